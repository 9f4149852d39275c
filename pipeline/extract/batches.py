"""What bounds the loop: a fixed number of batches, and a budget of bytes that wait to be decoded."""

from __future__ import annotations

import queue
import threading
from typing import Any

import torch

from pipeline.extract.backbone import Backbone
from pipeline.extract.tune import Tuner, Way


class Batch:
    """Slots for pictures, filled by several workers. Its size is that of the way that it will be computed in."""

    def __init__(self, backbone: Backbone, way: Way) -> None:
        self._slots_BHWC = backbone.new_batch(way.batch_size)
        self.slots = self._slots_BHWC.unbind()
        """One (H, W, 3) uint8 tensor a picture."""
        self._lock = threading.Lock()
        self.reset(way)

    @property
    def images_BHWC(self) -> torch.Tensor:
        """As many pictures as a forward pass takes; slots that were not filled hold old ones."""
        return self._slots_BHWC[: self.way.batch_size]

    def settle(self, count: int) -> bool:
        """Count slots whose sample was decoded or refused; True for the call that completes the batch."""
        with self._lock:
            self._num_settled += count
            return count > 0 and self._num_settled == self._num_expected

    def seal(self) -> bool:
        """Expect no more than what was placed; False while a worker still has a slot of it in hand."""
        with self._lock:
            if self._num_settled < self.num_placed:
                return False
            self._num_expected = self.num_placed
            return True

    def reset(self, way: Way) -> None:
        """Empty all slots."""
        self.way = way
        self.rows: list[Any] = [None] * way.batch_size
        self.num_placed, self._num_settled, self._num_expected = 0, 0, way.batch_size


class Batches:
    """A fixed number of batches, one of them open."""

    def __init__(self, backbone: Backbone, tuner: Tuner, count: int) -> None:
        self._tuner = tuner
        self._free: queue.SimpleQueue[Batch] = queue.SimpleQueue()
        largest = max(tuner.ways, key=lambda way: way.batch_size)
        for _ in range(count):
            self._free.put(Batch(backbone, largest))
        self._open: Batch | None = None
        self._lock = threading.Lock()

    def place(self, count: int) -> list[tuple[Batch, int]]:
        """The next slots, at most `count` and as many as there are; waits for a batch to come back where there are none.

        Never waits with slots in hand: the batches that others wait for could be its own.
        """
        slots: list[tuple[Batch, int]] = []
        with self._lock:
            while len(slots) < count:
                if self._open is None:
                    if slots and self._free.empty():
                        break
                    self._open = self._free.get()
                    self._open.reset(self._tuner.next())
                batch = self._open
                slots.append((batch, batch.num_placed))
                batch.num_placed += 1
                if batch.num_placed == batch.way.batch_size:
                    self._open = None
        return slots

    def seal(self) -> Batch | None:
        """Take the open batch away, if there is one and nobody is filling it. Never waits."""
        if not self._lock.acquire(blocking=False):
            return None
        try:
            if self._open is None or not self._open.seal():
                return None
            batch, self._open = self._open, None
            return batch
        finally:
            self._lock.release()

    def free(self, batch: Batch) -> None:
        """Take back a batch whose outputs have been read."""
        self._free.put(batch)


class ByteBudget:
    """Lets fetchers run ahead of workers by so many bytes, or by one chunk where that is larger."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used, self._changed = limit, 0, threading.Condition()

    def acquire(self, num_bytes: int) -> None:
        """Wait until there is room, and take it."""
        with self._changed:
            self._changed.wait_for(lambda: self._used == 0 or self._used + num_bytes <= self._limit)
            self._used += num_bytes

    def release(self, num_bytes: int) -> None:
        """Give room back."""
        with self._changed:
            self._used -= num_bytes
            self._changed.notify_all()
