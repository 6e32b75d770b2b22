"""Files to lazy tensors: every source, and every way a file can be broken."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

from genlip_mlx.checkpoint.errors import CheckpointError
from genlip_mlx.checkpoint.reading import open_checkpoint, read_safetensors, read_tensors
from genlip_mlx.config import ConfigError

from .conftest import Folder


def rewrite_header(path: Path, change: dict[str, object]) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = {**json.loads(data[8 : 8 + length]), **change}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_one_file_and_shards_give_the_stored_numbers(tiny: Folder, navit: Folder) -> None:
    for folder in (tiny, navit):
        stored = folder.tensors()
        tensors = read_tensors(folder.path)
        assert set(tensors) == set(stored)
        for name, tensor in tensors.items():
            assert tensor.shape == stored[name].shape
            assert tensor.dtype == mx.float32
            assert np.array_equal(np.array(tensor.read()), stored[name])


def test_a_tensor_can_be_read_again(tiny: Folder) -> None:
    tensor = read_tensors(tiny.path)["ln_post.bias"]
    assert mx.array_equal(tensor.read(), tensor.read())


@pytest.mark.parametrize("prefix", ["model.", "module.", "_orig_mod.", "model._orig_mod.module.", "state_dict.model."])
def test_prefixes_are_stripped(tiny: Folder, prefix: str) -> None:
    names = set(tiny.tensors())

    def add_prefix(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    tiny.rewrite(add_prefix)
    assert set(read_tensors(tiny.path)) == names
    assert open_checkpoint(tiny.path).config.hidden_size == 64


def test_a_compiled_module_inside_is_unwrapped(tiny: Folder) -> None:
    def compile_trunk(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if name.startswith("visual.")]:
            tensors[name.replace("visual.", "visual._orig_mod.")] = tensors.pop(name)

    tiny.rewrite(compile_trunk)
    open_checkpoint(tiny.path)


def test_two_names_for_one_tensor_are_an_error(tiny: Folder) -> None:
    tiny.rewrite(lambda tensors: tensors.update({"model.ln_post.bias": tensors["ln_post.bias"]}))
    with pytest.raises(CheckpointError, match=r"ln_post\.bias and model\.ln_post\.bias are both ln_post\.bias"):
        read_tensors(tiny.path)


def test_the_rotary_buffer_is_ignored(tiny: Folder) -> None:
    buffers = {"visual.rotary_emb.inv_freq": np.ones(16, np.float32), "rotary_emb.inv_freq": np.ones(16, np.float32)}
    tiny.rewrite(lambda tensors: tensors.update(buffers))
    assert not [name for name in open_checkpoint(tiny.path).tensors if "rotary" in name]


def test_a_missing_config_is_named(tiny: Folder) -> None:
    (tiny.path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"tiny-224/config\.json: no such file; a model folder needs one"):
        open_checkpoint(tiny.path)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_broken_config_is_named(tiny: Folder, text: str) -> None:
    (tiny.path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"config\.json: (not valid JSON|expected a JSON object)"):
        open_checkpoint(tiny.path)


def test_another_architecture_is_refused(tiny: Folder) -> None:
    tiny.config(model_type="llama", architectures=["LlamaForCausalLM"])
    with pytest.raises(ConfigError, match=r"config\.json.*model_type is 'llama'.*'genlip' only"):
        open_checkpoint(tiny.path)
    tiny.config(model_type="genlip")
    with pytest.raises(ConfigError, match="unknown architecture LlamaForCausalLM"):
        open_checkpoint(tiny.path)


def test_no_weights(tiny: Folder) -> None:
    (tiny.path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"tiny-224: no weights; expected model\.safetensors"):
        read_tensors(tiny.path)


def test_one_file_of_another_name_will_do(tiny: Folder) -> None:
    file = tiny.path / "model.safetensors"
    file.rename(tiny.path / "genlip.safetensors")
    open_checkpoint(tiny.path)
    (tiny.path / "ema.safetensors").write_bytes((tiny.path / "genlip.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"which of ema\.safetensors, genlip\.safetensors holds the weights"):
        read_tensors(tiny.path)


def test_a_missing_shard_is_named(navit: Folder) -> None:
    (navit.path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: no such file.*download it again"):
        read_tensors(navit.path)


def test_an_index_cannot_point_elsewhere(navit: Folder) -> None:
    index = navit.path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"ln_post.bias": "../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"'\.\./secret\.safetensors' is not a file beside it"):
        read_tensors(navit.path)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        read_tensors(navit.path)


def test_a_tensor_in_two_shards_is_an_error(navit: Folder) -> None:
    shards = sorted(navit.path.glob("model-*.safetensors"))
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(CheckpointError, match="is also in model-00001-of-00002"):
        read_tensors(navit.path)


@pytest.mark.parametrize("kept", [0, 5, 8, 100, 5000, -1])
def test_a_truncated_file_is_named_before_mlx_sees_it(tiny: Folder, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tiny.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    monkeypatch.setattr(mx, "load", None)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*truncated.*download it again"):
        read_tensors(tiny.path)


def test_what_is_not_safetensors_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    for content, message in [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-lfs pointer"),
        (b"<!DOCTYPE html><html>", "not a safetensors file"),
        (struct.pack("<Q", 4) + b"nope", "its header is not JSON"),
        (struct.pack("<Q", 4) + b"[  ]", "its header is not a JSON object"),
    ]:
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{message}"):
            read_safetensors(file)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [64]},
        {"dtype": "F32", "shape": [64], "data_offsets": [0, 255]},
        {"dtype": "F32", "shape": [-64], "data_offsets": [256, 0]},
        {"dtype": "F32", "shape": ["64"], "data_offsets": [0, 256]},
        "text",
    ],
)
def test_a_header_that_contradicts_itself(tiny: Folder, entry: object) -> None:
    rewrite_header(tiny.path / "model.safetensors", {"ln_post.bias": entry})
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged: .*ln_post\.bias"):
        read_tensors(tiny.path)


def test_a_type_that_mlx_lacks_is_named(tiny: Folder) -> None:
    tensors: dict[str, np.ndarray] = {**tiny.tensors(), "ln_post.bias": np.zeros(64, np.float64)}
    save_file(tensors, tiny.path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"ln_post\.bias has type F64"):
        read_tensors(tiny.path)
