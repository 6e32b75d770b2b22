"""Whole folders: convert, quantize, export, and back."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from genlip_mlx.checkpoint import convert as module
from genlip_mlx.checkpoint.convert import convert, export, quantize
from genlip_mlx.checkpoint.errors import CheckpointError, HubError
from genlip_mlx.checkpoint.names import expected_shapes
from genlip_mlx.checkpoint.quantization import QuantizationError, choose
from genlip_mlx.checkpoint.reading import open_checkpoint

from .conftest import Folder, listing


@pytest.mark.parametrize("name", ["tiny", "navit"])
def test_convert_and_export_is_bit_exact(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder: Folder = request.getfixturevalue(name)
    report = convert(folder.path, tmp_path / "ours")
    assert report.dtype == "float32"
    assert report.bits_per_weight == 32
    export(tmp_path / "ours", tmp_path / "theirs")
    before, after = folder.tensors(), Folder(tmp_path / "theirs").tensors()
    assert set(before) == set(after)
    for tensor, array in before.items():
        assert after[tensor].dtype == array.dtype
        assert after[tensor].shape == array.shape
        assert after[tensor].tobytes() == array.tobytes()
    stated = json.loads((folder.path / "config.json").read_text())
    exported = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert stated.items() <= exported.items()
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json"):
        assert (tmp_path / "theirs" / file).read_bytes() == (folder.path / file).read_bytes()
    assert mx.load(str(tmp_path / "theirs" / "model.safetensors"), return_metadata=True)[1] == {"format": "pt"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_convert_casts_every_tensor(tiny: Folder, tmp_path: Path, dtype: str) -> None:
    report = convert(tiny.path, tmp_path / "out", dtype)
    assert report.dtype == dtype
    assert report.total_bytes == 2 * report.parameters
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype
    original = open_checkpoint(tiny.path).tensors
    for name, tensor in open_checkpoint(tmp_path / "out").tensors.items():
        assert mx.array_equal(tensor.read(), original[name].read().astype(getattr(mx, dtype)))
    again = convert(tmp_path / "out", tmp_path / "again")  # auto keeps the type
    assert again.dtype == dtype


def test_an_unknown_type_is_told(tiny: Folder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown dtype 'int8'; choose auto, float32, float16, bfloat16"):
        convert(tiny.path, tmp_path / "out", "int8")
    with pytest.raises(ValueError, match="unknown format 'onnx'; choose safetensors or bin"):
        export(tiny.path, tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("packed", [False, True])
def test_vision_only_leaves_the_text_side_out(navit: Folder, tmp_path: Path, packed: bool) -> None:
    choice = choose(group_size=32) if packed else None
    convert(navit.path, tmp_path / "direct", quantization=choice, vision_only=True)
    convert(navit.path, tmp_path / "whole", quantization=choice)
    convert(tmp_path / "whole", tmp_path / "later", vision_only=True)
    direct, later = open_checkpoint(tmp_path / "direct"), open_checkpoint(tmp_path / "later")
    assert direct.config.vision_only
    assert direct.config == later.config
    for name, tensor in direct.tensors.items():
        assert name.startswith(("vision_embeddings.", "visual.", "ln_post."))
        assert mx.array_equal(tensor.read(), later.tensors[name].read())
    assert set(expected_shapes(direct.config)) <= set(direct.tensors)
    assert sorted(path.name for path in (tmp_path / "direct").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    with pytest.raises(
        CheckpointError, match="is vision-only; the published layout needs" if not packed else "dequantize"
    ):
        export(tmp_path / "direct", tmp_path / "theirs")


def test_quantize_is_the_same_in_one_pass_or_two(tiny: Folder, tmp_path: Path) -> None:
    convert(tiny.path, tmp_path / "one", quantization=choose(bits=8))
    convert(tiny.path, tmp_path / "plain")
    report = quantize(tmp_path / "plain", tmp_path / "two", choose(bits=8))
    one, two = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "two")
    assert one.config == two.config
    assert report.quantization == one.config.quantization
    for name, tensor in one.tensors.items():
        assert mx.array_equal(tensor.read(), two.tensors[name].read())


def test_what_quantized_models_cannot_do_says_what_to_do(tiny: Folder, tmp_path: Path) -> None:
    convert(tiny.path, tmp_path / "packed", quantization=choose())
    before = listing(tmp_path)
    command = "genlip-mlx dequantize --model .*packed --mlx-path packed-plain"
    with pytest.raises(QuantizationError, match=f"is quantized already; start from the original.*{command}"):
        quantize(tmp_path / "packed", tmp_path / "out", choose(bits=8))
    with pytest.raises(CheckpointError, match=f"is quantized, which the published layout does not have.*{command}"):
        export(tmp_path / "packed", tmp_path / "out")
    assert listing(tmp_path) == before


def test_a_quantized_model_can_change_the_type_of_the_rest(tiny: Folder, tmp_path: Path) -> None:
    convert(tiny.path, tmp_path / "packed", quantization=choose())
    convert(tmp_path / "packed", tmp_path / "half", "float16")
    tensors = open_checkpoint(tmp_path / "half").tensors
    assert {tensor.dtype for tensor in tensors.values()} == {mx.uint32, mx.float16}


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("tokenizer.json", "tiny-224: no tokenizer; copy tokenizer.json from the published model"),
        ("preprocessor_config.json", "tiny-224: no preprocessor_config.json; copy it from the published model"),
        ("config.json", r"config\.json: no such file"),
        ("model.safetensors", "no weights"),
    ],
)
def test_a_missing_file_is_named_and_nothing_is_written(tiny: Folder, tmp_path: Path, file: str, message: str) -> None:
    (tiny.path / file).unlink()
    before = listing(tmp_path)
    with pytest.raises(ValueError, match=message):
        convert(tiny.path, tmp_path / "out")
    assert listing(tmp_path) == before


def test_damaged_sources_leave_nothing(tiny: Folder, tmp_path: Path) -> None:
    file = tiny.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    before = listing(tmp_path)
    with pytest.raises(CheckpointError, match="truncated"):
        convert(tiny.path, tmp_path / "out")
    tiny.config(hidden_size=128)
    with pytest.raises(CheckpointError):
        convert(tiny.path, tmp_path / "out")
    assert set(listing(tmp_path)) == set(before)


def test_the_card_tells_facts_and_no_places(navit: Folder, tmp_path: Path) -> None:
    convert(navit.path, tmp_path / "out", "bfloat16", choose(group_size=32, recipe="mixed_4_8"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: mlx\npipeline_tag: image-to-text\n")
    assert "Made from `tiny-navit`" in card
    assert str(tmp_path) not in card
    assert "base_model" not in card
    parameters = sum(int(np.prod(shape)) for shape in expected_shapes(open_checkpoint(navit.path).config).values())
    assert f"| parameters | {parameters:,} |" in card
    assert "| type | bfloat16 |" in card
    assert "affine, 4 bits, groups of 32; 5 layers at 8 bits" in card
    assert "13 layers" in card
    assert 'genlip_mlx.load("out")' in card
    assert "genlip-mlx caption photo.jpg --model out" in card


def test_the_card_of_an_encoder_does_not_promise_captions(navit: Folder, tmp_path: Path) -> None:
    convert(navit.path, tmp_path / "out", vision_only=True)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "caption" not in card
    assert "genlip_mlx.encode(" in card


def test_upload_comes_after_the_folder_is_whole(tiny: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = []

    def upload(folder: Path, repo: str) -> None:
        open_checkpoint(folder)
        uploads.append((folder, repo))

    monkeypatch.setattr(module, "upload", upload)
    monkeypatch.setattr(module, "check_upload", lambda repo: None)
    convert(tiny.path, tmp_path / "out", upload_repo="me/tiny")
    assert uploads == [(tmp_path / "out", "me/tiny")]
    assert 'load("me/tiny")' in (tmp_path / "out" / "README.md").read_text()


def test_a_hopeless_upload_is_told_before_the_work(tiny: Folder, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="tiny: not a hub repo id; expected owner/name"):
        convert(tiny.path, tmp_path / "out", upload_repo="tiny")
    assert not (tmp_path / "out").exists()
