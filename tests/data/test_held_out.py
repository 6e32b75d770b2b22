"""Records set aside, and validation data that is found beside a data set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from genlip_mlx.data.held_out import find_splits, set_aside
from genlip_mlx.data.sources import SourceError, open_source


def names(source: object) -> list[str]:
    return [source[i].name for i in range(len(source))]  # type: ignore[index, arg-type]


def test_set_aside_is_a_partition_that_the_seed_alone_draws() -> None:
    source = open_source("synth:train:50")
    rest, held_out = set_aside(source, 0.1, 7)
    assert (len(rest), len(held_out)) == (45, 5)
    assert sorted(names(rest) + names(held_out)) == sorted(names(source))
    again, other = set_aside(open_source("synth:train:50"), 0.1, 7), set_aside(source, 0.1, 8)
    assert names(again[1]) == names(held_out) != names(other[1])
    assert again[0].identity() == rest.identity() != other[0].identity()
    assert rest.identity() != held_out.identity() != source.identity()


def test_at_least_one_record_on_each_side() -> None:
    source = open_source("synth:train:2")
    assert [len(part) for part in set_aside(source, 0.01, 0)] == [1, 1]
    assert [len(part) for part in set_aside(source, 0.99, 0)] == [1, 1]
    with pytest.raises(SourceError, match=r"one record cannot be shared out; name validation data, or do without"):
        set_aside(open_source("synth:train:1"), 0.1, 0)


def lines(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"image": "x.png", "caption": "a"}) + "\n")
    return str(path)


def test_validation_that_is_there(tmp_path: Path) -> None:
    lone = lines(tmp_path / "a" / "train.jsonl")
    assert find_splits(lone) == find_splits(str(tmp_path / "a")) == (lone, None)
    beside = lines(tmp_path / "a" / "val.jsonl")
    assert find_splits(lone) == find_splits(str(tmp_path / "a")) == (lone, beside)
    named = lines(tmp_path / "a" / "cats-train-v2.jsonl")
    other = lines(tmp_path / "a" / "cats-dev-v2.jsonl")
    assert find_splits(named) == (named, other)
    cats = lines(tmp_path / "b" / "cats.jsonl")
    assert find_splits(cats) == (cats, None)
    folder = str(tmp_path / "c")
    lines(tmp_path / "c" / "train" / "metadata.jsonl")
    assert find_splits(folder) == (folder, None)
    lines(tmp_path / "c" / "validation" / "metadata.jsonl")
    assert find_splits(folder) == (folder, folder)
    for data in ("synth:train:9", "stream:shards-*.tar", "shard-{0..3}.tar", "part-*.parquet", "nothing.jsonl"):
        assert find_splits(data) == (data, None)
