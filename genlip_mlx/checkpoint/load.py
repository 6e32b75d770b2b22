"""A folder or a hub name to a model that runs, and back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from ..config import GenLIPConfig
from ..model.genlip import GenLIP
from ..processing.processor import Processor
from . import names, quantization
from .adapters import load_adapters
from .card import describe
from .hub import resolve
from .lazy import LazyTensor, parse_dtype
from .reading import open_checkpoint
from .writing import model_folder, write_weights


def load(
    path_or_repo: str | Path,
    dtype: str = "auto",
    revision: str | None = None,
    lazy: bool = False,
    adapter_path: str | Path | None = None,
) -> tuple[GenLIP, Processor]:
    """A model and what prepares its inputs, ready to caption and encode.

    Args:
        path_or_repo: a folder, published or converted, or a hub repo id (owner/name).
        dtype: float32, float16 or bfloat16 for what is not quantized; auto is bfloat16 on a GPU and
            float32 on a CPU, where bfloat16 is slow.
        revision: branch, tag or commit of a hub repo.
        lazy: leave the weights on disk until they are used.
        adapter_path: folder of an adapter that was trained on this model.

    Raises:
        CheckpointError, ConfigError: if the files are not those of a GenLIP model.
        AdapterError: if the adapter is for another model.
        HubError: if the hub is not reached or does not have it.
    """
    folder = resolve(path_or_repo, revision)
    model = load_model(folder, dtype, lazy)
    if adapter_path is not None:
        load_adapters(model, adapter_path)
    return model, Processor.from_pretrained(folder)


def load_model(folder: Path, dtype: str = "auto", lazy: bool = False) -> GenLIP:
    """The model alone, in eval mode; arguments and errors as `load`."""
    chosen = parse_dtype(dtype) or default_dtype()
    checkpoint = open_checkpoint(folder)
    model = empty_model(checkpoint.config)
    weights = [(name, tensor.cast(chosen).read()) for name, tensor in checkpoint.tensors.items()]
    model.load_weights(weights)
    del weights
    model.eval()
    if not lazy:
        # In turn, so that a cast holds no more than one tensor twice.
        for weight in _parameters(model).values():
            mx.eval(weight)
    return model


def default_dtype() -> mx.Dtype:
    """What `auto` means on this machine's default device."""
    return mx.bfloat16 if mx.default_device().type == mx.DeviceType.gpu else mx.float32


def empty_model(config: GenLIPConfig) -> GenLIP:
    """A model whose layers are packed as `config.quantization` says, with weights yet to be loaded."""
    model = GenLIP(config)
    packed = quantization.packings(config)
    if packed:

        def choice(path: str, module: nn.Module) -> bool | dict[str, Any]:
            return dataclasses.asdict(packed[path]) if path in packed else False

        nn.quantize(model, class_predicate=choice)
    return model


def save(
    model: GenLIP, processor: Processor, folder: str | Path, source: str | None = None, overwrite: bool = False
) -> None:
    """Save a model folder that `load` reads back: config, weights, tokenizer, preprocessor, card.

    Args:
        source: what the model was made from, for its card.
        overwrite: replace a model that is there already.

    Raises:
        FileExistsError: if something is there that may not be replaced.
        DiskFullError: if the disk fills up; the old folder stays as it was.
        CheckpointError: if the model's parameters are not those of its config.
    """
    with model_folder(folder, overwrite) as temporary:
        write_model(temporary, model, processor, Path(folder).name, source)


def write_model(folder: Path, model: GenLIP, processor: Processor, name: str, source: str | None = None) -> None:
    """The files of `save`, into a folder that someone else puts in place; `name` is for the card."""
    config = model.config
    tensors = {path: LazyTensor.of(value) for path, value in _parameters(model).items()}
    layout = quantization.stored_layout(config, mx.float32)
    names.check(tensors, layout, name)
    write_weights(folder, {path: tensors[path] for path in layout})
    describe(folder, config, tensors["ln_post.weight"].dtype, name, source)
    processor.save(folder)


def _parameters(model: GenLIP) -> dict[str, mx.array]:
    flat: dict[str, mx.array] = {}
    tree_flatten(model.parameters(), destination=flat)
    return flat
