"""Flash cards: as many words to read or shapes to name as a small picture holds, and nothing else to say.

What a training step teaches is what it names: a scene spends hundreds of tokens on a handful of words and shapes, and a
card some dozens. And they make a course, from what a model learns in minutes to what scenes hold. The first cards are
four patches square, black on white, with a word a row or a shape a cell: everything begins where a patch does, and
where to look next is plain. Place, words a line, the sheet, colour and noise then vary more and more.
"""

from __future__ import annotations

from string import ascii_lowercase, ascii_uppercase
from typing import NamedTuple

from PIL import Image

from .dice import Dice
from .drawing import (
    PATCH,
    Drawn,
    canvas,
    grain,
    line_at,
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

_MARGIN = 2
_LABELS = tuple(label for labels, _ in LABELS for label in labels)
_NOUNS = (WORDS, WORDS, WORDS, ITEMS, NUMBERED, TITLES, _LABELS, SHOPS, SHOP_KINDS)


class _Hard(NamedTuple):
    """How far each thing strays from the plainest card, 0 to 1."""

    place: float  # of lines and shapes, and their size
    words: float  # a line
    sheet: float  # more and other patches
    look: float  # colours, noise, bold letters


_LESSONS = ((0.0, 0.5), (0.1, 0.6), (0.2, 0.8), (0.4, 1.0))  # from which level to which each of them grows


def _difficulty(dice: Dice) -> _Hard:
    reached = (max(0.0, min(1.0, (dice.level - start) / (end - start))) for start, end in _LESSONS)
    return _Hard(*(most * dice.uniform(0, 1) ** 0.5 for most in reached))


def cards(dice: Dice) -> Drawn:
    """Lines of words, numbers and letters to read, or shapes to name; a later level has easier cards among its own."""
    hard = _difficulty(dice)
    if dice.chance(0.6):
        return _page(dice, hard)
    return _groups(dice, hard) if dice.chance(0.6 * hard.look) else _board(dice, hard)


def _groups(dice: Dice, hard: _Hard) -> Drawn:
    """Groups of shapes in their places, as in a scene."""
    total = dice.between(1, 6)
    number = min(total, dice.weighted(((1, 0.3), (2, 0.4), (3, 0.2), (4, 0.1))))
    width, height = (PATCH * dice.between(4, 5 + round(4 * hard.sheet)) for _ in range(2))
    image, facts, _, ground = scattered(dice, (width, height), total, number, "square")
    clauses = [f"{group_name(fact)} {dice.pick(PLACES[fact['place']])}" for fact in facts]
    return grain(image, dice), sentence(f"{', and '.join(clauses)}, on {ground}."), facts


def _board(dice: Dice, hard: _Hard) -> Drawn:
    """A shape in each cell, named row by row. No facts: they are of groups, each in a place that has a name."""
    side = dice.pick((2, 4)) if dice.chance(1 - hard.sheet) else dice.pick((2, 3, 5))  # patches of a cell
    most = max(1, round((4 + 4 * hard.sheet) / side))
    columns, rows = (dice.between(most if side * most <= 4 else 1, most) for _ in range(2))
    while columns * rows * side**2 < 16:
        columns, rows = columns + 1, rows + (columns > rows)
    paper, ground = _ground(dice, hard.look, PALE if hard.look < 0.3 else tuple(BACKGROUNDS))
    cell, size = PATCH * side, (PATCH * side * columns, PATCH * side * rows)
    image, colours = _sheet(dice, hard.look, size, paper), visible(paper, COLOURS)
    names = []
    for place in range(columns * rows):
        shape, name = dice.pick(list(SHAPES)), dice.pick(colours)
        diameter = int(cell * (0.9 - 0.4 * hard.place * dice.uniform(0, 1)))
        free = hard.place * (cell - diameter) / 2
        x = (place % columns + 0.5) * cell + free * dice.uniform(-1, 1)
        y = (place // columns + 0.5) * cell + free * dice.uniform(-1, 1)
        put_shape(image, shape, (x, y), diameter, shade(COLOURS[name], dice, 12), hard.place * dice.uniform(-9, 9))
        names.append(f"{name} {shape}")
    told = [", ".join(names[start : start + columns]) for start in range(0, len(names), columns)]
    return _finish(dice, hard.look, image), sentence(f"{'; '.join(told)}, on {ground}."), []


def _page(dice: Dice, hard: _Hard) -> Drawn:
    """Lines of one colour; or rows with a number at their right end, as on a receipt."""
    columns = dice.between(4, 4 + round(7 * hard.sheet))
    fewest = max(2, -(-16 // columns))  # no picture has less than 16 patches
    rows = dice.between(fewest, 4 + round(4 * hard.sheet)) if dice.chance(hard.sheet) else 4
    size = PATCH * columns, PATCH * rows
    paper, ground = _ground(dice, hard.look, (*BACKGROUNDS, *COLOURS))
    inks = readable(paper, INKS)
    ink = dice.pick(inks) if dice.chance(hard.look) or "black" not in inks else "black"
    paint = shade(named(ink), dice, round(12 * hard.look))

    room = size[0] - 2 * _MARGIN
    priced = columns > 6 and dice.chance(0.5)
    step = 2 if dice.chance(0.5 * hard.place) else 1  # rows from line to line
    most = (rows + step - 1) // step
    longest = 8 if dice.chance(hard.words) else 1  # words a line
    upper, number = dice.chance(0.5), max(dice.between(1, most), dice.between(1, most))
    lines = [_priced(dice, room - 8) if priced else _line(dice, upper, room, longest) for _ in range(number)]
    widest = max(map(text_width, lines))
    left = _MARGIN + (room - widest) * hard.place * dice.uniform(0, 1)
    free = rows - 1 - step * (number - 1)
    first = dice.between(0, free) if dice.chance(hard.place) else 0
    centred, bold = dice.chance(0.5 * hard.place), dice.chance(0.35 * hard.look)
    image = _sheet(dice, hard.look, size, paper)
    for k, line in enumerate(lines):
        y = line_at(first + step * k)
        if priced:
            name, price = line.rsplit(" ", 1)
            put_text(image, name, (_MARGIN, y), paint, "lm", bold)
            put_text(image, price, (size[0] - _MARGIN, y), paint, "rm", bold)
        else:
            x, anchor = (left + widest / 2, "mm") if centred else (left, "lm")
            put_text(image, line, (x, y), paint, anchor, bold)
    said = quoted(" ".join(lines)) if dice.chance(0.5) else ", ".join(map(quoted, lines))
    facts: list[Fact] = [{"type": "text", "text": line} for line in lines]
    return _finish(dice, hard.look, image), f"{sentence(ink)} on {ground}: {said}.", facts


def _ground(dice: Dice, hard: float, names: tuple[str, ...]) -> tuple[Colour, str]:
    """A background's colour and its name; white for the easiest."""
    name = dice.pick(names) if dice.chance(hard) else "white"
    return shade(named(name), dice, round(8 * hard)), name


def _sheet(dice: Dice, hard: float, size: tuple[int, int], colour: Colour) -> Image.Image:
    return canvas(size, colour, dice) if dice.chance(hard) else Image.new("RGB", size, colour)


def _finish(dice: Dice, hard: float, image: Image.Image) -> Image.Image:
    return grain(image, dice) if dice.chance(hard) else image


def _priced(dice: Dice, room: float) -> str:
    line = f"{dice.pick(dice.pick((ITEMS, _LABELS)))} {_number(dice)}"
    return line if text_width(line) <= room else _priced(dice, room)


def _line(dice: Dice, upper: bool, room: float, longest: int) -> str:
    """A word, or as many as `longest` in some part of the room."""
    line, width = _piece(dice, upper), room * dice.uniform(0.4, 1.0)
    while text_width(line) > room:
        line = _piece(dice, upper)
    for _ in range(longest - 1):
        longer = f"{line} {_piece(dice, upper)}"
        if text_width(longer) > width:
            break
        line = longer
    return line


def _piece(dice: Dice, upper: bool) -> str:
    """A word, a number, some letters, or now and then a few words that go together."""
    kind = dice.weighted((("word", 0.45), ("number", 0.2), ("letters", 0.35)))
    if kind == "number":
        return _number(dice)
    if kind == "letters":  # that no vocabulary helps to guess
        return "".join(dice.pick(ascii_uppercase if upper else ascii_lowercase) for _ in range(dice.between(1, 5)))
    piece = dice.pick(FOOTERS) if dice.chance(0.04) else dice.pick(dice.pick(_NOUNS))
    return piece.upper() if upper else piece


def _number(dice: Dice) -> str:
    if dice.chance(0.5):
        return f"{dice.below(20)}.{dice.below(100):02d}"
    return str(dice.between(1, 99 if dice.chance(0.6) else 9999))
