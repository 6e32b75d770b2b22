"""genlip-mlx convert"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .console import note, progress, size

if TYPE_CHECKING:
    from ..checkpoint.convert import Report
    from ..checkpoint.quantization import Quantization


def convert(
    hf_path: Annotated[str, typer.Option(help="Published model: a folder, or a hub repo id.", show_default=False)],
    mlx_path: options.MlxPath,
    dtype: Annotated[
        options.Dtype, typer.Option(help="Type of the weights written; auto keeps the checkpoint's.")
    ] = options.Dtype.auto,
    quantize: Annotated[bool, typer.Option("--quantize", "-q", help="Quantize in the same pass.")] = False,
    q_bits: options.QBits = None,
    q_group_size: options.QGroupSize = None,
    q_mode: options.QMode = "affine",
    quant_recipe: options.QuantRecipe = None,
    vision_only: Annotated[
        bool, typer.Option("--vision-only", help="Leave out text embedding and head: an encoder alone.")
    ] = False,
    revision: options.Revision = None,
    upload_repo: options.UploadRepo = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Convert a published checkpoint to an MLX model folder.

    Reads model.safetensors (whole or in shards) or a PyTorch pickle, one tensor at a time.

    Examples:

        genlip-mlx convert --hf-path YanFang/GenLIP-L16-NaViT --mlx-path genlip-l16

        genlip-mlx convert --hf-path YanFang/GenLIP-L16-NaViT --mlx-path genlip-l16-4bit -q --q-bits 4
    """
    from ..checkpoint.convert import convert as run

    if not quantize and (q_bits, q_group_size, q_mode, quant_recipe) != (None, None, "affine", None):
        raise typer.BadParameter("quantization options need --quantize (-q)")
    with progress("converting", "bytes") as advance:
        report = run(
            hf_path,
            mlx_path,
            dtype=dtype.value,
            quantization=choose(q_bits, q_group_size, q_mode, quant_recipe) if quantize else None,
            vision_only=vision_only,
            revision=revision,
            upload_repo=upload_repo,
            overwrite=overwrite,
            progress=advance,
        )
    tell(report)


def choose(bits: int | None, group_size: int | None, mode: str, recipe: str | None) -> Quantization:
    from ..checkpoint.quantization import choose

    return choose(bits, group_size, mode, recipe)


def tell(report: Report) -> None:
    """What was written, in a line; layers that stayed unquantized, in another."""
    what = f"{report.parameters / 1e6:.1f} M parameters, {size(report.total_bytes)}, {report.dtype}"
    if report.quantization is not None:
        what += f", quantized to {report.bits_per_weight:.2f} bits a weight"
    print(f"{report.folder}: {what}")
    if report.unquantized:
        layers = ", ".join(f"{name} ({width})" for name, width in report.unquantized.items())
        note(f"left unquantized, as the group size does not divide their width: {layers}")
