"""Words to ids and back, from a Hugging Face tokenizer.json or a SentencePiece model.

The one idea: a token is a string of bytes, and text is the UTF-8 reading of all bytes in a row. So decoding a list
and streaming one token at a time are the same incremental UTF-8 decoder: linear in the number of
tokens, and a character is never shown before its last byte has come.
"""

from __future__ import annotations

import codecs
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers

END_OF_TURN = "<|im_end|>"  # generation stops at this token
_SPACE = "\u2581"  # how SentencePiece writes a space
_TOKENIZER_JSON = "tokenizer.json"
# All that belongs to a tokenizer in a published folder; `save` writes those that exist.
_FILES = (
    _TOKENIZER_JSON,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.model",
)


class TokenizerError(ValueError):
    """A tokenizer that is missing or unusable, or text it cannot take; the message names the file."""


class Tokenizer(ABC):
    """What captions need of a tokenizer, whichever library reads its file.

    Attributes:
        vocab_size: number of ids the tokenizer knows, special ones included.
        eos_ids: what follows a caption: the ids of "<|im_end|>\\n", as far as the vocabulary has them.
        leading_spaces: how many spaces decoding drops at the very start of a text (SentencePiece puts one there).
    """

    vocab_size: int
    eos_ids: list[int]
    leading_spaces: int

    def __init__(self, path: Path) -> None:
        # Held, so that a tokenizer can be saved after the folder it came from is gone.
        found = (source for pattern in _FILES for source in sorted(path.parent.glob(pattern)))
        self._files = {source.name: _read(source) for source in found}

    @property
    def stop_id(self) -> int:
        """The id at which generation stops."""
        return self.eos_ids[0]

    def encode(self, text: str) -> list[int]:
        """The ids of a text; nothing is added before or after.

        With a tokenizer.json, special tokens spelled out in the text become their ids, as in the reference. Who
        feeds captions from strangers may want to remove "<|im_end|>" from them first.

        Raises:
            TokenizerError: if the text holds half a surrogate pair, which no UTF-8 can express.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(f"the text is not valid Unicode (character {error.start}: {error.reason})") from None
        return self._encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Special tokens and ids outside the vocabulary add nothing; broken UTF-8 becomes U+FFFD."""
        stream = Detokenizer(self)
        return "".join([*map(stream.add, ids), stream.finish()])

    def id_to_text(self, token_id: int) -> str:
        """One token in readable form: " cat", a special token by its name, stray UTF-8 bytes as "<0xE2>"."""
        # surrogateescape turns each undecodable byte b into the code point 0xDC00 + b.
        text = self.token_bytes(token_id).decode("utf-8", "surrogateescape")
        if not text:
            return self.token_name(token_id) or f"<id {token_id}>"
        return "".join(f"<0x{ord(c) - 0xDC00:02X}>" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in text)

    def save(self, folder: Path) -> None:
        """Write the files this tokenizer was loaded from, unchanged, into an existing folder."""
        for name, content in self._files.items():
            (Path(folder) / name).write_bytes(content)

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text, in UTF-8; nothing for special tokens and unknown ids."""

    @abstractmethod
    def token_name(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it; None for unknown ids."""

    @abstractmethod
    def _encode(self, text: str) -> list[int]: ...


class Detokenizer:
    """Text from ids that come one at a time, e.g. while a caption is generated."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._spaces_to_drop = tokenizer.leading_spaces

    def add(self, token_id: int) -> str:
        """The characters that this token completes, possibly none."""
        data = self._tokenizer.token_bytes(token_id)
        if data and self._spaces_to_drop:
            dropped = min(len(data) - len(data.lstrip(b" ")), self._spaces_to_drop)
            data = data[dropped:]
            self._spaces_to_drop = 0 if data else self._spaces_to_drop - dropped
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What is left at the end: U+FFFD if the last character was never completed."""
        return self._utf8.decode(b"", final=True)


class ByteLevelTokenizer(Tokenizer):
    """Byte-level BPE from a tokenizer.json, as Qwen3's.

    Raises:
        TokenizerError: if the file is damaged, is not byte-level, or lacks <|im_end|>.
    """

    leading_spaces = 0

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        import tokenizers

        try:
            self._bpe: tokenizers.Tokenizer = tokenizers.Tokenizer.from_buffer(_read(path))
        except ValueError as error:
            raise TokenizerError(f"{path}: not a valid tokenizer ({error}); fetch the file again") from None
        if not isinstance(self._bpe.decoder, tokenizers.decoders.ByteLevel):
            raise TokenizerError(
                f"{path}: decoder is {type(self._bpe.decoder).__name__}, only ByteLevel is supported; "
                "if this tokenizer has a SentencePiece .model, remove tokenizer.json to use that"
            )
        if self._bpe.token_to_id(END_OF_TURN) is None:
            raise TokenizerError(f"{path}: no {END_OF_TURN} token, which ends a caption; add it to added_tokens")
        # Batching options that some files carry would cut or pad single texts.
        self._bpe.no_truncation()
        self._bpe.no_padding()
        self._special = {i for i, token in self._bpe.get_added_tokens_decoder().items() if token.special}
        self.vocab_size = self._bpe.get_vocab_size()
        self.eos_ids = self._encode(f"{END_OF_TURN}\n")

    def token_bytes(self, token_id: int) -> bytes:
        name = self.token_name(token_id)
        if name is None or token_id in self._special:
            return b""
        table = _byte_of_character()
        if all(c in table for c in name):
            return bytes(table[c] for c in name)
        return name.encode()  # an added token that is not spelled in byte characters

    def token_name(self, token_id: int) -> str | None:
        name: str | None = self._bpe.id_to_token(token_id) if token_id >= 0 else None
        return name

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._bpe.encode(text, add_special_tokens=False).ids
        return ids


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; special tokens in a text are plain words to it.

    Raises:
        TokenizerError: if the file is damaged, or has neither <|im_end|> nor an end-of-sentence id.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        import sentencepiece

        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.load_from_serialized_proto(_read(path))
        except RuntimeError as error:
            raise TokenizerError(f"{path}: not a valid SentencePiece model ({error}); fetch the file again") from None
        self.vocab_size = self._pieces.get_piece_size()
        self.leading_spaces = self._count_leading_spaces()
        stop = self._id_of(END_OF_TURN)
        if stop is not None:
            newline = self._id_of("\n")
            self.eos_ids = [stop] if newline is None else [stop, newline]
        elif self._pieces.eos_id() >= 0:
            self.eos_ids = [self._pieces.eos_id()]
        else:
            raise TokenizerError(f"{path}: neither {END_OF_TURN} nor an end-of-sentence piece; train it with one")

    def _id_of(self, piece: str) -> int | None:
        found: int = self._pieces.piece_to_id(piece)
        return None if found == self._pieces.unk_id() else found

    def _count_leading_spaces(self) -> int:
        # The model's own setting shows in how it decodes three spaces: it drops none, the first, or all.
        space = self._id_of(_SPACE)
        if space is None:
            return 1
        kept = len(self._pieces.decode([space] * 3))
        return sys.maxsize if kept == 0 else 3 - kept

    def token_bytes(self, token_id: int) -> bytes:
        name = self.token_name(token_id)
        if name is None or self._pieces.is_control(token_id) or self._pieces.is_unused(token_id):
            return b""
        if self._pieces.is_byte(token_id):
            return bytes([int(name[3:-1], 16)])  # "<0xE2>"
        if self._pieces.is_unknown(token_id):
            unknown: str = self._pieces.decode([token_id])
            return unknown.encode()
        return name.replace(_SPACE, " ").encode()

    def token_name(self, token_id: int) -> str | None:
        if not 0 <= token_id < self.vocab_size:
            return None
        piece: str = self._pieces.id_to_piece(token_id)
        return piece

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._pieces.encode(text)
        return ids


def tokenizer_file(folder: Path) -> Path | None:
    """The file of a model folder that holds its tokenizer: tokenizer.json before a SentencePiece model.

    Raises:
        TokenizerError: if there are several SentencePiece models to choose from.
    """
    json_file = Path(folder) / _TOKENIZER_JSON
    if json_file.is_file():
        return json_file
    models = sorted(Path(folder).glob("*.model"))
    if len(models) > 1:
        raise TokenizerError(f"{folder}: several tokenizers ({', '.join(m.name for m in models)}); keep one")
    return models[0] if models else None


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder.

    Raises:
        TokenizerError: if there is none, or it cannot be used.
    """
    path = tokenizer_file(folder)
    if path is None:
        raise TokenizerError(
            f"{folder}: no tokenizer.json and no SentencePiece .model; "
            "copy the tokenizer files of the checkpoint this model comes from"
        )
    return ByteLevelTokenizer(path) if path.name == _TOKENIZER_JSON else SentencePieceTokenizer(path)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read ({error.strerror or error})") from None


@cache
def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE (GPT-2's): printable Latin-1 bytes stand for themselves, and the
    68 others, in order, for the code points from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
