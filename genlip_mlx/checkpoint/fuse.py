"""An adapter worked into the weights it was trained on: a model folder like any other."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from ..config import GenLIPConfig
from ..model.genlip import GenLIP
from .adapters import load_adapters
from .card import describe
from .hub import resolve
from .lazy import LazyTensor, dtype_name
from .load import load_model
from .quantization import QuantizationError, stored_layout, unpack
from .reading import open_checkpoint
from .writing import copy_processor, model_folder, write_weights


def fuse(
    model: str | Path,
    adapter_path: str | Path,
    destination: str | Path,
    dequantize: bool = False,
    revision: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model folder whose weights hold an adapter, in the type of the model's own.

    Args:
        model: folder or hub repo id, the one that the adapter was trained on.
        dequantize: of a quantized model, write plain weights; else what is adapted is quantized again, as it was.

    Raises:
        AdapterError, CheckpointError, ConfigError, HubError: if model or adapter cannot be used.
        QuantizationError: if there is nothing to dequantize.
        FileExistsError, DiskFullError: as `writing.model_folder`.
    """
    source = resolve(model, revision)
    checkpoint = open_checkpoint(source)
    if dequantize and checkpoint.config.quantization is None:
        raise QuantizationError(f"{source}: is not quantized; leave out --dequantize")
    loaded = load_model(source, dtype_name(checkpoint.dtype), lazy=True)
    load_adapters(loaded, adapter_path)
    config, tensors = fused(loaded, dequantize)
    target = Path(destination).expanduser()
    with model_folder(target, overwrite) as folder:
        copy_processor(source, folder, config.vision_only)
        describe(folder, config, checkpoint.dtype, target.resolve().name, source.name)
        layout = stored_layout(config, checkpoint.dtype)
        write_weights(folder, {name: tensors[name].cast(dtype) for name, (_, dtype) in layout.items()})


def fused(model: GenLIP, dequantize: bool = False) -> tuple[GenLIPConfig, dict[str, LazyTensor]]:
    """The tensors of a model once its adapters are worked in, and the config that says how they are packed."""
    config = model.config
    layers = [(path, module.fuse(dequantize)) for path, module in model.named_modules() if hasattr(module, "fuse")]
    model.update_modules(tree_unflatten(layers))
    weights: dict[str, mx.array] = {}
    tree_flatten(model.parameters(), destination=weights)
    flat = {name: LazyTensor.of(value) for name, value in weights.items()}
    if not dequantize or config.quantization is None:
        return config, flat
    packed = dataclasses.replace(config, quantization=config.quantization | dict.fromkeys(dict(layers), False))
    return dataclasses.replace(config, quantization=None), unpack(flat, packed, model.ln_post.weight.dtype)
