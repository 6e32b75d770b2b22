"""MRoPE: rotary position embedding over three axes, time, row and column.

A head's d/2 frequencies are shared out among the axes; a token at (t, h, w) turns each pair of
numbers by its axis' position times the frequency (Qwen2-VL's M-RoPE; interleaved as in Qwen3-VL).
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
import numpy as np

from ..config import GenLIPConfig

AXES = 3  # t, h, w


@lru_cache(maxsize=16)
def frequency_axes(half_dim: int, section: tuple[int, int, int], interleaved: bool) -> tuple[int, ...]:
    """The axis (0 t, 1 h, 2 w) that each of the `half_dim` frequencies follows.

    Interleaved: every third frequency goes to h (from 1) and to w (from 2), `section[1]` and
    `section[2]` of them at most; the rest stay with t. Otherwise: one run of frequencies an axis.
    """
    if not interleaved:
        return tuple(axis for axis, count in enumerate(section) for _ in range(count))
    axes = [0] * half_dim
    for axis in (1, 2):
        for i in range(axis, min(AXES * section[axis], half_dim), AXES):
            axes[i] = axis
    return tuple(axes)


class Rope:
    """cos and sin of a model's rotary angles."""

    def __init__(self, config: GenLIPConfig):
        half = config.head_dim // 2
        self.inv_freq = mx.array(config.rope_theta ** (-np.arange(half) / half), dtype=mx.float32)  # [d/2]
        self.axes = mx.array(frequency_axes(half, config.mrope_section, config.mrope_interleaved))  # [d/2]

    def table(self, positions: mx.array) -> tuple[mx.array, mx.array]:
        """cos, sin: float32 [N, 1, d/2] for integer positions [N, 3]; the 1 spans the heads."""
        angles = mx.take(positions, self.axes, axis=1).astype(mx.float32) * self.inv_freq
        return mx.cos(angles)[:, None], mx.sin(angles)[:, None]


def rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Turn the pairs (x[i], x[i + d/2]) of x [N, H, d]; float32 inside, the dtype of x outside."""
    first, second = mx.split(x, 2, axis=-1)
    turned = mx.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
