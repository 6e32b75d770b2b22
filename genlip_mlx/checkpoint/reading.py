"""From a model folder to lazy tensors and the config that fits them.

Headers are checked here before MLX sees a file, so a damaged one is an error that names it.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import GenLIPConfig, read_json
from . import names, quantization
from .errors import CheckpointError
from .lazy import LazyTensor
from .pickles import read_pickle

# safetensors' names of the types that MLX reads as they are
SAFETENSORS_DTYPES: dict[str, mx.Dtype] = {
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "I8": mx.int8,
    "U16": mx.uint16,
    "I16": mx.int16,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "F32": mx.float32,
    "U64": mx.uint64,
    "I64": mx.int64,
}
_MAX_HEADER = 100_000_000  # bytes, the format's own limit


@dataclass(frozen=True)
class Checkpoint:
    """A model folder whose tensors are all accounted for, in our layout, not read yet."""

    folder: Path
    config: GenLIPConfig
    tensors: dict[str, LazyTensor]

    @property
    def dtype(self) -> mx.Dtype:
        """The type of what is not packed."""
        return self.tensors["ln_post.weight"].dtype


def open_checkpoint(folder: Path) -> Checkpoint:
    """A published or converted model folder.

    Raises:
        CheckpointError: if a file is missing or damaged, or config and tensors do not fit.
        ConfigError: if config.json is not a GenLIP model's.
    """
    source = str(folder)
    stated = read_json(folder / "config.json", "a model folder needs one")
    found = read_tensors(folder)
    field = stated.get("quantization")
    if field is not None and not isinstance(field, dict):
        raise CheckpointError(f"{source}: config.json: quantization must be an object, not {field!r}")
    shapes = quantization.plain_shapes(found, field, source)
    config = quantization.explicit(names.reconcile(stated, shapes, source), found)
    tensors = names.ours(found)
    layout = quantization.stored_layout(config, mx.float32)
    names.check(tensors, layout, source)
    return Checkpoint(folder, config, {name: tensors[name] for name in layout})


def read_tensors(folder: Path) -> dict[str, LazyTensor]:
    """All tensors of a folder under plain names, in published or converted shapes.

    Raises:
        CheckpointError: if there are no weights, a shard is missing, or a file is damaged.
    """
    tensors: dict[str, LazyTensor] = {}
    origin: dict[str, Path] = {}
    for path in _weight_files(folder):
        read = read_safetensors if path.suffix == ".safetensors" else read_pickle
        for name, tensor in read(path).items():
            if name in origin:
                raise CheckpointError(f"{path}: {name} is also in {origin[name].name}")
            tensors[name], origin[name] = tensor, path
    return names.plain_names(tensors, str(folder))


def _weight_files(folder: Path) -> list[Path]:
    """One file, or the shards of an index; safetensors before pickles."""
    for stem, suffixes in (("model", ("safetensors",)), ("pytorch_model", ("bin", "pt", "pth"))):
        single = folder / f"{stem}.{suffixes[0]}"
        index = folder / f"{single.name}.index.json"
        if single.is_file():
            return [single]
        if index.is_file():
            return _shards(index)
        others = sorted(path for suffix in suffixes for path in folder.glob(f"*.{suffix}"))
        if len(others) == 1:
            return others
        if others:
            listed = ", ".join(path.name for path in others)
            raise CheckpointError(f"{folder}: which of {listed} holds the weights? Name it {single.name}")
    raise CheckpointError(
        f"{folder}: no weights; expected model.safetensors, model.safetensors.index.json or pytorch_model.bin"
    )


def _shards(index: Path) -> list[Path]:
    files = read_json(index, "").get("weight_map")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{index}: has no weight_map of tensor names to files")
    shards = sorted({str(name) for name in files.values()})
    for name in shards:
        if Path(name).name != name:
            raise CheckpointError(f"{index}: {name!r} is not a file beside it")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent / name}: no such file, but {index.name} lists it; download it again")
    return [index.parent / name for name in shards]


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Tensors of one safetensors file.

    Raises:
        CheckpointError: if the file is damaged or truncated, or holds a type that MLX does not have.
    """
    header = _header(path)
    waiting: dict[str, mx.array] = {}

    def reader(name: str) -> Callable[[], mx.array]:
        def read() -> mx.array:
            # MLX opens all tensors of a file at once, none of them in memory yet. Handing an array
            # out for good lets its memory go with the reader.
            if name not in waiting:
                arrays = mx.load(str(path))
                assert isinstance(arrays, dict)
                waiting.update(arrays)
            return waiting.pop(name)

        return read

    return {name: LazyTensor(shape, dtype, reader(name)) for name, (shape, dtype) in header.items()}


def _header(path: Path) -> dict[str, tuple[tuple[int, ...], mx.Dtype]]:
    """Shape and type of each tensor, with every offset checked against the file's size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if start == b"version ":
            raise CheckpointError(f"{path}: a git-lfs pointer, not the weights; run `git lfs pull` in its folder")
        if not 2 <= length <= _MAX_HEADER or start[:1] == b"<":
            raise CheckpointError(f"{path}: not a safetensors file, or truncated at {size} bytes; download it again")
        if 8 + length > size:
            raise CheckpointError(f"{path}: truncated: {size} bytes do not even hold its header; download it again")
        text = file.read(length)
    try:
        entries = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise CheckpointError(f"{path}: not a safetensors file, or damaged: its header is not JSON") from None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: damaged: its header is not a JSON object")
    entries.pop("__metadata__", None)
    tensors = {name: _entry(path, name, entry) for name, entry in entries.items()}
    needed = 8 + length + max((end for _, _, end in tensors.values()), default=0)
    if needed > size:
        raise CheckpointError(f"{path}: truncated: {size} bytes of {needed}; download it again")
    return {name: (shape, dtype) for name, (shape, dtype, _) in tensors.items()}


def _entry(path: Path, name: str, entry: Any) -> tuple[tuple[int, ...], mx.Dtype, int]:
    try:
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path}: damaged: the header's entry of {name} is not a tensor") from None
    if kind not in SAFETENSORS_DTYPES:
        raise CheckpointError(f"{path}: {name} has type {kind}, which MLX does not read; store it as F32 or BF16")
    dtype = SAFETENSORS_DTYPES[kind]
    if not _counts([*shape, begin, end]) or end - begin != math.prod(shape) * dtype.size:
        raise CheckpointError(f"{path}: damaged: {name} {list(shape)} {kind} does not fit its bytes {begin} to {end}")
    return shape, dtype, end


def _counts(values: Iterable[Any]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values)
