"""A version of a dataset held against its log, against itself and against its source. Changes nothing.

In: an opened version, and what embeds images by its recipe. Out: a `Report` with what is wrong, a line each.

    partitions   every file that the log names: there, whole, made from and by what the log says, its samples accounted for
    columns      where asked for: every row of them, down to the checksums of its pages
    sample       rows drawn evenly over the version: the image fetched, hashed, embedded again, and compared

What cannot be seen: a partition that was rewritten in the same size, with a key or label changed and every checksum made anew.

Memory: what planning takes for a partition; 500 MB while embeddings are read (`NUM_READERS` row groups, with what a remote
store reads ahead), with the keys and positions of as many partitions; the encoded images of `BATCH_ROWS` rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.analysis import columns
from pipeline.dataset import partition
from pipeline.dataset.partition import DATA_FOLDER
from pipeline.dataset.read import PLACE_COLUMNS, Dataset
from pipeline.dataset.table import Entry
from pipeline.errors import DatasetError, SampleError, SourceChanged, StorageError, StorageRefused, WorldError
from pipeline.recipe import Layout, Recipe, differences
from pipeline.storage import FileStat, join

NUM_THREADS = 16
"""Footers and images that are read at once: both are waited for."""
NUM_READERS = 4
"""Partitions whose embeddings are read at once."""
DEEP_BYTES = 1 << 30
"""Of partitions: up to here all columns are read unless told otherwise; seconds."""
UNIT_ROWS = 1000
"""Sampled rows of one partition that are read in one go."""
BATCH_ROWS = 16
"""Images that are fetched and embedded together."""

_LOGGED = ("num_bytes", "num_rows", "shard", "fingerprint", "recipe_id", "layout_id", "num_quarantined")
"""What both log and footer say of a partition."""

Embed = Callable[[Sequence[bytes]], tuple[Mapping[str, NDArray[np.float32]], Mapping[int, SampleError]]]
"""See `extract.embedder.Embedder.embed`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is not as it should be."""

    kind: str
    """What differs, in a word, to count by."""
    message: str
    path: str
    """Of the partition, relative to the dataset."""
    shard: str
    key: str | None = None
    """Of the row, or of the first of several."""

    def __str__(self) -> str:
        row = f" key {self.key!r}" if self.key is not None else ""
        return f"{self.path} ({self.shard}){row}: {self.message}"

    def as_json(self) -> dict[str, Any]:
        """A mapping of plain values."""
        return {name: getattr(self, name) for name in ("kind", "path", "shard", "key", "message")}


@dataclass(slots=True, kw_only=True)
class Report:
    """What was looked at and what is wrong."""

    version: int
    num_partitions: int
    num_rows: int
    """As the log says."""
    num_bytes: int
    """Of the partitions, as the log says."""
    deep: bool
    """Whether all columns were read."""
    tolerance: float
    """Share of the largest value by which a row may differ from what its image gives now."""
    rounded: bool
    """Whether values are rounded to float16: then they may also differ by one step of it."""
    num_sampled: int = 0
    num_compared: int = 0
    """Rows whose image was embedded again."""
    max_difference: float = 0.0
    """Of the compared rows, as a share of their largest value; what rounding to float16 explains is taken off."""
    findings: list[Finding] = field(default_factory=list)
    unavailable: list[Finding] = field(default_factory=list)
    """Sampled rows whose image the source no longer has, or cannot give by itself: not the dataset's fault."""
    seconds: float = 0.0

    @property
    def num_damaged(self) -> int:
        """Partitions with a finding."""
        return len({finding.path for finding in self.findings})

    @property
    def verdict(self) -> str:
        """What is wrong in a sentence; empty when nothing is."""
        if self.findings:
            return f"{self.num_damaged:,} of {self.num_partitions:,} partitions are not what they should be"
        if self.num_sampled and not self.num_compared:
            return (
                f"none of the {self.num_sampled} sampled rows could be compared with its image, the first because "
                f"{self.unavailable[0].message}"
            )
        return ""

    def as_json(self) -> dict[str, Any]:
        """A mapping of plain values."""
        return {
            "version": self.version,
            "ok": not self.verdict,
            "partitions": {"total": self.num_partitions, "damaged": self.num_damaged},
            "rows": {
                "total": self.num_rows,
                "sampled": self.num_sampled,
                "compared": self.num_compared,
                "unavailable": len(self.unavailable),
            },
            "bytes": self.num_bytes,
            "deep": self.deep,
            "tolerance": self.tolerance,
            "max_difference": self.max_difference,
            "findings": [finding.as_json() for finding in self.findings],
            "unavailable": [finding.as_json() for finding in self.unavailable],
            "seconds": round(self.seconds, 3),
        }


def verify(dataset: Dataset, embed: Embed | None = None, rows: int = 100, seed: int = 0, *, deep: bool | None = None) -> Report:
    """Check one version.

    Args:
        dataset: the version; its images are read from the source that it was opened with.
        embed: embeds encoded images by the dataset's recipe; without it no row is compared with its image.
        rows: how many rows are drawn to be compared; all where the version has no more.
        seed: draws others.
        deep: read all columns of all rows; where left out, when the partitions have no more than `DEEP_BYTES`.

    Raises:
        DatasetError: the version was vacuumed.
        StorageError: the dataset cannot be listed.
    """
    start = time.monotonic()
    entries = dataset.entries()
    num_bytes = sum(entry.num_bytes for entry in entries)
    recipe = Recipe(fields=dataset.recipe, widths=dataset.nodes)
    report = Report(
        version=dataset.version,
        num_partitions=len(entries),
        num_rows=len(dataset),
        num_bytes=num_bytes,
        deep=num_bytes <= DEEP_BYTES if deep is None else deep,
        tolerance=recipe.tolerance,
        rounded=recipe.rounded,
    )
    report.findings += _doubled(entries)
    checked = _check_partitions(dataset, entries, report.deep)
    report.findings += itertools.chain.from_iterable(each.findings for each in checked)
    if embed is not None:
        _check_sample(dataset, checked, embed, rows, seed, report)
    report.seconds = time.monotonic() - start
    return report


# Partitions


@dataclass(frozen=True, slots=True, kw_only=True)
class _Checked:
    """A partition that was looked at."""

    entry: Entry
    findings: list[Finding]
    num_rows: int = 0
    """That can be read: 0 where the file is not what it should be."""


def _doubled(entries: Iterable[Entry]) -> list[Finding]:
    """A row's identity is shard and key, so a shard may have one partition only."""
    first: dict[str, Entry] = {}
    findings = []
    for entry in entries:
        other = first.setdefault(entry.shard, entry)
        if other is not entry:
            findings.append(_finding(entry, "shard", f"the version has a second partition of this shard: {other.path}"))
    return findings


def _check_partitions(dataset: Dataset, entries: Sequence[Entry], deep: bool) -> list[_Checked]:
    store = dataset.table_.store
    # One listing for what a question for each file would cost a request each.
    files = {file.url: file for file in store.list(join(dataset.url, DATA_FOLDER), missing_ok=True)}
    root = store.absolute(dataset.url)
    found = [files.get(join(root, entry.path)) for entry in entries]
    if None in found:
        _check_not_vacuumed(dataset, entries[found.index(None)])
    recipe_id = Recipe(fields=dataset.recipe, widths=dataset.nodes).recipe_id
    layout_id = Layout(fields=dataset.table_.layout_fields).layout_id

    def check(entry: Entry, file: FileStat | None) -> _Checked:
        if file is None:
            return _Checked(entry=entry, findings=[_finding(entry, "missing", "the file is not there")])
        checked = _check_partition(dataset, entry, file, deep)
        for what, found, expected in (("recipe", entry.recipe_id, recipe_id), ("layout", entry.layout_id, layout_id)):
            if found != expected:
                message = f"{what}: the log has {found} for it, and {expected} for the version"
                checked.findings.append(_finding(entry, what, message))
        return checked

    with ThreadPoolExecutor(NUM_READERS if deep else NUM_THREADS) as threads:
        return list(threads.map(check, entries, found))


def _check_not_vacuumed(dataset: Dataset, entry: Entry) -> None:
    """Raise a DatasetError where a partition is missing because its version was vacuumed."""
    with contextlib.suppress(StorageRefused):
        dataset.stat(entry)


def _check_partition(dataset: Dataset, entry: Entry, file: FileStat, deep: bool) -> _Checked:
    """Footer, quarantine, and with `deep` the columns of one file."""
    table = dataset.table_
    try:
        content = partition.read_footer(table.store, file)
        described = partition.partition_of(entry.path, file.num_bytes, content)
        logged = dataclasses.replace(described, **{name: getattr(entry, name) for name in _LOGGED})
        wrong = partition.disagreements(file, content, logged, dataset.schema, dataset.recipe, table.layout_fields)
    except (StorageError, KeyError, TypeError) as error:
        findings = [_finding(entry, "unreadable", f"the footer cannot be read: {_reason(error, file)}")]
        if file.num_bytes != entry.num_bytes:
            findings.insert(0, _differs(entry, "num_bytes", file.num_bytes, entry.num_bytes))
        return _Checked(entry=entry, findings=findings)
    findings = [_differs(entry, what, found, expected) for what, found, expected in wrong]
    kinds = {finding.kind for finding in findings}
    quarantined, more = _check_quarantine(dataset, entry, content)
    findings += more
    if kinds & {"columns", "num_bytes"}:
        return _Checked(entry=entry, findings=findings)
    if deep:
        expected = columns.Expected(
            shard=entry.shard,
            nodes=dataset.nodes,
            normalized={name for name, node in dataset.recipe["nodes"].items() if node["normalize"] == "l2"},
            rounded=Recipe(fields=dataset.recipe, widths=dataset.nodes).rounded,
            num_read=described.num_read,
            quarantined=quarantined,
        )
        try:
            with table.store.open(file) as handle:
                problems = columns.check(handle, expected)
        except (WorldError, pa.ArrowException, OSError, ValueError) as error:
            findings.append(_finding(entry, "unreadable", f"its rows cannot be read: {_reason(error, file)}"))
            return _Checked(entry=entry, findings=findings)
        findings += [_finding(entry, each.column, each.message, each.key) for each in problems]
    return _Checked(entry=entry, findings=findings, num_rows=content["stored"][0])


def _check_quarantine(dataset: Dataset, entry: Entry, content: Mapping[str, Any]) -> tuple[list[int] | None, list[Finding]]:
    """Positions of the samples in quarantine (None: not known), and what is wrong with their list."""
    try:
        rows = partition.read_quarantine(dataset.table_.store, dataset.url, content)
    except (StorageError, KeyError, TypeError, ValueError) as error:
        return None, [_finding(entry, "quarantine", f"the quarantine cannot be read: {type(error).__name__}: {error}")]
    findings = []
    if len(rows) != content["num_quarantined"]:
        message = f"the quarantine has {len(rows)} rows, the footer counts {content['num_quarantined']}"
        findings.append(_finding(entry, "quarantine", message))
    if strange := [row for row in rows if row.shard != entry.shard]:
        message = f"{len(strange)} rows of the quarantine are of another shard, the first of {strange[0].shard}"
        findings.append(_finding(entry, "quarantine", message, strange[0].key))
    return [row.index for row in rows], findings


# The sample


@dataclass(frozen=True, slots=True)
class _Row:
    """A row that was drawn."""

    entry: Entry
    place: dict[str, Any]
    """`PLACE_COLUMNS`."""
    embeddings: dict[str, NDArray[np.float32]]
    """Column to as many values as the row has."""


def _check_sample(dataset: Dataset, checked: Sequence[_Checked], embed: Embed, rows: int, seed: int, report: Report) -> None:
    """Draw rows, embed their images again and compare. A batch at a time."""
    drawn = draw([each.num_rows for each in checked], rows, seed)
    report.num_sampled = sum(len(positions) for positions in drawn.values())
    units = [
        (checked[number].entry, positions[first : first + UNIT_ROWS])
        for number, positions in drawn.items()
        for first in range(0, len(positions), UNIT_ROWS)
    ]
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        for batch in _batches(_read_rows(dataset, units, threads, report.findings), BATCH_ROWS):
            available, images = [], []
            for row, image in zip(batch, threads.map(lambda row: _image(dataset, row), batch), strict=True):
                if isinstance(image, bytes):
                    available.append(row)
                    images.append(image)
                else:
                    is_ours, message = image
                    finding = _finding(row.entry, "image", message, row.place["key"])
                    (report.findings if is_ours else report.unavailable).append(finding)
            if images:
                _compare(available, embed(images), report)


def draw(counts: Sequence[int], rows: int, seed: int) -> dict[int, list[int]]:
    """Rows of partitions of so many rows each, every row as likely as any other.

    Returns:
        By number of a partition: positions in it, ascending.
    """
    ends = np.cumsum(counts, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    picked = np.sort(np.random.default_rng(seed).choice(total, min(rows, total), replace=False)) if total else np.empty(0, int)
    drawn: dict[int, list[int]] = {}
    for row, number in zip(picked.tolist(), np.searchsorted(ends, picked, side="right").tolist(), strict=True):
        drawn.setdefault(number, []).append(row - int(ends[number]) + counts[number])
    return drawn


def _read_rows(
    dataset: Dataset, units: Sequence[tuple[Entry, list[int]]], threads: ThreadPoolExecutor, findings: list[Finding]
) -> Iterator[_Row]:
    """The drawn rows, `NUM_READERS` units ahead of their use. What cannot be read becomes a finding."""

    def read(unit: tuple[Entry, list[int]]) -> pa.Table | Finding:
        try:
            return dataset.rows(*unit, [*PLACE_COLUMNS, *dataset.nodes])
        except (WorldError, pa.ArrowException, OSError, ValueError) as error:
            return _finding(unit[0], "unreadable", f"{len(unit[1])} of its rows cannot be read: {error}")

    for some in _batches(units, NUM_READERS):
        for (entry, _), found in zip(some, list(threads.map(read, some)), strict=True):
            if isinstance(found, Finding):
                findings.append(found)
                continue
            places = found.select(PLACE_COLUMNS).to_pylist()
            for number, place in enumerate(places):
                cells = {name: found.column(name)[number].values for name in dataset.nodes}
                embeddings = {
                    name: np.empty(0, np.float32) if cell is None else cell.to_numpy(zero_copy_only=False)
                    for name, cell in cells.items()
                }
                yield _Row(entry, place, embeddings)


def _image(dataset: Dataset, row: _Row) -> bytes | tuple[bool, str]:
    """The image that a row was made from, or whether it is the dataset's fault that there is none, and why.

    It is where the shard still is the one that was read: then the row points at the wrong bytes.
    """
    try:
        return dataset.image_of(row.place)
    except (SourceChanged, StorageRefused) as error:
        try:
            is_ours = dataset.source.stat(row.entry.shard).fingerprint == row.entry.fingerprint
        except StorageError:
            is_ours = False
        if is_ours:
            return True, f"the shard is unchanged, but not what the row says of its image: {error}"
        return False, str(error)
    except (DatasetError, StorageError) as error:
        return False, str(error)


def _compare(
    rows: Sequence[_Row],
    embedded: tuple[Mapping[str, NDArray[np.float32]], Mapping[int, SampleError]],
    report: Report,
) -> None:
    """Hold rows against what their images give now."""
    made, errors = embedded
    number = 0
    for position, row in enumerate(rows):
        key = row.place["key"]
        if position in errors:
            message = f"its image can no longer be embedded: {errors[position].message}"
            report.findings.append(_finding(row.entry, "image", message, key))
            continue
        report.num_compared += 1
        for name, values_D in row.embeddings.items():
            difference = _difference(values_D, made[name][number], report.rounded)
            if not difference <= report.tolerance:
                message = f"{name} differs from what its image gives by {difference:.3g} of the largest value; "
                message += f"allowed is {report.tolerance:g}"
                report.findings.append(_finding(row.entry, "embedding", message, key))
            else:
                report.max_difference = max(report.max_difference, difference)
        number += 1


def _difference(found_D: NDArray[np.float32], expected_D: NDArray[np.float32], rounded: bool) -> float:
    """The largest difference as a share of the largest value, less one step of float16 where values were rounded."""
    if found_D.shape != expected_D.shape or not np.isfinite(found_D).all():
        return math.inf
    difference_D = np.abs(found_D - expected_D)
    if rounded:
        step_D = np.spacing(np.maximum(np.abs(found_D), np.abs(expected_D)).clip(max=65504).astype(np.float16))
        difference_D = np.maximum(difference_D - step_D, 0)
    largest = float(np.abs(expected_D).max(initial=0.0))
    return float(difference_D.max(initial=0.0)) / max(largest, 1e-12)


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _finding(entry: Entry, kind: str, message: str, key: str | None = None) -> Finding:
    return Finding(kind=kind, message=message, path=entry.path, shard=entry.shard, key=key)


def _differs(entry: Entry, what: str, found: Any, expected: Any) -> Finding:
    if what == "reconciles":
        return _finding(entry, what, "its counts do not add up: read is not embedded + carried over + quarantined")
    if isinstance(found, dict):
        return _finding(entry, what, f"{what} of the log -> of the file: {'; '.join(differences(expected, found))}")
    if what == "columns":
        odd = [f"{name} {kind}" for name, kind in found if (name, kind) not in expected]
        lacking = [f"{name} {kind}" for name, kind in expected if (name, kind) not in found]
        found, expected = ", ".join(odd) or "others or another order", ", ".join(lacking) or "fewer"
    return _finding(entry, what, f"{what}: the file has {found}, the log {expected}")


def _reason(error: Exception, file: FileStat) -> str:
    """What an error says besides the file's own name."""
    text = str(error).removeprefix(f"{file.url}: ")
    return text if isinstance(error, WorldError) else f"{type(error).__name__}: {text}"
