"""Queries of all kinds, and their answers."""

from __future__ import annotations

import datetime
import io
import json
from typing import Any

import numpy as np
import pytest
from datasets import write_dataset

from pipeline.analysis.search import Query, answers, by_keys, by_vectors
from pipeline.dataset.read import Dataset
from pipeline.errors import ConfigError, DatasetError

ROWS_ND = np.random.default_rng(0).standard_normal((300, 16)).astype(np.float32)
ROWS_ND[[40, 41, 42]] = ROWS_ND[39]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    keys = [f"{row % 150:05d}" for row in range(300)]
    columns = {
        "weight": [float("nan") if row == 41 else row / 2 for row in range(300)],
        "day": [datetime.date(2026, 11, 1 + row % 28) for row in range(300)],
        "score": list(range(300)),
    }
    folder = tmp_path_factory.mktemp("queries")
    return write_dataset(folder, ROWS_ND, list(range(300)), keys=keys, columns=columns, rows_per_shard=150)


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_a_row_is_not_its_own_neighbour(dataset: Dataset) -> None:
    shard = dataset.entries()[0].shard
    queries = by_keys(dataset, ["00041", "00007"], shard=shard)
    assert [query.name for query in queries] == ["00041", "00007"]
    assert np.array_equal(queries[0].vector_D, ROWS_ND[41])
    first, second = answers(dataset, queries, 4)
    assert first.neighbours.positions[:3].tolist() == [39, 40, 42], "its copies are"
    assert 7 not in second.neighbours.positions
    assert [len(each.neighbours) for each in (first, second)] == [4, 4]
    others = answers(dataset, by_keys(dataset, ["00041"], shard=dataset.entries()[1].shard), 300)
    assert len(others[0].neighbours) == 299
    assert 191 not in others[0].neighbours.positions


def test_a_row_that_was_filtered_out_costs_no_neighbour(dataset: Dataset) -> None:
    import pyarrow.compute as pc

    (answer,) = answers(
        dataset, by_keys(dataset, ["00041"], shard=dataset.entries()[0].shard), 2, where=pc.field("label") > 100
    )
    assert len(answer.neighbours) == 2
    assert min(row["label"] for row in answer.rows()) > 100


def test_a_key_of_several_shards_has_to_be_said(dataset: Dataset) -> None:
    with pytest.raises(DatasetError, match="2 shards have a key '00007': say which one by shard="):
        by_keys(dataset, ["00007"])


def test_vectors_are_the_rows_of_a_file(dataset: Dataset) -> None:
    for array in (ROWS_ND[:3], ROWS_ND[:3].astype(np.float64), ROWS_ND[:3].astype(np.float16)):
        queries = by_vectors("q.npy", npy(array))
        assert [query.name for query in queries] == ["vector 0", "vector 1", "vector 2"]
        assert [answer.neighbours.positions[0] for answer in answers(dataset, queries, 1)] == [0, 1, 2]
    (single,) = by_vectors("q.npy", npy(ROWS_ND[5]))
    assert answers(dataset, [single], 1)[0].neighbours.positions.tolist() == [5]
    assert answers(dataset, by_vectors("q.npy", npy(ROWS_ND[:0])), 3) == []


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"hello", "vectors: q.npy: not a readable .npy file"),
        (npy(ROWS_ND)[:500], "not a readable .npy file"),
        (npy(np.array([{}], dtype=object)), "not a readable .npy file: Object arrays cannot be loaded"),
        (npy(ROWS_ND[None]), r"q.npy: shape \(1, 300, 16\) of float32 is not allowed; allowed: numbers of shape \(Q, D\)"),
        (npy(np.array(["a"])), "of <U1 is not allowed"),
        (npy(np.float32(3)), r"shape \(\) of float32 is not allowed"),
        (npy(ROWS_ND).replace(b"(300, 16)", b"(9**9,16)"), "not a readable .npy file"),
        (npy(ROWS_ND).replace(b"(300, 16), ", b"(10**15,),  "), "not a readable .npy file"),
    ],
)
def test_files_that_hold_no_vectors(payload: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        by_vectors("q.npy", payload)


def test_answers_as_json(dataset: Dataset) -> None:
    (answer,) = answers(dataset, [Query(name="mine", vector_D=ROWS_ND[41])], 3)
    found = json.loads(json.dumps(answer.as_json(), default=str, allow_nan=False))
    assert found["query"] == "mine"
    shard = dataset.entries()[0].shard
    assert found["neighbours"][2] == {
        "score": 1.0, "key": "00041", "label": 41, "shard": shard, "index": 41,
        "columns": {"weight": None, "day": "2026-11-14", "score": 41},
    }  # fmt: skip


def test_k_is_at_least_one(dataset: Dataset) -> None:
    for queries in (by_keys(dataset, ["00041"], shard=dataset.entries()[0].shard), by_vectors("q.npy", npy(ROWS_ND[:1]))):
        with pytest.raises(ConfigError, match="k: 0 is not allowed; at least 1"):
            answers(dataset, queries, 0)
