"""How well a model foretells the captions of a data set, and what it says of the pictures itself.

The one idea: the loss needs every record as it was written, but a picture is captioned once: records that ask the same
of the same picture are one question with several right answers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from ..data.held_out import Subset
from ..data.pipeline import MAX_SAMPLE_LEN, Pipeline
from ..data.records import Record, RecordError
from ..data.sources import Source
from ..generate import Caption
from ..generate import captions as generate
from ..model.genlip import GenLIP, VisionOnlyError
from ..processing.processor import Processor
from ..train.objective import Batch, summed_loss

BATCH_TOKENS = MAX_SAMPLE_LEN  # through the model together; no sample is longer
BATCH_SIZE = 8  # pictures captioned together
MAX_TOKENS = 256  # of a caption
MAX_EXPONENT = 700  # of a perplexity that a float holds

Report = Callable[[float, float], None]  # (done, total)


class EvaluationError(ValueError):
    """A model or a data set that gives nothing to measure."""


def first_records(source: Source, limit: int | None) -> Source:
    """The first records of a source; all of them for None."""
    return source if limit is None else Subset(source, range(min(limit, len(source))))


# --- The loss ---


@dataclass(frozen=True)
class Evaluation:
    """The loss of a model on a data set."""

    nll: float  # nats, mean per label token over the whole data set
    perplexity: float
    label_tokens: int
    samples: int
    skipped: Mapping[str, int]  # records that could not be used, by reason

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    model: GenLIP,
    processor: Processor,
    source: Source,
    *,
    batch_tokens: int = BATCH_TOKENS,
    log: Callable[[str], None] | None = None,
    report: Report = lambda done, total: None,
) -> Evaluation:
    """The mean loss per label token: prompts carry none, eos tokens do.

    Args:
        batch_tokens: image and text tokens that go through the model together; a longer sample is cut.
        log: called with one line for each of the first skipped records of a kind.
        report: called with (done, total) records.

    Raises:
        DataError: if no record can be used.
        EvaluationError: if the loss is not finite.
        SourceError: if the source is a stream.
        VisionOnlyError: if the model has no text side.
    """
    if model.config.vision_only:
        raise VisionOnlyError
    records, total, label_tokens = len(source), 0.0, 0
    with Pipeline(source, processor, batch_tokens, workers=0, shuffle=False, epochs=1, log=log) as packs:
        for pack in packs:
            batch = Batch.of(pack)
            if batch.label_tokens:
                total += cast(float, summed_loss(model, batch).item())
                label_tokens += batch.label_tokens
            stats = packs.stats
            report(stats.samples + sum(stats.skipped.values()), records)
        stats = packs.stats
    nll = finite(total / label_tokens, source)
    return Evaluation(nll, perplexity(nll), label_tokens, stats.samples, stats.skipped)


def finite(nll: float, source: Source) -> float:
    """A loss that is a number.

    Raises:
        EvaluationError: if it is not.
    """
    if not math.isfinite(nll):
        raise EvaluationError(f"{source.name}: the loss is {nll}; the weights are damaged, or overflow their dtype")
    return nll


def perplexity(nll: float) -> float:
    return math.exp(min(nll, MAX_EXPONENT))


# --- Captions ---


@dataclass(frozen=True)
class Question:
    """A picture, what is asked of it, and the answers that count as right."""

    record: int  # in its source; the first of those that ask this
    name: str
    prompt: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """What a model said."""

    question: Question
    caption: str
    finish_reason: str

    def to_dict(self) -> dict[str, Any]:
        question = self.question
        return {
            "image": question.name,
            "prompt": question.prompt,
            "caption": self.caption,
            "references": list(question.references),
            "finish_reason": self.finish_reason,
        }


def questions(source: Source, processor: Processor, limit: int) -> list[Question]:
    """What the first pictures of a data set are asked; of a conversation, its first question.

    All records are read, so that a picture's references are found wherever they are. Unusable ones are left out.

    Raises:
        EvaluationError: if there is none.
        VisionOnlyError: if the processor has no tokenizer.
    """
    if processor.tokenizer is None:
        raise VisionOnlyError
    why = "it is empty"
    found: dict[tuple[Any, str], Question] = {}
    for number in range(len(source)):
        try:
            record = source[number]
            record.text(processor)  # refuses what is no caption and no conversation
        except RecordError as error:
            why = str(error)
            continue
        prompt, answer = record.question
        key = (_picture(record, number), prompt)
        if key in found:
            known = found[key]
            found[key] = replace(known, references=(*known.references, answer))
        elif len(found) < limit:
            name = str(record.image) if isinstance(record.image, Path) else record.name
            found[key] = Question(number, name, prompt, (answer,))
    if not found:
        raise EvaluationError(f"{source.name}: no record can be used; {why}")
    return list(found.values())


def _picture(record: Record, number: int) -> Any:
    """What tells a record's picture from others."""
    if isinstance(record.image, Path):
        return record.image
    return hashlib.sha256(record.image).digest() if isinstance(record.image, bytes) else number


def by_prompt(asked: Iterable[Question]) -> Iterator[tuple[str, list[Question]]]:
    """Questions with the same prompt together: one batch of pictures has one prompt."""
    groups: dict[str, list[Question]] = {}
    for question in asked:
        groups.setdefault(question.prompt, []).append(question)
    yield from groups.items()


def answer(
    model: GenLIP,
    processor: Processor,
    source: Source,
    asked: Sequence[Question],
    *,
    max_tokens: int = MAX_TOKENS,
    report: Report = lambda done, total: None,
) -> list[Answer]:
    """Greedy captions, in the order of their records; pictures that cannot be read are left out.

    Raises:
        EvaluationError: if none can be read.
        VisionOnlyError: if the model has no text side.
    """
    answers: list[Answer] = []
    done = 0
    for prompt, group in by_prompt(asked):
        pictures = (source[question.record].image for question in group)
        spoken: Iterator[Caption] = generate(
            model, processor, pictures, prompt, max_tokens=max_tokens, batch_size=BATCH_SIZE
        )
        for question, said in zip(group, spoken):
            done += 1
            if said.caption is not None and said.finish_reason is not None:
                answers.append(Answer(question, said.caption, said.finish_reason))
            report(done, len(asked))
    if not answers:
        raise EvaluationError(f"{source.name}: none of {len(asked)} pictures could be read, so none was captioned")
    return sorted(answers, key=lambda one: one.question.record)
