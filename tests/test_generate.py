"""Captions: the reference's tokens, the same in any company, ended and sampled as asked."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import Golden
from PIL import Image

from genlip_mlx import generate
from genlip_mlx.checkpoint.convert import convert
from genlip_mlx.checkpoint.load import load
from genlip_mlx.generate import Caption, caption, captions, make_sampler, stream
from genlip_mlx.model.cache import GROWTH
from genlip_mlx.model.genlip import GenLIP, VisionOnlyError
from genlip_mlx.model.sequence import PackedSequence
from genlip_mlx.processing.images import ImageError
from genlip_mlx.processing.processor import DEFAULT_PROMPT, Processor

Loaded = tuple[GenLIP, Processor]


@pytest.fixture(scope="module")
def loaded(case: Golden) -> Loaded:
    return load(case.folder, "float32")


@pytest.fixture(scope="module")
def pictures(golden_dir: Path) -> list[Image.Image]:
    """Pictures of many sizes: wide, tall, tiny, large."""
    astronaut = Image.open(golden_dir / "images" / "astronaut.jpg").convert("RGB")
    page = Image.open(golden_dir / "images" / "page.png").convert("RGB")
    sizes = [(320, 64), (64, 64), (48, 400), (200, 210), (64, 64), (700, 500)]
    return [(page if i % 2 else astronaut).resize(size) for i, size in enumerate(sizes)]


def until(ids: list[int], stop: int) -> list[int]:
    return ids[: ids.index(stop)] if stop in ids else ids


# --- The reference's tokens ---


def test_greedy_captions_are_the_references(case: Golden, loaded: Loaded) -> None:
    for index, sample in enumerate(case.samples):
        (result,) = caption(*loaded, case.image_path(index), sample["prompt"], max_tokens=24)
        assert result == Caption(
            image=str(case.image_path(index)),
            caption=sample["greedy_text"],
            tokens=sample["greedy_ids"],
            finish_reason="length",
            grid=tuple(sample["grid"]),
            prompt=sample["prompt"],
        )


def test_a_caption_ends_at_the_stop_token(case: Golden, loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    _, processor = loaded
    sample = case.samples[0]
    for stop in dict.fromkeys(sample["greedy_ids"]):
        assert processor.tokenizer is not None
        monkeypatch.setattr(processor.tokenizer, "eos_ids", [stop])
        expected = until(sample["greedy_ids"], stop)
        (result,) = caption(*loaded, case.image_path(0), sample["prompt"], max_tokens=24)
        assert (result.tokens, result.finish_reason) == (expected, "stop")
        assert result.caption == processor.tokenizer.decode(expected)


def test_the_last_token_allowed_may_be_the_stop_token(
    case: Golden, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = case.samples[0]["greedy_ids"]
    first = next(i for i in range(3, 24) if ids[i] not in ids[:i])
    monkeypatch.setattr(loaded[1].tokenizer, "eos_ids", [ids[first]])
    for max_tokens, tokens, reason in ((first, first, "length"), (first + 1, first, "stop")):
        (result,) = caption(*loaded, case.image_path(0), case.samples[0]["prompt"], max_tokens=max_tokens)
        assert (result.tokens, result.finish_reason) == (ids[:tokens], reason)


# --- Together as alone ---


def alone(loaded: Loaded, images: list[Any], **options: Any) -> list[list[int]]:
    return [caption(*loaded, image, **options)[0].tokens for image in images]


@pytest.mark.parametrize("prompt", [DEFAULT_PROMPT, ""])
@pytest.mark.parametrize("batch_size", [2, 4, 8])
def test_pictures_of_any_size_together(
    loaded: Loaded, pictures: list[Image.Image], batch_size: int, prompt: str
) -> None:
    together = caption(*loaded, pictures, prompt, max_tokens=20, batch_size=batch_size)
    assert [result.tokens for result in together] == alone(loaded, pictures, prompt=prompt, max_tokens=20)
    assert [result.image for result in together] == [f"image {i}" for i in range(len(pictures))]


def test_sequences_that_stop_leave_the_batch(
    loaded: Loaded, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = alone(loaded, pictures, max_tokens=30)
    # A token that some captions hold early, some late and some never.
    ends = {stop: [len(until(ids, stop)) for ids in tokens] for stop in set(itertools.chain(*tokens))}
    stop = max(ends, key=lambda stop: len(set(ends[stop])))
    assert len(set(ends[stop])) >= 3

    rows: list[list[int]] = []
    keep = generate.GenLIP.extend

    def counted(self: GenLIP, input_ids: mx.array, cache: Any, **options: Any) -> mx.array:
        rows.append(list(input_ids.shape))
        return keep(self, input_ids, cache, **options)

    monkeypatch.setattr(generate.GenLIP, "extend", counted)
    monkeypatch.setattr(loaded[1].tokenizer, "eos_ids", [stop])
    results = caption(*loaded, pictures, max_tokens=30, batch_size=len(pictures))
    assert [result.tokens for result in results] == [until(ids, stop) for ids in tokens]
    reasons = ["stop" if stop in ids else "length" for ids in tokens]
    assert [result.finish_reason for result in results] == reasons
    # The work shrinks with the batch: one row a caption that goes on (and one step is always under way).
    batches = [batch for batch, _ in rows[1:]]
    assert batches == sorted(batches, reverse=True)
    assert len(set(batches)) >= 3


def test_a_caption_longer_than_the_cache_at_first(case: Golden, loaded: Loaded) -> None:
    """Each token of a long caption is the likeliest after all before it, computed in one go without a cache."""
    model, processor = loaded
    names = [case.image_path(0), case.image_path(1)]
    prompt = case.samples[0]["prompt"]
    smallest = min(h * w for h, w in (sample["grid"] for sample in case.samples[:2]))
    length = 2 * GROWTH - smallest % GROWTH + 10  # the cache grows twice
    results = caption(model, processor, names, prompt, max_tokens=length)
    alone = caption(model, processor, names[1], prompt, max_tokens=length)
    assert results[1].tokens == alone[0].tokens

    prompt_ids = processor.prompt_ids(prompt)
    for result, (patches, grid) in zip(results, processor.images(names)):
        assert len(result.tokens) == length
        ids = [*prompt_ids, *result.tokens[:-1]]
        logits = np.array(model(mx.array(patches), mx.array(ids), PackedSequence([grid], [len(ids)])))
        logits = logits[len(prompt_ids) :]
        chosen = logits[np.arange(length), result.tokens]
        np.testing.assert_array_less(logits.max(axis=1) - chosen, 2e-4)


# --- Many pictures ---


def test_a_bad_picture_keeps_its_place_and_the_rest_goes_on(case: Golden, loaded: Loaded, tmp_path: Path) -> None:
    good, sample = case.image_path(0), case.samples[0]
    missing = tmp_path / "missing.jpg"
    images = [missing, good, missing, good, good, b"", missing]
    results = list(captions(*loaded, images, sample["prompt"], max_tokens=3, batch_size=2))
    assert [result.error is None for result in results] == [image == good for image in images]
    for result, image in zip(results, images):
        if image == good:
            assert result.tokens == sample["greedy_ids"][:3]
        else:
            assert (result.caption, result.tokens, result.finish_reason, result.grid) == (None, [], None, None)
    assert results[0] == Caption(str(missing), None, [], None, None, sample["prompt"], f"{missing}: no such file")
    assert results[5].error == "image 5: not an image of a known format (JPEG, PNG, WebP, GIF, TIFF, ...)"


def test_nothing_but_bad_pictures(loaded: Loaded) -> None:
    results = list(captions(*loaded, ["a.jpg", "b.jpg"], batch_size=1))
    assert [result.error for result in results] == ["a.jpg: no such file", "b.jpg: no such file"]


def test_captions_take_pictures_as_they_come(loaded: Loaded) -> None:
    endless: Iterator[Any] = itertools.repeat(Image.new("RGB", (64, 64)))
    results = captions(*loaded, endless, max_tokens=1, batch_size=2)
    assert len(list(itertools.islice(results, 5))) == 5
    results.close()  # type: ignore[attr-defined]


def test_caption_raises_for_a_bad_picture(case: Golden, loaded: Loaded) -> None:
    with pytest.raises(ImageError, match=r"^missing\.jpg: no such file$"):
        caption(*loaded, [case.image_path(0), "missing.jpg"], max_tokens=1)


def test_no_pictures(loaded: Loaded) -> None:
    assert caption(*loaded, []) == []


# --- Streaming ---


def test_a_stream_is_the_caption_in_pieces(case: Golden, loaded: Loaded) -> None:
    for index, sample in enumerate(case.samples):
        *pieces, last = stream(*loaded, case.image_path(index), sample["prompt"], max_tokens=24)
        assert "".join(pieces) == sample["greedy_text"]  # type: ignore[arg-type]
        assert len(pieces) > 3
        assert [last] == caption(*loaded, case.image_path(index), sample["prompt"], max_tokens=24)


def test_a_stream_comes_while_it_is_spoken(case: Golden, loaded: Loaded) -> None:
    pieces = stream(*loaded, case.image_path(0), max_tokens=10**6)
    assert isinstance(next(pieces), str)
    pieces.close()  # type: ignore[attr-defined]


def test_a_stream_ends_at_the_stop_token(case: Golden, loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = case.samples[0]["greedy_ids"]
    monkeypatch.setattr(loaded[1].tokenizer, "eos_ids", [ids[0]])
    (only,) = stream(*loaded, case.image_path(0), case.samples[0]["prompt"])
    assert isinstance(only, Caption)
    assert (only.tokens, only.caption, only.finish_reason) == ([], "", "stop")


def test_a_stream_of_a_bad_picture(loaded: Loaded) -> None:
    with pytest.raises(ImageError, match=r"^missing\.jpg: no such file$"):
        list(stream(*loaded, "missing.jpg"))


# --- Sampling ---


def test_sampling_is_repeatable_with_a_seed(case: Golden, loaded: Loaded) -> None:
    def spoken(**options: Any) -> list[list[int]]:
        images = [case.image_path(0), case.image_path(1)]
        return [result.tokens for result in caption(*loaded, images, temp=1.0, max_tokens=12, **options)]

    assert spoken(seed=7) == spoken(seed=7)
    assert spoken(seed=7) != spoken(seed=8)
    assert spoken(seed=2**64 - 1) == spoken(seed=2**64 - 1)
    assert spoken() != spoken()
    text = "".join(piece for piece in stream(*loaded, case.image_path(0), temp=1.0, seed=3) if isinstance(piece, str))
    assert caption(*loaded, case.image_path(0), temp=1.0, seed=3)[0].caption == text


def test_a_tiny_top_p_leaves_the_likeliest_token(case: Golden, loaded: Loaded) -> None:
    sample = case.samples[1]
    (result,) = caption(*loaded, case.image_path(1), sample["prompt"], temp=1.0, top_p=1e-6, max_tokens=24)
    assert result.tokens == sample["greedy_ids"]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize(
    ("temp", "top_p", "expected"),
    [
        (0.0, 1.0, [1.0, 0, 0, 0]),
        (1.0, 1.0, [0.5, 0.25, 0.125, 0.125]),
        (0.5, 1.0, [16 / 22, 4 / 22, 1 / 22, 1 / 22]),
        (1.0, 0.7, [2 / 3, 1 / 3, 0, 0]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_should(
    temp: float, top_p: float, expected: list[float], dtype: mx.Dtype
) -> None:
    mx.random.seed(0)
    logits = mx.broadcast_to(mx.array([4.0, 3.0, 2.0, 2.0]) * np.log(2), (20000, 4)).astype(dtype)
    drawn = np.array(make_sampler(temp, top_p)(logits))
    assert drawn.shape == (20000,)
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 20000, expected, atol=0.02)


# --- What cannot be asked ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"temp": -1.0}, "temp must be 0 (greedy) or more, not -1.0"),
        ({"temp": float("nan")}, "temp must be 0 (greedy) or more, not nan"),
        ({"top_p": 0.0}, "top_p must lie in (0, 1], not 0.0"),
        ({"top_p": 1.5}, "top_p must lie in (0, 1], not 1.5"),
        ({"seed": -1}, "seed must lie in 0 to 2**64 - 1, not -1"),
        ({"seed": 2**64}, f"seed must lie in 0 to 2**64 - 1, not {2**64}"),
    ],
)
def test_options_out_of_range(loaded: Loaded, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        caption(*loaded, "missing.jpg", **options)


def test_a_vision_only_model_cannot_speak(case: Golden, tmp_path: Path) -> None:
    convert(case.folder, tmp_path / "encoder", vision_only=True)
    encoder = load(tmp_path / "encoder", "float32")
    for ask in (caption, lambda *arguments: list(stream(*arguments))):
        with pytest.raises(VisionOnlyError, match="convert without --vision-only"):
            ask(*encoder, case.image_path(0))
