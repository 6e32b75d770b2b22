"""What a user watches while a model is trained: one live line on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from ..train.plot import Smoothed
from .console import note

Report = Callable[[dict[str, Any]], None]

_SHARE = 0.9  # of the smoothed loss that a step leaves as it was: about ten steps count


SERVICES = ("wandb", "swanlab")  # what mlx-lm reports to


@contextmanager
def training_reporter(total: int, every: int, service: Report | None = None) -> Iterator[Report]:
    """Show how training goes: the smoothed loss, tokens/s, memory and time left.

    Args:
        total: steps of the whole run.
        every: steps a line, where there is no terminal.
        service: told the metrics of each step as well; see `reporting_service`.

    Yields:
        a function to call with each step's metrics, as `Run.train` does. Where validation losses and skipped steps
        are among them, they get lines of their own.
    """
    line = _Line(total)
    tell = service or (lambda metrics: None)
    if sys.stderr.isatty():
        with _live(total) as show:

            def each(metrics: dict[str, Any]) -> None:
                tell(metrics)
                show(line.after(metrics))

            yield each
    else:

        def now_and_then(metrics: dict[str, Any]) -> None:
            tell(metrics)
            text = line.after(metrics)
            if metrics["step"] % every == 0 or metrics["step"] == total:
                note(text)

        yield now_and_then


def check_services(report_to: str) -> None:
    """Refuse a service that cannot be reported to, before anything else is done.

    Args:
        report_to: one of SERVICES, or several with commas.

    Raises:
        ValueError: if mlx-lm knows no such service, or its package is missing.
    """
    for name in report_to.split(","):
        if name.strip().lower() not in SERVICES:
            raise ValueError(f"--report-to takes {' or '.join(SERVICES)}, not {name.strip()!r}")
        if find_spec(name.strip().lower()) is None:
            raise ValueError(f"--report-to {name.strip()}: pip install {name.strip().lower()}")


def reporting_service(report_to: str, folder: str, config: dict[str, Any], every: int) -> Report:
    """A report function that tells mlx-lm's callbacks, in mlx-lm's words.

    Args:
        report_to: as `check_services` accepts it.
        folder: of the run, which gets its name.
        config: shown with the run.
        every: steps between reports of the training loss.
    """
    from mlx_lm.tuner.callbacks import get_reporting_callbacks

    callback = get_reporting_callbacks(report_to, project_name="genlip-mlx", log_dir=folder, config=config)
    tokens = 0

    def report(metrics: dict[str, Any]) -> None:
        nonlocal tokens
        tokens += metrics["tokens"]
        step = {"iteration": metrics["step"]}
        if metrics["step"] % every == 0:
            train = {
                "train_loss": metrics["loss"],
                "learning_rate": metrics["lr"],
                "grad_norm": metrics["grad_norm"],
                "tokens_per_second": metrics["tokens_per_second"],
                "trained_tokens": tokens,
                "peak_memory": metrics["peak_memory_gb"],
            }
            callback.on_train_loss_report(step | train)
        if "valid_loss" in metrics:
            callback.on_val_loss_report(step | {"val_loss": metrics["valid_loss"]})

    return report


class _Line:
    """The line of the latest step."""

    def __init__(self, total: int) -> None:
        self._total, self._loss = total, Smoothed(_SHARE)
        self._began: tuple[int, float] | None = None  # the first step seen, and when it was over

    def after(self, metrics: dict[str, Any]) -> str:
        step, now = metrics["step"], time.monotonic()
        if "valid_loss" in metrics:
            note(f"step {step}: validation loss {metrics['valid_loss']:.4f}")
        if metrics.get("skipped"):
            note(f"step {step}: the loss was not finite; nothing was changed")
        parts = [
            f"step {step}/{self._total}",
            f"loss {self._loss.add(metrics['loss']):.4f}",
            f"lr {metrics['lr']:.2e}",
            f"{metrics['tokens_per_second']:.0f} tokens/s",
            f"{metrics['peak_memory_gb']:.2f} GB",
        ]
        # The first step holds the wait for the first data, which tells nothing of the others.
        first, began = self._began = self._began or (step, now)
        if step > first:
            left = (now - began) / (step - first) * (self._total - step)
            parts.append(f"{int(left // 3600)}:{int(left // 60 % 60):02}:{int(left % 60):02} left")
        return "  ".join(parts)


@contextmanager
def _live(total: int) -> Iterator[Callable[[str], None]]:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    def text(line: str) -> Text:
        return Text(line, no_wrap=True, overflow="ellipsis")

    # Refreshed by steps alone: a thread that redraws would take the cores from training.
    with Live(text(f"step 0/{total}"), console=Console(stderr=True), auto_refresh=False) as live:
        yield lambda line: live.update(text(line), refresh=True)
