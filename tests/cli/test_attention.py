"""`attention`: tables, JSON and figures of one model and of several, and what cannot be measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import Golden
from PIL import Image

from genlip_mlx.cli.attention import _labels

from .conftest import Call, run


@pytest.fixture(scope="module")
def deeper(navit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three blocks, where the golden ones have two."""
    import mlx.core as mx

    folder = tmp_path_factory.mktemp("deeper") / "deeper"
    shutil.copytree(navit, folder)
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    for index in folder.glob("*.index.json"):
        index.unlink()
    weights: dict[str, mx.array] = {}
    for file in folder.glob("*.safetensors"):
        weights |= mx.load(str(file))  # type: ignore[arg-type]
    mx.eval(weights)
    more = {name.replace("layers.1.", "layers.2."): w for name, w in weights.items() if "layers.1." in name}
    for file in folder.glob("*.safetensors"):
        file.unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), weights | more)
    return folder


@pytest.fixture
def small(images_dir: Path, tmp_path: Path) -> Path:
    path = tmp_path / "small.png"
    Image.open(images_dir / "astronaut.jpg").resize((80, 64)).save(path)
    return path


def test_the_installed_command(case: Golden, model: Path, tmp_path: Path) -> None:
    output, image = tmp_path / "attention.json", case.image_path(0)
    outcome = run("attention", image, "--model", model, "--caption", "A cat.", "--json", output, "--layers", "2")
    assert outcome.code == 0, outcome.err
    assert outcome.err == f"shares of attention written to {output}\n"
    assert outcome.out.startswith(f"{model.name}: attention in %, mean of 1 pictures")
    assert len(outcome.out.splitlines()) == 4
    (result,) = json.loads(output.read_text())["models"]
    assert (result["model"], result["blocks"], result["samples"]) == (str(model), 2, 1)
    for name in ("vision_to_first", "text_to_first", "text_to_vision", "gate_mean", "gate_closed"):
        assert len(result[name]) == 2
        assert all(0 <= share <= 1 for share in result[name])
    (picture,) = result["pictures"]
    h, w = picture["grid"]
    assert (picture["image"], picture["caption"], list(picture["maps"])) == (str(image), "A cat.", ["2"])
    maps = picture["maps"]["2"]
    assert [len(maps["from_text"]), len(maps["from_text"][0])] == [h, w]
    assert sum(map(sum, maps["from_text"])) == pytest.approx(result["text_to_vision"][1], abs=1e-4)
    assert sum(map(sum, maps["from_vision"])) == pytest.approx(1, abs=1e-4)


def test_models_of_other_depth_and_own_captions(
    call: Call, navit: Path, deeper: Path, small: Path, tmp_path: Path
) -> None:
    figure, data = tmp_path / "f.png", tmp_path / "f.json"
    options = ("--model", navit, "--compare", deeper, "--output", figure, "--json", data)
    outcome = call("attention", small, *options)
    assert outcome.code == 0, outcome.err
    assert f"the models differ in blocks ({navit} has 2, {deeper} has 3): curves are drawn over depth" in outcome.err
    assert Image.open(figure).width == 1200
    first, second = json.loads(data.read_text())["models"]
    assert (first["blocks"], second["blocks"]) == (2, 3)
    assert list(second["pictures"][0]["maps"]) == ["1", "2", "3"]
    said = call("caption", small, "--model", deeper)
    assert said.out == second["pictures"][0]["caption"] + "\n"


def test_a_bad_picture_is_reported_once_and_skipped(call: Call, navit: Path, photos: Path) -> None:
    options = ("--model", navit, "--compare", navit, "--caption", "A.", "--layers", "none")
    outcome = call("attention", photos, *options)
    assert outcome.code == 1
    lines = outcome.err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"skipped: {photos / 'b.jpg'}: ")
    assert lines[1] == "1 of 3 pictures could not be read"
    assert outcome.out.count("mean of 2 pictures") == 2


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["a/model"], ["model"]),
        (["a/one", "b/two"], ["one", "two"]),
        (["runs/gated/checkpoints/step-9", "runs/ungated/checkpoints/step-9"], ["gated", "ungated"]),
        (["a/m", "a/b/m"], ["m", "b"]),
        (["a/m", "a/m"], ["m", "m"]),
    ],
)
def test_short_names_of_models(names: list[str], labels: list[str]) -> None:
    assert _labels(names) == labels


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("{photo}", "--model", "{encoder}"), 1, "this model is vision-only"),
        (("{photo}", "--model", "{model}", "--compare", "{encoder}"), 1, "this model is vision-only"),
        (("tiny.png", "--model", "{model}"), 1, "tiny.png: 40 x 9 pixels are less than one patch of 16 x 16"),
        (("text.jpg", "--model", "{model}"), 1, "text.jpg: not an image of a known format"),
        (("text.jpg", "tiny.png", "--model", "{model}"), 1, "none of the 2 pictures could be read"),
        (("none.jpg", "--model", "{model}"), 1, "none.jpg: no such file"),
        (("{photo}", "--model", "{model}", "--caption", " "), 1, "caption: is empty"),
        (("{photo}", "--model", "{model}", "--layers", "3"), 1, "there is no block 3: 1 is the first, 2 the last"),
        (
            ("{photo}", "--model", "{deeper}", "--compare", "{model}", "--layers", "3"),
            1,
            "{model}: there is no block 3: 1 is the first, 2 the last",
        ),
        (("{photo}", "--model", "{model}", "--layers", "x"), 2, "--layers takes numbers of blocks such as 1,12,24"),
        (("{photo}", "--model", "{model}", "--output", "o.gif"), 1, "o.gif: figures are written as .png, .pdf, .svg"),
        (("{photo}", "--model", "{model}", "--compare", "nowhere"), 1, "nowhere: no such folder"),
    ],
)
def test_errors(
    call: Call,
    navit: Path,
    deeper: Path,
    vision_only: Path,
    images_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.jpg").write_text("not a picture")
    Image.new("RGB", (40, 9)).save("tiny.png")
    photo = images_dir.absolute() / "astronaut.jpg"
    names = {"photo": photo, "model": navit, "encoder": vision_only, "deeper": deeper}
    outcome = call("attention", *(word.format(**names) for word in arguments))
    assert outcome.code == code
    assert message.format(**names) in outcome.error
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["text.jpg", "tiny.png"]
