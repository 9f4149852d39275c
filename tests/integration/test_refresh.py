"""The refresh of a bucket that changes, on a real S3 server: nothing twice, all or nothing."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bucket import Bucket
from conftest import noise, shard_members
from faults import FaultProxy, Request, Rule, hold, rewrite, status, swallow
from s3 import S3Server

import pipeline
from pipeline import config, driver
from pipeline.dataset.read import Dataset
from pipeline.errors import RemovalRefused, ShardChanged, SourceError, StorageError
from pipeline.storage import Store

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3.endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def bucket(s3: S3Server, proxy: FaultProxy) -> Bucket:
    """A bucket whose traffic goes through the proxy."""
    return Bucket(s3, proxy.endpoint_url)


def opened(bucket: Bucket, version: int | None = None) -> Dataset:
    return pipeline.open_dataset(bucket.output, version, config.Storage(**bucket.storage))


def numbers(summary: driver.Summary) -> tuple[int, int]:
    images = summary.as_json()["images"]
    return images["embedded"], images["carried_over"]


def is_commit(request: Request) -> bool:
    return request.method == "PUT" and "/_delta_log/" in request.path


def is_listing(request: Request) -> bool:
    return request.method == "GET" and "list-type=2" in request.query and "prefix=shards/" in request.query


def test_a_hundred_tars(bucket: Bucket, proxy: FaultProxy) -> None:
    """The whole life of a dataset, counted in requests to the store."""
    images = noise(5000)
    bucket.fill(images, 50)
    first = driver.run(bucket.config())
    assert numbers(first) == (5000, 0)

    proxy.clear()
    second = driver.run(bucket.config())
    assert (numbers(second), second.version, second.committed) == ((0, 0), 0, False)
    assert proxy.count("GET", contains="/shards/") == 0
    assert not [request for request in proxy.requests if is_commit(request)]

    images[1234] = noise(1, seed=1)[0]
    bucket.put("024", shard_members(images[1200:1250], 1200))
    proxy.clear()
    third = driver.run(bucket.config())
    assert (numbers(third), third.version) == ((1, 49), 1)
    assert {r.path.rpartition("/")[2] for r in proxy.requests if r.method == "GET" and r.path.endswith(".tar")} == {"024.tar"}
    before, after = opened(bucket, 0).to_numpy(), opened(bucket).to_numpy()
    assert np.flatnonzero(np.abs(before - after).max(axis=1)).tolist() == [1234]

    bucket.remove("007")
    fourth = driver.run(bucket.config())
    assert (numbers(fourth), fourth.version) == ((0, 0), 2)
    assert len(opened(bucket)) == 4950
    assert not {f"{number:05d}" for number in range(350, 400)} & set(opened(bucket).keys())
    assert len(opened(bucket, 1)) == 5000

    wider = bucket.config(backbone__nodes={"embedding": {"node": "flatten"}, "unit": {"node": "flatten", "normalize": "l2"}})
    _, todo = driver.make_plan(wider)
    assert len(todo.extract) == 99
    assert len(todo.reasons) == 1
    assert todo.reasons[0].startswith("recipe: nodes.unit: none -> ")
    fifth = driver.run(wider)
    assert (numbers(fifth), fifth.version) == ((4950, 0), 3)
    assert opened(bucket).nodes == {"embedding": 32, "unit": 32}
    assert opened(bucket, 2).nodes == {"embedding": 32}


def test_what_moves_is_not_computed_again(bucket: Bucket) -> None:
    images = noise(60)
    bucket.fill(images, 20)
    driver.run(bucket.config())

    bucket.fs.mv(f"{bucket.name}/shards/001.tar", f"{bucket.name}/shards/renamed.tar")
    assert numbers(driver.run(bucket.config())) == (0, 20)
    # Two samples of 002 go to a new shard; 002 itself is written anew without them.
    bucket.put("002", shard_members(images[42:60], 42))
    bucket.put("004", shard_members(images[40:42], 40))
    moved = driver.run(bucket.config())
    assert numbers(moved)[1] >= 18
    assert sum(numbers(moved)) == 20
    assert sorted(opened(bucket).keys()) == [f"{number:05d}" for number in range(60)]


def test_only_what_is_in_quarantine_is_tried_again(bucket: Bucket) -> None:
    images = noise(30)
    images[14] = noise(1, seed=1, side=64)[0]
    bucket.fill(images, 10)
    strict, lenient = bucket.config(source__max_pixels=1000), bucket.config()
    driver.run(strict)
    (refused,) = opened(bucket).quarantine()
    assert (refused.key, refused.error) == ("00014", "TooManyPixels")

    again = driver.run(strict, retry_quarantined=True)
    assert numbers(again) == (0, 9) and again.num_unchanged == 2
    assert [row.key for row in opened(bucket).quarantine()] == ["00014"]
    assert not driver.run(lenient).committed  # nothing changed that a refresh would notice
    healed = driver.run(lenient, retry_quarantined=True)
    assert numbers(healed) == (1, 9) and healed.num_unchanged == 2
    assert opened(bucket).quarantine() == [] and len(opened(bucket)) == 30
    assert not driver.run(lenient, retry_quarantined=True).committed


def test_a_label_alone_changes_rows_and_computes_nothing(bucket: Bucket) -> None:
    images = noise(20)
    bucket.fill(images, 20)
    driver.run(bucket.config())
    members = shard_members(images, 0)
    members["00003.cls"] = b"7"
    bucket.put("000", members)
    assert numbers(driver.run(bucket.config())) == (0, 20)
    labels = dict(zip(opened(bucket).keys(), opened(bucket).table(["label"]).column("label").to_pylist(), strict=True))
    assert labels["00003"] == 7
    assert numbers(driver.run(bucket.config(source__columns=["txt"]))) == (0, 20)
    assert numbers(driver.run(bucket.config(source__label=None, source__columns=["txt"]))) == (0, 20)
    assert "label" not in opened(bucket).schema.names


@pytest.mark.parametrize("lost", ["all", "half"])
def test_a_broken_listing_does_not_empty_the_dataset(bucket: Bucket, proxy: FaultProxy, lost: str) -> None:
    bucket.fill(noise(60), 10)
    driver.run(bucket.config())

    def shorten(page: bytes) -> bytes:
        head, *entries = page.split(b"<Contents>")
        tail = entries[-1].partition(b"</Contents>")[2]
        kept = [] if lost == "all" else [entry.partition(b"</Contents>")[0] + b"</Contents>" for entry in entries[::2]]
        return b"<Contents>".join([head, *kept]) + tail

    proxy.add(Rule(is_listing, rewrite(shorten)))
    with pytest.raises(SourceError if lost == "all" else RemovalRefused, match=r"no such file|50% of the dataset's rows"):
        driver.run(bucket.config())
    proxy.remove_rules()
    assert len(opened(bucket)) == 60
    assert opened(bucket).version == 0


def test_a_shrunken_source_can_be_allowed(bucket: Bucket) -> None:
    bucket.fill(noise(30), 10)
    driver.run(bucket.config())
    bucket.remove("001")
    with pytest.raises(RemovalRefused, match="--allow-removals"):
        driver.run(bucket.config())
    driver.run(bucket.config(), allow_removals=True)
    assert len(opened(bucket)) == 20


def test_a_shard_written_during_the_run_is_listed_again(bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.fill(noise(20), 10)
    fresh = noise(10, seed=1)

    def overwrite(request: Request) -> bool:
        if request.method == "GET" and request.path.endswith("/001.tar") and not written:
            written.append(request)
            bucket.put("001", shard_members(fresh, 10))
        return False

    written: list[Request] = []
    proxy.add(Rule(overwrite, status(503)))
    driver.run(bucket.config())
    assert written
    proxy.remove_rules()
    assert numbers(driver.run(bucket.config())) == (0, 0)
    assert len(opened(bucket)) == 20


def test_only_the_planned_version_is_read(bucket: Bucket) -> None:
    bucket.put("000", shard_members(noise(1), 0))
    store = Store(config.Storage(**bucket.storage))
    (listed,) = store.list(f"s3://{bucket.name}/shards/*.tar")
    bucket.put("000", shard_members(noise(1, seed=1), 0))
    with pytest.raises(ShardChanged, match="written anew"), store.open(listed) as file:
        file.read()


def test_a_lost_answer_to_the_commit_counts_once(bucket: Bucket, proxy: FaultProxy) -> None:
    images = noise(40)
    bucket.fill(images[:20], 10)
    proxy.add(Rule(is_commit, swallow, times=1))
    first = driver.run(bucket.config())
    assert (first.version, first.committed) == (0, True)
    bucket.fill(images, 10)
    bucket.put("000", shard_members(images[1:10], 1))
    proxy.add(Rule(is_commit, swallow, times=1))
    second = driver.run(bucket.config())
    assert (second.version, second.committed) == (1, True)
    assert sorted(opened(bucket).keys()) == [f"{number:05d}" for number in range(1, 40)]
    assert numbers(driver.run(bucket.config())) == (0, 0)


@pytest.mark.parametrize("held", ["A", "B"])
@pytest.mark.parametrize("number", range(int(os.environ.get("PIPELINE_RACE_ROUNDS", "1"))))
class TestRace:
    """Two runs at once: A's commit is held until B's has landed, and the other way round.

    `PIPELINE_RACE_ROUNDS=10` repeats it.
    """

    def test_first_versions(self, s3: S3Server, held: str, number: int) -> None:
        self.race(s3, held, prepare=lambda bucket: None)

    def test_refreshes(self, s3: S3Server, held: str, number: int) -> None:
        def prepare(bucket: Bucket) -> None:
            driver.run(bucket.config())
            images = noise(70)
            bucket.put("001", shard_members(noise(9, seed=5), 10))  # changed, and one sample fewer
            bucket.put("006", shard_members(images[60:70], 60))  # new
            bucket.remove("002")

        self.race(s3, held, prepare)

    def race(self, s3: S3Server, held: str, prepare: Callable[[Bucket], None]) -> None:
        with FaultProxy(s3.endpoint_url) as slow, FaultProxy(s3.endpoint_url) as free:
            bucket = Bucket(s3)
            bucket.fill(noise(60), 10)
            prepare(bucket)
            go = threading.Event()
            slow.add(Rule(is_commit, hold(go), times=1))
            through = {name: {**bucket.storage, "endpoint_url": (slow if name == held else free).endpoint_url} for name in "AB"}
            results: dict[str, Any] = {}

            def one(name: str) -> None:
                results[name] = driver.run(bucket.config(source__storage=through[name], output__storage=through[name]))

            other = "B" if held == "A" else "A"
            late = threading.Thread(target=one, args=(held,))
            late.start()
            try:
                _until(lambda: any(is_commit(request) for request in slow.requests))
                one(other)
            finally:
                go.set()
                late.join()
            expected = sorted(key for shard in bucket.fs.ls(f"{bucket.name}/shards") for key in _keys(bucket, shard))
            assert sorted(opened(bucket).keys()) == expected
            assert set(results) == {"A", "B"}
            assert results[other].committed
            assert not results[held].committed
            assert results[held].version == results[other].version
            assert numbers(driver.run(bucket.config())) == (0, 0)


def test_a_reader_during_a_run_sees_the_old_version(bucket: Bucket, proxy: FaultProxy) -> None:
    images = noise(30)
    bucket.fill(images[:20], 10)
    driver.run(bucket.config())
    bucket.fill(images, 10)
    go = threading.Event()
    proxy.add(Rule(is_commit, hold(go), times=1))
    run = threading.Thread(target=driver.run, args=(bucket.config(),))
    proxy.clear()
    run.start()
    try:
        _until(lambda: any(is_commit(request) for request in proxy.requests))
        reader = opened(bucket)
        assert (reader.version, len(reader)) == (0, 20)
    finally:
        go.set()
        run.join()
    assert len(reader.to_numpy()) == 20
    assert len(opened(bucket)) == 30


def test_a_store_that_is_down_for_a_moment(bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.fill(noise(40), 10)
    proxy.add(Rule(lambda request: "/shards/" in request.path or "/data/" in request.path, status(503), probability=0.3))
    driver.run(bucket.config())
    proxy.remove_rules()
    assert len(opened(bucket)) == 40


def test_a_store_that_stays_down_is_one_clear_line(bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.fill(noise(10), 10)
    proxy.add(Rule(is_listing, status(503)))
    with pytest.raises(StorageError, match=rf"s3://{bucket.name}/shards.*: ") as caught:
        driver.run(bucket.config())
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


def _keys(bucket: Bucket, shard: str) -> list[str]:
    import io
    import tarfile

    with tarfile.open(fileobj=io.BytesIO(bucket.fs.cat_file(shard))) as tar:
        return [Path(name).stem for name in tar.getnames() if name.endswith(".png")]


def _until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    import time

    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
