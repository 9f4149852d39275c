"""Rows back as arrays: one version of a dataset, whole or in batches.

Embeddings come out of the Arrow buffers without a step in Python for a row.
"""

from __future__ import annotations

import contextlib
import hashlib
import html
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.config import Storage
from pipeline.dataset import partition
from pipeline.dataset.partition import Quarantined
from pipeline.dataset.table import Entry, Table
from pipeline.errors import DatasetError, StorageError, StorageRefused, nearest
from pipeline.storage import Store, join

if TYPE_CHECKING:
    import torch


PLACE_COLUMNS = ("key", "shard", "index", "url", "offset", "nbytes", "content_hash")
"""What leads from a row back to the encoded image."""


def open_dataset(
    url: str, version: int | None = None, storage: Storage | None = None, source_storage: Storage | None = None
) -> Dataset:
    """Open the newest committed version of a dataset, or the one asked for.

    Args:
        url: folder or URL of the dataset.
        version: number of a version; the newest when left out.
        storage: how to reach the dataset.
        source_storage: how to reach the images that it was made from; like the dataset when left out.

    Raises:
        DatasetError: there is no dataset, or no such version, or its format is newer than this program.
    """
    table = Table.open(Store(storage), url, version)
    if table is None:
        raise DatasetError(f"{url}: there is no dataset yet; `pipeline run` makes one")
    return Dataset(table, Store(source_storage) if source_storage is not None else None)


class Dataset:
    """One committed version. Later commits do not change it; once `vacuum` removed its files, reading it is a DatasetError."""

    def __init__(self, table: Table, source: Store | None = None) -> None:
        self.table_ = table
        self.url = table.url
        self._source = source or table.store

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
        return [join(self.url, entry.path) for entry in self.entries()]

    def keys(self) -> list[str]:
        """The key of every row."""
        return [str(key) for key in self.table(["key"]).column("key").to_pylist()]

    def to_numpy(self, node: str | None = None, rows: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """One embedding column as a contiguous (N, D) float32 array, in the order of `table()`.

        Args:
            node: name of the column; the first one when left out.
            rows: positions of the rows wanted, ascending; all when left out.
        """
        name = self._node(node)
        embeddings_ND = np.empty((len(self) if rows is None else len(rows), self.nodes[name]), np.float32)
        first = start = 0
        for entry in self.entries():
            wanted = slice(None) if rows is None else rows[start : np.searchsorted(rows, first + entry.num_rows)] - first
            if entry.num_rows and (isinstance(wanted, slice) or len(wanted)):
                values_ND = partition.list_values(self.read(entry, [name]).column(name))[wanted]
                embeddings_ND[start : start + len(values_ND)] = values_ND
                start += len(values_ND)
            first += entry.num_rows
        return embeddings_ND

    def to_torch(self, node: str | None = None) -> torch.Tensor:
        """One embedding column as a (N, D) float32 tensor that may be trained on."""
        import torch

        return torch.from_numpy(self.to_numpy(node))

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows as an Arrow table; all columns, or those named."""
        names = self._names(columns)
        schema = pa.schema([self.schema.field(name).remove_metadata() for name in names])
        return pa.concat_tables([table.cast(schema) for table in self._partitions(names)] or [schema.empty_table()])

    def iter_batches(self, columns: Sequence[str] | None = None, batch_size: int = 4096) -> Iterator[pa.RecordBatch]:
        """The rows of `table()` in record batches of at most `batch_size`; memory is bounded by one row group."""
        names = self._names(columns)
        for entry in self.entries():
            with self._open(entry) as file:
                for batch in pq.ParquetFile(file).iter_batches(batch_size, columns=names):
                    yield batch.select(names)

    def entries(self) -> list[Entry]:
        """Partitions in a stable order, so that separate reads of columns line up."""
        return sorted(self.table_.entries, key=lambda entry: (entry.shard, entry.path))

    def read(self, entry: Entry, columns: Sequence[str]) -> pa.Table:
        """The rows of one partition."""
        with self._open(entry) as file:
            return pq.read_table(file, columns=list(columns))

    def quarantine(self) -> list[Quarantined]:
        """What could not be embedded, of the partitions of this version."""
        rows: list[Quarantined] = []
        for entry in self.entries():
            if entry.num_quarantined:
                store = self.table_.store
                with self._present(entry) as url:
                    footer = partition.read_footer(store, store.stat(url))
                    rows += partition.read_quarantine(store, self.url, footer)
        return rows

    def image(self, key: str, shard: str | None = None) -> bytes:
        """The encoded image of one sample, as the source has it: one ranged read, or one row group of a Parquet source.

        Args:
            key: the sample's key.
            shard: URL of its shard; needed where several shards have that key.

        Raises:
            DatasetError: no such sample, or several; its image is not what was embedded, or cannot be read by itself.
            StorageError: the source cannot be read.
        """
        row = self._find(key, shard)
        if row["offset"] is not None:
            image = _range(self._source, row)
        elif self.table_.layout_fields["format"] == "parquet":
            image = _cell(self._source, row)
        else:
            raise DatasetError(f"{row['url']}: the image of {key!r} lies in a compressed archive and cannot be read by itself")
        if image is None or _content_hash(image) != row["content_hash"]:
            raise DatasetError(f"{row['url']}: the source has changed since version {self.version}: {key!r} has another image")
        return image

    def _find(self, key: str, shard: str | None) -> dict[str, Any]:
        """`PLACE_COLUMNS` of one row."""
        entries = [entry for entry in self.entries() if shard in (None, entry.shard)]
        if not entries and shard is not None:
            hint = nearest(shard, {entry.shard for entry in self.entries()})
            raise DatasetError(f"{self.url}: version {self.version} has no shard {shard!r}; {hint or 'see its column shard'}")
        with ThreadPoolExecutor(16) as threads:
            rows = [row for found in threads.map(lambda entry: self._rows_of(entry, key), entries) for row in found]
        if not rows:
            raise DatasetError(f"{self.url}: version {self.version} has no key {key!r}" + (f" in {shard}" if shard else ""))
        if len(rows) > 1:
            shards = ", ".join(row["shard"] for row in rows[:5]) + (", …" if len(rows) > 5 else "")
            raise DatasetError(f"{self.url}: {len(rows)} shards have a key {key!r}: say which one by shard=: {shards}")
        return rows[0]

    def _rows_of(self, entry: Entry, key: str) -> list[dict[str, Any]]:
        """`PLACE_COLUMNS` of the rows with this key in one partition; row groups without it are known by their statistics."""
        with self._present(entry) as url:
            file = pq.ParquetFile(_Ranges(self.table_.store, url, entry.num_bytes), pre_buffer=True)
            column = file.schema_arrow.get_field_index("key")
            groups = []
            for group in range(file.num_row_groups):
                statistics = file.metadata.row_group(group).column(column).statistics
                if statistics is None or not statistics.has_min_max or statistics.min <= key <= statistics.max:
                    groups.append(group)
            rows = file.read_row_groups(groups, columns=list(PLACE_COLUMNS))
            return list(rows.filter(pc.equal(rows.column("key"), key)).to_pylist())

    def _node(self, node: str | None) -> str:
        name = node or next(iter(self.nodes))
        if name not in self.nodes:
            raise DatasetError(f"{self.url}: there is no embedding column {name!r}; it has {', '.join(self.nodes)}")
        return name

    def _names(self, columns: Sequence[str] | None) -> list[str]:
        names = list(columns) if columns is not None else self.schema.names
        for name in names:
            if name not in self.schema.names:
                hint = nearest(name, self.schema.names)
                raise DatasetError(
                    f"{self.url}: there is no column {name!r}; {hint or 'it has ' + ', '.join(self.schema.names)}"
                )
        return names

    def _partitions(self, names: list[str]) -> Iterator[pa.Table]:
        for entry in self.entries():
            yield self.read(entry, names)

    @contextlib.contextmanager
    def _open(self, entry: Entry) -> Iterator[BinaryIO]:
        store = self.table_.store
        with self._present(entry) as url, store.open(store.stat(url)) as file:
            yield file

    @contextlib.contextmanager
    def _present(self, entry: Entry) -> Iterator[str]:
        """The URL of a partition; tells a file that was vacuumed from one that the store has lost."""
        store, url = self.table_.store, join(self.url, entry.path)
        try:
            yield url
        except StorageRefused:
            newest = Table.open(store, self.url)
            if newest is None or any(each.path == entry.path for each in newest.entries) or store.exists(url):
                raise
            raise DatasetError(
                f"{self.url}: version {self.version} was vacuumed: its partition {entry.path} is gone; "
                f"the newest version is {newest.version}"
            ) from None


class _Ranges(io.RawIOBase):
    """A stored file in which every read is one ranged request for just these bytes, where `Store.open` reads ahead."""

    def __init__(self, store: Store, url: str, num_bytes: int) -> None:
        self._store, self._url, self._num_bytes, self._position = store, url, num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self._num_bytes - self._position)
        if count > 0:
            buffer[:count] = self._store.read_range(self._url, self._position, count)
            self._position += count
        return max(count, 0)


def _content_hash(image: bytes) -> str:
    return hashlib.sha256(image).hexdigest()[:32]


def _range(source: Store, row: dict[str, Any]) -> bytes | None:
    """The bytes that a row points at; None where the object has become too short for them."""
    try:
        return source.read_range(row["url"], row["offset"], row["nbytes"])
    except StorageError:
        if source.stat(row["url"]).num_bytes < row["offset"] + row["nbytes"]:
            return None
        raise


def _cell(source: Store, row: dict[str, Any]) -> bytes | None:
    """The value with the row's content hash in row `index` of a Parquet file, in whichever column; None where none has it."""
    with source.open(source.stat(row["url"])) as handle:
        try:
            file = pq.ParquetFile(handle, pre_buffer=False, buffer_size=1 << 20)
            columns = [field.name for field in file.schema_arrow if _may_hold_bytes(field.type)]
            start = row["index"]
            for group in range(file.num_row_groups):
                num_rows = file.metadata.row_group(group).num_rows
                if start < num_rows:
                    break
                start -= num_rows
            else:
                return None
            for batch in file.iter_batches(16, row_groups=[group], columns=columns, use_threads=False):
                if start < batch.num_rows:
                    values = batch.slice(start, 1).to_pylist()[0]
                    return next((each for each in _bytes_in(values) if _content_hash(each) == row["content_hash"]), None)
                start -= batch.num_rows
        except pa.ArrowInvalid:  # no longer a Parquet file
            pass
    return None


def _may_hold_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_struct(kind))


def _bytes_in(value: Any) -> Iterator[bytes]:
    """The bytes in a row or a struct, at any depth."""
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _bytes_in(each)
