"""Shapes, words and paper on a Pillow canvas.

Everything goes through an 8-bit mask that is pasted in one colour: smooth edges, and one way to turn things.
The font is the one inside Pillow, so that a scene needs nothing from the system.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from .dice import Dice
from .vocabulary import BACKGROUNDS, COLOURS, Colour, Fact

Drawn = tuple[Image.Image, str, list[Fact]]  # what every kind of scene makes: picture, caption, facts

PATCH = 16  # pixels; sides are whole patches, so that the native processor keeps every pixel as it is
EM = PATCH  # the size of type
_SMOOTH = 4  # a shape is drawn this many times larger, then averaged down


@lru_cache(maxsize=128)
def font(size: int) -> ImageFont.FreeTypeFont:
    """The font, `size` pixels to an em.

    Raises:
        OSError: if Pillow was built without FreeType.
    """
    if not features.check("freetype2"):
        raise OSError("Pillow was built without FreeType, which draws the text; install a wheel: pip install pillow")
    loaded = ImageFont.load_default(size)
    assert isinstance(loaded, ImageFont.FreeTypeFont)
    return loaded


def text_width(text: str) -> float:
    """Pixels from the start of the first letter to the end of the last.

    Scaled from a large size, where hinting is negligible: what fits, and so what is written, must not depend
    on the FreeType at hand.
    """
    return _width_at_256(text) * EM / 256


@lru_cache(maxsize=4096)  # scenes are written in few words
def _width_at_256(text: str) -> float:
    return font(256).getlength(text)


def line_at(row: int) -> int:
    """y of the middle of a line of text that stands in a row of patches.

    Type is one patch high and stands in these rows: a letter is in one patch or two, and not in four. A model of a few
    million parameters then begins to read in an hour of one CPU core; letters at any height it did not in two.
    """
    return PATCH * row + PATCH // 2


def put_text(
    image: Image.Image,
    text: str,
    xy: tuple[float, float],
    colour: Colour | int,
    anchor: str = "mm",
    bold: bool = False,
    halo: Colour | None = None,
) -> None:
    """Draw a line of text; `xy` and `anchor` as Pillow's, `halo` paints what lies close by.

    Bold letters are struck twice, a pixel apart, as on a typewriter.
    """
    draw, (x, y) = ImageDraw.Draw(image), (round(xy[0]), round(xy[1]))
    if halo is not None:
        draw.text((x, y), text, fill=halo, font=font(EM), anchor=anchor, stroke_width=3, stroke_fill=halo)
    for shift in (0, 1) if bold else (0,):
        draw.text((x + shift, y), text, fill=colour, font=font(EM), anchor=anchor)


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape inside the circle of radius 1, y down."""
    if shape == "square":
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if shape == "diamond":
        return [(0, -1), (0.66, 0), (0, 1), (-0.66, 0)]
    if shape == "triangle":
        return [(0, -0.95), (0.95, 0.75), (-0.95, 0.75)]
    if shape == "cross":
        a, b = 0.31, 0.92
        return [
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        ]
    if shape == "star":
        turns = [(math.pi * k / 5, 1.0 if k % 2 == 0 else 0.42) for k in range(10)]
        return [(r * math.sin(t), -r * math.cos(t)) for t, r in turns]
    if shape == "heart":
        angles = [2 * math.pi * k / 40 for k in range(40)]
        heights = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in angles]
        return [(math.sin(t) ** 3, -(y + 2.5) / 16) for t, y in zip(angles, heights, strict=True)]
    raise ValueError(f"unknown shape {shape!r}")


def put_shape(
    image: Image.Image, shape: str, centre: tuple[float, float], diameter: int, colour: Colour, degrees: float = 0.0
) -> None:
    """Draw a shape of the vocabulary, at most `diameter` pixels across, turned by some degrees."""
    side = diameter * _SMOOTH
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    if shape in ("circle", "ring"):
        edge = side * 0.04
        draw.ellipse((edge, edge, side - edge, side - edge), fill=255)
        if shape == "ring":
            hole = side * 0.25
            draw.ellipse((hole, hole, side - hole, side - hole), fill=0)
    else:
        c, s, r = math.cos(math.radians(degrees)), math.sin(math.radians(degrees)), side / 2
        draw.polygon([(r + r * (x * c - y * s), r + r * (x * s + y * c)) for x, y in _outline(shape)], fill=255)
    corner = (round(centre[0] - diameter / 2), round(centre[1] - diameter / 2))
    image.paste(colour, corner, mask.reduce(_SMOOTH))


def shade(colour: Colour, dice: Dice, spread: int) -> Colour:
    """A colour that still goes by the same name: each channel moved by at most `spread`."""
    r, g, b = (max(0, min(255, channel + dice.between(-spread, spread))) for channel in colour)
    return r, g, b


def distance(a: Colour, b: Colour) -> float:
    """How far apart two colours look, 0 to 765: green differences weigh most, red ones least."""
    dr, dg, db = a[0] - b[0], a[1] - b[1], a[2] - b[2]
    return math.sqrt(2 * dr * dr + 4 * dg * dg + 3 * db * db)


def visible(ground: Colour, names: Iterable[str], far: float = 280) -> list[str]:
    """Those of the named colours in which a shape stands out from the ground."""
    return [name for name in names if distance(named(name), ground) >= far]


def readable(ground: Colour, names: Iterable[str]) -> list[str]:
    """Those of the named colours in which text can be read on the ground: lighter or darker, not just another hue."""

    def luma(colour: Colour) -> float:  # ITU-R BT.601
        return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]

    return [name for name in names if abs(luma(named(name)) - luma(ground)) >= 78]


def named(name: str) -> Colour:
    """The RGB of an object's or a background's colour."""
    return COLOURS[name] if name in COLOURS else BACKGROUNDS[name]


def squarish(dice: Dice, smallest: int) -> tuple[int, int]:
    """(width, height) of a picture of `smallest` to 10 patches a side, square or a little off it."""
    side = dice.between(smallest, 10)
    other = max(smallest, min(10, side + dice.between(-2, 2)))
    return PATCH * side, PATCH * other


def canvas(size: tuple[int, int], colour: Colour, dice: Dice) -> Image.Image:
    """A background: plain, or fading a little from one side to the other."""
    if dice.chance(0.6):
        return Image.new("RGB", size, colour)
    ramp = Image.linear_gradient("L")
    if dice.chance(0.5):
        ramp = ramp.transpose(Image.Transpose.ROTATE_90)
    image = Image.new("RGB", size, colour)
    depth = dice.between(8, 26)
    darker = (max(0, colour[0] - depth), max(0, colour[1] - depth), max(0, colour[2] - depth))
    image.paste(darker, (0, 0), ramp.resize(size, Image.Resampling.BILINEAR))
    return image


def grain(image: Image.Image, dice: Dice) -> Image.Image:
    """Half of all pictures come with a camera's noise."""
    if dice.chance(0.5):
        return image
    noise = dice.noise(image.height, image.width, dice.between(6, 28))
    # Whole rows, all three channels of a pixel with the same noise: twice as fast as three channels a pixel.
    pixels = np.asarray(image).reshape(image.height, -1) + np.repeat(noise.reshape(image.height, -1), 3, axis=1)
    pixels = np.clip(pixels, 0, 255, out=pixels).astype(np.uint8)
    return Image.fromarray(pixels.reshape(image.height, image.width, 3))
