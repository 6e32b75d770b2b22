"""From facts to a caption: sentences that must be there, and some that may."""

from __future__ import annotations

from .dice import Dice
from .vocabulary import PLACES, SHAPES, Fact, counted, sentence


def compose(dice: Dice, told: list[str], extras: list[str], words: int) -> str:
    """The told sentences in their order, then extras in any order until there are about so many words."""
    text = " ".join(told)
    for extra in dice.shuffled(extras):
        if len(text.split()) >= words:
            break
        text += " " + extra
    return text


def quoted(text: str) -> str:
    return f'"{text}"'


def group_name(fact: Fact, size: str = "") -> str:
    """ "three large red circles"."""
    thing = counted(fact["count"], fact["shape"], SHAPES[fact["shape"]])
    number, noun = thing.split(" ", 1)
    return " ".join(part for part in (number, size, fact["colour"], noun) if part)


def group_clause(dice: Dice, fact: Fact, size: str = "") -> str:
    """ "on the left there are three large red circles", one of several ways."""
    form = dice.pick(
        (
            "there {be} {group} {place}",
            "{place} there {be} {group}",
            "{place} {be} {group}",
            "{group} {be} {place}",
            "{group} {be} drawn {place}",
            "{group} can be seen {place}",
            "you can see {group} {place}",
        )
    )
    be = "is" if fact["count"] == 1 else "are"
    return form.format(be=be, group=group_name(fact, size), place=dice.pick(PLACES[fact["place"]]))


def group_sentences(dice: Dice, clauses: list[str]) -> list[str]:
    """One sentence a clause, or two clauses a sentence."""
    sentences = []
    while clauses:
        if len(clauses) > 1 and dice.chance(0.4):
            link = dice.pick((", while ", ", and ", "; "))
            sentences.append(sentence(clauses[0] + link + clauses[1] + "."))
            clauses = clauses[2:]
        else:
            sentences.append(sentence(clauses[0] + "."))
            clauses = clauses[1:]
    return sentences
