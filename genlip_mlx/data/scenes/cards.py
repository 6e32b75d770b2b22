"""Flash cards: one thing to name or to read, in few patches and few words.

A card costs a sixth of a scene's tokens, so a training step holds six times as many words and shapes. Half of the words
stand where a patch begins, and half are black on white: what a model reads first, and where it learns the letters.
"""

from __future__ import annotations

from PIL import Image

from .dice import Dice
from .drawing import (
    PATCH,
    Drawn,
    canvas,
    fitting,
    grain,
    named,
    put_shape,
    put_text,
    readable,
    shade,
    text_width,
    visible,
)
from .shapes import scattered
from .signs import INKS
from .vocabulary import (
    BACKGROUNDS,
    COLOURS,
    FOOTERS,
    ITEMS,
    LABELS,
    NUMBERED,
    PALE,
    PLACES,
    SHAPES,
    SHOP_KINDS,
    SHOPS,
    TITLES,
    WORDS,
    Colour,
    Fact,
    sentence,
)
from .wording import group_name, quoted

_LABELS = tuple(label for labels, _ in LABELS for label in labels)
_NOUNS = (WORDS, WORDS, WORDS, ITEMS, NUMBERED, TITLES, _LABELS, SHOPS, SHOP_KINDS)


def cards(dice: Dice) -> Drawn:
    """A few words or a number to read, or one or two groups of shapes, on 16 to 88 patches, mostly under 40."""
    return _to_name(dice) if dice.chance(0.4) else _to_read(dice)


def _to_name(dice: Dice) -> Drawn:
    plain = dice.chance(0.4)
    image, facts, ground = _one_thing(dice) if plain else _groups(dice)
    clauses = [f"{group_name(fact)} {dice.pick(PLACES[fact['place']])}" for fact in facts]
    caption = sentence(f"{', and '.join(clauses)}, on {ground}.")
    return image if plain else grain(image, dice), caption, facts


def _one_thing(dice: Dice) -> tuple[Image.Image, list[Fact], str]:
    """The plainest: one shape as large as its card."""
    ground, side = dice.pick(PALE), 4 * PATCH
    image = Image.new("RGB", (side, side), named(ground))
    shape, name = dice.pick(list(SHAPES)), dice.pick(visible(named(ground), COLOURS))
    put_shape(image, shape, (side / 2, side / 2), side - 8, shade(COLOURS[name], dice, 12))
    return image, [{"type": "group", "shape": shape, "colour": name, "count": 1, "place": "centre"}], ground


def _groups(dice: Dice) -> tuple[Image.Image, list[Fact], str]:
    total = dice.between(1, 6)
    number = min(total, dice.weighted(((1, 0.6), (2, 0.4))))
    size = PATCH * dice.between(4, 6), PATCH * dice.between(4, 6)
    image, facts, _, ground = scattered(dice, size, total, number, "square")
    return image, facts, ground


def _to_read(dice: Dice) -> Drawn:
    if dice.chance(0.5):
        ground, ink = "white", "black"
        paper, paint = named(ground), named(ink)
    else:
        ground = dice.pick([*BACKGROUNDS, *COLOURS])
        paper = shade(named(ground), dice, 8)
        ink = dice.pick(readable(paper, INKS))
        paint = shade(named(ink), dice, 12)
    lines = _lines(dice)
    image = _at_the_corner(lines, paper, paint) if dice.chance(0.5) else _anywhere(dice, lines, paper, paint)
    facts: list[Fact] = [{"type": "text", "text": line} for line in lines]
    text = quoted(" ".join(lines))
    caption = dice.pick((f"It says {text}.", f"{text} in {ink} on {ground}.", f"{sentence(ink)} letters say {text}."))
    return image, caption, facts


def _at_the_corner(lines: list[str], ground: Colour, ink: Colour) -> Image.Image:
    """Lines of one size that begin where a patch does: the same word is the same patches."""
    rows = 2 * len(lines)
    columns = max(int(max(text_width(line, PATCH) for line in lines) + 6) // PATCH + 1, 16 // rows)
    image = Image.new("RGB", (PATCH * columns, PATCH * rows), ground)
    for k, line in enumerate(lines):
        put_text(image, line, (4, PATCH * (2 * k + 1)), PATCH, ink, "lm")
    return image


def _anywhere(dice: Dice, lines: list[str], ground: Colour, ink: Colour) -> Image.Image:
    em, bold = dice.weighted(((dice.between(15, 20), 0.7), (dice.between(21, 30), 0.3))), dice.chance(0.3)
    em = fitting(lines, 9 * PATCH, 9 * PATCH, em)
    widest = max(text_width(line, em) for line in lines)
    pitch = em * dice.uniform(1.25, 1.8)
    rows = max(2, -(-int(len(lines) * pitch) // PATCH) + dice.between(0, 1))
    columns = max(-(-int(widest + 10) // PATCH) + dice.between(0, 2), -(-16 // rows))
    image = canvas((PATCH * columns, PATCH * rows), ground, dice)
    free_x, free_y = (image.width - widest - 6) / 2, (image.height - len(lines) * pitch) / 2
    x = image.width / 2 + max(0.0, free_x) * dice.uniform(-0.9, 0.9)
    y = image.height / 2 + max(0.0, free_y) * dice.uniform(-0.9, 0.9)
    for k, line in enumerate(lines):
        put_text(image, line, (x, y + (k - (len(lines) - 1) / 2) * pitch), em, ink, bold=bold)
    return grain(image, dice)


def _lines(dice: Dice) -> list[str]:
    style = dice.weighted((("words", 0.6), ("number", 0.2), ("both", 0.15), ("phrase", 0.05)))
    if style == "phrase":
        return [dice.pick(FOOTERS)]
    nouns = {"words": dice.between(1, 2), "number": 0, "both": 1}[style]
    pieces = [dice.pick(dice.pick(_NOUNS)) for _ in range(nouns)]
    if style != "words":
        pieces.append(
            dice.weighted(
                (
                    (str(dice.between(1, 99)), 0.4),
                    (str(dice.between(1, 9999)), 0.3),
                    (f"{dice.below(20)}.{dice.below(100):02d}", 0.3),
                )
            )
        )
    if dice.chance(0.5):
        pieces = [piece.upper() for piece in pieces]
    return pieces if dice.chance(0.5) else [" ".join(pieces)]
