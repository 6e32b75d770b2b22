"""Small models and packs of random numbers, and the plain model's view of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from model.dense import Dense

from genlip_mlx.config import GenLIPConfig
from genlip_mlx.model.genlip import GenLIP

Grid = tuple[int, int]


def small_config(head_dim: int = 8, num_heads: int = 2, **fields: Any) -> GenLIPConfig:
    """Two layers, patches of 2x2 pixels, 40 words."""
    defaults: dict[str, Any] = {
        "hidden_size": head_dim * num_heads,
        "num_attention_heads": num_heads,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "vocab_size": 40,
        "patch_size": 2,
        "mrope_section": (head_dim // 2 - 2 * (head_dim // 6), head_dim // 6, head_dim // 6),
    }
    return GenLIPConfig(**defaults | fields)


def random_model(config: GenLIPConfig, seed: int = 0) -> GenLIP:
    """Every parameter is random, norms, biases and LayerScale too: none may hide behind a 0 or a 1."""
    model = GenLIP(config)
    rng = np.random.default_rng(seed)
    weights = []
    for name, value in tree_flatten(model.parameters()):
        draw = rng.standard_normal(value.shape).astype(np.float32)
        if value.ndim == 2:
            draw *= 1.5 / value.shape[1] ** 0.5
        elif name.endswith("bias"):
            draw *= 0.3
        else:
            draw = 1 + 0.3 * draw
        weights.append((name, mx.array(draw)))
    model.load_weights(weights)
    model.eval()
    return model


def dense_of(model: GenLIP) -> Dense:
    return Dense(model.config, dict(tree_flatten(model.parameters())))


@dataclass(frozen=True)
class Pack:
    """Random pixels and words for samples of these sizes."""

    grids: list[Grid]
    text_lengths: list[int]
    patches: mx.array  # [P, 3*p*p]
    input_ids: mx.array  # int32 [T]

    def picture(self, sample: int) -> mx.array:
        sizes = [h * w for h, w in self.grids]
        start = sum(sizes[:sample])
        return self.patches[start : start + sizes[sample]]

    def text(self, sample: int) -> mx.array:
        start = sum(self.text_lengths[:sample])
        return self.input_ids[start : start + self.text_lengths[sample]]


def random_pack(config: GenLIPConfig, grids: Sequence[Grid], text_lengths: Sequence[int], seed: int = 0) -> Pack:
    rng = np.random.default_rng(seed)
    rows = sum(h * w for h, w in grids)
    return Pack(
        grids=list(grids),
        text_lengths=list(text_lengths),
        patches=mx.array(rng.standard_normal((rows, config.patch_dim)).astype(np.float32)),
        input_ids=mx.array(rng.integers(config.vocab_size, size=sum(text_lengths)).astype(np.int32)),
    )


def assert_close(ours: mx.array, expected: mx.array | np.ndarray, atol: float = 2e-5) -> None:
    """Equal up to float32 rounding, relative to the largest number."""
    ours, expected = np.asarray(ours), np.asarray(expected)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=atol * max(1.0, float(np.abs(expected).max(initial=0))))
