"""A tokenizer for one's own captions, trained with SentencePiece.

The one idea: text comes back as it went in. Nothing is normalised, no space is added or dropped, a line break is a
piece of its own, and a character the vocabulary lacks becomes its UTF-8 bytes. (One exception: U+2581, a block that
SentencePiece writes for a space, comes back as one.)
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..files import atomic_file
from ..processing import TokenizerError, load_tokenizer
from .records import Record, RecordError
from .sources import Source, SourceError

CONTROL_SYMBOLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>")
FILE_NAME = "tokenizer.model"
MAX_RECORDS = 200_000  # texts trained on; of more records, so many evenly spread ones

_BYTES = 256
_MEASURED = 1000  # texts
_LONGEST_LINE = 65536  # bytes; SentencePiece leaves out longer ones


@dataclass(frozen=True)
class TrainedTokenizer:
    """What was trained, and on what."""

    path: Path
    vocab_size: int
    records: int
    characters_per_token: float  # on the first of those records' texts
    skipped: dict[str, int]  # records without a text, by reason


def train(
    source: Source, vocab_size: int, folder: str | Path, progress: Callable[[int, int], None] | None = None
) -> TrainedTokenizer:
    """Train a byte-fallback BPE model on the captions, prompts and turns of a data set; the same data, the same file.

    BPE and not a unigram model: on drawn scenes it needs a fifth fewer tokens at the same vocabulary.

    Args:
        source: up to MAX_RECORDS of its records are used; their pictures are not decoded.
        vocab_size: pieces, the 4 control symbols, the unknown piece, the line break and 256 bytes included.
        folder: where tokenizer.model goes; made if missing.
        progress: called with (records read, of how many).

    Raises:
        SourceError: if no record has a text.
        TokenizerError: if the vocabulary is too small for the characters there are, or larger than the texts can fill.
        OSError: if the file cannot be written.
    """
    import sentencepiece

    smallest = len(CONTROL_SYMBOLS) + len(["<unk>", "\n"]) + _BYTES
    if vocab_size <= smallest:
        raise TokenizerError(f"vocab size {vocab_size} is too small; it must be over {smallest}, better 2000 and more")
    texts, records, skipped = _texts(source, progress)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.split("\n") if line),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,  # the rarest ones are left to their bytes
            control_symbols=list(CONTROL_SYMBOLS),
            user_defined_symbols=["\n"],
            bos_id=-1,
            eos_id=-1,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,  # a number is read digit by digit
            max_sentence_length=_LONGEST_LINE,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        if most := re.search(r"value <= (\d+)", reason):
            problem = f"{records} texts do not fill {vocab_size} pieces; choose at most {most[1]}"
        else:
            problem = f"vocab size {vocab_size} cannot be had from {records} texts ({reason})"
        raise TokenizerError(f"{source.name}: {problem}") from None
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / FILE_NAME) as file:
        file.write(model.getvalue())
    tokenizer = load_tokenizer(folder)
    some = texts[:_MEASURED]
    tokens = sum(len(tokenizer.encode(text)) for text in some)
    return TrainedTokenizer(
        folder / FILE_NAME, tokenizer.vocab_size, records, sum(map(len, some)) / tokens, dict(skipped)
    )


def _texts(source: Source, progress: Callable[[int, int], None] | None) -> tuple[list[str], int, Counter[str]]:
    """What training will encode, the number of usable records, and the others by reason."""
    texts: list[str] = []
    skipped: Counter[str] = Counter()
    example = ""
    number = min(len(source), MAX_RECORDS)
    for done in range(number):
        try:
            record = source[done * len(source) // number]
        except RecordError as error:
            skipped[error.reason] += 1
            example = example or str(error)
        else:
            texts += [text.strip() for text in _spoken(record)]
        if progress is not None:
            progress(done + 1, number)
    texts = [text for text in texts if text]
    if not texts:
        raise SourceError(f"{source.name}: none of {number} records has a text to train on; {example}")
    return texts, number - skipped.total(), skipped


def _spoken(record: Record) -> list[str]:
    if not record.turns:
        return [record.prompt, record.caption]
    said = [turn.get("value", turn.get("content")) for turn in record.turns if isinstance(turn, Mapping)]
    return [text.replace("<image>", "") for text in said if isinstance(text, str)]
