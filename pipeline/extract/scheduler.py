"""Who has which shards, what waits, and what is to be done next.

Plain state, no call to Ray: the pool asks what to do, does it, and tells what came of it. A step costs the same with a million
shards and a thousand actors as with ten, but for shards that have to be tried alone.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.dataset.partition import Partition
from pipeline.errors import IncompleteRun, PipelineError, WorldError
from pipeline.extract.carry import Task

logger = logging.getLogger(__name__)

SHARDS_IN_FLIGHT = 3
"""Shards that one actor has in hand: one being read, one to go on with, one whose last rows are still on their way. What
one lost actor can cost."""
MAX_FRUITLESS = 10
"""Shards that may be given up, and actors that may be lost with several shards in hand, while no shard is finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of one shard."""

    task: Task
    partition: Partition | None = None
    error: PipelineError | None = None
    """Why there is no partition."""
    stages: dict[str, float] = field(default_factory=dict)
    """Seconds by stage that the actor spent since its last result."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an actor may run and what it takes."""

    node: str = ""
    """The node that it is bound to, empty for any."""
    num_gpus: float = 0.0


@dataclass(slots=True, eq=False)
class Worker:
    """One actor, from the moment that it was asked for, and what it has in hand."""

    actor: Any
    """How to reach it; nothing here looks inside."""
    place: Place
    node: str = ""
    """Where it runs; empty while it waits for a node."""
    info: dict[str, Any] = field(default_factory=dict)
    """What `Extractor.start` told; empty until it is ready."""
    is_ready: bool = False
    is_leaving: bool = False
    """Its node is being drained: it finishes what it has."""
    for_one: bool = False
    """It is kept for shards that are tried with nothing else in hand."""
    in_hand: dict[str, Task] = field(default_factory=dict)
    """By the shard's URL."""
    num_loans: int = 0
    """Loans of other actors that it has in hand."""
    busy_at: float = 0.0
    """When it last had something to do, or became ready."""


class Scheduler:
    """Deals shards to actors.

    A shard is tried again when its actor dies: which of its shards an actor died of nobody knows, so each is then tried by an
    actor that has nothing else in hand. One that costs such an actor too is a suspect: its pictures are decoded in processes
    of their own. One that goes on killing is given up, while the others are finished.
    """

    def __init__(self, max_attempts: int) -> None:
        self._max_attempts = max_attempts
        self.waiting: collections.deque[Task] = collections.deque()
        self.alone: collections.deque[Task] = collections.deque()
        """Shards to be tried by an actor that has nothing else in hand."""
        self.workers: dict[Worker, None] = {}
        """In the order in which they were asked for."""
        self.num_placed = self.num_ready = self.num_in_hand = 0
        self._may_get: list[dict[Worker, None]] = [{} for _ in range(SHARDS_IN_FLIGHT)]
        """Workers that may get another shard, by the number that they have."""
        self._keeps_some = False
        """Whether an actor is kept for shards that are tried alone."""
        self._attempts: collections.Counter[str] = collections.Counter()
        self._num_fruitless = 0

    @property
    def is_done(self) -> bool:
        """Whether every shard has its result."""
        return not (self.waiting or self.alone or self.num_in_hand)

    @property
    def num_waiting(self) -> int:
        """Shards that no actor has."""
        return len(self.waiting) + len(self.alone)

    def idle(self) -> list[Worker]:
        """Actors that have no shard and will get none."""
        return [] if self.num_waiting else list(self._may_get[0])

    def owners(self) -> list[Worker]:
        """Actors that have shards in hand, but for those that try one alone."""
        return [worker for worker in self.workers if worker.in_hand and worker.is_ready and not worker.for_one]

    # Workers

    def hired(self, worker: Worker) -> None:
        """An actor was asked for."""
        self.workers[worker] = None

    def placed(self, worker: Worker, node: str) -> None:
        """It has its node."""
        self.num_placed += not worker.node
        worker.node = node

    def ready(self, worker: Worker, *, is_ready: bool = True) -> None:
        """It has started, or starts anew."""
        self.num_ready += is_ready - worker.is_ready
        worker.is_ready, worker.busy_at = is_ready, time.monotonic()
        self._sort(worker)

    def leaving(self, worker: Worker, is_leaving: bool) -> None:
        """Its node is about to go, or stays after all."""
        worker.is_leaving = is_leaving
        self._keeps_some |= worker.for_one
        self._sort(worker)

    def gone(self, worker: Worker) -> list[Task]:
        """It is no longer there; what it had in hand."""
        del self.workers[worker]
        tasks = list(worker.in_hand.values())
        self.num_in_hand -= len(tasks)
        self.num_placed -= bool(worker.node)
        self.ready(worker, is_ready=False)
        worker.in_hand.clear()
        return tasks

    # Shards

    def deal(self) -> Iterator[tuple[Worker, Task]]:
        """Give shards to the actors with the fewest in hand, until none waits or every one has enough."""
        if self.alone or self._keeps_some:
            yield from self._deal_alone()
        while self.waiting and (worker := self._next()) is not None:
            yield worker, self._give(worker, self.waiting.popleft())

    def has(self, worker: Worker, task: Task) -> bool:
        """Whether this is still in that actor's hands."""
        return worker.in_hand.get(task.shard.url) is task

    def returned(self, worker: Worker, task: Task) -> None:
        """It has an answer for this shard."""
        del worker.in_hand[task.shard.url]
        worker.busy_at = time.monotonic()
        self.num_in_hand -= 1
        self._sort(worker)

    def finished(self) -> None:
        """A shard came to its end: the run comes along."""
        self._num_fruitless = 0

    def again(self, task: Task, why: PipelineError) -> list[Result]:
        """Try a shard again that a passing fault hit, unless it was tried often enough."""
        url = task.shard.url
        self._attempts[url] += 1
        if self._attempts[url] >= self._max_attempts:
            return [Result(task=task, error=why)]
        logger.warning("%s: %s; it will be tried again", url, why)
        self.waiting.append(task)
        return []

    def lost(self, worker: Worker, task: Task, why: str, *, is_blamed: bool = True) -> list[Result]:
        """An actor died or broke over this task. What it had in hand is tried alone; a shard that was alone is to blame."""
        tasks = self.gone(worker)
        url = task.shard.url
        if len(tasks) > 1 or not is_blamed:
            self._count_fruitless(why)
            logger.warning("%s: %s; %d shards that it had in hand will be tried one by one", url, why, len(tasks))
            self.alone.extend(tasks)
            return []
        self._attempts[url] += 1
        if self._attempts[url] >= self._max_attempts:
            self._count_fruitless(f"{url}: {why}")
            error = WorldError(f"{why}, the last time with nothing else in hand; {self._attempts[url]} attempts")
            return [Result(task=task, error=error)]
        logger.warning("%s: %s with nothing else in hand; its pictures will be decoded apart", url, why)
        self.alone.append(dataclasses.replace(task, is_suspect=True))
        return []

    # Inside

    def _next(self) -> Worker | None:
        """Of the actors that may get another shard one with the fewest.

        None gets more than its share: actors that still start would then find nothing. Of those that wait for a node no more
        are expected than there are others.
        """
        num_expected = min(len(self.workers), 2 * self.num_placed)
        share = -(-(len(self.waiting) + self.num_in_hand) // max(1, num_expected))
        for workers in self._may_get[: max(1, share)]:
            if workers:
                return next(iter(workers))
        return None

    def _give(self, worker: Worker, task: Task) -> Task:
        worker.in_hand[task.shard.url] = task
        self.num_in_hand += 1
        self._sort(worker)
        return task

    def _sort(self, worker: Worker) -> None:
        """Put it among those that may get another shard, or not."""
        for workers in self._may_get:
            workers.pop(worker, None)
        if worker.is_ready and not worker.is_leaving and not worker.for_one and len(worker.in_hand) < SHARDS_IN_FLIGHT:
            self._may_get[len(worker.in_hand)][worker] = None

    def _deal_alone(self) -> Iterator[tuple[Worker, Task]]:
        """Keep some actors for what has to be tried alone: all while there is nothing else, else at most every second one."""
        ready = [worker for worker in self.workers if worker.is_ready and not worker.is_leaving]
        most = len(ready) if not self.waiting else max(1, len(ready) // 2)
        num_at_it = sum(worker.for_one and bool(worker.in_hand) for worker in ready)
        ready.sort(key=lambda worker: (not (worker.for_one and worker.in_hand), len(worker.in_hand)))
        num_kept = max(num_at_it, min(most, num_at_it + len(self.alone)))
        self._keeps_some = num_kept > 0
        for position, worker in enumerate(ready):
            worker.for_one = position < num_kept
            self._sort(worker)
        for worker in ready[:num_kept]:
            if self.alone and not worker.in_hand:
                yield worker, self._give(worker, self.alone.popleft())

    def _count_fruitless(self, why: str) -> None:
        self._num_fruitless += 1
        if self._num_fruitless > MAX_FRUITLESS:
            raise IncompleteRun(f"actors are lost again and again and no shard is finished; {why}")
