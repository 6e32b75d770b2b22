"""The chunked objective against the plain one, and the schedule against numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from genlip_mlx.config import GenLIPConfig
from genlip_mlx.data.packing import Pack
from genlip_mlx.model.genlip import GenLIP, initialize
from genlip_mlx.model.sequence import PackedSequence
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


class Adapted(nn.Module):
    """A frozen layer with a trained low-rank one beside it, and dropout."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear.freeze()
        self.a = mx.random.normal((linear.weight.shape[1], 4), key=mx.random.key(1))
        self.b = mx.random.normal((4, linear.weight.shape[0]), key=mx.random.key(2))
        self.dropout = nn.Dropout(0.5)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x) + self.dropout(x) @ self.a @ self.b


HEADS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "plain": lambda linear: linear,
    "quantized": lambda linear: linear.to_quantized(32, 8),
    "frozen": lambda linear: linear.freeze(),
    "adapted": Adapted,
}


def plain_loss(model: GenLIP, batch: Batch) -> mx.array:
    logits = model.logits(model.outputs(batch.patches, batch.input_ids, batch.sequence)[batch.rows])
    return nn.losses.cross_entropy(logits.astype(mx.float32), batch.targets, reduction="sum")


def loss_and_gradients(model: GenLIP, loss: Callable[[GenLIP], mx.array]) -> tuple[float, dict[str, mx.array]]:
    mx.random.seed(0)
    value, gradients = nn.value_and_grad(model, loss)(model)
    flat: dict[str, mx.array] = {}
    tree_flatten(gradients, destination=flat)
    mx.eval(value, flat)
    return float(value), flat


@pytest.mark.parametrize("embed", [None, 64])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("head", ["plain", "quantized", "frozen"])
def test_chunks_are_the_whole(embed: int | None, checkpoint: bool, training: bool, head: str) -> None:
    model, batch = small_model(embed), Batch.of(small_pack())
    model.lm_head = HEADS[head](model.lm_head)
    model.train(training)
    three_rows = 150
    expected, theirs = loss_and_gradients(model, lambda model: plain_loss(model, batch))
    loss, ours = loss_and_gradients(model, lambda model: summed_loss(model, batch, checkpoint, three_rows))
    assert batch.label_tokens == 8
    assert loss == pytest.approx(expected, rel=1e-6)
    assert ours.keys() == theirs.keys()
    assert ("lm_head.weight" in ours) == (head == "plain")
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_loss_and_its_gradient_come_of_the_same_dropout() -> None:
    model, batch = small_model(), Batch.of(small_pack())
    model.lm_head = HEADS["adapted"](model.lm_head)
    expected, theirs = loss_and_gradients(model, lambda model: plain_loss(model, batch))
    loss, ours = loss_and_gradients(model, lambda model: summed_loss(model, batch))  # in one chunk
    assert loss == pytest.approx(expected, rel=1e-6)
    assert ours.keys() == theirs.keys()
    assert {"lm_head.a", "lm_head.b"} < ours.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_low_precision_sums_in_float32() -> None:
    model, batch = small_model(), Batch.of(small_pack())
    expected, theirs = loss_and_gradients(model, lambda model: plain_loss(model, batch))
    model.set_dtype(mx.bfloat16)
    loss, ours = loss_and_gradients(model, lambda model: summed_loss(model, batch, chunk_logits=50))  # row by row
    assert loss == pytest.approx(expected, rel=1e-2)
    for name, value in ours.items():
        assert value.dtype == mx.bfloat16
        error = mx.linalg.norm(value.astype(mx.float32) - theirs[name]) / mx.linalg.norm(theirs[name])
        assert error.item() < 0.05, name


def test_a_pack_without_labels_costs_nothing() -> None:
    pack = small_pack()
    batch = Batch.of(replace(pack, labels=np.full_like(pack.labels, NO_LOSS)))
    model = small_model()
    for training in (True, False):
        assert summed_loss(model.train(training), batch).item() == 0


class OnlyHead(GenLIP):
    """Features ready-made."""

    def outputs(
        self, patches: mx.array, input_ids: mx.array, sequence: PackedSequence, checkpoint: bool = False
    ) -> mx.array:
        return patches


def peak(rows: int, vocab: int, gradients: bool) -> int:
    """Bytes that the loss of so many rows needs at its worst, in chunks of 32."""
    config = replace(small_model().config, vocab_size=vocab)
    model = OnlyHead(config).train(gradients)
    targets = mx.random.randint(0, vocab, (rows,), key=mx.random.key(0))
    features = mx.random.normal((rows, config.hidden_size), key=mx.random.key(1))
    batch = Batch(features, mx.zeros((0,), mx.int32), PackedSequence([(1, 1)]), mx.arange(rows), targets)
    mx.eval(model.parameters(), features, targets)
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    if gradients:
        loss_and_gradients(model, lambda model: summed_loss(model, batch, chunk_logits=32 * vocab))
    else:
        mx.eval(summed_loss(model, batch, chunk_logits=32 * vocab))
    return mx.get_peak_memory() - held


@pytest.mark.parametrize("gradients", [True, False])
def test_memory_does_not_grow_with_rows(gradients: bool) -> None:
    vocab, few, many = 20_000, 256, 1024
    grown = peak(many, vocab, gradients) - peak(few, vocab, gradients)
    logits = 4 * (many - few) * vocab  # what one array of the additional logits would take
    assert grown < logits / 4


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
