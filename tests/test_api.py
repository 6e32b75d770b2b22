"""The package from Python: its public names, and every example of the README, run as printed."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import Golden
from PIL import Image

import genlip_mlx
from genlip_mlx.processing.images import ImageError

README = Path(__file__).parent.parent / "README.md"


# --- Public names ---


def test_public_names() -> None:
    for name in genlip_mlx.__all__:
        assert getattr(genlip_mlx, name) is not None
    assert {"load", "caption", "encode", "GenLIP", "GenLIPConfig", "Processor"} <= set(genlip_mlx.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'captoin'"):
        _ = genlip_mlx.captoin


def test_importing_the_package_starts_nothing_heavy() -> None:
    code = "import sys, genlip_mlx; print(*{'mlx.core', 'numpy', 'PIL', 'tokenizers', 'typer'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


# --- A picture by any name ---


@pytest.fixture(scope="module")
def loaded(case: Golden) -> tuple[genlip_mlx.GenLIP, genlip_mlx.Processor]:
    return genlip_mlx.load(str(case.folder), dtype="float32")


def ways(path: Path) -> list[Any]:
    return [path, str(path), path.read_bytes(), Image.open(path)]


def test_load_gives_a_model_and_its_processor(case: Golden, loaded: Any) -> None:
    model, processor = loaded
    assert isinstance(model, genlip_mlx.GenLIP)
    assert isinstance(processor, genlip_mlx.Processor)
    assert isinstance(model.config, genlip_mlx.GenLIPConfig)
    assert not model.training
    assert model.ln_post.weight.dtype == mx.float32
    assert genlip_mlx.load(case.folder, dtype="bfloat16")[0].ln_post.weight.dtype == mx.bfloat16


def test_caption_takes_a_picture_by_any_name(case: Golden, loaded: Any) -> None:
    sample, images = case.samples[0], ways(case.image_path(0))
    together = genlip_mlx.caption(*loaded, images, prompt=sample["prompt"], max_tokens=6)
    alone = [genlip_mlx.caption(*loaded, image, prompt=sample["prompt"], max_tokens=6)[0] for image in images]
    for results in (together, alone):
        assert [result.tokens for result in results] == [sample["greedy_ids"][:6]] * len(images)
        assert [result.image for result in results[:2]] == [str(case.image_path(0))] * 2
    assert genlip_mlx.caption(*loaded, tuple(images), prompt=sample["prompt"], max_tokens=6) == together


def test_encode_takes_a_picture_by_any_name(case: Golden, loaded: Any) -> None:
    for image in ways(case.image_path(0)):
        for images in (image, [image], (image,)):
            (result,) = genlip_mlx.encode(*loaded, images)
            assert isinstance(result.features, mx.array)
            ours = case.rows(np.array(result.features), "0.features")
            np.testing.assert_allclose(ours, case.expected("0.features"), rtol=0, atol=5e-5)


@pytest.mark.parametrize("call", [genlip_mlx.caption, genlip_mlx.encode])
def test_a_picture_that_cannot_be_read_raises(case: Golden, loaded: Any, call: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("not a picture")
    for image, name in (("missing.jpg", "missing.jpg"), (text, text), (b"nothing", "image 0")):
        with pytest.raises(ImageError, match=re.escape(str(name))):
            call(*loaded, image)


# --- The README ---


def blocks(language: str) -> list[str]:
    """The fenced blocks of the README in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def reader(golden_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the README's examples assume it: a model `genlip-navit`, a picture, and `genlip-mlx` to call."""
    folder = tmp_path / "reader"
    folder.mkdir()
    shutil.copytree(golden_dir / "tiny-navit", folder / "genlip-navit", ignore=shutil.ignore_patterns("expected*"))
    shutil.copy(golden_dir / "images" / "astronaut.jpg", folder)
    script = Path(sys.executable).parent / "genlip-mlx"
    if not script.exists():
        script = tmp_path / "bin" / "genlip-mlx"
        script.parent.mkdir()
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m genlip_mlx "$@"\n')
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=":")
    monkeypatch.chdir(folder)
    return folder


def test_the_readmes_python_runs(reader: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = blocks("python")
    assert found
    namespace: dict[str, Any] = {}
    for number, block in enumerate(found, 1):
        exec(compile(block, f"README.md, python block {number}", "exec"), namespace)
    assert "astronaut.jpg" in capsys.readouterr().out


def test_the_readmes_commands_run(reader: Path) -> None:
    lines = [
        line
        for block in blocks("sh")
        if block.startswith("# tested\n")
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("genlip-mlx ")
    ]
    assert lines
    for line in lines:
        done = subprocess.run(line, shell=True, cwd=reader, capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0, f"{line}\n{done.stderr}"


def test_every_command_of_the_readme_exists() -> None:
    from genlip_mlx.cli.main import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    known |= {str(group.name) for group in app.registered_groups}
    used = re.findall(r"^genlip-mlx ([a-z]+)", "\n".join(blocks("sh")), re.MULTILINE)
    assert used
    assert set(used) <= known
