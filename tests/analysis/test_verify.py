"""What `verify` finds: every kind of damage is planted in the files of a dataset, or in its source."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from bucket import Bucket
from commands import cli, invoke, last_line
from conftest import noise, settings, shard_members, tar_bytes
from models import tiny
from numpy.typing import NDArray
from quick import committed
from s3 import S3Server

import pipeline
from pipeline.analysis.verify import Report, columns, sample, verify
from pipeline.analysis.verify.sample import draw
from pipeline.dataset import partition
from pipeline.dataset.partition import PartitionWriter, list_values
from pipeline.dataset.read import Dataset
from pipeline.dataset.table import Table
from pipeline.errors import BackboneError, DatasetError, SampleError
from pipeline.extract.embedder import Embedder
from pipeline.recipe import Layout, Recipe
from pipeline.storage import Store

NODES = {"raw": {"node": "flatten"}, "unit": {"node": "flatten", "normalize": "l2"}}
IMAGES = noise(30)


def write_source(folder: Path) -> None:
    """Shards a, b, c of ten images each; of the same size, as are the partitions made from them. The third of b is broken."""
    folder.mkdir(parents=True)
    for name, first in zip("abc", (0, 10, 20), strict=True):
        images = IMAGES[first : first + 10]
        if name == "b":
            images = [*images[:3], b"no image", *images[4:]]
        (folder / f"{name}.tar").write_bytes(tar_bytes(shard_members(images, first)))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of three tars beside its source. Not to be changed."""
    folder = tmp_path_factory.mktemp("sound")
    write_source(folder / "source")
    committed(settings(f"{folder}/source/*.tar", folder / "out", backbone__nodes=NODES))
    return folder


@pytest.fixture
def output(sound: Path, tmp_path: Path) -> Path:
    """A copy of the dataset, to be damaged; its source is the same."""
    shutil.copytree(sound / "out", tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset with a source of its own."""
    write_source(tmp_path / "source")
    committed(settings(f"{tmp_path}/source/*.tar", tmp_path / "out", backbone__nodes=NODES))
    return tmp_path


def verified(output: Path | str | Dataset, rows: int = 1000, **more: Any) -> Report:
    dataset = output if isinstance(output, Dataset) else pipeline.open_dataset(str(output))
    return verify(dataset, Embedder(dataset.recipe).embed, rows, **more)


def partition_of(output: Path, shard: str) -> Path:
    """The file made from a shard."""
    entries = pipeline.open_dataset(str(output)).entries()
    return output / next(entry.path for entry in entries if entry.shard.endswith(f"/{shard}.tar"))


def unchanged(_: dict[str, Any]) -> None:
    pass


def rewrite(path: Path, change: Callable[[dict[str, Any]], None], *, rounded: bool = False, **footer_changes: Any) -> None:
    """A partition written anew with the footer that it had; `change` gets its columns, embeddings as (N, D)."""
    file = pq.ParquetFile(path)
    footer, table = json.loads(file.metadata.metadata[b"pipeline"]), file.read()
    widths = footer["widths"]
    footer |= footer_changes
    values = {name: table.column(name).to_pylist() for name in table.schema.names if name not in widths}
    values |= {name: list_values(table.column(name)).copy() for name in widths}
    change(values)
    fields = [partition.embedding_field(each.name, widths[each.name]) if each.name in widths else each for each in table.schema]
    with open(path, "wb") as handle:
        writer = PartitionWriter(handle, pa.schema(fields), rounded=rounded)
        embeddings = {name: values.pop(name) for name in widths}
        writer.write(values, embeddings)
        writer.close(footer)


def kinds(report: Report) -> set[str]:
    return {finding.kind for finding in report.findings}


class TestSound:
    """Datasets with nothing wrong."""

    def test_tars(self, sound: Path) -> None:
        report = verified(sound / "out")
        assert (report.verdict, report.findings, report.unavailable) == ("", [], [])
        assert (report.num_partitions, report.num_rows, report.num_sampled, report.num_compared) == (3, 29, 29, 29)
        assert report.deep
        assert report.max_difference < 1e-5

    def test_fewer_rows_and_no_rows(self, sound: Path) -> None:
        dataset = pipeline.open_dataset(str(sound / "out"))
        some = verified(dataset, 7, deep=False)
        assert (some.num_sampled, some.num_compared, some.deep, some.verdict) == (7, 7, False, "")
        none = verify(dataset)
        assert (none.num_sampled, none.num_compared, none.verdict) == (0, 0, "")

    def test_parquet_with_every_type_that_is_carried(self, tmp_path: Path) -> None:
        names = [f"key {number}" for number in range(30)]
        moments = pa.array([1_700_000_000_000_000 + number for number in range(30)], pa.timestamp("us"))
        table = pa.table(
            {
                "image": IMAGES, "name": names, "n": pa.array(range(30), pa.int8()), "x": pa.array(range(30), pa.float32()),
                "day": pa.array(range(30), pa.date32()), "when": moments,
                "there": moments.cast(pa.timestamp("us", "Europe/Berlin")), "yes": [True, None] * 15,
            }
        )  # fmt: skip
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=8)
        carried = ["n", "x", "day", "when", "there", "yes"]
        changes = {"source__label": "name", "source__key": "name", "source__columns": carried}
        report = verified(committed(settings(f"{tmp_path}/*.parquet", tmp_path / "out", **changes)))
        assert (report.findings, report.num_compared) == ([], 30)

    @pytest.mark.parametrize("precision", ["bfloat16", "float16"])
    def test_files_with_rounded_values(self, precision: str, tmp_path: Path) -> None:
        (tmp_path / "source").mkdir()
        for number, image in enumerate(IMAGES):
            (tmp_path / "source" / f"{number:02d}.png").write_bytes(image)
        changes = {"source__label": None, "run__precision": precision, "backbone__nodes": NODES}
        dataset = committed(settings(tmp_path / "source", tmp_path / "out", **changes))
        report = verified(dataset)
        assert (report.findings, report.num_compared) == ([], 30)
        assert report.tolerance > 1e-3

    def test_a_version_without_rows(self, tmp_path: Path) -> None:
        (tmp_path / "a.tar").write_bytes(tar_bytes({"1.png": b"no image"}))
        report = verified(committed(settings(f"{tmp_path}/*.tar", tmp_path / "out", source__label=None)))
        assert (report.verdict, report.num_partitions, report.num_sampled) == ("", 1, 0)

    def test_in_a_real_store(self, s3: S3Server) -> None:
        bucket = Bucket(s3)
        bucket.fill(IMAGES, 10)
        dataset = committed(bucket.config())
        assert (verified(dataset).verdict, verified(dataset, deep=False).num_compared) == ("", 30)

        bucket.fs.rm_file(f"{bucket.name}/out/{dataset.entries()[1].path}")
        bucket.put("002", shard_members(noise(2, seed=9), 20))
        damaged = last_line(invoke("verify", bucket.output, "--json", "--endpoint-url", bucket.endpoint_url, env=s3.env()))
        assert [(each["kind"], each["shard"][-7:]) for each in damaged["findings"]] == [("missing", "001.tar")]
        assert {each["shard"][-7:] for each in damaged["unavailable"]} == {"002.tar"}
        assert damaged["rows"] == {"total": 30, "sampled": 20, "compared": 10, "unavailable": 10}


class TestFiles:
    """Damage that needs no look at the rows."""

    def test_a_partition_that_is_gone(self, output: Path) -> None:
        partition_of(output, "b").unlink()
        report = verified(output)
        (finding,) = report.findings
        assert finding.kind == "missing"
        assert str(finding) == f"{finding.path} ({finding.shard}): the file is not there"
        assert finding.shard.endswith("/b.tar")
        assert report.num_compared == 20, "the others are looked at all the same"
        assert report.verdict == "1 of 3 partitions are not what they should be"

    def test_one_that_was_cut(self, output: Path) -> None:
        path = partition_of(output, "b")
        path.write_bytes(path.read_bytes()[:-100])
        report = verified(output)
        assert kinds(report) == {"num_bytes", "unreadable"}
        assert any("not a whole Parquet file" in finding.message for finding in report.findings)

    def test_two_of_the_same_size_that_were_swapped(self, tmp_path: Path) -> None:
        """Alike but for the URL of their shard; a checksum more or less takes a byte."""
        (tmp_path / "source").mkdir()
        for name in "abcdefgh":
            (tmp_path / "source" / f"{name}.tar").write_bytes(tar_bytes(shard_members(IMAGES[:10], 0)))
        dataset = committed(settings(f"{tmp_path}/source/*.tar", tmp_path / "out", backbone__nodes=NODES))
        by_size = itertools.groupby(sorted(dataset.entries(), key=lambda entry: entry.num_bytes), lambda entry: entry.num_bytes)
        one, other = next(same for _, group in by_size if len(same := list(group)) > 1)[:2]
        first, second = tmp_path / "out" / one.path, tmp_path / "out" / other.path
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
        report = verified(dataset, rows=0, deep=False)
        assert kinds(report) == {"shard", "fingerprint"}
        assert {finding.path for finding in report.findings} == {one.path, other.path}
        assert f"shard: the file has {other.shard}, the log {one.shard}" in {finding.message for finding in report.findings}

    def test_the_file_of_another_dataset(self, output: Path, sound: Path, tmp_path: Path) -> None:
        changes = {"backbone__weights": "seed:1", "source__label": None}
        other = committed(settings(f"{sound}/source/*.tar", tmp_path / "other", backbone__nodes=NODES, **changes))
        shutil.copy(tmp_path / "other" / other.entries()[0].path, partition_of(output, "a"))
        report = verified(output)
        assert kinds(report) == {"num_bytes", "recipe_id", "layout_id", "columns", "recipe", "layout"}
        messages = {finding.kind: finding.message for finding in report.findings}
        assert "weights: seed:0 -> seed:1" in messages["recipe"]
        assert messages["columns"] == "columns: the file has fewer or another order, the log label int64"
        assert report.num_compared == 19

    def test_a_log_with_another_number_of_rows(self, output: Path) -> None:
        log = output / "_delta_log" / f"{0:020d}.json"
        text = log.read_text()
        assert text.count('{\\"numRecords\\": 9}') == 1
        log.write_text(text.replace('{\\"numRecords\\": 9}', '{\\"numRecords\\": 8}'))
        report = verified(output)
        (finding,) = report.findings
        assert (finding.kind, finding.message) == ("num_rows", "num_rows: the file has 9, the log 8")

    def test_footers_that_say_nothing_or_do_not_add_up(self, output: Path) -> None:
        rewrite(partition_of(output, "a"), unchanged, num_embedded=11)
        rewrite(partition_of(output, "b"), unchanged, num_read=None)
        rewrite(partition_of(output, "c"), unchanged, recipe=None, quarantine=None)
        other = partition_of(output, "c")
        table = pq.read_table(other).replace_schema_metadata({"pipeline": "[]"})
        pq.write_table(table, other)
        report = verified(output, rows=0)
        found = {(finding.shard[-5], finding.kind) for finding in report.findings if finding.kind != "num_bytes"}
        assert found == {("a", "reconciles"), ("b", "reconciles"), ("c", "unreadable")}

    def test_another_recipe_in_the_log(self, output: Path) -> None:
        log = output / "_delta_log" / f"{0:020d}.json"
        recipe_id = pipeline.open_dataset(str(output)).entries()[0].recipe_id
        log.write_text(log.read_text().replace(f'"_recipe":"{recipe_id}"', '"_recipe":"0123456789abcdef"', 1))
        report = verified(output, rows=0)
        assert kinds(report) == {"recipe", "recipe_id"}
        assert len({finding.path for finding in report.findings}) == 1

    def test_a_quarantine_that_is_gone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(partition, "MAX_FOOTER_QUARANTINE_BYTES", 100)
        write_source(tmp_path / "source")
        committed(settings(f"{tmp_path}/source/*.tar", tmp_path / "out", backbone__nodes=NODES))
        (sibling,) = (tmp_path / "out" / "data").glob("*.quarantine.json")
        whole = json.loads(sibling.read_text())
        assert verified(tmp_path / "out").verdict == ""
        cases: list[tuple[Any, str]] = [
            ("[", "the quarantine cannot be read: JSONDecodeError"),
            ([{"key": "1"}], "the quarantine cannot be read: TypeError"),
            ([*whole, *whole], "the quarantine has 2 rows, the footer counts 1"),
            ([whole[0] | {"shard": "elsewhere"}], "1 rows of the quarantine are of another shard, the first of elsewhere"),
            ([whole[0] | {"index": 5}], "1 of the 10 samples are neither here nor in quarantine, the first is number 3"),
        ]
        for content, message in cases:
            sibling.write_text(content if isinstance(content, str) else json.dumps(content))
            report = verified(tmp_path / "out")
            assert any(finding.message.startswith(message) for finding in report.findings), (message, report.findings)
            assert {finding.shard[-5:] for finding in report.findings} == {"b.tar"}
        sibling.unlink()
        (finding,) = verified(tmp_path / "out").findings
        assert finding.kind == "quarantine"
        assert "there is no such file" in finding.message

    def test_a_shard_that_is_in_the_version_twice(self, folder: Path) -> None:
        dataset = pipeline.open_dataset(str(folder / "out"))
        entry = dataset.entries()[0]
        copy = partition.new_path(partition.identity_of(entry.path) or "")
        shutil.copy(folder / "out" / entry.path, folder / "out" / copy)
        store = Store()
        content = partition.read_footer(store, store.stat(f"{folder}/out/{copy}"))
        table = dataset.table_
        target = partition.Target(
            store=store,
            url=str(folder / "out"),
            recipe=Recipe(fields=dataset.recipe, widths=dataset.nodes),
            layout=Layout(fields=table.layout_fields),
            schema=dataset.schema,
        )
        table.commit(target, "again", [partition.partition_of(copy, entry.num_bytes, content)], [])
        (finding,) = verified(folder / "out").findings
        assert finding.kind == "shard"
        assert "a second partition of this shard" in finding.message

    def test_a_version_that_was_vacuumed(self, output: Path) -> None:
        table = Table.open(Store(), str(output))
        assert table is not None
        dataset = pipeline.open_dataset(str(output))
        target = partition.Target(
            store=Store(),
            url=str(output),
            recipe=Recipe(fields=dataset.recipe, widths=dataset.nodes),
            layout=Layout(fields=table.layout_fields),
            schema=dataset.schema,
        )
        gone = dataset.entries()[0]
        table.commit(target, "less", [], [gone])
        (output / gone.path).unlink()
        with pytest.raises(DatasetError, match="version 0 was vacuumed"):
            verify(pipeline.open_dataset(str(output), 0))
        assert verified(output).num_compared == 19


class TestRows:
    """Damage that only the rows show."""

    def test_a_value_that_was_changed(self, output: Path) -> None:
        path, size = partition_of(output, "b"), partition_of(output, "b").stat().st_size

        def change(values: dict[str, Any]) -> None:
            values["raw"][4, 7] += 0.01

        rewrite(path, change)
        while path.stat().st_size != size:  # a checksum takes four bytes or five
            rewrite(path, change)
        assert verified(output, rows=0).verdict == "", "the row is as good as any"
        (finding,) = verified(output).findings
        assert (finding.kind, finding.key, finding.shard[-5:]) == ("embedding", "00015", "b.tar")
        assert "raw differs from what its image gives by 0." in finding.message
        assert "allowed is 0.0001" in finding.message

    def test_two_rows_that_were_swapped(self, output: Path) -> None:
        def change(values: dict[str, Any]) -> None:
            for name in NODES:
                values[name][[1, 2]] = values[name][[2, 1]]

        rewrite(partition_of(output, "a"), change)
        assert {(finding.kind, finding.key) for finding in verified(output).findings} == {
            ("embedding", "00001"),
            ("embedding", "00002"),
        }

    @pytest.mark.parametrize("what", ["nan", "short", "long"])
    def test_an_embedding_that_is_none(self, output: Path, what: str) -> None:
        def change(values: dict[str, Any]) -> None:
            if what == "nan":
                values["raw"][3, 0] = np.nan
            else:
                values["unit"][3] *= 0.5 if what == "short" else 1.001

        rewrite(partition_of(output, "c"), change)
        (finding,) = verified(output, rows=0).findings
        column, message = ("raw", "raw is not finite") if what == "nan" else ("unit", "unit has not length 1")
        assert (finding.kind, finding.key, finding.message) == (column, "00023", f"{message}: 1 row")

    def test_embeddings_of_another_width(self, output: Path) -> None:
        path = partition_of(output, "c")
        file = pq.ParquetFile(path)
        table = file.read()
        rows = table.column("raw").to_pylist()
        rows[2] = rows[2][:-1]
        table = table.set_column(
            table.schema.get_field_index("raw"), table.schema.field("raw"), pa.array(rows, table.schema.field("raw").type)
        )
        handle = pa.BufferOutputStream()
        pq.write_table(table, handle, store_schema=False)
        expected = columns.Expected(
            shard=table.column("shard")[0].as_py(), nodes={"raw": 32}, normalized=(), rounded=False, num_read=10, quarantined=[]
        )
        (problem,) = columns.check(pa.BufferReader(handle.getvalue()), expected)
        assert (problem.column, problem.key, problem.message) == ("raw", "00022", "raw has not 32 values: 1 row")

    def test_values_that_are_not_rounded(self, tmp_path: Path) -> None:
        write_source(tmp_path / "source")
        changes = {"run__precision": "float16", "backbone__nodes": NODES}
        dataset = committed(settings(f"{tmp_path}/source/*.tar", tmp_path / "out", **changes))
        path = partition_of(tmp_path / "out", "a")

        def change(values: dict[str, Any]) -> None:
            values["raw"][5, 5] = np.nextafter(values["raw"][5, 5], np.float32(9))

        rewrite(path, change, rounded=True)
        found = verify(dataset)
        if "num_bytes" not in kinds(found):
            (finding,) = found.findings
            assert (finding.key, finding.message) == ("00005", "raw is not rounded to float16: 1 row")
        expected = columns.Expected(
            shard=dataset.entries()[0].shard, nodes={"raw": 32}, normalized=(), rounded=True, num_read=10, quarantined=[]
        )
        with open(path, "rb") as handle:
            assert [problem.key for problem in columns.check(handle, expected)] == ["00005"]

    def test_a_bit_that_fell_over(self, output: Path) -> None:
        path = partition_of(output, "a")
        content = bytearray(path.read_bytes())
        group = pq.read_metadata(path).row_group(0)
        column = next(each for each in map(group.column, range(group.num_columns)) if each.path_in_schema.startswith("raw."))
        content[column.data_page_offset + column.total_compressed_size - 3] ^= 1
        path.write_bytes(content)
        (finding,) = verified(output, rows=0).findings
        assert finding.kind == "unreadable"
        assert "its rows cannot be read: OSError" in finding.message
        assert "CRC" in finding.message
        (finding,) = verified(output, deep=False).findings
        assert finding.message.startswith("10 of its rows cannot be read: ")
        assert "CRC" in finding.message

    @pytest.mark.parametrize(
        ("column", "value", "message"),
        [
            ("key", "00004", "1 keys have more than one row"),
            ("shard", "file:///elsewhere.tar", "shard is not that of the log: 1 row"),
            ("index", 9, "index does not ascend: 1 row"),
            ("content_hash", "x" * 32, "content_hash is no digest: 1 row"),
            ("width", 0, "width is below 1: 1 row"),
            ("nbytes", None, "offset without nbytes: 1 row"),
        ],
    )
    def test_a_cell_that_was_changed(self, output: Path, column: str, value: Any, message: str) -> None:
        """The size of the file may tell; the rows tell more."""
        path = partition_of(output, "a")

        def change(values: dict[str, Any]) -> None:
            values[column][3] = value

        rewrite(path, change)
        entry = next(each for each in pipeline.open_dataset(str(output)).entries() if each.path.endswith(path.name))
        expected = columns.Expected(
            shard=entry.shard, nodes={"raw": 32, "unit": 32}, normalized={"unit"}, rounded=False, num_read=10, quarantined=[]
        )
        with open(path, "rb") as handle:
            problems = columns.check(handle, expected)
        assert message in {problem.message for problem in problems}
        assert verified(output, rows=0).verdict

    def test_rows_that_were_dropped(self, output: Path) -> None:
        def change(values: dict[str, Any]) -> None:
            for name in values:
                values[name] = values[name][:-2]

        rewrite(partition_of(output, "c"), change)
        report = verified(output)
        assert kinds(report) == {"num_bytes", "rows"}
        assert any(finding.message == "rows: the file has 8, the log 10" for finding in report.findings)

    def test_a_row_that_points_elsewhere_while_its_shard_is_unchanged(self, output: Path) -> None:
        def change(values: dict[str, Any]) -> None:
            values["offset"][6] += 512

        rewrite(partition_of(output, "a"), change)
        report = verified(output)
        assert report.unavailable == []
        finding = next(each for each in report.findings if each.kind == "image")
        assert finding.key == "00006"
        assert "the shard is unchanged, but not what the row says of its image" in finding.message

    def test_rows_that_lead_to_no_image_where_only_the_sample_is_read(self, output: Path) -> None:
        dataset = pipeline.open_dataset(str(output))
        entry = next(each for each in dataset.entries() if each.shard.endswith("a.tar"))
        table = pq.read_table(output / entry.path)
        for name, row, value in (("shard", 1, "file:///elsewhere.tar"), ("url", 2, None), ("nbytes", 5, None)):
            cells = table.column(name).to_pylist()
            cells[row] = value
            table = table.set_column(table.schema.get_field_index(name), name, pa.array(cells))
        pq.write_table(table, output / entry.path)
        entry = dataclasses.replace(entry, num_bytes=(output / entry.path).stat().st_size)
        report = verify(dataset, rows=0, deep=False)
        report.findings.clear()
        sample.compare(dataset, [(entry, 10)], Embedder(dataset.recipe).embed, 10, 0, report)
        assert [(finding.key, finding.kind, finding.message) for finding in report.findings] == [
            ("00001", "image", "the row says that it is of file:///elsewhere.tar"),
            ("00002", "image", "url is null"),
            ("00005", "image", "nbytes is null"),
        ]
        assert (report.num_compared, report.unavailable) == (7, [])

    def test_images_that_can_no_longer_be_embedded(self, sound: Path) -> None:
        dataset = pipeline.open_dataset(str(sound / "out"))
        embedder, refused = Embedder(dataset.recipe), {IMAGES[4], IMAGES[9]}

        def embed(images: Sequence[bytes]) -> tuple[dict[str, NDArray[np.float32]], dict[int, SampleError]]:
            return embedder.embed([b"" if image in refused else image for image in images])

        report = verify(dataset, embed, 1000)
        assert [(finding.kind, finding.key) for finding in report.findings] == [("image", "00004"), ("image", "00009")]
        assert report.findings[0].message == "its image can no longer be embedded: the image has zero bytes"
        assert report.num_compared == 27


class TestSource:
    """What the source did since is not the dataset's fault."""

    def test_a_shard_that_was_replaced_and_one_that_is_gone(self, folder: Path) -> None:
        (folder / "source" / "a.tar").write_bytes(tar_bytes(shard_members(noise(10, seed=3), 0)))
        (folder / "source" / "b.tar").unlink()
        report = verified(folder / "out")
        assert (report.verdict, report.findings, report.num_sampled, report.num_compared) == ("", [], 29, 10)
        reasons = {finding.shard[-5]: finding.message for finding in report.unavailable}
        assert "the source has changed since version 0" in reasons["a"]
        assert "there is no such file" in reasons["b"]

        (folder / "source" / "c.tar").unlink()
        report = verified(folder / "out")
        assert (report.findings, report.num_compared) == ([], 0)
        assert report.verdict.startswith("none of the 29 sampled rows could be compared")
        assert verified(folder / "out", rows=0).verdict == ""

    def test_a_shard_that_has_become_shorter_is_not_asked_for_again(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (folder / "source" / "a.tar").write_bytes(tar_bytes(shard_members(IMAGES[:2], 0)))
        monkeypatch.setattr("pipeline.storage.time.sleep", lambda seconds: pytest.fail("it waits"))
        report = verified(folder / "out")
        assert (report.verdict, report.num_compared, len(report.unavailable)) == ("", 21, 8)

    def test_a_compressed_archive(self, tmp_path: Path) -> None:
        (tmp_path / "a.tar.gz").write_bytes(gzip.compress(tar_bytes(shard_members(IMAGES[:3], 0))))
        report = verified(committed(settings(f"{tmp_path}/*.tar.gz", tmp_path / "out", source__format="webdataset")))
        assert (report.findings, report.num_compared, len(report.unavailable)) == ([], 0, 3)
        assert "lies in a compressed archive" in report.verdict

    def test_loose_files(self, tmp_path: Path) -> None:
        (tmp_path / "source").mkdir()
        for number, image in enumerate(IMAGES[:5]):
            (tmp_path / "source" / f"{number}.png").write_bytes(image)
        dataset = committed(settings(tmp_path / "source", tmp_path / "out", source__label=None))
        (tmp_path / "source" / "2.png").write_bytes(IMAGES[20])
        (tmp_path / "source" / "4.png").unlink()
        report = verified(dataset)
        assert (report.verdict, report.num_compared, [finding.key for finding in report.unavailable]) == (
            "",
            3,
            ["2.png", "4.png"],
        )


class TestSample:
    """Which rows are drawn, and how many are held."""

    def test_every_row_is_as_likely(self) -> None:
        counts = [100, 0, 7, 1]
        seen = [(number, row) for seed in range(400) for number, rows in draw(counts, 27, seed).items() for row in rows]
        times = np.unique(np.array([number * 1000 + row for number, row in seen]), return_counts=True)
        assert len(times[0]) == 108, "each was drawn"
        assert abs(times[1] - 100).max() < 50, "100 times, with a deviation of 8.7"

    def test_rows_are_drawn_once_and_no_more_than_there_are(self) -> None:
        assert draw([3, 2], 99, 0) == {0: [0, 1, 2], 1: [0, 1]}
        assert draw([], 5, 0) == draw([0, 0], 5, 0) == draw([5], 0, 0) == {}
        assert draw([1000], 20, 1) == draw([1000], 20, 1) != draw([1000], 20, 2)
        assert len(set(draw([10_000_000_000], 100, 0)[0])) == 100

    def test_rows_of_many_row_groups(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(partition, "MAX_ROWS_PER_GROUP", 7)
        monkeypatch.setattr(sample, "UNIT_ROWS", 4)
        (tmp_path / "a.tar").write_bytes(tar_bytes(shard_members(IMAGES, 0)))
        dataset = committed(settings(f"{tmp_path}/*.tar", tmp_path / "out"))
        assert pq.ParquetFile(dataset.files()[0].removeprefix("file://")).num_row_groups == 5
        report = verified(dataset)
        assert (report.verdict, report.num_compared) == ("", 30)
        (entry,) = dataset.entries()
        found = dataset.rows(entry, [0, 6, 7, 29], ["index", "key"])
        assert found.to_pydict() == {"index": [0, 6, 7, 29], "key": ["00000", "00006", "00007", "00029"]}


class TestCommand:
    """What a user sees."""

    def test_sound(self, sound: Path) -> None:
        spoken = cli("verify", sound / "out", "--rows", "5")
        assert spoken.returncode == 0, spoken.stderr
        assert "3, 29 rows, " in spoken.stdout
        assert "all as the log says" in spoken.stdout
        assert "5 of 5 rows embedded again" in spoken.stdout

    def test_damaged(self, output: Path) -> None:
        partition_of(output, "b").unlink()
        spoken = invoke("verify", output, "--rows", "0")
        assert spoken.returncode == 1
        assert "wrong       data/" in spoken.stdout
        assert "b.tar): the file is not there" in spoken.stdout
        assert spoken.stderr == f"error: {output}: 1 of 3 partitions are not what they should be\n"

    def test_what_only_the_source_has_lost(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (folder / "source" / "a.tar").unlink()
        (folder / "source" / "b.tar").unlink()
        spoken = invoke("verify", folder / "out")
        assert spoken.returncode == 0
        assert "10 of 29 rows embedded again" in spoken.stdout
        assert f"source      no image for 10 of them: file://{folder}/source/a.tar: there is no such file" in spoken.stdout
        monkeypatch.setattr("pipeline.cli.verify.MAX_SHOWN", 1)
        lines = invoke("verify", folder / "out").stdout.splitlines()
        assert "            and 1 more lines, which --json has" in lines
        assert not any("b.tar" in line for line in lines)

    def test_other_weights_than_those_of_the_recipe(self, tmp_path: Path) -> None:
        write_source(tmp_path / "source")
        weights = tmp_path / "w.safetensors"
        safetensors.torch.save_file(tiny().state_dict(), weights)
        committed(settings(f"{tmp_path}/source/*.tar", tmp_path / "out", backbone__weights=str(weights)))
        torch.manual_seed(7)
        safetensors.torch.save_file(tiny().state_dict(), weights)
        refused = invoke("verify", tmp_path / "out", "--json")
        assert refused.returncode == 2
        assert "Traceback" not in refused.stderr
        assert "differ in weights_digest: " in last_line(refused)["error"]
        weights.unlink()
        with pytest.raises(BackboneError, match=r"backbone\.weights: .*w\.safetensors: there is no such file"):
            verified(tmp_path / "out")
        assert invoke("verify", tmp_path / "out", "--rows", "0", "--json").returncode == 0
