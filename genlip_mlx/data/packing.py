"""Samples of any length, packed to a token budget.

The one idea: packing needs sizes, not pixels. A sample is measured long before it is decoded, so the packer can look
hundreds of samples ahead in little memory, and packs come out nearly full.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from ..processing import NO_LOSS

Grid = tuple[int, int]  # height, width in patches


@dataclass(frozen=True)
class Measured:
    """A sample whose sizes and text are known, and whose pixels are as a rule still on disk."""

    position: int  # in the order of its epoch
    record: int  # in its source
    grid: Grid
    input_ids: np.ndarray  # [T] int32
    labels: np.ndarray  # [T] int32, NO_LOSS where there is no loss
    patches: np.ndarray | None = None  # [h*w, 3*p*p] uint8, if the picture was drawn to measure it
    num_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_tokens", self.grid[0] * self.grid[1] + len(self.input_ids))


@dataclass(frozen=True)
class Pack:
    """Samples in two flat streams, patches and text, largest sample first."""

    patches: np.ndarray  # [P, 3*p*p] float32, normalised
    grids: tuple[Grid, ...]
    input_ids: np.ndarray  # [T] int32
    labels: np.ndarray  # [T] int32, NO_LOSS where there is no loss
    text_lengths: tuple[int, ...]
    records: tuple[int, ...]  # number of each sample's record in the source

    @property
    def num_tokens(self) -> int:
        """Image and text tokens together."""
        return len(self.patches) + len(self.input_ids)

    @property
    def label_tokens(self) -> int:
        """Text tokens with a loss. None, in the rare pack whose every picture turned out damaged."""
        return int(np.count_nonzero(self.labels != NO_LOSS))


def first_fit(
    samples: Iterable[Measured], budget: int, lookahead: int
) -> Iterator[tuple[list[Measured], list[Measured]]]:
    """Fill packs from a buffer of samples, the longest waiting first.

    Every sample goes into one pack, and the longest waiting one always into the next, so none waits for ever. The
    same samples in the same order give the same packs.

    Args:
        samples: each of at most `budget` tokens. They are taken only as the buffer needs them.
        budget: most tokens a pack.
        lookahead: most samples in the buffer.

    Yields:
        the samples of a pack, in order of arrival, and those still waiting.
    """
    incoming = iter(samples)
    waiting = list(islice(incoming, lookahead))
    while waiting:
        chosen, left, room = [], [], budget
        for sample in waiting:
            if sample.num_tokens <= room:
                chosen.append(sample)
                room -= sample.num_tokens
            else:
                left.append(sample)
        if not chosen:
            raise ValueError(f"a sample of {waiting[0].num_tokens} tokens does not fit a pack of {budget}")
        waiting = left
        yield chosen, list(waiting)
        waiting += islice(incoming, lookahead - len(waiting))


def in_pack_order(samples: Iterable[Measured]) -> list[Measured]:
    """Largest first, equal ones side by side: attention then takes most runs of samples as they lie."""
    return sorted(samples, key=lambda s: (-s.grid[0] * s.grid[1], -len(s.input_ids), s.grid, s.position))
