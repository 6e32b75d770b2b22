"""What `info` says of a model, against the files themselves and what the model really allots."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from genlip_mlx.checkpoint.convert import convert
from genlip_mlx.checkpoint.errors import CheckpointError
from genlip_mlx.checkpoint.load import load
from genlip_mlx.checkpoint.quantization import choose
from genlip_mlx.checkpoint.reading import open_checkpoint
from genlip_mlx.cli.doctor import doctor
from genlip_mlx.cli.info import info
from genlip_mlx.config import PRESETS, ConfigError
from genlip_mlx.info import ModelInfo, cache_bytes, describe_model, fused_attention, weight_memory

app = typer.Typer()
for command in (info, doctor):
    app.command()(command)


def parts(model: ModelInfo) -> dict[str, tuple[int, int]]:
    return {part.name: (part.parameters, part.stored_bytes) for part in model.parts}


def memory(model: ModelInfo) -> dict[str, tuple[int, int]]:
    return {row.precision: (row.model_bytes, row.encoder_bytes) for row in model.memory}


@pytest.mark.parametrize("case", ["tiny-224", "tiny-navit"])
def test_parts_add_up_to_the_tensors(golden_dir: Path, case: str) -> None:
    model = describe_model(golden_dir / case)
    tensors = open_checkpoint(golden_dir / case).tensors
    found = parts(model)
    assert found["total"][0] == sum(int(np.prod(tensor.shape)) for tensor in tensors.values())
    assert found["total"][1] == sum(tensor.nbytes for tensor in tensors.values())
    for column in (0, 1):
        assert found["encoder"][column] == found["patch_embedding"][column] + found["trunk"][column]
        rest = found["text_embedding"][column] + found["head"][column]
        assert found["total"][column] == found["encoder"][column] + rest
    assert model.dtype == "float32"
    assert memory(model)["float32"] == (found["total"][1], found["encoder"][1])
    assert memory(model)["bfloat16"] == (found["total"][1] // 2, found["encoder"][1] // 2)
    assert model.disk_bytes == sum(path.stat().st_size for path in (golden_dir / case).iterdir())
    assert model.quantized is None


def test_reads_no_weights(golden_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str) -> None:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(mx, "load", load)
    assert describe_model(golden_dir / "tiny-navit").parts


def test_token_range(golden_dir: Path) -> None:
    fixed = describe_model(golden_dir / "tiny-224").image_tokens
    assert (fixed.native, fixed.min_tokens, fixed.max_tokens) == (False, 196, 196)
    native = describe_model(golden_dir / "tiny-navit").image_tokens
    assert (native.native, native.min_tokens, native.max_tokens) == (True, 16, 1024)


def test_fused_attention() -> None:
    served = {dim: (fused_attention(dim).encoding, fused_attention(dim).decoding) for dim in (32, 64, 72, 96, 256)}
    assert served == {32: (False, True), 64: (True, True), 72: (True, True), 96: (True, True), 256: (False, False)}
    assert fused_attention(72).cached_dim == 96


def test_cache_is_what_the_model_allots(golden_dir: Path) -> None:
    model, _ = load(golden_dir / "tiny-navit", "float32")
    for grid, texts in (((14, 14), [6, 1]), ((14, 14), [6, 1, 300]), ((16, 16), [2]), ((2, 3), [])):
        patches = mx.zeros((grid[0] * grid[1], model.config.patch_dim))
        _, cache = model.prefill(patches, [grid])
        for tokens in texts:
            model.extend(mx.zeros((1, tokens), mx.int32), cache)
        allotted = sum(keys.nbytes + values.nbytes for keys, values in cache.layers)
        assert cache_bytes(model.config, grid[0] * grid[1], sum(texts), mx.float32) == allotted


def test_a_quantized_model(golden_dir: Path, tmp_path: Path) -> None:
    convert(golden_dir / "tiny-224", tmp_path / "q8", dtype="bfloat16", quantization=choose(bits=8))
    model = describe_model(tmp_path / "q8")
    assert model.quantized is not None
    assert (model.quantized.bits, model.quantized.group_size, model.quantized.mode) == (8, 64, "affine")
    # Two blocks of q, k, v, out, fc1, gate_fc; the embedding and the head. fc2 is 96 wide.
    assert model.quantized.layers_by_bits == {8: 14}
    assert model.quantized.unquantized == {
        "vision_embeddings.patch_embedding": 768,
        "visual.layers.0.mlp.fc2": 96,
        "visual.layers.1.mlp.fc2": 96,
    }
    stored, parameters = parts(model)["total"][1], parts(model)["total"][0]
    assert model.quantized.bits_per_weight == pytest.approx(8 * stored / parameters)
    # What was estimated for the original is what came out.
    original = describe_model(golden_dir / "tiny-224")
    assert memory(original)["8 bits"][0] == stored
    assert memory(model) == memory(original)


def test_mixed_bits(golden_dir: Path, tmp_path: Path) -> None:
    convert(golden_dir / "tiny-224", tmp_path / "mixed", quantization=choose(recipe="mixed_4_8"))
    model = describe_model(tmp_path / "mixed")
    assert model.quantized is not None
    assert (model.quantized.bits, model.quantized.layers_by_bits) == (4, {8: 14})


def test_a_vision_only_model(golden_dir: Path, tmp_path: Path) -> None:
    convert(golden_dir / "tiny-navit", tmp_path / "encoder", vision_only=True)
    model = describe_model(tmp_path / "encoder")
    assert (
        parts(model)["total"] == parts(model)["encoder"] == parts(describe_model(golden_dir / "tiny-navit"))["encoder"]
    )
    assert all(row.model_bytes == row.encoder_bytes for row in model.memory)
    assert model.cache is None


def test_a_model_that_no_group_fits(golden_dir: Path) -> None:
    config = open_checkpoint(golden_dir / "tiny-navit").config
    odd = type(config)(hidden_size=144, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    rows = {row.precision: row.model_bytes for row in weight_memory(odd)}
    assert rows["8 bits"] == rows["4 bits"] == rows["bfloat16"]


def test_published_sizes() -> None:
    whole = {row.precision: row.model_bytes for row in weight_memory(PRESETS["So16"])}
    assert whole["float32"] == 4 * 817_301_376
    assert whole["4 bits"] == pytest.approx(817_301_376 * 4.5 / 8, rel=0.01)


@pytest.mark.parametrize(
    ("build", "error"),
    [
        (lambda folder: None, CheckpointError),
        (lambda folder: folder.mkdir(), ConfigError),
        (lambda folder: (folder.mkdir(), (folder / "config.json").write_text('{"model_type": "bert"}')), ValueError),
    ],
    ids=["no folder", "no config", "another model"],
)
def test_errors_name_the_folder(tmp_path: Path, build: Callable[[Path], object], error: type[Exception]) -> None:
    build(tmp_path / "missing")
    result = CliRunner().invoke(app, ["info", "--model", str(tmp_path / "missing")])
    assert isinstance(result.exception, error)
    assert str(tmp_path / "missing") in str(result.exception)


def test_a_model_without_preprocessor(golden_dir: Path, tmp_path: Path) -> None:
    for path in (golden_dir / "tiny-224").iterdir():
        if path.name != "preprocessor_config.json":
            (tmp_path / path.name).symlink_to(path.resolve())
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json: no such file"):
        describe_model(tmp_path)


def test_printed(golden_dir: Path) -> None:
    result = CliRunner().invoke(app, ["info", "--model", str(golden_dir / "tiny-navit")])
    assert result.exit_code == 0, result.output
    rows = [" ".join(line.split()) for line in result.output.splitlines()]
    assert "pictures 16 to 1024 tokens, aspect ratio kept; a token is 16 x 16 pixels" in rows
    assert "Weights parameters stored" in rows
    assert "= encoder 432,944 1.7 MB" in rows
    assert "bfloat16 1.1 MB 865.9 kB" in rows
    assert "captioning yes: head dim 72, stored 96 wide" in rows
    assert all(len(line) <= 110 for line in result.output.splitlines() if str(golden_dir) not in line)


def test_printed_quantized_and_vision_only(golden_dir: Path, tmp_path: Path) -> None:
    convert(golden_dir / "tiny-224", tmp_path / "q", quantization=choose(bits=4, group_size=32), vision_only=True)
    result = CliRunner().invoke(app, ["info", "--model", str(tmp_path / "q")])
    rows = [" ".join(line.split()) for line in result.output.splitlines()]
    assert "not quantized vision_embeddings.patch_embedding (width 768)" in rows
    assert "layers by bits 14 at 4" in rows
    assert "text none: a vision-only model, for features" in rows
    assert not any("captioning" in row for row in rows)


def test_json(golden_dir: Path) -> None:
    result = CliRunner().invoke(app, ["info", "--model", str(golden_dir / "tiny-navit"), "--json"])
    found = json.loads(result.output)
    assert found["config"]["text_embed_dim"] == 96
    assert found["parts"][-1] == {"name": "total", "parameters": 546_848, "stored_bytes": 2_187_392}
    assert found["cache"]["prompt_tokens"] == 6
    assert found["fused_attention"] == {"head_dim": 72, "encoding": True, "cached_dim": 96, "decoding": True}
