"""The loop as a Ray actor pinned to one GPU (or one CPU node), and the Ray that it runs on.

Shards go to the actors and partitions' descriptions come back; no pixel and no embedding ever enters Ray's object store. With
`pool.py` the only room that talks to Ray.
"""

from __future__ import annotations

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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from pipeline import config
from pipeline.dataset.partition import Partition, Target
from pipeline.errors import GuardError, PipelineError
from pipeline.extract import logs
from pipeline.extract.carry import KnownRows, Task
from pipeline.extract.telemetry import Counters
from pipeline.imports import importing
from pipeline.source import Source

if TYPE_CHECKING:
    from pipeline.extract.backbone import Backbone
    from pipeline.extract.lending import Answer, Images
    from pipeline.extract.loop import Loop

logger = logging.getLogger(__name__)

POLL_S = 5.0
"""How often a compiler looks whether the loop still measures."""
ALARM_S = 1.0
"""How often an actor says that its interpreter is alive."""
BATCH_SIZES = {"cpu": (8, 16, 32), "cuda": (64, 128, 256, 512)}
"""Sizes to choose from by measurement: on a CPU small ones stay in the cache, on a GPU large ones fill it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loan:
    """What the pool has to know of what an actor lends."""

    number: int
    num_images: int
    """0 where it has nothing to lend now."""
    num_bytes_left: int
    """Of its shards, not read yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What an actor tells of one shard, or of what it did for another actor."""

    partition: Partition | None = None
    error: PipelineError | None = None
    """Why there is no partition."""
    stages: dict[str, float] = dataclasses.field(default_factory=dict)
    """Seconds by stage that the actor spent since its last report."""
    chosen: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Program and batch size that the actor has found to be fastest so far."""


class Extractor:
    """The loop in an actor. Device, threads and batch size are decided here, where the hardware is."""

    def __init__(self, settings: config.Config, run_id: str, import_paths: list[str]) -> None:
        logs.set_up(run_id, self.where())
        self._counters = Counters(run_id, self.where())
        # A model of one's own lies where the driver was started, which is not where Ray starts its workers.
        sys.path.extend(path for path in import_paths if path not in sys.path)
        self._settings = settings
        self._backbone: Backbone | None = None
        self._building = threading.Lock()
        self._loop: Loop | None = None
        self._why = ""

    def where(self) -> str:
        """The node that this actor has come to."""
        return str(ray.get_runtime_context().get_node_id())

    def prepare(self) -> None:
        """Import what takes long and build the model, while the driver still plans."""
        with contextlib.suppress(Exception):  # `start` meets it again, and is listened to
            self._build()

    def _build(self) -> Backbone:
        with importing():
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
            "node": self.where(),
            "gpus": [str(gpu) for gpu in gpus],
            "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
            "device": device,
            "threads": threads,
            **self._chosen(backbone, self._loop),
        }

    def extract(self, task: Task) -> Report:
        """Extract one shard. Several calls run at once, so that batches are packed across shards."""
        backbone, loop = self._backbone, self._loop
        assert backbone is not None and loop is not None, "the pool waits for start()"
        partition, error = None, None
        self._counters.begin()
        with logs.about(task.shard.url):
            try:
                partition = loop.submit(task).result()
                logger.info("done: %d rows, %d samples in quarantine", partition.num_rows, partition.num_quarantined)
            except PipelineError as failure:
                error = failure
                logger.warning("failed: %s: %s", type(error).__name__, error)
            except BaseException:
                self._counters.shard(0, None, {})
                raise
        stages = loop.stages.take()
        self._counters.shard(task.shard.num_bytes, partition, stages)
        return Report(partition=partition, error=error, stages=stages, chosen=self._chosen(backbone, loop))

    def lend(self, max_images: int) -> tuple[Loan, Images]:
        """Encoded images for an actor that has nothing left to do; its answer, or None, has to come to `settle`."""
        assert self._loop is not None, "the pool waits for start()"
        number, images = self._loop.lender.lend(max_images)
        return Loan(number=number, num_images=len(images), num_bytes_left=self._loop.num_bytes_left), images

    def embed_for(self, images: Images) -> tuple[Report, Answer]:
        """Decode and embed what another actor lends.

        Raises:
            GuardError: the model is not what it was; no row of it may get out.
        """
        backbone, loop = self._backbone, self._loop
        assert backbone is not None and loop is not None, "the pool waits for start()"
        self._counters.begin()
        num_images, stages = 0, dict[str, float]()
        try:
            answer = loop.embed(images).result()
            backbone.check_frozen()
            num_images, stages = len(images), loop.stages.take()
        finally:
            self._counters.loan(num_images, stages)
        return Report(stages=stages, chosen=self._chosen(backbone, loop)), answer

    def settle(self, number: int, answer: Answer | None) -> None:
        """Take the answer to a loan; None where none will come."""
        assert self._loop is not None, "the pool waits for start()"
        self._loop.lender.settle(number, answer)

    def _chosen(self, backbone: Backbone, loop: Loop) -> dict[str, Any]:
        from pipeline.extract.backbone import COMPILED

        best = loop.tuner.best
        return {
            "model": COMPILED if best.program == COMPILED else backbone.program,
            "model_because": self._why,
            "batch_size": best.batch_size,
            "first_batch_at": loop.lanes.first_batch_at,
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
