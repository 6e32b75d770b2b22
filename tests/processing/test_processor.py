"""Prompts, captions and turns to ids and labels, and a model folder's processor in and out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from genlip_mlx.config import ConfigError
from genlip_mlx.processing.images import ImageError, ImageProcessor
from genlip_mlx.processing.processor import DEFAULT_PROMPT, NO_LOSS, Processor, TextSample
from genlip_mlx.processing.tokenizer import Tokenizer, TokenizerError

if TYPE_CHECKING:
    from conftest import Golden

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = (
    "config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_pretrained(GOLDEN / "tiny-navit")


@pytest.fixture(scope="module")
def tokenizer(processor: Processor) -> Tokenizer:
    assert processor.tokenizer is not None
    return processor.tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder's small files, to be spoilt."""
    for name in FILES:
        shutil.copyfile(GOLDEN / "tiny-navit" / name, tmp_path / name)
    return tmp_path


def learned(sample: TextSample) -> list[int]:
    assert sample.input_ids.dtype == sample.labels.dtype == np.int32
    assert sample.input_ids.shape == sample.labels.shape
    has_loss = sample.labels != NO_LOSS
    assert (sample.labels == sample.input_ids)[has_loss].all()
    ids: list[int] = sample.labels[has_loss].tolist()
    return ids


def test_samples_equal_the_reference(case: Golden) -> None:
    processor = Processor.from_pretrained(case.folder)
    for index, expected in enumerate(case.samples):
        sample = processor.text(expected["prompt"], expected["caption"])
        assert sample.input_ids.dtype == sample.labels.dtype == np.int32
        np.testing.assert_array_equal(sample.input_ids, case.expected(f"{index}.input_ids"))
        np.testing.assert_array_equal(sample.labels, case.expected(f"{index}.labels"))
        assert len(processor.prompt_ids(expected["prompt"])) == expected["n_prompt"]
        ((patches, grid),) = processor.images([case.image_path(index)])
        assert list(grid) == expected["grid"]
        np.testing.assert_allclose(
            case.rows(patches, f"{index}.patches"), case.expected(f"{index}.patches"), rtol=0, atol=1e-6
        )


def test_prompts_are_stripped(processor: Processor, tokenizer: Tokenizer) -> None:
    assert processor.prompt_ids(f" {DEFAULT_PROMPT}\n") == tokenizer.encode(DEFAULT_PROMPT)
    assert processor.prompt_ids("") == processor.prompt_ids(" \n") == []


def test_text_learns_caption_and_eos(processor: Processor, tokenizer: Tokenizer) -> None:
    sample = processor.text("What?", " A cat. ")
    assert sample.input_ids.tolist() == tokenizer.encode("What?") + tokenizer.encode("A cat.") + tokenizer.eos_ids
    assert learned(sample) == tokenizer.encode("A cat.") + tokenizer.eos_ids
    without = processor.text("", "A cat.")
    assert learned(without) == without.input_ids.tolist()


@pytest.mark.parametrize("keys", [("from", "value"), ("role", "content")])
@pytest.mark.parametrize("roles", [("human", "gpt"), ("user", "assistant")])
def test_conversation(
    processor: Processor, tokenizer: Tokenizer, keys: tuple[str, str], roles: tuple[str, str]
) -> None:
    texts = ["<image>\nWhat is it?", " A cat. ", "Which colour?", "Black."]
    turns = [dict(zip(keys, (roles[i % 2], text))) for i, text in enumerate(texts)]
    sample = processor.conversation(turns)
    e, eos = tokenizer.encode, tokenizer.eos_ids
    first, second = e("What is it?") + e("A cat.") + eos, e("Which colour?") + e("Black.") + eos
    assert sample.input_ids.tolist() == first + second
    assert learned(sample) == e("A cat.") + eos + e("Black.") + eos


def test_one_exchange_equals_prompt_and_caption(processor: Processor) -> None:
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A cat."}]
    expected = processor.text("", "A cat.")
    np.testing.assert_array_equal(processor.conversation(turns).labels, expected.labels)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([{"from": "system", "value": "x"}], "turn 0: from is 'system'; known roles are human, user, gpt, assistant"),
        ([{"role": "tool", "content": "x"}], "turn 0: role is 'tool'; known roles"),
        ([{}], "turn 0: role is None; known roles"),
        ([{"from": "user", "value": "x"}, {"from": "gpt"}], "turn 1: value is missing; a turn needs a text"),
        ([{"from": "user", "value": "  "}], "turn 0: value is '  '; a turn needs a text"),
        ([{"role": "user", "content": ["x"]}], r"turn 0: content is \['x'\]; a turn needs a text"),
        ([{"from": "user", "value": "x"}], "conversation: no turn from gpt or assistant, so nothing to learn"),
        ([], "conversation: no turn from gpt or assistant"),
        (["x"], "turn 0: must be an object with from and value, not 'x'"),
        ([{"from": "gpt", "value": "a\ud83d"}], r"turn 0: value: the text is not valid Unicode \(character 1"),
    ],
)
def test_bad_conversations(processor: Processor, turns: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        processor.conversation(turns)


def test_bad_captions(processor: Processor) -> None:
    with pytest.raises(ValueError, match=r"^caption: is empty; every sample needs a text to learn"):
        processor.text("What?", " \n")
    not_text: Any = None
    with pytest.raises(ValueError, match=r"^caption: must be text, not None"):
        processor.text("What?", not_text)
    with pytest.raises(ValueError, match=r"^prompt: must be text, not None"):
        processor.text(not_text, "A cat.")
    with pytest.raises(ValueError, match=r"^caption: the text is not valid Unicode"):
        processor.text("", "\ud83d")


def test_images_name_the_one_that_fails(processor: Processor, tmp_path: Path) -> None:
    long = tmp_path / "long.png"
    Image.new("RGB", (900, 3)).save(long)
    page = GOLDEN / "images" / "page.png"
    assert [grid for _, grid in processor.images([page, page.read_bytes(), Image.open(page)])] == [(12, 24)] * 3
    with pytest.raises(ImageError, match=f"^{long}: an image of 900 x 3 pixels has an aspect ratio over 200"):
        processor.images([page, long])
    with pytest.raises(ImageError, match=r"^image 1: an image of 900 x 3"):
        processor.images([page, long.read_bytes()])
    with pytest.raises(ImageError, match=f"^{long}: an image of 900 x 3"):
        processor.images([Image.open(long)])


def test_save_and_load(processor: Processor, tmp_path: Path) -> None:
    processor.save(tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {*FILES} - {"config.json"}
    for path in (tmp_path / "new").iterdir():
        assert path.read_text().strip() == (GOLDEN / "tiny-navit" / path.name).read_text().strip()
    again = Processor.from_pretrained(tmp_path / "new")
    assert again.image_processor == processor.image_processor
    assert again.prompt_ids(DEFAULT_PROMPT) == processor.prompt_ids(DEFAULT_PROMPT)


def test_a_vision_only_model_needs_no_tokenizer(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=f"^{folder}: no tokenizer.json and no SentencePiece .model"):
        Processor.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vision_only": True}))
    processor = Processor.from_pretrained(folder)
    assert processor.tokenizer is None
    processor.save(tmp_path / "saved")
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["preprocessor_config.json"]
    with pytest.raises(TokenizerError, match=r"^this model is vision-only and has no tokenizer"):
        processor.prompt_ids(DEFAULT_PROMPT)


def test_bad_folders(folder: Path) -> None:
    with pytest.raises(ConfigError, match=f"^{folder}/no: no such folder"):
        Processor.from_pretrained(folder / "no")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=f"^{folder}/preprocessor_config.json: no such file; copy it from"):
        Processor.from_pretrained(folder)


def test_a_processor_can_be_made_without_files(tokenizer: Tokenizer) -> None:
    processor = Processor(ImageProcessor(native=False), tokenizer)
    assert processor.images([Image.new("L", (5, 5))])[0][1] == (14, 14)
