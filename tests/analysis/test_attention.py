"""Attention allocation: exact on patterns made by hand, and the model's own on golden and random models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import Golden
from model.dense import Dense, Row, angles, half_turn, interleave, sees
from model.random_case import dense_of, random_model, random_pack, small_config
from PIL import Image

from genlip_mlx.analysis.attention import (
    CLOSED,
    Allocation,
    Drawn,
    LayerError,
    Maps,
    WatchedContext,
    allocation,
    draw,
    first_and_vision,
    look,
    mean_allocation,
    own_words,
    spread,
)
from genlip_mlx.analysis.picture import Picture, read_picture
from genlip_mlx.checkpoint.load import load
from genlip_mlx.data.records import Record
from genlip_mlx.data.sources import open_source
from genlip_mlx.generate import caption
from genlip_mlx.model.attention import PackedContext
from genlip_mlx.model.genlip import GenLIP, VisionOnlyError
from genlip_mlx.model.sequence import PackedSequence
from genlip_mlx.processing.processor import DEFAULT_PROMPT, Processor

Loaded = tuple[GenLIP, Processor]


@pytest.fixture(scope="module")
def loaded(case: Golden) -> Loaded:
    return load(case.folder, "float32")


def no_rotation(sequence: PackedSequence, half: int) -> tuple[mx.array, mx.array]:
    rows = sequence.num_image_rows + sequence.num_text_rows
    return mx.ones((rows, 1, half)), mx.zeros((rows, 1, half))


# --- Patterns made by hand ---


def given(sequence: PackedSequence, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """What each row gives the first patch and all patches, [P + T, H, 2]."""
    context = WatchedContext(sequence, no_rotation(sequence, keys.shape[-1] // 2), first_and_vision(sequence))
    values = mx.array(np.random.default_rng(0).standard_normal(keys.shape).astype(np.float32))
    out = context.attend(mx.array(queries), mx.array(keys), values)
    assert out.shape == queries.shape
    return np.asarray(context.given)


@pytest.mark.parametrize("slack", [0.0, 5.0])
def test_allocation_of_even_attention_is_exact(slack: float) -> None:
    # Two samples: 6 patches and 2 words, 4 patches and 3 words. All scores are 0.
    sequence = PackedSequence([(2, 3), (2, 2)], [2, 3], slack)
    zeros = np.zeros((15, 2, 4), np.float32)
    shares = given(sequence, zeros, zeros)
    patches = [6] * 6 + [4] * 4 + [6] * 2 + [4] * 3
    words = [0] * 10 + [1, 2] + [1, 2, 3]  # seen, itself included
    for row, (image, text) in enumerate(zip(patches, words)):
        np.testing.assert_allclose(shares[row], [[1 / (image + text), image / (image + text)]] * 2, rtol=1e-6)


def test_allocation_of_sinks_is_exact() -> None:
    # Keys are one-hot by row, so that a query's numbers are its scores; d = 8 for 4 patches and 3 words.
    sequence = PackedSequence([(2, 2)], [3])
    keys = np.zeros((7, 2, 8), np.float32)
    keys[np.arange(7), :, np.arange(7)] = 1
    far = 1000 * math.sqrt(8)  # a score of 1000: everything else is 0 in float32
    queries = np.zeros((7, 2, 8), np.float32)
    queries[:, 0, 0] = far  # head 0: all look at the first patch
    queries[:4, 1, 3] = far  # head 1: patches at the last patch,
    queries[4:, 1, 4] = far  # words half at the first word, half at patch 1
    queries[4:, 1, 1] = far
    shares = given(sequence, queries, keys)
    np.testing.assert_array_equal(shares[:, 0], [[1, 1]] * 7)
    np.testing.assert_array_equal(shares[:, 1], [[0, 1]] * 4 + [[0, 0.5]] * 3)


def test_the_output_is_the_models_own() -> None:
    rng = np.random.default_rng(0)
    sequence = PackedSequence([(3, 4), (2, 2), (3, 4)], [5, 0, 2], slack=9.0)
    rows = 28 + 7
    q, k, v = (mx.array(rng.standard_normal((rows, 3, 8)).astype(np.float32)) for _ in range(3))
    table = no_rotation(sequence, 4)
    watched = WatchedContext(sequence, table, mx.eye(rows))
    expected = PackedContext(sequence, table).attend(q, k, v)
    np.testing.assert_allclose(np.asarray(watched.attend(q, k, v)), np.asarray(expected), rtol=0, atol=1e-6)
    # A column a key: the probabilities themselves. They add up to 1, and times the values they are the output.
    p = np.asarray(watched.given)
    np.testing.assert_allclose(p.sum(axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(np.einsum("qhk,khd->qhd", p, np.asarray(v)), np.asarray(expected), rtol=0, atol=1e-5)


# --- Against attention computed the plain way ---


class Recorded(Dense):
    """The plain model that writes down its attention probabilities, [H, L, L], and gates, [L, D], layer by layer."""

    def watch(self, rows: list[Row], patches: mx.array, input_ids: mx.array) -> list[tuple[np.ndarray, np.ndarray]]:
        config, found = self.config, []
        dim, size = config.hidden_size, config.hidden_size // config.num_attention_heads
        turns = mx.array(angles(rows, config))
        mask = mx.array([[sees(query, key) for key in rows] for query in rows])
        for i, x in enumerate(self.states(rows, patches, input_ids)[:-1]):
            name = f"visual.layers.{i}"
            x = self.layer_norm(f"{name}.layer_norm1", x)
            both, keys = self.linear(f"{name}.self_attn.q_proj", x), self.linear(f"{name}.self_attn.k_proj", x)
            heads = []
            for start in range(0, dim, size):
                q, k = (y[:, start : start + size] for y in (both, keys))
                q, k = (y * mx.cos(turns) + half_turn(y) * mx.sin(turns) for y in (q, k))
                heads.append(mx.softmax(mx.where(mask, q @ k.T / math.sqrt(size), -mx.inf), axis=-1))
            found.append((np.asarray(mx.stack(heads)), np.asarray(1 / (1 + mx.exp(-both[:, dim:])))))
        return found


def plain(model: GenLIP, patches: mx.array, grid: tuple[int, int], ids: mx.array) -> list[dict[str, Any]]:
    """The same measures from probabilities stored whole."""
    measures = []
    count = grid[0] * grid[1]
    watcher = Recorded(model.config, dense_of(model).weights)
    for p, gate in watcher.watch(interleave([grid], [len(ids)]), patches, ids):
        measures.append(
            {
                "vision_to_first": p[:, :count, 0].mean(),
                "text_to_first": p[:, count:, 0].mean(),
                "text_to_vision": p[:, count:, :count].sum(axis=-1).mean(),
                "gate_mean": gate.mean() if gate.size else None,
                "gate_closed": (gate < CLOSED).mean() if gate.size else None,
                "from_text": p[:, count:, :count].mean(axis=(0, 1)).reshape(grid),
                "from_vision": p[:, :count, :count].mean(axis=(0, 1)).reshape(grid),
            }
        )
    return measures


def assert_measures(shares: Allocation, maps: dict[int, Maps], expected: list[dict[str, Any]]) -> None:
    for block, row in enumerate(expected):
        for name in ("vision_to_first", "text_to_first", "text_to_vision", "gate_mean", "gate_closed"):
            ours = getattr(shares, name)
            if row[name] is None:
                assert ours is None
            else:
                assert ours[block] == pytest.approx(row[name], abs=1e-5), (block, name)
        np.testing.assert_allclose(maps[block + 1].from_text, row["from_text"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(maps[block + 1].from_vision, row["from_vision"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("gated", [True, False])
def test_a_random_model_measured_the_plain_way(gated: bool) -> None:
    config = small_config(gated_attention=gated, num_heads=3, num_hidden_layers=3)
    model = random_model(config)
    pack = random_pack(config, [(3, 5)], [6])
    shares, maps = look(model, np.asarray(pack.patches), (3, 5), pack.input_ids.tolist(), [1, 2, 3])
    assert_measures(shares, maps, plain(model, pack.patches, (3, 5), pack.input_ids))
    assert (shares.even, shares.samples) == (1 / 15, 1)


def test_golden_models_measured_the_plain_way(case: Golden, loaded: Loaded) -> None:
    model, processor = loaded
    sample = case.samples[1]
    picture = read_picture(processor.image_processor, case.image_path(1))
    ids = processor.text(sample["prompt"], sample["caption"]).input_ids.tolist()
    np.testing.assert_array_equal(ids, case.expected("1.input_ids"))
    shares, maps = look(model, picture.patches, picture.grid, ids, [1, 2])
    assert_measures(shares, maps, plain(model, mx.array(picture.patches), picture.grid, mx.array(ids)))
    np.testing.assert_allclose([maps[b].from_text.sum() for b in (1, 2)], shares.text_to_vision, atol=1e-5)


def test_the_walk_through_the_blocks_is_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config()
    model = random_model(config)
    pack = random_pack(config, [(2, 3)], [4])
    sequence = PackedSequence(pack.grids, pack.text_lengths)
    last: list[mx.array] = []
    block = type(model.visual.layers[0])
    call = block.__call__

    def watched(self: Any, x: mx.array, context: Any) -> mx.array:
        last.append(call(self, x, context))
        return last[-1]

    monkeypatch.setattr(block, "__call__", watched)
    look(model, np.asarray(pack.patches), (2, 3), pack.input_ids.tolist())
    ours = model.ln_post(last[-1])[sequence.output_rows]
    expected = model.outputs(pack.patches, pack.input_ids, sequence)
    np.testing.assert_allclose(np.asarray(ours), np.asarray(expected), rtol=0, atol=1e-5)


def test_query_and_gate_are_the_two_halves() -> None:
    for gated in (True, False):
        model = random_model(small_config(gated_attention=gated))
        layer = model.visual.layers[0].self_attn
        x = mx.random.normal((5, 16))
        query, gate = layer.query_and_gate(x)
        both = layer.q_proj(x)
        np.testing.assert_array_equal(np.asarray(query), np.asarray(both[:, :16]))
        if gate is None:
            assert not gated
        else:
            np.testing.assert_allclose(np.asarray(gate), np.asarray(mx.sigmoid(both[:, 16:])), atol=1e-6)


# --- Many samples ---


def test_allocation_is_the_mean_over_samples(loaded: Loaded) -> None:
    model, processor = loaded
    source = open_source("synth:test:3:shapes,words")
    records = [source[i] for i in range(3)]
    ours = allocation(model, processor, records)
    alone = [allocation(model, processor, [record]) for record in records]
    assert ours.samples == 3
    for name in ("vision_to_first", "text_to_first", "text_to_vision", "gate_mean", "gate_closed", "even"):
        each = np.stack([getattr(one, name) for one in alone])
        np.testing.assert_allclose(getattr(ours, name), each.mean(axis=0), rtol=1e-12)
    halves = [mean_allocation(alone[:2]), alone[2]]
    np.testing.assert_allclose(mean_allocation(halves).text_to_vision, ours.text_to_vision, rtol=1e-12)
    assert ours.to_dict()["samples"] == 3
    assert ours.to_dict()["text_to_vision"] == ours.text_to_vision.tolist()


def test_conversations_and_bad_samples(loaded: Loaded, golden_dir: Path) -> None:
    image = golden_dir / "images" / "page.png"
    turns = ({"from": "human", "value": "What?"}, {"from": "gpt", "value": "A page."})
    assert allocation(*loaded, [Record("a", image, turns=turns)]).samples == 1
    with pytest.raises(ValueError, match="attention is averaged over samples, and there is none"):
        allocation(*loaded, [])
    with pytest.raises(ValueError, match=r"^b: .*none\.png: no such file"):
        allocation(*loaded, [Record("b", golden_dir / "none.png", "A page.")])


def test_own_words_are_the_greedy_caption(case: Golden, loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = loaded
    tokenizer = processor.tokenizer
    assert tokenizer is not None
    picture = read_picture(processor.image_processor, case.image_path(0))
    (spoken,) = caption(model, processor, case.image_path(0))
    prompt = processor.prompt_ids(DEFAULT_PROMPT)
    ends = tokenizer.eos_ids if spoken.finish_reason == "stop" else []
    assert own_words(model, processor, picture) == ([*prompt, *spoken.tokens, *ends], spoken.caption)
    monkeypatch.setattr(tokenizer, "eos_ids", [spoken.tokens[0], 5])  # stops at once
    assert own_words(model, processor, picture) == ([*prompt, spoken.tokens[0], 5], "")


# --- What cannot be ---


def test_errors(loaded: Loaded) -> None:
    config = small_config()
    model = random_model(config)
    pack = random_pack(config, [(2, 2)], [3])
    patches = np.asarray(pack.patches)
    for layer in (0, 3, -1):
        with pytest.raises(LayerError, match=f"^there is no block {layer}: 1 is the first, 2 the last$"):
            look(model, patches, (2, 2), [1], [layer])
    with pytest.raises(ValueError, match="attention from text needs a text"):
        look(model, patches, (2, 2), [])
    alone = GenLIP(small_config(vision_only=True))
    with pytest.raises(VisionOnlyError):
        look(alone, patches, (2, 2), [1])
    with pytest.raises(VisionOnlyError):
        allocation(alone, loaded[1], [])


def test_blocks_mapped_by_default() -> None:
    spreads = {n: spread(GenLIP(small_config(num_hidden_layers=n))) for n in (1, 2, 4, 7)}
    assert spreads == {1: [1], 2: [1, 2], 4: [1, 2, 3, 4], 7: [1, 3, 5, 7]}


# --- Figures ---


def test_models_of_different_depth_and_without_gate_are_drawn(tmp_path: Path) -> None:
    picture = Picture("p.png", Image.new("RGB", (64, 32), "red"), np.zeros((8, 768), np.float32), (2, 4))
    values = np.linspace(0, 0.3, 8, dtype=np.float32).reshape(2, 4)
    drawn = []
    for number, depth in enumerate((2, 5)):
        curve = np.linspace(0.1, 0.4, depth)
        gate = None if number else curve
        shares = Allocation(curve, curve, curve, gate, gate, 0.1, 1)
        drawn.append(Drawn(f"model {number}", shares, picture, {1: Maps(values, np.zeros((2, 4), np.float32))}))
    draw(tmp_path / "two.png", drawn)
    draw(tmp_path / "one.png", [Drawn("model", drawn[1].allocation, picture, {})])
    with Image.open(tmp_path / "two.png") as two, Image.open(tmp_path / "one.png") as one:
        assert (two.width, one.width) == (1200, 1200)
        assert two.height > one.height
