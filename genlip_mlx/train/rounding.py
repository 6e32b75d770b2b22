"""Rounding weights so that a layer's outputs stay, rather than the weights themselves (GPTQ, arXiv 2210.17323).

The one idea: inputs of a layer are correlated, so what one rounded weight adds to an output, weights that are not
rounded yet can take away again. Layers go one after another, each seeing its inputs as the rounded layers before it
give them, and so making up for their error too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from ..checkpoint.quantization import Packing, pack_codes
from ..model.attention import PackedContext
from ..model.blocks import Block
from ..model.genlip import GenLIP
from ..model.rope import Rope
from .distillation import Parts, layer_at
from .objective import Batch

DAMPING = 0.01  # added to the diagonal of the inputs' second moment, as a share of its mean
CHUNK_WEIGHTS = 2**24  # weights that are rounded at a time: 64 MB in float32

# Layers of a block that read the same input, in the order of the forward pass.
_STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.out_proj",),
    ("mlp.fc1", "mlp.gate_fc"),
    ("mlp.fc2",),
)

Report = Callable[[float, float], None]


def round_layers(
    student: GenLIP,
    full: GenLIP,
    batches: Sequence[Batch],
    packings: Mapping[str, Packing],
    dtype: mx.Dtype,
    report: Report = lambda done, total: None,
) -> None:
    """Round the layers of a student anew, in place: all but the text embedding, whose rows no product adds up.

    The inputs of one block are in memory at a time, for all batches.

    Args:
        student: of `distillation.make_student`.
        full: what it is made from.
        batches: what the layers' inputs are measured on.
        packings: how each layer is packed.
        dtype: type that scales and biases are stored in.
        report: called with (done, total) blocks.
    """

    def put(path: str, moment: mx.array) -> None:
        parts = round_weight(layer_at(full, path).weight, moment, packings[path], dtype)
        layer_at(student, path).update(parts)

    if "in_proj" in packings:
        tokens = [student.embeddings(batch.input_ids) for batch in batches]
        put("in_proj", _second_moment(tokens))
    contexts = [PackedContext(batch.sequence, Rope(full.config).table(batch.sequence.positions)) for batch in batches]
    states = [student.embed(batch.patches, batch.input_ids, batch.sequence) for batch in batches]
    mx.eval(states)
    blocks = list(zip(student.visual.layers, full.visual.layers))
    for number, (block, original) in enumerate(blocks):
        prefix = f"visual.layers.{number}."
        _round_block(
            block, original, states, contexts, {n: p for n, p in packings.items() if n.startswith(prefix)}, put
        )
        for i, context in enumerate(contexts):
            states[i] = block(states[i], context)
            mx.eval(states[i])
        report(number + 1, len(blocks))
    features = [student.ln_post(x[b.sequence.output_rows[b.rows]]) for x, b in zip(states, batches)]
    if "proj" in packings:
        put("proj", _second_moment(features))
    if "lm_head" in packings:
        put("lm_head", _second_moment([student.proj(x) if "proj" in student else x for x in features]))


def _round_block(
    block: Block,
    original: Block,
    states: Sequence[mx.array],
    contexts: Sequence[PackedContext],
    packings: Mapping[str, Packing],
    put: Callable[[str, mx.array], None],
) -> None:
    """One block, stage by stage; stages to come compute with the original weights."""
    paths = {path.split(".", 3)[3]: path for path in packings}
    rounded = {name: layer_at(block, name) for name in paths}
    _replace(block, {name: layer_at(original, name) for name in paths})
    for stage in _STAGES:
        names = [name for name in stage if name in paths]
        if not names:
            continue
        listener = _Listener(layer_at(original, names[0]))
        _replace(block, {names[0]: listener})
        for x, context in zip(states, contexts):
            mx.eval(block(x, context), listener.moment)
        _replace(block, {name: rounded[name] for name in names})
        for name in names:
            put(paths[name], listener.moment)


def _replace(module: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    module.update_modules(tree_unflatten(list(layers.items())))


class _Listener(nn.Module):
    """A layer that adds up x^T x over the rows x it is given."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.moment = mx.zeros(())

    def __call__(self, x: mx.array) -> mx.array:
        self.moment = self.moment + _second_moment([x])
        return self.layer(x)


def _second_moment(rows: Sequence[mx.array]) -> mx.array:
    """Sum of x^T x over the rows of arrays [rows, K]: float32 [K, K]."""
    return sum((x.T @ x for x in (x.astype(mx.float32) for x in rows)), mx.zeros(()))


def round_weight(weight: mx.array, second_moment: mx.array, packing: Packing, dtype: mx.Dtype) -> Parts:
    """A weight whose packed form gives about the same products with the inputs measured.

    Scales and biases of a group are those of plain rounding, for the weights as they stand when its turn comes.

    Args:
        weight: [outputs, inputs].
        second_moment: x^T x of the inputs, [inputs, inputs].
        packing: affine.
        dtype: type that scales and biases are stored in; the codes are chosen for the stored values.

    Returns:
        weight, scales, biases, as mx.quantize gives them; scales and biases in the type of `weight`.
    """
    inverse = _inverse_factor(second_moment)
    rows = max(1, CHUNK_WEIGHTS // weight.shape[1])
    chunks = [_round_rows(weight[i : i + rows], inverse, packing, dtype) for i in range(0, weight.shape[0], rows)]
    return {part: mx.concatenate([chunk[part] for chunk in chunks]) for part in packing.parts}


def _inverse_factor(second_moment: mx.array) -> mx.array:
    """U [K, K], upper triangular, with U^T U the inverse of the damped second moment.

    In float64, on the CPU: the only part of the method where float32 would not do.
    """
    moment = np.array(second_moment, dtype=np.float64)
    moment[np.diag_indices_from(moment)] += DAMPING * np.mean(np.diag(moment)) + np.finfo(np.float32).tiny
    return mx.array(np.linalg.cholesky(np.linalg.inv(moment)).T.astype(np.float32))


def _round_rows(weight: mx.array, inverse: mx.array, packing: Packing, dtype: mx.Dtype) -> Parts:
    rest, size, largest = weight.astype(mx.float32), packing.group_size, 2**packing.bits - 1
    codes, scales, biases = [], [], []
    for start in range(0, weight.shape[1], size):
        group, rest = rest[:, :size], rest[:, size:]
        _, scale, bias = (x.astype(dtype).astype(mx.float32) for x in mx.quantize(group, size, packing.bits))
        factor = inverse[start : start + size]  # of the group's own columns and those after it
        errors = []
        for column in range(size):
            number = start + column
            value = group[:, column : column + 1]
            code = mx.clip(mx.round((value - bias) / scale), 0, largest)
            error = (value - (code * scale + bias)) / factor[column, number]
            group = group - error * factor[column, start : start + size]
            codes.append(code)
            errors.append(error)
        rest = rest - mx.concatenate(errors, axis=1) @ factor[:, start + size :]
        scales.append(scale)
        biases.append(bias)
        mx.eval(rest, scale, bias, *codes[-size:])  # a group at a time, or the graph would hold every column's
    packed = pack_codes(np.array(mx.concatenate(codes, axis=1)), packing.bits)
    together = [mx.concatenate(part, axis=1).astype(weight.dtype) for part in (scales, biases)]
    return {"weight": mx.array(packed), "scales": together[0], "biases": together[1]}
