"""Pixels and words to arrays. Numpy only: data workers import this without starting MLX."""

from .images import ImageError, ImageProcessor, image_size, list_images, open_image
from .processor import DEFAULT_PROMPT, NO_LOSS, Processor, TextSample
from .tokenizer import Detokenizer, Tokenizer, TokenizerError, load_tokenizer

__all__ = [
    "DEFAULT_PROMPT",
    "NO_LOSS",
    "Detokenizer",
    "ImageError",
    "ImageProcessor",
    "Processor",
    "TextSample",
    "Tokenizer",
    "TokenizerError",
    "image_size",
    "list_images",
    "load_tokenizer",
    "open_image",
]
