"""What `doctor` finds out, and that it does find what is wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import genlip_mlx  # first, since it loads OpenBLAS, which must come before mlx

# isort: split
import mlx.core as mx
import mlx.nn as nn
import pytest
import typer
from typer.testing import CliRunner

from genlip_mlx import blas
from genlip_mlx import doctor as library
from genlip_mlx.checkpoint.convert import convert
from genlip_mlx.checkpoint.errors import CheckpointError
from genlip_mlx.cli.doctor import doctor
from genlip_mlx.cli.info import info
from genlip_mlx.doctor import Device, Kernel, ModelProbe, Product

ON_GPU = mx.default_device().type == mx.DeviceType.gpu
METAL, CPU = Device("Metal", "Apple M9", None, 64, 48), Device("CPU", "some CPU", 2, 64, None)

app = typer.Typer()
for command in (info, doctor):
    app.command()(command)


@pytest.fixture
def broken(golden_dir: Path, tmp_path: Path) -> Path:
    """Golden cases whose tiny-224 turns its positions by other angles than the reference did."""
    copy = tmp_path / "golden"
    shutil.copytree(golden_dir, copy)
    path = copy / "tiny-224" / "config.json"
    path.write_text(path.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 5000.0'))
    return copy


def test_a_healthy_machine() -> None:
    steps: list[tuple[int, int]] = []
    report = library.examine(progress=lambda done, total: steps.append((done, total)))
    assert not report.failed
    status = {check.name: check.status for check in report.checks}
    assert status["golden tiny-224"] == status["golden tiny-navit"] == "ok"
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert report.versions["genlip-mlx"] == genlip_mlx.__version__
    assert {"python", "mlx", "mlx-lm", "numpy", "pillow", "tokenizers", "system"} <= report.versions.keys()
    assert report.device.name
    assert report.device.memory_bytes
    assert report.device.memory_bytes > 10**8
    assert all(product.gflops > 0 for product in report.products)
    if not ON_GPU:
        assert status["fused attention"] == "not applicable"
        assert report.device.backend == "CPU"


@pytest.mark.parametrize("case", ["tiny-224", "tiny-navit"])
def test_bfloat16_features(golden_dir: Path, case: str) -> None:
    parity = library.compare(golden_dir, case, on_gpu=True)
    assert parity.bfloat16_cosine is not None
    assert 0.9995 < parity.bfloat16_cosine < 1
    assert library.check_parity(parity).status == "ok"
    worse = dataclasses.replace(parity, bfloat16_cosine=0.99)
    assert library.check_parity(worse).status == "failed"
    assert "bfloat16 have cosine 0.9900 (at least 0.999)" in library.check_parity(worse).message


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_wrong_result_fails(broken: Path, on_gpu: bool) -> None:
    check = library.check_parity(library.compare(broken, "tiny-224", on_gpu))
    assert check.status == "failed"
    assert "features differ by" in check.message
    assert "logits differ by" in check.message
    assert "patches" not in check.message
    assert check.remedy is not None
    assert ("MLX_ENABLE_TF32=0" in check.remedy) == on_gpu


def test_other_pictures_fail_by_name(broken: Path) -> None:
    from PIL import Image

    (broken / "images" / "astronaut.jpg").unlink()
    Image.new("RGB", (300, 200), "red").save(broken / "images" / "astronaut.jpg")
    check = library.check_parity(library.compare(broken, "tiny-224", on_gpu=False))
    assert check.message.startswith("patches differ by")
    assert check.remedy is not None
    assert "pillow" in check.remedy


def test_another_caption_fails(golden_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "golden"
    shutil.copytree(golden_dir, copy)
    path = copy / "tiny-224" / "expected.json"
    expected = json.loads(path.read_text())
    expected["samples"][1]["greedy_ids"][5] += 1
    path.write_text(json.dumps(expected))
    for on_gpu in (False, True):
        parity = library.compare(copy, "tiny-224", on_gpu)
        assert parity.greedy_identical == 1
        assert parity.greedy_margin > parity.greedy_tolerance
        assert "1 of 2 captions identical" in library.check_parity(parity).message
        assert library.check_parity(parity).status == "failed"


def test_a_near_tie_passes_on_a_gpu(golden_dir: Path) -> None:
    parity = library.compare(golden_dir, "tiny-224", on_gpu=True)
    near = dataclasses.replace(parity, greedy_identical=1, greedy_margin=0.01)
    assert library.check_parity(near).status == "ok"
    assert library.check_parity(near).message.endswith("1 of 2 captions identical (the others part at a near tie)")
    nan = dataclasses.replace(parity, greedy_margin=math.nan)
    assert library.check_parity(nan).status == "failed"


def test_nan_fails() -> None:
    assert not library.Difference("features", math.nan, 1.0).within


@pytest.mark.parametrize("case", ["tiny-224", "tiny-navit"])
def test_tolerances_of_gpus_leave_room_for_tf32(golden_dir: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products whose inputs are rounded to 10 bits, as a GPU may do, pass there with room, and not on a CPU."""
    attention = mx.fast.scaled_dot_product_attention

    def rounded(x: mx.array) -> mx.array:
        bits = x.astype(mx.float32).view(mx.uint32) + 0x1000
        return (bits & mx.array(0xFFFFE000, mx.uint32)).view(mx.float32)

    def linear(self: nn.Linear, x: mx.array) -> mx.array:
        y = rounded(x) @ rounded(self.weight).T
        return y + self.bias if "bias" in self else y

    def attend(q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
        return attention(rounded(q), rounded(k), rounded(v), **options)

    monkeypatch.setattr(nn.Linear, "__call__", linear)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attend)
    parity = library.compare(golden_dir, case, on_gpu=True)
    assert parity.within
    for difference in parity.differences[1:]:
        assert library.CPU_TOLERANCES[difference.quantity] < difference.value < difference.tolerance / 2


def test_kernels_that_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = mx.fast.scaled_dot_product_attention

    def served(*arrays: mx.array, force_fused: bool, **options: Any) -> mx.array:
        assert force_fused
        return attention(*arrays, **options)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", served)
    kernels = library.try_kernels()
    assert {kernel.result for kernel in kernels} == {"ok"}
    assert {kernel.head_dim for kernel in kernels} == {64, 72, 80, 96, 128}
    assert {kernel.width for kernel in kernels if kernel.use == "decode"} == {64, 96, 128}
    assert library.check_kernels(METAL, kernels).status == "ok"


def test_kernels_that_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
        if q.shape[-1] == 80:
            raise RuntimeError("no such kernel in the library")
        return q * 2

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", wrong)
    kernels = library.try_kernels()
    assert {kernel.result for kernel in kernels} == {"wrong"}
    check = library.check_kernels(METAL, kernels)
    assert check.status == "failed"
    assert "encode at head dim 64 with mask none" in check.message


def test_kernels_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arrays: mx.array, **options: Any) -> mx.array:
        raise ValueError("force_fused=True but no fused kernel is available")

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", missing)
    kernels = library.try_kernels()
    assert {kernel.result for kernel in kernels} == {"not served"}
    assert library.check_kernels(METAL, kernels).status == "warning"
    assert library.check_kernels(dataclasses.replace(METAL, backend="CUDA"), kernels).status == "ok"
    assert library.check_kernels(CPU, ()).status == "not applicable"


def test_a_slow_blas_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(blas, "loaded", None)
    check = library.check_products(CPU, (Product("float32", 1024, 5.6),))
    assert check.status == "warning"
    assert check.message == "6 GFLOP/s in float32 (1024 x 1024): slow"
    assert check.remedy is not None
    assert "apt-get install libopenblas0-pthread" in check.remedy
    assert "GENLIP_MLX_BLAS" in check.remedy
    assert "OpenBLAS was not loaded" in library.describe_blas()
    assert library.check_products(CPU, (Product("float32", 1024, 50.0),)).status == "ok"
    monkeypatch.setattr(blas, "loaded", "libopenblas.so.0")
    assert library.check_products(CPU, (Product("float32", 1024, 5.6),)).status == "ok"
    assert library.describe_blas().startswith("OpenBLAS (libopenblas.so.0)")
    monkeypatch.setattr("sys.platform", "darwin")
    assert library.describe_blas() == "Accelerate"


def test_a_model_of_ones_own(golden_dir: Path, tmp_path: Path) -> None:
    probe = library.probe_model(golden_dir / "tiny-navit")
    assert probe.finite
    assert probe.image_tokens == 196
    assert probe.tokens_per_second is not None
    convert(golden_dir / "tiny-navit", tmp_path / "encoder", vision_only=True)
    assert library.probe_model(tmp_path / "encoder").tokens_per_second is None


def test_a_model_without_finite_numbers_fails() -> None:
    check = library.check_model(ModelProbe("m", "float16", 1.0, 196, 0.1, 9.0, finite=False))
    assert check.status == "failed"
    assert check.message == "m: features or logits are not finite numbers"


def test_a_missing_model_is_told_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "measure_products", lambda on_gpu: pytest.fail("measured before the model was found"))
    result = CliRunner().invoke(app, ["doctor", "--model", str(tmp_path / "missing")])
    assert isinstance(result.exception, CheckpointError)


def test_printed(golden_dir: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", "--model", str(golden_dir / "tiny-224")])
    assert result.exit_code == 0, result.output
    rows = [" ".join(line.split()) for line in result.output.splitlines()]
    assert any(row.startswith("device ") for row in rows)
    assert "tiny-224 tiny-navit at most" in rows
    assert "same captions 2 of 2 3 of 3" in rows or ON_GPU
    assert any(row.startswith("ok golden tiny-224 as the reference computes; ") for row in rows)
    assert any(row.startswith("ok model ") and "196 image tokens encoded in" in row for row in rows)


def test_printed_for_a_gpu(golden_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tuple(Kernel(dim, use, mask, dim, "ok", 0.0) for dim in (64, 72) for use, mask in library.CALLS)
    monkeypatch.setattr(library, "find_device", lambda: METAL)
    monkeypatch.setattr(library, "measure_products", lambda on_gpu: (Product("float32", 4096, 3000.0),))
    monkeypatch.setattr(library, "try_kernels", lambda: table)
    rows = [" ".join(line.split()) for line in CliRunner().invoke(app, ["doctor"]).output.splitlines()]
    assert "device Metal: Apple M9, 64 B memory, 48 B for the GPU" in rows
    assert "head dim encode, none encode, causal encode, boolean decode, none decode, boolean" in rows
    assert "72 ok ok ok ok ok" in rows
    assert any(row.startswith("bfloat16 cosine 0.999") for row in rows)


def test_exit_code_and_json_of_a_failure(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "golden_folder", lambda: broken)
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["failed"] is True
    assert {check["name"]: check["status"] for check in found["checks"]}["golden tiny-224"] == "failed"
    assert {check["name"]: check["status"] for check in found["checks"]}["golden tiny-navit"] == "ok"


def test_json_has_no_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    report = library.examine()
    parity = report.golden[0]
    nan = dataclasses.replace(parity, differences=(library.Difference("features", math.nan, 1.0),))
    report = dataclasses.replace(report, golden=(nan,), checks=(library.check_parity(nan),))
    monkeypatch.setattr(library, "examine", lambda model, progress: report)
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["golden"][0]["differences"][0]["value"] is None
    assert "NaN" not in result.stdout


def test_without_golden_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "golden_folder", lambda: None)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert "the reference's results are not installed" in result.output
    assert "-> install genlip-mlx again" in result.output
