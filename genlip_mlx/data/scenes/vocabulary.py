"""The words scenes are made of: what is drawn, what it is called, what there is to read.

Captions are written from these tables and `genlip_mlx.data.scoring` reads them back with the same tables.
"""

from __future__ import annotations

from typing import Any

Colour = tuple[int, int, int]  # RGB, 0 to 255
Fact = dict[str, Any]  # see `genlip_mlx.data.synthetic.Scene`

COLOURS: dict[str, Colour] = {
    "red": (212, 36, 36),
    "orange": (245, 138, 18),
    "yellow": (246, 212, 28),
    "green": (40, 148, 58),
    "blue": (34, 86, 208),
    "purple": (122, 48, 168),
    "pink": (245, 128, 182),
    "brown": (124, 74, 36),
    "black": (22, 22, 22),
}
BACKGROUNDS: dict[str, Colour] = {
    "white": (250, 250, 250),
    "light grey": (212, 212, 212),
    "light yellow": (255, 242, 178),
    "light blue": (200, 226, 248),
    "light green": (206, 238, 206),
    "dark grey": (70, 70, 74),
    "dark blue": (24, 34, 84),
}
PALE = ("white", "light grey", "light yellow", "light blue", "light green")  # those that black can be read on

SHAPES: dict[str, str] = {  # one: many
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "heart": "hearts",
    "cross": "crosses",
    "diamond": "diamonds",
    "ring": "rings",
}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")

PLACES: dict[str, tuple[str, ...]] = {
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "top": ("at the top", "in the upper part"),
    "bottom": ("at the bottom", "in the lower part"),
    "centre": ("in the centre", "in the middle"),
    "top left": ("in the top left corner", "at the top left"),
    "top right": ("in the top right corner", "at the top right"),
    "bottom left": ("in the bottom left corner", "at the bottom left"),
    "bottom right": ("in the bottom right corner", "at the bottom right"),
    "everywhere": ("all over the picture", "across the whole picture"),
}

_WORDS = """
air apple arm baby bag ball bank bath bean bear bed bell bike bird boat book box bread bus cake camp car card cat
chair city clock coat coin corn cow cup day desk dog door drum duck egg exit face farm film fire fish flag fork fox
fruit game gate gift glass gold hall hand hat hill home honey horse hotel ice jam juice key king lake lamp leaf lemon
lion map milk moon mouse music news night nose ocean oil oven park pen piano pizza plant pool post queen radio rain
ring river road roof room rose salt sand ship shoe shop sky snow soap sock soup star sugar sun swim table taxi tea
tent tiger tower toy train tree wall wind wolf zoo
"""
WORDS = tuple(_WORDS.split())
NUMBERED = ("room", "bus", "gate", "exit", "line", "track", "floor", "house", "table", "lane", "zone", "route")

SHOPS = ("corner", "green", "city", "sunny", "garden", "river", "village", "royal", "star", "family")
SHOP_KINDS = ("shop", "market", "cafe", "bakery", "store")
_ITEMS = """
apples bananas beans bread butter cake candy carrots cheese cherries chips coffee cookies corn cream eggs fish flour
grapes ham honey jam juice lemons lettuce melon milk noodles nuts oil olives onions oranges pasta pears peas pepper
pizza plums potatoes rice salad salt sauce soap soup sugar tea tomatoes water yogurt
"""
ITEMS = tuple(_ITEMS.split())
FOOTERS = ("thank you", "see you soon", "come again", "paid by card", "paid in cash", "have a nice day")

TITLES = (
    "sales",
    "visitors",
    "rain",
    "goals",
    "books",
    "cars",
    "tickets",
    "letters",
    "trees",
    "prices",
    "users",
    "eggs",
)
LABELS: tuple[tuple[tuple[str, ...], bool], ...] = (  # of a chart's axis, and whether they come in this order
    (("mon", "tue", "wed", "thu", "fri", "sat", "sun"), True),
    (("jan", "feb", "mar", "apr", "may", "jun", "jul"), True),
    (("A", "B", "C", "D", "E", "F", "G"), True),
    (("2019", "2020", "2021", "2022", "2023", "2024", "2025"), True),
    (("cat", "dog", "cow", "fox", "bee", "ant", "owl"), False),
    (("tea", "milk", "juice", "water", "soup", "cola", "cream"), False),
    (("bus", "car", "bike", "train", "ship", "taxi", "boat"), False),
)


def a_(noun: str) -> str:
    """ "a red sign", "an orange sign"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def counted(n: int, one: str, many: str | None = None) -> str:
    """ "one line", "three lines"."""
    return f"{NUMBERS[n]} {one if n == 1 else many or one + 's'}"


def listed(parts: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def sentence(text: str) -> str:
    return text[0].upper() + text[1:]
