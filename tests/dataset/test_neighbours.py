"""The rows of a dataset that are nearest to vectors: which they are, what comes with them, and what is read for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
from datasets import write_dataset

from pipeline.dataset.groups import RowGroup
from pipeline.dataset.read import Dataset
from pipeline.dataset.topk import TopK, nearest_rows
from pipeline.errors import ConfigError, DatasetError

RANDOM = np.random.default_rng(0)
ROWS_ND = RANDOM.standard_normal((1000, 48)).astype(np.float32)
ROWS_ND[500] = ROWS_ND[20]
ROWS_ND[7, 3] = np.nan
QUERIES_QD = np.concatenate([ROWS_ND[[20, 999]], RANDOM.standard_normal((3, 48)).astype(np.float32)])
LABELS = [None if row % 10 == 0 else row % 7 for row in range(1000)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    author = [f"author {row // 300}" for row in range(1000)]
    return write_dataset(
        tmp_path_factory.mktemp("search"),
        {"embedding": ROWS_ND, "other": -ROWS_ND[:, :5].copy()},
        LABELS,
        columns={"author": author},
        rows_per_shard=[400, 0, 50, 550],
        rows_per_group=64,
    )


@pytest.mark.parametrize("metric", ["cosine", "inner"])
def test_the_nearest_rows_are_those_of_the_array(dataset: Dataset, metric: str) -> None:
    scores, rows = nearest_rows(ROWS_ND, QUERIES_QD, 6, metric)
    found = dataset.search(QUERIES_QD, 6, metric=metric)
    assert [each.positions.tolist() for each in found] == rows.tolist()
    assert [each.scores.tolist() for each in found] == scores.tolist()
    if metric == "cosine":
        assert found[0].positions[:2].tolist() == [20, 500], "equal rows, in their order"
    table = dataset.table(dataset.columns)
    for each in found:
        assert each.rows.equals(table.take(each.positions))
        assert each.rows.schema.names == [
            "key", "label", "author", "shard", "index", "url", "offset", "nbytes", "content_hash", "width", "height",
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("run_rows", "runs"),
    [
        (1, [*[64] * 6, 16, 50, *[64] * 8, 38]),
        (100, [*[64] * 5, 80, 50, *[64] * 8, 38]),
        (500, [450, 448, 102]),
        (1000, [1000]),
    ],
)
def test_however_many_row_groups_a_thread_takes_at_a_time(
    dataset: Dataset, run_rows: int, runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    monkeypatch.setattr("pipeline.dataset.read.FEW_ARRAY_BYTES", run_rows * 48 * 4)
    taken: list[int] = []
    candidates = TopK.candidates
    monkeypatch.setattr(
        TopK, "candidates", lambda self, rows, *other: taken.append(len(rows)) or candidates(self, rows, *other)
    )
    scores, rows = nearest_rows(ROWS_ND, QUERIES_QD, 6)
    from_memory = len(taken)
    found = dataset.search(QUERIES_QD, 6)
    assert [each.positions.tolist() for each in found] == rows.tolist()
    assert [each.scores.tolist() for each in found] == scores.tolist()
    assert taken[from_memory:] == runs


def test_columns_that_nobody_wants_are_not_read(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = dataset.search(QUERIES_QD, 6)
    for each, whole in zip(dataset.search(QUERIES_QD, 6, columns=["author", "key"]), wanted, strict=True):
        assert each.rows.equals(whole.rows.select(["author", "key"]))
    read: list[int] = []
    monkeypatch.setattr(RowGroup, "read", lambda self, columns: read.append(self.start))
    for each, whole in zip(dataset.search(QUERIES_QD, 6, columns=()), wanted, strict=True):
        assert np.array_equal(each.positions, whole.positions)
        assert np.array_equal(each.scores, whole.scores)
        assert each.rows.num_columns == 0
    with pytest.raises(DatasetError, match="no column 'autor'; did you mean author"):
        dataset.search(QUERIES_QD, columns=["autor"])
    assert not read


def test_one_of_several_columns(dataset: Dataset) -> None:
    wanted = nearest_rows(-ROWS_ND[:, :5], QUERIES_QD[:, :5], 4)[1]
    found = dataset.search(QUERIES_QD[:, :5], 4, node="other")
    assert [each.positions.tolist() for each in found] == wanted.tolist()
    with pytest.raises(DatasetError, match="no embedding column 'x'; it has embedding, other"):
        dataset.search(QUERIES_QD, node="x")
    with pytest.raises(ConfigError, match=r"shape \(5, 48\) does not fit; allowed: \(number of queries, 5\)"):
        dataset.search(QUERIES_QD, node="other")


@pytest.mark.parametrize(
    ("where", "meant"),
    [
        (pc.field("label") == 3, [label == 3 for label in LABELS]),
        (pc.field("label") != 3, [label not in (3, None) for label in LABELS]),
        (pc.field("label").is_null(), [label is None for label in LABELS]),
        (
            (pc.field("label") == 3) & (pc.field("author") == "author 1"),
            [LABELS[r] == 3 and r // 300 == 1 for r in range(1000)],
        ),
        (pc.field("index") < 0, [False] * 1000),
    ],
)
def test_only_rows_that_are_meant_are_found(dataset: Dataset, where: pc.Expression, meant: list[bool]) -> None:
    left_ND = np.where(np.array(meant)[:, None], ROWS_ND, np.nan)
    _, rows = nearest_rows(left_ND, QUERIES_QD, 5)
    found = dataset.search(QUERIES_QD, 5, where=where)
    assert [each.positions.tolist() for each in found] == [[row for row in of_query if row >= 0] for of_query in rows.tolist()]


def test_embeddings_of_row_groups_without_a_row_that_is_meant_are_not_read(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    values = RowGroup.values
    monkeypatch.setattr(RowGroup, "values", lambda self, *others: read.append(self.start) or values(self, *others))
    dataset.search(QUERIES_QD, 5, where=pc.field("author") == "author 3")
    assert sorted(read) == [898, 962]


def test_fewer_rows_than_asked_for(dataset: Dataset, tmp_path: Path) -> None:
    found = dataset.search(QUERIES_QD[:1], 2000)
    assert len(found[0]) == 999, "all but the row that is not finite"
    assert 7 not in found[0].positions
    empty = write_dataset(tmp_path, ROWS_ND[:0], rows_per_shard=[0])
    assert [len(each) for each in empty.search(QUERIES_QD, 3)] == [0] * 5
    assert dataset.search(np.empty((0, 48)), 3) == []


def test_rounded_embeddings_are_searched_as_they_are_stored(tmp_path: Path) -> None:
    rounded_ND = ROWS_ND.astype(np.float16).astype(np.float32)
    dataset = write_dataset(tmp_path, rounded_ND, precision="float16", rows_per_group=100)
    scores, rows = nearest_rows(rounded_ND, QUERIES_QD, 4)
    found = dataset.search(QUERIES_QD, 4)
    assert [each.positions.tolist() for each in found] == rows.tolist()
    assert [each.scores.tolist() for each in found] == scores.tolist()


def test_a_filter_that_cannot_be_evaluated(dataset: Dataset) -> None:
    with pytest.raises(DatasetError, match=r"where: \(embedding == 3\): .*columns are key \(string\), label"):
        dataset.search(QUERIES_QD, where=pc.field("embedding") == 3)
