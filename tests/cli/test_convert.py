"""`convert`, `quantize`, `dequantize`, `export` as commands; what they write is tested in tests/checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import Golden

from genlip_mlx.checkpoint.load import load
from genlip_mlx.cli import console

from .conftest import Call


def test_convert_says_what_it_wrote(case: Golden, tmp_path: Path, call: Call) -> None:
    outcome = call("convert", "--hf-path", case.folder, "--mlx-path", tmp_path / "m")
    megabytes = {"tiny-224": "0.2 M parameters, 745.7 kB", "tiny-navit": "0.5 M parameters, 2.2 MB"}
    assert outcome.code == 0
    assert outcome.out == f"{tmp_path / 'm'}: {megabytes[case.folder.name]}, float32\n"
    assert outcome.err == ""


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_convert_to_another_type(golden_dir: Path, tmp_path: Path, call: Call, dtype: str) -> None:
    outcome = call("convert", "--hf-path", golden_dir / "tiny-224", "--mlx-path", tmp_path / "m", "--dtype", dtype)
    assert outcome.code == 0
    assert outcome.out.endswith(f", {dtype}\n")
    weights = mx.load(str(tmp_path / "m" / "model.safetensors"))
    assert isinstance(weights, dict)
    assert {str(weight.dtype) for weight in weights.values()} == {f"mlx.core.{dtype}"}


def test_convert_quantizes_in_the_same_pass(golden_dir: Path, tmp_path: Path, call: Call) -> None:
    source, target = golden_dir / "tiny-224", tmp_path / "m"
    outcome = call("convert", "--hf-path", source, "--mlx-path", target, "-q", "--q-bits", "8", "--q-group-size", "32")
    assert outcome.code == 0
    assert "quantized to 1" in outcome.out  # 8 bits, and the scales of small layers
    config = json.loads((target / "config.json").read_text())
    assert config["quantization"]["bits"] == 8
    assert config["quantization"]["group_size"] == 32
    load(target)


def test_layers_that_stay_unquantized_are_named(golden_dir: Path, tmp_path: Path, call: Call) -> None:
    outcome = call("convert", "--hf-path", golden_dir / "tiny-navit", "--mlx-path", tmp_path / "m", "-q")
    assert outcome.code == 0
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith("left unquantized, as the group size does not divide their width: embeddings (96), ")
    assert "visual.layers.0.mlp.fc1 (144)" in outcome.err
    assert "fc2" not in outcome.err


def test_convert_leaves_out_the_text_side(golden_dir: Path, tmp_path: Path, call: Call) -> None:
    target = tmp_path / "m"
    outcome = call("convert", "--hf-path", golden_dir / "tiny-navit", "--mlx-path", target, "--vision-only")
    assert outcome.code == 0
    assert not (target / "tokenizer.json").exists()
    assert json.loads((target / "config.json").read_text())["vision_only"] is True


def test_quantize_dequantize_export(converted: dict[str, Path], tmp_path: Path, call: Call) -> None:
    packed, plain, published = tmp_path / "packed", tmp_path / "plain", tmp_path / "published"
    assert (
        call("quantize", "--model", converted["tiny-224"], "--mlx-path", packed, "--quant-recipe", "mixed_4_8").code
        == 0
    )
    assert call("dequantize", "--model", packed, "--mlx-path", plain).code == 0
    outcome = call("export", "--model", plain, "--hf-path", published)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(f"{published}: 0.2 M parameters")
    load(published)


def test_progress_in_plain_lines(golden_dir: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "PLAIN_INTERVAL", 0.0)
    outcome = call("convert", "--hf-path", golden_dir / "tiny-224", "--mlx-path", tmp_path / "m")
    lines = outcome.err.splitlines()
    assert all(line.startswith("converting: ") for line in lines)
    assert lines[-1] == "converting: 745728 of 745728 bytes (100%)"


def test_quantization_options_need_quantize(golden_dir: Path, tmp_path: Path, call: Call) -> None:
    outcome = call("convert", "--hf-path", golden_dir / "tiny-224", "--mlx-path", tmp_path / "m", "--q-bits", "4")
    assert outcome.code == 2
    assert "quantization options need --quantize (-q)" in outcome.error
    assert not list(tmp_path.iterdir())
