"""What verifying a version costs before a row is compared with its image. A command of its own, pytest does not run it.

    python tests/benchmarks/verify.py [--partitions 1000] [--rows 500] [--width 512] [--repeats 5] [--json]

The dataset is real: partitions of `PartitionWriter` with footers, one row group each, in a Delta table, on a local disk. Every
line of the result is one way of looking at it, each repeat in a fresh process, the ways taking turns:

`quick` footers against the log; `latency` the same with `LATENCY_S` for every ranged read, as from an object store; `deep` all
columns of all rows; `hash` only the SHA-256 of the same files read by as many threads, for comparison.

Columns: seconds of `verify` (opening the log is in it), seconds of CPU, milliseconds a partition, bytes of partitions a second,
and how much it adds to the process's peak memory, in MB (10^6 bytes). Medians; the range of the seconds lies in the JSON. The
page cache is warm. The cores may be shared with other work: then CPU seconds say more. Linux only (kB of ru_maxrss).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from memory import RESULTS, ROOT, circumstances, save

WAYS = ("quick", "latency", "deep", "hash")
LATENCY_S = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure verifying.")
    parser.add_argument("--partitions", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=500, help="of each partition")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, the table on stderr")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        way, folder = arguments.child.split(":", 1)
        print(json.dumps(measure(way, folder)))
        return
    out = sys.stderr if arguments.json else sys.stdout
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        build(Path(folder), arguments.partitions, arguments.rows, arguments.width)
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for _ in range(arguments.repeats):
            for way in WAYS:
                runs[way].append(child(way, folder))
    lines = []
    print(f"{'way':<8} {'seconds':>8} {'CPU':>6} {'ms/partition':>13} {'MB/s':>8} {'peak MB':>8}", file=out)
    for way, found in runs.items():
        seconds = [run["seconds"] for run in found]
        line = {"way": way, "seconds_range": [min(seconds), max(seconds)]}
        line |= {name: statistics.median(run[name] for run in found) for name in found[0]}
        lines.append(line)
        per_partition, rate = line["seconds"] / arguments.partitions * 1e3, line["num_bytes"] / line["seconds"] / 1e6
        seconds_shown = f"{line['seconds']:8.2f} {line['cpu_seconds']:6.2f}"
        print(f"{way:<8} {seconds_shown} {per_partition:13.2f} {rate:8.0f} {line['peak_bytes'] / 1e6:8.0f}", file=out)
    report = {
        "benchmark": "verify",
        **circumstances(arguments.repeats, "the process that makes the files", ("deltalake", "pyarrow")),
        "num_partitions": arguments.partitions,
        "num_rows_each": arguments.rows,
        "width": arguments.width,
        "results": lines,
    }
    save(report, RESULTS, out)
    if arguments.json:
        print(json.dumps(report))


def child(way: str, folder: str) -> dict[str, Any]:
    """What a fresh process found out."""
    command = [sys.executable, __file__, "--child", f"{way}:{folder}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return dict(json.loads(answer.stdout.splitlines()[-1]))


def build(folder: Path, num_partitions: int, num_rows: int, width: int) -> None:
    """A version of partitions as a run makes them, with random embeddings of length 1."""
    sys.path.insert(0, str(ROOT))
    import numpy as np

    from pipeline.dataset import partition, table
    from pipeline.recipe import FORMAT_VERSION, Layout, Recipe, digest
    from pipeline.storage import Store

    nodes = {"embedding": {"node": "flatten", "pool": "none", "normalize": "l2"}}
    recipe = Recipe(fields={"model": "none", "nodes": nodes, "precision": "float32"}, widths={"embedding": width})
    layout = Layout(fields={"format_version": FORMAT_VERSION, "format": "webdataset", "label": None, "columns": {}})
    schema = partition.schema(recipe, [])
    target = partition.Target(store=Store(), url=str(folder), recipe=recipe, layout=layout, schema=schema)
    (folder / partition.DATA_FOLDER).mkdir()
    rng, made = np.random.default_rng(0), []
    for number in range(num_partitions):
        shard = f"s3://photos/shards/{number:06d}.tar"
        values_ND = rng.standard_normal((num_rows, width), np.float32)
        values_ND /= np.linalg.norm(values_ND, axis=1, keepdims=True)
        columns: dict[str, list[Any]] = {
            "key": [f"{number:06d}{row:06d}" for row in range(num_rows)],
            "shard": [shard] * num_rows,
            "index": list(range(num_rows)),
            "url": [shard] * num_rows,
            "offset": [512 + 100_000 * row for row in range(num_rows)],
            "nbytes": [99_000] * num_rows,
            "content_hash": [digest(shard, str(row)) for row in range(num_rows)],
            "width": [500] * num_rows,
            "height": [375] * num_rows,
        }
        path = partition.new_path(target.identity(shard, digest(shard)))
        finished = partition.Partition(
            path=path, num_bytes=0, shard=shard, fingerprint=digest(shard), recipe_id=recipe.recipe_id,
            layout_id=layout.layout_id, num_rows=num_rows, num_read=num_rows, num_embedded=num_rows, num_carried_over=0,
            num_quarantined=0,
        )  # fmt: skip
        with open(folder / path, "wb") as file:
            writer = partition.PartitionWriter(file, schema, rounded=False)
            writer.write(columns, {"embedding": values_ND})
            writer.close(partition.footer(target, finished, []))
        made.append(dataclasses.replace(finished, num_bytes=(folder / path).stat().st_size))
    table.create(target, "run", made)


def measure(way: str, folder: str) -> dict[str, Any]:
    """One look, after the imports."""
    import hashlib
    from concurrent.futures import ThreadPoolExecutor

    import pipeline
    from pipeline.analysis.verify import NUM_READERS, verify
    from pipeline.storage import Store

    if way == "latency":
        read_range = Store.read_range

        def slowly(self: Store, url: str, start: int, num_bytes: int) -> bytes:
            time.sleep(LATENCY_S)
            return read_range(self, url, start, num_bytes)

        Store.read_range = slowly  # type: ignore[method-assign]
    before, start, cpu_start = peak_bytes(), time.perf_counter(), time.process_time()
    dataset = pipeline.open_dataset(folder)
    num_bytes = sum(entry.num_bytes for entry in dataset.entries())
    if way == "hash":

        def digest(url: str) -> None:
            with open(url.removeprefix("file://"), "rb") as file:
                hashlib.file_digest(file, "sha256")

        with ThreadPoolExecutor(NUM_READERS) as threads:
            list(threads.map(digest, dataset.files()))
    else:
        found = verify(dataset, deep=way == "deep")
        assert not found.verdict, found.findings[:3]
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
        "num_bytes": num_bytes,
        "peak_bytes": peak_bytes() - before,
    }


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
