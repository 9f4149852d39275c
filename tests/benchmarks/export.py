"""Exports against copying the same bytes. A command of its own, pytest does not run it.

    python tests/benchmarks/export.py [--rows 1000000] [--dim 512] [--repeats 5] [--folder DIR] [--json]

A dataset of random float32 embeddings is written to `--folder` (a temporary folder below it, which goes in the end), 10,000
rows a partition, with keys in no order. Then, in turn, each in a process of its own:

    cp         `cp` of the dataset's partitions to another folder of the same disk, then `sync` of each copy
    npy        `pipeline export --to npy`, which syncs what it has written
    parquet    `pipeline export --to parquet`: every row is read, spread over temporary files, sorted and written

`seconds` is the whole process, with 1 to 2 s of starting Python; `peak` its largest resident set, pages of mapped files
included. The page cache is treated alike: before each `warm` one the partitions are read from end to end, before each `cold`
one their pages are dropped (`POSIX_FADV_DONTNEED`); what the previous one wrote is removed, and the disk synced. The
goal: npy below 1 GB, and at least half as fast as cp. Linux only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from memory import RESULTS, ROOT, circumstances, save

GOAL = {"npy_peak_bytes": 1e9, "npy_share_of_cp": 0.5}
ROWS_PER_SHARD = 10_000
MB = 1e6


def parsed(description: str) -> argparse.Namespace:
    """The arguments of a command that measures on a large dataset, which a child of it makes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, the table on stderr")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parsed("Measure exports against cp.")
    if arguments.child:
        make(arguments.child, arguments.rows, arguments.dim)
        return
    out = sys.stderr if arguments.json else sys.stdout
    with tempfile.TemporaryDirectory(prefix="export-", dir=arguments.folder) as name:
        dataset = Path(name, "dataset")
        sizes = ["--rows", str(arguments.rows), "--dim", str(arguments.dim)]
        subprocess.run([sys.executable, __file__, "--child", str(dataset), *sizes], check=True)
        files = sorted((dataset / "data").iterdir())
        num_bytes = sum(file.stat().st_size for file in files)
        print(f"{arguments.rows:,} x {arguments.dim}, {num_bytes / MB:.0f} MB in {len(files)} partitions", file=out)
        print(f"{'cache':<5} {'what':<8} {'seconds':>8} {'MB/s':>6} {'peak MB':>8} {'cpu s':>6}", file=out)
        runs: dict[tuple[str, str], list[dict[str, float]]] = {}
        for repeat in range(arguments.repeats):
            turn = repeat % len(KINDS)
            for cache in CACHES:
                for what in (*KINDS[turn:], *KINDS[:turn]):  # none comes always after the same other
                    found = measure(what, cache, dataset, files, Path(name, "to"))
                    runs.setdefault((cache, what), []).append(found)
                    print(shown(cache, what, found, num_bytes), file=out, flush=True)
    lines = [summary(cache, what, found, num_bytes) for (cache, what), found in runs.items()]
    speeds = {(line["cache"], line["what"]): line["bytes_per_s"] for line in lines}
    for line in lines:
        line["share_of_cp"] = line["bytes_per_s"] / speeds[line["cache"], "cp"]
        text = shown(line["cache"], line["what"], line, num_bytes)
        print(f"{text}  median, {line['share_of_cp']:.2f} of cp", file=out)
    npy = [line for line in lines if line["what"] == "npy"]
    met = {
        "npy_peak_bytes": all(line["peak_bytes_range"][1] < GOAL["npy_peak_bytes"] for line in npy),
        "npy_share_of_cp": all(line["share_of_cp"] >= GOAL["npy_share_of_cp"] for line in npy),
    }
    print("goal: " + ", ".join(f"{name} {'met' if ok else 'MISSED'}" for name, ok in met.items()), file=out)
    report = {
        "benchmark": "export",
        "goal": GOAL,
        "met": met,
        **circumstances(arguments.repeats, "none: each is a process of its own", ("pyarrow", "deltalake")),
        "num_rows": arguments.rows,
        "dim": arguments.dim,
        "dataset_bytes": num_bytes,
        "results": lines,
    }
    save(report, arguments.out, out)
    if arguments.json:
        print(json.dumps(report))


def make(folder: Path, num_rows: int, dim: int) -> None:
    """Write the dataset; in a process of its own, so that its memory is gone afterwards."""
    sys.path.insert(0, str(ROOT / "tests"))
    from datasets import write_dataset

    keys = [hashlib.sha256(str(row).encode()).hexdigest()[:16] for row in range(num_rows)]
    labels = [row % 10 for row in range(num_rows)]
    embeddings_ND = np.random.default_rng(0).standard_normal((num_rows, dim), dtype=np.float32)
    write_dataset(folder, embeddings_ND, labels, keys=keys, rows_per_shard=ROWS_PER_SHARD)


def read_all(files: list[Path]) -> None:
    for file in files:
        with file.open("rb", buffering=0) as handle:
            while handle.read(8 << 20):
                pass


def drop_pages(files: list[Path]) -> None:
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


CACHES: dict[str, Callable[[list[Path]], None]] = {"warm": read_all, "cold": drop_pages}
KINDS = ("cp", "npy", "parquet")


def measure(what: str, cache: str, dataset: Path, files: list[Path], to: Path) -> dict[str, float]:
    """One process: its seconds, its seconds of processor and its peak memory."""
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir()
    os.sync()
    CACHES[cache](files)
    if what == "cp":
        command = ["sh", "-c", 'cp -t "$0" "$@" && exec sync "$0"/*', str(to), *map(str, files)]
    else:
        command = [sys.executable, "-m", "pipeline", "export", str(dataset), "--to", what, str(to / "exported")]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return {"seconds": seconds, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_bytes": usage.ru_maxrss << 10}


def summary(cache: str, what: str, runs: list[dict[str, float]], num_bytes: int) -> dict[str, Any]:
    line: dict[str, Any] = {"cache": cache, "what": what}
    for name in ("seconds", "cpu_s", "peak_bytes"):
        values = [run[name] for run in runs]
        line |= {name: statistics.median(values), f"{name}_range": [min(values), max(values)]}
    return line | {"bytes_per_s": num_bytes / line["seconds"]}


def shown(cache: str, what: str, found: dict[str, Any], num_bytes: int) -> str:
    speed = num_bytes / found["seconds"] / MB
    return f"{cache:<5} {what:<8} {found['seconds']:8.1f} {speed:6.0f} {found['peak_bytes'] / MB:8.0f} {found['cpu_s']:6.1f}"


if __name__ == "__main__":
    main()
