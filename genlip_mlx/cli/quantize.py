"""genlip-mlx quantize and dequantize"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .console import note, progress
from .convert import choose, tell

if TYPE_CHECKING:
    from ..checkpoint.quantization import Quantization


def quantize(
    model: options.Model,
    mlx_path: options.MlxPath,
    q_bits: options.QBits = None,
    q_group_size: options.QGroupSize = None,
    q_mode: options.QMode = "affine",
    quant_recipe: options.QuantRecipe = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            help="Pictures with captions to round and scale the weights by: JSONL, folder, tars, parquet or hub name.",
            show_default=False,
        ),
    ] = None,
    target_bpw: Annotated[
        float | None,
        typer.Option(help="Bits a weight on average; calibration chooses each layer's.", show_default=False),
    ] = None,
    iters: Annotated[
        int | None, typer.Option(min=1, help="Steps of calibration; 200 if not given.", show_default=False)
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(min=0, help="Of calibration, in steps between two codes; 0.01 if not given.", show_default=False),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Image and text tokens a step of calibration; 4096.", show_default=False),
    ] = None,
    revision: options.Revision = None,
    upload_repo: options.UploadRepo = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Write a quantized copy of a model.

    The patch kernel stays as it is, and so does a layer whose width the group size does not divide. With --calibrate
    the copy learns from the full model what it says and sees: a few bits then cost much less.

    Examples:

        genlip-mlx quantize --model genlip-l16 --mlx-path genlip-l16-8bit --q-bits 8

        genlip-mlx quantize --model genlip-l16 --mlx-path genlip-l16-mixed --quant-recipe mixed_4_8

        genlip-mlx quantize --model genlip-l16 --mlx-path genlip-l16-4bit --calibrate photos/captions.jsonl

        genlip-mlx quantize --model genlip-l16 --mlx-path genlip-l16-5bit --calibrate photos/ --target-bpw 5
    """
    from ..checkpoint.convert import quantize as run

    settings = {"iters": iters, "learning_rate": learning_rate, "batch_tokens": batch_tokens, "target_bpw": target_bpw}
    given = {name: value for name, value in settings.items() if value is not None}
    if given and calibrate is None:
        raise typer.BadParameter(f"--{next(iter(given)).replace('_', '-')} needs captions to learn from: --calibrate")
    if target_bpw is not None and (q_bits is not None or quant_recipe is not None):
        raise typer.BadParameter("--target-bpw chooses the bits; leave out --q-bits and --quant-recipe")
    chosen = choose(q_bits, q_group_size, q_mode, quant_recipe)
    if calibrate is not None:
        _calibrate(model, mlx_path, chosen, calibrate, given, revision, upload_repo, overwrite)
        return
    with progress("quantizing", "bytes") as advance:
        report = run(model, mlx_path, chosen, revision, upload_repo, overwrite, advance)
    tell(report)


def _calibrate(
    model: str,
    mlx_path: str,
    quantization: Quantization,
    data: str,
    settings: dict[str, Any],
    revision: str | None,
    upload_repo: str | None,
    overwrite: bool,
) -> None:
    from ..train.calibrate import Calibration
    from ..train.calibrate import calibrate as run

    units = {"measuring": "packs", "rounding": "blocks", "distilling": "steps"}
    with ExitStack() as stack:
        bars = {step: stack.enter_context(progress(step, unit)) for step, unit in units.items()}
        report, outcome = run(
            model,
            mlx_path,
            quantization,
            Calibration(data, **settings),
            revision,
            upload_repo,
            overwrite,
            note,
            lambda step, done, total: bars[step](done, total),
        )
    tell(report)
    for name, found in (
        ("plain rounding", outcome.plain),
        ("rounding by data", outcome.rounded),
        ("distilled", outcome.distilled),
    ):
        kept = "  (kept)" if found == outcome.best else ""
        note(f"{name:16}  KL {found.kl:.5f} a token  feature error {found.feature_error:.6f}{kept}")


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
