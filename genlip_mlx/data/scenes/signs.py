"""Scenes to read: signs and pages, tall boards, wide banners."""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image, ImageDraw

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
    squarish,
    text_width,
    visible,
)
from .vocabulary import (
    BACKGROUNDS,
    COLOURS,
    NUMBERED,
    ORDINALS,
    SHAPES,
    WORDS,
    Fact,
    a_,
    counted,
    listed,
    sentence,
)
from .wording import compose, group_clause, quoted

INKS = ("white", "black", "yellow", "blue", "red")


@dataclass(frozen=True)
class _Sign:
    """What a sign looks like; without a panel the words stand on the wall itself."""

    thing: str
    wall: str
    panel: str | None
    ink: str
    lines: list[str]
    bold: bool
    border: bool


def words(dice: Dice) -> Drawn:
    """A sign, a label or a page with a word, a few words or a number; or a tall board with a word a line."""
    if dice.chance(0.28):
        return _board(dice)
    wall, panel, ink = _colours(dice)
    framed = dice.chance(0.7)
    sign = _Sign(
        thing=dice.pick(("sign", "plate", "label", "poster") if framed else ("wall", "page")),
        wall=wall,
        panel=panel if framed else None,
        ink=ink if framed else dice.pick(readable(named(wall), (*INKS, "green"))),
        lines=_sign_lines(dice),
        bold=dice.chance(0.4),
        border=framed and dice.chance(0.5),
    )
    facts: list[Fact] = [{"type": "text", "text": line} for line in sign.lines]
    return grain(_paint(dice, sign), dice), _sign_caption(dice, sign), facts


def _paint(dice: Dice, sign: _Sign) -> Image.Image:
    widest = max(text_width(line) for line in sign.lines)
    width, height = squarish(dice, 6)
    width = max(width, PATCH * math.ceil((widest + 2 * PATCH) / PATCH))
    image = canvas((width, height), shade(named(sign.wall), dice, 6), dice)
    ink = shade(named(sign.ink), dice, 10)
    rows = height // PATCH
    step = dice.between(1, 2) if 2 * len(sign.lines) - 1 <= rows - 2 else 1
    span = step * (len(sign.lines) - 1) + 1
    first = dice.between(1, rows - 1 - span)
    if sign.panel is not None:
        above, below = (PATCH * free for free in (first, rows - first - span))
        top, bottom = above - dice.uniform(7, above - 1), height - below + dice.uniform(7, below - 1)
        colour = shade(named(sign.panel), dice, 8)
        for inset, paint in ((0, colour), (3, ink), (5, colour)) if sign.border else ((0, colour),):
            box = (PATCH / 4 + inset, top + inset, width - PATCH / 4 - inset, bottom - inset)
            ImageDraw.Draw(image).rounded_rectangle(box, 6, fill=paint)
    x = width / 2 + max(0.0, width - widest - PATCH) / 2 * dice.uniform(-0.8, 0.8)
    for k, line in enumerate(sign.lines):
        put_text(image, line, (x, line_at(first + step * k)), ink, bold=sign.bold)
    return image


def _sign_caption(dice: Dice, sign: _Sign) -> str:
    thing, wall, panel, ink = sign.thing, sign.wall, sign.panel, sign.ink
    openings: tuple[str, ...]
    if panel is None:
        openings = (
            f"{sentence(a_(wall))} {thing} with {ink} letters on it.",
            f"The picture shows {ink} writing on a {wall} {thing}.",
            f"On a {wall} {thing} something is written in {ink}.",
        )
        extras = [f"No frame is drawn on the {thing}."]
    else:
        openings = (
            f"{sentence(a_(panel))} {thing} with {ink} letters on a {wall} wall.",
            f"The picture shows {a_(panel)} {thing} in front of a {wall} background.",
            f"On a {wall} wall hangs {a_(panel)} {thing} with {ink} writing.",
            f"There is {a_(panel)} {thing} on a {wall} background, written in {ink}.",
        )
        extras = ["Nothing else hangs beside it."]
        extras.append(f"A thin {ink} line runs around the {thing}." if sign.border else f"The {thing} has no border.")
    extras += [*_writing(sign.lines, ink, sign.bold), f"The writing is in {counted(len(sign.lines), 'line')}."]
    return compose(dice, [dice.pick(openings), _reading(dice, thing, sign.lines)], extras, dice.between(25, 34))


def _sign_lines(dice: Dice) -> list[str]:
    style = dice.weighted((("word", 0.28), ("two", 0.26), ("three", 0.18), ("numbered", 0.18), ("number", 0.1)))
    if style == "number":
        return [str(dice.between(1, 9999)) if dice.chance(0.6) else f"{dice.below(100)}.{dice.below(100):02d}"]
    if style == "numbered":
        noun, number = _cased(dice, [dice.pick(NUMBERED)])[0], str(dice.between(1, 999))
        return [noun, number] if dice.chance(0.5) else [f"{noun} {number}"]
    picked = _cased(dice, dice.sample(WORDS, {"word": 1, "two": 2, "three": 3}[style]))
    if style == "three" and dice.chance(0.4):
        return [f"{picked[0]} {picked[1]}", picked[2]]
    if style == "two" and len(" ".join(picked)) <= 11 and dice.chance(0.5):
        return [" ".join(picked)]
    return picked


def _cased(dice: Dice, picked: list[str]) -> list[str]:
    return [word.upper() for word in picked] if dice.chance(0.5) else picked


def _colours(dice: Dice) -> tuple[str, str, str]:
    """Names of wall, panel and ink, each to be told from the one before."""
    wall = dice.pick(list(BACKGROUNDS))
    panel = dice.pick(visible(named(wall), (*COLOURS, "white"), 150))
    return wall, panel, dice.pick(readable(named(panel), INKS))


def _reading(dice: Dice, thing: str, lines: list[str]) -> str:
    """The sentence that says what is written, each line or all of them in quotes."""
    verb = dice.pick(("reads", "says", "shows"))
    if len(lines) > 1 and dice.chance(0.5):
        parts = [f"the {ORDINALS[k]} line {verb} {quoted(line)}" for k, line in enumerate(lines)]
        return sentence(listed(parts) + ".")
    whole = " ".join(lines)
    return dice.pick(
        (
            f"The {thing} {verb} {quoted(whole)}.",
            f"It {verb} {quoted(whole)}.",
            f"The writing {verb} {quoted(whole)}.",
            f"On it is written {quoted(whole)}.",
            f"The {'words' if ' ' in whole else 'text'} on it {'are' if ' ' in whole else 'is'} {quoted(whole)}.",
        )
    )


def _writing(lines: list[str], ink: str, bold: bool) -> list[str]:
    """Sentences that may be said of any writing."""
    pieces = " ".join(lines).split()
    letters, numbers = any(map(str.isalpha, pieces)), not all(map(str.isalpha, pieces))
    extras = ["There is nothing else to read.", f"The {'letters' if letters else 'digits'} are {ink}."]
    if letters:
        extras.append(f"The letters are {'capital' if lines[0].isupper() else 'small'} letters.")
    extras.append("There is a number in the text." if numbers else f"The text has {counted(len(pieces), 'word')}.")
    if bold:
        extras.append("The writing is thick and bold.")
    return extras


def _board(dice: Dice) -> Drawn:
    """A tall board, one word a line: clear at its own size, squeezed to near illegibility in a small square."""
    wall, panel, ink_name = _colours(dice)
    lines = _cased(dice, dice.sample(WORDS, dice.between(4, 7)))
    step = dice.between(2, 3)
    rows = max(14, step * (len(lines) - 1) + 3 + dice.between(0, 2))
    image = canvas((PATCH * dice.between(6, 8), PATCH * rows), shade(named(wall), dice, 6), dice)
    box = (6, 6, image.width - 6, image.height - 6)
    ImageDraw.Draw(image).rounded_rectangle(box, 8, fill=shade(named(panel), dice, 8))
    ink, bold, at_left = shade(named(ink_name), dice, 10), dice.chance(0.3), dice.chance(0.5)
    x, anchor = (PATCH, "lm") if at_left else (image.width / 2, "mm")
    first = dice.between(1, rows - 2 - step * (len(lines) - 1))
    for k, line in enumerate(lines):
        put_text(image, line, (x, line_at(first + step * k)), ink, anchor, bold)

    thing, number = dice.pick(("board", "list", "notice")), counted(len(lines), "line")
    openings = (
        f"A tall {panel} {thing} with {number} of {ink_name} writing on a {wall} background.",
        f"The picture shows a tall {panel} {thing} on a {wall} wall, with {number} in {ink_name}.",
        f"On a {wall} background there is a tall {panel} {thing} with {number} of text.",
    )
    lead = dice.pick(("From top to bottom it reads", "Its lines are", f"The {thing} lists", "The words on it are"))
    told = [dice.pick(openings), f"{lead} {listed([quoted(line) for line in lines])}."]
    extras = [*_writing(lines, ink_name, bold), "Every line holds one word."]
    extras.append("The lines start at the left edge." if at_left else "The lines stand in the middle of it.")
    facts: list[Fact] = [{"type": "text", "text": line} for line in lines]
    return grain(image, dice), compose(dice, told, extras, dice.between(25, 34)), facts


def banners(dice: Dice) -> Drawn:
    """A wide strip with a line of words, often with a shape at one end."""
    picked = dice.sample(WORDS, dice.between(4, 6))
    if dice.chance(0.25):
        picked[-1] = str(dice.between(1, 2030))
    text, bold = " ".join(_cased(dice, picked)), dice.chance(0.4)
    rows = dice.between(4, 5)
    diameter = int(PATCH * rows * dice.uniform(0.45, 0.62)) if dice.chance(0.55) else 0
    width = PATCH * (math.ceil((text_width(text) + diameter) / PATCH) + dice.between(3, 6))
    ground = dice.pick([*COLOURS, "white", "light grey", "light yellow", "dark blue"])
    colour = shade(named(ground), dice, 8)
    image = canvas((width, PATCH * rows), colour, dice)
    ink_name = dice.pick(readable(colour, INKS))
    ink = shade(named(ink_name), dice, 10)
    facts: list[Fact] = []
    left, right = 12.0, width - 12.0
    if diameter:
        shape, end, name = dice.pick(list(SHAPES)), dice.pick(("left", "right")), dice.pick(visible(colour, COLOURS))
        x = left + diameter / 2 if end == "left" else right - diameter / 2
        put_shape(image, shape, (x, image.height / 2), diameter, shade(COLOURS[name], dice, 12), dice.uniform(-9, 9))
        left, right = (left + diameter + 8, right) if end == "left" else (left, right - diameter - 8)
        facts.append({"type": "group", "shape": shape, "colour": name, "count": 1, "place": end})
    x = (left + right) / 2 + (right - left - text_width(text)) / 2 * dice.uniform(-0.9, 0.9)
    put_text(image, text, (x, line_at(dice.between(1, rows - 2))), ink, bold=bold)
    border = dice.chance(0.35)
    if border:
        ImageDraw.Draw(image).rectangle((2, 2, width - 3, image.height - 3), outline=ink, width=2)

    thing = dice.pick(("banner", "strip", "headline"))
    openings = (
        f"A wide {ground} {thing} with {ink_name} letters.",
        f"The picture shows a long {ground} {thing} with {ink_name} writing.",
        f"This is a wide {thing} in {ground}, written in {ink_name}.",
        f"A long {thing} has {ink_name} letters on {a_(ground)} background.",
    )
    told = [dice.pick(openings), _reading(dice, thing, [text])]
    extras = [*_writing([text], ink_name, bold), "All the words stand in one row."]
    extras.append(f"{sentence(a_(ink_name)) if border else 'No'} frame runs around the {thing}.")
    if facts:
        told.append(sentence(group_clause(dice, facts[0]) + "."))
    else:
        extras.append("No shape is drawn beside the words.")
    facts.insert(0, {"type": "text", "text": text})
    return grain(image, dice), compose(dice, told, extras, dice.between(25, 34)), facts
