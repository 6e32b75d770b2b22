"""LoRA and DoRA adapters: a few numbers beside a model that stays as it is, in mlx-lm's layers and files.

    adapters.safetensors      lora_a, lora_b (and DoRA's m) of each adapted layer
    adapter_config.json       fine_tune_type, num_layers, lora_parameters, and what else the run was told

What an adapter is follows from its config and the model's: which layers, which tensors, which shapes. So one
that was made for another model is refused before anything is computed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from ..config import GenLIPConfig, read_json
from ..files import atomic_file
from ..model.genlip import GenLIP
from .errors import listed
from .lazy import LazyTensor
from .names import matrices
from .reading import read_safetensors
from .writing import write_safetensors

WEIGHTS_FILE, CONFIG_FILE = "adapters.safetensors", "adapter_config.json"
TENSORS = ("lora_a", "lora_b", "m")
_BLOCKS = "visual.layers."


class AdapterError(ValueError):
    """An adapter that is unreadable, impossible, or made for another model."""


@dataclass(frozen=True)
class AdapterConfig:
    """Which layers are adapted, and how; names and defaults are mlx-lm's.

    Raises:
        AdapterError: naming the field, if a value is impossible.
    """

    fine_tune_type: str = "lora"  # or dora
    num_layers: int = -1  # blocks, counted from the last; -1 for all
    rank: int = 8
    scale: float = 20.0  # of the product of the two small matrices
    dropout: float = 0.0  # of their input, while training
    keys: tuple[str, ...] | None = None  # layers of a block (self_attn.q_proj) or of the model (lm_head, embeddings)

    def __post_init__(self) -> None:
        if self.fine_tune_type not in ("lora", "dora"):
            raise AdapterError(f"fine_tune_type must be lora or dora, not {self.fine_tune_type!r}")
        if not _whole(self.num_layers) or self.num_layers == 0 or self.num_layers < -1:
            raise AdapterError(f"num_layers must be at least 1, or -1 for all, not {self.num_layers!r}")
        if not _whole(self.rank) or self.rank < 1:
            raise AdapterError(f"lora_parameters: rank must be at least 1, not {self.rank!r}")
        for name in ("scale", "dropout"):
            if not isinstance(getattr(self, name), (int, float)) or isinstance(getattr(self, name), bool):
                raise AdapterError(f"lora_parameters: {name} must be a number, not {getattr(self, name)!r}")
        if not 0 <= self.dropout < 1:
            raise AdapterError(f"lora_parameters: dropout must lie in [0, 1), not {self.dropout}")

    @classmethod
    def of(cls, fine_tune_type: str, num_layers: int, lora_parameters: Mapping[str, Any]) -> AdapterConfig:
        """From the three fields that mlx-lm writes.

        Raises:
            AdapterError: for a parameter that is unknown or impossible.
        """
        unknown = sorted(map(str, lora_parameters.keys() - {"rank", "scale", "dropout", "keys"}))
        if unknown:
            raise AdapterError(f"lora_parameters: unknown {', '.join(unknown)}; known: rank, scale, dropout, keys")
        values = dict(lora_parameters)
        keys = values.pop("keys", None)
        if keys is not None:
            if not isinstance(keys, (list, tuple)) or not keys or not all(isinstance(key, str) for key in keys):
                raise AdapterError(f"lora_parameters: keys must be a list of layer names, not {keys!r}")
            values["keys"] = tuple(keys)
        return cls(fine_tune_type, num_layers, **values)

    @property
    def lora_parameters(self) -> dict[str, Any]:
        parameters: dict[str, Any] = {"rank": self.rank, "scale": self.scale, "dropout": self.dropout}
        return parameters if self.keys is None else parameters | {"keys": list(self.keys)}

    def paths(self, config: GenLIPConfig) -> list[str]:
        """The layers of a model that are adapted.

        Raises:
            AdapterError: if the model has fewer blocks, or a key names no layer of it.
        """
        blocks = config.num_hidden_layers
        if self.num_layers > blocks:
            raise AdapterError(f"num_layers is {self.num_layers}, but the model has {blocks} blocks")
        first = 0 if self.num_layers < 0 else blocks - self.num_layers
        by_key: dict[str, list[str]] = {}
        for path in matrices(config):
            inside = path.startswith(_BLOCKS)
            number, _, key = path.removeprefix(_BLOCKS).partition(".") if inside else ("", "", path)
            chosen = by_key.setdefault(key, [])
            if not inside or int(number) >= first:
                chosen.append(path)
        usual = [key for key, paths in by_key.items() if any(path.startswith(_BLOCKS) for path in paths)]
        keys = self.keys or usual
        unknown = [key for key in keys if key not in by_key]
        if unknown:
            raise AdapterError(
                f"lora_parameters: the model has no layer {', '.join(unknown)}; it has {', '.join(by_key)}"
            )
        return [path for key in dict.fromkeys(keys) for path in by_key[key]]


def attach(model: GenLIP, adapters: AdapterConfig) -> None:
    """Put untrained adapters into a model, which computes what it did: their product is zero.

    Everything but the adapters is frozen. What is random in them is drawn from MLX's global state.

    Raises:
        AdapterError: if the model has no such layers.
    """
    from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear  # takes seconds to import
    from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear

    modules, shapes = dict(model.named_modules()), matrices(model.config)
    sizes = {"r": adapters.rank, "scale": adapters.scale, "dropout": adapters.dropout}
    paths = adapters.paths(model.config)
    model.freeze()
    adapted: list[tuple[str, nn.Module]] = []
    for path in paths:
        layer, (rows, columns) = modules[path], shapes[path]
        linear = isinstance(layer, (nn.Linear, nn.QuantizedLinear))
        # Not `from_base`: mlx-lm's DoRA there takes a wrong width for 3, 5 and 6 bits.
        if adapters.fine_tune_type == "lora" and linear:
            module = LoRALinear(columns, rows, **sizes)
            module.linear = layer
        elif adapters.fine_tune_type == "lora":
            module = LoRAEmbedding(rows, columns, **sizes)
            module.embedding = layer
        elif linear:
            module = DoRALinear(columns, rows, **sizes)
            module.set_linear(layer)
        elif isinstance(layer, nn.QuantizedEmbedding):
            raise AdapterError(f"{path}: DoRA has no quantized embeddings; leave it out of keys, or use lora")
        else:
            module = DoRAEmbedding(rows, columns, **sizes)
            module.set_embedding(layer)
            module.m = module.m.astype(mx.float32)
        adapted.append((path, module))
    model.update_modules(tree_unflatten(adapted))


def adapter_tensors(model: GenLIP) -> dict[str, mx.array]:
    """The adapters' numbers by name."""
    flat: dict[str, mx.array] = {}
    tree_flatten(model.trainable_parameters(), destination=flat)
    return {name: value for name, value in flat.items() if name.rpartition(".")[2] in TENSORS}


def write_adapters(folder: Path, tensors: Mapping[str, mx.array], content: Mapping[str, Any]) -> None:
    """Write both files into a folder, each whole or not at all.

    Args:
        tensors: as `adapter_tensors` gives them.
        content: of adapter_config.json.

    Raises:
        OSError: if the disk is full, or the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / WEIGHTS_FILE) as file:
        lazy = {name: LazyTensor.of(value) for name, value in tensors.items()}
        write_safetensors(file, lazy, {"format": "mlx"}, lambda nbytes: None)
    with atomic_file(folder / CONFIG_FILE, text=True) as file:
        file.write(json.dumps(dict(sorted(content.items())), indent=4) + "\n")


def read_config(folder: str | Path) -> AdapterConfig:
    """What adapter_config.json says.

    Raises:
        AdapterError: if it is missing, or not that of an adapter.
    """
    folder = Path(folder).expanduser()
    if not (folder / CONFIG_FILE).is_file():
        raise AdapterError(f"{folder}: no adapter; there is no {CONFIG_FILE}")
    content = read_json(folder / CONFIG_FILE, "")
    kind, parameters = content.get("fine_tune_type", "lora"), content.get("lora_parameters")
    if kind == "full":
        raise AdapterError(f"{folder}: comes from full fine-tuning, which changes the model itself; load that model")
    if not isinstance(parameters, dict) or "scale" not in parameters or "rank" not in parameters:
        raise AdapterError(f"{folder / CONFIG_FILE}: lora_parameters must name rank and scale")
    try:
        return AdapterConfig.of(kind, content.get("num_layers", -1), parameters)
    except AdapterError as error:
        raise AdapterError(f"{folder / CONFIG_FILE}: {error}") from None


def load_adapters(model: GenLIP, folder: str | Path) -> AdapterConfig:
    """Put a trained adapter into a model, in the model's type.

    Raises:
        AdapterError, CheckpointError: if it is damaged, or made for another model; the layers are named.
    """
    folder = Path(folder).expanduser()
    adapters = read_config(folder)
    try:
        attach(model, adapters)
    except AdapterError as error:
        raise AdapterError(f"{folder}: is for another model; {error}") from None
    fill(model, folder, model.ln_post.weight.dtype)
    model.eval()
    return adapters


def fill(model: GenLIP, folder: Path, dtype: mx.Dtype) -> None:
    """Read trained numbers, as `dtype`, into adapters that are attached.

    Raises:
        AdapterError: if they are not those of this model, naming the tensors.
        CheckpointError: if the file is damaged.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise AdapterError(f"{folder}: no adapter; there is no {WEIGHTS_FILE}")
    found, expected = read_safetensors(path), adapter_tensors(model)
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "wrong": [
            f"{name} {list(found[name].shape)} instead of {list(value.shape)}"
            for name, value in expected.items()
            if name in found and found[name].shape != value.shape
        ],
    }
    told = [f"{kind} ({len(names)}): {listed(names, 3)}" for kind, names in problems.items() if names]
    if told:
        raise AdapterError(f"{folder}: is for another model; {'; '.join(told)}")
    model.load_weights([(name, tensor.cast(dtype).read()) for name, tensor in found.items()], strict=False)
    mx.eval(model.trainable_parameters())


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
