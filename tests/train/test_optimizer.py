"""Muon beside AdamW: which parameters it moves, how far, and that a decay is a decay."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from genlip_mlx.train.optimizer import Muon, make_optimizer, orthogonalized
from genlip_mlx.train.recipe import Recipe

RECIPE = Recipe(data="x", iters=1, init_from="x", learning_rate=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("shape", [(96, 96), (128, 48), (48, 128)])
def test_muon_moves_a_matrix_as_far_as_adamw_would(shape: tuple[int, int]) -> None:
    optimizer = Muon(1e-2, weight_decay=0.0)
    matrix = {"w": mx.zeros(shape)}
    gradient = mx.random.normal(shape, key=mx.random.key(0)) * 1e-3
    moved = np.array(optimizer.apply_gradients({"w": gradient}, matrix)["w"]) / -1e-2
    assert np.sqrt(np.mean(moved**2)) == pytest.approx(0.2, rel=0.15)
    # The gradient's own singular vectors, with almost equal singular values.
    u, _, v = np.linalg.svd(np.array(gradient), full_matrices=False)
    values = np.diag(u.T @ moved @ v.T) / (0.2 * np.sqrt(max(shape)))
    assert np.mean((values > 0.6) & (values < 1.3)) > 0.9  # five iterations leave the smallest ones behind


def test_decay_does_not_pass_through_the_orthogonalisation() -> None:
    matrix = mx.random.normal((8, 4), key=mx.random.key(1))
    optimizer = Muon(1e-2, weight_decay=0.1)
    after = optimizer.apply_gradients({"w": mx.zeros((8, 4))}, {"w": matrix})["w"]
    np.testing.assert_allclose(after, matrix * (1 - 1e-2 * 0.1), rtol=1e-6)


def test_the_rest_is_adamws() -> None:
    assert orthogonalized("visual.layers.3.mlp.fc1.weight", mx.zeros((2, 2)))
    assert not orthogonalized("visual.layers.3.mlp.fc1.bias", mx.zeros(2))
    assert not orthogonalized("lm_head.weight", mx.zeros((2, 2)))
    key = mx.random.key(2)
    parameters = {"lm_head": {"weight": mx.random.normal((6, 4), key=key)}}
    gradients = {"lm_head": {"weight": mx.random.normal((6, 4), key=key) * 0.1}}
    results = []
    for name in ("adamw", "muon"):
        optimizer = make_optimizer(replace(RECIPE, optimizer=name))
        optimizer.init(parameters)
        results.append(np.array(optimizer.apply_gradients(gradients, parameters)["lm_head"]["weight"]))
    np.testing.assert_array_equal(*results)
