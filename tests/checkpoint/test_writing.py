"""Folders that are there whole or not at all, and files that others read."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

from genlip_mlx.checkpoint import writing
from genlip_mlx.checkpoint.convert import convert
from genlip_mlx.checkpoint.errors import CheckpointError, DiskFullError
from genlip_mlx.checkpoint.lazy import LazyTensor, Together
from genlip_mlx.checkpoint.reading import open_checkpoint, read_safetensors, read_tensors
from genlip_mlx.checkpoint.writing import model_folder, write_weights

from .conftest import Folder, listing


def no_space(*arguments: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_every_type_survives_and_stays_aligned(tmp_path: Path) -> None:
    dtypes = [mx.float32, mx.uint8, mx.bfloat16, mx.uint32, mx.float16]
    arrays = {f"{i}": (mx.arange(15).reshape(3, 5) * 7).astype(dtype) for i, dtype in enumerate(dtypes)}
    arrays["transposed"] = mx.arange(6).reshape(2, 3).T
    arrays["empty"] = mx.zeros((0, 4))
    write_weights(tmp_path, {name: LazyTensor.of(array) for name, array in arrays.items()})
    file = tmp_path / "model.safetensors"
    for loaded in (mx.load(str(file)), {name: tensor.read() for name, tensor in read_safetensors(file).items()}):
        assert isinstance(loaded, dict)
        assert set(loaded) == set(arrays)
        for name, array in arrays.items():
            assert loaded[name].dtype == array.dtype
            assert mx.array_equal(loaded[name], array)
    with safe_open(file, "numpy") as other:  # the format's own library
        assert other.metadata() == {"format": "mlx"}
        assert np.array_equal(other.get_tensor("0"), np.array(arrays["0"]))
    header = json.loads(file.read_bytes()[8:].split(b"}}", 1)[0] + b"}}")
    sizes = {"F32": 4, "U32": 4, "I32": 4, "BF16": 2, "F16": 2, "U8": 1}
    for name in arrays:
        assert header[name]["data_offsets"][0] % sizes[header[name]["dtype"]] == 0


def test_shards_have_an_index_and_read_back(tmp_path: Path) -> None:
    tensors = {f"t{i}": LazyTensor.of(mx.full((100,), i)) for i in range(7)}
    calls: list[tuple[int, int]] = []
    write_weights(tmp_path, tensors, shard_bytes=1000, progress=lambda done, total: calls.append((done, total)))
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [*(f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)), "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2800
    assert index["weight_map"]["t6"] == "model-00004-of-00004.safetensors"
    for name, tensor in read_tensors(tmp_path).items():
        assert mx.array_equal(tensor.read(), tensors[name].read())
    assert calls[-1] == (2800, 2800)
    assert calls == sorted(calls)


def test_a_tensor_over_the_limit_gets_a_shard_of_its_own(tmp_path: Path) -> None:
    tensors = {f"t{i}": LazyTensor.of(mx.zeros((n,))) for i, n in enumerate((1, 1000, 1))}
    write_weights(tmp_path, tensors, shard_bytes=100)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_a_tensor_that_is_not_what_it_promised_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"t: .* is not what its header says"):
        write_weights(tmp_path, {"t": LazyTensor((2,), mx.float32, lambda: mx.zeros(3))})


def test_arrays_computed_together_are_computed_once() -> None:
    calls = []

    def compute() -> list[mx.array]:
        calls.append(1)
        return [mx.array(i) for i in range(3)]

    together = Together(compute)
    assert [together.take(i).item() for i in (2, 0, 1)] == [2, 0, 1]
    assert len(calls) == 1


def test_nothing_is_seen_before_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    with model_folder(target) as folder:
        (folder / "a").write_text("a")
        assert not target.exists()
        assert folder.parent == target.parent
    assert listing(tmp_path) == {"deep/model/a": b"a"}


def interrupted(folder: Path, error: type[BaseException]) -> None:
    (folder / "a").write_text("a")
    raise error


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), model_folder(tmp_path / "model") as folder:
            interrupted(folder, error)
        assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_lost(tiny: Folder, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "thesis.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    before = listing(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="work: is not empty and not a model folder; choose another name"):
            convert(tiny.path, work, overwrite=overwrite)
        with pytest.raises(FileExistsError, match="file: is a file; choose another name"):
            convert(tiny.path, tmp_path / "file", overwrite=overwrite)
    with pytest.raises(
        FileExistsError, match="tiny-224: exists already; choose another name, or replace it with --overwrite"
    ):
        convert(tiny.path, tiny.path)
    assert listing(tmp_path) == before


def test_an_empty_folder_is_filled(tiny: Folder, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    convert(tiny.path, tmp_path / "empty")
    open_checkpoint(tmp_path / "empty")


@pytest.mark.parametrize("atomic", [True, False])
def test_overwrite_swaps_and_leaves_no_trace(
    tiny: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, atomic: bool
) -> None:
    if not atomic:  # a file system that cannot swap
        monkeypatch.setattr(writing, "_exchange", lambda a, b: False)
    (tiny.path / "left-over.txt").write_text("old")
    convert(tiny.path, tiny.path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-224"]
    assert not (tiny.path / "left-over.txt").exists()
    assert open_checkpoint(tiny.path).tensors["embeddings.weight"].shape == (448, 64)


@pytest.mark.parametrize("step", ["_write_numbers", "_sync", "write_json"])
def test_a_full_disk_is_one_clear_message(
    tiny: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    convert(tiny.path, tmp_path / "old")
    before = listing(tmp_path)
    monkeypatch.setattr(writing, step, no_space)
    for target in ("new", "old"):
        with pytest.raises(DiskFullError, match=f"{target}: the disk is full; nothing was changed") as error:
            convert(tiny.path, tmp_path / target, overwrite=True)
        assert "\n" not in str(error.value)
        assert listing(tmp_path) == before


@pytest.mark.parametrize("existing", [False, True])
def test_a_killed_process_leaves_the_old_model_or_none(tiny: Folder, tmp_path: Path, existing: bool) -> None:
    target = tmp_path / "out"
    if existing:
        convert(tiny.path, target, dtype="float16")
    before = listing(target)
    script = f"""
        import os, signal
        from genlip_mlx.checkpoint import writing
        from genlip_mlx.checkpoint.convert import convert

        def die(done, total):
            if done > total / 2:
                os.kill(os.getpid(), signal.SIGKILL)

        convert({str(tiny.path)!r}, {str(target)!r}, overwrite=True, progress=die)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, env=environment())
    assert done.returncode == -signal.SIGKILL
    assert target.exists() == existing
    assert listing(target) == before
    assert len(list(tmp_path.glob(".out.*.partial"))) == 1
    convert(tiny.path, target, overwrite=True)  # clears up after the dead
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny-224"]


def environment() -> dict[str, str]:
    root = Path(__file__).parents[2]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}


def test_a_folder_being_written_is_left_alone(tmp_path: Path) -> None:
    with model_folder(tmp_path / "out") as first:
        (first / "a").write_text("first")
        with model_folder(tmp_path / "out") as second:
            (second / "a").write_text("second")
        assert first.exists()
        (tmp_path / "out" / "a").unlink()
    assert listing(tmp_path) == {"out/a": b"first"}


def test_memory_is_about_the_largest_tensor(tmp_path: Path) -> None:
    """Peak of a float32 conversion of a 200 MB bfloat16 file, beyond what Python and MLX take."""
    script = f"""
        import pathlib, resource, sys
        import mlx.core as mx
        from genlip_mlx.checkpoint.lazy import LazyTensor
        from genlip_mlx.checkpoint.reading import read_safetensors
        from genlip_mlx.checkpoint.writing import write_weights

        def peak():  # bytes on macOS, KiB on Linux
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

        source, target = pathlib.Path({str(tmp_path)!r}), pathlib.Path({str(tmp_path)!r}) / "out"
        target.mkdir()
        tensor = LazyTensor((5000, 1000), mx.bfloat16, lambda: mx.ones((5000, 1000), mx.bfloat16))
        write_weights(source, {{str(i): tensor for i in range(20)}})
        before = peak()
        found = read_safetensors(source / "model.safetensors")
        write_weights(target, {{name: tensor.cast(mx.float32) for name, tensor in found.items()}})
        print(peak() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], check=True, env=environment(), capture_output=True, text=True
    )
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 400e6
    assert int(done.stdout) < 100e6
