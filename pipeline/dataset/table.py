"""The Delta table: which partitions make up which version. Its log is the manifest; there is no other state.

Every partition is one add action, whose partition values say what it was made from and by. Recipe and layout travel whole
in the schema's metadata, so they change in the same commit as the files. Each commit is made on the version that was planned
from and is never retried blindly: what lost a race looks first, and plans again.
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable, Schema
from deltalake.exceptions import DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, CommitProperties, RemoveAction, Transaction, create_table_with_add_actions

from pipeline.dataset.partition import DATA_FOLDER, Partition, Target, identity_of
from pipeline.errors import MAX_NAMES, CommitConflict, ConfigError, DatasetError, StorageError, StorageRefused, nearby
from pipeline.recipe import FORMAT_VERSION, Recipe, canonical
from pipeline.storage import FileStat, Store, join

LOG_FOLDER = "_delta_log"
PARTITION_COLUMNS = ("_shard", "_fingerprint", "_recipe", "_layout", "_quarantined")
"""Delta partition values of every file: what it was made from, what by, and how many samples it could not embed."""
CONFIGURATION = {
    # Old versions open for a year; Delta's own default forgets them after 30 days.
    "delta.logRetentionDuration": "interval 365 days",
}
KEEP_VERSIONS = 10
KEEP_YOUNGER = datetime.timedelta(days=7)
"""What `vacuum` spares unless told otherwise. A run names its partitions only when it commits, and adopts those of 3 days."""

_OURS = re.compile(r"(\.parquet|\.quarantine\.json)(\.[0-9a-f]{32}\.tmp)?$")
"""Ends of the names in the data folder: a partition, its quarantine, and either of them while it is written locally."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One partition as the log names it."""

    path: str
    num_bytes: int
    num_rows: int
    shard: str
    fingerprint: str
    recipe_id: str
    layout_id: str
    num_quarantined: int

    @property
    def values(self) -> dict[str, str | None]:
        """Its Delta partition values."""
        return _values(self.shard, self.fingerprint, self.recipe_id, self.layout_id, self.num_quarantined)


class Table:
    """One version of a dataset."""

    def __init__(self, store: Store, url: str, delta: DeltaTable) -> None:
        self.store, self.url, self._delta = store, url, delta
        self.version: int = delta.version()

    @classmethod
    def open(cls, store: Store, url: str, version: int | None = None) -> Table | None:
        """The newest version or the one asked for; None where nothing was committed yet.

        Raises:
            DatasetError: no such version, not a table of this program, or one of a newer format.
            StorageError: the store refused.
        """
        if version is not None and version < 0:
            raise DatasetError(f"{url}: there is no version {version}; the first one is 0")
        location = store.absolute(url)
        if os.path.isfile(store.local_path(location) or ""):
            raise DatasetError(f"{url}: is a file; a dataset is a folder, which `pipeline run` makes")
        try:
            delta = DeltaTable(location, version=version, storage_options=store.delta_options(location))
        except TableNotFoundError:
            return None
        except (DeltaError, OSError) as error:
            if version is not None and "version" in str(error).lower():
                newest = cls.open(store, url)
                which = f"; the newest is {newest.version}" if newest is not None else ""
                raise DatasetError(f"{url}: there is no version {version}{which}") from None
            raise _storage_error(store, url, error) from None
        table = cls(store, url, delta)
        found = table.layout_fields.get("format_version") if table.is_ours else None
        if found is None:
            raise DatasetError(f"{url}: a Delta table that this program did not write; name another folder")
        if found > FORMAT_VERSION:
            raise DatasetError(
                f"{url}: has format version {found}, this program reads up to {FORMAT_VERSION}; install a newer frozen-pipeline"
            )
        return table

    @property
    def is_ours(self) -> bool:
        """Whether the columns are those of a dataset of embeddings."""
        return set(PARTITION_COLUMNS) <= {field.name for field in self._delta.schema().fields}

    @cached_property
    def schema(self) -> pa.Schema:
        """Columns of the partitions, with the widths of embedding columns in their metadata."""
        fields = pa.schema(self._delta.schema().to_arrow())
        return pa.schema([field for field in fields if field.name not in PARTITION_COLUMNS])

    @cached_property
    def recipe(self) -> Recipe:
        """What the embeddings of this version were made by."""
        return Recipe(fields=self.recipe_fields, widths=self.widths)

    @cached_property
    def recipe_fields(self) -> dict[str, Any]:
        """The recipe of this version."""
        return self._metadata("_recipe")

    @cached_property
    def layout_fields(self) -> dict[str, Any]:
        """The layout of this version."""
        return self._metadata("_layout")

    @property
    def widths(self) -> dict[str, int]:
        """Embedding column to number of values, in the order of the columns."""
        return {f.name: int(f.metadata[b"width"]) for f in self.schema if f.metadata and b"width" in f.metadata}

    def _metadata(self, column: str) -> dict[str, Any]:
        for field in self._delta.schema().fields:
            if field.name == column:
                return dict(json.loads(field.metadata.get("content", "{}")))
        return {}

    @cached_property
    def entries(self) -> list[Entry]:
        """The partitions of this version."""
        actions = pa.table(self._delta.get_add_actions(flatten=True))
        columns = ["path", "size_bytes", "num_records", *(f"partition.{name}" for name in PARTITION_COLUMNS)]
        rows = zip(*(actions.column(name).to_pylist() for name in columns), strict=True)
        return [
            Entry(
                path=path, num_bytes=size, num_rows=records, shard=shard, fingerprint=fingerprint, recipe_id=recipe,
                layout_id=layout, num_quarantined=int(quarantined),
            )
            for path, size, records, shard, fingerprint, recipe, layout, quarantined in rows
        ]  # fmt: skip

    @property
    def num_rows(self) -> int:
        """Rows of this version."""
        return sum(entry.num_rows for entry in self.entries)

    def history(self, limit: int | None = None) -> list[dict[str, Any]]:
        """Commits, newest first: `version`, `timestamp` in ms, and as text `run_id`, `num_rows`, `num_added`, `num_removed`.

        The last three (rows of the version, partitions added and removed) are missing where another program committed.
        deltalake holds the GIL while it waits for the store: not for a process that serves that store too.
        """
        return [dict(commit) for commit in self._delta.history(limit)]

    def has_commit_of(self, run_id: str) -> bool:
        """Whether the commit of that run is part of this version's history."""
        return self._delta.transaction_version(run_id) is not None

    def commit(self, target: Target, run_id: str, add: Sequence[Partition], remove: Sequence[Entry]) -> int:
        """One atomic commit on top of this version; the new version.

        A changed schema, recipe or layout replaces the whole content together with the schema.

        Raises:
            CommitConflict: somebody else committed since this version was read; nothing of this was written.
        """
        replaces = target.recipe.fields != self.recipe_fields or target.layout.fields != self.layout_fields
        now = _now_ms()
        actions: list[AddAction | RemoveAction] = [_add(partition) for partition in add]
        if not replaces:
            actions += [
                RemoveAction(entry.path, True, now, size=entry.num_bytes, partition_values=entry.values) for entry in remove
            ]
        removed = self.entries if replaces else remove
        try:
            self._delta.create_write_transaction(
                actions,
                mode="overwrite" if replaces else "append",
                schema=_delta_schema(target) if replaces else self._delta.schema(),
                partition_by=list(PARTITION_COLUMNS),
                commit_properties=_properties(run_id, target.recipe, add, removed, self.num_rows),
            )
        except (DeltaError, OSError) as error:
            return _landed(self.store, self.url, run_id, self.version, error)
        return self.version + 1  # without retries it can be no other


def missing(store: Store, url: str) -> DatasetError:
    """The error for a place where nothing was committed, with the dataset that may be meant: a local one around it or in it."""
    path, near = store.local_path(store.absolute(url)), []
    if path is not None:
        folder = Path(path)
        around = (*folder.parents[:3], *itertools.islice(folder.glob("*"), MAX_NAMES))
        near = sorted(each for each in around if (each / LOG_FOLDER).is_dir() and (each / DATA_FOLDER).is_dir())
    hint = f"did you mean {', '.join(map(str, near[:3]))}?" if near else nearby(url)
    return DatasetError(f"{url}: there is no dataset yet; `pipeline run` makes one" + (f"; {hint}" if hint else ""))


def create(target: Target, run_id: str, add: Sequence[Partition]) -> int:
    """Make the table with its first version, in one commit; that version.

    Raises:
        CommitConflict: somebody else made it first.
    """
    location = target.store.absolute(target.url)
    try:
        create_table_with_add_actions(
            location,
            _delta_schema(target),
            [_add(partition) for partition in add],
            mode="error",
            partition_by=list(PARTITION_COLUMNS),
            configuration=CONFIGURATION,
            storage_options=target.store.delta_options(location),
            commit_properties=_properties(run_id, target.recipe, add),
        )
    except (DeltaError, OSError) as error:
        return _landed(target.store, target.url, run_id, -1, error)
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Vacuumed:
    """What `vacuum` removed, or would remove."""

    kept_versions: list[int]
    files: list[FileStat]

    @property
    def num_bytes(self) -> int:
        """Size of the files."""
        return sum(file.num_bytes for file in self.files)


def vacuum(
    store: Store,
    url: str,
    *,
    keep_versions: int = KEEP_VERSIONS,
    keep_younger: datetime.timedelta = KEEP_YOUNGER,
    dry_run: bool = False,
) -> Vacuumed:
    """Remove the partitions that none of the newest versions names, their quarantine, and what killed writers left behind.

    Only files of this program in the data folder are removed, and none that is younger than `keep_younger` or whose age the
    store does not tell. Older versions stay in the log; reading one says that it was vacuumed. deltalake's own vacuum removes
    the quarantine files of partitions that are kept, and commits two versions that a run in progress would conflict with.

    Raises:
        ConfigError: no version, or a negative age, is to be kept.
        DatasetError: there is no dataset, or a version to keep cannot be read; nothing was removed.
    """
    if keep_versions < 1:
        raise ConfigError(f"keep-versions: {keep_versions} is not allowed; at least 1")
    if keep_younger < datetime.timedelta(0):
        raise ConfigError(f"older-than: {keep_younger.total_seconds() / 86400:g} days is not allowed; at least 0")
    newest = time.time() - keep_younger.total_seconds()
    # Listed before the log is read: what is committed in between is then named.
    listing = store.list(join(url, DATA_FOLDER), missing_ok=True)
    old = {_relative(store, url, file): file for file in listing if 0 < file.modified < newest}
    kept = _versions(store, url)[-keep_versions:]
    named: set[str] = set()
    for version in kept:
        table = Table.open(store, url, version)
        assert table is not None, "the log names this version"
        named |= {entry.path for entry in table.entries}
    if not kept:
        raise missing(store, url)
    files = [file for path, file in sorted(old.items()) if _is_waste(path, named)]
    if not dry_run:
        with ThreadPoolExecutor(16) as threads:
            for _ in threads.map(lambda file: store.delete(file.url), files):
                pass
    return Vacuumed(kept_versions=kept, files=files)


def _is_waste(path: str, named: set[str]) -> bool:
    """Whether a file belongs to a partition that is not named, or was never finished."""
    end = _OURS.search(path)
    if end is None:
        return False
    owner = path[: end.start()] + ".parquet"
    return identity_of(owner) is not None and (end[2] is not None or owner not in named)


def _versions(store: Store, url: str) -> list[int]:
    """Versions that the log has, oldest first."""
    names = [file.url.rpartition("/")[2] for file in store.list(join(url, LOG_FOLDER), missing_ok=True)]
    return sorted(int(name[:20]) for name in names if re.fullmatch(r"\d{20}\.json", name))


def _relative(store: Store, url: str, file: FileStat) -> str:
    """Path of a file as the log would name it."""
    return file.url.removeprefix(join(store.absolute(url), ""))


def _landed(store: Store, url: str, run_id: str, planned: int, error: Exception) -> int:
    """A commit that raised may have landed, its answer lost on the way: look before deciding.

    Args:
        planned: the version that was planned from; -1 where there was none.

    Returns:
        The version that this run's commit made.
    """
    newest = Table.open(store, url)
    if newest is not None and newest.has_commit_of(run_id):
        for version in range(planned + 1, newest.version):
            earlier = Table.open(store, url, version)
            if earlier is not None and earlier.has_commit_of(run_id):
                return version
        return newest.version
    raise CommitConflict(f"{url}: {store.redact(str(error))}") from None


_REFUSED = re.compile(r"privileges|SignatureDoesNotMatch|InvalidAccessKeyId|AccessDenied|NoSuchBucket|40[134] ", re.IGNORECASE)
"""deltalake tells a refusal from a failure only in its text."""


def _storage_error(store: Store, url: str, error: Exception) -> StorageError:
    text = " ".join(store.redact(str(error)).split())
    answer = re.search(r"<Message>([^<]+)", text)  # the one sentence in a page of causes that is meant for people
    return (StorageRefused if _REFUSED.search(text) else StorageError)(f"{url}: {answer[1] if answer else text[:500]}")


def _add(partition: Partition) -> AddAction:
    return AddAction(
        path=partition.path,
        size=partition.num_bytes,
        partition_values=_values(
            partition.shard, partition.fingerprint, partition.recipe_id, partition.layout_id, partition.num_quarantined
        ),
        modification_time=_now_ms(),
        data_change=True,
        stats=json.dumps({"numRecords": partition.num_rows}),
    )


def _values(shard: str, fingerprint: str, recipe_id: str, layout_id: str, num_quarantined: int) -> dict[str, str | None]:
    return dict(zip(PARTITION_COLUMNS, (shard, fingerprint, recipe_id, layout_id, str(num_quarantined)), strict=True))


def _delta_schema(target: Target) -> Schema:
    content: Mapping[str, Mapping[str, Any]] = {"_recipe": target.recipe.fields, "_layout": target.layout.fields}
    manifest = [
        pa.field(name, pa.string(), metadata={"content": canonical(content[name])} if name in content else None)
        for name in PARTITION_COLUMNS
    ]
    return Schema.from_arrow(pa.schema([*target.schema, *manifest]))


def _properties(
    run_id: str, recipe: Recipe, add: Sequence[Partition], remove: Sequence[Entry] = (), num_rows_before: int = 0
) -> CommitProperties:
    num_rows = num_rows_before + sum(each.num_rows for each in add) - sum(each.num_rows for each in remove)
    return CommitProperties(
        # What the history shows of a commit, so that showing it opens no other version.
        custom_metadata={
            "run_id": run_id,
            "recipe_id": recipe.recipe_id,
            "num_rows": str(num_rows),
            "num_added": str(len(add)),
            "num_removed": str(len(remove)),
        },
        # No retry: the handle saw the version that was planned from, and that is what the commit has to follow.
        max_commit_retries=0,
        # How a commit whose answer was lost is found again.
        app_transactions=[Transaction(run_id, 1)],
    )


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
