"""How good frozen features are: small classifiers trained on them, and what they reach on pictures not seen.

- linear: a linear layer on the mean over patches;
- attentive: one learned query attends to the patches (softmax over keys, values averaged), then a linear layer;
- to segment: a linear layer on each patch, which speaks for all pixels of the patch.

The one idea: probes with different learning rates share everything but their weights, so a sweep trains them at
once, as one more axis of every product. Layer, learning rate and step are chosen on the validation split; the
test split is looked at once, by the probe that was chosen.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import mlx.core as mx
import numpy as np

from ..features import layer_numbers
from ..model.genlip import GenLIP
from ..processing.processor import Processor
from .feature_cache import CACHE, Encoder, ModelEncoder, PixelEncoder, Store, build, random_model
from .labelled import IGNORED, LabelledError, LabelledSet

LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
STEPS = 500
EVALUATIONS = 10  # times that the validation split is looked at in a training
BATCH = {"classify": 128, "segment": 16}  # pictures
WEIGHT_DECAY = 0.01
PADDING = 64  # pictures of unlike sizes are filled up to a multiple of so many patches
RESAMPLES = 1000  # of the bootstrap
_BETAS, _EPS = (0.9, 0.999), 1e-8

Weights = dict[str, mx.array]
Whitening = tuple[mx.array, mx.array]  # of features x: mean [D] and W [D, D] of (x - mean) W
Progress = Callable[[str, int, int], None]  # what, done, of how many


@dataclass(frozen=True)
class Trial:
    """One trained probe of a sweep, at the step where it did best on the validation split."""

    layer: str
    learning_rate: float
    step: int
    validation: float


@dataclass(frozen=True)
class ProbeResult:
    """A kind of probe on one kind of features.

    `test` is accuracy, or mean IoU over pixels; `interval` holds 95 % (Wilson's for accuracy; for mean IoU, a
    bootstrap over pictures). `chosen` did best on the validation split among `sweep`.
    """

    features: str
    probe: str
    chosen: Trial
    test: float
    interval: tuple[float, float]
    sweep: tuple[Trial, ...]


@dataclass(frozen=True)
class ProbeReport:
    """All results on one labelled set."""

    classes: tuple[str, ...]
    pictures: dict[str, int]  # used, by split
    skipped: tuple[str, ...]  # why others were not
    cached_bytes: int
    results: tuple[ProbeResult, ...]


def probe(
    model: GenLIP,
    processor: Processor,
    data: LabelledSet,
    *,
    layers: Literal["last", "all"] | Sequence[int] | None = None,
    size: int | Literal["native"] | None = None,
    baselines: bool = False,
    cache: str = CACHE,
    steps: int = STEPS,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> ProbeReport:
    """Train and test probes on a model's features.

    Args:
        layers: hidden states to try beside the `ln_post` output: none ("last"), "all", or numbers; by default those
            after half and after three quarters of the blocks.
        size: None as the model's processor says, pixels a side, or "native".
        baselines: probe a random-weight model of the same shape, and raw pixels, too. The linear probe on pixels
            sees the whole picture at 32 x 32, the attentive one its patches.
        cache: folder of cached features.
        steps: of training, at each layer.
        seed: of weights, batches and the random model.

    Raises:
        CacheError: if the disk has no room for the features.
        LabelledError: if a split has no picture that can be used.
        ValueError: if a layer does not exist, or the size is no multiple of the patch.
    """
    depth = model.config.num_hidden_layers
    chosen = layer_numbers([depth // 2, depth * 3 // 4] if layers is None else layers, depth)
    chosen = list(dict.fromkeys(chosen))
    encoders: list[Encoder] = [ModelEncoder("model", model, processor, chosen, size)]
    if baselines:
        untrained = random_model(model.config, model.ln_post.weight.dtype, seed)
        encoders.append(ModelEncoder("random weights", untrained, processor, chosen, size))
        encoders.append(PixelEncoder(processor.image_processor, size, model.config.num_attention_heads))
    results: list[ProbeResult] = []
    cached_bytes = 0
    for encoder in encoders:
        stores = {}
        for split, pictures in data.splits.items():
            what = f"encoding {split} pictures: {encoder.name}"
            stores[split] = build(encoder, pictures, cache, partial(progress, what))
        cached_bytes += sum(store.nbytes for store in stores.values())
        if encoder is encoders[0]:
            used = {split: len(store) for split, store in stores.items()}
            skipped = tuple(message for store in stores.values() for message in store.skipped)
        labels = {split: data.splits[split].labels[store.rows] for split, store in stores.items()}
        for kind in ("linear", "attentive") if data.task == "classify" else ("linear",):
            results.append(_sweep(data, encoder, kind, stores, labels, steps, seed, progress))
    classes = data.classes or tuple(map(str, range(_mask_classes(stores))))
    return ProbeReport(classes, used, skipped, cached_bytes, tuple(results))


def _sweep(
    data: LabelledSet,
    encoder: Encoder,
    kind: str,
    stores: dict[str, Store],
    labels: dict[str, np.ndarray],
    steps: int,
    seed: int,
    progress: Progress,
) -> ProbeResult:
    segment = data.task == "segment"
    outputs = len(data.classes) or _mask_classes(stores)
    if segment and outputs < _mask_classes(stores):
        raise LabelledError(
            f"{data.name}: a mask holds class {_mask_classes(stores) - 1}, and classes.txt names 0 to {outputs - 1}"
        )
    trials: list[Trial] = []
    best: tuple[float, Weights, Task] | None = None
    for layer in encoder.layers:
        tasks = _tasks(kind, segment, stores, labels, layer, outputs, encoder.num_heads)

        advance = partial(progress, f"{kind} probe on {encoder.name}, layer {layer}")
        found = _train(tasks["train"], tasks["validation"], BATCH[data.task], steps, seed, advance)
        for rate, (step, score, weights) in zip(LEARNING_RATES, found):
            trials.append(Trial(layer, rate, step, score))
            if best is None or score > best[0]:
                best, chosen = (score, weights, tasks["test"]), trials[-1]
    assert best is not None
    _, weights, test = best
    records = test.records(weights, BATCH[data.task])[0]
    interval = _bootstrap(records, seed) if segment else wilson(int(records[:, 0].sum()), len(records))
    return ProbeResult(encoder.name, kind, chosen, test.score(records), interval, tuple(trials))


def _mask_classes(stores: dict[str, Store]) -> int:
    return max(store.num_classes() for store in stores.values())


# --- Three tasks: what a probe sees, what it computes, what it is held against ---


class Task(ABC):
    """A probe on one split and layer; R learning rates at once, C outputs.

    Inputs are whitened by the training split's mean and covariance, so that layers of any scale suit the same learning
    rates. Of a transformer's features a few directions have nearly all of the variance; an optimizer would spend its
    steps on these, and not on what tells classes apart.
    """

    def __init__(self, store: Store, layer: str, outputs: int, whitening: Whitening) -> None:
        self._store, self._layer, self.outputs = store, layer, outputs
        self._mean, self._matrix = whitening
        self.width = len(self._mean)

    def __len__(self) -> int:
        return len(self._store)

    def start(self, key: mx.array) -> Weights:
        """First weights of one probe: the classifier at zero."""
        return {"weight": mx.zeros((self.width, self.outputs)), "bias": mx.zeros((1, self.outputs))}

    @abstractmethod
    def inputs(self, rows: np.ndarray) -> tuple[mx.array, ...]:
        """What `logits` takes for some pictures."""

    def logits(self, weights: Weights, *inputs: mx.array) -> mx.array:
        """[R, n, C]."""
        return inputs[0] @ weights["weight"] + weights["bias"]

    @abstractmethod
    def targets(self, rows: np.ndarray) -> mx.array:
        """What `loss` holds logits against."""

    @abstractmethod
    def loss(self, logits: mx.array, targets: mx.array) -> mx.array:
        """Cross-entropy, the mean of a batch, added up over learning rates, which do not touch one another."""

    @abstractmethod
    def judge(self, logits: mx.array, rows: np.ndarray) -> np.ndarray:
        """What a score is made of: [R, pictures, K]."""

    @abstractmethod
    def score(self, records: np.ndarray) -> float:
        """Of [pictures, K]."""

    def records(self, weights: Weights, batch: int) -> np.ndarray:
        """[R, pictures, K] of the whole split."""
        parts = []
        for start in range(0, len(self), batch):
            rows = np.arange(start, min(start + batch, len(self)))
            parts.append(self.judge(self.logits(weights, *self.inputs(rows)), rows))
        return np.concatenate(parts, axis=1)

    def _white(self, values: np.ndarray) -> mx.array:
        return (mx.array(values.astype(np.float32)) - self._mean) @ self._matrix


def _whitening(mean: np.ndarray, covariance: np.ndarray, pictures: int) -> Whitening:
    """What gives features about unit variance in every direction, float32.

    Directions with less of the variance than one picture's share stay small: so few pictures do not show them well,
    and a probe would learn noise from them.
    """
    variances, directions = np.linalg.eigh(covariance)
    share = max(float(variances.sum()) / pictures, 1e-12)  # zero if all features are constant
    matrix = directions / np.sqrt(np.maximum(variances, 0) + share)
    return mx.array(mean.astype(np.float32)), mx.array(matrix.astype(np.float32))


class LinearTask(Task):
    """Classify by a linear layer on pooled features."""

    def __init__(self, store: Store, labels: np.ndarray, layer: str, outputs: int, whitening: Whitening) -> None:
        super().__init__(store, layer, outputs, whitening)
        self._labels = labels.astype(np.int32)
        self._pooled = store.pooled(layer)

    def inputs(self, rows: np.ndarray) -> tuple[mx.array, ...]:
        return (self._white(self._pooled[rows]),)

    def targets(self, rows: np.ndarray) -> mx.array:
        return mx.array(self._labels[rows])

    def loss(self, logits: mx.array, targets: mx.array) -> mx.array:
        picked = mx.take_along_axis(logits, targets[None, :, None], axis=-1)[..., 0]
        return (mx.logsumexp(logits, axis=-1) - picked).mean(axis=1).sum()

    def judge(self, logits: mx.array, rows: np.ndarray) -> np.ndarray:
        right: np.ndarray = np.array(logits.argmax(axis=-1))[..., None] == self._labels[rows][:, None]
        return right

    def score(self, records: np.ndarray) -> float:
        return float(records.mean())


class AttentiveTask(LinearTask):
    """Classify by cross-attention of one learned query over the patches, then a linear layer.

    With one query, its product with all keys is one vector a head times the patches, and values may be projected
    after they are averaged: the same function as projecting every patch, at a fraction of its cost.
    """

    def __init__(
        self,
        store: Store,
        labels: np.ndarray,
        layer: str,
        outputs: int,
        whitening: Whitening,
        num_heads: int,
    ) -> None:
        Task.__init__(self, store, layer, outputs, whitening)
        self._labels, self._heads = labels.astype(np.int32), num_heads
        self._shared = int(store.lengths.max()) if len(set(store.lengths.tolist())) == 1 else None

    def start(self, key: mx.array) -> Weights:
        dim, heads = self.width, self._heads
        keys = mx.random.split(key, 3)
        shape, spread = (heads, dim // heads, dim), dim**-0.5
        return super().start(key) | {
            "query": 0.02 * mx.random.normal((heads, 1, dim // heads), key=keys[0]),
            "key": spread * mx.random.normal(shape, key=keys[1]),
            "value": spread * mx.random.normal(shape, key=keys[2]),
        }

    def inputs(self, rows: np.ndarray) -> tuple[mx.array, ...]:
        lengths = self._store.lengths[rows]
        longest = self._shared or -(-int(lengths.max()) // PADDING) * PADDING
        patches = np.zeros((len(rows), longest, self.width), np.float32)
        for out, row, length in zip(patches, rows, lengths):
            out[:length] = self._store.tokens(self._layer, int(row))
        absent = np.arange(longest) >= lengths[:, None]
        return self._white(patches), mx.array(np.where(absent, np.float32(-np.inf), np.float32(0)))

    def logits(self, weights: Weights, *inputs: mx.array) -> mx.array:
        patches, mask = inputs  # [B, P, D], [B, P]
        batch, _, dim = patches.shape
        rates, heads = weights["query"].shape[:2]
        asked = (weights["query"] @ weights["key"]).reshape(rates * heads, dim)  # [R*H, D]
        scores = (patches @ asked.T) * (dim // heads) ** -0.5 + mask[..., None]  # [B, P, R*H]
        attention = mx.softmax(scores, axis=1).swapaxes(1, 2)  # [B, R*H, P]
        seen = (attention @ patches).reshape(batch, rates, heads, dim).transpose(1, 2, 0, 3)  # [R, H, B, D]
        values = seen @ weights["value"].swapaxes(2, 3)  # [R, H, B, d]
        pooled = values.swapaxes(1, 2).reshape(rates, batch, dim)
        return super().logits(weights, pooled)


class SegmentTask(Task):
    """Name each patch's pixels by a linear layer on the patch."""

    def inputs(self, rows: np.ndarray) -> tuple[mx.array, ...]:
        tokens = [self._store.tokens(self._layer, int(row)) for row in rows]
        return (self._white(np.concatenate(tokens)),)

    def _counts(self, rows: np.ndarray) -> np.ndarray:
        """Pixels of each class in each patch of some pictures, float32 [n, C]."""
        pixels = np.concatenate([self._store.pixels(int(row)) for row in rows]).astype(np.int64)
        slots = pixels + (IGNORED + 1) * np.arange(len(pixels))[:, None]
        counts = np.bincount(slots.ravel(), minlength=(IGNORED + 1) * len(pixels)).reshape(len(pixels), -1)
        return counts[:, : self.outputs].astype(np.float32)

    def targets(self, rows: np.ndarray) -> mx.array:
        return mx.array(self._counts(rows))

    def loss(self, logits: mx.array, targets: mx.array) -> mx.array:
        # The mean over pixels, of which a patch's share one prediction.
        scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return -(scores * targets).sum() / mx.maximum(targets.sum(), 1)

    def judge(self, logits: mx.array, rows: np.ndarray) -> np.ndarray:
        """Of each picture, pixels rightly named, and pixels that are or are named so: [R, pictures, 2C]."""
        counts = self._counts(rows)
        edges = np.cumsum([0, *self._store.lengths[rows]])[:-1]
        named = np.eye(self.outputs, dtype=np.float32)[np.array(logits.argmax(axis=-1))]  # [R, n, C]
        right = named * counts
        union = named * counts.sum(-1, keepdims=True) + counts - right
        return np.add.reduceat(np.concatenate([right, union], axis=-1), edges, axis=1)

    def score(self, records: np.ndarray) -> float:
        """Mean IoU over the classes that occur or are named."""
        return _mean_iou(records.sum(axis=0, dtype=np.float64))


def _mean_iou(sums: np.ndarray) -> float:
    right, union = np.split(sums, 2)
    return float((right[union > 0] / union[union > 0]).mean()) if union.any() else math.nan


def _tasks(
    kind: str,
    segment: bool,
    stores: dict[str, Store],
    labels: dict[str, np.ndarray],
    layer: str,
    outputs: int,
    num_heads: int,
) -> dict[str, Task]:
    train = stores["train"]
    if not segment and kind == "linear":
        pooled = train.pooled(layer)
        whitening = _whitening(pooled.mean(axis=0), np.cov(pooled, rowvar=False, bias=True), len(train))
        return {split: LinearTask(store, labels[split], layer, outputs, whitening) for split, store in stores.items()}
    whitening = _whitening(*train.moments(layer), len(train))
    if segment:
        return {split: SegmentTask(store, layer, outputs, whitening) for split, store in stores.items()}
    return {
        split: AttentiveTask(store, labels[split], layer, outputs, whitening, num_heads)
        for split, store in stores.items()
    }


# --- Training ---


def _train(
    train: Task, validation: Task, batch: int, steps: int, seed: int, advance: Callable[[int, int], None]
) -> list[tuple[int, float, Weights]]:
    """Train a probe at every learning rate: the best step of each, its validation score, and its weights (R = 1).

    AdamW (arXiv 1711.05101) with a cosine down to zero.
    """
    rates = len(LEARNING_RATES)
    first = train.start(mx.random.key(seed))
    weights = {name: mx.repeat(value[None], rates, axis=0) for name, value in first.items()}
    means = {name: mx.zeros_like(value) for name, value in weights.items()}
    squares = dict(means)
    gradient = mx.value_and_grad(lambda w, inputs, targets: train.loss(train.logits(w, *inputs), targets))
    best: list[tuple[int, float, Weights]] = []
    looks = {math.ceil(steps * look / EVALUATIONS) for look in range(1, EVALUATIONS + 1)}
    for step, rows in zip(range(1, steps + 1), _batches(len(train), batch, seed)):
        _, gradients = gradient(weights, train.inputs(rows), train.targets(rows))
        falling = mx.array(LEARNING_RATES) * (0.5 * (1 + math.cos(math.pi * (step - 1) / steps)))
        for name, g in gradients.items():
            means[name] = _BETAS[0] * means[name] + (1 - _BETAS[0]) * g
            squares[name] = _BETAS[1] * squares[name] + (1 - _BETAS[1]) * g * g
            mean, square = means[name] / (1 - _BETAS[0] ** step), squares[name] / (1 - _BETAS[1] ** step)
            rate = falling.reshape(-1, *[1] * (g.ndim - 1))
            weights[name] = weights[name] - rate * (mean / (mx.sqrt(square) + _EPS) + WEIGHT_DECAY * weights[name])
        mx.eval(weights, means, squares)
        if step in looks:
            scores = [validation.score(records) for records in validation.records(weights, batch)]
            now = [(step, score, {n: w[i : i + 1] for n, w in weights.items()}) for i, score in enumerate(scores)]
            best = [new if new[1] > old[1] else old for old, new in zip(best, now)] if best else now
        advance(step, steps)
    return best


def _batches(number: int, batch: int, seed: int) -> Iterator[np.ndarray]:
    """Shuffled pictures, again and again; sorted inside a batch, as they lie on disk."""
    rng = np.random.default_rng(seed)
    batch = min(batch, number)
    while True:
        order = rng.permutation(number)
        for start in range(0, number - batch + 1, batch):
            yield np.sort(order[start : start + batch])


# --- Confidence ---


def wilson(right: int, number: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share (J. Am. Stat. Assoc. 22, 1927); z of 1.96 for 95 %."""
    share, n = right / number, number
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def _bootstrap(records: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % of the mean IoU when the test pictures are drawn anew, with replacement."""
    rng = np.random.default_rng(seed)
    number = len(records)
    weights = (rng.multinomial(number, np.full(number, 1 / number)) for _ in range(RESAMPLES))
    found = np.sort([_mean_iou(times @ records.astype(np.float64)) for times in weights])
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)
