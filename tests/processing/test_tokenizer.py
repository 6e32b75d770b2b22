"""Words to ids and back: the reference's ids, both file formats, streaming, and every way a tokenizer can fail."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from genlip_mlx.processing.tokenizer import Detokenizer, Tokenizer, TokenizerError, load_tokenizer

if TYPE_CHECKING:
    from conftest import Golden

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny-224"
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>"]
TEXTS = ["A cat sat on the mat.", "Two dogs, one brown and one white, run over green grass.", "A bar chart of 4 bars."]
text_of_the_world = st.text(st.characters(codec="utf-8"), max_size=40) | st.text("aé猫😀👩‍👩‍👧 \n", max_size=40)
golden_ids = st.lists(st.integers(0, 450), max_size=60)  # 400 tokens, 8 of them special, and ids past the end


def sentencepiece_model(folder: Path, **options: Any) -> Path:
    """Train a small model, as this project trains its own, on a few sentences."""
    model = io.BytesIO()
    settings = {"control_symbols": CONTROL, "user_defined_symbols": ["\n"], "normalization_rule_name": "identity"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        minloglevel=2,
        **(settings | options),
    )
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def golden() -> Tokenizer:
    return load_tokenizer(GOLDEN)


@pytest.fixture(scope="module")
def reference() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(GOLDEN / "tokenizer.json"))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece_model(folder)
    return load_tokenizer(folder)


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.add(i) for i in ids), detokenizer.finish()]


# --- tokenizer.json ---


def test_ids_and_texts_equal_the_reference(case: Golden) -> None:
    tokenizer = load_tokenizer(case.folder)
    for index, sample in enumerate(case.samples):
        ids = tokenizer.encode(sample["prompt"]) + tokenizer.encode(sample["caption"]) + tokenizer.eos_ids
        assert ids == case.expected(f"{index}.input_ids").tolist()
        assert tokenizer.decode(sample["greedy_ids"]) == sample["greedy_text"]


def test_special_ids(golden: Tokenizer) -> None:
    assert golden.vocab_size == 400
    assert golden.eos_ids == [394, *golden.encode("\n")]
    assert golden.stop_id == 394


def test_special_tokens_in_a_text_are_parsed_like_the_reference(golden: Tokenizer) -> None:
    assert golden.encode("a<|im_end|>") == [*golden.encode("a"), 394]
    assert golden.decode(golden.encode("a<|im_end|>b")) == "ab"


@given(text_of_the_world)
def test_round_trip(golden: Tokenizer, text: str) -> None:
    assert golden.decode(golden.encode(text)) == text


@settings(max_examples=300)
@given(golden_ids)
def test_decode_equals_the_library(golden: Tokenizer, reference: tokenizers.Tokenizer, ids: list[int]) -> None:
    assert golden.decode(ids) == reference.decode(ids)


@given(golden_ids)
@example([])
def test_streaming_adds_up(golden: Tokenizer, ids: list[int]) -> None:
    assert "".join(stream(golden, ids)) == golden.decode(ids)


@given(text_of_the_world)
def test_streaming_never_shows_half_a_character(golden: Tokenizer, text: str) -> None:
    shown = ""
    for piece in stream(golden, golden.encode(text)):
        shown += piece
        assert text.startswith(shown)
    assert shown == text


def test_streaming_shows_a_character_with_its_last_byte(golden: Tokenizer) -> None:
    ids = golden.encode("😀")
    assert len(ids) == 4
    assert stream(golden, ids) == ["", "", "", "😀", ""]
    assert stream(golden, ids[:3]) == ["", "", "", "\ufffd"]


def test_streaming_looks_at_each_token_once(golden: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    token_bytes = golden.token_bytes

    def spy(token_id: int) -> bytes:
        seen.append(token_id)
        return token_bytes(token_id)

    monkeypatch.setattr(golden, "token_bytes", spy)
    ids = golden.encode("😀 a long caption " * 50)
    stream(golden, ids)
    assert seen == ids


def test_id_to_text(golden: Tokenizer) -> None:
    cat = golden.encode(" in")
    assert len(cat) == 1
    assert golden.id_to_text(cat[0]) == " in"
    assert [golden.id_to_text(i) for i in golden.encode("😀")] == ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    assert golden.id_to_text(394) == "<|im_end|>"
    assert [golden.id_to_text(i) for i in (440, -1)] == ["<id 440>", "<id -1>"]


def changed(folder: Path, change: Any) -> Path:
    config = json.loads((GOLDEN / "tokenizer.json").read_text())
    change(config)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(config))
    return path


def test_padding_and_truncation_of_the_file_are_ignored(tmp_path: Path, golden: Tokenizer) -> None:
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    pad = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 392, "pad_type_id": 0, "pad_token": "x"}
    changed(tmp_path, lambda c: c.update(truncation=truncation, padding=pad | {"strategy": {"Fixed": 50}}))
    assert load_tokenizer(tmp_path).encode(TEXTS[0]) == golden.encode(TEXTS[0])


def test_an_added_token_outside_the_byte_alphabet(tmp_path: Path) -> None:
    token = {"id": 400, "content": "猫 ", "special": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    path = changed(tmp_path, lambda c: c["added_tokens"].append(token | flags))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("猫 ") == [400]
    assert tokenizer.decode([400]) == tokenizers.Tokenizer.from_file(str(path)).decode([400]) == "猫 "


# --- SentencePiece ---


@given(text_of_the_world.filter(lambda text: "\u2581" not in text))
def test_sentencepiece_round_trip(pieces: Tokenizer, text: str) -> None:
    text = " ".join(text.split(" ")).strip(" ")
    while "  " in text:  # the model itself makes one space of several
        text = text.replace("  ", " ")
    ids = pieces.encode(text)
    assert pieces.decode(ids) == text
    assert "".join(stream(pieces, ids)) == text
    assert all(text.startswith("".join(stream(pieces, ids)[:n])) for n in range(len(ids)))


@pytest.mark.parametrize("dummy", [True, False])
@pytest.mark.parametrize("remove", [True, False])
def test_sentencepiece_decodes_like_the_library(tmp_path: Path, dummy: bool, remove: bool) -> None:
    path = sentencepiece_model(tmp_path, add_dummy_prefix=dummy, remove_extra_whitespaces=remove)
    tokenizer = load_tokenizer(tmp_path)
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    space = library.piece_to_id("\u2581")
    for text in (*TEXTS, " two  spaces ", "😀 é\n猫"):
        for ids in (library.encode(text), [space, *library.encode(text)], library.encode(text)[1:], [space, space]):
            assert tokenizer.decode(ids) == library.decode(ids)
    assert tokenizer.decode([5, *library.encode("on"), library.unk_id()]) == library.decode(
        [5, *library.encode("on"), library.unk_id()]
    )


def test_sentencepiece_special_ids(pieces: Tokenizer) -> None:
    assert [pieces.id_to_text(i) for i in pieces.eos_ids] == ["<|im_end|>", "\n"]
    assert pieces.stop_id == pieces.eos_ids[0]
    assert pieces.vocab_size == 320
    assert pieces.decode([*pieces.encode("A cat"), pieces.stop_id, 99999, -1]) == "A cat"
    assert pieces.stop_id not in pieces.encode("<|im_end|>")


def test_sentencepiece_id_to_text(pieces: Tokenizer) -> None:
    assert "".join(pieces.id_to_text(i) for i in pieces.encode("A cat")) == " A cat"
    assert [pieces.id_to_text(i) for i in pieces.encode("x😀")[-4:]] == ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    assert pieces.id_to_text(99999) == "<id 99999>"


def test_sentencepiece_models_of_others(tmp_path: Path) -> None:
    sentencepiece_model(tmp_path, user_defined_symbols=[])
    tokenizer = load_tokenizer(tmp_path)
    assert [tokenizer.id_to_text(i) for i in tokenizer.eos_ids] == ["<|im_end|>"]  # no newline piece
    sentencepiece_model(tmp_path, control_symbols=[])
    tokenizer = load_tokenizer(tmp_path)
    assert [tokenizer.id_to_text(i) for i in tokenizer.eos_ids] == ["</s>"]
    path = sentencepiece_model(tmp_path, control_symbols=[], eos_id=-1)
    with pytest.raises(TokenizerError, match=rf"^{path}: neither <\|im_end\|> nor an end-of-sentence piece"):
        load_tokenizer(tmp_path)


# --- Files ---


def test_save_copies_the_files_unchanged(tmp_path: Path) -> None:
    source, target, again = (tmp_path / name for name in ("source", "target", "again"))
    for folder in (source, target, again):
        folder.mkdir()
    names = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    for name in names:
        shutil.copy(GOLDEN / name, source)
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "config.json"):
        (source / name).write_text(f"contents of {name}")
    tokenizer = load_tokenizer(source)
    tokenizer.save(target)
    assert {path.name for path in target.iterdir()} == names | {"vocab.json", "merges.txt", "added_tokens.json"}
    for path in target.iterdir():
        assert path.read_bytes() == (source / path.name).read_bytes()
    load_tokenizer(target).save(target)  # in place: nothing to do
    (source / "tokenizer.json").unlink()
    tokenizer.save(again)  # though its own folder has lost it
    assert (again / "tokenizer.json").read_bytes() == (target / "tokenizer.json").read_bytes()


def test_save_sentencepiece(tmp_path: Path, pieces: Tokenizer) -> None:
    pieces.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]
    assert load_tokenizer(tmp_path).encode(TEXTS[0]) == pieces.encode(TEXTS[0])


def test_tokenizers_travel_to_worker_processes(golden: Tokenizer, pieces: Tokenizer) -> None:
    for tokenizer in (golden, pieces):
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.decode(copy.encode(TEXTS[1])) == TEXTS[1]
        assert copy.eos_ids == tokenizer.eos_ids


def test_tokenizer_json_goes_before_a_model(tmp_path: Path, golden: Tokenizer) -> None:
    sentencepiece_model(tmp_path)
    shutil.copy(GOLDEN / "tokenizer.json", tmp_path)
    assert load_tokenizer(tmp_path).eos_ids == golden.eos_ids


def test_import_is_light() -> None:
    heavy = "'mlx.core', 'transformers', 'tokenizers', 'sentencepiece', 'urllib.request'"
    code = f"import sys, genlip_mlx.processing; print([m for m in ({heavy}) if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


# --- Errors ---


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=rf"^{tmp_path}: no tokenizer.json and no SentencePiece .model; copy the"):
        load_tokenizer(tmp_path)
    for name in ("a.model", "b.model"):
        (tmp_path / name).touch()
    with pytest.raises(TokenizerError, match=rf"^{tmp_path}: several tokenizers \(a.model, b.model\); keep one"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"not json", b"\xff\xfe"])
def test_damaged_tokenizer_json(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=f"^{path}: not a valid tokenizer .*; fetch the file again") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\n\x05abc"])
def test_damaged_sentencepiece_model(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=f"^{path}: not a valid SentencePiece model .*; fetch the file again"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_file_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.mkdir()
    with pytest.raises(TokenizerError, match=f"^{path}: cannot be read .Is a directory"):
        load_tokenizer(tmp_path)


def test_tokenizer_json_of_another_kind(tmp_path: Path) -> None:
    path = changed(
        tmp_path, lambda config: config.update(decoder={"type": "WordPiece", "prefix": "#", "cleanup": True})
    )
    with pytest.raises(TokenizerError, match=f"^{path}: decoder is WordPiece, only ByteLevel is supported; if this"):
        load_tokenizer(tmp_path)


def test_tokenizer_json_without_end_of_turn(tmp_path: Path) -> None:
    path = changed(tmp_path, lambda config: config.update(added_tokens=[]))
    with pytest.raises(TokenizerError, match=rf"^{path}: no <\|im_end\|> token, which ends a caption"):
        load_tokenizer(tmp_path)


def test_half_a_surrogate_pair(golden: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"the text is not valid Unicode \(character 1: surrogates not allowed\)"):
        golden.encode("a\ud83d")
