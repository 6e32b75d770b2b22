"""Curves: what is drawn of which runs, and what cannot be."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from genlip_mlx.train.plot import Smoothed, plot, read_metrics


def run(folder: Path, steps: int = 60, **last: Any) -> Path:
    """A run folder whose loss falls."""
    dice = random.Random(folder.name)
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = 7 / step**0.3 + dice.uniform(-0.2, 0.2)
        rows.append({"step": step, "loss": loss, "lr": 1e-3 * step / steps, "grad_norm": 1 / step, "tokens": 4000})
        if step % 20 == 0:
            rows[-1]["valid_loss"] = loss + 0.1
    rows[-1] |= last
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_runs_over_each_other(kind: str, tmp_path: Path) -> None:
    target = tmp_path / f"curves.{kind}"
    # Names that are equal, and a step whose loss was not finite.
    plot([run(tmp_path / "a" / "one"), run(tmp_path / "b" / "one", loss=None, grad_norm=None)], target)
    if kind == "png":
        assert Image.open(target).size == (1200, 480)
    assert target.read_bytes()[:4] in (b"\x89PNG", b"%PDF", b"<?xm")


def test_a_line_that_is_being_written_does_not_count(tmp_path: Path) -> None:
    folder = run(tmp_path / "one", steps=5)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "run: no metrics.jsonl; name a run folder"),
        ("", "metrics.jsonl: no step yet; there is nothing to draw"),
        ('{"step": 1, "lo', "metrics.jsonl: no step yet"),
        ("nonsense\n", "metrics.jsonl:1: not the metrics of a step"),
        ("[1]\n", "metrics.jsonl:1: not the metrics of a step"),
        ('{"step": 1}\n', "metrics.jsonl:1: not the metrics of a step"),
        ('{"tokens": "many", "loss": 1, "lr": 1, "grad_norm": 1}\n', "metrics.jsonl:1: not the metrics of a step"),
    ],
)
def test_folders_without_curves(content: str | None, message: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    if content is not None:
        (tmp_path / "run" / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        plot([run(tmp_path / "good"), tmp_path / "run"], tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


def test_a_picture_of_no_known_kind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"c\.doc: no picture is called \.doc; known are .*png"):
        plot([run(tmp_path / "one")], tmp_path / "c.doc")


def test_the_average_starts_at_the_first_value() -> None:
    smoothed = Smoothed(0.5)
    assert math.isnan(smoothed.add(math.nan))
    assert smoothed.add(4.0) == 4.0
    assert smoothed.add(math.inf) == 4.0
    assert smoothed.add(1.0) == pytest.approx((0.5 * 4 + 1) / 1.5)
