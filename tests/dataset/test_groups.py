"""Row groups one after the other: their order, how many are read ahead, what of them is read, and damaged ones."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from bucket import Bucket
from datasets import write_dataset
from s3 import S3Server

from pipeline.config import Storage
from pipeline.dataset import groups
from pipeline.dataset.groups import Groups, RowGroup
from pipeline.dataset.partition import list_values
from pipeline.dataset.read import Dataset
from pipeline.errors import StorageError, StorageRefused
from pipeline.storage import Store

ROWS_ND = np.random.default_rng(0).standard_normal((1000, 64)).astype(np.float32)


def opened(folder: Path) -> Dataset:
    """A partition of ten row groups, a partition without rows, and small ones."""
    return write_dataset(folder, ROWS_ND, rows_per_shard=[500, 0, 30, 470], rows_per_group=50)


def test_all_rows_in_their_order(tmp_path: Path) -> None:
    dataset = opened(tmp_path)
    found = list(Groups(dataset.table_).map(lambda group: (group.start, group.num_rows, group.embeddings("embedding"))))
    assert [num_rows for _, num_rows, _ in found] == [50] * 10 + [30] + [50] * 9 + [20]
    assert [start for start, _, _ in found] == np.cumsum([0, *(num_rows for _, num_rows, _ in found[:-1])]).tolist()
    assert np.array_equal(np.concatenate([values_ND for _, _, values_ND in found]), ROWS_ND)


def test_no_more_row_groups_are_in_memory_than_stated(tmp_path: Path) -> None:
    lock, begun = threading.Lock(), 0

    def begin(group: RowGroup) -> None:
        nonlocal begun
        with lock:
            begun += 1

    results = Groups(opened(tmp_path).table_).map(begin)
    for taken, _ in enumerate(results, 1):
        time.sleep(0.005)
        assert begun < taken + groups.GROUPS_AHEAD
    assert begun == taken == 21


def test_who_leaves_early_reads_no_more(tmp_path: Path) -> None:
    begun = []
    results = Groups(opened(tmp_path).table_).map(lambda group: begun.append(group.number))
    next(results)
    results.close()
    assert len(begun) <= groups.GROUPS_AHEAD
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("row-groups")]


def test_statistics_rule_row_groups_out(tmp_path: Path) -> None:
    found = Groups(opened(tmp_path).table_).map(lambda group: group.may_hold("key", ["00120", "00999", "0012"]))
    assert [number for number, may_hold in enumerate(found) if may_hold] == [2, 20]


def test_a_remote_row_group_is_read_a_column_at_a_time(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = Bucket(s3)
    storage = Storage(**bucket.storage)
    dataset = write_dataset(bucket.output, ROWS_ND, rows_per_shard=500, rows_per_group=250, storage=storage)
    asked: list[tuple[int, int]] = []
    read_range = Store.read_range

    def recording(self: Store, url: str, start: int, num_bytes: int) -> bytes:
        asked.append((start, num_bytes))
        return read_range(self, url, start, num_bytes)

    monkeypatch.setattr(Store, "read_range", recording)
    assert np.array_equal(dataset.to_numpy(), ROWS_ND)
    footers = [num_bytes for _, num_bytes in asked if num_bytes == 64 << 10]
    columns = [num_bytes for _, num_bytes in asked if num_bytes != 64 << 10]
    assert len(footers) == 2, "one read of the end of each file"
    assert len(columns) == 4, "one read for each row group"
    assert all(250 * 64 * 4 < num_bytes < 250 * 64 * 4 * 1.02 for num_bytes in columns)
    asked.clear()
    assert dataset.table(["key", "shard"]).num_rows == 1000
    assert sum(num_bytes for _, num_bytes in asked) < 2 * (64 << 10) + 20_000


def test_a_damaged_partition_is_named(tmp_path: Path) -> None:
    dataset = opened(tmp_path)
    path = Path(dataset.files()[0].removeprefix("file://"))
    whole = path.read_bytes()
    for damaged in (b"", b"PAR1", whole[:-1000], bytes(1000) + whole[-1000:], whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(StorageError, match=rf"{path.name}: not a readable partition: "):
            dataset.to_numpy()
    path.write_bytes(Path(dataset.files()[3].removeprefix("file://")).read_bytes())
    with pytest.raises(StorageError, match=rf"{path.name}: has 470 rows, and 500 in the log"):
        dataset.table(["key"])
    path.unlink()
    with pytest.raises(StorageRefused, match=rf"{path.name}: there is no such file"):
        dataset.keys()


def test_embeddings_are_not_copied_once_they_are_decoded(tmp_path: Path) -> None:
    (group, *_) = Groups(opened(tmp_path).table_).map(lambda group: group)
    table = group.read(["embedding"])
    assert np.shares_memory(list_values(table.column("embedding")), table.column("embedding").chunk(0).values.to_numpy())
