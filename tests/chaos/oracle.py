"""What a dataset holds, and how that differs from what it should hold: nothing lost, doubled or torn.

Rows are compared by shard and key. Shards are known by the last part of their URL, so that datasets made from copies of a
source can be compared. Equal means promise 1: all other columns identical, embeddings within 1e-4 of the largest value.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.dataset import partition
from pipeline.dataset.read import Dataset
from pipeline.storage import FileStat, join

TOLERANCE = 1e-4
"""Of the largest value of all expected embeddings."""


@dataclass(slots=True)
class Shard:
    """The rows made from one shard, in the dataset's order, and what it has in quarantine."""

    keys: list[str] = field(default_factory=list)
    others: list[tuple[Any, ...]] = field(default_factory=list)
    """Every column but the embeddings; `shard` and `url` as whether they name the shard that the log names."""
    embeddings: list[NDArray[np.float32]] = field(default_factory=list)
    quarantine: list[tuple[Any, ...]] = field(default_factory=list)


Contents = dict[str, Shard]
"""By the shard's name."""


@dataclass(slots=True)
class Difference:
    """Counts of what is not as it should be."""

    lost: int = 0
    doubled: int = 0
    torn: int = 0
    """Rows of the right key that differ, shards of the wrong number."""
    strange: int = 0
    """Rows that nobody expects."""
    quarantine: int = 0
    """Rows of the quarantine that are missing or too many."""
    examples: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.lost or self.doubled or self.torn or self.strange or self.quarantine)

    def __str__(self) -> str:
        counts = [f"{getattr(self, name)} {name}" for name in ("lost", "doubled", "torn", "strange")]
        return f"{', '.join(counts)}, {self.quarantine} rows of the quarantine differ: {'; '.join(self.examples[:5])}"


def name_of(url: str) -> str:
    """`003` of `s3://bucket/shards/003.tar`."""
    return url.rpartition("/")[2].removesuffix(".tar")


def contents(dataset: Dataset) -> Contents:
    """All that one version holds."""
    found: Contents = collections.defaultdict(Shard)
    places = {"shard", "url"}
    others = [name for name in dataset.schema.names if name not in dataset.nodes]
    for entry in dataset.entries():
        shard = found[name_of(entry.shard)]
        table = dataset.read(entry, dataset.schema.names)
        for row in table.select(others).to_pylist():
            shard.keys.append(row["key"])
            shard.others.append(tuple(row[name] == entry.shard if name in places else row[name] for name in others))
        columns = [partition.list_values(table.column(node)) for node in dataset.nodes]
        if table.num_rows:
            shard.embeddings += list(np.concatenate(columns, axis=1))
    for row in dataset.quarantine():
        values = dataclasses.asdict(row) | {"shard": None, "url": row.url == row.shard}
        found[name_of(row.shard)].quarantine.append(tuple(values.values()))
    return dict(found)


def difference(found: Contents, expected: Contents) -> Difference:
    """How `found` differs from `expected`."""
    result = Difference()
    limit = tolerance(expected.values())
    for name in sorted({*found, *expected}):
        _compare(name, found.get(name, Shard()), expected.get(name, Shard()), limit, result)
    return result


def tolerance(shards: Iterable[Shard]) -> float:
    """By how much two values of equal embeddings may differ."""
    return TOLERANCE * max((float(np.abs(each.embeddings).max()) for each in shards if each.keys), default=0.0)


def _compare(name: str, found: Shard, expected: Shard, limit: float, result: Difference) -> None:
    have, want = collections.Counter(found.keys), collections.Counter(expected.keys)
    for key, count in (want - have).items():
        result.lost += count
        result.examples.append(f"lost {name} {key}")
    for key, count in (have - want).items():
        if key in want:
            result.doubled += count
            result.examples.append(f"doubled {name} {key}")
        else:
            result.strange += count
            result.examples.append(f"strange {name} {key}")
    places = {key: number for number, key in reversed(list(enumerate(found.keys)))}
    for number, key in enumerate(expected.keys):
        if key not in places:
            continue
        place = places[key]
        same = found.others[place] == expected.others[number]
        # Written so that what is not a number is not equal either.
        near = np.abs(found.embeddings[place] - expected.embeddings[number]).max() <= limit
        if not (same and near):
            result.torn += 1
            result.examples.append(f"torn {name} {key}: {found.others[place]} for {expected.others[number]}")
    quarantined, refused = collections.Counter(found.quarantine), collections.Counter(expected.quarantine)
    apart = [*(quarantined - refused).elements(), *(refused - quarantined).elements()]
    result.quarantine += len(apart)
    result.examples += [f"quarantine of {name}: {row}" for row in apart]


def broken_promises(dataset: Dataset, source: Mapping[str, FileStat]) -> list[str]:
    """What does not hold of a version's log: its shards are the source's, its partitions are there, and their footers agree.

    Args:
        dataset: the version.
        source: the source's shards as they are listed now, by URL.
    """
    broken = []
    entries = dataset.entries()
    named = sorted((entry.shard, entry.fingerprint) for entry in entries)
    if named != sorted((file.url, file.fingerprint) for file in source.values()):
        broken.append(f"the log names other shards than the source has: {named}")
    store = dataset.table_.store
    for entry in entries:
        file = store.stat(join(dataset.url, entry.path))
        footer = partition.read_footer(store, file)
        described = partition.partition_of(entry.path, file.num_bytes, footer)
        logged = {each.name: getattr(entry, each.name) for each in dataclasses.fields(entry)}
        in_footer = {name: getattr(described, name) for name in logged}
        if logged != in_footer:
            broken.append(f"{entry.path}: the log says {logged}, the footer {in_footer}")
        if not described.reconciles or footer["stored"][0] != described.num_rows:
            broken.append(f"{entry.path}: the counts do not add up: {described}, {footer['stored'][0]} rows")
    return broken
