"""What can go wrong with a command: one line that says what and where, the right exit code, nothing half-written."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from genlip_mlx import files
from genlip_mlx.checkpoint import load as loading
from genlip_mlx.checkpoint import writing

from .conftest import Call, run


@pytest.fixture
def place(navit: Path, vision_only: Path, golden_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in: `model`, `encoder`, `source` (as published), `photo.jpg`, `photos/`, `text.jpg`."""
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(navit)
    Path("encoder").symlink_to(vision_only)
    Path("source").symlink_to((golden_dir / "tiny-224").absolute())
    Path("photos").symlink_to((golden_dir / "images").absolute())
    Path("photo.jpg").symlink_to((golden_dir / "images" / "astronaut.jpg").absolute())
    Path("empty").mkdir()
    Path("text.jpg").write_text("not a picture")
    return tmp_path


def failure(call: Call, command: str, place: Path) -> tuple[int, str]:
    """Exit code and message of a command that must fail, and leave nothing."""
    before = sorted(place.rglob("*"))
    outcome = call(*command.split())
    assert "Traceback" not in outcome.err
    message = outcome.error
    assert sorted(place.rglob("*")) == before
    return outcome.code, message


@pytest.mark.parametrize(
    ("command", "message"),
    [
        # Models
        ("caption photo.jpg --model nowhere", "nowhere: no such folder, and not a hub repo id (owner/name) either"),
        ("features photo.jpg --model nowhere --output o.npz", "nowhere: no such folder, and not a hub repo id"),
        ("caption photo.jpg --model empty", "empty/config.json: no such file; a model folder needs one"),
        ("caption photo.jpg --model photo.jpg", "photo.jpg: is a file; give the folder that holds it"),
        ("caption photo.jpg --model model --revision main", "model: a local folder has no revision 'main'"),
        (
            "caption photo.jpg --model encoder",
            "this model is vision-only: it has no text embedding and no head; convert without --vision-only",
        ),
        ("caption photo.jpg --model encoder --stream", "this model is vision-only"),
        ("caption photo.jpg --model encoder --output o.jsonl", "this model is vision-only"),
        # Pictures
        ("caption missing.jpg --model model", "missing.jpg: no such file or folder"),
        ("caption empty --model model", "empty: no images in this folder (.jpg, .png, .webp, .gif, .tiff, ...)"),
        ("features missing.jpg --model model --output o.npz", "missing.jpg: no such file or folder"),
        ("features empty --model model --output o.npz", "empty: no images in this folder"),
        # Features
        ("features photo.jpg --model model --output o.txt", "o.txt: features are written as .npz or .safetensors"),
        ("features photo.jpg --model model --output no/o.npz", "no/o.npz: the folder no does not exist"),
        ("features photo.jpg --model model --output text.jpg/o.npz", "text.jpg/o.npz: cannot be written"),
        ("features photo.jpg --model model --output o.npz --size 100", "size 100 is not a multiple of patch_size 16"),
        ("features photo.jpg --model model --output o.npz --size 0", "size must be a positive whole number, not 0"),
        (
            "features photo.jpg --model model --output o.npz --layers 0,3",
            "there is no layer 3: 0 is the embeddings, 2 the last block",
        ),
        # Captions
        ("caption photo.jpg --model model --output no/o.jsonl", "no/o.jsonl: the folder no does not exist"),
        ("caption photo.jpg --model model --output empty", "empty is a folder; name a file to write"),
        (f"caption photo.jpg --model model --seed {2**64}", f"seed must lie in 0 to 2**64 - 1, not {2**64}"),
        # Conversions
        ("convert --hf-path nowhere --mlx-path out", "nowhere: no such folder, and not a hub repo id"),
        ("convert --hf-path source --mlx-path photos", "is not empty and not a model folder; choose another name"),
        ("convert --hf-path source --mlx-path model", "exists already; choose another name"),
        ("convert --hf-path source --mlx-path text.jpg", "is a file; choose another name"),
        ("convert --hf-path source --mlx-path out -q --q-bits 7", "affine takes bits 2, 3, 4, 5, 6, 8, not 7"),
        ("convert --hf-path source --mlx-path out -q --q-mode no", "unknown quantization mode 'no'; choose affine,"),
        ("convert --hf-path source --mlx-path out --upload-repo a", "a: not a hub repo id; expected owner/name"),
        (
            "quantize --model model --mlx-path out --quant-recipe no",
            "unknown quantization recipe 'no'; choose mixed_4_8",
        ),
        ("dequantize --model model --mlx-path out", "is not quantized"),
        ("export --model encoder --hf-path out", "is vision-only; the published layout needs text embedding and head"),
    ],
)
def test_errors(call: Call, place: Path, command: str, message: str) -> None:
    code, told = failure(call, command, place)
    assert code == 1
    assert message in told


@pytest.mark.parametrize(
    ("command", "messages"),
    [
        ("captoin photo.jpg", ["No such command 'captoin'", "'caption'", "(see genlip-mlx --help)"]),
        ("--no-such-option", ["No such option", "--no-such-option"]),
        ("caption photo.jpg", ["Missing option '--model'", "(see genlip-mlx caption --help)"]),
        ("caption --model model", ["Missing argument 'images'"]),
        ("caption photo.jpg --model", ["--model", "requires an argument"]),
        ("caption photo.jpg --modle model", ["No such option: --modle", "--model"]),
        ("caption photo.jpg --model model --max-tokens 0", ["--max-tokens"]),
        ("caption photo.jpg --model model --max-tokens few", ["--max-tokens"]),
        ("caption photo.jpg --model model --batch-size 0", ["--batch-size"]),
        ("caption photo.jpg --model model --temp -1", ["--temp"]),
        ("caption photo.jpg --model model --temp nan", ["--temp"]),
        ("caption photo.jpg --model model --top-p 0", ["top_p must lie in (0, 1], not 0.0"]),
        ("caption photo.jpg --model model --top-p 1.5", ["--top-p"]),
        ("caption photo.jpg --model model --seed -1", ["--seed"]),
        ("caption photo.jpg --model model --dtype int8", ["--dtype", "'int8'", "'bfloat16'"]),
        ("caption photo.jpg --model model --stream --json", ["--stream shows text; leave out --json and --output"]),
        ("caption photo.jpg --model model --stream --output o.jsonl", ["--stream shows text"]),
        ("features photo.jpg --model model", ["Missing option '--output'", "(see genlip-mlx features --help)"]),
        ("features photo.jpg --model model --output o.npz --pool max", ["--pool", "'max'", "'mean'"]),
        (
            "features photo.jpg --model model --output o.npz --size big",
            ["--size takes model, native, or pixels a side, not 'big'"],
        ),
        (
            "features photo.jpg --model model --output o.npz --layers top",
            ["--layers takes last, all, or numbers such as 0,12,24, not 'top'"],
        ),
        ("features photo.jpg --model model --output o.npz --layers 1,", ["--layers takes last, all, or numbers"]),
        ("convert --hf-path source", ["Missing option '--mlx-path'"]),
        ("convert --mlx-path out", ["Missing option '--hf-path'"]),
        ("convert --hf-path source --mlx-path out --q-group-size 32", ["quantization options need --quantize (-q)"]),
        ("export --model model --hf-path out --format onnx", ["--format", "'onnx'"]),
    ],
)
def test_bad_usage(call: Call, place: Path, command: str, messages: list[str]) -> None:
    code, told = failure(call, command, place)
    assert code == 2
    for message in messages:
        assert message in told


def test_the_installed_command_fails_the_same_way(place: Path) -> None:
    outcome = run("caption", "missing.jpg", "--model", "model", cwd=place)
    assert (outcome.code, outcome.error) == (1, "missing.jpg: no such file or folder")
    outcome = run("caption", "--model", "model", cwd=place)
    assert outcome.code == 2
    assert "Missing argument 'images'" in outcome.error


def test_debug_shows_the_traceback(call: Call, place: Path) -> None:
    outcome = call("caption", "missing.jpg", "--model", "model", "--debug")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("Traceback (most recent call last):\n")
    assert outcome.err.endswith("\nerror: missing.jpg: no such file or folder\n")


def test_what_nobody_foresaw(call: Call, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("kernel not found\nin line 2")

    monkeypatch.setattr(loading, "load", broken)
    outcome = call("caption", "photo.jpg", "--model", "model")
    assert outcome.code == 1
    assert outcome.error == "unexpected RuntimeError: kernel not found in line 2 (--debug shows where)"
    assert "in broken" in call("caption", "photo.jpg", "--model", "model", "--debug").err


# --- Damaged checkpoints: tests/checkpoint has them all, this is the way of one through each command ---


@pytest.fixture
def damaged(golden_dir: Path, place: Path) -> Path:
    """`damaged`, a checkpoint whose weights are cut off."""
    shutil.copytree(golden_dir / "tiny-224", "damaged", ignore=shutil.ignore_patterns("expected*"))
    weights = Path("damaged/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    return place


@pytest.mark.parametrize(
    "command",
    [
        "convert --hf-path damaged --mlx-path out",
        "quantize --model damaged --mlx-path out",
        "export --model damaged --hf-path out",
        "caption photo.jpg --model damaged",
        "features photo.jpg --model damaged --output o.npz",
    ],
)
def test_a_truncated_checkpoint(call: Call, damaged: Path, command: str) -> None:
    code, message = failure(call, command, damaged)
    assert code == 1
    assert message.startswith("damaged/model.safetensors: ")


# --- Full disks ---


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(("command", "output"), [("caption", "o.jsonl"), ("features", "o.npz")])
def test_a_full_disk(call: Call, place: Path, monkeypatch: pytest.MonkeyPatch, command: str, output: str) -> None:
    Path(output).write_text("old")
    monkeypatch.setattr(files.os, "fsync", full)
    code, message = failure(call, f"{command} photo.jpg --model model --output {output}", place)
    assert (code, message) == (1, f"{output}: the disk is full; nothing was written")
    assert Path(output).read_text() == "old"


def test_a_disk_that_is_full_before_the_model_is_whole(
    call: Call, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_sync", full)
    code, message = failure(call, "convert --hf-path source --mlx-path out", place)
    assert code == 1
    assert "out: the disk is full; nothing was changed" in message
