"""Work that one actor does for another: near the end of a run some have nothing left, while one still has a large shard.

The owner of the shard lends what it has read and none of its workers has begun, encoded as it is, from the end of its queue. A
helper's lanes decode and embed it. The owner takes the answer as if its own lanes had given it, and writes the one partition.
It keeps what it lent until the answer is there; where that takes too long it computes it too, and the first one counts. So
nothing depends on a helper: it may be slow, and it may die.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import SampleError
from pipeline.extract.carry import NOTHING_KNOWN
from pipeline.extract.chunks import CHUNK_SAMPLES, Chunk
from pipeline.extract.lanes import Lanes, Results
from pipeline.extract.rows import Home, Row
from pipeline.source import Sample

MAX_LENT_BYTES = 128 << 20
"""Encoded images that an owner keeps until their answers are there, beside the budget of its own lanes."""
LEAVE_CHUNKS = 2
"""What each of an owner's own workers is left with."""
LEND_WITHIN_S = 0.25
"""How long an owner that has nothing to lend waits for something."""
LATE_S = 1.0
"""An answer that has not come by then is late, if the owner could compute it meanwhile."""

_numbers = itertools.count(1)

Images = list[NDArray[np.uint8]]
"""Encoded images: arrays, because Ray hands them on without a copy."""


@dataclass(slots=True)
class Answer:
    """What became of the N images of a loan; the rows of images that have an error mean nothing."""

    sizes_N2: NDArray[np.int32]
    """Width and height."""
    embeddings: dict[str, NDArray[np.float32]]
    """Column to (N, D)."""
    errors: dict[int, tuple[str, str, str]]
    """By position: stage, error and message of a `SampleError`."""


@dataclass(slots=True)
class _Lent:
    rows: list[Row]
    num_bytes: int
    since: float
    is_taken_back: bool = False


class Lender:
    """The owner's side. From any thread."""

    def __init__(self, lanes: Lanes, results: Results, num_workers: int, max_rows: int) -> None:
        self._lanes, self._results = lanes, results
        self._keep = LEAVE_CHUNKS * CHUNK_SAMPLES * num_workers
        self._max_rows = max_rows
        """Rows that are lent, and half of those that may pile up behind them."""
        self._lock = threading.Lock()
        self._lent: dict[int, _Lent] = {}

    def lend(self, max_images: int) -> tuple[int, Images]:
        """The number of a loan, and encoded images: about so many and at most half of what waits; none after a moment without.

        Whoever gets some has to `settle` the loan.
        """
        with self._lock:
            num_rows = sum(len(lent.rows) for lent in self._lent.values())
            num_bytes = sum(lent.num_bytes for lent in self._lent.values())
        number = next(_numbers)
        is_full = num_rows >= self._max_rows or num_bytes >= MAX_LENT_BYTES
        rows = list[Row]()
        for chunk in self._lanes.chunks.take_last(0 if is_full else max_images, self._keep, LEND_WITHIN_S):
            rows += self._lanes.recognise(chunk)
            self._lanes.give_away(chunk)
        images = [_as_array(row.sample.image) for row in rows]
        if rows:
            with self._lock:
                self._lent[number] = _Lent(rows, sum(map(len, images)), time.monotonic())
        return number, images

    def settle(self, number: int, answer: Answer | None) -> None:
        """Take the answer to a loan; None where none will come. Nothing where it is one of an earlier loop of this process."""
        with self._lock:
            lent = self._lent.pop(number, None)
        if lent is None:
            return
        if answer is not None:
            self._results.put(lambda: _settled(lent.rows, answer))
        elif not lent.is_taken_back:
            self._take_back(lent)

    def take_back_late(self) -> None:
        """Compute what is late here too, where there is nothing else to do, or too many rows wait for it."""
        now = time.monotonic()
        with self._lock:
            late = [lent for lent in self._lent.values() if not lent.is_taken_back and now - lent.since >= LATE_S]
        if not late:
            return
        if any(row.home.num_waiting > 2 * self._max_rows for row in late[0].rows):
            self._take_back(late[0])
        elif self._lanes.is_idle:
            self._take_back(late[-1])  # its helper has come the least far

    def _take_back(self, lent: _Lent) -> None:
        lent.is_taken_back = True
        # Rows of their own: the answer may still come.
        rows = [Row(row.home, row.sample, row.content_hash) for row in lent.rows]
        for chunk in reversed(list(_chunks(rows))):
            self._lanes.take_back(chunk)


def _settled(rows: Sequence[Row], answer: Answer) -> None:
    """Bring an answer home; run by the router."""
    touched: dict[Home, None] = {}
    for position, row in enumerate(rows):
        if position in answer.errors:
            row.home.refuse(row, SampleError(*answer.errors[position]))
        else:
            row.width, row.height = answer.sizes_N2[position].tolist()
            # Copied, or the whole answer would stay in the object store while one of its rows is open.
            row.embeddings = {column: values_ND[position].copy() for column, values_ND in answer.embeddings.items()}
            row.home.add(row)
        row.sample.image = b""
        touched[row.home] = None
    for home in touched:
        home.flush()


class Borrowed:
    """The helper's side: a home for the rows of one loan."""

    name = "an image that another actor lends"
    known = NOTHING_KNOWN
    is_suspect = False
    num_waiting = 0

    def __init__(self, num_images: int) -> None:
        self.future: Future[Answer] = Future()
        self._num_images = num_images
        self._rows: dict[int, Row] = {}
        self._errors: dict[int, tuple[str, str, str]] = {}

    def chunks(self, images: Images) -> Iterator[Chunk]:
        """What the lanes have to do."""
        samples = [Sample(key=str(number), index=number, url="", image=image.data) for number, image in enumerate(images)]
        return _chunks([Row(self, sample) for sample in samples])

    def wants(self, sample: Sample) -> bool:
        """See `Home`."""
        return not self.future.done()

    def add(self, row: Row) -> None:
        """See `Home`."""
        self._rows[row.sample.index] = row

    def refuse(self, row: Row, error: SampleError) -> None:
        """See `Home`."""
        self._errors[row.sample.index] = (error.stage, error.error, error.message)

    def flush(self) -> None:
        """See `Home`."""
        if len(self._rows) + len(self._errors) == self._num_images and not self.future.done():
            rows, self._rows = self._rows, {}
            sizes_N2 = np.zeros((self._num_images, 2), np.int32)
            embeddings = dict[str, NDArray[np.float32]]()
            for position, row in rows.items():
                sizes_N2[position] = row.width, row.height
                for column, values_D in row.embeddings.items():
                    if column not in embeddings:
                        embeddings[column] = np.zeros((self._num_images, len(values_D)), np.float32)
                    embeddings[column][position] = values_D
            self.future.set_result(Answer(sizes_N2, embeddings, self._errors))

    def fail(self, error: BaseException) -> None:
        """The loop is broken: no answer will come."""
        if not self.future.done():
            self.future.set_exception(error)


def _chunks(rows: list[Row]) -> Iterator[Chunk]:
    """Rows that have to be computed, a few at a time. Their bytes are on no fetcher's budget: a few loans bound them."""
    for start in range(0, len(rows), CHUNK_SAMPLES):
        some = rows[start : start + CHUNK_SAMPLES]
        yield Chunk(some[0].home, some, num_bytes=0, is_recognised=True, may_be_lent=False)


def _as_array(image: bytes | memoryview) -> NDArray[np.uint8]:
    return np.frombuffer(image, np.uint8) if len(image) else np.empty(0, np.uint8)
