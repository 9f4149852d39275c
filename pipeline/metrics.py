"""Where the time goes: seconds by stage, what a run adds up to, and what bounds it."""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from collections.abc import Iterator, Mapping

STAGES = ("fetch", "decode", "forward", "write")
"""What threads do. Their waiting is counted beside it:

`no_shard` fetchers without a shard · `no_sample` workers without a sample · `no_batch` workers without a free batch, because
device or writer are behind.
"""


class Stages:
    """Seconds by stage, added up over threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: collections.defaultdict[str, float] = collections.defaultdict(float)

    def add(self, stage: str, seconds: float) -> None:
        """Count `seconds` for `stage`."""
        with self._lock:
            self._seconds[stage] += seconds

    @contextlib.contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Count the duration of a block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - start)

    def take(self) -> dict[str, float]:
        """What was added since the last call."""
        with self._lock:
            seconds, self._seconds = self._seconds, collections.defaultdict(float)
            return dict(seconds)


def bound_by(seconds: Mapping[str, float]) -> str:
    """`fetch`, `decode`, `forward`, `write` or `starved`: what has to become faster for the run to become faster.

    Workers decode and launch forward passes. Where they mostly wait for samples, fetching is too slow, or there are no shards
    to fetch; where they mostly wait for a free batch, what comes after them is. Otherwise it is what they spend most time on.
    """
    busy = seconds.get("decode", 0.0) + seconds.get("forward", 0.0)
    no_sample, no_batch = seconds.get("no_sample", 0.0), seconds.get("no_batch", 0.0)
    if no_sample > max(busy, no_batch):
        return "starved" if seconds.get("no_shard", 0.0) > seconds.get("fetch", 0.0) else "fetch"
    if no_batch > busy:
        return "write" if seconds.get("write", 0.0) > seconds.get("device", 0.0) else "forward"
    return "decode" if seconds.get("decode", 0.0) > seconds.get("forward", 0.0) else "forward"
