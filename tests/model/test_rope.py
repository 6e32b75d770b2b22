"""Which frequency turns with which axis, and what the turning does."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from model.random_case import small_config

from genlip_mlx.config import PRESETS
from genlip_mlx.model.rope import Rope, frequency_axes, rotate

# Written out by hand from section 1 of the method's description, a letter a frequency.
INTERLEAVED = [
    # L/16, d = 64: h stops at 31 and w at 29 because d/2 is reached before 12 of each are placed
    (64, (8, 12, 12), "thwthwthwthwthwthwthwthwthwthwth"),
    # L/16 as its config file says, d = 72: 12 of each, whatever section[0] claims
    (72, (8, 12, 12), "thwthwthwthwthwthwthwthwthwthwthwthw"),
    (72, (12, 12, 12), "thwthwthwthwthwthwthwthwthwthwthwthw"),
    # the small presets, d = 64: h and w run out after 10, the rest is t
    (64, (12, 10, 10), "thwthwthwthwthwthwthwthwthwthwtt"),
    # g/16 with 24 heads, d = 64, and with 16, d = 96
    (64, (16, 16, 16), "thwthwthwthwthwthwthwthwthwthwth"),
    (96, (16, 16, 16), "thwthwthwthwthwthwthwthwthwthwthwthwthwthwthwthw"),
    # the golden case tiny-224, d = 32
    (32, (4, 6, 6), "thwthwthwthwthwt"),
    # more h than w, and neither
    (24, (8, 3, 1), "thwthtthtttt"),
    (12, (6, 0, 0), "tttttt"),
]
CHUNKED = [
    (64, (8, 12, 12), "tttttttthhhhhhhhhhhhwwwwwwwwwwww"),
    (12, (1, 2, 3), "thhwww"),
    (12, (0, 3, 3), "hhhwww"),
]


def letters(axes: tuple[int, ...]) -> str:
    return "".join("thw"[axis] for axis in axes)


@pytest.mark.parametrize(("head_dim", "section", "expected"), INTERLEAVED)
def test_interleaved_sections(head_dim: int, section: tuple[int, int, int], expected: str) -> None:
    assert letters(frequency_axes(head_dim // 2, section, True)) == expected


@pytest.mark.parametrize(("head_dim", "section", "expected"), CHUNKED)
def test_chunked_sections(head_dim: int, section: tuple[int, int, int], expected: str) -> None:
    assert letters(frequency_axes(head_dim // 2, section, False)) == expected


@pytest.mark.parametrize("name", PRESETS)
def test_every_axis_turns_something_in_every_preset(name: str) -> None:
    config = PRESETS[name]
    axes = frequency_axes(config.head_dim // 2, config.mrope_section, config.mrope_interleaved)
    assert len(axes) == config.head_dim // 2
    assert set(axes) == {0, 1, 2}


def test_table() -> None:
    config = small_config(head_dim=12, mrope_section=(2, 2, 2), rope_theta=100.0)
    positions = [[0, 0, 0], [0, 3, 5], [7, 7, 7], [900, 900, 900]]
    cos, sin = Rope(config).table(mx.array(positions))
    assert cos.shape == sin.shape == (4, 1, 6)
    assert cos.dtype == sin.dtype == mx.float32
    rates = [1, 100 ** (-1 / 6), 100 ** (-1 / 3), 100 ** (-1 / 2), 100 ** (-2 / 3), 100 ** (-5 / 6)]
    angles = np.array([[p[axis] * rate for axis, rate in zip((0, 1, 2, 0, 1, 2), rates)] for p in positions])
    # An angle of 900 has a float32 spacing of 6e-5.
    np.testing.assert_allclose(np.asarray(cos)[:, 0], np.cos(angles), atol=1e-4)
    np.testing.assert_allclose(np.asarray(sin)[:, 0], np.sin(angles), atol=1e-4)
    np.testing.assert_allclose(np.asarray(cos)[:3, 0], np.cos(angles[:3]), atol=1e-6)


def test_rotate_turns_first_half_against_second() -> None:
    x = mx.array([[[1.0, 2.0, 3.0, 4.0]]])  # pairs (1, 3) and (2, 4)
    turned = rotate(x, mx.array([[[0.0, 1.0]]]), mx.array([[[1.0, 0.0]]]))
    assert turned.tolist() == [[[-3.0, 2.0, 1.0, 4.0]]]


def test_scores_depend_on_differences_of_positions_alone() -> None:
    config = small_config(head_dim=16)
    rng = np.random.default_rng(0)
    q, k = (mx.array(rng.standard_normal((1, 1, 16)).astype(np.float32)) for _ in range(2))

    def score(at: list[int], other: list[int]) -> float:
        turn = Rope(config).table
        return float((rotate(q, *turn(mx.array([at]))) * rotate(k, *turn(mx.array([other])))).sum())

    assert score([5, 9, 4], [3, 2, 1]) == pytest.approx(score([15, 29, 34], [13, 22, 31]), abs=1e-4)
    assert score([5, 9, 4], [3, 2, 1]) != pytest.approx(score([5, 9, 4], [3, 1, 2]), abs=1e-2)


def test_half_precision_is_turned_in_float32() -> None:
    # Far out in a text, where bfloat16 angles would be off by whole turns.
    config = small_config(head_dim=16)
    x = mx.random.normal((3, 2, 16), key=mx.random.key(0)).astype(mx.bfloat16)
    table = Rope(config).table(mx.array([[1000, 1001, 1003], [4001, 4001, 4001], [0, 63, 62]]))
    ours, exact = rotate(x, *table), rotate(x.astype(mx.float32), *table)
    assert ours.dtype == mx.bfloat16
    assert mx.array_equal(ours, exact.astype(mx.bfloat16))
