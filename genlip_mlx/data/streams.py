"""Data sets too large to have: shards that come when their turn does, and go after it.

The one idea: an order without a count. Shards are visited in an order drawn from the seed, and the records of each in
an order of its own, so a position is the number of a shard's turn and a place in that shard. It can be found
again without knowing how many records came before it, and so a stream resumes as exactly as files do.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from .records import Columns, Record, RecordError
from .sources import DamagedError, Source, SourceError, datasets_library, expand, hub_errors, open_files, permutation

_TURN = 1 << 32  # positions, and record numbers, that belong to one shard
_KEPT = 4  # downloaded shards on disk, the one that comes next not counted
_PAUSES = (0, 1, 2, 4, 8)  # seconds before each attempt at a download


class Stream(Source):
    """Tars or parquet files, opened one at a time; those of the hub are downloaded one ahead and deleted after use.

    Record numbers are those of `places`; how many there are is not known.

    Args:
        name: stream: and a pattern of files, a folder, or a data set on the hub, owner/name or owner/name:CONFIG.

    Raises:
        SourceError: if there are no shards, or the first one lacks a column.
    """

    exact = False

    def __init__(self, name: str, columns: Columns, split: str) -> None:
        from huggingface_hub import constants

        self.name, self._columns = name, columns
        data = str(Path(name.removeprefix("stream:")).expanduser())
        self._shards = expand(data) or _listed(name, data, split)
        kinds = sorted({Path(shard).suffix.lower() for shard in self._shards})
        if len(kinds) != 1 or kinds[0] not in (".tar", ".parquet"):
            raise SourceError(f"{name}: only tars or parquet files can be streamed, not {', '.join(kinds)}")
        # Beside the hub's own files, where the user has made room for data; gone with the source.
        home = Path(constants.HF_HOME)
        home.mkdir(parents=True, exist_ok=True)
        self._temporary = tempfile.TemporaryDirectory(prefix="genlip-stream-", dir=home, ignore_cleanup_errors=True)
        self._folder = Path(self._temporary.name)
        self._owner = True  # workers have copies, and delete nothing
        self._opened: dict[int, _Shard] = {}  # the latest few
        self._ahead: tuple[int, threading.Thread] | None = None  # the shard that comes next, on its way
        self._sizes: dict[int, int] = {}  # records of the shards seen so far
        self._shard(0)

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "_temporary"}
        return state | {"_owner": False, "_opened": {}, "_ahead": None}

    def __len__(self) -> int:
        raise SourceError(f"{self.name}: a stream cannot be used here; leave out stream: to have the data whole")

    def count(self) -> int:
        return round(sum(self._sizes.values()) / len(self._sizes) * len(self._shards))

    def places(
        self, epoch: int, seed: int | None, start: int = 0, before: Iterable[int] = ()
    ) -> Iterator[tuple[int, int]]:
        turns = [*range(len(self._shards))] if seed is None else permutation(len(self._shards), seed, epoch).tolist()
        first, within = divmod(start, _TURN)
        earlier = ((turn, [p % _TURN for p in run]) for turn, run in groupby(before, lambda p: p // _TURN))
        for turn, inside in chain(earlier, ((turn, None) for turn in range(first, len(turns)))):
            number = turns[turn]
            records = range(len(self._shard(number)))
            order = records if seed is None else permutation(len(records), seed, epoch + _TURN * (number + 1)).tolist()
            if inside is None:
                self._fetch_ahead(turns[turn + 1 : turn + 2])
                inside = [*range(within if turn == first else 0, len(records))]
            for place in inside:
                yield turn * _TURN + place, number * _TURN + order[place]

    def __getitem__(self, index: int) -> Record:
        number, inside = divmod(index, _TURN)
        try:
            return self._shard(number)[inside]
        except FileNotFoundError:  # deleted since: it comes again
            self._opened.pop(number, None)
            return self._shard(number)[inside]

    def _signature(self) -> Iterable[bytes]:
        for shard in self._shards:
            place = _hub_path(shard)
            # Not the revision: a new README in the repo must not end a run.
            known = place[2] if place else f"{os.path.basename(shard)} {os.path.getsize(shard)}"
            yield known.encode("utf-8", "surrogateescape")

    def _shard(self, number: int) -> _Shard:
        if number not in self._opened:
            if self._ahead is not None and self._ahead[0] == number:
                self._ahead[1].join()  # or it would be downloaded twice
            path, folder = self._fetch(number), self._folder / str(number)
            self._opened[number] = shard = _Shard(self.name, path, self._columns, folder / "arrow")
            self._sizes[number] = len(shard)
            while len(self._opened) > _KEPT:
                oldest = next(iter(self._opened))
                del self._opened[oldest]
                if self._owner:
                    shutil.rmtree(self._folder / str(oldest), ignore_errors=True)
        return self._opened[number]

    def _fetch(self, number: int) -> str:
        """The file of a shard, downloaded if need be.

        Raises:
            SourceError: if the hub does not give it.
        """
        place = _hub_path(self._shards[number])
        if place is None:
            return self._shards[number]
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # a live line shows how training goes
        repo, revision, file = place
        folder = self._folder / str(number)
        for pause in _PAUSES:
            time.sleep(pause)
            try:
                return hf_hub_download(repo, file, repo_type="dataset", revision=revision, local_dir=folder)
            except OSError as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SourceError(f"{self.name}: {file} cannot be downloaded ({reason})")

    def _fetch_ahead(self, numbers: list[int]) -> None:
        def fetch() -> None:
            with suppress(SourceError):  # which shows when the shard's turn comes
                self._fetch(numbers[0])

        if numbers and _hub_path(self._shards[numbers[0]]):
            self._ahead = numbers[0], threading.Thread(target=fetch, name="download", daemon=True)
            self._ahead[1].start()


class _Shard:
    """The records of one file; damage counts as one more record that cannot be used."""

    def __init__(self, name: str, path: str, columns: Columns, cache: Path) -> None:
        self._source: Source | None = None
        self._problems: tuple[RecordError, ...] = ()
        try:
            self._source = open_files(f"{name} {os.path.basename(path)}", [path], columns, cache)
            self._problems = self._source.problems
        except DamagedError as error:
            self._problems = (RecordError("bad shard", str(error)),)
        self._sound = len(self._source) if self._source is not None else 0

    def __len__(self) -> int:
        return self._sound + len(self._problems)

    def __getitem__(self, index: int) -> Record:
        if self._source is None or index >= self._sound:
            raise self._problems[index - self._sound]
        return self._source[index]


def _listed(name: str, data: str, split: str) -> list[str]:
    """The files of a split, as the datasets library finds them in a folder or on the hub."""
    library = datasets_library(name)
    repo, _, config = (data, "", "") if Path(data).is_dir() else data.partition(":")
    with hub_errors(name, library):
        files = library.load_dataset_builder(repo, config or None).config.data_files or {}
    if split not in files:
        raise SourceError(f"{name}: no split {split}; there are {', '.join(map(str, files)) or 'none with files'}")
    return [str(file) for file in files[split]]


def _hub_path(shard: str) -> tuple[str, str, str] | None:
    """Repo, revision and path of hf://datasets/owner/name@revision/path; None for a file that is here."""
    found = re.fullmatch(r"hf://datasets/([^/]+/[^/@]+)@([^/]+)/(.+)", shard)
    return (found[1], found[2], found[3]) if found else None
