"""The rows of a version, a row group at a time and read ahead of need: the one way to them.

In: a table. Out: what some work makes of its row groups, in the order of the rows. Embeddings that were not rounded are read
out of their pages (`pages.py`), everything else is decoded by Arrow, local files mapped into memory for it (a partition's name
is never used again, so none changes meanwhile). Of remote files just the columns that are asked for are fetched.

Memory: `GROUPS_AHEAD` results of the work at a time, or `REMOTE_GROUPS_AHEAD`, of at most `partition.ROW_GROUP_BYTES` of
embeddings each where the work keeps them all, as much again for what is fetched or decoded, and `FOOTERS_KEPT` footers. Of runs
of row groups what the work keeps.
"""

from __future__ import annotations

import collections
import contextlib
import io
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import BinaryIO, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.ahead import ahead
from pipeline.dataset.pages import PlainNumbers, Spans, plain_spans
from pipeline.dataset.partition import list_values
from pipeline.dataset.table import Entry, Table
from pipeline.errors import DatasetError, StorageError, StorageRefused
from pipeline.storage import join

T = TypeVar("T")

GROUPS_AHEAD, REMOTE_GROUPS_AHEAD = 3, 6
"""Row groups that are in memory at a time: the one in hand, and those that are ready or under way."""
FOOTERS_AHEAD = 16
FOOTERS_KEPT = 64
"""For the next time, which often comes at once: the rows that a search has found. Reading one takes 0.25 ms."""


@dataclass(frozen=True, slots=True)
class OpenPartition:
    """A partition whose footer was read."""

    table: Table
    entry: Entry
    start: int
    """Position of its first row in the version."""
    metadata: pq.FileMetaData | None = None
    spans: dict[tuple[int, str], Spans | None] = field(default_factory=dict)
    """By row group and column: where its plain numbers lie, as they were found."""

    def reader(self) -> pq.ParquetFile:
        """A reader for one thread."""
        store, url = self.table.store, join(self.table.url, self.entry.path)
        path = store.local_path(url)
        if path is None:
            source = store.open_ranges(url, self.entry.num_bytes)
            return pq.ParquetFile(source, metadata=self.metadata, pre_buffer=True)
        with found(url):
            return pq.ParquetFile(pa.memory_map(path), metadata=self.metadata)

    def fetch(self, start: int, num_bytes: int) -> bytes | None:
        """Bytes of a remote partition; of a local one they are read when they are wanted."""
        store, url = self.table.store, join(self.table.url, self.entry.path)
        return store.read_range(url, start, num_bytes) if store.local_path(url) is None else None

    def open(self) -> BinaryIO:
        """The file of a local partition."""
        path = self.table.store.local_path(url := join(self.table.url, self.entry.path))
        assert path is not None
        with found(url):
            return open(path, "rb", buffering=0)

    def groups(self) -> Iterator[RowGroup]:
        """Its row groups in order."""
        assert self.metadata is not None
        start = self.start
        for number in range(self.metadata.num_row_groups):
            num_rows = self.metadata.row_group(number).num_rows
            yield RowGroup(self, number, start, num_rows)
            start += num_rows


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows that are read in one piece."""

    partition: OpenPartition
    number: int
    start: int
    """Position of its first row in the version."""
    num_rows: int

    def read(self, columns: Sequence[str]) -> pa.Table:
        """These columns, in this order.

        Raises:
            DatasetError: the version was vacuumed.
            StorageError: it cannot be read, or is damaged.
        """
        # Threads within a row group are of use to embeddings only: of all else a column takes 0.1 ms.
        is_large = not self.partition.table.widths.keys().isdisjoint(columns)
        with present(self.partition.table, self.partition.entry):
            rows = self.partition.reader().read_row_group(self.number, columns=list(columns), use_threads=is_large)
            return rows.select(list(columns))

    def embeddings(self, column: str, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """An embedding column as (N, D) float32.

        Args:
            column: its name.
            out: (N, D) float32, contiguous, to be filled and returned.

        Raises:
            DatasetError: the version was vacuumed.
            StorageError: it cannot be read, or is damaged.
        """
        return self.values(column).whole(out)

    def values(self, column: str) -> Values:
        """An embedding column, to be read. Of a remote partition its bytes are fetched now."""
        return Values(self, column)

    def chunk(self, path: str) -> pq.ColumnChunkMetaData:
        """What the footer says of a column."""
        assert self.partition.metadata is not None
        group = self.partition.metadata.row_group(self.number)
        for number in range(group.num_columns):
            if group.column(number).path_in_schema == path:
                return group.column(number)
        raise KeyError(f"there is no column {path}")

    def may_hold(self, column: str, values: Collection[str]) -> bool:
        """Whether the statistics of a text column leave room for any of the values."""
        statistics = self.chunk(column).statistics
        if statistics is None or not statistics.has_min_max:
            return True
        return any(statistics.min <= value <= statistics.max for value in values)


class Values:
    """An embedding column of a row group, read from front to end or here and there. Used by one thread at a time.

    Every method raises DatasetError when the version was vacuumed, and StorageError when it cannot be read or is damaged.
    """

    def __init__(self, group: RowGroup, column: str) -> None:
        self._group, self._column = group, column
        self.width = group.partition.table.widths[column]
        self._span: tuple[int, int] | None = None
        """Where its pages begin, and their bytes, if they may hold the plain numbers."""
        self._fetched: bytes | None = None
        """The pages, of a remote partition."""
        self._decoded_ND: NDArray[np.float32] | None = None
        """All of it, where Arrow had to decode it."""
        with self._present():
            chunk = group.chunk(f"{column}.list.element")
            if chunk.compression == "UNCOMPRESSED" and chunk.physical_type == "FLOAT":
                self._span = chunk.data_page_offset, chunk.total_compressed_size
                self._fetched = group.partition.fetch(*self._span)

    def __len__(self) -> int:
        return self._group.num_rows

    def blocks(self, places: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
        """Consecutive rows (B, D) float32, each block in the next of some places.

        Args:
            places: contiguous float32 arrays (B, D), with room for all rows in the end; or one that is offered again and again,
                where a block is used before the next one is asked for. What fits into a core's cache is still there for whoever
                looks at it next, and memory that is used again is warm.
        """
        first = 0
        with self._opened() as plain:
            for place_BD in places:
                block_BD = place_BD[: len(self) - first]
                if plain is not None:
                    plain.readinto(block_BD)
                else:
                    block_BD[:] = self._decoded()[first : first + len(block_BD)]
                yield block_BD
                first += len(block_BD)
                if first >= len(self):
                    return

    def whole(self, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """All rows (N, D) float32; in `out`, contiguous, where it is given."""
        values_ND = np.empty((len(self), self.width), np.float32) if out is None else out
        for _ in self.blocks([values_ND]):
            pass
        return values_ND

    def take(self, rows_M: NDArray[np.int64]) -> NDArray[np.float32]:
        """Single rows (M, D) float32."""
        found_MD = np.empty((len(rows_M), self.width), np.float32)
        if not len(rows_M):
            return found_MD
        with self._opened() as plain:
            if plain is None:
                return self._decoded()[rows_M]
            for place_D, row in zip(found_MD, rows_M.tolist(), strict=True):
                plain.seek(row * self.width)
                plain.readinto(place_D)
        return found_MD

    def _present(self) -> contextlib.AbstractContextManager[str]:
        return present(self._group.partition.table, self._group.partition.entry)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[PlainNumbers | None]:
        """Its plain numbers; None where it has none."""
        if self._span is None:
            with self._present():
                yield None
            return
        partition, key = self._group.partition, (self._group.number, self._column)
        start, num_bytes = self._span
        with self._present(), contextlib.ExitStack() as stack:
            if self._fetched is None:
                file: BinaryIO = stack.enter_context(partition.open())
            else:
                file, start = io.BytesIO(self._fetched), 0
            if key not in partition.spans:
                partition.spans[key] = plain_spans(file, start, num_bytes, len(self) * self.width)
            spans = partition.spans[key]
            yield PlainNumbers(file, start, spans) if spans is not None else None

    def _decoded(self) -> NDArray[np.float32]:
        if self._decoded_ND is None:
            column = self._group.read([self._column]).column(self._column)
            self._decoded_ND = list_values(column).reshape(len(self), self.width)
        return self._decoded_ND


class Groups:
    """All row groups of a version."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self.entries = sorted(table.entries, key=lambda entry: (entry.shard, entry.path))
        """In a stable order, so that separate reads of columns line up."""
        self._numbers = {entry.path: number for number, entry in enumerate(self.entries)}
        self._starts = [0, *itertools.accumulate(entry.num_rows for entry in self.entries)]
        self._kept: collections.OrderedDict[int, OpenPartition] = collections.OrderedDict()
        self.is_local = table.store.local_path(table.url) is not None
        self._limit = GROUPS_AHEAD if self.is_local else REMOTE_GROUPS_AHEAD

    def map(self, work: Callable[[RowGroup], T], numbers: Sequence[int] | None = None, limit: int | None = None) -> Iterator[T]:
        """What `work` makes of every row group, in order; threads do it ahead of need.

        Args:
            work: reads what it needs of a row group, and may do so at the same time as for another.
            numbers: positions in `entries` of the partitions to read; all when left out.
            limit: results there are at a time, where they are small.
        """
        limit = limit or self._limit
        return self._map(lambda run: work(run[0]), numbers, limit, min(limit, FOOTERS_AHEAD))

    def map_runs(self, work: Callable[[Sequence[RowGroup]], T], max_rows: int, num_threads: int) -> Iterator[T]:
        """What `work` makes of runs of consecutive row groups, in order; threads do it ahead of need.

        For work that takes hardly longer than reading, and whose results are small: what a thread does between two of its runs
        the others wait for.

        Args:
            work: as in `map`.
            max_rows: of a run; a row group that has more is a run by itself.
            num_threads: runs at the same time.
        """
        return self._map(work, None, num_threads + 1, num_threads, max_rows)

    def _map(
        self,
        work: Callable[[Sequence[RowGroup]], T],
        numbers: Sequence[int] | None,
        limit: int,
        num_threads: int,
        max_rows: int = 0,
    ) -> Iterator[T]:
        pool = ThreadPoolExecutor(num_threads, thread_name_prefix="row-groups")
        try:
            chosen = range(len(self.entries)) if numbers is None else numbers
            opened = ahead(pool, self._open, chosen, FOOTERS_AHEAD)
            groups = (group for partition in opened for group in partition.groups())
            yield from ahead(pool, work, _runs(groups, max_rows), limit)
        finally:
            pool.shutdown(cancel_futures=True)

    def number_of(self, entry: Entry) -> int:
        """Position of a partition in `entries`."""
        return self._numbers[entry.path]

    def numbers_of(self, positions: NDArray[np.int64]) -> list[int]:
        """Which partitions these rows lie in, as positions in `entries`."""
        numbers: list[int] = np.unique(np.searchsorted(self._starts, positions, side="right") - 1).tolist()
        return numbers

    def _open(self, number: int) -> OpenPartition:
        partition = self._kept.pop(number, None) or self._read_footer(number)
        self._kept[number] = partition  # the newest comes last
        while len(self._kept) > FOOTERS_KEPT:
            with contextlib.suppress(KeyError):  # another thread was quicker
                self._kept.popitem(last=False)
        return partition

    def _read_footer(self, number: int) -> OpenPartition:
        entry, start = self.entries[number], self._starts[number]
        with present(self._table, entry) as url:
            metadata = OpenPartition(self._table, entry, start).reader().metadata
            if metadata.num_rows != entry.num_rows:
                raise StorageError(f"{url}: has {metadata.num_rows} rows, and {entry.num_rows} in the log")
        return OpenPartition(self._table, entry, start, metadata)


def _runs(groups: Iterable[RowGroup], max_rows: int) -> Iterator[list[RowGroup]]:
    """Consecutive row groups with at most so many rows together, or single ones."""
    run: list[RowGroup] = []
    for group in groups:
        if run and group.start + group.num_rows - run[0].start > max_rows:
            yield run
            run = []
        run.append(group)
    if run:
        yield run


@contextlib.contextmanager
def found(url: str) -> Iterator[None]:
    """A local file that is not there, as the store would say it."""
    try:
        yield
    except FileNotFoundError:
        raise StorageRefused(f"{url}: there is no such file") from None


@contextlib.contextmanager
def present(table: Table, entry: Entry) -> Iterator[str]:
    """The URL of a partition; tells a file that was vacuumed from one that the store has lost, and from a damaged one."""
    url = join(table.url, entry.path)
    try:
        yield url
    except StorageRefused:
        newest = Table.open(table.store, table.url)
        if newest is None or any(each.path == entry.path for each in newest.entries) or table.store.exists(url):
            raise
        raise DatasetError(
            f"{table.url}: version {table.version} was vacuumed: its partition {entry.path} is gone; "
            f"the newest version is {newest.version}"
        ) from None
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise StorageError(f"{url}: not a readable partition: {error}") from None
