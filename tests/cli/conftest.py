"""Two ways to run a command: as installed, in a process of its own; and in this process, which takes milliseconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import CASES, Golden

from genlip_mlx.cli.main import main

Call = Callable[..., "Outcome"]

# The command as pip installs it; from a checkout that is not installed, the module.
SCRIPT = Path(sys.executable).parent / "genlip-mlx"
COMMAND = [str(SCRIPT)] if SCRIPT.exists() else [sys.executable, "-m", "genlip_mlx"]


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code, and the text on stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The message of a command that failed as the contract says: one line, and nothing on stdout."""
        assert self.code != 0
        assert self.out == ""
        assert self.err.startswith("error: ")
        assert self.err.count("\n") == 1
        assert self.err.endswith("\n")
        return self.err.removeprefix("error: ").rstrip("\n")


def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    """The installed command, running."""
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={**os.environ, "no_proxy": "*"},
        **options,
    )


def run(*arguments: str | Path, **options: Any) -> Outcome:
    """The installed command, to its end."""
    with start(*arguments, **options) as process:
        out, err = process.communicate(timeout=120)
        return Outcome(process.returncode, out, err)


def wait_for(condition: Callable[[], object]) -> None:
    """Until something has happened in another process."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for a minute"
        time.sleep(0.01)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> Iterator[None]:
    """Commands hear Ctrl-C, even where this whole test run goes in the background and so is deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command in this process, through the function that the installed command calls."""

    def call(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["genlip-mlx", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as end:
            main()
        assert isinstance(end.value.code, int)
        return Outcome(end.value.code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def converted(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both golden checkpoints, converted by the installed command."""
    folder = tmp_path_factory.mktemp("converted")
    for name in CASES:
        outcome = run("convert", "--hf-path", golden_dir / name, "--mlx-path", folder / name)
        assert (outcome.code, outcome.err) == (0, "")
        assert outcome.out.startswith(f"{folder / name}: ")
    return {name: folder / name for name in CASES}


@pytest.fixture(scope="session")
def model(case: Golden, converted: dict[str, Path]) -> Path:
    """The converted model of each golden case."""
    return converted[case.folder.name]


@pytest.fixture(scope="session")
def navit(converted: dict[str, Path]) -> Path:
    """One converted model, where the case does not matter."""
    return converted["tiny-navit"]


@pytest.fixture(scope="session")
def vision_only(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from genlip_mlx.checkpoint.convert import convert

    folder = tmp_path_factory.mktemp("encoder") / "encoder"
    convert(golden_dir / "tiny-navit", folder, vision_only=True)
    return folder


@pytest.fixture(scope="session")
def images_dir(golden_dir: Path) -> Path:
    return golden_dir / "images"


@pytest.fixture
def photos(images_dir: Path, tmp_path: Path) -> Path:
    """A folder of three files, the second cut off in the middle."""
    folder = tmp_path / "photos"
    folder.mkdir()
    whole = (images_dir / "astronaut.jpg").read_bytes()
    (folder / "a.jpg").write_bytes(whole)
    (folder / "b.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "c.png").write_bytes((images_dir / "page.png").read_bytes())
    return folder


@dataclass(frozen=True)
class Site:
    """A web server on this machine.

    It has `/astronaut.jpg`; `/page.html`, which is no picture; `/endless`, which stops in the middle
    of its answer for as long as the test runs; and nothing else.
    """

    address: str
    asked: list[str]  # paths of the requests so far

    def __truediv__(self, page: str) -> str:
        return f"{self.address}/{page}"


@pytest.fixture
def site(images_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "*")
    asked: list[str] = []
    over = threading.Event()

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if self.path == "/astronaut.jpg":
                self.answer((images_dir / "astronaut.jpg").read_bytes())
            elif self.path == "/page.html":
                self.answer(b"<html>not a picture</html>")
            elif self.path == "/endless":
                self.answer(b"\xff\xd8", promised=1000)
                over.wait(60)
            else:
                self.send_error(404)

        def answer(self, body: bytes, promised: int | None = None) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(promised or len(body)))
            self.end_headers()
            self.wfile.write(body)
            self.wfile.flush()

        def log_message(self, *_: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a client that is killed hangs up early

    server = Quiet(("127.0.0.1", 0), Pages)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield Site(f"http://127.0.0.1:{server.server_address[1]}", asked)
    over.set()
    server.shutdown()
    thread.join()
    server.server_close()
