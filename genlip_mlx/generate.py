"""Speaking captions: prefill the picture and the prompt once, then one token at a time.

A batch holds pictures of different sizes; every caption is the one the picture would get alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from .model.genlip import GenLIP, VisionOnlyError
from .processing.images import ImageError
from .processing.processor import DEFAULT_PROMPT, Processor
from .processing.reader import ImageLike, Reading, as_list, read_images
from .processing.tokenizer import Detokenizer

Sampler = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class Caption:
    """What was said of one picture.

    `tokens` are the ids as generated, the end token excluded; `finish_reason` is "stop" (the model
    ended its text) or "length" (max_tokens reached). For a picture that could not be read `error`
    says why and the other fields are empty.
    """

    image: str
    caption: str | None
    tokens: list[int]
    finish_reason: str | None
    grid: tuple[int, int] | None  # (h, w) in patches
    prompt: str
    error: str | None = None


def caption(
    model: GenLIP,
    processor: Processor,
    images: ImageLike | Sequence[ImageLike],
    prompt: str = DEFAULT_PROMPT,
    **options: Any,
) -> list[Caption]:
    """Caption pictures: paths, URLs, encoded bytes or PIL images.

    Args:
        options: max_tokens, temp, top_p, seed, batch_size as in `captions`.

    Returns:
        One `Caption` a picture, in order.

    Raises:
        ImageError: if a picture cannot be read. `captions` goes on instead.
        VisionOnlyError: if the model has no text side.
    """
    results = list(captions(model, processor, as_list(images), prompt, **options))
    for result in results:
        if result.error is not None:
            raise ImageError(result.error)
    return results


def captions(
    model: GenLIP,
    processor: Processor,
    images: Iterable[ImageLike],
    prompt: str = DEFAULT_PROMPT,
    *,
    max_tokens: int = 256,
    temp: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    batch_size: int = 8,
) -> Iterator[Caption]:
    """Caption any number of pictures, yielding each result in order as its batch is done.

    A picture that cannot be read gives a `Caption` with `error` set, and the rest goes on.

    Args:
        max_tokens: tokens a caption has at most.
        temp: 0 is greedy; otherwise the softmax temperature of sampling.
        top_p: sample from the smallest set of tokens with this total probability.
        seed: makes sampling repeatable for the same pictures and batch size.
        batch_size: pictures decoded together.

    Raises:
        ValueError: if an option is out of its range.
        VisionOnlyError: if the model has no text side.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    speaker = Speaker(model, processor, prompt, max_tokens, temp, top_p, seed)

    def finished(batch: list[Reading]) -> Iterator[Caption]:
        spoken = iter(speaker.speak([reading for reading in batch if reading.error is None]))
        for reading in batch:
            if reading.error is None:
                yield next(spoken)
            else:
                yield Caption(reading.name, None, [], None, None, prompt, reading.error)

    batch: list[Reading] = []
    for reading in read_images(processor.image_processor, images):
        batch.append(reading)
        if sum(r.error is None for r in batch) == batch_size:
            yield from finished(batch)
            batch = []
    yield from finished(batch)


def stream(
    model: GenLIP, processor: Processor, image: ImageLike, prompt: str = DEFAULT_PROMPT, **options: Any
) -> Iterator[str | Caption]:
    """Caption one picture, yielding pieces of text as they are spoken and the whole `Caption` last.

    Args:
        options: max_tokens, temp, top_p, seed as in `captions`.

    Raises:
        ImageError: if the picture cannot be read.
        ValueError, VisionOnlyError: as `captions`.
    """
    speaker = Speaker(model, processor, prompt, **options)
    (reading,) = read_images(processor.image_processor, [image])
    if reading.error is not None:
        raise ImageError(reading.error)
    text = Detokenizer(speaker.tokenizer)
    tokens: list[int] = []
    for step in speaker.tokens([reading]):
        if step[0] != speaker.stop_id:
            tokens.append(step[0])
            if piece := text.add(step[0]):
                yield piece
    if piece := text.finish():
        yield piece
    yield speaker.result(reading, tokens)


class Speaker:
    """A model with its prompt and sampling settled: turns pictures that have been read into captions."""

    def __init__(
        self,
        model: GenLIP,
        processor: Processor,
        prompt: str,
        max_tokens: int = 256,
        temp: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ):
        if model.config.vision_only or processor.tokenizer is None:
            raise VisionOnlyError
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
        self.model, self.tokenizer, self.prompt = model, processor.tokenizer, prompt
        self.prompt_ids = processor.prompt_ids(prompt)
        self.max_tokens = max_tokens
        self.stop_id = self.tokenizer.stop_id
        self.sampler = make_sampler(temp, top_p)
        if seed is not None:
            if not 0 <= seed < 2**64:
                raise ValueError(f"seed must lie in 0 to 2**64 - 1, not {seed}")
            mx.random.seed(seed)

    def speak(self, readings: Sequence[Reading]) -> list[Caption]:
        """Caption the pictures of one batch."""
        if not readings:
            return []
        tokens: list[list[int]] = [[] for _ in readings]
        for step in self.tokens(readings):
            for row, token in step.items():
                if token != self.stop_id:
                    tokens[row].append(token)
        return [self.result(reading, ids) for reading, ids in zip(readings, tokens)]

    def result(self, reading: Reading, tokens: list[int]) -> Caption:
        text = self.tokenizer.decode(tokens)
        reason = "length" if len(tokens) == self.max_tokens else "stop"
        return Caption(reading.name, text, tokens, reason, reading.grid, self.prompt)

    def tokens(self, readings: Sequence[Reading]) -> Iterator[dict[int, int]]:
        """Each step's token by row of the batch; a row whose token is the stop id ends there."""
        patches = mx.array(np.concatenate([reading.patches for reading in readings]))
        logits, cache = self.model.prefill(patches, [reading.grid for reading in readings])
        if self.prompt_ids:
            prompt = mx.broadcast_to(mx.array(self.prompt_ids), (len(readings), len(self.prompt_ids)))
            logits = self.model.extend(prompt, cache)
        active = list(range(len(readings)))
        current = self.sampler(logits)
        mx.async_eval(current)
        for count in range(1, self.max_tokens + 1):
            if count < self.max_tokens:
                # The next step is under way while this one's ids travel back to Python.
                following = self.sampler(self.model.extend(current[:, None], cache))
                mx.async_eval(following)
            ids = np.array(current).tolist()
            yield dict(zip(active, ids))
            going = [row for row, token in enumerate(ids) if token != self.stop_id]
            if not going or count == self.max_tokens:
                return
            if len(going) < len(active):
                active = [active[row] for row in going]
                cache.keep(going)
                following = following[mx.array(going)]
            current = following


def make_sampler(temp: float, top_p: float) -> Sampler:
    """Logits [B, V] -> token ids [B]: the argmax, or one of mlx-lm's samplers.

    Raises:
        ValueError: if temp is negative or top_p not in (0, 1].
    """
    if not temp >= 0:
        raise ValueError(f"temp must be 0 (greedy) or more, not {temp}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], not {top_p}")
    if temp == 0:
        return lambda logits: mx.argmax(logits, axis=-1)
    from mlx_lm.sample_utils import make_sampler as mlx_lm_sampler  # takes seconds to import

    sample = mlx_lm_sampler(temp=temp, top_p=top_p)

    def sampler(logits: mx.array) -> mx.array:
        logits = logits.astype(mx.float32)
        return sample(logits - mx.logsumexp(logits, axis=-1, keepdims=True))

    return sampler
