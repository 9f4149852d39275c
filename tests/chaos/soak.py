"""A long run in which an actor is killed again and again: what it costs, and whether anything grows or is lost.

    python tests/chaos/soak.py [--shards 500] [--minutes 20] [--kill-every 30] [--json]

A command of its own, pytest does not run it. `pipeline run` with two actors of one thread each embeds shards of photographs
with ResNet-18 (random weights); a short run beforehand tells how many images a shard needs for the run to last that long. The
shards are a few distinct ones under many names (hard links), so that a calm run of the distinct ones gives every expected row.

The first part of the run is left in peace (`CALM_SHARE` of the shards): its images a second are the reference. Then a random
actor that has been at work for a while is killed every `--kill-every` seconds. From the kill until its replacement has embedded
its first batch there is an actor missing; that time is subtracted. What is left of the difference is the work that was thrown
away and done again. Memory is the resident set of the driver and of each actor,
every second; slopes are least squares over what comes after the first minute. The actors of the calm part live long enough to
have one; the others tell whether later ones need more.

At the end the rows are compared with the expected ones. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from conftest import crops, settings, shard_members, tar_bytes
from helpers import ROOT, TESTS, actors_below
from memory import circumstances, save
from oracle import broken_promises, contents, difference

import pipeline
from pipeline.storage import Store

RESULTS = Path(__file__).parent / "results"
NUM_ACTORS = 2
NUM_DISTINCT = 8
"""Shards that differ; the others are further names of these."""
CALM_SHARE = 0.25
"""Of the shards, before the first kill."""
END_SHARE = 0.98
"""Of the shards: what comes after them is not measured, since there is not work for two any more."""
EVERY_S = 1.0
SETTLED_S = 15.0
"""An actor is not killed before it is so old, and its memory then is its level."""
PLATEAU_S = 60.0
"""The slope of an actor's memory is that from this age on, and of actors that live for as long again."""
MAX_RUNS = 4
MB = 1e6


@dataclass(slots=True)
class Watched:
    """What was seen of one process: seconds since the epoch, and bytes."""

    seen_at: list[float] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)

    def after(self, age_s: float) -> Watched:
        """What was seen from this age on."""
        first = next((number for number, at in enumerate(self.seen_at) if at - self.seen_at[0] >= age_s), len(self.seen_at))
        return Watched(self.seen_at[first:], self.rss[first:])

    def slope(self) -> float | None:
        """Megabytes a minute; None where there is too little to tell."""
        if len(self.rss) < PLATEAU_S / EVERY_S:
            return None
        at = np.array(self.seen_at)
        return float(np.polyfit((at - at[0]) / 60, np.array(self.rss) / MB, 1)[0])


@dataclass(slots=True)
class Kill:
    """One actor that was killed, and the one that came for it."""

    at: float
    pid: int
    replaced_by: int | None = None
    back_at: float = 0.0
    """When the replacement had embedded its first batch."""


@dataclass(slots=True)
class Soak:
    """What was seen of the long run."""

    code: int
    report: dict[str, Any]
    stderr: str
    started_at: float
    seconds: float
    kills: list[Kill]
    driver: Watched
    actors: dict[int, Watched]
    finished_at: list[float]
    """For each shard, in order of time: when its first partition was there."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill actors for a long time, and see what it costs.")
    parser.add_argument("--shards", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--kill-every", type=float, default=30.0, help="seconds")
    parser.add_argument("--seed", type=int, default=0, help="decides which actor is killed")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, all else on stderr")
    arguments = parser.parse_args()
    out = sys.stderr if arguments.json else sys.stdout
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is ended then too
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        rate = calibrated(folder)
        per_shard = max(8, round(rate * 60 * arguments.minutes / arguments.shards))
        print(f"calibrated: {rate:.0f} images/s, so {arguments.shards} shards of {per_shard} images", file=out, flush=True)
        distinct = write_distinct(folder / "distinct", per_shard)
        expected_run(folder)
        (folder / "shards").mkdir()
        for number in range(arguments.shards):
            (folder / "shards" / f"{number:05d}.tar").hardlink_to(distinct[number % NUM_DISTINCT])
        soak = soaked(folder, arguments, out)
        codes = [soak.code]
        while codes[-1] and len(codes) < MAX_RUNS:
            codes.append(start(folder, "shards", "out", "again").wait())
        verdict = judged(folder, arguments.shards)
    report = {
        "benchmark": "soak",
        **circumstances(1, f"the first {CALM_SHARE:.0%} of the shards are left in peace", ("ray", "psutil", "torchvision")),
        "command": " ".join(["python", "tests/chaos/soak.py", *sys.argv[1:]]),
        "settings": {
            "model": "torchvision/resnet18",
            "actors": NUM_ACTORS,
            "shards": arguments.shards,
            "images_per_shard": per_shard,
            "kill_every_s": arguments.kill_every,
            "seed": arguments.seed,
        },
        "exit_codes": codes,
        "error": soak.report.get("error"),
        "oracle": verdict,
        **measured(soak, per_shard),
    }
    for line in shown(report):
        print(line, file=out)
    save(report, arguments.out, out)
    if arguments.json:
        print(json.dumps(report))
    sys.exit(bool(codes[-1] or verdict["problems"]))


# The runs


def start(folder: Path, source: str, output: str, name: str) -> subprocess.Popen[bytes]:
    """`pipeline run` from one folder to another; what it says goes to `NAME.out` and `NAME.err`."""
    model = {"model": "torchvision/resnet18", "weights": "seed:0", "nodes": {"embedding": {"node": "flatten"}}}
    wanted = settings(
        f"{folder}/{source}/*.tar",
        folder / output,
        backbone=model,
        run={"workers": NUM_ACTORS, "threads": 1, "optimize": "fold"},
    )
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(wanted.model_dump(mode="json")))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)])}
    command = [sys.executable, "-m", "pipeline", "run", str(path), "--json"]
    with open(folder / f"{name}.out", "wb") as out, open(folder / f"{name}.err", "wb") as err:
        return subprocess.Popen(command, stdout=out, stderr=err, env=environment, cwd=ROOT)


def report_of(folder: Path, name: str) -> dict[str, Any]:
    lines = (folder / f"{name}.out").read_text().strip().splitlines()
    return dict(json.loads(lines[-1])) if lines else {}


def finish_times(output: Path) -> list[float]:
    """When the first partition of each shard was there, in order of time. A shard whose actor died may have several."""
    first: dict[str, float] = {}
    for file in (output / "data").glob("*.parquet"):
        identity, at = file.name.rpartition("-")[0], file.stat().st_mtime
        first[identity] = min(at, first.get(identity, at))
    return sorted(first.values())


def calibrated(folder: Path) -> float:
    """Images a second of a calm run, from its first partition on."""
    num_shards, per_shard = 24, 32
    images = crops(per_shard)
    (folder / "calibration").mkdir()
    for number in range(num_shards):
        (folder / "calibration" / f"{number:05d}.tar").write_bytes(tar_bytes(shard_members(images, 0, "jpg")))
    if start(folder, "calibration", "calibration-out", "calibration").wait():
        raise SystemExit(f"the run to calibrate with failed:\n{(folder / 'calibration.err').read_text()[-2000:]}")
    times = finish_times(folder / "calibration-out")
    # Two actors with several shards each in hand: the first partitions come together.
    skipped = 2 * NUM_ACTORS
    return (num_shards - skipped - 1) * per_shard / (times[-1] - times[skipped])


def write_distinct(folder: Path, per_shard: int) -> list[Path]:
    folder.mkdir()
    images = crops(NUM_DISTINCT * per_shard, seed=1)
    paths = []
    for number in range(NUM_DISTINCT):
        paths.append(folder / f"{number:05d}.tar")
        members = shard_members(images[number * per_shard : (number + 1) * per_shard], number * per_shard, "jpg")
        paths[-1].write_bytes(tar_bytes(members))
    return paths


def expected_run(folder: Path) -> None:
    """Every row that there can be, from a run that nobody disturbs."""
    if start(folder, "distinct", "expected", "expected").wait():
        raise SystemExit(f"the calm run failed:\n{(folder / 'expected.err').read_text()[-2000:]}")


def soaked(folder: Path, arguments: argparse.Namespace, out: Any) -> Soak:
    """The long run, watched and disturbed."""
    draw = random.Random(arguments.seed)
    kills, actors, driver = list[Kill](), dict[int, Watched](), Watched()
    next_kill, next_word, num_finished = 0.0, 0.0, 0
    started_at = time.time()
    process = start(folder, "shards", "out", "soak")
    try:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            now = time.time()
            look(watched, driver, now)
            alive = {each.pid: each for each in actors_below([process.pid])}
            for pid, each in alive.items():
                look(each, actors.setdefault(pid, Watched()), now)
            match_replacements(kills, actors)
            if now >= next_word:
                num_finished = len(finish_times(folder / "out"))
                memory = f"driver {driver.rss[-1] / MB:.0f} MB" if driver.rss else ""
                print(f"{now - started_at:6.0f} s  {num_finished} shards  {len(kills)} kills  {memory}", file=out, flush=True)
                next_word = now + 15.0
            if num_finished >= CALM_SHARE * arguments.shards and now >= next_kill:
                settled = [pid for pid in alive if now - actors[pid].seen_at[0] >= SETTLED_S]
                if settled:
                    victim = draw.choice(sorted(settled))
                    with contextlib.suppress(psutil.NoSuchProcess):
                        alive[victim].kill()
                        kills.append(Kill(now, victim))
                        next_kill = now + arguments.kill_every
            time.sleep(max(0.0, now + EVERY_S - time.time()))
    finally:
        process.kill()
        process.wait()
    seconds = time.time() - started_at
    report = report_of(folder, "soak")
    first_batch = {actor["pid"]: actor["first_batch_at"] for actor in report.get("actors", [])}
    for kill in kills:
        # One that was killed before it had finished a shard told nothing: then there was an actor missing until its own end.
        born = actors[kill.replaced_by].seen_at[-1] if kill.replaced_by is not None else started_at + seconds
        kill.back_at = (first_batch.get(kill.replaced_by) if kill.replaced_by is not None else None) or born
    return Soak(
        code=process.returncode,
        report=report,
        stderr=(folder / "soak.err").read_text(),
        started_at=started_at,
        seconds=seconds,
        kills=kills,
        driver=driver,
        actors=actors,
        finished_at=finish_times(folder / "out"),
    )


def look(process: psutil.Process, watched: Watched, now: float) -> None:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        watched.rss.append(process.memory_info().rss)
        watched.seen_at.append(now)


def match_replacements(kills: Sequence[Kill], actors: dict[int, Watched]) -> None:
    """The first actor that appeared after a kill, and came for no earlier one, is the one that came for it."""
    taken = {kill.replaced_by for kill in kills}
    for kill in kills:
        if kill.replaced_by is None:
            later = [pid for pid, seen in actors.items() if pid not in taken and seen.seen_at and seen.seen_at[0] > kill.at]
            kill.replaced_by = min(later, key=lambda pid: actors[pid].seen_at[0], default=None)
            taken.add(kill.replaced_by)


# What it says


def judged(folder: Path, num_shards: int) -> dict[str, Any]:
    """The rows against the expected ones, and the log against its partitions."""
    calm = contents(pipeline.open_dataset(str(folder / "expected")))
    expected = {f"{number:05d}": calm[f"{number % NUM_DISTINCT:05d}"] for number in range(num_shards)}
    dataset = pipeline.open_dataset(str(folder / "out"))
    differs = difference(contents(dataset), expected)
    listed = {file.url: file for file in Store().list(f"{folder}/shards/*.tar")}
    problems = broken_promises(dataset, listed) + ([str(differs)] if differs else [])
    return {
        "rows": len(dataset),
        "expected": sum(len(shard.keys) for shard in expected.values()),
        "lost": differs.lost,
        "doubled": differs.doubled,
        "torn": differs.torn,
        "quarantined": len(dataset.quarantine()),
        "problems": problems,
    }


def measured(soak: Soak, per_shard: int) -> dict[str, Any]:
    """Speed in both parts, what was missing, and slopes of memory."""
    started = [at for actor in soak.report.get("actors", []) if (at := actor["first_batch_at"]) is not None]
    calm_from = sorted(started)[NUM_ACTORS - 1] if len(started) >= NUM_ACTORS else soak.started_at
    first_kill = soak.kills[0].at if soak.kills else soak.started_at + soak.seconds
    end = soak.finished_at[int(END_SHARE * (len(soak.finished_at) - 1))]
    calm = part(soak, per_shard, calm_from, first_kill)
    chaos = part(soak, per_shard, first_kill, end)
    slopes = [slope for seen in soak.actors.values() if (slope := seen.after(PLATEAU_S).slope()) is not None]
    levels = Watched()
    for seen in soak.actors.values():
        if settled := seen.after(SETTLED_S).rss[: int(SETTLED_S / EVERY_S)]:
            levels.seen_at.append(seen.seen_at[0])
            levels.rss.append(int(statistics.median(settled)))
    missing = [kill.back_at - kill.at for kill in soak.kills]
    driver = soak.driver.after(PLATEAU_S)
    return {
        "seconds": round(soak.seconds, 1),
        "kills": len(soak.kills),
        "actors_lost": soak.report.get("actors_lost"),
        "missing_s": {
            "median": rounded(statistics.median(missing)),
            "most": rounded(max(missing)),
            "sum": rounded(sum(missing)),
        }
        if missing
        else None,
        "speed": {
            "calm": calm,
            "chaos": chaos,
            "chaos_share_of_calm": rounded(chaos["images_per_s"] / calm["images_per_s"], 3),
            "without_missing_share_of_calm": rounded(chaos["images_per_actor_s"] / calm["images_per_actor_s"], 3),
        },
        "memory": {
            "driver_mb": {
                "early": level(driver.rss[:60]),
                "late": level(driver.rss[-60:]),
                "most": level([max(driver.rss, default=0)]),
            },
            "driver_mb_per_minute": rounded(driver.slope(), 2),
            "actors": len(soak.actors),
            "actor_mb_per_minute": [rounded(slope, 2) for slope in slopes],
            "actor_mb": {
                "first": level(levels.rss[:1]),
                "last": level(levels.rss[-1:]),
                "most": level([max(levels.rss, default=0)]),
            },
        },
    }


def part(soak: Soak, per_shard: int, begin: float, end: float) -> dict[str, Any]:
    """Speed between two moments, a second and a second of an actor that was there."""
    images = per_shard * sum(begin < at <= end for at in soak.finished_at)
    missing = sum(max(0.0, min(kill.back_at, end) - max(kill.at, begin)) for kill in soak.kills)
    seconds = max(1e-9, end - begin)
    return {
        "seconds": rounded(seconds),
        "images": images,
        "missing_actor_s": rounded(missing),
        "images_per_s": rounded(images / seconds, 2),
        "images_per_actor_s": rounded(images / max(1e-9, NUM_ACTORS * seconds - missing), 2),
    }


def level(rss: Sequence[int]) -> float | None:
    return rounded(statistics.median(rss) / MB) if rss else None


def rounded(value: float | None, digits: int = 1) -> Any:
    return round(value, digits) if value is not None else None


def shown(report: dict[str, Any]) -> Iterator[str]:
    """The result in a few lines."""
    speed, memory, oracle = report["speed"], report["memory"], report["oracle"]
    yield f"exit codes {report['exit_codes']}, {report['kills']} kills in {report['seconds']:.0f} s"
    found = ", ".join(f"{oracle[name]} {name}" for name in ("lost", "doubled", "torn"))
    yield f"rows {oracle['rows']:,} of {oracle['expected']:,}: {found}"
    yield from (f"PROBLEM: {problem}" for problem in oracle["problems"])
    if report["missing_s"]:
        missing = report["missing_s"]
        yield f"an actor was missing for {missing['median']} s after a kill (median; at most {missing['most']} s)"
    yield f"images/s: calm {speed['calm']['images_per_s']}, under kills {speed['chaos']['images_per_s']}"
    yield f"without the time in which an actor was missing: {speed['without_missing_share_of_calm']:.1%} of the calm part"
    yield f"driver: {memory['driver_mb']} MB, {memory['driver_mb_per_minute']} MB a minute"
    yield f"{memory['actors']} actors: {memory['actor_mb']} MB at the age of {SETTLED_S:g} s"
    yield f"those that lived for {2 * PLATEAU_S:g} s: {memory['actor_mb_per_minute']} MB a minute from {PLATEAU_S:g} s on"


if __name__ == "__main__":
    main()
