"""Where the time goes: seconds by stage, how busy each stage was, and what bounds a run."""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

STAGES = ("fetch", "decode", "forward", "write")
"""What threads do, and `device`, what a GPU computes beside them. The threads' waiting is counted too:

`no_shard` fetchers without a shard · `no_sample` workers without a sample · `no_batch` workers without a free batch, because
device or writer are behind · `no_rows` writers without rows. `elapsed` is the loop's own clock.
"""
BUSY = 0.5
"""A stage that is busy for more than this share of its threads' time is not waiting for the others."""

MAX_STRETCHES, MIN_STRETCHES = 120, 4
SHARDS_A_STRETCH = 4
_IMAGES, _SHARDS = "images", "shards"

ADVICE = {
    "fetch": "reading the source is too slow: run closer to the storage, or pack small files into larger shards",
    "decode": "decoding is too slow: more cores for each actor, images stored smaller, or decode: fast for large JPEGs",
    "forward": "the model is what takes the time: a faster device, more of them, or bfloat16 where it is precise enough",
    "write": "writing the output is too slow: an output closer by, fewer or narrower nodes, or shards of more images",
    "starved": "the actors wait for shards: more and smaller shards keep them busy, fewer actors cost less",
}
"""The one change that would help most, by what bounds a run."""


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


class Pace:
    """How a run came along: what was finished, over time. Memory: `MAX_STRETCHES` stretches of equal length, which become twice
    as long when there are more.
    """

    def __init__(self) -> None:
        self._length_s = 1.0
        self._stretches: list[collections.Counter[str]] = []

    def add(self, at_s: float, num_images: int, seconds: Mapping[str, float]) -> None:
        """One shard more.

        Args:
            at_s: when, in seconds since the beginning.
            num_images: embedded.
            seconds: by stage, of the actor since the shard before.
        """
        while at_s >= MAX_STRETCHES * self._length_s:
            pairs = range(0, len(self._stretches), 2)
            self._stretches = [_sum(self._stretches[first : first + 2]) for first in pairs]
            self._length_s *= 2
        stretch = int(at_s / self._length_s)
        self._stretches += [collections.Counter() for _ in range(stretch + 1 - len(self._stretches))]
        self._stretches[stretch].update({_IMAGES: num_images, _SHARDS: 1, **seconds})

    def as_json(self) -> dict[str, Any] | None:
        """Length of a stretch in seconds, and of each the images a second and how busy the stages were.

        Shards are finished in one moment and made in many: stretches are so long that `SHARDS_A_STRETCH` end in one on average.
        None of a run too short to tell, and of the last stretch nothing, which is not whole.
        """
        shards = _sum(self._stretches)[_SHARDS]
        many = max(1, -(-len(self._stretches) * SHARDS_A_STRETCH // max(1, shards)))
        whole = [_sum(self._stretches[first : first + many]) for first in range(0, len(self._stretches) - many, many)]
        if len(whole) < MIN_STRETCHES:
            return None
        shares = [busy(each) for each in whole]
        return {
            "stretch_s": many * self._length_s,
            "images_per_second": [round(each[_IMAGES] / (many * self._length_s), 1) for each in whole],
            "busy": {stage: [round(share[stage], 2) for share in shares] for stage in STAGES},
        }


def _sum(stretches: Iterable[collections.Counter[str]]) -> collections.Counter[str]:
    total: collections.Counter[str] = collections.Counter()
    for each in stretches:
        total.update(each)
    return total


def busy(seconds: Mapping[str, float]) -> dict[str, float]:
    """Stage to the share of its threads' time that it was at work, from 0 to 1.

    Workers decode and compute, so on a CPU the shares of `decode` and `forward` add up to what they were not waiting.
    """
    of = collections.defaultdict(float, seconds)
    workers = of["decode"] + of["forward"] + of["no_sample"] + of["no_batch"]
    totals = {
        "fetch": of["fetch"] + of["no_shard"],
        "decode": workers,
        "forward": workers,
        "write": of["write"] + of["no_rows"],
    }
    shares = {stage: of[stage] / totals[stage] if totals[stage] else 0.0 for stage in STAGES}
    if of["device"] and of["elapsed"]:  # on a GPU workers only launch what the device computes
        shares["forward"] = min(1.0, of["device"] / of["elapsed"])
    return shares


def bound_by(seconds: Mapping[str, float]) -> str:
    """`fetch`, `decode`, `forward`, `write` or `starved`: what has to become faster for the run to become faster.

    Workers decode and launch forward passes. Where they mostly wait for samples, reading is too slow, or the writers are, since
    only so many shards are open at once, or there are no shards. Where they mostly wait for a free batch, what comes after
    them is too slow. Otherwise it is what they spend most time on.
    """
    of, share = collections.defaultdict(float, seconds), busy(seconds)
    working = of["decode"] + of["forward"]
    if of["no_sample"] > max(working, of["no_batch"]):
        if share["fetch"] > BUSY and share["fetch"] >= share["write"]:
            return "fetch"
        return "write" if share["write"] > BUSY else "starved" if of["no_shard"] > of["fetch"] else "fetch"
    if of["no_batch"] > working:
        return "write" if of["write"] > of["device"] else "forward"
    return "decode" if of["decode"] > of["forward"] else "forward"
