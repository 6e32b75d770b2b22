"""Gated prefix-LM attention.

`Attention` projects, rotates, gates; *what a row sees* is the business of a context:

- `PackedContext`: samples of different sizes packed into two streams; pictures alone are the
  same thing with no text.
- `CachedContext` (see `cache.py`): new text rows over the keys and values of what came before.

A context has four methods: `queried(x)` keeps the rows whose output is wanted, `rotate(x)`
applies MRoPE, `attend(q, k, v)` is softmax attention, and `drop_path` leaves a branch out for
some samples while training. All arrays are flat: [rows, H, d].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from ..config import GenLIPConfig
from .exponential import attention, sigmoid
from .rope import rotate
from .sequence import PackedSequence


class Context(Protocol):
    """What attention needs to know about its rows."""

    def queried(self, x: mx.array) -> mx.array: ...

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array: ...

    def rotate(self, x: mx.array, queries: bool = False) -> mx.array: ...

    def drop_path(self, branch: mx.array, number: int) -> mx.array: ...


def attend(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | str | None, scale: float) -> mx.array:
    """Softmax attention of [B, L, H, d] queries over [B, S, H, d] keys and values: [B, L, H, d]."""
    if queries.shape[1] == 0:  # a bucket of pictures without text
        return queries
    q, k, v = (x.swapaxes(1, 2) for x in (queries, keys, values))
    return attention(q, k, v, scale, mask).swapaxes(1, 2)


class PackedContext:
    """Exact prefix-LM attention within each sample of a pack.

    Image rows attend to their picture; text rows to their picture and the text so far.
    Nothing crosses samples, and the cost is each sample's own.

    Args:
        table: cos and sin of the rows, `Rope.table(sequence.positions)`; blocks share one.
        outputs_only: ask only for the rows that predict text (`PackedSequence.output_rows`):
            the last block of a captioner needs no others.
        observe: called with the rotated keys and the values [P + T, H, d] of each layer.
        kept: factors [2, n] of each sample's two branches, for drop path; None keeps all.
    """

    def __init__(
        self,
        sequence: PackedSequence,
        table: tuple[mx.array, mx.array],
        outputs_only: bool = False,
        observe: Callable[[mx.array, mx.array], None] | None = None,
        kept: mx.array | None = None,
    ):
        self.sequence = sequence
        self.observe = observe
        self.kept = kept
        self.cos, self.sin = table
        self.rows = sequence.output_rows if outputs_only else None

    def queried(self, x: mx.array) -> mx.array:
        return x if self.rows is None else x[self.rows]

    def rotate(self, x: mx.array, queries: bool = False) -> mx.array:
        if queries:
            return rotate(x, self.queried(self.cos), self.queried(self.sin))
        return rotate(x, self.cos, self.sin)

    def drop_path(self, branch: mx.array, number: int) -> mx.array:
        """The branch (0 attention, 1 feed-forward) [queried rows, D] times its sample's factor."""
        if self.kept is None:
            return branch
        factors = self.kept[number][self.queried(self.sequence.samples)]
        return branch * factors[:, None].astype(branch.dtype)

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """Attention of the queried rows [Q, H, d] over all rows [P + T, H, d]: [Q, H, d]."""
        if self.observe is not None:
            self.observe(keys, values)
        seq, scale = self.sequence, queries.shape[-1] ** -0.5
        border = [seq.num_image_rows]
        image_k, text_k = mx.split(keys, border)
        image_v, text_v = mx.split(values, border)
        # Keys and values of each bucket, image then text.
        ks, vs = seq.image.split(image_k), seq.image.split(image_v)
        prefix_ks, prefix_vs = ks, vs
        if seq.num_text_rows:
            prefix_ks = [mx.concatenate([i, t], axis=1) for i, t in zip(ks, seq.text.split(text_k))]
            prefix_vs = [mx.concatenate([i, t], axis=1) for i, t in zip(vs, seq.text.split(text_v))]
        if self.rows is not None:
            qs = seq.output.split(queries)
            return seq.output.join(
                [attend(q, k, v, m, scale) for q, k, v, m in zip(qs, prefix_ks, prefix_vs, seq.output_masks)]
            )
        image_q, text_q = mx.split(queries, border)
        qs = seq.image.split(image_q)
        out = seq.image.join([attend(q, k, v, m, scale) for q, k, v, m in zip(qs, ks, vs, seq.image_masks)])
        if not seq.num_text_rows:
            return out
        qs = seq.text.split(text_q)
        text = [attend(q, k, v, m, scale) for q, k, v, m in zip(qs, prefix_ks, prefix_vs, seq.text_masks)]
        return mx.concatenate([out, seq.text.join(text)])


class Attention(nn.Module):
    """Multi-head attention whose output is multiplied by a sigmoid gate (section 3.2 of the paper).

    The first D outputs of `q_proj` are queries, the last D gate scores; without a gate it has D.
    """

    def __init__(self, config: GenLIPConfig):
        super().__init__()
        dim = config.hidden_size
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.gated = config.gated_attention
        self.q_proj = nn.Linear(dim, 2 * dim if self.gated else dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def query_and_gate(self, x: mx.array) -> tuple[mx.array, mx.array | None]:
        """[rows, D] -> queries [rows, D] before rotation; and what the gate lets through, 0 to 1, of the same shape."""
        q = self.q_proj(x)
        if not self.gated:
            return q, None
        q, gate = mx.split(q, 2, axis=-1)
        return q, sigmoid(gate)

    def __call__(self, x: mx.array, context: Context) -> mx.array:
        """[rows, D] -> [queried rows, D]."""
        q, gate = self.query_and_gate(context.queried(x))
        q, k, v = (y.reshape(-1, self.num_heads, self.head_dim) for y in (q, self.k_proj(x), self.v_proj(x)))
        out = context.attend(context.rotate(q, queries=True), context.rotate(k), v).flatten(1)
        if gate is not None:
            out = out * gate
        return self.out_proj(out)
