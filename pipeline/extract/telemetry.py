"""Counters and gauges of a run, which Ray exports for Prometheus on every node, with `ray_` in front of their names.

Counted a shard at a time and passed on every other second, since Ray takes tens of microseconds for each value. No label names
a shard: there are too many.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipeline.dataset.partition import Partition

if TYPE_CHECKING:
    from pipeline.extract.scheduler import Scheduler

COUNTERS = {
    "pipeline_images_total": "Images embedded, of finished shards.",
    "pipeline_carried_over_total": "Rows whose embeddings were known, of finished shards.",
    "pipeline_quarantined_total": "Samples that could not be embedded, of finished shards.",
    "pipeline_bytes_total": "Encoded bytes of finished shards.",
    "pipeline_shards_total": "Shards finished.",
    "pipeline_failures_total": "Attempts at a shard that ended with an error.",
    "pipeline_images_lent_total": "Images computed for a shard of another actor.",
}
"""Of actors, with the labels `run_id` and `node`."""
STAGE_SECONDS = "pipeline_stage_seconds_total"
"""With the label `stage` too: seconds of threads at work (`fetch`, `decode`, `forward`, `write`), of what they waited for, and
of the device."""
GAUGES = {
    "pipeline_shards_waiting": "Shards that no actor has.",
    "pipeline_shards_in_hand": "Shards that an actor has.",
    "pipeline_actors": "Actors at work.",
    "pipeline_actors_pending": "Actors that wait for a node.",
}
"""Of the driver, with the label `run_id`."""
EVERY_S = 2.0


class Counters:
    """Of one actor. From any thread."""

    def __init__(self, run_id: str, node: str) -> None:
        from ray.util.metrics import Counter

        labels = {"run_id": run_id, "node": node}
        self._counters = {name: Counter(name, text, tuple(labels)).set_default_tags(labels) for name, text in COUNTERS.items()}
        stages = Counter(STAGE_SECONDS, "Seconds by stage, of all threads.", (*labels, "stage"))
        self._stages = stages.set_default_tags(labels)
        self._lock = threading.Lock()
        self._num_open = 0
        self._counts: collections.Counter[str] = collections.Counter()
        self._seconds: collections.defaultdict[str, float] = collections.defaultdict(float)
        self._passed_on_at = 0.0

    def begin(self) -> None:
        """A shard or a loan was taken in hand: something will be counted."""
        with self._lock:
            self._num_open += 1

    def shard(self, num_bytes: int, partition: Partition | None, seconds: Mapping[str, float]) -> None:
        """One shard is done, or has failed."""
        counts = {"pipeline_failures_total": 1}
        if partition is not None:
            counts = {
                "pipeline_images_total": partition.num_embedded,
                "pipeline_carried_over_total": partition.num_carried_over,
                "pipeline_quarantined_total": partition.num_quarantined,
                "pipeline_bytes_total": num_bytes,
                "pipeline_shards_total": 1,
            }
        self._end(counts, seconds)

    def loan(self, num_images: int, seconds: Mapping[str, float]) -> None:
        """One loan was answered."""
        self._end({"pipeline_images_lent_total": num_images}, seconds)

    def _end(self, counts: Mapping[str, int], seconds: Mapping[str, float]) -> None:
        with self._lock:
            self._num_open -= 1
            self._counts.update(counts)
            for stage, value in seconds.items():
                self._seconds[stage] += value
            # At once where nothing may follow: this process can be ended any time.
            if self._num_open and time.monotonic() - self._passed_on_at < EVERY_S:
                return
            self._passed_on_at = time.monotonic()
            for name, count in self._counts.items():
                if count:
                    self._counters[name].inc(count)
            for stage, value in self._seconds.items():
                if value:
                    self._stages.inc(value, {"stage": stage})
            self._counts.clear()
            self._seconds.clear()


class Gauges:
    """Of the driver."""

    def __init__(self, run_id: str) -> None:
        from ray.util.metrics import Gauge

        labels = {"run_id": run_id}
        self._gauges = {name: Gauge(name, text, tuple(labels)).set_default_tags(labels) for name, text in GAUGES.items()}

    def show(self, scheduler: Scheduler) -> None:
        """How things stand."""
        for name, value in {
            "pipeline_shards_waiting": scheduler.num_waiting,
            "pipeline_shards_in_hand": scheduler.num_in_hand,
            "pipeline_actors": scheduler.num_ready,
            "pipeline_actors_pending": len(scheduler.workers) - scheduler.num_placed,
        }.items():
            self._gauges[name].set(value)
