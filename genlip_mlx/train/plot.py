"""Curves of one or more runs over each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import atomic_file

# Okabe and Ito's palette: told apart by colour-blind readers too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run, one dict a step.

    Raises:
        ValueError: if the folder holds no run.
    """
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{run}: no metrics.jsonl; name a run folder")
    return [json.loads(line) for line in path.read_text().splitlines()]


def plot(runs: Sequence[str | Path], output: str | Path) -> None:
    """Draw loss (training thin, validation thick), learning rate and gradient norm over tokens seen.

    Raises:
        ValueError: if a folder holds no run, or matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError('plots need matplotlib: pip install "genlip-mlx[train]"') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (loss, rate, norm) = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for run, color in zip(map(Path, runs), COLORS * len(runs)):
        metrics = read_metrics(run)
        seen, total = [], 0
        for row in metrics:
            total += row["tokens"]
            seen.append(total / 1e6)
        losses = [float("nan") if row["loss"] is None else row["loss"] for row in metrics]
        loss.plot(seen, losses, color=color, alpha=0.25, linewidth=0.8)
        loss.plot(seen, _smooth(losses), color=color, linewidth=1.5, label=run.name)
        valid = [(x, row["valid_loss"]) for x, row in zip(seen, metrics) if row.get("valid_loss") is not None]
        if valid:
            loss.plot(*zip(*valid), color=color, marker="o", linestyle="--", label=f"{run.name}, validation")
        rate.plot(seen, [row["lr"] for row in metrics], color=color)
        norm.plot(seen, [row["grad_norm"] for row in metrics], color=color, linewidth=0.8)
    for axes, label in ((loss, "loss, nats a token"), (rate, "learning rate"), (norm, "gradient norm")):
        axes.set_xlabel("tokens seen, millions")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    norm.set_yscale("log")
    loss.legend()
    with atomic_file(output) as file:
        figure.savefig(file, dpi=120, format=Path(output).suffix.lstrip(".") or "png")
    pyplot.close(figure)


def _smooth(values: Sequence[float], share: float = 0.95) -> list[float]:
    """An exponential average without the pull of its start (as Adam's bias correction)."""
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        if value == value:  # not nan
            mean, weight = share * mean + (1 - share) * value, share * weight + 1 - share
        out.append(mean / weight if weight else float("nan"))
    return out
