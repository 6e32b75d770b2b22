"""genlip-mlx features"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from . import options
from .console import Advance, note, progress

if TYPE_CHECKING:
    from ..features import Features


class Pool(str, Enum):
    none = "none"
    mean = "mean"


def features(
    images: options.Images,
    model: options.Model,
    output: Annotated[str, typer.Option(help="File to write: F.npz or F.safetensors.", show_default=False)],
    layers: Annotated[str, typer.Option(help="last (ln_post features), all, or numbers: 0,12,24.")] = "last",
    pool: Annotated[Pool, typer.Option(help="mean: one vector a picture.")] = Pool.none,
    size: Annotated[
        str, typer.Option(help="model: as the model was made for; native: keep the aspect ratio; or pixels a side.")
    ] = "model",
    dtype: options.LoadDtype = options.Dtype.auto,
    revision: options.Revision = None,
    adapter_path: options.AdapterPath = None,
) -> None:
    """Write the patch features of pictures.

    Arrays "0", "1", ... in input order, [h x w, D] float32; with --layers all [N+1, h x w, D], and
    "0.ln_post"; `grids` [n, 2] and `paths`. With --pool mean one array `features` [n, D].

    Examples:

        genlip-mlx features photos/ --model genlip-l16 --output photos.npz

        genlip-mlx features photos/ --model genlip-l16 --output photos.npz --pool mean --size 384
    """
    from ..checkpoint.load import load
    from ..features import check_output, encode_images, write_features
    from ..processing.images import list_images

    chosen_layers, chosen_size = parse_layers(layers), parse_size(size)
    check_output(output)
    paths = list_images(images)
    loaded, processor = load(model, dtype.value, revision, adapter_path=adapter_path)
    results = encode_images(loaded, processor, paths, layers=chosen_layers, pool=pool.value, size=chosen_size)
    with progress("encoding", "pictures") as advance:
        report = write_features(output, _watched(results, len(paths), advance))
    failed = sum(result.error is not None for result in report)
    note(f"features of {len(report) - failed} pictures written to {output}")
    if failed:
        note(f"{failed} of {len(paths)} pictures could not be read")
        raise typer.Exit(1)


def _watched(results: Iterable[Features], total: int, advance: Advance) -> Iterator[Features]:
    for done, result in enumerate(results, 1):
        if result.error is not None:
            note(f"skipped: {result.error}")
        yield result
        advance(done, total)


def parse_layers(text: str) -> Literal["last", "all"] | list[int]:
    if text == "last" or text == "all":
        return text  # type: ignore[return-value]
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--layers takes last, all, or numbers such as 0,12,24, not {text!r}") from None


def parse_size(text: str) -> int | Literal["native"] | None:
    if text == "model":
        return None
    if text == "native":
        return "native"
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"--size takes model, native, or pixels a side, not {text!r}") from None
