"""The actors on what the cluster has, kept busy with shards and replaced when they die.

There are more of them as nodes join, and as the cluster's autoscaler adds what actors without a place ask for; one that has
nothing to do is ended, so that its node can be taken away. Who gets what is the scheduler's to say: here are the calls.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import logging
import os
import queue
import sys
import time
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import config
from pipeline.dataset.partition import Target
from pipeline.errors import GuardError, IncompleteRun, PipelineError, ShardChanged, StorageError, StorageRefused
from pipeline.extract.actors import Extractor, Report
from pipeline.extract.carry import NOTHING_KNOWN, KnownRows, Task
from pipeline.extract.cluster import cause, first_line
from pipeline.extract.room import Room, draining_nodes, nodes_but, room_for, wanting
from pipeline.extract.scheduler import SHARDS_IN_FLIGHT, Place, Result, Scheduler, Worker
from pipeline.extract.tail import LOANS_IN_FLIGHT, REST_S, Continuation, Tail
from pipeline.extract.telemetry import Gauges
from pipeline.source import Source

logger = logging.getLogger(__name__)

LOOK_S = 5.0
"""How often the pool looks for nodes that joined or are about to leave, and for actors that have nothing to do."""
IDLE_S = 10.0
"""An actor that has had nothing to do for so long is ended."""
MAX_STILLBORN = 3
"""So many actors may die before the first one has started."""
MAX_PREPARED = 8
"""Actors that are started before it is known how many shards there are."""
WORTH_A_HELPER_BYTES = 1 << 30
"""Of one shard: for so many more an actor without a shard of its own is started too, where there is room now."""
MAX_PENDING = 64
"""Actors that ask the autoscaler at a time; as they get their nodes, more do."""
SAY_EVERY_S = 300.0
PATIENCE_S = 30.0
"""An actor that has waited for a node for so long is worth a warning."""


class Pool:
    """Actors on what the cluster has. Use as a context manager; the actors end with it."""

    def __init__(self, settings: config.Config, run_id: str = "") -> None:
        self._settings, self._settings_ref, self._run_id = settings, ray.put(settings), run_id
        self._gauges = Gauges(run_id)
        self._source = Source(settings.source)
        self._target: Target | None = None
        self._known_ref: Any = None
        self._num_bytes = 0
        """Of the shards that are to be extracted."""
        self._num_helpers = 0
        """Actors that are worth their start although there are fewer shards."""
        self._scheduler = Scheduler(settings.run.max_attempts)
        self._answers: queue.SimpleQueue[tuple[Continuation, Future[Any]]] = queue.SimpleQueue()
        """To calls, in the order in which they came: whoever waits for one of a thousand calls need not look at all."""
        self._seen: dict[tuple[str, int], dict[str, Any]] = {}
        self.num_lost = 0
        """Actors that died."""
        self._tail = Tail(self._scheduler, self._when_done, self._bury_helper)
        self._next_look = 0.0
        self._at_work_at = self._say_at = 0.0
        """When an actor was last ready, and when to say what is waited for."""

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._scheduler.workers:
            ray.kill(worker.actor)

    @property
    def num_ready(self) -> int:
        """Actors at work."""
        return self._scheduler.num_ready

    @property
    def seen(self) -> list[dict[str, Any]]:
        """What `Extractor.start` told of every actor that was ever ready, and what it has found to be fastest since."""
        return list(self._seen.values())

    @property
    def tail_s(self) -> float:
        """Seconds from the moment that the first actor ran out of work to the end."""
        return self._tail.seconds

    @property
    def num_lent(self) -> int:
        """Images that were computed by another actor than the one whose shard they are of."""
        return self._tail.num_lent

    def prepare(self) -> None:
        """Let the first actors import and build while the driver still plans."""
        room = self._room(())
        for place in room.places[:MAX_PREPARED] or filter(None, [room.more]):
            self._hire(place).actor.prepare.remote()

    def extract(self, tasks: Iterable[Task], target: Target, known: KnownRows = NOTHING_KNOWN) -> Iterator[Result]:
        """Extract shards on all actors; results in the order in which they finish.

        A shard whose actor died, or that a passing fault hit, is tried again, up to `run.max_attempts` times in all.
        """
        scheduler = self._scheduler
        scheduler.waiting.extend(tasks)
        sizes = [task.shard.num_bytes for task in scheduler.waiting]
        self._num_bytes, self._num_helpers = sum(sizes), sum(size // WORTH_A_HELPER_BYTES for size in sizes)
        self._target, self._known_ref = target, ray.put(known)  # hashes only, shared by the actors of a node
        for worker in scheduler.workers:
            self._start(worker)
        self._next_look, self._at_work_at = 0.0, time.monotonic()
        self._say_at = self._at_work_at + PATIENCE_S
        for _ in range(self._answers.qsize()):  # what came in while the driver planned
            then, answer = self._answers.get()
            yield from then(answer)
        while not scheduler.is_done:
            if time.monotonic() >= self._next_look:
                self._next_look = time.monotonic() + LOOK_S
                self._look()
            for worker, task in scheduler.deal():
                self._when_done(worker.actor.extract.remote(task), functools.partial(self._collect, worker, task))
            self._tail.arrange()
            with contextlib.suppress(queue.Empty):
                then, answer = self._answers.get(timeout=REST_S if self._tail.is_on else LOOK_S)
                yield from then(answer)
        self._tail.end()
        self._gauges.show(scheduler)

    # Calls and their answers

    def _when_done(self, reference: Any, then: Continuation) -> None:
        reference.future().add_done_callback(lambda answer: self._answers.put((then, answer)))

    def _placed(self, worker: Worker, answer: Future[Any]) -> list[Result]:
        with contextlib.suppress(RayError):  # `start` fails too, and is listened to
            node = answer.result()
            if worker in self._scheduler.workers:
                self._scheduler.placed(worker, node)
        return []

    def _started(self, worker: Worker, answer: Future[Any]) -> list[Result]:
        if worker not in self._scheduler.workers:
            return []
        try:
            worker.info = answer.result()
        except RayTaskError as error:
            # What `start` raises it would raise again, and on every node.
            why = cause(error)
            if isinstance(why, PipelineError):
                raise why from None
            raise IncompleteRun(f"the actors cannot start: {type(why).__name__}: {why}") from None
        except RayError as error:
            self._scheduler.gone(worker)
            self.num_lost += 1
            if not self._seen and self.num_lost >= MAX_STILLBORN:
                raise IncompleteRun(f"{self.num_lost} actors died before they had started: {first_line(error)}") from None
            return []
        node, pid = worker.info["node"], worker.info["pid"]
        self._scheduler.placed(worker, node)
        self._scheduler.ready(worker)
        self._seen[node, pid] = worker.info
        logger.info("actor %s on node %s: %s", pid, node[:8], worker.info["device"])
        return []

    def _collect(self, worker: Worker, task: Task, answer: Future[Any]) -> list[Result]:
        """What came of a shard: one result, or none where it goes back to the queue."""
        if not self._scheduler.has(worker, task):
            return []  # its actor was lost with all that it had in hand
        try:
            report: Report = answer.result()
        except RayTaskError as error:
            # The loop itself broke: this actor would fail every shard that it gets.
            return self._bury(worker, task, f"its actor broke: {first_line(cause(error))}")
        except RayError as error:
            # Neither a node that is gone tells anything of the shard, nor an actor that also had others' images in hand.
            was_taken = isinstance(error, RayActorError) and getattr(error, "preempted", False)
            is_gone = was_taken or worker.node not in {node.node_id for node in nodes_but(())}
            why = "its node is gone" if is_gone else "its actor died"
            return self._bury(worker, task, why, is_blamed=not is_gone and not worker.num_loans)
        self._scheduler.returned(worker, task)
        if isinstance(report.error, GuardError):
            raise report.error  # a broken promise: no other shard would fare better
        if isinstance(report.error, ShardChanged):
            now = self._source.relist(task.shard)
            return self._scheduler.again(dataclasses.replace(task, shard=now) if now else task, report.error)
        if isinstance(report.error, StorageError) and not isinstance(report.error, StorageRefused):
            return self._scheduler.again(task, report.error)
        self._scheduler.finished()
        worker.info |= report.chosen
        stages, partition = self._tail.take_stages(report.stages), report.partition
        if partition is not None and self._target is not None:
            target = self._target
            own = (task.shard.url, task.shard.fingerprint, target.recipe.recipe_id, target.layout.layout_id)
            partition = partition.sharing(*own)
        return [Result(task=task, partition=partition, error=report.error, stages=stages)]

    def _bury(self, worker: Worker, task: Task, why: str, *, is_blamed: bool = True) -> list[Result]:
        """Forget an actor that died or broke."""
        self._lose(worker)
        return self._scheduler.lost(worker, task, why, is_blamed=is_blamed)

    def _bury_helper(self, worker: Worker, why: str) -> list[Result]:
        """Forget one that did so over another's images; of shards that it had too nobody knows anything."""
        if worker not in self._scheduler.workers:
            return []
        self._lose(worker)
        logger.warning("an actor computed images of another's shard, and %s", why)
        if worker.in_hand:
            return self._scheduler.lost(worker, next(iter(worker.in_hand.values())), f"its actor: {why}", is_blamed=False)
        self._scheduler.gone(worker)
        return []

    def _lose(self, worker: Worker) -> None:
        with contextlib.suppress(RayError):
            ray.kill(worker.actor)  # it may only be out of reach
        self.num_lost += 1
        self._next_look = 0.0  # another one is wanted

    # As many actors as there is work and room for

    def _look(self) -> None:
        """Use nodes that joined, leave those that are about to go, and end what has nothing to do."""
        draining = draining_nodes()
        for worker in self._scheduler.workers:
            if worker.is_ready:
                self._scheduler.leaving(worker, worker.node in draining)
        room = self._room(draining)
        self._shrink()
        self._grow(room)
        self._watch_the_wait()
        self._gauges.show(self._scheduler)

    def _room(self, draining: Collection[str]) -> Room:
        return room_for(self._settings.run, nodes_but(draining))

    def _shrink(self) -> None:
        """End actors on nodes that go, actors that have had nothing to do for a while, and those that nothing waits for."""
        scheduler, now = self._scheduler, time.monotonic()
        without_node = [worker for worker in scheduler.workers if not worker.node]
        idle = [worker for worker in scheduler.workers if worker.is_ready and not worker.in_hand and not worker.num_loans]
        needless = [
            worker for worker in idle if worker.is_leaving or (not scheduler.num_waiting and now - worker.busy_at >= IDLE_S)
        ]
        for worker in without_node[scheduler.num_waiting :] + needless:
            scheduler.gone(worker)
            ray.kill(worker.actor)

    def _grow(self, room: Room) -> None:
        """Ask for an actor wherever the cluster has room for one and there is work for it, then for more where that helps."""
        workers = [worker for worker in self._scheduler.workers if not worker.is_leaving]
        taken = collections.Counter(_place(worker) for worker in workers)
        missing = list((collections.Counter(room.places) - taken).elements())
        if room.more is not None:
            num_pending = sum(not worker.node for worker in workers)
            missing += [room.more] * max(0, MAX_PENDING - num_pending - len(missing))
        num_wanted = self._scheduler.num_waiting - sum(not worker.is_ready for worker in workers)
        num_helpers, self._num_helpers = min(self._num_helpers, len(room.places) - num_wanted), 0
        for place in missing[: max(0, min(num_wanted + max(0, num_helpers), room.most - len(workers)))]:
            self._start(self._hire(place), len(room.places))

    def _watch_the_wait(self) -> None:
        """Say what actors without a node wait for, and give up where there has been none at work for too long."""
        run, now = self._settings.run, time.monotonic()
        without_node = [worker.place for worker in self._scheduler.workers if not worker.node]
        if self._scheduler.num_ready:
            self._at_work_at = now
        if not without_node or (self._scheduler.num_ready and run.workers == "auto"):
            self._say_at = now + PATIENCE_S
        elif now >= self._say_at:
            self._say_at = now + SAY_EVERY_S
            logger.warning("waiting for %s", wanting(without_node))
        if now - self._at_work_at > run.start_timeout_s:
            why = f"waiting for {wanting(without_node)}" if without_node else "those that have their node do not come up"
            raise IncompleteRun(f"no actor has started in run.start_timeout_s = {run.start_timeout_s:g}: {why}")

    def _hire(self, place: Place) -> Worker:
        options: dict[str, Any] = {
            "num_cpus": 1,
            "num_gpus": place.num_gpus,
            "max_concurrency": SHARDS_IN_FLIGHT + LOANS_IN_FLIGHT + 3,  # and calls that take no time
            "max_restarts": 0,  # the pool replaces what dies: it has to hear of it
        }
        if place.node:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(place.node, soft=False)
        remote: Any = ray.remote(Extractor)
        import_paths = [path or os.getcwd() for path in sys.path]
        actor = remote.options(**options).remote(self._settings_ref, self._run_id, import_paths)
        worker = Worker(actor, place)
        self._scheduler.hired(worker)
        self._when_done(actor.where.remote(), functools.partial(self._placed, worker))
        return worker

    def _start(self, worker: Worker, num_places: int = 1) -> None:
        self._scheduler.ready(worker, is_ready=False)
        share = self._num_bytes // max(num_places, len(self._scheduler.workers))
        reference = worker.actor.start.remote(self._target, self._known_ref, share)
        self._when_done(reference, functools.partial(self._started, worker))


def _place(worker: Worker) -> Place:
    """The place that an actor takes up. One that asked for any node has, on CPUs, that of the node that it came to."""
    return worker.place if worker.place.num_gpus else Place(worker.place.node or worker.node)
