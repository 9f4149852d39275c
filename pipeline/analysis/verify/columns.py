"""The rows of one partition held against what every partition promises: read once, a batch at a time.

In: an opened Parquet file and what is known of it. Out: what is wrong, with the number of rows and the first of them. Which
file it is, and what the log says of it, is `verify.py`'s business.

Legend: B rows of a batch, D values of an embedding.
"""

from __future__ import annotations

import collections
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

BATCH_BYTES, MAX_BATCH_ROWS = 4 << 20, 4096
"""Of embeddings, decoded at a time."""
BUFFER_BYTES = 1 << 20
"""A column of a row group is read through it, not in one piece."""
LENGTH_TOLERANCE, ROUNDED_LENGTH_TOLERANCE = 1e-4, 2e-3
"""How far the length of a normalised embedding may be from 1: summed in float32; and each value rounded by half of 1/1024."""
MAX_FLOAT16 = 65504.0

_NEVER_NULL = ("key", "shard", "index", "url", "content_hash", "width", "height")
_OTHERS = ("offset", "nbytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What is known of a partition without its rows."""

    shard: str
    nodes: Mapping[str, int]
    """Embedding column to width."""
    normalized: Collection[str]
    """Columns whose rows have length 1, or 0 where the model gave nothing but zeros."""
    rounded: bool
    """Whether values are rounded to what float16 can hold."""
    num_read: int
    """Samples of the shard."""
    quarantined: Sequence[int] | None
    """Positions of those that have no row; None where they are not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Rows that are not as they should be."""

    column: str
    message: str
    key: str | None
    """Of the first row."""


def check(handle: BinaryIO, expected: Expected) -> list[Problem]:
    """Read all rows, verifying the checksums of the pages; carried columns are left out.

    Memory: some batches, a page, and the keys and positions of the partition.

    Raises:
        OSError: a page is damaged.
        pyarrow.ArrowException: so is the file.
    """
    file = pq.ParquetFile(handle, buffer_size=BUFFER_BYTES, page_checksum_verification=True)
    batch_rows = max(1, min(MAX_BATCH_ROWS, BATCH_BYTES // (4 * sum(expected.nodes.values()))))
    tally, last = _Tally(), -1
    keys: list[pa.Array] = []
    positions: list[NDArray[np.int64]] = []
    for batch in file.iter_batches(batch_rows, columns=[*_NEVER_NULL, *_OTHERS, *expected.nodes]):
        tally.keys = batch.column("key")
        _check_places(batch, expected, tally)
        index_B = batch.column("index").fill_null(-1).to_numpy()
        tally.add("index", "index does not ascend", index_B <= np.concatenate([[last], index_B[:-1]]))
        last = int(index_B[-1]) if len(index_B) else last
        keys.append(tally.keys)
        positions.append(index_B)
        for name, width in expected.nodes.items():
            _check_embedding(batch.column(name), name, width, expected, tally)
    problems = tally.problems()
    problems += _doubled_keys(pa.chunked_array(keys, pa.string()))
    if expected.quarantined is not None:
        index_N = np.concatenate([np.asarray(expected.quarantined, np.int64), *positions])
        missing = np.setdiff1d(np.arange(expected.num_read), index_N)
        strange = len(index_N) - (expected.num_read - len(missing))
        if len(missing):
            first = f"{len(missing)} of the {expected.num_read} samples are neither here nor in quarantine"
            problems.append(Problem(column="index", message=f"{first}, the first is number {missing[0]}", key=None))
        if strange:
            message = f"{strange} rows are of no sample, or of one that has a row already or is in quarantine"
            problems.append(Problem(column="index", message=message, key=None))
    return problems


class _Tally:
    """Counts rows by what is wrong with them."""

    def __init__(self) -> None:
        self.keys: pa.Array = pa.array([], pa.string())
        """Of the rows that are looked at now."""
        self._counts: collections.Counter[tuple[str, str]] = collections.Counter()
        self._first: dict[tuple[str, str], str | None] = {}

    def add(self, column: str, what: str, bad_B: NDArray[np.bool_]) -> None:
        if bad_B.any():
            self._counts[column, what] += int(bad_B.sum())
            self._first.setdefault((column, what), self.keys[int(bad_B.argmax())].as_py())

    def problems(self) -> list[Problem]:
        return [
            Problem(column=column, message=f"{what}: {count} row{'s' if count > 1 else ''}", key=self._first[column, what])
            for (column, what), count in self._counts.items()
        ]


def _check_places(batch: pa.RecordBatch, expected: Expected, tally: _Tally) -> None:
    """What leads from a row to its image."""
    for name in _NEVER_NULL:
        if batch.column(name).null_count:
            tally.add(name, f"{name} is null", _numpy(batch.column(name).is_null()))
    tally.add(
        "shard", "shard is not that of the log", _numpy(pc.not_equal(batch.column("shard"), expected.shard).fill_null(False))
    )
    is_hash = pc.match_substring_regex(batch.column("content_hash"), "^[0-9a-f]{32}$")
    tally.add("content_hash", "content_hash is no digest", ~_numpy(is_hash.fill_null(True)))
    for name, least in (("width", 1), ("height", 1), ("offset", 0), ("nbytes", 1)):
        tally.add(name, f"{name} is below {least}", _numpy(pc.less(batch.column(name), least).fill_null(False)))
    # The other way round is an image in a compressed archive.
    is_half = pc.and_(batch.column("offset").is_valid(), batch.column("nbytes").is_null())
    tally.add("nbytes", "offset without nbytes", _numpy(is_half))


def _check_embedding(array: pa.ListArray, name: str, width: int, expected: Expected, tally: _Tally) -> None:
    is_wrong_B = pc.list_value_length(array).fill_null(-1).to_numpy() != width
    tally.add(name, f"{name} has not {width} values", is_wrong_B)
    keys = tally.keys
    if is_wrong_B.any():
        whole = pa.array(~is_wrong_B)
        array, tally.keys = array.filter(whole), keys.filter(whole)
    values_BD = array.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)  # a null becomes NaN
    squares_B = np.einsum("bd,bd->b", values_BD, values_BD)
    is_finite_B = np.isfinite(squares_B)
    if not is_finite_B.all():  # large values have squares beyond float32
        is_finite_B[~is_finite_B] = np.isfinite(values_BD[~is_finite_B]).all(axis=1)
    tally.add(name, f"{name} is not finite", ~is_finite_B)
    if name in expected.normalized:
        length_B = np.sqrt(squares_B)
        limit = ROUNDED_LENGTH_TOLERANCE if expected.rounded else LENGTH_TOLERANCE
        tally.add(name, f"{name} has not length 1", is_finite_B & (length_B > 0) & ~(np.abs(length_B - 1) <= limit))
    if expected.rounded:
        # A float16 as float32 ends in 13 zeros, subnormal ones too.
        is_rounded_B = ((values_BD.view(np.uint32) & 0x1FFF) == 0).all(axis=1) & (np.abs(values_BD) <= MAX_FLOAT16).all(axis=1)
        tally.add(name, f"{name} is not rounded to float16", is_finite_B & ~is_rounded_B)
    tally.keys = keys


def _doubled_keys(keys: pa.ChunkedArray) -> list[Problem]:
    if len(keys) == pc.count_distinct(keys, mode="all").as_py():
        return []
    counts = keys.value_counts()
    doubled = counts.filter(pc.greater(counts.field("counts"), 1))
    message = f"{len(doubled)} keys have more than one row"
    return [Problem(column="key", message=message, key=doubled.field("values")[0].as_py())]


def _numpy(array: pa.BooleanArray) -> NDArray[np.bool_]:
    result: NDArray[np.bool_] = array.to_numpy(zero_copy_only=False)
    return result
