"""The chunked objective against the plain one, and the schedule against numbers worked out by hand."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from genlip_mlx.config import GenLIPConfig
from genlip_mlx.data.packing import Pack
from genlip_mlx.model.genlip import GenLIP, initialize
from genlip_mlx.processing.processor import NO_LOSS
from genlip_mlx.train.objective import Batch, summed_loss
from genlip_mlx.train.optimizer import clip, global_norm, learning_rate
from genlip_mlx.train.recipe import Recipe


def small_model(embed: int | None = None) -> GenLIP:
    config = GenLIPConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=50,
        text_embed_dim=embed,
        patch_size=2,
        mrope_section=(4, 2, 2),
    )
    model = GenLIP(config)
    initialize(model, mx.random.key(0))
    return model


def small_pack() -> Pack:
    rng = np.random.default_rng(0)
    grids, lengths = ((2, 3), (2, 3), (1, 4)), (5, 3, 4)
    tokens = rng.integers(0, 50, sum(lengths)).astype(np.int32)
    labels = tokens.copy()
    labels[[0, 1, 5, 9]] = NO_LOSS  # the third sample's first token is a label: its last image row predicts it
    labels[8] = tokens[8]
    patches = rng.standard_normal((16, 12)).astype(np.float32)
    return Pack(patches, grids, tokens, labels, lengths, (0, 1, 2))


@pytest.mark.parametrize("embed", [None, 24])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_chunks_are_the_whole(embed: int | None, checkpoint: bool) -> None:
    model, batch = small_model(embed), Batch.of(small_pack())

    def plain(model: GenLIP) -> mx.array:
        logits = model(batch.patches, batch.input_ids, batch.sequence)[batch.rows]
        return nn.losses.cross_entropy(logits, batch.targets, reduction="sum")

    def chunked(model: GenLIP) -> mx.array:
        return summed_loss(model, batch, checkpoint, chunk_logits=150)  # three rows at a time

    expected, expected_gradients = nn.value_and_grad(model, plain)(model)
    loss, gradients = nn.value_and_grad(model, chunked)(model)
    assert batch.label_tokens == 8
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    theirs = dict(tree_flatten(expected_gradients))
    for name, value in tree_flatten(gradients):
        np.testing.assert_allclose(value, theirs[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_rows_before_their_labels() -> None:
    pack = small_pack()
    batch = Batch.of(pack)
    # Rows of a sample: its last image row, then its tokens; each predicts the next token.
    assert batch.rows.tolist() == [2, 3, 4, 7, 8, 10, 12, 13]
    assert batch.targets.tolist() == [int(x) for x in pack.labels if x != NO_LOSS]


def recipe(**fields: object) -> Recipe:
    return Recipe(**{"data": "x", "iters": 1000, "init_from": "m"} | fields)  # type: ignore[arg-type]


def test_learning_rate() -> None:
    paper = recipe(learning_rate=1e-3, min_learning_rate=1e-6, warmup=0.1)
    assert learning_rate(paper, 1) == pytest.approx(1e-5)
    assert learning_rate(paper, 100) == pytest.approx(1e-3)
    assert learning_rate(paper, 550) == pytest.approx((1e-3 + 1e-6) / 2)
    assert learning_rate(paper, 1000) == pytest.approx(1e-6)
    assert learning_rate(recipe(lr_schedule="constant", warmup=0.0, learning_rate=2e-4), 777) == 2e-4


def test_norm_of_a_large_matrix_keeps_its_digits() -> None:
    gradients = {"a": mx.full((4096, 1024), 0.1), "b": [mx.full((7,), 2.0)]}
    exact = math.sqrt(4096 * 1024 * np.float32(0.1).astype(np.float64) ** 2 + 28)
    norm = global_norm(gradients)
    assert norm.item() == pytest.approx(exact, rel=1e-5)
    clipped = clip(gradients, norm, 1.0)
    assert global_norm(clipped).item() == pytest.approx(1, rel=1e-4)
    untouched = clip(gradients, norm, 1e6)
    assert mx.array_equal(untouched["b"][0], gradients["b"][0])
