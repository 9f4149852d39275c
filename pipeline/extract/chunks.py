"""A few samples at a time on their way from those who read them to those who compute them."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.extract.rows import Home, Row

CHUNK_SAMPLES = 8
"""Samples handed to a worker at a time: fewer hand-overs, still many chunks in a batch."""
LARGE_IMAGE_BYTES = 2 << 20
"""An image of this size is handed over alone."""


@dataclass(slots=True, eq=False)
class Chunk:
    """Samples of one shard, or of one loan."""

    home: Home
    rows: list[Row]
    num_bytes: int
    """Of the encoded images, as far as they count in the budget."""
    is_recognised: bool = False
    """Whether all of its rows have to be computed, and this is known."""
    may_be_lent: bool = True


class Chunks:
    """What was read and no worker has begun: workers take the first, and the last ones can be lent.

    From any thread. The budget of bytes bounds it.
    """

    def __init__(self) -> None:
        self._chunks: collections.deque[Chunk] = collections.deque()
        self._num_rows = 0
        self._closed = False
        lock = threading.Lock()
        self._filled, self._plenty = threading.Condition(lock), threading.Condition(lock)

    def put(self, chunk: Chunk) -> None:
        """Queue it."""
        self._add(chunk, self._chunks.append)

    def put_first(self, chunk: Chunk) -> None:
        """Let it be the next."""
        self._add(chunk, self._chunks.appendleft)

    def get(self) -> Chunk | None:
        """The next one, as soon as there is one; None once the queue is closed and empty."""
        with self._filled:
            while not self._chunks:
                if self._closed:
                    return None
                self._filled.wait()
            chunk = self._chunks.popleft()
            self._num_rows -= len(chunk.rows)
            return chunk

    def take_last(self, max_rows: int, keep: int, timeout_s: float) -> list[Chunk]:
        """Chunks from the end: about `max_rows`, and at most half of what lies beyond the first `keep` rows.

        Waits for a moment where there is nothing beyond them. What may not be lent, and what lies before it, stays.
        """
        with self._plenty:
            self._plenty.wait_for(lambda: self._num_rows > keep or self._closed, timeout_s)
            most, taken = min(max_rows, (self._num_rows - keep + 1) // 2), list[Chunk]()
            while most > 0 and self._chunks and self._chunks[-1].may_be_lent:
                taken.append(self._chunks.pop())
                self._num_rows -= len(taken[-1].rows)
                most -= len(taken[-1].rows)
            return taken[::-1]

    def close(self) -> None:
        """Let workers end when nothing is left."""
        with self._filled:
            self._closed = True
            self._filled.notify_all()
            self._plenty.notify_all()

    def _add(self, chunk: Chunk, add: Callable[[Chunk], None]) -> None:
        with self._filled:
            add(chunk)
            self._num_rows += len(chunk.rows)
            self._filled.notify()
            self._plenty.notify()
