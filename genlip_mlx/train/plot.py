"""Curves of one or more runs over each other."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import accumulate, cycle, product
from pathlib import Path
from typing import Any

from ..files import atomic_file

# Okabe and Ito's palette: told apart by colour-blind readers too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":")  # the palette again, where there are more runs than colours


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run, one dict a step.

    Raises:
        ValueError: if the folder holds no run, its run has made no step, or its metrics are damaged.
    """
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{run}: no metrics.jsonl; name a run folder")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break  # the run is just writing it, or was killed as it did
        try:
            row = json.loads(line)
            rows.append(row | {name: _number(row[name]) for name in ("loss", "lr", "grad_norm")})
            if not isinstance(row["tokens"], int):
                raise TypeError
        except (ValueError, LookupError, TypeError):
            raise ValueError(f"{path}:{number}: not the metrics of a step") from None
    if not rows:
        raise ValueError(f"{path}: no step yet; there is nothing to draw")
    return rows


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def plot(runs: Sequence[str | Path], output: str | Path) -> None:
    """Draw loss, learning rate and gradient norm over the tokens seen, 1200 pixels wide.

    Training losses are lines, each step's pale and their average strong; validation losses are points.

    Raises:
        ValueError: if a folder holds no run, the output is of no known kind, or matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError('plots need matplotlib: pip install "genlip-mlx[train]"') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    folders = [*map(Path, runs)]
    read = [read_metrics(folder) for folder in folders]
    names = [folder.resolve().name for folder in folders]
    if len({*names}) < len(names):
        names = [*map(str, folders)]
    figure = pyplot.figure(figsize=(12, 4.8), layout="constrained")
    kind = Path(output).suffix.lstrip(".").lower() or "png"
    known = figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise ValueError(f"{output}: no picture is called .{kind}; known are {', '.join(known)}")
    loss, rate, norm = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    for name, metrics, (dash, color) in zip(names, read, cycle(product(DASHES, COLORS))):
        seen = [total / 1e6 for total in accumulate(row["tokens"] for row in metrics)]
        losses = [row["loss"] for row in metrics]
        loss.plot(seen, losses, color=color, alpha=0.25, linewidth=0.8)
        loss.plot(seen, [*map(Smoothed().add, losses)], color=color, linestyle=dash, linewidth=1.5, label=name)
        valid = [(x, row["valid_loss"]) for x, row in zip(seen, metrics) if row.get("valid_loss") is not None]
        if valid:
            loss.scatter(*zip(*valid), color=color, edgecolor="white", s=40, zorder=3)
        rate.plot(seen, [row["lr"] for row in metrics], color=color, linestyle=dash)
        norm.plot(seen, [row["grad_norm"] for row in metrics], color=color, linewidth=0.8)
    labels = "loss, nats a label token (points: validation)", "learning rate", "gradient norm, before clipping"
    for axes, label in zip((loss, rate, norm), labels):
        axes.set_xlabel("tokens seen (millions)")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (loss, norm):
        axes.set_yscale("log")
    loss.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7), numticks=100))  # about even
    loss.yaxis.set_minor_locator(ticker.NullLocator())
    loss.yaxis.set_major_formatter("{x:g}")  # 0.7, and not 7 x 10^-1
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    with atomic_file(output) as file:
        figure.savefig(file, dpi=100, format=kind)
    pyplot.close(figure)


class Smoothed:
    """An exponential average without the pull of its start (as Adam's bias correction).

    Args:
        share: of the average that a new value leaves as it was.
    """

    def __init__(self, share: float = 0.95) -> None:
        self._share, self._sum, self._weight = share, 0.0, 0.0

    def add(self, value: float) -> float:
        """The average after one more value; what is not finite does not count. nan before the first that does."""
        if math.isfinite(value):
            self._sum = self._share * self._sum + (1 - self._share) * value
            self._weight = self._share * self._weight + 1 - self._share
        return self._sum / self._weight if self._weight else math.nan
