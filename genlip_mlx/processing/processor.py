"""A model's two inputs in one object: pictures to patches, and prompts, captions and turns to ids.

The one idea: a sample's text is pieces tokenized apart and joined, so where a loss applies is known
per piece, never searched for in the joined text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..config import ConfigError, GenLIPConfig
from .images import ImageError, ImageProcessor, open_image
from .tokenizer import Tokenizer, TokenizerError, load_tokenizer, tokenizer_file

DEFAULT_PROMPT = "Describe the image in detail."
NO_LOSS = -100  # the label of a token that is not to be predicted

_PREPROCESSOR = "preprocessor_config.json"
_IMAGE_TAG = "<image>"
_USER_ROLES = ("human", "user")
_ASSISTANT_ROLES = ("gpt", "assistant")


@dataclass(frozen=True)
class TextSample:
    """The text tokens of one training sample."""

    input_ids: np.ndarray  # [T] int32
    labels: np.ndarray  # [T] int32; labels[k] is input_ids[k], or NO_LOSS


@dataclass(frozen=True)
class Processor:
    """What stands between files and a model."""

    image_processor: ImageProcessor
    tokenizer: Tokenizer | None  # None: a vision-only model

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Processor:
        """Read preprocessor_config.json and the tokenizer of a model folder.

        Raises:
            ConfigError: if the folder or its preprocessor_config.json is missing or not understood.
            TokenizerError: if the tokenizer is unusable, or missing in a model that is not vision-only.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder")
        image_processor = ImageProcessor.from_file(folder / _PREPROCESSOR)
        config = folder / "config.json"
        if tokenizer_file(folder) is None and config.is_file() and GenLIPConfig.from_file(config).vision_only:
            return cls(image_processor, None)
        return cls(image_processor, load_tokenizer(folder))

    def save(self, folder: str | Path) -> None:
        """Write preprocessor_config.json, and copy the tokenizer's files, into a folder (made if missing)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.image_processor.to_dict(), indent=2) + "\n"
        (folder / _PREPROCESSOR).write_text(text, encoding="utf-8")
        if self.tokenizer is not None:
            self.tokenizer.save(folder)

    def images(self, sources: Iterable[str | Path | bytes | Image.Image]) -> list[tuple[np.ndarray, tuple[int, int]]]:
        """Patches [h*w, 3*patch_size**2] float32 and grid (h, w) of each picture.

        Raises:
            ImageError: at the first picture that cannot be used, naming it.
        """
        return [self._image(source, index) for index, source in enumerate(sources)]

    def _image(self, source: str | Path | bytes | Image.Image, index: int) -> tuple[np.ndarray, tuple[int, int]]:
        by_name = isinstance(source, (str, Path))
        name = str(source) if by_name else getattr(source, "filename", "") or f"image {index}"
        image = open_image(source, name)
        try:
            return self.image_processor(image)
        except ImageError as error:
            raise ImageError(f"{name}: {error}") from None

    def prompt_ids(self, prompt: str) -> list[int]:
        """The ids of a prompt, stripped; none for an empty one."""
        return self._ids(prompt, "prompt")

    def text(self, prompt: str, caption: str) -> TextSample:
        """A captioned picture's text: prompt without loss, then caption and eos ids with loss.

        Raises:
            ValueError: if the caption is empty, or a field is not text; the field is named.
        """
        ids = self._ids(caption, "caption")
        if not ids:
            raise ValueError("caption: is empty; every sample needs a text to learn")
        return _sample([(self.prompt_ids(prompt), False), (ids + self._tokenizer().eos_ids, True)])

    def conversation(self, turns: Sequence[Mapping[str, Any]]) -> TextSample:
        """A conversation's text: user turns without loss, assistant turns and the eos ids after each with loss.

        Args:
            turns: [{"from": "human" | "user" | "gpt" | "assistant", "value": text}, ...], or with the keys "role"
                and "content". An <image> tag in a user turn is removed: the picture always comes first.

        Raises:
            ValueError: naming the turn and its field, if a role is unknown, a text is empty or missing, or no
                turn is the assistant's.
        """
        pieces: list[tuple[list[int], bool]] = []
        for number, turn in enumerate(turns):
            if not isinstance(turn, Mapping):
                raise ValueError(f"turn {number}: must be an object with from and value, not {turn!r}")
            role_key, text_key = ("from", "value") if "from" in turn else ("role", "content")
            role, text = turn.get(role_key), turn.get(text_key)
            if role not in _USER_ROLES + _ASSISTANT_ROLES:
                known = ", ".join(_USER_ROLES + _ASSISTANT_ROLES)
                raise ValueError(f"turn {number}: {role_key} is {role!r}; known roles are {known}")
            field = f"turn {number}: {text_key}"
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{field} is {'missing' if text is None else repr(text)}; a turn needs a text")
            if role in _USER_ROLES:
                pieces.append((self._ids(text.replace(_IMAGE_TAG, ""), field), False))
            else:
                pieces.append((self._ids(text, field) + self._tokenizer().eos_ids, True))
        if not any(learn for _, learn in pieces):
            raise ValueError(f"conversation: no turn from {' or '.join(_ASSISTANT_ROLES)}, so nothing to learn")
        return _sample(pieces)

    def _ids(self, text: str, field: str) -> list[int]:
        tokenizer = self._tokenizer()
        if not isinstance(text, str):
            raise ValueError(f"{field}: must be text, not {text!r}")
        text = text.strip()
        try:
            return tokenizer.encode(text) if text else []
        except TokenizerError as error:
            raise TokenizerError(f"{field}: {error}") from None

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise TokenizerError("this model is vision-only and has no tokenizer; use a whole model for text")
        return self.tokenizer


def _sample(pieces: Sequence[tuple[list[int], bool]]) -> TextSample:
    """Join pieces of ids, each with or without loss."""
    input_ids = np.array([i for ids, _ in pieces for i in ids], np.int32)
    learn = np.repeat([learn for _, learn in pieces], [len(ids) for ids, _ in pieces])
    return TextSample(input_ids, np.where(learn, input_ids, np.int32(NO_LOSS)))
