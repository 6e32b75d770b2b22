"""The two-stream sequence against what it stands for: one sequence under a dense mask."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from model.dense import Dense, Row, image_rows, interleave, predicting_rows
from model.random_case import assert_close, dense_of, random_model, random_pack, small_config

from genlip_mlx.model.genlip import GenLIP, VisionOnlyError
from genlip_mlx.model.sequence import Arrangement, PackedSequence

CONFIG = small_config(text_embed_dim=12)
MODEL = random_model(CONFIG)
TRUTH = dense_of(MODEL)

side = st.integers(1, 5)
grid = st.tuples(side, side)
slack = st.one_of(st.just(0.0), st.floats(0, 3), st.just(1e6))


@st.composite
def sequences(draw: st.DrawFn, max_samples: int = 6, max_text: int = 5) -> PackedSequence:
    """Packs of a few samples; equal ones are likely, pictures without words occur."""
    kinds = draw(st.lists(st.tuples(grid, st.integers(0, max_text)), min_size=1, max_size=3))
    samples = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=max_samples))
    return PackedSequence([g for g, _ in samples], [n for _, n in samples], slack=draw(slack))


@st.composite
def arrangements(draw: st.DrawFn) -> tuple[list[int], list[list[int]]]:
    """Lengths of some samples, and the samples dealt out to buckets in any order."""
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=8))
    order = draw(st.permutations(range(len(lengths))))
    cuts = sorted(draw(st.sets(st.integers(1, len(lengths)))) | {len(lengths)})
    return lengths, [list(order[start:end]) for start, end in zip([0, *cuts], cuts) if end > start]


def arrangement_of(lengths: list[int], buckets: list[list[int]]) -> Arrangement:
    return Arrangement([sum(lengths[:i]) for i in range(len(lengths))], lengths, buckets)


# Arrangement


@given(arrangements())
@settings(max_examples=100, deadline=None)
def test_split_places_every_row_once_and_join_takes_it_back(drawn: tuple[list[int], list[list[int]]]) -> None:
    lengths, buckets = drawn
    arrangement = arrangement_of(lengths, buckets)
    rows = sum(lengths)
    if rows == 0:
        return  # a stream without rows is never split
    x = mx.arange(rows * 2).reshape(rows, 1, 2)
    parts = arrangement.split(x)
    assert [part.shape for part in parts] == [(len(b), max(lengths[i] for i in b), 1, 2) for b in buckets]
    placed = []
    for bucket, part in zip(buckets, parts):
        for i, rectangle in zip(bucket, part.tolist()):
            placed += [row[0][0] // 2 for row in rectangle[: lengths[i]]]
            assert rectangle[: lengths[i]] == x[sum(lengths[:i]) : sum(lengths[: i + 1])].tolist()
    assert sorted(placed) == list(range(rows))
    assert mx.array_equal(arrangement.join(parts), x)


def test_equal_samples_in_order_move_nothing() -> None:
    assert arrangement_of([4, 4, 4], [[0, 1, 2]]).in_order
    assert arrangement_of([4, 4, 2], [[0, 1], [2]]).in_order
    assert not arrangement_of([4, 4, 2], [[0, 1, 2]]).in_order
    assert not arrangement_of([4, 2], [[1], [0]]).in_order


@given(arrangements(), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_gradients_through_split_and_join(drawn: tuple[list[int], list[list[int]]], seed: int) -> None:
    lengths, buckets = drawn
    arrangement = arrangement_of(lengths, buckets)
    rows = sum(lengths)
    if rows == 0:
        return
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> mx.array:
        return mx.array(rng.standard_normal(shape).astype(np.float32))

    x = draw(rows, 2, 3)
    # Real places only: masks keep what stands in padding from any result.
    real = [
        mx.array([[j < lengths[i] for j in range(n)] for i in bucket]).reshape(b, n, 1, 1)
        for bucket, (b, n) in zip(buckets, arrangement.shapes)
    ]
    factors = [draw(b, n, 2, 3) * keep for keep, (b, n) in zip(real, arrangement.shapes)]
    _, (grad,) = mx.vjp(arrangement.split, [x], factors)
    expected = np.zeros(x.shape, np.float32)
    for bucket, factor in zip(buckets, factors):
        for b, i in enumerate(bucket):
            start = sum(lengths[:i])
            expected[start : start + lengths[i]] += np.asarray(factor)[b, : lengths[i]]
    np.testing.assert_array_equal(np.asarray(grad), expected)

    # join: padding gets no gradient, a real place that of its row
    parts = [draw(b, n, 2, 3) for b, n in arrangement.shapes]
    _, grads = mx.vjp(lambda *p: [arrangement.join(p)], parts, [x])
    for bucket, ours in zip(buckets, grads):
        for b, i in enumerate(bucket):
            start = sum(lengths[:i])
            np.testing.assert_array_equal(np.asarray(ours)[b, : lengths[i]], np.asarray(x)[start : start + lengths[i]])
            assert not np.asarray(ours)[b, lengths[i] :].any()


# PackedSequence: the plain facts


@given(sequences())
@settings(max_examples=100, deadline=None)
def test_rows(sequence: PackedSequence) -> None:
    rows = interleave(sequence.grids, sequence.text_lengths)
    streams = [r for r in rows if not r.is_text] + [r for r in rows if r.is_text]
    assert sequence.num_image_rows == sum(not r.is_text for r in rows)
    assert sequence.num_text_rows == sum(r.is_text for r in rows)
    assert sequence.positions.tolist() == [list(r.position) for r in streams]
    assert sequence.samples.tolist() == [r.sample for r in streams]
    # Sample after sample, as the interleaved sequence has them.
    wanted = [rows[i] for i in predicting_rows(rows).tolist()]
    assert [streams[i] for i in sequence.output_rows.tolist()] == wanted


@given(sequences(max_samples=12))
@settings(max_examples=200, deadline=None)
def test_buckets_hold_every_sample_once_within_the_slack(sequence: PackedSequence) -> None:
    assert sorted(i for bucket in sequence.buckets for i in bucket) == list(range(len(sequence.grids)))
    assert -1e-12 <= sequence.attention_padding <= sequence.slack + 1e-12
    if sequence.slack == 0:
        kinds = {(h * w, n) for (h, w), n in zip(sequence.grids, sequence.text_lengths)}
        assert len(sequence.buckets) == len(kinds)  # equal samples share a call
        assert sequence.attention_padding == 0
    if sequence.slack == 1e6:
        assert len(sequence.buckets) == 1


def test_attention_padding_counts_query_key_pairs() -> None:
    # 4 + 1 image pairs and 2 * 4 + 1 * 2 text pairs are of use, 2 * (4 + 8) are computed.
    sequence = PackedSequence([(2, 1), (1, 1)], [2, 1], slack=10)
    assert sequence.buckets == [[0, 1]]
    assert sequence.attention_padding == pytest.approx(24 / 15 - 1)
    assert PackedSequence([(2, 1), (1, 1)], [2, 1]).attention_padding == 0


def test_pictures_alone_may_leave_the_texts_out() -> None:
    assert PackedSequence([(1, 2), (2, 2)]).text_lengths == (0, 0)


# Two streams equal the dense mask


def stream_order(rows: list[Row]) -> mx.array:
    return mx.array([i for text in (False, True) for i, row in enumerate(rows) if row.is_text == text])


@given(sequences(), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_forward_equals_the_dense_mask(sequence: PackedSequence, seed: int) -> None:
    pack = random_pack(CONFIG, sequence.grids, sequence.text_lengths, seed)
    rows = interleave(sequence.grids, sequence.text_lengths)
    state = TRUTH.states(rows, pack.patches, pack.input_ids)[-1]
    logits = MODEL(pack.patches, pack.input_ids, sequence)
    assert_close(logits, TRUTH.logits(state[predicting_rows(rows)]))
    assert_close(MODEL.encode(pack.patches, pack.grids), TRUTH.features(state[image_rows(rows)]))


@given(sequences(max_samples=4, max_text=4), st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_gradients_equal_the_dense_mask(sequence: PackedSequence, seed: int) -> None:
    pack = random_pack(CONFIG, sequence.grids, sequence.text_lengths, seed)
    rows = interleave(sequence.grids, sequence.text_lengths)
    outputs = predicting_rows(rows)
    draw = np.random.default_rng(seed).standard_normal((len(outputs), CONFIG.vocab_size))
    factor = mx.array(draw.astype(np.float32))

    def dense_loss(weights: dict[str, mx.array], patches: mx.array) -> mx.array:
        dense = Dense(CONFIG, weights)
        return (dense.logits(dense.states(rows, patches, pack.input_ids)[-1][outputs]) * factor).sum()

    def loss(model: GenLIP, patches: mx.array) -> mx.array:
        return (model(patches, pack.input_ids, sequence) * factor).sum()

    expected_loss, (expected, expected_patches) = mx.value_and_grad(dense_loss, argnums=(0, 1))(
        TRUTH.weights, pack.patches
    )
    ours_loss, tree = nn.value_and_grad(MODEL, loss)(MODEL, pack.patches)
    ours = dict(tree_flatten(tree))
    assert_close(ours_loss, expected_loss, atol=1e-4)
    assert ours.keys() == expected.keys()
    largest = max(float(mx.abs(grad).max()) for grad in expected.values())
    for name, grad in ours.items():
        np.testing.assert_allclose(
            np.asarray(grad), np.asarray(expected[name]), rtol=0, atol=2e-5 * largest, err_msg=name
        )
    patches = mx.grad(lambda p: loss(MODEL, p))(pack.patches)
    assert_close(patches, expected_patches, atol=1e-4)


@given(st.lists(grid, min_size=1, max_size=4), st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None)
def test_gradients_of_pictures_alone_equal_the_dense_mask(grids: list[tuple[int, int]], seed: int) -> None:
    pack = random_pack(CONFIG, grids, [0] * len(grids), seed)
    rows = interleave(grids, pack.text_lengths)
    draw = np.random.default_rng(seed).standard_normal((len(rows), CONFIG.hidden_size))
    factor = mx.array(draw.astype(np.float32))
    ours = mx.grad(lambda p: (MODEL.encode(p, grids) * factor).sum())(pack.patches)
    expected = mx.grad(lambda p: (TRUTH.features(TRUTH.states(rows, p, pack.input_ids)[-1]) * factor).sum())(
        pack.patches
    )
    assert_close(ours, expected, atol=1e-4)


def test_samples_do_not_see_each_other() -> None:
    # Another sample's pixels and words change nothing, padding or not.
    grids, lengths = [(2, 3), (4, 2), (2, 3)], [3, 1, 2]
    first, other = (random_pack(CONFIG, grids, lengths, seed) for seed in (1, 2))
    for slack in (0.0, 100.0):
        sequence = PackedSequence(grids, lengths, slack=slack)
        patches = mx.concatenate([first.picture(0), other.picture(1), other.picture(2)])
        ids = mx.concatenate([first.text(0), other.text(1), other.text(2)])
        before = MODEL(first.patches, first.input_ids, sequence)
        after = MODEL(patches, ids, sequence)
        assert_close(after[:4], before[:4], atol=1e-6)
        assert not mx.allclose(after[4:], before[4:])


# Errors


@pytest.mark.parametrize("grids", [[], [(0, 3)], [(2, 2), (3, 0)], [(-1, 2)]])
def test_empty_grids(grids: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match=r"^grids must name at least one \(h, w\) of one patch or more, not \["):
        PackedSequence(grids)


@pytest.mark.parametrize("lengths", [[1], [1, 2, 3], [1, -1]])
def test_wrong_text_lengths(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"2 grids need as many text lengths, not|text lengths must not be negative"):
        PackedSequence([(1, 1), (2, 2)], lengths)


@pytest.mark.parametrize("shape", [(5, 12), (7, 12), (6, 13), (6, 3, 2, 2)])
def test_wrong_patches(shape: tuple[int, ...]) -> None:
    message = r"^patches \(.*\) do not fit the grids, which need \(6, 12\)$"
    patches, ids, grids = mx.zeros(shape), mx.zeros(2, mx.int32), [(1, 2), (2, 2)]
    with pytest.raises(ValueError, match=message):
        MODEL.encode(patches, grids)
    with pytest.raises(ValueError, match=message):
        MODEL.hidden_states(patches, grids)
    with pytest.raises(ValueError, match=message):
        MODEL.prefill(patches, grids)
    with pytest.raises(ValueError, match=message):
        MODEL(patches, ids, PackedSequence(grids, [1, 1]))


@pytest.mark.parametrize("shape", [(3,), (5,), (2, 2)])
def test_wrong_tokens(shape: tuple[int, ...]) -> None:
    sequence = PackedSequence([(1, 1), (1, 1)], [3, 1])
    with pytest.raises(ValueError, match=r"^input_ids \(.*\) do not hold the 4 tokens of the texts$"):
        MODEL(mx.zeros((2, 12)), mx.zeros(shape, mx.int32), sequence)


def test_a_vision_only_model_has_no_words() -> None:
    config = small_config(vision_only=True)
    model = random_model(config)
    assert not {"embeddings", "in_proj", "proj", "lm_head"} & set(model)
    pack = random_pack(config, [(2, 2)], [3])
    assert model.encode(pack.patches, pack.grids).shape == (4, config.hidden_size)
    attempts = {
        "forward": lambda: model(pack.patches, pack.input_ids, PackedSequence(pack.grids, pack.text_lengths)),
        "logits": lambda: model.logits(mx.zeros((1, config.hidden_size))),
        "prefill": lambda: model.prefill(pack.patches, pack.grids),
        "text": lambda: model.embed_text(pack.input_ids),
    }
    for attempt in attempts.values():
        with pytest.raises(VisionOnlyError, match="vision-only: it has no text embedding and no head; convert without"):
            attempt()
