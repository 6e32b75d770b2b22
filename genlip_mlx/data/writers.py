"""Scenes on disk, in each of the layouts that training reads.

The folder appears whole or not at all: everything is written beside it under another name, then renamed.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from .synthetic import Scene, SceneError, Scenes

FORMATS = ("imagefolder", "jsonl", "webdataset")
ENCODINGS = ("jpg", "png")
SHARD = 1000  # scenes a webdataset shard, and a task of a worker
_JPEG_QUALITY = 92
_LISTS = {"imagefolder": "metadata.jsonl", "jsonl": "data.jsonl"}


def write(
    scenes: Scenes,
    folder: str | Path,
    format: str = "imagefolder",
    encoding: str = "jpg",
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write scenes as a data set.

    Args:
        scenes: what to draw.
        folder: where; new or empty.
        format: "imagefolder" (pictures beside metadata.jsonl: file_name, caption), "jsonl" (data.jsonl: image,
            caption, and images/) or "webdataset" (tars of SHARD scenes: NNNNNN.jpg, NNNNNN.json). Beside the
            caption each record has `kind`, `layout` and `facts`, see `Scene`.
        encoding: "jpg" (quality 92, full colour resolution) or "png" (exact, about twice as large).
        workers: processes that draw. The files are the same for any number.
        progress: called with (scenes written, of how many).

    Raises:
        SceneError: if the format or the encoding is not known.
        FileExistsError: if the folder holds something already.
        OSError: if it cannot be written; nothing is left behind.
    """
    folder = Path(folder)
    for name, value, known in (("format", format, FORMATS), ("encoding", encoding, ENCODINGS)):
        if value not in known:
            raise SceneError(f"unknown {name} {value!r}; known: {', '.join(known)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: exists and is not an empty folder; remove it or choose another one")
    partial_folder = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        (partial_folder / "images" if format == "jsonl" else partial_folder).mkdir(parents=True)
        task = partial(_write_shard if format == "webdataset" else _write_images, scenes, partial_folder, encoding)
        records: list[dict[str, Any]] = []
        for done in _run(task, len(scenes), workers):
            records += done
            if progress is not None:
                progress(len(records), len(scenes))
        if format in _LISTS:
            _write_list(partial_folder / _LISTS[format], records, "image" if format == "jsonl" else "file_name")
        if folder.exists():
            folder.rmdir()
        partial_folder.rename(folder)
    except OSError as error:
        raise OSError(f"{folder}: cannot be written, {error.strerror or error}; nothing was left there") from error
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)


def _run(task: Callable[[range], list[dict[str, Any]]], number: int, workers: int) -> Iterator[list[dict[str, Any]]]:
    spans = [range(start, min(start + SHARD, number)) for start in range(0, number, SHARD)]
    if workers == 1 or len(spans) < 2:
        yield from map(task, spans)
        return
    # Not fork: a process that has loaded MLX or a BLAS has threads, which a fork would lose.
    with ProcessPoolExecutor(min(workers, len(spans)), multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(task, spans)
        except BaseException:  # Ctrl-C included: what has not begun shall not
            pool.shutdown(cancel_futures=True)
            raise


def _record(scene: Scene) -> dict[str, Any]:
    return {"caption": scene.caption, "kind": scene.kind, "layout": scene.layout, "facts": list(scene.facts)}


def _encode(image: Image.Image, encoding: str) -> bytes:
    buffer = io.BytesIO()
    if encoding == "png":
        image.save(buffer, "PNG", compress_level=4)
    else:
        image.save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)  # coloured letters blur when subsampled
    return buffer.getvalue()


def _write_images(scenes: Scenes, folder: Path, encoding: str, span: range) -> list[dict[str, Any]]:
    inside = "images/" if (folder / "images").exists() else ""
    records = []
    for index in span:
        scene, path = scenes[index], f"{inside}{index:06d}.{encoding}"
        (folder / path).write_bytes(_encode(scene.image, encoding))
        records.append({"path": path, **_record(scene)})
    return records


def _write_list(path: Path, records: Iterable[dict[str, Any]], path_field: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            image_path = record.pop("path")
            file.write(json.dumps({path_field: image_path, **record}) + "\n")


def _write_shard(scenes: Scenes, folder: Path, encoding: str, span: range) -> list[dict[str, Any]]:
    records = []
    with tarfile.open(folder / f"{span.start // SHARD:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in span:
            scene = scenes[index]
            record = _record(scene)
            records.append(record)
            for suffix, content in (encoding, _encode(scene.image, encoding)), ("json", json.dumps(record).encode()):
                member = tarfile.TarInfo(f"{index:06d}.{suffix}")  # no owner, no time: the same bytes every day
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return records
