"""Frozen features of many pictures, computed once and kept on disk.

The one idea: a shard is a few hundred pictures, written whole or not at all. A run that was killed goes on after its
last shard, and training maps the files into memory, so that no more is read than it looks at.

Numbers on disk are float16, clipped to its range: relative errors of 0.0005, far below what a probe can use.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image

from ..config import GenLIPConfig
from ..features import encode_images
from ..files import atomic_file
from ..model.genlip import GenLIP, initialize
from ..processing.images import ImageError, ImageProcessor, image_size, open_image
from ..processing.processor import Processor
from ..processing.reader import ImageLike
from .labelled import IGNORED, LabelledError, Pictures, digest

CACHE = "~/.cache/genlip-mlx/features"
SHARD = 256  # pictures
THUMBNAIL = 32  # pixels a side
Size = int | Literal["native"] | None  # None: as the processor says
_LARGEST = 65504.0  # of float16


class CacheError(OSError):
    """Features that do not fit on the disk."""


@dataclass(frozen=True)
class Encoded:
    """What an encoder makes of one picture.

    `tokens` are float16 [layers, h*w, D], `pooled` float32 [layers, K]; `error` says why there are none.
    """

    grid: tuple[int, int]  # h, w in patches
    tokens: np.ndarray
    pooled: np.ndarray
    error: str | None = None


class Encoder(Protocol):
    """Something that turns pictures into features.

    Attributes:
        name: what tables call it.
        identity: tells its features from another's.
        layers: the name of each layer it gives.
        num_heads: of an attentive probe on it.
        patch_size: pixels a side.
    """

    name: str
    identity: str
    layers: tuple[str, ...]
    num_heads: int
    patch_size: int

    def encode(self, images: Iterable[ImageLike]) -> Iterator[Encoded]: ...


class ModelEncoder:
    """Hidden states of a model, and "last", the output of `ln_post`; pooled is their mean over patches.

    Args:
        layers: hidden states beside "last", by number; 0 is the embeddings.
    """

    def __init__(
        self,
        name: str,
        model: GenLIP,
        processor: Processor,
        layers: Sequence[int],
        size: int | Literal["native"] | None,
    ) -> None:
        self.name, self._model, self._processor = name, model, processor
        self._processor = replace(processor, image_processor=resized(processor.image_processor, size))
        self._numbers = layers
        self.layers = (*map(str, layers), "last")
        self.num_heads, self.patch_size = model.config.num_attention_heads, model.config.patch_size
        pixels = json.dumps(self._processor.image_processor.to_dict(), sort_keys=True)
        self.identity = digest(["model", _fingerprint(model), pixels, *self.layers])

    def encode(self, images: Iterable[ImageLike]) -> Iterator[Encoded]:
        for result in encode_images(self._model, self._processor, images, layers=self._numbers):
            if result.features is None:
                yield _failed(result.image, result.error)
                continue
            states = result.features[None]
            if result.hidden_states is not None:
                states = mx.concatenate([result.hidden_states, states])
            states = states.astype(mx.float32)
            pooled = np.array(states.mean(axis=1))
            yield Encoded(result.grid, np.array(mx.clip(states, -_LARGEST, _LARGEST).astype(mx.float16)), pooled)


class PixelEncoder:
    """No model at all: a patch is its normalised pixels, and pooled is the whole picture at 32 x 32 pixels.

    Args:
        num_heads: of the attentive probe that it is held against.
    """

    def __init__(self, processor: ImageProcessor, size: Size, num_heads: int) -> None:
        self.name = "raw pixels"
        self.layers: tuple[str, ...] = ("pixels",)
        self._processor = resized(processor, size)
        self._thumbnails = self._processor.resized(THUMBNAIL)
        self.num_heads, self.patch_size = math.gcd(num_heads, 3 * processor.patch_size**2), processor.patch_size
        self.identity = digest(["pixels", json.dumps(self._processor.to_dict(), sort_keys=True)])

    def encode(self, images: Iterable[ImageLike]) -> Iterator[Encoded]:
        for image in images:
            try:
                opened = open_image(image, "picture")
                patches, grid = self._processor(opened)
                pooled = self._thumbnails(opened)[0].reshape(1, -1)
            except (ImageError, OSError) as error:
                yield _failed("picture", str(error))
                continue
            yield Encoded(grid, patches[None].astype(np.float16), pooled)


def random_model(config: GenLIPConfig, dtype: mx.Dtype, seed: int) -> GenLIP:
    """An encoder of a model's shape with the weights that pretraining starts from."""
    model = GenLIP(replace(config, vision_only=True, quantization=None))
    initialize(model, mx.random.key(seed))
    model.set_dtype(dtype)
    model.eval()
    return model


def resized(processor: ImageProcessor, size: Size) -> ImageProcessor:
    """A processor for another size: None as it is, "native" with any aspect ratio, or pixels a side."""
    return processor if size is None else processor.resized(None if size == "native" else size)


def _failed(name: str, error: str | None) -> Encoded:
    return Encoded((0, 0), np.empty(0), np.empty(0), (error or "").removeprefix(name).removeprefix(": "))


def _fingerprint(model: GenLIP) -> str:
    """Of the weights, whatever files they came from."""
    found = hashlib.blake2b(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    weights: dict[str, mx.array] = {}
    tree_flatten(model.parameters(), destination=weights)
    for name, value in sorted(weights.items()):
        found.update(f"{name} {value.dtype} {value.shape}".encode())
        found.update(np.array(value.reshape(-1).view(mx.uint8)).tobytes())
    return found.hexdigest()[:24]


def build(
    encoder: Encoder, pictures: Pictures, cache: str | Path, advance: Callable[[int, int], None] | None = None
) -> Store:
    """The features of pictures, from the cache as far as it has them.

    Args:
        cache: folder of all cached features; made if it is not there.
        advance: called with (pictures done, of how many).

    Raises:
        CacheError: if the disk has no room for them.
        LabelledError: if no picture could be used.
    """
    folder = Path(cache).expanduser() / digest([encoder.identity, pictures.identity, str(SHARD)])
    folder.mkdir(parents=True, exist_ok=True)
    shards = [range(start, min(start + SHARD, len(pictures))) for start in range(0, len(pictures), SHARD)]
    for number, span in enumerate(shards):
        if not (folder / f"{number}.json").exists():
            _write_shard(encoder, pictures, span, folder, number)
            written = sum(file.stat().st_size for file in folder.glob(f"{number}.*"))
            needed, free = written * (len(shards) - number - 1), shutil.disk_usage(folder).free
            if needed > free:
                raise CacheError(
                    f"{folder}: the features need another {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB; "
                    "name another place with --cache, or fewer layers with --layers"
                )
        if advance is not None:
            advance(span.stop, len(pictures))
    store = Store(folder, len(shards), encoder.layers)
    if not len(store.rows):
        raise LabelledError(f"no picture could be used; the first: {store.skipped[0]}")
    return store


def _write_shard(encoder: Encoder, pictures: Pictures, span: range, folder: Path, number: int) -> None:
    """Three arrays and, last, the JSON object that says the shard is there."""
    good: list[tuple[int, Image.Image | None]] = []
    skipped: list[str] = []

    def usable() -> Iterator[ImageLike]:
        for row in span:
            try:
                picture, mask = _checked(pictures, row, encoder.patch_size)
            except (ImageError, LabelledError, OSError) as error:
                skipped.append(str(error))
                continue
            good.append((row, mask))
            yield picture

    rows, grids, tokens, pooled, pixels = [], [], [], [], []
    for position, result in enumerate(encoder.encode(usable())):
        row, mask = good[position]
        good[position] = (row, None)
        if result.error is not None:
            skipped.append(f"{pictures.names[row]}: {result.error}")
            continue
        rows.append(row)
        grids.append(result.grid)
        tokens.append(result.tokens)
        pooled.append(result.pooled)
        if mask is not None:
            pixels.append(_cut_mask(mask, result.grid, encoder.patch_size))
    arrays = {}
    if rows:
        arrays = {"tokens": np.concatenate(tokens, axis=1), "pooled": np.stack(pooled, axis=1)}
    if pixels:
        arrays["pixels"] = np.concatenate(pixels)
    for kind, array in arrays.items():
        with atomic_file(folder / f"{number}.{kind}.npy") as file:
            np.save(file, array)
    with atomic_file(folder / f"{number}.json", text=True) as file:
        json.dump({"rows": rows, "grids": grids, "skipped": skipped}, file)


def _checked(pictures: Pictures, row: int, patch_size: int) -> tuple[ImageLike, Image.Image | None]:
    """A picture, not yet decoded, and its mask, if both can be used as far as their headers say."""
    name, picture = pictures.names[row], pictures.picture(row)
    height, width = image_size(picture, name)
    if min(height, width) < patch_size:
        raise ImageError(
            f"{name}: {width} x {height} pixels, smaller than a patch of {patch_size} x {patch_size}; enlarge it first"
        )
    if pictures.mask is None:
        return picture, None
    mask = pictures.mask(row)
    if mask.size != (width, height):
        raise LabelledError(
            f"{name}: its mask has {mask.width} x {mask.height} pixels and it has {width} x {height}; they must agree"
        )
    return picture, mask


def _cut_mask(mask: Image.Image, grid: tuple[int, int], p: int) -> np.ndarray:
    """Class numbers uint8 [h*w, p*p] of the pixels of each patch, the mask scaled as its picture was."""
    h, w = grid
    pixels = np.asarray(mask.resize((w * p, h * p), Image.Resampling.NEAREST))
    return pixels.reshape(h, p, w, p).swapaxes(1, 2).reshape(h * w, p * p)


class Store:
    """Cached features of one split.

    Attributes:
        rows: the pictures' numbers in their split, those left out that could not be used.
        skipped: why the others could not.
    """

    def __init__(self, folder: Path, num_shards: int, layers: Sequence[str]) -> None:
        self.folder, self._layers = folder, list(layers)
        self._shards: list[dict[str, Any]] = [json.loads((folder / f"{i}.json").read_text()) for i in range(num_shards)]
        self._full = [i for i, shard in enumerate(self._shards) if shard["rows"]]
        self.rows = np.array([row for shard in self._shards for row in shard["rows"]], np.int64)
        self.skipped = [message for shard in self._shards for message in shard["skipped"]]
        # Of each picture: its shard, and its first and last patch there.
        self._places: list[tuple[int, int, int]] = []
        for i in self._full:
            ends = np.cumsum([0, *(h * w for h, w in self._shards[i]["grids"])]).tolist()
            self._places += [(i, start, end) for start, end in pairwise(ends)]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        """On disk."""
        return sum(file.stat().st_size for file in self.folder.iterdir())

    @cached_property
    def lengths(self) -> np.ndarray:
        """Patches of each picture, int [n]."""
        return np.array([end - start for _, start, end in self._places])

    def pooled(self, layer: str) -> np.ndarray:
        """float32 [n, K]."""
        number = self._layers.index(layer)
        return np.concatenate([np.load(self.folder / f"{i}.pooled.npy", mmap_mode="r")[number] for i in self._full])

    def tokens(self, layer: str, number: int) -> np.ndarray:
        """float16 [h*w, D] of a picture, mapped from disk."""
        shard, start, end = self._places[number]
        tokens: np.ndarray = self._mapped("tokens", shard)[self._layers.index(layer), start:end]
        return tokens

    def pixels(self, number: int) -> np.ndarray:
        """Class numbers uint8 [h*w, p*p] of a picture's mask, `IGNORED` for none."""
        shard, start, end = self._places[number]
        pixels: np.ndarray = self._mapped("pixels", shard)[start:end]
        return pixels

    def moments(self, layer: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean [D] and covariance [D, D] of a layer's numbers over all patches, float64."""
        total = products = np.zeros(())
        for i in self._full:
            tokens = self._mapped("tokens", i)[self._layers.index(layer)]
            for start in range(0, len(tokens), 4096):
                block = tokens[start : start + 4096].astype(np.float64)
                total, products = total + block.sum(0), products + block.T @ block
        mean = total / self.lengths.sum()
        return mean, products / self.lengths.sum() - np.outer(mean, mean)

    def num_classes(self) -> int:
        """One more than the highest class number in the masks."""
        highest = 0
        for i in self._full:
            pixels = self._mapped("pixels", i)
            highest = max(highest, int(pixels.max(initial=0, where=pixels != IGNORED)))
        return highest + 1

    def _mapped(self, kind: str, shard: int) -> np.ndarray:
        key = (kind, shard)
        if key not in self._maps:
            self._maps[key] = np.load(self.folder / f"{shard}.{kind}.npy", mmap_mode="r")
        return self._maps[key]

    @cached_property
    def _maps(self) -> dict[tuple[str, int], np.ndarray]:
        return {}
