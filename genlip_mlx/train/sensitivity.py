"""Which layers need their bits: what rounding each one costs, and the choice of bits that a budget allows.

The one idea: near the full model, what a small change of the weights costs (KL of the next token, squared error of
features) is a quadratic form, the Fisher information. Rounding errors are as good as independent, so its diagonal is
enough, and that is a mean of squared gradients: of tokens drawn from the model's own predictions, and of
features along random directions. One backward pass a pack so prices every layer at every number of bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..checkpoint.quantization import Packing
from ..model.genlip import GenLIP
from .distillation import Rows, in_chunks, layer_at
from .objective import Batch, Head

BITS = (3, 4, 5, 6, 8)  # to choose from; 2 ruin words that the calibration data does not happen to hold

Costs = dict[str, dict[Packing, float]]


def rounding_costs(
    full: GenLIP,
    batches: Sequence[Batch],
    choices: Mapping[str, Sequence[Packing]],
    seed: int = 0,
    report: Callable[[float, float], None] = lambda done, total: None,
) -> Costs:
    """What rounding one layer plainly and nothing else adds to KL plus relative squared error of features, about.

    Gradients of all weights are in memory at a time: as much again as the model in the type it computes in.

    Args:
        full: the unquantized model.
        batches: what to measure on.
        choices: packings to price, by layer.
        seed: of the tokens and directions drawn.
        report: called with (done, total) batches.
    """
    model = GenLIP(full.config)  # shares the weights, but not the places where gradients are traced
    model.update(full.parameters())
    model.eval()
    model.freeze()
    for path in choices:
        layer_at(model, path).unfreeze(keys=["weight"], recurse=False)
    gradient = nn.value_and_grad(model, _score)
    costs: Costs = {path: dict.fromkeys(packings, 0.0) for path, packings in choices.items()}
    key = mx.random.key(seed)
    for done, batch in enumerate(batches, 1):
        key, draw = mx.random.split(key)
        _, gradients = gradient(model, batch, draw)
        flat: dict[str, mx.array] = {}
        tree_flatten(gradients, destination=flat)
        del gradients
        for path, packings in choices.items():
            squares = mx.square(flat.pop(f"{path}.weight").astype(mx.float32))
            weight = layer_at(full, path).weight
            for packing in packings:
                cost = (squares * mx.square(_rounding_error(weight, packing))).sum(axis=-1).sum()
                costs[path][packing] += cast(float, cost.item()) / len(batches)
        report(done, len(batches))
    return costs


def _rounding_error(weight: mx.array, packing: Packing) -> mx.array:
    size, bits = packing.group_size, packing.bits
    rounded = mx.dequantize(*mx.quantize(weight, size, bits), group_size=size, bits=bits)
    return rounded.astype(mx.float32) - weight.astype(mx.float32)


def _score(model: GenLIP, batch: Batch, key: mx.array) -> mx.array:
    """A random number whose squared gradient has the Fisher information of both parts of the cost as its mean.

    For a token drawn from the prediction, half the mean square of the gradient of its log-probability is the KL of a
    small change; for a direction drawn from a normal distribution, the mean square of the gradient of
    the feature along it is the feature's squared change. Draws are independent, so a pack's may be added up.
    """
    rows = Rows.of(model, batch, checkpoint=True)
    token_key, direction_key = mx.random.split(key)
    tokens = mx.random.split(token_key, batch.label_tokens)

    def value(head: Head, chunk: slice) -> Callable[[mx.array], mx.array]:
        def log_probability(features: mx.array) -> mx.array:
            logits = head(features)
            gumbel = mx.vmap(lambda k: mx.random.gumbel((logits.shape[-1],), key=k))(tokens[chunk])
            drawn = mx.argmax(mx.stop_gradient(logits) + gumbel, axis=-1, keepdims=True)
            return (mx.take_along_axis(logits, drawn, -1)[:, 0] - mx.logsumexp(logits, -1)).sum()

        return log_probability

    spoken = in_chunks(model, batch.label_tokens, value)(rows.text)
    patches = rows.patches.astype(mx.float32)
    direction = mx.random.normal(patches.shape, key=direction_key)
    length = mx.sqrt(mx.square(mx.stop_gradient(patches)).sum(-1, keepdims=True))
    seen = (patches * direction / length).sum()
    return spoken * (0.5 / batch.label_tokens) ** 0.5 + seen * (1 / patches.shape[0]) ** 0.5


def spend(costs: Costs, nbytes: Callable[[str, Packing], int], budget: int) -> dict[str, Packing]:
    """The packings of least cost in all that fit a budget: the best buy first, from the fewest bits on.

    Args:
        costs: of each layer's packings.
        nbytes: of a layer so packed.
        budget: bytes for all layers; enough for the fewest bits.
    """
    ladder = {path: sorted(own, key=lambda packing: packing.bits) for path, own in costs.items()}
    chosen = {path: packings[0] for path, packings in ladder.items()}
    room = budget - sum(nbytes(path, packing) for path, packing in chosen.items())
    while True:
        best: tuple[float, str, Packing] | None = None
        for path, now in chosen.items():
            for packing in ladder[path][ladder[path].index(now) + 1 :]:
                more = nbytes(path, packing) - nbytes(path, now)
                worth = (costs[path][now] - costs[path][packing]) / more
                if more <= room and (best is None or worth > best[0]):
                    best = worth, path, packing
        if best is None:
            return chosen
        _, path, packing = best
        room -= nbytes(path, packing) - nbytes(path, chosen[path])
        chosen[path] = packing
