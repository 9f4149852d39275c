"""The extraction loop: fetch, decode, embed and write, overlapped in one process.

In: shards. Out: one published partition a shard. Nothing here knows a container format, a store or a device.

    submit ──► fetchers ──► samples ──► workers ──► batches ──► router ──► writers ──► a future a shard
               read a shard  in chunks  decode into  fixed size  rows back  row groups,
               as samples    bounded    free slots   padded      to their   publish
                             in bytes                            partition

Batches are packed across shard borders. The worker that fills the last slot of a batch launches its forward pass: on a CPU
that runs there and then, so every core is a lane of its own; on a GPU it is only queued, and the worker goes on decoding.
A batch that nothing will fill any more is launched as it is. Memory is bounded by the number of batches, the bytes of
encoded images in a budget of bytes, one row group for each open partition, and 100 bytes for each key of an open shard.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.dataset import partition
from pipeline.dataset.partition import Partition, Quarantined, Target
from pipeline.errors import SampleError, WorldError
from pipeline.extract.backbone import Backbone, Pass
from pipeline.extract.batches import Batch, Batches, ByteBudget
from pipeline.extract.carry import NOTHING_KNOWN, CarriedRows, KnownRows, Task, known_rows
from pipeline.extract.decode import Decoder
from pipeline.extract.isolated import IsolatedDecoder
from pipeline.extract.rows import OpenShard, Row, columns
from pipeline.extract.tune import Tuner, Way
from pipeline.metrics import Stages
from pipeline.source import Sample, Source

logger = logging.getLogger(__name__)

CHUNK_SAMPLES = 8
"""Samples handed to a worker at a time: fewer hand-overs, still many chunks in a batch."""
QUEUED_BYTES, QUEUED_BYTES_PER_WORKER = 32 << 20, 8 << 20
"""Encoded images between fetchers and workers."""
LARGE_IMAGE_BYTES = 2 << 20
"""An image of this size is handed over alone."""
NUM_FETCHERS = 2
"""While one waits for a store's first byte the other reads."""
NUM_WRITERS = 2
MAX_WAITING_ROWS = 20_000
"""Rows of a shard that wait for an earlier one."""
WATCH_S = 1.0
"""How often somebody looks whether a picture is stuck."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the loop is told besides its parts."""

    decode: str
    batch_sizes: Sequence[int]
    """Those to choose from by measurement."""
    num_workers: int
    decode_timeout_s: float = 60.0
    """For one picture."""
    decode_imports: Sequence[str] = ()
    """See `IsolatedDecoder`."""


class Loop:
    """Runs until it is closed; shards are submitted from any thread."""

    def __init__(
        self, source: Source, backbone: Backbone, target: Target, settings: Settings, known: KnownRows = NOTHING_KNOWN
    ) -> None:
        self.stages = Stages()
        self._known = known
        self._source, self._backbone, self._target, self._settings = source, backbone, target, settings
        self._rows_per_group = partition.rows_per_group(backbone.recipe)

        self._shards: queue.SimpleQueue[OpenShard | None] = queue.SimpleQueue()
        self._samples: queue.SimpleQueue[tuple[OpenShard, list[Sample]] | None] = queue.SimpleQueue()
        self._budget = ByteBudget(QUEUED_BYTES + settings.num_workers * QUEUED_BYTES_PER_WORKER)
        self._results: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.tuner = Tuner([Way(backbone.program, size) for size in settings.batch_sizes])
        # What is computed (on a CPU one a worker, on a GPU one that is copied and one that runs), one that is being filled, one
        # on its way back.
        num_computed = settings.num_workers if backbone.device.type == "cpu" else 2
        self._batches = Batches(backbone, self.tuner, num_computed + 2)
        self._writing: list[queue.Queue[Callable[[], None] | None]] = [queue.Queue(maxsize=4) for _ in range(NUM_WRITERS)]

        self._carried_rows = [CarriedRows(target) for _ in self._writing]

        self._lock = threading.Lock()
        self._open: set[OpenShard] = set()
        self._num_opened = 0
        self.first_batch_at: float | None = None
        """Seconds since the epoch when the first batch had been embedded."""
        self.num_fetched = 0
        """Samples, and below their encoded bytes, so far."""
        self.num_bytes_fetched = 0
        self._num_unread = 0
        """Shards that were submitted and are not read to their end."""
        self._num_undecided = 0
        """Samples that were fetched and have neither a row in a batch nor an error yet."""
        self._failure: BaseException | None = None
        self._decoding: dict[int, tuple[float, Row]] = {}
        """By thread: the picture that it has in hand, and since when."""
        self._closed = threading.Event()

        roles = [self._fetch] * NUM_FETCHERS + [self._work] * settings.num_workers + [self._route, self._watch]
        self._threads = [threading.Thread(target=self._guarded, args=(role,), daemon=True) for role in roles]
        self._threads += [threading.Thread(target=self._guarded, args=(self._write, q), daemon=True) for q in self._writing]
        for thread in self._threads:
            thread.start()

    def submit(self, task: Task) -> Future[Partition]:
        """Extract one shard. The future has its partition, or the error that the shard failed with."""
        with self._lock:
            opened = OpenShard(task.shard, task.previous, self._num_opened % NUM_WRITERS, task.is_suspect)
            self._open.add(opened)
            self._num_opened += 1
            self._num_unread += 1
            failure = self._failure
        if failure is not None:
            self._finish(opened, failure)
        self._shards.put(opened)
        return opened.future

    def close(self) -> None:
        """Stop the threads. Call it when every future is done."""
        self._closed.set()
        for _ in range(NUM_FETCHERS):
            self._shards.put(None)
        for _ in range(self._settings.num_workers):
            self._samples.put(None)
        self._results.put(None)
        for writing in self._writing:
            writing.put(None)
        for thread in self._threads:
            thread.join()

    # The five kinds of threads

    def _fetch(self) -> None:
        """Read shards as chunks of samples."""
        while True:
            with self.stages.time("no_shard"):
                opened = self._shards.get()
            if opened is None:
                return
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
            except BaseException as error:
                self._results.put(lambda opened=opened, error=error: self._fail(opened, error))  # type: ignore[misc]
            else:
                self._results.put(lambda opened=opened, num=num_read: self._end(opened, num))  # type: ignore[misc]
            with self._lock:
                self._num_unread -= 1
            self._launch_rest()

    def _hand_over(self, opened: OpenShard, chunk: list[Sample]) -> None:
        num_bytes = sum(len(sample.image) for sample in chunk)
        with self._lock:
            self._num_undecided += len(chunk)
            self.num_fetched += len(chunk)
            self.num_bytes_fetched += num_bytes
        self._budget.acquire(num_bytes)
        self._samples.put((opened, chunk))

    def _work(self) -> None:
        """Decode samples into slots, and launch the batches that are full."""
        if self._backbone.device.type == "cpu":
            torch.set_num_threads(1)  # this thread is a lane: a second level of threads would only spin
        settings, preprocess = self._settings, self._backbone.preprocess
        fast, max_pixels = settings.decode == "fast", self._source.settings.max_pixels
        decoder = Decoder(preprocess, fast=fast, max_pixels=max_pixels)
        isolated = IsolatedDecoder(
            preprocess,
            fast=fast,
            max_pixels=max_pixels,
            imports=settings.decode_imports,
            timeout_s=settings.decode_timeout_s,
        )
        with torch.inference_mode(), contextlib.closing(isolated):
            self._work_through_samples(decoder, isolated)

    def _work_through_samples(self, decoder: Decoder, isolated: IsolatedDecoder) -> None:
        while True:
            with self.stages.time("no_sample"):
                item = self._samples.get()
            if item is None:
                return
            opened, chunk = item
            num_bytes = sum(len(sample.image) for sample in chunk)
            with self.stages.time("decode"):
                unknown = self._recognise(opened, chunk)
            while unknown:
                with self.stages.time("no_batch"):
                    slots = self._batches.place(len(unknown))
                placed, unknown = unknown[: len(slots)], unknown[len(slots) :]
                with self.stages.time("decode"):
                    self._decode(isolated if opened.is_suspect else decoder, placed, slots)
                for batch in dict.fromkeys(batch for batch, _ in slots):
                    if batch.settle(sum(other is batch for other, _ in slots)):
                        self._launch(batch)
            self._budget.release(num_bytes)
            with self._lock:
                self._num_undecided -= len(chunk)
            self._launch_rest()

    def _recognise(self, opened: OpenShard, chunk: list[Sample]) -> list[Row]:
        """Hash what was read; the rows that have to be computed. Errors and known rows go on from here."""
        unknown = []
        known = [rows for rows in (opened.known, self._known) if len(rows)]
        for sample in chunk:
            if sample.error is not None:
                self._refuse(opened, sample, sample.error)
                continue
            content_hash = hashlib.sha256(sample.image).hexdigest()[:32]
            place = next((found for rows in known if (found := rows.find(content_hash))), None) if known else None
            if place is None:
                unknown.append(Row(opened, sample, content_hash))
            else:
                sample.image = b""
                row = Row(opened, sample, content_hash, place.width, place.height, place)
                self._results.put(lambda row=row: self._carried(row))  # type: ignore[misc]
        return unknown

    def _decode(self, decoder: Decoder | IsolatedDecoder, rows: list[Row], slots: list[tuple[Batch, int]]) -> None:
        """Give every row its picture in a batch, or an error."""
        thread = threading.get_ident()
        for row, (batch, slot) in zip(rows, slots, strict=True):
            if not row.opened.is_suspect:
                self._decoding[thread] = (time.monotonic(), row)
            try:
                row.width, row.height = decoder(row.sample.image, batch.slots[slot])
                batch.rows[slot] = row
            except WorldError:
                raise
            except Exception as error:  # the failure budget bounds what this hides
                self._refuse(row.opened, row.sample, SampleError.of(error))
            row.sample.image = b""
        self._decoding.pop(thread, None)

    def _watch(self) -> None:
        """Give the loop up when a picture is stuck: no thread can be ended, but this process can."""
        while not self._closed.wait(WATCH_S):
            for since, row in list(self._decoding.values()):
                if time.monotonic() - since > self._settings.decode_timeout_s:
                    where = f"{row.opened.shard.url}: the picture {row.sample.key!r} (number {row.sample.index})"
                    raise TimeoutError(f"{where} takes longer than {self._settings.decode_timeout_s:g} s to decode")

    def _refuse(self, opened: OpenShard, sample: Sample, error: SampleError) -> None:
        sample.image = b""
        self._results.put(lambda: self._quarantine(opened, sample, error))

    def _launch(self, batch: Batch) -> None:
        started: Pass | None = None
        with self.stages.time("forward"):
            with contextlib.suppress(torch.OutOfMemoryError):
                started = self._backbone.launch(batch.images_BHWC, batch.way.program)
            if started is None:
                started = self._launch_in_parts(batch)
        self._results.put(lambda: self._embedded(batch, started))

    def _launch_in_parts(self, batch: Batch) -> Pass:
        """Compute a batch that does not fit into the device's memory; the next ones will be smaller.

        Raises:
            torch.OutOfMemoryError: not even a single picture fits.
        """
        size, outputs = batch.way.batch_size, dict[str, NDArray[np.float32]]()
        while size > 1 and not outputs:
            size = self.tuner.refuse(size)
            logger.warning("%d pictures at once do not fit into memory, going on with %d", batch.way.batch_size, size)
            with contextlib.suppress(torch.OutOfMemoryError):
                parts = [self._backbone.launch(images_BHWC).wait() for images_BHWC in torch.split(batch.images_BHWC, size)]
                outputs = {column: np.concatenate([part[column] for part in parts]) for column in parts[0]}
        if not outputs:
            raise torch.OutOfMemoryError("a single picture does not fit into the device's memory")
        return Pass(lambda: outputs, lambda: 0.0)

    def _launch_rest(self) -> None:
        """Launch the open batch when nothing that is on its way could fill it."""
        with self._lock:
            idle = self._num_unread == 0 and self._num_undecided == 0
        if idle and (batch := self._batches.seal()) is not None:
            self._launch(batch)

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

    # What comes back, run by the router

    def _embedded(self, batch: Batch, started: Pass) -> None:
        # Copied, so that nothing that lives on lies among the large blocks of the forward pass (see `Decoder`).
        outputs = {column: values_BD.copy() for column, values_BD in started.wait().items()}
        seconds = started.seconds()
        self.tuner.record(batch.way, seconds)
        if self._backbone.device.type != "cpu":
            self.stages.add("device", seconds)
        self.first_batch_at = self.first_batch_at or time.time()
        refusals_B = self._backbone.refusals(outputs)
        touched: dict[OpenShard, None] = {}
        for slot, row in enumerate(batch.rows):
            if row is None or row.opened.closed:
                continue
            if (refusal := refusals_B[slot]) is None:
                row.embeddings = {column: values_BD[slot] for column, values_BD in outputs.items()}
                row.opened.rows[row.sample.index] = row
                touched[row.opened] = None
            else:
                self._quarantine(row.opened, row.sample, refusal)
        self._batches.free(batch)
        for opened in touched:
            self._flush(opened)

    def _carried(self, row: Row) -> None:
        if not row.opened.closed:
            row.opened.rows[row.sample.index] = row
            row.opened.num_carried_over += 1
            self._flush(row.opened)

    def _quarantine(self, opened: OpenShard, sample: Sample, error: SampleError) -> None:
        if opened.closed:
            return
        opened.quarantine.append(
            Quarantined(
                key=sample.key, shard=opened.shard.url, index=sample.index, offset=sample.offset,
                stage=error.stage, error=error.error, message=error.message[:500],
            )
        )  # fmt: skip
        opened.rows[sample.index] = None
        self._flush(opened)

    def _end(self, opened: OpenShard, num_read: int) -> None:
        opened.num_read = num_read
        self._flush(opened)

    def _flush(self, opened: OpenShard) -> None:
        """Hand the rows that are complete and in order to the writer; the rest when the shard is complete."""
        opened.collect()
        if len(opened.rows) > MAX_WAITING_ROWS and (batch := self._batches.seal()) is not None:
            self._launch(batch)  # rows that were carried over pile up behind one that waits for its batch to fill
        while len(opened.ordered) >= self._rows_per_group:
            group, opened.ordered = opened.ordered[: self._rows_per_group], opened.ordered[self._rows_per_group :]
            self._in_writer(opened, lambda group=group: self._write_group(opened, group))  # type: ignore[misc]
        if opened.num_read is not None and opened.next_index == opened.num_read and not opened.closed:
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

    def _guarded(self, role: Callable[..., None], *arguments: Any) -> None:
        """A thread that dies takes the loop with it: every open shard fails, none hangs."""
        try:
            role(*arguments)
        except BaseException as error:
            with self._lock:
                self._failure = error
                opened = list(self._open)
            for each in opened:
                self._finish(each, error)


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
