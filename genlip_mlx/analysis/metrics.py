"""Captions against what people wrote: likeness of wording, errors of reading, and fields that must be right.

The one idea: each figure comes from the library that its field publishes with; here is only what they do not settle,
words for CIDEr and the best of several references for the error rates.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

# A word, with an apostrophe, a decimal point or a hyphen inside it; other punctuation does not count.
_WORD = re.compile(r"\w+(?:['.,-]\w+)*")


class MetricError(ValueError):
    """A metric that cannot be computed; the message says what it lacks."""


@dataclass(frozen=True)
class Field:
    """A value that a caption states, such as a receipt's total."""

    name: str
    pattern: re.Pattern[str]

    @classmethod
    def parse(cls, text: str) -> Field:
        """Read NAME=REGEX.

        Raises:
            MetricError: if there is no name, or the expression is not valid.
        """
        name, _, expression = text.partition("=")
        if not name or not expression:
            raise MetricError(f"{text!r} is no field; write NAME=REGEX, such as 'total=TOTAL ([0-9.]+)'")
        try:
            return cls(name, re.compile(expression))
        except re.error as error:
            raise MetricError(f"field {name}: {expression!r} is no regular expression ({error})") from None

    def value(self, text: str) -> str | None:
        """The expression's first group, or all it matches if it has none; None if it is not found."""
        match = self.pattern.search(text)
        if match is None:
            return None
        value: str | None = match[1] if self.pattern.groups else match[0]
        return value and value.strip()


@dataclass(frozen=True)
class FieldScore:
    """How often a field's value was exactly right."""

    exact_match: float  # share of captions whose value is one of the references'
    captions: int  # whose references state the field


@dataclass(frozen=True)
class CaptionScores:
    """Scores of captions against their references."""

    captions: int
    cider: float | None  # CIDEr-D, 0 to 10; None for a single picture, where no word is rarer than another
    bleu: float  # corpus BLEU-4, 0 to 100
    character_error_rate: float  # edits over the characters of the closest reference; can exceed 1
    word_error_rate: float
    fields: dict[str, FieldScore]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check(references: Sequence[Sequence[str]], fields: Sequence[Field] = ()) -> None:
    """Find out before captions are generated, which takes long, whether `score` can be computed.

    Raises:
        MetricError: if a library is missing, or no reference states a field.
    """
    _libraries()
    for field in fields:
        if not any(field.value(text) for texts in references for text in texts):
            raise MetricError(
                f"field {field.name}: {field.pattern.pattern!r} is found in none of the references, "
                f"such as {references[0][0]!r}"
            )


def score(captions: Sequence[str], references: Sequence[Sequence[str]], fields: Sequence[Field] = ()) -> CaptionScores:
    """Score generated captions.

    CIDEr (arXiv 1411.5726, in its variant CIDEr-D) weighs n-grams by how few pictures' references have them, so it
    depends on the whole set; words are lower-cased, without punctuation. BLEU is sacrebleu's, lower-cased. Error
    rates are jiwer's, of the text as it is but for runs of spaces; of several references the closest counts.

    Args:
        captions: one a picture.
        references: one or more a picture, none of them empty.
        fields: values to compare.

    Raises:
        MetricError: as `check`.
    """
    check(references, fields)
    jiwer, bleu_metric, cider_scorer = _libraries()
    said = [" ".join(caption.split()) for caption in captions]
    right = [[" ".join(text.split()) for text in texts] for texts in references]
    bleu = bleu_metric(lowercase=True).corpus_score(said, [list(column) for column in zip_longest(*right)])
    return CaptionScores(
        captions=len(said),
        cider=_cider(cider_scorer, said, right),
        bleu=float(bleu.score),
        character_error_rate=_error_rate(jiwer.cer, said, right),
        word_error_rate=_error_rate(jiwer.wer, said, right),
        fields={field.name: _field_score(field, captions, references) for field in fields},
    )


def _error_rate(rate: Callable[..., float], said: Sequence[str], right: Sequence[Sequence[str]]) -> float:
    """All edits over the lengths of the references, each the closest of its picture."""
    closest = [
        texts[int(np.argmin([rate(text, caption) for text in texts]))] if len(texts) > 1 else texts[0]
        for caption, texts in zip(said, right)
    ]
    return float(rate(closest, list(said)))


def _cider(scorer: Any, said: Sequence[str], right: Sequence[Sequence[str]]) -> float | None:
    words = [[_words(text) for text in texts] for texts in right]
    if len(said) < 2 or not any(text for texts in words for text in texts):
        return None
    total = scorer()
    for caption, texts in zip(said, words):
        total += (_words(caption), texts)
    return float(total.compute_score()[0])


def _words(text: str) -> str:
    return " ".join(_WORD.findall(text.lower()))


def _field_score(field: Field, captions: Sequence[str], references: Sequence[Sequence[str]]) -> FieldScore:
    matches = []
    for caption, texts in zip(captions, references):
        values = {value for text in texts if (value := field.value(text))}
        if values:
            matches.append(field.value(caption) in values)
    return FieldScore(sum(matches) / len(matches), len(matches))


def _libraries() -> tuple[Any, Any, Any]:
    """jiwer, sacrebleu's BLEU, and the CIDEr of the COCO evaluation, which needs no Java."""
    try:
        import jiwer
        from pycocoevalcap.cider.cider_scorer import CiderScorer
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise MetricError(
            f'caption metrics need the extra "evaluate" ({error.name} is missing): pip install "genlip-mlx[evaluate]"'
        ) from None
    return jiwer, BLEU, CiderScorer
