"""SIGKILL at points spread over a run, and what stands after the next run.

One point by default, since `test_chaos.py` has more. `PIPELINE_KILL_POINTS=20 pytest tests/chaos/test_kills.py` tries twenty.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from bucket import Bucket
from commands import cli, last_line, start
from conftest import noise
from faults import FaultProxy, Request, Rule, delay
from s3 import S3Server

import pipeline
from pipeline import config
from pipeline.dataset.partition import identity_of
from pipeline.dataset.read import Dataset

NUM_POINTS = int(os.environ.get("PIPELINE_KILL_POINTS", "1"))
VICTIMS = ("driver", "store", "actor", "driver")
NUM_SHARDS, PER_SHARD = 12, 10


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server of this module's own: it is killed."""
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="module")
def calm(server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, int]:
    """The rows of an undisturbed run, and how many requests it made."""
    with FaultProxy(server.endpoint_url) as proxy:
        bucket = filled(server, proxy)
        proxy.clear()
        assert cli("run", written(bucket, tmp_path_factory.mktemp("calm")), "--json").returncode == 0
        return opened(bucket, server), len(proxy.requests)


@pytest.mark.parametrize("point", range(NUM_POINTS))
def test_a_kill_loses_nothing(server: S3Server, calm: tuple[Dataset, int], tmp_path: Path, point: int) -> None:
    expected, num_requests = calm
    victim = VICTIMS[point % len(VICTIMS)]
    at = max(2, int(num_requests * (point + 0.5) / NUM_POINTS))
    with FaultProxy(server.endpoint_url) as proxy:
        bucket = filled(server, proxy)
        path = written(bucket, tmp_path)
        proxy.clear()
        reached = threading.Event()

        def arrived(request: Request) -> bool:
            if proxy.count() >= at:
                reached.set()
            return True

        proxy.add(Rule(arrived, delay(0.02)))  # slow enough for the kill to land near its point
        process = start("run", path, "--json")
        try:
            assert reached.wait(120), process.communicate()
            family = psutil.Process(process.pid).children(recursive=True)
            strike(victim, process.pid, server)
            process.communicate(timeout=120)
            # Actors outlive their driver by a moment, in which they may still finish a partition.
            psutil.wait_procs(family, timeout=60)
        finally:
            process.kill()
        proxy.remove_rules()

        committed = bucket.fs.exists(f"{bucket.name}/out/_delta_log/00000000000000000000.json")
        waiting = {identity_of(path) for path in bucket.fs.find(f"{bucket.name}/out/data") if path.endswith(".parquet")}
        again = cli("run", path, "--json")
        report = last_line(again)
        assert again.returncode == 0, (again.stderr, report)
        assert report["shards"]["adopted"] == (0 if committed else len(waiting))
        assert report["shards"]["extracted"] == (0 if committed else NUM_SHARDS - len(waiting))
        same_rows(opened(bucket, server), expected)


def filled(server: S3Server, proxy: FaultProxy) -> Bucket:
    bucket = Bucket(server, proxy.endpoint_url)
    bucket.fill(noise(NUM_SHARDS * PER_SHARD), PER_SHARD)
    return bucket


def written(bucket: Bucket, folder: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(bucket.config().model_dump(mode="json")))
    return path


def opened(bucket: Bucket, server: S3Server) -> Dataset:
    options: dict[str, Any] = {**bucket.storage, "endpoint_url": server.endpoint_url}
    return pipeline.open_dataset(bucket.output, storage=config.Storage(**options))


def strike(victim: str, driver: int, server: S3Server) -> None:
    """Kill one process, by its id, that this test started."""
    if victim == "driver":
        psutil.Process(driver).kill()
    elif victim == "store":
        server.kill()
        time.sleep(1.0)
        server.restart()
    else:
        # The point may lie before the actor's start or after its end: then there is nothing to kill.
        for process in psutil.Process(driver).children(recursive=True):
            if process.name().startswith("ray::Extractor"):
                process.kill()


def same_rows(found: Dataset, expected: Dataset) -> None:
    """Promise 1: embeddings within the tolerance, all else identical but for the bucket's name."""
    names = ["key", "label", "index", "offset", "nbytes", "content_hash", "width", "height"]
    assert found.table(names).to_pylist() == expected.table(names).to_pylist()
    limit = 1e-4 * np.abs(expected.to_numpy()).max()
    assert np.abs(found.to_numpy() - expected.to_numpy()).max() <= limit
