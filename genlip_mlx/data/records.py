"""One picture and what is said of it, whatever the file it came from.

The one idea: every source reduces what it holds to one mapping of fields and reads it with `Columns`, so that names,
defaults and complaints are the same for JSON lines, tables and tars.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..processing import DEFAULT_PROMPT, Processor, TextSample, TokenizerError

ImageSource = Path | bytes | Image.Image

IMAGE_FIELDS = ("image", "file_name")
TEXT_FIELDS = ("caption", "conversations", "conversation", "messages", "text")
PROMPT_FIELD = "prompt"


class RecordError(ValueError):
    """A record that cannot be used.

    Attributes:
        reason: the kind of defect in a few fixed words, to count by.
        message: one line that names the record, its field and what is wrong with it.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)  # both, or the error could not travel between processes
        self.reason, self.message = reason, message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Record:
    """A picture with either a caption or a conversation about it."""

    name: str  # for messages: file:line, path, or shard/key
    image: ImageSource
    caption: str = ""
    prompt: str = DEFAULT_PROMPT  # what the caption answers; "" is a prompt too
    turns: tuple[Mapping[str, Any], ...] = ()  # instead of prompt and caption, as `Processor.conversation` takes them

    @property
    def picture(self) -> str:
        """What messages call the picture."""
        if isinstance(self.image, Path) and str(self.image) != self.name:
            return f"{self.name}: {self.image}"
        return self.name

    @property
    def question(self) -> tuple[str, str]:
        """A prompt and the answer to it, of a conversation the first; for a record whose `text` is sound."""
        prompts: list[str] = []
        for turn in self.turns:
            role, text = (turn["from"], turn["value"]) if "from" in turn else (turn["role"], turn["content"])
            if role not in ("human", "user"):
                return " ".join(filter(None, prompts)), text.strip()
            prompts.append(text.replace("<image>", "").strip())
        return self.prompt, self.caption.strip()

    def text(self, processor: Processor) -> TextSample:
        """The record's text tokens, with labels where a loss applies.

        Raises:
            RecordError: if the text is empty, or the turns are not a conversation.
        """
        try:
            if self.turns:
                return processor.conversation(self.turns)
            return processor.text(self.prompt, self.caption)
        except TokenizerError as error:
            raise RecordError("bad text", f"{self.name}: {error}") from None
        except ValueError as error:
            raise RecordError("bad conversation" if self.turns else "no caption", f"{self.name}: {error}") from None


@dataclass(frozen=True)
class Columns:
    """Which fields of a row hold what; None stands for the first usual name that the row has."""

    image: str | None = None  # IMAGE_FIELDS
    caption: str | None = None  # TEXT_FIELDS; a text is a caption, a list is a conversation
    prompt: str | None = None  # PROMPT_FIELD

    def record(self, row: Any, name: str, folder: Path) -> Record:
        """Read a row that has a picture.

        Args:
            row: field names to values; the picture is a path, the bytes of a file, or {"bytes", "path"}.
            name: what messages call the record.
            folder: what a relative path is relative to.

        Raises:
            RecordError: if a field is missing or of the wrong kind.
        """
        if not isinstance(row, Mapping):
            raise RecordError("bad record", f"{name}: must be an object with fields, not {_shown(row)}")
        field, value = self._find(row, name, self.image, IMAGE_FIELDS, "no image")
        return self.describe(row, name, _image(value, f"{name}: {field}", folder))

    def describe(self, row: Any, name: str, image: ImageSource) -> Record:
        """Read the text of a row, for a picture from elsewhere.

        Raises:
            RecordError: if there is no caption and no conversation, or a field is of the wrong kind.
        """
        if not isinstance(row, Mapping):
            raise RecordError("bad record", f"{name}: must be an object with fields, not {_shown(row)}")
        field, text = self._find(row, name, self.caption, TEXT_FIELDS, "no caption")
        if isinstance(text, (list, tuple)) and text:
            return Record(name, image, turns=tuple(text))
        if not isinstance(text, str) or not text.strip():
            raise RecordError(
                "no caption", f"{name}: {field} is {_shown(text)}; a caption or a list of turns is needed"
            )
        prompt = row.get(self.prompt or PROMPT_FIELD)
        if self.prompt is not None and self.prompt not in row:
            raise RecordError("no prompt", f"{name}: no field {self.prompt}; it has {_names(row)}")
        if prompt is None:
            return Record(name, image, text)
        if not isinstance(prompt, str):
            raise RecordError("bad prompt", f"{name}: {self.prompt or PROMPT_FIELD} is {_shown(prompt)}, not a text")
        return Record(name, image, text, prompt)

    @staticmethod
    def _find(
        row: Mapping[str, Any], name: str, chosen: str | None, usual: tuple[str, ...], reason: str
    ) -> tuple[str, Any]:
        for field in (chosen,) if chosen else usual:
            if row.get(field) is not None:
                return field, row[field]
        raise RecordError(reason, f"{name}: no field {chosen or ' or '.join(usual)}; it has {_names(row)}")


def _image(value: Any, field: str, folder: Path) -> ImageSource:
    if isinstance(value, (list, tuple)):
        if len(value) != 1:
            raise RecordError("bad image", f"{field} holds {len(value)} pictures; a record has one")
        value = value[0]
    if isinstance(value, Mapping):  # the pictures of Hugging Face data sets
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise RecordError("bad image", f"{field} is {_shown(value)}; a path is needed")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value):
        # What a server sends differs from day to day, and the order of training would with it.
        raise RecordError("bad image", f"{field} is an address, {value}; download the pictures and give their paths")
    path = folder / value
    try:
        found = path.is_file()
    except ValueError:  # a zero byte
        found = False
    if not found:
        raise RecordError("missing file", f"{field}: {path} is no file; paths are relative to {folder}")
    return path


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, row)) or "none"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
