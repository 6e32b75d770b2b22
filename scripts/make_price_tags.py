#!/usr/bin/env python3
"""Draw price tags with captions: a kind of picture that genlip-tiny's training never showed.

    python scripts/make_price_tags.py tags [--train 600] [--validation 60] [--seed 0]

Writes tags/train and tags/validation, each a folder of pictures with metadata.jsonl. A tag has a hole for its string, a
product and its price; some are on sale, with the old price struck through. The caption states all of it in one form,
so that the price can be found by a regular expression: `costs ([0-9.]+)`.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FOOD = "apples pears plums grapes lemons bread rolls butter cheese milk cream eggs rice beans peas corn onions carrots"
GOODS = "tea coffee sugar salt flour honey jam juice water soap candles paper pens socks hats gloves cups plates spoons"
PRODUCTS = [*FOOD.split(" "), *GOODS.split(" ")]
UNITS = ("each", "a kilo", "a pack", "a box")
PAPERS = {"white": (250, 248, 240), "yellow": (250, 225, 110), "orange": (250, 180, 90), "green": (180, 225, 150)}
SALE = (200, 30, 30)
INK = (25, 25, 30)


def tag(random: random.Random) -> tuple[Image.Image, str]:
    """One tag on a counter, and its caption."""
    width, height = random.choice(((160, 112), (176, 112), (192, 128), (208, 128)))
    product, unit = random.choice(PRODUCTS), random.choice(UNITS)
    name = random.choice(list(PAPERS))
    cents = random.randrange(15, 2500)
    before = cents + random.randrange(20, 900) if random.random() < 0.35 else None

    counter = tuple(random.randrange(60, 150) for _ in range(3))
    image = Image.new("RGB", (width, height), counter)
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = (random.randrange(4, 12) for _ in range(4))
    right, bottom, middle = width - right, height - bottom, height // 2
    corner = left + 22
    outline = [(corner, top), (right, top), (right, bottom), (corner, bottom), (left, middle)]
    draw.polygon(outline, fill=PAPERS[name], outline=INK)
    draw.ellipse((corner - 10, middle - 5, corner, middle + 5), fill=counter, outline=INK)
    draw.line((0, middle - random.randrange(10, 40), corner - 5, middle), fill=INK, width=2)

    def write(text: str, size: int, y: float, colour: tuple[int, int, int] = INK) -> tuple[float, float, float, float]:
        place = ((corner + right) / 2, y)
        font = ImageFont.load_default(size)
        draw.text(place, text, colour, font, anchor="mm")
        return draw.textbbox(place, text, font, anchor="mm")

    space = (bottom - top) / 8
    write(product, 20, top + 1.4 * space)
    write(money(cents), 30, top + 3.7 * space, SALE if before else INK)
    write(unit, 14 if before else 16, top + (5.5 if before else 6.2) * space)
    caption = f"{'An' if name[0] in 'aeiou' else 'A'} {name} price tag for {product}. It costs {money(cents)} {unit}."
    if before:
        x0, y0, x1, y1 = write(money(before), 17, top + 7.0 * space)
        draw.line((x0, y1, x1, y0), fill=SALE, width=2)
        caption += f" It is on sale and was {money(before)} before."
    return image, caption


def money(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02}"


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
    parser.add_argument("--train", type=int, default=600, help="tags to learn from")
    parser.add_argument("--validation", type=int, default=60, help="tags to judge by")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.output.exists():
        parser.error(f"{options.output}: exists already")
    for split, count in (("train", options.train), ("validation", options.validation)):
        write_split(options.output / split, count, f"{split} {options.seed}")
    print(f"{options.output}: {options.train} tags in train, {options.validation} in validation")


if __name__ == "__main__":
    main()
