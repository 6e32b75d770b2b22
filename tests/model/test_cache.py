"""Cached decoding where it could go wrong: growth, left padding, finished sequences, widened heads."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from model.random_case import assert_close, random_model, random_pack, small_config

from genlip_mlx.model.cache import GROWTH, Cache, cache_head_dim
from genlip_mlx.model.genlip import GenLIP
from genlip_mlx.model.sequence import PackedSequence


@pytest.fixture(scope="module")
def model() -> GenLIP:
    return random_model(small_config())


def words(model: GenLIP, *shape: int) -> mx.array:
    return mx.array(np.random.default_rng(7).integers(model.config.vocab_size, size=shape).astype(np.int32))


def poison(cache: Cache) -> None:
    """Large numbers in every column that holds nothing: they must not show anywhere."""
    for layer, (keys, values) in enumerate(cache.layers):
        column = mx.arange(keys.shape[2])
        used = (column >= cache.padding[:, None]) & (column < cache.length)
        used = used[:, None, :, None]
        cache.layers[layer] = (mx.where(used, keys, 1e4), mx.where(used, values, 1e4))


@pytest.mark.parametrize(
    ("head_dim", "stored"),
    [(8, 64), (32, 64), (64, 64), (72, 96), (80, 96), (96, 96), (112, 128), (128, 128), (160, 160)],
)
def test_cache_head_dim(head_dim: int, stored: int) -> None:
    assert cache_head_dim(head_dim) == stored


@pytest.mark.parametrize(("head_dim", "stored"), [(72, 96), (160, 160)])
def test_keys_and_values_are_stored_at_that_width(head_dim: int, stored: int) -> None:
    wide = random_model(small_config(head_dim=head_dim, num_hidden_layers=1))
    pack = random_pack(wide.config, [(2, 2)], [0])
    _, cache = wide.prefill(pack.patches, pack.grids)
    for array in cache.layers[0]:
        assert array.shape == (1, 2, GROWTH, stored)
        assert not np.asarray(array)[..., head_dim:].any()


@pytest.mark.parametrize(
    ("grid", "steps"),
    [
        ((15, 17), [1, 1, 1]),  # 255: the second word stands in the first new column
        ((16, 16), [1, 1]),  # 256: full, so room is made before the first word
        ((5, 50), [300, 1]),  # 250: a prompt longer than what is left and one growth
        ((5, 50), [6, 257, 1]),  # filled to the brim, then past the next brim
    ],
)
def test_growth(model: GenLIP, grid: tuple[int, int], steps: list[int]) -> None:
    pack = random_pack(model.config, [grid], [sum(steps)])
    expected = model(pack.patches, pack.input_ids, PackedSequence([grid], [sum(steps)]))
    first, cache = model.prefill(pack.patches, [grid])
    ours, start = [first], 0
    for n in steps:
        ours.append(model.extend(pack.input_ids[None, start : start + n], cache, all_logits=True)[0])
        start += n
        capacity = cache.layers[0][0].shape[2]
        assert capacity >= cache.length == grid[0] * grid[1] + start
        assert capacity % GROWTH == 0  # few different shapes
        assert capacity - cache.length <= GROWTH
    assert_close(mx.concatenate(ours), expected)


def test_shorter_pictures_are_padded_on_the_left(model: GenLIP) -> None:
    grids = [(2, 3), (4, 4), (1, 1)]
    pack = random_pack(model.config, grids, [0, 0, 0])
    _, cache = model.prefill(pack.patches, grids)
    assert cache.batch_size == 3
    assert cache.length == 16
    assert cache.padding.tolist() == [10, 0, 15]
    assert cache.next_position.tolist() == [3, 4, 1]
    model.extend(words(model, 3, 2), cache)
    assert cache.length == 18
    assert cache.next_position.tolist() == [5, 6, 3]


@pytest.mark.parametrize("grids", [[(2, 3), (4, 4), (1, 1)], [(2, 3), (3, 2), (1, 6)]], ids=["padded", "equal sizes"])
def test_what_stands_in_unused_columns_does_not_matter(model: GenLIP, grids: list[tuple[int, int]]) -> None:
    pack = random_pack(model.config, grids, [0, 0, 0])
    ids = words(model, 3, 5)
    _, cache = model.prefill(pack.patches, grids)
    poison(cache)
    batched = [model.extend(ids[:, :4], cache)]
    poison(cache)
    batched.append(model.extend(ids[:, 4:], cache))
    for i, grid in enumerate(grids):
        _, alone = model.prefill(pack.picture(i), [grid])
        assert_close(batched[0][i : i + 1], model.extend(ids[i : i + 1, :4], alone))
        assert_close(batched[1][i : i + 1], model.extend(ids[i : i + 1, 4:], alone))


def test_keep_goes_on_with_the_sequences_named(model: GenLIP) -> None:
    grids = [(2, 3), (4, 4), (1, 1), (3, 3)]
    pack = random_pack(model.config, grids, [0] * 4)
    ids = words(model, 4, 6)
    _, cache = model.prefill(pack.patches, grids)
    model.extend(ids[:, :3], cache)
    cache.keep([3, 0])  # the widest is gone: every sequence left is padded
    assert cache.batch_size == 2
    assert cache.padding.tolist() == [7, 10]
    two = model.extend(ids[mx.array([3, 0]), 3:5], cache)
    cache.keep([1])
    one = model.extend(ids[:1, 5:], cache)
    for i, ours in ((3, two[:1]), (0, two[1:])):
        _, alone = model.prefill(pack.picture(i), [grids[i]])
        assert_close(ours, model.extend(ids[i : i + 1, :5], alone))
    _, alone = model.prefill(pack.picture(0), grids[:1])
    assert_close(one, model.extend(ids[:1], alone))


def test_a_cache_continues_for_each_of_several_endings(model: GenLIP) -> None:
    # One picture, its row kept three times: what scoring several captions of it needs.
    pack = random_pack(model.config, [(3, 2)], [0])
    ids = words(model, 3, 4)
    _, cache = model.prefill(pack.patches, pack.grids)
    cache.keep([0, 0, 0])
    ours = model.extend(ids, cache)
    for i in range(3):
        _, alone = model.prefill(pack.patches, pack.grids)
        assert_close(ours[i : i + 1], model.extend(ids[i : i + 1], alone))
