"""The command as such: help, version, what it imports, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import genlip_mlx
from genlip_mlx.checkpoint import load as loading
from genlip_mlx.cli import console, main
from genlip_mlx.cli.console import progress, size

from .conftest import Call, run

COMMANDS = [command.name or command.callback.__name__ for command in main.app.registered_commands if command.callback]


def test_all_commands_are_there() -> None:
    assert {"convert", "quantize", "dequantize", "export", "caption", "features", "info", "doctor"} <= set(COMMANDS)
    assert "" not in COMMANDS


@pytest.mark.parametrize("command", [*COMMANDS, "tokenizer train"])
def test_every_command_has_help_with_an_example(call: Call, command: str) -> None:
    outcome = call(*command.split(), "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert f"Usage: genlip-mlx {command}" in outcome.out
    assert max(outcome.out) < "\u2600"  # box drawing, but no emoji: rich makes one of :train:
    assert "Example" in outcome.out
    examples = outcome.out.partition("Example")[2]
    assert f"genlip-mlx {command} " in examples
    assert call(*command.split(), "-h") == outcome


def test_every_option_has_a_help_text() -> None:
    import typer

    group = typer.main.get_command(main.app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        assert command.help, name
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"


def test_help_of_the_whole(call: Call) -> None:
    outcome = call("--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert "Usage: genlip-mlx" in outcome.out
    assert "--debug" in outcome.out
    for command in COMMANDS:
        assert command in outcome.out


def test_no_command_shows_the_help_and_no_error(call: Call) -> None:
    outcome = call()
    assert outcome.code == 2
    assert "Usage: genlip-mlx" in outcome.out + outcome.err
    assert "error" not in outcome.err


def test_version(call: Call) -> None:
    assert run("--version").out == f"{genlip_mlx.__version__}\n"
    assert call("--version").code == 0


# --- What is imported ---


def imported(*arguments: str | Path) -> set[str]:
    """The modules that a command has loaded at its end."""
    code = """
import atexit, json, sys
atexit.register(lambda: print("modules", json.dumps(sorted(sys.modules))))
from genlip_mlx.cli.main import main
main()
"""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True)
    return set(json.loads(done.stdout.rpartition("modules ")[2]))


@pytest.mark.parametrize("arguments", [["--help"], ["caption", "--help"], ["--version"]])
def test_help_starts_nothing_heavy(arguments: list[str]) -> None:
    heavy = {
        "mlx",
        "mlx.core",
        "numpy",
        "PIL",
        "tokenizers",
        "mlx_lm",
        "transformers",
        "huggingface_hub",
        "sentencepiece",
    }
    assert not heavy & imported(*arguments)


def test_a_greedy_caption_starts_no_sampler(navit: Path, images_dir: Path) -> None:
    modules = imported("caption", images_dir / "page.png", "--model", navit, "--max-tokens", "2")
    assert "mlx.core" in modules
    assert not {"mlx_lm", "transformers", "huggingface_hub", "torch", "rich.progress"} & modules


# --- Ctrl-C ---


def test_ctrl_c(call: Call, navit: Path, images_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "load", interrupted)
    outcome = call("caption", images_dir, "--model", navit)
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "interrupted\n")


# --- Progress and sizes ---


def test_progress_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with progress("encoding", "pictures") as advance:
        for done in range(1, 31):
            now += 1
            advance(done, 30)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [f"encoding: {n} of 30 pictures ({p}%)" for n, p in ((10, 33), (20, 67), (30, 100))]


@pytest.mark.parametrize("seconds", [0.5, 5.0])
def test_a_progress_bar_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with progress("encoding", "pictures") as advance:
        advance(1, 3)
        now += seconds
        advance(2, 3)
        advance(3, 3)
    out, err = capsys.readouterr()
    assert out == ""
    if seconds < 1:
        assert err == ""
    else:
        assert "encoding" in err
        assert "/3" in err
        assert "pictures" in err


def test_hidden_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "PLAIN_INTERVAL", 0.0)
    with progress("encoding", hidden=True) as advance:
        advance(1, 2)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (745_728, "745.7 kB"), (2_190_000, "2.2 MB"), (1.3e9, "1.30 GB")],
)
def test_sizes_for_a_reader(nbytes: float, text: str) -> None:
    assert size(nbytes) == text
