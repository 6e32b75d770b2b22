"""To disk: one tensor in memory at a time, and a folder that is there whole or not at all.

A model folder is written under a temporary name beside its destination and renamed once every
byte is on disk. A safetensors header needs only shapes and types, so it goes first
and each tensor is computed, written and let go after it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import secrets
import shutil
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import mlx.core as mx

from ..config import MODEL_TYPE, GenLIPConfig
from .errors import CheckpointError, DiskFullError
from .lazy import LazyTensor, dtype_name
from .pickles import write_pickle
from .reading import SAFETENSORS_DTYPES

SHARD_BYTES = 5_000_000_000
TOKENIZER_FILES = ("tokenizer.json", "*.model")  # either makes a tokenizer
TEXT_FILES = (
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
    "generation_config.json",
)
PREPROCESSOR_FILE = "preprocessor_config.json"

Progress = Callable[[int, int], None]
"""Called with bytes written and bytes in all."""

_KINDS = {dtype_name(dtype): kind for kind, dtype in SAFETENSORS_DTYPES.items()}


@contextmanager
def model_folder(destination: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder to fill, which takes the destination's place when the block ends well.

    Whatever stops the block, the destination is the old one or the new one, never half of either.
    What a killed process left behind is cleared away by the next one with the same destination.

    Raises:
        FileExistsError: if something is there that may not be replaced.
        DiskFullError: if the disk fills up.
    """
    target = Path(destination).expanduser().resolve()
    _check_destination(target, overwrite)
    temporary = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    lock = -1
    try:
        _make_parents(target)
        _clear_abandoned(target)
        temporary.mkdir()
        lock = _lock(temporary)
        yield temporary
        for folder, _, files in os.walk(temporary):
            for name in files:
                _sync(Path(folder) / name)
            _sync(Path(folder))
        _check_destination(target, overwrite)  # it may have appeared meanwhile
        _put_in_place(temporary, target)
        _sync(target.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"{target}: the disk is full; nothing was changed. Free some space or choose another disk"
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # the remains, or the model that was replaced
        if lock >= 0:
            os.close(lock)


def _check_destination(target: Path, overwrite: bool) -> None:
    if target.is_dir():
        if not any(target.iterdir()):
            return
        if not _is_model(target):
            raise FileExistsError(f"{target}: is not empty and not a model folder; choose another name")
        if not overwrite:
            raise FileExistsError(f"{target}: exists already; choose another name, or replace it with --overwrite")
    elif target.exists():
        raise FileExistsError(f"{target}: is a file; choose another name")


def _make_parents(target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(
            f"{target}: cannot be made, since a file is in the place of a folder above it"
        ) from None


def _is_model(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == MODEL_TYPE


def _lock(folder: Path) -> int:
    """Mark a folder as being written, for as long as this process lives."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)  # held by another process, or a file system without locks
        return -1
    return descriptor


def _clear_abandoned(target: Path) -> None:
    for folder in target.parent.glob(f".{target.name}.*.partial"):
        if (lock := _lock(folder)) >= 0:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _put_in_place(temporary: Path, target: Path) -> None:
    """Rename; an old model and the new one change places in one step where the system can."""
    if not (target.is_dir() and any(target.iterdir())):
        os.rename(temporary, target)
        return
    if _exchange(temporary, target):
        return
    old = temporary.with_suffix(".old")
    os.rename(target, old)
    os.rename(temporary, target)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders atomically; False if this system has no such call."""
    libc = ctypes.CDLL(None)
    old, new = os.fsencode(a), os.fsencode(b)
    swap = 2  # RENAME_EXCHANGE of Linux and RENAME_SWAP of macOS
    if sys.platform == "darwin":
        return libc.renamex_np(old, new, ctypes.c_uint(swap)) == 0
    here = -100  # AT_FDCWD
    return hasattr(libc, "renameat2") and libc.renameat2(here, old, here, new, ctypes.c_uint(swap)) == 0


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_weights(
    folder: Path,
    tensors: Mapping[str, LazyTensor],
    format: str = "mlx",
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """model.safetensors, or shards of at most `shard_bytes` with an index.

    Args:
        format: "mlx" for our layout, "pt" for the published one, as the file's metadata says.
    """
    total = sum(tensor.nbytes for tensor in tensors.values())
    written = 0

    def advance(nbytes: int) -> None:
        nonlocal written
        written += nbytes
        if progress is not None:
            progress(written, total)

    for name, part in _shards(folder, "model", "safetensors", tensors, shard_bytes):
        with (folder / name).open("wb") as file:
            write_safetensors(file, part, {"format": format}, advance)


def write_pickles(folder: Path, tensors: Mapping[str, LazyTensor], shard_bytes: int = SHARD_BYTES) -> None:
    """pytorch_model.bin, or shards of at most `shard_bytes` with an index."""
    for name, part in _shards(folder, "pytorch_model", "bin", tensors, shard_bytes):
        with (folder / name).open("wb") as file:
            write_pickle(file, part)


def _shards(
    folder: Path, stem: str, suffix: str, tensors: Mapping[str, LazyTensor], limit: int
) -> Iterator[tuple[str, dict[str, LazyTensor]]]:
    """File names and their tensors, in order; writes the index if there is more than one."""
    parts: list[dict[str, LazyTensor]] = [{}]
    room = limit
    for name, tensor in tensors.items():
        if tensor.nbytes > room and parts[-1]:
            parts.append({})
            room = limit
        parts[-1][name] = tensor
        room -= tensor.nbytes
    if len(parts) == 1:
        yield f"{stem}.{suffix}", parts[0]
        return
    files = [f"{stem}-{i:05}-of-{len(parts):05}.{suffix}" for i in range(1, len(parts) + 1)]
    yield from zip(files, parts)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: file for file, part in zip(files, parts) for name in sorted(part)},
    }
    write_json(folder / f"{stem}.{suffix}.index.json", index)


def write_safetensors(
    file: IO[bytes], tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str], advance: Callable[[int], None]
) -> None:
    """The safetensors format: header length, JSON header, numbers without gaps.

    Wide types go first, so every tensor stays aligned for readers that map the file.
    """
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.size)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        kind = _KINDS[dtype_name(tensor.dtype)]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in order:
        _write_numbers(file, tensors[name], name)
        mx.clear_cache()  # MLX keeps freed GPU buffers for later, one for each size
        advance(tensors[name].nbytes)


def _write_numbers(file: IO[bytes], tensor: LazyTensor, name: str) -> None:
    array = mx.contiguous(tensor.read())
    if (tuple(array.shape), array.dtype) != (tensor.shape, tensor.dtype):
        raise CheckpointError(f"{name}: {array.shape} {array.dtype} is not what its header says")
    if array.dtype == mx.bfloat16:  # Python's buffers have no such type
        array = array.view(mx.uint16)
    mx.eval(array)
    file.write(memoryview(cast(Any, array)))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_config(folder: Path, config: GenLIPConfig, dtype: mx.Dtype) -> None:
    """config.json, stating the type of the weights beside it."""
    content = config.to_dict()
    content["torch_dtype"] = dtype_name(dtype)
    for stale in {"dtype", "quantization_config"} & content.keys():  # other programs' words for the same
        del content[stale]
    write_json(folder / "config.json", content)


def copy_processor(source: Path, folder: Path, vision_only: bool) -> None:
    """Copy preprocessor and tokenizer files as they are; a vision-only model has no tokenizer.

    Raises:
        CheckpointError: if one is missing.
    """
    if not (source / PREPROCESSOR_FILE).is_file():
        raise CheckpointError(f"{source}: no {PREPROCESSOR_FILE}; copy it from the published model")
    shutil.copyfile(source / PREPROCESSOR_FILE, folder / PREPROCESSOR_FILE)
    if vision_only:
        return
    if not any(path for pattern in TOKENIZER_FILES for path in source.glob(pattern)):
        raise CheckpointError(f"{source}: no tokenizer; copy tokenizer.json from the published model")
    for path in sorted(path for pattern in TEXT_FILES for path in source.glob(pattern)):
        shutil.copyfile(path, folder / path.name)
