"""genlip-mlx zeroshot"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .console import note, progress

if TYPE_CHECKING:
    from ..analysis.zeroshot import ZeroShot


class Normalization(str, Enum):
    mean = "mean"
    sum = "sum"


def zeroshot(
    model: options.Model,
    data: Annotated[
        str,
        typer.Option(
            help="Class folders (with train and test above them, the test split); pictures without labels; parquet; "
            "hub name; or synth:[SIZE], drawn scenes.",
            show_default=False,
        ),
    ],
    classes: Annotated[
        str,
        typer.Option(help="Class names, one a line; or a .json object {label: name in captions}.", show_default=False),
    ],
    label: options.Label = None,
    templates: options.Templates = None,
    prompt: Annotated[
        str | None, typer.Option(help='What the captions answer; "" asks nothing.', show_default=False)
    ] = None,
    normalization: Annotated[
        Normalization, typer.Option(help="Score of a caption: log-probability a token (mean), or of all (sum).")
    ] = Normalization.mean,
    prior_correct: Annotated[
        bool,
        typer.Option("--prior-correct", help="Subtract each class' mean score over the pictures."),
    ] = False,
    output: Annotated[
        str | None, typer.Option(help="Write results and each picture's best classes, as JSON.", show_default=False)
    ] = None,
    dtype: options.LoadDtype = options.Dtype.auto,
    revision: options.Revision = None,
) -> None:
    """Classify pictures by the likeliest caption.

    Labels, such as the names of class folders, give an accuracy. Templates that sound like the captions the model
    was trained on work best by far. A picture that cannot be used is reported and skipped; the exit code is then 1.

    Examples:

        genlip-mlx zeroshot --model genlip-l16 --data photos/ --classes classes.txt

        genlip-mlx zeroshot --model genlip-l16 --data pets/ --classes pets.json --templates captions.txt --prior-correct
    """
    from ..analysis.zeroshot import classify, open_gallery, read_classes, read_templates
    from ..checkpoint.load import load
    from ..processing.processor import DEFAULT_PROMPT

    names = read_classes(classes)
    patterns = read_templates(templates) if templates is not None else ["{}"]
    pictures = open_gallery(data, label)
    for line in pictures.notes:
        note(f"{data}: {line}")
    loaded, processor = load(model, dtype.value, revision)
    with progress("classifying", "pictures") as advance, _sink(output) as write:
        result = classify(
            loaded,
            processor,
            pictures,
            names,
            patterns,
            prompt=DEFAULT_PROMPT if prompt is None else prompt,
            normalization=normalization.value,
            prior_correct=prior_correct,
            progress=advance,
        )
        write({"model": model, "data": data, **result.to_json()})
    for prediction in result.predictions:
        if prediction.error is not None:
            note(f"skipped: {prediction.error}")
    _tell(result)
    if result.skipped:
        note(f"{result.skipped} of {len(pictures.names)} pictures could not be used")
        raise typer.Exit(1)


@contextmanager
def _sink(output: str | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Where the result goes: a file that is opened before the work begins, or nowhere."""
    if output is None:
        yield lambda result: None
        return
    from ..files import atomic_file

    with atomic_file(output, text=True) as file:
        yield lambda result: print(json.dumps(result, ensure_ascii=False, indent=1), file=file)
    note(f"results written to {output}")


def _tell(result: ZeroShot) -> None:
    """The accuracy by class, or without labels each picture's class."""
    accuracy = result.accuracy()
    if accuracy is None:
        for prediction in result.predictions:
            if prediction.top:
                print(f"{prediction.image}: {prediction.top[0][0]}")
        return
    rows = result.by_class()
    width = max(map(len, (*rows, "all classes")))
    print(f"{'class':<{width}}  pictures  correct")
    for label, (pictures, correct) in rows.items():
        print(f"{label:<{width}}  {pictures:>8}  {correct / pictures:>7.1%}")
    print(f"{'all classes':<{width}}  {sum(n for n, _ in rows.values()):>8}  {accuracy:>7.1%}")
