"""The examples of docs/examples: each runs as it is, and reads the rows that the dataset has."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from bucket import Bucket
from commands import ROOT
from datasets import write_dataset
from s3 import S3Server

from pipeline.config import Storage
from pipeline.dataset.read import Dataset

EXAMPLES = ROOT / "docs" / "examples"
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """90 rows of three classes that can be told apart, in four partitions, one of them empty."""
    random = np.random.default_rng(0)
    classes = np.arange(90) % 3
    embeddings = random.standard_normal((90, 16)).astype(np.float32)
    embeddings[np.arange(90), classes] += 6
    keys = [f"{number:03d}" for number in random.permutation(90)]
    labels = [f"class {number}" for number in classes]
    return write_dataset(
        tmp_path_factory.mktemp("examples") / "out", embeddings, labels, keys=keys, rows_per_shard=[30, 25, 0, 35]
    )


@pytest.fixture
def run(dataset: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs an example in this process; gives its global names and what it printed."""

    def run(name: str) -> tuple[dict[str, Any], str]:
        monkeypatch.setattr(sys, "argv", [name, dataset.url])
        names = runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return names, capsys.readouterr().out

    return run


def norms(dataset: Dataset) -> dict[str, float]:
    """Key to norm."""
    return dict(zip(dataset.keys(), np.linalg.norm(dataset.to_numpy(), axis=1).tolist(), strict=True))


def test_every_example_is_tested_and_listed() -> None:
    tested = set(re.findall(r'"(\w+\.py)"', Path(__file__).read_text()))
    assert tested == set(NAMES)
    assert set(re.findall(r"^\| `(\w+\.py)`", (EXAMPLES / "README.md").read_text(), re.MULTILINE)) == set(NAMES)
    for name in NAMES:
        assert f"python docs/examples/{name} " in (EXAMPLES / name).read_text()


def test_duckdb(dataset: Dataset, run: Any) -> None:
    names, printed = run("duckdb_query.py")
    table = names["rows"].select("key", "embedding").to_arrow_table()
    assert table.column("key").to_pylist() == dataset.keys()
    assert np.array_equal(np.array(table.column("embedding").to_pylist(), np.float32), dataset.to_numpy())
    assert re.findall(r"class (\d) │ +(\d+) │\n", printed) == [("0", "30"), ("1", "30"), ("2", "30")]
    embeddings = dataset.to_numpy()
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    nearest = np.argsort(-(unit @ unit[0]))[:5]
    assert [row[0] for row in names["neighbours"].fetchall()] == [dataset.keys()[row] for row in nearest]


def test_polars(dataset: Dataset, run: Any) -> None:
    names, printed = run("polars_query.py")
    rows = names["rows"].sort("shard", "index").collect()
    assert rows["key"].to_list() == dataset.keys()
    assert rows.columns == dataset.schema.names
    assert np.array_equal(names["embeddings"], dataset.to_numpy())
    assert "embedding: 90 x 16 float32" in printed
    assert re.findall(r"class (\d) ┆ (\d+)", printed) == [("0", "30"), ("1", "30"), ("2", "30")]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray Data sets options that it has deprecated itself
def test_ray_data(dataset: Dataset, run: Any, local_ray: None) -> None:
    names, printed = run("ray_data.py")
    normed = names["normed"].take_all()
    assert {row["key"]: row["norm"] for row in normed} == pytest.approx(norms(dataset), rel=1e-6)
    # Where the machine is busy Ray may have something to say as well.
    first, *others = [line for line in printed.splitlines() if "(raylet)" not in line]
    assert first == f"90 rows, norms from {min(norms(dataset).values()):.4f} to {max(norms(dataset).values()):.4f}"
    assert [line.split()[0] for line in others] == [row["key"] for row in normed[:3]]


def test_dataloader(dataset: Dataset) -> None:
    # A process of its own: its workers are forks, which the threads of this one would not survive.
    done = subprocess.run(
        [sys.executable, EXAMPLES / "dataloader.py", dataset.url],
        cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    mean = f"mean norm {np.mean(list(norms(dataset).values())):.4f}"
    assert done.stdout.splitlines() == [f"epoch 0: 90 rows in 2 batches, {mean}", f"epoch 1: 90 rows in 2 batches, {mean}"]

    rows = runpy.run_path(str(EXAMPLES / "dataloader.py"))["Rows"](dataset, batch_size=8)
    expected = dict(zip(dataset.keys(), dataset.to_numpy(), strict=True))
    batches = list(rows)
    assert [len(keys) for keys, _ in batches] == [8] * 11 + [2]
    assert [key for keys, _ in batches for key in keys] != dataset.keys(), "shuffled"
    found = {key: embedding.numpy() for keys, embeddings in batches for key, embedding in zip(keys, embeddings, strict=True)}
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


def test_sklearn(dataset: Dataset, run: Any) -> None:
    names, printed = run("sklearn_classifier.py")
    assert np.array_equal(names["embeddings"], dataset.to_numpy())
    assert names["rows"].column("key").to_pylist() == dataset.keys()
    train, accuracy, test = re.fullmatch(r"trained on (\d+) rows, accuracy (\S+) on (\d+) others\n", printed).groups()
    assert int(train) + int(test) == 90
    assert int(test) > 5
    assert float(accuracy) > 0.9


def test_faiss(dataset: Dataset, run: Any) -> None:
    names, printed = run("faiss_search.py")
    assert names["keys"] == dataset.keys()
    embeddings = dataset.to_numpy()
    assert np.array_equal(names["index"].reconstruct_n(0, 90), embeddings)
    nearest = np.argsort(-(embeddings[:3] @ embeddings.T), axis=1)[:, :5]
    printed_keys = [re.findall(r"(\d{3}) \(", line) for line in printed.splitlines()]
    assert printed_keys == [[dataset.keys()[row] for row in rows] for rows in nearest]


def test_from_a_bucket(s3: S3Server) -> None:
    bucket = Bucket(s3)
    embeddings = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
    dataset = write_dataset(bucket.output, embeddings, rows_per_shard=[10, 0, 20], storage=Storage(**bucket.storage))
    files, keys = dataset.files(), dataset.keys()
    log = pl.scan_delta(bucket.output, storage_options=s3.storage_options())
    assert log.sort("shard", "index").collect()["key"].to_list() == keys
    assert pl.read_parquet(files, storage_options=s3.storage_options())["key"].to_list() == keys
    connection = duckdb.connect()
    connection.register_filesystem(bucket.fs)
    assert [key for (key,) in connection.read_parquet(files).select("key").fetchall()] == keys
    paths = [file.removeprefix("s3://") for file in files]
    assert pq.read_table(paths, filesystem=bucket.fs).column("key").to_pylist() == keys
