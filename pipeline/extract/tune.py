"""Which program and batch size are fastest here: found on real batches in the first seconds, at no cost but their slowness."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Sequence
from dataclasses import dataclass

NUM_TRIALS = 4
NUM_IGNORED = 1
"""The first pass of a shape finds its kernels."""
HOPELESS = 1.25
"""A way that is so many times slower than another after its first trials is not tried again."""
NUM_FIRST_TRIALS = 2
SMALLER_IS_ENOUGH = 1.03
"""A smaller batch is taken when it is at most so much slower: it needs less memory and cache."""


@dataclass(frozen=True, slots=True)
class Way:
    """How a batch can be computed."""

    program: str
    batch_size: int


class Tuner:
    """Tries every way a few times, then stays with the fastest. From any thread."""

    def __init__(self, ways: Sequence[Way]) -> None:
        self._lock = threading.Lock()
        self._open: dict[Way, list[float]] = {}
        self._issued: dict[Way, int] = {}
        self.best = ways[0]
        self._base = ways[0].program
        """A program that runs batches of any size."""
        self.seconds_per_image = 0.0
        """Of the best way so far; 0 before a batch was computed in it."""
        self._decided = threading.Event()
        self._try(ways)

    @property
    def ways(self) -> list[Way]:
        """The best way, and those that are still tried."""
        with self._lock:
            return list(dict.fromkeys([self.best, *self._open]))

    def next(self) -> Way:
        """The way for the next batch."""
        with self._lock:
            if not self._open:
                return self.best
            way = min(self._open, key=lambda each: self._issued[each])
            self._issued[way] += 1
            return way

    def record(self, way: Way, seconds: float) -> None:
        """What a full batch took."""
        with self._lock:
            if way not in self._open:
                if way == self.best:
                    self.seconds_per_image = seconds / way.batch_size
                return
            self._open[way].append(seconds / way.batch_size)
            if all(len(trials) >= NUM_IGNORED + NUM_FIRST_TRIALS for trials in self._open.values()):
                self._drop_the_hopeless()
            if all(len(trials) >= NUM_IGNORED + NUM_TRIALS for trials in self._open.values()) or len(self._open) == 1:
                self._decide()

    def add(self, way: Way) -> None:
        """Try one more way: against those that are being tried, else against the best so far."""
        with self._lock:
            if self._open:
                self._open[way] = []
                self._issued[way] = 0
                return
        self._try([self.best, way])

    def insist(self, way: Way) -> None:
        """Use this way and no other."""
        self._try([way])

    def refuse(self, batch_size: int) -> int:
        """This size does not fit into memory: go on with smaller ones; the largest that may be tried now."""
        with self._lock:
            half = max(1, batch_size // 2)
            self._open = {way: trials for way, trials in self._open.items() if way.batch_size < batch_size}
            if self.best.batch_size >= batch_size:
                self.best = max(self._open, key=lambda way: way.batch_size) if self._open else Way(self._base, half)
            if len(self._open) < 2:
                self._open = {}
                self._decided.set()
            return half

    def wait(self, timeout_s: float) -> bool:
        """Until the best way is known; False when that took longer."""
        return self._decided.wait(timeout_s)

    def _try(self, ways: Sequence[Way]) -> None:
        with self._lock:
            self._decided.clear()
            self._open = {way: [] for way in ways}
            self._issued = dict.fromkeys(ways, 0)
            if len(self._open) == 1:
                (self.best,) = self._open
                self._open = {}
                self._decided.set()

    def _drop_the_hopeless(self) -> None:
        taken = {way: min(trials[NUM_IGNORED:]) for way, trials in self._open.items()}
        fastest = min(taken.values())
        self._open = {way: trials for way, trials in self._open.items() if taken[way] <= fastest * HOPELESS}

    def _decide(self) -> None:
        taken = {way: statistics.median(trials[NUM_IGNORED:]) for way, trials in self._open.items()}
        fastest = min(taken.values())
        good = [way for way, seconds in taken.items() if seconds <= fastest * SMALLER_IS_ENOUGH]
        self.best = min(good, key=lambda way: way.batch_size)
        self.seconds_per_image = taken[self.best]
        self._open = {}
        self._decided.set()
