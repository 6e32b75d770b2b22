"""PyTorch's own files (.bin, .pt, .pth): read without ever running them, and written.

Such a file is a pickle, a small program. PyTorch's restricted reader builds tensors and plain
containers and refuses the rest; there is no way around it here.
"""

from __future__ import annotations

import errno
import importlib
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from .errors import CheckpointError
from .lazy import LazyTensor, dtype_name


def import_torch(purpose: str) -> Any:
    """The torch module.

    Raises:
        CheckpointError: how to install it; `purpose` says what needs it.
    """
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise CheckpointError(f'{purpose} needs PyTorch: pip install "genlip-mlx[torch]"') from None


_MAPPED_BYTES = 200_000_000


class _Mapping:
    """A PyTorch file's tensors by name, mapped into memory rather than read.

    Pages of a mapping stay in memory once touched, so it is renewed after a while. Files older than
    PyTorch 1.6 cannot be mapped and stay in memory whole.
    """

    def __init__(self, torch: Any, path: Path):
        self._torch, self._path = torch, path
        self.tensors = _tensors(torch, path)
        self._renewable = zipfile.is_zipfile(path)
        self._touched = 0

    def read(self, name: str, dtype: mx.Dtype) -> mx.array:
        if self._renewable and self._touched > _MAPPED_BYTES:
            self.tensors.clear()
            self.tensors = _tensors(self._torch, self._path)
            self._touched = 0
        tensor = self.tensors[name].detach().contiguous()
        self._touched += tensor.nbytes
        if dtype == mx.bfloat16:  # numpy has no such type
            return mx.array(tensor.view(self._torch.int16).numpy()).view(mx.bfloat16)
        return mx.array(tensor.numpy())


def read_pickle(path: Path) -> dict[str, LazyTensor]:
    """Tensors of a PyTorch file, at its top or nested under state_dict, model or module.

    Raises:
        CheckpointError: if torch is missing, the file is damaged, or it wants to run code.
    """
    mapping = _Mapping(import_torch(f"{path}: a pickled checkpoint"), path)
    lazy = {}
    for name, tensor in mapping.tensors.items():
        dtype = _dtype(tensor, f"{path}: {name}")
        lazy[name] = LazyTensor(tuple(tensor.shape), dtype, partial(mapping.read, name, dtype))
    return lazy


def _tensors(torch: Any, path: Path) -> dict[str, Any]:
    content = _load(torch, path)
    for wrapper in ("state_dict", "model", "module"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not tensors by name")
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors by name, at the top or under state_dict or model")
    return tensors


def _load(torch: Any, path: Path) -> Any:
    mapped = zipfile.is_zipfile(path)
    try:
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it wants to run {wanted[1]}" if wanted else "it holds more than tensors"
        raise CheckpointError(
            f"{path}: refused: {what}; only plain tensors are read. Ask for the weights as safetensors"
        ) from None
    except OSError as error:
        if error.errno != errno.EINVAL:  # what reading beyond a cut zip file gives
            raise
        raise CheckpointError(f"{path}: damaged or truncated; download it again") from None
    except (RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, struct.error):
        raise CheckpointError(f"{path}: damaged or truncated; download it again") from None


def _dtype(tensor: Any, where: str) -> mx.Dtype:
    name = str(tensor.dtype).removeprefix("torch.")
    dtype = getattr(mx, name, None)
    if not isinstance(dtype, mx.Dtype) or name == "float64":
        raise CheckpointError(f"{where} is {name}, which is not supported; store it as float32")
    return dtype


def write_pickle(file: BinaryIO, tensors: Mapping[str, LazyTensor]) -> None:
    """Save tensors as PyTorch's state dict; all of them are in memory at once.

    Raises:
        CheckpointError: if torch is missing.
    """
    torch = import_torch("the format bin")
    torch.save({name: _to_torch(torch, tensor) for name, tensor in tensors.items()}, file)


def _to_torch(torch: Any, tensor: LazyTensor) -> Any:
    array = tensor.read()
    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(array.view(mx.int16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(array)).to(getattr(torch, dtype_name(array.dtype)))
