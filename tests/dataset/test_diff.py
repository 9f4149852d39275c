"""Two versions of a dataset that real runs made: every number of their difference, and what is read to find it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from commands import cli, last_line
from conftest import crops, settings, shard_members, tar_bytes, write_shards

import pipeline
from pipeline import driver
from pipeline.dataset.diff import _differ, _num_shared, diff
from pipeline.dataset.read import Dataset
from pipeline.dataset.table import Entry
from pipeline.errors import DatasetError

TWO_NODES = {"raw": {"node": "flatten"}, "embedding": {"node": "flatten"}}
HALF = {"run__max_removed": 0.5}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> str:
    """Four versions: 60 rows; an image, a label and a shard less; another node; a shard renamed."""
    folder = tmp_path_factory.mktemp("history")
    images = crops(60)
    source, output = f"{folder}/shards/*.tar", folder / "out"
    write_shards(folder / "shards", images, 15)
    driver.run(settings(source, output))
    replaced = shard_members([*images[:3], *crops(1, seed=9), *images[4:15]], 0, "jpg")
    (folder / "shards" / "000.tar").write_bytes(tar_bytes(replaced))
    relabelled = shard_members(images[15:30], 15, "jpg") | {"00020.cls": b"7"}
    (folder / "shards" / "001.tar").write_bytes(tar_bytes(relabelled))
    (folder / "shards" / "003.tar").unlink()
    driver.run(settings(source, output, **HALF))
    driver.run(settings(source, output, backbone__nodes=TWO_NODES))
    (folder / "shards" / "002.tar").rename(folder / "shards" / "moved.tar")
    summary = driver.run(settings(source, output, backbone__nodes=TWO_NODES))
    assert summary.version == 3
    return str(output)


def test_rows_added_removed_changed_and_relabelled(output: str) -> None:
    before, after = pipeline.open_dataset(output, 0), pipeline.open_dataset(output, 1)
    found = diff(before, after)
    assert found.as_json()["rows"] == {
        "before": 60, "after": 45, "added": 0, "removed": 15, "changed": 1, "relabelled": 1, "moved": 0, "unchanged": 43,
    }  # fmt: skip
    assert found.as_json()["partitions"] == {"shared": 1, "added": 2, "removed": 3}
    assert (found.recipe, found.layout, found.nodes_added, found.nodes_removed) == ([], [], [], [])

    assert found.examples["added"] == []
    shard = next(entry.shard for entry in before.entries() if entry.shard.endswith("003.tar"))
    assert found.examples["removed"] == [{"shard": shard, "key": f"{number:05d}"} for number in range(45, 53)]

    drift = found.drift["embedding"]
    assert [(each["key"], each["cosine"]) for each in drift.farthest] == [("00003", drift.cosine_min)]
    old, new = before.to_numpy().astype(np.float64), after.to_numpy().astype(np.float64)
    shift = np.linalg.norm(new.mean(axis=0) - old.mean(axis=0))
    assert drift.mean_shift == pytest.approx(shift, rel=1e-9)
    assert drift.mean_norm_before == pytest.approx(np.linalg.norm(old, axis=1).mean(), rel=1e-9)
    assert drift.mean_norm_after == pytest.approx(np.linalg.norm(new, axis=1).mean(), rel=1e-9)
    assert drift.relative_mean_shift == pytest.approx(shift / np.linalg.norm(old, axis=1).mean(), rel=1e-9)
    cosine = old[3] @ new[3] / np.linalg.norm(old[3]) / np.linalg.norm(new[3])
    assert drift.num_compared == 1
    assert [drift.cosine_mean, drift.cosine_median, drift.cosine_min] == pytest.approx([cosine] * 3, rel=1e-6)
    assert cosine < 0.9999, "another picture has another embedding"


def test_the_other_way_round(output: str) -> None:
    found = diff(pipeline.open_dataset(output, 1), pipeline.open_dataset(output, 0), drift=False)
    rows = found.as_json()["rows"]
    assert rows == {
        "before": 45, "after": 60, "added": 15, "removed": 0, "changed": 1, "relabelled": 1, "moved": 0, "unchanged": 43,
    }  # fmt: skip
    assert found.drift == {}


def test_a_version_does_not_differ_from_itself(output: str) -> None:
    found = diff(pipeline.open_dataset(output, 1), pipeline.open_dataset(output, 1))
    assert (found.num_unchanged, found.num_partitions_shared, found.num_partitions_added) == (45, 3, 0)
    drift = found.drift["embedding"]
    assert (drift.mean_shift, drift.relative_mean_shift, drift.num_compared, drift.cosine_min) == (0.0, 0.0, 0, None)
    assert drift.mean_norm_before == drift.mean_norm_after


def test_another_recipe_compares_every_row(output: str) -> None:
    found = diff(pipeline.open_dataset(output, 1), pipeline.open_dataset(output, 2))
    assert (found.num_unchanged, found.num_partitions_shared, found.num_partitions_added) == (45, 0, 3)
    assert (found.nodes_added, found.nodes_removed) == (["raw"], [])
    assert len(found.recipe) == 1
    assert found.recipe[0].startswith("nodes.raw: none -> ")
    assert list(found.drift) == ["embedding"]
    drift = found.drift["embedding"]
    assert drift.num_compared == 45
    assert drift.cosine_min == pytest.approx(1, abs=1e-6)
    assert drift.relative_mean_shift == pytest.approx(0, abs=1e-6)


def test_rows_of_a_renamed_shard_are_moved(output: str) -> None:
    found = diff(pipeline.open_dataset(output, 2), pipeline.open_dataset(output, 3))
    assert (found.num_added, found.num_removed, found.num_moved, found.num_unchanged) == (15, 15, 15, 30)
    drift = found.drift["raw"]
    assert drift.mean_shift == pytest.approx(0, abs=1e-9)
    assert (drift.num_compared, drift.cosine_mean) == (0, None)


def test_only_partitions_that_differ_are_read_for_rows_and_each_once_for_drift(
    output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = pipeline.open_dataset(output, 0), pipeline.open_dataset(output, 1)
    old, new = {entry.path for entry in before.entries()}, {entry.path for entry in after.entries()}
    seen: list[str] = []
    read = Dataset.read

    def recording(self: Dataset, entry: Entry, columns: Any) -> pa.Table:
        seen.append(entry.path)
        return read(self, entry, columns)

    monkeypatch.setattr(Dataset, "read", recording)
    diff(before, after, drift=False)
    assert sorted(seen) == sorted(old ^ new)
    seen.clear()
    diff(before, after)
    assert sorted(seen) == sorted(old | new)


def test_cli(output: str) -> None:
    report = last_line(cli("diff", output, "0", "1", "--json"))
    assert (report["before"], report["after"], report["rows"]["changed"]) == (0, 1, 1)
    drift = diff(pipeline.open_dataset(output, 0), pipeline.open_dataset(output, 1)).drift["embedding"]
    assert report["drift"]["embedding"]["mean_shift"] == drift.mean_shift

    spoken = cli("diff", output, "1", "2")
    assert spoken.returncode == 0, spoken.stderr
    for part in ("45 to 45", "45 unchanged", "nodes.raw: none ->", "raw added", "cosine of 45 rows"):
        assert part in spoken.stdout
    assert last_line(cli("diff", output, "1", "2", "--rows-only", "--json"))["drift"] == {}

    for versions in (("0", "99"), ("--", "-1", "1")):
        wrong = cli("diff", output, "--json", *versions)
        assert wrong.returncode == 2
        assert "there is no version" in last_line(wrong)["error"]


def test_status_tells_the_history(output: str) -> None:
    history = last_line(cli("status", output, "--json"))["history"]
    assert [(each["version"], each["rows"], each["added"], each["removed"]) for each in history] == [
        (3, 45, 1, 1), (2, 45, 3, 3), (1, 45, 2, 3), (0, 60, 4, 0),
    ]  # fmt: skip
    runs = {path.name for path in Path(output, "_runs").iterdir()}
    assert {each["run_id"] for each in history} == runs
    assert all(each["when"].endswith("+00:00") for each in history)
    assert "45 rows, 2 partitions added, 3 removed" in cli("status", output).stdout


def test_a_version_that_does_not_exist(output: str) -> None:
    for version in (-1, 4):
        with pytest.raises(DatasetError, match=f"there is no version {version}"):
            pipeline.open_dataset(output, version)


def test_values_that_differ() -> None:
    def column(*values: Any) -> pa.ChunkedArray:
        return pa.chunked_array([pa.array(values)])

    nan = float("nan")
    assert _differ(column(1.0, nan, None, nan, 2.0), column(1.0, nan, None, None, 3.0)).tolist() == [
        False, False, False, True, True,
    ]  # fmt: skip
    assert _differ(column([1], [2]), column([1], [3])).tolist() == [False, True]
    assert _differ(column(1, 2), column("1", "2")).tolist() == [True, True], "another type is another value"


def test_copies_move_as_often_as_they_can_be_paired() -> None:
    added, removed = np.array(["a", "a", "a", "b"], "S32"), np.array(["a", "a", "c"], "S32")
    assert _num_shared([added], [removed]) == 2
    assert _num_shared([], [removed]) == 0
