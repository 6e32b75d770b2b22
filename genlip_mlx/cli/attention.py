"""genlip-mlx attention"""

from __future__ import annotations

import json
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .console import Advance, note, progress

if TYPE_CHECKING:
    from ..analysis.attention import Allocation, Drawn
    from ..model.genlip import GenLIP
    from ..processing.processor import Processor


def attention(
    images: options.Images,
    model: options.Model,
    caption: Annotated[
        str | None,
        typer.Option(help="The text behind the picture.", show_default="each model's own greedy caption"),
    ] = None,
    compare: Annotated[
        list[str] | None, typer.Option(help="Another model beside the first; may be repeated.", show_default=False)
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Blocks to map, such as 1,12,24; none for no maps.", show_default="four, evenly spread"),
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="Figure to write: F.png, F.pdf or F.svg.", show_default=False)
    ] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", help="Write all shares and maps here.", show_default=False)
    ] = None,
    dtype: options.LoadDtype = options.Dtype.auto,
    revision: options.Revision = None,
) -> None:
    """Measure where attention goes, block by block: to the first token, to the picture, and through the gate.

    Shares are means over pictures, queries and heads. The first token is the first patch: much attention on it in every
    picture is an attention sink. Maps, of the first picture in the figure and of all in the JSON file, show which
    patches get attention from the text and from all patches. A picture that cannot be read is reported and skipped.

    Examples:

        genlip-mlx attention photos/ --model genlip-l16 --output attention.png

        genlip-mlx attention cat.jpg --model gated --compare ungated --caption "A cat." --json attention.json
    """
    from ..analysis import figures
    from ..analysis.attention import check_layers, draw
    from ..checkpoint.load import load
    from ..files import atomic_file
    from ..model.genlip import VisionOnlyError
    from ..processing.images import list_images

    if output is not None:
        figures.check_figure(output)
    chosen = _numbers(layers)
    paths = list_images(images)
    names = [model, *(compare or [])]
    # All are opened before any is at work, so that a mistake shows at once. Weights stay on disk until used.
    opened = [load(name, dtype.value, revision, lazy=True) for name in names]
    for name, (loaded, _) in zip(names, opened):
        if loaded.config.vision_only:
            raise VisionOnlyError
        try:
            check_layers(loaded, chosen or [])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    depths = [loaded.config.num_hidden_layers for loaded, _ in opened]
    if len(set(depths)) > 1:
        listed = ", ".join(f"{name} has {depth}" for name, depth in zip(names, depths))
        note(f"the models differ in blocks ({listed}): curves are drawn over depth, in % of each model's blocks")

    drawn: list[Drawn] = []
    report: list[dict[str, Any]] = []
    for name, label in zip(names, _labels(names)):
        loaded, processor = opened.pop(0)
        with progress(f"reading attention of {name}", "pictures") as advance:
            one, pictures, failures = _attend(label, loaded, processor, paths, caption, chosen, advance)
        shares = {"model": name, "blocks": loaded.config.num_hidden_layers, **one.allocation.to_dict()}
        report.append({**shares, "pictures": pictures})
        for message in failures if not drawn else ():  # each model finds the same ones
            note(f"skipped: {message}")
        drawn.append(one)
    if json_file is not None:
        with atomic_file(json_file, text=True) as file:
            json.dump({"models": report}, file, ensure_ascii=False)
        note(f"shares of attention written to {json_file}")
    if output is not None:
        draw(output, drawn)
        note(f"figure written to {output}")
    for one in drawn:
        _print(one.name, one.allocation)
    if failures:
        note(f"{len(failures)} of {len(paths)} pictures could not be read")
        raise typer.Exit(1)


def _attend(
    label: str,
    model: GenLIP,
    processor: Processor,
    paths: list[str],
    caption: str | None,
    layers: list[int] | None,
    advance: Advance,
) -> tuple[Drawn, list[dict[str, Any]], list[str]]:
    """One model's attention: for the figure, for the JSON file, and which pictures could not be read."""
    from ..analysis.attention import Drawn, look, mean_allocation, own_words, spread
    from ..analysis.picture import read_picture
    from ..processing.images import ImageError
    from ..processing.processor import DEFAULT_PROMPT

    layers = spread(model) if layers is None else layers
    found, rows, failures, shown = [], [], [], None
    for done, path in enumerate(paths, 1):
        try:
            picture = read_picture(processor.image_processor, path)
        except ImageError as error:
            failures.append(str(error))
            continue
        if caption is None:
            ids, text = own_words(model, processor, picture)
        else:
            ids, text = processor.text(DEFAULT_PROMPT, caption).input_ids.tolist(), caption
        allocation, maps = look(model, picture.patches, picture.grid, ids, layers)
        found.append(allocation)
        shown = shown or (picture, maps)
        listed = {
            block: {"from_text": one.from_text.tolist(), "from_vision": one.from_vision.tolist()}
            for block, one in maps.items()
        }
        rows.append({"image": path, "grid": list(picture.grid), "caption": text, "maps": listed})
        advance(done, len(paths))
    if shown is None:
        raise ImageError(failures[0] if len(failures) == 1 else f"none of the {len(paths)} pictures could be read")
    return Drawn(label, mean_allocation(found), *shown), rows, failures


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [] if text == "none" else [int(word) for word in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--layers takes numbers of blocks such as 1,12,24, or none, not {text!r}") from None


def _labels(names: list[str]) -> list[str]:
    """Short names of models: the last part of each path, or the parts in which the paths differ."""
    parts = [Path(name).parts for name in names]
    short = [path[-1:] for path in parts]
    if len(set(short)) < len(set(parts)):
        start, end = _shared(parts), _shared([path[::-1] for path in parts])
        short = [path[start : len(path) - end] or path[-1:] for path in parts]
    return ["/".join(path) for path in short]


def _shared(paths: list[tuple[str, ...]]) -> int:
    """How many first parts all paths have in common."""
    return sum(1 for _ in takewhile(lambda part: len(set(part)) == 1, zip(*paths)))


def _print(name: str, shares: Allocation) -> None:
    gated = shares.gate_mean is not None and shares.gate_closed is not None
    print(f"{name}: attention in %, mean of {shares.samples} pictures; if all patches got the same: {shares.even:.2%}")
    gate = f"  {'gate mean':>9}  {'below 0.1':>9}" if gated else ""
    print(f"{'block':>5}  {'vision to first':>15}  {'text to first':>13}  {'text to vision':>14}{gate}")
    columns = [shares.vision_to_first, shares.text_to_first, shares.text_to_vision]
    for block, (first, text, vision) in enumerate(zip(*columns)):
        line = f"{block + 1:>5}  {first:>15.2%}  {text:>13.2%}  {vision:>14.2%}"
        if shares.gate_mean is not None and shares.gate_closed is not None:
            line += f"  {shares.gate_mean[block]:>9.3f}  {shares.gate_closed[block]:>9.2%}"
        print(line)
