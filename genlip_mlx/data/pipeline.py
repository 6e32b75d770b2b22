"""From a source to packs: measured, packed, decoded and normalised ahead of the one who trains.

The one idea: a record is read twice. First it is *measured*: its text is tokenized and its picture's header read, which
takes about a twentieth of the time of decoding and is all that packing needs. Then the packs a rank owns are *decoded*. So every
rank knows every pack while it decodes only its own, packs do not depend on how many ranks or workers there are,
and where the order stands is a handful of numbers.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import chain, islice
from types import TracebackType
from typing import Any

import numpy as np

from ..processing import NO_LOSS, ImageError, Processor, image_size, open_image
from .packing import Grid, Measured, Pack, first_fit, in_pack_order
from .records import RecordError
from .sources import Source

BUDGET = 16384  # tokens a pack
MAX_SAMPLE_LEN = 4096  # tokens a sample, image and text
LOOKAHEAD = 512  # samples
FIRST_RECORDS = 1000  # if none of so many can be used, something is wrong with all of them
LOGGED = 20  # messages a reason; more are only counted

_READY = 2  # packs waiting for the trainer
_DECODING = 2  # packs being decoded after those
_MEASURE_BATCH, _DECODE_BATCH = 32, 4  # records a task: some 10 ms of work each


class DataError(ValueError):
    """Training cannot go on: no record can be used, a worker died, or the data is not that of the state."""


@dataclass(frozen=True)
class Stats:
    """What a pipeline has done up to the last pack it gave."""

    epoch: int  # that the last pack belongs to, from 0
    packs: int
    samples: int
    tokens: int
    skipped: Mapping[str, int]  # records that could not be used, by reason
    fill: float  # tokens, as a share of packs times budget
    seconds_waited: float  # for packs that were not ready, in this process


class Pipeline:
    """Packs of a data set, in an order that depends on the seed alone.

    Sample k of epoch e is record permutation(seed, e)[k], and no pack holds samples of two epochs. Packs are dealt to the
    ranks in turn: two ranks see in one step what a single one sees in two. A sample whose picture proves damaged
    only when decoded is left out of its pack. A script that uses workers needs `if __name__ == "__main__":`.

    Args:
        source: the records.
        processor: of the model to train, with its tokenizer.
        budget: most tokens a pack, image and text.
        seed: of the order.
        workers: processes that measure and decode; with 0, a thread of this process does.
        lookahead: samples that the packer chooses from.
        max_sample_len: most tokens of a sample. Longer texts are cut; a picture that leaves no room for text is skipped.
        rank: which of `world` processes this is.
        world: processes that share the data.
        shuffle: False for the source's own order.
        epochs: how often to go through the data; None for ever. Of the last packs, some ranks may get none.
        start: a `state` to go on from, of a pipeline with any number of workers and ranks.
        log: called with one line for each of the first 20 skipped records of a kind.

    Raises:
        DataError: if the state is of another data set or another order, or the processor has no tokenizer.
    """

    def __init__(
        self,
        source: Source,
        processor: Processor,
        budget: int = BUDGET,
        seed: int = 0,
        workers: int = 2,
        lookahead: int = LOOKAHEAD,
        max_sample_len: int = MAX_SAMPLE_LEN,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
        epochs: int | None = None,
        start: Mapping[str, Any] | None = None,
        log: Callable[[str], None] | None = None,
    ) -> None:
        for name, value in ("budget", budget), ("lookahead", lookahead), ("max_sample_len", max_sample_len):
            if value < 1:
                raise DataError(f"{name} must be positive, not {value}")
        if not 0 <= rank < world:
            raise DataError(f"rank {rank} is not one of {world} ranks, which count from 0")
        if workers < 0:
            raise DataError(f"workers must not be negative, but is {workers}")
        order = {"source": source.identity(), "seed": seed, "shuffle": shuffle}
        if start is None:
            problems = Counter(problem.reason for problem in source.problems)
            start = order | {"epoch": 0, "position": 0, "waiting": [], "packs": 0, "samples": 0, "tokens": 0}
            start = start | {"skipped": dict(problems)}
            self._news = [str(problem) for problem in source.problems]
        else:
            _check(start, order, source.name)
            self._news = []
        self._state = dict(start)
        self._budget, self._log, self._waited = budget, log, 0.0
        self._logged: Counter[str] = Counter()
        reader = _Reader(source, processor, min(max_sample_len, budget))
        plan = _Order(len(source), seed, shuffle, epochs, budget, lookahead, rank, world)
        self._producer = _Producer(reader, plan, workers, self._state)
        self._stop = weakref.finalize(self, self._producer.stop)

    def __iter__(self) -> Iterator[Pack]:
        return self

    def __next__(self) -> Pack:
        """The next pack.

        Raises:
            StopIteration: after the last epoch, or once closed.
            DataError: if no record can be used, or a worker died.
            OSError: if a file of the source is gone.
        """
        while True:
            started = time.perf_counter()
            item = self._producer.next()
            self._waited += time.perf_counter() - started
            if item is None:
                raise StopIteration
            for message in [*self._news, *item.messages]:
                if self._log is not None:
                    self._log(message)
            self._news = []
            if item.error is not None:
                self.close()
                raise item.error
            skipped = Counter(self._state["skipped"])
            skipped.update(item.skipped)
            self._state |= item.place | {"skipped": dict(skipped)}
            if item.pack is not None:
                self._state["packs"] += 1
                self._state["samples"] += item.samples
                self._state["tokens"] += item.pack.num_tokens
                return item.pack

    def state(self) -> dict[str, Any]:
        """Where the order stands after the last pack, for `start`; JSON can hold it.

        Every rank's says the same about the order: that all ranks have had the packs of this turn.
        """
        return self._state | {"waiting": list(self._state["waiting"]), "skipped": dict(self._state["skipped"])}

    @property
    def stats(self) -> Stats:
        state = self.state()
        full = state["packs"] * self._budget
        counts = {name: state[name] for name in ("epoch", "packs", "samples", "tokens", "skipped")}
        return Stats(**counts, fill=state["tokens"] / full if full else 0.0, seconds_waited=self._waited)

    def close(self) -> None:
        """End the workers; what they had ready is dropped, and `state` stays."""
        self._stop()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _check(start: Mapping[str, Any], order: Mapping[str, Any], name: str) -> None:
    """Refuse a state that would not go on where it left off."""
    if not start.keys() >= {*order, "epoch", "position", "waiting", "packs", "samples", "tokens", "skipped"}:
        raise DataError(f"{name}: what it should resume from is not a data state; start a new run")
    was, now = start["source"], order["source"]
    if was != now:
        changed = f"had {was['records']} records and has {now['records']}" if was["records"] != now["records"] else ""
        raise DataError(
            f"{name}: the data has changed since this state was saved ({changed or 'other names or sizes'}); "
            "put the data back as it was, or start a new run from the checkpoint's weights"
        )
    for field in "seed", "shuffle":
        if start[field] != order[field]:
            raise DataError(f"{field} is {order[field]}, but this state was saved with {start[field]}; keep it")


# --- Records one by one: what the workers do ---


@dataclass(frozen=True)
class _Skipped:
    """A record that cannot be used."""

    position: int
    reason: str
    message: str


@dataclass(frozen=True)
class _Reader:
    """Measures and decodes records; every worker has a copy."""

    source: Source
    processor: Processor
    limit: int  # tokens a sample

    def measure(self, places: Sequence[tuple[int, int]]) -> list[Measured | _Skipped]:
        """The sizes and text of records, given as (position, record)."""
        return [self._usable(position, lambda: self._measure(position, record)) for position, record in places]

    def decode(self, samples: Sequence[Measured]) -> list[np.ndarray | _Skipped]:
        """The patches [h*w, 3*p*p] uint8 of measured samples."""
        return [self._usable(sample.position, lambda: self._decode(sample)) for sample in samples]
