"""`report`: the installed command writes a page and says what is not on it; bad input leaves nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from genlip_mlx.analysis.report import PAGE

from .conftest import Call, run


def test_the_installed_command(navit: Path, images_dir: Path, tmp_path: Path) -> None:
    outcome = run("report", "--model", navit, "--data", images_dir, "--output", "out", cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    assert outcome.out == f"{Path('out') / PAGE}\n"
    names = ("Loss", "Probes", "Zero-shot classification")
    lines = [line for line in outcome.err.splitlines() if not line.startswith("measuring:")]  # on a slow machine
    assert [line.partition(" (")[0] for line in lines] == [f"left out: {name}" for name in names]
    content = (tmp_path / "out" / PAGE).read_text(encoding="utf-8")
    assert content.startswith("<!doctype html>")
    assert "astronaut.jpg" in content


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nowhere"], "nowhere: no such folder, and not a hub repo id"),
        (["--data", "nowhere"], "nowhere: no such file or folder"),
        (["--output", "file"], "file: is no folder; name another"),
        (["--templates", "file"], "file: template 'words' has no {} for the class"),
    ],
)
def test_errors(
    call: Call,
    navit: Path,
    images_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("words")
    outcome = call("report", "--model", navit, "--data", images_dir, "--output", "out", *options)
    assert outcome.code == 1
    assert message in outcome.error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
