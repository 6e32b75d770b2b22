"""Features: the reference's numbers, the same in any company, and files that hold them whole."""

from __future__ import annotations

import errno
import io
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import Golden, read_features
from PIL import Image

from genlip_mlx import files
from genlip_mlx.checkpoint.load import load
from genlip_mlx.config import ConfigError
from genlip_mlx.features import Features, check_output, encode, encode_images, write_features
from genlip_mlx.model.genlip import GenLIP
from genlip_mlx.processing.images import ImageError
from genlip_mlx.processing.processor import Processor

Loaded = tuple[GenLIP, Processor]
SUFFIXES = (".npz", ".safetensors")
TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def loaded(case: Golden) -> Loaded:
    return load(case.folder, "float32")


def close(ours: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(np.array(ours), np.array(expected), rtol=0, atol=tolerance)


# --- The numbers ---


def test_features_and_states_are_the_references(case: Golden, loaded: Loaded) -> None:
    images = [case.image_path(i) for i in range(len(case.samples))]
    for index, result in enumerate(encode(*loaded, images, layers="all")):
        assert result.image == str(images[index])
        assert list(result.grid) == case.samples[index]["grid"]
        close(case.rows(result.features, f"{index}.features"), case.expected(f"{index}.features"))
        assert result.hidden_states is not None
        assert result.hidden_states.shape[0] == loaded[0].config.num_hidden_layers + 1
        for layer, state in enumerate(np.array(result.hidden_states)):
            close(case.rows(state, f"{index}.hidden.{layer}"), case.expected(f"{index}.hidden.{layer}"))


def test_last_is_the_features_alone(case: Golden, loaded: Loaded) -> None:
    (result,) = encode(*loaded, case.image_path(0))
    (whole,) = encode(*loaded, case.image_path(0), layers="all")
    assert result.hidden_states is None
    close(result.features, whole.features, 1e-6)


@pytest.mark.parametrize("layers", [[0], [1, -1], [-1, 0], (2,), [0, 0]])
def test_layers_by_number(case: Golden, loaded: Loaded, layers: list[int]) -> None:
    (result,) = encode(*loaded, case.image_path(0), layers=layers)
    (whole,) = encode(*loaded, case.image_path(0), layers="all")
    assert result.hidden_states is not None
    np.testing.assert_array_equal(np.array(result.hidden_states), np.array(whole.hidden_states)[list(layers)])


@pytest.mark.parametrize("pack_tokens", [1, 300, 10**6])
def test_pictures_of_any_size_together(case: Golden, loaded: Loaded, pack_tokens: int) -> None:
    picture = Image.open(case.image_path(0)).convert("RGB")
    images = [picture.resize(size) for size in [(320, 64), (64, 64), (48, 400), (64, 64), (700, 500)]]
    options: dict[str, Any] = {"layers": "all", "size": "native"}
    results = list(encode_images(*loaded, images, pack_tokens=pack_tokens, **options))
    for result, image in zip(results, images, strict=True):
        (alone,) = encode(*loaded, image, **options)
        assert result.grid == alone.grid
        close(result.features, alone.features)
        close(result.hidden_states, alone.hidden_states)


def test_pooled_features_are_the_mean_over_patches(case: Golden, loaded: Loaded) -> None:
    images = [case.image_path(0), case.image_path(1)]
    pooled = encode(*loaded, images, pool="mean", layers=[0, -1])
    for result, whole in zip(pooled, encode(*loaded, images, layers=[0, -1])):
        assert result.features is not None
        assert result.features.shape == (loaded[0].config.hidden_size,)
        close(result.features, np.array(whole.features).mean(axis=0), 1e-6)
        close(result.hidden_states, np.array(whole.hidden_states).mean(axis=1), 1e-6)


def test_bfloat16_pools_in_float32(case: Golden) -> None:
    model = load(case.folder, "bfloat16")
    (pooled,) = encode(*model, case.image_path(0), pool="mean")
    (whole,) = encode(*model, case.image_path(0))
    assert pooled.features is not None
    assert whole.features is not None
    assert pooled.features.dtype == mx.bfloat16
    expected = np.array(whole.features.astype(mx.float32)).mean(axis=0)
    np.testing.assert_allclose(np.array(pooled.features.astype(mx.float32)), expected, rtol=2**-8, atol=1e-6)


def test_sizes(case: Golden, loaded: Loaded) -> None:
    path = case.image_path(0)
    assert encode(*loaded, path, size=384)[0].grid == (24, 24)
    (own,) = encode(*loaded, path)
    (native,) = encode(*loaded, path, size="native")
    (fixed,) = encode(*loaded, path, size=224)
    assert list(own.grid) == case.samples[0]["grid"]
    same = fixed if case.folder.name == "tiny-224" else native
    assert same.grid == own.grid
    close(same.features, own.features, 0)
    assert native.grid != fixed.grid == (14, 14)


# --- Many pictures ---


def test_every_way_to_name_a_picture(case: Golden, loaded: Loaded) -> None:
    path = case.image_path(1)
    images = [path, str(path), path.read_bytes(), Image.open(path)]
    results = encode(*loaded, images)
    assert [result.image for result in results] == [str(path), str(path), "image 2", "image 3"]
    for result in results:
        close(result.features, results[0].features, 1e-5)
    for image in images:
        (result,) = encode(*loaded, image)
        close(result.features, results[0].features, 1e-5)


def test_a_bad_picture_keeps_its_place_and_the_rest_goes_on(case: Golden, loaded: Loaded) -> None:
    good = case.image_path(0)
    images = ["missing.jpg", good, "missing.jpg", good, "missing.jpg"]
    results = list(encode_images(*loaded, images, pack_tokens=1))
    assert [result.error for result in results] == [
        "missing.jpg: no such file" if image == "missing.jpg" else None for image in images
    ]
    assert [result.features is None for result in results] == [image == "missing.jpg" for image in images]
    with pytest.raises(ImageError, match=r"^missing\.jpg: no such file$"):
        encode(*loaded, images)


def test_pictures_are_taken_as_they_come(loaded: Loaded) -> None:
    endless = itertools.repeat(Image.new("RGB", (64, 64)))
    results = encode_images(*loaded, endless, pack_tokens=400)
    assert len(list(itertools.islice(results, 50))) == 50
    results.close()  # type: ignore[attr-defined]


def test_no_pictures(loaded: Loaded) -> None:
    assert encode(*loaded, []) == []


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"layers": [3]}, ValueError, "there is no layer 3: 0 is the embeddings, 2 the last block"),
        ({"layers": [-4]}, ValueError, "there is no layer -4: 0 is the embeddings, 2 the last block"),
        ({"layers": "first"}, ValueError, "layers must be 'last', 'all' or numbers, not 'first'"),
        ({"pool": "max"}, ValueError, "pool must be 'none' or 'mean', not 'max'"),
        ({"size": 100}, ConfigError, "size 100 is not a multiple of patch_size 16"),
        ({"size": 0}, ConfigError, "size must be a positive whole number, not 0"),
        ({"size": "384"}, ConfigError, "size must be a positive whole number, not '384'"),
    ],
)
def test_options_that_make_no_sense(
    case: Golden, loaded: Loaded, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    assert loaded[0].config.num_hidden_layers == 2
    with pytest.raises(kind) as caught:
        encode(*loaded, case.image_path(0), **options)
    assert str(caught.value) == message


# --- Files ---


def made(*shapes: tuple[int, int], states: bool = False, pooled: bool = False) -> Iterator[Features]:
    """Features of made-up pictures with grids 1 x n; n = 0 stands for one that cannot be read."""
    rng = np.random.default_rng(0)
    for number, (rows, dim) in enumerate(shapes):
        name = f"{number}.jpg"
        if not rows:
            yield Features(name, (0, 0), None, error=f"{name}: no such file")
            continue
        features = mx.array(rng.standard_normal((dim,) if pooled else (rows, dim)).astype(np.float32))
        hidden = mx.stack([features, -features]) if states else None
        yield Features(name, (1, rows), features, hidden)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_features(tmp_path: Path, suffix: str) -> None:
    shapes = [(3, 4), (0, 0), (5, 4)]
    path = tmp_path / f"out{suffix}"
    report = write_features(str(path), made(*shapes))
    assert [(result.image, result.error) for result in report] == [
        ("0.jpg", None),
        ("1.jpg", "1.jpg: no such file"),
        ("2.jpg", None),
    ]
    assert all(result.features is None for result in report)
    arrays, paths = read_features(path)
    assert paths == ["0.jpg", "2.jpg"]
    assert set(arrays) == {"0", "1", "grids"}
    assert arrays["grids"].tolist() == [[1, 3], [1, 5]]
    assert arrays["grids"].dtype == np.int32
    first, _, second = made(*shapes)
    np.testing.assert_array_equal(arrays["0"], np.array(first.features))
    np.testing.assert_array_equal(arrays["1"], np.array(second.features))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_hidden_states(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    write_features(path, made((3, 4), (5, 4), states=True))
    arrays, _ = read_features(path)
    assert {name: array.shape for name, array in arrays.items()} == {
        "0": (2, 3, 4),
        "0.ln_post": (3, 4),
        "1": (2, 5, 4),
        "1.ln_post": (5, 4),
        "grids": (2, 2),
    }
    np.testing.assert_array_equal(arrays["1"][0], arrays["1.ln_post"])


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("states", [False, True])
def test_a_file_of_pooled_features(tmp_path: Path, suffix: str, states: bool) -> None:
    path = tmp_path / f"out{suffix}"
    write_features(path, made((3, 4), (5, 4), states=states, pooled=True))
    arrays, paths = read_features(path)
    shapes = {name: array.shape for name, array in arrays.items()}
    hidden = {"hidden_states": (2, 2, 4)} if states else {}
    assert shapes == {"features": (2, 4), "grids": (2, 2)} | hidden
    assert paths == ["0.jpg", "1.jpg"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_bfloat16_is_written_as_float32(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    features = mx.array([[1.0, 2.5]]).astype(mx.bfloat16)
    write_features(path, [Features("a.jpg", (1, 1), features)])
    arrays, _ = read_features(path)
    assert arrays["0"].dtype == np.float32
    assert arrays["0"].tolist() == [[1.0, 2.5]]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_arrays_are_written_by_value_however_they_lie_in_memory(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    features = mx.arange(12, dtype=mx.float32).reshape(3, 4).T
    hidden = mx.arange(24, dtype=mx.float32).reshape(4, 2, 3).swapaxes(0, 1)
    mx.eval(features, hidden)
    write_features(path, [Features("a.jpg", (1, 4), features, hidden)])
    arrays, _ = read_features(path)
    np.testing.assert_array_equal(arrays["0.ln_post"], np.arange(12).reshape(3, 4).T)
    np.testing.assert_array_equal(arrays["0"], np.arange(24).reshape(4, 2, 3).swapaxes(0, 1))


@pytest.mark.parametrize("name", ["out.txt", "out", "out.NPZ", ".npz"])
def test_only_two_formats(name: str, tmp_path: Path) -> None:
    message = re.escape(f"{tmp_path / name}: features are written as .npz or .safetensors")
    with pytest.raises(ValueError, match=f"^{message}$"):
        write_features(tmp_path / name, made((3, 4)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nothing_readable_means_nothing_written(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    with pytest.raises(ValueError, match=r"no picture could be read, so nothing was written$"):
        write_features(path, made((0, 0), (0, 0)))
    assert not list(tmp_path.iterdir())


class FullDisk(io.FileIO):
    """A file on a disk that takes 100 bytes more."""

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"out{suffix}"
    path.write_bytes(b"old")

    def opened(file: Path, mode: str) -> io.BufferedWriter:
        return io.BufferedWriter(FullDisk(file, mode), 64)

    monkeypatch.setattr(files, "open", opened, raising=False)
    with pytest.raises(OSError, match=f"^{re.escape(str(path))}: the disk is full; nothing was written$"):
        write_features(path, made((30, 40), (30, 40)))
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {path.name: b"old"}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_what_stops_encoding_leaves_the_old_file(tmp_path: Path, suffix: str, error: BaseException) -> None:
    path = tmp_path / f"out{suffix}"
    path.write_bytes(b"old")

    def stopped() -> Iterator[Features]:
        yield from made((3, 4))
        raise error

    with pytest.raises(type(error)):
        write_features(path, stopped())
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {path.name: b"old"}


def test_an_output_is_checked_before_any_work() -> None:
    assert check_output("folder/out.npz") == Path("folder/out.npz")
    with pytest.raises(ValueError, match="features are written as"):
        check_output("out.json")
