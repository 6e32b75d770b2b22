"""GenLIP the plain way: one interleaved sequence, an explicit L x L mask, explicit positions.

Written from the description of the method alone and sharing nothing with `genlip_mlx.model`, so
that the two can be held against each other. Everything is spelled out and slow. It is MLX, so that
`mx.grad` goes through it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from genlip_mlx.config import GenLIPConfig

Weights = dict[str, mx.array]


class Row(NamedTuple):
    """One token of the interleaved sequence."""

    sample: int
    is_text: bool
    index: int  # in its picture or text
    position: tuple[int, int, int]  # t, h, w


def interleave(grids: Sequence[tuple[int, int]], text_lengths: Sequence[int]) -> list[Row]:
    """Sample after sample, each its picture and then its text."""
    rows = []
    for sample, ((height, width), length) in enumerate(zip(grids, text_lengths)):
        for r in range(height):
            for c in range(width):
                rows.append(Row(sample, False, r * width + c, (0, r, c)))
        start = max(height, width)
        for j in range(length):
            rows.append(Row(sample, True, j, (start + j, start + j, start + j)))
    return rows


def sees(query: Row, key: Row) -> bool:
    """The prefix-LM mask."""
    if query.sample != key.sample:
        return False
    if not query.is_text:
        return not key.is_text
    return not key.is_text or key.index <= query.index


def frequency_axis(i: int, config: GenLIPConfig) -> int:
    """Which of t, h, w (0, 1, 2) rotary frequency `i` follows."""
    t, h, w = config.mrope_section
    if config.mrope_interleaved:
        if i in range(1, 3 * h, 3):
            return 1
        return 2 if i in range(2, 3 * w, 3) else 0
    if i < t:
        return 0
    return 1 if i < t + h else 2


def angles(rows: Sequence[Row], config: GenLIPConfig) -> list[list[float]]:
    """Rotary angles [L][d], in double precision: those of the d/2 frequencies, twice."""
    head_dim = config.hidden_size // config.num_attention_heads
    table = []
    for row in rows:
        half = []
        for i in range(head_dim // 2):
            half.append(row.position[frequency_axis(i, config)] * config.rope_theta ** (-2 * i / head_dim))
        table.append(half + half)
    return table


def activation(name: str, x: mx.array) -> mx.array:
    if name == "silu":
        return x / (1 + mx.exp(-x))
    if name == "gelu":
        return x * (1 + mx.erf(x / math.sqrt(2))) / 2
    if name == "gelu_pytorch_tanh":
        return x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    assert name == "relu"
    return mx.where(x > 0, x, 0)


@dataclass(frozen=True)
class Dense:
    """The model as a function of its weights, named as published.

    Args:
        weights: flat; the patch kernel [D, 3*p*p] or [D, 3, p, p].
    """

    config: GenLIPConfig
    weights: Weights

    def linear(self, name: str, x: mx.array) -> mx.array:
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def layer_norm(self, name: str, x: mx.array) -> mx.array:
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = (centred * centred).mean(axis=-1, keepdims=True)
        normal = centred / mx.sqrt(variance + self.config.layer_norm_eps)
        return normal * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def attention(self, name: str, x: mx.array, mask: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        """x [L, D], mask [L, L], cos and sin [L, d] -> [L, D], head after head."""
        dim = self.config.hidden_size
        head_dim = dim // self.config.num_attention_heads
        queries = self.linear(f"{name}.q_proj", x)
        keys, values = self.linear(f"{name}.k_proj", x), self.linear(f"{name}.v_proj", x)
        heads = []
        for start in range(0, dim, head_dim):
            q, k, v = (y[:, start : start + head_dim] for y in (queries, keys, values))
            q, k = (y * cos + half_turn(y) * sin for y in (q, k))
            scores = mx.where(mask, q @ k.T / math.sqrt(head_dim), -mx.inf)
            out = mx.softmax(scores, axis=-1) @ v
            if self.config.gated_attention:
                gate = queries[:, dim + start : dim + start + head_dim]
                out = out / (1 + mx.exp(-gate))
            heads.append(out)
        return self.linear(f"{name}.out_proj", mx.concatenate(heads, axis=-1))

    def feed_forward(self, name: str, x: mx.array) -> mx.array:
        up = self.linear(f"{name}.fc1", x)
        if self.config.use_swiglu_ffn:
            return self.linear(
                f"{name}.fc2", activation(self.config.hidden_act, self.linear(f"{name}.gate_fc", x)) * up
            )
        return self.linear(f"{name}.fc2", activation(self.config.hidden_act, up))

    def states(self, rows: Sequence[Row], patches: mx.array, input_ids: mx.array) -> list[mx.array]:
        """The embeddings and every block's output, [L, D] each.

        Args:
            rows: the sequence, from `interleave`.
            patches: [P, 3*p*p], pictures one after another.
            input_ids: int [T], texts one after another.
        """
        kernel = self.weights["vision_embeddings.patch_embedding.weight"].reshape(self.config.hidden_size, -1)
        image = patches @ kernel.T + self.weights["vision_embeddings.patch_embedding.bias"]
        text = self.weights["embeddings.weight"][input_ids]
        if "in_proj.weight" in self.weights:
            text = self.linear("in_proj", text)
        stream, taken = [], [0, 0]
        for row in rows:
            stream.append((text if row.is_text else image)[taken[row.is_text]])
            taken[row.is_text] += 1
        x = mx.stack(stream)
        turns = mx.array(angles(rows, self.config))
        cos, sin = mx.cos(turns), mx.sin(turns)
        mask = mx.array([[sees(query, key) for key in rows] for query in rows])
        states = [x]
        for i in range(self.config.num_hidden_layers):
            layer = f"visual.layers.{i}"
            branch = self.attention(f"{layer}.self_attn", self.layer_norm(f"{layer}.layer_norm1", x), mask, cos, sin)
            x = x + branch * self.weights.get(f"{layer}.layer_scale1.lambda1", 1)
            branch = self.feed_forward(f"{layer}.mlp", self.layer_norm(f"{layer}.layer_norm2", x))
            x = x + branch * self.weights.get(f"{layer}.layer_scale2.lambda1", 1)
            states.append(x)
        return states

    def features(self, state: mx.array) -> mx.array:
        return self.layer_norm("ln_post", state)

    def logits(self, state: mx.array) -> mx.array:
        """Scores of the vocabulary for states of the last block: [..., D] -> [..., V]."""
        x = self.features(state)
        return self.linear("lm_head", self.linear("proj", x) if "proj.weight" in self.weights else x)


def half_turn(x: mx.array) -> mx.array:
    """[-x2, x1] of the halves x1, x2."""
    half = x.shape[-1] // 2
    return mx.concatenate([-x[:, half:], x[:, :half]], axis=-1)


def image_rows(rows: Sequence[Row]) -> mx.array:
    """Where in the sequence the image tokens stand, picture after picture."""
    return mx.array([i for i, row in enumerate(rows) if not row.is_text])


def predicting_rows(rows: Sequence[Row]) -> mx.array:
    """Where in the sequence text is predicted: each picture's last token and all text."""
    return mx.array(
        [
            i
            for i, row in enumerate(rows)
            if row.is_text or i + 1 == len(rows) or rows[i + 1].is_text or rows[i + 1].sample != row.sample
        ]
    )
