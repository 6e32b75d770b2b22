"""genlip-mlx fuse"""

from __future__ import annotations

from typing import Annotated

import typer

from . import options
from .console import note


def fuse(
    model: options.Model,
    adapter_path: Annotated[str, typer.Option(help="Folder of the adapter.", show_default=False)],
    mlx_path: Annotated[str, typer.Option("--mlx-path", "--save-path", help="Folder to write.", show_default=False)],
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Write plain weights; else a quantized model stays quantized.")
    ] = False,
    revision: options.Revision = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Work an adapter into the weights of the model it was trained on.

    Quantizing again what is adapted costs some precision; `export` needs --dequantize.

    Examples:

        genlip-mlx fuse --model genlip-l16 --adapter-path runs/receipts/adapters --mlx-path genlip-receipts

        genlip-mlx fuse --model genlip-l16-4bit --adapter-path adapters --mlx-path genlip-receipts --dequantize
    """
    from ..checkpoint.fuse import fuse as run

    run(model, adapter_path, mlx_path, dequantize, revision, overwrite)
    note(f"{mlx_path}: {model} with {adapter_path}")
