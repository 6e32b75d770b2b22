"""Keys and values of a batch of captions in the making.

All sequences of a batch end in the same column, so that a new token is one write at one
place; what is shorter is padded on the left and masked. A batch of equal sizes needs no mask.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial

import mlx.core as mx
import numpy as np

from ..config import GenLIPConfig
from .exponential import attention
from .rope import Rope, rotate
from .sequence import Grid, text_start

GROWTH = 256  # columns a cache grows by, as mlx-lm's: few different buffer sizes
FUSED_DECODE_DIMS = (64, 96, 128)  # head dims that Metal's fused attention serves for 8 queries or fewer


def cache_head_dim(head_dim: int) -> int:
    """The width keys and values are stored at: zero-padded to what Metal's decoding kernel serves.

    Zeros add nothing to a score, and the padded outputs are cut off, so the result is the same.
    """
    return next((fused for fused in FUSED_DECODE_DIMS if fused >= head_dim), head_dim)


def _widen(x: mx.array, width: int) -> mx.array:
    return x if x.shape[-1] == width else mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])


class Cache:
    """Keys and values of every layer for B sequences, and where each one stands.

    Args:
        grids: (h, w) of each sequence's picture. The cache holds no rows yet; `add_images`
            fills one layer after the other.
    """

    def __init__(self, config: GenLIPConfig, grids: Seq[Grid]):
        self.head_dim = config.head_dim
        self.rope = Rope(config)
        self.layers: list[tuple[mx.array, mx.array]] = []  # keys, values: [B, H, capacity, width]
        lengths = np.array([h * w for h, w in grids])
        self.length = int(lengths.max())  # columns in use
        self.padding = mx.array(self.length - lengths)  # columns on the left that hold nothing, [B]
        self.padded = bool(np.any(lengths != self.length))
        self.next_position = mx.array([text_start(grid) for grid in grids])  # of the next token, [B]
        column = np.arange(self.length)
        starts = np.cumsum(lengths) - lengths
        rows = np.maximum(column - (self.length - lengths)[:, None], 0) + starts[:, None]
        self._image_rows = mx.array(rows.astype(np.int32))  # stream row of each column, [B, length]

    @property
    def batch_size(self) -> int:
        return self.next_position.shape[0]

    def add_images(self, keys: mx.array, values: mx.array) -> None:
        """The next layer's image keys (rotated) and values [P, H, d], pictures one after another."""
        width = cache_head_dim(self.head_dim)
        room = -self.length % GROWTH or GROWTH

        def place(x: mx.array) -> mx.array:
            x = x[self._image_rows] if self.padded else x.reshape(self.batch_size, self.length, *x.shape[1:])
            return mx.pad(_widen(x, width).swapaxes(1, 2), [(0, 0), (0, 0), (0, room), (0, 0)])

        self.layers.append((place(keys), place(values)))

    def extend(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write [B, H, L, width] after the columns in use; returns all [B, H, length + L, width].

        `advance` then counts the new columns, once for all layers.
        """
        old_keys, old_values = self.layers[layer]
        end = self.length + keys.shape[2]
        if end > old_keys.shape[2]:
            room = -(-(end - old_keys.shape[2]) // GROWTH) * GROWTH
            grow = [(0, 0), (0, 0), (0, room), (0, 0)]
            old_keys, old_values = mx.pad(old_keys, grow), mx.pad(old_values, grow)
        old_keys[:, :, self.length : end] = keys
        old_values[:, :, self.length : end] = values
        self.layers[layer] = (old_keys, old_values)
        return old_keys[:, :, :end], old_values[:, :, :end]

    def advance(self, tokens: int) -> None:
        self.length += tokens
        self.next_position = self.next_position + tokens

    def keep(self, rows: Seq[int]) -> None:
        """Go on with these sequences only; the others are finished."""
        index = mx.array(list(rows))
        self.layers = [(keys[index], values[index]) for keys, values in self.layers]
        self.padding, self.next_position = self.padding[index], self.next_position[index]

    def contexts(self, tokens: int) -> list[CachedContext]:
        """One context a layer for the next `tokens` text rows of every sequence."""
        shape = (self.batch_size, tokens)
        positions = (self.next_position[:, None] + mx.arange(tokens)).reshape(-1, 1)
        table = self.rope.table(mx.broadcast_to(positions, (positions.shape[0], 3)))
        mask: mx.array | str | None = "causal" if tokens > 1 else None
        if self.padded:
            column = mx.arange(self.length + tokens)
            row = mx.arange(self.length, self.length + tokens)
            mask = (column >= self.padding[:, None])[:, None, None] & (column <= row[:, None])
        return [CachedContext(partial(self.extend, i), shape, table, mask) for i in range(len(self.layers))]


class CachedContext:
    """The next text rows of each sequence, over everything before them and themselves.

    Args:
        extend: given the rows' keys and values [B, H, L, width], those of all columns that they may see.
        shape: (B, L).
    """

    def __init__(
        self,
        extend: Callable[[mx.array, mx.array], tuple[mx.array, mx.array]],
        shape: tuple[int, int],
        table: tuple[mx.array, mx.array],
        mask: mx.array | str | None,
    ):
        self.extend, self.shape, self.mask = extend, shape, mask
        self.cos, self.sin = table

    def queried(self, x: mx.array) -> mx.array:
        return x

    def rotate(self, x: mx.array, queries: bool = False) -> mx.array:
        return rotate(x, self.cos, self.sin)

    def drop_path(self, branch: mx.array, number: int) -> mx.array:
        return branch

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """[B * L, H, d] each -> [B * L, H, d]."""
        head_dim = queries.shape[-1]
        width = cache_head_dim(head_dim)
        q, k, v = (_widen(x.reshape(*self.shape, *x.shape[1:]).swapaxes(1, 2), width) for x in (queries, keys, values))
        k, v = self.extend(k, v)
        out = attention(q, k, v, head_dim**-0.5, self.mask)
        return out[..., :head_dim].swapaxes(1, 2).reshape(-1, *queries.shape[1:])
