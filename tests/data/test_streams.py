"""Streams: every record once an epoch, exact resume in the middle of a shard, and few shards on disk."""

from __future__ import annotations

import json
import pickle
import shutil
import threading
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from genlip_mlx.data import streams
from genlip_mlx.data.pipeline import DataError, Pipeline, survey
from genlip_mlx.data.records import RecordError
from genlip_mlx.data.sources import Source, SourceError, open_source
from genlip_mlx.processing import ImageProcessor, Processor, load_tokenizer

from .test_pipeline import assert_same, packs_of, picture
from .test_sources import write_tar

SHARDS, EACH = 7, 9


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets
    import huggingface_hub

    home = tmp_path_factory.mktemp("home")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(home))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    return home


@pytest.fixture(scope="module")
def processor(golden_dir: Path) -> Processor:
    return Processor(ImageProcessor(native=True, min_pixels=256), load_tokenizer(golden_dir / "tiny-224"))


def caption(shard: int, place: int) -> str:
    return f"Picture {place} of shard {shard}."


def as_tars(folder: Path, each: int = EACH) -> str:
    for shard in range(SHARDS):
        members = []
        for place in range(each):
            members.append((f"{place}.png", picture(shard * each + place)))
            members.append((f"{place}.json", json.dumps({"caption": caption(shard, place)}).encode()))
        write_tar(folder / f"train-{shard:03d}.tar", members)
    return f"stream:{folder}/train-{{000..{SHARDS - 1:03d}}}.tar"


def as_parquet(folder: Path) -> str:
    from datasets import Dataset

    for shard in range(SHARDS):
        rows = {
            "image": [picture(shard * EACH + place) for place in range(EACH)],
            "caption": [caption(shard, place) for place in range(EACH)],
        }
        Dataset.from_dict(rows).to_parquet(folder / f"train-{shard:03d}.parquet")
    return f"stream:{folder}"  # as the datasets library lists it


def captions(source: Source, *order: Any, **more: Any) -> list[str]:
    return [source[record].caption for _, record in source.places(*order, **more)]


@pytest.mark.parametrize("layout", [as_tars, as_parquet])
def test_every_record_once_an_epoch_shard_by_shard(layout: Any, tmp_path: Path) -> None:
    source = open_source(layout(tmp_path))
    everything = [caption(shard, place) for shard in range(SHARDS) for place in range(EACH)]
    assert captions(source, 0, None) == everything
    orders = [captions(source, epoch, seed) for epoch, seed in ((0, 3), (1, 3), (0, 4), (0, 3))]
    assert all(sorted(order) == sorted(everything) for order in orders)
    assert orders[0] == orders[3]
    assert len({tuple(order) for order in orders}) == 3
    for order in orders:
        shards = [text.split()[-1] for text in order]
        assert len({*shards}) == len([1 for a, b in zip([None, *shards], shards) if a != b]) == SHARDS
        assert shards[::EACH] != sorted(shards[::EACH])
        places = [[text.split()[1] for text in order[k : k + EACH]] for k in range(0, len(order), EACH)]
        assert len({*map(tuple, places)}) > 1  # each shard has an order of its own
    assert source.count() == SHARDS * EACH
    assert not source.exact


def test_the_order_never_changes(tmp_path: Path) -> None:
    # A checkpoint of one release must go on in the next: this list is part of the format.
    places = [*open_source(as_tars(tmp_path, each=3)).places(0, 7)]
    assert [(p >> 32, p % 2**32) for p, _ in places[:7]] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]
    assert [(r >> 32, r % 2**32) for _, r in places[:7]] == [(4, 2), (4, 0), (4, 1), (1, 1), (1, 0), (1, 2), (6, 2)]


def test_a_position_is_found_again(tmp_path: Path) -> None:
    data = as_tars(tmp_path)
    places = [*open_source(data).places(2, 5)]
    for start in (0, 4, EACH - 1, EACH, 3 * EACH + 2, SHARDS * EACH - 1):
        assert [*open_source(data).places(2, 5, start=places[start][0])] == places[start:]
        assert [*open_source(data).places(2, 5, start=places[start][0] + 1)] == places[start + 1 :]
    before = [places[k][0] for k in (2, 5, EACH, 2 * EACH + 1)]
    start = places[2 * EACH + 3][0]
    expected = [places[k] for k in (2, 5, EACH, 2 * EACH + 1)] + places[2 * EACH + 3 :]
    assert [*open_source(data).places(2, 5, start, before)] == expected


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_resume_in_the_middle_of_a_shard(workers: int, tmp_path: Path, processor: Processor) -> None:
    data = as_tars(tmp_path)
    alone = packs_of(open_source(data), processor, epochs=2)
    with Pipeline(open_source(data), processor, budget=150, lookahead=6, workers=workers, epochs=2) as pipeline:
        first = list(islice(pipeline, 5))
        state = json.loads(json.dumps(pipeline.state()))
    assert state["waiting"]
    assert_same(first, alone[:5])
    assert_same(packs_of(open_source(data), processor, epochs=2, start=state, workers=workers), alone[5:])


def test_damage_is_counted_where_it_is(tmp_path: Path, processor: Processor) -> None:
    data = as_tars(tmp_path)
    whole = (tmp_path / "train-003.tar").read_bytes()
    (tmp_path / "train-003.tar").write_bytes(whole[: len(whole) // 2])
    said: list[str] = []
    with Pipeline(open_source(data), processor, budget=150, workers=0, epochs=1, log=said.append) as pipeline:
        samples = sum(len(pack.records) for pack in pipeline)
        assert pipeline.stats.skipped == {"corrupt tar": 1}
    assert (SHARDS - 1) * EACH < samples < SHARDS * EACH
    assert "train-003.tar: is cut off inside" in said[0]


def test_a_damaged_parquet_file_is_one_bad_record(tmp_path: Path) -> None:
    data = as_parquet(tmp_path)
    (tmp_path / "train-003.parquet").write_bytes(b"PAR1 and no more")
    source = open_source(data)
    found, unusable = [], []
    for _, record in source.places(0, 1):
        try:
            found.append(source[record].caption)
        except RecordError as error:
            unusable.append((error.reason, "train-003.parquet: not a readable parquet file" in error.message))
    assert len(found) == (SHARDS - 1) * EACH
    assert unusable == [("bad shard", True)]


def test_workers_get_a_copy(tmp_path: Path) -> None:
    source = open_source(as_parquet(tmp_path))
    copy = pickle.loads(pickle.dumps(source))
    places = [*source.places(0, 1)]
    assert [copy[record] for _, record in places] == [source[record] for _, record in places]
    assert copy.identity() == source.identity()


def test_changed_shards_are_noticed(tmp_path: Path, processor: Processor) -> None:
    data = as_tars(tmp_path)
    state = Pipeline(open_source(data), processor).state()
    (tmp_path / "train-006.tar").unlink()
    shrunk = data.replace("006", "005")
    with pytest.raises(DataError, match=r"has changed since this state was saved \(other names or sizes\)"):
        Pipeline(open_source(shrunk), processor, start=state)


def test_a_survey_of_a_stream(tmp_path: Path, processor: Processor) -> None:
    found = survey(open_source(as_tars(tmp_path)), processor, samples=20, budget=300)
    assert (found.looked_at, found.usable, found.records) == (20, 20, SHARDS * EACH)


# --- The hub ---


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub with one data set; the files that were asked for."""
    import datasets
    import huggingface_hub

    there = tmp_path / "there"
    (there / "data").mkdir(parents=True)
    as_tars(there / "data")
    asked = []

    def builder(repo: str, config: str | None) -> SimpleNamespace:
        files = [f"hf://datasets/{repo}@abc123/data/{path.name}" for path in sorted((there / "data").iterdir())]
        return SimpleNamespace(config=SimpleNamespace(data_files={"train": files}))

    def download(repo: str, file: str, *, repo_type: str, revision: str, local_dir: Path) -> str:
        assert (repo, repo_type, revision) == ("some/one", "dataset", "abc123")
        target = local_dir / file
        if not target.exists():
            asked.append(Path(file).name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(there / file, target)
        return str(target)

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(streams, "_PAUSES", (0, 0))
    return asked


def finish_downloads() -> None:
    for thread in threading.enumerate():
        if thread.name == "download":
            thread.join()


def test_shards_of_the_hub_come_and_go(hub: list[str], own_home: Path, tmp_path: Path) -> None:
    source = open_source("stream:some/one")
    assert hub == ["train-000.tar"]
    seen, most = [], 0
    for _, record in source.places(0, 3):
        finish_downloads()
        seen.append(source[record].caption)
        most = max(most, len([*own_home.rglob("*.tar")]))
    assert sorted(seen) == sorted(captions(open_source(f"stream:{tmp_path}/there/data/*.tar"), 0, None))
    assert most == streams._KEPT + 1
    assert len(hub) <= SHARDS + 1  # the first one perhaps twice
    # One that has gone comes again.
    places = [*source.places(0, 3)]
    assert [source[record].caption for _, record in places] == seen
    del source
    assert not [*own_home.rglob("*.tar")]


def test_a_shard_ahead(hub: list[str]) -> None:
    places = open_source("stream:some/one").places(0, None)
    next(places)
    finish_downloads()
    assert hub == ["train-000.tar", "train-001.tar"]


def test_a_copy_fetches_what_has_been_deleted(hub: list[str], own_home: Path) -> None:
    source = open_source("stream:some/one")
    copy = pickle.loads(pickle.dumps(source))
    before = copy[0].caption
    for folder in own_home.glob("genlip-stream-*/0"):
        shutil.rmtree(folder)
    assert copy[0].caption == before
    assert hub.count("train-000.tar") == 2


def test_a_download_that_fails(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    source = open_source("stream:some/one")
    real, failures = huggingface_hub.hf_hub_download, [ConnectionError("no route")]

    def download(*words: Any, **more: Any) -> str:
        if failures:
            raise failures.pop()
        return real(*words, **more)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert source[streams._TURN].caption == caption(1, 0)  # at the second attempt
    failures += [ConnectionError("no route\nat all")] * 2
    with pytest.raises(SourceError) as caught:
        source[2 * streams._TURN]
    assert str(caught.value) == "stream:some/one: data/train-002.tar cannot be downloaded (no route)"


# --- What cannot be streamed ---


def test_what_is_refused(tmp_path: Path, hub: list[str]) -> None:
    data = as_tars(tmp_path)
    with pytest.raises(SourceError, match=r"a stream cannot be used here; leave out stream: to have the data whole"):
        len(open_source(data))
    with pytest.raises(SourceError, match=r"stream:some/one: no split validation; there are train"):
        open_source("stream:some/one", split="validation")
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(SourceError, match=r"only tars or parquet files can be streamed, not \.jsonl"):
        open_source(f"stream:{tmp_path}/a.jsonl")
    with pytest.raises(SourceError, match=r"1 of 8 files are missing, the first is .*train-007\.tar"):
        open_source(data.replace("006", "007"))


def test_columns_are_checked_at_once(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no column 'alt'; there are image, caption"):
        open_source(as_parquet(tmp_path), caption_column="alt")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"stream:.*nothing: no such file or folder here"):
        open_source(f"stream:{tmp_path}/nothing")
