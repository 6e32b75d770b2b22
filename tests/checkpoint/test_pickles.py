"""PyTorch's files. What needs torch runs where it is installed; the message without it, everywhere."""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from genlip_mlx.checkpoint import pickles, writing
from genlip_mlx.checkpoint.convert import convert, export
from genlip_mlx.checkpoint.errors import CheckpointError, DiskFullError
from genlip_mlx.checkpoint.reading import open_checkpoint, read_tensors

from .conftest import Folder, listing

INSTALL = r'needs PyTorch: pip install "genlip-mlx\[torch\]"'


def test_without_torch_the_message_says_how_to_install_it(
    tiny: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    (tiny.path / "model.safetensors").rename(tiny.path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin: a pickled checkpoint {INSTALL}"):
        read_tensors(tiny.path)
    with pytest.raises(CheckpointError, match=f"the format bin {INSTALL}"):
        export(tiny.path, tmp_path / "out", "bin")
    assert not (tmp_path / "out").exists()


if importlib.util.find_spec("torch") is not None:
    import torch

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, ("pwned",)

    def as_pickle(folder: Folder, name: str = "pytorch_model.bin", nest: Any = lambda state: state, **how: Any) -> Path:
        state = {name: torch.from_numpy(array) for name, array in folder.tensors().items()}
        for file in folder.path.glob("model*"):
            file.unlink()
        torch.save(nest(state), folder.path / name, **how)
        return folder.path / name

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "genlip.pt", "genlip.pth"])
    @pytest.mark.parametrize(
        "nest",
        [
            lambda state: state,
            lambda state: {"state_dict": state, "step": 3},
            lambda state: {"model": {f"module._orig_mod.{name}": value for name, value in state.items()}},
            lambda state: {"state_dict": {"model": state}},
        ],
    )
    def test_pickles_give_the_stored_numbers(tiny: Folder, name: str, nest: Any) -> None:
        stored = open_checkpoint(tiny.path)
        before = {name: tensor.read() for name, tensor in stored.tensors.items()}
        as_pickle(tiny, name, nest)
        after = open_checkpoint(tiny.path)
        assert after.config == stored.config
        for tensor, array in before.items():
            assert mx.array_equal(after.tensors[tensor].read(), array)

    def test_an_old_file_is_read_whole(tiny: Folder) -> None:
        as_pickle(tiny, _use_new_zipfile_serialization=False)
        assert len(open_checkpoint(tiny.path).tensors) == 46

    def test_a_mapping_is_renewed(tiny: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
        stored = tiny.tensors()
        as_pickle(tiny)
        monkeypatch.setattr(pickles, "_MAPPED_BYTES", 50_000)
        tensors = read_tensors(tiny.path)
        for name, array in stored.items():
            assert np.array_equal(np.array(tensors[name].read()), array)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    @pytest.mark.parametrize("shard_bytes", [5_000_000_000, 300_000])
    def test_export_to_a_pickle_and_back_is_bit_exact(
        tiny: Folder, tmp_path: Path, dtype: str, shard_bytes: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        convert(tiny.path, tmp_path / "ours", dtype)
        monkeypatch.setattr(writing.write_pickles, "__defaults__", (shard_bytes,))
        export(tmp_path / "ours", tmp_path / "theirs", "bin")
        files = sorted((tmp_path / "theirs").glob("*.bin"))
        assert len(files) == (1 if shard_bytes > 1e6 else len(files))
        state: dict[str, Any] = {}
        for file in files:
            state |= torch.load(file, weights_only=True)
        assert state["vision_embeddings.patch_embedding.weight"].shape == (64, 3, 16, 16)
        assert {value.dtype for value in state.values()} == {getattr(torch, dtype)}
        if len(files) > 1:
            index = json.loads((tmp_path / "theirs" / "pytorch_model.bin.index.json").read_text())
            assert set(index["weight_map"]) == set(state)
        ours, back = open_checkpoint(tmp_path / "ours"), open_checkpoint(tmp_path / "theirs")
        for name, tensor in ours.tensors.items():
            assert tensor.dtype == back.tensors[name].dtype
            assert mx.array_equal(tensor.read(), back.tensors[name].read())

    @pytest.mark.parametrize("new", [True, False])
    def test_a_pickle_that_wants_to_run_code_is_refused(
        tiny: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new: bool
    ) -> None:
        monkeypatch.chdir(tmp_path)
        as_pickle(tiny, nest=lambda state: {**state, "extra": Evil()}, _use_new_zipfile_serialization=new)
        before = listing(tmp_path)
        with pytest.raises(
            CheckpointError, match=r"pytorch_model\.bin: refused: it wants to run posix\.mkdir"
        ) as error:
            convert(tiny.path, tmp_path / "out")
        assert "\n" not in str(error.value)
        assert listing(tmp_path) == before
        assert not (tmp_path / "pwned").exists()

    @pytest.mark.parametrize("new", [True, False])
    @pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.999])
    def test_a_truncated_pickle_is_named(tiny: Folder, new: bool, part: float) -> None:
        file = as_pickle(tiny, _use_new_zipfile_serialization=new)
        data = file.read_bytes()
        file.write_bytes(data[: int(part * len(data))])
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: .*download it again"):
            read_tensors(tiny.path)

    @pytest.mark.parametrize(
        ("content", "message"), [([1, 2], "holds a list"), ({"step": 3}, "holds no tensors by name")]
    )
    def test_a_pickle_without_tensors_is_named(tiny: Folder, content: object, message: str) -> None:
        file = as_pickle(tiny)
        torch.save(content, file)
        with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin: {message}"):
            read_tensors(tiny.path)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.float8_e4m3fn])
    def test_types_that_are_not_weights_are_named(tiny: Folder, dtype: Any) -> None:
        as_pickle(tiny, nest=lambda state: {**state, "ln_post.bias": state["ln_post.bias"].to(dtype)})
        with pytest.raises(CheckpointError, match=r"ln_post\.bias"):
            open_checkpoint(tiny.path)

    def test_a_missing_shard_is_named(tiny: Folder) -> None:
        as_pickle(tiny).unlink()
        index = {"weight_map": {"ln_post.bias": "pytorch_model-00001-of-00002.bin"}}
        (tiny.path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=r"pytorch_model-00001-of-00002\.bin: no such file"):
            read_tensors(tiny.path)

    def test_a_full_disk_while_pickling(tiny: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Full(io.BytesIO):
            def write(self, data: Any) -> int:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(writing, "write_pickle", lambda file, tensors: pickles.write_pickle(Full(), tensors))
        before = listing(tmp_path)
        with pytest.raises(DiskFullError, match="out: the disk is full"):
            export(tiny.path, tmp_path / "out", "bin")
        assert listing(tmp_path) == before
