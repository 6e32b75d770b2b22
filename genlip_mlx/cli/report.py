"""genlip-mlx report"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .console import note, progress


def report(
    model: options.Model,
    data: Annotated[
        str,
        typer.Option(
            help="Pictures with captions (JSONL, folder, parquet, tars, hub name, synth:SPLIT), or pictures alone.",
            show_default=False,
        ),
    ],
    output: Annotated[str, typer.Option(help="Folder to write report.html into.", show_default=False)],
    labelled: Annotated[
        str | None,
        typer.Option(
            help="Where labels are, for probes and zero-shot: as probe's --data.", show_default="the same as --data"
        ),
    ] = None,
    label: options.Label = None,
    templates: options.Templates = None,
    limit: Annotated[
        int, typer.Option(min=1, help="Records, and pictures of each labelled split, measured at most.")
    ] = 500,
    dtype: options.LoadDtype = options.Dtype.auto,
    revision: options.Revision = None,
) -> None:
    """Write one page about a model: loss, captions, patches, attention, probes, zero-shot.

    The page needs no network: figures and pictures are within it. What the model or the data has not got is
    left out, with the reason.

    Examples:

        genlip-mlx report --model genlip-l16 --data captions.jsonl --labelled pets/ --output report/

        genlip-mlx report --model my-run --data synth:test --label shape --output r/
    """
    from ..analysis.report import PAGE, Material, write_report
    from ..analysis.zeroshot import read_templates
    from ..checkpoint.load import load
    from ..info import describe_model

    if Path(output).exists() and not Path(output).is_dir():
        raise OSError(f"{output}: is no folder; name another")
    patterns = ["{}"] if templates is None else read_templates(templates)
    info = describe_model(model, revision)
    loaded, processor = load(model, dtype.value, revision)
    material = Material(info, loaded, processor, data, labelled or data, label, patterns, limit)
    with progress("measuring", "sections") as advance:
        left_out = write_report(output, material, advance)
    for title, reason in left_out.items():
        note(f"left out: {title} ({reason})")
    print(Path(output) / PAGE)
