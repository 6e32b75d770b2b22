"""Pictures that say what is in them, drawn offline from a seed.

A scene is a function of (seed, split, index) alone: any of a million can be drawn without the ones before it,
in any process, and the splits can never share one. Shapes to count, words to read and values to look up, each with
a long caption and with the facts that `genlip_mlx.data.scoring` holds a generated caption against.

Facts, colours, texts and captions are the same everywhere; pixels are the same wherever Pillow and its FreeType are.

>>> scene = Scenes("test", size=3)[0]
>>> scene.kind in SCENES, scene.layout in LAYOUTS, scene.image.mode
(True, True, 'RGB')
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from .scenes.cards import cards
from .scenes.charts import bars, lines
from .scenes.dice import Dice
from .scenes.drawing import Drawn
from .scenes.receipts import receipts
from .scenes.shapes import shapes
from .scenes.signs import banners, words
from .scenes.vocabulary import Fact

COURSE = (36000, 66000)  # of the training split: level 0 up to the first number, 1 from the second on
SPLITS = ("train", "validation", "test")
LAYOUTS = ("square", "tall", "wide")
_RENDERERS: dict[str, tuple[Callable[[Dice], Drawn], float]] = {  # with its weight in a mixture
    "shapes": (shapes, 0.50),
    "words": (words, 0.20),
    "receipts": (receipts, 0.07),
    "banners": (banners, 0.11),
    "bars": (bars, 0.06),
    "lines": (lines, 0.06),
    "cards": (cards, 1.00),
}
KINDS = tuple(_RENDERERS)
SCENES = tuple(kind for kind in KINDS if kind != "cards")  # a model is to describe these; cards are to learn from


class SceneError(ValueError):
    """A split or a kind of scene that does not exist."""


@dataclass(frozen=True)
class Scene:
    """One picture and the truth about it.

    Attributes:
        image: RGB, sides a multiple of 16 pixels, 36 to 240 patches of 16 x 16; a card has 16 to 100.
        caption: what is there, 25 to 60 words, of a card 4 to 40; everything printed stands in double quotes, in
            reading order.
        kind: one of KINDS.
        layout: "tall" or "wide" if one side is over 1.6 times the other, else "square".
        facts: JSON objects, in reading order (none for a card with a shape in each cell):
            {"type": "group", "shape", "colour", "count", "place"}: `count` equal shapes in one place,
            {"type": "text", "text"}: a printed line (or several, read together),
            {"type": "value", "label", "value"}: the number (a float) printed with a label.
    """

    image: Image.Image
    caption: str
    kind: str
    layout: str
    facts: tuple[Fact, ...]


class Scenes:
    """The scenes of a split, drawn when asked for.

    Args:
        split: "train", "validation" or "test"; no scene of one is a scene of another, whatever their sizes.
        seed: another seed gives another world of scenes.
        size: how many there are; the first n are the same for every size.
        kinds: only these kinds, in their usual proportions: all scenes, or flash cards too: these come first,
            and scenes join them until there are as many.

    Raises:
        SceneError: if the split, a kind or the size is not possible.
    """

    def __init__(self, split: str, seed: int = 0, size: int = 1000, kinds: Sequence[str] = SCENES) -> None:
        if split not in SPLITS:
            raise SceneError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
        unknown = [kind for kind in kinds if kind not in _RENDERERS]
        if unknown or not kinds:
            raise SceneError(f"unknown kind of scene {', '.join(unknown) or '(none)'}; known: {', '.join(KINDS)}")
        if not 0 <= size < 2**48:
            raise SceneError(f"size must be a number of scenes, not {size}")
        self.split, self.seed, self.size = split, seed, size
        self.kinds = tuple(kind for kind in KINDS if kind in kinds)  # the order they are named in changes nothing

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Scene]:
        return (self[index] for index in range(self.size))

    def _level(self, index: int) -> float:
        """How hard number `index` may be: with cards in it, the training split in its order is a course."""
        if self.split != "train" or "cards" not in self.kinds:
            return 1.0
        first, last = COURSE
        return min(1.0, max(0.0, (index - first) / (last - first)))

    def __getitem__(self, index: int) -> Scene:
        """Draw a scene, about 4 ms.

        Raises:
            IndexError: if there are not so many.
        """
        if not -self.size <= index < self.size:
            raise IndexError(f"scene {index} of {self.size}")
        index %= self.size
        level = self._level(index)
        dice = Dice(self.seed, SPLITS.index(self.split), index, level)
        kind = dice.weighted([(kind, _RENDERERS[kind][1] * (1 if kind == "cards" else level)) for kind in self.kinds])
        image, caption, facts = _RENDERERS[kind][0](dice)
        ratio = image.width / image.height
        layout = "wide" if ratio > 1.6 else "tall" if ratio < 1 / 1.6 else "square"
        return Scene(image, caption, kind, layout, tuple(facts))
