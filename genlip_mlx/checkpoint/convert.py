"""From checkpoint to checkpoint: another type, fewer bits, or the published layout again.

No model is built. Each function turns one dict of lazy tensors into another and streams it to
disk, so memory holds about the largest tensor, whatever the size of the model.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import GenLIPConfig
from .card import describe
from .errors import CheckpointError
from .hub import check_upload, resolve, upload
from .lazy import LazyTensor, dtype_name, parse_dtype
from .names import expected_shapes, matrices, published
from .pickles import import_torch
from .quantization import Quantization, QuantizationError, pack, stored_layout, unpack, unquantized
from .reading import Checkpoint, open_checkpoint
from .writing import Progress, copy_processor, model_folder, write_config, write_pickles, write_weights


@dataclass(frozen=True)
class Report:
    """What was written."""

    folder: Path
    parameters: int
    total_bytes: int  # of all tensors
    dtype: str  # of what is not packed
    quantization: dict[str, Any] | None  # as in config.json
    unquantized: dict[str, int]  # layers that no group size divides, with their input widths

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.total_bytes / self.parameters


def convert(
    hf_path: str | Path,
    mlx_path: str | Path,
    dtype: str = "auto",
    quantization: Quantization | None = None,
    vision_only: bool = False,
    revision: str | None = None,
    upload_repo: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """A published (or converted) checkpoint to a folder in MLX's layout.

    Args:
        hf_path: folder or hub repo id.
        mlx_path: folder to write; it must not exist, be empty, or, with `overwrite`, hold a model.
        dtype: float32, float16, bfloat16, or auto for the checkpoint's own.
        quantization: as `quantization.choose` gives it.
        vision_only: leave out text embedding, bridges, head and tokenizer.
        revision: of a hub repo.
        upload_repo: hub repo id to publish the folder to.
        progress: called with bytes written and bytes in all.

    Raises:
        CheckpointError, ConfigError: if the source is not a whole GenLIP checkpoint.
        QuantizationError: if it is quantized already, or no layer fits the group size.
        FileExistsError, DiskFullError: as `writing.model_folder`.
        HubError: if the hub fails; after a failed upload the folder stays.
    """
    chosen = parse_dtype(dtype)
    if upload_repo is not None:
        check_upload(upload_repo)
    source = open_checkpoint(resolve(hf_path, revision))
    config, tensors = source.config, source.tensors
    if vision_only and not config.vision_only:
        config = _without_text(config)
        tensors = {name: tensors[name] for name in stored_layout(config, source.dtype)}
    if chosen is not None:
        tensors = {name: tensor.cast(chosen) for name, tensor in tensors.items()}
    if quantization is not None:
        check_unquantized(source)
        config = quantization.apply(config)
        tensors = pack(tensors, config)
    return _save(config, tensors, source.folder, origin(hf_path), mlx_path, upload_repo, overwrite, progress)


def quantize(
    model: str | Path,
    mlx_path: str | Path,
    quantization: Quantization,
    revision: str | None = None,
    upload_repo: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """A quantized copy of a model; arguments and errors as `convert`."""
    return convert(
        model,
        mlx_path,
        quantization=quantization,
        revision=revision,
        upload_repo=upload_repo,
        overwrite=overwrite,
        progress=progress,
    )


def dequantize(
    model: str | Path,
    mlx_path: str | Path,
    dtype: str = "auto",
    revision: str | None = None,
    upload_repo: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """A copy of a quantized model with every weight unpacked; the lost precision does not come back.

    Args:
        dtype: float32, float16, bfloat16, or auto for the type of what was not packed.

    Raises:
        QuantizationError: if the model is not quantized; else as `convert`.
    """
    chosen = parse_dtype(dtype)
    if upload_repo is not None:
        check_upload(upload_repo)
    source = open_checkpoint(resolve(model, revision))
    if source.config.quantization is None:
        raise QuantizationError(f"{source.folder}: is not quantized; to change its type use convert --dtype")
    chosen = chosen or source.dtype
    tensors = {name: tensor.cast(chosen) for name, tensor in source.tensors.items()}
    tensors = unpack(tensors, source.config, chosen)
    config = dataclasses.replace(source.config, quantization=None)
    return _save(config, tensors, source.folder, origin(model), mlx_path, upload_repo, overwrite, progress)


def export(
    model: str | Path,
    hf_path: str | Path,
    format: str = "safetensors",
    revision: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """A model in the published PyTorch layout: names, shapes, files; types as they are.

    Args:
        format: safetensors, or bin for a pickled state dict (needs torch).

    Raises:
        CheckpointError: if the model is quantized or vision-only, or torch is missing; else as `convert`.
    """
    if format not in ("safetensors", "bin"):
        raise ValueError(f"unknown format {format!r}; choose safetensors or bin")
    if format == "bin":
        import_torch("the format bin")
    source = open_checkpoint(resolve(model, revision))
    config = source.config
    if config.quantization is not None:
        raise CheckpointError(
            f"{source.folder}: is quantized, which the published layout does not have; dequantize it first: "
            f"{_dequantize_command(source.folder)}"
        )
    if config.vision_only:
        raise CheckpointError(f"{source.folder}: is vision-only; the published layout needs text embedding and head")
    tensors = published(source.tensors, config)
    with model_folder(hf_path, overwrite) as folder:
        copy_processor(source.folder, folder, vision_only=False)
        write_config(folder, config, source.dtype)
        if format == "bin":
            write_pickles(folder, tensors)
        else:
            write_weights(folder, tensors, "pt", progress)
    return report_on(Path(hf_path), config, tensors)


def check_unquantized(source: Checkpoint) -> None:
    """Refuse to quantize twice.

    Raises:
        QuantizationError: naming the folder.
    """
    if source.config.quantization is not None:
        raise QuantizationError(
            f"{source.folder}: is quantized already; start from the original or from its dequantized copy "
            f"({_dequantize_command(source.folder)})"
        )


def _save(
    config: GenLIPConfig,
    tensors: dict[str, LazyTensor],
    processor_from: Path,
    origin: str,
    mlx_path: str | Path,
    upload_repo: str | None,
    overwrite: bool,
    progress: Progress | None,
) -> Report:
    target = Path(mlx_path).expanduser().resolve()
    with model_folder(target, overwrite) as folder:
        copy_processor(processor_from, folder, config.vision_only)
        describe(folder, config, tensors["ln_post.weight"].dtype, upload_repo or target.name, origin)
        write_weights(folder, tensors, "mlx", progress)
    if upload_repo is not None:
        upload(target, upload_repo)
    return report_on(Path(mlx_path), config, tensors)


def report_on(folder: Path, config: GenLIPConfig, tensors: dict[str, LazyTensor]) -> Report:
    """What a folder holds whose tensors are these."""
    return Report(
        folder=folder,
        parameters=sum(math.prod(shape) for shape in expected_shapes(config).values()),
        total_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        dtype=dtype_name(tensors["ln_post.weight"].dtype),
        quantization=config.quantization,
        unquantized=unquantized(config) if config.quantization is not None else {},
    )


def _without_text(config: GenLIPConfig) -> GenLIPConfig:
    """The config of the encoder alone; what it says of quantized layers that go is dropped."""
    encoder = dataclasses.replace(config, vision_only=True, quantization=None)
    if config.quantization is None:
        return encoder
    gone = matrices(config).keys() - matrices(encoder).keys()
    kept = {key: value for key, value in config.quantization.items() if key not in gone}
    return dataclasses.replace(encoder, quantization=kept)


def origin(path_or_repo: str | Path) -> str:
    """What a card calls a source: a repo id, or a folder's name without its place on this machine."""
    path = Path(path_or_repo).expanduser()
    return path.resolve().name if path.is_dir() else str(path_or_repo)


def _dequantize_command(folder: Path) -> str:
    return f"genlip-mlx dequantize --model {folder} --mlx-path {folder.name}-plain"
