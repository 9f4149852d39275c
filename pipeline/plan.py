"""What a run has to do: the source as it is now against the dataset as it was committed.

An anti-join between a listing and the log's partition values. A shard whose fingerprint, recipe and layout the log names is
left alone; one that a finished partition waits for is adopted; the rest is extracted; what the source no longer has is
removed. Nothing is opened but the footers of partitions to adopt, and nothing is changed.
"""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from pipeline.dataset import partition
from pipeline.dataset.partition import Partition, Target
from pipeline.dataset.table import Entry, Table
from pipeline.errors import StorageError
from pipeline.extract.carry import Task
from pipeline.recipe import Recipe, differences
from pipeline.source import Shard
from pipeline.storage import FileStat, join

logger = logging.getLogger(__name__)

ADOPT_WITHIN = datetime.timedelta(days=3)
"""Finished partitions that no version names are taken over while they are younger; `vacuum` removes them at 7 days."""


@dataclass(slots=True, kw_only=True)
class Plan:
    """Shards by what happens to them. The driver's memory while planning, with table and listing: up to 5 kB a shard, 8 kB
    for one to adopt; while everything is committed anew: 12 kB (tests/benchmarks/planning.py)."""

    extract: list[Task] = field(default_factory=list)
    adopt: list[Partition] = field(default_factory=list)
    """Finished by a run that did not commit."""
    unchanged: list[Entry] = field(default_factory=list)
    replaced: list[Entry] = field(default_factory=list)
    """Committed partitions of shards that are extracted or adopted anew."""
    removed: list[Entry] = field(default_factory=list)
    """Committed partitions of shards that the source no longer has."""
    reasons: list[str] = field(default_factory=list)
    """Why everything is done anew: the fields in which recipe or layout differ."""
    num_new: int = 0
    """Of the shards to extract or adopt, those that the dataset does not have yet."""

    @property
    def rewrites(self) -> bool:
        """Whether recipe or layout changed: then no committed partition stays, and a commit needs every shard."""
        return bool(self.reasons)

    @property
    def num_shards(self) -> int:
        """Shards of the source."""
        return len(self.extract) + len(self.adopt) + len(self.unchanged)

    @property
    def num_bytes(self) -> int:
        """Encoded bytes to read."""
        return sum(task.shard.num_bytes for task in self.extract)

    @property
    def does_nothing(self) -> bool:
        """Whether the dataset already is what is wanted."""
        return not (self.extract or self.adopt or self.removed)

    def carry_over_from(self, recipe: Recipe) -> dict[str, int]:
        """Partitions that this plan removes, path to rows: samples that moved to other shards are found there again."""
        return {entry.path: entry.num_rows for entry in self.removed if entry.recipe_id == recipe.recipe_id}

    @property
    def removed_share(self) -> float:
        """Share of the dataset's rows whose shards are gone."""
        before = sum(entry.num_rows for entry in [*self.unchanged, *self.replaced, *self.removed])
        return sum(entry.num_rows for entry in self.removed) / before if before else 0.0


def make(shards: Iterable[Shard], table: Table | None, target: Target, *, retry_quarantined: bool = False) -> Plan:
    """Compare the source's shards with a version of the dataset (None: there is none yet).

    Args:
        shards: the source's listing; a shard that is listed twice counts once.
        table: the version.
        target: what the dataset shall be.
        retry_quarantined: extract unchanged shards again that have samples in quarantine. Their rows are carried over, so that
            only those samples are tried.
    """
    plan, recipe, layout = Plan(), target.recipe, target.layout
    if table is not None:
        plan.reasons += [f"recipe: {each}" for each in differences(table.recipe_fields, recipe.fields)]
        plan.reasons += [f"layout: {each}" for each in differences(table.layout_fields, layout.fields)]
    committed = {entry.shard: entry for entry in table.entries} if table is not None else {}
    wanted: dict[str, Shard] = {}
    to_beat: dict[str, int] = {}
    seen: set[str] = set()
    for shard in shards:
        if shard.url in seen:
            continue
        seen.add(shard.url)
        entry = committed.pop(shard.url, None)
        want = (shard.fingerprint, recipe.recipe_id, layout.layout_id)
        if entry is not None and (entry.fingerprint, entry.recipe_id, entry.layout_id) == want:
            if not (retry_quarantined and entry.num_quarantined):
                plan.unchanged.append(entry)
                continue
            to_beat[shard.url] = entry.num_quarantined
        if entry is None:
            plan.num_new += 1
        else:
            plan.replaced.append(entry)
        wanted[target.identity(shard.url, shard.fingerprint)] = shard
    plan.removed = list(committed.values())
    if wanted:
        plan.adopt = list(_adoptable(wanted, target, to_beat))
    adopted = {each.shard for each in plan.adopt}
    previous = {entry.shard: entry.path for entry in plan.replaced if entry.recipe_id == recipe.recipe_id}
    plan.extract = [
        Task(shard=shard, previous=previous.get(shard.url)) for shard in wanted.values() if shard.url not in adopted
    ]
    return plan


def _adoptable(wanted: dict[str, Shard], target: Target, to_beat: dict[str, int]) -> Iterator[Partition]:
    """Finished partitions of the wanted work, one for each shard: a name that fits, young enough, and a footer that agrees.

    Where the committed partition is of the same work, one that has fewer samples in quarantine than it: `to_beat`, by shard.
    """
    oldest = time.time() - ADOPT_WITHIN.total_seconds()
    listing = target.store.list(join(target.url, partition.DATA_FOLDER), missing_ok=True)
    files = [file for file in listing if partition.identity_of(file.url) in wanted and file.modified > oldest]

    def read(file: FileStat) -> Partition | None:
        path = f"{partition.DATA_FOLDER}/{file.url.rpartition('/')[2]}"
        try:
            return partition.partition_of(path, file.num_bytes, partition.read_footer(target.store, file))
        except (StorageError, KeyError) as error:
            logger.warning("%s is left alone: %s", path, error)
            return None

    found: set[str] = set()
    with ThreadPoolExecutor(16) as threads:
        for candidate in threads.map(read, files):
            name = partition.identity_of(candidate.path) if candidate is not None else None
            if candidate is None or name is None or name in found:
                continue
            shard = wanted[name]
            if candidate.num_quarantined >= to_beat.get(shard.url, candidate.num_quarantined + 1):
                continue
            if candidate.shard == shard.url and candidate.fingerprint == shard.fingerprint and candidate.reconciles:
                found.add(name)
                yield candidate
