"""Rounding by data, prices of layers, distillation, and the folder that calibration writes."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from genlip_mlx.checkpoint.convert import convert, quantize
from genlip_mlx.checkpoint.errors import DiskFullError
from genlip_mlx.checkpoint.load import load, load_model
from genlip_mlx.checkpoint.quantization import Packing, QuantizationError, choose, packings
from genlip_mlx.checkpoint.reading import open_checkpoint
from genlip_mlx.data.packing import Pack
from genlip_mlx.data.pipeline import DataError, Pipeline
from genlip_mlx.data.sources import open_source
from genlip_mlx.model.genlip import GenLIP
from genlip_mlx.train import calibrate as calibrating
from genlip_mlx.train import distillation
from genlip_mlx.train.calibrate import Calibration, Outcome, calibrate
from genlip_mlx.train.distillation import Divergence, Rows, distil, divergence, layer_at, make_student
from genlip_mlx.train.objective import Batch
from genlip_mlx.train.rounding import round_layers, round_weight
from genlip_mlx.train.sensitivity import rounding_costs, spend

FOUR = Packing(32, 4)


def dequantized(parts: dict[str, mx.array], packing: Packing) -> mx.array:
    return mx.dequantize(*(parts[name] for name in packing.parts), packing.group_size, packing.bits)


@pytest.fixture(scope="module")
def folder(golden_dir: Path) -> Path:
    return golden_dir / "tiny-navit"


@pytest.fixture(scope="module")
def full(folder: Path) -> GenLIP:
    return load_model(folder, "float32")


@pytest.fixture(scope="module")
def data(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden samples of both kinds as a JSONL file."""
    samples = json.loads((golden_dir / "tiny-navit" / "expected.json").read_text())["samples"]
    file = tmp_path_factory.mktemp("data") / "captions.jsonl"
    images = (golden_dir / "images").absolute()
    lines = [{"image": str(images / s["image"]), "prompt": s["prompt"], "caption": s["caption"]} for s in samples]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def batches(folder: Path, data: Path) -> list[Batch]:
    _, processor = load(folder)
    with Pipeline(open_source(str(data)), processor, budget=1024, workers=0, epochs=1, shuffle=False) as packs:
        return [Batch.of(pack) for pack in packs]


@pytest.fixture(scope="module")
def packed(full: GenLIP) -> dict[str, Packing]:
    return packings(choose(4, 32).apply(full.config))


# --- Rounding ---


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_uncorrelated_inputs_are_rounded_plainly(bits: int) -> None:
    """Nothing can be made up for then, so the result is that of mx.quantize."""
    weight = mx.random.normal((5, 96), key=mx.random.key(bits))
    parts = round_weight(weight, mx.eye(96), Packing(32, bits), mx.float32)
    plain = dict(zip(("weight", "scales", "biases"), mx.quantize(weight, 32, bits)))
    for name in ("scales", "biases"):
        assert mx.array_equal(parts[name], plain[name])
    np.testing.assert_array_equal(parts["weight"], plain["weight"])


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_correlated_inputs_are_made_up_for(dtype: mx.Dtype) -> None:
    rng = np.random.default_rng(0)
    x = mx.array((rng.standard_normal((400, 8)) @ rng.standard_normal((8, 64))).astype(np.float32))
    x = x + 0.1 * mx.array(rng.standard_normal(x.shape).astype(np.float32))
    weight = mx.array(rng.standard_normal((20, 64)).astype(np.float32))
    plain = mx.dequantize(*mx.quantize(weight, 32, 4), 32, 4)
    parts = round_weight(weight, x.T @ x, FOUR, dtype)
    ours, theirs = (float(np.square(x @ (w - weight).T).sum()) for w in (dequantized(parts, FOUR), plain))
    assert ours < 0.3 * theirs
    assert mx.array_equal(parts["scales"].astype(dtype).astype(mx.float32), parts["scales"])


def test_dead_inputs_and_row_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = mx.random.normal((6, 32), key=mx.random.key(0)), mx.zeros((32, 32))
    whole = round_weight(weight, moment, FOUR, mx.float32)
    assert mx.isfinite(dequantized(whole, FOUR)).all().item()
    monkeypatch.setattr("genlip_mlx.train.rounding.CHUNK_WEIGHTS", 64)  # two rows at a time
    chunked = round_weight(weight, moment, FOUR, mx.float32)
    assert all(mx.array_equal(whole[name], chunked[name]) for name in whole)


def test_rounding_a_model_brings_it_nearer(full: GenLIP, batches: list[Batch], packed: dict[str, Packing]) -> None:
    student = make_student(full, choose(4, 32).apply(full.config), packed, mx.float32)
    plain = divergence(student, full, batches)
    round_layers(student, full, batches, packed, mx.float32)
    assert divergence(student, full, batches).total < 0.9 * plain.total


# --- The student ---


def test_a_student_is_the_quantized_model(
    folder: Path, full: GenLIP, batches: list[Batch], packed: dict[str, Packing], tmp_path: Path
) -> None:
    quantize(folder, tmp_path / "q", choose(4, 32))
    stored = load_model(tmp_path / "q", "float32")
    student = make_student(full, choose(4, 32).apply(full.config), packed, mx.float32)
    ours, theirs = Rows.of(student, batches[0]), Rows.of(stored, batches[0])
    np.testing.assert_allclose(ours.patches, theirs.patches, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ours.text, theirs.text, rtol=1e-4, atol=1e-4)
    trained = {name.rpartition(".")[2] for name, _ in tree_flatten(student.trainable_parameters())}
    assert trained == {"scales", "biases"}


def test_rows_are_features_and_outputs(full: GenLIP, batches: list[Batch]) -> None:
    batch = batches[0]
    rows = Rows.of(full, batch)
    outputs = full.outputs(batch.patches, batch.input_ids, batch.sequence)[batch.rows]
    np.testing.assert_allclose(rows.patches, full.encode(batch.patches, batch.sequence.grids), atol=1e-5)
    np.testing.assert_allclose(rows.text, outputs, atol=1e-5)


def test_divergence(
    full: GenLIP, batches: list[Batch], packed: dict[str, Packing], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert divergence(full, full, batches).total == pytest.approx(0, abs=1e-6)
    student = make_student(full, choose(4, 32).apply(full.config), packed, mx.float32)
    found = divergence(student, full, batches[:1])
    expected, ours = Rows.of(full, batches[0]), Rows.of(student, batches[0])
    p, q = (nn.log_softmax(m.logits(r.text), axis=-1) for m, r in ((full, expected), (student, ours)))
    assert found.kl == pytest.approx((mx.exp(p) * (p - q)).sum(-1).mean().item(), rel=1e-3)
    error = mx.square(ours.patches - expected.patches).sum(-1) / mx.square(expected.patches).sum(-1)
    assert found.feature_error == pytest.approx(error.mean().item(), rel=1e-4)
    monkeypatch.setattr(distillation, "CHUNK_LOGITS", 7 * full.config.vocab_size)
    assert divergence(student, full, batches[:1]).kl == pytest.approx(found.kl, rel=1e-4)


def test_distillation_learns(full: GenLIP, batches: list[Batch], packed: dict[str, Packing]) -> None:
    student = make_student(full, choose(4, 32).apply(full.config), packed, mx.bfloat16)
    before, codes = divergence(student, full, batches), layer_at(student, "lm_head").weight
    distil(student, full, iter(batches * 12), packed, mx.bfloat16, iters=12, learning_rate=0.03)
    assert divergence(student, full, batches).total < 0.8 * before.total
    head = layer_at(student, "lm_head")
    assert mx.array_equal(head.weight, codes)
    for part in (head.scales, head.biases):  # as they will be stored
        assert mx.array_equal(part, part.astype(mx.bfloat16).astype(mx.float32))


# --- Prices and budgets ---


def test_prices_of_layers(full: GenLIP, batches: list[Batch], packed: dict[str, Packing]) -> None:
    """The price of a layer against what rounding it alone does."""
    ladder = [Packing(32, 3), Packing(32, 4)]
    costs = rounding_costs(full, batches * 3, dict.fromkeys(packed, ladder))
    assert set(costs) == set(packed)
    assert all(own[ladder[0]] > own[ladder[1]] > 0 for own in costs.values())
    estimated, measured = [], []
    for path in packed:
        only = {path: ladder[0]}
        config = choose(3, 32).apply(full.config)
        measured.append(divergence(make_student(full, config, only, mx.float32), full, batches).total)
        estimated.append(costs[path][ladder[0]])
    ratio = np.log(np.array(estimated) / np.array(measured))
    assert max(measured) > 4 * min(measured)
    assert np.abs(ratio).max() < math.log(1.5)


def test_spending_a_budget() -> None:
    three, four, eight = (Packing(64, bits) for bits in (3, 4, 8))
    costs = {"a": {three: 9.0, four: 1.0, eight: 0.9}, "b": {three: 0.5, four: 0.1, eight: 0.0}}

    def nbytes(path: str, packing: Packing) -> int:
        return packing.bits

    assert spend(costs, nbytes, 6) == {"a": three, "b": three}
    assert spend(costs, nbytes, 7) == {"a": four, "b": three}
    assert spend(costs, nbytes, 8) == {"a": four, "b": four}
    assert spend(costs, nbytes, 100) == {"a": eight, "b": eight}


# --- The whole ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_calibrated_folder(folder: Path, data: Path, tmp_path: Path, dtype: str) -> None:
    convert(folder, tmp_path / "full", dtype=dtype)
    steps: list[tuple[str, float, float]] = []
    report, outcome = calibrate(
        tmp_path / "full",
        tmp_path / "q",
        choose(4, 32),
        Calibration(str(data), iters=6, batch_tokens=1024, learning_rate=0.02),
        advance=lambda *step: steps.append(step),
    )
    assert outcome.best.total < 0.8 * outcome.plain.total
    assert {name for name, _, _ in steps} == {"rounding", "distilling"}
    assert steps[-1] == ("distilling", 6, 6)
    plain = quantize(tmp_path / "full", tmp_path / "plain", choose(4, 32))
    assert dataclasses.replace(report, folder=plain.folder) == plain
    stored, source = open_checkpoint(tmp_path / "q"), open_checkpoint(tmp_path / "full")
    assert stored.config == open_checkpoint(tmp_path / "plain").config
    for name in ("ln_post.weight", "visual.layers.0.layer_norm1.bias", "proj.weight"):  # as they were
        assert mx.array_equal(stored.tensors[name].read(), source.tensors[name].read())
    model, processor = load(tmp_path / "q", "float32")
    with Pipeline(open_source(str(data)), processor, budget=1024, workers=0, epochs=1) as packs:
        found = divergence(model, load_model(tmp_path / "full", "float32"), [Batch.of(pack) for pack in packs])
    assert found.total < outcome.plain.total


def test_a_target(golden_dir: Path, data: Path, tmp_path: Path) -> None:
    settings = Calibration(str(data), iters=1, batch_tokens=1024, target_bpw=14)
    report, _ = calibrate(golden_dir / "tiny-224", tmp_path / "q", choose(group_size=32), settings)
    assert 13.9 < report.bits_per_weight <= 14
    model, _ = load(tmp_path / "q")
    assert len({packing.bits for packing in packings(model.config).values()}) > 1


def test_the_best_step_is_kept() -> None:
    nothing, good, plain = Divergence(math.nan, 0.1), Divergence(0.1, 0.1), Divergence(0.2, 0.2)
    assert Outcome(plain, good, nothing).best is good
    assert Outcome(good, plain, nothing).best is good


def test_a_pack_without_labels_is_passed_over(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = Batch.of, 0

    def every_other(pack: Pack, slack: float = 0.0) -> Batch:
        nonlocal seen
        seen += 1
        labels = np.full_like(pack.labels, -100) if seen % 2 else pack.labels
        return real(dataclasses.replace(pack, labels=labels), slack)

    monkeypatch.setattr(calibrating.Batch, "of", every_other)
    _, outcome = calibrate(folder, tmp_path / "q", choose(4, 32), Calibration(str(data), 1, batch_tokens=1024))
    assert math.isfinite(outcome.best.total)


def refused(error: type[Exception], message: str, target: Path, *arguments: Any) -> None:
    with pytest.raises(error, match=message):
        calibrate(arguments[0], target / "q", *arguments[1:])
    assert not list(target.iterdir())


def test_refusals(folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, settings = tmp_path / "out", Calibration(str(data), 1, batch_tokens=1024)
    target.mkdir()
    four = choose(4, 32)
    refused(
        QuantizationError,
        "quantization mode mxfp4 does not have; choose affine",
        target,
        folder,
        choose(mode="mxfp4"),
        settings,
    )
    convert(folder, tmp_path / "encoder", vision_only=True)
    refused(
        QuantizationError,
        "encoder: is vision-only, and calibration needs its text side",
        target,
        tmp_path / "encoder",
        four,
        settings,
    )
    quantize(folder, tmp_path / "packed", four)
    refused(QuantizationError, "packed: is quantized already", target, tmp_path / "packed", four, settings)
    for bpw in (2.0, 33.0, math.nan):
        wish = dataclasses.replace(settings, target_bpw=bpw)
        refused(
            QuantizationError,
            r"is out of reach: .* this model takes \d+\.\d\d to \d+\.\d\d bits",
            target,
            folder,
            four,
            wish,
        )
    silent = tmp_path / "silent.jsonl"
    silent.write_text(json.dumps({"image": "a.jpg"}) + "\n")
    refused(ValueError, "silent.jsonl", target, folder, four, dataclasses.replace(settings, data=str(silent)))
    gone = dataclasses.replace(settings, data=str(tmp_path / "no.jsonl"))
    refused(ValueError, "no.jsonl", target, folder, four, gone)
    small = type("Usage", (), {"free": 10})
    monkeypatch.setattr(calibrating.shutil, "disk_usage", lambda path: small)
    refused(
        DiskFullError,
        "q: needs .* MB, and the disk has 0.0 MB left; nothing was changed",
        target,
        folder,
        four,
        settings,
    )
    assert issubclass(DataError, ValueError)
