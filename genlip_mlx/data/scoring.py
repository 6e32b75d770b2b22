"""How much of a scene a generated caption gets right.

The caption is read back with the vocabulary that true captions are written from, whatever the order of
its sentences: groups of shapes ("three large red circles on the left"), quoted texts, numbers after a quoted label.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from .scenes.vocabulary import COLOURS, NUMBERS, PLACES, SHAPES, Fact

_SINGULAR = {word: one for one, many in SHAPES.items() for word in (one, many)}
_COUNTS = {word: n for n, word in enumerate(NUMBERS)} | {"single": 1}
_PLACE_OF = {phrase: place for place, phrases in PLACES.items() for phrase in phrases}


def _any_of(words: Iterable[str]) -> str:
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))  # the longest first, or "ring" eats "rings"


_GROUP = re.compile(
    rf"\b(?P<count>{_any_of(_COUNTS)}|\d+) (?:(?:small|large) )?(?:(?P<colour>{_any_of(COLOURS)}) )?"
    rf"(?P<shape>{_any_of(_SINGULAR)})\b"
)
_PLACE = re.compile(rf"\b(?:{_any_of(_PLACE_OF)})\b")
_CLAUSE = re.compile(r"[.;]|, while |, and ")
_PRICED = re.compile(r"(.+) (\d+(?:\.\d+)?)")
_NUMBER_NEXT = re.compile(r"[^.,;\d]{0,12}?(\d+(?:\.\d+)?)")


def read_texts(caption: str) -> list[str]:
    """What the caption says is written: its quoted strings, spaces made even. A quote left open runs to the end."""
    return [" ".join(part.split()) for part in caption.split('"')[1::2]]


def read_groups(caption: str) -> list[Fact]:
    """The groups of shapes that the caption states; `colour` and `place` are None where it gives none."""
    unquoted = " ".join(" ".join(caption.split('"')[::2]).lower().replace("center", "centre").split())
    groups: list[Fact] = []
    for clause in _CLAUSE.split(unquoted):
        place = _PLACE.search(clause)
        for match in _GROUP.finditer(clause):
            count = match["count"]
            groups.append(
                {
                    "type": "group",
                    "shape": _SINGULAR[match["shape"]],
                    "colour": match["colour"],
                    "count": _COUNTS[count] if count in _COUNTS else int(count),
                    "place": _PLACE_OF[place[0]] if place else None,
                }
            )
    return groups


def read_values(caption: str) -> dict[str, float]:
    """Label to number, from `"tue" is 12` and `"milk 1.20"` alike; the first one stands if a label is named twice."""
    values: dict[str, float] = {}
    parts = caption.split('"')
    for quoted, after in zip(parts[1::2], [*parts[2::2], ""], strict=False):
        text = " ".join(quoted.split())
        if number := _NUMBER_NEXT.match(after):
            values.setdefault(text, float(number[1]))
        elif priced := _PRICED.fullmatch(text):
            values.setdefault(priced[1], float(priced[2]))
    return values


def edit_distance(a: str, b: str) -> int:
    """Least number of characters to insert, delete or replace to turn a into b (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


_ASPECTS = {"shapes": "shape", "colours": "colour", "counts": "count", "places": "place"}


def _best_match(truth: Sequence[Fact], stated: Sequence[Fact]) -> list[int]:
    """Right shapes, colours, counts and places under the pairing, one to one, that makes the most of them right."""
    # best[set of true groups already paired]: a sweep over the stated ones, so that babble stays cheap.
    best: dict[int, list[int]] = {0: [0] * len(_ASPECTS)}
    for claim in stated:
        for taken, right in list(best.items()):
            for k, fact in enumerate(truth):
                if taken >> k & 1:
                    continue
                more = [n + (claim[key] == fact[key]) for n, key in zip(right, _ASPECTS.values(), strict=True)]
                both = taken | 1 << k
                if both not in best or sum(more) > sum(best[both]):
                    best[both] = more
    return max(best.values(), key=sum)


def score(facts: Sequence[Fact], caption: str) -> dict[str, Any]:
    """Hold a generated caption against a scene's facts.

    Returns:
        Counts, to be added up by `summary`:
        groups: groups of shapes there are, or that the caption states if it states more: inventions cost;
        shapes, colours, counts, places: how many of them the caption gives rightly, each on its own;
        values, values_right: labelled numbers there are, and those stated exactly;
        characters: length of the text there is to read; edits: edit distance of the text read to it;
        text: the text read.
    """
    groups = [fact for fact in facts if fact["type"] == "group"]
    stated = read_groups(caption)
    values = {fact["label"]: fact["value"] for fact in facts if fact["type"] == "value"}
    read_value = read_values(caption)
    text = " ".join(fact["text"] for fact in facts if fact["type"] == "text")
    read = " ".join(read_texts(caption))
    return {
        "groups": max(len(groups), len(stated)),
        **dict(zip(_ASPECTS, _best_match(groups, stated), strict=True)),
        "values": len(values),
        "values_right": sum(read_value.get(label) == value for label, value in values.items()),
        "characters": len(text),
        "edits": edit_distance(read, text),
        "text": read,
    }


def summary(scores: Iterable[dict[str, Any]]) -> dict[str, float | None]:
    """Shares over many scenes: shapes, colours, counts, places, values, and character_error_rate.

    Everything is added up before it is divided, so a scene weighs what there is in it. None where there was
    nothing of the sort. An error rate can exceed 1.
    """
    names = ("groups", *_ASPECTS, "values", "values_right", "characters", "edits")
    total = dict.fromkeys(names, 0)
    for one in scores:
        for name in names:
            total[name] += one[name]
    shares: dict[str, float | None] = {
        name: total[name] / total["groups"] if total["groups"] else None for name in _ASPECTS
    }
    shares["values"] = total["values_right"] / total["values"] if total["values"] else None
    shares["character_error_rate"] = total["edits"] / total["characters"] if total["characters"] else None
    return shares
