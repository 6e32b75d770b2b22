"""`zeroshot`: what it prints and writes, and its errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from .conftest import Call, run

MODEL = ("--model", "model")
PETS = ("--data", "pets", "--classes", "classes.txt")
LOOSE = ("--data", "loose", "--classes", "classes.txt")


@pytest.fixture
def place(navit: Path, vision_only: Path, images_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in: `model`, `encoder`, `pets/` (two class folders), `loose/`, classes and templates."""
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(navit)
    Path("encoder").symlink_to(vision_only)
    for target, name in (
        ("pets/cat/a.jpg", "astronaut.jpg"),
        ("pets/dog/b.png", "page.png"),
        ("loose/p.png", "page.png"),
    ):
        Path(target).parent.mkdir(parents=True)
        shutil.copy(images_dir / name, target)
    Path("classes.txt").write_text("cat\ndog\nbird\n")
    Path("templates.txt").write_text("a photo of a {}.\n")
    return tmp_path


def test_the_installed_command_with_labels(place: Path) -> None:
    outcome = run("zeroshot", *MODEL, *PETS, "--output", "r.json", cwd=place)
    assert (outcome.code, outcome.err) == (0, "results written to r.json\n")
    header, cat, dog, whole = (line.split() for line in outcome.out.splitlines())
    assert header == ["class", "pictures", "correct"]
    assert (cat[:2], dog[:2], whole[:3]) == (["cat", "1"], ["dog", "1"], ["all", "classes", "2"])
    result = json.loads((place / "r.json").read_text())
    right = [p["label"] == p["top"][0]["class"] for p in result["predictions"]]
    assert result["accuracy"] == sum(right) / 2
    assert whole[3] == f"{sum(right) / 2:.1%}"
    assert [p["image"] for p in result["predictions"]] == ["pets/cat/a.jpg", "pets/dog/b.png"]
    assert all(len(p["top"]) == 3 and p["error"] is None for p in result["predictions"])
    assert (result["templates"], result["normalization"], result["prior_corrected"]) == (["{}"], "mean", False)
    assert (result["model"], result["data"], result["images"], result["skipped"]) == ("model", "pets", 2, 0)


def test_without_labels(call: Call, place: Path) -> None:
    outcome = call("zeroshot", *MODEL, *LOOSE, "--templates", "templates.txt")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out in {f"{Path('loose/p.png')}: {name}\n" for name in ("cat", "dog", "bird")}


def test_names_for_labels(call: Call, place: Path) -> None:
    Path("names.json").write_text('{"cat": "person in orange", "dog": "page of text"}')
    words = (
        "zeroshot --model model --data pets --classes names.json --prior-correct --normalization sum --output r.json"
    )
    assert call(*words.split(), "--prompt", "").code == 0
    result = json.loads(Path("r.json").read_text())
    assert result["classes"] == {"cat": "person in orange", "dog": "page of text"}
    assert (result["prompt"], result["normalization"], result["prior_corrected"]) == ("", "sum", True)
    (first, second) = ({t["class"]: t["score"] for t in p["top"]} for p in result["predictions"])
    assert first["cat"] == pytest.approx(-second["cat"], abs=1e-4)  # two pictures: each is as far from their mean


def test_a_picture_that_cannot_be_used(call: Call, place: Path) -> None:
    Image.new("RGB", (8, 8)).save("loose/a.png")
    outcome = call("zeroshot", *MODEL, *LOOSE)
    assert outcome.code == 1
    assert outcome.out.count("\n") == 1
    assert outcome.err.splitlines() == [
        "skipped: loose/a.png: 8 x 8 pixels are less than one patch of 16 x 16; enlarge the picture first",
        "1 of 2 pictures could not be used",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model nowhere", "nowhere: no such folder, and not a hub repo id"),
        ("--model encoder", "this model is vision-only"),
        ("--data nowhere", "nowhere: no such folder or parquet file"),
        ("--data empty", "empty: no images in this folder"),
        ("--classes nothing.txt", "nothing.txt: names no class; write one name a line"),
        ("--classes twice.txt", "twice.txt: class 'cat' stands there 2 times; a class needs a name of its own"),
        ("--classes missing.txt", "missing.txt: cannot be read (No such file or directory)"),
        ("--classes few.txt", "pets/dog/b.png: unknown class 'dog'; add it to the classes"),
        ("--templates classes.txt", "classes.txt: template 'cat' has no {} for the class"),
        ("--templates nothing.txt", "nothing.txt: holds no template; write one a line"),
        ("--data loose --prior-correct", "--prior-correct needs two or more"),
        ("--output no/r.json", "no/r.json: the folder no does not exist"),
    ],
)
def test_errors(call: Call, place: Path, options: str, message: str) -> None:
    Path("empty").mkdir()
    for name, text in (("nothing.txt", "\n"), ("twice.txt", "cat\ndog\ncat\n"), ("few.txt", "cat\n")):
        Path(name).write_text(text)
    before = sorted(place.rglob("*"))
    outcome = call("zeroshot", *MODEL, *PETS, *options.split())
    assert outcome.code == 1
    assert message in outcome.error
    assert sorted(place.rglob("*")) == before
