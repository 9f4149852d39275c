"""A version of a dataset held against its log, against itself and against its source. Changes nothing.

In: an opened version, and what embeds images by its recipe. Out: a `Report` with what is wrong, a line each.

    partitions   every file that the log names: there, whole, made from and by what the log says, its samples accounted for
    columns      where asked for: every row of them, down to the checksums of its pages (`columns.py`)
    sample       rows drawn evenly over what can be read: the image fetched, hashed, embedded again, compared (`sample.py`)

What cannot be seen: a partition that was rewritten in the same size, with a key or label changed and every checksum made anew.

Memory: 2 kB a file of the data folder; while columns are read 400 MB (measured: `NUM_READERS` at once, 2,048 values a row),
256 MB that are read ahead of a remote store, and the keys and positions of as many partitions; the encoded images of a batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.analysis.verify import columns, sample
from pipeline.analysis.verify.findings import Finding, Report
from pipeline.analysis.verify.sample import Embed
from pipeline.dataset import partition
from pipeline.dataset.partition import DATA_FOLDER, Partition
from pipeline.dataset.read import Dataset
from pipeline.dataset.table import Entry
from pipeline.errors import StorageError, StorageRefused, WorldError
from pipeline.recipe import Layout, differences
from pipeline.storage import FileStat, join

__all__ = ["Finding", "Report", "verify"]

NUM_THREADS = 16
"""Footers that are read at once: they are waited for."""
NUM_READERS = 4
"""Partitions whose columns are read at once."""
DEEP_BYTES = 1 << 30
"""Of partitions: up to here all columns are read unless told otherwise, which takes seconds."""
NOTE_EVERY_S = 10.0

_LOGGED = ("num_bytes", "num_rows", "shard", "fingerprint", "recipe_id", "layout_id", "num_quarantined")
"""What both log and footer say of a partition."""


def verify(
    dataset: Dataset,
    embed: Embed | None = None,
    rows: int = 100,
    seed: int = 0,
    *,
    deep: bool | None = None,
    note: Callable[[str], None] | None = None,
) -> Report:
    """Check one version.

    Args:
        dataset: the version; its images are read from the source that it was opened with.
        embed: embeds encoded images by the dataset's recipe; without it no row is compared with its image.
        rows: how many rows are drawn to be compared; all where there are no more.
        seed: draws others.
        deep: read all columns of all rows; where left out, when the partitions have no more than `DEEP_BYTES`.
        note: is told now and then how many partitions have been looked at.

    Raises:
        DatasetError: the version was vacuumed.
        StorageError: the dataset cannot be listed.
    """
    start = time.monotonic()
    num_bytes = sum(entry.num_bytes for entry in dataset.entries())
    report = Report(
        version=dataset.version,
        num_partitions=len(dataset.entries()),
        num_rows=len(dataset),
        num_bytes=num_bytes,
        deep=num_bytes <= DEEP_BYTES if deep is None else deep,
        tolerance=dataset.table_.recipe.tolerance,
    )
    checked = _check_all(dataset, report.deep, note)
    report.findings += [finding for each in checked for finding in each.findings]
    if embed is not None:
        sample.compare(dataset, [(each.entry, each.num_rows) for each in checked], embed, rows, seed, report)
    report.seconds = time.monotonic() - start
    return report


@dataclass(slots=True, kw_only=True)
class _Checked:
    """A partition that was looked at."""

    entry: Entry
    findings: list[Finding]
    num_rows: int = 0
    """That can be read: 0 where the file is not what it should be."""


def _check_all(dataset: Dataset, deep: bool, note: Callable[[str], None] | None) -> list[_Checked]:
    entries, store = dataset.entries(), dataset.table_.store
    # One listing, where a question for each file would cost a request each.
    listed = {file.url: file for file in store.list(join(dataset.url, DATA_FOLDER), missing_ok=True)}
    root = store.absolute(dataset.url)
    files = [listed.get(join(root, entry.path)) for entry in entries]
    if None in files:
        with contextlib.suppress(StorageRefused):
            dataset.stat(entries[files.index(None)])  # says so where the version was vacuumed
    check, checked, noted_at = _Check(dataset, deep), list[_Checked](), time.monotonic()
    with ThreadPoolExecutor(NUM_READERS if deep else NUM_THREADS) as threads:
        for each in threads.map(check, entries, files):
            checked.append(each)
            if note is not None and time.monotonic() - noted_at > NOTE_EVERY_S:
                note(f"{len(checked):,} of {len(entries):,} partitions")
                noted_at = time.monotonic()
    _find_doubled(checked)
    return checked


def _find_doubled(checked: Iterable[_Checked]) -> None:
    """A row's identity is shard and key, so a shard may have one partition only."""
    first: dict[str, Entry] = {}
    for each in checked:
        other = first.setdefault(each.entry.shard, each.entry)
        if other is not each.entry:
            message = f"the version has a second partition of this shard: {other.path}"
            each.findings.append(Finding.of(each.entry, "shard", message))


class _Check:
    """Looks at one file: its entry in the log, its footer, its quarantine, and with `deep` its columns. From any thread."""

    def __init__(self, dataset: Dataset, deep: bool) -> None:
        self._dataset, self._deep = dataset, deep
        self._store, self._layout = dataset.table_.store, dataset.table_.layout_fields
        self._recipe = dataset.table_.recipe
        self._layout_id = Layout(fields=self._layout).layout_id

    def __call__(self, entry: Entry, file: FileStat | None) -> _Checked:
        checked = _Checked(entry=entry, findings=[])
        for what, its, of_all in (
            ("recipe", entry.recipe_id, self._recipe.recipe_id),
            ("layout", entry.layout_id, self._layout_id),
        ):
            if its != of_all:
                message = f"{what}: the log has {its} for this partition, {of_all} for the version"
                checked.findings.append(Finding.of(entry, what, message))
        if file is None:
            checked.findings.append(Finding.of(entry, "missing", "the file is not there"))
        else:
            self._check_file(file, checked)
        return checked

    def _check_file(self, file: FileStat, checked: _Checked) -> None:
        entry, findings = checked.entry, checked.findings
        try:
            content = partition.read_footer(self._store, file)
            described = partition.partition_of(entry.path, file.num_bytes, content)
            logged = dataclasses.replace(described, **{name: getattr(entry, name) for name in _LOGGED})
            schema, recipe = self._dataset.schema, self._recipe.fields
            wrong = partition.disagreements(file, content, logged, schema, recipe, self._layout)
        except (StorageError, KeyError, TypeError) as error:
            if file.num_bytes != entry.num_bytes:
                findings.append(_differs(entry, "num_bytes", file.num_bytes, entry.num_bytes))
            findings.append(Finding.of(entry, "unreadable", f"the footer cannot be read: {_reason(error, file)}"))
            return
        findings += [_differs(entry, what, found, expected) for what, found, expected in wrong]
        quarantined = self._quarantined(content, checked)
        if {what for what, _, _ in wrong} & {"columns", "num_bytes"}:
            return
        if self._deep and not self._check_columns(file, described, None if wrong else quarantined, checked):
            return
        checked.num_rows = content["stored"][0]

    def _quarantined(self, content: Mapping[str, Any], checked: _Checked) -> list[int] | None:
        """Positions of the samples in quarantine; None where they are not known."""
        entry, findings = checked.entry, checked.findings
        try:
            rows = partition.read_quarantine(self._store, self._dataset.url, content)
            positions = [int(row.index) for row in rows]
        except (StorageError, KeyError, TypeError, ValueError) as error:
            message = f"the quarantine cannot be read: {type(error).__name__}: {error}"
            findings.append(Finding.of(entry, "quarantine", message))
            return None
        if len(rows) != content["num_quarantined"]:
            message = f"the quarantine has {len(rows)} rows, the footer counts {content['num_quarantined']}"
            findings.append(Finding.of(entry, "quarantine", message))
        if strange := [row for row in rows if row.shard != entry.shard]:
            message = f"{len(strange)} rows of the quarantine are of another shard, the first of {strange[0].shard}"
            findings.append(Finding.of(entry, "quarantine", message, strange[0].key))
        return positions

    def _check_columns(
        self, file: FileStat, described: Partition, quarantined: Sequence[int] | None, checked: _Checked
    ) -> bool:
        """Read all rows; False where that cannot be done."""
        nodes: Mapping[str, Mapping[str, Any]] = self._recipe.fields["nodes"]
        expected = columns.Expected(
            shard=checked.entry.shard,
            nodes=self._recipe.widths,
            normalized={name for name, node in nodes.items() if node["normalize"] == "l2"},
            rounded=self._recipe.rounded,
            num_read=described.num_read,
            quarantined=quarantined,
        )
        try:
            with self._store.open(file) as handle:
                problems = columns.check(handle, expected)
        except (WorldError, pa.ArrowException, OSError, ValueError) as error:
            message = f"its rows cannot be read: {_reason(error, file)}"
            checked.findings.append(Finding.of(checked.entry, "unreadable", message))
            return False
        checked.findings += [Finding.of(checked.entry, each.column, each.message, each.key) for each in problems]
        return True


def _differs(entry: Entry, what: str, found: Any, expected: Any) -> Finding:
    """What the file has and what the log has, in a line."""
    if what == "reconciles":
        return Finding.of(entry, what, "its counts do not add up: read is not embedded + carried over + quarantined")
    if isinstance(found, dict):
        return Finding.of(entry, what, f"{what} of the log -> of the file: {'; '.join(differences(expected, found))}")
    if what == "columns":
        odd = [f"{name} {kind}" for name, kind in found if (name, kind) not in expected]
        lacking = [f"{name} {kind}" for name, kind in expected if (name, kind) not in found]
        found, expected = ", ".join(odd) or "fewer or another order", ", ".join(lacking) or "fewer or another order"
    return Finding.of(entry, what, f"{what}: the file has {found}, the log {expected}")


def _reason(error: Exception, file: FileStat) -> str:
    """What an error says besides the file's own name."""
    text = str(error).removeprefix(f"{file.url}: ")
    return text if isinstance(error, WorldError) else f"{type(error).__name__}: {text}"
