#!/usr/bin/env python3
"""Draw price tags with captions: a kind of picture that genlip-tiny's training never showed.

    python scripts/make_price_tags.py tags [--train 3000] [--validation 100] [--seed 0]

Writes tags/train and tags/validation, each a folder of pictures with metadata.jsonl. A tag is of coloured paper, hangs
on a string, and shows a price of 1 to 9; some have a red band, which means a sale. The caption states all of it in one
form, so that fields can be found by a regular expression: `costs ([0-9])`.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

PAPERS = {
    "white": (250, 248, 240),
    "yellow": (250, 220, 80),
    "orange": (245, 160, 60),
    "green": (150, 215, 120),
    "blue": (140, 190, 245),
    "pink": (250, 170, 200),
}
SALE = (200, 30, 30)
INK = (25, 25, 30)


def tag(chance: random.Random) -> tuple[Image.Image, str]:
    """One tag on a counter, and its caption."""
    width, height = chance.choice(((128, 96), (144, 96), (128, 112), (144, 112)))
    name, price = chance.choice(list(PAPERS)), chance.randrange(1, 10)
    on_sale, from_right = chance.random() < 0.4, chance.random() < 0.5

    counter = tuple(chance.randrange(60, 150) for _ in range(3))
    image = Image.new("RGB", (width, height), counter)
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = (chance.randrange(2, 8) for _ in range(4))
    right, bottom, middle = width - right, height - bottom, height // 2
    corner = left + 24
    draw.polygon(
        [(corner, top), (right, top), (right, bottom), (corner, bottom), (left, middle)], fill=PAPERS[name], outline=INK
    )
    if on_sale:
        draw.rectangle((corner, bottom - 14, right, bottom), fill=SALE)
    draw.ellipse((corner - 12, middle - 5, corner - 2, middle + 5), fill=counter, outline=INK)
    draw.line((0, middle - chance.randrange(10, 40), corner - 7, middle), fill=INK, width=2)
    if from_right:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    centre = width / 2 + (-12 if from_right else 12) + chance.randrange(-4, 5)
    place = (centre, middle - (6 if on_sale else 0) + chance.randrange(-3, 4))
    ImageDraw.Draw(image).text(place, str(price), INK, ImageFont.load_default(64), anchor="mm")

    article = "An" if name[0] in "aeiou" else "A"
    caption = (
        f"{article} {name} price tag with its string on the {'right' if from_right else 'left'}. It costs {price}."
    )
    return image, caption + (" It is on sale." if on_sale else "")


def write_split(folder: Path, count: int, seed: str) -> None:
    folder.mkdir(parents=True)
    chance = random.Random(seed)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as file:
        for number in range(count):
            image, caption = tag(chance)
            name = f"{number:05}.png"
            image.save(folder / name)
            file.write(json.dumps({"file_name": name, "caption": caption}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("output", type=Path, help="folder to make")
    parser.add_argument("--train", type=int, default=3000, help="tags to learn from")
    parser.add_argument("--validation", type=int, default=100, help="tags to judge by")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.output.exists():
        parser.error(f"{options.output}: exists already")
    for split, count in (("train", options.train), ("validation", options.validation)):
        write_split(options.output / split, count, f"{split} {options.seed}")
    print(f"{options.output}: {options.train} tags in train, {options.validation} in validation")


if __name__ == "__main__":
    main()
