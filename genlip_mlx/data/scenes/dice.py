"""Every random choice of a scene, from one counter-based stream.

Only raw Philox words are used, whose sequence is fixed by definition: the streams of numpy's own
distributions may change between releases, and with them every scene.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Dice:
    """The random choices of one scene.

    Args:
        seed: any whole number of at most 64 bits.
        stream: which split, below 2**16.
        index: which scene of it, below 2**48.
        level: how hard the scene may be, from 0 to 1, where there are levels.
    """

    def __init__(self, seed: int, stream: int, index: int, level: float = 1.0) -> None:
        self.level = level
        # The key, not a hash of it, tells the streams apart: two of them can never be the same one.
        self._philox = np.random.Philox(key=np.array([seed % 2**64, stream << 48 | index], dtype=np.uint64))

    def below(self, n: int) -> int:
        """A whole number in [0, n)."""
        return int(self._philox.random_raw()) % n

    def between(self, low: int, high: int) -> int:
        """A whole number in [low, high]."""
        return low + self.below(high - low + 1)

    def uniform(self, low: float, high: float) -> float:
        """A real number in [low, high)."""
        return low + (high - low) * (int(self._philox.random_raw()) >> 11) * 2.0**-53

    def chance(self, probability: float) -> bool:
        return self.uniform(0.0, 1.0) < probability

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.below(len(choices))]

    def weighted(self, choices: Sequence[tuple[T, float]]) -> T:
        """One of the (choice, weight) pairs' choices."""
        left = self.uniform(0.0, sum(weight for _, weight in choices))
        for choice, weight in choices:
            left -= weight
            if left < 0:
                return choice
        return choices[-1][0]

    def sample(self, choices: Sequence[T], n: int) -> list[T]:
        """n different ones, in random order."""
        pool = list(choices)
        for i in range(n):
            j = self.between(i, len(pool) - 1)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:n]

    def shuffled(self, choices: Sequence[T]) -> list[T]:
        return self.sample(choices, len(choices))

    def noise(self, height: int, width: int, amplitude: int) -> np.ndarray:
        """[height, width, 1] int16, each in [-amplitude, amplitude], most of it near 0; amplitude is at most 128."""
        words = self._philox.random_raw(-(-height * width // 4))
        pairs = np.asarray(words, dtype="<u8").view("<u2")[: height * width]
        # Two bytes of each pair added up: triangular, which is near enough to a camera's noise.
        summed = ((pairs & 255) + (pairs >> 8)).astype(np.int16) - 255
        return (summed * np.int16(amplitude) // np.int16(255)).reshape(height, width, 1)
