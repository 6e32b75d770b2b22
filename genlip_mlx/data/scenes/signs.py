"""Scenes to read: signs and pages, tall boards, wide banners."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image, ImageDraw

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
    squarish,
    text_mask,
    text_width,
    turn,
    visible,
)
from .vocabulary import (
    BACKGROUNDS,
    COLOURS,
    NUMBERED,
    ORDINALS,
    SHAPES,
    WORDS,
    Colour,
    Fact,
    a_,
    counted,
    listed,
    sentence,
)
from .wording import compose, group_clause, quoted

INKS = ("white", "black", "yellow", "blue", "red")
_LARGEST = 56  # pixels an em, on a sign


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
    tilt: float  # degrees, counter-clockwise


def words(dice: Dice) -> Drawn:
    """A sign, a label or a page with a word, a few words or a number; or a tall board with a word a line."""
    if dice.chance(0.28):
        return _board(dice)
    wall, panel, ink = _colours(dice)
    framed = dice.chance(0.7)
    tilt = dice.uniform(2, 6) * dice.pick((-1, 1)) if dice.chance(0.4) else 0.0
    sign = _Sign(
        thing=dice.pick(("sign", "plate", "label", "poster") if framed else ("wall", "page")),
        wall=wall,
        panel=panel if framed else None,
        ink=ink if framed else dice.pick(readable(named(wall), (*INKS, "green"))),
        lines=_sign_lines(dice),
        bold=dice.chance(0.4),
        border=framed and dice.chance(0.5),
        tilt=tilt,
    )
    facts: list[Fact] = [{"type": "text", "text": line} for line in sign.lines]
    image = _paint(dice, sign, squarish(dice, 8))
    return grain(image, dice), _sign_caption(dice, sign), facts


def _paint(dice: Dice, sign: _Sign, size: tuple[int, int]) -> Image.Image:
    image = canvas(size, shade(named(sign.wall), dice, 6), dice)
    ink = shade(named(sign.ink), dice, 10)
    margin = PATCH // 2
    width, height = image.width - 2 * margin, image.height - 2 * margin
    em = fitting(sign.lines, width * 0.84, height * 0.84, _LARGEST)
    # Never so small that the fixed 224 x 224 picture of stage 1 could not be read.
    em = min(max(20, int(em * dice.uniform(0.75, 1.0))), fitting(sign.lines, width * 0.92, height, _LARGEST))
    text_height = len(sign.lines) * em * 1.3
    if sign.panel is None:
        middle = image.height / 2 + max(0.0, height - text_height) / 2 * dice.uniform(-0.8, 0.8)
    else:
        panel_height = min(height, max(text_height + 18, height * dice.uniform(0.5, 1.0)))
        top = margin + (height - panel_height) * dice.uniform(0.0, 1.0)
        middle = top + panel_height / 2
        colour = shade(named(sign.panel), dice, 8)
        for inset, paint in ((0, colour), (4, ink), (6, colour)) if sign.border else ((0, colour),):
            left, upper = margin + inset, top + inset
            box = (left, upper, image.width - left, top + panel_height - inset)
            image.paste(paint, (0, 0), turn(_rounded(image.size, box), sign.tilt))
    layer = Image.new("L", image.size)
    for k, line in enumerate(sign.lines):
        mask = text_mask(line, em, sign.bold)
        y = middle + (k - (len(sign.lines) - 1) / 2) * em * 1.3
        layer.paste(mask, (round((image.width - mask.width) / 2), round(y - mask.height / 2)))
    image.paste(ink, (0, 0), turn(layer, sign.tilt))
    return image


def _rounded(size: tuple[int, int], box: tuple[float, float, float, float]) -> Image.Image:
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rounded_rectangle(box, 8, fill=255)
    return mask


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
    if sign.tilt:
        turned = "writing" if panel is None else f"whole {thing}"
        extras.append(f"The {turned} is tilted to the {'left' if sign.tilt > 0 else 'right'}.")
    else:
        extras.append("The writing is level and not tilted.")
    extras += [*_writing(sign.lines, ink, sign.bold), f"The writing is in {counted(len(sign.lines), 'line')}."]
    return compose(dice, [dice.pick(openings), _reading(dice, thing, sign.lines)], extras, dice.between(25, 48))


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
    width, height = PATCH * dice.between(7, 8), PATCH * dice.between(32, 38)
    wall, panel, ink_name = _colours(dice)
    image = canvas((width, height), shade(named(wall), dice, 6), dice)
    margin = 6
    box = (margin, margin, width - margin, height - margin)
    image.paste(shade(named(panel), dice, 8), (0, 0), _rounded(image.size, box))
    ink = shade(named(ink_name), dice, 10)
    lines = _cased(dice, dice.sample(WORDS, dice.between(4, 7)))
    em = dice.between(16, max(16, fitting(lines, width - 3 * margin, height, 20)))
    pitch = (height - 6 * margin) / len(lines)
    bold, at_left = dice.chance(0.3), dice.chance(0.5)
    x, anchor = (2.5 * margin, "lm") if at_left else (width / 2, "mm")
    for k, line in enumerate(lines):
        y = 3 * margin + (k + 0.5) * pitch + dice.uniform(-0.2, 0.2) * (pitch - em)
        put_text(image, line, (x, y), em, ink, anchor, bold)

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
    return grain(image, dice), compose(dice, told, extras, dice.between(25, 45)), facts


def banners(dice: Dice) -> Drawn:
    """A wide strip with a line of words, often with a shape at one end."""
    rows = dice.between(4, 6)
    image_size = PATCH * min(dice.between(32, 44), 288 // rows), PATCH * rows
    ground = dice.pick([*COLOURS, "white", "light grey", "light yellow", "dark blue"])
    colour = shade(named(ground), dice, 8)
    image = canvas(image_size, colour, dice)
    ink_name = dice.pick(readable(colour, INKS))
    ink = shade(named(ink_name), dice, 10)
    facts: list[Fact] = []
    left, right = 12.0, image.width - 12.0
    if dice.chance(0.55):
        shape, end, name = dice.pick(list(SHAPES)), dice.pick(("left", "right")), dice.pick(visible(colour, COLOURS))
        diameter = int(image.height * dice.uniform(0.45, 0.62))
        x = left + diameter / 2 if end == "left" else right - diameter / 2
        put_shape(image, shape, (x, image.height / 2), diameter, shade(COLOURS[name], dice, 12), dice.uniform(-9, 9))
        left, right = (left + diameter + 10, right) if end == "left" else (left, right - diameter - 10)
        facts.append({"type": "group", "shape": shape, "colour": name, "count": 1, "place": end})
    em, bold = dice.between(22, min(30, image.height // 2)), dice.chance(0.4)
    text = _banner_text(dice, em, right - left - 8)
    _print(dice, image, text, em, bold, ink, left, right)
    border = dice.chance(0.35)
    if border:
        ImageDraw.Draw(image).rectangle((2, 2, image.width - 3, image.height - 3), outline=ink, width=2)

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
    return grain(image, dice), compose(dice, told, extras, dice.between(25, 45)), facts


def _banner_text(dice: Dice, em: int, width: float) -> str:
    picked = dice.sample(WORDS, dice.between(4, 7))
    if dice.chance(0.25):
        picked[-1] = str(dice.between(1, 2030))
    picked = _cased(dice, picked)
    while text_width(" ".join(picked), em) > width:
        picked.pop(0)
    return " ".join(picked)


def _print(
    dice: Dice, image: Image.Image, text: str, em: int, bold: bool, ink: Colour, left: float, right: float
) -> None:
    """A line of text somewhere between left and right, hardly tilted."""
    mask, layer = text_mask(text, em, bold), Image.new("L", image.size)
    x = (left + right) / 2 + max(0.0, right - left - mask.width) / 2 * dice.uniform(-0.9, 0.9)
    y = image.height / 2 + (image.height - em * 1.3) / 2 * dice.uniform(-0.6, 0.6)
    layer.paste(mask, (round(x - mask.width / 2), round(y - mask.height / 2)))
    image.paste(ink, (0, 0), turn(layer, dice.uniform(-0.8, 0.8)))
