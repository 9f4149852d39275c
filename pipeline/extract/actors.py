"""The loop as a Ray actor pinned to one GPU (or one CPU node), and the pool that keeps the actors busy.

The only room that talks to Ray, with the driver's start-up. Shards go to the actors and partitions' descriptions come back;
no pixel and no embedding ever enters Ray's object store. `on_gpu` lends a GPU of the cluster to what is no extraction.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import faulthandler
import gc
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import config
from pipeline.dataset.partition import Partition, Target
from pipeline.errors import GuardError, IncompleteRun, PipelineError, ShardChanged, StorageError, StorageRefused, WorldError
from pipeline.extract.carry import NOTHING_KNOWN, KnownRows, Task
from pipeline.source import Source

if TYPE_CHECKING:
    from pipeline.extract.backbone import Backbone
    from pipeline.extract.loop import Loop

T = TypeVar("T")

logger = logging.getLogger(__name__)

SHARDS_IN_FLIGHT = 3
"""Shards that one actor has in hand: one being read, one to go on with, one whose last rows are still on their way. What
one lost actor can cost."""
MAX_STILLBORN = 3
"""So many actors may die before the first one has started."""
MAX_FRUITLESS = 10
"""Shards that may be given up, and actors that may be lost with several shards in hand, while no shard is finished."""
MAX_PREPARED = 8
"""Actors that are started before it is known how many shards there are."""
POLL_S = 5.0
"""How often the pool looks for nodes that joined or are about to leave."""
ALARM_S = 1.0
"""How often an actor says that its interpreter is alive."""
BATCH_SIZES = {"cpu": (8, 16, 32), "cuda": (64, 128, 256, 512)}
"""Sizes to choose from by measurement: on a CPU small ones stay in the cache, on a GPU large ones fill it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of one shard."""

    task: Task
    partition: Partition | None = None
    error: PipelineError | None = None
    """Why there is no partition."""
    stages: dict[str, float] = dataclasses.field(default_factory=dict)
    """Seconds by stage that the actor spent since its last result."""
    chosen: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Program and batch size that the actor has found to be fastest so far."""


class Extractor:
    """The loop in an actor. Device, threads and batch size are decided here, where the hardware is."""

    def __init__(self, settings: config.Config, import_paths: list[str]) -> None:
        # A model of one's own lies where the driver was started, which is not where Ray starts its workers.
        sys.path.extend(path for path in import_paths if path not in sys.path)
        self._settings = settings
        self._backbone: Backbone | None = None
        self._building = threading.Lock()
        self._loop: Loop | None = None
        self._why = ""

    def prepare(self) -> None:
        """Import what takes long and build the model, while the driver still plans."""
        with contextlib.suppress(Exception):  # `start` meets it again, and is listened to
            self._build()

    def _build(self) -> Backbone:
        import torch

        from pipeline.extract.backbone import Backbone, Spec

        with self._building:
            if self._backbone is None:
                run = self._settings.run
                device = "cuda" if ray.get_gpu_ids() and torch.cuda.is_available() else "cpu"
                if device == "cpu":
                    torch.set_num_threads(1)  # each worker thread is a lane of its own: threads below it would only spin
                spec = Spec(
                    backbone=self._settings.backbone,
                    decode=self._settings.decode,
                    precision=run.precision,
                    fold=run.optimize != "none",
                )
                self._backbone = Backbone(spec, device)
            return self._backbone

    def start(self, target: Target, known: KnownRows, num_bytes: int) -> dict[str, Any]:
        """Start the loop; where this actor runs and with what.

        Not in the constructor: what that raises reaches the driver only as text.

        Args:
            target: what the dataset shall be.
            known: rows that need not be computed.
            num_bytes: of the shards that this actor can expect to get.
        """
        from pipeline.extract.loop import Loop, Settings
        from pipeline.extract.model import modules

        backbone, run, gpus = self._build(), self._settings.run, ray.get_gpu_ids()
        if backbone.recipe.fields != target.recipe.fields:
            raise GuardError(
                "backbone: this node builds another model than the driver does; are the same packages installed on all nodes?"
            )
        device = backbone.device.type
        threads = run.threads if run.threads != "auto" else _share_of_node(run, bool(gpus))
        sizes = BATCH_SIZES[device] if run.batch_size == "auto" else (run.batch_size,)
        work = Settings(
            decode=self._settings.decode,
            batch_sizes=sizes,
            num_workers=threads,
            decode_timeout_s=run.decode_timeout_s,
            decode_imports=modules(self._settings.backbone),
        )
        if self._loop is None:
            threading.Thread(target=_stay_alive, args=(2 * run.decode_timeout_s,), daemon=True).start()
        else:
            self._loop.close()
        # What the libraries have allocated lives as long as the process. Looking through it for garbage, again and again, would
        # hold the interpreter lock for 30 microseconds an image.
        gc.collect()
        gc.freeze()
        self._loop = Loop(Source(self._settings.source), backbone, target, work, known)
        if run.optimize in ("auto", "compile"):
            arguments = (backbone, self._loop, run.optimize, sizes, threads, num_bytes)
            threading.Thread(target=self._try_to_compile, args=arguments, daemon=True).start()
        return {
            "pid": os.getpid(),
            "node": ray.get_runtime_context().get_node_id(),
            "gpus": [str(gpu) for gpu in gpus],
            "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
            "device": device,
            "threads": threads,
            **self._chosen(backbone, self._loop),
        }

    def extract(self, task: Task) -> Result:
        """Extract one shard. Several calls run at once, so that batches are packed across shards."""
        backbone, loop = self._backbone, self._loop
        assert backbone is not None and loop is not None, "the pool waits for start()"
        partition, error = None, None
        try:
            partition = loop.submit(task).result()
        except PipelineError as failure:
            error = failure
        chosen = self._chosen(backbone, loop)
        return Result(task=task, partition=partition, error=error, stages=loop.stages.take(), chosen=chosen)

    def _chosen(self, backbone: Backbone, loop: Loop) -> dict[str, Any]:
        from pipeline.extract.backbone import COMPILED

        best = loop.tuner.best
        return {
            "model": COMPILED if best.program == COMPILED else backbone.program,
            "model_because": self._why,
            "batch_size": best.batch_size,
            "first_batch_at": loop.first_batch_at,
        }

    def _try_to_compile(self, *arguments: Any) -> None:
        try:
            self._compile(*arguments)
        except Exception as error:  # the cache folder may be full, read-only, or hold half a file: the loop needs none of it
            logger.warning("no compiled program is used: %s: %s", type(error).__name__, error)
            self._why = "a compiled program could not be used"

    def _compile(self, backbone: Backbone, loop: Loop, mode: str, sizes: Sequence[int], num_lanes: int, num_bytes: int) -> None:
        """Beside the loop: let it use a compiled program, where there is one or one is worth its making."""
        from pipeline.extract import aot
        from pipeline.extract.backbone import COMPILED
        from pipeline.extract.tune import Way

        tuner, device = loop.tuner, backbone.device.type

        backbone.has_pictures.wait()
        found = next((size for size in sizes if aot.Order.of(backbone, size).path.exists()), None)
        if found is None:
            while not (tuner.wait(POLL_S) and tuner.seconds_per_image):
                time.sleep(0.1)  # a single way is the best before it was measured
            if mode == "auto":
                images = loop.num_fetched / max(1, loop.num_bytes_fetched) * (num_bytes - loop.num_bytes_fetched)
                seconds = max(0.0, images) * tuner.seconds_per_image / (num_lanes if device == "cpu" else 1)
                if not aot.is_worth_compiling(seconds):
                    self._why = f"{seconds:.0f} s of forward passes were ahead, too few to compile for"
                    return
        batch_size = found or tuner.best.batch_size
        path = aot.compiled(aot.Order.of(backbone, batch_size))
        columns = list(backbone.recipe.widths)
        if path is None or not backbone.adopt(batch_size, aot.load(path, columns, num_lanes)):
            self._why = "it could not be compiled"
        elif mode == "compile":
            tuner.insist(Way(COMPILED, batch_size))
            self._why = "the config says so"
        else:
            tuner.add(Way(COMPILED, batch_size))
            self._why = "measured"


def _stay_alive(seconds: float) -> None:
    """End this process when no Python thread has run for so long: native code is stuck that holds the interpreter lock.

    Nothing in Python could notice it. What hangs without the lock is found by the loop.
    """
    while True:
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or sys.stderr)
        time.sleep(ALARM_S)


def _share_of_node(run: config.Run, has_gpu: bool) -> int:
    """This actor's share of its node's cores, as Ray counts them: equal shares for the actors that a node has."""
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    node_id = ray.get_runtime_context().get_node_id()
    resources: dict[str, float] = next((node["Resources"] for node in nodes if node["NodeID"] == node_id), {})
    cores = int(resources.get("CPU", 0)) or os.cpu_count() or 1
    if has_gpu:
        actors = resources.get("GPU", 1) / (1.0 if run.num_gpus == "auto" else run.num_gpus)
    else:
        actors = 1 if run.workers == "auto" else math.ceil(run.workers / len(nodes))
    return max(1, int(cores / max(1, actors)))


@contextlib.contextmanager
def cluster() -> Iterator[None]:
    """Ray for the duration of a run: the cluster that RAY_ADDRESS names or that this job runs on, else a local one."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    quiet: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, configure_logging=False, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


def on_gpu(function: Callable[..., T], *arguments: Any) -> T:
    """`function(*arguments)` in a task on a GPU of the cluster, else in this process where there is no cluster or no GPU.

    The function reads its data itself: only its arguments and what it returns travel.

    Raises:
        WorldError: the task's process died; otherwise what the function raises.
    """
    if not ray.is_initialized() and not os.environ.get("RAY_ADDRESS"):
        return function(*arguments)
    with cluster():
        if not ray.cluster_resources().get("GPU"):  # type: ignore[no-untyped-call]
            return function(*arguments)
        remote: Any = ray.remote(num_gpus=1, max_retries=1)(function)
        try:
            result: T = ray.get(remote.remote(*arguments))
        except RayTaskError as error:
            raise _cause(error) from None
        except RayError as error:
            raise WorldError(f"what ran on a GPU of the cluster died: {_first_line(error)}") from None
        return result


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
            cause = _cause(error)
            if isinstance(cause, PipelineError):
                raise cause from None
            raise IncompleteRun(f"the actors cannot start: {type(cause).__name__}: {cause}") from None
        except RayError as error:
            self._workers.remove(worker)
            self.num_lost += 1
            if not self.seen and self.num_lost >= MAX_STILLBORN:
                raise IncompleteRun(f"{self.num_lost} actors died before they had started: {_first_line(error)}") from None
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
            return self._bury(worker, task, f"its actor broke: {_first_line(_cause(error))}")
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


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _cause(error: BaseException) -> BaseException:
    """The exception that was raised over there, where Ray carries it."""
    inner = getattr(error, "cause", None)
    return inner if isinstance(inner, BaseException) else error
