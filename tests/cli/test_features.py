"""`features`: the reference's numbers through the installed command, in both formats."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import Golden, read_features

from genlip_mlx.cli import console

from .conftest import Call, Site, run, start, wait_for

SUFFIXES = (".npz", ".safetensors")


def close(ours: np.ndarray, expected: np.ndarray) -> None:
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, rtol=0, atol=5e-5)


# --- The reference's numbers ---


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_installed_command_gives_the_references_features(
    case: Golden, model: Path, tmp_path: Path, suffix: str
) -> None:
    paths = [case.image_path(i) for i in range(len(case.samples))]
    output = tmp_path / f"out{suffix}"
    outcome = run("features", *paths, "--model", model, "--output", output, "--dtype", "float32")
    assert (outcome.code, outcome.out) == (0, "")
    assert outcome.err == f"features of {len(paths)} pictures written to {output}\n"
    arrays, named = read_features(output)
    assert named == [str(path) for path in paths]
    assert set(arrays) == {*(str(i) for i in range(len(paths))), "grids"}
    assert arrays["grids"].dtype.kind == "i"
    assert arrays["grids"].tolist() == [sample["grid"] for sample in case.samples]
    for i in range(len(paths)):
        assert arrays[str(i)].shape == (np.prod(case.samples[i]["grid"]), arrays["0"].shape[1])
        close(case.rows(arrays[str(i)], f"{i}.features"), case.expected(f"{i}.features"))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_all_layers(case: Golden, model: Path, tmp_path: Path, suffix: str) -> None:
    paths = [case.image_path(i) for i in range(len(case.samples))]
    output = tmp_path / f"out{suffix}"
    outcome = run("features", *paths, "--model", model, "--output", output, "--layers", "all", "--dtype", "float32")
    assert outcome.code == 0
    arrays, named = read_features(output)
    assert named == [str(path) for path in paths]
    for i in range(len(paths)):
        assert arrays[str(i)].shape[0] == 3
        for layer, state in enumerate(arrays[str(i)]):
            close(case.rows(state, f"{i}.hidden.{layer}"), case.expected(f"{i}.hidden.{layer}"))
        close(case.rows(arrays[f"{i}.ln_post"], f"{i}.features"), case.expected(f"{i}.features"))


# --- Options ---


def features(call: Call, model: Path, output: Path, *arguments: str | Path) -> tuple[dict[str, np.ndarray], list[str]]:
    outcome = call("features", "--model", model, "--output", output, *arguments)
    assert outcome.code == 0, outcome.err
    return read_features(output)


def test_pooled(call: Call, model: Path, images_dir: Path, tmp_path: Path) -> None:
    whole, _ = features(call, model, tmp_path / "whole.npz", images_dir)
    for suffix in SUFFIXES:
        pooled, paths = features(call, model, tmp_path / f"pooled{suffix}", images_dir, "--pool", "mean")
        assert set(pooled) == {"features", "grids"}
        close(pooled["features"], np.stack([whole["0"].mean(axis=0), whole["1"].mean(axis=0)]))
        assert paths == [str(images_dir / name) for name in ("astronaut.jpg", "page.png")]


def test_layers_by_number(call: Call, navit: Path, images_dir: Path, tmp_path: Path) -> None:
    every, _ = features(call, navit, tmp_path / "all.npz", images_dir, "--layers", "all")
    some, _ = features(call, navit, tmp_path / "some.npz", images_dir, "--layers", "2, 0")
    last, _ = features(call, navit, tmp_path / "last.npz", images_dir, "--layers=-1")
    for name in ("0", "1"):
        np.testing.assert_array_equal(some[name], every[name][[2, 0]])
        np.testing.assert_array_equal(last[name], every[name][[2]])


def test_sizes(call: Call, converted: dict[str, Path], images_dir: Path, tmp_path: Path) -> None:
    def grids(model: str, *size: str) -> list[list[int]]:
        arrays, _ = features(call, converted[model], tmp_path / "out.npz", images_dir, *size)
        result: list[list[int]] = arrays["grids"].tolist()
        assert [len(arrays[str(i)]) for i in range(2)] == [h * w for h, w in result]
        return result

    native = grids("tiny-navit")
    assert native[0] != native[1]
    assert grids("tiny-navit", "--size", "native") == native
    assert grids("tiny-navit", "--size", "384") == [[24, 24], [24, 24]]
    assert grids("tiny-224") == grids("tiny-224", "--size", "model") == [[14, 14], [14, 14]]
    assert grids("tiny-224", "--size", "384") == [[24, 24], [24, 24]]
    assert grids("tiny-224", "--size", "native") != [[14, 14], [14, 14]]


def test_an_encoder_alone_gives_the_same(
    call: Call, navit: Path, vision_only: Path, images_dir: Path, tmp_path: Path
) -> None:
    whole, _ = features(call, navit, tmp_path / "whole.npz", images_dir)
    encoder, _ = features(call, vision_only, tmp_path / "encoder.npz", images_dir)
    assert set(whole) == set(encoder)
    for name in whole:
        np.testing.assert_array_equal(encoder[name], whole[name])


# --- What cannot be read, and an early end ---


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_corrupt_picture_is_reported_and_skipped(
    call: Call, navit: Path, photos: Path, tmp_path: Path, suffix: str
) -> None:
    output = tmp_path / f"out{suffix}"
    outcome = call("features", photos, "--model", navit, "--output", output)
    assert (outcome.code, outcome.out) == (1, "")
    skipped, *rest = outcome.err.splitlines()
    assert skipped.startswith(f"skipped: {photos / 'b.jpg'}: the image is damaged or cut off")
    assert rest == [f"features of 2 pictures written to {output}", "1 of 3 pictures could not be read"]
    arrays, paths = read_features(output)
    assert paths == [str(photos / "a.jpg"), str(photos / "c.png")]
    assert set(arrays) == {"0", "1", "grids"}


def test_nothing_readable_means_nothing_written(call: Call, navit: Path, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.npz"
    outcome = call("features", photos / "b.jpg", "--model", navit, "--output", output)
    assert outcome.code == 1
    skipped, error = outcome.err.splitlines()
    assert skipped.startswith(f"skipped: {photos / 'b.jpg'}: ")
    assert error == f"error: {output}: no picture could be read, so nothing was written"
    assert list(tmp_path.iterdir()) == [photos]


def test_pictures_from_the_web(call: Call, navit: Path, images_dir: Path, site: Site, tmp_path: Path) -> None:
    web, paths = features(call, navit, tmp_path / "web.npz", site / "astronaut.jpg")
    local, _ = features(call, navit, tmp_path / "local.npz", images_dir / "astronaut.jpg")
    assert paths == [site / "astronaut.jpg"]
    np.testing.assert_array_equal(web["0"], local["0"])


def test_progress_in_plain_lines(
    call: Call, navit: Path, images_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "PLAIN_INTERVAL", 0.0)
    outcome = call("features", images_dir, "--model", navit, "--output", tmp_path / "out.npz")
    assert outcome.err.splitlines()[:2] == ["encoding: 1 of 2 pictures (50%)", "encoding: 2 of 2 pictures (100%)"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_ended_in_the_middle(navit: Path, images_dir: Path, site: Site, tmp_path: Path, how: signal.Signals) -> None:
    output = tmp_path / "out.npz"
    output.write_text("old")
    with start("features", images_dir, site / "endless", "--model", navit, "--output", output) as process:
        wait_for(lambda: site.asked and len(list(tmp_path.iterdir())) == 2)
        process.send_signal(how)
        out, err = process.communicate(timeout=15)
    assert out == ""
    if how == signal.SIGINT:
        assert (process.returncode, err) == (130, "interrupted\n")
        assert list(tmp_path.iterdir()) == [output]
    else:
        assert process.returncode == -signal.SIGKILL
    assert output.read_text() == "old"
