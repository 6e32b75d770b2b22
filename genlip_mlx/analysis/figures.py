"""How every figure of an analysis is drawn.

The one idea: pictures are drawn in units of patches. Patch (row, column) is the unit square there, so labels, maps and
borders need no further arithmetic, whatever the picture's size.
"""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..files import atomic_file

# Okabe and Ito's palette: told apart by colour-blind readers too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # of lines
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # so that lines differ without colour as well
FILLS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00")  # of areas, half transparent
HEAT = "cividis"  # even steps of lightness, the same for most colour-blind readers
DPI = 100
FORMATS = (".png", ".pdf", ".svg")
# matplotlib's own font lacks scripts that a vocabulary may have; whichever of these is installed fills in.
FONTS = ("DejaVu Sans", "Arial Unicode MS", "PingFang SC", "Hiragino Sans", "Noto Sans CJK SC", "Noto Sans CJK JP")
PIXELS_A_PATCH = 32  # of a drawn picture


def check_figure(path: str | Path) -> None:
    """Whether a figure could be written there, asked before the work that leads to it.

    Raises:
        ValueError: if the suffix names no known format, or matplotlib is missing.
    """
    if Path(path).suffix not in FORMATS:
        raise ValueError(f"{path}: figures are written as {', '.join(FORMATS)}")
    if find_spec("matplotlib") is None:
        raise ValueError('plots need matplotlib: pip install "genlip-mlx[train]"')


@contextmanager
def figure(path: str | Path, width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure to draw on, written whole when the block ends.

    Args:
        path: .png, .pdf or .svg.
        width, height: in pixels; parts are laid out so that no label covers another.

    Raises:
        ValueError: as `check_figure`.
        OSError: if the file cannot be written.
    """
    check_figure(path)
    from matplotlib import font_manager, rc_context
    from matplotlib.figure import Figure

    installed = set(font_manager.get_font_names())
    # Tokens hold dollar signs, which would otherwise start a formula.
    style = {
        "font.family": [name for name in FONTS if name in installed],
        "font.size": 11 * max(1.0, width / 1200),  # readable when a wide figure is shown 1200 pixels wide
        "text.parse_math": False,
    }
    with rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # drawn as an empty box
        drawn = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, layout="constrained")
        yield drawn
        with atomic_file(path) as file:
            drawn.savefig(file, format=Path(path).suffix[1:])


def show_picture(axes: Any, image: Image.Image, grid: tuple[int, int], fade: float = 0.0, grey: bool = False) -> None:
    """Draw a picture in units of patches, at its own aspect ratio.

    Args:
        grid: (h, w) in patches.
        fade: how much of it is white, 0 to 1, so that what is drawn over it can be read.
        grey: without its colours.
    """
    h, w = grid
    resized = image.resize((w * PIXELS_A_PATCH, h * PIXELS_A_PATCH), Image.Resampling.BILINEAR)
    pixels = np.asarray(resized.convert("L").convert("RGB") if grey else resized) / 255
    aspect = (image.height / h) / (image.width / w)
    axes.imshow(pixels * (1 - fade) + fade, extent=(0, w, h, 0), aspect=aspect)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("column, patches")
    axes.set_ylabel("row, patches")


def show_heat(axes: Any, image: Image.Image, values: np.ndarray, maximum: float) -> Any:
    """Draw a map [h, w] of values from 0 to `maximum` over the picture; returns what a colour bar describes."""
    h, w = values.shape
    # A pale picture: its own lightness must not pass for the map's.
    show_picture(axes, image, (h, w), fade=0.55, grey=True)
    extent, aspect = (0, w, h, 0), axes.get_aspect()
    return axes.imshow(values, extent=extent, aspect=aspect, cmap=HEAT, vmin=0, vmax=maximum, alpha=0.75)


def show_borders(axes: Any, groups: np.ndarray, **style: Any) -> None:
    """Lines between neighbouring patches whose numbers in `groups` [h, w] differ."""
    from matplotlib.collections import LineCollection

    beside, below = np.diff(groups, axis=1) != 0, np.diff(groups, axis=0) != 0
    upright = [((c + 1, r), (c + 1, r + 1)) for r, c in np.argwhere(beside)]
    level = [((c, r + 1), (c + 1, r + 1)) for r, c in np.argwhere(below)]
    axes.add_collection(LineCollection(upright + level, **style))


def write(axes: Any, x: float, y: float, text: str, room: float, size: float, **style: Any) -> None:
    """A label around (x, y), black with a white rim, shrunk to the room it has and cut where it would get too small.

    Args:
        room: width for the text, in pixels.
        size: height of the letters at most, in pixels.
    """
    from matplotlib import patheffects

    smallest = min(size, 10.0)
    while len(text) > 2 and letters(text) * smallest > room:
        text = f"{text.rstrip('…')[:-1]}…"
    size = min(size, room / max(letters(text), 1e-9))
    rim = [patheffects.withStroke(linewidth=2.5, foreground="white", alpha=0.85)]
    axes.text(x, y, text, ha="center", va="center", fontsize=size * 72 / DPI, path_effects=rim, clip_on=True, **style)


def letters(text: str) -> float:
    """About the width of a text, as a multiple of its font size."""
    return sum(1.0 if unicodedata.east_asian_width(c) in "WF" else 0.78 if c.isupper() else 0.64 for c in text)
