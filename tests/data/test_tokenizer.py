"""Training a tokenizer: text comes back as it went in, special tokens are there, the same data gives the same file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from genlip_mlx.cli.tokenizer import app
from genlip_mlx.data.sources import SourceError, open_source
from genlip_mlx.data.synthetic import Scenes
from genlip_mlx.data.tokenizer import CONTROL_SYMBOLS, train
from genlip_mlx.processing import DEFAULT_PROMPT, Processor, Tokenizer, TokenizerError, load_tokenizer
from genlip_mlx.processing.images import ImageProcessor


def captions(folder: Path, texts: list[object], name: str = "caption") -> str:
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps({"image": "d.jsonl", name: text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    texts: list[object] = [scene.caption for scene in Scenes("train", size=200)]
    return captions(tmp_path_factory.mktemp("data"), texts)


@pytest.fixture(scope="module")
def tokenizer(data: str, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train(open_source(data), 600, folder)
    return load_tokenizer(folder)


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))


@given(TEXTS)
def test_text_comes_back_as_it_went_in(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", ["  two  spaces ", "a line\n\n  and\tanother\r\n", "ﬁ ½ Å e\u0301", "猫🐈", "12 345"])
def test_nothing_is_normalised(text: str, tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens(tokenizer: Tokenizer) -> None:
    ids = [next(i for i in range(tokenizer.vocab_size) if tokenizer.token_name(i) == name) for name in CONTROL_SYMBOLS]
    newline = tokenizer.encode("\n")
    assert tokenizer.eos_ids == [ids[2], *newline]
    assert len(newline) == 1
    assert tokenizer.decode(ids) == ""
    assert not {*ids} & {*tokenizer.encode("".join(CONTROL_SYMBOLS))}  # a caption cannot spell them


def test_captions_become_few_tokens(tokenizer: Tokenizer) -> None:
    held_out = [scene.caption for scene in Scenes("validation", size=20)]
    assert sum(map(len, held_out)) / sum(len(tokenizer.encode(text)) for text in held_out) > 2.5
    assert len(tokenizer.encode(DEFAULT_PROMPT)) <= 7  # every sample has it, so it is among the texts
    assert len(tokenizer.encode("8056")) == 4


def test_it_serves_a_processor(tokenizer: Tokenizer) -> None:
    sample = Processor(ImageProcessor(native=True), tokenizer).text("", "A cat.")
    assert tokenizer.decode(sample.input_ids.tolist()) == "A cat.\n"


def test_the_same_data_gives_the_same_file(data: str, tmp_path: Path) -> None:
    trained = [train(open_source(data), 400, tmp_path / name) for name in "ab"]
    assert trained[0].path == tmp_path / "a" / "tokenizer.model"
    assert trained[0].path.read_bytes() == trained[1].path.read_bytes()
    assert (trained[0].vocab_size, trained[0].records, trained[0].skipped) == (400, 200, {})


def test_of_many_records_some_are_used(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genlip_mlx.data.tokenizer.MAX_RECORDS", 50)
    seen = []
    trained = train(open_source(data), 350, tmp_path, lambda done, total: seen.append((done, total)))
    assert trained.records == 50
    assert seen[-1] == (50, 50)


def test_turns_are_texts_too(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nQuixotic zebras?"}, {"from": "gpt", "value": "Jovial lynxes."}]
    path = captions(tmp_path, [turns] * 30, "conversations")
    train(open_source(path), 300, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer.encode("zebras")) < 6
    assert len(tokenizer.encode("<image>")) == 7


def test_a_data_set_without_text(tmp_path: Path) -> None:
    path = captions(tmp_path, [None, None])
    with pytest.raises(SourceError, match=r"none of 2 records has a text to train on; .*d\.jsonl:1: no field caption"):
        train(open_source(path), 300, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("size", "message"),
    [(262, "is too small; it must be over 262"), (20000, r"200 texts do not fill 20000 pieces; choose at most \d+")],
)
def test_vocabularies_that_cannot_be(size: int, message: str, data: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        train(open_source(data), size, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_command(data: str, tmp_path: Path) -> None:
    arguments = ["train", "--data", data, "--vocab-size", "500", "--output", str(tmp_path / "t")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "tokenizer.model: 500 pieces from 200 records" in result.output
    assert load_tokenizer(tmp_path / "t").vocab_size == 500


def test_the_command_says_what_it_left_out(tmp_path: Path) -> None:
    path = captions(tmp_path, ["A cat sleeps.", None, "A dog runs.", 7])
    result = CliRunner().invoke(app, ["train", "--data", path, "--vocab-size", "290", "--output", str(tmp_path / "t")])
    assert "skipped 2 records: no caption" in result.stderr
