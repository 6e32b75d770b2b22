"""Data to judge a training by: a split that is there already, or records set aside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from .records import Record
from .sources import Source, SourceError, open_source, permutation

_NAMES = ("validation", "valid", "val", "dev")


class Subset(Source):
    """Some records of a source.

    Args:
        numbers: of the records, in order.
    """

    def __init__(self, source: Source, numbers: Sequence[int] | np.ndarray) -> None:
        self.name, self.problems = source.name, source.problems
        self._source, self._numbers = source, np.asarray(numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Record:
        return self._source[int(self._numbers[index])]

    def _signature(self) -> Iterable[bytes]:
        return [*self._source._signature(), self._numbers.tobytes()]


def set_aside(source: Source, share: float, seed: int) -> tuple[Source, Source]:
    """The records to train on, and a share of them (at least one) to judge by, drawn by the seed alone.

    Raises:
        SourceError: if there are fewer than two records, or their number is not known.
    """
    if not source.exact:
        raise SourceError(f"{source.name}: a stream cannot be shared out; name validation data, or do without")
    if len(source) < 2:
        raise SourceError(f"{source.name}: one record cannot be shared out; name validation data, or do without")
    order = permutation(len(source), seed, 2**64 - 1)  # which is no epoch
    count = min(len(source) - 1, max(1, round(share * len(source))))
    return Subset(source, np.sort(order[count:])), Subset(source, np.sort(order[:count]))


def find_splits(data: str) -> tuple[str, str | None]:
    """What to train on, and the validation data that belongs to it: a split of its own, or a file beside train.jsonl.

    A folder with train.jsonl in it, mlx-lm's layout, stands for that file. None if there is no validation data.
    """
    path = Path(data).expanduser()
    if (path / "train.jsonl").is_file():
        path = path / "train.jsonl"
    if path.is_file():
        before, train, after = path.name.partition("train")
        beside = [path.with_name(f"{before}{name}{after}") for name in _NAMES] if train else []
        return str(path), next((str(other) for other in beside if other.is_file()), None)
    if path.is_dir() or (not data.startswith(("synth:", "stream:")) and not set("{*?") & set(data)):
        with suppress(SourceError):
            open_source(data, split="validation")
            return data, data
    return data, None
