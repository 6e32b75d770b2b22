"""AdamW, its learning rate over time, and clipping: section 4.1 of the paper. Muon for those who have few steps."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

from .recipe import Recipe


class Muon(optim.Muon):
    """Muon with the decoupled weight decay and the scale of arXiv 2502.16982: AdamW's learning rates serve it too.

    An orthogonalised update of an m x n matrix has elements of RMS 1 / sqrt(max(m, n)); AdamW's have about 0.2.
    """

    def __init__(self, learning_rate: float, weight_decay: float):
        super().__init__(learning_rate, weight_decay=0.0)
        self.decay = weight_decay

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> mx.array:
        rows, columns = parameter.shape
        update = super().apply_single(gradient, mx.zeros_like(parameter), state)  # MLX scales tall matrices itself
        scale = 0.2 * math.sqrt(max(rows, columns) / max(1.0, rows / columns))
        return parameter * (1 - self.learning_rate * self.decay) + scale * update


def orthogonalized(path: str, parameter: mx.array) -> bool:
    """Is this one of the parameters that Muon is for: the blocks' matrices?"""
    return path.startswith("visual.layers.") and parameter.ndim == 2


def make_optimizer(recipe: Recipe) -> optim.Optimizer:
    """AdamW (arXiv 1711.05101) with bias correction, decaying every parameter; or Muon, and AdamW for the rest."""
    adamw = optim.AdamW(
        learning_rate=recipe.learning_rate,
        betas=[recipe.adam_beta1, recipe.adam_beta2],
        eps=recipe.adam_eps,
        weight_decay=recipe.weight_decay,
        bias_correction=True,
    )
    if recipe.optimizer == "adamw":
        return adamw
    return optim.MultiOptimizer([Muon(recipe.learning_rate, recipe.weight_decay), adamw], [orthogonalized])


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
