"""`pipeline submit` on a cluster of three Ray nodes on this machine, with token authentication, and a real S3 server.

The head has neither CPUs nor GPUs, each of the others has two GPUs, which exist in Ray's books only: what is pinned to which
one can be seen. Only the nodes have the store's credentials. Reads of shards go through a gate, so that a test can wait until
all actors are at work.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from bucket import Bucket
from commands import cli, last_line, start
from conftest import noise, settings, shard_members, tar_bytes
from faults import FaultProxy, Request, Rule, hold
from helpers import Cluster
from oracle import Contents, broken_promises, contents, difference
from s3 import S3Server, free_ports

import pipeline
from pipeline import config, driver, runs
from pipeline.dataset.read import Dataset
from pipeline.storage import Store

NUM_SHARDS, PER_SHARD = 20, 3
LARGE = ("001", "005", "009")
"""Larger than the others, so these are extracted first."""
LATER = ("020", "021", "022", "023", "024", "025", "026", "027")
"""Shards that come before the refresh."""
FETCHERS = 2
"""Shards that one actor reads at once."""
TIMEOUT_S = 120


class Site:
    """The cluster, and how to submit to it."""

    def __init__(self, cluster: Cluster, dashboard: int) -> None:
        self.cluster, self.dashboard, self.address = cluster, dashboard, f"http://127.0.0.1:{dashboard}"
        self.env = {"RAY_AUTH_TOKEN_PATH": str(cluster.token_path), "RAY_ADDRESS": self.address}
        self._started: list[subprocess.Popen[str]] = []

    def submit(self, path: Path, *options: str) -> subprocess.Popen[str]:
        """Submit, with a report at the end."""
        self._started.append(start("submit", path, "--json", *options, env=self.env))
        return self._started[-1]

    def close(self) -> None:
        """End what a test that failed has left behind."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
                process.communicate()

    def stop(self, job: str) -> None:
        """`ray job stop`."""
        env = {**os.environ, **self.env, "RAY_AUTH_MODE": "token"}
        command = [f"{sysconfig.get_path('scripts')}/ray", "job", "stop", "--no-wait", job]
        subprocess.run(command, env=env, check=True, capture_output=True, timeout=TIMEOUT_S)


class Forwarder:
    """A forwarded port, as `kubectl port-forward` makes it, that can break."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._sockets += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while block := source.recv(65536):
                sink.sendall(block)
            sink.shutdown(socket.SHUT_WR)

    def cut(self) -> int:
        """Break all connections that there are; how many were open."""
        broken, self._sockets = self._sockets, []
        for each in broken:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        return len(broken)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()


class Gate:
    """Holds reads of shards back, but for those that it lets through."""

    def __init__(self, proxy: FaultProxy, free: tuple[str, ...] = ()) -> None:
        self._open = threading.Event()
        self._proxy = proxy
        self._free = free
        proxy.add(Rule(self._is_held, hold(self._open)))

    def _is_held(self, request: Request) -> bool:
        is_read = request.method == "GET" and request.path.endswith(".tar")
        return is_read and request.path[-7:-4] not in self._free

    def wait_for(self, num_reads: int) -> None:
        """Until so many reads have come."""
        until(lambda: sum(self._is_held(each) for each in self._proxy.requests) >= num_reads)

    def open(self) -> None:
        self._open.set()
        self._proxy.remove_rules()


@pytest.fixture(scope="module")
def site(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    dashboard, agent = free_ports(2)
    env = {
        "PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}",
        "AWS_ACCESS_KEY_ID": s3.access_key,
        "AWS_SECRET_ACCESS_KEY": s3.secret_key,
        "RAY_JOB_STOP_WAIT_TIME_S": "60",  # as in the manifests: a busy machine may take more than Ray's 3 s
    }
    arguments = ["--cpus=2", "--gpus=2", f"--dashboard={dashboard}", f"--agent={agent}"]
    with Cluster(tmp_path_factory.mktemp("cluster"), env, arguments) as cluster:
        site = Site(cluster, dashboard)
        yield site
        site.close()


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3.endpoint_url) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def bucket(s3: S3Server) -> Bucket:
    """A bucket with a dataset that the tests bring forward, one after the other."""
    return filled(s3)


@pytest.fixture(scope="module")
def expected(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Contents:
    """What a run on this machine makes of all shards, those that come later too."""
    folder = tmp_path_factory.mktemp("local")
    (folder / "shards").mkdir()
    for name, members in all_shards().items():
        (folder / "shards" / f"{name}.tar").write_bytes(tar_bytes(members))
    driver.run(settings(f"{folder}/shards/*.tar", folder / "out"))
    return contents(pipeline.open_dataset(str(folder / "out")))


def test_four_actors_on_four_gpus(site: Site, bucket: Bucket, proxy: FaultProxy, expected: Contents, tmp_path: Path) -> None:
    gate = Gate(proxy)
    process = site.submit(written(bucket, proxy, tmp_path))
    gate.wait_for(4 * FETCHERS)
    gate.open()
    report, log = ended(process, 0)

    assert (report["status"], report["exit_code"]) == ("SUCCEEDED", 0)
    assert report["run"]["shards"]["extracted"] == NUM_SHARDS
    (saved,) = runs.latest(store(bucket), bucket.output)
    assert saved["run_id"] == report["run"]["run_id"]
    places = {(actor["node"], actor["cuda_visible_devices"]) for actor in saved["actors"]}
    assert len(places) == len(saved["actors"]) == 4
    assert {gpu for _, gpu in places} == {"0", "1"}
    assert len({node for node, _ in places}) == 2
    # Nobody watches: no bar and no line a shard, but lines with the run's name.
    lines = [line for line in log.splitlines() if saved["run_id"] in line and " of 20 shards" in line]
    assert 1 <= len(lines) <= 3
    assert f"ray job submit --address {site.address} --working-dir {tmp_path} -- python -m pipeline run" in log
    same_rows(bucket, expected)


def test_a_job_that_is_stopped_and_a_node_that_dies_cost_nothing(
    site: Site, s3: S3Server, proxy: FaultProxy, expected: Contents, tmp_path: Path
) -> None:
    bucket = filled(s3)
    path = written(bucket, proxy, tmp_path)
    gate = Gate(proxy, free=LARGE)
    process = site.submit(path, "--submission-id", "stopped", "--set", "run.workers=1")
    until(lambda: partitions(bucket) >= len(LARGE))
    site.stop("stopped")
    report, log = ended(process, 1)
    assert report["status"] == "STOPPED"
    num_finished = partitions(bucket)
    assert f"stopped; {num_finished} finished shards wait for the next run, which adopts them; nothing was committed" in log
    (saved,) = runs.latest(store(bucket), bucket.output)
    assert saved["error"].startswith("stopped; ") and saved["version"] is None

    proxy.clear()
    process = site.submit(path)
    gate.wait_for(4 * FETCHERS)
    site.cluster.kill_node()
    site.cluster.add_node()
    gate.wait_for(4 * FETCHERS + 2)
    gate.open()
    report, log = ended(process, 0)
    assert report["run"]["shards"]["adopted"] == num_finished >= len(LARGE)
    assert report["run"]["shards"]["extracted"] == NUM_SHARDS - num_finished
    # Those of the node, and whatever was sent there while nobody knew that it is dead.
    assert report["run"]["actors_lost"] >= 2
    at_work = {actor["node"] for actor in report["run"]["actors"] if actor["first_batch_at"] is not None}
    assert len({actor["node"] for actor in report["run"]["actors"]}) == 3, "the node that died, the other, and the new one"
    assert len(at_work) == 2
    same_rows(bucket, expected)


def test_two_refreshes_at_once_double_no_row_and_a_broken_connection_is_made_anew(
    site: Site, bucket: Bucket, proxy: FaultProxy, expected: Contents, tmp_path: Path
) -> None:
    for name in LATER:
        bucket.put(name, all_shards()[name])
    bucket.remove("000")
    path = written(bucket, proxy, tmp_path)
    gate = Gate(proxy)
    forwarder = Forwarder(site.dashboard)
    first = site.submit(path, "--set", "run.workers=1")
    second = site.submit(path, "--set", "run.workers=1", "--address", forwarder.address)
    gate.wait_for(2 * FETCHERS)
    assert forwarder.cut()
    gate.open()
    (one, _), (other, log) = ended(first, 0), ended(second, 0)
    forwarder.close()
    reports = [one["run"], other["run"]]
    assert sorted(report["committed"] for report in reports) == [False, True]
    assert [report["images"]["total"] for report in reports] == [(NUM_SHARDS - 1 + len(LATER)) * PER_SHARD] * 2
    same_rows(bucket, {name: shard for name, shard in expected.items() if name != "000"}, LATER)
    lines = log.splitlines()
    assert len(set(lines)) == len(lines), "no line twice"
    assert sum(f" Plan: {len(LATER)} shards to extract" in line for line in lines) == 1


def test_a_run_that_fails_gives_its_exit_code(site: Site, bucket: Bucket, proxy: FaultProxy, tmp_path: Path) -> None:
    path = written(bucket, proxy, tmp_path, backbone__model="torchvision/resnet17")
    report, log = ended(site.submit(path), 2)
    assert (report["status"], report["exit_code"]) == ("FAILED", 2)
    assert "error: backbone.model: " in log and "Traceback" not in log


def test_without_a_token_it_is_refused(site: Site, bucket: Bucket, proxy: FaultProxy, tmp_path: Path) -> None:
    path = written(bucket, proxy, tmp_path)
    nothing = {"HOME": str(tmp_path), "RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": "", "RAY_ADDRESS": ""}
    refused = cli("submit", path, "--address", site.address, "--json", env=nothing)
    assert refused.returncode == 2
    assert refused.stderr.splitlines() == [f"error: {last_line(refused)['error']}"]
    assert f"{site.address}: the cluster wants a token; RAY_AUTH_TOKEN_PATH names a file" in refused.stderr


def filled(server: S3Server) -> Bucket:
    bucket = Bucket(server)
    for name, members in all_shards().items():
        if name not in LATER:
            bucket.put(name, members)
    return bucket


def all_shards() -> dict[str, dict[str, bytes]]:
    names = [f"{number:03d}" for number in range(NUM_SHARDS + len(LATER))]
    small, large = noise(len(names) * PER_SHARD), noise(len(LARGE) * PER_SHARD, seed=1, side=64)
    for number, image in enumerate(large):
        small[int(LARGE[number // PER_SHARD]) * PER_SHARD + number % PER_SHARD] = image
    return {
        name: shard_members(small[number * PER_SHARD :][:PER_SHARD], number * PER_SHARD) for number, name in enumerate(names)
    }


def written(bucket: Bucket, proxy: FaultProxy, folder: Path, **changes: Any) -> Path:
    """The config as it is deployed: no credentials, and GPUs asked for."""
    storage = {"endpoint_url": proxy.endpoint_url}
    given: dict[str, Any] = {"source__storage": storage, "output__storage": storage, "run__num_gpus": 1, **changes}
    settings_ = bucket.config(**given)
    (folder / "photos.yaml").write_text(yaml.safe_dump(settings_.model_dump(mode="json")))
    return folder / "photos.yaml"


def ended(process: subprocess.Popen[str], code: int) -> tuple[dict[str, Any], str]:
    """The report of a submission that has ended, and the job's log."""
    out, log = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == code, log
    return dict(json.loads(out.strip().splitlines()[-1])), log


def store(bucket: Bucket) -> Store:
    return Store(config.Storage(**bucket.storage))


def opened(bucket: Bucket) -> Dataset:
    return pipeline.open_dataset(bucket.output, storage=config.Storage(**bucket.storage))


def partitions(bucket: Bucket) -> int:
    return len(bucket.fs.find(f"{bucket.name}/out/data"))


def same_rows(bucket: Bucket, expected: Contents, more: tuple[str, ...] = ()) -> None:
    """Promise 1 to 3: the rows of the local run, and a log that holds."""
    wanted = {name: shard for name, shard in expected.items() if name not in LATER or name in more}
    dataset = opened(bucket)
    found = difference(contents(dataset), wanted)
    assert not found, str(found)
    source = {file.url: file for file in store(bucket).list(f"s3://{bucket.name}/shards")}
    assert broken_promises(dataset, source) == []


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)
