"""Exports as their readers see them: arrays, sorted Parquet, indexes; and what is left of those that did not end well."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bucket import Bucket
from commands import cli, last_line, start
from datasets import write_dataset
from faults import FaultProxy, Rule, status
from numpy.typing import NDArray
from s3 import S3Server

from pipeline.analysis import export
from pipeline.analysis.export import sort
from pipeline.config import Storage
from pipeline.dataset.read import Dataset, open_dataset
from pipeline.errors import ConfigError, PipelineError, StorageError, StorageRefused
from pipeline.storage import Store

SHARDS = [40, 0, 37, 3, 20]
"""Rows of each; the second had no good sample."""
BATCH_ROWS = 23
"""Of what is sorted, where a test makes it by hand."""


def values(num_rows: int, width: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((num_rows, width)).astype(np.float32)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """100 rows of two embedding columns in five partitions, one of them empty. Keys come in no order, and twice or thrice."""
    numbers = np.random.default_rng(1).permutation(100) % 40
    keys = [f"k{number:02d}" for number in numbers]
    for begin, stop in ((0, 40), (40, 77), (77, 80), (80, 100)):  # no key twice in a shard
        seen: set[str] = set()
        for row in range(begin, stop):
            while keys[row] in seen:
                keys[row] += "é"
            seen.add(keys[row])
    labels = [None if row % 10 == 9 else f"class {row % 3}" for row in range(100)]
    return write_dataset(
        tmp_path_factory.mktemp("export") / "out",
        {"embedding": values(100, 8), "other": values(100, 5, seed=2)},
        labels,
        keys=keys,
        rows_per_shard=SHARDS,
        columns={"caption": [f"picture {row}" for row in range(100)]},
    )


@pytest.fixture
def small_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fits into memory is so little that some tens of rows are spread over files, and spread again."""
    monkeypatch.setattr(sort, "SORT_BYTES", 3000)
    monkeypatch.setattr(sort, "RANGE_BYTES", 2000)
    monkeypatch.setattr(sort, "PIECE_BYTES", 1500)
    monkeypatch.setattr(sort, "MAX_RANGES", 3)


def left(folder: Path) -> list[str]:
    """Names in a folder."""
    return sorted(path.name for path in folder.iterdir())


class TestArray:
    """`--to npy`."""

    def test_row_i_of_the_array_is_row_i_of_the_keys(self, dataset: Dataset, tmp_path: Path) -> None:
        done = cli("export", dataset.url, "--to", "npy", tmp_path / "x.npy", "--json")
        assert (done.returncode, done.stderr) == (0, "")
        array = np.load(tmp_path / "x.npy", mmap_mode="r")
        assert isinstance(array, np.memmap)
        assert (array.shape, array.dtype, array.flags.c_contiguous) == ((100, 8), np.float32, True)
        assert np.array_equal(array, values(100, 8))
        keys = pq.read_table(tmp_path / "x.npy.keys.parquet")
        assert keys.equals(dataset.table(["key", "label", "shard"]))
        about = json.loads(pq.read_metadata(tmp_path / "x.npy.keys.parquet").metadata[b"pipeline.export"])
        assert (about["dataset"], about["version"], about["node"]) == (f"file://{dataset.url}", 0, "embedding")
        assert about["recipe"] == dataset.recipe
        report = last_line(done)
        assert report["seconds"] > 0
        del report["seconds"]
        assert report == {
            "output": dataset.url, "version": 0, "to": "npy", "destination": str(tmp_path / "x.npy"), "rows": 100,
            "files": [f"{tmp_path}/x.npy.keys.parquet", f"{tmp_path}/x.npy"],
            "bytes": sum(path.stat().st_size for path in tmp_path.iterdir()),
        }  # fmt: skip
        assert left(tmp_path) == ["x.npy", "x.npy.keys.parquet"]

    def test_the_node_and_the_version_asked_for(self, dataset: Dataset, tmp_path: Path) -> None:
        options = ("--to", "npy", tmp_path / "x.npy", "--node", "other", "--version", "0")
        done = cli("export", dataset.url, *options)
        assert done.returncode == 0, done.stderr
        assert np.array_equal(np.load(tmp_path / "x.npy"), values(100, 5, seed=2))
        assert f"wrote    {tmp_path}/x.npy.keys.parquet\n" in done.stdout
        assert "rows     100\n" in done.stdout

    def test_keys_of_many_row_groups(self, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(export, "KEYS_PER_GROUP", 30)
        told: list[tuple[str, int]] = []
        export.to_npy(dataset, f"{tmp_path}/x.npy", progress=lambda stage, rows: told.append((stage, rows)))
        keys = pq.ParquetFile(tmp_path / "x.npy.keys.parquet")
        assert [keys.metadata.row_group(group).num_rows for group in range(4)] == [30, 30, 30, 10]
        assert keys.read().column("key").to_pylist() == dataset.keys()
        assert (sum(rows for _, rows in told), {stage for stage, _ in told}) == (100, {"written"})

    def test_no_rows(self, tmp_path: Path) -> None:
        empty = write_dataset(tmp_path / "out", values(0, 8), rows_per_shard=[0])
        done = export.to_npy(empty, f"{tmp_path}/x.npy")
        assert done.num_rows == 0
        assert np.load(tmp_path / "x.npy", mmap_mode="r").shape == (0, 8)
        assert pq.read_table(tmp_path / "x.npy.keys.parquet").schema.names == ["key", "shard"]

    def test_rounded_values_are_exported_as_they_are_stored(self, tmp_path: Path) -> None:
        rounded = values(50, 16).astype(np.float16).astype(np.float32)
        half = write_dataset(tmp_path / "out", rounded, rows_per_shard=20, precision="float16")
        export.to_npy(half, f"{tmp_path}/x.npy")
        assert np.array_equal(np.load(tmp_path / "x.npy"), rounded)
        assert np.load(tmp_path / "x.npy").dtype == np.float32


class TestParquet:
    """`--to parquet`."""

    def test_small_datasets_are_sorted_in_memory(self, dataset: Dataset, tmp_path: Path) -> None:
        done = cli("export", dataset.url, "--to", "parquet", tmp_path / "sorted", "--row-group-rows", 30, "--json")
        assert done.returncode == 0, done.stderr
        assert left(tmp_path / "sorted") == ["part-00000.parquet"]
        assert_sorted(dataset, tmp_path / "sorted", group=30)
        assert last_line(done)["bytes"] == (tmp_path / "sorted" / "part-00000.parquet").stat().st_size

    @pytest.mark.usefixtures("small_sort")
    @pytest.mark.parametrize("group", [1, 7, 1000])
    def test_rows_and_sizes(self, dataset: Dataset, tmp_path: Path, group: int) -> None:
        done = export.to_parquet(dataset, f"{tmp_path}/sorted", row_group_rows=group, file_bytes=20_000)
        assert_sorted(dataset, tmp_path / "sorted", group)
        sizes = [path.stat().st_size for path in sorted((tmp_path / "sorted").iterdir())]
        assert (done.num_bytes, done.num_rows, len(done.files)) == (sum(sizes), 100, len(sizes))
        if group < 1000:
            assert len(sizes) > 1
            assert max(sizes) <= 20_000
        if group == 7:
            assert min(sizes[:-1]) > 10_000, "a file is filled before the next begins"
        assert left(tmp_path) == ["sorted"], "no temporary files"

    def test_one_row_group_may_be_larger_than_a_file(self, dataset: Dataset, tmp_path: Path) -> None:
        export.to_parquet(dataset, f"{tmp_path}/sorted", row_group_rows=50, file_bytes=1)
        assert left(tmp_path / "sorted") == ["part-00000.parquet", "part-00001.parquet"]

    def test_encodings_are_those_of_the_dataset(self, dataset: Dataset, tmp_path: Path) -> None:
        rounded = values(2000, 16).astype(np.float16).astype(np.float32)
        half = write_dataset(tmp_path / "out", rounded, rows_per_shard=500, precision="float16")
        for each, expected in ((half, ("ZSTD", True)), (dataset, ("UNCOMPRESSED", False))):
            export.to_parquet(each, f"{tmp_path}/{expected[0]}")
            metadata = pq.read_metadata(f"{tmp_path}/{expected[0]}/part-00000.parquet")
            columns = [metadata.row_group(0).column(number) for number in range(metadata.num_columns)]
            (found,) = (column for column in columns if column.path_in_schema == "embedding.list.element")
            assert (found.compression, "BYTE_STREAM_SPLIT" in found.encodings) == expected
            theirs = pq.read_schema(each.files()[0])
            assert pq.read_schema(f"{tmp_path}/{expected[0]}/part-00000.parquet").equals(theirs)
        table = pq.read_table(tmp_path / "ZSTD" / "part-00000.parquet")
        assert np.array_equal(np.array(table.column("embedding").to_pylist(), np.float32), rounded)

    def test_one_embedding_column_of_two(self, dataset: Dataset, tmp_path: Path) -> None:
        export.to_parquet(dataset, f"{tmp_path}/sorted", node="other")
        names = pq.read_schema(tmp_path / "sorted" / "part-00000.parquet").names
        assert names == [name for name in dataset.schema.names if name != "embedding"]

    def test_the_footer_says_where_the_rows_come_from(self, dataset: Dataset, tmp_path: Path) -> None:
        export.to_parquet(dataset, f"{tmp_path}/sorted")
        metadata = pq.read_metadata(tmp_path / "sorted" / "part-00000.parquet")
        assert json.loads(metadata.metadata[b"pipeline.export"]) == {
            "dataset": f"file://{dataset.url}", "version": 0, "recipe": dataset.recipe, "widths": {"embedding": 8, "other": 5},
        }  # fmt: skip
        order = pq.SortingColumn.to_ordering(dataset.schema, metadata.row_group(0).sorting_columns)[0]
        assert order == (("key", "ascending"), ("shard", "ascending"))

    def test_no_rows(self, tmp_path: Path) -> None:
        empty = write_dataset(tmp_path / "out", values(0, 8), rows_per_shard=[0])
        assert export.to_parquet(empty, f"{tmp_path}/sorted").num_rows == 0
        assert pl.read_parquet(f"{tmp_path}/sorted").shape == (0, len(empty.schema))

    @pytest.mark.usefixtures("small_sort")
    def test_no_room_for_temporary_files(self, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = sort.shutil.disk_usage(tmp_path)
        monkeypatch.setattr(sort.shutil, "disk_usage", lambda path: usage._replace(free=10_000))
        with pytest.raises(StorageRefused, match=r"sorted\..*\.tmp: sorting needs .* GB for temporary files, and 0.0 GB"):
            export.to_parquet(dataset, f"{tmp_path}/sorted")
        assert left(tmp_path) == []


def assert_sorted(dataset: Dataset, folder: Path, group: int) -> None:
    """The folder has the rows of the dataset by key and shard, in row groups of that many; three readers say so."""
    expected = dataset.table().sort_by([("key", "ascending"), ("shard", "ascending")])
    files = sorted(folder.iterdir())
    assert pa.concat_tables([pq.read_table(file) for file in files]).cast(expected.schema).equals(expected)
    frame = pl.read_parquet(folder)
    assert frame["key"].to_list() == expected.column("key").to_pylist()
    assert np.array_equal(frame["embedding"].list.to_array(8).to_numpy(), np.array(expected.column("embedding").to_pylist()))
    rows = duckdb.sql(f"SELECT key, shard, other FROM read_parquet('{folder}/*.parquet')").fetchall()
    assert rows == list(zip(*(expected.column(name).to_pylist() for name in ("key", "shard", "other")), strict=True))

    groups = [row_group for file in files for row_group in row_groups(file)]
    assert {row_group.num_rows for row_group in groups[:-1]} <= {group}
    assert groups[-1].num_rows == 100 - group * (len(groups) - 1)
    statistics = [row_group.column(0).statistics for row_group in groups]
    bounds = [bound for each in statistics for bound in (each.min, each.max)]
    assert bounds == sorted(bounds), "a reader that wants one key skips all other row groups"


def row_groups(file: Path) -> list[Any]:
    metadata = pq.read_metadata(file)
    return [metadata.row_group(number) for number in range(metadata.num_row_groups)]


class TestSort:
    """The external sort by itself."""

    @pytest.mark.usefixtures("small_sort")
    @pytest.mark.parametrize(
        "keys",
        [
            [f"{number:04d}" for number in np.random.default_rng(0).permutation(400)],
            ["the same"] * 400,
            [f"{number % 3}" for number in range(400)],
            [("é", "e", "z", "\U0001f600", "", "a\0")[number % 6] * (number % 7) for number in range(400)],
            [f"{number:04d}" for number in reversed(range(400))],
            [f"{number - number // BATCH_ROWS:04d}" for number in range(400)],
        ],
        ids=["shuffled", "one key", "three keys", "any text", "backwards", "equal where a batch ends"],
    )
    def test_any_keys(self, keys: list[str], tmp_path: Path) -> None:
        shards = [f"s{number:03d}" for number in np.random.default_rng(1).permutation(400)]
        table = pa.table({"key": keys, "shard": shards, "row": range(400)})
        found = list(sort.in_order(rows_of(table), tmp_path))
        assert max(each.nbytes for each in found) < 3 * sort.PIECE_BYTES
        expected = sorted(zip(keys, shards, range(400), strict=True))
        assert [tuple(row.values()) for each in found for row in each.to_pylist()] == expected
        assert left(tmp_path) == []

    @pytest.mark.usefixtures("small_sort")
    def test_rows_that_cannot_be_told_apart_come_to_an_end(self, tmp_path: Path) -> None:
        table = pa.table({"key": ["k"] * 400, "shard": ["s"] * 400, "row": range(400)})
        found = pa.concat_tables(list(sort.in_order(rows_of(table), tmp_path)))
        assert sorted(found.column("row").to_pylist()) == list(range(400))

    @pytest.mark.usefixtures("small_sort")
    def test_rows_in_order_need_no_temporary_files(self, tmp_path: Path) -> None:
        table = pa.table({"key": [f"{row:03d}" for row in range(400)], "shard": ["s"] * 400, "row": range(400)})
        found = pa.concat_tables(list(sort.in_order(rows_of(table), tmp_path / "no such folder")))
        assert found.equals(table)

    def test_tables_of_equal_size(self) -> None:
        table = pa.table({"row": range(10)})
        pieces = [table.slice(0, 1), table.slice(1, 0), table.slice(1, 6), table.slice(7)]
        found = list(sort.regroup(pieces, 4))
        assert [each.num_rows for each in found] == [4, 4, 2]
        assert pa.concat_tables(found).equals(table)
        assert list(sort.regroup([], 4)) == []

    def test_samples_come_from_everywhere(self) -> None:
        assert sort.sample(5, 100).tolist() == [0, 1, 2, 3, 4]
        assert len(sort.sample(0, 100)) == 0
        found = sort.sample(1000, 10)
        assert (found // 100).tolist() == list(range(10))


def rows_of(table: pa.Table) -> sort.Rows:
    def read(columns: Sequence[str] | None) -> list[pa.RecordBatch]:
        return table.select(columns or table.column_names).to_batches(max_chunksize=BATCH_ROWS)

    return sort.Rows(read=read, num_rows=table.num_rows, num_bytes=table.nbytes)


class TestFaiss:
    """`--to faiss`."""

    def test_vector_i_is_row_i_of_the_keys(self, dataset: Dataset, tmp_path: Path) -> None:
        import faiss

        done = cli("export", dataset.url, "--to", "faiss", tmp_path / "x.index", "--node", "other", "--json")
        assert done.returncode == 0, done.stderr
        index = faiss.read_index(str(tmp_path / "x.index"))
        expected = values(100, 5, seed=2)
        assert (type(index), index.metric_type) == (faiss.IndexFlatIP, faiss.METRIC_INNER_PRODUCT)
        assert np.array_equal(index.reconstruct_n(0, 100), expected)
        scores, neighbours = index.search(expected[:3], 4)
        products = expected[:3] @ expected.T
        assert np.array_equal(neighbours, np.argsort(-products, axis=1)[:, :4])
        assert np.allclose(scores, -np.sort(-products, axis=1)[:, :4], atol=1e-5)
        keys = pq.read_table(tmp_path / "x.index.keys.parquet")
        assert keys.equals(dataset.table(["key", "label", "shard"]))
        assert last_line(done)["files"] == [f"{tmp_path}/x.index.keys.parquet", f"{tmp_path}/x.index"]

    def test_an_index_that_is_trained(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import faiss

        embeddings = values(2000, 8)
        dataset = write_dataset(tmp_path / "out", embeddings, rows_per_shard=300)
        monkeypatch.setattr(export, "TRAIN_BYTES", 500 * 8 * 4)
        told: list[str] = []
        export.to_faiss(
            dataset, f"{tmp_path}/x.index", factory="IVF4,Flat", progress=lambda stage, rows: told.extend([stage] * rows)
        )
        index = faiss.read_index(str(tmp_path / "x.index"))
        assert (faiss.extract_index_ivf(index).nlist, index.ntotal) == (4, 2000)
        assert (told.count("read for training"), told.count("written")) == (2000, 2000)
        index.nprobe = 4
        assert np.array_equal(index.search(embeddings[:50], 1)[1][:, 0], np.argmax(embeddings[:50] @ embeddings.T, axis=1))

    def test_the_training_sample_is_rows_from_all_over(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import faiss

        embeddings = values(2000, 8) + np.linspace(0, 1, 2000, dtype=np.float32)[:, None]
        dataset = write_dataset(tmp_path / "out", embeddings, rows_per_shard=300)
        monkeypatch.setattr(export, "TRAIN_BYTES", 200 * 8 * 4)  # FAISS takes 256 a centroid
        export.to_faiss(dataset, f"{tmp_path}/x.index", factory="IVF1,Flat")
        index = faiss.read_index(str(tmp_path / "x.index"))
        centroid = faiss.downcast_index(index.quantizer).reconstruct(0)  # the mean, of length 1
        sampled = embeddings[sort.sample(2000, 200)]
        mean = sampled.mean(axis=0)
        assert np.allclose(centroid, mean / np.linalg.norm(mean), atol=1e-5)

    @pytest.mark.parametrize(
        ("factory", "reason"),
        [("Bogus", "could not parse index string Bogus"), ("IVF128,Flat", "Number of training points (100) should be")],
    )
    def test_what_faiss_refuses(self, dataset: Dataset, tmp_path: Path, factory: str, reason: str) -> None:
        with pytest.raises(ConfigError) as refused:
            export.to_faiss(dataset, f"{tmp_path}/x.index", factory=factory)
        assert str(refused.value).startswith(f"faiss-index: '{factory}': ")
        assert reason in str(refused.value)
        assert ".cpp" not in str(refused.value)
        assert left(tmp_path) == []

    def test_no_rows(self, tmp_path: Path) -> None:
        import faiss

        empty = write_dataset(tmp_path / "out", values(0, 8), rows_per_shard=[0])
        export.to_faiss(empty, f"{tmp_path}/x.index")
        index = faiss.read_index(str(tmp_path / "x.index"))
        assert (index.ntotal, index.d) == (0, 8)
        with pytest.raises(ConfigError, match="faiss-index: 'IVF4,Flat'"):
            export.to_faiss(empty, f"{tmp_path}/y.index", factory="IVF4,Flat")

    def test_without_faiss(self, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "faiss", None)  # what import sees where it is not installed
        with pytest.raises(ConfigError, match=r"faiss is not installed; `pip install 'frozen-pipeline\[faiss\]'`"):
            export.to_faiss(dataset, f"{tmp_path}/x.index")


class TestRefused:
    """What the user is told, and that nothing happens."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--to", "npy", "--node", "nod"], "there is no embedding column 'nod'; it has embedding, other"),
            (["--to", "npy", "--version", "7"], "there is no version 7"),
            (["--to", "npy", "--file-bytes", "1GB"], "file-bytes: '1GB' means nothing with --to npy, only with --to parquet"),
            (["--to", "parquet", "--faiss-index", "Flat"], "faiss-index: 'Flat' means nothing with --to parquet"),
            (["--to", "parquet", "--file-bytes", "much"], "file-bytes: 'much' is not a size; allowed are 512MB"),
            (["--to", "parquet", "--file-bytes", "0"], "file-bytes: 0 is not allowed; at least 1"),
            (["--to", "parquet", "--row-group-rows", "0"], "row-group-rows: 0 is not allowed; at least 1"),
            (["--to", "csv"], "'csv' is not one of"),
        ],
    )
    def test_wrong_options(self, dataset: Dataset, tmp_path: Path, options: list[str], message: str) -> None:
        from typer.testing import CliRunner

        from pipeline.cli import app

        done = CliRunner().invoke(app, ["export", dataset.url, *options, f"{tmp_path}/x"])
        assert done.exit_code == 2
        assert message in done.stderr
        assert left(tmp_path) == []

    @pytest.mark.parametrize("write", [export.to_npy, export.to_faiss, export.to_parquet])
    def test_a_destination_that_exists(self, dataset: Dataset, tmp_path: Path, write: Callable[..., Any]) -> None:
        other = write_dataset(tmp_path / "out", values(10, 3))
        write(other, f"{tmp_path}/there")
        before = contents(tmp_path / "there")
        with pytest.raises(ConfigError, match=r"there: exists already; --overwrite replaces it") as refused:
            write(dataset, f"{tmp_path}/there")
        assert refused.value.exit_code == 2
        assert contents(tmp_path / "there") == before
        write(dataset, f"{tmp_path}/there", overwrite=True)
        assert contents(tmp_path / "there") != before
        assert [name for name in left(tmp_path) if name.endswith(".tmp")] == []

    @pytest.mark.parametrize("write", [export.to_npy, export.to_faiss])
    def test_keys_that_exist_and_folders(self, dataset: Dataset, tmp_path: Path, write: Callable[..., Any]) -> None:
        (tmp_path / "x.keys.parquet").write_text("mine")
        with pytest.raises(ConfigError, match=r"x\.keys\.parquet: exists already"):
            write(dataset, f"{tmp_path}/x")
        assert left(tmp_path) == ["x.keys.parquet"]
        for folder in (str(tmp_path), f"{tmp_path}/new/"):
            with pytest.raises(ConfigError, match="is a folder; name a file"):
                write(dataset, folder, overwrite=True)
        assert left(tmp_path) == ["x.keys.parquet"]

    def test_only_what_an_export_wrote_is_replaced(self, dataset: Dataset, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.tex").write_text("years of work")
        (tmp_path / "mine" / "part-00000.parquet").write_text("")
        with pytest.raises(ConfigError, match=r"mine: holds thesis.tex, which no export wrote, and is not replaced"):
            export.to_parquet(dataset, f"{tmp_path}/mine", overwrite=True)
        assert left(tmp_path / "mine") == ["part-00000.parquet", "thesis.tex"]
        (tmp_path / "file").write_text("mine")
        with pytest.raises(ConfigError, match=r"not replaced"):
            export.to_parquet(dataset, f"{tmp_path}/file", overwrite=True)

    @pytest.mark.parametrize("write", [export.to_npy, export.to_parquet])
    def test_into_the_dataset(self, dataset: Dataset, write: Callable[..., Any]) -> None:
        before = left(Path(dataset.url))
        for place in (dataset.url, f"{dataset.url}/data/x", f"file://{dataset.url}/x"):
            with pytest.raises(ConfigError, match="lies in the dataset"):
                write(dataset, place, overwrite=True)
        assert left(Path(dataset.url)) == before

    def test_a_folder_that_cannot_be_written(self, dataset: Dataset, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        for kind in ("npy", "parquet"):
            done = cli("export", dataset.url, "--to", kind, tmp_path / "file" / "x")
            assert (done.returncode, done.stdout) == (2, "")
            assert done.stderr.startswith(f"error: {tmp_path}/file/x: ")
            assert len(done.stderr.splitlines()) == 1


def contents(path: Path) -> bytes:
    """Of a file, or of the files of a folder."""
    return path.read_bytes() if path.is_file() else b"".join(file.read_bytes() for file in sorted(path.iterdir()))


def killed(process: subprocess.Popen[str], begun: Callable[[], bool]) -> None:
    """Kill a process once it has begun to write; it must not have come to its end."""
    deadline = time.monotonic() + 60
    try:
        while not begun():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


class TestInterrupted:
    """Nothing of an export that did not come to its end looks like one."""

    def test_array_killed_in_the_middle(self, tmp_path: Path) -> None:
        dataset = write_dataset(tmp_path / "out", values(1500, 64), rows_per_shard=5)  # 300 files to open take a while
        process = start("export", dataset.url, "--to", "npy", tmp_path / "x.npy")
        killed(process, lambda: any(file.stat().st_size > 20_000 for file in tmp_path.glob("x.npy.*.tmp")))
        assert {name for name in left(tmp_path) if not name.endswith(".tmp")} == {"out"}
        assert len(left(tmp_path)) > 1

    def test_folder_killed_in_the_middle(self, dataset: Dataset, tmp_path: Path) -> None:
        many = write_dataset(tmp_path / "out", values(5000, 4), rows_per_shard=1000)
        process = start("export", many.url, "--to", "parquet", tmp_path / "to", "--row-group-rows", "1")
        killed(process, lambda: any(file.stat().st_size > 10_000 for file in tmp_path.glob("to.*.tmp/part-00000.*.tmp")))
        assert {name for name in left(tmp_path) if not name.endswith(".tmp")} == {"out"}
        assert len(left(tmp_path)) > 1
        export.to_parquet(dataset, f"{tmp_path}/to")
        assert_sorted(dataset, tmp_path / "to", 100)

    @pytest.mark.parametrize(
        ("kind", "write"), [("npy", export.to_npy), ("faiss", export.to_faiss), ("parquet", export.to_parquet)]
    )
    def test_a_disk_that_takes_no_more(self, dataset: Dataset, tmp_path: Path, kind: str, write: Callable[..., Any]) -> None:
        big = write_dataset(tmp_path / "out", values(2000, 64), rows_per_shard=500)
        write(dataset, f"{tmp_path}/to/old")
        before = {name: contents(tmp_path / "to" / name) for name in left(tmp_path / "to")}
        process = start("export", big.url, "--to", kind, tmp_path / "to" / "old", "--overwrite")
        # The write that passes the limit is cut short, as on a disk that is full; of the array it is the last one.
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (450_000, resource.RLIM_INFINITY))
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (1, "")
        assert err.startswith(f"error: {tmp_path}/to/")
        assert err.endswith(": File too large\n")
        assert len(err.splitlines()) == 1
        assert {name: contents(tmp_path / "to" / name) for name in left(tmp_path / "to")} == before

    def test_rows_that_the_log_does_not_know(self, tmp_path: Path) -> None:
        dataset = write_dataset(tmp_path / "out", values(300, 8), rows_per_shard=100)
        file = dataset.files()[1]
        pq.write_table(pq.read_table(file).slice(0, 99), file)
        for write in (export.to_npy, export.to_faiss, export.to_parquet):
            with pytest.raises(PipelineError, match=r"300 rows.* 299|99 rows.* 100"):
                write(dataset, f"{tmp_path}/to")
        assert left(tmp_path) == ["out"]


class TestStore:
    """A dataset and an export in a real object store."""

    def test_there_and_back(self, s3: S3Server, tmp_path: Path) -> None:
        bucket = Bucket(s3)
        storage = Storage(**bucket.storage)
        keys = [f"{row:03d}" for row in np.random.default_rng(0).permutation(200)]
        dataset = write_dataset(bucket.output, values(200, 16), keys=keys, rows_per_shard=[150, 0, 50], storage=storage)
        place = f"s3://{bucket.name}/exports"
        for write, name in ((export.to_npy, "x.npy"), (export.to_faiss, "x.index"), (export.to_parquet, "sorted")):
            done = write(dataset, f"{place}/{name}")
            assert done.num_rows == 200
            with pytest.raises(ConfigError, match="exists already"):
                write(dataset, f"{place}/{name}")
        bucket.fs.get(f"{bucket.name}/exports/", f"{tmp_path}/", recursive=True)
        assert np.array_equal(np.load(tmp_path / "x.npy"), values(200, 16))
        for name in ("x.npy", "x.index"):
            assert pq.read_table(tmp_path / f"{name}.keys.parquet").column("key").to_pylist() == keys
        assert left(tmp_path / "sorted") == ["_SUCCESS", "part-00000.parquet"]
        assert done.files == [f"{place}/sorted/part-00000.parquet", f"{place}/sorted/_SUCCESS"]
        about = json.loads((tmp_path / "sorted" / "_SUCCESS").read_text())
        assert (about["rows"], about["files"], about["version"]) == (200, ["part-00000.parquet"], 0)
        assert pq.read_table(tmp_path / "sorted").column("key").to_pylist() == sorted(keys)

    def test_credentials_from_the_environment(self, s3: S3Server, dataset: Dataset) -> None:
        bucket = Bucket(s3)
        done = cli("export", dataset.url, "--to", "npy", f"s3://{bucket.name}/x.npy", env=s3.env())
        assert done.returncode == 0, done.stderr
        assert bucket.fs.ls(bucket.name) == [f"{bucket.name}/x.npy", f"{bucket.name}/x.npy.keys.parquet"]
        refused = cli("export", dataset.url, "--to", "npy", f"s3://{bucket.name}/y.npy", env=s3.env(reader=True))
        assert refused.returncode == 2
        assert "Access Denied" in refused.stderr
        assert s3.reader_secret_key not in refused.stderr

    def test_killed_in_the_middle(self, dataset: Dataset, s3: S3Server, tmp_path: Path) -> None:
        bucket = Bucket(s3)
        url = f"s3://{bucket.name}/sorted"
        many = write_dataset(tmp_path / "out", values(600, 4), rows_per_shard=600)
        options = ("--to", "parquet", url, "--row-group-rows", "1", "--file-bytes", "1")
        process = start("export", many.url, *options, env=s3.env())
        killed(process, lambda: bool(bucket.fs.exists(f"{bucket.name}/sorted/part-00000.parquet")))
        found = bucket.fs.ls(f"{bucket.name}/sorted")
        assert found
        assert all(Path(name).name.startswith("part-") for name in found), "no _SUCCESS"

        there = open_dataset(dataset.url, storage=Storage(**bucket.storage))
        with pytest.raises(ConfigError, match=r"sorted: holds an export that was never finished \(it has no _SUCCESS\)"):
            export.to_parquet(there, url)
        export.to_parquet(there, url, overwrite=True)
        assert bucket.fs.ls(f"{bucket.name}/sorted") == [
            f"{bucket.name}/sorted/_SUCCESS", f"{bucket.name}/sorted/part-00000.parquet",
        ]  # fmt: skip

    def test_an_error_in_the_middle(self, s3: S3Server) -> None:
        bucket = Bucket(s3)
        storage = Storage(**bucket.storage)
        url = f"s3://{bucket.name}/x.npy"
        dataset = write_dataset(bucket.output, values(300, 64), rows_per_shard=100, storage=storage)
        bucket.fs.rm_file(dataset.files()[-1])
        before = list(Store(storage).list(f"s3://{bucket.name}"))
        with pytest.raises(StorageError, match="there is no such file"):
            export.to_npy(dataset, url)
        assert list(Store(storage).list(f"s3://{bucket.name}", missing_ok=True)) == before

    def test_an_old_array_never_stands_beside_new_keys(self, dataset: Dataset, s3: S3Server) -> None:
        with FaultProxy(s3.endpoint_url) as proxy:
            bucket = Bucket(s3, proxy.endpoint_url)
            there = open_dataset(dataset.url, storage=Storage(**bucket.storage))
            url = f"s3://{bucket.name}/x.npy"
            export.to_npy(there, url, node="other")
            proxy.clear()
            proxy.add(Rule(lambda request: request.matches("PUT", "/x.npy?"), status(403, "AccessDenied")))
            with pytest.raises(StorageError):
                export.to_npy(there, url, overwrite=True)
            changes = [(each.method, Path(each.path).name) for each in proxy.requests if each.method in {"PUT", "DELETE"}]
            assert changes == [("DELETE", "x.npy"), ("PUT", "x.npy.keys.parquet"), ("PUT", "x.npy")]

    def test_an_old_folder_loses_its_marker_first(self, dataset: Dataset, s3: S3Server) -> None:
        with FaultProxy(s3.endpoint_url) as proxy:
            bucket = Bucket(s3, proxy.endpoint_url)
            there = open_dataset(dataset.url, storage=Storage(**bucket.storage))
            url = f"s3://{bucket.name}/sorted"
            export.to_parquet(there, url, row_group_rows=30, file_bytes=1)
            proxy.clear()
            export.to_parquet(there, url, overwrite=True)
            changes = [(each.method, Path(each.path).name) for each in proxy.requests if each.method in {"PUT", "DELETE"}]
            assert changes[0] == ("DELETE", "_SUCCESS")
            assert sorted(changes[1:-2]) == [("DELETE", f"part-0000{number}.parquet") for number in range(4)]
            assert changes[-2:] == [("PUT", "part-00000.parquet"), ("PUT", "_SUCCESS")]

    def test_interrupted_by_its_user(self, dataset: Dataset, s3: S3Server) -> None:
        bucket = Bucket(s3)
        url, seen = f"s3://{bucket.name}/sorted", []

        def interrupt(stage: str, num_rows: int) -> None:
            if stage == "written":
                seen.append(bucket.fs.find(f"{bucket.name}/sorted"))
                if len(seen) == 4:
                    raise KeyboardInterrupt

        there = open_dataset(dataset.url, storage=Storage(**bucket.storage))
        with pytest.raises(KeyboardInterrupt):
            export.to_parquet(there, url, row_group_rows=20, file_bytes=1, progress=interrupt)
        assert seen[-1] == [f"{bucket.name}/sorted/part-0000{number}.parquet" for number in range(3)]
        assert list(there.table_.store.list(url, missing_ok=True)) == []
        assert len(export.to_parquet(there, url).files) == 2
