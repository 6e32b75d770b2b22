"""`synth`: a data set of drawn scenes."""

from __future__ import annotations

import os
from enum import Enum
from typing import Annotated

import typer

from .console import progress


class Split(str, Enum):
    train = "train"
    validation = "validation"
    test = "test"


class Format(str, Enum):
    imagefolder = "imagefolder"
    jsonl = "jsonl"
    webdataset = "webdataset"


class Encoding(str, Enum):
    jpg = "jpg"
    png = "png"


def synth(
    output: Annotated[str, typer.Option(help="Folder to write; new or empty.", show_default=False)],
    split: Annotated[Split, typer.Option(help="Which scenes; no two splits share one.")] = Split.train,
    size: Annotated[int, typer.Option(min=1, help="Number of scenes.")] = 1000,
    seed: Annotated[int, typer.Option(help="Another seed gives other scenes.")] = 0,
    format: Annotated[Format, typer.Option(help="Layout of the data set.")] = Format.imagefolder,
    encoding: Annotated[Encoding, typer.Option(help="Of the pictures; png is exact and larger.")] = Encoding.jpg,
    kinds: Annotated[
        str,
        typer.Option(
            help="Only these, with commas: shapes, words, receipts, banners, bars, lines, cards.",
            show_default="all but cards",
        ),
    ] = "",
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that draw.", show_default="number of CPUs")
    ] = os.cpu_count() or 1,
) -> None:
    """Draw pictures with long captions to learn from: shapes to count, words to read, receipts, banners, charts.

    Needs no download: a scene is made from the seed, the split and its number alone, and is the same on any machine.
    Each record holds `caption`, `kind`, `layout` and `facts` (what is in the picture, for scoring).

    Example:

        genlip-mlx synth --output scenes/train --split train --size 20000 --format webdataset

        genlip-mlx synth --output scenes/read --split test --size 500 --kinds words,banners
    """
    from ..data.synthetic import SCENES, Scenes
    from ..data.writers import write

    chosen = [kind.strip() for kind in kinds.split(",")] if kinds else SCENES
    scenes = Scenes(split.value, seed, size, chosen)
    with progress("drawing", "scenes") as advance:
        write(scenes, output, format.value, encoding.value, workers, advance)
    print(f"{output}: {size} {split.value} scenes, seed {seed}, {format.value}")
