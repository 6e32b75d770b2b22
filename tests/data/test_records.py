"""Records: which fields are read, and what is said of those that cannot be."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from genlip_mlx.data.records import Columns, Record, RecordError
from genlip_mlx.processing import DEFAULT_PROMPT, NO_LOSS, ImageProcessor, Processor, load_tokenizer

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.jpg").write_bytes(b"pixels")
    return tmp_path


@pytest.fixture
def processor(golden_dir: Path) -> Processor:
    return Processor(ImageProcessor(native=True), load_tokenizer(golden_dir / "tiny-224"))


def read(row: Any, folder: Path, **columns: str) -> Record:
    return Columns(**columns).record(row, "d.jsonl:7", folder)


@pytest.mark.parametrize(
    ("row", "columns", "caption", "prompt"),
    [
        ({"image": "a.jpg", "caption": "A cat."}, {}, "A cat.", DEFAULT_PROMPT),
        ({"file_name": "a.jpg", "text": "A cat."}, {}, "A cat.", DEFAULT_PROMPT),
        ({"image": "a.jpg", "caption": "A cat.", "prompt": None}, {}, "A cat.", DEFAULT_PROMPT),
        ({"image": "a.jpg", "caption": "A cat.", "prompt": ""}, {}, "A cat.", ""),
        ({"image": "a.jpg", "caption": "A cat.", "prompt": "Say it.", "text": "no"}, {}, "A cat.", "Say it."),
        ({"image": "x", "img": "a.jpg", "caption": "A cat."}, {"image": "img"}, "A cat.", DEFAULT_PROMPT),
        ({"image": "a.jpg", "alt": "A cat.", "caption": "no"}, {"caption": "alt"}, "A cat.", DEFAULT_PROMPT),
        ({"image": ["a.jpg"], "caption": "A cat.", "ask": "Say it."}, {"prompt": "ask"}, "A cat.", "Say it."),
    ],
)
def test_fields_are_found(row: dict, columns: dict, caption: str, prompt: str, folder: Path) -> None:
    assert read(row, folder, **columns) == Record("d.jsonl:7", folder / "a.jpg", caption, prompt)


@pytest.mark.parametrize("name", ["conversations", "conversation", "messages"])
def test_a_list_is_a_conversation(name: str, folder: Path, processor: Processor) -> None:
    record = read({"image": "a.jpg", name: TURNS}, folder)
    assert record.turns == tuple(TURNS)
    expected = processor.conversation(TURNS)
    text = record.text(processor)
    assert text.input_ids.tolist() == expected.input_ids.tolist()
    assert text.labels.tolist() == expected.labels.tolist()
    assert read({"image": "a.jpg", "chat": TURNS}, folder, caption="chat").turns == tuple(TURNS)


def test_a_caption_answers_its_prompt(folder: Path, processor: Processor) -> None:
    text = read({"image": "a.jpg", "caption": "A cat.", "prompt": "Say it."}, folder).text(processor)
    silent = int((text.labels == NO_LOSS).sum())
    assert text.input_ids[:silent].tolist() == processor.prompt_ids("Say it.")


def test_pictures_come_as_bytes_too(folder: Path) -> None:
    assert read({"image": b"\xff\xd8", "caption": "x"}, folder).image == b"\xff\xd8"
    assert read({"image": {"bytes": b"\xff", "path": "a.jpg"}, "caption": "x"}, folder).image == b"\xff"
    assert read({"image": {"bytes": None, "path": "a.jpg"}, "caption": "x"}, folder).image == folder / "a.jpg"
    assert read({"image": str(folder / "a.jpg"), "caption": "x"}, Path("elsewhere")).image == folder / "a.jpg"


@pytest.mark.parametrize(
    ("row", "reason", "message"),
    [
        (["a.jpg"], "bad record", "must be an object with fields, not ['a.jpg']"),
        ({"caption": "x"}, "no image", "no field image or file_name; it has caption"),
        ({"image": None, "caption": "x"}, "no image", "no field image or file_name"),
        ({"image": 3, "caption": "x"}, "bad image", "image is 3; a path is needed"),
        ({"image": ["a.jpg", "a.jpg"], "caption": "x"}, "bad image", "image holds 2 pictures"),
        ({"image": "https://example.org/a.jpg", "caption": "x"}, "bad image", "download the pictures"),
        ({"image": "b.jpg", "caption": "x"}, "missing file", "b.jpg is no file; paths are relative to"),
        ({"image": "\0", "caption": "x"}, "missing file", "is no file"),
        ({"image": "a.jpg"}, "no caption", "no field caption or conversations or conversation or messages or text"),
        ({"image": "a.jpg", "caption": "  "}, "no caption", "caption is '  '; a caption or a list of turns is needed"),
        ({"image": "a.jpg", "caption": ["x" * 99] * 0}, "no caption", "caption is []"),
        ({"image": "a.jpg", "caption": 7}, "no caption", "caption is 7"),
        ({"image": "a.jpg", "caption": "x", "prompt": 7}, "bad prompt", "prompt is 7, not a text"),
    ],
)
def test_what_is_wrong_is_named(row: Any, reason: str, message: str, folder: Path) -> None:
    with pytest.raises(RecordError) as caught:
        read(row, folder)
    assert caught.value.reason == reason
    assert str(caught.value).startswith("d.jsonl:7: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("column", ["image", "caption", "prompt"])
def test_a_chosen_field_must_be_there(column: str, folder: Path) -> None:
    with pytest.raises(RecordError, match=r"d\.jsonl:7: no field other; it has image, caption"):
        read({"image": "a.jpg", "caption": "x"}, folder, **{column: "other"})


@pytest.mark.parametrize(
    ("row", "reason", "message"),
    [
        ({"conversations": [{"from": "cat", "value": "x"}]}, "bad conversation", "d.jsonl:7: turn 0: from is 'cat'"),
        ({"conversations": ["x", "y"]}, "bad conversation", "d.jsonl:7: turn 0: must be an object"),
        ({"conversations": TURNS[:1]}, "bad conversation", "d.jsonl:7: conversation: no turn from gpt"),
        ({"caption": "half \ud800"}, "bad text", "d.jsonl:7: caption: the text is not valid Unicode"),
    ],
)
def test_texts_that_teach_nothing(row: dict, reason: str, message: str, folder: Path, processor: Processor) -> None:
    record = read({"image": "a.jpg", **row}, folder)
    with pytest.raises(RecordError) as caught:
        record.text(processor)
    assert caught.value.reason == reason
    assert message in str(caught.value)


def test_errors_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(RecordError("no image", "d:1: no field image")))
    assert (error.reason, str(error)) == ("no image", "d:1: no field image")
