"""Rows back as arrays: one version of a dataset, whole or in batches.

Embeddings come out of the Arrow buffers without a step in Python for a row.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.config import Storage
from pipeline.dataset import partition
from pipeline.dataset.partition import Quarantined
from pipeline.dataset.table import Entry, Table
from pipeline.errors import DatasetError, nearest
from pipeline.storage import Store, join

if TYPE_CHECKING:
    import torch


def open_dataset(url: str, version: int | None = None, storage: Storage | None = None) -> Dataset:
    """Open the newest committed version of a dataset, or the one asked for.

    Raises:
        DatasetError: there is no dataset, or no such version, or its format is newer than this program.
    """
    table = Table.open(Store(storage), url, version)
    if table is None:
        raise DatasetError(f"{url}: there is no dataset yet; `pipeline run` makes one")
    return Dataset(table)


class Dataset:
    """One committed version. Later commits do not change it."""

    def __init__(self, table: Table) -> None:
        self.table_ = table
        self.url = table.url

    @property
    def version(self) -> int:
        """Number of the version."""
        return self.table_.version

    @property
    def recipe(self) -> dict[str, Any]:
        """All that determined the embeddings."""
        return self.table_.recipe_fields

    @property
    def schema(self) -> pa.Schema:
        """Columns; an embedding column has its `width` in the field's metadata."""
        return self.table_.schema

    @property
    def nodes(self) -> dict[str, int]:
        """Embedding columns and their widths."""
        return self.table_.widths

    def __len__(self) -> int:
        return self.table_.num_rows

    def __repr__(self) -> str:
        nodes = ", ".join(f"{name}[{width}]" for name, width in self.nodes.items())
        return f"<Dataset {self.url} version {self.version}: {len(self):,} rows, {nodes}>"

    def _repr_html_(self) -> str:
        return f"<code>{html.escape(repr(self))}</code>"

    def files(self) -> list[str]:
        """URLs of the partitions: for every reader that does not know Delta."""
        return [join(self.url, entry.path) for entry in self._entries()]

    def keys(self) -> list[str]:
        """The key of every row."""
        return [str(key) for key in self.table(["key"]).column("key").to_pylist()]

    def to_numpy(self, node: str | None = None) -> NDArray[np.float32]:
        """One embedding column as a contiguous (N, D) float32 array, in the order of `table()`."""
        name = self._node(node)
        embeddings_ND = np.empty((len(self), self.nodes[name]), np.float32)
        start = 0
        for table in self._partitions([name]):
            stop = start + table.num_rows
            if table.num_rows:
                embeddings_ND[start:stop] = partition.list_values(table.column(name))
            start = stop
        return embeddings_ND

    def to_torch(self, node: str | None = None) -> torch.Tensor:
        """One embedding column as a (N, D) float32 tensor that may be trained on."""
        import torch

        return torch.from_numpy(self.to_numpy(node))

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows as an Arrow table; all columns, or those named."""
        names = list(columns) if columns is not None else self.schema.names
        for name in names:
            if name not in self.schema.names:
                hint = nearest(name, self.schema.names)
                raise DatasetError(
                    f"{self.url}: there is no column {name!r}; {hint or 'it has ' + ', '.join(self.schema.names)}"
                )
        schema = pa.schema([self.schema.field(name).remove_metadata() for name in names])
        return pa.concat_tables([table.cast(schema) for table in self._partitions(names)] or [schema.empty_table()])

    def iter_batches(self, columns: Sequence[str] | None = None, batch_size: int = 4096) -> Iterator[pa.RecordBatch]:
        """The rows in record batches of at most `batch_size`; memory is bounded by one row group."""
        names = list(columns) if columns is not None else self.schema.names
        for entry in self._entries():
            with self._open(entry) as file:
                yield from pq.ParquetFile(file).iter_batches(batch_size, columns=names)

    def quarantine(self) -> list[Quarantined]:
        """What could not be embedded, of the partitions of this version."""
        rows: list[Quarantined] = []
        for entry in self._entries():
            if entry.num_quarantined:
                store = self.table_.store
                footer = partition.read_footer(store, store.stat(join(self.url, entry.path)))
                rows += partition.read_quarantine(store, self.url, footer)
        return rows

    def _node(self, node: str | None) -> str:
        name = node or next(iter(self.nodes))
        if name not in self.nodes:
            raise DatasetError(f"{self.url}: there is no embedding column {name!r}; it has {', '.join(self.nodes)}")
        return name

    def _entries(self) -> list[Entry]:
        """Partitions in a stable order, so that separate reads of columns line up."""
        return sorted(self.table_.entries, key=lambda entry: (entry.shard, entry.path))

    def _partitions(self, names: list[str]) -> Iterator[pa.Table]:
        for entry in self._entries():
            with self._open(entry) as file:
                yield pq.read_table(file, columns=names)

    def _open(self, entry: Entry) -> Any:
        store = self.table_.store
        return store.open(store.stat(join(self.url, entry.path)))
