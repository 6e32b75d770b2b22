"""Which layers are packed, how, and that sizes on disk are the computed ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from genlip_mlx.checkpoint import quantization
from genlip_mlx.checkpoint.convert import convert, dequantize
from genlip_mlx.checkpoint.errors import CheckpointError
from genlip_mlx.checkpoint.lazy import DTYPES, LazyTensor
from genlip_mlx.checkpoint.names import PATCH_EMBEDDING, matrices
from genlip_mlx.checkpoint.quantization import (
    MODES,
    Packing,
    QuantizationError,
    choose,
    estimate_size,
    pack_codes,
    packings,
)
from genlip_mlx.checkpoint.reading import open_checkpoint
from genlip_mlx.config import PRESETS

from .conftest import Folder

PACKINGS = [
    Packing(group_size, bits, mode)
    for mode, (sizes, widths) in MODES.items()
    for group_size in sizes
    for bits in widths
]


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda p: f"{p.mode}-{p.bits}-{p.group_size}")
def test_packed_layouts_are_those_of_mlx(packing: Packing) -> None:
    weight = mx.random.normal((6, 256), key=mx.random.key(0)).astype(mx.bfloat16)
    parts = packing.pack(LazyTensor.of(weight))
    for part, (shape, dtype) in packing.layout((6, 256), mx.bfloat16).items():
        array = parts[part].read()
        assert (tuple(array.shape), array.dtype) == (shape, dtype) == (parts[part].shape, parts[part].dtype)
    plain = packing.unpack(parts, mx.float32)
    error = mx.abs(plain.read() - weight).mean().item()
    assert plain.shape == (6, 256)
    assert error < (2 ** (1 - packing.bits) if packing.mode == "affine" else 0.15)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Packing(64, 4)),
        ({"bits": 8}, Packing(64, 8)),
        ({"group_size": 32, "bits": 3}, Packing(32, 3)),
        ({"mode": "mxfp4"}, Packing(32, 4, "mxfp4")),
        ({"mode": "mxfp8"}, Packing(32, 8, "mxfp8")),
        ({"mode": "nvfp4"}, Packing(16, 4, "nvfp4")),
        ({"recipe": "mixed_4_8"}, Packing(64, 4)),
    ],
)
def test_what_is_left_out_is_mlx_s_default(options: dict[str, Any], expected: Packing) -> None:
    assert choose(**options).default == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 7}, "mode affine takes bits 2, 3, 4, 5, 6, 8, not 7"),
        ({"bits": 0}, "not 0"),
        ({"group_size": 16}, "mode affine takes group size 32, 64, 128, not 16"),
        ({"mode": "mxfp4", "bits": 8}, "mode mxfp4 takes bits 4, not 8"),
        ({"mode": "int4"}, "unknown quantization mode 'int4'; choose affine, mxfp4, mxfp8, nvfp4"),
        ({"recipe": "mixed_1_2"}, "unknown quantization recipe 'mixed_1_2'; choose mixed_4_8"),
        ({"recipe": "mixed_4_8", "bits": 4}, "recipe mixed_4_8 sets the bits itself"),
        ({"recipe": "mixed_4_8", "mode": "nvfp4"}, "recipe mixed_4_8 sets the bits itself"),
    ],
)
def test_bad_options_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        choose(**options)


def test_the_recipe_keeps_both_ends_at_8_bits() -> None:
    config = PRESETS["g16"]
    packings = quantization.packings(choose(recipe="mixed_4_8").apply(config))
    eight = {path for path, packing in packings.items() if packing.bits == 8}
    ends = {"embeddings", "in_proj", "proj", "lm_head"}
    ends |= {path for path in matrices(config) if path.startswith(("visual.layers.0.", "visual.layers.39."))}
    assert eight == ends
    assert {packing.bits for path, packing in packings.items() if path not in ends} == {4}
    assert set(packings) == set(matrices(config)) - {PATCH_EMBEDDING}


def test_layers_that_no_group_divides_stay_and_are_named(navit: Folder, tmp_path: Path) -> None:
    report = convert(navit.path, tmp_path / "out", quantization=choose(group_size=32))
    stored = open_checkpoint(tmp_path / "out")
    # D is 144: only what reads E = 96 or F = 128 numbers can be packed in groups of 32.
    assert set(report.unquantized.values()) == {144}
    assert "proj" in report.unquantized
    for path in report.unquantized:
        assert f"{path}.scales" not in stored.tensors
        assert stored.tensors[f"{path}.weight"].dtype == mx.float32
        assert stored.config.quantization is not None
        assert stored.config.quantization[path] is False
    packed = {"embeddings", "in_proj", "lm_head", "visual.layers.0.mlp.fc2", "visual.layers.1.mlp.fc2"}
    assert {name.removesuffix(".scales") for name in stored.tensors if name.endswith(".scales")} == packed


def test_a_group_that_divides_nothing_is_an_error(navit: Folder, tmp_path: Path) -> None:
    navit.rewrite(lambda tensors: None)
    config = dataclasses.replace(open_checkpoint(navit.path).config, vision_only=True, intermediate_size=100)
    with pytest.raises(QuantizationError, match="group size 128 divides no layer's width"):
        choose(group_size=128).apply(config)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [None, {}, {"bits": 8, "group_size": 32}, {"mode": "nvfp4"}, {"mode": "mxfp8"}, {"recipe": "mixed_4_8"}]
)
def test_sizes_on_disk_are_as_computed(
    tiny: Folder, tmp_path: Path, options: dict[str, Any] | None, dtype: str
) -> None:
    choice = None if options is None else choose(**options)
    report = convert(tiny.path, tmp_path / "out", dtype, choice)
    config = open_checkpoint(tmp_path / "out").config
    file = tmp_path / "out" / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert estimate_size(config, DTYPES[dtype]) == report.total_bytes == file.stat().st_size - header


def test_config_json_follows_mlx_lm(tiny: Folder, tmp_path: Path) -> None:
    """A default at the top, other layers by path; a layer without an entry is packed if it has scales."""
    convert(tiny.path, tmp_path / "out", quantization=choose(group_size=32, recipe="mixed_4_8"))
    out = Folder(tmp_path / "out")
    field = open_checkpoint(out.path).config.quantization
    assert field is not None
    assert (field["group_size"], field["bits"], field["mode"]) == (32, 4, "affine")
    assert field["lm_head"] == {"group_size": 32, "bits": 8, "mode": "affine"}
    assert field[PATCH_EMBEDDING] is False
    out.config(quantization={key: value for key, value in field.items() if value is not False})
    assert open_checkpoint(out.path).config.quantization == field


def test_a_quantization_field_that_does_not_fit_is_an_error(tiny: Folder, tmp_path: Path) -> None:
    convert(tiny.path, tmp_path / "out", quantization=choose())
    out = Folder(tmp_path / "out")
    for field, message in [
        (None, "is quantized, but config.json has no quantization field"),
        ("4bit", "quantization must be an object"),
        ({"bits": 4}, "quantization has no group_size"),
        ({"group_size": 64, "bits": 9}, "takes bits .* not 9"),
        ({"group_size": 64, "bits": 8}, r"embeddings\.weight \[448, 8\] instead of \[448, 16\]"),
    ]:
        out.config(quantization=field)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(out.path)


def test_an_unquantized_model_takes_a_stray_quantization_field_as_missing_tensors(tiny: Folder) -> None:
    tiny.config(quantization={"group_size": 64, "bits": 4, "embeddings": {"group_size": 64, "bits": 4}})
    with pytest.raises(CheckpointError, match=r"missing \(2\): embeddings\.scales, embeddings\.biases"):
        open_checkpoint(tiny.path)


@pytest.mark.parametrize("options", [{"bits": 8}, {"mode": "mxfp4"}])
def test_dequantize_undoes_the_packing(tiny: Folder, tmp_path: Path, options: dict[str, Any]) -> None:
    convert(tiny.path, tmp_path / "packed", "bfloat16", choose(**options))
    report = dequantize(tmp_path / "packed", tmp_path / "plain")
    assert report.dtype == "bfloat16"
    assert report.quantization is None
    plain, original = open_checkpoint(tmp_path / "plain"), open_checkpoint(tiny.path)
    assert plain.config == original.config
    for name, tensor in plain.tensors.items():
        assert tensor.dtype == mx.bfloat16
        before = original.tensors[name].read()
        assert mx.allclose(tensor.read().astype(mx.float32), before, rtol=0.02, atol=0.3 * mx.abs(before).max().item())


def test_dequantize_needs_a_quantized_model(tiny: Folder, tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match="tiny-224: is not quantized; to change its type use convert --dtype"):
        dequantize(tiny.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_are_packed_as_mlx_packs_them(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 64))
    packed = mx.array(pack_codes(codes, bits))
    ones, zeros = mx.ones((3, 1)), mx.zeros((3, 1))
    assert np.array_equal(mx.dequantize(packed, ones, zeros, 64, bits), codes)
    assert packed.dtype == mx.uint32


def test_layers_with_bits_of_their_own(tiny: Folder, tmp_path: Path) -> None:
    paths = packings(choose(group_size=32).apply(open_checkpoint(tiny.path).config))
    bits = dict.fromkeys(paths, 3) | {"lm_head": 5, "embeddings": 8}
    convert(tiny.path, tmp_path / "out", quantization=choose(group_size=32).with_bits(bits))
    config = open_checkpoint(tmp_path / "out").config
    assert {path: packing.bits for path, packing in packings(config).items()} == bits
    assert config.quantization is not None
    assert config.quantization["bits"] == 3
    assert {path for path, own in config.quantization.items() if isinstance(own, dict)} == {"lm_head", "embeddings"}
    assert (
        "affine, 3 bits, groups of 32; 1 layers at 5 bits; 1 layers at 8 bits"
        in (tmp_path / "out/README.md").read_text()
    )
