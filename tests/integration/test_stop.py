"""A run on this machine that is told to stop. On a cluster: `test_submit.py`."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from bucket import Bucket
from commands import start
from conftest import noise
from faults import FaultProxy, Request, Rule, hold
from s3 import S3Server

import pipeline
from pipeline import config, driver, runs, stopping
from pipeline.storage import Store

NUM_SHARDS, NUM_FREE = 12, 3


def test_what_was_finished_is_kept_and_a_second_signal_ends_it_at_once(s3: S3Server, tmp_path: Path) -> None:
    with FaultProxy(s3.endpoint_url) as proxy:
        bucket = Bucket(s3, proxy.endpoint_url)
        bucket.fill(noise(NUM_SHARDS * 2), 2)
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(bucket.config().model_dump(mode="json")))
        # All shards are of one size, so they are read in order: the first few, and then none.
        proxy.add(Rule(lambda request: is_read(request) and shard(request) >= NUM_FREE, hold(threading.Event())))

        process = start("run", path, "--json")
        family = stop(process, lambda: partitions(bucket) == NUM_FREE)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 1, err
        report = json.loads(out.splitlines()[-1])
        num_known = report["shards"]["extracted"]  # of the last ones the driver may not have heard yet
        said = f"stopped; {num_known} finished shards wait for the next run, which adopts them; nothing was committed"
        assert err.splitlines()[-1] == f"error: {said}"
        assert (report["error"], report["committed"], report["version"]) == (said, False, None)
        (saved,) = runs.latest(Store(config.Storage(**bucket.storage)), bucket.output)
        assert saved["error"] == said
        assert not psutil.wait_procs(family, timeout=30)[1], "the Ray that it started ends with it"

        # The next one adopts them. It is stopped too, and its last word, run.json, never gets through.
        proxy.add(Rule(lambda request: request.method == "PUT" and request.path.endswith("/run.json"), hold(threading.Event())))
        proxy.clear()
        process = start("run", path, "--json")
        stop(process, lambda: proxy.count("GET", ".tar") > 0)
        until(lambda: proxy.count("PUT", "/run.json") > 0)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
        assert process.returncode == -signal.SIGTERM
        assert f"Plan: {NUM_SHARDS - NUM_FREE} shards to extract" in err and f"{NUM_FREE} to adopt" in err
        assert f"stopped; {NUM_FREE} finished shards" in err, "said at once, before anything could hang"
        assert partitions(bucket) == NUM_FREE


@pytest.mark.usefixtures("local_ray")
def test_a_commit_that_has_begun_is_finished_and_told_of(s3: S3Server) -> None:
    with FaultProxy(s3.endpoint_url) as proxy:
        bucket, go = Bucket(s3, proxy.endpoint_url), threading.Event()
        bucket.fill(noise(2), 2)
        proxy.add(Rule(is_commit, hold(go), times=1))

        def strike() -> None:
            until(lambda: any(is_commit(request) for request in proxy.requests))
            os.kill(os.getpid(), signal.SIGTERM)
            go.set()

        thread = threading.Thread(target=strike)
        thread.start()
        with stopping.stoppable(), pytest.raises(KeyboardInterrupt) as stopped:
            driver.run(bucket.config())
        thread.join()
        summary = stopped.value.summary  # type: ignore[attr-defined]
        assert (summary.committed, summary.version) == (True, 0)
        assert summary.error == "stopped after version 0 was committed"
        assert len(pipeline.open_dataset(bucket.output, storage=config.Storage(**bucket.storage))) == 2


def is_commit(request: Request) -> bool:
    return request.method == "PUT" and "/_delta_log/" in request.path


def is_read(request: Request) -> bool:
    return request.method == "GET" and request.path.endswith(".tar")


def shard(request: Request) -> int:
    return int(request.path[-7:-4])


def partitions(bucket: Bucket) -> int:
    return len(bucket.fs.find(f"{bucket.name}/out/data"))


def stop(process: Any, when: Callable[[], bool]) -> list[psutil.Process]:
    """SIGTERM to the driver alone; all processes that it had started."""
    until(lambda: when() or process.poll() is not None)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    return family


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
