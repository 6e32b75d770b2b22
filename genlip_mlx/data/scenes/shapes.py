"""Scenes to count: groups of coloured shapes, each in its place."""

from __future__ import annotations

from itertools import pairwise

from PIL import Image

from .dice import Dice
from .drawing import PATCH, Drawn, canvas, grain, put_shape, shade, squarish, visible
from .vocabulary import BACKGROUNDS, COLOURS, SHAPES, Colour, Fact, counted, sentence
from .wording import compose, group_clause, group_sentences

Box = tuple[float, float, float, float]  # left, top, right, bottom, as shares of the picture

_REGIONS: dict[str, Box] = {
    "everywhere": (0.0, 0.0, 1.0, 1.0),
    "left": (0.0, 0.0, 0.5, 1.0),
    "right": (0.5, 0.0, 1.0, 1.0),
    "top": (0.0, 0.0, 1.0, 0.5),
    "bottom": (0.0, 0.5, 1.0, 1.0),
    "centre": (0.2, 0.2, 0.8, 0.8),
    "top left": (0.0, 0.0, 0.5, 0.5),
    "top right": (0.5, 0.0, 1.0, 0.5),
    "bottom left": (0.0, 0.5, 0.5, 1.0),
    "bottom right": (0.5, 0.5, 1.0, 1.0),
}
_LONGER = {"tall": "taller", "wide": "wider"}
_CORNERS = ("top left", "top right", "bottom left", "bottom right")


def shapes(dice: Dice) -> Drawn:
    """One to six coloured shapes, in one to four groups that each have their place, told in reading order."""
    total = dice.between(1, 6)
    number = min(total, dice.weighted(((1, 0.4), (2, 0.4), (3, 0.15), (4, 0.05))))
    layout = "square" if number == 4 else dice.weighted((("square", 0.56), ("tall", 0.22), ("wide", 0.22)))
    if layout == "square":
        # Six things in the smallest picture could not be told apart.
        width, height = squarish(dice, 6 + total // 3)
    else:
        sides = [PATCH * dice.between(4 + total // 3, 7), PATCH * dice.between(12, 16)]
        width, height = sides if layout == "tall" else sides[::-1]
    image, facts, sizes, ground = scattered(dice, (width, height), total, number, layout)
    return grain(image, dice), _shapes_caption(dice, facts, sizes, ground, layout), facts


def scattered(
    dice: Dice, size: tuple[int, int], total: int, number: int, layout: str
) -> tuple[Image.Image, list[Fact], list[str], str]:
    """`total` shapes in `number` groups: the picture, the groups, a word for the size of each, the background."""
    regions = _places(dice, number, total, layout)
    ground = dice.pick(list(BACKGROUNDS))
    colour = shade(BACKGROUNDS[ground], dice, 5)
    image = canvas(size, colour, dice)

    cuts = sorted(dice.sample(range(1, total), number - 1))
    counts = [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]
    pairs = [(shape, name) for shape in SHAPES for name in visible(colour, COLOURS)]
    facts: list[Fact] = []
    sizes = []
    for (shape, name), count, (place, box) in zip(dice.sample(pairs, number), counts, regions, strict=True):
        sizes.append(_scatter(dice, image, shape, shade(COLOURS[name], dice, 12), count, box))
        facts.append({"type": "group", "shape": shape, "colour": name, "count": count, "place": place})
    return image, facts, sizes, ground


def _places(dice: Dice, number: int, total: int, layout: str) -> list[tuple[str, Box]]:
    """Where each of the groups goes, in reading order."""
    upright = layout == "tall" or (layout == "square" and dice.chance(0.5))
    ends = ("top", "bottom") if upright else ("left", "right")
    if number == 1:
        places = ["everywhere" if total > 4 and dice.chance(0.5) else dice.pick(("centre", *ends))]
    elif number == 2:
        places = list(ends)
    elif number == 3:
        thirds = ((0.0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1.0))
        boxes = [(0.0, a, 1.0, b) if upright else (a, 0.0, b, 1.0) for a, b in thirds]
        return list(zip((ends[0], "centre", ends[1]), boxes, strict=True))
    else:
        places = list(_CORNERS)
    return [(place, _REGIONS[place]) for place in places]


def _scatter(dice: Dice, image: Image.Image, shape: str, colour: Colour, count: int, box: Box) -> str:
    """Draw `count` of a shape in a part of the picture without touching; the word for their size, or none."""
    margin = 3
    left, top = box[0] * image.width + margin, box[1] * image.height + margin
    width, height = box[2] * image.width - margin - left, box[3] * image.height - margin - top
    grids = [(columns, -(-count // columns)) for columns in range(1, count + 1)]
    columns, rows = max(grids, key=lambda grid: min(width / grid[0], height / grid[1]))
    cell_width, cell_height = width / columns, height / rows
    cell = min(cell_width, cell_height)
    diameter = max(17, int(min(cell, 96) * dice.uniform(0.55, 0.95)))
    diameter = min(diameter, int(cell))
    for place in dice.sample(range(columns * rows), count):
        free_x, free_y = (cell_width - diameter) / 2, (cell_height - diameter) / 2
        x = left + (place % columns + 0.5) * cell_width + free_x * dice.uniform(-0.9, 0.9)
        y = top + (place // columns + 0.5) * cell_height + free_y * dice.uniform(-0.9, 0.9)
        put_shape(image, shape, (x, y), diameter, colour, dice.uniform(-9, 9))
    share = diameter / min(image.size)
    return "large" if share > 0.38 else "small" if share < 0.16 else ""


def _shapes_caption(dice: Dice, facts: list[Fact], sizes: list[str], ground: str, layout: str) -> str:
    total, number = sum(fact["count"] for fact in facts), len(facts)
    things = counted(total, "shape") if dice.chance(0.5) else counted(total, "object")
    picture = "picture" if layout == "square" else f"{layout} picture"
    opening = dice.pick(
        (
            f"the picture shows {things} on a {ground} background.",
            f"on a {ground} background there {'is' if total == 1 else 'are'} {things}.",
            f"this is a {picture} of {things} on a {ground} background.",
            f"the background is {ground} and holds {things} in {counted(number, 'group')}.",
            f"a {picture} with a {ground} background and {things}.",
        )
    )
    clauses = [group_clause(dice, fact, size) for fact, size in zip(facts, sizes, strict=True)]
    told = [sentence(opening), *group_sentences(dice, clauses)]
    extras = ["Nothing else is drawn."]
    if layout != "square":
        extras.append(f"The picture is {_LONGER[layout]} than it is {'wide' if layout == 'tall' else 'tall'}.")
    for fact in facts:
        one, many, colour = fact["shape"], SHAPES[fact["shape"]], fact["colour"]
        alone = sum(other["shape"] == one for other in facts) == 1
        if fact["count"] > 1:
            extras.append(f"The {colour} {many} do not touch each other.")
            if alone:
                extras.append(f"Every {one} in the picture is {colour}.")
        elif alone:
            extras.append(f"The only {one} is {colour}.")
    if number == 1:
        extras.append("There is only one group of shapes." if total > 1 else "There is only this one thing to see.")
    for a, b in pairwise(facts):
        more, less = (a, b) if a["count"] >= b["count"] else (b, a)
        names = [f"{fact['colour']} {SHAPES[fact['shape']]}" for fact in (more, less)]
        if more["count"] > less["count"]:
            extras.append(f"There are more {names[0]} than {names[1]}.")
        else:
            extras.append(f"There are as many {names[0]} as {names[1]}.")
    by_place = {fact["place"]: fact for fact in facts}
    for before, after, relation in (("left", "right", "to the left of"), ("top", "bottom", "above")):
        if before in by_place and after in by_place:
            first, second = (
                f"the {fact['colour']} {SHAPES[fact['shape']] if fact['count'] > 1 else fact['shape']}"
                for fact in (by_place[before], by_place[after])
            )
            be = "is" if by_place[before]["count"] == 1 else "are"
            extras.append(sentence(f"{first} {be} {relation} {second}."))
    return compose(dice, told, extras, dice.between(25, 34))
