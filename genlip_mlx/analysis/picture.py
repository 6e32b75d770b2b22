"""One picture as an analysis needs it: the pixels to draw on, and the patches that the model reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..processing.images import ImageError, ImageProcessor, open_image


@dataclass(frozen=True)
class Picture:
    """A picture that has been read."""

    name: str  # path or address
    image: Image.Image  # RGB, at its own size
    patches: np.ndarray  # float32 [h*w, 3*p*p]
    grid: tuple[int, int]  # h, w in patches


def read_picture(processor: ImageProcessor, source: str | Path | bytes | Image.Image, name: str = "") -> Picture:
    """Open a picture and cut it into patches.

    Raises:
        ImageError: naming it, if it cannot be read, or is smaller than one patch: what a model says of
            a patch would then be about less than one of its pixels.
    """
    name = name or (str(source) if isinstance(source, (str, Path)) else "image")
    image = open_image(source, name)
    side = processor.patch_size
    if min(image.size) < side:
        raise ImageError(
            f"{name}: {image.width} x {image.height} pixels are less than one patch of {side} x {side}; "
            "enlarge the picture first"
        )
    try:
        patches, grid = processor(image)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from None
    return Picture(name, image, patches, grid)
