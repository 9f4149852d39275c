"""The extraction loop: fetch, decode, embed and write, overlapped in one process.

In: shards. Out: one published partition a shard. Nothing here knows a container format, a store or a device.

    submit ──► fetchers ──► lanes ──► router ──► writers ──► a future a shard
               read a shard  decode    rows back  row groups,
               as samples    and embed to their   publish
                             (`lanes`) partition

Memory is bounded by what the lanes hold, one row group for each open partition, and 100 bytes for each key of an open shard;
while an actor lends work to others, by what `lending` adds.
"""

from __future__ import annotations

import functools
import itertools
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

from pipeline.dataset import partition
from pipeline.dataset.partition import Partition, Target
from pipeline.errors import SampleError
from pipeline.extract import logs
from pipeline.extract.backbone import Backbone
from pipeline.extract.carry import NOTHING_KNOWN, CarriedRows, KnownRows, Task, known_rows
from pipeline.extract.chunks import CHUNK_SAMPLES, LARGE_IMAGE_BYTES, Chunk
from pipeline.extract.lanes import Lanes, Results
from pipeline.extract.lanes import Settings as Settings
from pipeline.extract.lending import Answer, Borrowed, Images, Lender
from pipeline.extract.rows import OpenShard, Row, columns
from pipeline.metrics import Stages
from pipeline.source import Sample, Source

logger = logging.getLogger(__name__)

NUM_FETCHERS = 2
"""While one waits for a store's first byte the other reads."""
NUM_WRITERS = 2
MAX_WAITING_ROWS = 20_000
"""Rows of a shard that wait for an earlier one."""
WATCH_S = 1.0
"""How often somebody looks whether a picture is stuck, or a loan late."""


class Loop:
    """Runs until it is closed; shards are submitted from any thread."""

    def __init__(
        self, source: Source, backbone: Backbone, target: Target, settings: Settings, known: KnownRows = NOTHING_KNOWN
    ) -> None:
        self.stages = Stages()
        self._source, self._backbone, self._target = source, backbone, target
        self._num_workers = settings.num_workers
        self._rows_per_group = partition.rows_per_group(backbone.recipe)

        self._shards: queue.SimpleQueue[OpenShard | None] = queue.SimpleQueue()
        self._results: Results = queue.SimpleQueue()
        self.lanes = Lanes(backbone, settings, known, source.settings.max_pixels, self.stages, self._results)
        self.tuner = self.lanes.tuner
        self.lender = Lender(self.lanes, self._results, settings.num_workers, self._rows_per_group)
        self._writing: list[queue.Queue[Callable[[], None] | None]] = [queue.Queue(maxsize=4) for _ in range(NUM_WRITERS)]
        self._carried_rows = [CarriedRows(target) for _ in self._writing]

        self._lock = threading.Lock()
        self.num_fetched = self.num_bytes_fetched = 0
        """Samples, and their encoded bytes, so far."""
        self._open: set[OpenShard] = set()
        self._borrowed: set[Borrowed] = set()
        self._num_opened = 0
        self._failure: BaseException | None = None
        self._closed = threading.Event()

        kinds: list[list[Callable[[], None]]] = [
            [self._fetch] * NUM_FETCHERS,
            [self.lanes.work] * settings.num_workers,
            [self._route],
            [functools.partial(self._write, writing) for writing in self._writing],
            [self._watch],
        ]
        self._threads = [[threading.Thread(target=self._guarded, args=(role,), daemon=True) for role in kind] for kind in kinds]
        for thread in itertools.chain(*self._threads):
            thread.start()

    def submit(self, task: Task) -> Future[Partition]:
        """Extract one shard. The future has its partition, or the error that the shard failed with."""
        with self._lock:
            opened = OpenShard(task.shard, task.previous, self._num_opened % NUM_WRITERS, self._on_rows, task.is_suspect)
            self._open.add(opened)
            self._num_opened += 1
            failure = self._failure
        self.lanes.expect()
        if failure is not None:
            self._finish(opened, failure)
        self._shards.put(opened)
        return opened.future

    def embed(self, images: Images) -> Future[Answer]:
        """Decode and embed what another actor lends. The future has its answer, or the error that this loop failed with."""
        borrowed = Borrowed(len(images))
        with self._lock:
            self._borrowed.add(borrowed)
            failure = self._failure
        borrowed.future.add_done_callback(lambda _: self._borrowed.discard(borrowed))
        if failure is not None:
            borrowed.fail(failure)
            return borrowed.future
        self.lanes.expect()
        for chunk in borrowed.chunks(images):
            self.lanes.put(chunk)
        self.lanes.expect_no_more()
        return borrowed.future

    @property
    def num_bytes_left(self) -> int:
        """Of open shards, so far as they have not been read."""
        with self._lock:
            return sum(max(0, opened.shard.num_bytes - opened.num_bytes_read) for opened in self._open)

    def close(self) -> None:
        """Stop the threads, each kind when it has done what those before it have left. Call it when every future is done."""
        self._closed.set()
        for _ in range(NUM_FETCHERS):
            self._shards.put(None)
        fetchers, workers, router, writers, watch = self._threads
        _join(fetchers)
        self.lanes.chunks.close()
        _join(workers)
        self._results.put(None)
        _join(router)
        for writing in self._writing:
            writing.put(None)
        _join(writers)
        _join(watch)

    # The threads, but for the lanes' workers

    def _fetch(self) -> None:
        """Read shards as chunks of samples."""
        while True:
            with self.stages.time("no_shard"):
                opened = self._shards.get()
            if opened is None:
                return
            with logs.about(opened.shard.url):
                self._fetch_shard(opened)
            self.lanes.expect_no_more()

    def _fetch_shard(self, opened: OpenShard) -> None:
        num_read, seen = 0, set[int]()
        try:
            if opened.previous is not None:
                with self.stages.time("fetch"):
                    opened.known = known_rows(self._target, {opened.previous: 0})
            samples = iter(self._source.read(opened.shard))
            while True:
                with self.stages.time("fetch"):
                    chunk = _next_chunk(samples, seen)
                if not chunk:
                    break
                num_read += len(chunk)
                self._hand_over(opened, chunk)
        except BaseException as failure:
            error = failure
            self._results.put(lambda: self._fail(opened, error))
        else:
            self._results.put(lambda: self._end(opened, num_read))

    def _hand_over(self, opened: OpenShard, chunk: list[Sample]) -> None:
        num_bytes = sum(len(sample.image) for sample in chunk)
        opened.num_bytes_read += num_bytes
        with self._lock:
            self.num_fetched += len(chunk)
            self.num_bytes_fetched += num_bytes
        rows = [Row(opened, sample) for sample in chunk]
        self.lanes.put(Chunk(opened, rows, num_bytes, may_be_lent=not opened.is_suspect))

    def _watch(self) -> None:
        """Give the loop up when a picture is stuck, and take back what was lent for too long."""
        while not self._closed.wait(WATCH_S):
            self.lanes.check_decoders()
            self.lender.take_back_late()

    def _route(self) -> None:
        """Bring results back to their partitions. Only this thread touches what an open partition has collected."""
        while True:
            with self.stages.time("elapsed"):
                result = self._results.get()
                if result is None:
                    return
                result()

    def _write(self, writing: queue.Queue[Callable[[], None] | None]) -> None:
        """Encode and publish, off the path of the samples."""
        while True:
            with self.stages.time("no_rows"):
                job = writing.get()
            if job is None:
                return
            with self.stages.time("write"):
                job()

    # What becomes of rows, run by the router

    def _end(self, opened: OpenShard, num_read: int) -> None:
        opened.num_read = num_read
        opened.flush()

    def _on_rows(self, opened: OpenShard) -> None:
        """Hand the rows that are complete and in order to the writer; the rest when the shard is complete."""
        opened.collect()
        if len(opened.rows) > MAX_WAITING_ROWS:
            self.lanes.launch_open()  # rows that were carried over pile up behind one that waits for its batch to fill
        while len(opened.ordered) >= self._rows_per_group:
            group, opened.ordered = opened.ordered[: self._rows_per_group], opened.ordered[self._rows_per_group :]
            self._in_writer(opened, lambda group=group: self._write_group(opened, group))  # type: ignore[misc]
        if opened.num_read is not None and opened.next_index == opened.num_read:
            opened.closed = True
            self._in_writer(opened, lambda: self._publish(opened))

    def _fail(self, opened: OpenShard, error: BaseException) -> None:
        """Give a shard up, after what its writer is doing with it."""
        opened.closed = True
        self._in_writer(opened, lambda: self._finish(opened, error))

    def _in_writer(self, opened: OpenShard, job: Callable[[], None]) -> None:
        def guarded() -> None:
            if not opened.future.done():
                try:
                    with logs.about(opened.shard.url):
                        job()
                except BaseException as error:
                    self._finish(opened, error)

        self._writing[opened.writer_number].put(guarded)

    # Jobs of a writer

    def _write_group(self, opened: OpenShard, group: Sequence[Row]) -> None:
        if opened.writer is None:
            opened.start(self._target)
        assert opened.writer is not None, "start() made it"
        for row in group:
            if row.place is not None:
                row.embeddings = self._carried_rows[opened.writer_number].read(row.place)
        opened.writer.write(*columns(opened.shard.url, group, self._target))

    def _publish(self, opened: OpenShard) -> None:
        rest, opened.ordered = opened.ordered, []  # rows know their shard: left in it they would wait for the cycle collector
        if rest or opened.writer is None:
            self._write_group(opened, rest)
        # Before anyone can see the partition: whatever this model did to itself, no row of it gets out.
        self._backbone.check_frozen()
        self._finish(opened, opened.publish(self._target))

    # Ends

    def _finish(self, opened: OpenShard, result: Partition | BaseException) -> None:
        with self._lock:
            self._open.discard(opened)
        opened.closed = True
        if isinstance(result, BaseException):
            opened.abort()
            if not opened.future.done():
                opened.future.set_exception(result)
        else:
            opened.future.set_result(result)

    def _guarded(self, role: Callable[[], None]) -> None:
        """A thread that dies takes the loop with it: every open shard fails, none hangs."""
        try:
            role()
        except BaseException as error:
            logger.error("the loop broke, and every shard in hand fails with it", exc_info=error)
            with self._lock:
                self._failure = error
                opened, borrowed = list(self._open), list(self._borrowed)
            for shard in opened:
                self._finish(shard, error)
            for loan in borrowed:
                loan.fail(error)


def _join(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.join()


def _next_chunk(samples: Iterator[Sample], seen: set[int]) -> list[Sample]:
    """Up to `CHUNK_SAMPLES`, fewer where they are large; none at the end. `seen` holds the hashes of the keys so far."""
    chunk: list[Sample] = []
    for sample in samples:
        key = hash(sample.key)
        if key in seen:
            sample.error = SampleError("read", "DuplicateKey", "the shard has an earlier sample of this key")
        seen.add(key)
        chunk.append(sample)
        if len(chunk) == CHUNK_SAMPLES or len(sample.image) > LARGE_IMAGE_BYTES:
            break
    return chunk
