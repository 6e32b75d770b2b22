"""AdamW, its learning rate over time, and clipping: section 4.1 of the paper."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

from .recipe import Recipe


def make_optimizer(recipe: Recipe) -> optim.AdamW:
    """AdamW (arXiv 1711.05101) with bias correction, decaying every parameter."""
    return optim.AdamW(
        learning_rate=recipe.learning_rate,
        betas=[recipe.adam_beta1, recipe.adam_beta2],
        eps=recipe.adam_eps,
        weight_decay=recipe.weight_decay,
        bias_correction=True,
    )


def learning_rate(recipe: Recipe, step: int) -> float:
    """The rate of a step, counted from 1: linear warm-up from 0, then a cosine down to the minimum, or constant."""
    warmup = round(recipe.warmup * recipe.iters)
    if step <= warmup:
        return recipe.learning_rate * step / warmup
    if recipe.lr_schedule == "constant":
        return recipe.learning_rate
    done = (step - warmup) / max(1, recipe.iters - warmup)
    span = recipe.learning_rate - recipe.min_learning_rate
    return recipe.min_learning_rate + span * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def global_norm(gradients: Any) -> mx.array:
    """The norm of all gradients together, float32.

    Rows are summed first: one flat float32 sum over a large matrix loses digits on MLX's CPU back end.
    """
    flat: dict[str, mx.array] = {}
    tree_flatten(gradients, destination=flat)
    squares = [_square_sum(gradient) for gradient in flat.values()]
    return mx.sqrt(mx.stack(squares).sum())


def _square_sum(x: mx.array) -> mx.array:
    squares = mx.square(x.astype(mx.float32))
    while squares.ndim:
        squares = squares.sum(axis=-1)
    return squares


def clip(gradients: Any, norm: mx.array, limit: float) -> Any:
    """Scale gradients so that their norm is at most `limit` (as torch.nn.utils.clip_grad_norm_)."""
    scale = mx.minimum(1.0, limit / (norm + 1e-6))
    return tree_map(lambda gradient: gradient * scale.astype(gradient.dtype), gradients)
