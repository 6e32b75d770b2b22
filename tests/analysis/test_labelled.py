"""Labelled sets: every layout gives its labels, splits that are missing are made the same way each time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genlip_mlx.analysis.labelled import (
    SCENE_LABELS,
    LabelledError,
    LabelledSet,
    open_labelled,
    open_mask,
    scene_mask,
)
from genlip_mlx.data.scenes.vocabulary import SHAPES
from genlip_mlx.data.synthetic import Scenes
from genlip_mlx.processing.images import ImageError, open_image


def paint(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (32, 32)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def class_folders(folder: Path, numbers: dict[str, int]) -> None:
    """Red pictures in folders whose names end in a, blue ones in others."""
    for name, number in numbers.items():
        for i in range(number):
            paint(folder / name / f"{i}.png", (200, i, 0) if name.endswith("a") else (0, i, 200))


def is_red(data: LabelledSet, split: str, i: int) -> bool:
    pixel = open_image(data.splits[split].picture(i)).getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return pixel[0] == 200


def sizes(data: LabelledSet) -> dict[str, int]:
    return {split: len(pictures) for split, pictures in data.splits.items()}


def test_class_folders_in_three_splits(tmp_path: Path) -> None:
    class_folders(tmp_path, {"train/a": 3, "train/b": 2, "val/a": 1, "val/b": 1, "test/b": 2})
    data = open_labelled(str(tmp_path))
    assert data.classes == ("a", "b")
    assert sizes(data) == {"train": 5, "validation": 2, "test": 2}
    assert data.notes == ()
    for split, pictures in data.splits.items():
        for i, label in enumerate(pictures.labels):
            assert is_red(data, split, i) == (label == 0)


def test_splits_that_are_not_there(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 10, "b": 15})
    data = open_labelled(str(tmp_path))
    assert sizes(data) == {"train": 15, "validation": 5, "test": 5}
    assert [note.partition(":")[0] for note in data.notes] == ["no test split", "no validation split"]
    names = [name for pictures in data.splits.values() for name in pictures.names]
    assert len(set(names)) == 25
    for pictures in data.splits.values():
        assert np.bincount(pictures.labels).tolist() == [len(pictures) * 2 // 5, len(pictures) * 3 // 5]
    again = open_labelled(str(tmp_path))
    assert {s: p.identity for s, p in data.splits.items()} == {s: p.identity for s, p in again.splits.items()}


def test_without_a_test_split_the_validation_split_is_tested_on(tmp_path: Path) -> None:
    class_folders(tmp_path, {"train/a": 5, "train/b": 5, "val/a": 3, "val/b": 1})
    data = open_labelled(str(tmp_path))
    assert sizes(data) == {"train": 8, "validation": 2, "test": 4}
    assert "validation split is tested on" in data.notes[0]


def test_a_changed_picture_is_another_identity(tmp_path: Path) -> None:
    class_folders(tmp_path, {"train/a": 2, "train/b": 2, "val/b": 1, "test/b": 1})
    before = open_labelled(str(tmp_path)).splits["test"].identity
    paint(tmp_path / "test" / "b" / "0.png", (1, 2, 3), (40, 40))
    assert open_labelled(str(tmp_path)).splits["test"].identity != before


Layout = Callable[[Path], object]


def only_empty(folder: Path) -> None:
    (folder / "a").mkdir()
    class_folders(folder, {"b": 2})


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda folder: None, {}, "no class folders"),
        (only_empty, {}, "no images in this folder"),
        (lambda folder: class_folders(folder, {"a": 3}), {}, "only one class, 'a'"),
        (lambda folder: class_folders(folder, {"a": 9, "b": 1}), {}, "class 'b' has only one picture to train on"),
        (lambda folder: class_folders(folder, {"a": 9, "b": 9}), {"label": "shape"}, "leave out --label"),
        (lambda folder: class_folders(folder, {"test/a": 1, "test/b": 1}), {}, "no train split; there is test"),
        (
            lambda folder: class_folders(folder, {"train/a": 3, "train/b": 3, "test/zebra": 1}),
            {},
            "test/zebra: unknown label; the training split has no class 'zebra'",
        ),
        (lambda folder: class_folders(folder, {"a": 2}), {"task": "segment"}, "no folder images"),
        (lambda folder: class_folders(folder, {"images": 2, "masks": 1}), {"task": "segment"}, "1.png: no such mask"),
        (lambda folder: None, {"task": "sort"}, "unknown task 'sort'; known: classify, segment"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, make: Layout, options: dict[str, str], message: str) -> None:
    make(tmp_path)
    with pytest.raises((LabelledError, ImageError), match=message):
        open_labelled(str(tmp_path), **options)


@pytest.mark.parametrize(
    ("data", "label", "message"),
    [
        ("nowhere at all", None, "no such folder"),
        ("synth:", None, "no label; name one with --label: shape, colour"),
        ("synth:", "size", "unknown label 'size'"),
        ("synth:train", "shape", "the form is synth: or synth:SIZE"),
    ],
)
def test_wrong_names(data: str, label: str | None, message: str) -> None:
    with pytest.raises(LabelledError, match=message):
        open_labelled(data, label=label)


# --- Scenes ---


@pytest.mark.parametrize("label", SCENE_LABELS)
def test_scenes_by_label(label: str) -> None:
    data = open_labelled("synth:24", label=label)
    assert sizes(data) == {"train": 24, "validation": 6, "test": 6}
    by_image = {scene.image.tobytes(): scene for scene in Scenes("test", size=60, kinds=("shapes",))}
    test = data.splits["test"]
    for i, truth in enumerate(test.labels):
        (fact,) = by_image[open_image(test.picture(i)).tobytes()].facts
        assert data.classes[truth] == fact[label]


def test_the_mask_of_a_scene_covers_its_shapes() -> None:
    checked = 0
    for scene in Scenes("train", size=200, kinds=("shapes",)):
        if len(scene.facts) != 1 or scene.facts[0]["shape"] != "square":
            continue
        mask = np.asarray(scene_mask(scene, "shape"))
        assert set(np.unique(mask)) == {0, 1 + list(SHAPES).index("square")}
        # Squares turned a little fill most of the box around them.
        rows, columns = np.nonzero(mask)
        if scene.facts[0]["count"] == 1:
            box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
            assert 0.7 < len(rows) / box <= 1
            checked += 1
    assert checked


# --- Masks and tables ---


def test_masks_in_folders(tmp_path: Path) -> None:
    for i in range(5):
        paint(tmp_path / "images" / f"{i}.png", (9, 9, i))
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(np.full((32, 32), i, np.uint8)).save(tmp_path / "masks" / f"{i}.png")
    (tmp_path / "classes.txt").write_text("sky\nsea\n")
    data = open_labelled(str(tmp_path), "segment")
    assert data.classes == ("sky", "sea")
    assert sizes(data) == {"train": 3, "validation": 1, "test": 1}
    for pictures in data.splits.values():
        assert pictures.mask is not None
        for i, name in enumerate(pictures.names):
            assert np.asarray(pictures.mask(i)).max() == int(Path(name).stem)


def test_masks_are_class_numbers(tmp_path: Path) -> None:
    numbers = np.arange(4, dtype=np.uint8).reshape(2, 2)
    palette = Image.fromarray(numbers)
    palette.putpalette([7] * 768)
    palette.save(tmp_path / "p.png")
    np.testing.assert_array_equal(np.asarray(open_mask(tmp_path / "p.png")), numbers)
    paint(tmp_path / "rgb.png", (1, 2, 3))
    with pytest.raises(LabelledError, match=r"rgb\.png: the mask has mode RGB; write class numbers"):
        open_mask(tmp_path / "rgb.png")
    (tmp_path / "bad.png").write_bytes(b"nothing")
    with pytest.raises(LabelledError, match=r"bad\.png: the mask cannot be read"):
        open_mask(tmp_path / "bad.png")


@pytest.fixture
def table(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Parquet as on the hub: train and test files, red pictures of class "warm", blue ones of class "cold"."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["warm", "cold"]),
            "word": datasets.Value("string"),
        }
    )
    for split, labels in {"train": [0, 1] * 4, "test": [1, 0]}.items():
        pictures = [Image.new("RGB", (32, 32), (0, 0, 200) if label else (200, 0, 0)) for label in labels]
        rows = {"image": pictures, "label": labels, "word": [f"w{label}" for label in labels]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    return tmp_path


def test_tables(table: Path) -> None:
    data = open_labelled(str(table))
    assert data.classes == ("warm", "cold")
    assert sizes(data) == {"train": 6, "validation": 2, "test": 2}
    for split, pictures in data.splits.items():
        assert [is_red(data, split, i) for i in range(len(pictures))] == (pictures.labels == 0).tolist()
    by_word = open_labelled(str(table), label="word")
    assert by_word.splits["test"].identity == data.splits["test"].identity  # their features are the same
    assert by_word.classes == ("w0", "w1")
    assert by_word.splits["test"].labels.tolist() == [1, 0]
    with pytest.raises(LabelledError, match="no column 'kind'; name one of image, label, word with --label"):
        open_labelled(str(table), label="kind")


def test_one_parquet_file_is_divided(table: Path) -> None:
    data = open_labelled(str(table / "train-00000-of-00001.parquet"))
    assert sizes(data) == {"train": 4, "validation": 2, "test": 2}
    (table / "train-00000-of-00001.parquet").write_bytes(b"nothing")
    with pytest.raises(LabelledError, match="cannot be read"):
        open_labelled(str(table / "train-00000-of-00001.parquet"))
