"""Parquet files with encoded images in a column: plain binary, or the `{bytes, path}` struct of Hugging Face datasets.

Row groups are read through a buffered stream in small batches, so memory does not grow with the row group, only with the
page: what wrote the file decides how many images that is (pyarrow: 1024 rows or 1 MiB, whichever ends later).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from pipeline.config import Source
from pipeline.errors import ConfigError, SampleError, ShardError, SourceError, nearest
from pipeline.source.sample import (
    KEY_NAMES,
    LABEL_NAMES,
    MAX_IMAGE_BYTES,
    Sample,
    Shard,
    Suggestion,
    arrow_type,
    convert,
    named,
)
from pipeline.storage import FileStat, Store

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

BATCH_ROWS = 16
BUFFER_BYTES = 1 << 20
WHOLE_BYTES = 32 << 20
"""Of files up to this size a row group's column is read in one piece. The buffered stream makes room for whatever a page claims
to have, up to 2 GiB, before it looks whether the file has that much."""
ENDINGS = (".parquet", ".pq")
IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "bytes", "content", "data")
"""What people call the column, the likeliest first."""


def shards(source: Source, store: Store) -> Iterator[Shard]:
    """One shard a Parquet file."""
    for file in _files(source, store):
        yield Shard(url=file.url, files=(file,))


def fields(source: Source, store: Store) -> list[pa.Field]:
    """See `Format.fields`. Types are those of the first readable file; files that differ are cast or fail by name."""
    import pyarrow as pa

    schema = _first_schema(source, store)
    _check(source, schema)
    found = []
    if source.label is not None:
        own = _field(schema, source.label, "source.label")
        kind = arrow_type(source.label_type) if source.label_type else _portable(own, "source.label")
        found.append(pa.field("label", kind))
    for name in source.columns or []:
        found.append(pa.field(name.rpartition(".")[2], _portable(_field(schema, name, "source.columns"), "source.columns")))
    return found


def read(source: Source, store: Store, shard: Shard) -> Iterator[Sample]:
    """See `Format.read`."""
    import pyarrow as pa

    with store.open(shard.files[0]) as handle:
        file = open_file(handle, shard.files[0])
        try:
            image = _check(source, file.schema_arrow)
            carried = {name.rpartition(".")[2]: name for name in source.columns or []}
            if source.label is not None:
                carried["label"] = source.label
            wanted = dict.fromkeys([image, *carried.values(), *([source.key] if source.key else [])])
            index = 0
            for batch in file.iter_batches(BATCH_ROWS, columns=list(wanted), use_threads=False):
                for row in _rows(batch):
                    yield _sample(source, shard, row, index, image, carried)
                    index += 1
        except ConfigError as error:
            raise ShardError(f"{shard.url}: {error}") from None
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # the last two: no text, no date
            raise ShardError(f"{shard.url}: not a readable Parquet file: {error}") from None


def suggest(source: Source, store: Store) -> Suggestion:
    """Columns of the first readable file, by their types and names."""
    import pyarrow as pa

    schema = _first_schema(source, store)
    images = [field.name for field in schema if _holds_images(field.type)]
    if not images:
        raise SourceError(f"source.url: no column holds binary data; there are {', '.join(schema.names)}")
    fields: dict[str, Any] = {}
    notes = [f"columns: {', '.join(f'{field.name} ({field.type})' for field in schema)}"]
    if len(images) > 1:
        fields["image"] = named(images, IMAGE_NAMES) or images[0]
        notes.append(f"several columns hold binary data ({', '.join(images)}): {fields['image']} is taken")
    plain = [field.name for field in schema if pa.types.is_integer(field.type) or _is_text(field.type)]
    if (label := named(plain, LABEL_NAMES)) is not None:
        fields["label"] = label
        notes.append(f"label: {label}")
    others = [name for name in plain if name != label]
    while (key := named(others, KEY_NAMES)) is not None:
        if _is_unique(source, store, key):
            fields["key"] = key
            notes.append(f"key: {key}")
            break
        others.remove(key)
    return Suggestion(fields=fields, notes=notes)


def _is_unique(source: Source, store: Store, name: str) -> bool:
    """Whether a column tells the rows of the first readable file apart."""
    import pyarrow.compute as pc

    for file in _files(source, store):
        with store.open(file) as handle, contextlib.suppress(ShardError):
            column = open_file(handle, file).read(columns=[name]).column(0)
            return bool(pc.count_distinct(column, mode="all").as_py() == len(column) and column.null_count == 0)
    return False


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _sample(source: Source, shard: Shard, row: dict[str, Any], index: int, image: str, carried: dict[str, str]) -> Sample:
    sample = Sample(key=str(index), index=index, url=shard.url)
    if source.key:
        key = _value(row, source.key)
        if key is None:
            sample.key = f"row {index}"  # a bare number could be another row's key
            sample.error = SampleError("read", "NoKey", f"column {source.key} is null")
        else:
            sample.key = key if isinstance(key, str) else str(key)
    payload = _value(row, image)
    if isinstance(payload, dict):
        payload = payload.get("bytes")
    if payload is None:
        sample.error = sample.error or SampleError("read", "NoImage", f"column {image} is null")
    elif len(payload) > MAX_IMAGE_BYTES:
        sample.error = SampleError("read", "TooLarge", f"has {len(payload)} bytes; at most {MAX_IMAGE_BYTES} are read")
    else:
        sample.image = payload
    sample.columns = {column: _value(row, name) for column, name in carried.items()}
    if source.label is not None and source.label_type:
        try:
            sample.columns["label"] = convert(sample.columns["label"], source.label_type, "label")
        except SampleError as error:
            sample.error = sample.error or error
    return sample


def _files(source: Source, store: Store) -> Iterator[FileStat]:
    for url in source.urls:
        for file in store.list(url):
            if file.url.lower().endswith(ENDINGS):
                yield file


def open_file(handle: BinaryIO, file: FileStat) -> pq.ParquetFile:
    """A Parquet file from anyone, read through buffers that do not grow with what it claims.

    Raises:
        ShardError: it is none.
    """
    # What the columns claim of themselves is not looked at: some of it ends the process that asks pyarrow for it.
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer_size = BUFFER_BYTES if file.num_bytes > WHOLE_BYTES else 0
    try:
        opened = pq.ParquetFile(_Bounded(handle, file.num_bytes), buffer_size=buffer_size, pre_buffer=False)
        _ = opened.schema_arrow  # made when it is first asked for
        return opened
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise ShardError(f"{file.url}: not a readable Parquet file: {error}") from None


class _Bounded(io.RawIOBase):
    """A file that makes no room for more than it has. Python's own does for what is asked; pyarrow asks for what is claimed."""

    def __init__(self, handle: BinaryIO, num_bytes: int) -> None:
        self._handle, self._num_bytes = handle, num_bytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._handle.seek(offset, whence)

    def tell(self) -> int:
        return self._handle.tell()

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._num_bytes - self._handle.tell())
        return self._handle.read(left if size < 0 else min(size, left))


def _field(schema: pa.Schema, path: str, where: str) -> pa.Field:
    """The field that `column` or `struct.child` names."""
    import pyarrow as pa

    field: pa.Field | None = None
    children: list[pa.Field] = list(schema)
    for name in path.split("."):
        found = [child for child in children if child.name == name]
        if not found:
            names = [child.name for child in children]
            raise ConfigError(f"{where}: there is no column {path!r}; {nearest(name, names) or 'it has ' + ', '.join(names)}")
        if len(found) > 1:
            raise ConfigError(f"{where}: there are {len(found)} columns {name!r}")
        field = found[0]
        children = list(field.type) if pa.types.is_struct(field.type) else []
    assert field is not None
    return field


def _value(row: dict[str, Any], path: str) -> Any:
    value: Any = row
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _first_schema(source: Source, store: Store) -> pa.Schema:
    unreadable: ShardError | None = None
    for file in _files(source, store):
        with store.open(file) as handle:
            try:
                return open_file(handle, file).schema_arrow
            except ShardError as error:  # one damaged file does not stop the others
                unreadable = unreadable or error
    raise unreadable or SourceError(f"source.url: {', '.join(source.urls)} holds no Parquet file")


def _check(source: Source, schema: pa.Schema) -> str:
    """The image column of a file that has all that the config names.

    Raises:
        ConfigError: it has not.
    """
    given = [("source.label", source.label), ("source.key", source.key), *(("source.columns", c) for c in source.columns or [])]
    for where, name in given:
        if name is not None:
            _field(schema, name, where)
    if source.image is not None:
        kind = _field(schema, source.image, "source.image").type
        if not _holds_images(kind):
            raise ConfigError(f"source.image: {source.image!r} is {kind}; allowed: a column of binary, or of {{bytes, path}}")
        return source.image
    found = [field.name for field in schema if _holds_images(field.type)]
    if len(found) != 1:
        names = ", ".join(found) or "none"
        raise ConfigError(f"source.image: {len(found)} columns hold binary data ({names}); name one")
    return str(found[0])


def _holds_images(kind: pa.DataType) -> bool:
    """Whether a column of this type may hold encoded images."""
    import pyarrow as pa

    def is_binary(kind: pa.DataType) -> bool:
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))

    children = kind if pa.types.is_struct(kind) else []
    return is_binary(kind) or any(child.name == "bytes" and is_binary(child.type) for child in children)


def _rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Python values of what the columns of a dataset can hold: microseconds, and integers of 63 bits."""
    import pyarrow as pa

    columns = []
    for column in batch.columns:
        if pa.types.is_timestamp(column.type):
            column = column.cast(pa.timestamp("us", tz=column.type.tz), safe=False)
        elif pa.types.is_uint64(column.type):
            column = column.cast(pa.int64())
        columns.append(column)
    rows: list[dict[str, Any]] = pa.RecordBatch.from_arrays(columns, names=batch.schema.names).to_pylist()
    return rows


def _portable(field: pa.Field, where: str) -> pa.DataType:
    """The type that Delta and every reader can hold for a carried column."""
    import pyarrow as pa

    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if pa.types.is_integer(kind):
        return pa.int64()
    if pa.types.is_floating(kind):
        return pa.float64()
    if pa.types.is_boolean(kind) or pa.types.is_date32(kind):
        return kind
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", tz="UTC" if kind.tz else None)  # Delta knows no other zone; it is the same moment
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    raise ConfigError(f"{where}: {field.name!r} is {kind}; carried are text, numbers, truth values, dates and times")
