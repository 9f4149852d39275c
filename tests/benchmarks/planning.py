"""What planning costs: a listing of N shards against a table of N partitions. A command of its own, pytest does not run it.

    python tests/benchmarks/planning.py [--shards 100000] [--repeats 5] [--json]

The table is a real Delta table of N add actions with made-up paths, made by `pipeline.dataset.table.create`; its data folder
holds N empty files of those names, because a plan that wants anything lists it. Every line of the result is one listing with
one difference between source and table, each repeat in a fresh process, so that its peak memory is its own.

Listings: `generated` Shard objects as `Source.shards()` would give them, at no cost; `local`, a real folder of N tars of one
byte; `s3`, the pages of 1000 of a server that only lists, in this process. Both real ones through `pipeline.source.Source`.

Differences: `first` no table yet; `unchanged`; `refresh` 1 % changed, 1 % removed, 1 % new; `recipe` another one, everything
anew; `adopt` like `recipe`, and 1 % of the shards have a finished partition (zero rows, a real footer, `FOOTER_LATENCY_S` for
each read) that no version names; `checkpoint` like `unchanged`, opened from a checkpoint instead of the JSON log.

Columns: `import` and `open` (the log), `list` (time in the source's listing), `data` (time in the listing of the data folder),
`match` (the rest of `plan.make`, footers included), `plan` = open + list + data + match, `commit` (create, append or
overwrite), in seconds; peak memory of planning, and with the commit, in MB (10^6 bytes); `B/shard`, how much planning adds to
the peak after the imports, by N (25 MB of it, and 40 MB more with S3, do not depend on N); log bytes per shard. Medians; the
range of `plan` lies in the JSON.

The cores may be shared with other work and the page cache is warm: take the seconds as upper bounds and compare ratios. Memory
is without model and Ray, which planning does not load but the driver does. Linux only (kB of ru_maxrss).
"""

# This process loads nothing of the pipeline: a child's ru_maxrss starts at what its parent had when it forked.

from __future__ import annotations

import argparse
import datetime
import http.server
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from memory import RESULTS, ROOT, circumstances

if TYPE_CHECKING:
    from pipeline.dataset.partition import Partition, Target
    from pipeline.source import Shard, Source
    from pipeline.storage import FileStat, Store

LISTINGS = ("generated", "local", "s3")
DIFFERENCES = ("first", "unchanged", "refresh", "recipe", "adopt", "checkpoint")
EVERY = 100
"""One shard in so many is changed, removed, new, or adopted."""
PAGE = 1000
FOOTER_LATENCY_S = 0.02
GOAL = {"seconds": 15.0, "megabytes": 1000.0}
"""For planning 100,000 shards on two cores."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure planning.")
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--listings", nargs="+", default=LISTINGS, choices=LISTINGS)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, the table on stderr")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        order = json.loads(arguments.child)
        tasks: dict[str, Callable[..., dict[str, Any]]] = {"build": build, "checkpoint": checkpoint, "measure": measure}
        print(json.dumps(tasks[order.pop("task")](**order)))
        return
    out = sys.stderr if arguments.json else sys.stdout
    print(HEADER, file=out, flush=True)
    lines = []
    for listing in arguments.listings:
        for line in compare(listing, arguments.shards, arguments.repeats):
            lines.append(line)
            print(shown(line), file=out, flush=True)
    packages = ("deltalake", "pyarrow", "fsspec", "s3fs")
    report = {
        "benchmark": "planning",
        "goal": GOAL,
        **circumstances(arguments.repeats, "the process that makes table and files", packages),
        "num_shards": arguments.shards,
        "results": lines,
    }
    path = RESULTS / f"planning-{datetime.date.today()}-{report['hardware']['cpus']}cpu{suffix(arguments.shards)}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {path}", file=out)
    if arguments.json:
        print(json.dumps(report))


def suffix(num_shards: int) -> str:
    return "" if num_shards == 100_000 else f"-{num_shards}"


def compare(listing: str, num_shards: int, repeats: int) -> Iterator[dict[str, Any]]:
    """All differences for one listing, one line each."""
    with tempfile.TemporaryDirectory(prefix="planning-") as folder, ListingServer(num_shards) as endpoint_url:
        order = {"listing": listing, "num_shards": num_shards, "folder": folder, "endpoint_url": endpoint_url}
        built = child(task="build", **order)
        for difference in DIFFERENCES:
            if difference == "checkpoint":
                child(task="checkpoint", folder=folder)
            runs = [child(task="measure", difference=difference, **order) for _ in range(repeats)]
            names = runs[0].keys()
            medians = {name: statistics.median(run[name] for run in runs) for name in names}
            plan_s = [run["plan_s"] for run in runs]
            yield {
                "listing": listing,
                "difference": difference,
                **medians,
                "plan_s_range": [min(plan_s), max(plan_s)],
                "log_bytes_per_shard": built["log_bytes"] / num_shards,
            }


def child(**order: Any) -> dict[str, Any]:
    """What a fresh process found out."""
    command = [sys.executable, __file__, "--child", json.dumps(order)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return dict(json.loads(answer.stdout.splitlines()[-1]))


HEADER = (
    f"{'listing':<10} {'difference':<10} {'import':>6} {'open':>6} {'list':>6} {'data':>6} {'match':>6} {'plan':>6}"
    f" {'commit':>6} {'plan MB':>8} {'all MB':>8} {'B/shard':>8} {'log B/shard':>11}"
)


def shown(line: dict[str, Any]) -> str:
    seconds = " ".join(
        f"{line[name]:6.2f}" for name in ("import_s", "open_s", "list_s", "data_s", "match_s", "plan_s", "commit_s")
    )
    memory = f"{line['plan_peak_bytes'] / 1e6:8.0f} {line['peak_bytes'] / 1e6:8.0f} {line['plan_bytes_per_shard']:8.0f}"
    return f"{line['listing']:<10} {line['difference']:<10} {seconds} {memory} {line['log_bytes_per_shard']:11.0f}"


# In the child


def build(listing: str, num_shards: int, folder: str, endpoint_url: str) -> dict[str, Any]:
    """The folder of shards, the table of what is listed there, its data folder, and the partitions to adopt."""
    from pipeline.dataset import partition, table

    if listing == "local":
        shards_folder = Path(folder, "shards")
        shards_folder.mkdir()
        for number in range(num_shards):
            (shards_folder / f"{number:08d}.tar").write_bytes(b"x")
    dataset = Path(folder, "dataset")
    (dataset / partition.DATA_FOLDER).mkdir(parents=True)
    target, waiting = target_of("committed", dataset), target_of("adopt", dataset)
    committed = []
    for number, shard in enumerate(listed(listing, num_shards, folder, endpoint_url)):
        committed.append(finished(shard, target))
        (dataset / committed[-1].path).touch()
        if number % EVERY == 0:
            unnamed = finished(shard, waiting, num_rows=0)
            with open(dataset / unnamed.path, "wb") as file:
                writer = partition.PartitionWriter(file, waiting.schema, rounded=False)
                writer.close(partition.footer(waiting, unnamed, []))
    assert len(committed) == num_shards
    table.create(target, "run 0", committed)
    return {"log_bytes": (dataset / "_delta_log" / f"{0:020d}.json").stat().st_size}


def checkpoint(folder: str) -> dict[str, Any]:
    """What deltalake does by itself after every hundredth commit."""
    from deltalake import DeltaTable

    DeltaTable(f"{folder}/dataset").create_checkpoint()
    return {}


def measure(listing: str, num_shards: int, folder: str, endpoint_url: str, difference: str) -> dict[str, Any]:
    """Plan, and commit what the plan asks for; the commit is taken back afterwards."""
    start = time.perf_counter()
    from pipeline import plan
    from pipeline.dataset import table
    from pipeline.storage import Store

    class Timed(Store):
        """The store of the dataset: footers cost a round trip, and the time of listings adds up."""

        list_s = 0.0

        def list(self, url: str, *, missing_ok: bool = False) -> Iterator[FileStat]:
            clock = Clock(super().list(url, missing_ok=missing_ok))
            yield from clock
            self.list_s += clock.seconds

        def read_range(self, url: str, start: int, num_bytes: int) -> bytes:
            time.sleep(FOOTER_LATENCY_S)
            return super().read_range(url, start, num_bytes)

    dataset, store = Path(folder, "nothing yet" if difference == "first" else "dataset"), Timed()
    target = target_of(difference if difference in {"recipe", "adopt"} else "committed", dataset, store)
    import_s, import_peak = time.perf_counter() - start, peak_bytes()

    start = time.perf_counter()
    current = table.Table.open(store, str(dataset))
    open_s = time.perf_counter() - start

    shards = Clock(listed(listing, num_shards, folder, endpoint_url))
    source = differing(shards, num_shards) if difference == "refresh" else iter(shards)
    start = time.perf_counter()
    todo = plan.make(source, current, target)
    make_s, plan_peak = time.perf_counter() - start, peak_bytes()
    check(todo, difference, num_shards)

    add = todo.adopt + [finished(task.shard, target) for task in todo.extract]
    remove = todo.removed + todo.replaced
    start = time.perf_counter()
    if current is None:
        table.create(target, "run 1", add)
        commit_s = time.perf_counter() - start
        shutil.rmtree(dataset)
    elif add or remove:
        assert current.commit(target, "run 1", add, remove) == 1
        commit_s = time.perf_counter() - start
        (dataset / "_delta_log" / f"{1:020d}.json").unlink()
    else:
        commit_s = 0.0
    return {
        "import_s": import_s,
        "open_s": open_s,
        "list_s": shards.seconds,
        "data_s": store.list_s,
        "match_s": make_s - shards.seconds - store.list_s,
        "plan_s": open_s + make_s,
        "commit_s": commit_s,
        "import_peak_bytes": import_peak,
        "plan_peak_bytes": plan_peak,
        "peak_bytes": peak_bytes(),
        "plan_bytes_per_shard": (plan_peak - import_peak) / num_shards,
    }


def check(todo: Any, difference: str, num_shards: int) -> None:
    """A fast plan that is wrong would be worth nothing."""
    few = len(range(0, num_shards, EVERY))
    expected = {
        "first": (num_shards, 0, 0, 0, 0),
        "unchanged": (0, 0, num_shards, 0, 0),
        "checkpoint": (0, 0, num_shards, 0, 0),
        "refresh": (2 * few, 0, num_shards - 2 * few, few, few),
        "recipe": (num_shards, 0, 0, num_shards, 0),
        "adopt": (num_shards - few, few, 0, num_shards, 0),
    }[difference]
    found = tuple(len(each) for each in (todo.extract, todo.adopt, todo.unchanged, todo.replaced, todo.removed))
    assert found == expected, f"extract, adopt, unchanged, replaced, removed: {found}, expected {expected}"


class Clock:
    """Passes an iterator on and adds up the time spent in it."""

    def __init__(self, each: Iterable[Any]) -> None:
        self._each, self.seconds = iter(each), 0.0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        start = time.perf_counter()
        try:
            return next(self._each)
        finally:
            self.seconds += time.perf_counter() - start


def listed(listing: str, num_shards: int, folder: str, endpoint_url: str) -> Iterator[Shard]:
    if listing == "generated":
        return (shard_named(f"s3://photos/shards/{number:08d}.tar") for number in range(num_shards))
    return source_of(listing, folder, endpoint_url).shards()


def source_of(listing: str, folder: str, endpoint_url: str) -> Source:
    from pipeline import config
    from pipeline.source import Source

    if listing == "local":
        return Source(config.Source(url=f"{folder}/shards/*.tar"))
    options = {"key": "a", "secret": "b"}
    return Source(
        config.Source(url="s3://photos/shards/*.tar", storage=config.Storage(endpoint_url=endpoint_url, options=options))
    )


def differing(shards: Iterable[Shard], num_shards: int) -> Iterator[Shard]:
    """One in `EVERY` is gone, one has other bytes, and as many are new at the end."""
    import dataclasses

    for number, shard in enumerate(shards):
        if number % EVERY == 1:
            [file] = shard.files
            yield dataclasses.replace(shard, files=(dataclasses.replace(file, version="etag:another"),))
        elif number % EVERY != 2:
            yield shard
    for number in range(0, num_shards, EVERY):
        yield shard_named(f"s3://photos/shards/new-{number:08d}.tar")


def shard_named(url: str) -> Shard:
    from pipeline.source import Shard
    from pipeline.storage import FileStat

    return Shard(url=url, files=(FileStat(url=url, num_bytes=500 << 20, version=f"etag:{etag(url)}", modified=1.8e9),))


def etag(name: str) -> str:
    import hashlib

    return f"{hashlib.md5(name.encode()).hexdigest()}-60"


def finished(shard: Shard, target: Target, num_rows: int = 5000) -> Partition:
    """The partition that an actor would have made of a shard."""
    from pipeline.dataset import partition

    return partition.Partition(
        path=partition.new_path(target.identity(shard.url, shard.fingerprint)),
        num_bytes=10 << 20,
        shard=shard.url,
        fingerprint=shard.fingerprint,
        recipe_id=target.recipe.recipe_id,
        layout_id=target.layout.layout_id,
        num_rows=num_rows,
        num_read=num_rows,
        num_embedded=num_rows,
        num_carried_over=0,
        num_quarantined=0,
    )


def target_of(weights: str, dataset: Path, store: Store | None = None) -> Target:
    """Datasets that differ in their recipe."""
    from pipeline.dataset import partition
    from pipeline.recipe import FORMAT_VERSION, Layout, Recipe
    from pipeline.storage import Store

    nodes = {"embedding": {"node": "flatten", "pool": "none", "normalize": "l2"}}
    fields = {"model": "torchvision/resnet50", "weights": weights, "nodes": nodes, "decode_version": 1, "precision": "float32"}
    recipe = Recipe(fields=fields, widths={"embedding": 2048})
    layout = Layout(fields={"format_version": FORMAT_VERSION, "format": "webdataset", "label": None, "columns": {}})
    schema = partition.schema(recipe, [])
    return partition.Target(store=store or Store(), url=str(dataset), recipe=recipe, layout=layout, schema=schema)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# In the parent


class ListingServer:
    """Answers ListObjectsV2 for one bucket of N shards, page by page, and nothing else; asks for no credentials."""

    def __init__(self, num_shards: int) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or each page waits 40 ms for an acknowledgement

            def do_GET(self) -> None:
                query = parse_qs(urlsplit(self.path).query)
                body = listing_page(int(query.get("continuation-token", ["0"])[0]), num_shards)
                self.send_response(200)
                self.send_header("Content-Type", "application/xml")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> str:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_port}"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def listing_page(first: int, num_shards: int) -> bytes:
    names = [f"shards/{number:08d}.tar" for number in range(first, min(first + PAGE, num_shards))]
    contents = "".join(
        f"<Contents><Key>{name}</Key><LastModified>2026-11-01T00:00:00.000Z</LastModified>"
        f"<ETag>&quot;{etag(name)}&quot;</ETag><Size>{500 << 20}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        for name in names
    )
    end = first + PAGE
    more = f"<NextContinuationToken>{end}</NextContinuationToken>" if end < num_shards else ""
    return (
        '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>photos</Name><Prefix>shards/</Prefix><KeyCount>{len(names)}</KeyCount><MaxKeys>{PAGE}</MaxKeys>"
        f"<IsTruncated>{'true' if more else 'false'}</IsTruncated>{more}{contents}</ListBucketResult>"
    ).encode()


if __name__ == "__main__":
    main()
