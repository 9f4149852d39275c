"""One Parquet file of embeddings, made from one shard: its schema, its writer, its footer.

Embeddings are plain `list<float32>`, so that every reader understands them; where values were rounded to what float16 can
hold, BYTE_STREAM_SPLIT and zstd store them in half of the bytes. The footer says what the file was made from and by, what
became of every sample that was read, and holds the quarantine.
"""

from __future__ import annotations

import dataclasses
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import GuardError, StorageError
from pipeline.recipe import FORMAT_VERSION, Layout, Recipe, canonical, digest
from pipeline.storage import FileStat, Store, join

DATA_FOLDER = "data"
ROW_GROUP_BYTES = 16 << 20
"""Of embeddings, before encoding: what a writer holds, and what a reader gets in one piece."""
MAX_ROWS_PER_GROUP = 8192
"""What else belongs to a row takes a kilobyte while it waits."""
MAX_FOOTER_QUARANTINE_BYTES = 1 << 20
"""Beyond it the quarantine goes into a sibling file."""

_FOOTER_KEY = b"pipeline"
_FIXED = [
    pa.field("key", pa.string(), nullable=False),
    pa.field("shard", pa.string(), nullable=False),
    pa.field("index", pa.int64(), nullable=False),
    pa.field("url", pa.string(), nullable=False),
    pa.field("offset", pa.int64()),
    pa.field("nbytes", pa.int64()),
    pa.field("content_hash", pa.string(), nullable=False),
    pa.field("width", pa.int32(), nullable=False),
    pa.field("height", pa.int32(), nullable=False),
]
_NAME = re.compile(r"(?P<identity>[0-9a-f]{16}-[0-9a-f]{16}-[0-9a-f]{16}-[0-9a-f]{16})-[0-9a-f]{32}\.parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What the dataset shall be: where it lies, what its embeddings are made by, what its rows hold. Picklable."""

    store: Store
    url: str
    recipe: Recipe
    layout: Layout
    schema: pa.Schema
    """Of every partition; see `schema`."""

    def identity(self, shard_url: str, fingerprint: str) -> str:
        """First part of the name of a shard's partition: equal for all attempts at the same work."""
        return f"{digest(shard_url)[:16]}-{fingerprint[:16]}-{self.recipe.recipe_id}-{self.layout.layout_id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantined:
    """A sample that could not be embedded."""

    key: str
    shard: str
    index: int
    offset: int | None
    stage: str
    """`read`, `label`, `decode` or `embed`."""
    error: str
    """Short name of the kind of failure, to count by."""
    message: str
    url: str | None = None
    """The object that holds it; None, like the fields below, in partitions of earlier programs."""
    nbytes: int | None = None
    """Of the encoded image, where they are contiguous."""
    content_hash: str | None = None
    """Of the encoded image; None where none could be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """A finished partition: what the log, the checks before a commit and the report need to know of it."""

    path: str
    """Relative to the dataset."""
    num_bytes: int
    shard: str
    fingerprint: str
    recipe_id: str
    layout_id: str
    num_rows: int
    num_read: int
    num_embedded: int
    num_carried_over: int
    num_quarantined: int

    @property
    def reconciles(self) -> bool:
        """Whether every sample that was read is accounted for."""
        return (
            self.num_read == self.num_embedded + self.num_carried_over + self.num_quarantined
            and self.num_rows == self.num_embedded + self.num_carried_over
        )

    def sharing(self, *texts: str) -> Partition:
        """The same, with these texts in place of its own equal ones: a million descriptions then have no second copies."""
        known = {text: text for text in texts}
        names = ("shard", "fingerprint", "recipe_id", "layout_id")
        return dataclasses.replace(self, **{name: known.get(own, own) for name in names for own in [getattr(self, name)]})


def embedding_field(column: str, width: int) -> pa.Field:
    """Arrow field of an embedding column; the width lies in its metadata, since Delta has no fixed-size lists."""
    return pa.field(column, pa.list_(pa.field("element", pa.float32())), nullable=False, metadata={"width": str(width)})


def schema(recipe: Recipe, carried: Sequence[pa.Field]) -> pa.Schema:
    """Columns of a partition: key, label and what is carried along, where the image lies, the embeddings."""
    embeddings = [embedding_field(column, width) for column, width in recipe.widths.items()]
    return pa.schema([_FIXED[0], *carried, *_FIXED[1:], *embeddings])


def new_path(identity: str) -> str:
    """A path that nobody else will use."""
    return f"{DATA_FOLDER}/{identity}-{uuid.uuid4().hex}.parquet"


def identity_of(path: str) -> str | None:
    """The identity in a partition's path, None for any other file."""
    match = _NAME.fullmatch(path.rpartition("/")[2])
    return match["identity"] if match else None


def parquet_writer(
    file: BinaryIO, arrow_schema: pa.Schema, *, rounded: bool, sorted_by: Sequence[str] = ()
) -> pq.ParquetWriter:
    """A writer of rows of a dataset, as every reader understands them.

    Args:
        file: where to write.
        arrow_schema: columns of `schema`, or some of them.
        rounded: whether embeddings were rounded to what float16 can hold.
        sorted_by: columns that the rows of a row group ascend by; noted in the file.
    """
    embeddings = [field.name for field in arrow_schema if field.metadata and b"width" in field.metadata]
    leaves = [f"{column}.list.element" for column in embeddings]
    others = [field.name for field in arrow_schema if field.name not in embeddings]
    # float32 mantissas do not compress (under 10 %) and zstd would cost more than the write; rounded ones halve.
    compression = dict.fromkeys(others, "zstd") | dict.fromkeys(leaves, "zstd" if rounded else "none")
    return pq.ParquetWriter(
        file,
        arrow_schema,
        compression=compression,
        # Dictionaries inflate float32 by half; the shard's URL repeats and shrinks to nothing.
        use_dictionary=["shard", "url"],
        use_byte_stream_split=leaves if rounded and leaves else False,
        write_statistics=["key", "index"],
        sorting_columns=pq.SortingColumn.from_ordering(arrow_schema, list(sorted_by)) if sorted_by else None,
        write_page_checksum=True,  # so that a reader who asks can tell a bit that fell over
        store_schema=False,  # with it Polars refuses the file
    )


class PartitionWriter:
    """Writes rows in the order given, a row group at a time."""

    def __init__(self, file: BinaryIO, arrow_schema: pa.Schema, *, rounded: bool) -> None:
        self._schema = arrow_schema
        self._writer = parquet_writer(file, arrow_schema, rounded=rounded)
        self.num_rows = 0

    def write(self, columns: Mapping[str, Sequence[Any]], embeddings: Mapping[str, NDArray[np.float32]]) -> None:
        """Write one row group.

        Args:
            columns: column to N values.
            embeddings: column to (N, D) float32.
        """
        arrays = []
        for field in self._schema:
            if field.name in embeddings:
                values_ND = embeddings[field.name]
                offsets = np.arange(len(values_ND) + 1, dtype=np.int32) * values_ND.shape[1]
                arrays.append(pa.ListArray.from_arrays(offsets, pa.array(values_ND.reshape(-1)), type=field.type))
            else:
                arrays.append(pa.array(columns[field.name], field.type))
        table = pa.Table.from_arrays(arrays, schema=self._schema)
        self._writer.write_table(table, row_group_size=max(1, table.num_rows))
        self.num_rows += table.num_rows

    def close(self, footer: Mapping[str, Any]) -> None:
        """Write the footer."""
        self._writer.add_key_value_metadata({_FOOTER_KEY: canonical(footer)})
        self._writer.close()


def list_values(column: pa.ChunkedArray) -> NDArray[np.float32]:
    """(N, D) float32 of an embedding column, without a step in Python for a row."""
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # which copies a single chunk, too
    values: NDArray[np.float32] = array.flatten().to_numpy(zero_copy_only=True)
    return values.reshape(len(array), -1) if len(array) else values.reshape(0, 0)


def rows_per_group(recipe: Recipe) -> int:
    """Rows that make up `ROW_GROUP_BYTES` of embeddings, and no more than `MAX_ROWS_PER_GROUP`."""
    return max(1, min(MAX_ROWS_PER_GROUP, ROW_GROUP_BYTES // (4 * sum(recipe.widths.values()))))


def footer(target: Target, partition: Partition, quarantine: Sequence[Quarantined]) -> dict[str, Any]:
    """What the footer says. A quarantine too large for it is published as a sibling file, which it then names."""
    rows: Any = [dataclasses.asdict(row) for row in quarantine]
    payload = json.dumps(rows, ensure_ascii=False).encode("utf-8", "backslashreplace")
    if len(payload) > MAX_FOOTER_QUARANTINE_BYTES:
        rows = partition.path.removesuffix(".parquet") + ".quarantine.json"
        target.store.write(join(target.url, rows), payload)
    counts = {name: value for name, value in dataclasses.asdict(partition).items() if name not in {"path", "num_bytes"}}
    return {
        "format_version": FORMAT_VERSION,
        **counts,
        "recipe": dict(target.recipe.fields),
        "widths": dict(target.recipe.widths),
        "layout": dict(target.layout.fields),
        "quarantine": rows,
    }


def read_footer(store: Store, file: FileStat) -> dict[str, Any]:
    """The footer of a partition, in one ranged read as a rule.

    Returns:
        What `footer` made, and `stored`: the number of rows and the columns that the file really has.

    Raises:
        StorageError: not a whole partition of this program.
    """
    tail = b""
    wanted = 64 << 10
    while len(tail) < min(wanted, file.num_bytes):
        start = max(0, file.num_bytes - wanted)
        tail = store.read_range(file.url, start, file.num_bytes - start)
        if tail[-4:] != b"PAR1":
            raise StorageError(f"{file.url}: not a whole Parquet file")
        wanted = max(wanted, int.from_bytes(tail[-8:-4], "little") + 8)
    try:
        # Only the footer is parsed, so the tail alone will do.
        metadata = pq.read_metadata(pa.BufferReader(tail))
        content = json.loads((metadata.metadata or {})[_FOOTER_KEY])
        content["stored"] = (metadata.num_rows, [(field.name, field.type) for field in metadata.schema.to_arrow_schema()])
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        raise StorageError(f"{file.url}: not a partition: {type(error).__name__}: {error}") from None
    return dict(content)


def first_rows(store: Store, url: str, num_bytes: int, column: str) -> pa.ChunkedArray:
    """One column of a partition's first row group."""
    file = pq.ParquetFile(store.open_ranges(url, num_bytes))
    return file.read_row_group(0, columns=[column]).column(0)


def check(target: Target, partition: Partition) -> None:
    """Hold a finished partition against its own footer and against what is about to be committed.

    Raises:
        GuardError: the file says something else, or its counts do not add up.
        StorageError: it cannot be read.
    """
    url = join(target.url, partition.path)
    file = target.store.stat(url)
    content = read_footer(target.store, file)
    wrong = disagreements(file, content, partition, target.schema, target.recipe.fields, target.layout.fields)
    if wrong:
        what, found, expected = wrong[0]
        raise GuardError(f"{url}: {what} in the file: {found}; expected: {expected}; nothing was committed")


def disagreements(
    file: FileStat,
    content: Mapping[str, Any],
    partition: Partition,
    arrow_schema: pa.Schema,
    recipe: Mapping[str, Any],
    layout: Mapping[str, Any],
) -> list[tuple[str, Any, Any]]:
    """Where a file and its footer are not the partition that they should be: what, found, expected. Empty where all agrees.

    Raises:
        KeyError: the footer lacks what every one has.
    """
    described = partition_of(partition.path, file.num_bytes, content)
    num_rows, columns = content["stored"]
    compared = [
        *(
            (field.name, getattr(described, field.name), getattr(partition, field.name))
            for field in dataclasses.fields(Partition)
        ),
        ("rows", num_rows, described.num_rows),
        ("columns", columns, [(field.name, field.type) for field in arrow_schema]),
        ("recipe", content["recipe"], json.loads(canonical(recipe))),
        ("layout", content["layout"], json.loads(canonical(layout))),
        ("reconciles", described.reconciles, True),
    ]
    return [(what, found, expected) for what, found, expected in compared if found != expected]


def partition_of(path: str, num_bytes: int, content: Mapping[str, Any]) -> Partition:
    """A partition as its own footer describes it."""
    names = [field.name for field in dataclasses.fields(Partition) if field.name not in {"path", "num_bytes"}]
    return Partition(path=path, num_bytes=num_bytes, **{name: content[name] for name in names})


def read_quarantine(store: Store, dataset_url: str, content: Mapping[str, Any]) -> list[Quarantined]:
    """The quarantine rows of a partition with this footer."""
    rows = content["quarantine"]
    if isinstance(rows, str):
        rows = json.loads(store.read(join(dataset_url, rows)))
    return [Quarantined(**row) for row in rows]
