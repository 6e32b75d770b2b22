"""What is shown while a model is trained: a live line, plain lines, and what mlx-lm's services are told."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest

from genlip_mlx.cli import training
from genlip_mlx.cli.training import check_services, reporting_service, training_reporter


def metrics(step: int, **more: Any) -> dict[str, Any]:
    speed = {"tokens_per_second": 1234.5, "peak_memory_gb": 1.25, "tokens": 100}
    return {"step": step, "loss": 4.0, "lr": 1e-3, "grad_norm": 0.5} | speed | more


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_now_and_then(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with training_reporter(5, every=2) as report:
        for step in range(1, 6):
            clock[0] += 3600 if step == 1 else 60  # the first step waited for its data
            report(metrics(step, **{"valid_loss": 3.5} if step == 3 else {}))
    assert capsys.readouterr().err.splitlines() == [
        "step 2/5  loss 4.0000  lr 1.00e-03  1234 tokens/s  1.25 GB  0:03:00 left",
        "step 3: validation loss 3.5000",
        "step 4/5  loss 4.0000  lr 1.00e-03  1234 tokens/s  1.25 GB  0:01:00 left",
        "step 5/5  loss 4.0000  lr 1.00e-03  1234 tokens/s  1.25 GB  0:00:00 left",
    ]


def test_a_step_that_was_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    with training_reporter(2, every=1) as report:
        report(metrics(1))
        report(metrics(2, loss=float("nan"), skipped=True))
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "step 2: the loss was not finite; nothing was changed"
    assert lines[2].startswith("step 2/2  loss 4.0000")  # the average of those that were


def test_one_live_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with training_reporter(3, every=2) as report:
        for step in (1, 2, 3):
            report(metrics(step, **{"valid_loss": 3.5} if step == 2 else {}))
    shown = capsys.readouterr().err
    for part in ("step 0/3", "step 1/3", "step 2/3", "step 3/3", "step 2: validation loss 3.5000"):
        assert part in shown
    assert shown.count("\n") == 2  # after the validation, and at the end: all else is overwritten


class Service(ModuleType):
    """Stands for wandb."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun: dict[str, Any] = {}
        self.told: list[tuple[int, dict[str, Any]]] = []

    def init(self, **words: Any) -> None:
        self.begun = words

    def log(self, data: dict[str, Any], step: int) -> None:
        self.told.append((step, data))


def test_a_service_is_told_in_the_words_of_mlx_lm(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_lm.tuner import callbacks

    service = Service()
    monkeypatch.setattr(callbacks, "wandb", service)
    report = reporting_service("wandb", "runs/one", {"iters": 4}, every=2)
    with training_reporter(4, 100, report) as report_all:
        for step in range(1, 5):
            report_all(metrics(step, **{"valid_loss": 3.5} if step == 3 else {}))
    assert service.begun["name"] == "one"
    assert service.begun["config"] == {"iters": 4}
    assert [step for step, _ in service.told] == [2, 3, 4]
    assert service.told[0][1]["train_loss"] == 4.0
    assert service.told[1][1] == {"iteration": 3, "val_loss": 3.5}
    assert service.told[2][1]["trained_tokens"] == 400


def test_services_are_those_of_mlx_lm(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_lm.tuner.callbacks import SUPPORT_CALLBACK

    assert set(SUPPORT_CALLBACK) == set(training.SERVICES)
    monkeypatch.setattr(
        training, "find_spec", lambda name: importlib.util.find_spec("json" if name == "wandb" else "no_")
    )
    check_services("WandB")
    with pytest.raises(ValueError, match="--report-to swanlab: pip install swanlab"):
        check_services("wandb,swanlab")
    with pytest.raises(ValueError, match="--report-to takes wandb or swanlab, not 'tensorboard'"):
        check_services("tensorboard")
