"""Two versions of a dataset compared: which rows differ, what they were made by, and how far the embeddings moved.

In: two opened versions. Out: a `Diff`. A partition that both versions name is the same file and is compared by its name alone;
of the others, those made from the same shard are compared row by row. Only the drift of the embeddings has to read every
partition, and each just once. Memory: one pair of partitions, and 32 bytes for each row that was added or removed.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.config import RESERVED_COLUMNS
from pipeline.dataset.partition import list_values
from pipeline.dataset.read import Dataset
from pipeline.dataset.table import Entry
from pipeline.recipe import differences

EXAMPLES = 8
"""Rows that are named, of each kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """How one embedding column moved. None where there is nothing to compare."""

    mean_shift: float | None
    """L2 distance between the mean embeddings of the two versions."""
    relative_mean_shift: float | None
    """`mean_shift` as a share of `mean_norm_before`."""
    mean_norm_before: float | None
    """Mean of the L2 norms of the rows."""
    mean_norm_after: float | None
    num_compared: int
    """Rows of the same shard and key whose content or recipe differs; the cosines are between their embeddings."""
    cosine_mean: float | None
    cosine_median: float | None
    cosine_min: float | None
    farthest: list[dict[str, Any]]
    """`shard`, `key` and `cosine` of the first `EXAMPLES` of these, the least cosine first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diff:
    """What changed between two versions. A row's identity is its shard and its key."""

    before: int
    after: int
    num_rows_before: int
    num_rows_after: int
    num_added: int
    num_removed: int
    num_changed: int
    """Same shard and key, another content hash."""
    num_relabelled: int
    """Same content hash, another value in the label or in a carried column that both versions have."""
    num_moved: int
    """Of the added rows, those whose image was removed elsewhere: it went to another shard or key."""
    num_partitions_shared: int
    num_partitions_added: int
    num_partitions_removed: int
    recipe: list[str]
    """Fields in which the recipes differ."""
    layout: list[str]
    nodes_added: list[str]
    nodes_removed: list[str]
    drift: dict[str, Drift]
    """Of each embedding column that both versions have in equal width; empty when it was not asked for."""
    examples: dict[str, list[dict[str, str]]]
    """`shard` and `key` of the first `EXAMPLES` rows `added` and `removed`."""

    @property
    def num_unchanged(self) -> int:
        """Rows that both versions have, alike in content, label and carried columns."""
        return self.num_rows_before - self.num_removed - self.num_changed - self.num_relabelled

    def as_json(self) -> dict[str, Any]:
        """A mapping of plain values."""
        names = ("added", "removed", "changed", "relabelled", "moved", "unchanged")
        return {
            "before": self.before,
            "after": self.after,
            "rows": {
                "before": self.num_rows_before,
                "after": self.num_rows_after,
                **{name: getattr(self, f"num_{name}") for name in names},
            },
            "partitions": {name: getattr(self, f"num_partitions_{name}") for name in ("shared", "added", "removed")},
            "recipe": self.recipe,
            "layout": self.layout,
            "nodes": {"added": self.nodes_added, "removed": self.nodes_removed},
            "drift": {name: dataclasses.asdict(drift) for name, drift in self.drift.items()},
            "examples": self.examples,
        }


def diff(before: Dataset, after: Dataset, *, drift: bool = True) -> Diff:
    """Compare two versions of a dataset.

    Args:
        before: the older version.
        after: the newer version.
        drift: compare the embeddings too, which reads every partition.

    Raises:
        DatasetError: a version was vacuumed.
        StorageError: a partition cannot be read.
    """
    nodes = [name for name, width in before.nodes.items() if after.nodes.get(name) == width] if drift else []
    moves = {name: _Drift(before.nodes[name]) for name in nodes}
    not_carried = (RESERVED_COLUMNS - {"label"}) | before.nodes.keys() | after.nodes.keys()
    carried = [name for name in before.schema.names if name in after.schema.names and name not in not_carried]
    paths = {entry.path for entry in before.entries()} & {entry.path for entry in after.entries()}
    if nodes:
        for entry in before.entries():
            if entry.path in paths:
                table = before.read(entry, nodes)
                for name, move in moves.items():
                    values_ND = move.values(table.column(name))
                    move.add(values_ND, values_ND)
    # A shard has one partition in a version, so a row of one version can only meet a row of that shard's partition.
    old_entries = {entry.shard: entry for entry in before.entries() if entry.path not in paths}
    new_entries = {entry.shard: entry for entry in after.entries() if entry.path not in paths}
    rows = _Rows()
    for shard in sorted(old_entries.keys() | new_entries.keys()):
        old_entry, new_entry = old_entries.get(shard), new_entries.get(shard)
        columns = ["key", "content_hash", *carried, *nodes]
        old, new = _read(before, old_entry, columns), _read(after, new_entry, columns)
        remade = old_entry is not None and new_entry is not None and old_entry.recipe_id != new_entry.recipe_id
        compared_2M = rows.compare(shard, old, new, carried, remade)
        keys = new.column("key").take(pa.array(compared_2M[1])).to_pylist()
        for name, move in moves.items():
            old_ND, new_ND = move.values(old.column(name)), move.values(new.column(name))
            move.add(old_ND, new_ND)
            move.compare(old_ND[compared_2M[0]], new_ND[compared_2M[1]], shard, keys)
    return Diff(
        before=before.version,
        after=after.version,
        num_rows_before=len(before),
        num_rows_after=len(after),
        num_added=sum(map(len, rows.added)),
        num_removed=sum(map(len, rows.removed)),
        num_changed=rows.num_changed,
        num_relabelled=rows.num_relabelled,
        num_moved=_num_shared(rows.added, rows.removed),
        num_partitions_shared=len(paths),
        num_partitions_added=len(new_entries),
        num_partitions_removed=len(old_entries),
        recipe=differences(before.recipe, after.recipe),
        layout=differences(before.table_.layout_fields, after.table_.layout_fields),
        nodes_added=[name for name in after.nodes if name not in before.nodes],
        nodes_removed=[name for name in before.nodes if name not in after.nodes],
        drift={name: move.result() for name, move in moves.items()},
        examples=rows.examples,
    )


class _Rows:
    """Counts rows that differ, a shard at a time."""

    def __init__(self) -> None:
        self.added: list[NDArray[np.bytes_]] = []
        """Content hashes."""
        self.removed: list[NDArray[np.bytes_]] = []
        self.num_changed = self.num_relabelled = 0
        self.examples: dict[str, list[dict[str, str]]] = {"added": [], "removed": []}

    def compare(self, shard: str, old: pa.Table, new: pa.Table, carried: Sequence[str], remade: bool) -> NDArray[np.int64]:
        """Count one shard's rows.

        Args:
            shard: its URL.
            old: its rows before.
            new: its rows after.
            carried: columns that make a row relabelled.
            remade: whether the recipe differs.

        Returns:
            (2, M) positions in `old` and `new` of the rows whose embeddings are to be compared.
        """
        position = {key: row for row, key in enumerate(old.column("key").to_pylist())}
        found_N = np.array([position.get(key, -1) for key in new.column("key").to_pylist()], np.int64)
        new_M = np.flatnonzero(found_N >= 0)
        old_M = found_N[new_M]
        old_hashes, new_hashes = _hashes(old), _hashes(new)
        self.added.append(new_hashes[found_N < 0])
        only_old_M = np.setdiff1d(np.arange(len(old)), old_M)
        self.removed.append(old_hashes[only_old_M])
        for name, table, rows_M in (("added", new, np.flatnonzero(found_N < 0)), ("removed", old, only_old_M)):
            known = self.examples[name]
            some = table.column("key").take(pa.array(rows_M[: EXAMPLES - len(known)], pa.int64()))
            known += [{"shard": shard, "key": key} for key in some.to_pylist()]
        changed_M = old_hashes[old_M] != new_hashes[new_M]
        relabelled_M = np.zeros(len(old_M), np.bool_)
        for name in carried:
            relabelled_M |= _differ(old.column(name).take(pa.array(old_M)), new.column(name).take(pa.array(new_M)))
        self.num_changed += int(changed_M.sum())
        self.num_relabelled += int((relabelled_M & ~changed_M).sum())
        matched_2M = np.stack([old_M, new_M])
        return matched_2M if remade else matched_2M[:, changed_M]


class _Drift:
    """Sums over all rows of both versions, in float64."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._sums_2D = np.zeros((2, width))
        self._norms_2, self._counts_2 = np.zeros(2), np.zeros(2, np.int64)
        self._cosines = [np.empty(0, np.float32)]
        self._farthest: list[dict[str, Any]] = []

    def values(self, column: pa.ChunkedArray) -> NDArray[np.float32]:
        """(N, D) float32, also where N is 0."""
        return list_values(column).reshape(len(column), self._width)

    def add(self, old_ND: NDArray[np.float32], new_ND: NDArray[np.float32]) -> None:
        """Rows of the version before, and of the one after."""
        for side, values_ND in enumerate((old_ND, new_ND)):
            self._sums_2D[side] += values_ND.sum(axis=0, dtype=np.float64)
            self._norms_2[side] += _norms(values_ND).sum()
            self._counts_2[side] += len(values_ND)

    def compare(self, old_MD: NDArray[np.float32], new_MD: NDArray[np.float32], shard: str, keys: Sequence[str]) -> None:
        """Embeddings of the same rows of a shard, and their keys; the cosine with a zero vector counts as 0."""
        dot_M = np.einsum("md,md->m", old_MD, new_MD, dtype=np.float64)
        cosine_M = dot_M / np.maximum(_norms(old_MD) * _norms(new_MD), np.finfo(np.float64).tiny)
        cosine_M = np.clip(cosine_M, -1.0, 1.0).astype(np.float32)
        self._cosines.append(cosine_M)
        least = np.argsort(cosine_M, kind="stable")[:EXAMPLES].tolist()
        found = [{"shard": shard, "key": keys[row], "cosine": float(cosine_M[row])} for row in least]
        self._farthest = heapq.nsmallest(EXAMPLES, [*self._farthest, *found], key=lambda each: each["cosine"])

    def result(self) -> Drift:
        """What the sums say."""
        both = self._counts_2.all()
        means_2D = self._sums_2D / np.maximum(self._counts_2, 1)[:, None]
        shift = float(np.linalg.norm(means_2D[1] - means_2D[0])) if both else None
        norms = [float(norm / count) if count else None for norm, count in zip(self._norms_2, self._counts_2, strict=True)]
        cosines = np.concatenate(self._cosines)
        return Drift(
            mean_shift=shift,
            relative_mean_shift=shift / norms[0] if shift is not None and norms[0] else None,
            mean_norm_before=norms[0],
            mean_norm_after=norms[1],
            num_compared=len(cosines),
            cosine_mean=float(cosines.mean(dtype=np.float64)) if len(cosines) else None,
            cosine_median=float(np.median(cosines)) if len(cosines) else None,
            cosine_min=float(cosines.min()) if len(cosines) else None,
            farthest=self._farthest,
        )


def _read(dataset: Dataset, entry: Entry | None, columns: Sequence[str]) -> pa.Table:
    """Rows of a partition; no rows where there is no partition."""
    if entry is None:
        return pa.schema([dataset.schema.field(name) for name in columns]).empty_table()
    return dataset.read(entry, columns)


def _norms(values_ND: NDArray[np.float32]) -> NDArray[np.float64]:
    """(N,) L2 norms, summed in float64 without a copy of the rows in it."""
    return np.asarray(np.sqrt(np.einsum("nd,nd->n", values_ND, values_ND, dtype=np.float64)))


def _hashes(table: pa.Table) -> NDArray[np.bytes_]:
    return np.array(table.column("content_hash").to_pylist(), "S32")


def _differ(old: pa.ChunkedArray, new: pa.ChunkedArray) -> NDArray[np.bool_]:
    """Where two columns of equal length have other values; null equals null and NaN equals NaN."""
    if old.equals(new):
        return np.zeros(len(old), np.bool_)
    pairs = zip(old.to_pylist(), new.to_pylist(), strict=True)
    return np.array([a != b and not (a != a and b != b) for a, b in pairs], np.bool_)


def _num_shared(added: Sequence[NDArray[np.bytes_]], removed: Sequence[NDArray[np.bytes_]]) -> int:
    """Content hashes that are on both sides; copies count as often as they can be paired."""
    if not added or not removed:
        return 0
    first, first_counts = np.unique(np.concatenate(added), return_counts=True)
    second, second_counts = np.unique(np.concatenate(removed), return_counts=True)
    _, at_first, at_second = np.intersect1d(first, second, assume_unique=True, return_indices=True)
    return int(np.minimum(first_counts[at_first], second_counts[at_second]).sum())
