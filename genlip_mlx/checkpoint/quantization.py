"""Fewer bits a weight: which layers, how they are packed, and what that costs on disk.

The choice is written into config.json in mlx-lm's layout, one default and the layers that differ:

    {"group_size": 64, "bits": 4, "mode": "affine",
     "lm_head": {"group_size": 64, "bits": 8, "mode": "affine"},
     "vision_embeddings.patch_embedding": false}

Every layer that does not follow the default is named there, so the config alone tells the layout.
The patch kernel is never packed: it reads pixels and is a thousandth of the weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ..config import GenLIPConfig
from .errors import CheckpointError
from .lazy import LazyTensor, Together
from .names import PATCH_EMBEDDING, Shape, expected_shapes, matrices

# Group sizes and bits that each mode of mx.quantize takes, the default first.
MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((64, 32, 128), (4, 2, 3, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "mxfp8": ((32,), (8,)),
    "nvfp4": ((16,), (4,)),
}
RECIPES = ("mixed_4_8",)


class QuantizationError(ValueError):
    """Options that no mode of quantization takes, or a model that they do not fit."""


@dataclass(frozen=True)
class Packing:
    """How one weight [outputs, inputs] is stored: `bits` a number, a scale for each `group_size` inputs."""

    group_size: int
    bits: int
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise QuantizationError(f"unknown quantization mode {self.mode!r}; choose {', '.join(MODES)}")
        sizes, bits = MODES[self.mode]
        for name, value, known in (("group size", self.group_size, sizes), ("bits", self.bits, bits)):
            if value not in known:
                choice = ", ".join(map(str, sorted(known)))
                raise QuantizationError(f"quantization mode {self.mode} takes {name} {choice}, not {value!r}")

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the stored tensors."""
        return ("weight", "scales", "biases") if self.mode == "affine" else ("weight", "scales")

    def layout(self, shape: Shape, dtype: mx.Dtype) -> dict[str, tuple[Shape, mx.Dtype]]:
        """Shape and type of each part for a weight of `shape` and `dtype`.

        Affine scales and biases have the weight's type; those of the other modes are 8-bit floats, in bytes.
        """
        rows, inputs = shape
        scale = dtype if self.mode == "affine" else mx.uint8
        packed: dict[str, tuple[Shape, mx.Dtype]] = {"weight": ((rows, inputs * self.bits // 32), mx.uint32)}
        return packed | dict.fromkeys(self.parts[1:], ((rows, inputs // self.group_size), scale))

    def nbytes(self, shape: Shape, dtype: mx.Dtype) -> int:
        """Bytes of all parts of a weight of `shape` and `dtype`."""
        return sum(math.prod(part) * kind.size for part, kind in self.layout(shape, dtype).values())

    def pack(self, weight: LazyTensor) -> dict[str, LazyTensor]:
        """The stored parts of a weight."""
        together = Together(lambda: mx.quantize(weight.read(), self.group_size, self.bits, mode=self.mode))
        layout = self.layout(weight.shape, weight.dtype)
        return {part: LazyTensor(*layout[part], partial(together.take, index)) for index, part in enumerate(self.parts)}

    def unpack(self, parts: Mapping[str, LazyTensor], dtype: mx.Dtype) -> LazyTensor:
        """The weight that stored parts stand for."""

        def read() -> mx.array:
            arrays = [parts[part].read() for part in self.parts]
            biases = arrays[2] if len(arrays) > 2 else None
            weight = mx.dequantize(
                arrays[0], arrays[1], biases, group_size=self.group_size, bits=self.bits, mode=self.mode
            )
            return weight.astype(dtype)

        rows, groups = parts["scales"].shape
        return LazyTensor((rows, groups * self.group_size), dtype, read)


@dataclass(frozen=True)
class Quantization:
    """What a user asks for; see `choose`."""

    default: Packing
    recipe: str | None = None
    bits: Mapping[str, int] = dataclasses.field(default_factory=dict)  # of layers that have their own, by path

    def with_bits(self, bits: Mapping[str, int]) -> Quantization:
        """With bits for each layer; the commonest are the default."""
        ((common, _),) = Counter(bits.values()).most_common(1)
        own = {path: number for path, number in bits.items() if number != common}
        return Quantization(dataclasses.replace(self.default, bits=common), None, own)

    def apply(self, config: GenLIPConfig) -> GenLIPConfig:
        """The config of the quantized model; `pack` then does what it says.

        Raises:
            QuantizationError: if the group size divides no layer's inputs.
        """
        choice: dict[str, Any] = dataclasses.asdict(self.default)
        packed = 0
        for path, (_, inputs) in matrices(config).items():
            if path == PATCH_EMBEDDING or inputs % self.default.group_size:
                choice[path] = False
                continue
            packed += 1
            bits = 8 if self.recipe and _matters(path, config) else self.bits.get(path)
            if bits is not None:
                choice[path] = dataclasses.asdict(dataclasses.replace(self.default, bits=bits))
        if not packed:
            raise QuantizationError(
                f"group size {self.default.group_size} divides no layer's width; choose a smaller group size"
            )
        return dataclasses.replace(config, quantization=choice)


def _matters(path: str, config: GenLIPConfig) -> bool:
    """What the recipe mixed_4_8 keeps at 8 bits: both ends of the model."""
    if path.startswith("visual.layers."):
        return int(path.split(".")[2]) in (0, config.num_hidden_layers - 1)
    return True


def choose(
    bits: int | None = None, group_size: int | None = None, mode: str = "affine", recipe: str | None = None
) -> Quantization:
    """Options as the commands take them, with MLX's defaults where left out.

    Args:
        bits: a number; affine 2, 3, 4, 5, 6, 8 (default 4).
        group_size: inputs that share a scale; affine 32, 64, 128 (default 64).
        mode: affine, mxfp4, mxfp8 or nvfp4; all but affine have one size of each.
        recipe: mixed_4_8 keeps text embedding, bridges, head, first and last block at 8 bits.

    Raises:
        QuantizationError: for values that the mode does not take.
    """
    if recipe is not None:
        if recipe not in RECIPES:
            raise QuantizationError(f"unknown quantization recipe {recipe!r}; choose {', '.join(RECIPES)}")
        if mode != "affine" or bits is not None:
            raise QuantizationError(f"recipe {recipe} sets the bits itself, in affine mode; leave out bits and mode")
    if mode not in MODES:
        raise QuantizationError(f"unknown quantization mode {mode!r}; choose {', '.join(MODES)}")
    sizes, widths = MODES[mode]
    default = Packing(sizes[0] if group_size is None else group_size, widths[0] if bits is None else bits, mode)
    return Quantization(default, recipe)


def packings(config: GenLIPConfig) -> dict[str, Packing]:
    """The packed layers of a model and how each is packed; empty if it is not quantized.

    Raises:
        CheckpointError: if the config's quantization field is malformed.
    """
    if config.quantization is None:
        return {}
    default = _parse(config.quantization)
    return {
        path: _parse(choice) if isinstance(choice, dict) else default
        for path in matrices(config)
        if (choice := config.quantization.get(path, True)) is not False
    }


def _parse(field: Mapping[str, Any]) -> Packing:
    try:
        return Packing(field["group_size"], field["bits"], field.get("mode", "affine"))
    except KeyError as error:
        raise CheckpointError(f"config.json: quantization has no {error.args[0]}") from None
    except QuantizationError as error:
        raise CheckpointError(f"config.json: {error}") from None


def unquantized(config: GenLIPConfig) -> dict[str, int]:
    """Layers of a quantized model that stay as they are, with their input widths; without the patch kernel."""
    packed = packings(config)
    return {
        path: shape[1] for path, shape in matrices(config).items() if path not in packed and path != PATCH_EMBEDDING
    }


def stored_layout(config: GenLIPConfig, dtype: mx.Dtype) -> dict[str, tuple[Shape, mx.Dtype]]:
    """Shape and type of every tensor as saved, with `dtype` for what is not packed."""
    layout: dict[str, tuple[Shape, mx.Dtype]] = {}
    packed = packings(config)
    for name, shape in expected_shapes(config).items():
        path, _, tensor = name.rpartition(".")
        if tensor == "weight" and path in packed:
            parts = packed[path].layout(shape, dtype)
            layout |= {f"{path}.{part}": spec for part, spec in parts.items()}
        else:
            layout[name] = (shape, dtype)
    return layout


def estimate_size(config: GenLIPConfig, dtype: mx.Dtype) -> int:
    """Bytes of all tensors of a model as saved; `config.quantization` says how it is packed."""
    return sum(math.prod(shape) * kind.size for shape, kind in stored_layout(config, dtype).values())


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Integers [rows, inputs] of `bits` each as mx.quantize stores them: uint32 [rows, inputs * bits // 32].

    A row is one string of bits, the lowest of the first integer first.
    """
    rows = codes.astype(np.uint8)[..., None]
    string = (rows >> np.arange(bits, dtype=np.uint8) & 1).reshape(len(codes), -1)
    return np.packbits(string, axis=1, bitorder="little").view("<u4")


def pack(tensors: Mapping[str, LazyTensor], config: GenLIPConfig) -> dict[str, LazyTensor]:
    """Quantize as `config.quantization` says."""
    stored: dict[str, LazyTensor] = {}
    packed = packings(config)
    for name, tensor in tensors.items():
        path, _, kind = name.rpartition(".")
        if kind == "weight" and path in packed:
            stored |= {f"{path}.{part}": value for part, value in packed[path].pack(tensor).items()}
        else:
            stored[name] = tensor
    return stored


def unpack(tensors: Mapping[str, LazyTensor], config: GenLIPConfig, dtype: mx.Dtype) -> dict[str, LazyTensor]:
    """Undo `pack`, as `config.quantization` says."""
    plain = dict(tensors)
    for path, packing in packings(config).items():
        parts = {part: plain.pop(f"{path}.{part}") for part in packing.parts}
        plain[f"{path}.weight"] = packing.unpack(parts, dtype)
    return plain


def plain_shapes(tensors: Mapping[str, LazyTensor], field: Mapping[str, Any] | None, source: str) -> dict[str, Shape]:
    """Shapes by name as if nothing were packed.

    Args:
        field: config.json's quantization.

    Raises:
        CheckpointError: if tensors are packed and config.json does not say how.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    for path in packed_paths(tensors):
        if field is None:
            raise CheckpointError(f"{source}: {path} is quantized, but config.json has no quantization field")
        own = field.get(path)
        packing = _parse(own if isinstance(own, dict) else field)
        if len(tensors[f"{path}.scales"].shape) != 2:
            continue  # listed as wrong later
        rows, groups = tensors[f"{path}.scales"].shape
        shapes[f"{path}.weight"] = (rows, groups * packing.group_size)
    return shapes


def packed_paths(names: Iterable[str]) -> list[str]:
    """Layers that are stored packed, known by their scales."""
    return [name.removesuffix(".scales") for name in names if name.endswith(".scales")]


def explicit(config: GenLIPConfig, names: Iterable[str]) -> GenLIPConfig:
    """The config with every layer that is not packed named as such.

    mlx-lm leaves out layers that it did not pack and looks for their scales instead.
    """
    if config.quantization is None:
        return config
    packed = set(packed_paths(names))
    field = dict(config.quantization)
    for path in matrices(config):
        if path not in field and path not in packed:
            field[path] = False
    return dataclasses.replace(config, quantization=field)
