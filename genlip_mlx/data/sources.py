"""Records from any data set, by number.

The one idea: random access. A source knows where each record lies and reads nothing else before it is asked, so the
order of training is a matter of numbers alone, and any process can fetch any record. What it remembers is a few
numbers a record; it can be pickled, and holds no open file.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import tarfile
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..processing import ImageError, list_images
from .records import IMAGE_FIELDS, TEXT_FIELDS, Columns, Record, RecordError
from .synthetic import Scenes

if TYPE_CHECKING:
    import datasets

_METADATA = "metadata.jsonl"
_TAR_IMAGES = ("jpg", "jpeg", "png", "webp")
_SPLIT_NAMES = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev")}
_SCAN = 1 << 24  # bytes read at a time while looking for line ends
_BLOCK = 512  # bytes; all in a tar is a multiple of it


class SourceError(ValueError):
    """A data set that cannot be opened; the message says what is there instead, or what to do."""


class DamagedError(SourceError):
    """A file that is of the right kind, but cannot be read."""


class Source(ABC):
    """Numbered records.

    Attributes:
        name: what the user called the data set.
        problems: damage found while opening, such as a tar that is cut off; the rest is there.
        exact: whether `count` is.
    """

    name: str
    exact = True
    problems: tuple[RecordError, ...] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Record:
        """Read a record; the picture may still be a path.

        Raises:
            RecordError: if it cannot be used.
            OSError: if a file that holds many records is no longer there.
        """

    @abstractmethod
    def _signature(self) -> Iterable[bytes]:
        """What tells this data set from a changed one."""

    def count(self) -> int:
        """How many records there are; of a stream, which has no length, an estimate."""
        return len(self)

    def places(
        self, epoch: int, seed: int | None, start: int = 0, before: Iterable[int] = ()
    ) -> Iterator[tuple[int, int]]:
        """The order of an epoch: positions, each larger than the one before, and the numbers of their records.

        Args:
            seed: of the order; None for the source's own.
            start: the position to begin at.
            before: positions before it, in order, that come first.
        """
        order = np.arange(len(self)) if seed is None else permutation(len(self), seed, epoch)
        return ((position, int(order[position])) for position in chain(before, range(start, len(order))))

    def identity(self) -> dict[str, Any]:
        """Number of records, if known, and a fingerprint of names and sizes: {"records", "fingerprint"}, for JSON."""
        digest = hashlib.sha256(type(self).__name__.encode())
        for part in self._signature():
            digest.update(len(part).to_bytes(8, "little") + part)
        return {"records": len(self) if self.exact else None, "fingerprint": digest.hexdigest()[:16]}


def permutation(number: int, seed: int, stream: int) -> np.ndarray:
    """The numbers [n] below `number` in an order that seed and stream give."""
    # Sorted raw words: numpy's own shuffling may change between its releases.
    words = np.random.Philox(key=np.array([seed % 2**64, stream], np.uint64)).random_raw(number)
    return np.argsort(words, kind="stable")


def open_source(
    data: str,
    image_column: str | None = None,
    caption_column: str | None = None,
    prompt_column: str | None = None,
    split: str = "train",
) -> Source:
    """Open a data set.

    Args:
        data: one of
            - a JSONL file of {"image": path relative to the file, "caption", "prompt"} or {"image", "conversations"};
            - a folder of pictures with metadata.jsonl (file_name, caption) or a .txt beside each;
            - a folder of tars, parquet or JSONL files;
            - webdataset tars or parquet files, by name or pattern: shard-{000..015}.tar, part-*.parquet;
            - a data set on the Hugging Face hub, owner/name or owner/name:CONFIG, downloaded whole;
            - stream: and tars or parquet files by pattern, their folder, or a hub name: opened, and downloaded, one
              at a time, for training on data that is too much to hold or to look through first;
            - synth:SPLIT[:SIZE][:KINDS], scenes drawn when asked for, such as synth:train:5000:words,banners.
        image_column: the field of the picture, by default "image" or "file_name"; in tars, the member's suffix.
        caption_column: the field of the text, by default the first there is of "caption", "conversations",
            "conversation", "messages", "text". A list is taken for a conversation.
        prompt_column: the field of the prompt, by default "prompt"; records without one get the default prompt.
        split: of a hub data set, or of a folder with such a subfolder or parquet files named after it.

    Raises:
        SourceError: if there is nothing of the kind, or it holds no record.
    """
    columns = Columns(image_column, caption_column, prompt_column)
    if data.startswith("synth:"):
        _refuse(columns, data, "drawn scenes")
        return DrawnScenes(data)
    if data.startswith("stream:"):
        from .streams import Stream

        return Stream(data, columns, split)
    path = Path(data).expanduser()
    if path.is_dir():
        source = _open_folder(path, columns, split)
    elif files := expand(str(path)):
        source = open_files(data, files, columns)
    elif re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?", data):
        source = _open_hub(data, columns, split)
    else:
        raise SourceError(f"{data}: no such file or folder, and not the name of a hub data set (owner/name) either")
    if not len(source):
        raise SourceError("; ".join([f"{data}: holds no records", *map(str, source.problems)]))
    return source


def _open_folder(folder: Path, columns: Columns, split: str) -> Source:
    names = _SPLIT_NAMES.get(split, (split,))
    inside = next((folder / name for name in names if (folder / name).is_dir()), folder)
    tables = sorted([*inside.glob("*.parquet"), *inside.glob("data/*.parquet")])
    if inside == folder:  # as the hub keeps them: train-00000-of-00004.parquet
        own = [path for path in tables if re.split(r"[-_.]", path.name)[0] in names]
        if split != "train" and not own:
            raise SourceError(f"{folder}: no split {split}; that would be a subfolder {folder / split}")
        tables = own or tables
    metadata = [inside / _METADATA] if (inside / _METADATA).is_file() else sorted(inside.rglob(_METADATA))
    lines, tars = metadata or sorted(inside.glob("*.jsonl")), sorted(inside.glob("*.tar"))
    for files in (lines, tars, tables):
        if files:
            return open_files(str(inside), [str(path) for path in files], columns)
    for other in ("metadata.csv", "metadata.parquet"):
        if (inside / other).is_file():
            raise SourceError(f"{inside / other}: only {_METADATA} is read; write the same columns as JSON lines")
    _refuse(columns, str(inside), "pictures with .txt files")
    return ImageFolder(inside)


def open_files(data: str, files: Sequence[str], columns: Columns, cache: Path | None = None) -> Source:
    """Files of one kind.

    Args:
        data: what the user calls them.
        cache: folder for what the datasets library makes of parquet, by default its own.

    Raises:
        SourceError: if they are not a data set.
        DamagedError: if one cannot be read; a tar is used up to its damage.
    """
    suffixes = {Path(file).suffix.lower() for file in files}
    if len(suffixes) > 1:
        raise SourceError(f"{data}: files of several kinds, {', '.join(sorted(suffixes))}; name one kind")
    suffix = suffixes.pop()
    if suffix == ".jsonl":
        parts = [JsonLines(Path(file), columns) for file in files]
        return parts[0] if len(parts) == 1 else Joined(data, parts)
    if suffix == ".tar":
        return Tars(data, files, columns)
    if suffix == ".parquet":
        return _open_parquet(data, files, columns, cache)
    remedy = {
        ".json": "write one object a line and call it .jsonl",
        ".gz": "unpack it: records inside a compressed file cannot be found by number",
        ".tgz": "unpack it and pack it again as .tar, without compression",
        ".csv": "write the same columns as JSON lines",
    }.get(suffix, "known are .jsonl, .tar, .parquet and folders")
    raise SourceError(f"{files[0]}: not a data set that can be read; {remedy}")


def _refuse(columns: Columns, data: str, what: str) -> None:
    chosen = next((name for name in (columns.image, columns.caption, columns.prompt) if name), None)
    if chosen:
        raise SourceError(f"{data}: {what} have no columns, so {chosen!r} cannot be one; leave the option out")


def expand(pattern: str) -> list[str]:
    """The files behind a name: braces as in a shell, then wildcards, sorted; none if there is no such file."""
    if os.path.isfile(pattern):
        return [pattern]
    names = list(_braces(pattern))
    files = [sorted(glob.glob(name)) if glob.has_magic(name) else [name] * os.path.isfile(name) for name in names]
    missing = [name for name, found in zip(names, files) if not found]
    if missing and len(names) > 1:
        raise SourceError(f"{pattern}: {len(missing)} of {len(names)} files are missing, the first is {missing[0]}")
    return [file for found in files for file in found]


def _braces(pattern: str) -> Iterator[str]:
    group = re.search(r"\{([^{}]*)\}", pattern)
    if not group:
        yield pattern
        return
    before, after = pattern[: group.start()], pattern[group.end() :]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", group[1])
    if span:
        first, last = span.groups()
        width = len(first) if first.startswith("0") else 0
        choices: Iterable[str] = (f"{number:0{width}d}" for number in range(int(first), int(last) + 1))
    else:
        choices = group[1].split(",")
    for choice in choices:
        yield from _braces(before + choice + after)


class JsonLines(Source):
    """One JSON object a line; empty lines do not count."""

    def __init__(self, path: Path, columns: Columns) -> None:
        self.name, self._path, self._columns = str(path), path, columns
        ends, size = [], 0
        with open(path, "rb") as file:
            while chunk := file.read(_SCAN):
                ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + size + 1)
                size += len(chunk)
        self._edges = np.unique(np.concatenate([[0], *ends, [size]]))  # line i is [edges[i], edges[i + 1])
        self._lines = np.flatnonzero(np.diff(self._edges) > len("\r\n"))  # the lines that hold something

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Record:
        line = int(self._lines[index])
        name = f"{self._path}:{line + 1}"
        start, end = map(int, self._edges[line : line + 2])
        return self._columns.record(_json(_read(self._path, (start, end - start))[0], name), name, self._path.parent)

    def _signature(self) -> Iterable[bytes]:
        return [self._path.name.encode("utf-8", "surrogateescape"), self._edges.tobytes()]


class Joined(Source):
    """Several sources, one after another."""

    def __init__(self, name: str, parts: Sequence[Source]) -> None:
        self.name, self._parts = name, parts
        self.problems = tuple(problem for part in parts for problem in part.problems)
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        part = bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]

    def _signature(self) -> Iterable[bytes]:
        return (part for source in self._parts for part in source._signature())


class ImageFolder(Source):
    """Pictures, searched recursively, with the caption of each in a .txt file of the same name."""

    def __init__(self, folder: Path) -> None:
        self.name, self._folder = str(folder), folder
        try:
            found = list_images([str(folder)])
        except ImageError:
            raise SourceError(
                f"{folder}: no records in this folder; it should hold pictures, {_METADATA}, or .jsonl, .tar or "
                ".parquet files"
            ) from None
        self._names = _Names(os.path.relpath(path, folder) for path in found)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Record:
        path = self._folder / self._names[index]
        text = path.with_suffix(".txt")
        try:
            caption = text.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise RecordError("no caption", f"{path}: neither {text.name} beside it nor {_METADATA}") from None
        except OSError as error:
            raise RecordError("no caption", f"{text}: cannot be read ({error.strerror or error})") from None
        except UnicodeDecodeError as error:
            raise RecordError("bad text", f"{text}: not UTF-8 ({error.reason} at byte {error.start})") from None
        return Columns().describe({"caption": caption}, str(path), path)

    def _signature(self) -> Iterable[bytes]:
        return self._names.signature()


class Tars(Source):
    """Webdataset shards: members of one name and several suffixes, one after another, are one record."""

    def __init__(self, name: str, files: Sequence[str], columns: Columns) -> None:
        self.name, self._files, self._columns = name, list(files), columns
        suffixes = (columns.image,) if columns.image else _TAR_IMAGES
        shards = [_index_tar(file, suffixes) for file in files]
        self.problems = tuple(shard.problem for shard in shards if shard.problem)
        self._ends = list(accumulate(len(shard.members) for shard in shards))
        self._members = np.concatenate([shard.members for shard in shards])  # [n, 2, 2]: picture, text; offset, size
        self._plain = np.concatenate([shard.plain for shard in shards])
        self._keys = _Names(key for shard in shards for key in shard.keys)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> Record:
        file = self._files[bisect_right(self._ends, index)]
        name = f"{file}/{self._keys[index]}"
        picture, text = self._members[index].tolist()
        if picture[0] < 0:
            kinds = self._columns.image or ", ".join(_TAR_IMAGES)
            raise RecordError("no image", f"{name}: no member with a picture's suffix ({kinds})")
        if text[0] < 0:
            raise RecordError("no caption", f"{name}: no .json and no .txt member of this name")
        image, words = _read(file, picture, text)
        if not self._plain[index]:
            return self._columns.describe(_json(words, f"{name}.json"), f"{name}.json", image)
        try:
            return Columns().describe({"caption": words.decode()}, f"{name}.txt", image)
        except UnicodeDecodeError as error:
            raise RecordError("bad text", f"{name}.txt: not UTF-8 ({error.reason} at byte {error.start})") from None

    def _signature(self) -> Iterable[bytes]:
        yield from (Path(file).name.encode("utf-8", "surrogateescape") for file in self._files)
        yield self._members.tobytes()
        yield from self._keys.signature()


@dataclass
class _Shard:
    """Where the records of one tar lie."""

    members: np.ndarray  # [n, 2, 2] int64: picture and text, each with offset and size in bytes; offset -1: not there
    plain: np.ndarray  # [n] bool: the text is a caption, not JSON
    keys: list[str]
    problem: RecordError | None = None


def _index_tar(file: str, image_suffixes: Sequence[str]) -> _Shard:
    keys: list[str] = []
    members: list[list[list[int]]] = []
    plain: list[bool] = []
    problem = None
    try:
        for member in _walk(file):
            head, base = os.path.split(member.name)
            stem, _, suffix = base.partition(".")
            suffix = suffix.lower()
            kind = 0 if suffix in image_suffixes else 1 if suffix in ("json", "txt") else None
            if not stem or kind is None or not member.isreg():
                continue
            key = os.path.join(head, stem)
            if not keys or keys[-1] != key:
                keys.append(key)
                members.append([[-1, 0], [-1, 0]])
                plain.append(False)
            # JSON goes before a .txt of the same name; of two pictures, the first counts.
            if members[-1][kind][0] < 0 or (suffix == "json" and plain[-1]):
                members[-1][kind] = [member.offset_data, member.size]
                plain[-1] = suffix == "txt" if kind else plain[-1]
    except tarfile.TarError as error:
        if keys and min(members[-1])[0] < 0:  # its other half lies behind the damage
            keys.pop(), members.pop(), plain.pop()
        problem = RecordError("corrupt tar", f"{file}: {error}; the {len(keys)} records before that are used")
    places = np.array(members, np.int64).reshape(-1, 2, 2)
    return _Shard(places, np.array(plain, bool), keys, problem)


def _walk(file: str) -> Iterator[tarfile.TarInfo]:
    """The members of a tar in order, as far as it is sound.

    Raises:
        TarError: at the first damage, saying what and where.
    """
    size, end = os.path.getsize(file), 0
    with open(file, "rb") as data, tarfile.open(fileobj=data, mode="r:") as tar:
        while True:
            data.seek(end)
            block = data.read(_BLOCK)
            if not block:
                raise tarfile.ReadError(f"has no end mark, so it may be cut off, at byte {end}")
            if not any(block):
                if any(map(any, iter(lambda: data.read(1 << 16), b""))):
                    raise tarfile.ReadError(f"goes on after its end mark at byte {end}")
                return
            data.seek(end)
            tar.offset = end
            try:
                member = tarfile.TarInfo.fromtarfile(tar)
            except (tarfile.HeaderError, ValueError) as error:
                raise tarfile.ReadError(f"is damaged at byte {end} ({_line(error)})") from None
            if member.offset_data + member.size > size:
                raise tarfile.ReadError(f"is cut off inside {member.name}")
            end = tar.offset
            yield member


class Table(Source):
    """A table with a column of pictures and a column of texts, as the datasets library opens it.

    Args:
        name: what the user called it.
        table: the rows, on disk; only the columns needed are ever read.
        columns: chosen names; the others are found.
        folder: what a path in the picture column is relative to.
        origin: what, beside the shape of the table, tells it from a changed one.

    Raises:
        SourceError: if a column is not there.
    """

    def __init__(
        self, name: str, table: datasets.Dataset, columns: Columns, folder: Path, origin: Sequence[str]
    ) -> None:
        there = table.column_names
        image = columns.image or _first(IMAGE_FIELDS, there) or _first(_image_columns(table), there)
        caption = columns.caption or _first(TEXT_FIELDS, there)
        prompt = columns.prompt or _first(["prompt"], there)
        for column, kind, option in (image, "picture", "image_column"), (caption, "text", "caption_column"):
            if column is None:
                raise SourceError(f"{name}: no column for the {kind}; name one of {', '.join(there)} as {option}")
        chosen = [column for column in (image, caption, prompt) if column is not None]
        for column in chosen:
            if column not in there:
                raise SourceError(f"{name}: no column {column!r}; there are {', '.join(there)}")
        self.name, self._folder, self._origin = name, folder, list(origin)
        self._columns = Columns(image, caption, prompt)
        # Arrow's own rows: pictures stay the bytes they are.
        self._table = table.select_columns(list(dict.fromkeys(chosen))).with_format("arrow")

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Record:
        (row,) = self._table[index].to_pylist()
        return self._columns.record(row, f"{self.name}[{index}]", self._folder)

    def _signature(self) -> Iterable[bytes]:
        return [part.encode("utf-8", "surrogateescape") for part in (*self._origin, str(len(self)))]


def _image_columns(table: datasets.Dataset) -> list[str]:
    return [name for name, feature in table.features.items() if type(feature).__name__ == "Image"]


def _first(wanted: Iterable[str], there: Sequence[str]) -> str | None:
    return next((name for name in wanted if name in there), None)


def _open_parquet(data: str, files: Sequence[str], columns: Columns, cache: Path | None) -> Table:
    library = datasets_library(data)
    from pyarrow import parquet

    if cache is not None:
        library.disable_progress_bars()  # a stream's files are opened while a live line shows how training goes

    for file in files:
        try:
            parquet.read_schema(file)
        except (ValueError, OSError) as error:  # what pyarrow raises for damaged files derives from these
            raise DamagedError(f"{file}: not a readable parquet file ({_line(error)})") from None
    try:
        table = library.load_dataset(
            "parquet", data_files=list(files), split="train", cache_dir=None if cache is None else str(cache)
        )
    except (ValueError, OSError, library.exceptions.DatasetsError) as error:
        raise DamagedError(f"{data}: cannot be read ({_line(error.__cause__ or error)})") from None
    origin = [f"{Path(file).name} {os.path.getsize(file)}" for file in files]
    return Table(data, table, columns, Path(files[0]).parent, origin)


def _open_hub(data: str, columns: Columns, split: str) -> Table:
    library = datasets_library(data)
    repo, _, config = data.partition(":")
    with hub_errors(data, library):
        table = library.load_dataset(repo, config or None, split=split)
    return Table(data, table, columns, Path(), [repo, config, split, str(table.info.dataset_size)])


@contextmanager
def hub_errors(data: str, library: Any) -> Iterator[None]:
    """What the datasets library raises while it looks for a data set, as a SourceError."""
    try:
        yield
    except FileNotFoundError as error:
        raise SourceError(
            f"{data}: no such file or folder here, and no such data set on the hub (a private one needs "
            f"`hf auth login`): {_line(error)}"
        ) from None
    except OSError as error:
        raise SourceError(
            f"{data}: no such file or folder here, and the hub cannot be reached ({_line(error)})"
        ) from None
    except (ValueError, RuntimeError, library.exceptions.DatasetsError) as error:
        raise SourceError(f"{data}: the hub's data set cannot be opened ({_line(error)})") from None


def datasets_library(data: str) -> Any:
    """The datasets library.

    Raises:
        SourceError: if it is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise SourceError(f'{data}: reading it needs the extra "train": pip install "genlip-mlx[train]"') from None
    return datasets


class DrawnScenes(Source):
    """The scenes of `genlip_mlx.data.synthetic`, by the name synth:SPLIT[:SIZE][:KINDS]."""

    def __init__(self, name: str) -> None:
        _, split, *rest = name.split(":")
        options: dict[str, Any] = {}
        for part in rest:
            key = "size" if part.isdigit() else "kinds"
            if key in options:
                raise SourceError(f"{name}: two values for {key}; the form is synth:SPLIT[:SIZE][:KINDS]")
            options[key] = int(part) if part.isdigit() else part.split(",")
        self.name, self._scenes = name, Scenes(split, **options)

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> Record:
        scene = self._scenes[index]
        return Record(f"{self.name}[{index}]", scene.image, scene.caption)

    def _signature(self) -> Iterable[bytes]:
        scenes = self._scenes
        return [part.encode() for part in (scenes.split, str(scenes.seed), str(scenes.size), *scenes.kinds)]


class _Names(Sequence[str]):
    """Many names in little memory: one run of bytes, and where each ends."""

    def __init__(self, names: Iterable[str]) -> None:
        parts = [name.encode("utf-8", "surrogateescape") for name in names]
        self._bytes = b"".join(parts)
        self._edges = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return len(self._edges) - 1

    def __getitem__(self, index: Any) -> Any:
        start, end = self._edges[index : index + 2]
        return self._bytes[start:end].decode("utf-8", "surrogateescape")

    def signature(self) -> list[bytes]:
        return [self._bytes, self._edges.tobytes()]


def _read(path: str | Path, *spans: Sequence[int]) -> list[bytes]:
    """Spans (offset, size) of a file. It is opened each time: 20 us, and no limit of open files is ever met."""
    parts = []
    with open(path, "rb") as file:
        for offset, size in spans:
            file.seek(offset)
            parts.append(file.read(size))
    return parts


def _json(line: bytes, name: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecordError("bad JSON", f"{name}: not valid JSON ({_line(error)})") from None


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
