"""Result files: whole or not at all, and a message that says what to do."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from genlip_mlx import files
from genlip_mlx.files import atomic_file


def entries(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "result"
    path.write_bytes(b"old")
    return path


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "result"
    with atomic_file(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert entries(tmp_path) == {"result": b"new"}


def test_an_old_file_stays_until_the_new_one_is_whole(old: Path) -> None:
    with atomic_file(old, text=True) as file:
        file.write("Grüße\n")
        assert old.read_bytes() == b"old"
    assert entries(old.parent) == {"result": "Grüße\n".encode()}


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError("no")])
def test_a_failure_leaves_the_old_file_alone(old: Path, error: BaseException) -> None:
    def fail() -> None:
        with atomic_file(old) as file:
            file.write(b"half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert entries(old.parent) == {"result": b"old"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(old: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=r"result: the disk is full; nothing was written$"), atomic_file(old) as file:
        file.write(b"new")
    assert entries(old.parent) == {"result": b"old"}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing/result", "missing/result: the folder missing does not exist"),
        ("folder", "folder is a folder; name a file to write"),
        ("file/result", "file/result: cannot be written (Not a directory)"),
        ("pipe", "pipe is not a plain file; name another"),
        ("n" * 250, f"{'n' * 250}: cannot be written (File name too long)"),
    ],
)
def test_places_where_no_file_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").touch()
    os.mkfifo("pipe")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match=f"^{re.escape(message)}$"), atomic_file(path):
        pytest.fail("there is nothing to write to")
    assert sorted(tmp_path.iterdir()) == before


def test_a_link_goes_on_pointing_at_its_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("result")
    with atomic_file(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "result").read_bytes() == b"new"


def test_json_with_a_file_name_that_is_no_unicode(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    with atomic_file(tmp_path / "result", text=True) as file:
        file.write(json.dumps({"image": name, "caption": "Grüße"}, ensure_ascii=False))
    assert json.loads((tmp_path / "result").read_text(encoding="utf-8")) == {"image": name, "caption": "Grüße"}


def test_a_killed_process_leaves_the_old_file(old: Path) -> None:
    code = f"""
from genlip_mlx.files import atomic_file
with atomic_file({str(old)!r}) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    input()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        process.kill()
    assert old.read_bytes() == b"old"
