"""Probes: their arithmetic against plain versions, sets with a known answer, and features that are computed once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from genlip_mlx.analysis import feature_cache
from genlip_mlx.analysis import probe as probing
from genlip_mlx.analysis.feature_cache import (
    CacheError,
    Encoded,
    ModelEncoder,
    PixelEncoder,
    Store,
    build,
    random_model,
)
from genlip_mlx.analysis.labelled import LabelledError, LabelledSet, open_labelled
from genlip_mlx.analysis.probe import AttentiveTask, LinearTask, SegmentTask, probe, wilson
from genlip_mlx.checkpoint.load import load
from genlip_mlx.features import encode
from genlip_mlx.model.genlip import GenLIP
from genlip_mlx.processing.processor import Processor
from genlip_mlx.processing.reader import ImageLike

Loaded = tuple[GenLIP, Processor]


@pytest.fixture(scope="module")
def loaded(golden_dir: Path) -> Loaded:
    return load(golden_dir / "tiny-navit")


def write_pictures(folder: Path, number: int = 30) -> None:
    """Noise around red in class a, around blue in class b; sizes differ."""
    rng = np.random.default_rng(0)
    for name, base in {"a": (170, 60, 60), "b": (60, 60, 170)}.items():
        (folder / name).mkdir(parents=True)
        for i in range(number):
            pixels = np.array(base) + rng.integers(-50, 50, (64, 64 + 16 * (i % 3), 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")


@pytest.fixture
def coloured(tmp_path: Path) -> LabelledSet:
    write_pictures(tmp_path / "data")
    return open_labelled(str(tmp_path / "data"))


# --- Arithmetic ---


@pytest.mark.parametrize(
    ("right", "number", "low", "high"),
    # Agresti and Coull, The American Statistician 52 (1998), give the formula; these follow from it by hand.
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_wilson(right: int, number: int, low: float, high: float) -> None:
    assert wilson(right, number) == pytest.approx((low, high), abs=1e-4)


class Memory(Store):
    """Features that lie in memory, one layer."""

    def __init__(self, tokens: list[np.ndarray], pixels: list[np.ndarray] | None = None) -> None:
        self._tokens, self._pixels = tokens, pixels or []
        self.rows = np.arange(len(tokens))
        self.__dict__["lengths"] = np.array([len(picture) for picture in tokens])

    def pooled(self, layer: str) -> np.ndarray:
        return np.stack([picture.mean(axis=0) for picture in self._tokens])

    def tokens(self, layer: str, number: int) -> np.ndarray:
        return self._tokens[number]

    def pixels(self, number: int) -> np.ndarray:
        return self._pixels[number]


PLAIN = mx.zeros(8), mx.eye(8)  # a whitening that changes nothing


@pytest.mark.parametrize("lengths", [(5, 5), (3, 7)])
def test_attention_is_that_of_projected_keys_and_values(lengths: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    tokens = [rng.standard_normal((length, 8)).astype(np.float32) for length in lengths]
    task = AttentiveTask(Memory(tokens), np.zeros(2), "last", 3, PLAIN, num_heads=2)
    first = task.start(mx.random.key(0))
    weights = {name: mx.array(rng.standard_normal((4, *value.shape)), mx.float32) for name, value in first.items()}
    ours = np.array(task.logits(weights, *task.inputs(np.arange(2))))
    assert ours.shape == (4, 2, 3)
    w = {name: np.array(value, np.float64) for name, value in weights.items()}
    for rate in range(4):
        for picture, x in enumerate(tokens):
            heads = []
            for h in range(2):
                keys, values = x @ w["key"][rate, h].T, x @ w["value"][rate, h].T  # [P, 4]
                scores = keys @ w["query"][rate, h, 0] / 2  # the square root of the head's width
                attention = np.exp(scores - scores.max())
                heads.append(attention @ values / attention.sum())
            expected = np.concatenate(heads) @ w["weight"][rate] + w["bias"][rate, 0]
            np.testing.assert_allclose(ours[rate, picture], expected, rtol=0, atol=1e-4)


def test_learning_rates_do_not_touch_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, 40)
    tokens = [rng.standard_normal((4, 8)).astype(np.float32) + label for label in labels]
    task = AttentiveTask(Memory(tokens), labels, "last", 3, PLAIN, num_heads=2)
    together = probing._train(task, task, 16, 20, 0, lambda done, total: None)
    rates = probing.LEARNING_RATES
    for i in (0, 3):
        monkeypatch.setattr(probing, "LEARNING_RATES", rates[i : i + 1])
        ((step, score, alone),) = probing._train(task, task, 16, 20, 0, lambda done, total: None)
        assert (step, score) == together[i][:2]
        for name, value in alone.items():
            np.testing.assert_allclose(np.array(value), np.array(together[i][2][name]), rtol=0, atol=1e-4)


def test_mean_iou_by_hand() -> None:
    # One picture of three patches with four pixels each; patches are named 0, 1 and 1; 255 counts for nothing.
    tokens = [np.eye(3, 8, dtype=np.float32)]
    pixels = [np.array([[0, 0, 0, 1], [1, 1, 1, 1], [2, 2, 1, 255]], np.uint8)]
    task = SegmentTask(Memory(tokens, pixels), "last", 3, PLAIN)
    weight = np.zeros((1, 8, 3), np.float32)
    weight[0, [0, 1, 2], [0, 1, 1]] = 1
    records = task.records({"weight": mx.array(weight), "bias": mx.zeros((1, 1, 3))}, 4)
    # Right: 3 of class 0, 5 of class 1; unions: 4, 1 + 4 + 3 (one missed, two of class 2 taken for it), 2.
    assert records.tolist() == [[[3, 5, 0, 4, 8, 2]]]
    assert task.score(records[0]) == pytest.approx((3 / 4 + 5 / 8 + 0) / 3)


def test_the_loss_of_a_patch_is_the_mean_over_its_pixels() -> None:
    tokens = [np.ones((2, 8), np.float32)]
    pixels = [np.array([[0, 0, 0, 1], [1, 255, 255, 255]], np.uint8)]
    task = SegmentTask(Memory(tokens, pixels), "last", 2, PLAIN)
    logits = mx.array([[[1.0, 0.0], [0.0, 2.0]]])
    logs = np.log(np.exp([[1, 0], [0, 2]]) / np.exp([[1, 0], [0, 2]]).sum(axis=1, keepdims=True))
    expected = -(3 * logs[0, 0] + logs[0, 1] + logs[1, 1]) / 5
    assert task.loss(logits, task.targets(np.arange(1))).item() == pytest.approx(expected, abs=1e-6)


def test_a_constant_feature_is_harmless() -> None:
    tokens = [np.full((2, 8), 3.0, np.float32)] * 4
    task = LinearTask(Memory(tokens), np.zeros(4), "last", 2, probing._whitening(np.full(8, 3.0), np.zeros((8, 8)), 4))
    assert np.array(task.inputs(np.arange(4))[0]).tolist() == np.zeros((4, 8)).tolist()


def test_what_large_directions_hide_is_found() -> None:
    """The class is a hundredth of the variance, and every number of a feature is mostly something else."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    hidden = np.concatenate([4 * rng.standard_normal((400, 7)), labels[:, None] * 2 - 1.0], axis=1)
    mixing, _ = np.linalg.qr(rng.standard_normal((8, 8)))
    features = (hidden @ mixing).astype(np.float32)
    whitening = probing._whitening(features.mean(axis=0), np.cov(features, rowvar=False, bias=True), 400)
    task = LinearTask(Memory([row[None] for row in features]), labels, "last", 2, whitening)
    white = np.array(task.inputs(np.arange(400))[0])
    np.testing.assert_allclose(np.cov(white, rowvar=False), np.eye(8), atol=0.4)
    found = probing._train(task, task, 128, 50, 0, lambda done, total: None)
    assert max(score for _, score, _ in found) == 1.0


# --- Sets with a known answer ---


def test_two_colours_are_told_apart(coloured: LabelledSet, loaded: Loaded, tmp_path: Path) -> None:
    report = probe(*loaded, coloured, baselines=True, cache=str(tmp_path / "cache"), steps=20)
    assert report.classes == ("a", "b")
    assert report.pictures == {"train": 36, "validation": 12, "test": 12}
    assert report.skipped == ()
    kinds = [(result.features, result.probe) for result in report.results]
    names = ("model", "random weights", "raw pixels")
    assert kinds == [(name, kind) for name in names for kind in ("linear", "attentive")]
    for result in report.results:
        assert (result.test, result.interval) == (1.0, wilson(12, 12))
        assert len(result.sweep) == len(probing.LEARNING_RATES) * (1 if result.features == "raw pixels" else 2)
        assert result.chosen in result.sweep
        assert result.chosen.validation == max(trial.validation for trial in result.sweep)
    again = probe(*loaded, coloured, baselines=True, cache=str(tmp_path / "cache"), steps=20)
    assert again == report


def test_labels_without_meaning_are_not_learned(tmp_path: Path, loaded: Loaded) -> None:
    rng = np.random.default_rng(0)
    for i in range(150):
        (tmp_path / "data" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / "data" / str(i % 2) / f"{i}.png")
    data = open_labelled(str(tmp_path / "data"))
    report = probe(*loaded, data, layers="last", cache=str(tmp_path / "cache"), steps=20)
    for result in report.results:
        assert result.interval[0] < 0.5


def test_segmenting_left_from_right(tmp_path: Path, loaded: Loaded) -> None:
    data = tmp_path / "data"
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (data / folder).mkdir(parents=True)
    for i in range(10):
        classes = rng.integers(0, 2, (4, 4)).repeat(16, axis=0).repeat(16, axis=1).astype(np.uint8)
        Image.fromarray(np.where(classes[..., None], 220, 40).repeat(3, -1).astype(np.uint8)).save(
            data / "images" / f"{i}.png"
        )
        Image.fromarray(classes).save(data / "masks" / f"{i}.png")
    (data / "masks" / "3.png").write_bytes((data / "images" / "3.png").read_bytes())
    Image.new("L", (60, 64)).save(data / "masks" / "4.png")
    report = probe(
        *loaded, open_labelled(str(data), "segment"), layers=[0], baselines=True, cache=str(tmp_path / "c"), steps=60
    )
    assert report.classes == ("0", "1")
    assert sum(report.pictures.values()) == 8
    assert any("3.png: the mask has mode RGB" in message for message in report.skipped)
    assert any("its mask has 60 x 64 pixels and it has 64 x 64" in message for message in report.skipped)
    for result in report.results:
        assert result.probe == "linear"
        assert result.test > 0.9
        assert result.interval[0] <= result.test <= result.interval[1]
    (data / "classes.txt").write_text("dark\n")
    with pytest.raises(LabelledError, match=r"a mask holds class 1, and classes\.txt names 0 to 0"):
        probe(*loaded, open_labelled(str(data), "segment"), layers=[0], cache=str(tmp_path / "c"), steps=1)


# --- Features, once ---


class Counting:
    """An encoder that counts its pictures, and stops like a killed process after some."""

    def __init__(self, inside: ModelEncoder, limit: int | None = None) -> None:
        self.name, self.identity, self.layers = inside.name, inside.identity, inside.layers
        self.num_heads, self.patch_size = inside.num_heads, inside.patch_size
        self._inside, self._limit, self.count = inside, limit, 0

    def encode(self, images: Iterable[ImageLike]) -> Iterator[Encoded]:
        for result in self._inside.encode(images):
            if self.count == self._limit:
                raise KeyboardInterrupt
            self.count += 1
            yield result


def test_a_killed_run_goes_on_where_it_was(
    coloured: LabelledSet, loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "SHARD", 5)
    pictures, encoder = coloured.splits["train"], ModelEncoder("model", *loaded, [1], None)
    with pytest.raises(KeyboardInterrupt):
        build(Counting(encoder, limit=7), pictures, tmp_path / "cache")
    rest = Counting(encoder)
    store = build(rest, pictures, tmp_path / "cache")
    assert rest.count == len(pictures) - 5
    nothing = Counting(encoder)
    build(nothing, pictures, tmp_path / "cache")
    assert nothing.count == 0
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert not list((tmp_path / "cache").rglob("*.partial"))

    expected = encode(*loaded, list(pictures.names), layers=[1])
    for number, features in enumerate(expected):
        assert features.features is not None
        assert features.hidden_states is not None
        for layer, array in ("last", features.features), ("1", features.hidden_states[0]):
            tokens = store.tokens(layer, number)
            assert tokens.dtype == np.float16
            np.testing.assert_allclose(tokens, np.array(array), rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(store.pooled(layer)[number], np.array(array).mean(axis=0), rtol=0, atol=1e-5)
    mean, covariance = store.moments("last")
    every = np.concatenate([np.array(features.features) for features in expected])
    np.testing.assert_allclose(mean, every.mean(axis=0), rtol=0, atol=1e-3)
    np.testing.assert_allclose(covariance, np.cov(every, rowvar=False, bias=True), rtol=1e-3, atol=1e-3)


def test_what_changes_features_changes_their_place(loaded: Loaded) -> None:
    model, processor = loaded
    other = random_model(model.config, mx.float32, 0)
    identities = {
        ModelEncoder("model", model, processor, [], None).identity,
        ModelEncoder("model", model, processor, [1], None).identity,
        ModelEncoder("model", model, processor, [], 64).identity,
        ModelEncoder("model", other, processor, [], None).identity,
        PixelEncoder(processor.image_processor, None, 2).identity,
        PixelEncoder(processor.image_processor, 64, 2).identity,
    }
    assert len(identities) == 6
    same = random_model(model.config, mx.float32, 0)
    assert ModelEncoder("x", same, processor, [], None).identity in identities


def test_pictures_that_cannot_be_used(tmp_path: Path, loaded: Loaded) -> None:
    write_pictures(tmp_path / "data")
    whole = (tmp_path / "data" / "a" / "0.png").read_bytes()
    (tmp_path / "data" / "a" / "0.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "data" / "a" / "1.png").write_bytes(b"nothing")
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "b" / "0.png")
    data = open_labelled(str(tmp_path / "data"))
    report = probe(*loaded, data, layers="last", baselines=True, cache=str(tmp_path / "cache"), steps=10)
    assert sum(report.pictures.values()) == 57
    reasons = sorted(message.removeprefix(str(tmp_path / "data")) for message in report.skipped)
    assert reasons[0].startswith("/a/0.png: the image is damaged or cut off")
    assert reasons[1].startswith("/a/1.png: not an image of a known format")
    assert reasons[2] == "/b/0.png: 8 x 8 pixels, smaller than a patch of 16 x 16; enlarge it first"
    assert report.results[0].test == 1.0


def test_a_split_without_usable_pictures(tmp_path: Path, loaded: Loaded) -> None:
    write_pictures(tmp_path / "data" / "train")
    (tmp_path / "data" / "test" / "a").mkdir(parents=True)
    (tmp_path / "data" / "test" / "a" / "x.png").write_bytes(b"nothing")
    data = open_labelled(str(tmp_path / "data"))
    with pytest.raises(LabelledError, match=r"no picture could be used; the first: .*x\.png: not an image"):
        probe(*loaded, data, layers="last", cache=str(tmp_path / "cache"), steps=1)


def test_a_full_disk(coloured: LabelledSet, loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "SHARD", 5)
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(CacheError, match=r"need another 0\.0 GB and the disk has 0\.0 GB; name another place"):
        build(ModelEncoder("model", *loaded, [], None), coloured.splits["train"], tmp_path / "cache")


def test_a_layer_that_does_not_exist(coloured: LabelledSet, loaded: Loaded, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no layer 7"):
        probe(*loaded, coloured, layers=[7], cache=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_the_shard_says_what_it_holds(coloured: LabelledSet, loaded: Loaded, tmp_path: Path) -> None:
    store = build(ModelEncoder("model", *loaded, [], None), coloured.splits["test"], tmp_path / "cache")
    shard = json.loads((store.folder / "0.json").read_text())
    assert shard["rows"] == list(range(12))
    assert [h * w for h, w in shard["grids"]] == store.lengths.tolist()
    assert store.nbytes > store.lengths.sum() * loaded[0].config.hidden_size * 2
