"""From a source to packs: measured, packed, decoded and normalised ahead of the one who trains.

The one idea: a record is read twice. First it is *measured*: its text is tokenized and its picture's header read,
which takes less than a tenth of the time of decoding and is all that packing needs. Then the packs a rank owns are
*decoded*. So every rank knows every pack while it decodes only its own, packs do not depend on how many ranks or
workers there are, and where the order stands is a handful of numbers.
"""

from __future__ import annotations

import math
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
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from multiprocessing import resource_tracker
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from ..processing import NO_LOSS, ImageError, Processor, image_size, open_image
from .packing import Grid, Measured, Pack, first_fit, in_pack_order
from .records import Record, RecordError
from .sources import Source

T = TypeVar("T")

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

    Epoch e goes through source.places(e, seed) in order, and no pack holds samples of two epochs. Packs are dealt to
    the ranks in turn: two ranks see in one step what a single one sees in two. A sample whose picture proves damaged
    only when decoded is left out of its pack. A script that uses workers needs `if __name__ == "__main__":`.

    Args:
        source: the records.
        processor: of the model to train, with its tokenizer.
        budget: most tokens a pack, image and text.
        seed: of the order.
        workers: processes that measure and decode; with 0, a thread of this process does.
        lookahead: samples that the packer chooses from.
        max_sample_len: most tokens of a sample. Longer texts are cut; a picture that leaves no room is skipped.
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
        if processor.tokenizer is None:
            raise DataError("a vision-only model has no tokenizer and cannot learn to speak; train a whole model")
        if not source.count():
            raise DataError(f"{source.name}: holds no records")
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
        reader = _Reader(source, processor, min(max_sample_len, budget))
        plan = _Order(seed if shuffle else None, epochs, budget, lookahead, rank, world)
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
            for message in [*self._news, *item.skips.messages]:
                if self._log is not None:
                    self._log(message)
            self._news = []
            if item.error is not None:
                self.close()
                raise item.error
            skipped = Counter(self._state["skipped"])
            skipped.update(item.skips.counts)
            self._state |= item.place | {"skipped": dict(skipped)}
            if item.pack is not None:
                self._state["packs"] += 1
                self._state["samples"] += sum(record >= 0 for record in item.pack.records)
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


def _check(start: Mapping[str, Any], order: Mapping[str, Any], data: str) -> None:
    """Refuse a state that would not go on where it left off."""
    if not start.keys() >= {*order, "epoch", "position", "waiting", "packs", "samples", "tokens", "skipped"}:
        raise DataError(f"{data}: what it should resume from is not a data state; start a new run")
    was, now = start["source"], order["source"]
    if was != now:
        changed = f"had {was['records']} records and has {now['records']}" if was["records"] != now["records"] else ""
        raise DataError(
            f"{data}: the data has changed since this state was saved ({changed or 'other names or sizes'}); "
            "put the data back as it was, or start a new run from the checkpoint's weights"
        )
    for name in "seed", "shuffle":
        if start[name] != order[name]:
            raise DataError(f"{name} is {order[name]}, but this state was saved with {start[name]}; keep it")


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
        found: list[Measured | _Skipped] = []
        for position, record in places:
            try:
                found.append(self._measure(position, record))
            except RecordError as error:
                found.append(_Skipped(position, error.reason, error.message))
        return found

    def decode(self, places: Sequence[tuple[int, int, Grid]]) -> list[np.ndarray | _Skipped]:
        """The patches [h*w, 3*p*p] uint8 of measured records, given as (position, record, grid)."""
        found: list[np.ndarray | _Skipped] = []
        for position, record, grid in places:
            try:
                found.append(self._decode(record, grid))
            except RecordError as error:
                found.append(_Skipped(position, error.reason, error.message))
        return found

    def _measure(self, position: int, index: int) -> Measured:
        record = self.source[index]
        text = record.text(self.processor)
        try:
            height, width = image_size(record.image, record.picture)
        except ImageError as error:
            raise RecordError("damaged image", str(error)) from None
        if height == width == 1:
            raise RecordError("1x1 image", f"{record.picture}: an image of 1 x 1 pixel shows nothing")
        try:
            grid = self.processor.image_processor.grid(height, width)
        except ImageError as error:
            raise RecordError("aspect ratio", f"{record.picture}: {error}") from None
        room = self.limit - grid[0] * grid[1]
        input_ids, labels = text.input_ids[: max(room, 0)], text.labels[: max(room, 0)]
        if not np.any(labels != NO_LOSS):
            raise RecordError(
                "too long",
                f"{record.picture}: {grid[0] * grid[1]} patches and the prompt leave no room for a caption "
                f"in {self.limit} tokens",
            )
        # A picture in memory was drawn just now: cutting it costs less than drawing it again.
        patches = None if isinstance(record.image, (bytes, Path)) else self._cut(record)[0]
        return Measured(position, index, grid, input_ids, labels, patches)

    def _decode(self, index: int, grid: Grid) -> np.ndarray:
        record = self.source[index]
        patches, found = self._cut(record)
        if found != grid:
            raise RecordError("damaged image", f"{record.picture}: its header states another size than its pixels have")
        return patches

    def _cut(self, record: Record) -> tuple[np.ndarray, Grid]:
        try:
            return self.processor.image_processor.cut(open_image(record.image, record.picture))
        except ImageError as error:
            raise RecordError("damaged image", str(error)) from None


_reader: _Reader  # of a worker process


def _start_worker(reader: _Reader) -> None:
    global _reader
    _reader = reader
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A parent that was killed cannot say so, and a worker would wait for its next task for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _pool(workers: int, reader: _Reader) -> ProcessPoolExecutor:
    # Not fork: a process that has loaded MLX or a BLAS has threads, which a fork would lose.
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker, initargs=(reader,))


def _in_worker(method: str, batch: Sequence[Any]) -> list[Any]:
    done: list[Any] = getattr(_reader, method)(batch)
    return done


# --- Packs: what the thread does ---


@dataclass(frozen=True)
class _Order:
    """Which records come when, and which packs of them are ours."""

    seed: int | None  # None for the source's own order
    epochs: int | None
    budget: int
    lookahead: int
    rank: int
    world: int


@dataclass
class _Skips:
    """Records given up."""

    counts: Counter[str] = field(default_factory=Counter)  # by reason
    messages: list[str] = field(default_factory=list)  # about the first few of a reason

    def __iadd__(self, other: _Skips) -> _Skips:
        self.counts.update(other.counts)
        self.messages += other.messages
        return self


@dataclass(frozen=True)
class _Plan:
    """A pack before it is decoded."""

    samples: list[Measured]
    place: dict[str, Any]  # epoch, position, waiting: where the order stands after it
    skips: _Skips  # since the plan before


@dataclass(frozen=True)
class _Item:
    """What the thread hands over: a pack, the last word, or an error."""

    place: dict[str, Any]
    skips: _Skips
    pack: Pack | None = None
    error: BaseException | None = None


class _Forward:
    """A context that hands any error in it to `receive`, and ends it there."""

    def __init__(self, receive: Callable[[BaseException], None]) -> None:
        self._receive = receive

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> bool:
        if error is not None:
            self._receive(error)
        return True


class _Producer:
    """The thread that makes packs ahead, and its workers. It does not know the Pipeline, which can so be dropped."""

    def __init__(self, reader: _Reader, order: _Order, workers: int, start: Mapping[str, Any]) -> None:
        self._reader, self._order, self._workers = reader, order, workers
        self._epoch, self._position, self._waiting = start["epoch"], start["position"], list(start["waiting"])
        self._first_epoch = self._epoch
        self._measured = int(start["packs"])  # more than 0 once a record has been usable
        self._decoded = int(start["samples"])  # of our own packs
        self._damaged = 0  # found so when decoded
        self._reasons: Counter[str] = Counter()  # of all records given up in this process
        self._examples: dict[str, str] = {}
        self._skips = _Skips()  # while measuring, since the last plan
        self._ready: queue.Queue[_Item | None] = queue.Queue(_READY)
        self._stopped = threading.Event()
        self._pool: ProcessPoolExecutor | None = None
        self._thread: threading.Thread | None = None
        self._ended = False

    def next(self) -> _Item | None:
        """The next item; None at the end."""
        if self._ended or self._stopped.is_set():
            return None
        if self._thread is None:
            self._pool = _pool(self._workers, self._reader) if self._workers else None
            self._thread = threading.Thread(target=self._run, name="packs", daemon=True)
            self._thread.start()
        item = self._ready.get()
        self._ended = item is None
        return item

    def stop(self) -> None:
        """End the thread and the workers, whatever they are at."""
        self._stopped.set()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        # Workers, which this thread starts, inherit this, so that Ctrl-C does not end them half started. Python's
        # resource tracker would undo it, were it not running yet.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        with _Forward(self._fail):
            for item in self._items():
                self._put(item)
            self._put(None)

    def _put(self, item: _Item | None) -> None:
        while not self._stopped.is_set():
            try:
                return self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, BrokenProcessPool):
            error = DataError(
                "a data worker died; the system may have ended it for lack of memory: try fewer workers. If the "
                'message above speaks of bootstrapping, the script needs `if __name__ == "__main__":`'
            )
        self._put(_Item({}, self._skips, error=error))

    def _submit(self, method: str, batch: Sequence[Any]) -> Future[list[Any]]:
        if self._stopped.is_set():
            raise CancelledError
        if self._pool is not None:
            return self._pool.submit(_in_worker, method, batch)
        future: Future[list[Any]] = Future()
        future.set_result(getattr(self._reader, method)(batch))
        return future

    def _items(self) -> Iterator[_Item]:
        decoding: deque[tuple[_Plan, list[Future[list[Any]]]]] = deque()
        for plan in self._plans():
            places = [(s.position, s.record, s.grid) for s in plan.samples if s.patches is None]
            decoding.append((plan, [self._submit("decode", batch) for batch in _batches(places, _DECODE_BATCH)]))
            if len(decoding) > _DECODING:
                yield self._item(*decoding.popleft())
        while decoding:
            yield self._item(*decoding.popleft())
        if self._damaged and not self._decoded:
            raise DataError(self._why())
        yield _Item({"epoch": self._epoch, "position": 0, "waiting": []}, self._skips)

    def _plans(self) -> Iterator[_Plan]:
        """Our packs; each stands for a turn in which every rank gets one."""
        rank, world = self._order.rank, self._order.world
        turn: list[_Plan] = []
        for samples, place in self._all_packs():
            turn.append(_Plan(samples, place, self._skips))
            self._skips = _Skips()
            if len(turn) == world:
                yield _ours(turn, rank)
                turn = []
        if rank < len(turn):
            yield _ours(turn, rank)
        else:
            for plan in turn:
                self._skips += plan.skips

    def _all_packs(self) -> Iterator[tuple[list[Measured], dict[str, Any]]]:
        order = self._order
        while order.epochs is None or self._epoch < order.epochs:
            for chosen, left in first_fit(self._samples(), order.budget, order.lookahead):
                waiting = [sample.position for sample in left]
                place = {"epoch": self._epoch, "position": self._position, "waiting": waiting}
                yield in_pack_order(chosen), place
            if not self._measured:
                raise DataError(self._why())
            self._epoch, self._position, self._waiting = self._epoch + 1, 0, []

    def _samples(self) -> Iterator[Measured]:
        """The usable samples of an epoch, from where it stands."""
        places = self._reader.source.places(self._epoch, self._order.seed, self._position, self._waiting)
        batches = _batches(places, _MEASURE_BATCH)
        running = deque(self._submit("measure", batch) for batch in islice(batches, 2 * self._workers + 1))
        while running:
            done = running.popleft().result()
            running.extend(self._submit("measure", batch) for batch in islice(batches, 1))
            for sample in done:
                self._position = max(self._position, sample.position + 1)
                if isinstance(sample, _Skipped):
                    self._skip(sample, self._skips)
                    if not self._measured and self._reasons.total() >= FIRST_RECORDS:
                        raise DataError(self._why())
                else:
                    self._measured += 1
                    yield sample

    def _item(self, plan: _Plan, futures: Iterable[Future[list[Any]]]) -> _Item:
        decoded = chain.from_iterable(future.result() for future in futures)
        good: list[tuple[Measured, np.ndarray]] = []
        for sample in plan.samples:
            patches = next(decoded) if sample.patches is None else sample.patches
            if isinstance(patches, _Skipped):
                self._damaged += 1
                self._skip(patches, plan.skips)
            else:
                good.append((sample, patches))
        self._decoded += len(good)
        # A first epoch of nothing but damaged pictures counts, however short.
        if not self._decoded and (self._damaged >= FIRST_RECORDS or plan.place["epoch"] > self._first_epoch):
            raise DataError(self._why())
        pack = self._pack(good) if good else self._blank(plan.samples[0])
        return _Item(plan.place, plan.skips, pack)

    def _pack(self, samples: Sequence[tuple[Measured, np.ndarray]]) -> Pack:
        ends = np.cumsum([0, *(len(patches) for _, patches in samples)])
        out = np.empty((ends[-1], samples[0][1].shape[1]), np.float32)
        for (_, patches), start, end in zip(samples, ends, ends[1:]):
            self._reader.processor.image_processor.normalise(patches, out[start:end])
        return Pack(
            patches=out,
            grids=tuple(sample.grid for sample, _ in samples),
            input_ids=np.concatenate([sample.input_ids for sample, _ in samples]),
            labels=np.concatenate([sample.labels for sample, _ in samples]),
            text_lengths=tuple(len(sample.input_ids) for sample, _ in samples),
            records=tuple(sample.record for sample, _ in samples),
        )

    def _blank(self, sample: Measured) -> Pack:
        """A black picture without a loss, for a pack with no sound picture: ranks stay in step, and learn nothing."""
        silent = replace(sample, labels=np.full_like(sample.labels, NO_LOSS), record=-1)
        processor = self._reader.processor.image_processor
        rows = sample.grid[0] * sample.grid[1]
        return self._pack([(silent, np.zeros((rows, 3 * processor.patch_size**2), np.uint8))])

    def _skip(self, skipped: _Skipped, skips: _Skips) -> None:
        self._reasons[skipped.reason] += 1
        self._examples.setdefault(skipped.reason, skipped.message)
        skips.counts[skipped.reason] += 1
        if self._reasons[skipped.reason] <= LOGGED:
            # File names may hold bytes that are no text, which a log could not take.
            line = f"skipped ({skipped.reason}): {skipped.message}"
            skips.messages.append(line.encode("utf-8", "backslashreplace").decode())

    def _why(self) -> str:
        """Why no record can be used."""
        (reason, count), *others = self._reasons.most_common()
        rest = "".join(f"; {other}: {number}" for other, number in others)
        return (
            f"{self._reader.source.name}: none of the first {self._reasons.total()} records can be used. "
            f"{reason}: {count}, for example {self._examples[reason]}{rest}"
        )


def _ours(turn: Sequence[_Plan], rank: int) -> _Plan:
    """The plan of a rank in a turn, which leaves the order where the whole turn does."""
    skips = _Skips()
    for plan in turn:
        skips += plan.skips
    return _Plan(turn[rank].samples, turn[-1].place, skips)


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


# --- What a data set holds ---


@dataclass(frozen=True)
class Survey:
    """What the first records of an order are like; tokens are means over the usable ones."""

    records: int  # in the data set; of a stream, an estimate
    looked_at: int
    usable: int
    image_tokens: float
    text_tokens: float
    label_tokens: float
    skipped: Mapping[str, int]  # by reason
    packs_per_epoch: int  # estimated from these records; exact if they are all there are


def survey(
    source: Source,
    processor: Processor,
    samples: int = 1000,
    budget: int = BUDGET,
    seed: int = 0,
    lookahead: int = LOOKAHEAD,
    max_sample_len: int = MAX_SAMPLE_LEN,
) -> Survey:
    """Measure the first records of the order that a Pipeline of this seed has; no picture is decoded.

    Raises:
        DataError: if none of them can be used.
    """
    reader = _Reader(source, processor, min(max_sample_len, budget))
    places = list(islice(source.places(0, seed), samples))
    looked_at, records = len(places), source.count()
    found = reader.measure(places)
    good = [sample for sample in found if isinstance(sample, Measured)]
    bad = [sample for sample in found if isinstance(sample, _Skipped)]
    if not good:
        raise DataError(f"{source.name}: none of the first {looked_at} records can be used; {bad[0].message}")
    sizes = [sum(sample.num_tokens for sample in chosen) for chosen, _ in first_fit(good, budget, lookahead)]
    share = records / looked_at
    # The last packs are filled from what is left over, which tells nothing of a longer run.
    typical = max(sizes) if share > 1 else sum(sizes) / len(sizes)
    return Survey(
        records=records,
        looked_at=looked_at,
        usable=len(good),
        image_tokens=float(np.mean([sample.grid[0] * sample.grid[1] for sample in good])),
        text_tokens=float(np.mean([len(sample.input_ids) for sample in good])),
        label_tokens=float(np.mean([np.count_nonzero(sample.labels != NO_LOSS) for sample in good])),
        skipped=dict(Counter(skipped.reason for skipped in bad)),
        packs_per_epoch=math.ceil(share * sum(sizes) / (typical if len(sizes) > 1 else budget)),
    )
