"""Encoded samples to embedded rows: the part of the loop that takes the time, for its own shards and for what others lend it.

    chunks ──► workers ──► batches ──► results
    bounded    decode into  fixed size  what the router is
    in bytes   free slots   padded      to do with rows

Batches are packed across the borders of shards and loans. The worker that fills the last slot of a batch launches its forward
pass: on a CPU that runs there and then, so every core is a lane of its own; on a GPU it is only queued, and the worker goes on
decoding. A batch that nothing will fill any more is launched as it is. Memory is bounded by the number of batches and the bytes
of encoded images in a budget of bytes. Knows neither where samples come from nor what becomes of rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import SampleError, WorldError
from pipeline.extract import logs
from pipeline.extract.backbone import Backbone, Pass
from pipeline.extract.batches import Batch, Batches, ByteBudget
from pipeline.extract.carry import KnownRows
from pipeline.extract.chunks import Chunk, Chunks
from pipeline.extract.decode import Decoder
from pipeline.extract.isolated import IsolatedDecoder
from pipeline.extract.rows import Home, Row
from pipeline.extract.tune import Tuner, Way
from pipeline.metrics import Stages

logger = logging.getLogger(__name__)

QUEUED_BYTES, QUEUED_BYTES_PER_WORKER = 32 << 20, 8 << 20
"""Encoded images between fetchers and workers."""

Results = queue.SimpleQueue[Callable[[], None] | None]
"""What the router has to do, in order."""


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


class Lanes:
    """Run by the loop's threads: `work` by as many as there are workers, what lies in `results` by its router."""

    def __init__(
        self, backbone: Backbone, settings: Settings, known: KnownRows, max_pixels: int, stages: Stages, results: Results
    ) -> None:
        self._backbone, self._settings, self._known, self._max_pixels = backbone, settings, known, max_pixels
        self._stages, self._results = stages, results
        self.chunks = Chunks()
        self._budget = ByteBudget(QUEUED_BYTES + settings.num_workers * QUEUED_BYTES_PER_WORKER)
        self.tuner = Tuner([Way(backbone.program, size) for size in settings.batch_sizes])
        # What is computed (on a CPU one a worker, on a GPU one that is copied and one that runs), one that is being filled, one
        # on its way back.
        num_computed = settings.num_workers if backbone.device.type == "cpu" else 2
        self._batches = Batches(backbone, self.tuner, num_computed + 2)
        self._lock = threading.Lock()
        self._num_expected = 0
        """Shards and loans that are not read to their end."""
        self._num_undecided = 0
        """Samples that were handed over and have neither a row in a batch nor an error yet."""
        self.first_batch_at: float | None = None
        """Seconds since the epoch when the first batch had been embedded."""
        self._decoding: dict[int, tuple[float, Row]] = {}
        """By thread: the picture that it has in hand, and since when."""

    # Samples in

    def expect(self) -> None:
        """A shard or a loan will be handed over, chunk by chunk: batches may wait for it."""
        with self._lock:
            self._num_expected += 1

    def expect_no_more(self) -> None:
        """It has been handed over."""
        with self._lock:
            self._num_expected -= 1
        self._launch_rest()

    def put(self, chunk: Chunk) -> None:
        """Hand over a chunk; waits while too much is queued."""
        with self._lock:
            self._num_undecided += len(chunk.rows)
        self._budget.acquire(chunk.num_bytes)
        self.chunks.put(chunk)

    def give_away(self, chunk: Chunk) -> None:
        """A chunk that was taken out of the queue is computed elsewhere."""
        self._decided(chunk)

    def take_back(self, chunk: Chunk) -> None:
        """It has to be computed here after all, and before all others: rows wait for it."""
        with self._lock:
            self._num_undecided += len(chunk.rows)
        self.chunks.put_first(chunk)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do, and nothing to be expected."""
        with self._lock:
            return self._num_expected == 0 and self._num_undecided == 0

    # Workers

    def work(self) -> None:
        """Decode samples into slots, and launch the batches that are full."""
        if self._backbone.device.type == "cpu":
            torch.set_num_threads(1)  # this thread is a lane: a second level of threads would only spin
        settings, preprocess = self._settings, self._backbone.preprocess
        fast = settings.decode == "fast"
        decoder = Decoder(preprocess, fast=fast, max_pixels=self._max_pixels)
        isolated = IsolatedDecoder(
            preprocess,
            fast=fast,
            max_pixels=self._max_pixels,
            imports=settings.decode_imports,
            timeout_s=settings.decode_timeout_s,
        )
        with torch.inference_mode(), contextlib.closing(isolated):
            self._work_through_chunks(decoder, isolated)

    def _work_through_chunks(self, decoder: Decoder, isolated: IsolatedDecoder) -> None:
        while True:
            with self._stages.time("no_sample"):
                chunk = self.chunks.get()
            if chunk is None:
                return
            with logs.about(chunk.home.name):
                self._work_through(chunk, isolated if chunk.home.is_suspect else decoder)
            self._decided(chunk)

    def _work_through(self, chunk: Chunk, decoder: Decoder | IsolatedDecoder) -> None:
        with self._stages.time("decode"):
            unknown = self.recognise(chunk)
        while unknown:
            with self._stages.time("no_batch"):
                slots = self._batches.place(len(unknown))
            placed, unknown = unknown[: len(slots)], unknown[len(slots) :]
            with self._stages.time("decode"):
                self._decode(decoder, placed, slots)
            for batch in dict.fromkeys(batch for batch, _ in slots):
                if batch.settle(sum(other is batch for other, _ in slots)):
                    self._launch(batch)

    def _decided(self, chunk: Chunk) -> None:
        self._budget.release(chunk.num_bytes)
        with self._lock:
            self._num_undecided -= len(chunk.rows)
        self._launch_rest()

    def recognise(self, chunk: Chunk) -> list[Row]:
        """Hash what was read; the rows that have to be computed. Errors and known rows go on from here."""
        if chunk.is_recognised:
            return [row for row in chunk.rows if row.home.wants(row.sample)]
        unknown = []
        known = [rows for rows in (chunk.home.known, self._known) if len(rows)]
        for row in chunk.rows:
            sample = row.sample
            if sample.error is None or len(sample.image):
                row.content_hash = hashlib.sha256(sample.image).hexdigest()[:32]
            if sample.error is not None:
                self._refuse(row, sample.error)
                continue
            place = next((found for rows in known if (found := rows.find(row.content_hash))), None) if known else None
            if place is None:
                unknown.append(row)
            else:
                sample.image = b""
                row.place, row.width, row.height = place, place.width, place.height
                self._results.put(lambda row=row: self._carried(row))  # type: ignore[misc]
        return unknown

    def _decode(self, decoder: Decoder | IsolatedDecoder, rows: list[Row], slots: list[tuple[Batch, int]]) -> None:
        """Give every row its picture in a batch, or an error."""
        thread = threading.get_ident()
        for row, (batch, slot) in zip(rows, slots, strict=True):
            if not row.home.is_suspect:
                self._decoding[thread] = (time.monotonic(), row)
            try:
                row.width, row.height = decoder(row.sample.image, batch.slots[slot])
                batch.rows[slot] = row
            except WorldError:
                raise
            except Exception as error:  # the failure budget bounds what this hides
                self._refuse(row, SampleError.of(error))
            row.sample.image = b""
        self._decoding.pop(thread, None)

    def check_decoders(self) -> None:
        """See whether a picture is stuck.

        Raises:
            TimeoutError: no thread can be ended, but the process can.
        """
        for since, row in list(self._decoding.values()):
            if time.monotonic() - since > self._settings.decode_timeout_s:
                where = f"{row.home.name}: the picture {row.sample.key!r} (number {row.sample.index})"
                raise TimeoutError(f"{where} takes longer than {self._settings.decode_timeout_s:g} s to decode")

    # Batches

    def launch_open(self) -> None:
        """Launch the open batch, full or not, unless a worker is filling it."""
        if (batch := self._batches.seal()) is not None:
            self._launch(batch)

    def _launch_rest(self) -> None:
        """Launch the open batch when nothing that is on its way could fill it."""
        if self.is_idle:
            self.launch_open()

    def _launch(self, batch: Batch) -> None:
        started: Pass | None = None
        with self._stages.time("forward"):
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

    # Rows out, run by the router

    def _embedded(self, batch: Batch, started: Pass) -> None:
        # Copied, so that nothing that lives on lies among the large blocks of the forward pass (see `Decoder`).
        outputs = {column: values_BD.copy() for column, values_BD in started.wait().items()}
        seconds = started.seconds()
        self.tuner.record(batch.way, seconds)
        if self._backbone.device.type != "cpu":
            self._stages.add("device", seconds)
        self.first_batch_at = self.first_batch_at or time.time()
        refusals_B = self._backbone.refusals(outputs)
        touched: dict[Home, None] = {}
        for slot, row in enumerate(batch.rows):
            if row is None:
                continue
            if (refusal := refusals_B[slot]) is None:
                row.embeddings = {column: values_BD[slot] for column, values_BD in outputs.items()}
                row.home.add(row)
            else:
                row.home.refuse(row, refusal)
            touched[row.home] = None
        self._batches.free(batch)
        for home in touched:
            home.flush()

    def _carried(self, row: Row) -> None:
        row.home.add(row)
        row.home.flush()

    def _refuse(self, row: Row, error: SampleError) -> None:
        def refused() -> None:
            row.home.refuse(row, error)
            row.home.flush()

        row.sample.image = b""
        self._results.put(refused)
