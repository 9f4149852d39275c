"""Whether an actor's memory depends on the number or the size of shards. A command of its own, pytest does not run it.

    python tests/benchmarks/memory.py --photographs DIR [--shards 8] [--big-mb 2000] [--repeats 3] [--json]
                                      [--model python/models:tiny --weights seed:0 --node flatten] [--decode exact]

`DIR` is what `photographs.py` made. Three sources, every run a `pipeline run` in a fresh process with an output folder of its
own, one source after the other and then again:

    few     N tars of 250 small photographs
    many    10 N tars, the same ones under other names (hard links)
    big     one tar of `--big-mb` megabytes, the same photographs under other names

Measured is the actor, the Ray worker that runs `Extractor`, among the descendants of the run's own process: its proportional
set size (PSS: shared pages count by share), every `EVERY_S` seconds. `peak` is the largest sample, `late` the median of the
second half: where they are alike, the run was long enough to reach its plateau. `own` is the peak without pages of files:
the share of the libraries (up to 100 MB) depends on what other processes have them loaded as well, Ray's own for example.
`driver` is the peak of the process that was started. Medians over the repeats; ranges lie in the JSON.

The goal: `many` and `big` within 10 % of `few`, in `peak` and in `own`. Linux only.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import yaml

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
EVERY_S = 0.1
SEARCH_EVERY_S = 1.0
"""How often the actor is looked for: that reads the whole process table."""
TIMES = 10
"""So many times the shards of `few` are in `many`."""
GOAL = {"growth": 0.10}
MB = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the memory of an actor.")
    parser.add_argument("--photographs", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--big-mb", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="python/models:tiny", help="a module of tests/, or a model of torchvision")
    parser.add_argument("--weights", default="seed:0")
    parser.add_argument("--node", default="flatten")
    parser.add_argument("--decode", choices=("exact", "fast"), default="exact")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, the table on stderr")
    arguments = parser.parse_args()
    out = sys.stderr if arguments.json else sys.stdout
    runs: dict[str, list[dict[str, Any]]] = {"few": [], "many": [], "big": []}
    with tempfile.TemporaryDirectory(prefix="memory-") as name:
        folder = Path(name)
        sources = make_sources(arguments.photographs, arguments.shards, arguments.big_mb, folder)
        print(
            f"{'source':<6} {'images':>7} {'seconds':>8} {'peak MB':>8} {'own MB':>8} {'late MB':>8} {'driver MB':>9}", file=out
        )
        for repeat in range(arguments.repeats):
            for source, url in sources.items():
                settings = {
                    "source": {"url": url},
                    "backbone": {
                        "model": arguments.model,
                        "weights": arguments.weights,
                        "nodes": {"embedding": {"node": arguments.node}},
                    },
                    "decode": arguments.decode,
                    "output": {"url": str(folder / f"{source}-{repeat}")},
                }
                found = watched_run(settings, folder)
                runs[source].append(found)
                print(shown(source, found), file=out, flush=True)
    lines = [summary(source, found) for source, found in runs.items()]
    for line in lines:
        line["growth"] = {name: line[f"{name}_bytes"] / lines[0][f"{name}_bytes"] - 1 for name in ("peak", "own")}
        peaks = ", ".join(
            f"{name} {line[f'{name}_bytes'] / MB:.0f} MB ({line['growth'][name]:+.1%})" for name in line["growth"]
        )
        print(f"{line['source']:<6} medians: {peaks}", file=out)
    met = {name: all(line["growth"][name] <= GOAL["growth"] for line in lines) for name in ("peak", "own")}
    print(
        f"goal, at most {GOAL['growth']:+.0%}: " + ", ".join(f"{n} {'met' if ok else 'MISSED'}" for n, ok in met.items()),
        file=out,
    )
    report = {
        "benchmark": "memory",
        "goal": GOAL,
        "met": met,
        **circumstances(arguments.repeats, "each run builds and checks its model before the first shard", ("ray", "psutil")),
        "settings": {"model": arguments.model, "weights": arguments.weights, "decode": arguments.decode},
        "num_shards": arguments.shards,
        "big_mb": arguments.big_mb,
        "results": lines,
    }
    save(report, arguments.out, out)
    if arguments.json:
        print(json.dumps(report))


def make_sources(photographs: Path, num_shards: int, big_mb: int, folder: Path) -> dict[str, str]:
    """The URL of each source. The tars are copied once; all others are further names of the copies."""
    tars = sorted((photographs / "small-tar").glob("*.tar"))
    for source, number in (("few", num_shards), ("many", TIMES * num_shards)):
        (folder / "sources" / source).mkdir(parents=True)
        for position in range(number):
            tar, first = folder / "sources" / source / f"{position:05d}.tar", folder / "sources" / "few"
            if source == "few" and position < len(tars):
                shutil.copy(tars[position], tar)
            else:
                tar.hardlink_to(first / f"{position % min(num_shards, len(tars)):05d}.tar")
    big = folder / "sources" / "big.tar"
    images = [file.read_bytes() for file in sorted((photographs / "small").glob("*.jpg"))]
    with tarfile.open(big, "w") as tar:
        number = 0
        while tar.offset < big_mb * MB:
            member = tarfile.TarInfo(f"{number:07d}.jpg")
            member.size = len(images[number % len(images)])
            tar.addfile(member, io.BytesIO(images[number % len(images)]))
            number += 1
    return {"few": f"{folder}/sources/few/*.tar", "many": f"{folder}/sources/many/*.tar", "big": str(big)}


def watched_run(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One `pipeline run`, and the memory of its actor and its driver."""
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    # `python/models:NAME` lies in tests/.
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "pipeline", "run", str(config), "--json"]
    samples: list[Sample] = []
    driver_peak, actor, next_look = 0, None, 0.0
    with (
        open(folder / "stderr", "w+") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment, cwd=folder) as process,
    ):
        driver = psutil.Process(process.pid)
        while process.poll() is None:
            wake = time.monotonic() + EVERY_S
            driver_peak = max(driver_peak, sample(driver).pss)
            if actor is None and time.monotonic() >= next_look:
                actor, next_look = find_actor(driver), time.monotonic() + SEARCH_EVERY_S
            if actor is not None:
                samples.append(sample(actor))
            time.sleep(max(0.0, wake - time.monotonic()))
        assert process.stdout is not None
        answer = process.stdout.read().splitlines()  # one line, which the pipe holds until here
        if process.returncode:
            stderr.seek(0)
            raise SystemExit(f"the run failed:\n{stderr.read()[-2000:]}")
    report = json.loads(answer[-1])
    samples = [each for each in samples if each.pss]
    assert samples, "no actor was seen"
    assert len(report["actors"]) == 1, "an actor for each node, and there is one node"
    return {
        "num_images": report["images"]["embedded"],
        "seconds": report["seconds"],
        "peak_bytes": max(each.pss for each in samples),
        "own_bytes": max(each.own for each in samples),
        "late_bytes": statistics.median(each.pss for each in samples[len(samples) // 2 :]),
        "driver_peak_bytes": driver_peak,
        "num_samples": len(samples),
    }


def find_actor(driver: psutil.Process) -> psutil.Process | None:
    """The worker that runs `Extractor`, below the Ray that this driver has started. Ray names the process after its class."""
    try:
        for process in driver.children(recursive=True):
            if "".join(process.cmdline()).startswith("ray::Extractor"):
                return process
    except psutil.Error:  # a process that ended while the list was read
        pass
    return None


class Sample(NamedTuple):
    """Bytes of one process at one moment; 0 when it has ended."""

    pss: int
    own: int


def sample(process: psutil.Process) -> Sample:
    # psutil reads the same file, and keeps the sum only.
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return Sample(0, 0)
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return Sample(1024 * kilobytes["Pss"], 1024 * (kilobytes["Pss"] - kilobytes["Pss_File"]))


def summary(source: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    names = ("seconds", "peak_bytes", "own_bytes", "late_bytes", "driver_peak_bytes", "num_samples")
    ranges = {f"{name}_range": [min(run[name] for run in runs), max(run[name] for run in runs)] for name in names[1:3]}
    return {
        "source": source,
        "num_images": runs[0]["num_images"],
        **{name: statistics.median(run[name] for run in runs) for name in names},
        **ranges,
    }


def shown(source: str, found: dict[str, Any]) -> str:
    memory = " ".join(f"{found[name] / MB:8.0f}" for name in ("peak_bytes", "own_bytes", "late_bytes"))
    memory += f" {found['driver_peak_bytes'] / MB:9.0f}"
    return f"{source:<6} {found['num_images']:7,} {found['seconds']:8.1f} {memory}"


# What every benchmark records; the others beside this file import it from here


def circumstances(repeats: int, warm_up: str, packages: Sequence[str]) -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    models = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "pipeline")
    words = ["DIR" if word.startswith(("/", "~")) else word for word in sys.argv[1:]]
    return {
        "command": " ".join(["python", f"tests/benchmarks/{Path(sys.argv[0]).name}", *words]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": f"{commit} and changes that are not committed" if changes else commit or None,
        "hardware": {
            "cpus": len(os.sched_getaffinity(0)),
            "model": models[0] if models else platform.machine(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "load_average": list(os.getloadavg()),
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "numpy", *packages)}},
        "warm_up": warm_up,
        "repeats": repeats,
        "statistic": "median",
    }


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def save(report: dict[str, Any], folder: Path, out: Any) -> None:
    """Write the report beside the others, named after benchmark, day and number of cores."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{report['benchmark']}-{datetime.date.today()}-{report['hardware']['cpus']}cpu.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {path}", file=out)


if __name__ == "__main__":
    main()
