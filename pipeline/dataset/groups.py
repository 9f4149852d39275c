"""The rows of a version, a row group at a time and read ahead of need: the one way to them.

In: a table. Out: what some work makes of its row groups, in the order of the rows. Embeddings that were not rounded are read
out of their pages (`pages.py`), everything else is decoded by Arrow, local files mapped into memory for it (a partition's name
is never used again, so none changes meanwhile). Of remote files just the columns that are asked for are fetched.

Memory: `GROUPS_AHEAD` results of the work at a time, or `REMOTE_GROUPS_AHEAD`, of at most `partition.ROW_GROUP_BYTES` of
embeddings each where the work keeps them all, as much again for what is fetched or decoded, and `FOOTERS_AHEAD` footers.
"""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.ahead import ahead
from pipeline.dataset.pages import read_plain
from pipeline.dataset.partition import list_values
from pipeline.dataset.table import Entry, Table
from pipeline.errors import DatasetError, StorageError, StorageRefused
from pipeline.storage import join

T = TypeVar("T")

GROUPS_AHEAD, REMOTE_GROUPS_AHEAD = 3, 6
"""Row groups that are in memory at a time: the one in hand, and those that are ready or under way."""
FOOTERS_AHEAD = 16


@dataclass(frozen=True, slots=True)
class OpenPartition:
    """A partition whose footer was read."""

    table: Table
    entry: Entry
    start: int
    """Position of its first row in the version."""
    metadata: pq.FileMetaData | None = None

    def reader(self) -> pq.ParquetFile:
        """A reader for one thread."""
        store, url = self.table.store, join(self.table.url, self.entry.path)
        path = store.local_path(url)
        if path is None:
            source = store.open_ranges(url, self.entry.num_bytes)
            return pq.ParquetFile(source, metadata=self.metadata, pre_buffer=True)
        with found(url):
            return pq.ParquetFile(pa.memory_map(path), metadata=self.metadata)

    def read_plain(self, start: int, num_bytes: int, out: NDArray[np.float32]) -> bool:
        """See `pages.read_plain`."""
        store, url = self.table.store, join(self.table.url, self.entry.path)
        path = store.local_path(url)
        if path is None:
            return read_plain(io.BytesIO(store.read_range(url, start, num_bytes)), 0, num_bytes, out)
        with found(url), open(path, "rb", buffering=0) as file:
            return read_plain(file, start, num_bytes, out)

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
        with present(self.partition.table, self.partition.entry):
            return self.partition.reader().read_row_group(self.number, columns=list(columns)).select(list(columns))

    def embeddings(self, column: str, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """An embedding column as (N, D) float32.

        Args:
            column: its name.
            out: (N, D) float32, contiguous, to be filled and returned: memory that is used again is warm.

        Raises:
            DatasetError: the version was vacuumed.
            StorageError: it cannot be read, or is damaged.
        """
        table, entry = self.partition.table, self.partition.entry
        shape = self.num_rows, table.widths[column]
        with present(table, entry):
            chunk = self._chunk(f"{column}.list.element")
            values_ND = np.empty(shape, np.float32) if out is None else out
            if (
                chunk.compression != "UNCOMPRESSED"
                or chunk.physical_type != "FLOAT"
                or not self.partition.read_plain(chunk.data_page_offset, chunk.total_compressed_size, values_ND)
            ):
                values_ND[:] = list_values(self.read([column]).column(column)).reshape(shape)
            return values_ND

    def _chunk(self, path: str) -> pq.ColumnChunkMetaData:
        assert self.partition.metadata is not None
        group = self.partition.metadata.row_group(self.number)
        for number in range(group.num_columns):
            if group.column(number).path_in_schema == path:
                return group.column(number)
        raise KeyError(f"there is no column {path}")

    def may_hold(self, column: str, values: Collection[str]) -> bool:
        """Whether the statistics of a text column leave room for any of the values."""
        statistics = self._chunk(column).statistics
        if statistics is None or not statistics.has_min_max:
            return True
        return any(statistics.min <= value <= statistics.max for value in values)


class Groups:
    """All row groups of a version."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self.entries = sorted(table.entries, key=lambda entry: (entry.shard, entry.path))
        """In a stable order, so that separate reads of columns line up."""
        self._numbers = {entry.path: number for number, entry in enumerate(self.entries)}
        self._starts = [0, *itertools.accumulate(entry.num_rows for entry in self.entries)]
        is_local = table.store.local_path(table.url) is not None
        self._limit = GROUPS_AHEAD if is_local else REMOTE_GROUPS_AHEAD

    def map(self, work: Callable[[RowGroup], T], numbers: Sequence[int] | None = None, limit: int | None = None) -> Iterator[T]:
        """What `work` makes of every row group, in order; threads do it ahead of need.

        Args:
            work: reads what it needs of a row group, and may do so at the same time as for another.
            numbers: positions in `entries` of the partitions to read; all when left out.
            limit: results there are at a time, where they are small.
        """
        limit = limit or self._limit
        pool = ThreadPoolExecutor(min(limit, FOOTERS_AHEAD), thread_name_prefix="row-groups")
        try:
            chosen = range(len(self.entries)) if numbers is None else numbers
            opened = ahead(pool, self._open, chosen, FOOTERS_AHEAD)
            yield from ahead(pool, work, (group for partition in opened for group in partition.groups()), limit)
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
        entry, start = self.entries[number], self._starts[number]
        with present(self._table, entry) as url:
            metadata = OpenPartition(self._table, entry, start).reader().metadata
            if metadata.num_rows != entry.num_rows:
                raise StorageError(f"{url}: has {metadata.num_rows} rows, and {entry.num_rows} in the log")
        return OpenPartition(self._table, entry, start, metadata)


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
