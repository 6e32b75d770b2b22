"""The Transformer block and its parts; one `Block` serves training, encoding and decoding."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from ..config import GenLIPConfig
from .attention import Attention, Context
from .exponential import silu

ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "silu": silu,
    "gelu": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "relu": nn.relu,
}


class MLP(nn.Module):
    """fc2(act(gate_fc(x)) * fc1(x)) with SwiGLU (arXiv 2002.05202), fc2(act(fc1(x))) without."""

    def __init__(self, config: GenLIPConfig):
        super().__init__()
        self.act = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        if config.use_swiglu_ffn:
            self.gate_fc = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        """[rows, D] -> [rows, D]."""
        if "gate_fc" in self:
            return self.fc2(self.act(self.gate_fc(x)) * self.fc1(x))
        return self.fc2(self.act(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor for each channel of a branch (arXiv 2103.17239)."""

    def __init__(self, dim: int, init_value: float):
        super().__init__()
        self.lambda1 = mx.full((dim,), init_value)

    def __call__(self, x: mx.array) -> mx.array:
        return x * self.lambda1


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with LayerScale and drop path.

    With a context that asks for few rows (`Context.queried`), all rows give keys and values
    and only those go on.
    """

    def __init__(self, config: GenLIPConfig):
        super().__init__()
        dim = config.hidden_size
        self.layer_norm1 = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.scaled = config.use_layer_scale
        if self.scaled:
            self.layer_scale1 = LayerScale(dim, config.ls_init_value)
            self.layer_scale2 = LayerScale(dim, config.ls_init_value)

    def __call__(self, x: mx.array, context: Context) -> mx.array:
        """[rows, D] -> [queried rows, D]."""
        branch = self.self_attn(self.layer_norm1(x), context)
        if self.scaled:
            branch = self.layer_scale1(branch)
        x = context.queried(x) + context.drop_path(branch, 0)
        branch = self.mlp(self.layer_norm2(x))
        if self.scaled:
            branch = self.layer_scale2(branch)
        return x + context.drop_path(branch, 1)
