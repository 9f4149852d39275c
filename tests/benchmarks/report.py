"""The page of a large dataset: its size, seconds and memory. A command of its own, pytest does not run it.

    python tests/benchmarks/report.py [--rows 1000000] [--dim 512] [--repeats 5] [--folder DIR] [--json]

A dataset of random float32 embeddings is written to `--folder` (a temporary folder below it, which goes in the end), 10,000
rows a partition, with 1,000 labels and a sample in a thousand in quarantine; and so is one of a tenth of the rows. Their images
are 200 pictures of 640 x 480, read from one file as from a shard. Then `pipeline report` runs on each, in a process of its own:
`warm` after all partitions were read, `cold` after their pages were dropped (`POSIX_FADV_DONTNEED`).

`seconds` is the whole process, with 1 s of starting Python; `peak` its largest resident set, pages of mapped files included.
The goal, for the large one: below 10 MB, 60 s and 2 GB in every run. Linux only.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from export import CACHES, MB, parsed
from memory import ROOT, circumstances, save

GOAL = {"page_bytes": 10e6, "seconds": 60, "peak_bytes": 2e9}
ROWS_PER_SHARD = 10_000
NUM_PICTURES, NUM_LABELS = 200, 1000


def main() -> None:
    arguments = parsed("Measure the page of a large dataset.")
    if arguments.child:
        make(arguments.child, arguments.rows, arguments.dim)
        return
    out = sys.stderr if arguments.json else sys.stdout
    runs: dict[tuple[int, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="report-", dir=arguments.folder) as name:
        sizes = (arguments.rows // 10, arguments.rows)
        for num_rows in sizes:
            options = ["--rows", str(num_rows), "--dim", str(arguments.dim), "--child", f"{name}/{num_rows}"]
            subprocess.run([sys.executable, __file__, *options], check=True)
        print(f"{'rows':>9} {'cache':<5} {'seconds':>8} {'cpu s':>6} {'peak MB':>8} {'page MB':>8}", file=out)
        for _ in range(arguments.repeats):
            for num_rows in sizes:
                for cache in CACHES:
                    found = measure(Path(name, str(num_rows)), cache)
                    runs.setdefault((num_rows, cache), []).append(found)
                    print(shown(num_rows, cache, found), file=out, flush=True)
    lines = []
    for (num_rows, cache), found in runs.items():
        medians = {what: statistics.median(each[what] for each in found) for what in found[0]}
        ranges = {f"{what}_range": [min(e[what] for e in found), max(e[what] for e in found)] for what in found[0]}
        lines.append({"rows": num_rows, "cache": cache, **medians, **ranges})
        print(f"{shown(num_rows, cache, medians)}  median", file=out)
    large = [line for line in lines if line["rows"] == arguments.rows]
    met = {what: all(line[f"{what}_range"][1] < most for line in large) for what, most in GOAL.items()}
    print("goal: " + ", ".join(f"{what} {'met' if ok else 'MISSED'}" for what, ok in met.items()), file=out)
    report = {
        "benchmark": "report",
        "goal": GOAL,
        "met": met,
        **circumstances(arguments.repeats, "none: each is a process of its own", ("pyarrow", "deltalake", "vl-convert-python")),
        "dim": arguments.dim,
        "results": lines,
    }
    save(report, arguments.out, out)
    if arguments.json:
        print(json.dumps(report))


def make(folder: Path, num_rows: int, dim: int) -> None:
    """Write the dataset and its pictures; in a process of its own, so that its memory is gone afterwards."""
    sys.path.insert(0, str(ROOT / "tests"))
    from datasets import write_dataset
    from images import encode, photo

    folder.mkdir()
    pictures = [encode(photo(640, 480, seed), quality=85) for seed in range(NUM_PICTURES)]
    source = folder / "pictures"
    source.write_bytes(b"".join(pictures))
    starts = np.cumsum([0, *map(len, pictures)]).tolist()
    hashes = [hashlib.sha256(each).hexdigest()[:32] for each in pictures]
    numbers = (np.arange(num_rows) % NUM_PICTURES).tolist()
    random = np.random.default_rng(0)
    write_dataset(
        folder / "dataset",
        random.standard_normal((num_rows, dim), dtype=np.float32),
        [f"class {label}" for label in random.integers(0, NUM_LABELS, num_rows).tolist()],
        content_hashes=[hashes[number] for number in numbers],
        columns={
            "url": [source.as_uri()] * num_rows,
            "offset": [starts[number] for number in numbers],
            "nbytes": [len(pictures[number]) for number in numbers],
        },
        rows_per_shard=ROWS_PER_SHARD,
        quarantined_per_shard=ROWS_PER_SHARD // 1000,
    )


def measure(folder: Path, cache: str) -> dict[str, float]:
    """One process: its seconds, its seconds of processor, its peak memory, and the size of the page."""
    CACHES[cache](sorted((folder / "dataset" / "data").iterdir()))
    page = folder / "page.html"
    command = [sys.executable, "-m", "pipeline", "report", str(folder / "dataset"), "--to", str(page)]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    assert status == 0, f"{command} ended with {status}"
    assert page.read_bytes().count(b"data:image/jpeg") > 100, "the page has its pictures"
    cpu = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "cpu_s": cpu, "peak_bytes": usage.ru_maxrss << 10, "page_bytes": page.stat().st_size}


def shown(num_rows: int, cache: str, found: dict[str, Any]) -> str:
    """A line of the table."""
    sizes = f"{found['peak_bytes'] / MB:8.0f} {found['page_bytes'] / MB:8.2f}"
    return f"{num_rows:>9,} {cache:<5} {found['seconds']:8.1f} {found['cpu_s']:6.1f} {sizes}"


if __name__ == "__main__":
    main()
