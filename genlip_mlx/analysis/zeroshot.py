"""Zero-shot classification by speaking: the class whose caption the model finds likeliest for the picture.

A class scores log P(caption | picture), with the end tokens that a caption is trained with, so a score is the negative
of a teacher-forced loss. Each picture is read once: all captions share its keys and values, and captions that
begin alike share their beginning (`trie.py`).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from PIL import Image

from ..model.genlip import GenLIP, VisionOnlyError
from ..processing.images import ImageProcessor, list_images
from ..processing.processor import DEFAULT_PROMPT, Processor
from ..processing.reader import ImageLike, Reading, read_images
from .labelled import open_labelled
from .picture import check_size
from .trie import RUN_ROWS, Trie, node_log_probs

BATCH_SIZE = 8  # pictures read together, where their captions are few
TOP_K = 5  # classes named for each picture

Normalization = Literal["mean", "sum"]


class ZeroShotError(ValueError):
    """Classes, templates or labels that cannot be used; the message names the file."""


@dataclass(frozen=True)
class Prediction:
    """What a picture was taken for.

    `top` holds the best classes and their scores, best first. For a picture that could not be
    used `error` says why, and `top` is empty.
    """

    image: str
    label: str | None
    top: tuple[tuple[str, float], ...]
    error: str | None = None


@dataclass(frozen=True)
class ZeroShot:
    """Predictions for a data set, and how well they agree with its labels, if it has any."""

    classes: Mapping[str, str]  # label -> name
    templates: Sequence[str]
    prompt: str
    normalization: Normalization
    prior_corrected: bool
    predictions: list[Prediction]

    @property
    def skipped(self) -> int:
        return sum(p.error is not None for p in self.predictions)

    def accuracy(self, k: int = 1) -> float | None:
        """The share of labelled pictures whose class is among the best k; None without labels."""
        hits = [p.label in [name for name, _ in p.top[:k]] for p in self._labelled]
        return sum(hits) / len(hits) if hits else None

    def by_class(self) -> dict[str, tuple[int, int]]:
        """For each label that occurs: its pictures, and how many were taken for it."""
        pictures = Counter(p.label for p in self._labelled)
        correct = Counter(p.label for p in self._labelled if p.top[0][0] == p.label)
        return {label: (pictures[label], correct[label]) for label in self.classes if pictures[label]}

    @property
    def _labelled(self) -> list[Prediction]:
        return [p for p in self.predictions if p.error is None and p.label is not None]

    def to_json(self) -> dict[str, Any]:
        """For `--output`; scores are in nats, a token's or a caption's as `normalization` says."""
        return {
            "accuracy": self.accuracy(),
            "accuracy_top5": self.accuracy(TOP_K) if len(self.classes) > TOP_K else None,
            "images": len(self.predictions) - self.skipped,
            "skipped": self.skipped,
            "classes": dict(self.classes),
            "templates": list(self.templates),
            "prompt": self.prompt,
            "normalization": self.normalization,
            "prior_corrected": self.prior_corrected,
            "by_class": {label: {"images": n, "correct": hits} for label, (n, hits) in self.by_class().items()},
            "predictions": [
                {
                    "image": p.image,
                    "label": p.label,
                    "top": [{"class": name, "score": score} for name, score in p.top],
                    "error": p.error,
                }
                for p in self.predictions
            ],
        }


# --- Files ---


def read_classes(path: str | Path) -> dict[str, str]:
    """Labels and the names that captions call them by: one name a line, or a JSON object {label: name}.

    Raises:
        ZeroShotError: if there is none, or a label or a name stands there twice.
    """
    if Path(path).suffix == ".json":
        try:
            pairs = json.loads(_text(path), object_pairs_hook=list)
        except json.JSONDecodeError as error:
            raise ZeroShotError(f"{path}: not valid JSON ({error})") from None
        if not isinstance(pairs, list) or not all(
            isinstance(pair, tuple) and isinstance(pair[1], str) and pair[1].strip() for pair in pairs
        ):
            raise ZeroShotError(f"{path}: must be an object of labels and the names of their classes")
        pairs = [(label, name.strip()) for label, name in pairs]
    else:
        pairs = [(name, name) for name in _lines(path)]
    if not pairs:
        raise ZeroShotError(f"{path}: names no class; write one name a line")
    for kind in zip(*pairs):
        value, times = Counter(kind).most_common(1)[0]
        if times > 1:
            raise ZeroShotError(f"{path}: class {value!r} stands there {times} times; a class needs a name of its own")
    return dict(pairs)


def read_templates(path: str | Path) -> list[str]:
    """Captions with {} in place of the class, one a line.

    Raises:
        ZeroShotError: if there is none, or one has no {}.
    """
    templates = _lines(path)
    if not templates:
        raise ZeroShotError(f"{path}: holds no template; write one a line, with {{}} for the class")
    for template in templates:
        if "{}" not in template:
            raise ZeroShotError(f"{path}: template {template!r} has no {{}} for the class")
    return templates


def _lines(path: str | Path) -> list[str]:
    return [line.strip() for line in _text(path).splitlines() if line.strip()]


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ZeroShotError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise ZeroShotError(f"{path}: cannot be read ({error.strerror})") from None


# --- Pictures ---


@dataclass(frozen=True)
class Gallery:
    """Numbered pictures to classify; nothing is opened before it is asked for."""

    names: Sequence[str]
    labels: Sequence[str | None]  # None: not known
    picture: Callable[[int], ImageLike]
    notes: tuple[str, ...] = ()  # what a user should know of the choice of pictures


def open_gallery(data: str, label: str | None = None) -> Gallery:
    """Pictures, with labels where there are some.

    Args:
        data: a folder of class folders, all of whose pictures are taken; a folder of pictures, a picture or an address,
            without labels; or what `open_labelled` opens, of which the test split is taken.
        label: as in `open_labelled`.

    Raises:
        ImageError: if there is no picture.
        ZeroShotError: if some pictures lie in class folders and others beside them.
        LabelledError: as `open_labelled`.
    """
    path = Path(data).expanduser()
    tables = path.suffix == ".parquet" or any(path.glob("*.parquet")) or any(path.glob("data/*.parquet"))
    split = tables or any((path / name).is_dir() for name in ("train", "training"))
    if "://" not in data and (split or not path.exists()):
        found = open_labelled(data, "classify", label)
        test = found.splits["test"]
        return Gallery(test.names, [found.classes[number] for number in test.labels], test.picture, found.notes)
    names = list_images([data if "://" in data else str(path)])
    # The label is the first folder below the one that was named.
    parts = [Path(os.path.relpath(name, path)).parts if path.is_dir() else () for name in names]
    labels = [found[0] if len(found) > 1 else None for found in parts]
    loose = [name for name, folder in zip(names, labels) if folder is None]
    if loose and len(loose) < len(names):
        raise ZeroShotError(f"{data}: {loose[0]} is in no class folder, and others are; move it, or leave it out")
    return Gallery(names, labels, names.__getitem__)


# --- Scores ---


class CaptionScorer:
    """A model with its prompt and candidate captions settled: pictures in, log-probabilities out.

    Args:
        captions: texts the pictures may have; those that begin alike share their beginning.
        prompt: what the captions answer; "" asks nothing.

    Raises:
        VisionOnlyError: if the model has no text side.
        ValueError: if a caption is empty.
    """

    def __init__(self, model: GenLIP, processor: Processor, captions: Sequence[str], prompt: str = DEFAULT_PROMPT):
        if model.config.vision_only or processor.tokenizer is None:
            raise VisionOnlyError
        self.model = model
        self.prompt_ids = processor.prompt_ids(prompt)
        texts = [processor.text("", caption).input_ids.tolist() for caption in captions]
        self.trie = Trie.of(texts)
        self.lengths = np.array([len(text) for text in texts])  # tokens of each caption, its end included

    def log_probs(self, readings: Sequence[Reading]) -> np.ndarray:
        """log P(caption and its end | picture, prompt) in nats, float64 [pictures, captions]."""
        patches = mx.array(np.concatenate([reading.patches for reading in readings]))
        logits, cache = self.model.prefill(patches, [reading.grid for reading in readings])
        if self.prompt_ids:
            prompt = mx.broadcast_to(mx.array(self.prompt_ids), (len(readings), len(self.prompt_ids)))
            logits = self.model.extend(prompt, cache)
        return self.trie.sums(node_log_probs(self.model, self.trie, logits, cache))


@dataclass(frozen=True)
class _WholePatches(ImageProcessor):
    """As the model's own, without pictures under a patch."""

    def __call__(self, image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
        check_size(image, self.patch_size)
        return super().__call__(image)


def classify(
    model: GenLIP,
    processor: Processor,
    pictures: Gallery,
    classes: Mapping[str, str],
    templates: Sequence[str] = ("{}",),
    *,
    prompt: str = DEFAULT_PROMPT,
    normalization: Normalization = "mean",
    prior_correct: bool = False,
    progress: Callable[[float, float], None] = lambda done, total: None,
) -> ZeroShot:
    """Take each picture for the class with the best score.

    A class' score is the mean, over templates, of log P(caption | picture), divided by the caption's tokens
    unless `normalization` is "sum".

    Args:
        classes: label -> the name that takes the place of {} in templates.
        prior_correct: subtract log P(caption), so that no class wins by being common words. It is
            estimated as the mean of log P(caption | picture) over these very pictures (their labels are not used): a
            blank picture, being like none the model has seen, makes a far worse estimate.

    Raises:
        ZeroShotError: if a label is no class, or one picture alone is to be corrected.
        VisionOnlyError: if the model has no text side.
    """
    for name, label in zip(pictures.names, pictures.labels):
        if label is not None and label not in classes:
            raise ZeroShotError(
                f"{name}: unknown class {label!r}; add it to the classes, or map labels to class names in a .json file"
            )
    captions = [template.replace("{}", name) for name in classes.values() for template in templates]
    scorer = CaptionScorer(model, processor, captions, prompt)
    scores = np.zeros((len(pictures.names), len(classes)), np.float32)
    errors: list[str | None] = []
    for reading, values in _scored(scorer, processor.image_processor, pictures):
        if reading.error is None:
            if normalization == "mean":
                values = values / scorer.lengths
            scores[len(errors)] = values.reshape(len(classes), len(templates)).mean(axis=1)
        errors.append(reading.error)
        progress(len(errors), len(pictures.names))
    good = np.array([error is None for error in errors])
    if prior_correct:
        if good.sum() < 2:
            raise ZeroShotError("log P(caption) is a mean over pictures: --prior-correct needs two or more")
        # The mean over templates is linear, so correcting classes is correcting captions.
        scores -= scores[good].mean(axis=0)
    labels = list(classes)
    predictions = []
    for name, label, row, error in zip(pictures.names, pictures.labels, scores, errors):
        best = np.argsort(-row, kind="stable")[: TOP_K if error is None else 0]
        top = tuple((labels[i], float(row[i])) for i in best)
        predictions.append(Prediction(name, label, top, error))
    return ZeroShot(classes, templates, prompt, normalization, prior_correct, predictions)


def _scored(
    scorer: CaptionScorer, processor: ImageProcessor, pictures: Gallery
) -> Iterator[tuple[Reading, np.ndarray]]:
    """Each picture in order with the log-probabilities of its captions [captions], nothing if it has an error."""
    # With few captions, several pictures fill a run of the trie; with many, one does.
    size = max(1, min(BATCH_SIZE, RUN_ROWS // (len(scorer.trie.rows) or 1)))
    batch: list[Reading] = []

    def finished() -> Iterator[tuple[Reading, np.ndarray]]:
        good = [reading for reading in batch if reading.error is None]
        rows = iter(scorer.log_probs(good) if good else ())
        for reading in batch:
            yield reading, next(rows) if reading.error is None else np.zeros(0)

    images = (pictures.picture(number) for number in range(len(pictures.names)))
    for name, reading in zip(pictures.names, read_images(_WholePatches(**vars(processor)), images)):
        if reading.error is not None and not reading.error.startswith(name):  # a picture that was no file
            reading = replace(reading, error=f"{name}: {reading.error.partition(': ')[2]}")
        batch.append(reading)
        if sum(r.error is None for r in batch) == size:
            yield from finished()
            batch = []
    yield from finished()
