"""From `pipeline run CONFIG` to the first embedded batch, against what Ray and PyTorch take. pytest does not run it.

    python tests/benchmarks/startup.py --photographs DIR [--model mobilenet_v3_small] [--repeats 5] [--json]

`DIR` is what `photographs.py` made. In turn, each in a fresh process, from its start:

    ours    `pipeline run` on one tar of 32 small photographs, a torchvision model with weights `seed:0`: until the first
            batch is embedded, as the summary tells it
    floor   the least that does the same: import ray, `ray.init`, one actor that imports torch and torchvision, builds the same
            model and does one forward pass of 32 zeros; until the process that started it has the answer

`total` is until the process has ended. The goal is on the ratio of the medians, and depends on what else the machine does less
than the seconds do. The first round of all is not counted: it brings the files into the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from memory import RESULTS, ROOT, circumstances, save

BATCH_SIZE = 32
POLL_S = 0.01
GOAL = {"ratio": 1.3}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the time to the first batch.")
    parser.add_argument("--photographs", type=Path)
    parser.add_argument("--model", default="mobilenet_v3_small", help="a classification model of torchvision")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, the table on stderr")
    parser.add_argument("--floor", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.floor:
        floor_in_child(arguments.model)
        return
    if arguments.photographs is None:
        parser.error("--photographs is missing")
    out = sys.stderr if arguments.json else sys.stdout
    rounds = []
    print(f"{'round':>7} {'ours':>7} {'floor':>7} {'ratio':>6} {'ours total':>10} {'floor total':>11}", file=out, flush=True)
    with tempfile.TemporaryDirectory(prefix="startup-") as name:
        folder = Path(name)
        shard = make_shard(arguments.photographs, folder)
        for number in range(arguments.repeats + 1):
            found = {"ours": ours(shard, arguments.model, folder / f"out-{number}"), "floor": floor(arguments.model, folder)}
            seconds = " ".join(f"{found[side]['first_batch_s']:7.2f}" for side in found)
            ratio = found["ours"]["first_batch_s"] / found["floor"]["first_batch_s"]
            totals = f"{found['ours']['total_s']:10.2f} {found['floor']['total_s']:11.2f}"
            print(f"{number or 'warm-up':>7} {seconds} {ratio:6.2f} {totals}", file=out, flush=True)
            if number:
                rounds.append(found)
    results = {side: summary([each[side] for each in rounds]) for side in ("ours", "floor")}
    ratio = results["ours"]["first_batch_s"] / results["floor"]["first_batch_s"]
    met = ratio <= GOAL["ratio"]
    print(f"ratio of the medians {ratio:.2f}, goal at most {GOAL['ratio']}: {'met' if met else 'MISSED'}", file=out)
    report = {
        "benchmark": "startup",
        "goal": GOAL,
        "met": met,
        **circumstances(arguments.repeats, "one round", ("ray", "torchvision")),
        "settings": {"model": arguments.model, "weights": "seed:0", "batch_size": BATCH_SIZE},
        "ratio": ratio,
        "results": results,
    }
    save(report, arguments.out, out)
    if arguments.json:
        print(json.dumps(report))


def make_shard(photographs: Path, folder: Path) -> Path:
    """One tar of one batch."""
    shard = folder / "shard.tar"
    with tarfile.open(shard, "w") as tar:
        for file in sorted((photographs / "small").glob("*.jpg"))[:BATCH_SIZE]:
            tar.add(file, file.name)
    return shard


def ours(shard: Path, model: str, output: Path) -> dict[str, Any]:
    """One run into a folder that is not there yet."""
    settings = {
        "source": {"url": str(shard)},
        "backbone": {
            "model": f"torchvision/{model}",
            "weights": "seed:0",
            "nodes": {"embedding": {"node": "flatten"}},
        },
        "output": {"url": str(output)},
        "run": {"batch_size": BATCH_SIZE, "report": False},
    }
    config = output.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "pipeline", "run", str(config), "--json"]
    start, started_at, first_file_s = time.monotonic(), time.time(), None
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment(), cwd=shard.parent
    ) as process:
        while process.poll() is None:
            if first_file_s is None and any((output / "data").glob("**/*.parquet")):
                first_file_s = time.monotonic() - start
            time.sleep(POLL_S)
        total_s = time.monotonic() - start
        assert process.stdout is not None
        report = json.loads(process.stdout.read().splitlines()[-1])
    assert process.returncode == 0, report
    assert report["images"]["embedded"] == BATCH_SIZE
    return {
        # The summary's clock starts with the run, after the imports of the command line.
        "first_batch_s": report["started_at"] + report["first_batch_s"] - started_at,
        "first_file_s": first_file_s,
        "total_s": total_s,
    }


def floor(model: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--floor", "--model", model]
    start = time.monotonic()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment(), cwd=folder
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        first_batch_s = time.monotonic() - start
        process.wait()
    assert process.returncode == 0 and line.startswith(f"({BATCH_SIZE},"), line
    return {"first_batch_s": first_batch_s, "total_s": time.monotonic() - start}


def floor_in_child(model: str) -> None:
    """Ray, an actor, the model, one batch."""
    import ray

    ray.init(address="local", include_dashboard=False, log_to_driver=False)

    class Actor:
        def embed(self, name: str) -> tuple[int, ...]:
            import torch
            import torchvision

            torch.manual_seed(0)
            network = torchvision.models.get_model(name, weights=None).eval()
            with torch.inference_mode():
                return tuple(network(torch.zeros(BATCH_SIZE, 3, 224, 224)).shape)

    actor: Any = ray.remote(Actor).options(num_cpus=1).remote()
    print(ray.get(actor.embed.remote(model)), flush=True)
    ray.shutdown()


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    first = [run["first_batch_s"] for run in runs]
    found = {
        "first_batch_s": statistics.median(first),
        "first_batch_s_range": [min(first), max(first)],
        "total_s": statistics.median(run["total_s"] for run in runs),
    }
    if "clock" in runs[0]:
        found |= {"clock": runs[0]["clock"], "first_file_s": statistics.median(run["first_file_s"] for run in runs)}
    return found


if __name__ == "__main__":
    main()
