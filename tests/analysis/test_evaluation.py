"""The loss over a data set, and which pictures are asked what."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import Golden

import genlip_mlx
from genlip_mlx.analysis.evaluation import (
    EvaluationError,
    answer,
    evaluate,
    first_records,
    perplexity,
    questions,
)
from genlip_mlx.data.pipeline import DataError
from genlip_mlx.data.sources import Source, open_source
from genlip_mlx.model.genlip import VisionOnlyError

TALK = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A cat."},
    {"from": "human", "value": "Sure?"},
    {"from": "gpt", "value": "Yes."},
]


def lines(path: Path, *rows: dict[str, Any]) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_source(str(path))


def golden_rows(case: Golden) -> list[dict[str, Any]]:
    return [
        {"image": str(case.image_path(i).resolve()), "prompt": sample["prompt"], "caption": sample["caption"]}
        for i, sample in enumerate(case.samples)
    ]


@pytest.mark.parametrize("batch_tokens", [16384, 400])
def test_the_references_loss_however_packed(case: Golden, tmp_path: Path, batch_tokens: int) -> None:
    model, processor = genlip_mlx.load(case.folder)
    source = lines(tmp_path / "data.jsonl", *golden_rows(case))
    seen: list[tuple[float, float]] = []
    result = evaluate(
        model, processor, source, batch_tokens=batch_tokens, report=lambda done, total: seen.append((done, total))
    )
    assert result.nll == pytest.approx(case.expected_json["packed_loss"], abs=1e-5)
    assert result.perplexity == pytest.approx(perplexity(result.nll))
    assert result.label_tokens == case.expected_json["packed_label_tokens"]
    assert (result.samples, result.skipped) == (len(case.samples), {})
    assert seen[-1] == (len(source), len(source))
    first = evaluate(model, processor, first_records(source, 1))
    assert len(first_records(source, 99)) == len(first_records(source, None)) == len(source)
    assert (first.samples, first.nll) == (1, pytest.approx(case.samples[0]["loss"], abs=1e-5))


@pytest.fixture
def navit(golden_dir: Path) -> tuple[Any, Any]:
    return genlip_mlx.load(golden_dir / "tiny-navit")


def test_records_that_cannot_be_used_are_counted(navit: tuple[Any, Any], golden_dir: Path, tmp_path: Path) -> None:
    page = str((golden_dir / "images" / "page.png").resolve())
    (tmp_path / "bad.png").write_bytes(Path(page).read_bytes()[:3000])
    source = lines(
        tmp_path / "data.jsonl",
        {"image": page, "caption": "words"},
        {"image": page},
        {"image": "none.png", "caption": "x"},
        {"image": "bad.png", "caption": "x"},
    )
    log: list[str] = []
    result = evaluate(*navit, source, log=log.append)
    assert result.samples == 1
    assert result.skipped == {"no caption": 1, "missing file": 1, "damaged image": 1}
    assert len(log) == 3


def test_nothing_to_evaluate(navit: tuple[Any, Any], golden_dir: Path, tmp_path: Path) -> None:
    source = lines(tmp_path / "data.jsonl", {"image": str((golden_dir / "images" / "page.png").resolve())})
    with pytest.raises(DataError, match=r"no caption: 1, for example .*data.jsonl:1: no field caption or"):
        evaluate(*navit, source)
    with pytest.raises(EvaluationError, match=r"no record can be used; .*data.jsonl:1: no field caption or"):
        questions(source, navit[1], 5)


def test_a_damaged_model(navit: tuple[Any, Any], golden_dir: Path, tmp_path: Path) -> None:
    model, processor = navit
    model.ln_post.weight = mx.full(model.ln_post.weight.shape, float("nan"))
    page = {"image": str((golden_dir / "images" / "page.png").resolve()), "caption": "words"}
    with pytest.raises(EvaluationError, match=r"data.jsonl: the loss is nan"):
        evaluate(model, processor, lines(tmp_path / "data.jsonl", page))


def test_a_vision_only_model(navit: tuple[Any, Any], vision_only_navit: Path, tmp_path: Path) -> None:
    encoder, processor = genlip_mlx.load(vision_only_navit)
    source = open_source("synth:test:2")
    with pytest.raises(VisionOnlyError):
        evaluate(encoder, processor, source)
    with pytest.raises(VisionOnlyError):
        questions(source, processor, 2)


@pytest.fixture
def vision_only_navit(golden_dir: Path, tmp_path: Path) -> Path:
    from genlip_mlx.checkpoint.convert import convert

    convert(golden_dir / "tiny-navit", tmp_path / "encoder", vision_only=True)
    return tmp_path / "encoder"


def test_records_of_one_picture_and_prompt_are_one_question(
    navit: tuple[Any, Any], golden_dir: Path, tmp_path: Path
) -> None:
    for name in ("page.png", "astronaut.jpg"):
        shutil.copy(golden_dir / "images" / name, tmp_path)
    source = lines(
        tmp_path / "data.jsonl",
        {"image": "page.png", "caption": " one "},
        {"image": "astronaut.jpg", "caption": "two"},
        {"image": "page.png"},
        {"image": "page.png", "caption": "three", "prompt": "Why?"},
        {"image": "astronaut.jpg", "conversations": TALK},
        {"image": "page.png", "caption": "four"},
    )
    asked = questions(source, navit[1], 10)
    default = "Describe the image in detail."
    assert [(q.record, Path(q.name).name, q.prompt, q.references) for q in asked] == [
        (0, "page.png", default, ("one", "four")),
        (1, "astronaut.jpg", default, ("two",)),
        (3, "page.png", "Why?", ("three",)),
        (4, "astronaut.jpg", "What is it?", ("A cat.",)),
    ]
    assert questions(source, navit[1], 1) == asked[:1]  # the limit is one of pictures, not of references


def test_answers_are_what_caption_says_in_order(navit: tuple[Any, Any], golden_dir: Path, tmp_path: Path) -> None:
    folder = (golden_dir / "images").resolve()
    (tmp_path / "bad.png").write_bytes((folder / "page.png").read_bytes()[:3000])
    rows = [
        {"image": str(folder / "page.png"), "caption": "x", "prompt": "Why?"},
        {"image": str(folder / "astronaut.jpg"), "caption": "x", "prompt": ""},
        {"image": "bad.png", "caption": "x", "prompt": ""},
        {"image": str(folder / "astronaut.jpg"), "caption": "y", "prompt": "Why?"},
    ]
    source = lines(tmp_path / "data.jsonl", *rows)
    answers = answer(*navit, source, questions(source, navit[1], 10), max_tokens=6)
    assert [(a.question.record, a.finish_reason) for a in answers] == [(0, "length"), (1, "length"), (3, "length")]
    for one in answers:
        row = rows[one.question.record]
        (alone,) = genlip_mlx.caption(*navit, [row["image"]], row["prompt"], max_tokens=6)
        assert one.caption == alone.caption
    broken = lines(tmp_path / "broken.jsonl", rows[2])
    with pytest.raises(EvaluationError, match="none of 1 pictures could be read"):
        answer(*navit, broken, questions(broken, navit[1], 1))


def test_a_perplexity_is_a_number() -> None:
    assert perplexity(0) == 1
    assert perplexity(1e9) < float("inf")
