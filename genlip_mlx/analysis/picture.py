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


def check_size(image: Image.Image, patch_size: int) -> None:
    """Refuse what would have to be blown up to fill one patch.

    What a model says of a patch would then be about less than one of its pixels.

    Raises:
        ImageError: if a side is shorter than a patch.
    """
    if min(image.size) < patch_size:
        raise ImageError(
            f"{image.width} x {image.height} pixels are less than one patch of {patch_size} x {patch_size}; "
            "enlarge the picture first"
        )


def read_picture(processor: ImageProcessor, source: str | Path | bytes | Image.Image, name: str = "") -> Picture:
    """Open a picture and cut it into patches.

    Raises:
        ImageError: naming it, if it cannot be read, or is smaller than one patch.
    """
    name = name or (str(source) if isinstance(source, (str, Path)) else "image")
    image = open_image(source, name)
    try:
        check_size(image, processor.patch_size)
        patches, grid = processor(image)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from None
    return Picture(name, image, patches, grid)
