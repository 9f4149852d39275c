"""The Delta table: which partitions make up which version. Its log is the manifest; there is no other state.

Every partition is one add action, whose partition values say what it was made from and by. Recipe and layout travel whole
in the schema's metadata, so they change in the same commit as the files. Each commit is made on the version that was planned
from and is never retried blindly: what lost a race looks first, and plans again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable, Schema
from deltalake.exceptions import DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, CommitProperties, RemoveAction, create_table_with_add_actions

from pipeline.dataset.partition import Partition
from pipeline.errors import CommitConflict, DatasetError, StorageError
from pipeline.recipe import FORMAT_VERSION, Layout, Recipe, canonical
from pipeline.storage import Store

PARTITION_COLUMNS = ("_shard", "_fingerprint", "_recipe", "_layout", "_quarantined")
"""Delta partition values of every file: what it was made from, what by, and how many samples it could not embed."""
CONFIGURATION = {
    # Old versions open for a year; Delta's own default forgets them after 30 days.
    "delta.logRetentionDuration": "interval 365 days",
}


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
        location = store.absolute(url)
        try:
            delta = DeltaTable(location, version=version, storage_options=store.delta_options(location))
        except TableNotFoundError:
            return None
        except (DeltaError, OSError) as error:
            if version is not None and "version" in str(error).lower():
                raise DatasetError(f"{url}: there is no version {version}") from None
            raise StorageError(f"{url}: {store.redact(str(error))}") from None
        table = cls(store, url, delta)
        found = table.layout_fields.get("format_version") if table.is_ours else None
        if found is None:
            raise DatasetError(f"{url}: a Delta table that this program did not write")
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
        """Commits, newest first: `version`, `timestamp` in ms, `run_id`, and what the commit did."""
        return [dict(commit) for commit in self._delta.history(limit)]

    def commit(
        self, run_id: str, add: Sequence[Partition], remove: Sequence[Entry], recipe: Recipe, layout: Layout, schema: pa.Schema
    ) -> int:
        """One atomic commit on top of this version; the new version.

        A changed schema, recipe or layout replaces the whole content together with the schema.

        Raises:
            CommitConflict: somebody else committed since this version was read; nothing of this was written.
        """
        replaces = recipe.fields != self.recipe_fields or layout.fields != self.layout_fields
        now = _now_ms()
        actions: list[AddAction | RemoveAction] = [_add(partition) for partition in add]
        if not replaces:
            actions += [
                RemoveAction(entry.path, True, now, size=entry.num_bytes, partition_values=entry.values) for entry in remove
            ]
        paths = {partition.path for partition in add}
        try:
            self._delta.create_write_transaction(
                actions,
                mode="overwrite" if replaces else "append",
                schema=_delta_schema(schema, recipe, layout) if replaces else self._delta.schema(),
                partition_by=list(PARTITION_COLUMNS),
                # No retry: this handle saw the version that was planned from, and that is what the commit has to follow.
                commit_properties=CommitProperties(custom_metadata=_commit_info(run_id, recipe), max_commit_retries=0),
            )
        except (DeltaError, OSError) as error:
            return _landed(self.store, self.url, run_id, paths, error)
        return self._delta.version()


def create(
    store: Store, url: str, run_id: str, add: Sequence[Partition], recipe: Recipe, layout: Layout, schema: pa.Schema
) -> int:
    """Make the table with its first version, in one commit; that version.

    Raises:
        CommitConflict: somebody else made it first.
    """
    location = store.absolute(url)
    try:
        create_table_with_add_actions(
            location,
            _delta_schema(schema, recipe, layout),
            [_add(partition) for partition in add],
            mode="error",
            partition_by=list(PARTITION_COLUMNS),
            configuration=CONFIGURATION,
            storage_options=store.delta_options(location),
            commit_properties=CommitProperties(custom_metadata=_commit_info(run_id, recipe), max_commit_retries=0),
        )
    except (DeltaError, OSError) as error:
        return _landed(store, url, run_id, {partition.path for partition in add}, error)
    return 0


def _landed(store: Store, url: str, run_id: str, paths: set[str], error: Exception) -> int:
    """A commit that raised may have landed, its answer lost on the way: look before deciding."""
    table = Table.open(store, url)
    if table is not None:
        for commit in table.history(20):
            if commit.get("run_id") == run_id and paths <= {entry.path for entry in table.entries}:
                return int(commit["version"])
    raise CommitConflict(f"{url}: {store.redact(str(error))}") from None


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


def _delta_schema(schema: pa.Schema, recipe: Recipe, layout: Layout) -> Schema:
    content: Mapping[str, Mapping[str, Any]] = {"_recipe": recipe.fields, "_layout": layout.fields}
    manifest = [
        pa.field(name, pa.string(), metadata={"content": canonical(content[name])} if name in content else None)
        for name in PARTITION_COLUMNS
    ]
    return Schema.from_arrow(pa.schema([*schema, *manifest]))


def _commit_info(run_id: str, recipe: Recipe) -> dict[str, str]:
    return {"run_id": run_id, "recipe_id": recipe.recipe_id}


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
