"""genlip-mlx quantize --calibrate; plain quantization is in test_convert."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from genlip_mlx.checkpoint.load import load

from .conftest import Call


@pytest.fixture
def data(images_dir: Path, tmp_path: Path) -> Path:
    file = tmp_path / "captions.jsonl"
    names = ("astronaut.jpg", "page.png")
    lines = [{"image": str((images_dir / name).absolute()), "caption": f"what {name} shows"} for name in names]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_calibrate(call: Call, navit: Path, data: Path, tmp_path: Path) -> None:
    outcome = call(
        *("quantize", "--model", navit, "--mlx-path", tmp_path / "q", "--q-group-size", "32"),
        *("--calibrate", data, "--iters", "2", "--batch-tokens", "1024"),
    )
    assert outcome.code == 0
    assert outcome.out.startswith(f"{tmp_path / 'q'}: ")
    lines = outcome.err.splitlines()[-3:]
    assert [line.split("  ")[0] for line in lines] == ["plain rounding", "rounding by data", "distilled"]
    assert sum(line.endswith("(kept)") for line in lines) == 1
    load(tmp_path / "q")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("--target-bpw 5", 2, "--target-bpw needs captions to learn from: --calibrate"),
        ("--iters 5", 2, "--iters needs captions to learn from: --calibrate"),
        ("--calibrate {data} --iters 0", 2, "--iters"),
        ("--calibrate {data} --target-bpw 5 --q-bits 4", 2, "leave out --q-bits and --quant-recipe"),
        ("--calibrate {data} --q-mode nvfp4", 1, "choose affine, or leave out --calibrate"),
        ("--calibrate nowhere.jsonl", 1, "nowhere.jsonl"),
        ("--calibrate {data} --target-bpw 2 --q-group-size 32", 1, "--target-bpw 2 is out of reach"),
    ],
)
def test_errors(call: Call, navit: Path, data: Path, tmp_path: Path, options: str, code: int, message: str) -> None:
    words = [word.format(data=data) for word in options.split()]
    outcome = call("quantize", "--model", navit, "--mlx-path", tmp_path / "q", *words)
    assert (outcome.code, message in outcome.error) == (code, True), outcome.error
    assert list(tmp_path.iterdir()) == [data]


def test_a_vision_only_model(call: Call, vision_only: Path, data: Path, tmp_path: Path) -> None:
    outcome = call("quantize", "--model", vision_only, "--mlx-path", tmp_path / "q", "--calibrate", data)
    assert (outcome.code, "make an encoder of it with convert --vision-only" in outcome.error) == (1, True)
