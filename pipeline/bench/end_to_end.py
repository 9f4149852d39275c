"""The real loop on the source's first images, from its first byte to its last row, in a process of its own."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pipeline import config, metrics
from pipeline.bench.jobs import pictures, spec
from pipeline.dataset import partition
from pipeline.dataset.partition import Target
from pipeline.extract import aot, loop
from pipeline.extract.backbone import COMPILED, Backbone, Pass, Spec
from pipeline.extract.carry import Task
from pipeline.extract.tune import Way
from pipeline.source import Sample, Shard, Source
from pipeline.storage import Store


@dataclass(frozen=True, kw_only=True)
class EndToEnd:
    """A job: one run of the loop whenever it is asked."""

    settings: config.Config
    device: str
    program: str
    batch_size: int
    num_workers: int
    num_wanted: int
    """Images of one run, at least; where the source's are fewer, they go round."""
    shards: list[Shard]
    counts: dict[str, int]
    """Shard's URL to how many of its samples there are to read."""
    pixels: bytes
    """At least a batch of pictures; see `jobs.pictures`."""

    def results(self) -> Iterator[dict[str, Any]]:
        """Steady images a second, the share of its threads' time that each stage was busy, and what bounds it."""
        if self.device == "cpu":
            torch.set_num_threads(1)
        settings = self.settings
        backbone = _Clocked(spec(settings, fold=settings.run.optimize != "none"), self.device)
        work = loop.Settings(decode=settings.decode, batch_sizes=(self.batch_size,), num_workers=self.num_workers)
        # A turn is a pass in every lane. Lanes tend to finish together, so only whole turns tell a rate; the first and last
        # ones, when lanes fill and run empty, do not count.
        turn = self.num_workers if self.device == "cpu" else 4
        num_wanted = max(self.num_wanted, 6 * turn * self.batch_size)
        source = _Source(settings.source, _cut(self.counts, num_wanted))
        shards = [shard for shard in self.shards if shard.url in source.counts]
        rounds = -(-num_wanted // sum(source.counts.values()))
        backbone.launch(pictures(self.pixels, backbone.preprocess)[: self.batch_size]).wait()
        if self.program == COMPILED:
            backbone.adopt(
                self.batch_size,
                aot.load(aot.Order.of(backbone, self.batch_size).path, list(backbone.recipe.widths), self.num_workers),
            )
        layout, schema = source.layout(), partition.schema(backbone.recipe, source.fields())
        while True:
            backbone.finished.clear()
            with tempfile.TemporaryDirectory() as folder:
                target = Target(store=Store(), url=folder, recipe=backbone.recipe, layout=layout, schema=schema)
                start = time.perf_counter()
                running = loop.Loop(source, backbone, target, work)
                if self.program == COMPILED:
                    running.tuner.insist(Way(COMPILED, self.batch_size))
                futures = [running.submit(Task(shard=shard)) for _ in range(rounds) for shard in shards]
                num_images = sum(future.result().num_embedded for future in futures)
                seconds = time.perf_counter() - start
                running.close()  # only now has the last waiting been counted
                taken = running.stages.take()
            finished = sorted(backbone.finished)[turn - 1 :]
            passes = (len(finished) - 1 - turn) // turn * turn
            yield {
                # Where most images cannot be decoded, passes are too few.
                "images_per_s": passes * self.batch_size / (finished[passes] - finished[0])
                if passes > 0
                else num_images / seconds,
                "images": num_images,
                "seconds": seconds,
                "busy": metrics.busy(taken),
                "bound_by": metrics.bound_by(taken),
                "program": self.program if self.program == COMPILED else backbone.program,
                "batch_size": self.batch_size,
            }


class _Source(Source):
    """The first samples of shards."""

    def __init__(self, settings: config.Source, counts: dict[str, int]) -> None:
        super().__init__(settings)
        self.counts = counts

    def read(self, shard: Shard) -> Iterator[Sample]:
        """As many samples as `counts` says."""
        return itertools.islice(super().read(shard), self.counts[shard.url])


class _Clocked(Backbone):
    """Remembers when its passes were done, on a GPU when they were queued: in the long run as many as are done."""

    def __init__(self, spec: Spec, device: str) -> None:
        super().__init__(spec, device)
        self.finished: list[float] = []

    def launch(self, images_BHWC: torch.Tensor, program: str = "") -> Pass:
        """See `Backbone.launch`."""
        started = super().launch(images_BHWC, program)
        self.finished.append(time.perf_counter())
        return started


def _cut(counts: dict[str, int], num_wanted: int) -> dict[str, int]:
    """The first `num_wanted` samples."""
    kept = dict[str, int]()
    for url, count in counts.items():
        if num_wanted > 0:
            kept[url] = min(count, num_wanted)
            num_wanted -= count
    return kept
