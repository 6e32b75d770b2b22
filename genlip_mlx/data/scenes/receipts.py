"""Scenes with rows of words and prices: receipts."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image, ImageDraw

from .dice import Dice
from .drawing import PATCH, Drawn, canvas, grain, line_at, named, put_text, shade, text_width
from .vocabulary import (
    BACKGROUNDS,
    FOOTERS,
    ITEMS,
    SHOP_KINDS,
    SHOPS,
    Colour,
    Fact,
    counted,
    listed,
)
from .wording import compose, quoted

_EDGE = 9  # pixels from the side of the picture to the print


@dataclass(frozen=True)
class _Receipt:
    shop: str
    names: list[str]  # of the items
    cents: list[int]  # of the items
    footer: str | None
    paper: str
    table: str
    ink: str

    @property
    def total(self) -> str:
        return _money(sum(self.cents))

    @property
    def items(self) -> list[tuple[str, str]]:
        return [(name, _money(cents)) for name, cents in zip(self.names, self.cents, strict=True)]

    @property
    def sums(self) -> list[tuple[str, str]]:
        """The items, and what they add up to."""
        return [*self.items, ("total", self.total)]


def _money(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02d}"


def receipts(dice: Dice) -> Drawn:
    """A till receipt: the shop, some items with prices, the total that they add up to, often a last line."""
    names = dice.sample(ITEMS, dice.between(3, 7))
    receipt = _Receipt(
        shop=f"{dice.pick(SHOPS)} {dice.pick(SHOP_KINDS)}".upper(),
        names=names,
        cents=[5 * dice.between(8, 399 if dice.chance(0.2) else 199) for _ in names],
        footer=dice.pick(FOOTERS) if dice.chance(0.6) else None,
        paper=dice.weighted((("white", 0.75), ("light yellow", 0.25))),
        table=dice.pick(("brown", "dark grey", "dark blue", "green", "red", "light grey")),
        ink=dice.weighted((("black", 0.8), ("blue", 0.2))),
    )
    width, paper = PATCH * dice.between(9, 10), shade(BACKGROUNDS[receipt.paper], dice, 4)
    lines, barcode = _layout(receipt, width - 2 * _EDGE), dice.chance(0.5)
    rows = max(18, 1 + sum(after for _, _, after in lines) + 2 * barcode)
    image = canvas((width, PATCH * rows), shade(named(receipt.table), dice, 10), dice)
    image.paste(paper, (4, 4, width - 4, image.height - 4))
    _print(dice, image, lines, shade(named(receipt.ink), dice, 16), barcode)

    facts: list[Fact] = [{"type": "text", "text": receipt.shop}]
    for name, price in receipt.sums:
        facts.append({"type": "text", "text": f"{name} {price}"})
        facts.append({"type": "value", "label": name, "value": float(price)})
    if receipt.footer is not None:
        facts.append({"type": "text", "text": receipt.footer})
    return grain(image, dice), _receipt_caption(dice, receipt), facts


def _layout(receipt: _Receipt, room: int) -> list[tuple[str, str, int]]:
    """Lines from the top: what stands at the left, or alone in the middle; at the right; and rows to the next line."""
    heading = receipt.shop.split() if text_width(receipt.shop) > room else [receipt.shop]
    lines = [(line, "", 1) for line in heading[:-1]] + [(heading[-1], "", 2)]
    lines += [(name, price, 2) for name, price in receipt.sums]
    return lines if receipt.footer is None else [*lines, (receipt.footer, "", 2)]


def _print(dice: Dice, image: Image.Image, lines: list[tuple[str, str, int]], ink: Colour, barcode: bool) -> None:
    draw, row, left, right = ImageDraw.Draw(image), 1, _EDGE, image.width - _EDGE
    for name, price, after in lines:
        y = line_at(row)
        if not price:
            put_text(image, name, (image.width / 2, y), ink, bold=name.isupper())
        else:
            last = name == "total"
            if last:
                draw.line((left, y - PATCH, right, y - PATCH), fill=ink, width=1)
            put_text(image, name, (left, y), ink, "lm", last)
            put_text(image, price, (right, y), ink, "rm", last)
        row += after
    if barcode:
        x = 4 * _EDGE
        while x < image.width - 4 * _EDGE:
            bar = dice.between(1, 3)
            draw.rectangle((x, PATCH * row, x + bar, PATCH * row + 20), fill=ink)
            x += bar + dice.between(3, 5)


def _receipt_caption(dice: Dice, receipt: _Receipt) -> str:
    shop, paper, table, ink = quoted(receipt.shop), receipt.paper, receipt.table, receipt.ink
    number = counted(len(receipt.names), "item")
    openings = (
        f"A tall {paper} receipt from {shop} on a {table} table.",
        f"The picture shows a long {paper} receipt of {shop}, printed in {ink}.",
        f"This is a receipt on {paper} paper, and its heading is {shop}.",
        f"On a {table} table lies a receipt from {shop}.",
    )
    lead = dice.pick((f"It lists {number}:", f"The {number} are", f"There are {number} on it, namely"))
    sum_lead = dice.pick(("The last sum is", "Below them stands", "Under the line it says", "The sum is given as"))
    told = [
        dice.pick(openings),
        f"{lead} {listed([quoted(f'{name} {price}') for name, price in receipt.items])}.",
        f"{sum_lead} {quoted(f'total {receipt.total}')}.",
    ]
    if receipt.footer is not None:
        lead = dice.pick(("At the end it says", "The last line is", "It ends with"))
        told.append(f"{lead} {quoted(receipt.footer)}.")
    extras = [f"The paper is {paper}.", f"The table is {table}.", f"The print is {ink}."]
    high, low = max(receipt.cents), min(receipt.cents)
    if receipt.cents.count(high) == receipt.cents.count(low) == 1:
        dearest, cheapest = (receipt.names[receipt.cents.index(cents)] for cents in (high, low))
        extras.append(f"The dearest item is {dearest} and the cheapest is {cheapest}.")
    return compose(dice, told, extras, dice.between(28, 36))
