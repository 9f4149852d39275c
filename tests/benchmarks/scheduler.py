"""What a shard costs the driver, and so how many shards one driver can keep up with. A command, pytest does not run it.

    python tests/benchmarks/scheduler.py [--shards 10000 100000 1000000] [--actors 16 1000] [--repeats 3] [--json]

`driver`: the real planner, the real driver's loop and the real pool with its scheduler, over N shards that a listing makes up
and actors that are played in this process: each answers at once with a description as a real one would, unpickled. What the
played actors take themselves is left out. `µs a shard` is plan + extraction by N (`plan` alone in its own column); `B planned`
is what the plan adds to the process, `B finished` what it has grown by during extraction, both by N: what remains of a
finished shard is its description. Each line is a process of its own.

`Ray`: one idle real actor that answers with such a description, in the driver's CPU time and in elapsed time, one call after
the other and with as many in flight as an actor has shards; `wait` is the same with `ray.wait` over all calls that are out, as
the pool did before: it looks at all of them for every answer, and `many` are 3000, those of 1000 actors.

`shards an hour` is what one core of the driver can do: 3600 s by the sum of both costs (CPU time, calls in flight).
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import pickle
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from memory import RESULTS, circumstances, save

GOAL = {"driver_us": 100.0}
ROWS, SHARD_BYTES = 5000, 500 << 20
NUM_CALLS = 2000
IN_FLIGHT, MANY = 3, 3000


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what a shard costs the driver.")
    parser.add_argument("--shards", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--actors", type=int, nargs="+", default=[16, 1000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, the table on stderr")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        order = json.loads(arguments.child)
        task: Callable[..., dict[str, Any]] = {"driver": driver, "ray": ray_calls}[order.pop("task")]
        print(json.dumps(task(**order)))
        return
    out = sys.stderr if arguments.json else sys.stdout
    print("   shards actors µs a shard of it plan B planned B finished", file=out, flush=True)
    lines = []
    for num_shards in arguments.shards:
        for num_actors in arguments.actors:
            order = {"task": "driver", "num_shards": num_shards, "num_actors": num_actors}
            lines.append(medians([child(order) for _ in range(arguments.repeats)]))
            line = lines[-1]
            print(
                f"{num_shards:9} {num_actors:6} {line['driver_us']:10.1f} {line['plan_us']:10.1f} "
                f"{line['planned_bytes_per_shard']:9.0f} {line['finished_bytes_per_shard']:10.0f}",
                file=out,
                flush=True,
            )
    calls = medians([child({"task": "ray"}) for _ in range(arguments.repeats)])
    print(f"\n{'Ray, a call':<34} {'CPU µs':>7} {'elapsed µs':>10}", file=out)
    for name in ("one_by_one", "in_flight", "wait", "wait_many"):
        print(f"{name.replace('_', ' '):<34} {calls[f'{name}_cpu_us']:7.0f} {calls[f'{name}_us']:10.0f}", file=out)
    per_hour = 3600e6 / (max(line["driver_us"] for line in lines) + calls["in_flight_cpu_us"])
    print(f"\n{per_hour:,.0f} shards an hour", file=out)
    report = {
        "benchmark": "scheduler",
        "goal": GOAL,
        **circumstances(arguments.repeats, "none: a process each", ("ray",)),
        "settings": {"rows_of_a_shard": ROWS, "calls": NUM_CALLS, "in_flight": IN_FLIGHT},
        "driver": lines,
        "ray": calls,
        "shards_an_hour": per_hour,
    }
    save(report, RESULTS, out)
    if arguments.json:
        print(json.dumps(report))


def child(order: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", json.dumps(order)]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(finished.stdout.strip().splitlines()[-1]))


def medians(lines: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: statistics.median(line[name] for line in lines) for name in lines[0]}


# The driver, with actors that are played


def driver(num_shards: int, num_actors: int) -> dict[str, Any]:
    """Plan and extract N shards."""
    from planning import finished, shard_named, target_of

    from pipeline import driver, plan
    from pipeline.extract import pool, room
    from pipeline.extract.actors import Loan, Report
    from pipeline.extract.carry import Task
    from pipeline.report.terminal import Watch

    logging.disable(logging.WARNING)
    target = target_of("committed", Path("/nonexistent"))

    class Reference:
        """Of a call: answered at once."""

        def __init__(self, answer: Any) -> None:
            self._future: Future[Any] = Future()
            self._future.set_result(answer)

        def future(self) -> Future[Any]:
            return self._future

    class Actor:
        def __init__(self, number: int) -> None:
            self._number = number
            for name in ("extract", "start", "where"):
                setattr(self, name, SimpleNamespace(remote=getattr(self, f"_{name}")))
            nothing = Loan(number=0, num_images=0, num_bytes_left=0)
            self.lend = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda _: (Reference(nothing), None)))

        def _where(self) -> Reference:
            return Reference(f"node {self._number}")

        def _start(self, *_: object) -> Reference:
            info = {"node": f"node {self._number}", "pid": self._number, "device": "cpu", "batch_size": 16, "threads": 2}
            return Reference(info)

        def _extract(self, task: Task) -> Reference:
            report = Report(partition=finished(task.shard, target, ROWS), stages=STAGES, chosen={"batch_size": 16})
            return Reference(pickle.loads(pickle.dumps(report)))

    class PlayedPool(pool.Pool):
        """Hires actors without a cluster."""

        def _room(self, _: object) -> room.Room:
            return room.Room([pool.Place(f"node {number}") for number in range(num_actors)])

        def _hire(self, place: pool.Place) -> pool.Worker:
            worker = pool.Worker(Actor(len(self._scheduler.workers)), place)
            self._scheduler.hired(worker)
            self._when_done(worker.actor.where.remote(), lambda answer: self._placed(worker, answer))
            return worker

    pool.ray = SimpleNamespace(put=lambda value: value, kill=lambda actor: None)  # type: ignore[assignment]
    pool.draining_nodes = lambda: ()
    pool.Gauges = lambda _: SimpleNamespace(show=lambda _: None)  # type: ignore[assignment,misc]
    settings = driver.config.parse(
        {
            "source": {"url": "s3://photos/shards/*.tar"},
            "backbone": {"model": "python/null:model", "weights": "builtin", "nodes": {"embedding": {"node": "flatten"}}},
            "output": {"url": "/nonexistent"},
        }
    )
    played = PlayedPool(settings)
    crew: Any = SimpleNamespace(pool=lambda: played)
    goal: Any = SimpleNamespace(target=target)
    summary = driver.Summary(run_id="", output="", recipe_id="")

    def listing() -> Iterator[Any]:
        return (shard_named(f"s3://photos/shards/{number:08d}.tar") for number in range(num_shards))

    def seconds(what: Callable[[], Any]) -> float:
        """Of this process, whatever else the machine does."""
        start = time.process_time()
        what()
        return time.process_time() - start

    listing_s = seconds(lambda: collections.deque(listing(), maxlen=0))
    before_bytes, todo = used_bytes(), plan.Plan()

    def make() -> None:
        nonlocal todo
        todo = plan.make(listing(), None, target)

    plan_s = seconds(make) - listing_s
    planned_bytes, some = used_bytes(), todo.extract[:: max(1, num_shards // 10_000)]
    playing_s = seconds(lambda: [Actor(0)._extract(task) and None for task in some]) * num_shards / len(some)
    done = list[Any]()
    with Watch() as watch:
        watch.planned(todo)
        extract_s = seconds(lambda: done.extend(driver._extract(goal, todo, summary, crew, watch))) - playing_s
    assert len(done) == num_shards, "every shard has its partition"
    return {
        "num_shards": num_shards,
        "num_actors": num_actors,
        "driver_us": (plan_s + extract_s) / num_shards * 1e6,
        "plan_us": plan_s / num_shards * 1e6,
        "planned_bytes_per_shard": (planned_bytes - before_bytes) / num_shards,
        "finished_bytes_per_shard": (used_bytes() - planned_bytes) / num_shards,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


STAGES = dict.fromkeys(("fetch", "decode", "forward", "write", "no_shard", "no_sample", "no_batch", "no_rows", "elapsed"), 1.0)


def used_bytes() -> int:
    """Resident now, after what is free has been given back."""
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# Ray


def ray_calls() -> dict[str, Any]:
    """CPU time of this process, and elapsed time, for a call to an idle actor."""
    import queue

    import ray
    from planning import finished, shard_named, target_of

    from pipeline.extract.actors import Report
    from pipeline.extract.carry import Task

    target = target_of("committed", Path("/nonexistent"))
    shard = shard_named("s3://photos/shards/00000000.tar")
    task = Task(shard=shard)
    report = Report(partition=finished(shard, target, ROWS), stages=STAGES, chosen={"batch_size": 16})

    @ray.remote(num_cpus=0, max_concurrency=8)
    class Actor:
        def extract(self, task: Task) -> Report:
            return report

    ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    actor = Actor.remote()

    def one_by_one() -> None:
        for _ in range(NUM_CALLS):
            ray.get(actor.extract.remote(task))

    def in_flight() -> None:
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for number in range(NUM_CALLS + IN_FLIGHT):
            if number >= IN_FLIGHT:
                answers.get().result()
            if number < NUM_CALLS:
                actor.extract.remote(task).future().add_done_callback(answers.put)

    def wait(num_in_flight: int) -> Callable[[], None]:
        def waiting() -> None:
            references: dict[Any, None] = {}
            for number in range(NUM_CALLS + num_in_flight):
                if number >= num_in_flight:
                    ((done,), _) = ray.wait(list(references), num_returns=1)
                    del references[done]
                    ray.get(done)
                if number < NUM_CALLS:
                    references[actor.extract.remote(task)] = None

        return waiting

    measured: dict[str, Any] = {}
    ways = {"one_by_one": one_by_one, "in_flight": in_flight, "wait": wait(IN_FLIGHT), "wait_many": wait(MANY)}
    one_by_one()
    for name, way in ways.items():
        cpu, start = time.process_time(), time.perf_counter()
        way()
        measured[f"{name}_us"] = (time.perf_counter() - start) / NUM_CALLS * 1e6
        measured[f"{name}_cpu_us"] = (time.process_time() - cpu) / NUM_CALLS * 1e6
    ray.shutdown()
    return measured


if __name__ == "__main__":
    main()
