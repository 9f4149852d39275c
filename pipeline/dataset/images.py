"""The encoded image of a row, as the source has it: one ranged read, or one row group of a Parquet source."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from pipeline.errors import DatasetError, ShardError, StorageError
from pipeline.source.parquet import open_file
from pipeline.storage import Store

PLACE_COLUMNS = ("key", "shard", "index", "url", "offset", "nbytes", "content_hash")
"""What leads from a row back to the encoded image."""


def read_image(source: Store, row: Mapping[str, Any], source_format: str) -> bytes | None:
    """The image of one row; None where the source has another one in its place.

    Args:
        source: how to reach the source.
        row: values of `PLACE_COLUMNS`.
        source_format: of the source, as the layout names it.

    Raises:
        DatasetError: the image cannot be read by itself.
        StorageError: the source cannot be read.
    """
    if row["offset"] is not None:
        image = _range(source, row)
    elif source_format == "parquet":
        image = _cell(source, row)
    else:
        raise DatasetError(
            f"{row['url']}: the image of {row['key']!r} lies in a compressed archive and cannot be read by itself"
        )
    return image if image is not None and _content_hash(image) == row["content_hash"] else None


def _content_hash(image: bytes) -> str:
    return hashlib.sha256(image).hexdigest()[:32]


def _range(source: Store, row: Mapping[str, Any]) -> bytes | None:
    """The bytes that a row points at; None where the object has become too short for them."""
    try:
        return source.read_range(row["url"], row["offset"], row["nbytes"])
    except StorageError:
        if source.stat(row["url"]).num_bytes < row["offset"] + row["nbytes"]:
            return None
        raise


def _cell(source: Store, row: Mapping[str, Any]) -> bytes | None:
    """The value with the row's content hash in row `index` of a Parquet file, in whichever column; None where none has it."""
    stat = source.stat(row["url"])
    with source.open(stat) as handle:
        try:
            file = open_file(handle, stat)
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
        except (ShardError, pa.ArrowException, OSError, ValueError):  # no longer a Parquet file, or a damaged one
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
