"""Sources: every layout gives the same records, by number; what cannot be opened is named with its remedy."""

from __future__ import annotations

import builtins
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from genlip_mlx.data import writers
from genlip_mlx.data.records import Record, RecordError
from genlip_mlx.data.sources import Source, SourceError, open_source
from genlip_mlx.data.synthetic import SceneError, Scenes
from genlip_mlx.processing import DEFAULT_PROMPT, open_image

CAPTIONS = [f"Picture number {i}." for i in range(7)]


def jpeg(shade: int = 0, size: tuple[int, int] = (32, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_tar(path: Path, members: list[tuple[str, bytes]], **options: Any) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def as_jsonl(folder: Path) -> str:
    for i in range(7):
        (folder / f"{i}.jpg").write_bytes(jpeg(i))
    return str(write_lines(folder / "d.jsonl", [{"image": f"{i}.jpg", "caption": c} for i, c in enumerate(CAPTIONS)]))


def as_metadata(folder: Path) -> str:
    rows = [{"file_name": f"in/{i}.jpg", "text": c} for i, c in enumerate(CAPTIONS)]
    write_lines(folder / "train" / "metadata.jsonl", rows)
    (folder / "train" / "in").mkdir()
    for i in range(7):
        (folder / "train" / "in" / f"{i}.jpg").write_bytes(jpeg(i))
    return str(folder)


def as_texts(folder: Path) -> str:
    for i, caption in enumerate(CAPTIONS):
        (folder / "deep" / str(i)).mkdir(parents=True)
        (folder / "deep" / str(i) / "a.b.jpg").write_bytes(jpeg(i))
        (folder / "deep" / str(i) / "a.b.txt").write_text(f"{caption}\n")
    return str(folder)


def as_tars(folder: Path, **options: Any) -> str:
    members = [(f"x/{i}", jpeg(i), c) for i, c in enumerate(CAPTIONS)]
    for number, part in enumerate((members[:3], members[3:])):
        pairs = [((f"{n}.jpg", j), (f"{n}.json", json.dumps({"caption": c}).encode())) for n, j, c in part]
        write_tar(folder / f"s-{number:03d}.tar", [member for pair in pairs for member in pair], **options)
    return str(folder / "s-{000..001}.tar")


def as_long_named_tars(folder: Path) -> str:
    members = [(f"{'é' * 150}/{i}.png.{kind}", i, kind) for i in range(7) for kind in ("txt", "webp")]
    content = {"txt": lambda i: CAPTIONS[i].encode(), "webp": jpeg}
    renamed = [(name.replace(".png.", "."), content[kind](i)) for name, i, kind in members]
    write_tar(folder / "a.tar", renamed[:6], format=tarfile.GNU_FORMAT)
    write_tar(folder / "b.tar", renamed[6:], format=tarfile.PAX_FORMAT)
    return str(folder / "*.tar")


def as_parquet(folder: Path) -> str:
    from datasets import Dataset, Features, Value
    from datasets import Image as Picture

    for number, part in enumerate((range(3), range(3, 7))):
        rows = {"caption": [CAPTIONS[i] for i in part], "picture": [{"bytes": jpeg(i), "path": None} for i in part]}
        features = Features({"caption": Value("string"), "picture": Picture()})
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"train-{number}.parquet")
    return str(folder)


def as_plain_parquet(folder: Path) -> str:
    from datasets import Dataset

    rows = {"text": CAPTIONS, "image": [jpeg(i) for i in range(7)], "other": [0] * 7}
    Dataset.from_dict(rows).to_parquet(folder / "a.parquet")
    return str(folder / "a.parquet")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


LAYOUTS = [as_jsonl, as_metadata, as_texts, as_tars, as_long_named_tars, as_parquet, as_plain_parquet]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_records_in_any_order(layout: Callable[[Path], str], tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    data = layout(tmp_path / "d")
    source = open_source(data)
    assert len(source) == 7
    assert source.problems == ()
    copy: Source = pickle.loads(pickle.dumps(source))  # as a worker gets it
    for i in (6, 0, 3, 2, 5, 1, 4):
        record = copy[i]
        assert record.caption.strip() == CAPTIONS[i]
        assert record.prompt == DEFAULT_PROMPT
        assert open_image(record.image).getpixel((5, 5)) == (i, i, i)
    assert copy.identity() == open_source(data).identity() == source.identity()
    assert json.loads(json.dumps(source.identity())) == source.identity()
    assert source.identity()["records"] == 7


def test_names_lead_to_the_record(tmp_path: Path) -> None:
    path = as_jsonl(tmp_path)
    assert open_source(path)[2].name == f"{path}:3"
    (tmp_path / "t").mkdir()
    assert open_source(as_tars(tmp_path / "t"))[4].name == f"{tmp_path}/t/s-001.tar/x/4.json"
    (tmp_path / "f").mkdir()
    assert open_source(as_texts(tmp_path / "f"))[4].name == f"{tmp_path}/f/deep/4/a.b.jpg"


@pytest.mark.parametrize("format", writers.FORMATS)
def test_what_synth_writes_is_read_back(format: str, tmp_path: Path) -> None:
    scenes = Scenes("validation", size=3, kinds=["words"])
    writers.write(scenes, tmp_path / "d", format)
    source = open_source(str(tmp_path / "d"))
    assert [source[i].caption for i in range(3)] == [scene.caption for scene in scenes]
    assert open_image(source[1].image).size == scenes[1].image.size


# --- JSON lines ---


def test_lines_are_counted_as_in_an_editor(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    row = b'{"image": "d.jsonl", "caption": "\xc3\xa9t\xc3\xa9"}'
    path.write_bytes(b"\xef\xbb\xbf" + row + b"\r\n\r\n\n" + row + b"\n{nonsense\n" + row)  # a mark, blanks, no end
    source = open_source(str(path))
    assert len(source) == 4
    assert [source[i].name for i in (0, 1, 3)] == [f"{path}:{line}" for line in (1, 4, 6)]
    assert source[3].caption == "été"
    with pytest.raises(RecordError, match=r"d\.jsonl:5: not valid JSON \(Expecting property name") as caught:
        source[2]
    assert caught.value.reason == "bad JSON"


def test_long_lines_cross_the_pieces_a_file_is_scanned_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = as_jsonl(tmp_path)
    whole = open_source(path)
    monkeypatch.setattr("genlip_mlx.data.sources._SCAN", 5)
    assert [open_source(path)[i] for i in range(7)] == [whole[i] for i in range(7)]


def test_several_lists_are_one_source(tmp_path: Path) -> None:
    for split in ("a", "b"):
        (tmp_path / split).mkdir()
        as_jsonl(tmp_path / split)
    source = open_source(str(tmp_path / "{a,b}" / "*.jsonl"))
    assert len(source) == 14
    assert [source[i].caption for i in range(14)] == CAPTIONS * 2
    assert source[9].image == tmp_path / "b" / "2.jpg"


def test_columns_can_be_chosen(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(jpeg())
    path = write_lines(tmp_path / "d.jsonl", [{"img": "0.jpg", "alt": "A cat.", "ask": "What?", "caption": "no"}])
    record = open_source(str(path), image_column="img", caption_column="alt", prompt_column="ask")[0]
    assert record == Record(f"{path}:1", tmp_path / "0.jpg", "A cat.", "What?")


# --- Folders ---


def test_splits_are_subfolders(tmp_path: Path) -> None:
    for name, number in (("train", 3), ("val", 2)):
        (tmp_path / name).mkdir()
        for i in range(number):
            (tmp_path / name / f"{i}.jpg").write_bytes(jpeg())
            (tmp_path / name / f"{i}.txt").write_text(name)
    assert len(open_source(str(tmp_path))) == 3
    assert len(open_source(str(tmp_path), split="validation")) == 2
    with pytest.raises(SourceError, match="no split test; that would be a subfolder"):
        open_source(str(tmp_path), split="test")


def test_splits_are_parquet_files_of_that_name(tmp_path: Path) -> None:
    from datasets import Dataset

    for name, number in (("train-0", 3), ("train-1", 1), ("validation-0", 2)):
        Dataset.from_dict({"caption": ["x"] * number, "image": [b"x"] * number}).to_parquet(
            tmp_path / f"{name}.parquet"
        )
    assert len(open_source(str(tmp_path))) == 4
    assert len(open_source(str(tmp_path), split="validation")) == 2


def test_a_picture_without_its_text(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg())
    (tmp_path / "b.jpg").write_bytes(jpeg())
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    source = open_source(str(tmp_path))
    with pytest.raises(RecordError, match=r"a\.jpg: neither a\.txt beside it nor metadata\.jsonl"):
        source[0]
    with pytest.raises(RecordError, match=r"b\.txt: not UTF-8"):
        source[1]


# --- Tars ---


def test_members_of_a_tar_are_put_together_by_name(tmp_path: Path) -> None:
    turns = [{"from": "gpt", "value": "A cat."}]
    members = [
        ("dir.v1/a.txt", b"no"),
        ("dir.v1/a.JPG", jpeg(1)),
        ("dir.v1/a.seg.png", b"mask"),
        ("dir.v1/a.json", json.dumps({"conversations": turns}).encode()),
        ("._a.jpg", b"resource fork"),
        ("b.png", jpeg(2)),
        ("c.txt", b"alone"),
        ("d.png", jpeg(3)),
        ("d.json", b"{"),
        ("e.jpeg", jpeg(4)),
        ("e.txt", b"\xff"),
    ]
    source = open_source(str(write_tar(tmp_path / "a.tar", members)))
    assert len(source) == 5
    assert source[0].turns == tuple(turns)
    assert source[0].image == jpeg(1)
    for index, message in enumerate(["b: no .json and no .txt", "c: no member with a picture's suffix (jpg, jpeg"], 1):
        with pytest.raises(RecordError) as caught:
            source[index]
        assert message in str(caught.value)
    with pytest.raises(RecordError, match=r"a\.tar/d\.json: not valid JSON"):
        source[3]
    with pytest.raises(RecordError, match=r"a\.tar/e\.txt: not UTF-8"):
        source[4]
    masks = open_source(str(tmp_path / "a.tar"), image_column="seg.png")
    assert masks[0].image == b"mask"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_cut_off_tar_gives_what_came_before(format: int, tmp_path: Path) -> None:
    as_tars(tmp_path, format=format)
    path = tmp_path / "s-000.tar"
    whole = path.read_bytes()
    blocks_of_a_record = len(jpeg()) // 512 + 1 + 1 + 1 + 1
    cut = 512 * (2 * blocks_of_a_record + 1) + 100  # inside the third record's picture
    path.write_bytes(whole[:cut])
    source = open_source(str(tmp_path / "s-{000..001}.tar"))
    assert [source[i].caption for i in range(len(source))] == CAPTIONS[:2] + CAPTIONS[3:]
    (problem,) = source.problems
    assert problem.reason == "corrupt tar"
    assert str(problem) == f"{path}: is cut off inside x/2.jpg; the 2 records before that are used"


def test_damage_inside_a_tar_ends_it(tmp_path: Path) -> None:
    as_tars(tmp_path)
    path = tmp_path / "s-001.tar"
    data = bytearray(path.read_bytes())
    at = data.index(b"x/5.json")
    data[at : at + 512] = b"\x07" * 512
    path.write_bytes(data)
    source = open_source(str(path))
    assert [source[i].caption for i in range(len(source))] == CAPTIONS[3:5]  # the picture of 5 has lost its text
    assert f"s-001.tar: is damaged at byte {at} (" in str(source.problems[0])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: data.index(b"x/2.jpg")], "has no end mark, so it may be cut off, at byte"),
        (lambda data: data + data, "goes on after its end mark at byte"),
    ],
)
def test_odd_ends_of_a_tar_are_reported(damage: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
    as_tars(tmp_path)
    path = tmp_path / "s-000.tar"
    path.write_bytes(damage(path.read_bytes()))
    source = open_source(str(path))
    assert len(source) >= 2
    assert message in str(source.problems[0])


def test_a_file_that_is_no_tar_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"not a tar" * 200)
    with pytest.raises(SourceError, match=r"a\.tar: holds no records; .*a\.tar: .*the 0 records before that are used"):
        open_source(str(tmp_path / "a.tar"))
    as_tars(tmp_path)
    assert len(open_source(str(tmp_path))) == 7  # the others are used


# --- Tables and the hub ---


def test_columns_of_a_table_are_checked_at_once(tmp_path: Path) -> None:
    data = as_plain_parquet(tmp_path)
    assert open_source(data, caption_column="text")[0].caption == CAPTIONS[0]
    with pytest.raises(SourceError, match=r"a\.parquet: no column 'alt'; there are text, image, other"):
        open_source(data, caption_column="alt")
    with pytest.raises(SourceError, match=r"no column 'ask'"):
        open_source(data, prompt_column="ask")


def test_a_table_without_pictures(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_dict({"a": [1], "text": ["x"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="no column for the picture; name one of a, text as image_column"):
        open_source(str(tmp_path / "a.parquet"))


def test_conversations_in_a_table(tmp_path: Path) -> None:
    from datasets import Dataset

    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
    Dataset.from_dict({"image": [jpeg()], "conversations": [turns]}).to_parquet(tmp_path / "a.parquet")
    assert open_source(str(tmp_path / "a.parquet"))[0].turns == tuple(turns)


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    as_parquet(tmp_path)
    path = tmp_path / "train-1.parquet"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(SourceError, match=r"train-1\.parquet: not a readable parquet file"):
        open_source(str(tmp_path))


def test_a_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(*arguments: Any, **options: Any) -> datasets.Dataset:
        asked.append((*arguments, options["split"]))
        return datasets.Dataset.from_dict({"image": [jpeg()] * 2, "caption": CAPTIONS[:2]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = open_source("someone/pictures:small", split="validation")
    assert asked == [("someone/pictures", "small", "validation")]
    assert source[1].caption == CAPTIONS[1]
    assert source[1].name == "someone/pictures:small[1]"
    assert source.identity() != open_source("someone/pictures", split="validation").identity()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("Couldn't reach"), "no such file or folder here, and the hub cannot be reached (Couldn't"),
        (FileNotFoundError("No 'some/one'"), "no such data set on the hub (a private one needs `hf auth login`)"),
        (ValueError("Config name is missing.\nPick one"), "cannot be opened (Config name is missing.)"),
    ],
)
def test_what_the_hub_does_not_give(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(SourceError) as caught:
        open_source("some/one")
    assert message in str(caught.value)


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = as_plain_parquet(tmp_path)
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SourceError, match=r'needs the extra "train": pip install "genlip-mlx\[train\]"'):
        open_source(data)


# --- Scenes ---


def test_drawn_scenes() -> None:
    source = open_source("synth:validation:20:words,bars")
    expected = Scenes("validation", size=20, kinds=["words", "bars"])
    assert len(source) == 20
    assert source[7].caption == expected[7].caption
    assert source[7].image == expected[7].image
    assert len(open_source("synth:train")) == len(Scenes("train"))
    assert source.identity() != open_source("synth:validation:20").identity()


# --- What cannot be opened, and what has changed ---


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no records in this folder; it should hold pictures"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "data", "message"),
    [
        ({}, "nowhere", "nowhere: no such file or folder, and not the name of a hub data set"),
        ({"d.jsonl": b"\n \n"[:1]}, "d.jsonl", "d.jsonl: holds no records"),
        ({"d.json": b"[]"}, "d.json", "d.json: not a data set that can be read; write one object a line"),
        ({"d.tar.gz": b""}, "d.tar.gz", "unpack it: records inside a compressed file cannot be found by number"),
        ({"d.zip": b""}, "d.zip", "known are .jsonl, .tar, .parquet and folders"),
        ({"a.jsonl": b"", "a.tar": b""}, "a.*", "files of several kinds, .jsonl, .tar; name one kind"),
        ({"s-00.tar": b""}, "s-{00..02}.tar", "2 of 3 files are missing, the first is "),
        ({"d/metadata.csv": b"", "d/a.jpg": b""}, "d", "only metadata.jsonl is read; write the same columns"),
        ({"d/a.jpg": b"", "d/a.txt": b"x"}, "d|alt", "pictures with .txt files have no columns, so 'alt' cannot be"),
        ({}, "synth:train|alt", "synth:train: drawn scenes have no columns"),
        ({}, "synth:train:1:2", "synth:train:1:2: two values for size"),
        ({}, "synth:trian", "unknown split 'trian'"),
        ({}, "synth:train:cats", "unknown kind of scene cats"),
    ],
)
def test_what_cannot_be_opened(
    files: dict[str, bytes], data: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    data, _, column = data.partition("|")
    with pytest.raises((SourceError, SceneError)) as caught:
        open_source(data, caption_column=column or None)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_changes_show_in_the_identity(tmp_path: Path) -> None:
    path = Path(as_jsonl(tmp_path))
    before = open_source(str(path)).identity()
    path.rename(tmp_path / "moved.jsonl")
    (tmp_path / "moved.jsonl").rename(path)
    assert open_source(str(path)).identity() == before
    path.write_text(path.read_text().replace("number 3", "number three"))
    after = open_source(str(path)).identity()
    assert after["records"] == before["records"]
    assert after["fingerprint"] != before["fingerprint"]
