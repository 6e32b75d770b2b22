"""Reading ahead: every picture once and in order, and nothing that holds up who has seen enough."""

from __future__ import annotations

import io
import itertools
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from genlip_mlx.processing import reader
from genlip_mlx.processing.images import ImageProcessor, open_image
from genlip_mlx.processing.reader import AHEAD, read_images

PROCESSOR = ImageProcessor(native=True, min_pixels=256)


def picture(number: int) -> Image.Image:
    """A picture that can be told from others by its grid, (1 + number, 1)."""
    return Image.new("RGB", (16, 16 * (1 + number)))


def test_pictures_come_in_order_whatever_takes_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(source: Any, name: str) -> Image.Image:
        time.sleep(0.005 if int(name.removeprefix("image ")) % 3 == 0 else 0)
        return open_image(source, name)

    monkeypatch.setattr(reader, "open_image", slow)
    readings = list(read_images(PROCESSOR, (picture(i) for i in range(50))))
    assert [reading.grid for reading in readings] == [(1 + i, 1) for i in range(50)]
    assert [reading.name for reading in readings] == [f"image {i}" for i in range(50)]
    assert all(reading.error is None for reading in readings)


def test_a_reading_is_what_the_processor_gives(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 32, 3), dtype=np.uint8))
    file = tmp_path / "noise.png"
    noise.save(file)
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    readings = list(read_images(PROCESSOR, [str(file), file, buffer.getvalue(), noise]))
    assert [reading.name for reading in readings] == [str(file), str(file), "image 2", "image 3"]
    patches, grid = PROCESSOR(noise)
    for reading in readings:
        assert reading.grid == grid
        np.testing.assert_array_equal(reading.patches, patches)


def test_what_cannot_be_read_is_told_in_its_place(tmp_path: Path) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("not a picture")
    long = Image.new("RGB", (1, 500))
    readings = list(read_images(PROCESSOR, [picture(0), str(text), long, b"", picture(1)]))
    assert [reading.grid for reading in readings] == [(1, 1), (0, 0), (0, 0), (0, 0), (2, 1)]
    errors = [reading.error for reading in readings]
    assert errors[0] is errors[4] is None
    assert errors[1:4] == [
        f"{text}: not an image of a known format (JPEG, PNG, WebP, GIF, TIFF, ...)",
        "image 2: an image of 1 x 500 pixels has an aspect ratio over 200; crop it first",
        "image 3: not an image of a known format (JPEG, PNG, WebP, GIF, TIFF, ...)",
    ]


def test_what_is_no_picture_at_all_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(TypeError):
        list(read_images(PROCESSOR, [np.zeros((16, 16, 3))]))  # type: ignore[list-item]


def test_only_a_few_are_read_ahead() -> None:
    taken = itertools.count()
    endless = (picture(next(taken)) for _ in itertools.count())
    readings = read_images(PROCESSOR, endless)
    for _ in range(3):
        next(readings)
    readings.close()
    assert next(taken) <= AHEAD + 3


def test_a_picture_that_never_comes_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def stuck(source: Any, name: str) -> Image.Image:
        if name == "stuck":
            over.wait(60)
        return picture(0)

    monkeypatch.setattr(reader, "open_image", stuck)
    readings = read_images(PROCESSOR, ["quick", "stuck", "stuck"])
    assert next(readings).name == "quick"
    began = time.monotonic()
    readings.close()
    assert time.monotonic() - began < 10
    over.set()
