"""Exact search against NumPy, and against reading the files. A command of its own, pytest does not run it.

    python tests/benchmarks/search.py [--rows 100000] [--dim 512] [--repeats 7] [--patience 0] [--json]

Ours is `pipeline.dataset.topk.nearest_rows` on an array, and `Dataset.search` on a dataset of the same rows on disk, in 20
partitions, with one label a row. The rows are Gaussian, so all neighbours are alike and none is much nearer: the hard case for
picking candidates. k = 10; 1, 10 and 100 queries; default threads for both.

    memory      theirs: queries normalised, queries @ rows.T, argpartition, sort. `inner` gives the same numbers; `cosine` also
                divides by the norms of the rows, which theirs does not
    disk        theirs: every partition opened and read to its end in one piece, and dropped; the page cache is warm. No search
                can beat that. `search` answers with all columns of the rows that it found, `places` with scores and positions
                alone, like theirs in memory. `filter` is a search where one label of ten is meant
    peak        what a fresh process holds at most on top of what it had once the dataset was open (resident set, with the
                mapped pages of files), for so many rows and four times as many

Both sides of a line take turns, each after a pause and once more before the clock starts; medians of `--repeats` rounds.
`--patience S` waits up to S seconds before each round until the cores are idle, for machines that others use as well: what it
saw is in the result. Where they were not, look at the CPU seconds, with `OPENBLAS_NUM_THREADS=1`: threads of a product that
wait for each other spin.

The goals: in memory at most 1.3 times theirs. On disk at most 2 times theirs for one query, and for more, where the product
takes longer than reading, no more than reading and theirs in memory together. Equal rows, scores within float32 rounding. The
peak below `PEAK_MB` for both sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from memory import RESULTS, ROOT, circumstances, save
from numpy.typing import NDArray

sys.path.insert(0, str(ROOT / "tests"))
from datasets import write_dataset
from meter import metered

K = 10
QUERIES = (1, 10, 100)
PARTITIONS = 20
PAUSE_S = 0.2
"""OpenBLAS's threads look for more work for 25 ms or so after a product: on the cores that the next side should have."""
PEAK_MB = 200
GOAL = {"memory_ratio": 1.3, "disk_ratio": 2.0, "of_reading_and_memory": 1.0, "peak_mb": PEAK_MB}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare search with NumPy and with reading files.")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--patience", type=float, default=0.0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, the table on stderr")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps({"peak_bytes": peak(arguments.child, arguments.dim)}))
        return
    out = sys.stderr if arguments.json else sys.stdout
    rows_ND = np.random.default_rng(0).standard_normal((arguments.rows, arguments.dim), np.float32)
    print(
        f"{'where':<7} {'queries':>7} {'side':<7} {'median ms':>9} {'ratio':>6} {'CPU ms':>8} {'ratio':>6}",
        file=out,
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="search-") as folder:
        write(f"{folder}/once", rows_ND)
        lines = [
            line for queries_QD in asked(arguments.dim) for line in compare(rows_ND, queries_QD, f"{folder}/once", arguments)
        ]
        for line in lines:
            for side, found in line["sides"].items():
                times = f"{1000 * found['median_s']:9.1f} {found['ratio']:6.2f}"
                cpu = f"{1000 * found['cpu_s']:8.1f} {found['cpu_ratio']:6.2f}"
                print(f"{line['where']:<7} {line['queries']:>7} {side:<7} {times} {cpu}", file=out)
        write(f"{folder}/four", np.concatenate([rows_ND, -rows_ND, rows_ND[::-1], -rows_ND[::-1]]))
        peaks = {name: child(f"{folder}/{name}", arguments.dim) for name in ("once", "four")}
    print("peak MB above the open dataset: " + ", ".join(f"{name} {each / 1e6:.0f}" for name, each in peaks.items()), file=out)
    memory, disk = ([line for line in lines if line["where"] == where] for where in ("memory", "disk"))
    for array, dataset in zip(memory, disk, strict=True):
        theirs = array["sides"]["theirs"]["median_s"] + dataset["sides"]["theirs"]["median_s"]
        dataset["of_reading_and_memory"] = dataset["sides"]["search"]["median_s"] / theirs
    met = {
        "memory_ratio": all(line["sides"]["inner"]["ratio"] <= 1.3 for line in memory),
        "disk_ratio": disk[0]["sides"]["search"]["ratio"] <= 2,
        "disk_ratio_of_places": disk[0]["sides"]["places"]["ratio"] <= 2,
        "of_reading_and_memory": all(line["of_reading_and_memory"] <= 1 for line in disk[1:]),
        "peak_mb": max(peaks.values()) <= PEAK_MB * 1e6,
        "agreement": all(line["agreement"]["rows_equal"] == 1 for line in lines),
    }
    print("goals: " + ", ".join(f"{name} {'met' if ok else 'MISSED'}" for name, ok in met.items()), file=out)
    report = {
        "benchmark": "search",
        "goal": GOAL,
        "met": met,
        "openblas_num_threads": os.environ.get("OPENBLAS_NUM_THREADS", "default"),
        **circumstances(arguments.repeats, "every side once before each of its runs", ("pyarrow", "deltalake")),
        "rows": arguments.rows,
        "dim": arguments.dim,
        "k": K,
        "results": lines,
        "peak_bytes": {"rows": peaks["once"], "four times the rows": peaks["four"]},
    }
    save(report, arguments.out, out)
    if arguments.json:
        print(json.dumps(report))


def asked(dim: int) -> list[NDArray[np.float32]]:
    random = np.random.default_rng(1)
    return [random.standard_normal((count, dim), np.float32) for count in QUERIES]


def write(folder: str, rows_ND: NDArray[np.float32]) -> None:
    labels = (np.arange(len(rows_ND)) % 10).tolist()
    write_dataset(folder, rows_ND, labels, rows_per_shard=-(-len(rows_ND) // PARTITIONS))


def compare(
    rows_ND: NDArray[np.float32], queries_QD: NDArray[np.float32], folder: str, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """One line for the array and one for the dataset."""
    import pyarrow.compute as pc

    import pipeline
    from pipeline.dataset.topk import nearest_rows

    dataset = pipeline.open_dataset(folder)
    files = [file.removeprefix("file://") for file in dataset.files()]
    unit_QD = queries_QD / np.linalg.norm(queries_QD, axis=1, keepdims=True)
    expected = brute_force(rows_ND, queries_QD)
    found = dataset.search(unit_QD, K, metric="inner")
    streamed = np.array([each.scores for each in found]), np.array([each.positions for each in found])
    sides: dict[str, dict[str, Callable[[], Any]]] = {
        "memory": {
            "theirs": lambda: brute_force(rows_ND, queries_QD),
            "inner": lambda: nearest_rows(rows_ND, unit_QD, K, "inner"),
            "cosine": lambda: nearest_rows(rows_ND, queries_QD, K),
        },
        "disk": {
            "theirs": lambda: [len(Path(file).read_bytes()) for file in files],
            "search": lambda: dataset.search(queries_QD, K),
            "places": lambda: dataset.search(queries_QD, K, columns=()),
            "filter": lambda: dataset.search(queries_QD, K, where=pc.field("label") == 3),
        },
    }
    agreements = {"memory": nearest_rows(rows_ND, unit_QD, K, "inner"), "disk": streamed}
    lines = []
    for where, of_place in sides.items():
        times, idle = take_turns(of_place, arguments.repeats, arguments.patience)
        medians = {side: np.median(seconds, axis=0) for side, seconds in times.items()}
        lines.append(
            {
                "where": where,
                "queries": len(queries_QD),
                "sides": {
                    side: {
                        "median_s": float(medians[side][0]),
                        "range_s": [min(seconds)[0], max(seconds)[0]],
                        "cpu_s": float(medians[side][1]),
                        "ratio": float(medians[side][0] / medians["theirs"][0]),
                        "cpu_ratio": float(medians[side][1] / medians["theirs"][1]),
                    }
                    for side, seconds in times.items()
                },
                "idle_before": idle,
                "agreement": agreement(expected, agreements[where]),
            }
        )
    return lines


def brute_force(rows_ND: NDArray[np.float32], queries_QD: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    unit_QD = queries_QD / np.linalg.norm(queries_QD, axis=1, keepdims=True)
    scores_QN = unit_QD @ rows_ND.T
    best_QK = np.argpartition(scores_QN, -K, axis=1)[:, -K:]
    scores_QK = np.take_along_axis(scores_QN, best_QK, axis=1)
    order_QK = np.argsort(-scores_QK, axis=1)
    return np.take_along_axis(scores_QK, order_QK, axis=1), np.take_along_axis(best_QK, order_QK, axis=1)


def agreement(
    expected: tuple[NDArray[np.float32], NDArray[np.int64]], found: tuple[NDArray[np.float32], NDArray[np.int64]]
) -> dict[str, float]:
    """Share of equal rows, and the largest difference of scores as a share of the largest score."""
    return {
        "rows_equal": float((expected[1] == found[1]).mean()),
        "score_difference": float(np.abs(expected[0] - found[0]).max() / np.abs(expected[0]).max()),
    }


def take_turns(
    sides: dict[str, Callable[[], Any]], repeats: int, patience: float
) -> tuple[dict[str, list[tuple[float, float]]], list[float]]:
    """Seconds and CPU seconds of each side by round, and how idle the cores were before each round."""
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    idle = []
    for _ in range(repeats):
        deadline = time.monotonic() + patience
        while (share := idle_share()) < 0.9 and time.monotonic() < deadline:
            pass
        idle.append(round(share, 2))
        for side, run in sides.items():
            time.sleep(PAUSE_S)
            run()
            start, cpu_start = time.perf_counter(), time.process_time()
            run()
            times[side].append((time.perf_counter() - start, time.process_time() - cpu_start))
    return times, idle


def idle_share(seconds: float = 0.2) -> float:
    before = _jiffies()
    time.sleep(seconds)
    passed, idle = (after - earlier for after, earlier in zip(_jiffies(), before, strict=True))
    return idle / max(passed, 1)


def _jiffies() -> tuple[int, int]:
    counts = [int(each) for each in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return sum(counts), counts[3] + counts[4]


def child(folder: str, dim: int) -> int:
    """Peak of a fresh process, in bytes."""
    command = [sys.executable, __file__, "--dim", str(dim), "--child", folder]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return int(json.loads(answer.stdout.splitlines()[-1])["peak_bytes"])


def peak(folder: str, dim: int) -> int:
    import pipeline

    dataset = pipeline.open_dataset(folder)
    dataset.take([0])  # loads what Arrow needs to read
    most = 0
    for queries_QD in asked(dim):
        with metered() as meter:
            dataset.search(queries_QD, K)
        most = max(most, meter()[1])
    return most


if __name__ == "__main__":
    main()
