"""Packing: every sample once, never over the budget, nearly full, and the same every time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genlip_mlx.data.packing import Measured, Pack, first_fit, in_pack_order
from genlip_mlx.processing import NO_LOSS

SIZES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 20)), max_size=60)


def measured(position: int, h: int, w: int, text: int) -> Measured:
    ids = np.zeros(text, np.int32)
    return Measured(position, position, (h, w), ids, ids)


@given(sizes=SIZES, budget=st.integers(56, 300), lookahead=st.integers(1, 40))
def test_every_sample_is_packed_once_within_the_budget(sizes: list, budget: int, lookahead: int) -> None:
    samples = [measured(i, *size) for i, size in enumerate(sizes)]
    taken: list[int] = []
    for chosen, waiting in first_fit(samples, budget, lookahead):
        assert 0 < sum(s.grid[0] * s.grid[1] + len(s.input_ids) for s in chosen) <= budget
        assert len(chosen) + len(waiting) <= lookahead
        assert chosen[0].position == min(s.position for s in [*chosen, *waiting])  # the longest waiting one goes first
        # First fit: whoever still waits did not fit when its turn came.
        for left in waiting:
            before = sum(s.num_tokens for s in chosen if s.position < left.position)
            assert before + left.num_tokens > budget
        taken += [s.position for s in chosen]
    assert sorted(taken) == list(range(len(sizes)))


@given(sizes=SIZES, lookahead=st.integers(1, 40), stop=st.integers(0, 10))
def test_going_on_from_those_waiting_gives_the_same_packs(sizes: list, lookahead: int, stop: int) -> None:
    samples = [measured(i, *size) for i, size in enumerate(sizes)]
    packs = [chosen for chosen, _ in first_fit(samples, 100, lookahead)]
    incoming = iter(samples)
    waiting: list[Measured] = []
    for number, (_, left) in enumerate(first_fit(incoming, 100, lookahead)):
        waiting = left
        if number == stop:
            break
    again = [chosen for chosen, _ in first_fit([*waiting, *incoming], 100, lookahead)]
    assert again == packs[stop + 1 :]


def test_samples_are_taken_as_they_are_needed() -> None:
    pulled = 0

    def endless() -> Iterator[Measured]:
        nonlocal pulled
        while True:
            pulled += 1
            yield measured(pulled, 5, 5, 5)

    packs = first_fit(endless(), 60, 8)
    next(packs)
    assert pulled == 8
    next(packs)
    assert pulled == 10


def test_a_sample_over_the_budget_is_a_mistake_not_a_hang() -> None:
    with pytest.raises(ValueError, match="40 tokens does not fit a pack of 39"):
        list(first_fit([measured(0, 5, 5, 15)], 39, 4))


@pytest.mark.parametrize("stage", [1, 2])
def test_packs_of_both_stages_are_over_97_percent_full(stage: int) -> None:
    rng = np.random.default_rng(stage)
    if stage == 1:
        sizes = [(14, 14, int(text)) for text in rng.normal(74, 20, 6000).clip(10, 300)]
    else:
        patches, text = rng.lognormal(6.75, 0.45, 3000).clip(16, 1024), rng.lognormal(5.8, 0.5, 3000).clip(20, 1000)
        sizes = [(1, int(p), int(t)) for p, t in zip(patches, text)]
    samples = [measured(i, *size) for i, size in enumerate(sizes)]
    packs = [sum(s.num_tokens for s in chosen) for chosen, _ in first_fit(samples, 16384, 512)]
    assert sum(packs) / len(packs) / 16384 > 0.97


@given(SIZES)
def test_equal_samples_lie_side_by_side_largest_first(sizes: list) -> None:
    ordered = in_pack_order(measured(i, *size) for i, size in enumerate(sizes))
    keys = [(s.grid[0] * s.grid[1], len(s.input_ids), s.grid) for s in ordered]
    assert [key[:2] for key in keys] == sorted((key[:2] for key in keys), reverse=True)
    runs = [key for key, before in zip(keys, [None, *keys]) if key != before]
    assert len(runs) == len(set(keys))


def test_a_pack_counts_its_tokens() -> None:
    labels = np.array([NO_LOSS, 5, 6, NO_LOSS, 7], np.int32)
    pack = Pack(np.zeros((6, 768), np.float32), ((2, 2), (1, 2)), labels, labels, (3, 2), (0, 1))
    assert (pack.num_tokens, pack.label_tokens) == (11, 3)
