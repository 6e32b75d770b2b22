"""genlip-mlx caption"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .console import note, progress

if TYPE_CHECKING:
    from ..generate import Caption


def caption(
    images: options.Images,
    model: options.Model,
    prompt: Annotated[str | None, typer.Option(help='What to ask; "" asks nothing.', show_default=False)] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens a caption has at most.")] = 256,
    temp: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(max=1, help="Sample from the likeliest tokens up to this probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes sampling repeatable.", show_default=False)] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures captioned together.")] = 8,
    stream: Annotated[bool, typer.Option("--stream", help="Show each caption as it is spoken, one at a time.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a picture.")] = False,
    output: Annotated[
        str | None, typer.Option(help="Write the JSON lines to this file instead.", show_default=False)
    ] = None,
    dtype: options.LoadDtype = options.Dtype.auto,
    revision: options.Revision = None,
    adapter_path: options.AdapterPath = None,
) -> None:
    """Caption pictures.

    A picture that cannot be read is reported and skipped; the exit code is then 1.

    Examples:

        genlip-mlx caption cat.jpg --model genlip-l16

        genlip-mlx caption photos/ --model genlip-l16 --output captions.jsonl
    """
    if stream and (as_json or output):
        raise typer.BadParameter("--stream shows text; leave out --json and --output")

    from ..checkpoint.load import load
    from ..generate import captions, make_sampler
    from ..generate import stream as stream_caption
    from ..processing.images import list_images
    from ..processing.processor import DEFAULT_PROMPT

    prompt = DEFAULT_PROMPT if prompt is None else prompt
    try:
        make_sampler(temp, top_p)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    paths = list_images(images)
    loaded, processor = load(model, dtype.value, revision, adapter_path=adapter_path)
    settings: dict[str, Any] = {"max_tokens": max_tokens, "temp": temp, "top_p": top_p, "seed": seed}
    failed = 0
    if stream:
        failed = sum(
            _stream(path, len(paths) > 1, lambda p: stream_caption(loaded, processor, p, prompt, **settings))
            for path in paths
        )
    else:
        results = captions(loaded, processor, paths, prompt, batch_size=batch_size, **settings)
        with _sink(output, as_json, len(paths) > 1) as write, progress("captioning", "pictures") as advance:
            for done, result in enumerate(results, 1):
                if result.error is not None:
                    failed += 1
                    note(f"skipped: {result.error}")
                write(result)
                advance(done, len(paths))
    if failed:
        note(f"{failed} of {len(paths)} pictures could not be read")
        raise typer.Exit(1)


def _stream(path: str, named: bool, start: Callable[[str], Iterator[str | Caption]]) -> bool:
    """Print one caption as it is spoken; True if the picture could not be read."""
    from ..processing.images import ImageError

    pieces = start(path)
    try:
        first = next(pieces)
    except ImageError as error:
        note(f"skipped: {error}")
        return True
    if named:
        print(f"{path}: ", end="")
    for piece in chain([first], pieces):
        if isinstance(piece, str):
            print(piece, end="", flush=True)
    print(flush=True)
    return False


@contextmanager
def _sink(output: str | None, as_json: bool, named: bool) -> Iterator[Callable[[Caption], None]]:
    """Where results go: a file of JSON lines, JSON lines or plain text on stdout."""
    if output is not None:
        from ..files import atomic_file

        with atomic_file(output, text=True) as file:
            yield lambda result: print(_json(result), file=file)
        note(f"captions written to {output}")
    elif as_json:
        yield lambda result: print(_json(result), flush=True)
    else:

        def plain(result: Caption) -> None:
            if result.error is None:
                print(f"{result.image}: {result.caption}" if named else result.caption, flush=True)

        yield plain


def _json(result: Caption) -> str:
    return json.dumps(dataclasses.asdict(result), ensure_ascii=False)
