"""Next-token cross-entropy on label rows alone.

A vocabulary of 151936 makes logits the largest array of a training step by far. So only rows with a label get
any, and these in chunks whose logits are computed again in the backward pass: memory
stays at one chunk's, however many rows there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..data.packing import Pack
from ..model.genlip import GenLIP
from ..model.sequence import PackedSequence
from ..processing.processor import NO_LOSS

CHUNK_LOGITS = 2**26  # logits in memory at a time: 256 MB in float32


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


class _Head(nn.Module):
    """The model's own head, alone: so that recomputing it differentiates no other parameter."""

    def __init__(self, model: GenLIP):
        super().__init__()
        self.lm_head = model.lm_head
        if "proj" in model:
            self.proj = model.proj

    def __call__(self, features: mx.array, targets: mx.array) -> mx.array:
        logits = self.lm_head(self.proj(features) if "proj" in self else features)
        return nn.losses.cross_entropy(logits.astype(mx.float32), targets, reduction="sum")


def summed_loss(model: GenLIP, batch: Batch, checkpoint: bool = False, chunk_logits: int = CHUNK_LOGITS) -> mx.array:
    """Cross-entropy summed over a pack's label tokens, float32; divide by `batch.label_tokens` for the mean.

    Args:
        checkpoint: compute the blocks' activations again in the backward pass.
        chunk_logits: how many logits exist at a time.
    """
    features = model.outputs(batch.patches, batch.input_ids, batch.sequence, checkpoint)[batch.rows]
    chunk = max(1, chunk_logits // model.config.vocab_size)
    head = _Head(model)
    if batch.label_tokens <= chunk:
        return head(features, batch.targets)
    total = mx.zeros(())
    for start in range(0, batch.label_tokens, chunk):
        # An argument of a checkpointed function is differentiated, which targets cannot be: they are bound here.
        part = partial(head, targets=batch.targets[start : start + chunk])
        total = total + nn.utils.checkpoint(head, part)(features[start : start + chunk])
    return total
