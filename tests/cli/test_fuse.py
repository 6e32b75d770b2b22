"""genlip-mlx fuse: from an adapter to a model like any other, and what is refused."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from genlip_mlx.checkpoint import writing
from genlip_mlx.checkpoint.adapters import AdapterConfig, adapter_tensors, attach, write_adapters
from genlip_mlx.checkpoint.load import load_model

from .conftest import Call


@pytest.fixture
def place(
    call: Call, converted: dict[str, Path], images_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder to work in: `model`, `packed` (the same at 8 bits), `other`, `adapter`, `page.png`."""
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(converted["tiny-navit"])
    Path("other").symlink_to(converted["tiny-224"])
    Path("page.png").symlink_to(images_dir / "page.png")
    quantized = call("quantize", "--model", "model", "--mlx-path", "packed", "--q-bits", "8", "--q-group-size", "32")
    assert quantized.code == 0
    mx.random.seed(1)
    model, config = load_model(Path("model"), "float32"), AdapterConfig(rank=4, scale=2.0)
    attach(model, config)
    tensors = {name: 0.1 * mx.random.normal(value.shape) for name, value in adapter_tensors(model).items()}
    content = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": config.lora_parameters}
    write_adapters(Path("adapter"), tensors, content)
    return tmp_path


def spoken(call: Call, *words: str) -> list[int]:
    outcome = call("caption", "page.png", "--max-tokens", "16", "--json", *words)
    assert outcome.code == 0, outcome.err
    tokens: list[int] = json.loads(outcome.out)["tokens"]
    return tokens


@pytest.mark.parametrize(("base", "options"), [("model", []), ("packed", []), ("packed", ["--dequantize"])])
def test_a_fused_model_says_what_the_adapted_one_says(call: Call, place: Path, base: str, options: list[str]) -> None:
    expected = spoken(call, "--model", base, "--adapter-path", "adapter")
    assert expected != spoken(call, "--model", base)
    outcome = call("fuse", "--model", base, "--adapter-path", "adapter", "--mlx-path", "fused", *options)
    assert outcome.code == 0, outcome.err
    still_packed = base == "packed" and not options
    assert ("quantization" in json.loads(Path("fused/config.json").read_text())) == still_packed
    if not still_packed:  # quantized again, it is another model by a little
        assert spoken(call, "--model", "fused") == expected
        assert call("export", "--model", "fused", "--hf-path", "published").code == 0
        assert spoken(call, "--model", "published") == expected


def test_mlx_lms_name_of_the_destination(call: Call, place: Path) -> None:
    words = ("fuse", "--model", "model", "--adapter-path", "adapter", "--save-path", "fused")
    assert call(*words).code == 0
    assert "fused: exists already" in call(*words).error
    assert call(*words, "--overwrite").code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model other --adapter-path adapter --mlx-path out", "adapter: is for another model; wrong ("),
        ("--model model --adapter-path nothing --mlx-path out", "nothing: no adapter; there is no adapter_config.json"),
        ("--model nothing --adapter-path adapter --mlx-path out", "nothing: no such folder"),
        (
            "--model model --adapter-path adapter --mlx-path out --dequantize",
            "is not quantized; leave out --dequantize",
        ),
        ("--model model --adapter-path adapter --mlx-path page.png", "is a file; choose another name"),
    ],
)
def test_errors(call: Call, place: Path, words: str, message: str) -> None:
    outcome = call("fuse", *words.split())
    assert outcome.code == 1
    assert message in outcome.error
    assert not Path("out").exists()


def test_an_adapter_for_another_model_is_refused_by_name(call: Call, place: Path) -> None:
    outcome = call("caption", "page.png", "--model", "other", "--adapter-path", "adapter")
    assert outcome.code == 1
    assert "visual.layers.0.self_attn.q_proj.lora_a" in outcome.error


def test_a_full_disk(call: Call, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writing, "_sync", full)
    outcome = call("fuse", "--model", "model", "--adapter-path", "adapter", "--mlx-path", "out")
    assert outcome.code == 1
    assert "out: the disk is full; nothing was changed" in outcome.error
    assert not Path("out").exists()
