"""Reading many pictures ahead of the model: decoded and cut into patches by a few threads, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path

import numpy as np
from PIL import Image

from .images import ImageError, ImageProcessor, open_image

ImageLike = str | Path | bytes | Image.Image

WORKERS = 2  # threads; Pillow decodes and resizes outside Python's lock
AHEAD = 16  # pictures held ready: at 1024 patches each, 3 MB a picture


@dataclass(frozen=True)
class Reading:
    """One picture as the model reads it, or why it cannot be read."""

    name: str  # path or URL; "image N" for bytes and PIL images
    patches: np.ndarray  # float32 [h*w, 3*p*p]
    grid: tuple[int, int]  # h, w in patches
    error: str | None = None


def as_list(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    """One picture or several, as several."""
    if isinstance(images, (str, Path, bytes, Image.Image)):
        return [images]
    return list(images)


def read_images(processor: ImageProcessor, images: Iterable[ImageLike]) -> Iterator[Reading]:
    """Open pictures and cut them into patches, a few ahead of the caller, in order."""

    def read(number: int, source: ImageLike) -> Reading:
        name = str(source) if isinstance(source, (str, Path)) else f"image {number}"
        try:
            patches, grid = processor(open_image(source, name))
        except (ImageError, OSError) as error:
            message = str(error)
            if not message.startswith(name):
                message = f"{name}: {message}"
            return Reading(name, np.empty((0, 0), np.float32), (0, 0), message)
        return Reading(name, patches, grid)

    pending: deque[AsyncResult[Reading]] = deque()
    numbered = enumerate(images)
    # Its threads are daemons: a server that does not answer cannot hold up who stops early, or Ctrl-C.
    with ThreadPool(WORKERS) as pool:
        for number, source in islice(numbered, AHEAD):
            pending.append(pool.apply_async(read, (number, source)))
        while pending:
            yield pending.popleft().get()
            for number, source in islice(numbered, 1):
                pending.append(pool.apply_async(read, (number, source)))
