"""Zero-shot scores are teacher-forced losses, however captions share their computation; and what files may say."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import Golden
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from genlip_mlx.analysis import zeroshot
from genlip_mlx.analysis.trie import ROOT, Trie, node_log_probs
from genlip_mlx.analysis.zeroshot import (
    CaptionScorer,
    Gallery,
    ZeroShotError,
    classify,
    open_gallery,
    read_classes,
    read_templates,
)
from genlip_mlx.checkpoint.load import load
from genlip_mlx.data.packing import Pack
from genlip_mlx.model.genlip import GenLIP
from genlip_mlx.processing.processor import DEFAULT_PROMPT, Processor
from genlip_mlx.processing.reader import Reading, read_images
from genlip_mlx.train.objective import Batch, summed_loss

CAPTIONS = [
    "a photo of a cat",
    "a photo of a cat on a mat",
    "a photo of a dog",
    "an astronaut",
    "a",
    "Text, and nothing else.",
]
CLASSES = {"cat": "cat", "dog": "dog", "person": "astronaut"}


@pytest.fixture(scope="module")
def loaded(case: Golden) -> tuple[GenLIP, Processor]:
    return load(case.folder, dtype="float32")


@pytest.fixture(scope="module")
def readings(case: Golden, loaded: tuple[GenLIP, Processor]) -> list[Reading]:
    """Both golden pictures, of different sizes where the model is native."""
    return list(read_images(loaded[1].image_processor, [case.images_dir / n for n in ("astronaut.jpg", "page.png")]))


def alone(model: GenLIP, processor: Processor, reading: Reading, prompt: str, caption: str) -> float:
    """log P of one caption as training computes it: the negative summed loss of one sample."""
    text = processor.text(prompt, caption)
    pack = Pack(reading.patches, (reading.grid,), text.input_ids, text.labels, (len(text.input_ids),), (0,))
    return -float(summed_loss(model, Batch.of(pack)).item())


# --- Scores ---


@pytest.mark.parametrize("prompt", [DEFAULT_PROMPT, ""])
def test_scores_are_the_losses_of_captions_computed_alone(
    loaded: tuple[GenLIP, Processor], readings: list[Reading], prompt: str
) -> None:
    model, processor = loaded
    scorer = CaptionScorer(model, processor, CAPTIONS, prompt)
    expected = [[alone(model, processor, reading, prompt, caption) for caption in CAPTIONS] for reading in readings]
    np.testing.assert_allclose(scorer.log_probs(readings), expected, rtol=0, atol=1e-4)
    assert scorer.lengths.tolist() == [len(processor.text("", caption).input_ids) for caption in CAPTIONS]


def test_scores_are_the_losses_of_the_reference(
    case: Golden, loaded: tuple[GenLIP, Processor], readings: list[Reading]
) -> None:
    by_image = {Path(reading.name).name: reading for reading in readings}
    for sample in case.samples:
        reading = by_image[sample["image"]]
        scorer = CaptionScorer(*loaded, [sample["caption"], "a cat"], sample["prompt"])
        mean = scorer.log_probs([reading])[0, 0] / scorer.lengths[0]
        assert -mean == pytest.approx(sample["loss"], abs=1e-4)


@pytest.mark.parametrize(("run_rows", "chunk_logits"), [(2, 2**26), (7, 3000), (64, 1), (10**6, 2**26)])
def test_runs_and_chunks_of_any_length_give_the_same(
    loaded: tuple[GenLIP, Processor], readings: list[Reading], run_rows: int, chunk_logits: int
) -> None:
    model, processor = loaded
    scorer = CaptionScorer(model, processor, CAPTIONS)
    patches = mx.array(np.concatenate([reading.patches for reading in readings]))
    logits, cache = model.prefill(patches, [reading.grid for reading in readings])
    logits = model.extend(mx.array([scorer.prompt_ids] * 2), cache)
    scores = scorer.trie.sums(node_log_probs(model, scorer.trie, logits, cache, run_rows, chunk_logits))
    np.testing.assert_allclose(scores, scorer.log_probs(readings), rtol=0, atol=1e-4)


# --- The trie ---

TEXTS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=20)


@given(TEXTS)
def test_the_trie_holds_each_text_and_each_beginning_once(texts: list[list[int]]) -> None:
    trie = Trie.of(texts)
    assert [trie.tokens[path].tolist() for path in trie.paths] == texts
    assert len(trie.tokens) == len({tuple(text[:n]) for text in texts for n in range(1, len(text) + 1)})
    for path in trie.paths:
        assert trie.parents[path].tolist() == [ROOT, *path[:-1].tolist()]
        assert trie.depths[path].tolist() == list(range(len(path)))


@given(TEXTS)
def test_descendants_are_a_run_of_rows(texts: list[list[int]]) -> None:
    trie = Trie.of(texts)
    for row in range(len(trie.rows)):
        seen = [j for j in range(row + 1) if j <= row < trie.row_ends[j]]
        assert seen == [*trie.ancestors(row).tolist(), row]


@given(TEXTS, st.integers(0, 2**32 - 1))
def test_sums_are_those_of_paths(texts: list[list[int]], seed: int) -> None:
    trie = Trie.of(texts)
    scores = np.random.default_rng(seed).normal(size=(2, len(trie.tokens)))
    np.testing.assert_allclose(trie.sums(scores), np.stack([scores[:, path].sum(axis=1) for path in trie.paths], 1))


# --- Classes ---


def expected_scores(loaded: tuple[GenLIP, Processor], readings: list[Reading], normalization: str) -> np.ndarray:
    model, processor = loaded
    scores = []
    for reading in readings:
        for name in CLASSES.values():
            captions = [f"a photo of a {name}", f"{name}"]
            values = [alone(model, processor, reading, DEFAULT_PROMPT, caption) for caption in captions]
            if normalization == "mean":
                values = [v / len(processor.text("", c).input_ids) for v, c in zip(values, captions)]
            scores.append(sum(values) / 2)
    return np.array(scores).reshape(len(readings), len(CLASSES))


@pytest.mark.parametrize("normalization", ["mean", "sum"])
@pytest.mark.parametrize("prior_correct", [False, True])
def test_a_class_scores_the_mean_of_its_templates(
    loaded: tuple[GenLIP, Processor],
    readings: list[Reading],
    normalization: zeroshot.Normalization,
    prior_correct: bool,
) -> None:
    names = [reading.name for reading in readings]
    pictures = Gallery(names, ["person", "dog"], names.__getitem__)
    done: list[tuple[float, float]] = []
    result = classify(
        *loaded,
        pictures,
        CLASSES,
        ["a photo of a {}", "{}"],
        normalization=normalization,
        prior_correct=prior_correct,
        progress=lambda *now: done.append(now),
    )
    scores = expected_scores(loaded, readings, normalization)
    if prior_correct:
        scores -= scores.mean(axis=0)
    labels = list(CLASSES)
    for prediction, row in zip(result.predictions, scores):
        assert [name for name, _ in prediction.top] == [labels[i] for i in np.argsort(-row)]
        np.testing.assert_allclose([score for _, score in prediction.top], -np.sort(-row), rtol=0, atol=1e-4)
    right = [labels[row.argmax()] == label for row, label in zip(scores, ["person", "dog"])]
    assert result.accuracy() == np.mean(right)
    assert result.accuracy(3) == 1
    assert result.by_class() == {"dog": (1, int(right[1])), "person": (1, int(right[0]))}
    assert done == [(1, 2), (2, 2)]


def test_one_picture_alone_has_no_prior(loaded: tuple[GenLIP, Processor], readings: list[Reading]) -> None:
    pictures = Gallery([readings[0].name], [None], lambda i: readings[0].name)
    with pytest.raises(ZeroShotError, match="needs two or more"):
        classify(*loaded, pictures, CLASSES, prior_correct=True)


def test_a_picture_smaller_than_a_patch(loaded: tuple[GenLIP, Processor], tmp_path: Path) -> None:
    small = tmp_path / "small.png"
    Image.new("RGB", (40, 15)).save(small)
    sources = [str(small), Image.new("RGB", (8, 40)), Image.new("RGB", (16, 16))]
    result = classify(*loaded, Gallery([str(small), "drawn", "fits"], [None] * 3, sources.__getitem__), CLASSES)
    told = "pixels are less than one patch of 16 x 16; enlarge the picture first"
    assert [p.error for p in result.predictions] == [f"{small}: 40 x 15 {told}", f"drawn: 8 x 40 {told}", None]
    assert (result.skipped, result.accuracy()) == (2, None)
    assert [len(p.top) for p in result.predictions] == [0, 0, 3]


# --- Files ---


def test_classes_and_templates(tmp_path: Path) -> None:
    lines = tmp_path / "classes.txt"
    lines.write_bytes("\ufeffcat \r\n\r\n  Bär\r\n".encode())
    assert read_classes(lines) == {"cat": "cat", "Bär": "Bär"}
    mapping = tmp_path / "classes.json"
    mapping.write_text('{"n01": " tabby cat", "n02": "dog"}')
    assert read_classes(mapping) == {"n01": "tabby cat", "n02": "dog"}
    lines.write_text("a photo of a {}.\n{} and {{}}\n")
    assert read_templates(lines) == ["a photo of a {}.", "{} and {{}}"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.txt", "", "c.txt: names no class; write one name a line"),
        ("c.txt", " \n\n", "c.txt: names no class"),
        ("c.txt", "cat\ndog\ncat \n", "c.txt: class 'cat' stands there 2 times"),
        ("c.json", "{}", "c.json: names no class"),
        ("c.json", '{"a": "cat", "b": "cat"}', "c.json: class 'cat' stands there 2 times"),
        ("c.json", '{"a": "cat", "a": "dog"}', "c.json: class 'a' stands there 2 times"),
        ("c.json", '["cat"]', "c.json: must be an object of labels and the names of their classes"),
        ("c.json", '{"a": 1}', "c.json: must be an object of labels"),
        ("c.json", '{"a": " "}', "c.json: must be an object of labels"),
        ("c.json", "{", "c.json: not valid JSON"),
    ],
)
def test_classes_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(text)
    with pytest.raises(ZeroShotError) as error:
        read_classes(name)
    assert str(error.value).startswith(message)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ZeroShotError, match=r"no\.txt: cannot be read"):
        read_classes(tmp_path / "no.txt")
    (tmp_path / "latin.txt").write_bytes("Bär".encode("latin-1"))
    with pytest.raises(ZeroShotError, match=r"latin\.txt: not UTF-8"):
        read_templates(tmp_path / "latin.txt")


def place(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32)).save(path)


def test_pictures_and_their_labels(tmp_path: Path) -> None:
    for name in ("cat/a.png", "cat/deep/b.png", "dog/c.png"):
        place(tmp_path / "classes" / name)
    pictures = open_gallery(str(tmp_path / "classes"))
    assert pictures.labels == ["cat", "cat", "dog"]
    assert [pictures.picture(i) for i in range(3)] == pictures.names
    loose = open_gallery(str(tmp_path / "classes" / "dog"))
    assert (loose.names, loose.labels) == ([str(tmp_path / "classes/dog/c.png")], [None])
    assert open_gallery(loose.names[0]).labels == [None]
    place(tmp_path / "classes" / "d.png")
    with pytest.raises(ZeroShotError, match=r"d\.png is in no class folder, and others are"):
        open_gallery(str(tmp_path / "classes"))


def test_of_splits_the_test_split_is_classified(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("cat/a.png", "cat/b.png", "cat/c.png", "dog/a.png", "dog/b.png", "dog/c.png"):
            place(tmp_path / split / name)
    pictures = open_gallery(str(tmp_path))
    assert all("/test/" in name for name in pictures.names)
    assert pictures.labels == ["cat"] * 3 + ["dog"] * 3
    drawn = open_gallery("synth:8", "colour")
    assert len(drawn.names) == len(drawn.labels) == 2
