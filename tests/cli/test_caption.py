"""`caption`: the reference's tokens through the installed command, and everything a folder of pictures can hold."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import Golden

from genlip_mlx.cli import console
from genlip_mlx.processing import images
from genlip_mlx.processing.processor import DEFAULT_PROMPT

from .conftest import Call, Outcome, Site, run, start, wait_for


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# --- The reference's tokens ---


def test_the_installed_command_speaks_the_references_captions(case: Golden, model: Path) -> None:
    for prompt in dict.fromkeys(sample["prompt"] for sample in case.samples):
        asked = [i for i, sample in enumerate(case.samples) if sample["prompt"] == prompt]
        paths = [case.image_path(i) for i in asked]
        outcome = run(
            "caption", *paths, "--model", model, "--json", "--max-tokens", 24, "--prompt", prompt, "--dtype", "float32"
        )
        assert (outcome.code, outcome.err) == (0, "")
        assert objects(outcome.out) == [
            {
                "image": str(path),
                "caption": case.samples[i]["greedy_text"],
                "tokens": case.samples[i]["greedy_ids"],
                "finish_reason": "length",
                "grid": case.samples[i]["grid"],
                "prompt": prompt,
                "error": None,
            }
            for i, path in zip(asked, paths)
        ]


# --- Where captions go ---


def caption(call: Call, model: Path, *arguments: str | Path) -> Outcome:
    return call("caption", "--model", model, "--max-tokens", "8", *arguments)


def test_the_default_prompt(call: Call, navit: Path, images_dir: Path) -> None:
    plain = caption(call, navit, images_dir, "--json")
    assert [result["prompt"] for result in objects(plain.out)] == [DEFAULT_PROMPT] * 2
    assert caption(call, navit, images_dir, "--json", "--prompt", DEFAULT_PROMPT).out == plain.out
    assert caption(call, navit, images_dir, "--json", "--prompt", "").out != plain.out


def test_plain_text_has_names_where_there_are_several_pictures(call: Call, navit: Path, images_dir: Path) -> None:
    paths = [images_dir / "astronaut.jpg", images_dir / "page.png"]
    both = objects(caption(call, navit, *paths, "--json").out)
    outcome = caption(call, navit, *paths)
    assert outcome.err == ""
    assert outcome.out == "".join(f"{path}: {result['caption']}\n" for path, result in zip(paths, both))
    assert caption(call, navit, paths[0]).out == f"{both[0]['caption']}\n"


def test_stream_prints_what_plain_prints(call: Call, navit: Path, images_dir: Path) -> None:
    for paths in ([images_dir], [images_dir / "page.png"]):
        assert caption(call, navit, *paths, "--stream") == caption(call, navit, *paths)


def test_output_is_the_json_lines(call: Call, navit: Path, images_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "captions.jsonl"
    output.write_text("old")
    outcome = caption(call, navit, images_dir, "--output", output)
    assert (outcome.code, outcome.out, outcome.err) == (0, "", f"captions written to {output}\n")
    assert output.read_text(encoding="utf-8") == caption(call, navit, images_dir, "--json").out
    assert list(tmp_path.iterdir()) == [output]


def test_batches_of_any_size_say_the_same(call: Call, navit: Path, images_dir: Path) -> None:
    arguments = [images_dir, images_dir, "--json"]
    one = caption(call, navit, *arguments, "--batch-size", "1")
    assert len(objects(one.out)) == 4
    assert caption(call, navit, *arguments, "--batch-size", "3") == one


def test_sampling_is_repeatable_with_a_seed(call: Call, navit: Path, images_dir: Path) -> None:
    arguments = [images_dir, "--json", "--temp", "1", "--top-p", "0.95"]
    first = caption(call, navit, *arguments, "--seed", "7")
    assert first.code == 0
    assert caption(call, navit, *arguments, "--seed", "7") == first
    assert caption(call, navit, *arguments, "--seed", "8").out != first.out
    assert caption(call, navit, *arguments).out != first.out


def test_types_to_compute_in(call: Call, navit: Path, images_dir: Path) -> None:
    for dtype in ("bfloat16", "float16"):
        outcome = caption(call, navit, images_dir, "--json", "--dtype", dtype)
        assert [len(result["tokens"]) for result in objects(outcome.out)] == [8, 8]


# --- Pictures that cannot be read ---


def test_a_corrupt_picture_is_reported_and_skipped(call: Call, navit: Path, photos: Path) -> None:
    outcome = caption(call, navit, photos, "--json")
    assert outcome.code == 1
    good, bad, page = objects(outcome.out)
    assert [good["image"], bad["image"], page["image"]] == [str(photos / name) for name in ("a.jpg", "b.jpg", "c.png")]
    assert good["error"] is None
    assert page["error"] is None
    assert len(good["tokens"]) == len(page["tokens"]) == 8
    assert bad["error"].startswith(f"{photos / 'b.jpg'}: the image is damaged or cut off")
    assert bad | {"error": None} == {
        "image": str(photos / "b.jpg"),
        "caption": None,
        "tokens": [],
        "finish_reason": None,
        "grid": None,
        "prompt": DEFAULT_PROMPT,
        "error": None,
    }
    assert outcome.err == f"skipped: {bad['error']}\n1 of 3 pictures could not be read\n"


@pytest.mark.parametrize("mode", [[], ["--stream"]])
def test_a_corrupt_picture_leaves_no_line_of_text(call: Call, navit: Path, photos: Path, mode: list[str]) -> None:
    outcome = caption(call, navit, photos, *mode)
    assert outcome.code == 1
    assert [name for name in ("a.jpg: ", "b.jpg: ", "c.png: ") if name in outcome.out] == ["a.jpg: ", "c.png: "]
    assert outcome.err.startswith(f"skipped: {photos / 'b.jpg'}: ")
    alone = caption(call, navit, photos / "b.jpg", *mode)
    assert (alone.code, alone.out) == (1, "")


def test_a_corrupt_picture_stands_in_the_output(call: Call, navit: Path, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "captions.jsonl"
    outcome = caption(call, navit, photos, "--output", output)
    assert outcome.code == 1
    assert [result["error"] is None for result in objects(output.read_text())] == [True, False, True]
    assert outcome.err.splitlines()[1:] == [f"captions written to {output}", "1 of 3 pictures could not be read"]


def test_a_file_name_that_is_no_unicode(navit: Path, images_dir: Path, tmp_path: Path) -> None:
    photo = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    try:
        shutil.copyfile(images_dir / "astronaut.jpg", photo)
    except OSError:  # macOS keeps such names out
        return
    outcome = run("caption", os.fsdecode(photo), "--model", navit, "--max-tokens", 2, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    (result,) = objects(outcome.out)
    assert os.fsencode(result["image"]) == photo


# --- Addresses ---


def test_a_picture_from_the_web(call: Call, navit: Path, images_dir: Path, site: Site) -> None:
    outcome = caption(call, navit, site / "astronaut.jpg", "--json")
    (local,) = objects(caption(call, navit, images_dir / "astronaut.jpg", "--json").out)
    assert objects(outcome.out) == [local | {"image": site / "astronaut.jpg"}]


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("no-such-page", "the server answered 404 Not Found"),
        ("page.html", "not an image of a known format (JPEG, PNG, WebP, GIF, TIFF, ...)"),
    ],
)
def test_an_address_without_a_picture(
    call: Call, navit: Path, images_dir: Path, site: Site, page: str, message: str
) -> None:
    outcome = caption(call, navit, site / page, images_dir / "page.png", "--json")
    assert outcome.code == 1
    bad, good = objects(outcome.out)
    assert bad["error"] == f"{site / page}: {message}"
    assert good["error"] is None


def test_a_file_too_large_to_download(call: Call, navit: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "URL_BYTES_LIMIT", 2**13)
    outcome = caption(call, navit, site / "astronaut.jpg", "--json")
    assert outcome.code == 1
    (result,) = objects(outcome.out)
    assert result["error"] == (
        f"{site / 'astronaut.jpg'}: larger than 0.0078125 MB; download it yourself and name the file"
    )


# --- Progress, and an early end ---


def test_progress_in_plain_lines(call: Call, navit: Path, images_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "PLAIN_INTERVAL", 0.0)
    outcome = caption(call, navit, images_dir, "--batch-size", "1", "--json")
    assert outcome.err == "captioning: 1 of 2 pictures (50%)\ncaptioning: 2 of 2 pictures (100%)\n"
    assert len(objects(outcome.out)) == 2


def test_no_progress_for_what_is_quick(call: Call, navit: Path, images_dir: Path) -> None:
    assert caption(call, navit, images_dir).err == ""


def test_interrupted_while_speaking(navit: Path, images_dir: Path) -> None:
    with start("caption", images_dir / "page.png", "--model", navit, "--stream", "--max-tokens", 10**6) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)  # it speaks
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")


def test_interrupted_with_an_output(navit: Path, images_dir: Path, site: Site, tmp_path: Path) -> None:
    output = tmp_path / "captions.jsonl"
    output.write_text("old")
    # It waits for its batch to be whole. In a picture's first computation Ctrl-C can be lost: MLX drops an exception
    # that comes while it converts a NumPy array.
    with start("caption", images_dir, site / "endless", "--model", navit, "--output", output) as process:
        wait_for(lambda: site.asked and len(list(tmp_path.iterdir())) == 2)  # the old one, and one in the making
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=15)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")
    assert list(tmp_path.iterdir()) == [output]
    assert output.read_text() == "old"


def test_interrupted_while_a_server_keeps_silent(navit: Path, site: Site) -> None:
    with start("caption", site / "endless", "--model", navit) as process:
        wait_for(lambda: site.asked)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=15)  # far below the time limit of a download
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


def test_a_reader_that_has_seen_enough(navit: Path, images_dir: Path) -> None:
    with start("caption", images_dir, "--model", navit, "--stream", "--max-tokens", 10**6) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.stdout.close()  # as `head` does
        assert process.wait(timeout=60) == 1
        assert process.stderr is not None
        assert process.stderr.read() == ""
