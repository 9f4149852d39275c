"""Parquet files with encoded images in a column: plain binary, or the `{bytes, path}` struct of Hugging Face datasets.

Row groups are read through a buffered stream in small batches, so memory does not grow with the row group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pipeline.config import Source
from pipeline.errors import ConfigError, SampleError, ShardError, SourceError, nearest
from pipeline.source.sample import MAX_IMAGE_BYTES, Sample, Shard, arrow_type, convert
from pipeline.storage import FileStat, Store

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

BATCH_ROWS = 16
BUFFER_BYTES = 1 << 20
ENDINGS = (".parquet", ".pq")


def shards(source: Source, store: Store) -> Iterator[Shard]:
    """One shard a Parquet file."""
    for file in _files(source, store):
        yield Shard(url=file.url, files=(file,))


def fields(source: Source, store: Store) -> list[pa.Field]:
    """See `Format.fields`. Types are those of the first file; files that differ are cast or fail by name."""
    import pyarrow as pa

    first = next(_files(source, store), None)
    if first is None:
        raise SourceError(f"source.url: {', '.join(source.urls)} holds no Parquet file")
    with store.open(first) as handle:
        schema = _open(handle, first.url).schema_arrow
    found = []
    if source.label is not None:
        kind = arrow_type(source.label_type) if source.label_type else _portable(_field(schema, source.label, "source.label"))
        found.append(pa.field("label", kind))
    for name in source.columns or []:
        found.append(pa.field(name.rpartition(".")[2], _portable(_field(schema, name, "source.columns"))))
    return found


def read(source: Source, store: Store, shard: Shard) -> Iterator[Sample]:
    """See `Format.read`."""
    import pyarrow as pa

    with store.open(shard.files[0]) as handle:
        file = _open(handle, shard.url)
        try:
            image = source.image or _image_column(file.schema_arrow, shard.url)
            carried = {name.rpartition(".")[2]: name for name in source.columns or []}
            if source.label is not None:
                carried["label"] = source.label
            wanted = dict.fromkeys([image, *carried.values(), *([source.key] if source.key else [])])
            for name in wanted:
                _field(file.schema_arrow, name, shard.url)
            index = 0
            for batch in file.iter_batches(BATCH_ROWS, columns=list(wanted), use_threads=False):
                rows = batch.to_pylist()
                for row in rows:
                    yield _sample(source, shard, row, index, image, carried)
                    index += 1
        except ConfigError as error:
            raise ShardError(f"{shard.url}: {error}") from None
        except (pa.ArrowException, OSError) as error:
            raise ShardError(f"{shard.url}: not a readable Parquet file: {error}") from None


def _sample(source: Source, shard: Shard, row: dict[str, Any], index: int, image: str, carried: dict[str, str]) -> Sample:
    sample = Sample(key=str(index), index=index, url=shard.url)
    if source.key:
        key = _value(row, source.key)
        if key is None:
            sample.error = SampleError("read", "NoKey", f"column {source.key} is null")
        else:
            sample.key = key if isinstance(key, str) else str(key)
    payload = _value(row, image)
    if isinstance(payload, dict):
        payload = payload.get("bytes")
    if payload is None:
        sample.error = sample.error or SampleError("read", "NoImage", f"column {image} is null")
    elif not isinstance(payload, bytes):
        sample.error = SampleError("read", "NotBinary", f"column {image} holds {type(payload).__name__}, not bytes")
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


def _open(handle: Any, url: str) -> pq.ParquetFile:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(handle, buffer_size=BUFFER_BYTES, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise ShardError(f"{url}: not a readable Parquet file: {error}") from None


def _field(schema: pa.Schema, path: str, where: str) -> pa.Field:
    """The field that `column` or `struct.child` names."""
    import pyarrow as pa

    field: pa.Field | None = None
    children: list[pa.Field] = list(schema)
    for name in path.split("."):
        field = next((child for child in children if child.name == name), None)
        if field is None:
            names = [child.name for child in children]
            raise ConfigError(f"{where}: there is no column {path!r}; {nearest(name, names) or 'it has ' + ', '.join(names)}")
        children = list(field.type) if pa.types.is_struct(field.type) else []
    assert field is not None
    return field


def _value(row: dict[str, Any], path: str) -> Any:
    value: Any = row
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _image_column(schema: pa.Schema, url: str) -> str:
    import pyarrow as pa

    def holds_images(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return any(child.name == "bytes" and holds_images(child.type) for child in kind)
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))

    found = [field.name for field in schema if holds_images(field.type)]
    if len(found) != 1:
        names = ", ".join(found) or "none"
        raise ShardError(f"{url}: {len(found)} columns hold binary data ({names}); name one in source.image")
    return str(found[0])


def _portable(field: pa.Field) -> pa.DataType:
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
        return pa.timestamp("us", tz=kind.tz)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    raise ConfigError(f"source.columns: {field.name!r} is {kind}; carried are text, numbers, truth values, dates and times")
