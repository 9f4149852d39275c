"""Rows drawn from a version, and their images embedded again: does a row still say what its image says?

In: partitions whose rows can be read, and what embeds images. Out: a `Report` that knows more. Of a row only its row group is
read, of its image only its bytes, where the container allows that.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.analysis.verify.findings import Finding, Report
from pipeline.dataset.read import PLACE_COLUMNS, Dataset
from pipeline.dataset.table import Entry
from pipeline.errors import DatasetError, SampleError, SourceChanged, StorageError, StorageRefused, WorldError

NUM_THREADS = 16
"""Images that are fetched at once."""
NUM_READERS = 4
"""Row groups that are read at once."""
UNIT_ROWS = 1000
"""Rows of one partition that are read in one go."""
BATCH_ROWS = 16
"""Images that are fetched and embedded together."""

Embed = Callable[[Sequence[bytes]], tuple[Mapping[str, NDArray[np.float32]], Mapping[int, SampleError]]]
"""Column to (M, D) float32 of the M images that could be embedded, in order; and by position why the others could not. See
`extract.embedder.Embedder.embed`."""


@dataclass(frozen=True, slots=True)
class _Row:
    """A row that was drawn."""

    entry: Entry
    place: dict[str, Any]
    """`PLACE_COLUMNS`."""
    embeddings: dict[str, NDArray[np.float32]]
    """Column to as many values as the row has."""


def compare(
    dataset: Dataset, readable: Sequence[tuple[Entry, int]], embed: Embed, num_rows: int, seed: int, report: Report
) -> None:
    """Draw rows, embed their images again, and note in the report which of them differ.

    Args:
        dataset: the version.
        readable: partitions with the number of rows that they really have.
        embed: embeds by the dataset's recipe.
        num_rows: to draw.
        seed: draws others.
        report: gets counts and findings.
    """
    drawn = draw([count for _, count in readable], num_rows, seed)
    report.num_sampled = sum(len(positions) for positions in drawn.values())
    units = [
        (readable[number][0], positions[first : first + UNIT_ROWS])
        for number, positions in drawn.items()
        for first in range(0, len(positions), UNIT_ROWS)
    ]
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        for batch in _batches(_read(dataset, units, threads, report.findings), BATCH_ROWS):
            rows, images = [], []
            for row, image in zip(batch, threads.map(lambda row: _image(dataset, row), batch), strict=True):
                if isinstance(image, bytes):
                    rows.append(row)
                    images.append(image)
                else:
                    (report.findings if image.is_ours else report.unavailable).append(
                        Finding.of(row.entry, "image", image.why, row.place["key"])
                    )
            if images:
                _compare(rows, *embed(images), report)


def draw(counts: Sequence[int], num_rows: int, seed: int) -> dict[int, list[int]]:
    """Rows of partitions of so many rows each, every row as likely as any other, none twice.

    Returns:
        By number of a partition: positions in it, ascending.
    """
    ends = np.cumsum(counts, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    if not total:
        return {}
    picked = np.sort(np.random.default_rng(seed).choice(total, min(num_rows, total), replace=False))
    drawn: dict[int, list[int]] = {}
    for row, number in zip(picked.tolist(), np.searchsorted(ends, picked, side="right").tolist(), strict=True):
        drawn.setdefault(number, []).append(row - int(ends[number]) + counts[number])
    return drawn


def _read(
    dataset: Dataset, units: Iterable[tuple[Entry, list[int]]], threads: ThreadPoolExecutor, findings: list[Finding]
) -> Iterator[_Row]:
    """The drawn rows, `NUM_READERS` units ahead of their use. What cannot be read becomes a finding."""

    def read(unit: tuple[Entry, list[int]]) -> pa.Table | Finding:
        entry, positions = unit
        try:
            return dataset.rows(entry, positions, [*PLACE_COLUMNS, *dataset.nodes])
        except (WorldError, pa.ArrowException, OSError, ValueError) as error:
            return Finding.of(entry, "unreadable", f"{len(positions)} of its rows cannot be read: {error}")

    for some in _batches(units, NUM_READERS):
        for (entry, _), table in zip(some, list(threads.map(read, some)), strict=True):
            if isinstance(table, Finding):
                findings.append(table)
                continue
            for number, place in enumerate(table.select(PLACE_COLUMNS).to_pylist()):
                yield _Row(entry, place, {name: _values(table.column(name)[number]) for name in dataset.nodes})


def _values(cell: pa.ListScalar) -> NDArray[np.float32]:
    """A null as no values, and null values as NaN."""
    if not cell.is_valid:
        return np.empty(0, np.float32)
    values: NDArray[np.float32] = cell.values.to_numpy(zero_copy_only=False)
    return values


@dataclass(frozen=True, slots=True)
class _NoImage:
    """Why a row has no image, and whether that is the dataset's fault."""

    why: str
    is_ours: bool = False


def _image(dataset: Dataset, row: _Row) -> bytes | _NoImage:
    """The image that a row was made from. That it is not there is the dataset's fault where the shard is still the one that
    was read: then the row points at the wrong bytes.
    """
    place, entry = row.place, row.entry
    nulls = [name for name in PLACE_COLUMNS if place[name] is None]
    if set(nulls) - {"offset", "nbytes"} or nulls == ["nbytes"]:
        return _NoImage(f"{nulls[0]} is null", is_ours=True)
    if place["shard"] != entry.shard:
        return _NoImage(f"the row says that it is of {place['shard']}", is_ours=True)
    try:
        return dataset.image_of(place)
    except (SourceChanged, StorageRefused) as error:
        try:
            is_unchanged = dataset.source.stat(entry.shard).fingerprint == entry.fingerprint
        except StorageError:
            is_unchanged = False
        if is_unchanged:
            return _NoImage(f"the shard is unchanged, but not what the row says of its image: {error}", is_ours=True)
        return _NoImage(str(error))
    except (DatasetError, StorageError) as error:
        return _NoImage(str(error))


def _compare(
    rows: Sequence[_Row],
    made: Mapping[str, NDArray[np.float32]],
    errors: Mapping[int, SampleError],
    report: Report,
) -> None:
    """Hold rows against what their images give now."""
    for position, error in errors.items():
        row = rows[position]
        message = f"its image can no longer be embedded: {error.message}"
        report.findings.append(Finding.of(row.entry, "image", message, row.place["key"]))
    compared = [row for position, row in enumerate(rows) if position not in errors]
    report.num_compared += len(compared)
    for number, row in enumerate(compared):
        for name, values_D in row.embeddings.items():
            difference = _difference(values_D, made[name][number])
            if difference <= report.tolerance:
                report.max_difference = max(report.max_difference, difference)
                continue
            message = f"{name} differs from what its image gives by {difference:.3g} of the largest value, allowed is "
            report.findings.append(Finding.of(row.entry, "embedding", f"{message}{report.tolerance:g}", row.place["key"]))


def _difference(found_D: NDArray[np.float32], expected_D: NDArray[np.float32]) -> float:
    """The largest difference as a share of the largest value. A step of float16 is a thousandth of it at most: less than the
    tolerance of every precision that is rounded.
    """
    if found_D.shape != expected_D.shape or not np.isfinite(found_D).all():
        return math.inf
    largest = float(np.abs(expected_D).max(initial=0.0))
    return float(np.abs(found_D - expected_D).max(initial=0.0)) / max(largest, 1e-12)


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
