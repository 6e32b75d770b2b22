"""genlip-mlx quantize and dequantize"""

from __future__ import annotations

from typing import Annotated

import typer

from . import options
from .console import progress
from .convert import choose, tell


def quantize(
    model: options.Model,
    mlx_path: options.MlxPath,
    q_bits: options.QBits = None,
    q_group_size: options.QGroupSize = None,
    q_mode: options.QMode = "affine",
    quant_recipe: options.QuantRecipe = None,
    revision: options.Revision = None,
    upload_repo: options.UploadRepo = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Write a quantized copy of a model.

    The patch kernel stays as it is, and so does a layer whose width the group size does not divide.

    Examples:

        genlip-mlx quantize --model genlip-l16 --mlx-path genlip-l16-8bit --q-bits 8

        genlip-mlx quantize --model genlip-l16 --mlx-path genlip-l16-mixed --quant-recipe mixed_4_8
    """
    from ..checkpoint.convert import quantize as run

    chosen = choose(q_bits, q_group_size, q_mode, quant_recipe)
    with progress("quantizing", "bytes") as advance:
        report = run(model, mlx_path, chosen, revision, upload_repo, overwrite, advance)
    tell(report)


def dequantize(
    model: options.Model,
    mlx_path: options.MlxPath,
    dtype: Annotated[
        options.Dtype, typer.Option(help="Type of the weights written; auto: that of the unquantized ones.")
    ] = options.Dtype.auto,
    revision: options.Revision = None,
    upload_repo: options.UploadRepo = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Write a copy of a quantized model with every weight unpacked.

    The precision lost in quantizing does not come back.

    Example:

        genlip-mlx dequantize --model genlip-l16-4bit --mlx-path genlip-l16-plain
    """
    from ..checkpoint.convert import dequantize as run

    with progress("dequantizing", "bytes") as advance:
        report = run(model, mlx_path, dtype.value, revision, upload_repo, overwrite, advance)
    tell(report)
