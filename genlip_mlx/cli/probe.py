"""genlip-mlx probe"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .console import Advance, note, progress
from .console import size as readable
from .features import parse_layers, parse_size

if TYPE_CHECKING:
    from ..analysis.probe import ProbeReport


class Task(str, Enum):
    classify = "classify"
    segment = "segment"


def probe(
    model: options.Model,
    data: Annotated[
        str,
        typer.Option(
            help="Class folders, with or without train, val and test above them; parquet; hub name; images/ and "
            "masks/ to segment; or synth:[SIZE], drawn scenes.",
            show_default=False,
        ),
    ],
    task: Annotated[Task, typer.Option(help="One class a picture, or (with masks) one a pixel.")] = Task.classify,
    label: options.Label = None,
    layers: Annotated[
        str,
        typer.Option(
            help="Hidden states to try beside the ln_post output: last (none), all, or numbers: 6,12.",
            show_default="after 1/2 and 3/4 of the blocks",
        ),
    ] = "",
    size: Annotated[
        str, typer.Option(help="model: as the model was made for; native: keep the aspect ratio; or pixels a side.")
    ] = "model",
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Probe raw pixels and a random-weight model of the same shape too.")
    ] = False,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of a probe.")] = 500,
    seed: Annotated[int, typer.Option(help="Of probe weights, batches and the random-weight model.")] = 0,
    output: Annotated[
        str | None, typer.Option(help="JSON file to write, with every trial of the sweep.", show_default=False)
    ] = None,
    cache: Annotated[
        str, typer.Option(help="Folder that keeps features for the next run; it may be deleted at any time.")
    ] = "~/.cache/genlip-mlx/features",
    dtype: options.LoadDtype = options.Dtype.auto,
    revision: options.Revision = None,
) -> None:
    """Measure how good a model's frozen features are.

    A linear probe on mean features and an attentive probe (one learned query) on patches are trained at six
    learning rates and several layers; the best on the validation split is tested. To segment, a linear layer names
    the pixels of each patch, and mean IoU is over pixels of the resized pictures. Intervals are 95 %.

    Examples:

        genlip-mlx probe --model genlip-l16 --data pets/ --size 384

        genlip-mlx probe --model my-run --data synth: --label shape --baselines
    """
    from ..analysis.labelled import open_labelled
    from ..analysis.probe import LEARNING_RATES, probe
    from ..checkpoint.load import load
    from ..files import atomic_file

    chosen_layers, chosen_size = parse_layers(layers) if layers else None, parse_size(size)
    if output is not None and not Path(output).resolve().parent.is_dir():
        raise OSError(f"{output}: the folder {Path(output).parent} does not exist")
    labelled = open_labelled(data, task.value, label)
    for line in labelled.notes:
        note(f"{data}: {line}")
    loaded, processor = load(model, dtype.value, revision)
    with ExitStack() as stages:
        report = probe(
            loaded,
            processor,
            labelled,
            layers=chosen_layers,
            size=chosen_size,
            baselines=baselines,
            cache=cache,
            steps=steps,
            seed=seed,
            progress=_Stages(stages),
        )
    for message in report.skipped:
        note(f"skipped: {message}")
    note(f"cached features: {readable(report.cached_bytes)} in {cache}")
    if output is not None:
        settings: dict[str, Any] = {"model": model, "data": data, "task": task.value, "label": label, "size": size}
        settings |= {"steps": steps, "seed": seed, "learning_rates": LEARNING_RATES, "notes": labelled.notes}
        with atomic_file(output, text=True) as file:
            json.dump(settings | asdict(report), file, indent=2)
            file.write("\n")
    _print(report, task)


class _Stages:
    """One progress bar after another, as the work goes from one thing to the next."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack, self._what = stack, ""
        self._advance: Advance

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self._stack.pop_all().close()
            self._what, self._advance = what, self._stack.enter_context(progress(what))
        self._advance(done, total)


def _print(report: ProbeReport, task: Task) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    used = ", ".join(f"{number} {split}" for split, number in report.pictures.items())
    measure = "accuracy" if task == Task.classify else "mean IoU"
    table = Table("features", "probe", "layer", "rate", "validation", "test", "95 % interval", box=SIMPLE_HEAD)
    for result in report.results:
        chosen, (low, high) = result.chosen, result.interval
        figures = f"{chosen.learning_rate:g}", f"{chosen.validation:.1%}", f"{result.test:.1%}"
        table.add_row(result.features, result.probe, chosen.layer, *figures, f"{100 * low:.1f} to {high:.1%}")
    print(f"{len(report.classes)} classes; pictures: {used}; {measure}:")
    Console().print(table)
