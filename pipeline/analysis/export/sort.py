"""Rows of any number in the order of their keys: record batches in, tables ascending by (key, shard) out, in bounded memory.

An external distribution sort. The first reading takes keys only: rows that lie in order already, as those of numbered
shards do, are handed on as they are; of all others it takes samples, whose quantiles cut the keys into ranges. The second
reading spreads the rows over a temporary file for each range; then every file is sorted by itself, and removed. A range that
comes out too large is cut again, in the same way. Every row is written once for each level: one up to `MAX_RANGES` times
`RANGE_BYTES` (13 GB), two up to 1.6 TB. No two rows of a dataset share key and shard, so the order is one and the same whatever
order they come in.

Memory: about three times `SORT_BYTES`. Embeddings have a fixed width on the way: to take rows of lists, Arrow makes an index
of every value.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import itertools
import math
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.errors import StorageRefused

ORDER = ("key", "shard")
SORT_BYTES = 128 << 20
"""So much is sorted in memory at once."""
RANGE_BYTES = 96 << 20
"""What a range is meant to hold: they come out unequal, by 9 % of it with 128 samples for each."""
MAX_RANGES = 128
"""Files that are written at once; some systems allow 256."""
SAMPLES_PER_RANGE = 128
PIECE_BYTES = 16 << 20
"""Rows are spread, and handed on, in pieces of about this size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows that can be read more than once."""

    read: Callable[[Sequence[str] | None], Iterable[pa.RecordBatch]]
    """All columns, or those named; in the same order each time."""
    num_rows: int
    num_bytes: int
    """Of all columns, in Arrow; about."""

    def per_piece(self) -> int:
        """Rows that take about `PIECE_BYTES`."""
        return max(1, PIECE_BYTES * self.num_rows // max(1, self.num_bytes))


def in_order(rows: Rows, folder: Path) -> Iterator[pa.Table]:
    """The rows, ascending by key and shard; as bytes of UTF-8, which is the order of Parquet's statistics.

    Args:
        rows: what to sort; nothing is handed on where there is none.
        folder: for temporary files, which are gone when the last table was taken.

    Raises:
        StorageRefused: `folder` has not room enough.
    """
    if rows.num_bytes <= SORT_BYTES:
        yield from _sorted(rows)
        return
    splitters, already = _survey(rows)
    if already:
        for batch in rows.read(None):
            yield pa.Table.from_batches([batch])
        return
    for path, part in _spread(rows, splitters, folder):
        # Rows that cannot be told apart would be spread for ever.
        yield from _sorted(part) if part.num_rows == rows.num_rows else in_order(part, folder)
        path.unlink()


def regroup(tables: Iterable[pa.Table], num_rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of `num_rows`; the last one has what is left."""
    held: list[pa.Table] = []
    count = 0
    for table in tables:
        held.append(table)
        count += table.num_rows
        while count >= num_rows:
            together = pa.concat_tables(held)
            yield together.slice(0, num_rows)
            held = [together.slice(num_rows)]
            count -= num_rows
    if count:
        yield pa.concat_tables(held)


def sample(num_rows: int, count: int) -> NDArray[np.int64]:
    """Numbers of at most `count` rows, ascending: one of each of equal stretches, by chance, and the same each time."""
    edges = np.linspace(0, num_rows, min(num_rows, count) + 1).astype(np.int64)
    return np.random.default_rng(0).integers(edges[:-1], edges[1:])


def fixed(batch: pa.RecordBatch, widths: Mapping[str, int]) -> pa.RecordBatch:
    """Embedding columns as lists of a fixed width; no value is copied."""
    columns = {
        name: pa.FixedSizeListArray.from_arrays(column.flatten(), widths[name]) if name in widths else column
        for name, column in zip(batch.schema.names, batch.columns, strict=True)
    }
    return pa.RecordBatch.from_pydict(columns)


def plain(table: pa.Table, arrow_schema: pa.Schema) -> pa.Table:
    """Embedding columns as the plain lists of the schema."""
    columns = []
    for field in arrow_schema:
        column = table.column(field.name)
        if pa.types.is_fixed_size_list(column.type):
            column = pa.chunked_array([_plain_list(chunk, field.type) for chunk in column.chunks], field.type)
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=arrow_schema)


def _plain_list(array: pa.FixedSizeListArray, kind: pa.DataType) -> pa.ListArray:
    offsets = np.arange(len(array) + 1, dtype=np.int32) * array.type.list_size
    return pa.ListArray.from_arrays(offsets, array.flatten(), type=kind)


def _sorted(rows: Rows) -> Iterator[pa.Table]:
    batches = list(rows.read(None))
    if not batches:
        return
    table = pa.Table.from_batches(batches).combine_chunks()
    del batches
    order = pc.sort_indices(table, sort_keys=[(name, "ascending") for name in ORDER])
    step = rows.per_piece()
    for start in range(0, len(order), step):
        yield table.take(order.slice(start, step))


def _survey(rows: Rows) -> tuple[list[tuple[str, str]], bool]:
    """Where the ranges begin, but for the first, and whether the rows lie in order already."""
    num_ranges = min(MAX_RANGES, math.ceil(rows.num_bytes / RANGE_BYTES))
    wanted = sample(rows.num_rows, num_ranges * SAMPLES_PER_RANGE)
    samples: list[tuple[str, str]] = []
    already, last, start = True, "", 0
    for batch in rows.read(ORDER):
        keys, shards = batch.columns
        first, stop = np.searchsorted(wanted, [start, start + len(keys)])
        here = wanted[first:stop] - start
        samples += zip(keys.take(here).to_pylist(), shards.take(here).to_pylist(), strict=True)
        start += len(keys)
        if already and len(keys):
            # Strictly: of equal keys the shards would have to be compared.
            already = last < keys[0].as_py() and pc.all(pc.less(keys[:-1], keys[1:])).as_py() is not False
            last = keys[-1].as_py()
    samples.sort()
    cuts = np.linspace(0, len(samples), num_ranges + 1).astype(int)[1:-1]
    return [samples[cut] for cut in cuts], already


def _spread(rows: Rows, splitters: list[tuple[str, str]], folder: Path) -> Iterator[tuple[Path, Rows]]:
    """The rows of each range in a file of its own, lowest range first."""
    free = shutil.disk_usage(folder).free
    if free < rows.num_bytes:
        raise StorageRefused(
            f"{folder}: sorting needs {rows.num_bytes / 1e9:.1f} GB for temporary files, and {free / 1e9:.1f} GB are free"
        )
    paths = [folder / f"{uuid.uuid4().hex}.arrow" for _ in range(len(splitters) + 1)]
    try:
        counts = _write_ranges(rows, splitters, paths)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise StorageRefused(f"{folder}: there is no room left for the temporary files of sorting") from None
    for path, count in zip(paths, counts, strict=True):
        if count:
            yield path, Rows(read=_Reader(path), num_rows=count, num_bytes=path.stat().st_size)


def _write_ranges(rows: Rows, splitters: list[tuple[str, str]], paths: list[Path]) -> list[int]:
    """Write each range to its file; how many rows each has. One of none has no file, where there are no rows at all."""
    counts_R = np.zeros(len(paths), np.int64)
    with contextlib.ExitStack() as files:
        writers: list[Any] = []
        for table in regroup((pa.Table.from_batches([batch]) for batch in rows.read(None)), rows.per_piece()):
            if not writers:
                writers = [files.enter_context(pa.ipc.new_file(str(path), table.schema)) for path in paths]
            range_N = _range_of(table, splitters)
            order_N = np.argsort(range_N, kind="stable")
            bounds_R = np.searchsorted(range_N[order_N], np.arange(len(paths) + 1))
            table = table.combine_chunks().take(order_N)
            for number, (start, stop) in enumerate(itertools.pairwise(bounds_R.tolist())):
                if start < stop:
                    writers[number].write_table(table.slice(start, stop - start))
            counts_R += np.diff(bounds_R)
    return counts_R.tolist()


def _range_of(table: pa.Table, splitters: list[tuple[str, str]]) -> NDArray[np.int64]:
    """(N,) number of the range of each row: how many splitters are not above it."""
    splitters_S = np.array([key for key, _ in splitters], object)
    keys_N = table.column("key").to_numpy()
    range_N: NDArray[np.int64] = np.searchsorted(splitters_S, keys_N, "right")
    # Where a key is that of a splitter, the shard decides.
    tied = np.flatnonzero((range_N > 0) & (splitters_S[range_N - 1] == keys_N))
    shards = table.column("shard").take(tied).to_pylist()
    range_N[tied] = [bisect.bisect_right(splitters, each) for each in zip(keys_N[tied], shards, strict=True)]
    return range_N


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads a temporary file."""

    path: Path

    def __call__(self, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(self.path)) as file:
            reader = pa.ipc.open_file(file)
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                yield batch if columns is None else batch.select(list(columns))
