"""`readout`: the reference's tokens through the installed command, its figures, and what cannot be read out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Golden
from PIL import Image

from .conftest import Call, run


def test_the_installed_command_gives_the_references_tokens(case: Golden, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "tokens.json"
    image = case.image_path(0)
    outcome = run("readout", image, "--model", model, "--json", output, "--dtype", "float32")
    assert outcome.code == 0, outcome.err
    h, w = case.samples[0]["grid"]
    assert outcome.err == f"tokens of {h * w} patches written to {output}\n"
    assert outcome.out.startswith(f"{image}: {h} x {w} patches\n")
    result = json.loads(output.read_text())
    assert result.keys() == {"image", "model", "grid", "top"}
    assert result["grid"] == [h, w]
    assert [[token["id"] for token in patch] for patch in result["top"]] == case.expected("0.readout_top5").tolist()
    for patch in result["top"]:
        assert all(token.keys() == {"id", "token", "p"} for token in patch)
        assert [token["p"] for token in patch] == sorted((token["p"] for token in patch), reverse=True)


def test_figures(call: Call, navit: Path, images_dir: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.png"
    Image.open(images_dir / "astronaut.jpg").resize((80, 64)).save(small)
    tokens, word, data = tmp_path / "tokens.png", tmp_path / "word.svg", tmp_path / "word.json"
    outcome = call("readout", small, "--model", navit, "--top", "2", "--output", tokens)
    assert (outcome.code, outcome.err) == (0, f"figure written to {tokens}\n")
    assert Image.open(tokens).width >= 1200
    outcome = call("readout", small, "--model", navit, "--query", "cat", "--output", word, "--json", data)
    assert outcome.code == 0
    assert outcome.err.startswith("'cat' is several tokens; counted is the first, 'c' or ' ca'\n")
    assert "'cat': mean probability 0." in outcome.out
    assert "<svg" in word.read_text()
    result = json.loads(data.read_text())
    assert (result["query"]["word"], result["query"]["whole"], len(result["query"]["p"])) == ("cat", False, 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{photo}", "--model", "{encoder}"), "this model is vision-only"),
        (("{photo}", "--model", "{encoder}", "--query", "cat"), "this model is vision-only"),
        (("small.png", "--model", "{model}"), "small.png: 40 x 9 pixels are less than one patch of 16 x 16; enlarge"),
        (("text.jpg", "--model", "{model}"), "text.jpg: not an image of a known format"),
        (("none.jpg", "--model", "{model}"), "none.jpg: no such file"),
        (("{photo}", "--model", "{model}", "--query", "猫"), "query '猫': the word is not in the vocabulary"),
        (("{photo}", "--model", "{model}", "--query", "a cat"), "query 'a cat': a single word is needed"),
        (("{photo}", "--model", "{model}", "--top", "9999"), "top must lie in 1 to 448, the size of the vocabulary"),
        (("{photo}", "--model", "{model}", "--output", "o.txt"), "o.txt: figures are written as .png, .pdf, .svg"),
        (("{photo}", "--model", "{model}", "--json", "no/o.json"), "no/o.json: the folder no does not exist"),
        (("{photo}", "--model", "nowhere"), "nowhere: no such folder"),
    ],
)
def test_errors(
    call: Call,
    navit: Path,
    vision_only: Path,
    images_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.jpg").write_text("not a picture")
    Image.new("RGB", (40, 9)).save("small.png")
    names = {"photo": images_dir.absolute() / "astronaut.jpg", "model": navit, "encoder": vision_only}
    outcome = call("readout", *(word.format(**names) for word in arguments))
    assert outcome.code == 1
    assert message in outcome.error
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["small.png", "text.jpg"]
