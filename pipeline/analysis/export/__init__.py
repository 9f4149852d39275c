"""A dataset in the form that another tool wants: an array to map into memory, Parquet files sorted by key, a FAISS index.

In: an opened version. Out: files at any fsspec URL, whole or not at all; `destination.py` says how. Row i of an array and
vector i of an index are named by row i of a Parquet file beside them.

Memory: a row group of the dataset and 64 MiB of an upload; sorting takes what `sort.py` says, and an index its vectors.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.analysis.export import sort
from pipeline.analysis.export.destination import (
    FOOTER_KEY,
    KEYS_END,
    MARKER,
    Parts,
    check_folder,
    file_and_keys,
    folder,
    temporary_folder,
)
from pipeline.dataset.partition import parquet_writer, rows_per_group
from pipeline.dataset.read import Dataset
from pipeline.errors import ConfigError, GuardError
from pipeline.recipe import canonical
from pipeline.storage import join

KEY_COLUMNS = ("key", "label", "shard")
"""What that file holds, as far as the dataset has it."""
KEYS_PER_GROUP = 1 << 17
FILE_BYTES = 512_000_000
"""Of a Parquet file, unless asked for otherwise."""
TRAIN_BYTES = 512 << 20
"""Vectors that an index is trained on at most: 262,144 of 512 values."""
BATCH_BYTES = 2 << 20
"""Read and written at once: what is still in the processor's cache. Of 16 MB, writing took the system four times as long."""

Progress = Callable[[str, int], None]
"""Told what is being done and how many rows more are done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What an export has written."""

    files: list[str]
    """URLs, in the order in which they became visible."""
    num_rows: int
    num_bytes: int


def silent(stage: str, num_rows: int) -> None:
    """Progress that nobody looks at."""


def to_npy(
    dataset: Dataset, url: str, *, node: str | None = None, overwrite: bool = False, progress: Progress = silent
) -> Exported:
    """Write one embedding column as a .npy file, (N, D) float32, and the keys of its rows beside it.

    Args:
        dataset: what to export.
        url: the .npy file; the keys go to the same URL with `KEYS_END`.
        node: embedding column; the first when left out.
        overwrite: replace what is there. The old array goes when the new one is written and before its keys appear.
        progress: told of the rows that were written.

    Raises:
        ConfigError: there is something at `url` that is not to be replaced.
        DatasetError: no such embedding column.
        StorageError: the store refused.
    """
    name = dataset.node(node)
    with file_and_keys(dataset, url, overwrite) as (file, keys):
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False}
        np.lib.format.write_array_header_1_0(file, header | {"shape": (len(dataset), dataset.nodes[name])})
        _stream(dataset, name, keys, file.write, progress)
    return _exported(dataset, url)


def to_faiss(
    dataset: Dataset,
    url: str,
    *,
    node: str | None = None,
    factory: str = "Flat",
    overwrite: bool = False,
    progress: Progress = silent,
) -> Exported:
    """Write a FAISS index over one embedding column, by inner product, and the keys of its rows beside it.

    The vectors are those of the dataset as they are: where the recipe normalises the node, the inner product is the cosine.
    Memory: the index, whose vectors a flat one holds all.

    Args:
        dataset: what to export.
        url: the index; the keys go to the same URL with `KEYS_END`, where row i names the vector with the id i.
        node: embedding column; the first when left out.
        factory: description of the index for `faiss.index_factory`. What needs training is trained on a sample of
            `TRAIN_BYTES`.
        overwrite: as in `to_npy`.
        progress: told of the rows that were read for training and added.

    Raises:
        ConfigError: faiss is not installed, it refuses `factory`, or there is something at `url` that is not to be replaced.
        DatasetError: no such embedding column.
        StorageError: the store refused.
    """
    faiss = _faiss()
    name = dataset.node(node)
    width = dataset.nodes[name]
    with file_and_keys(dataset, url, overwrite) as (file, keys), _faiss_refusing(factory):
        index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            index.train(_sample(dataset, name, progress))
        _stream(dataset, name, keys, lambda values: index.add(values.reshape(-1, width)), progress)
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
    return _exported(dataset, url)


def to_parquet(
    dataset: Dataset,
    url: str,
    *,
    node: str | None = None,
    row_group_rows: int | None = None,
    file_bytes: int = FILE_BYTES,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Exported:
    """Write a folder of Parquet files, sorted by key and shard over all of them.

    Columns and encodings are those of the dataset. Every row group has the least and the greatest key in its statistics; the
    footer names dataset, version, recipe and the widths of embedding columns.

    Args:
        dataset: what to export.
        url: the folder.
        node: the one embedding column to keep; all when left out.
        row_group_rows: rows of a row group; as in the dataset when left out.
        file_bytes: a file ends before the row group that would make it larger, but holds one at least.
        overwrite: replace the export that is there. Locally the new one takes its place when it is whole; in a remote store
            the old one goes first.
        progress: told of the rows that were read and written.

    Raises:
        ConfigError: a size is not positive, or there is something at `url` that is not to be replaced.
        DatasetError: no such embedding column.
        StorageError: the store refused, or there is no room to sort.
    """
    recipe = dataset.table_.recipe
    group = rows_per_group(recipe) if row_group_rows is None else row_group_rows
    for option, value in (("row-group-rows", group), ("file-bytes", file_bytes)):
        if value < 1:
            raise ConfigError(f"{option}: {value} is not allowed; at least 1")
    dropped = dataset.nodes.keys() - {dataset.node(node)} if node is not None else set()
    schema = pa.schema([field for field in dataset.schema if field.name not in dropped])
    store = dataset.table_.store
    check_folder(dataset, url, overwrite)
    with temporary_folder(store, url) as temporary:
        tables = sort.regroup(sort.in_order(_rows(dataset, schema, progress), temporary), group)
        # Whatever had to be sorted has been read by the time the first rows come: until then the old export stays.
        first = next(tables, schema.empty_table())
        with folder(dataset, url, overwrite) as place:
            with Parts(store, place, schema, file_bytes, rounded=recipe.rounded, footer=_about(dataset)) as parts:
                for table in itertools.chain([first], tables):
                    parts.write(sort.plain(table, schema))
                    progress("written", table.num_rows)
            _check_count(dataset, parts.num_rows)
            names = parts.names
            if store.local_path(url) is None:
                marker = {"rows": parts.num_rows, "files": parts.names, **_about(dataset)}
                store.write(join(url, MARKER), canonical(marker).encode())
                names = [*names, MARKER]
    return Exported(files=[join(url, name) for name in names], num_rows=parts.num_rows, num_bytes=parts.num_bytes)


def _exported(dataset: Dataset, url: str) -> Exported:
    files = [url + KEYS_END, url]
    num_bytes = sum(dataset.table_.store.stat(file).num_bytes for file in files)
    return Exported(files=files, num_rows=len(dataset), num_bytes=num_bytes)


# Rows


def _stream(dataset: Dataset, name: str, keys_file: BinaryIO, put: Callable[[Any], Any], progress: Progress) -> None:
    """Hand the values of one embedding column to `put`, a flat float32 array a time, and write the keys of the same rows."""
    columns = [column for column in KEY_COLUMNS if column in dataset.schema.names]
    width = dataset.nodes[name]

    scratch_BD = np.empty((max(1, BATCH_BYTES // (4 * width)), width), np.float32)

    def keys() -> Iterator[pa.Table]:
        for table, values in dataset.iter_values(name, columns):
            for block_BD in values.blocks(itertools.repeat(scratch_BD)):
                put(block_BD.reshape(-1))
                progress("written", len(block_BD))
            yield table

    schema = pa.schema([dataset.schema.field(column) for column in columns])
    num_rows = 0
    with parquet_writer(keys_file, schema, rounded=False) as writer:
        writer.add_key_value_metadata({FOOTER_KEY: canonical(_about(dataset) | {"node": name})})
        for table in sort.regroup(keys(), KEYS_PER_GROUP):
            writer.write_table(table.cast(schema), row_group_size=table.num_rows)
            num_rows += table.num_rows
    _check_count(dataset, num_rows)


def _rows(dataset: Dataset, schema: pa.Schema, progress: Progress) -> sort.Rows:
    """The rows of a dataset for sorting. Their size is that of the first ones, but no less than that of the files."""
    size = _batch_size(dataset)

    def read(columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
        for batch in dataset.iter_batches(columns or schema.names, size):
            progress("keys read" if columns else "read", batch.num_rows)
            yield sort.fixed(batch, dataset.nodes)

    first = next((batch for batch in dataset.iter_batches(schema.names, size) if batch.num_rows), None)
    like_first = first.nbytes * len(dataset) // first.num_rows if first is not None else 0
    in_files = sum(entry.num_bytes for entry in dataset.entries())
    return sort.Rows(read=read, num_rows=len(dataset), num_bytes=max(like_first, in_files))


def _sample(dataset: Dataset, name: str, progress: Progress) -> NDArray[np.float32]:
    """(n, D) float32 of rows from all over the dataset, `TRAIN_BYTES` at most."""
    width = dataset.nodes[name]
    wanted = sort.sample(len(dataset), TRAIN_BYTES // (4 * width))
    sample_ND = np.empty((len(wanted), width), np.float32)
    start = 0
    for batch in dataset.iter_batches([name], _batch_size(dataset)):
        first, stop = np.searchsorted(wanted, [start, start + batch.num_rows])
        values_ND = batch.column(name).flatten().to_numpy(zero_copy_only=True).reshape(-1, width)
        sample_ND[first:stop] = values_ND[wanted[first:stop] - start]
        start += batch.num_rows
        progress("read for training", batch.num_rows)
    return sample_ND


def _batch_size(dataset: Dataset) -> int:
    """Rows that take `BATCH_BYTES` of embeddings, or one."""
    return max(1, BATCH_BYTES // (4 * sum(dataset.nodes.values())))


def _about(dataset: Dataset) -> dict[str, Any]:
    """Where the rows come from: travels in every Parquet file."""
    return {
        "dataset": dataset.table_.store.absolute(dataset.url),
        "version": dataset.version,
        "recipe": dataset.recipe,
        "widths": dataset.nodes,
    }


def _check_count(dataset: Dataset, num_rows: int) -> None:
    if num_rows != len(dataset):
        raise GuardError(f"{dataset.url}: the log names {len(dataset)} rows, and {num_rows} were read; nothing was exported")


# FAISS


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise ConfigError("to: faiss is not installed; `pip install 'frozen-pipeline[faiss]'` does it") from None
    return faiss


@contextlib.contextmanager
def _faiss_refusing(factory: str) -> Iterator[None]:
    """What FAISS says of a description or its training, without the place in its source."""
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(r"^Error in .+? at \S+:\d+: ", "", str(error), flags=re.DOTALL)
        raise ConfigError(f"faiss-index: {factory!r}: {reason}; such as Flat, HNSW32 and IVF1024,Flat are allowed") from None
