"""Rows and images back from datasets that real runs made."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bucket import Bucket
from conftest import noise, settings, shard_members, tar_bytes
from datasets import write_dataset
from faults import FaultProxy
from hostile_containers import page_of_huge_length
from meter import metered
from quick import committed
from s3 import S3Server

import pipeline
from pipeline import driver
from pipeline.config import Storage
from pipeline.dataset.groups import GROUPS_AHEAD, RowGroup
from pipeline.errors import DatasetError, SourceChanged, StorageRefused
from pipeline.storage import Store

ROWS_ND = np.random.default_rng(0).standard_normal((1000, 8)).astype(np.float32)
WIDE = {"model": "torchvision/resnet18", "weights": "seed:0", "nodes": {"embedding": {"node": "flatten"}}}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, shards: Path, local_ray: None) -> str:
    """The 60 photographs, in two versions: the second lacks the last shard."""
    output = tmp_path_factory.mktemp("output") / "out"
    driver.run(settings(f"{shards}/*.tar", output))
    first = [f"{shards}/00{number}.tar" for number in range(3)]
    driver.run(settings("", output, source__url=first, run__max_removed=0.5))
    return str(output)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> tuple[Path, list[bytes]]:
    """60 images in Parquet files of row groups of 20, plain and as a struct, with a second picture beside each; the folder."""
    folder = tmp_path_factory.mktemp("parquet")
    images = noise(60)
    keys = [f"key {number:02d}" for number in range(60)]
    previews = [image[:30] for image in images]
    (folder / "plain").mkdir()
    (folder / "struct").mkdir()
    plain = pa.table({"preview": previews, "image": images, "name": keys, "weight": np.arange(60.0)})
    pq.write_table(plain, folder / "plain" / "a.parquet", row_group_size=20)
    struct = pa.table({"preview": previews, "image": [{"bytes": image, "path": "x.png"} for image in images], "name": keys})
    pq.write_table(struct, folder / "struct" / "a.parquet", row_group_size=20)
    return folder, images


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Every ranged read of this process, as URL, start and number of bytes."""
    seen: list[tuple[str, int, int]] = []
    read_range = Store.read_range

    def recording(self: Store, url: str, start: int, num_bytes: int) -> bytes:
        seen.append((url, start, num_bytes))
        return read_range(self, url, start, num_bytes)

    monkeypatch.setattr(Store, "read_range", recording)
    return seen


class TestRows:
    """Arrays, tables and batches of one version."""

    def test_arrays_follow_the_order_of_the_table(self, output: str) -> None:
        dataset = pipeline.open_dataset(output, 0)
        table = dataset.table()
        embeddings = dataset.to_numpy()
        assert (embeddings.shape, embeddings.dtype, embeddings.flags.c_contiguous) == ((60, 32), np.float32, True)
        assert np.array_equal(embeddings, np.array(table.column("embedding").to_pylist(), np.float32))
        assert dataset.keys() == table.column("key").to_pylist() == [f"{number:05d}" for number in range(60)]
        assert table.schema.names == dataset.schema.names

    def test_batches_are_the_table_in_pieces(self, output: str) -> None:
        dataset = pipeline.open_dataset(output, 0)
        batches = list(dataset.iter_batches(batch_size=4))
        assert [batch.num_rows for batch in batches] == [4, 4, 4, 3] * 4
        assert pa.Table.from_batches(batches).cast(dataset.table().schema).equals(dataset.table())
        two = next(dataset.iter_batches(["width", "key"]))
        assert two.schema.names == ["width", "key"], "in the order asked for"

    def test_batches_of_row_groups_are_read_no_further_ahead_than_stated(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dataset = write_dataset(tmp_path, ROWS_ND, rows_per_shard=300, rows_per_group=50)
        read = []
        read_group = RowGroup.read
        monkeypatch.setattr(RowGroup, "read", lambda self, columns: read.append(self.start) or read_group(self, columns))
        for number, batch in enumerate(dataset.iter_batches(["key"]), 1):
            assert batch.column("key")[0].as_py() == f"{50 * (number - 1):05d}"
            assert len(read) <= number + GROUPS_AHEAD
        assert sorted(read) == list(range(0, 1000, 50))

    def test_single_rows_in_the_order_asked_for(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        dataset = write_dataset(tmp_path, ROWS_ND, rows_per_shard=300, rows_per_group=50)
        read = []
        read_group = RowGroup.read
        monkeypatch.setattr(RowGroup, "read", lambda self, columns: read.append(self.start) or read_group(self, columns))
        positions = [999, 3, 310, 3, 4]
        rows = dataset.take(positions)
        assert rows.column("key").to_pylist() == [f"{position:05d}" for position in positions]
        assert np.array_equal(np.array(rows.column("embedding").to_pylist(), np.float32), ROWS_ND[positions])
        assert sorted(read) == [0, 300, 950]
        assert dataset.take([], ["key"]).num_rows == 0
        for wrong in (-1, 1000):
            with pytest.raises(DatasetError, match=rf"positions .*{wrong}.* are not all in 0 to 999"):
                dataset.take([5, wrong])

    def test_rows_by_their_keys(self, tmp_path: Path) -> None:
        dataset = write_dataset(tmp_path, ROWS_ND, list(range(1000)), rows_per_shard=300, rows_per_group=50)
        rows = dataset.find(["00700", "00003", "00700"], columns=["embedding", "label"])
        assert rows.schema.names == ["embedding", "label"]
        assert rows.column("label").to_pylist() == [700, 3, 700]
        assert np.array_equal(np.array(rows.column("embedding").to_pylist(), np.float32), ROWS_ND[[700, 3, 700]])
        with pytest.raises(DatasetError, match="version 0 has no key '01000'"):
            dataset.find(["00003", "01000"])

    def test_an_older_version_stays_as_it_was(self, output: str) -> None:
        assert len(pipeline.open_dataset(output)) == 45
        old = pipeline.open_dataset(output, 0)
        assert (old.version, len(old), len(old.keys())) == (0, 60, 60)

    def test_wrong_names(self, output: str, tmp_path: Path) -> None:
        dataset = pipeline.open_dataset(output)
        for wrong in (lambda: dataset.table(["labell"]), lambda: next(dataset.iter_batches(["labell"]))):
            with pytest.raises(DatasetError, match=r"no column 'labell'; did you mean label"):
                wrong()
        with pytest.raises(DatasetError, match="no embedding column 'x'; it has embedding"):
            dataset.to_numpy("x")
        with pytest.raises(DatasetError, match="no dataset yet"):
            pipeline.open_dataset(str(tmp_path))


class TestImages:
    """The encoded bytes of a sample."""

    def test_one_ranged_read_gets_the_bytes(
        self, output: str, photographs: list[bytes], shards: Path, reads: list[tuple[str, int, int]]
    ) -> None:
        dataset = pipeline.open_dataset(output, 0)
        for number in (0, 17, 59):
            reads.clear()
            assert dataset.image(f"{number:05d}") == photographs[number]
            of_source = [read for read in reads if read[0].endswith(".tar")]
            assert of_source == [(f"file://{shards}/{number // 15:03d}.tar", of_source[0][1], len(photographs[number]))]

    def test_a_key_that_is_not_there(self, output: str, shards: Path) -> None:
        dataset = pipeline.open_dataset(output)
        with pytest.raises(DatasetError, match=r"version 1 has no key '00059'; its keys are such as '000"):
            dataset.image("00059")
        with pytest.raises(DatasetError, match=r"no key '00000' in file://.*001.tar"):
            dataset.image("00000", shard=f"file://{shards}/001.tar")
        with pytest.raises(DatasetError, match=r"version 1 has no shard '.*003.tar'; did you mean"):
            dataset.image("00059", shard=f"file://{shards}/003.tar")

    def test_the_shard_decides_between_equal_keys_and_changes_are_noticed(
        self, tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        images = noise(2)
        (tmp_path / "shards").mkdir()
        for name, image in zip("ab", images, strict=True):
            (tmp_path / "shards" / f"{name}.tar").write_bytes(tar_bytes(shard_members([image], 0)))
        driver.run(settings(f"{tmp_path}/shards/*.tar", tmp_path / "out"))
        dataset = pipeline.open_dataset(str(tmp_path / "out"))
        shard = f"file://{tmp_path}/shards/b.tar"
        with pytest.raises(DatasetError, match=r"2 shards have a key '00000'.*shard=.*a\.tar, file://.*b\.tar"):
            dataset.image("00000")
        assert dataset.image("00000", shard=shard) == images[1]

        tar = tmp_path / "shards" / "b.tar"
        tar.write_bytes(tar_bytes(shard_members(noise(1, seed=5), 0)))
        with pytest.raises(DatasetError, match="source has changed since version 0"):
            dataset.image("00000", shard=shard)
        monkeypatch.setattr("pipeline.storage.time.sleep", lambda seconds: None)
        tar.write_bytes(b"short")
        with pytest.raises(DatasetError, match="source has changed since version 0"):
            dataset.image("00000", shard=shard)
        tar.unlink()
        with pytest.raises(StorageRefused, match=r"b\.tar: there is no such file"):
            dataset.image("00000", shard=shard)

    @pytest.mark.parametrize("form", ["plain", "struct"])
    def test_a_parquet_source_gives_the_cell(self, form: str, parquet: tuple[Path, list[bytes]], tmp_path: Path) -> None:
        folder, images = parquet
        columns = {"source__label": None, "source__key": "name", "source__image": "image"}
        driver.run(settings(f"{folder}/{form}/*.parquet", tmp_path / "out", **columns))
        dataset = pipeline.open_dataset(str(tmp_path / "out"))
        for number in (0, 19, 20, 59):
            assert dataset.image(f"key {number:02d}") == images[number]

        source = folder / form / "a.parquet"
        whole = source.read_bytes()
        for other in (pq.read_table(source).slice(0, 30), pq.read_table(source).take(list(range(59, -1, -1)))):
            pq.write_table(other, source, row_group_size=20)
            with pytest.raises(DatasetError, match=r"a\.parquet: the source has changed"):
                dataset.image("key 59")
        source.write_bytes(b"no longer Parquet")
        with pytest.raises(DatasetError, match=r"a\.parquet: the source has changed"):
            dataset.image("key 59")
        source.write_bytes(whole)
        assert dataset.image("key 59") == images[59]

    def test_a_damaged_parquet_source_takes_no_memory(self, tmp_path: Path) -> None:
        source = tmp_path / "a.parquet"
        columns = {"image": noise(1), "preview": [b"a"]}
        pq.write_table(pa.table(columns), source)
        dataset = committed(settings(source, tmp_path / "out", source__label=None, source__image="image"))
        assert dataset.image("0") == columns["image"][0]
        source.write_bytes(page_of_huge_length(columns))
        with metered() as meter:
            with pytest.raises(SourceChanged, match=r"a\.parquet: the source has changed since version 0: '0' has another"):
                dataset.image("0")
            _, num_bytes = meter()
        assert num_bytes < 32 << 20

    def test_a_compressed_archive_has_no_ranges(self, tmp_path: Path, local_ray: None) -> None:
        (tmp_path / "a.tar.gz").write_bytes(gzip.compress(tar_bytes(shard_members(noise(1), 0))))
        driver.run(settings(f"{tmp_path}/*.tar.gz", tmp_path / "out", source__format="webdataset"))
        with pytest.raises(DatasetError, match=r"a\.tar\.gz: .*'00000' lies in a compressed archive"):
            pipeline.open_dataset(str(tmp_path / "out")).image("00000")

    def test_finding_a_key_reads_no_embeddings(self, s3: S3Server, local_ray: None, reads: list[tuple[str, int, int]]) -> None:
        images = noise(300)
        bucket = Bucket(s3)
        bucket.fill(images, 150)
        driver.run(bucket.config(backbone=WIDE))
        dataset = pipeline.open_dataset(bucket.output, storage=Storage(**bucket.storage))
        reads.clear()
        assert dataset.image("00160") == images[160]
        by_file = {file: sum(size for url, _, size in reads if url == file) for file in dataset.files()}
        assert min(entry.num_bytes for entry in dataset.entries()) > 300_000, "150 rows of 512 float32"
        # The footer comes with the 64 KiB at the end of the file.
        assert max(by_file.values()) < (64 << 10) + 20_000
        assert min(by_file.values()) == 64 << 10, "the statistics of the other partition rule its rows out"

    def test_from_a_real_store_with_settings_of_its_own(self, s3: S3Server, tmp_path: Path, local_ray: None) -> None:
        images = noise(20)
        bucket = Bucket(s3)
        bucket.fill(images, 10)
        driver.run(bucket.config(output__url=str(tmp_path / "out"), output__storage={}))
        with FaultProxy(s3.endpoint_url) as proxy:
            storage = Storage(**(bucket.storage | {"endpoint_url": proxy.endpoint_url}))
            dataset = pipeline.open_dataset(str(tmp_path / "out"), source_storage=storage)
            assert dataset.image("00013") == images[13]
            (request,) = proxy.requests
            assert (request.method, request.path) == ("GET", f"/{bucket.name}/shards/001.tar")
            assert (request.num_bytes, request.headers["range"][:6]) == (len(images[13]), "bytes=")

    def test_from_a_dataset_in_a_real_store(self, s3: S3Server, local_ray: None) -> None:
        images = noise(20)
        bucket = Bucket(s3)
        bucket.fill(images, 10)
        driver.run(bucket.config())
        dataset = pipeline.open_dataset(bucket.output, storage=Storage(**bucket.storage))
        assert [dataset.image(f"{number:05d}") for number in (0, 10, 19)] == [images[0], images[10], images[19]]
        assert dataset.to_numpy().shape == (20, 32)
