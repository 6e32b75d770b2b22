"""genlip-mlx export"""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from . import options
from .console import progress
from .convert import tell


class Format(str, Enum):
    safetensors = "safetensors"
    bin = "bin"


def export(
    model: options.Model,
    hf_path: Annotated[str, typer.Option(help="Folder to write.", show_default=False)],
    format: Annotated[Format, typer.Option(help="bin is a pickled state dict and needs torch.")] = Format.safetensors,
    revision: options.Revision = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Write a model in the published PyTorch layout, weights as they are to the last bit.

    Example:

        genlip-mlx export --model genlip-l16 --hf-path genlip-l16-pytorch
    """
    from ..checkpoint.convert import export as run

    with progress("exporting", "bytes") as advance:
        report = run(model, hf_path, format.value, revision, overwrite, advance)
    tell(report)
