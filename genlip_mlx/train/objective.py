"""Next-token cross-entropy on label rows alone.

A vocabulary of 151936 makes logits the largest array of a training step by far. So only rows with a label get
any, and these in chunks, one after another. The loss is a sum, so the gradients of a chunk's rows and its share
of the head's can be had at once, while its logits are there (as Liger's fused linear cross-entropy does, arXiv
2410.10989): no logits wait for a backward pass, and memory stays at a chunk's, however many rows there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from ..data.packing import Pack
from ..model.exponential import exp
from ..model.genlip import GenLIP
from ..model.sequence import PackedSequence
from ..processing.processor import NO_LOSS

CHUNK_LOGITS = 2**25  # logits of a chunk: 128 MB in float32


@dataclass(frozen=True)
class Batch:
    """One pack as the model takes it."""

    patches: mx.array  # float32 [P, 3*p*p]
    input_ids: mx.array  # int32 [T]
    sequence: PackedSequence
    rows: mx.array  # int32 [labels]: which of the model's outputs [n + T] predict a label
    targets: mx.array  # int32 [labels]

    @classmethod
    def of(cls, pack: Pack, slack: float = 0.0) -> Batch:
        """Place a pack's arrays; row k of a sample (0 is its last image row) predicts text token k.

        Args:
            slack: see `PackedSequence`.
        """
        ends = np.cumsum(pack.text_lengths)
        # Each sample has one more row than tokens: the last one predicts nothing.
        labels = np.insert(pack.labels, ends, NO_LOSS)
        rows = np.flatnonzero(labels != NO_LOSS)
        return cls(
            mx.array(pack.patches),
            mx.array(pack.input_ids),
            PackedSequence(pack.grids, pack.text_lengths, slack),
            mx.array(rows.astype(np.int32)),
            mx.array(labels[rows].astype(np.int32)),
        )

    @cached_property
    def label_tokens(self) -> int:
        return self.targets.size


class Head(nn.Module):
    """The model's own head, alone, whatever its layers are: plain, quantized or adapted."""

    def __init__(self, model: GenLIP):
        super().__init__()
        self.lm_head = model.lm_head
        if "proj" in model:
            self.proj = model.proj

    def __call__(self, features: mx.array) -> mx.array:
        logits = self.lm_head(self.proj(features) if "proj" in self else features)
        return logits.astype(mx.float32)


def summed_loss(model: GenLIP, batch: Batch, checkpoint: bool = False, chunk_logits: int = CHUNK_LOGITS) -> mx.array:
    """Cross-entropy summed over a pack's label tokens, float32; divide by `batch.label_tokens` for the mean.

    In training mode the head's gradients are worked out along with the loss: call `model.eval()` where none are wanted.

    Args:
        checkpoint: compute the blocks' activations again in the backward pass.
        chunk_logits: how many logits exist at a time.
    """
    features = model.outputs(batch.patches, batch.input_ids, batch.sequence, checkpoint)[batch.rows]
    rows = max(1, chunk_logits // model.config.vocab_size)
    chunks = [slice(start, start + rows) for start in range(0, batch.label_tokens, rows)]
    head = Head(model)
    if model.training and chunks:
        return _with_gradients(head, batch.targets, chunks)(head.trainable_parameters(), features)
    total = mx.zeros(())
    for chunk in chunks:
        (part,) = mx.depends([features[chunk]], [total])  # one chunk at a time
        total = total + _cross_entropy(head(part), batch.targets[chunk])[0]
    return total


def _with_gradients(head: Head, targets: mx.array, chunks: list[slice]) -> Callable[[Any, mx.array], mx.array]:
    """A function of the head's parameters and the features, whose gradients are computed together with its value."""

    def surrogate(parameters: Any, features: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
        # Its gradient is the loss', and its value is never computed. One pass through the head serves both, since
        # a second one would draw another dropout.
        head.update(parameters)
        logits = head(features)
        loss, gradient = _cross_entropy(mx.stop_gradient(logits), targets)
        return (logits * gradient).sum(), loss

    differentiate = mx.value_and_grad(surrogate, argnums=(0, 1))

    @mx.custom_function
    def loss_and_gradients(parameters: Any, features: mx.array) -> tuple[mx.array, Any, mx.array]:
        total, by_parameters = mx.zeros(()), tree_map(lambda p: mx.zeros(p.shape), parameters)  # float32
        by_features: list[mx.array] = []
        for chunk in chunks:
            before: dict[str, mx.array] = {}
            tree_flatten(by_parameters, destination=before)
            (part,) = mx.depends([features[chunk]], [total, *before.values(), *by_features[-1:]])  # one at a time
            (_, loss), (more, by_part) = differentiate(parameters, part, targets[chunk])
            total, by_parameters = total + loss, tree_map(mx.add, by_parameters, more)
            by_features.append(by_part)
        head.update(parameters)
        return total, by_parameters, mx.concatenate(by_features)

    @loss_and_gradients.vjp
    def scaled(primals: Any, cotangents: Any, outputs: Any) -> Any:
        return tree_map(lambda p, gradient: (cotangents[0] * gradient).astype(p.dtype), primals, outputs[1:])

    return lambda parameters, features: cast(Any, loss_and_gradients(parameters, features))[0]


def _cross_entropy(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """The sum over rows of -log softmax(logits)[target], and its gradient [rows, V]; float32 logits.

    One exponential a logit serves both.
    """
    targets = targets[:, None]
    largest = logits.max(axis=-1, keepdims=True)
    shifted = logits - largest
    powers = exp(shifted)
    totals = powers.sum(axis=-1, keepdims=True)
    log_likelihood = mx.take_along_axis(logits, targets, axis=-1) - largest - mx.log(totals)
    gradient = mx.put_along_axis(powers / totals, targets, mx.exp(log_likelihood) - 1, axis=-1)
    return -log_likelihood.sum(), gradient
