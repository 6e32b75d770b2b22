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

PATCH = 16  # sides are whole patches, so that the native processor keeps every pixel as it is
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


def text_width(text: str, size: int) -> float:
    """Pixels from the start of the first letter to the end of the last.

    Scaled from a large size, where hinting is negligible: what fits, and so what is written, must not depend
    on the FreeType at hand.
    """
    return _width_at_256(text) * size / 256


@lru_cache(maxsize=4096)  # scenes are written in few words
def _width_at_256(text: str) -> float:
    return font(256).getlength(text)


def fitting(lines: list[str], width: float, height: float, largest: int, smallest: int = 10) -> int:
    """The largest font size at which every line is at most `width` and all of them `height` pixels (1.3 em a line)."""
    widest = max(text_width(line, 1) for line in lines)
    return max(smallest, min(largest, int(width / widest), int(height / len(lines) / 1.3)))


def _strikes(size: int, bold: bool) -> tuple[int, ...]:
    """Offsets in pixels at which a text is drawn; bold letters are struck twice, as on a typewriter."""
    return (0, max(1, size // 24)) if bold else (0,)


def text_mask(text: str, size: int, bold: bool = False) -> Image.Image:
    """ "L" mask of one line of text, as wide as it and 1.2 em high, which holds the letters that hang down."""
    strikes = _strikes(size, bold)
    mask = Image.new("L", (math.ceil(font(size).getlength(text)) + strikes[-1] + 4, math.ceil(size * 1.2)))
    for shift in strikes:
        ImageDraw.Draw(mask).text((1 + shift, 0), text, fill=255, font=font(size))
    return mask


def put_text(
    image: Image.Image,
    text: str,
    xy: tuple[float, float],
    size: int,
    colour: Colour | int,
    anchor: str = "mm",
    bold: bool = False,
    halo: Colour | None = None,
) -> None:
    """Draw a line of text; `xy` and `anchor` as Pillow's, `size` in pixels an em, `halo` paints what lies close by."""
    draw, (x, y) = ImageDraw.Draw(image), (round(xy[0]), round(xy[1]))
    if halo is not None:
        draw.text((x, y), text, fill=halo, font=font(size), anchor=anchor, stroke_width=3, stroke_fill=halo)
    for shift in _strikes(size, bold):
        draw.text((x + shift, y), text, fill=colour, font=font(size), anchor=anchor)


def turn(mask: Image.Image, degrees: float) -> Image.Image:
    """The mask turned counter-clockwise about its centre, on a canvas of the same size."""
    return mask.rotate(degrees, Image.Resampling.BICUBIC) if degrees else mask


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
    """(width, height) of a picture of `smallest` to 14 patches a side, square or a little off it."""
    side = dice.between(smallest, 14)
    other = max(smallest, min(14, side + dice.between(-2, 2)))
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
