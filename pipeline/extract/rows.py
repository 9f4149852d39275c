"""Rows on their way: a shard's into its partition, collected in any order, written in the shard's.

Knows nothing of threads, batches or devices: the loop decides who calls what, and only its router touches what was collected.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.dataset import partition
from pipeline.dataset.partition import Partition, PartitionWriter, Quarantined, Target
from pipeline.errors import GuardError, SampleError
from pipeline.extract.carry import NOTHING_KNOWN, KnownRows, Place
from pipeline.source import Sample, Shard
from pipeline.storage import join


class Home(Protocol):
    """What rows belong to. Only the router touches what it has collected."""

    known: KnownRows
    """Rows that need not be computed, besides those that all homes know."""
    is_suspect: bool
    """See `Task`."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def num_waiting(self) -> int:
        """Rows that cannot go on because an earlier one is missing."""
        ...

    def wants(self, sample: Sample) -> bool:
        """Whether it does not know yet what becomes of a sample."""
        ...

    def add(self, row: Row) -> None:
        """Take a row that has its embeddings, or the place where they lie; the first one of a sample counts."""
        ...

    def refuse(self, row: Row, error: SampleError) -> None:
        """Take note that a sample has no row, unless it has one."""
        ...

    def flush(self) -> None:
        """Pass on what is complete."""
        ...


@dataclass(slots=True)
class Row:
    """A sample on its way to its home."""

    home: Home
    sample: Sample
    content_hash: str = ""
    width: int = 0
    height: int = 0
    place: Place | None = None
    """Where its embeddings lie already."""
    embeddings: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """Column to (D,) float32."""


@dataclass(eq=False)
class OpenShard:
    """A shard that is being extracted."""

    shard: Shard
    previous: str | None
    writer_number: int
    on_rows: Callable[[OpenShard], None]
    """Called when rows have come."""
    is_suspect: bool = False
    future: Future[Partition] = field(default_factory=Future)
    known: KnownRows = NOTHING_KNOWN
    rows: dict[int, Row | None] = field(default_factory=dict)
    """By index, until all before it are there; None where the sample is in quarantine."""
    ordered: list[Row] = field(default_factory=list)
    quarantine: list[Quarantined] = field(default_factory=list)
    num_carried_over: int = 0
    next_index: int = 0
    num_bytes_read: int = 0
    num_read: int | None = None
    closed: bool = False
    writer: PartitionWriter | None = None
    path: str = ""
    _upload: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _file: Any = None

    @property
    def name(self) -> str:
        """See `Home`."""
        return self.shard.url

    @property
    def num_waiting(self) -> int:
        """See `Home`."""
        return len(self.rows)

    def wants(self, sample: Sample) -> bool:
        """See `Home`."""
        return not self.closed and sample.index >= self.next_index and sample.index not in self.rows

    def add(self, row: Row) -> None:
        """See `Home`."""
        if self.wants(row.sample):
            self.rows[row.sample.index] = row
            self.num_carried_over += row.place is not None

    def refuse(self, row: Row, error: SampleError) -> None:
        """See `Home`."""
        if self.wants(sample := row.sample):
            self.rows[sample.index] = None
            self.quarantine.append(
                Quarantined(
                    key=sample.key, shard=self.shard.url, index=sample.index, offset=sample.offset,
                    stage=error.stage, error=error.error, message=error.message[:500],
                    url=sample.url, nbytes=sample.nbytes, content_hash=row.content_hash or None,
                )
            )  # fmt: skip

    def flush(self) -> None:
        """See `Home`."""
        if not self.closed:
            self.on_rows(self)

    def collect(self) -> None:
        """Move the rows that continue the order."""
        while self.next_index in self.rows:
            row = self.rows.pop(self.next_index)
            self.next_index += 1
            if row is not None:
                self.ordered.append(row)

    def start(self, target: Target) -> None:
        """Open the file that nobody sees yet."""
        self.path = partition.new_path(target.identity(self.shard.url, self.shard.fingerprint))
        self._file = self._upload.enter_context(target.store.publish(join(target.url, self.path)))
        self.writer = PartitionWriter(self._file, target.schema, rounded=target.recipe.rounded)

    def publish(self, target: Target) -> Partition:
        """Write the footer and make the file visible."""
        assert self.writer is not None and self.num_read is not None, "all rows were written"
        finished = Partition(
            path=self.path,
            num_bytes=0,
            shard=self.shard.url,
            fingerprint=self.shard.fingerprint,
            recipe_id=target.recipe.recipe_id,
            layout_id=target.layout.layout_id,
            num_rows=self.writer.num_rows,
            num_read=self.num_read,
            num_embedded=self.writer.num_rows - self.num_carried_over,
            num_carried_over=self.num_carried_over,
            num_quarantined=len(self.quarantine),
        )
        if not finished.reconciles:
            raise GuardError(f"{self.shard.url}: {finished.num_read} samples were read, but {finished} accounts for others")
        self.quarantine.sort(key=lambda row: row.index)
        self.writer.close(partition.footer(target, finished, self.quarantine))
        num_bytes = self._file.tell()
        self._upload.close()
        return dataclasses.replace(finished, num_bytes=num_bytes)

    def abort(self) -> None:
        """Leave nothing visible behind."""
        self.rows.clear()
        self.ordered.clear()
        with contextlib.suppress(_Abandoned), self._upload:
            raise _Abandoned


class _Abandoned(Exception):
    """Makes `Store.publish` discard what it has."""


def columns(
    shard_url: str, group: Sequence[Row], target: Target
) -> tuple[dict[str, list[Any]], dict[str, NDArray[np.float32]]]:
    """Rows as columns: values by name, and (N, D) float32 by embedding column."""
    samples = [row.sample for row in group]
    columns: dict[str, list[Any]] = {
        "key": [sample.key for sample in samples],
        "shard": [shard_url] * len(group),
        "index": [sample.index for sample in samples],
        "url": [sample.url for sample in samples],
        "offset": [sample.offset for sample in samples],
        "nbytes": [sample.nbytes for sample in samples],
        "content_hash": [row.content_hash for row in group],
        "width": [row.width for row in group],
        "height": [row.height for row in group],
    }
    widths = target.recipe.widths
    for name in target.schema.names:
        if name not in columns and name not in widths:
            columns[name] = [sample.columns.get(name) for sample in samples]
    embeddings = {}
    for name, width in widths.items():
        embeddings[name] = np.empty((len(group), width), np.float32)
        for position, row in enumerate(group):
            embeddings[name][position] = row.embeddings[name]
    return columns, embeddings
