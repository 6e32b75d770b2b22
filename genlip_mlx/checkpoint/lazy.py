"""Tensors known by shape and type before their numbers are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

DTYPES: dict[str, mx.Dtype] = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@dataclass(frozen=True)
class LazyTensor:
    """Shape, type, and a way to get the numbers.

    `read` returns a new array each time and keeps none, so memory is given back as soon as the reader
    drops the array. What comes from a safetensors file is not even in memory before MLX evaluates it.
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype
    read: Callable[[], mx.array]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.size

    @property
    def floating(self) -> bool:
        return mx.issubdtype(self.dtype, mx.floating)

    @classmethod
    def of(cls, array: mx.array) -> LazyTensor:
        """An array that exists already."""
        return cls(tuple(array.shape), array.dtype, lambda: array)

    def cast(self, dtype: mx.Dtype) -> LazyTensor:
        """In another floating type; packed integers stay as they are."""
        if not self.floating or self.dtype == dtype:
            return self
        return LazyTensor(self.shape, dtype, lambda: self.read().astype(dtype))

    def reshape(self, *shape: int) -> LazyTensor:
        return LazyTensor(shape, self.dtype, lambda: self.read().reshape(shape))


class Together:
    """Arrays that one computation gives together and that are read one by one.

    The first read computes all of them; each is let go when it is read.
    """

    def __init__(self, compute: Callable[[], Sequence[mx.array]]):
        self._compute = compute
        self._waiting: dict[int, mx.array] = {}

    def take(self, index: int) -> mx.array:
        if index not in self._waiting:
            arrays = self._compute()
            mx.eval(*arrays)
            self._waiting = dict(enumerate(arrays))
        return self._waiting.pop(index)


def dtype_name(dtype: mx.Dtype) -> str:
    """'float32', 'uint8', ..."""
    return str(dtype).removeprefix("mlx.core.")


def parse_dtype(name: str) -> mx.Dtype | None:
    """The type of an option; None for 'auto'.

    Raises:
        ValueError: if it is none of auto, float32, float16, bfloat16.
    """
    if name == "auto":
        return None
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; choose auto, {', '.join(DTYPES)}")
    return DTYPES[name]
