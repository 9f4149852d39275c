"""As many actors as there is work and room for: nodes that an autoscaler adds and takes away, and those that never come."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from bucket import Bucket
from commands import ROOT, TESTS, last_line, start
from conftest import noise, settings, write_shards
from faults import FaultProxy, Request, Rule, hold
from helpers import Autoscaled
from s3 import S3Server

import pipeline
from pipeline import config, driver
from pipeline.errors import IncompleteRun
from pipeline.extract import pool

NUM_SHARDS, PER_SHARD = 8, 10
GENEROUS_S = 90.0


def test_a_run_grows_with_its_cluster_and_lets_go_of_what_has_no_work(s3: S3Server, tmp_path: Path) -> None:
    """From no node to two, and back to one while the last shard is still being read."""
    others_may_go, last_may_go = threading.Event(), threading.Event()

    def is_read(request: Request) -> bool:
        return request.method == "GET" and request.path.endswith(".tar")

    with FaultProxy(s3.endpoint_url) as proxy, Autoscaled(tmp_path) as cluster:
        bucket = Bucket(s3, proxy.endpoint_url)
        bucket.fill(noise(NUM_SHARDS * PER_SHARD), PER_SHARD)
        proxy.add(Rule(lambda request: is_read(request) and request.path.endswith("000.tar"), hold(last_may_go)))
        proxy.add(Rule(is_read, hold(others_may_go)))
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(bucket.config(run__num_gpus=1).model_dump(mode="json")))
        assert cluster.num_nodes == 0
        process = start("run", path, "--json", env=cluster.env)
        try:
            until(lambda: cluster.num_nodes == 2 and proxy.count("GET", ".tar") >= 4)  # both actors read
            others_may_go.set()
            until(lambda: cluster.num_nodes == 1)
            assert process.poll() is None
            last_may_go.set()
            out, err = process.communicate(timeout=GENEROUS_S)
        finally:
            process.kill()
            others_may_go.set()
            last_may_go.set()
    report = last_line(subprocess.CompletedProcess([], process.returncode, out, err))
    assert process.returncode == 0, err
    assert report["actors_lost"] == 0
    assert len({actor["node"] for actor in report["actors"]}) == 2
    assert {actor["cuda_visible_devices"] for actor in report["actors"]} == {"0"}
    assert report["tail_s"] > pool.IDLE_S
    storage = config.Storage(**{**bucket.storage, "endpoint_url": s3.endpoint_url})
    assert sorted(pipeline.open_dataset(bucket.output, storage=storage).keys()) == [
        f"{number:05d}" for number in range(NUM_SHARDS * PER_SHARD)
    ]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + GENEROUS_S
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.2)


@pytest.mark.usefixtures("local_ray")
def test_gpus_that_never_come_end_the_run(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody waits for ever, and what is waited for is said long before that."""
    monkeypatch.setattr(pool, "PATIENCE_S", 0.5)
    monkeypatch.setattr(pool, "LOOK_S", 0.2)
    wanted = settings(f"{shards}/*.tar", tmp_path / "out", run__num_gpus=0.5, run__start_timeout_s=2)
    each = "4 actors of 0.5 GPU and 1 CPU each; the cluster has 0 GPUs and 2 CPUs free"
    with pytest.raises(IncompleteRun, match=rf"no actor has started in run\.start_timeout_s = 2: waiting for {each}"):
        driver.run(wanted)
    (said,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("waiting for")]
    assert said == f"waiting for {each}"


def test_two_actors_share_a_gpu(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", noise(400), 10)
    script = f"""
import json, ray, sys
sys.path.insert(0, {str(TESTS)!r})
from conftest import settings
from pipeline import driver
ray.init(address="local", num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False)
model = {{"model": "python/models:sleepy", "weights": "seed:0", "nodes": {{"embedding": {{"node": "pooled"}}}}}}
source, output = {f"{tmp_path}/shards/*.tar"!r}, {str(tmp_path / "out")!r}
print(json.dumps(driver.run(settings(source, output, backbone=model, run__num_gpus=0.5)).as_json()))
"""
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    actors = last_line(finished)["actors"]
    assert [actor["cuda_visible_devices"] for actor in actors] == ["0", "0"]
    assert len({actor["pid"] for actor in actors}) == 2
    assert [actor["threads"] for actor in actors] == [2, 2]
    assert len(pipeline.open_dataset(str(tmp_path / "out"))) == 400
