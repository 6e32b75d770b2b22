"""Patch readout: the reference's tokens, words found in vocabularies, regions, and what drawings leave out."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import Golden
from PIL import Image

from genlip_mlx.analysis import readout as module
from genlip_mlx.analysis.figures import check_figure, letters
from genlip_mlx.analysis.picture import Picture, read_picture
from genlip_mlx.analysis.readout import (
    Group,
    Readout,
    Word,
    WordError,
    draw,
    draw_word,
    drawn_tokens,
    find_word,
    groups,
    is_word,
    readout,
    regions,
)
from genlip_mlx.checkpoint.load import load
from genlip_mlx.data.sources import open_source
from genlip_mlx.data.tokenizer import train
from genlip_mlx.model.genlip import GenLIP
from genlip_mlx.processing.images import ImageError, ImageProcessor
from genlip_mlx.processing.processor import Processor
from genlip_mlx.processing.tokenizer import Tokenizer, load_tokenizer

Loaded = tuple[GenLIP, Processor]


@pytest.fixture(scope="module")
def loaded(case: Golden) -> Loaded:
    return load(case.folder, "float32")


@pytest.fixture(scope="module")
def tokenizer(loaded: Loaded) -> Tokenizer:
    assert loaded[1].tokenizer is not None
    return loaded[1].tokenizer


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A SentencePiece tokenizer of this project."""
    folder = tmp_path_factory.mktemp("pieces")
    train(open_source("synth:train:300:shapes"), 500, folder)
    return load_tokenizer(folder)


def read(case: Golden, loaded: Loaded, sample: int = 0) -> Picture:
    return read_picture(loaded[1].image_processor, case.image_path(sample))


# --- The reference's tokens ---


@pytest.mark.parametrize("chunk", [module.CHUNK_LOGITS, 5000])
def test_top_5_are_the_references(case: Golden, loaded: Loaded, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(module, "CHUNK_LOGITS", chunk)
    for i, sample in enumerate(case.samples):
        picture = read(case, loaded, i)
        result = readout(loaded[0], picture.patches, picture.grid)
        assert result.grid == tuple(sample["grid"])
        name = f"{i}.readout_top5"
        np.testing.assert_array_equal(case.rows(result.ids, name), case.expected(name))


def test_probabilities_are_the_softmax(case: Golden, loaded: Loaded) -> None:
    model, picture = loaded[0], read(case, loaded)
    expected = np.asarray(mx.softmax(model.logits(model.encode(mx.array(picture.patches), [picture.grid])), axis=-1))
    size = expected.shape[1]
    for top in (1, 3, size):
        word = Word("word", (7, 30), True)
        result = readout(model, picture.patches, picture.grid, top, word)
        assert result.ids.shape == result.p.shape == (len(expected), top)
        np.testing.assert_allclose(result.p, -np.sort(-expected, axis=1)[:, :top], rtol=1e-4)
        np.testing.assert_allclose(result.p, np.take_along_axis(expected, result.ids, axis=1), rtol=1e-4)
        assert result.word is not None
        np.testing.assert_allclose(result.word, expected[:, 7] + expected[:, 30], rtol=1e-4)
    for top in (0, size + 1):
        with pytest.raises(ValueError, match=f"top must lie in 1 to {size}, the size of the vocabulary, not {top}"):
            readout(model, picture.patches, picture.grid, top)


# --- Words ---


def test_a_word_counts_with_and_without_a_space_by_its_whole_token(tokenizer: Tokenizer) -> None:
    spelled = {text: tokenizer.encode(text) for text in ("a", " a", "c", " c", "ca", " ca")}
    assert find_word(tokenizer, "a") == Word("a", tuple(i for t in ("a", " a") for i in spelled[t]), True)
    # "ca" alone is two tokens, " ca" is one: only that says the whole of it.
    assert [len(spelled[text]) for text in ("ca", " ca")] == [2, 1]
    assert find_word(tokenizer, " ca ") == Word("ca", (spelled[" ca"][0],), True)


def test_of_a_word_of_several_tokens_the_first_counts(tokenizer: Tokenizer) -> None:
    word = find_word(tokenizer, "cat")
    assert not word.whole
    assert [tokenizer.id_to_text(i) for i in word.ids] == ["c", " ca"]


def test_words_of_a_sentencepiece_vocabulary(pieces: Tokenizer) -> None:
    word = find_word(pieces, "red")
    assert word.whole
    assert " red" in [pieces.id_to_text(i) for i in word.ids]
    assert all("red".startswith(pieces.id_to_text(i).strip()) for i in find_word(pieces, "reddish").ids)


@pytest.mark.parametrize("text", ["", "  ", "red circle"])
def test_a_query_is_one_word(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(WordError, match=r"^query '.*': a single word is needed$"):
        find_word(tokenizer, text)


def test_a_word_outside_the_vocabulary(tokenizer: Tokenizer, pieces: Tokenizer) -> None:
    # Both have its bytes, which by themselves say nothing.
    for each in (tokenizer, pieces):
        with pytest.raises(WordError, match=r"^query '猫': the word is not in the vocabulary of this model"):
            find_word(each, "猫")


def test_the_stop_list_of_drawings(tokenizer: Tokenizer, pieces: Tokenizer) -> None:
    for each in (tokenizer, pieces):
        for text, wanted in (("a", True), ("3", True), (".", False), (",", False), ("-", False)):
            (token,) = each.encode(text)
            assert is_word(each, token) is wanted, text
        assert not is_word(each, each.stop_id)
        assert not is_word(each, each.encode("猫")[0])
        assert not is_word(each, each.vocab_size + 5)


def test_drawings_leave_punctuation_out_and_the_result_does_not(tokenizer: Tokenizer) -> None:
    point, a, spaced, b = (tokenizer.encode(text)[0] for text in (".", "a", " a", "b"))
    ids = np.array([[point, a, spaced, b], [b, point, a, spaced], [point, point, point, point]])
    result = Readout((1, 3), ids, np.array([[0.4, 0.3, 0.2, 0.1]] * 3), None)
    assert drawn_tokens(tokenizer, result) == [[("a", 0.3), ("b", 0.1)], [("b", 0.4), ("a", 0.2)], []]


# --- Regions ---


def test_groups_are_by_word_capitals_aside() -> None:
    tokens = [[("sky", 0.5)], [("Sky", 0.3), ("sea", 0.1)], [], [("sea", 0.2)], [("sky", 0.1)]]
    assert groups(tokens) == [Group("sky", (0, 1, 4), pytest.approx(0.3)), Group("sea", (3,), pytest.approx(0.2))]


def test_regions_are_connected_by_sides() -> None:
    # . # . #
    # # # . #
    # . . # .
    assert regions([1, 3, 4, 5, 7, 10], width=4) == [[1, 4, 5], [3, 7], [10]]
    assert regions([3, 4], width=4) == [[3], [4]]  # ends of two rows
    assert regions([], width=4) == []


def test_a_regions_label_stands_in_its_widest_row() -> None:
    # # . . .
    # # # # .
    # . # . .
    assert module._widest_row([0, 4, 5, 6, 9], 4) == (1, 0, 3)
    assert module._widest_row([0, 4, 8], 4) == (1, 0, 1)


# --- Pictures ---


@pytest.mark.parametrize("grid", [(2, 6), (6, 2)])
def test_drawings(tmp_path: Path, grid: tuple[int, int]) -> None:
    h, w = grid
    picture = Picture("p", Image.new("RGB", (16 * w, 16 * h), "teal"), np.zeros((12, 768), np.float32), grid)
    draw(tmp_path / "tokens.png", picture, [[("sky", 0.5), ("blue", 0.2)]] * 7 + [[("sea", 0.1)]] * 4 + [[]])
    draw_word(tmp_path / "word.png", picture, Word("sea", (1,), True), np.linspace(0, 0.2, 12, dtype=np.float32))
    for name in ("tokens.png", "word.png"):
        with Image.open(tmp_path / name) as drawn:
            assert max(drawn.size) >= 1200
            assert len(set(drawn.convert("L").resize((64, 64)).tobytes())) > 20  # not blank


def test_dollar_signs_and_unknown_scripts_are_drawn(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    picture = Picture("p", Image.new("RGB", (64, 32)), np.zeros((8, 768), np.float32), (2, 4))
    draw(tmp_path / "f.svg", picture, [[("$x^2$", 0.1)], [("\\frac", 0.1)], [("ꙮꙮ", 0.1)], [("猫", 0.1)], *[[]] * 4])
    assert not recwarn.list


def test_widths_of_letters() -> None:
    assert letters("") == 0
    assert letters("猫猫") > letters("ca")


def test_a_picture_smaller_than_a_patch_is_refused() -> None:
    for native in (False, True):
        for size in ((15, 400), (400, 15), (3, 3)):
            with pytest.raises(ImageError, match=f"^image: {size[0]} x {size[1]} pixels are less than one patch"):
                read_picture(ImageProcessor(native), Image.new("RGB", size))
        assert read_picture(ImageProcessor(native), Image.new("RGB", (16, 16))).patches.shape[1] == 768


def test_a_picture_too_long_is_named() -> None:
    with pytest.raises(ImageError, match=r"^long: an image of 16 x 4000 pixels has an aspect ratio over 200"):
        read_picture(ImageProcessor(True), Image.new("RGB", (16, 4000)), "long")


def test_figures_need_a_known_format_and_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    check_figure("a.pdf")
    with pytest.raises(ValueError, match=r"^a\.txt: figures are written as \.png, \.pdf, \.svg$"):
        check_figure("a.txt")
    monkeypatch.setattr("genlip_mlx.analysis.figures.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'^plots need matplotlib: pip install "genlip-mlx\[train\]"$'):
        check_figure("a.png")
