"""Rows back as arrays: one version of a dataset, whole, in batches, or the rows nearest to some vectors.

Embeddings come out of the Arrow buffers without a step in Python for a row. How much is in memory at a time: `groups.py`.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from pipeline.ahead import ahead
from pipeline.config import Storage
from pipeline.dataset import notebook, partition
from pipeline.dataset.filter import Filter
from pipeline.dataset.groups import Groups, RowGroup, Values, present
from pipeline.dataset.images import PLACE_COLUMNS as PLACE_COLUMNS
from pipeline.dataset.images import read_image
from pipeline.dataset.partition import Quarantined
from pipeline.dataset.table import Entry, Table, missing
from pipeline.dataset.topk import FEW_ARRAY_BYTES, FEW_QUERIES, Candidates, Metric, TopK, cached_rows, shares
from pipeline.errors import DatasetError, PipelineError, SourceChanged, nearest
from pipeline.storage import FileStat, Store, join

if TYPE_CHECKING:
    import pandas
    import torch

IMAGES_AHEAD = 8
"""Encoded images that are in memory at a time."""
SMALL_AHEAD = 16
"""Results there are at a time where each is a few rows."""


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
        raise missing(Store(storage), url)
    return Dataset(table, Store(source_storage) if source_storage is not None else None)


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The rows nearest to one query, best first."""

    scores: NDArray[np.float32]
    """(K,)"""
    positions: NDArray[np.int64]
    """(K,) where the rows stand in `to_numpy()` and `table()`."""
    rows: pa.Table
    """K rows: every column that is no embedding, or those that were asked for."""

    def __len__(self) -> int:
        return len(self.scores)


class Dataset:
    """One committed version. Later commits do not change it; once `vacuum` removed its files, reading it is a DatasetError."""

    def __init__(self, table: Table, source: Store | None = None) -> None:
        self.table_ = table
        self.url = table.url
        self._source = source or table.store

    @functools.cached_property
    def _groups(self) -> Groups:
        return Groups(self.table_)

    @property
    def version(self) -> int:
        """Number of the version."""
        return self.table_.version

    @property
    def source(self) -> Store:
        """How to reach the images that it was made from."""
        return self._source

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

    @property
    def columns(self) -> list[str]:
        """The columns that are no embeddings."""
        return [name for name in self.schema.names if name not in self.nodes]

    def __len__(self) -> int:
        return self.table_.num_rows

    def __repr__(self) -> str:
        nodes = ", ".join(f"{name}[{width}]" for name, width in self.nodes.items())
        return f"<Dataset {self.url} version {self.version}: {len(self):,} rows, {nodes}>"

    def _repr_html_(self) -> str:
        return notebook.as_html(self)

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
        name = self.node(node)
        embeddings_ND = np.empty((len(self) if rows is None else len(rows), self.nodes[name]), np.float32)

        def copy(group: RowGroup) -> None:
            end = group.start + group.num_rows
            if rows is None:
                group.embeddings(name, embeddings_ND[group.start : end])
                return
            first, last = np.searchsorted(rows, [group.start, end])
            if first < last:
                embeddings_ND[first:last] = group.embeddings(name)[rows[first:last] - group.start]

        for _ in self._groups.map(copy, None if rows is None else self._groups.numbers_of(rows)):
            pass
        return embeddings_ND

    def to_torch(self, node: str | None = None) -> torch.Tensor:
        """One embedding column as a (N, D) float32 tensor that may be trained on."""
        import torch

        return torch.from_numpy(self.to_numpy(node))

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows as an Arrow table; all columns, or those named."""
        schema = self._schema_of(columns)
        groups = self._groups.map(lambda group: group.read(schema.names).cast(schema))
        return pa.concat_tables([schema.empty_table(), *groups])

    def to_pandas(self, columns: Sequence[str] | None = None) -> pandas.DataFrame:
        """The rows as a DataFrame, see `notebook.as_pandas`; all columns that are no embeddings, or those named.

        Raises:
            UserError: pandas is not installed (the extra `notebook` has it), or there is no such column.
        """
        return notebook.as_pandas(self.table(self.columns if columns is None else columns))

    def iter_batches(self, columns: Sequence[str] | None = None, batch_size: int = 4096) -> Iterator[pa.RecordBatch]:
        """The rows of `table()` in record batches of at most `batch_size`, which end where a row group ends."""
        schema = self._schema_of(columns)
        for table in self._groups.map(lambda group: group.read(schema.names).cast(schema)):
            yield from table.to_batches(batch_size)

    def iter_values(self, node: str, columns: Sequence[str]) -> Iterator[tuple[pa.Table, Values]]:
        """Row groups in the order of `table()`: some columns, and an embedding column that is still to be read."""
        schema = self._schema_of(columns)
        return self._groups.map(lambda group: (group.read(schema.names).cast(schema), group.values(node)))

    def entries(self) -> list[Entry]:
        """Partitions in a stable order, so that separate reads of columns line up."""
        return self._groups.entries

    def read(self, entry: Entry, columns: Sequence[str]) -> pa.Table:
        """The rows of one partition."""
        groups = self._groups.map(lambda group: group.read(columns), [self._groups.number_of(entry)])
        return pa.concat_tables(groups)

    def rows(self, entry: Entry, positions: Sequence[int], columns: Sequence[str]) -> pa.Table:
        """Some rows of one partition, by their ascending numbers in it; only their row groups are read, one after the other.

        Raises:
            StorageError: the partition is damaged: a page is not what its checksum says.
        """
        names, found, first = self._schema_of(columns).names, [], 0
        with present(self.table_, entry) as url:
            handle = self.table_.store.open_ranges(url, entry.num_bytes)
            file = pq.ParquetFile(handle, pre_buffer=True, page_checksum_verification=True)
            for group in range(file.num_row_groups):
                end = first + file.metadata.row_group(group).num_rows
                if wanted := [position - first for position in positions if first <= position < end]:
                    found.append(file.read_row_group(group, columns=names).take(wanted))
                first = end
            return pa.concat_tables(found or [file.schema_arrow.empty_table()]).select(names)

    def stat(self, entry: Entry) -> FileStat:
        """The file of one partition as it is now."""
        with present(self.table_, entry) as url:
            return self.table_.store.stat(url)

    def take(self, positions: ArrayLike, columns: Sequence[str] | None = None) -> pa.Table:
        """Single rows, by where they stand in `table()`, in the order asked for. Only their row groups are read.

        Args:
            positions: (M,) integers; a row may come twice.
            columns: all when left out.
        """
        schema = self._schema_of(columns)
        wanted_U, order_M = np.unique(np.asarray(positions, np.int64), return_inverse=True)
        if len(wanted_U) and not 0 <= wanted_U[0] <= wanted_U[-1] < len(self):
            raise DatasetError(f"{self.url}: positions {wanted_U[0]} to {wanted_U[-1]} are not all in 0 to {len(self) - 1}")

        def rows(group: RowGroup) -> pa.Table:
            first, last = np.searchsorted(wanted_U, [group.start, group.start + group.num_rows])
            if first == last:
                return schema.empty_table()
            return group.read(schema.names).cast(schema).take(pa.array(wanted_U[first:last] - group.start))

        found = pa.concat_tables([schema.empty_table(), *self._groups.map(rows, self._groups.numbers_of(wanted_U))])
        return found.take(pa.array(order_M))

    def positions(self, where: pc.Expression) -> NDArray[np.int64]:
        """Positions in `table()`, ascending, of the rows for which an expression over columns that are no embeddings is true.

        Raises:
            DatasetError: no such column, or the version was vacuumed.
        """
        chosen = Filter(where, self._schema_of(self.columns))
        found = self._groups.map(lambda group: group.start + chosen.positions(group.read(chosen.columns)), limit=SMALL_AHEAD)
        return np.concatenate([np.empty(0, np.int64), *found])

    def search(
        self,
        vectors: ArrayLike,
        k: int = 10,
        *,
        node: str | None = None,
        metric: Metric = "cosine",
        where: pc.Expression | None = None,
        columns: Sequence[str] | None = None,
    ) -> list[Neighbours]:
        """The k rows nearest to each vector: exact, in one pass over the embeddings; see `topk.py` for scores and ties.

        Args:
            vectors: (Q, D) numbers.
            k: rows for each vector; fewer where the dataset has no more.
            node: embedding column; the first when left out.
            metric: `cosine` or `inner`.
            where: only rows for which this is true, an expression over the columns that are no embeddings. Embeddings of a row
                group without such a row are not read.
            columns: of the rows that are found; all that are no embeddings when left out. None at all saves reading them.

        Returns:
            Neighbours of each vector, in the order of the vectors.

        Raises:
            ConfigError: vectors, k or metric do not fit.
            DatasetError: no such column, or the version was vacuumed.
        """
        name = self.node(node)
        best = TopK(np.asarray(vectors), k, metric, num_rows=len(self), width=self.nodes[name])
        names = self._schema_of(self.columns if columns is None else columns).names
        chosen = Filter(where, self._schema_of(self.columns)) if where is not None else None
        scratch = threading.local()

        def look(run: Sequence[RowGroup], rows_M: NDArray[np.int64] | None = None) -> Candidates:
            return best.candidates(_Streamed([group.values(name) for group in run], scratch), run[0].start, rows_M)

        def look_at_chosen(group: RowGroup, chosen: Filter) -> Candidates | None:
            rows_M = chosen.positions(group.read(chosen.columns))
            return look([group], rows_M) if len(rows_M) else None

        looked: Iterator[Candidates | None]
        if chosen is not None:
            looked = self._groups.map(functools.partial(look_at_chosen, chosen=chosen))
        elif self._groups.is_local and not self.table_.recipe.rounded and len(best.rows_QK) <= FEW_QUERIES:
            # Row groups are nowhere in memory as a whole, so many can be under way.
            num_threads, step = shares(len(self), self.nodes[name], FEW_ARRAY_BYTES)
            looked = self._groups.map_runs(look, step, num_threads)
        else:
            looked = self._groups.map(lambda group: look([group]))
        for found in looked:
            if found is not None:
                best.merge(found)
        num_found = (best.rows_QK >= 0).sum(axis=1)
        rows = self.take(best.rows_QK[best.rows_QK >= 0] if names else [], names)
        starts = np.cumsum([0, *num_found])
        return [
            Neighbours(best.scores_QK[query, :num], best.rows_QK[query, :num], rows.slice(starts[query], num))
            for query, num in enumerate(num_found.tolist())
        ]

    def find(self, keys: Sequence[str], shard: str | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows with these keys, in the order of the keys. Row groups without them are known by their statistics.

        Args:
            keys: of samples.
            shard: URL of their shard; needed where several shards have such a key.
            columns: all when left out. Embeddings are read only of row groups that have such a key.

        Raises:
            DatasetError: no such sample, or several.
        """
        schema = self._schema_of(columns)
        numbers = [number for number, entry in enumerate(self.entries()) if shard in (None, entry.shard)]
        if not numbers and shard is not None:
            urls = {entry.shard for entry in self.entries()}
            alike = [each for each in sorted(urls) if each.endswith(f"/{shard}")]
            meant = f"did you mean {', '.join(alike[:5])}?" if alike else nearest(shard, urls) or "see its column shard"
            raise DatasetError(f"{self.url}: version {self.version} has no shard {shard!r}; {meant}")
        embeddings = [name for name in schema.names if name in self.nodes]
        others = list(dict.fromkeys(["key", "shard", *(name for name in schema.names if name not in self.nodes)]))
        read_schema = self._schema_of([*others, *embeddings])

        def rows(group: RowGroup) -> pa.Table:
            table = group.read(others) if group.may_hold("key", keys) else read_schema.empty_table()
            is_wanted = pc.is_in(table.column("key"), pa.array(keys, pa.string()))
            if not pc.any(is_wanted).as_py():
                return read_schema.empty_table()
            for name, column in zip(embeddings, group.read(embeddings).columns if embeddings else [], strict=True):
                table = table.append_column(name, column)
            return table.filter(is_wanted).cast(read_schema)

        groups = self._groups.map(rows, numbers, None if embeddings else SMALL_AHEAD)
        found = pa.concat_tables([read_schema.empty_table(), *groups])
        places: dict[str, list[int]] = {key: [] for key in keys}
        for place, key in enumerate(found.column("key").to_pylist()):
            places[key].append(place)
        for key, same in places.items():
            if not same:
                where = f" in {shard}" if shard else ""
                first = self.take([0] if len(self) else [], ["key"]).column("key").to_pylist()
                hint = f"; its keys are such as {first[0]!r}" if first else ""
                raise DatasetError(f"{self.url}: version {self.version} has no key {key!r}{where}{hint}")
            if len(same) > 1:
                shards = ", ".join(found.column("shard").take(pa.array(same[:5])).to_pylist()) + (
                    ", …" if len(same) > 5 else ""
                )
                raise DatasetError(f"{self.url}: {len(same)} shards have a key {key!r}: say which one by shard=: {shards}")
        return found.take(pa.array([places[key][0] for key in keys], pa.int64())).select(schema.names)

    def image(self, key: str, shard: str | None = None) -> bytes:
        """The encoded image of one sample, as the source has it: one ranged read, or one row group of a Parquet source.

        Args:
            key: the sample's key.
            shard: URL of its shard; needed where several shards have that key.

        Raises:
            DatasetError: no such sample, or several; its image cannot be read by itself.
            SourceChanged: its image is not what was embedded.
            StorageError: the source cannot be read.
        """
        (row,) = self.find([key], shard, PLACE_COLUMNS).to_pylist()
        return self.image_of(row)

    def image_of(self, row: Mapping[str, Any]) -> bytes:
        """The encoded image of a row that was read; it has to hold `PLACE_COLUMNS`. See `image`."""
        image = read_image(self._source, row, self.table_.layout_fields["format"])
        if image is None:
            changed = f"the source has changed since version {self.version}: {row['key']!r} has another image"
            raise SourceChanged(f"{row['url']}: {changed}")
        return image

    def images_of(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[bytes | PipelineError]:
        """The encoded images of rows, read ahead of need; or the error of one that cannot be read."""

        def read(row: Mapping[str, Any]) -> bytes | PipelineError:
            try:
                return self.image_of(row)
            except PipelineError as error:
                return error

        with ThreadPoolExecutor(IMAGES_AHEAD) as pool:
            yield from ahead(pool, read, rows, IMAGES_AHEAD)

    def quarantine(self) -> list[Quarantined]:
        """What could not be embedded, of the partitions of this version."""
        rows: list[Quarantined] = []
        for entry in self.entries():
            if entry.num_quarantined:
                store = self.table_.store
                with present(self.table_, entry) as url:
                    footer = partition.read_footer(store, store.stat(url))
                    rows += partition.read_quarantine(store, self.url, footer)
        return rows

    def node(self, node: str | None = None) -> str:
        """Name of an embedding column: the one given, which there has to be, or the first."""
        name = node or next(iter(self.nodes))
        if name not in self.nodes:
            raise DatasetError(f"{self.url}: there is no embedding column {name!r}; it has {', '.join(self.nodes)}")
        return name

    def _schema_of(self, columns: Sequence[str] | None) -> pa.Schema:
        """Fields of all columns, or of those named; without the widths, so that equal columns have equal fields."""
        for name in columns or []:
            if name not in self.schema.names:
                hint = nearest(name, self.schema.names)
                raise DatasetError(
                    f"{self.url}: there is no column {name!r}; {hint or 'it has ' + ', '.join(self.schema.names)}"
                )
        names = self.schema.names if columns is None else columns
        return pa.schema([self.schema.field(name).remove_metadata() for name in names])


class _Streamed:
    """Rows of row groups that are read when they are looked at. What a thread reads them into is used again."""

    def __init__(self, values: Sequence[Values], scratch: threading.local) -> None:
        self._values, self._scratch = values, scratch
        self._starts = np.cumsum([0, *map(len, values)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def parts(self) -> Iterator[NDArray[np.float32]]:
        place_BD = self._memory(cached_rows(self._values[0].width))
        return itertools.chain.from_iterable(values.blocks(itertools.repeat(place_BD)) for values in self._values)

    def take(self, rows_M: NDArray[np.int64], /) -> NDArray[np.float32]:
        found_MD = np.empty((len(rows_M), self._values[0].width), np.float32)
        numbers_M = np.searchsorted(self._starts, rows_M, side="right") - 1
        for number in np.unique(numbers_M).tolist():
            is_here_M = numbers_M == number
            found_MD[is_here_M] = self._values[number].take(rows_M[is_here_M] - self._starts[number])
        return found_MD

    def whole(self) -> NDArray[np.float32]:
        rows_ND = self._memory(len(self))
        for values, start in zip(self._values, self._starts.tolist(), strict=False):
            values.whole(rows_ND[start : start + len(values)])
        return rows_ND

    def _memory(self, num_rows: int) -> NDArray[np.float32]:
        rows_ND: NDArray[np.float32] | None = getattr(self._scratch, "rows_ND", None)
        if rows_ND is None or len(rows_ND) < num_rows:
            rows_ND = self._scratch.rows_ND = np.empty((num_rows, self._values[0].width), np.float32)
        return rows_ND[:num_rows]
