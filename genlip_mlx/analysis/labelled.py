"""Pictures with labels, wherever they come from: class folders, tables, folders of masks, drawn scenes.

The one idea: a split is a list of names and labels, and a function from a number to a picture. Nothing is opened
before it is asked for, so a set of any size can be listed, divided and named in memory.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .. import __version__
from ..data.scenes.drawing import distance, named
from ..data.scenes.vocabulary import COLOURS, SHAPES
from ..data.synthetic import Scene, Scenes
from ..processing.images import list_images, open_image
from ..processing.reader import ImageLike

TASKS = ("classify", "segment")
SPLITS = ("train", "validation", "test")
IGNORED = 255  # in a mask: this pixel has no label
SCENE_LABELS: dict[str, tuple[str, ...]] = {"shape": tuple(SHAPES), "colour": tuple(COLOURS)}
SCENES = 2000  # training pictures of a plain "synth:"
HELD_OUT = 0.2  # of each class, for a split that is not there

_FOLDERS = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev")}
_FOLDERS["test"] = ("test", "testing")
_LABEL_COLUMNS = ("label", "labels", "class", "fine_label")
_IMAGE_COLUMNS = ("image", "img", "file_name")


class LabelledError(ValueError):
    """A labelled set that is not there, has another layout, or cannot be divided."""


@dataclass(frozen=True)
class Pictures:
    """Numbered pictures with their labels.

    Attributes:
        names: what messages call each picture.
        labels: int32 [n], the class of each; zeros for segmentation.
        picture: the picture of a number, not yet decoded.
        mask: for segmentation, the label of each of its pixels: a picture of class numbers, `IGNORED` for none.
        identity: tells these pictures and masks from others, and from changed ones; other labels change nothing.
    """

    names: Sequence[str]
    labels: np.ndarray
    picture: Callable[[int], ImageLike]
    mask: Callable[[int], Image.Image] | None
    identity: str

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, rows: np.ndarray) -> Pictures:
        """Some of them, by number."""
        numbers = [int(row) for row in rows]
        picture, mask = self.picture, self.mask
        return Pictures(
            [self.names[i] for i in numbers],
            self.labels[rows],
            lambda i: picture(numbers[i]),
            None if mask is None else lambda i: mask(numbers[i]),
            digest([self.identity, *map(str, numbers)]),
        )


@dataclass(frozen=True)
class LabelledSet:
    """Three splits of labelled pictures.

    Attributes:
        classes: their names; for segmentation without a list of names, none, and numbers take their place.
        splits: `Pictures` by "train", "validation" and "test".
        notes: how splits were made that were not there.
    """

    name: str
    task: str
    classes: tuple[str, ...]
    splits: Mapping[str, Pictures]
    notes: tuple[str, ...]


def digest(parts: Iterable[str]) -> str:
    """A fingerprint of strings, 24 hexadecimal digits."""
    joined = "\0".join(parts).encode("utf-8", "surrogateescape")
    return hashlib.sha256(joined).hexdigest()[:24]


def open_labelled(data: str, task: str = "classify", label: str | None = None) -> LabelledSet:
    """Open a labelled set; nothing is decoded yet.

    A test split that is missing is the validation split, or a fifth of each class, always the same; a validation
    split that is missing is a fifth of each class of the training split.

    Args:
        data: one of
            - classify: a folder of class folders, or of train, validation (val) and test folders that hold them;
            - classify: parquet files (one, or a folder of them as on the hub), or a hub data set owner/name[:CONFIG],
              with a column of pictures and one of classes;
            - segment: a folder with images/ and masks/ (PNG of class numbers, 255 for no class, of the picture's
              name and size), or train, validation and test folders that hold them; classes.txt names classes;
            - synth:[SIZE], scenes drawn with shapes: to classify, those with one group of equal shapes.
        task: "classify" or "segment".
        label: of scenes, "shape" or "colour"; of a table, the column of classes.

    Raises:
        LabelledError: if there is nothing of the kind, a label is not known, or a class is too small to divide.
        ImageError: if a class folder holds no pictures.
    """
    if task not in TASKS:
        raise LabelledError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    if data.startswith("synth:"):
        return _open_scenes(data, task, label)
    path = Path(data).expanduser()
    tables = _tables(path)
    if task == "segment":
        if not path.is_dir():
            raise LabelledError(f"{data}: no such folder; to segment takes one with images/ and masks/, or synth:")
        _refuse_label(data, label)
        return _divided(data, task, _class_names(path), _mask_folders(path))
    if tables:
        return _open_tables(data, tables, label)
    if path.is_dir():
        _refuse_label(data, label)
        return _divided(data, task, *_class_folders(path))
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?", data):
        return _open_tables(data, None, label)
    raise LabelledError(f"{data}: no such folder or parquet file, and not a hub data set (owner/name) either")


def _refuse_label(data: str, label: str | None) -> None:
    if label is not None:
        raise LabelledError(f"{data}: folders name their classes, so {label!r} cannot be chosen; leave out --label")


def _divided(name: str, task: str, classes: tuple[str, ...], found: dict[str, Pictures]) -> LabelledSet:
    """Three splits from those that are there."""
    if "train" not in found:
        raise LabelledError(f"{name}: no train split; there is {', '.join(found)}")
    splits, notes = dict(found), []
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
        notes.append("no test split: the validation split is tested on, and not chosen by")
    absent = [split for split in ("test", "validation") if split not in splits]
    for number, split in enumerate(absent):
        share = HELD_OUT / (1 - number * HELD_OUT)  # of what is left: a fifth of all, then a fourth of four fifths
        splits["train"], splits[split] = _hold_out(name, splits["train"], share, split, classes)
        notes.append(f"no {split} split: {len(splits[split])} training pictures are held out for it")
    return LabelledSet(name, task, classes, {split: splits[split] for split in SPLITS}, tuple(notes))


def _hold_out(
    name: str, pictures: Pictures, share: float, split: str, classes: tuple[str, ...]
) -> tuple[Pictures, Pictures]:
    held = np.zeros(len(pictures), bool)
    rng = np.random.default_rng(0)
    for label in np.unique(pictures.labels):
        rows = rng.permutation(np.flatnonzero(pictures.labels == label))
        if len(rows) < 2:
            what = f"class {classes[label]!r} has" if len(np.unique(pictures.labels)) > 1 else "there is"
            raise LabelledError(
                f"{name}: {what} only one picture to train on, so none can be held out for {split}; "
                f"add pictures, or a {split} split"
            )
        held[rows[: max(1, round(share * len(rows)))]] = True
    return pictures.subset(np.flatnonzero(~held)), pictures.subset(np.flatnonzero(held))


# --- Folders ---


def _split_folders(folder: Path) -> dict[str, Path]:
    """Split folders that are there; the folder itself as "train" where there is none."""
    found = {}
    for split, names in _FOLDERS.items():
        inside = next((folder / name for name in names if (folder / name).is_dir()), None)
        if inside is not None:
            found[split] = inside
    return found or {"train": folder}


def _class_folders(folder: Path) -> tuple[tuple[str, ...], dict[str, Pictures]]:
    classes: tuple[str, ...] = ()
    found = {}
    for split, inside in _split_folders(folder).items():
        names = sorted(path.name for path in inside.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not names:
            raise LabelledError(f"{inside}: no class folders; expected {inside}/CLASS/picture.png")
        if not classes:
            classes = tuple(names)
        unknown = sorted(set(names) - set(classes))
        if unknown:
            raise LabelledError(f"{inside / unknown[0]}: unknown label; the training split has no class {unknown[0]!r}")
        paths, labels = [], []
        for name in names:
            inside_class = list_images([str(inside / name)])
            paths += inside_class
            labels += [classes.index(name)] * len(inside_class)
        found[split] = _files(paths, np.array(labels, np.int32), None)
    if len(classes) < 2:
        raise LabelledError(f"{folder}: only one class, {classes[0]!r}; there is nothing to tell apart")
    return classes, found


def _mask_folders(folder: Path) -> dict[str, Pictures]:
    found = {}
    for split, inside in _split_folders(folder).items():
        for name in ("images", "masks"):
            if not (inside / name).is_dir():
                raise LabelledError(f"{inside}: no folder {name}; to segment takes images/ and masks/")
        paths = list_images([str(inside / "images")])
        masks = [inside / "masks" / Path(path).relative_to(inside / "images").with_suffix(".png") for path in paths]
        missing = [mask for mask in masks if not mask.is_file()]
        if missing:
            raise LabelledError(f"{missing[0]}: no such mask ({len(missing)} of {len(masks)} pictures have none)")
        found[split] = _files(paths, np.zeros(len(paths), np.int32), masks)
    return found


def _class_names(folder: Path) -> tuple[str, ...]:
    file = folder / "classes.txt"
    return tuple(file.read_text(encoding="utf-8").splitlines()) if file.is_file() else ()


def _files(paths: list[str], labels: np.ndarray, masks: list[Path] | None) -> Pictures:
    def stamp(path: str | Path) -> str:
        state = os.stat(path)
        return f"{path} {state.st_size} {state.st_mtime_ns}"

    parts = [*map(stamp, paths), *map(stamp, masks or ())]
    mask = None if masks is None else lambda i: open_mask(masks[i])
    return Pictures(paths, labels, paths.__getitem__, mask, digest(parts))


def open_mask(path: Path) -> Image.Image:
    """A mask file: a picture whose pixels are class numbers, mode "L" or a palette's indices.

    Raises:
        LabelledError: if it cannot be read or holds colours.
    """
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise LabelledError(f"{path}: the mask cannot be read ({error})") from None
    if image.mode not in ("L", "P", "1"):
        raise LabelledError(f"{path}: the mask has mode {image.mode}; write class numbers as 8-bit grey or palette")
    return Image.fromarray(np.asarray(image).astype(np.uint8))


# --- Tables ---


def _tables(path: Path) -> dict[str, list[str]]:
    """Parquet files by split; none if there are no such files."""
    if path.is_file():
        return {"train": [str(path)]} if path.suffix == ".parquet" else {}
    found: dict[str, list[str]] = {}
    for file in sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")]):
        word = re.split(r"[-_.]", file.name)[0]
        split = next((split for split, names in _FOLDERS.items() if word in names), "train")
        found.setdefault(split, []).append(str(file))
    return found


def _open_tables(data: str, files: dict[str, list[str]] | None, label: str | None) -> LabelledSet:
    try:
        import datasets
    except ImportError:
        raise LabelledError(f'{data}: reading it needs the extra "train": pip install "genlip-mlx[train]"') from None
    repo, _, config = data.partition(":")
    try:
        tables = (
            datasets.load_dataset(repo, config or None)
            if files is None
            else datasets.load_dataset("parquet", data_files=files)
        )
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
        raise LabelledError(f"{data}: cannot be read ({reason})") from None
    found: dict[str, Pictures] = {}
    classes: tuple[str, ...] = ()
    names = {name: split for split, known in _FOLDERS.items() for name in known}
    for name, table in sorted(tables.items(), key=lambda item: names.get(item[0]) != "train"):
        if name not in names:
            continue
        image, column = _columns(data, table, label)
        values = np.asarray(table[column])
        if names[name] == "test" and values.dtype.kind == "i" and (values < 0).all():
            continue  # a test split whose labels are kept secret
        if not classes:
            classes = tuple(getattr(table.features[column], "names", None) or map(str, np.unique(values)))
            known = np.arange(len(classes)) if hasattr(table.features[column], "names") else np.unique(values)
        rows = np.searchsorted(known, values)
        wrong = (rows == len(known)) | (known[np.minimum(rows, len(known) - 1)] != values)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise LabelledError(f"{data}: unknown label {values[row]!s} in row {row} of the {name} split")
        found[names[name]] = _rows(f"{data}:{name}", table, image, rows.astype(np.int32))
    if not found:
        raise LabelledError(f"{data}: no split called train, validation or test; there is {', '.join(tables)}")
    return _divided(data, "classify", classes, found)


def _columns(data: str, table: Any, label: str | None) -> tuple[str, str]:
    there = table.column_names
    typed = [name for name, feature in table.features.items() if type(feature).__name__ == "Image"]
    image = next((name for name in (*typed, *_IMAGE_COLUMNS) if name in there), None)
    column = label or next((name for name in _LABEL_COLUMNS if name in there), None)
    if image is None:
        raise LabelledError(f"{data}: no column of pictures; there are {', '.join(there)}")
    if column is None or column not in there:
        what = f"no column {column!r}" if column else "no column of classes"
        raise LabelledError(f"{data}: {what}; name one of {', '.join(there)} with --label")
    return image, column


def _rows(name: str, table: Any, column: str, labels: np.ndarray) -> Pictures:
    raw = table.select_columns([column]).with_format("arrow")  # pictures stay the bytes they are

    def picture(row: int) -> ImageLike:
        (values,) = raw[row].to_pylist()
        value = values[column]
        content: ImageLike = (value["bytes"] or value["path"]) if isinstance(value, dict) else value
        return content

    names = [f"{name}[{row}]" for row in range(len(labels))]
    return Pictures(names, labels, picture, None, digest([name, table._fingerprint, column]))


# --- Scenes ---


def _open_scenes(data: str, task: str, label: str | None) -> LabelledSet:
    size = data.removeprefix("synth:") or str(SCENES)
    if not size.isdigit() or int(size) < 8:
        raise LabelledError(f"{data}: the form is synth: or synth:SIZE, of at least 8 training pictures")
    if label not in SCENE_LABELS:
        given = "no label" if label is None else f"unknown label {label!r}"
        raise LabelledError(f"{data}: {given}; name one with --label: {', '.join(SCENE_LABELS)}")
    names = SCENE_LABELS[label]
    sizes = {"train": int(size), "validation": int(size) // 4, "test": int(size) // 4}
    if task == "segment":
        names = ("background", *names)
    splits = {split: _scenes(split, number, task, label, names) for split, number in sizes.items()}
    return LabelledSet(data, task, names, splits, ())


def _scenes(split: str, size: int, task: str, label: str, classes: tuple[str, ...]) -> Pictures:
    drawn = Scenes(split, size=2**40, kinds=("shapes",))
    numbers: list[int] = []
    labels: list[int] = []
    for number, scene in enumerate(drawn):
        if len(numbers) == size:
            break
        if task == "segment" or len(scene.facts) == 1:
            numbers.append(number)
            labels.append(0 if task == "segment" else classes.index(scene.facts[0][label]))
    mask = None if task == "classify" else lambda i: scene_mask(drawn[numbers[i]], label)
    identity = digest(["scenes", __version__, split, *([label] if task == "segment" else []), *map(str, numbers)])
    names = [f"synth:{split}[{number}]" for number in numbers]
    return Pictures(names, np.array(labels, np.int32), lambda i: drawn[numbers[i]].image, mask, identity)


def scene_mask(scene: Scene, label: str) -> Image.Image:
    """What each pixel of a scene of shapes shows: 0 for the ground, else 1 + the number of its shape or colour.

    A pixel belongs to whichever colour it is nearest to, of those of the scene's groups and of the ground, which
    is all that is drawn at a picture's edge. Shapes are drawn in colours far from their ground's; at their
    smoothed outlines a pixel may be off, nowhere else.
    """
    pixels = np.asarray(open_image(scene.image), np.float32)  # [H, W, 3]
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    red, green, blue = (round(float(value)) for value in np.median(edge, axis=0))
    colours = [(red, green, blue), *(named(fact["colour"]) for fact in scene.facts)]
    numbers = [0, *(1 + SCENE_LABELS[label].index(fact[label]) for fact in scene.facts)]
    weights = np.sqrt([distance((0, 0, 0), axis) ** 2 / 255**2 for axis in ((255, 0, 0), (0, 255, 0), (0, 0, 255))])
    apart = [(((pixels - np.array(colour)) * weights) ** 2).sum(-1) for colour in colours]
    return Image.fromarray(np.array(numbers, np.uint8)[np.argmin(apart, axis=0)])
