"""The page: whole in itself, safe whatever texts hold, and honest about what is left out."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from genlip_mlx.analysis import probe, report
from genlip_mlx.analysis.report import PAGE, SECTIONS, Material, ReportError, table, write_report
from genlip_mlx.checkpoint.load import load
from genlip_mlx.info import describe_model
from genlip_mlx.processing.images import ImageError

UNSAFE = '<script>alert("&")</script>'


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(report, "probe", partial(probe.probe, steps=4, cache=str(tmp_path / "cache")))


@pytest.fixture
def captioned(golden_dir: Path, tmp_path: Path) -> Path:
    """JSON lines of two pictures and of one that is not there."""
    for name in ("astronaut.jpg", "page.png"):
        shutil.copy(golden_dir / "images" / name, tmp_path / name)
    rows = [("astronaut.jpg", UNSAFE), ("missing.jpg", "gone"), ("page.png", "A page of text.")]
    path = tmp_path / "captions.jsonl"
    path.write_text("".join(json.dumps({"image": image, "caption": caption}) + "\n" for image, caption in rows))
    return path


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    for label, colour in (("red", (200, 0, 0)), ("dark_blue", (0, 0, 150))):
        for number in range(5):
            path = tmp_path / "colours" / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64 + number), colour).save(path)
    return tmp_path / "colours"


def material(model: Path, data: Path | str, labelled: Path | str | None = None) -> Material:
    loaded = load(model, dtype="float32")
    return Material(describe_model(model), *loaded, str(data), str(labelled or data), None, ["a {} thing"], 50)


class Page(HTMLParser):
    """A page's elements, checked for balance, with their texts."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.titles: list[str] = []
        self.text = ""
        self.feed(content)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["h2"]:
            self.titles.append(data)
        self.text += data


def test_a_whole_page(golden_dir: Path, captioned: Path, labelled: Path, tmp_path: Path) -> None:
    done: list[tuple[float, float]] = []
    what = material(golden_dir / "tiny-navit", captioned, labelled)
    left_out = write_report(tmp_path / "deep" / "out", what, lambda *now: done.append(now))
    assert left_out == {}
    assert done == [(i, len(SECTIONS)) for i in range(1, len(SECTIONS) + 1)]
    content = (tmp_path / "deep" / "out" / PAGE).read_text(encoding="utf-8")
    page = Page(content)
    assert page.titles == list(SECTIONS)
    assert UNSAFE in page.text  # as words
    assert not {"script", "link", "iframe"} & page.tags
    assert "url(" not in content
    assert "@import" not in content
    assert len(page.addresses) == 2 + 2 + 1  # pictures captioned, read out, and the figure of attention
    for address in page.addresses:
        found = re.fullmatch(r"data:image/(png|jpeg);base64,([A-Za-z0-9+/=]+)", address)
        assert found
        assert Image.open(io.BytesIO(base64.b64decode(found[2]))).format == found[1].upper()
    assert "skipped: missing file" in page.text
    assert "prefers-color-scheme: dark" in content
    assert [path.name for path in (tmp_path / "deep" / "out").iterdir()] == [PAGE]


def test_pictures_alone(golden_dir: Path, tmp_path: Path) -> None:
    left_out = write_report(tmp_path, material(golden_dir / "tiny-224", golden_dir / "images"))
    assert set(left_out) == {"Loss", "Probes", "Zero-shot classification"}
    assert "neither astronaut.txt beside it nor metadata.jsonl" in left_out["Loss"]
    assert "no class folders" in left_out["Probes"]
    page = Page((tmp_path / PAGE).read_text(encoding="utf-8"))
    assert page.titles == list(SECTIONS)
    assert page.text.count("Left out: ") == 3


def test_class_folders(golden_dir: Path, labelled: Path, tmp_path: Path) -> None:
    left_out = write_report(tmp_path, material(golden_dir / "tiny-navit", labelled))
    assert set(left_out) == {"Loss"}
    text = Page((tmp_path / PAGE).read_text(encoding="utf-8")).text
    assert "of 2; by chance 50.0%" in text
    assert "linear probe" in text


def test_a_vision_only_model(golden_dir: Path, labelled: Path, tmp_path: Path) -> None:
    from genlip_mlx.checkpoint.convert import convert

    convert(golden_dir / "tiny-navit", tmp_path / "encoder", vision_only=True)
    left_out = write_report(tmp_path / "out", material(tmp_path / "encoder", labelled))
    assert set(left_out) == set(SECTIONS) - {"Model", "Probes"}
    assert all("vision-only" in reason for title, reason in left_out.items() if title != "Loss")


def test_a_picture_that_cannot_be_read_is_passed_over(golden_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(golden_dir / "images", folder)
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    (folder / "b.jpg").write_text("no picture")
    left_out = write_report(tmp_path, material(golden_dir / "tiny-224", folder))
    assert set(left_out) == {"Loss", "Probes", "Zero-shot classification"}


def test_no_data(golden_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jpg").write_text("no picture")
    out = tmp_path / "out"
    for data, kind, told in (
        ("nowhere", ReportError, "nowhere: no such file or folder"),
        ("synth:nothing", ReportError, "unknown split 'nothing'"),
        (tmp_path / "empty", ImageError, "empty: no images in this folder"),
        (tmp_path / "broken", ReportError, "broken: none of its first pictures can be read"),
    ):
        with pytest.raises(kind, match=told):
            write_report(out, material(golden_dir / "tiny-224", data))
    assert not out.exists()


def test_tables_are_escaped_and_aligned() -> None:
    assert table(("a<b", "n"), [('"&"', 1)]) == (
        '<div class="scroll"><table><thead><tr><th>a&lt;b</th><th class="number">n</th></tr></thead>\n<tbody>\n'
        '<tr><td>&quot;&amp;&quot;</td><td class="number">1</td></tr>\n</tbody></table></div>\n'
    )
