"""Encoding pictures: patch features of many images, packed so that the model's products stay large."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from .files import atomic_file
from .model.genlip import GenLIP
from .processing.images import ImageError
from .processing.processor import Processor
from .processing.reader import ImageLike, Reading, as_list, read_images

PACK_TOKENS = 2048  # image tokens encoded together


@dataclass(frozen=True)
class Features:
    """What the model makes of one picture.

    `features` is the output of `ln_post`, [h*w, D] (row-major patches), or [D] if pooled.
    `hidden_states` holds the chosen layers, [layers, h*w, D] or [layers, D]; 0 is the embeddings.
    `error` says why a picture could not be read; the arrays are then None.
    """

    image: str
    grid: tuple[int, int]  # h, w in patches
    features: mx.array | None
    hidden_states: mx.array | None = None
    error: str | None = None


def encode(
    model: GenLIP,
    processor: Processor,
    images: ImageLike | Sequence[ImageLike],
    *,
    layers: Literal["last", "all"] | Sequence[int] = "last",
    pool: Literal["none", "mean"] = "none",
    size: int | Literal["native"] | None = None,
) -> list[Features]:
    """Features of pictures: paths, URLs, encoded bytes or PIL images.

    Args:
        layers: which hidden states to return beside the features: none ("last"), "all" N + 1
            of them, or some by number (negative counts from the last block).
        pool: "mean" averages over the patches.
        size: None reads pictures as the model's processor says, a number resizes them to
            size x size pixels, "native" keeps their aspect ratio.

    Returns:
        One `Features` a picture, in order.

    Raises:
        ImageError: if a picture cannot be read. `encode_images` goes on instead.
        ValueError: if a layer does not exist or the size is no multiple of the patch.
    """
    results = list(encode_images(model, processor, as_list(images), layers=layers, pool=pool, size=size))
    for result in results:
        if result.error is not None:
            raise ImageError(result.error)
    return results


def encode_images(
    model: GenLIP,
    processor: Processor,
    images: Iterable[ImageLike],
    *,
    layers: Literal["last", "all"] | Sequence[int] = "last",
    pool: Literal["none", "mean"] = "none",
    size: int | Literal["native"] | None = None,
    pack_tokens: int = PACK_TOKENS,
) -> Iterator[Features]:
    """As `encode`, for any number of pictures; one that cannot be read gives `error`, and the rest goes on.

    Args:
        pack_tokens: image tokens that go through the model together.
    """
    chosen = layer_numbers(layers, model.config.num_hidden_layers)
    if pool not in ("none", "mean"):
        raise ValueError(f"pool must be 'none' or 'mean', not {pool!r}")
    image_processor = processor.image_processor
    if size == "native":
        image_processor = image_processor.resized(None)
    elif size is not None:
        image_processor = image_processor.resized(size)

    batch: list[Reading] = []
    tokens = 0
    for reading in read_images(image_processor, images):
        if tokens and tokens + len(reading.patches) > pack_tokens:
            yield from _encode_batch(model, batch, chosen, pool)
            batch, tokens = [], 0
        batch.append(reading)
        tokens += len(reading.patches)
    yield from _encode_batch(model, batch, chosen, pool)


def _encode_batch(model: GenLIP, batch: Sequence[Reading], layers: Sequence[int], pool: str) -> Iterator[Features]:
    good = [reading for reading in batch if reading.error is None]
    columns: list[mx.array] = []
    if good:
        patches = mx.array(np.concatenate([reading.patches for reading in good]))
        grids = [reading.grid for reading in good]
        if layers:
            states = model.hidden_states(patches, grids)
            columns = [model.ln_post(states[-1]), mx.stack([states[i] for i in layers], axis=1)]
        else:
            columns = [model.encode(patches, grids)]
        mx.eval(columns)
    start = 0
    for reading in batch:
        if reading.error is not None:
            yield Features(reading.name, reading.grid, None, error=reading.error)
            continue
        rows = [column[start : start + len(reading.patches)] for column in columns]
        start += len(reading.patches)
        if pool == "mean":
            rows = [part.astype(mx.float32).mean(axis=0).astype(part.dtype) for part in rows]
        elif layers:
            rows[1] = rows[1].swapaxes(0, 1)
        yield Features(reading.name, reading.grid, rows[0], rows[1] if layers else None)


def layer_numbers(layers: str | Sequence[int], num_layers: int) -> list[int]:
    """The hidden states that `layers` of `encode` stands for, none negative.

    Raises:
        ValueError: if one does not exist.
    """
    if layers == "last":
        return []
    if layers == "all":
        return list(range(num_layers + 1))
    if isinstance(layers, str):
        raise ValueError(f"layers must be 'last', 'all' or numbers, not {layers!r}")
    for layer in layers:
        if not -num_layers - 1 <= layer <= num_layers:
            raise ValueError(f"there is no layer {layer}: 0 is the embeddings, {num_layers} the last block")
    return [layer % (num_layers + 1) for layer in layers]


def write_features(path: str | Path, results: Iterable[Features]) -> list[Features]:
    """Write features as they come to an .npz or .safetensors file, float32, whole or not at all.

    Arrays are named by the picture's number: "0" [h*w, D], or with hidden states "0"
    [layers, h*w, D] and "0.ln_post" [h*w, D]; `grids` int [n, 2] and `paths` (in a safetensors
    file: JSON in the metadata). Pooled pictures give one array `features` [n, D] (and
    `hidden_states` [n, layers, D]). Pictures with an error are left out.

    Returns:
        The results without their arrays, so that a caller can report errors and counts.

    Raises:
        ValueError: if the suffix is another one, or no picture could be read.
    """
    path = check_output(path)
    report: list[Features] = []
    grids: list[tuple[int, int]] = []
    paths: list[str] = []
    pooled: dict[str, list[np.ndarray]] = {}
    with WRITERS[path.suffix](path) as file:
        for result in results:
            report.append(replace(result, features=None, hidden_states=None))
            if result.features is None:
                continue
            number = str(len(paths))
            grids.append(result.grid)
            paths.append(result.image)
            arrays = {number: result.features}
            if result.hidden_states is not None:
                arrays = {number: result.hidden_states, f"{number}.ln_post": result.features}
            for name, array in arrays.items():
                values = np.ascontiguousarray(array.astype(mx.float32))  # safetensors writes memory as it lies
                if result.features.ndim == 1:
                    key = "hidden_states" if array is result.hidden_states else "features"
                    pooled.setdefault(key, []).append(values)
                else:
                    file.add(name, values)
        if not paths:
            raise ValueError(f"{path}: no picture could be read, so nothing was written")
        for name, rows in pooled.items():
            file.add(name, np.stack(rows))
        file.add("grids", np.array(grids, np.int32))
        file.finish(paths)
    return report


def check_output(path: str | Path) -> Path:
    """The path of a features file, if its suffix names a format.

    Raises:
        ValueError: if it does not.
    """
    path = Path(path)
    if path.suffix not in WRITERS:
        raise ValueError(f"{path}: features are written as {' or '.join(WRITERS)}")
    return path


class _NpzFile:
    """A numpy archive written one array at a time, so that memory stays at one picture's features."""

    def __init__(self, path: Path):
        self._atomic = atomic_file(path)

    def __enter__(self) -> _NpzFile:
        with ExitStack() as stack:
            file = stack.enter_context(self._atomic)
            self._zip = stack.enter_context(zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def add(self, name: str, array: np.ndarray) -> None:
        with self._zip.open(f"{name}.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array(member, array, allow_pickle=False)

    def finish(self, paths: Sequence[str]) -> None:
        self.add("paths", np.array(paths))


class _SafetensorsFile:
    """A safetensors file; the library writes it whole, so all features are held until then."""

    def __init__(self, path: Path):
        self._atomic = atomic_file(path)
        self._arrays: dict[str, np.ndarray] = {}

    def __enter__(self) -> _SafetensorsFile:
        self._file = self._atomic.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._atomic.__exit__(*exception)  # type: ignore[arg-type]

    def add(self, name: str, array: np.ndarray) -> None:
        self._arrays[name] = array

    def finish(self, paths: Sequence[str]) -> None:
        from safetensors.numpy import save

        self._file.write(save(self._arrays, {"paths": json.dumps(list(paths))}))


WRITERS: dict[str, type[_NpzFile] | type[_SafetensorsFile]] = {".npz": _NpzFile, ".safetensors": _SafetensorsFile}
