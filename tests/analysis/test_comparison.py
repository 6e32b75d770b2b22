"""Two models on the same data, against figures worked out one sample at a time in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import genlip_mlx
from genlip_mlx.analysis import comparison
from genlip_mlx.analysis.comparison import ComparisonError, check_processors, compare, disk_bytes
from genlip_mlx.data.sources import Source, open_source
from genlip_mlx.model.genlip import GenLIP, VisionOnlyError
from genlip_mlx.model.sequence import PackedSequence
from genlip_mlx.processing.processor import Processor

CAPTIONS = {"astronaut.jpg": "A woman in an orange suit.", "page.png": "A page of printed text."}


@pytest.fixture
def full(golden_dir: Path) -> tuple[GenLIP, Processor]:
    return genlip_mlx.load(golden_dir / "tiny-navit")


@pytest.fixture
def quantized(golden_dir: Path) -> GenLIP:
    model, _ = genlip_mlx.load(golden_dir / "tiny-navit")

    def choose(path: str, module: nn.Module) -> bool:
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0

    nn.quantize(model, group_size=32, bits=3, class_predicate=choose)
    return model


@pytest.fixture
def source(golden_dir: Path, tmp_path: Path) -> Source:
    folder = (golden_dir / "images").resolve()
    rows = [{"image": str(folder / name), "caption": caption} for name, caption in CAPTIONS.items()]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_source(str(tmp_path / "data.jsonl"))


def log_probabilities(model: GenLIP, processor: Processor, picture: Path, caption: str) -> tuple[np.ndarray, list[int]]:
    """[labels, V] in float64, and the labels, of one sample."""
    ((patches, grid),) = processor.images([picture])
    text = processor.text("Describe the image in detail.", caption)
    sequence = PackedSequence([grid], [len(text.input_ids)])
    logits = model(mx.array(patches), mx.array(text.input_ids), sequence)
    rows = np.flatnonzero(text.labels >= 0)
    scores = np.array(logits).astype(np.float64)[rows]
    return scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True)), text.labels[rows].tolist()


@pytest.mark.parametrize("chunk", [2**24, 2000])
def test_every_figure(
    full: tuple[GenLIP, Processor],
    quantized: GenLIP,
    source: Source,
    golden_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
) -> None:
    monkeypatch.setattr(comparison, "CHUNK_LOGITS", chunk)
    model, processor = full
    seen: list[tuple[float, float]] = []
    result = compare(
        quantized,
        model,
        processor,
        source,
        max_tokens=8,
        batch_tokens=500,
        report=lambda done, total: seen.append((done, total)),
    )
    ours, theirs, cosines, labels = [], [], [], []
    for name, caption in CAPTIONS.items():
        picture = golden_dir / "images" / name
        log_p, ids = log_probabilities(quantized, processor, picture, caption)
        ours.append(log_p)
        theirs.append(log_probabilities(model, processor, picture, caption)[0])
        labels += ids
        a, b = (np.array(genlip_mlx.encode(one, processor, picture)[0].features) for one in (quantized, model))
        cosines.append((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1))
    p, q, cosine = np.concatenate(ours), np.concatenate(theirs), np.concatenate(cosines)
    rows = np.arange(len(labels))
    assert result.label_tokens == len(labels)
    assert result.model.nll == pytest.approx(-p[rows, labels].mean(), abs=1e-5)
    assert result.full.nll == pytest.approx(-q[rows, labels].mean(), abs=1e-5)
    assert result.nll_difference == pytest.approx((q - p)[rows, labels].mean(), abs=2e-5)
    assert result.kl == pytest.approx((np.exp(q) * (q - p)).sum(-1).mean(), rel=1e-4)
    assert result.kl > 0.01
    assert result.top_token_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    assert result.feature_cosine == pytest.approx(cosine.mean(), abs=1e-6)
    assert result.worst_feature_cosine == pytest.approx(cosine.min(), abs=1e-6)
    pictures = [golden_dir / "images" / name for name in CAPTIONS]
    said, meant = (genlip_mlx.caption(one, processor, pictures, max_tokens=8) for one in (quantized, model))
    same = [a.tokens == b.tokens for a, b in zip(said, meant)]
    leading = [np.cumprod(np.array(a.tokens) == np.array(b.tokens)).mean() for a, b in zip(said, meant)]
    assert result.captions == 2
    assert result.captions_identical == pytest.approx(np.mean(same))
    assert result.captions_leading == pytest.approx(np.mean(leading))
    assert (result.samples, result.skipped) == (2, {})
    assert seen[-1] == (4, 4)
    for side in (result.model, result.full):
        assert side.encode_tokens_per_second is not None
        assert side.encode_tokens_per_second > 0
        assert side.caption_tokens_per_second is not None
        assert side.caption_tokens_per_second > 0
    assert result.full.bits_per_weight == 32
    assert result.model.weight_bytes / result.full.weight_bytes == pytest.approx(result.model.bits_per_weight / 32)
    assert result.full.weight_bytes == disk_bytes(golden_dir / "tiny-navit")


def test_a_model_against_itself(full: tuple[GenLIP, Processor], source: Source) -> None:
    result = compare(full[0], full[0], full[1], source, max_tokens=4)
    assert (result.nll_difference, result.kl) == (0, 0)
    assert (result.top_token_agreement, result.captions_identical, result.captions_leading) == (1, 1, 1)
    assert result.worst_feature_cosine == pytest.approx(1)
    facts: dict[str, Any] = json.loads(json.dumps(result.to_dict()))
    assert {"nll", "perplexity", "label_tokens", "samples", "skipped", "kl", "sides"} <= facts.keys()
    assert facts["sides"]["model"]["nll"] == facts["nll"]


def test_without_captions(full: tuple[GenLIP, Processor], source: Source) -> None:
    result = compare(full[0], full[0], full[1], source, captions=0)
    assert (result.captions, result.captions_identical, result.captions_leading) == (0, None, None)
    assert result.full.caption_tokens_per_second is None


@pytest.mark.parametrize(
    ("ours", "theirs", "share"),
    [([1, 2, 3], [1, 2, 3], 1), ([], [], 1), ([1, 2], [1, 2, 3, 4], 0.5), ([1, 9, 3], [1, 2, 3], 1 / 3), ([], [5], 0)],
)
def test_leading_tokens(ours: list[int], theirs: list[int], share: float) -> None:
    assert comparison._leading(ours, theirs) == pytest.approx(share)


def test_models_of_different_kinds(full: tuple[GenLIP, Processor], golden_dir: Path, source: Source) -> None:
    other, other_processor = genlip_mlx.load(golden_dir / "tiny-224")
    with pytest.raises(ComparisonError, match="hidden_size is 64 in one model and 144 in the other; compare"):
        compare(other, full[0], full[1], source)
    with pytest.raises(ComparisonError, match="read pictures in different ways"):
        check_processors(other_processor, full[1])
    check_processors(full[1], full[1])


def test_an_encoder(full: tuple[GenLIP, Processor], golden_dir: Path, tmp_path: Path, source: Source) -> None:
    from genlip_mlx.checkpoint.convert import convert

    convert(golden_dir / "tiny-navit", tmp_path / "encoder", vision_only=True)
    encoder, _ = genlip_mlx.load(tmp_path / "encoder")
    with pytest.raises(VisionOnlyError):
        compare(full[0], encoder, full[1], source)
