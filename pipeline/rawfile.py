"""A stored object as a raw, seekable file: in pieces that are fetched ahead of need, or in ranges of just what is asked for.

Knows no store: it is given what fetches the bytes from `start` on, and how many there are.
"""

from __future__ import annotations

import collections
import io
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any

PIECE_BYTES = 8 << 20
"""Large objects are read in pieces of this size, `READ_AHEAD` of them ahead of need."""
READ_AHEAD, MAX_READ_AHEAD = 2, 6
"""Each time a reader has to wait for a piece it asks for one more ahead."""

Fetch = Callable[[int, int], bytes]
"""Start and number of bytes to these bytes."""


class RawFile(io.RawIOBase):
    """A position in an object of known size."""

    def __init__(self, fetch: Fetch, num_bytes: int) -> None:
        self._fetch, self._num_bytes, self._position = fetch, num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        self._position = max(0, base + offset)
        return self._position


class Ranges(RawFile):
    """Every read is one request for just these bytes: for readers that know where to look."""

    def read(self, size: int = -1) -> bytes:
        """The bytes as they were fetched, without a copy."""
        left = max(0, self._num_bytes - self._position)
        count = left if size < 0 else min(size, left)
        payload = self._fetch(self._position, count) if count else b""
        self._position += count
        return payload

    def readinto(self, buffer: Any) -> int:
        payload = self.read(len(buffer))
        buffer[: len(payload)] = payload
        return len(payload)


class Pieces(RawFile):
    """Large pieces, fetched by the threads of a pool ahead of a sequential reader."""

    def __init__(self, fetch: Fetch, num_bytes: int, pool: Executor) -> None:
        super().__init__(fetch, num_bytes)
        self._pool, self._ahead = pool, READ_AHEAD
        self._pieces: collections.OrderedDict[int, Future[bytes]] = collections.OrderedDict()

    def readinto(self, buffer: Any) -> int:
        if self._position >= self._num_bytes:
            return 0
        number, offset = divmod(self._position, PIECE_BYTES)
        piece = memoryview(self._piece(number))[offset:]
        count = min(len(buffer), len(piece))
        buffer[:count] = piece[:count]
        self._position += count
        return count

    def blocks(self, start: int) -> Iterator[bytes]:
        """All bytes from `start` on, piece by piece."""
        first, passed = divmod(start, PIECE_BYTES)
        for number in range(first, -(-self._num_bytes // PIECE_BYTES)):
            piece = self._piece(number)
            yield piece[passed:] if number == first else piece

    def _piece(self, number: int) -> bytes:
        """A piece; those after it are requested."""
        if (waited_for := self._pieces.get(number)) is not None and not waited_for.done():
            self._ahead = min(self._ahead + 1, MAX_READ_AHEAD)
        last = (self._num_bytes - 1) // PIECE_BYTES
        for wanted in range(number, min(number + self._ahead, last) + 1):
            if wanted not in self._pieces:
                start = wanted * PIECE_BYTES
                num_bytes = min(PIECE_BYTES, self._num_bytes - start)
                self._pieces[wanted] = self._pool.submit(self._fetch, start, num_bytes)
        self._pieces.move_to_end(number)
        while len(self._pieces) > self._ahead + 2:
            self._pieces.popitem(last=False)[1].cancel()
        return self._pieces[number].result()

    def close(self) -> None:
        for piece in self._pieces.values():
            piece.cancel()
        self._pieces.clear()
        super().close()
