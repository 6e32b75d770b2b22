"""What a changed model lost against the one it was made from: a quantized one against the full one, as a rule.

The one idea: both models see the same packs and the same pictures in turn, so that every difference is theirs, and
their speeds are measured under the same conditions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..checkpoint.hub import resolve
from ..checkpoint.reading import open_checkpoint
from ..config import estimate_parameters
from ..data.pipeline import Pipeline
from ..data.sources import Source
from ..generate import Caption, Speaker
from ..model.genlip import GenLIP, VisionOnlyError
from ..processing.processor import Processor
from ..processing.reader import read_images
from ..train.objective import Batch
from .evaluation import BATCH_SIZE, BATCH_TOKENS, MAX_TOKENS, Question, Report, by_prompt, finite, perplexity, questions

CAPTIONS = 50  # pictures captioned by both models
CHUNK_LOGITS = 2**24  # logits of each model in memory at a time: 64 MB in float32

_REMEDY = "compare a model with the one it was made from"


class ComparisonError(ValueError):
    """Two models whose outputs cannot be held against each other."""


@dataclass(frozen=True)
class Side:
    """One of the two models on its own."""

    nll: float  # mean per label token
    weight_bytes: int  # in memory
    bits_per_weight: float  # weight_bytes over the parameters of the architecture
    encode_tokens_per_second: float | None  # image tokens to features
    caption_tokens_per_second: float | None  # generated tokens, reading the picture included; None without captions


@dataclass(frozen=True)
class Comparison:
    """A model held against the full one. Means are over all label tokens, all patches, all captions."""

    model: Side
    full: Side
    kl: float  # nats per label token: KL(full || model) of the distributions of the next token
    top_token_agreement: float  # share of label tokens where both find the same token likeliest
    feature_cosine: float  # mean over patches of the cosine between the two features
    worst_feature_cosine: float  # of the patch where it is lowest
    captions: int  # pictures captioned by both, greedily
    captions_identical: float | None  # share of them; None without captions
    captions_leading: float | None  # tokens before the first different one, as a share of the longer caption; mean
    label_tokens: int
    samples: int
    skipped: Mapping[str, int]  # records that could not be used, by reason

    @property
    def nll_difference(self) -> float:
        """What the change costs, in nats per label token."""
        return self.model.nll - self.full.nll

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `nll` and `perplexity` are the model's, as in `Evaluation.to_dict`, and `sides` has both."""
        facts = asdict(self)
        sides = {name: facts.pop(name) for name in ("model", "full")}
        own = {"nll": self.model.nll, "perplexity": perplexity(self.model.nll), "nll_difference": self.nll_difference}
        return own | facts | {"sides": sides}


def compare(
    model: GenLIP,
    full: GenLIP,
    processor: Processor,
    source: Source,
    *,
    captions: int = CAPTIONS,
    max_tokens: int = MAX_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
    log: Callable[[str], None] | None = None,
    report: Report = lambda done, total: None,
) -> Comparison:
    """Hold a model against the full one on a data set.

    Args:
        model: the changed model.
        full: what it was made from.
        processor: of both; `check_processors` tells whether they may share one.
        source: pictures with captions.
        captions: pictures that both models caption greedily, from the start of the data set; 0 for none.
        max_tokens: of a caption.
        batch_tokens: image and text tokens that go through a model together.
        log: called with one line for each of the first skipped records of a kind.
        report: called with (done, total) records and pictures.

    Raises:
        ComparisonError: if the models differ in vocabulary or feature size.
        EvaluationError: if the loss of one is not finite.
        VisionOnlyError: if one has no text side.
        DataError: if no record can be used.
    """
    _check_models(model, full)
    models = (model, full)
    asked = questions(source, processor, captions) if captions else []
    total = len(source) + len(asked)
    sums = np.zeros(4)
    label_tokens, patches, cosine, worst = 0, 0, 0.0, math.inf
    encoding = (_Speed(), _Speed())
    with Pipeline(source, processor, batch_tokens, workers=0, shuffle=False, epochs=1, log=log) as packs:
        for number, pack in enumerate(packs):
            batch = Batch.of(pack)
            if batch.label_tokens:
                cosines = _cosines(*_encode(models, batch, encoding, number))
                patches, cosine = patches + len(cosines), cosine + float(cosines.sum())
                worst = min(worst, float(cosines.min()))
                sums += _token_sums(model, full, batch)
                label_tokens += batch.label_tokens
            stats = packs.stats
            report(stats.samples + sum(stats.skipped.values()), total)
        stats = packs.stats
    nll, full_nll, kl, agreement = (sums / label_tokens).tolist()
    captioning = (_Speed(), _Speed())
    pairs: list[tuple[Caption, Caption]] = []
    for pair in _caption(models, processor, source, asked, max_tokens, captioning):
        pairs.append(pair)
        report(len(source) + len(pairs), total)
    return Comparison(
        model=_side(model, finite(nll, source), encoding[0], captioning[0]),
        full=_side(full, finite(full_nll, source), encoding[1], captioning[1]),
        kl=kl,
        top_token_agreement=agreement,
        feature_cosine=cosine / patches,
        worst_feature_cosine=worst,
        captions=len(pairs),
        captions_identical=_mean([ours.tokens == theirs.tokens for ours, theirs in pairs]),
        captions_leading=_mean([_leading(ours.tokens, theirs.tokens) for ours, theirs in pairs]),
        label_tokens=label_tokens,
        samples=stats.samples,
        skipped=stats.skipped,
    )


def check_processors(processor: Processor, full: Processor) -> None:
    """Two models can be compared if files become the same numbers for both.

    Raises:
        ComparisonError: if they read text or pictures in different ways.
    """
    ours, theirs = processor.tokenizer, full.tokenizer
    if ours is not None and theirs is not None:
        if ours.vocab_size != theirs.vocab_size:
            raise ComparisonError(
                f"the tokenizers differ: vocabularies of {ours.vocab_size} and {theirs.vocab_size} tokens; {_REMEDY}"
            )
        for token in range(ours.vocab_size):
            name, other = ours.token_name(token), theirs.token_name(token)
            if name != other:
                raise ComparisonError(f"the tokenizers differ: token {token} is {name!r} and {other!r}; {_REMEDY}")
    if processor.image_processor != full.image_processor:
        raise ComparisonError(f"the models read pictures in different ways or sizes; {_REMEDY}")


def disk_bytes(path_or_repo: str | Path, revision: str | None = None) -> int:
    """What the weights of a model folder or hub repo take on disk; what else lies there does not count.

    Raises:
        CheckpointError, ConfigError, HubError: as `load`.
    """
    return sum(tensor.nbytes for tensor in open_checkpoint(resolve(path_or_repo, revision)).tensors.values())


def _check_models(model: GenLIP, full: GenLIP) -> None:
    if model.config.vision_only or full.config.vision_only:
        raise VisionOnlyError
    for name in ("vocab_size", "hidden_size", "patch_size"):
        ours, theirs = getattr(model.config, name), getattr(full.config, name)
        if ours != theirs:
            raise ComparisonError(f"{name} is {ours} in one model and {theirs} in the other; {_REMEDY}")


@dataclass
class _Speed:
    """What one model has done, and in what time."""

    tokens: int = 0
    seconds: float = 0.0

    def add(self, tokens: int, started: float) -> None:
        self.tokens += tokens
        self.seconds += time.perf_counter() - started

    def per_second(self) -> float | None:
        return self.tokens / self.seconds if self.tokens else None


def _turns(number: int) -> tuple[int, int]:
    """Which of the two models goes first: each every other time."""
    return (0, 1) if number % 2 == 0 else (1, 0)


def _encode(models: Sequence[GenLIP], batch: Batch, speeds: Sequence[_Speed], number: int) -> list[mx.array]:
    """Both models' features [P, D] of a pack's pictures."""
    grids = batch.sequence.grids
    mx.eval(batch.patches)
    if number == 0:  # a model's first call is slower than the others
        mx.eval([model.encode(batch.patches, grids) for model in models])
    features: dict[int, mx.array] = {}
    for turn in _turns(number):
        started = time.perf_counter()
        features[turn] = models[turn].encode(batch.patches, grids)
        mx.eval(features[turn])
        speeds[turn].add(len(batch.patches), started)
    return [features[0], features[1]]


def _cosines(ours: mx.array, theirs: mx.array) -> np.ndarray:
    """Of each patch's two features: [P, D] and [P, D] -> [P]."""
    ours, theirs = ours.astype(mx.float32), theirs.astype(mx.float32)
    norms = mx.linalg.norm(ours, axis=-1) * mx.linalg.norm(theirs, axis=-1)
    return np.array((ours * theirs).sum(axis=-1) / norms).astype(np.float64)


def _token_sums(model: GenLIP, full: GenLIP, batch: Batch) -> np.ndarray:
    """Loss, full model's loss, KL(full || model) and equal likeliest tokens, summed over a pack's label tokens."""
    features = [one.outputs(batch.patches, batch.input_ids, batch.sequence)[batch.rows] for one in (model, full)]
    mx.eval(features)
    chunk = max(1, CHUNK_LOGITS // model.config.vocab_size)
    sums = np.zeros(4)
    for start in range(0, batch.label_tokens, chunk):
        rows = slice(start, start + chunk)
        targets = batch.targets[rows, None]
        ours, theirs = (_log_probabilities(one, part[rows]) for one, part in zip((model, full), features))
        values = mx.stack(
            [
                -mx.take_along_axis(ours, targets, axis=-1).sum(),
                -mx.take_along_axis(theirs, targets, axis=-1).sum(),
                (mx.exp(theirs) * (theirs - ours)).sum(),
                (ours.argmax(axis=-1) == theirs.argmax(axis=-1)).sum().astype(mx.float32),
            ]
        )
        sums += np.array(values).astype(np.float64)
    return sums


def _log_probabilities(model: GenLIP, features: mx.array) -> mx.array:
    """Of the next token: [rows, D] -> float32 [rows, V]."""
    logits = model.logits(features).astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _caption(
    models: Sequence[GenLIP],
    processor: Processor,
    source: Source,
    asked: Sequence[Question],
    max_tokens: int,
    speeds: Sequence[_Speed],
) -> Iterator[tuple[Caption, Caption]]:
    """Both models' greedy captions; pictures that cannot be read are left out."""
    number = 0
    for prompt, group in by_prompt(asked):
        speakers = [Speaker(model, processor, prompt, max_tokens) for model in models]
        readings = read_images(processor.image_processor, (source[question.record].image for question in group))
        while batch := list(islice(readings, BATCH_SIZE)):
            good = [reading for reading in batch if reading.error is None]
            if not good:
                continue
            if number == 0:  # as in `_encode`
                for model in models:
                    Speaker(model, processor, prompt, max_tokens=2).speak(good)
            said: dict[int, list[Caption]] = {}
            for turn in _turns(number):
                started = time.perf_counter()
                said[turn] = speakers[turn].speak(good)
                # With the end token, which takes as long as any other.
                speeds[turn].add(sum(len(one.tokens) + (one.finish_reason == "stop") for one in said[turn]), started)
            number += 1
            yield from zip(said[0], said[1])


def _leading(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """Tokens before the first different one, as a share of the longer text."""
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
    longer = max(len(ours), len(theirs))
    return same / longer if longer else 1.0


def _mean(shares: Sequence[float]) -> float | None:
    return sum(shares) / len(shares) if shares else None


def _side(model: GenLIP, nll: float, encoding: _Speed, captioning: _Speed) -> Side:
    weights: dict[str, mx.array] = {}
    tree_flatten(model.parameters(), destination=weights)
    nbytes = sum(weight.nbytes for weight in weights.values())
    bits = 8 * nbytes / sum(estimate_parameters(model.config).values())
    return Side(nll, nbytes, bits, encoding.per_second(), captioning.per_second())
