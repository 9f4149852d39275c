"""Rows that need not be computed: content hashes whose embeddings lie in partitions of the same recipe.

The hashes of a partition are one small column; embeddings are read only for rows that are carried over, a row group at a
time, when the new partition is written.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.dataset.partition import Target, list_values
from pipeline.errors import StorageError
from pipeline.source import Shard
from pipeline.storage import join

logger = logging.getLogger(__name__)

MAX_KNOWN_ROWS = 20_000_000
"""At 32 bytes a row: 640 MB. What lies beyond is computed again, which costs time and nothing else."""
ROW_GROUPS_CACHED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A shard to extract, and the partition that its rows were in so far."""

    shard: Shard
    previous: str | None = None
    """Path of a partition of the same recipe; its rows are carried over where their content is unchanged."""
    is_suspect: bool = False
    """An actor died that had nothing else in hand: its pictures are decoded in a process of their own."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a known row lies, and what was seen of its image."""

    path: str
    row: int
    width: int
    height: int


class KnownRows:
    """Content hash to place, for the rows of some partitions. Sorted arrays: cheap to hold, to share and to search."""

    def __init__(self, paths: Sequence[str], tables: Sequence[pa.Table]) -> None:
        self.paths = list(paths)
        hashes_N2 = np.concatenate(
            [_hash_halves(table.column("content_hash")) for table in tables] or [np.empty((0, 2), np.uint64)]
        )
        order = np.argsort(hashes_N2[:, 0], kind="stable")
        self._first, self._second = hashes_N2[order, 0], hashes_N2[order, 1]
        fields = [np.empty((4, 0), np.int32)]
        for number, table in enumerate(tables):
            columns = [table.column(name).to_numpy() for name in ("width", "height")]
            fields.append(np.stack([np.full(table.num_rows, number), np.arange(table.num_rows), *columns]).astype(np.int32))
        self._fields_4N = np.concatenate(fields, axis=1)[:, order]

    def __len__(self) -> int:
        return len(self._first)

    def find(self, content_hash: str) -> Place | None:
        """Where a row of this content lies, if there is one."""
        first, second = np.uint64(int(content_hash[:16], 16)), np.uint64(int(content_hash[16:], 16))
        position = int(np.searchsorted(self._first, first))
        while position < len(self._first) and self._first[position] == first:
            if self._second[position] == second:
                number, row, width, height = self._fields_4N[:, position].tolist()
                return Place(self.paths[number], row, width, height)
            position += 1
        return None


NOTHING_KNOWN = KnownRows([], [])


def known_rows(target: Target, partitions: Mapping[str, int]) -> KnownRows:
    """Index partitions by content hash, reading three small columns of each.

    Args:
        partitions: path to number of rows; the ones beyond `MAX_KNOWN_ROWS` are left out.
    """
    chosen, total = [], 0
    for path, num_rows in partitions.items():
        if total + num_rows > MAX_KNOWN_ROWS:
            logger.warning("more than %d rows could be carried over; some are computed again", MAX_KNOWN_ROWS)
            break
        chosen.append(path)
        total += num_rows

    def read(path: str) -> pa.Table | None:
        try:
            with target.store.open(target.store.stat(join(target.url, path))) as file:
                return pq.read_table(file, columns=["content_hash", "width", "height"])
        except (StorageError, pa.ArrowException) as error:
            logger.warning("rows of %s are computed again: %s", path, error)
            return None

    with ThreadPoolExecutor(16) as threads:
        found = {path: table for path, table in zip(chosen, threads.map(read, chosen), strict=True) if table is not None}
    return KnownRows(list(found), list(found.values()))


class CarriedRows:
    """Reads embeddings of known rows, keeping the row groups used last. One per writing thread."""

    def __init__(self, target: Target) -> None:
        self._store, self._dataset_url, self._columns = target.store, target.url, list(target.recipe.widths)
        self._starts: dict[str, NDArray[np.int64]] = {}
        self._groups: collections.OrderedDict[tuple[str, int], dict[str, NDArray[np.float32]]] = collections.OrderedDict()

    def read(self, place: Place) -> dict[str, NDArray[np.float32]]:
        """Column to (D,) float32."""
        if place.path not in self._starts:
            self._load(place.path, 0)
        number = int(np.searchsorted(self._starts[place.path], place.row, side="right")) - 1
        if (place.path, number) not in self._groups:
            self._load(place.path, number)
        self._groups.move_to_end((place.path, number))
        row = place.row - int(self._starts[place.path][number])
        return {column: values_ND[row] for column, values_ND in self._groups[place.path, number].items()}

    def _load(self, path: str, number: int) -> None:
        with self._store.open(self._store.stat(join(self._dataset_url, path))) as handle:
            file = pq.ParquetFile(handle)
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            self._starts[path] = np.cumsum([0, *sizes[:-1]])
            table = file.read_row_group(number, columns=self._columns)
        self._groups[path, number] = {column: list_values(table.column(column)) for column in self._columns}
        while len(self._groups) > ROW_GROUPS_CACHED:
            self._groups.popitem(last=False)


def _hash_halves(column: pa.ChunkedArray) -> NDArray[np.uint64]:
    """Hexadecimal text of 128 bits as (N, 2) unsigned numbers."""
    raw = bytes.fromhex("".join(column.to_pylist()))
    return np.frombuffer(raw, dtype=">u8").astype(np.uint64).reshape(-1, 2)
