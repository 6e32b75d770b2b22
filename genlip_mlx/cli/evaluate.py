"""genlip-mlx evaluate"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .console import note, progress, size

if TYPE_CHECKING:
    from ..analysis.comparison import Comparison, Side
    from ..analysis.evaluation import Evaluation
    from ..analysis.metrics import CaptionScores

Row = tuple[str, ...]


def evaluate(
    model: options.Model,
    data: Annotated[
        str,
        typer.Option(help="JSONL, folder, tars, parquet, hub name or synth:SPLIT:SIZE.", show_default=False),
    ],
    output: Annotated[str | None, typer.Option(help="JSON file to write too.", show_default=False)] = None,
    against: Annotated[
        str | None, typer.Option(help="The full model: measure what --model lost.", show_default=False)
    ] = None,
    captions: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Caption the first N pictures too, greedily, and score the captions; with --against 50, else none.",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens a caption has at most.")] = 256,
    field: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=REGEX: how often the first group is exactly that of the reference; may be repeated.",
            show_default=False,
        ),
    ] = None,
    predictions: Annotated[
        str | None, typer.Option(help="JSONL file for the captions and their references.", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take the first N records.", show_default=False)] = None,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Image and text tokens that go through the model together.")
    ] = 4096,
    adapter_path: options.AdapterPath = None,
    split: Annotated[str, typer.Option(help="Of a hub data set, or a folder with splits.")] = "validation",
    image_column: Annotated[str | None, typer.Option(help="Field of the picture.", show_default=False)] = None,
    caption_column: Annotated[str | None, typer.Option(help="Field of the caption.", show_default=False)] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Field of the prompt.", show_default=False)] = None,
    dtype: options.LoadDtype = options.Dtype.auto,
    revision: options.Revision = None,
) -> None:
    """Measure a model on pictures with captions: the loss, and with --captions what it says itself.

    Several records of one picture with one prompt are its references. Scores of captions need the extra "evaluate".

    Examples:

        genlip-mlx evaluate --model genlip-l16 --data photos.jsonl --output scores.json

        genlip-mlx evaluate --model genlip-l16 --data receipts/ --captions 200 --field "total=TOTAL ([0-9.]+)"

        genlip-mlx evaluate --model genlip-l16-4bit --data photos.jsonl --against genlip-l16
    """
    if against is not None and (field or predictions):
        raise typer.BadParameter("--field and --predictions score one model; leave out --against")
    if not captions and (field or predictions):
        raise typer.BadParameter("--field and --predictions are about captions; say how many with --captions N")

    from ..analysis.comparison import CAPTIONS, check_processors, compare, disk_bytes
    from ..analysis.evaluation import answer, first_records, questions
    from ..analysis.evaluation import evaluate as run
    from ..analysis.metrics import Field, check, score
    from ..checkpoint.load import load
    from ..data.sources import open_source
    from ..files import atomic_file

    fields = [Field.parse(text) for text in field or []]
    source = first_records(open_source(data, image_column, caption_column, prompt_column, split), limit)
    loaded, processor = load(model, dtype.value, revision, adapter_path=adapter_path)
    facts: dict[str, Any] = {"model": model, "data": data}
    with ExitStack() as stack:
        # Opened before the work, which takes long: a folder that is not there shows now.
        result_file = stack.enter_context(atomic_file(output, text=True)) if output else None
        captions_file = stack.enter_context(atomic_file(predictions, text=True)) if predictions else None
        if against is not None:
            full, full_processor = load(against, dtype.value)
            check_processors(processor, full_processor)
            with progress("comparing", "records") as advance:
                comparison = compare(
                    loaded,
                    full,
                    processor,
                    source,
                    captions=CAPTIONS if captions is None else captions,
                    max_tokens=max_tokens,
                    batch_tokens=batch_tokens,
                    log=note,
                    report=advance,
                )
            disk = {"model": disk_bytes(model, revision), "full": disk_bytes(against)}
            facts |= {"against": against} | comparison.to_dict()
            for name, nbytes in disk.items():
                facts["sides"][name]["disk_bytes"] = nbytes
            lines = _table(_comparison(comparison, disk))
        else:
            asked = questions(source, processor, captions) if captions else []
            if asked:
                check([question.references for question in asked], fields)
            with progress("evaluating", "records") as advance:
                result = run(loaded, processor, source, batch_tokens=batch_tokens, log=note, report=advance)
            facts |= result.to_dict()
            lines = _table(_evaluation(result))
            if asked:
                with progress("captioning", "pictures") as advance:
                    answers = answer(loaded, processor, source, asked, max_tokens=max_tokens, report=advance)
                scores = score([a.caption for a in answers], [a.question.references for a in answers], fields)
                facts["captions"] = scores.to_dict()
                lines += ["", *_table(_scores(scores))]
                for one in answers if captions_file is not None else []:
                    print(json.dumps(one.to_dict(), ensure_ascii=False), file=captions_file)
        if result_file is not None:
            print(json.dumps(facts, indent=2, ensure_ascii=False), file=result_file)
    print("\n".join(lines))


def _table(rows: list[Row]) -> list[str]:
    """Rows with their columns lined up; the first is words, the others are figures."""
    widths = [max(len(row[column]) for row in rows if len(row) > column) for column in range(max(map(len, rows)))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]


def _counts(result: Evaluation | Comparison) -> list[Row]:
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(result.skipped.items()))
    skipped = f"{sum(result.skipped.values())}"
    return [
        ("label tokens", f"{result.label_tokens}"),
        ("samples", f"{result.samples}"),
        (f"skipped{f' ({reasons})' if reasons else ''}", skipped),
    ]


def _evaluation(result: Evaluation) -> list[Row]:
    return [("loss per label token", f"{result.nll:.4f}"), ("perplexity", f"{result.perplexity:.2f}"), *_counts(result)]


def _scores(scores: CaptionScores) -> list[Row]:
    return [
        ("captions", f"{scores.captions}"),
        ("CIDEr", "-" if scores.cider is None else f"{scores.cider:.3f}"),
        ("BLEU", f"{scores.bleu:.2f}"),
        ("character error rate", f"{scores.character_error_rate:.3f}"),
        ("word error rate", f"{scores.word_error_rate:.3f}"),
        *((f"exact {name} (of {one.captions})", f"{one.exact_match:.3f}") for name, one in scores.fields.items()),
    ]


def _ratio(label: str, values: Sequence[float | None], show: Callable[[float], str] = "{:.0f}".format) -> Row:
    """A figure of the full model, of the other, and their quotient."""
    full, other = values
    if full is None or other is None:
        return (label, "-", "-")
    return (label, show(full), show(other), f"x {other / full:.2f}")


def _comparison(result: Comparison, disk: dict[str, int]) -> list[Row]:
    sides: list[Side] = [result.full, result.model]
    rows: list[Row] = [
        ("", "full", "model", "difference"),
        ("loss per label token", *(f"{side.nll:.4f}" for side in sides), f"{result.nll_difference:+.4f}"),
        ("bits per weight", *(f"{side.bits_per_weight:.2f}" for side in sides)),
        _ratio("weights", [side.weight_bytes for side in sides], size),
        _ratio("on disk", [disk["full"], disk["model"]], size),
        _ratio("encoding, tokens/s", [side.encode_tokens_per_second for side in sides]),
        _ratio("captioning, tokens/s", [side.caption_tokens_per_second for side in sides]),
        ("KL divergence per label token", "", f"{result.kl:.5f}"),
        ("same likeliest token", "", f"{result.top_token_agreement:.2%}"),
        ("feature cosine, mean", "", f"{result.feature_cosine:.5f}"),
        ("feature cosine, worst patch", "", f"{result.worst_feature_cosine:.5f}"),
    ]
    if result.captions_identical is not None and result.captions_leading is not None:
        rows += [
            (f"same caption (of {result.captions})", "", f"{result.captions_identical:.2%}"),
            ("same leading tokens of a caption", "", f"{result.captions_leading:.2%}"),
        ]
    return [*rows, *((name, "", count) for name, count in _counts(result))]
