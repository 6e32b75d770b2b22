"""`evaluate`: the reference's loss through the installed command, scores of captions, and a quantized model's cost."""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from conftest import Golden

from genlip_mlx.checkpoint.convert import quantize
from genlip_mlx.checkpoint.quantization import choose

from .conftest import Call, run


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pictures(images_dir: Path) -> list[dict[str, Any]]:
    """Two records."""
    folder = images_dir.resolve()
    return [
        {"image": str(folder / "astronaut.jpg"), "caption": "An astronaut, age 30, smiles at us."},
        {"image": str(folder / "page.png"), "caption": "A page of text, page 12 is shown."},
    ]


@pytest.fixture(scope="module")
def quantized(converted: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "q4"
    quantize(converted["tiny-navit"], folder, choose(bits=4, group_size=32))
    return folder


# --- The reference's numbers ---


def test_the_installed_command_gives_the_references_loss(case: Golden, tmp_path: Path) -> None:
    rows = [
        {"image": str(case.image_path(i).resolve()), "prompt": sample["prompt"], "caption": sample["caption"]}
        for i, sample in enumerate(case.samples)
    ]
    data, output = write(tmp_path / "data.jsonl", *rows), tmp_path / "scores.json"
    outcome = run("evaluate", "--model", case.folder, "--data", data, "--output", output)
    assert (outcome.code, outcome.err) == (0, "")
    facts = json.loads(output.read_text())
    assert facts["nll"] == pytest.approx(case.expected_json["packed_loss"], abs=1e-5)
    assert facts["label_tokens"] == case.expected_json["packed_label_tokens"]
    assert (facts["samples"], facts["skipped"]) == (len(rows), {})
    table = dict(line.rsplit(maxsplit=1) for line in outcome.out.splitlines())
    assert float(table["loss per label token"]) == pytest.approx(facts["nll"], abs=1e-4)
    assert float(table["perplexity"]) == pytest.approx(facts["perplexity"], abs=0.01)


# --- Options ---


def test_captions_are_scored(call: Call, navit: Path, pictures: list[dict[str, Any]], tmp_path: Path) -> None:
    again = pictures[0] | {"caption": "A woman of age 30 in space clothes."}
    data, output, said = write(tmp_path / "d.jsonl", *pictures, again), tmp_path / "o.json", tmp_path / "said.jsonl"
    options = ["--captions", "9", "--max-tokens", "6", "--field", "age=age ([0-9]+),", "--predictions", said]
    outcome = call("evaluate", "--model", navit, "--data", data, "--output", output, *options)
    assert (outcome.code, outcome.err) == (0, "")
    facts = json.loads(output.read_text())
    assert facts["samples"] == 3
    scores = facts["captions"]
    assert scores["captions"] == 2
    assert scores["fields"] == {"age": {"exact_match": 0.0, "captions": 1}}
    assert scores["character_error_rate"] > 0
    for name in ("CIDEr", "BLEU", "word error rate", "exact age (of 1)"):
        assert name in outcome.out
    first, second = (json.loads(line) for line in said.read_text().splitlines())
    assert first["references"] == [pictures[0]["caption"], again["caption"]]
    assert (second["image"], second["finish_reason"]) == (pictures[1]["image"], "length")


def test_columns_limit_and_what_is_skipped(
    call: Call, navit: Path, pictures: list[dict[str, Any]], tmp_path: Path
) -> None:
    rows = [{"photo": row["image"], "words": row["caption"], "ask": ""} for row in pictures]
    data, output = write(tmp_path / "d.jsonl", rows[0], {"photo": "none.png"}, *rows), tmp_path / "o.json"
    columns = ["--image-column", "photo", "--caption-column", "words", "--prompt-column", "ask"]
    arguments = ["evaluate", "--model", navit, "--data", data, "--output", output, *columns]
    outcome = call(*arguments)
    assert outcome.code == 0
    assert outcome.err.startswith(f"skipped (missing file): {data}:2: photo: ")
    assert outcome.out.endswith("\nskipped (missing file 1)        1\n")
    assert json.loads(output.read_text())["skipped"] == {"missing file": 1}
    assert call(*arguments, "--limit", "1").code == 0
    facts = json.loads(output.read_text())
    assert (facts["samples"], facts["skipped"]) == (1, {})


def test_a_model_against_the_full_one(
    call: Call, navit: Path, quantized: Path, pictures: list[dict[str, Any]], tmp_path: Path
) -> None:
    data, output = write(tmp_path / "d.jsonl", *pictures), tmp_path / "o.json"
    arguments = ["evaluate", "--data", data, "--max-tokens", "4", "--output", output]
    outcome = call(*arguments, "--model", quantized, "--against", navit)
    assert (outcome.code, outcome.err) == (0, "")
    facts = json.loads(output.read_text())
    assert {"nll", "perplexity", "label_tokens", "samples", "skipped", "nll_difference", "kl"} <= facts.keys()
    sides = facts["sides"]
    assert facts["nll"] == sides["model"]["nll"]
    assert sides["model"]["disk_bytes"] < sides["full"]["disk_bytes"]
    assert facts["captions"] == 2
    assert outcome.out.splitlines()[0].split() == ["full", "model", "difference"]
    for name in (
        "KL divergence",
        "feature cosine, worst patch",
        "same caption (of 2)",
        "encoding, tokens/s",
        "on disk",
    ):
        assert name in outcome.out

    alone = call("evaluate", "--model", quantized, "--data", data, "--output", output)
    assert alone.code == 0
    assert json.loads(output.read_text())["nll"] == pytest.approx(facts["nll"], abs=1e-5)
    without = call(*arguments, "--model", navit, "--against", navit, "--captions", "0")
    assert "same caption" not in without.out
    assert "captioning, tokens/s" in without.out


# --- Errors: one line, and nothing written ---


@pytest.fixture
def place(
    navit: Path,
    vision_only: Path,
    converted: dict[str, Path],
    pictures: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(navit)
    Path("other").symlink_to(converted["tiny-224"])
    Path("encoder").symlink_to(vision_only)
    write(Path("good.jsonl"), *pictures)
    write(Path("mute.jsonl"), *({"image": row["image"]} for row in pictures))
    write(Path("empty.jsonl"))
    write(Path("gone.jsonl"), {"image": "gone.png", "caption": "x"})
    with tarfile.open("one.tar", "w") as shard:
        shard.add("good.jsonl", "a.json")
    shutil.copytree(navit, "renamed")
    tokens = Path("renamed/tokenizer.json")
    stated = json.loads(tokens.read_text())
    vocabulary = stated["model"]["vocab"]
    vocabulary["!"], vocabulary["#"] = vocabulary["#"], vocabulary["!"]
    tokens.write_text(json.dumps(stated))
    return tmp_path


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("--model model --data mute.jsonl", 1, "no caption: 2, for example mute.jsonl:1: no field caption or"),
        (
            "--model model --data mute.jsonl --captions 1",
            1,
            "mute.jsonl: no record can be used; mute.jsonl:2: no field",
        ),
        (
            "--model model --data good.jsonl --caption-column text",
            1,
            "good.jsonl:1: no field text; it has image, caption",
        ),
        ("--model model --data empty.jsonl", 1, "empty.jsonl: holds no records"),
        ("--model model --data stream:one.tar", 1, "stream:one.tar: a stream cannot be used here"),
        ("--model model --data nowhere", 1, "nowhere: no such file or folder"),
        ("--model nowhere --data good.jsonl", 1, "nowhere: no such folder, and not a hub repo id (owner/name) either"),
        ("--model encoder --data good.jsonl", 1, "this model is vision-only: it has no text embedding and no head"),
        ("--model encoder --data good.jsonl --captions 1", 1, "this model is vision-only"),
        ("--model model --data good.jsonl --against encoder", 1, "this model is vision-only"),
        ("--model model --data good.jsonl --against nowhere", 1, "nowhere: no such folder"),
        ("--model model --data good.jsonl --against renamed", 1, "the tokenizers differ: token "),
        ("--model model --data good.jsonl --against other", 1, "the models read pictures in different ways or sizes"),
        ("--model model --data good.jsonl --output no/o.json", 1, "no/o.json: the folder no does not exist"),
        (
            "--model model --data good.jsonl --captions 1 --predictions no/p.jsonl",
            1,
            "no/p.jsonl: the folder no does not",
        ),
        ("--model model --data good.jsonl --captions 1 --field x=(", 1, "field x: '(' is no regular expression"),
        ("--model model --data good.jsonl --captions 1 --field x=tax", 1, "field x: 'tax' is found in none of the"),
        ("--model model --data good.jsonl --adapter-path nowhere", 1, "nowhere"),
        ("--model model --data good.jsonl --field x=y", 2, "say how many with --captions N"),
        ("--model model --data good.jsonl --predictions p", 2, "say how many with --captions N"),
        ("--model model --data good.jsonl --against model --predictions p", 2, "score one model; leave out --against"),
        ("--model model --data good.jsonl --limit 0", 2, "--limit"),
        ("--model model", 2, "Missing option '--data'"),
        ("--data good.jsonl", 2, "Missing option '--model'"),
    ],
)
def test_errors(call: Call, place: Path, words: str, code: int, message: str) -> None:
    before = sorted(place.rglob("*"))
    written = [] if "--output" in words else ["--output", "o.json"]
    outcome = call("evaluate", *words.split(), *written)
    *skipped, error = outcome.err.splitlines()
    assert (outcome.code, outcome.out) == (code, "")
    assert error.startswith("error: ")
    assert message in error
    assert all(line.startswith("skipped (") for line in skipped)
    assert sorted(place.rglob("*")) == before


def test_no_record_can_be_used(call: Call, place: Path) -> None:
    outcome = call("evaluate", "--model", "model", "--data", "gone.jsonl")
    assert outcome.code == 1
    assert "error: gone.jsonl: none of the first 1 records can be used. missing file: 1" in outcome.err


def test_a_missing_extra_is_named_before_anything_is_generated(
    call: Call, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    assert call("evaluate", "--model", "model", "--data", "good.jsonl").code == 0
    outcome = call("evaluate", "--model", "model", "--data", "good.jsonl", "--captions", "1")
    assert outcome.error.endswith('pip install "genlip-mlx[evaluate]"')
