"""A quantized student learns to answer as the full model does (distilled weight quantization, as in mlx-lm's DWQ).

The one idea: integers stay, and the scale and bias of every group are learned by gradient descent, from what the full
model says after each token and sees in each patch. No label is needed but to know where text is.

A student computes with its weights unpacked, W = scale * code + bias, in the graph: the function is that of
mx.quantized_matmul, whose gradients by scales and biases would take a matrix as large as W all the same. So one code
path serves every device, and a dense product is what CPUs are quick at. Blocks are recomputed in the backward
pass, which keeps one block's unpacked weights at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_unflatten

from ..checkpoint.quantization import Packing
from ..config import GenLIPConfig
from ..model.genlip import GenLIP
from .objective import CHUNK_LOGITS, Batch, Head

Parts = dict[str, mx.array]  # of a packed weight: weight, scales, biases

WARMUP = 0.05  # share of the steps
BETAS = [0.9, 0.95]


class DequantizedLinear(nn.QuantizedLinear):
    """A quantized layer that multiplies with its unpacked weight, and so has quick gradients by scales and biases."""

    def __call__(self, x: mx.array) -> mx.array:
        weight = mx.dequantize(self.weight, self.scales, self.biases, self.group_size, self.bits)
        return mx.addmm(self.bias, x, weight.T) if "bias" in self else x @ weight.T


def layer_at(module: nn.Module, path: str) -> Any:
    """The layer of a dotted path."""
    found: Any = module
    for name in path.split("."):
        found = found[int(name) if isinstance(found, list) else name]
    return found


def make_student(full: GenLIP, config: GenLIPConfig, packings: Mapping[str, Packing], dtype: mx.Dtype) -> GenLIP:
    """The full model with its packed layers plainly rounded; all else is shared. Scales and biases are trainable.

    Args:
        config: of the quantized model.
        packings: its packed layers, in affine mode.
        dtype: type that scales and biases are stored in; they have its values, in the full model's type.
    """
    student = GenLIP(config)
    student.update(full.parameters())
    layers = []
    for path, packing in packings.items():
        layer = layer_at(full, path)
        if isinstance(layer, nn.Embedding):
            packed = layer.to_quantized(packing.group_size, packing.bits)
        else:
            packed = DequantizedLinear.from_linear(layer, packing.group_size, packing.bits)
        for part in ("scales", "biases"):
            packed[part] = packed[part].astype(dtype).astype(layer.weight.dtype)
        mx.eval(packed.parameters())
        layers.append((path, packed))
    student.update_modules(tree_unflatten(layers))
    student.freeze()
    for _, packed in layers:
        packed.unfreeze(keys=["scales", "biases"], recurse=False)
    student.eval()
    return student


@dataclass(frozen=True)
class Rows:
    """What a model makes of a pack: `ln_post` features."""

    patches: mx.array  # [P, D], what an encoder's user gets
    text: mx.array  # [labels, D], what predicts the labels

    @classmethod
    def of(cls, model: GenLIP, batch: Batch, checkpoint: bool = False) -> Rows:
        """One pass through the model.

        Args:
            checkpoint: compute the blocks' activations again in the backward pass.
        """
        sequence = batch.sequence
        x = model.outputs(batch.patches, batch.input_ids, sequence, checkpoint, every_row=True)
        return cls(x[: sequence.num_image_rows], x[sequence.output_rows[batch.rows]])


def in_chunks(model: GenLIP, rows: int, value: Callable[[Head, slice], Callable[[mx.array], mx.array]]) -> Any:
    """A function of text rows that sums `value` over chunks of them, whose logits are computed again for gradients.

    Args:
        rows: how many there will be.
        value: given the model's head and a chunk, a function of the chunk's features.
    """
    head = Head(model)
    size = max(1, CHUNK_LOGITS // model.config.vocab_size)
    chunks = [slice(start, start + size) for start in range(0, rows, size)]

    def total(features: mx.array) -> mx.array:
        parts = [nn.utils.checkpoint(head, value(head, chunk))(features[chunk]) for chunk in chunks]
        return sum(parts, mx.zeros(()))

    return total


@dataclass(frozen=True)
class Divergence:
    """How far a student is from the full model."""

    kl: float  # nats a label token: KL(full || student) of the next token
    feature_error: float  # squared, relative to the feature's square, mean over patches

    @property
    def total(self) -> float:
        """What distillation minimises. Both parts are relative errors of second order, so neither drowns the other."""
        return self.kl + self.feature_error


def divergence(student: GenLIP, full: GenLIP, batches: Iterable[Batch]) -> Divergence:
    """Over all batches, each weighing what it holds."""
    kl = error = 0.0
    labels = patches = 0
    for batch in batches:
        sums = _sums(student, full, batch, Rows.of(full, batch))
        mx.eval(sums)
        kl, error = kl + cast(float, sums[0].item()), error + cast(float, sums[1].item())
        labels, patches = labels + batch.label_tokens, patches + batch.sequence.num_image_rows
    return Divergence(kl / labels, error / patches)


def _sums(
    student: GenLIP, full: GenLIP, batch: Batch, target: Rows, checkpoint: bool = False
) -> tuple[mx.array, mx.array]:
    """KL summed over label tokens, and relative squared error over patches; float32."""
    rows = Rows.of(student, batch, checkpoint)

    def value(head: Head, chunk: slice) -> Callable[[mx.array], mx.array]:
        def kl(features: mx.array) -> mx.array:
            expected, found = _log_softmax(Head(full)(target.text[chunk])), _log_softmax(head(features))
            return (mx.exp(expected) * (expected - found)).sum()

        return kl

    difference = (rows.patches - target.patches).astype(mx.float32)
    error = mx.square(difference).sum(-1) / mx.square(target.patches.astype(mx.float32)).sum(-1)
    return in_chunks(student, batch.label_tokens, value)(rows.text), error.sum()


def _log_softmax(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def distil(
    student: GenLIP,
    full: GenLIP,
    batches: Iterator[Batch],
    packings: Mapping[str, Packing],
    dtype: mx.Dtype,
    iters: int,
    learning_rate: float,
    report: Callable[[float, float], None] = lambda done, total: None,
) -> None:
    """Learn scales and biases of a student's packed layers, in place. Adam, warm-up, cosine to zero.

    What is learned of a group is how far its ends move, apart and together, in steps between two codes. So a learning
    rate means the same for every model and every number of bits.

    Args:
        batches: without end.
        dtype: type that scales and biases will be stored in; the student always computes with stored values.
        learning_rate: most that a group's ends move in an iteration, in steps between two codes, about.
        report: called with (done, total) iterations.
    """
    start = {path: layer_at(student, path) for path in packings}
    parts = {path: (layer.scales, layer.biases) for path, layer in start.items()}
    moves = {path: {k: mx.zeros(scales.shape) for k in ("apart", "along")} for path, (scales, _) in parts.items()}

    def moved(moves: Mapping[str, Mapping[str, mx.array]]) -> Any:
        layers = []
        for path, (scales, biases) in parts.items():
            apart, along = moves[path]["apart"], moves[path]["along"]
            # Around the middle of the codes, so that the two are independent of each other.
            new = scales * (1 + apart / (2 ** packings[path].bits - 1)), biases + scales * (along - apart / 2)
            layers += [
                (f"{path}.{part}", value.astype(dtype).astype(scales.dtype))
                for part, value in zip(("scales", "biases"), new)
            ]
        return tree_unflatten(layers)

    def loss(moves: Any, batch: Batch, target: Rows) -> mx.array:
        student.update(moved(moves))
        kl, error = _sums(student, full, batch, target, checkpoint=True)
        return kl / batch.label_tokens + error / batch.sequence.num_image_rows

    gradient = mx.value_and_grad(loss)
    optimizer = optim.Adam(learning_rate, betas=BETAS, bias_correction=True)
    optimizer.init(moves)
    for step in range(iters):
        batch = next(batches)
        target = Rows.of(full, batch)
        mx.eval(target.patches, target.text)
        _, gradients = gradient(moves, batch, target)
        warm = min(1.0, (step + 1) / max(1.0, WARMUP * iters))
        optimizer.learning_rate = mx.array(learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / iters)))
        moves = optimizer.apply_gradients(gradients, moves)
        mx.eval(moves, optimizer.state)
        report(step + 1, iters)
    student.update(moved(moves))
    mx.eval(student.parameters())


def packed_parts(student: GenLIP, packings: Mapping[str, Packing]) -> dict[str, Parts]:
    """The packed weights of a student as they are."""
    return {path: {part: layer_at(student, path)[part] for part in packing.parts} for path, packing in packings.items()}


def restore(student: GenLIP, parts: Mapping[str, Parts]) -> None:
    """Put packed weights back that `packed_parts` gave."""
    for path, saved in parts.items():
        layer_at(student, path).update(saved)
