"""The actors on what the cluster has, kept busy with shards and replaced when they die.

With `actors.py` the only room that talks to Ray.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import os
import sys
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import config
from pipeline.dataset.partition import Target
from pipeline.errors import GuardError, IncompleteRun, PipelineError, ShardChanged, StorageError, StorageRefused, WorldError
from pipeline.extract.actors import POLL_S, SHARDS_IN_FLIGHT, Extractor, Result
from pipeline.extract.carry import NOTHING_KNOWN, KnownRows, Task
from pipeline.extract.cluster import cause, first_line
from pipeline.source import Source

logger = logging.getLogger(__name__)

MAX_STILLBORN = 3
"""So many actors may die before the first one has started."""
MAX_FRUITLESS = 10
"""Shards that may be given up, and actors that may be lost with several shards in hand, while no shard is finished."""
MAX_PREPARED = 8
"""Actors that are started before it is known how many shards there are."""


@dataclass(slots=True)
class _Worker:
    """One actor and what it has in hand."""

    actor: Any
    place: tuple[str, float]
    """Node that it is bound to, empty for any; share of a GPU."""
    ready: bool = False
    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    in_hand: dict[Any, Task] = dataclasses.field(default_factory=dict)
    is_leaving: bool = False
    """Its node is being drained: it finishes what it has."""
    for_one: bool = False
    """It is kept for shards that are tried with nothing else in hand."""


class Pool:
    """Actors on what the cluster has. Use as a context manager; the actors end with it.

    A shard is tried again when its actor dies: which of its shards an actor died of nobody knows, so each is then tried by an
    actor that has nothing else in hand. One that costs such an actor too is a suspect: its pictures are decoded in processes
    of their own. One that goes on killing is given up, while the others are finished.
    """

    def __init__(self, settings: config.Config) -> None:
        self._settings, self._settings_ref = settings, ray.put(settings)
        self._source = Source(settings.source)
        self._target: Target | None = None
        self._known_ref: Any = None
        self._num_bytes = 0
        """Of the shards that are to be extracted."""
        self._waiting: collections.deque[Task] = collections.deque()
        self._alone: collections.deque[Task] = collections.deque()
        """Shards to be tried by an actor that has nothing else in hand."""
        self._workers: list[_Worker] = []
        self._starting: dict[Any, _Worker] = {}
        self._attempts: collections.Counter[str] = collections.Counter()
        self.seen: list[dict[str, Any]] = []
        """What `Extractor.start` told of every actor that was ever ready, and what it has found to be fastest since."""
        self.num_lost = 0
        """Actors that died."""
        self._num_fruitless = 0

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            ray.kill(worker.actor)

    @property
    def num_ready(self) -> int:
        """Actors at work."""
        return sum(worker.ready for worker in self._workers)

    def prepare(self) -> None:
        """Let the first actors import and build while the driver still plans."""
        for place, share in self._places()[:MAX_PREPARED]:
            worker = self._hire(place, share)
            worker.actor.prepare.remote()

    def extract(self, tasks: Iterable[Task], target: Target, known: KnownRows = NOTHING_KNOWN) -> Iterator[Result]:
        """Extract shards on all actors; results in the order in which they finish.

        A shard whose actor died, or that a passing fault hit, is tried again, up to `run.max_attempts` times in all.
        """
        self._waiting = collections.deque(tasks)
        self._num_bytes = sum(task.shard.num_bytes for task in self._waiting)
        self._target, self._known_ref = target, ray.put(known)  # hashes only, shared by the actors of a node
        for worker in self._workers:
            self._start(worker)
        next_look = 0.0
        while self._waiting or self._alone or any(worker.in_hand for worker in self._workers):
            if time.monotonic() >= next_look:
                self._look_at_nodes()
                next_look = time.monotonic() + POLL_S
            self._deal()
            refs = [*self._starting, *(ref for worker in self._workers for ref in worker.in_hand)]
            done, _ = ray.wait(refs, num_returns=1, timeout=POLL_S) if refs else ([], None)
            for ref in done:
                if ref in self._starting:
                    self._started(ref)
                else:
                    yield from self._collect(ref)

    def _deal(self) -> None:
        """Give shards to the actors with the fewest in hand."""
        ready = [worker for worker in self._workers if worker.ready and not worker.is_leaving]
        self._deal_alone(ready)
        for depth in range(1, SHARDS_IN_FLIGHT + 1):
            for worker in ready:
                if self._waiting and not worker.for_one and len(worker.in_hand) < depth:
                    self._give(worker, self._waiting.popleft())

    def _deal_alone(self, ready: list[_Worker]) -> None:
        """Keep some actors for what has to be tried alone: all while there is nothing else, else at most every second one."""
        most = len(ready) if not self._waiting else max(1, len(ready) // 2)
        at_it = [worker for worker in ready if worker.for_one and worker.in_hand]
        kept = sorted(ready, key=lambda worker: (worker not in at_it, len(worker.in_hand)))
        kept = kept[: max(len(at_it), min(most, len(at_it) + len(self._alone)))]
        for worker in ready:
            worker.for_one = worker in kept
        for worker in kept:
            if self._alone and not worker.in_hand:
                self._give(worker, self._alone.popleft())

    def _give(self, worker: _Worker, task: Task) -> None:
        worker.in_hand[worker.actor.extract.remote(task)] = task

    def _started(self, ref: Any) -> None:
        worker = self._starting.pop(ref)
        try:
            worker.info = ray.get(ref)
        except RayTaskError as error:
            # What `start` raises it would raise again, and on every node.
            why = cause(error)
            if isinstance(why, PipelineError):
                raise why from None
            raise IncompleteRun(f"the actors cannot start: {type(why).__name__}: {why}") from None
        except RayError as error:
            self._workers.remove(worker)
            self.num_lost += 1
            if not self.seen and self.num_lost >= MAX_STILLBORN:
                raise IncompleteRun(f"{self.num_lost} actors died before they had started: {first_line(error)}") from None
            return
        worker.ready = True
        self.seen = [info for info in self.seen if info["pid"] != worker.info["pid"]] + [worker.info]
        logger.info("actor %s on node %s: %s", worker.info["pid"], worker.info["node"][:8], worker.info["device"])

    def _collect(self, ref: Any) -> list[Result]:
        """What is behind a reference: one result, or none where the shard goes back to the queue."""
        worker = next(worker for worker in self._workers if ref in worker.in_hand)
        task = worker.in_hand.pop(ref)
        try:
            result: Result = ray.get(ref)
        except RayTaskError as error:
            # The loop itself broke: this actor would fail every shard that it gets.
            return self._bury(worker, task, f"its actor broke: {first_line(cause(error))}")
        except RayError as error:
            has_left = isinstance(error, RayActorError) and getattr(error, "preempted", False)
            return self._bury(worker, task, "its actor died", is_blamed=not has_left)
        if isinstance(result.error, GuardError):
            raise result.error  # a broken promise: no other shard would fare better
        if isinstance(result.error, ShardChanged):
            now = self._source.relist(task.shard)
            return self._again(dataclasses.replace(task, shard=now) if now else task, result.error)
        if isinstance(result.error, StorageError) and not isinstance(result.error, StorageRefused):
            return self._again(task, result.error)
        self._num_fruitless = 0
        worker.info |= result.chosen
        return [result]

    def _again(self, task: Task, why: PipelineError) -> list[Result]:
        """Try a shard again that a passing fault hit, unless it was tried often enough."""
        url = task.shard.url
        self._attempts[url] += 1
        if self._attempts[url] >= self._settings.run.max_attempts:
            return [Result(task=task, error=why)]
        logger.warning("%s: %s; it will be tried again", url, why)
        self._waiting.append(task)
        return []

    def _bury(self, worker: _Worker, task: Task, why: str, *, is_blamed: bool = True) -> list[Result]:
        """Forget an actor that died or broke. What it had in hand is tried alone; a shard that was alone is to blame."""
        with contextlib.suppress(RayError):
            ray.kill(worker.actor)  # it may only be out of reach
        self.num_lost += 1
        self._workers.remove(worker)
        tasks = [task, *worker.in_hand.values()]
        if len(tasks) > 1 or not is_blamed:
            self._count_fruitless(why)
            logger.warning("%s: %s; %d shards that it had in hand will be tried one by one", task.shard.url, why, len(tasks))
            self._alone.extend(tasks)
            return []
        url = task.shard.url
        self._attempts[url] += 1
        if self._attempts[url] >= self._settings.run.max_attempts:
            self._count_fruitless(f"{url}: {why}")
            return [
                Result(
                    task=task,
                    error=WorldError(f"{why}, the last time with nothing else in hand; {self._attempts[url]} attempts"),
                )
            ]
        logger.warning("%s: %s with nothing else in hand; its pictures will be decoded apart", url, why)
        self._alone.append(dataclasses.replace(task, is_suspect=True))
        return []

    def _count_fruitless(self, why: str) -> None:
        self._num_fruitless += 1
        if self._num_fruitless > MAX_FRUITLESS:
            raise IncompleteRun(f"actors are lost again and again and no shard is finished; {why}")

    def _look_at_nodes(self) -> None:
        """Use nodes that joined, and leave those that are about to go."""
        draining = _draining_nodes()
        for worker in [each for each in self._workers if each.ready]:
            worker.is_leaving = worker.info["node"] in draining
            if worker.is_leaving and not worker.in_hand:
                self._workers.remove(worker)
                ray.kill(worker.actor)
        self._grow(len(self._waiting) + len(self._alone), draining)

    def _places(self, draining: Collection[str] = ()) -> list[tuple[str, float]]:
        """Node (empty for any) and share of a GPU of every actor that the cluster has room for now."""
        run = self._settings.run
        nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]  # type: ignore[no-untyped-call]
        gpus = sum(node["Resources"].get("GPU", 0) for node in nodes)
        if gpus or run.num_gpus != "auto":
            share = 1.0 if run.num_gpus == "auto" else run.num_gpus
            return [("", share)] * (int(gpus / share) if run.workers == "auto" else run.workers)
        # Without a node the autoscaler has to hear of the need: an actor without a place asks for one.
        cpu_nodes = [node["NodeID"] for node in nodes if node["Resources"].get("CPU", 0) >= 1] or [""]
        number = len(cpu_nodes) if run.workers == "auto" else run.workers
        return [(cpu_nodes[i % len(cpu_nodes)], 0.0) for i in range(number)]

    def _grow(self, num_waiting: int, draining: Collection[str]) -> None:
        """Start an actor wherever the cluster has room for one and there is work for it."""
        places = self._places(draining)
        taken = collections.Counter(worker.place for worker in self._workers if not worker.is_leaving)
        missing = collections.Counter(places) - taken
        for place in list(missing.elements())[: max(0, num_waiting - len(self._starting))]:
            self._start(self._hire(*place), len(places))

    def _hire(self, node: str, num_gpus: float) -> _Worker:
        options: dict[str, Any] = {
            "num_cpus": 1,
            "num_gpus": num_gpus,
            "max_concurrency": SHARDS_IN_FLIGHT,
            "max_restarts": 0,  # the pool replaces what dies: it has to hear of it
        }
        if node:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
        remote: Any = ray.remote(Extractor)
        actor = remote.options(**options).remote(self._settings_ref, [path or os.getcwd() for path in sys.path])
        worker = _Worker(actor, (node, num_gpus))
        self._workers.append(worker)
        return worker

    def _start(self, worker: _Worker, num_places: int = 1) -> None:
        worker.ready = False
        share = self._num_bytes // max(num_places, len(self._workers))
        self._starting[worker.actor.start.remote(self._target, self._known_ref, share)] = worker


def _draining_nodes() -> Collection[str]:
    """Nodes that will be taken away, such as spot instances that were given notice.

    Ray has no public way to ask; its own libraries ask so.
    """
    from ray._private.state import state

    nodes: dict[str, int] = state.get_draining_nodes()
    return nodes.keys()
