"""Scenes with rows of words and prices: receipts."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image, ImageDraw

from .dice import Dice
from .drawing import PATCH, Drawn, canvas, grain, named, put_text, shade, text_width
from .vocabulary import (
    BACKGROUNDS,
    FOOTERS,
    ITEMS,
    SHOP_KINDS,
    SHOPS,
    Fact,
    counted,
    listed,
)
from .wording import compose, quoted


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
    size = PATCH * dice.between(9, 10), PATCH * dice.between(28, 32)
    image = canvas(size, shade(named(receipt.table), dice, 10), dice)
    image.paste(_till_roll(dice, receipt, (size[0] - 8, size[1] - 8)), (4, 4))

    facts: list[Fact] = [{"type": "text", "text": receipt.shop}]
    for name, price in (*receipt.items, ("total", receipt.total)):
        facts.append({"type": "text", "text": f"{name} {price}"})
        facts.append({"type": "value", "label": name, "value": float(price)})
    if receipt.footer is not None:
        facts.append({"type": "text", "text": receipt.footer})
    return grain(image, dice), _receipt_caption(dice, receipt), facts


def _till_roll(dice: Dice, receipt: _Receipt, size: tuple[int, int]) -> Image.Image:
    paper = Image.new("RGB", size, shade(BACKGROUNDS[receipt.paper], dice, 4))
    draw, ink = ImageDraw.Draw(paper), shade(named(receipt.ink), dice, 16)
    em, edge, centre = dice.between(16, 17), 5, size[0] / 2
    heading = receipt.shop.split() if text_width(receipt.shop, em) > size[0] - 2 * edge else [receipt.shop]
    barcode = 30 if dice.chance(0.5) else 0
    rows = len(heading) + len(receipt.names) + 1 + (receipt.footer is not None)
    pitch = min(dice.uniform(36, 58), (size[1] - barcode - 40) / rows)
    y = 12 + pitch / 2
    for line in heading:
        put_text(paper, line, (centre, y), em, ink, bold=True)
        y += pitch * 0.75
    y += pitch * 0.25
    for name, price in (*receipt.items, ("total", receipt.total)):
        last = name == "total"
        if last:
            draw.line((edge, y - pitch / 2 + 2, size[0] - edge, y - pitch / 2 + 2), fill=ink, width=1)
        put_text(paper, name, (edge, y), em, ink, "lm", last)
        put_text(paper, price, (size[0] - edge, y), em, ink, "rm", last)
        y += pitch
    if receipt.footer is not None:
        put_text(paper, receipt.footer, (centre, y), em, ink)
        y += pitch
    if barcode and y + barcode < size[1]:
        x = 4 * edge
        while x < size[0] - 4 * edge:
            bar = dice.between(1, 3)
            draw.rectangle((x, y - 8, x + bar, y - 8 + barcode), fill=ink)
            x += bar + dice.between(3, 5)
    return paper


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
    return compose(dice, told, extras, dice.between(28, 48))
