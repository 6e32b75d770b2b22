"""Scenes with values to look up: bar charts and line charts."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from PIL import Image, ImageDraw

from .dice import Dice
from .drawing import PATCH, Drawn, canvas, grain, line_at, put_text, shade, text_width
from .vocabulary import BACKGROUNDS, COLOURS, LABELS, PALE, TITLES, Fact, a_, counted, listed
from .wording import compose, quoted


@dataclass(frozen=True)
class _Chart:
    style: str  # "bar" or "line"
    title: str | None
    labels: list[str]
    values: list[int]
    colour: str
    ground: str
    grid: bool


def bars(dice: Dice) -> Drawn:
    """A bar chart with a label under and the value over each bar."""
    return _chart(dice, "bar", _compact(dice), dice.between(3, 5))


def lines(dice: Dice) -> Drawn:
    """A line chart with marked points, a label under and the value over each; half of them are wide."""
    if dice.chance(0.5):
        return _chart(dice, "line", _compact(dice), dice.between(3, 5))
    return _chart(dice, "line", (PATCH * dice.between(18, 24), PATCH * dice.between(8, 9)), dice.between(5, 7))


def _compact(dice: Dice) -> tuple[int, int]:
    return PATCH * dice.between(10, 14), PATCH * dice.between(9, 12)


def _chart(dice: Dice, style: str, size: tuple[int, int], number: int) -> Drawn:
    labels, ordered = dice.pick(LABELS)
    room = (size[0] - 20) // (max(text_width(label) for label in labels) + 8)
    number = min(number, int(room))
    first = dice.between(0, len(labels) - number)
    largest = 9 if dice.chance(0.25) else 99
    chart = _Chart(
        style=style,
        title=dice.pick(TITLES) if dice.chance(0.75) else None,
        labels=list(labels[first : first + number]) if ordered else dice.sample(labels, number),
        values=[dice.between(1, largest) for _ in range(number)],
        colour=dice.pick([name for name in COLOURS if name != "yellow"]),
        ground=dice.pick(PALE),
        grid=dice.chance(0.4),
    )
    facts: list[Fact] = [] if chart.title is None else [{"type": "text", "text": chart.title}]
    facts += [{"type": "text", "text": label} for label in chart.labels]
    for label, value in zip(chart.labels, chart.values, strict=True):
        facts.append({"type": "value", "label": label, "value": float(value)})
    return grain(_plot(dice, chart, size), dice), _caption(dice, chart), facts


def _plot(dice: Dice, chart: _Chart, size: tuple[int, int]) -> Image.Image:
    paper = shade(BACKGROUNDS[chart.ground], dice, 4)
    image = canvas(size, paper, dice)
    draw = ImageDraw.Draw(image)
    colour, ink = shade(COLOURS[chart.colour], dice, 12), shade(COLOURS["black"], dice, 14)
    rows = 1 if chart.title is None else 3  # for the highest value, and for a title with a free row under it
    top, bottom = PATCH * rows + 8, size[1] - PATCH - 3
    left, right = 10.0, size[0] - 10.0
    if chart.grid:
        for k in range(1, 5):
            level = round(bottom - (bottom - top) * k / 4)
            draw.line((left, level, right, level), fill=(150, 150, 150), width=1)
    draw.line((left, bottom, right, bottom), fill=ink, width=2)
    if dice.chance(0.6):
        draw.line((left, top - PATCH, left, bottom), fill=ink, width=2)
    if chart.title is not None:
        put_text(image, chart.title, (size[0] / 2, line_at(0)), ink, bold=True)

    step = (right - left) / len(chart.labels)
    half = step * dice.uniform(0.25, 0.38)
    points = [
        (left + step * (k + 0.5), bottom - max(3.0, (bottom - top) * value / max(chart.values)))
        for k, value in enumerate(chart.values)
    ]
    if chart.style == "line":
        draw.line(points, fill=colour, width=3, joint="curve")
    for (x, y), label, value in zip(points, chart.labels, chart.values, strict=True):
        if chart.style == "bar":
            draw.rectangle((round(x - half), round(y), round(x + half), round(bottom) - 1), fill=colour)
        else:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
        over = line_at(int(y - 8) // PATCH - 1)  # the lowest row that is free
        put_text(image, str(value), (x, over), ink, halo=paper if chart.style == "line" else None)
        put_text(image, label, (x, line_at(size[1] // PATCH - 1)), ink)
    return image


def _caption(dice: Dice, chart: _Chart) -> str:
    style, colour, labels, values = chart.style, chart.colour, chart.labels, chart.values
    mark = "bar" if style == "bar" else "point"
    marks = counted(len(labels), mark)
    called = (
        "" if chart.title is None else dice.pick((" with the title ", " titled ", " called ")) + quoted(chart.title)
    )
    openings = (
        f"A {style} chart{called} has {marks} in {colour}.",
        f"The picture shows {a_(colour)} {style} chart{called} that has {marks}.",
        f"On a {chart.ground} background there is a {style} chart{called}, drawn in {colour} with {marks}.",
        f"This is a {style} chart{called}, and it has {marks}, all {colour}.",
    )
    lead, link = dice.pick(
        (
            ("From left to right:", " is "),
            ("From left to right", " has "),
            ("The values are", " "),
            ("The values are", " at "),
            (f"The {style} chart shows", " with "),
            (f"The {style} chart shows", " at "),
            ("It reads from left to right", " "),
        )
    )
    stated = [f"{quoted(label)}{link}{value}" for label, value in zip(labels, values, strict=True)]
    extras = [f"Each {mark} has its value written above it."]
    extras += [
        f"The {word} value is {value} for {labels[values.index(value)]}."
        for word, value in (("highest", max(values)), ("lowest", min(values)))
        if values.count(value) == 1
    ]
    if style == "line":
        extras.append(_course(values))
    elif values[0] != values[-1]:
        extras.append(f"The first bar is {'higher' if values[0] > values[-1] else 'lower'} than the last one.")
    extras.append("Thin grey lines lie behind it." if chart.grid else "No lines are drawn behind it.")
    extras.append("It has no title." if chart.title is None else f"The title stands above the {style} chart.")
    return compose(dice, [dice.pick(openings), f"{lead} {listed(stated)}."], extras, dice.between(28, 36))


def _course(values: list[int]) -> str:
    """How the line runs: all the way, or at its end."""
    steps = [(b > a) - (b < a) for a, b in pairwise(values)]
    way = {1: "goes up", -1: "goes down", 0: "is level"}
    if steps[0] and len(set(steps)) == 1:
        return f"The line {way[steps[0]]} all the way."
    return f"At its end the line {way[steps[-1]]}."
