"""What one large shard costs at the end of a run. A command of its own, pytest does not run it.

    python tests/benchmarks/tail.py [--repeats 5] [--images 40] [--json]

Four actors of one thread each; the model waits 20 ms for each picture, without the interpreter lock and without a core, as if
every actor had a device of its own: so four of them are four times as fast on any machine. Three sources of as many images in
all, N being `--images`: `balanced`, 62 shards of N; `large`, 12 shards of N and one of 50 N; `large alone`, the same while no
actor lends to another. The large shard is the first to be dealt.

Seconds are those of `Pool.extract`, from the first shard that is dealt to the last partition; the actors are ready before.
`tail` is the part of them after the first actor ran out of work. Rounds alternate; medians, and the ratios of medians to
`balanced`. Every round checks that no image is missing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import ray
import torch
from conftest import noise, settings, shard_members, tar_bytes
from memory import RESULTS, circumstances, save
from models import tiny
from torch import nn

from pipeline import config
from pipeline.driver import Goal
from pipeline.extract import pool as pool_module
from pipeline.extract import tail
from pipeline.extract.pool import Pool
from pipeline.plan import make

NUM_ACTORS = 4
WAIT_S = 0.02
SMALL, TIMES = 12, 50
"""Small shards beside the large one, and how many times as large that is."""
GOAL = 1.3
CASES = ("balanced", "large", "large alone")


class Waits(nn.Module):
    """Takes its time for every picture; torch.fx cannot trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.pooled = tiny()

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        time.sleep(WAIT_S * len(images_BCHW))
        pooled_BD: torch.Tensor = self.pooled(images_BCHW)
        return pooled_BD


def waits() -> nn.Module:
    return Waits()


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what one large shard costs.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, default=40, help="of a small shard")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, all else on stderr")
    arguments = parser.parse_args()
    out = sys.stderr if arguments.json else sys.stdout
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    rounds: dict[str, list[dict[str, Any]]] = {case: [] for case in CASES}
    ray.init(address="local", num_cpus=NUM_ACTORS, num_gpus=0, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wanted = {kind: written(folder, kind, arguments.images) for kind in ("balanced", "large")}
        goals = {kind: Goal.of(each) for kind, each in wanted.items()}
        pool_module.IDLE_S = math.inf
        with Pool(wanted["balanced"]) as pool:
            while pool.num_ready < NUM_ACTORS:
                measured(pool, goals["balanced"])
            for number in range(arguments.repeats):
                turn = number % len(CASES)
                for case in CASES[turn:] + CASES[:turn]:
                    tail.LOANS_IN_FLIGHT = 0 if case == "large alone" else 2
                    rounds[case].append(measured(pool, goals[case.partition(" ")[0]]))
                    print(f"  {number + 1}/{arguments.repeats}  {case:<12} {shown(rounds[case][-1])}", file=out, flush=True)
    ray.shutdown()
    lines = {case: summary(rounds[case], rounds["balanced"]) for case in CASES}
    for case, line in lines.items():
        print(f"{case:<12} {line['seconds']:6.2f} s  {line['ratio']:.2f} of balanced  tail {line['tail_s']:.2f} s", file=out)
    report = {
        "benchmark": "tail",
        "goal": {"ratio": GOAL},
        **circumstances(arguments.repeats, "one run of all shards, not counted", ("ray",)),
        "settings": {
            "actors": NUM_ACTORS,
            "wait_s": WAIT_S,
            "images": (SMALL + TIMES) * arguments.images,
            "images_of_small_shard": arguments.images,
            "large_shard_is_times": TIMES,
        },
        "results": lines,
        "rounds": rounds,
    }
    save(report, RESULTS, out)
    if arguments.json:
        print(json.dumps(report))


def written(folder: Path, kind: str, num_images: int) -> config.Config:
    """The shards, and a config for them."""
    sizes = [num_images] * (SMALL + TIMES if kind == "balanced" else SMALL)
    if kind == "large":
        sizes.append(TIMES * num_images)
    images, first = noise(sum(sizes)), 0
    (folder / kind).mkdir()
    for number, size in enumerate(sizes):
        members = shard_members(images[first : first + size], first)
        (folder / kind / f"{number:03d}.tar").write_bytes(tar_bytes(members))
        first += size
    model = {"model": "python/tail:waits", "weights": "seed:0", "nodes": {"embedding": {"node": "pooled"}}}
    run = {"workers": NUM_ACTORS, "threads": 1, "optimize": "none", "batch_size": 8}
    return settings(f"{folder}/{kind}/*.tar", folder / f"{kind}-out", backbone=model, run=run)


def extracted(pool: Pool, goal: Goal) -> int:
    """Images of all shards, as the driver has them extracted."""
    todo = make(goal.source.shards(), None, goal.target)
    tasks = sorted([*todo.extract], key=lambda task: -task.shard.num_bytes)
    results = list(pool.extract(tasks, goal.target))
    assert len(results) == len(tasks)
    return sum(result.partition.num_embedded for result in results if result.partition is not None)


def measured(pool: Pool, goal: Goal) -> dict[str, Any]:
    num_lent, tail_s, start = pool.num_lent, pool.tail_s, time.perf_counter()
    num_images = extracted(pool, goal)
    seconds = time.perf_counter() - start
    for path in Path(goal.target.url.removeprefix("file://"), "data").glob("*.parquet"):
        path.unlink()  # or the next round would find nothing to do
    return {
        "seconds": seconds,
        "tail_s": pool.tail_s - tail_s,
        "images_lent": pool.num_lent - num_lent,
        "images": num_images,
        "actors": pool.num_ready,
    }


def shown(line: dict[str, Any]) -> str:
    return f"{line['seconds']:6.2f} s  tail {line['tail_s']:5.2f} s  {line['images_lent']} of {line['images']} images lent"


def summary(lines: Sequence[dict[str, Any]], balanced: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians, the range of the seconds, and the ratio to the balanced case."""
    for line in lines:
        assert (line["images"], line["actors"]) == (balanced[0]["images"], NUM_ACTORS)
    seconds = [line["seconds"] for line in lines]
    medians = {name: statistics.median(line[name] for line in lines) for name in ("seconds", "tail_s", "images_lent")}
    ratio = medians["seconds"] / statistics.median(line["seconds"] for line in balanced)
    return {**medians, "seconds_range": [min(seconds), max(seconds)], "ratio": ratio}


if __name__ == "__main__":
    main()
