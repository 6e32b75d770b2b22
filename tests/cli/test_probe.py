"""`probe`: table, JSON, and what goes wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .conftest import Call


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name, base in {"red": (170, 60, 60), "blue": (60, 60, 170)}.items():
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for i in range(6):
            pixels = np.array(base) + rng.integers(-50, 50, (64, 64, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "data"


def test_table_and_json(call: Call, navit: Path, data: Path, tmp_path: Path) -> None:
    (data / "red" / "0.png").write_bytes(b"nothing")
    command = ["probe", "--model", navit, "--data", data, "--cache", tmp_path / "cache", "--steps", "10"]
    outcome = call(*command, "--size", "64", "--layers", "1", "--baselines", "--output", tmp_path / "r.json")
    assert outcome.code == 0
    assert outcome.out.startswith("2 classes; pictures: ")
    for words in ("random weights", "raw pixels", "attentive", "100.0%"):
        assert words in outcome.out
    assert f"{data}: no test split: 2 training pictures are held out for it" in outcome.err
    assert f"skipped: {data / 'red' / '0.png'}: not an image of a known format" in outcome.err
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["classes"] == ["blue", "red"]
    assert len(report["skipped"]) == 1
    assert [len(result["sweep"]) for result in report["results"]] == [12, 12, 12, 12, 6, 6]
    assert {trial["layer"] for trial in report["results"][0]["sweep"]} == {"1", "last"}
    assert report["results"][0]["test"] == 1.0
    assert len(report["learning_rates"]) == 6


def test_scenes(call: Call, navit: Path, tmp_path: Path) -> None:
    scenes = ["--data", "synth:12", "--label", "colour", "--cache", tmp_path / "cache", "--steps", "2"]
    outcome = call("probe", "--model", navit, *scenes, "--layers", "last", "--size", "64")
    assert outcome.code == 0
    assert outcome.out.startswith("9 classes; pictures: 12 train, 3 validation, 3 test; accuracy:\n")
    outcome = call("probe", "--model", navit, *scenes, "--layers", "last", "--size", "64", "--task", "segment")
    assert outcome.code == 0
    assert "; mean IoU:\n" in outcome.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere at all"], "no such folder or parquet file, and not a hub data set"),
        (["--data", "synth:", "--label", "size"], "unknown label 'size'; name one with --label: shape, colour"),
        (["--data", "synth:8", "--label", "shape", "--layers", "9"], "there is no layer 9"),
        (["--data", "synth:8", "--label", "shape", "--size", "70"], "size 70 is not a multiple of patch_size 16"),
        (["--data", "synth:8", "--label", "shape", "--output", "no/where.json"], "no/where.json: the folder no does"),
    ],
)
def test_bad_input(call: Call, navit: Path, tmp_path: Path, options: list[str], message: str) -> None:
    outcome = call("probe", "--model", navit, "--cache", tmp_path / "cache", *options)
    assert outcome.code == 1
    assert message in outcome.error
    assert not (tmp_path / "cache").exists()


def test_bad_usage(call: Call, navit: Path) -> None:
    assert call("probe", "--model", navit, "--data", "synth:", "--layers", "top").code == 2
    assert call("probe", "--model", navit, "--data", "synth:", "--task", "sort").code == 2
