"""Synthetic scenes: the same everywhere, true to their captions, scored fairly, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from typer.testing import CliRunner

from genlip_mlx.cli.synth import synth
from genlip_mlx.data import writers
from genlip_mlx.data.scenes.dice import Dice
from genlip_mlx.data.scenes.vocabulary import COLOURS
from genlip_mlx.data.scoring import edit_distance, read_groups, read_texts, read_values, score, summary
from genlip_mlx.data.synthetic import COURSE, KINDS, LAYOUTS, SCENES, SPLITS, Scene, SceneError, Scenes
from genlip_mlx.data.writers import write

# What scenes 0 to 99 of seed 0 say. It changes only when their world is meant to change, and with it
# every number that was measured on it.
WORLD = "f8aa138e5440a1ce"


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return list(Scenes("test", size=600))


def fingerprint(scene: Scene) -> str:
    return hashlib.sha256(scene.image.tobytes() + scene.caption.encode()).hexdigest()


def test_the_world_of_seed_0_stays_as_it_is(scenes: list[Scene]) -> None:
    said = json.dumps([(scene.kind, scene.image.size, scene.caption, scene.facts) for scene in scenes[:100]])
    assert hashlib.sha256(said.encode()).hexdigest()[:16] == WORLD


def test_a_scene_depends_on_seed_split_and_index_alone(scenes: list[Scene]) -> None:
    again = Scenes("test", size=10**9)
    for index in (599, 3, 40):
        assert fingerprint(again[index]) == fingerprint(scenes[index])
    assert again[-1].caption == again[10**9 - 1].caption
    assert fingerprint(Scenes("test", seed=1)[3]) != fingerprint(scenes[3])


def test_splits_share_no_scene() -> None:
    prints = [{fingerprint(scene) for scene in Scenes(split, size=150)} for split in SPLITS]
    assert len(set().union(*prints)) == 3 * 150


def test_indexing_is_a_sequence_s() -> None:
    few = Scenes("train", size=3)
    assert len(few) == 3
    assert len(list(few)) == 3
    for index in (3, -4):
        with pytest.raises(IndexError, match="of 3"):
            few[index]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "val"}, "unknown split 'val'; known: train, validation, test"),
        ({"split": "train", "kinds": ["words", "cats"]}, "unknown kind of scene cats; known: shapes, words"),
        ({"split": "train", "kinds": []}, "unknown kind of scene"),
        ({"split": "train", "size": -1}, "size must be"),
    ],
)
def test_what_does_not_exist_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(SceneError, match=message):
        Scenes(**arguments)


def test_every_kind_and_layout_occurs(scenes: list[Scene]) -> None:
    assert {scene.kind for scene in scenes} == set(SCENES)
    assert {scene.layout for scene in scenes} == set(LAYOUTS)
    assert {scene.kind for scene in Scenes("train", size=40, kinds=["lines", "words"])} == {"lines", "words"}
    assert all(scene.layout == "tall" for scene in scenes if scene.kind == "receipts")
    assert all(scene.layout == "wide" for scene in scenes if scene.kind == "banners")


def test_pictures_are_whole_patches_and_of_a_modest_size(scenes: list[Scene]) -> None:
    for scene in scenes:
        width, height = scene.image.size
        assert scene.image.mode == "RGB"
        assert width % 16 == height % 16 == 0
        assert 36 <= width * height // 256 <= 240


def test_cards_are_small_and_short_and_come_only_when_asked_for() -> None:
    for card in Scenes("train", size=200, kinds=["cards"]):
        width, height = card.image.size
        assert card.kind == "cards"
        assert width % 16 == height % 16 == 0
        assert 16 <= width * height // 256 <= 64
        assert len(card.caption.split()) <= 20


def test_scenes_join_the_cards_as_the_course_goes_on() -> None:
    mixed = Scenes("train", size=10**6, kinds=KINDS)
    share = {start: sum(mixed[start + k].kind == "cards" for k in range(200)) for start in (0, sum(COURSE) // 2, 10**5)}
    first, half_way, last = share.values()
    assert first == 200
    assert 110 <= half_way <= 155  # two to a scene
    assert 75 <= last <= 125  # one to one
    again = [scene.kind for scene in Scenes("validation", size=200, kinds=KINDS)]
    assert 75 <= again.count("cards") <= 125


def test_cards_are_a_course() -> None:
    course = Scenes("train", size=COURSE[1] + 100, kinds=["cards"])
    first = [course[index] for index in range(100)]
    assert {card.image.size for card in first} == {(64, 64)}
    assert all(card.caption.endswith(", on white.") or card.caption.startswith("Black on white:") for card in first)
    assert all((np.asarray(card.image)[0, 0] == 250).all() for card in first if card.facts)
    last = [course[COURSE[1] + index] for index in range(100)]
    assert len({card.image.size for card in last}) > 20
    assert all(16 <= card.image.width * card.image.height // 256 <= 100 for card in last)
    assert all(4 <= len(card.caption.split()) <= 40 for card in last)
    assert sum("on white" in card.caption for card in last) < 60
    later = Scenes("validation", size=100, kinds=["cards"])
    assert len({card.image.size for card in later}) > 20  # other splits ask for all of it from the start


def test_captions_are_long_and_varied(scenes: list[Scene]) -> None:
    assert all(25 <= len(scene.caption.split()) <= 70 for scene in scenes)
    assert all(scene.caption.endswith(".") and scene.caption[0].isupper() for scene in scenes)
    openings = {" ".join(scene.caption.split()[:3]) for scene in scenes}
    assert len(openings) > 50
    words = {word.strip('.,;:"').lower() for scene in scenes for word in scene.caption.split()}
    assert len([word for word in words if word.isalpha()]) < 1000


def test_articles_agree(scenes: list[Scene]) -> None:
    said = " ".join(scene.caption.lower() for scene in scenes)
    assert " a orange" not in said
    assert " an red" not in said


def test_the_true_caption_scores_perfectly(scenes: list[Scene]) -> None:
    for scene in chain(scenes, Scenes("train", seed=11, size=200, kinds=KINDS)):
        result = score(scene.facts, scene.caption)
        groups = sum(fact["type"] == "group" for fact in scene.facts)
        assert result["shapes"] == result["colours"] == result["counts"] == result["places"] == groups, scene.caption
        assert result["groups"] == groups, scene.caption
        assert result["values_right"] == result["values"], scene.caption
        assert result["edits"] == 0, scene.caption


def test_groups_are_told_in_reading_order() -> None:
    order = ["everywhere", "top left", "top right", "top", "left", "centre", "right", "bottom left", "bottom right"]
    order.append("bottom")
    for scene in Scenes("test", size=60, kinds=["shapes"]):
        places = [group["place"] for group in read_groups(scene.caption)]
        assert places == [fact["place"] for fact in scene.facts] == sorted(places, key=order.index)


def test_another_caption_does_not(scenes: list[Scene]) -> None:
    swapped = summary(score(a.facts, b.caption) for a, b in pairwise(scenes))
    assert swapped["character_error_rate"] > 0.8
    assert max(swapped[name] for name in ("shapes", "colours", "counts", "places", "values")) < 0.3


def test_totals_add_up() -> None:
    for scene in Scenes("validation", size=40, kinds=["receipts"]):
        *prices, total = [fact["value"] for fact in scene.facts if fact["type"] == "value"]
        assert round(sum(prices), 2) == total


def count_blobs(mask: np.ndarray) -> int:
    """Connected patches of a mask that are at least 3 pixels thick somewhere: a smooth edge is none."""
    solid = {tuple(p) for p in np.argwhere(np.asarray(Image.fromarray(mask).filter(ImageFilter.MinFilter(3))))}
    todo = {tuple(p) for p in np.argwhere(mask)}
    blobs = 0
    while todo:
        edge = [todo.pop()]
        thick = False
        while edge:
            y, x = edge.pop()
            thick |= (y, x) in solid
            near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & todo
            todo -= near
            edge += near
        blobs += thick
    return blobs


def test_shapes_are_as_many_and_of_the_colour_that_is_said() -> None:
    for scene in Scenes("validation", size=30, kinds=["shapes"]):
        pixels = np.asarray(scene.image.filter(ImageFilter.MedianFilter(3)), dtype=np.int32)
        grounds = [pixels[y, x] for y in (1, -2) for x in (1, -2)]
        names = sorted({fact["colour"] for fact in scene.facts})
        palette = np.array([*(COLOURS[name] for name in names), *grounds])
        nearest = ((pixels[:, :, None] - palette) ** 2).sum(-1).argmin(-1)
        for k, name in enumerate(names):
            said = sum(fact["count"] for fact in scene.facts if fact["colour"] == name)
            assert count_blobs((nearest == k).astype(np.uint8) * 255) == said, scene.caption


def test_groups_are_read_in_any_order_and_spelling() -> None:
    caption = (
        "In the center there are 3 small blue stars; one red ring is drawn at the top left. "
        'A sign says "two red hearts". '
        "Two crosses can be seen. The red ring is above the blue stars."
    )
    assert [(g["count"], g["colour"], g["shape"], g["place"]) for g in read_groups(caption)] == [
        (3, "blue", "star", "centre"),
        (1, "red", "ring", "top left"),
        (2, None, "cross", None),
    ]


FACTS = (
    {"type": "group", "shape": "circle", "colour": "red", "count": 3, "place": "left"},
    {"type": "group", "shape": "star", "colour": "blue", "count": 1, "place": "right"},
)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [  # groups, shapes, colours, counts, places
        ("One blue star is on the right, and on the left are three red circles.", (2, 2, 2, 2, 2)),
        ("Two red circles are on the left. One blue star is on the right.", (2, 2, 2, 1, 2)),
        ("Three red circles are on the right.", (2, 1, 1, 1, 0)),
        ("Three red squares are on the left. One pink star is at the top.", (2, 1, 1, 2, 1)),
        ("Three red circles. One blue star. Four green rings. Five green rings.", (4, 2, 2, 2, 0)),
        ("", (2, 0, 0, 0, 0)),
    ],
)
def test_groups_are_scored_part_by_part(caption: str, expected: tuple[int, ...]) -> None:
    result = score(FACTS, caption)
    assert tuple(result[name] for name in ("groups", "shapes", "colours", "counts", "places")) == expected


def test_texts_and_values_are_read() -> None:
    caption = (
        'It has the title "sales". The values are "2019" 12, "2020" is 7 and "tea" at 3.5. It ends with "milk 1.20'
    )
    assert read_texts(caption) == ["sales", "2019", "2020", "tea", "milk 1.20"]
    assert read_values(caption) == {"2019": 12, "2020": 7, "tea": 3.5, "milk": 1.2}
    facts = [
        {"type": "text", "text": "sales"},
        {"type": "value", "label": "2019", "value": 12.0},
        {"type": "value", "label": "2020", "value": 8.0},
    ]
    result = score(facts, 'Titled "sale". "2019" 12, "2020" 7.')
    assert (result["values"], result["values_right"], result["characters"]) == (2, 1, 5)
    assert result["edits"] == edit_distance("sale 2019 2020", "sales")


@pytest.mark.parametrize(("a", "b", "edits"), [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("ab", "ba", 2)])
def test_edit_distance(a: str, b: str, edits: int) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == edits


PIECES = st.sampled_from(
    [*COLOURS, "three", "one", "12", "circles", "star", "on the left", '"', "tea", ".", ", while ", "7.50", "\n"]
)


@given(st.one_of(st.text(max_size=80), st.lists(PIECES, max_size=40).map(" ".join)))
def test_any_caption_can_be_scored(caption: str) -> None:
    facts = [*FACTS, {"type": "text", "text": "tea 7.50"}, {"type": "value", "label": "tea", "value": 7.5}]
    result = score(facts, caption)
    for name in ("shapes", "colours", "counts", "places"):
        assert 0 <= result[name] <= 2 <= result["groups"]
    assert result["values_right"] <= result["values"]
    assert result["edits"] <= max(result["characters"], len(result["text"]))


def test_summary_adds_up_before_it_divides() -> None:
    nothing = summary([])
    assert set(nothing.values()) == {None}
    text = [{"type": "text", "text": "abcdefgh"}]
    both = summary([score(FACTS, "Three red circles are on the left."), score(text, '"abcdefxx"')])
    assert both == {
        "shapes": 0.5,
        "colours": 0.5,
        "counts": 0.5,
        "places": 0.5,
        "values": None,
        "character_error_rate": 0.25,
    }


def test_dice_are_fair_enough() -> None:
    dice = Dice(7, 0, 0)
    throws = [dice.between(1, 6) for _ in range(6000)]
    assert np.bincount(throws, minlength=7)[1:].min() > 850
    assert sorted(dice.shuffled(range(9))) == list(range(9))
    noise = dice.noise(50, 30, 8)
    assert noise.shape == (50, 30, 1)
    assert abs(noise.mean()) < 1
    assert -8 <= noise.min() <= -6
    assert 6 <= noise.max() <= 8


@pytest.fixture(scope="module")
def few() -> Scenes:
    return Scenes("validation", seed=5, size=7)


def same_record(record: dict, scene: Scene) -> bool:
    ours = {"caption": scene.caption, "kind": scene.kind, "layout": scene.layout, "facts": list(scene.facts)}
    return {key: record[key] for key in ours} == ours


@pytest.mark.parametrize(
    ("format", "list_name", "field"),
    [("imagefolder", "metadata.jsonl", "file_name"), ("jsonl", "data.jsonl", "image")],
)
def test_folders_hold_every_scene(tmp_path: Path, few: Scenes, format: str, list_name: str, field: str) -> None:
    folder = tmp_path / "new" / "scenes"
    write(few, folder, format, "png")
    records = [json.loads(line) for line in (folder / list_name).read_text().splitlines()]
    assert len(records) == 7
    for record, scene in zip(records, few):
        assert same_record(record, scene)
        with Image.open(folder / record[field]) as image:
            assert image.tobytes() == scene.image.tobytes()
    assert [path.name for path in folder.parent.iterdir()] == ["scenes"]


def test_shards_hold_every_scene(tmp_path: Path, few: Scenes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers, "SHARD", 4)
    seen: list[tuple[int, int]] = []
    write(few, tmp_path / "a", "webdataset", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 7), (7, 7)]
    shards = sorted((tmp_path / "a").iterdir())
    assert [shard.name for shard in shards] == ["000000.tar", "000001.tar"]
    index = 0
    for shard in shards:
        with tarfile.open(shard) as tar:
            members = tar.getmembers()
            for picture, text in zip(members[::2], members[1::2]):
                assert (picture.name, text.name) == (f"{index:06d}.jpg", f"{index:06d}.json")
                assert same_record(json.load(tar.extractfile(text)), few[index])
                with Image.open(tar.extractfile(picture)) as image:
                    error = np.asarray(image, dtype=float) - np.asarray(few[index].image)
                assert np.abs(error).mean() < 6
                index += 1
    assert index == 7
    write(few, tmp_path / "b", "webdataset")
    assert all((tmp_path / "b" / shard.name).read_bytes() == shard.read_bytes() for shard in shards)


def test_any_number_of_workers_writes_the_same(tmp_path: Path, few: Scenes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers, "SHARD", 4)
    contents = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        write(few, folder, "jsonl", workers=workers)
        contents.append({p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 8


def test_what_is_there_is_not_overwritten(tmp_path: Path, few: Scenes) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(FileExistsError, match="exists and is not an empty folder; remove it or choose another"):
        write(few, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(FileExistsError):
        write(few, tmp_path / "mine.txt")
    (tmp_path / "empty").mkdir()
    write(few, tmp_path / "empty")
    assert len(list((tmp_path / "empty").iterdir())) == 8


@pytest.mark.parametrize(
    ("trouble", "raised", "message"),
    [
        (OSError(28, "No space left on device"), OSError, "No space left on device; nothing"),
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
    ],
)
@pytest.mark.parametrize("format", writers.FORMATS)
def test_a_failure_leaves_nothing(
    tmp_path: Path,
    few: Scenes,
    monkeypatch: pytest.MonkeyPatch,
    trouble: BaseException,
    raised: type[BaseException],
    message: str,
    format: str,
) -> None:
    calls = []

    def encode(image: Image.Image, encoding: str) -> bytes:
        calls.append(image)
        if len(calls) == 3:
            raise trouble
        return b"picture"

    monkeypatch.setattr(writers, "_encode", encode)
    with pytest.raises(raised, match=message):
        write(few, tmp_path / "scenes", format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [{"format": "parquet"}, {"encoding": "gif"}])
def test_unknown_formats_are_named(tmp_path: Path, few: Scenes, arguments: dict) -> None:
    with pytest.raises(SceneError, match="known: "):
        write(few, tmp_path / "scenes", **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command()(synth)
    return app


def test_the_command_writes_and_says_so(tmp_path: Path, app: typer.Typer) -> None:
    output = str(tmp_path / "scenes")
    options = ["--split", "test", "--size", "5", "--seed", "3", "--kinds", "words, banners", "--workers", "1"]
    result = CliRunner().invoke(app, ["--output", output, *options])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{output}: 5 test scenes, seed 3, imagefolder\n"
    records = [json.loads(line) for line in (tmp_path / "scenes" / "metadata.jsonl").read_text().splitlines()]
    assert {record["kind"] for record in records} <= {"words", "banners"}
    expected = Scenes("test", 3, 5, ["words", "banners"])
    assert [record["caption"] for record in records] == [scene.caption for scene in expected]


def test_the_command_refuses_an_unknown_kind(tmp_path: Path, app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["--output", str(tmp_path / "scenes"), "--kinds", "cats"])
    assert isinstance(result.exception, SceneError)
    assert not (tmp_path / "scenes").exists()


def test_drawing_needs_no_mlx() -> None:
    code = "import sys, genlip_mlx.data.writers, genlip_mlx.data.scoring; sys.exit('mlx.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
