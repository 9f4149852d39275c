"""Runs under chaos, each drawn from its seed, and what stands after them. pytest runs twenty of them (`test_chaos.py`).

    python tests/chaos/chaos.py [--runs 200] [--seed 0] [--kind KIND] [--json]

One real S3 server behind a fault proxy and one Ray cluster of a head and two nodes are kept for all runs. Each run has a
bucket of its own: twelve small shards, a few images in them bad. While `pipeline run` works on it, actors, nodes, the store or
the driver are killed, or requests fail. Then, with everything whole again, it is run until it exits 0, three times at most,
and what it left is compared with what an undisturbed run makes: nothing lost, doubled or torn, the same quarantine, every
partition there, nothing left to do. A reader that opens the dataset all the while may see one version or the next, never a
mix.

A kill at a request happens before that request is answered, so the same seed strikes near the same point of the work.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import yaml

sys.path.append(str(Path(__file__).parents[1]))

import faults
from bucket import Bucket
from faults import FaultProxy, Request, Rule
from helpers import Cluster, Driver, Drivers
from oracle import Contents, broken_promises, contents, difference, name_of
from s3 import S3Server
from scenarios import COUNTED, KINDS, NUM_SHARDS, Fault, Scenario, Strike, drawn, members

from pipeline import config
from pipeline.dataset.read import Dataset
from pipeline.dataset.table import Table
from pipeline.errors import DatasetError, StorageError
from pipeline.recipe import digest
from pipeline.storage import FileStat, Store

MAX_CHAOS_RUNS, MAX_CALM_RUNS = 3, 3
RUN_TIMEOUT_S = 150.0
"""A run that takes longer hangs."""


class Site:
    """What the runs share: a store, a cluster, drivers, and the rows of undisturbed runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._calm: dict[bool, Contents] = {}
        with contextlib.ExitStack() as stack:
            self.server = stack.enter_context(S3Server(folder))
            self.cluster = stack.enter_context(Cluster(folder))
            self.drivers = stack.enter_context(Drivers(folder, self.cluster.env))
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def expected(self, shards: dict[str, int], is_large: bool) -> Contents:
        """What a dataset of these variants of shards holds."""
        if is_large not in self._calm:
            self._calm[is_large] = self._calm_run(is_large)
        return {name: self._calm[is_large][f"{name}-{variant}"] for name, variant in shards.items()}

    def bucket(self, endpoint_url: str | None = None) -> Bucket:
        """A new one; see `store_of` for why they share a filesystem."""
        bucket = Bucket(self.server, endpoint_url)
        bucket.fs, _ = store_of(self.server).locate(bucket.output)
        return bucket

    def _calm_run(self, is_large: bool) -> Contents:
        """The rows of an undisturbed run, with each variant of each shard as a shard of its own: rows know no neighbours."""
        bucket = self.bucket()
        if is_large:
            variants = [("000", 0), ("001", 0), ("002", 0), ("large", 0)]
        else:
            variants = [(f"{number:03d}", 0) for number in range(NUM_SHARDS + 2)]
            variants += [(f"{number:03d}", 1) for number in range(NUM_SHARDS)]
        for name, variant in variants:
            bucket.put(f"{name}-{variant}", members(name, variant))
        run = self.run(written(bucket, self.folder, is_large=is_large))
        assert run.code == 0, run
        found = contents(opened(bucket))
        remove(bucket)
        return found

    def run(self, path: Path, while_it_runs: Callable[[Driver], None] = lambda driver: None) -> Ended:
        """`pipeline run`, to its end."""
        start = time.monotonic()
        driver = self.drivers.start("run", path, "--json")
        while driver.wait(0.02) is None and time.monotonic() - start < RUN_TIMEOUT_S:
            while_it_runs(driver)
        hung = driver.code is None
        if hung:
            driver.kill()
            driver.wait(10)
        return Ended(
            code=driver.code,
            hung=hung,
            seconds=round(time.monotonic() - start, 1),
            stdout=driver.stdout,
            stderr=driver.stderr,
        )


def written(bucket: Bucket, folder: Path, *, is_large: bool, **changes: Any) -> Path:
    """The config file of a bucket; `changes` as for `settings`."""
    changes = {"run__max_failed": 0.5, **changes}
    if is_large:
        changes |= {"backbone__model": "python/models:wide"}
    path = folder / f"{bucket.name}.yaml"
    path.write_text(yaml.safe_dump(bucket.config(**changes).model_dump(mode="json")))
    return path


@functools.cache
def store_of(server: S3Server) -> Store:
    """The server past the proxy. One for all: what is collected as garbage closes its connections in whichever thread that
    happens in, and the proxy's runs an event loop of its own."""
    options = {"key": server.access_key, "secret": server.secret_key}
    return Store(config.Storage(endpoint_url=server.endpoint_url, options=options))


def opened(bucket: Bucket, version: int | None = None) -> Dataset:
    table = Table.open(store_of(bucket.server), bucket.output, version)
    if table is None:
        raise DatasetError("no version yet")
    return Dataset(table)


def listed(bucket: Bucket) -> dict[str, FileStat]:
    """The source's shards as they are now."""
    return {file.url: file for file in store_of(bucket.server).list(f"s3://{bucket.name}/shards/*.tar")}


def versions(bucket: Bucket) -> list[int]:
    """Those that the log has."""
    names = bucket.fs.find(f"{bucket.name}/out/_delta_log") if bucket.fs.exists(f"{bucket.name}/out/_delta_log") else []
    return sorted(int(Path(name).stem) for name in names if name.endswith(".json"))


def unfinished_uploads(bucket: Bucket) -> list[tuple[str, str]]:
    """Key and id of the multipart uploads that nobody has completed."""
    import fsspec

    page = fsspec.asyn.sync(bucket.fs.loop, bucket.fs._call_s3, "list_multipart_uploads", Bucket=bucket.name)
    return [(each["Key"], each["UploadId"]) for each in page.get("Uploads", [])]


def remove(bucket: Bucket) -> None:
    """Delete a bucket: each takes volumes of the server."""
    import fsspec

    fs = bucket.fs
    for key, upload in unfinished_uploads(bucket):
        fsspec.asyn.sync(fs.loop, fs._call_s3, "abort_multipart_upload", Bucket=bucket.name, Key=key, UploadId=upload)
    fs.rm(bucket.name, recursive=True)


# What comes of it


@dataclass(slots=True, kw_only=True)
class Ended:
    """One `pipeline run` that has ended."""

    code: int | None
    hung: bool
    seconds: float
    stdout: str
    stderr: str

    @property
    def was_killed(self) -> bool:
        return self.code is not None and self.code < 0

    @property
    def report(self) -> dict[str, Any]:
        """What `--json` printed as the last line; empty where it did not come to that."""
        with contextlib.suppress(IndexError, ValueError):
            return dict(json.loads(self.stdout.strip().splitlines()[-1]))
        return {}

    @property
    def failed(self) -> set[str]:
        """Names of the shards that it says have failed."""
        return {Path(url).stem for url in self.report.get("failed", {})}

    def as_json(self) -> dict[str, Any]:
        """In short."""
        shards = self.report.get("shards", {})
        return {
            "code": self.code,
            "seconds": self.seconds,
            **{name: shards.get(name) for name in ("extracted", "adopted", "unchanged", "failed")},
            "committed": self.report.get("committed"),
            "actors_lost": self.report.get("actors_lost"),
            "error": self.report.get("error"),
        }


class Striker:
    """Strikes when the moment has come, from the thread of the proxy or from that of the run."""

    def __init__(self, site: Site, scenario: Scenario, bucket: Bucket) -> None:
        self._site, self._draw = site, random.Random(scenario.seed)
        urls = {name: f"s3://{bucket.name}/shards/{name}.tar" for name in {*scenario.before, *scenario.after}}
        self._names = {digest(url)[:16]: name for name, url in urls.items()}
        """Shards by what their partitions' names begin with."""
        self._due = list(scenario.strikes)
        self._counts = dict.fromkeys(COUNTED, 0)
        self._lock = threading.RLock()
        self._healing: list[threading.Timer] = []
        self._store_returns: threading.Timer | None = None
        self._driver: Driver | None = None
        self._orphans: set[int] = set()
        """Actors of a driver that was killed: they do not matter any more."""
        self._start = time.monotonic()
        self.struck: list[dict[str, Any]] = []

    @property
    def pending(self) -> list[Strike]:
        """Strikes whose moment has not come, or that found no victim."""
        return list(self._due)

    def watch(self, driver: Driver) -> None:
        """Called again and again while a driver runs."""
        with self._lock:
            if driver is not self._driver:
                self._driver, self._start = driver, time.monotonic()
                self._orphans = {actor.pid for actor in self._site.cluster.actors()}
                self._counts = dict.fromkeys(COUNTED, 0)
            self._strike_where_due(None)

    def arrived(self, request: Request) -> bool:
        """The match of a rule that applies to nothing."""
        with self._lock:
            for name, matches in COUNTED.items():
                self._counts[name] += matches(request)
            self._strike_where_due(request)
        return False

    def heal(self) -> None:
        """Wait until the store is back and nodes have joined."""
        for timer in self._healing:
            timer.join()

    def _strike_where_due(self, request: Request | None) -> None:
        if self._driver is None or self._driver.was_killed:
            return  # what its actors still do is no longer the run's
        for strike in list(self._due):
            if strike.at_request is not None:
                is_due = request is not None and self._counts[strike.counted] >= strike.at_request
            else:
                is_due = time.monotonic() - self._start >= strike.at_s
            if is_due and (victims := self._hit(strike)):
                self._due.remove(strike)
                self.struck.append(
                    {
                        "victim": strike.victim,
                        "processes": victims,
                        "seconds": round(time.monotonic() - self._start, 2),
                        "number_of_request": self._counts[strike.counted],
                        "request": self._spoken(request) if request is not None else None,
                    }
                )

    def _spoken(self, request: Request) -> str:
        """`PUT partition of 004`."""
        path = request.path.partition("/")[2].partition("/")[2]
        file = path.rpartition("/")[2]
        if path.startswith("out/data/"):
            path = f"partition of {self._names.get(file[:16], 'no shard')}"
        elif path.startswith("shards/"):
            path = f"shard {name_of(file)}"
        return f"{request.method} {path or request.query}"

    def _hit(self, strike: Strike) -> list[int]:
        """The ids of the processes that were killed; none where there is nothing to kill yet."""
        site = self._site
        if strike.victim == "actor":
            if not (actors := self._actors()):
                return []
            chosen = self._draw.choice(actors)
            with contextlib.suppress(psutil.NoSuchProcess):
                chosen.kill()
            return [chosen.pid]
        if strike.victim == "driver":
            assert self._driver is not None
            self._driver.kill()
            return [self._driver.pid]
        if strike.victim == "node":
            if not self._actors() or site.cluster.num_nodes < strike.number:
                return []
            victims = [pid for _ in range(strike.number) for pid in site.cluster.kill_node()]
            self._later(strike.down_s, site.cluster.restore)
            return victims
        if self._store_returns is not None and self._store_returns.is_alive():
            return []  # it is down, or starts
        pid = site.server.pid
        assert pid is not None
        site.server.kill()
        self._store_returns = self._later(strike.down_s, site.server.start)
        return [pid]

    def _actors(self) -> list[psutil.Process]:
        return [actor for actor in self._site.cluster.actors() if actor.pid not in self._orphans]

    def _later(self, seconds: float, action: Callable[[], None]) -> threading.Timer:
        timer = threading.Timer(seconds, action)
        timer.start()
        self._healing.append(timer)
        return timer


class Reader(threading.Thread):
    """Opens a dataset over and over, past the proxy, and remembers what it saw. The store may be down: then it sees nothing."""

    def __init__(self, bucket: Bucket) -> None:
        super().__init__(name="reader", daemon=True)
        self._bucket = bucket
        self._stopped = threading.Event()
        self.looks: list[tuple[int, frozenset[tuple[str, int]]]] = []
        """Version and what its log names: path and number of rows."""
        self.read: dict[int, Contents] = {}
        """All that a version held when it was seen first and could be read."""
        self.num_without = 0
        """Looks that found no dataset, or no store."""

    def run(self) -> None:
        while not self._stopped.wait(0.1):
            try:
                dataset = opened(self._bucket)
                entries = frozenset((entry.path, entry.num_rows) for entry in dataset.entries())
                self.looks.append((dataset.version, entries))
                if dataset.version not in self.read:
                    self.read[dataset.version] = contents(dataset)
            except (DatasetError, StorageError):
                self.num_without += 1

    def stop(self) -> None:
        self._stopped.set()
        self.join()

    def complaints(self) -> Iterator[str]:
        """What no reader may see: a version that goes back, changes, or is not what it is to all others."""
        numbers = [version for version, _ in self.looks]
        if numbers != sorted(numbers):
            yield f"the reader saw versions come and go: {numbers}"
        for version in sorted(set(numbers)):
            standing = opened(self._bucket, version)
            named = frozenset((entry.path, entry.num_rows) for entry in standing.entries())
            if any(seen != named for number, seen in self.looks if number == version):
                yield f"the reader saw another version {version} than there is now"
            if version in self.read and (differs := difference(self.read[version], contents(standing))):
                yield f"what the reader read of version {version} is not what it holds: {differs}"


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What came of one scenario."""

    seed: int
    kind: str
    scenario: str
    struck: list[dict[str, Any]]
    missed: list[str]
    """Strikes that came too late or found no victim."""
    faults: dict[str, int]
    """Requests that failed, by kind of fault."""
    runs: list[dict[str, Any]]
    num_chaos_runs: int
    versions: list[int]
    looks: dict[str, int]
    unfinished_uploads: int
    lost: int
    doubled: int
    torn: int
    problems: list[str]
    seconds: float

    @property
    def verdict(self) -> str:
        return "FAILED" if self.problems else "ok"

    @property
    def first_exit(self) -> str:
        code = self.runs[0]["code"] if self.runs else None
        return "killed" if code is not None and code < 0 else str(code)

    def __str__(self) -> str:
        struck = [f"{each['victim']} at {each['seconds']} s ({each['request'] or 'by time'})" for each in self.struck]
        codes = ", ".join("killed" if (run["code"] or 0) < 0 else str(run["code"]) for run in self.runs)
        parts = [
            f"seed {self.seed:<4} {self.kind:<9} {self.verdict:<6} {self.seconds:5.1f} s  exits {codes}",
            *struck,
            *(f"missed: {each}" for each in self.missed),
            *(f"{count} x {name}" for name, count in self.faults.items() if count),
            *(f"PROBLEM: {problem}" for problem in self.problems),
        ]
        return "; ".join(parts)


def endure(site: Site, scenario: Scenario) -> Outcome:
    """One scenario from its bucket to its verdict."""
    start = time.monotonic()
    with FaultProxy(site.server.endpoint_url, seed=scenario.seed) as proxy:
        bucket = site.bucket(proxy.endpoint_url)
        outcome = _endure(site, scenario, proxy, bucket)
    site.cluster.restore()
    remove(bucket)
    outcome.seconds = round(time.monotonic() - start, 1)
    return outcome


def _endure(site: Site, scenario: Scenario, proxy: FaultProxy, bucket: Bucket) -> Outcome:
    path = written(bucket, site.folder, is_large=scenario.is_large)
    old, new = (site.expected(shards, scenario.is_large) for shards in (scenario.before, scenario.after))
    problems: list[str] = []
    if scenario.before:
        fill(bucket, {}, scenario.before)
        assert site.run(path).code == 0
    fill(bucket, scenario.before, scenario.after)

    striker, reader = Striker(site, scenario, bucket), Reader(bucket)
    proxy.clear()
    proxy.add(Rule(striker.arrived, faults.drop))
    rules = [(each, proxy.add(_rule(each))) for each in scenario.faults]
    reader.start()
    runs = [site.run(path, striker.watch)]
    while striker.pending and runs[-1].was_killed and len(runs) < MAX_CHAOS_RUNS:
        runs.append(site.run(path, striker.watch))
    num_chaos_runs = len(runs)
    proxy.remove_rules()
    striker.heal()
    while runs[-1].code != 0 and len(runs) < num_chaos_runs + MAX_CALM_RUNS:
        runs.append(site.run(path))
    reader.stop()

    problems += [f"run {number}: {each}" for number, run in enumerate(runs) for each in _complaints(run)]
    if runs[-1].code != 0:
        problems.append(f"the last run without faults ends with exit code {runs[-1].code}: {runs[-1].stderr[-1000:]}")
    found = versions(bucket)
    differs = None
    if not found:
        problems.append("nothing was committed")
    else:
        newest = opened(bucket)
        if differs := difference(contents(newest), new):
            problems.append(str(differs))
        problems += broken_promises(newest, listed(bucket))
        problems += _mixed_versions(scenario, bucket, runs, old, new)
        problems += reader.complaints()
        problems += _half_uploads(bucket, newest)
        again = site.run(path)
        if again.code != 0 or again.report.get("committed") or versions(bucket) != found:
            problems.append(f"a further run does something: {again.as_json()}, versions {found} -> {versions(bucket)}")
    return Outcome(
        seed=scenario.seed,
        kind=scenario.kind,
        scenario=str(scenario),
        struck=striker.struck,
        missed=[str(each) for each in striker.pending],
        faults={each.name: rule.num_applied for each, rule in rules},
        runs=[run.as_json() for run in runs],
        num_chaos_runs=num_chaos_runs,
        versions=found,
        looks={"with": len(reader.looks), "without": reader.num_without, "versions": len(reader.read)},
        unfinished_uploads=len(unfinished_uploads(bucket)),
        lost=differs.lost if differs else 0,
        doubled=differs.doubled if differs else 0,
        torn=differs.torn if differs else 0,
        problems=problems,
        seconds=0.0,
    )


def fill(bucket: Bucket, before: dict[str, int], after: dict[str, int]) -> None:
    """Bring the source from one state to another."""
    for name, variant in after.items():
        if before.get(name) != variant:
            bucket.put(name, members(name, variant))
    for name in before.keys() - after.keys():
        bucket.remove(name)


def _rule(fault: Fault) -> Rule:
    seen = 0

    def matches(request: Request) -> bool:
        nonlocal seen
        counts = fault.applies(request)
        seen += counts
        return counts and seen > fault.after

    return Rule(matches, fault.action, fault.times, fault.probability)


def _complaints(run: Ended) -> Iterator[str]:
    """What no run may do, whatever happens to it."""
    if run.hung:
        yield f"hangs: {run.stderr[-1000:]}"
    if run.was_killed or run.hung:
        return
    if run.code not in (0, 1, 2):
        yield f"exit code {run.code}: {run.stderr[-1000:]}"
    if "Traceback" in run.stderr:
        yield f"a traceback: {run.stderr[-3000:]}"
    if not run.report or (run.code and not run.report["error"]):
        yield f"exit code {run.code} without a word: {run.stdout[-1000:]} {run.stderr[-1000:]}"


def _mixed_versions(scenario: Scenario, bucket: Bucket, runs: Sequence[Ended], old: Contents, new: Contents) -> Iterator[str]:
    """Versions that are neither the one before nor the whole new one.

    A shard that failed keeps its previous rows and the others are committed: a run that did so has said which.
    """
    said = {name for run in runs for name in run.failed}
    for version in versions(bucket):
        holds = contents(opened(bucket, version))
        if scenario.before and version == 0:
            if differs := difference(holds, old):
                yield f"version 0 is no longer what it was: {differs}"
            continue
        stale = {name for name in {*holds, *new} if difference(_only(holds, name), _only(new, name))}
        for name in sorted(stale):
            if differs := difference(_only(holds, name), _only(old, name)):
                yield f"version {version} has neither the old nor the new shard {name}: {differs}"
        # A driver that was killed after such a commit could not say so.
        if not stale <= said and not any(run.was_killed for run in runs):
            yield f"version {version} mixes old and new without a word: {sorted(stale - said)}"


def _only(holds: Contents, name: str) -> Contents:
    return {name: holds[name]} if name in holds else {}


def _half_uploads(bucket: Bucket, dataset: Dataset) -> Iterator[str]:
    """Partitions that the log names and of which an upload is not finished."""
    named = {file.removeprefix(f"s3://{bucket.name}/") for file in dataset.files()}
    for key, _ in unfinished_uploads(bucket):
        if key in named:
            yield f"{key} is named, and its upload is not finished"


# As a command


def table(outcomes: Sequence[Outcome]) -> str:
    """Kinds and what came of them, in Markdown."""
    lines = [
        "| kind | runs | ok | kills that struck / came too late | requests that failed | first exit 0 / 1 / 2 / killed "
        "| runs until exit 0: mean (most) | partitions adopted | lost | doubled | torn | median s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kind in (*KINDS, "all"):
        these = [each for each in outcomes if kind in (each.kind, "all")]
        if not these:
            continue
        exits = [sum(each.first_exit == code for each in these) for code in ("0", "1", "2", "killed")]
        needed = [len(each.runs) for each in these]
        adopted = sum(run["adopted"] or 0 for each in these for run in each.runs)
        cells = [
            f"**{kind}**" if kind == "all" else kind,
            len(these),
            sum(not each.problems for each in these),
            f"{sum(len(each.struck) for each in these)} / {sum(len(each.missed) for each in these)}",
            sum(sum(each.faults.values()) for each in these),
            " / ".join(map(str, exits)),
            f"{statistics.mean(needed):.1f} ({max(needed)})",
            adopted,
            sum(each.lost for each in these),
            sum(each.doubled for each in these),
            sum(each.torn for each in these),
            f"{statistics.median(each.seconds for each in these):.1f}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the pipeline under chaos, and see what it loses.")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first run; each further one is one higher")
    parser.add_argument("--kind", choices=KINDS, help="of all runs; otherwise they take turns")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, all else on stderr")
    arguments = parser.parse_args()
    out = sys.stderr if arguments.json else sys.stdout
    start, outcomes = time.monotonic(), list[Outcome]()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder, Site(Path(folder)) as site:
        for seed in range(arguments.seed, arguments.seed + arguments.runs):
            outcomes.append(endure(site, drawn(seed, arguments.kind)))
            print(outcomes[-1], file=out, flush=True)
    failed = [each.seed for each in outcomes if each.problems]
    print(f"\n{table(outcomes)}\n", file=out)
    print(f"{len(outcomes)} runs in {time.monotonic() - start:.0f} s, failed seeds: {failed or 'none'}", file=out)
    if arguments.json:
        print(json.dumps({"failed": failed, "outcomes": [{**asdict(each), "verdict": each.verdict} for each in outcomes]}))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
