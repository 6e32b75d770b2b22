"""The trainer: packs in, a better model out. Every stage and kind of training is this loop.

Weights and optimiser are float32; the forward pass sees them cast to the computing dtype. A step's gradient is
the sum over its packs, and over the machines, divided by all their label tokens: however the tokens were packed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from ..data.packing import Pack
from ..model.genlip import GenLIP
from .objective import Batch, summed_loss
from .optimizer import clip, global_norm, learning_rate, make_optimizer
from .recipe import Recipe

MAX_BAD_STEPS = 10  # non-finite losses in a row that stop a run


class DivergedError(ValueError):
    """The loss was not finite for too many steps in a row."""


def number(scalar: mx.array) -> float:
    return cast(float, scalar.item())


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step did, over all machines."""

    step: int  # from 1
    loss: float  # mean over label tokens, before the step
    lr: float
    grad_norm: float  # before clipping
    tokens: int  # image and text
    label_tokens: int
    skipped: bool  # the loss or a gradient was not finite: nothing was changed


class Trainer:
    """A model with its optimiser.

    Args:
        model: float32 weights; what `trainable_parameters` names is trained.
        recipe: of the run.
        dtype: of the computation.
    """

    def __init__(self, model: GenLIP, recipe: Recipe, dtype: mx.Dtype = mx.float32):
        self.model, self.recipe, self.dtype = model, recipe, dtype
        self.optimizer = make_optimizer(recipe)
        self.optimizer.init(model.trainable_parameters())
        self.group = mx.distributed.init()
        self.steps_done = 0
        self.bad_steps = 0  # in a row
        self._gradient = mx.value_and_grad(self._loss)

    def step(self, packs: Sequence[Pack]) -> StepResult:
        """One optimiser step over this machine's packs (and, at the same time, the others').

        Raises:
            DivergedError: if this is the tenth step in a row whose loss is not finite.
        """
        self.model.train()
        # Drop path follows from the step, so that a resumed run draws what it would have drawn.
        mx.random.seed((self.recipe.seed * 1_000_003 + self.steps_done) * 1_009 + self.group.rank())
        parameters = self.model.trainable_parameters()
        loss, gradients = mx.zeros(()), tree_map(mx.zeros_like, parameters)
        tokens = label_tokens = 0
        for pack in packs:
            batch = Batch.of(pack, self.recipe.attention_slack)
            if batch.label_tokens:
                pack_loss, pack_gradients = self._gradient(parameters, batch)
                loss, gradients = loss + pack_loss, tree_map(mx.add, gradients, pack_gradients)
                mx.eval(loss, gradients)  # so that one pack's activations are gone before the next one's
            tokens += pack.num_tokens
            label_tokens += batch.label_tokens
        self.model.update(parameters)  # the forward pass left cast copies
        loss, gradients, tokens, label_tokens = self._over_all_machines(loss, gradients, tokens, label_tokens)

        scale = 1 / max(1, label_tokens)
        gradients = tree_map(lambda gradient: gradient * scale, gradients)
        norm = global_norm(gradients)
        step, rate = self.steps_done + 1, learning_rate(self.recipe, self.steps_done + 1)
        mean, norm_value = number(loss) * scale, number(norm)
        finite = math.isfinite(mean) and math.isfinite(norm_value) and label_tokens > 0
        self.bad_steps = 0 if finite else self.bad_steps + 1
        if self.bad_steps == MAX_BAD_STEPS:
            raise DivergedError(
                f"the loss was not finite for {MAX_BAD_STEPS} steps in a row, up to step {step}; "
                "lower learning_rate, or look at the data"
            )
        if finite:
            self.optimizer.learning_rate = mx.array(rate)
            self.optimizer.update(self.model, clip(gradients, norm, self.recipe.grad_clip))
            mx.eval(self.model.parameters(), self.optimizer.state)
        self.steps_done = step
        return StepResult(step, mean, rate, norm_value, tokens, label_tokens, not finite)

    def evaluate(self, packs: Iterator[Pack]) -> float:
        """Mean loss per label token over packs, each machine taking its own; nan for none."""
        total, count = 0.0, 0
        with self.computing() as model:
            for pack in packs:
                batch = Batch.of(pack, self.recipe.attention_slack)
                total += number(summed_loss(model, batch))
                count += batch.label_tokens
        sums = mx.distributed.all_sum(mx.array([total, count], mx.float32), group=self.group)
        total, count = number(sums[0]), int(number(sums[1]))
        return total / count if count else math.nan

    @contextmanager
    def computing(self) -> Iterator[GenLIP]:
        """The model as it computes, for a while: in eval mode and in the dtype of the computation."""
        parameters = self.model.trainable_parameters()
        self.model.eval()
        self._compute_with(parameters)
        try:
            yield self.model
        finally:
            self.model.update(parameters)

    def _loss(self, parameters: Any, batch: Batch) -> mx.array:
        self._compute_with(parameters)
        return summed_loss(self.model, batch, self.recipe.grad_checkpoint)

    def _compute_with(self, parameters: Any) -> None:
        self.model.update(tree_map(lambda p: p.astype(self.dtype), parameters))  # nothing to do where it is float32

    def _over_all_machines(
        self, loss: mx.array, gradients: Any, tokens: int, label_tokens: int
    ) -> tuple[mx.array, Any, int, int]:
        world = self.group.size()
        if world == 1:
            return loss, gradients, tokens, label_tokens
        # MLX averages gradients in large pieces; a sum is what label tokens of unequal packs need.
        gradients = tree_map(lambda gradient: gradient * world, nn.average_gradients(gradients, self.group))
        sums = mx.distributed.all_sum(mx.array([tokens, label_tokens], mx.int32), group=self.group)
        loss = mx.distributed.all_sum(loss, group=self.group)
        mx.eval(loss, gradients, sums)
        return loss, gradients, int(number(sums[0])), int(number(sums[1]))
