"""Numbers straight out of Parquet pages: the same as Arrow's, or none at all."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import write_dataset

from pipeline.dataset.pages import PlainNumbers, plain_spans

ROWS_ND = np.random.default_rng(0).standard_normal((700, 20)).astype(np.float32)


def written(rows: Any, kind: pa.DataType | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    defaults = {"compression": "none", "use_dictionary": False, "data_page_size": 4096, "write_batch_size": 64}
    defaults |= {"write_statistics": False}
    pq.write_table(
        pa.table({"key": ["x"] * len(rows), "e": pa.array(rows, kind or pa.list_(pa.float32()))}), file, **(defaults | options)
    )
    return file.getvalue()


def read(data: bytes, count: int) -> np.ndarray | None:
    chunk = pq.read_metadata(io.BytesIO(data)).row_group(0).column(1)
    return read_chunk(data, chunk.data_page_offset, chunk.total_compressed_size, count)


def read_chunk(data: bytes, start: int, num_bytes: int, count: int) -> np.ndarray | None:
    """In two pieces, which meet within a page."""
    spans = plain_spans(io.BytesIO(data), start, num_bytes, count)
    if spans is None:
        return None
    numbers = PlainNumbers(io.BytesIO(data), start, spans)
    out = np.full(count, np.nan, np.float32)
    try:
        numbers.readinto(out[: count // 3])
        numbers.readinto(out[count // 3 :])
    except ValueError:
        return None
    with pytest.raises(ValueError, match="end early"):
        numbers.readinto(np.empty(1, np.float32))
    return out


@pytest.mark.parametrize("width", [1, 20, 700, 14_000])
@pytest.mark.parametrize("options", [{}, {"write_page_checksum": True}, {"data_page_size": 1 << 20}])
def test_numbers_are_those_that_were_written(width: int, options: dict[str, Any]) -> None:
    """Rows of any width, however pages cut them."""
    rows_ND = ROWS_ND.reshape(-1, width)
    found = read(written(list(rows_ND), **options), rows_ND.size)
    assert found is not None
    assert np.array_equal(found.reshape(rows_ND.shape), rows_ND)


def test_partitions_are_of_that_kind_and_rounded_ones_are_not(tmp_path: Path) -> None:
    for precision, is_plain in (("float32", True), ("float16", False)):
        rounded_ND = ROWS_ND.astype(np.float16).astype(np.float32)
        dataset = write_dataset(tmp_path / precision, rounded_ND, precision=precision, rows_per_shard=700, rows_per_group=300)
        (file,) = dataset.files()
        data = Path(file.removeprefix("file://")).read_bytes()
        group = pq.read_metadata(io.BytesIO(data)).row_group(1)
        chunk = group.column(group.num_columns - 1)
        found = read_chunk(data, chunk.data_page_offset, chunk.total_compressed_size, 300 * 20)
        assert (found is not None) == is_plain
        assert np.array_equal(dataset.to_numpy(), rounded_ND)


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        ([[1.0, None], [2.0, 3.0]], {}),
        ([[1.0, 2.0], None], {}),
        ([[1.0, 2.0], []], {}),
        ([[1.0, 2.0]] * 2, {"use_dictionary": True}),
        ([[1.0, 2.0]] * 2, {"compression": "snappy"}),
        ([[1.0, 2.0]] * 2, {"write_statistics": True}),
        ([[1.0, 2.0]] * 2, {"data_page_version": "2.0"}),
        ([[1.0, 2.0]] * 2, {"use_byte_stream_split": ["e.list.element"]}),
    ],
)
def test_what_is_not_plain_is_left_to_arrow(rows: Any, options: dict[str, Any]) -> None:
    assert read(written(rows, **options), 4) is None


def test_another_number_of_numbers_is_refused() -> None:
    data = written(list(ROWS_ND))
    assert read(data, ROWS_ND.size - 1) is None
    assert read(data, ROWS_ND.size + 1) is None
    assert read(data, 0) is None


def test_damage_is_refused_or_changes_only_numbers() -> None:
    """Every byte of the levels and headers of a small chunk turned, and every end cut off."""
    data = written(list(ROWS_ND[:4]))
    chunk = pq.read_metadata(io.BytesIO(data)).row_group(0).column(1)
    start, end = chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size
    numbers = data.index(ROWS_ND[:4].tobytes())
    for position in range(start, numbers):
        for value in (0, 0x7F, 0x80, 0xFF, data[position] ^ 1):
            damaged = bytearray(data)
            damaged[position] = value
            found = read(bytes(damaged), 80)
            assert found is None or np.array_equal(found.reshape(4, 20), ROWS_ND[:4])
    for stop in range(start, end):
        assert read_chunk(data[:stop], start, end - start, 80) is None
    for garbage in (b"\x1c" * 4096, b"\x15" + b"\xff" * 4096, bytes(4096)):
        assert read_chunk(garbage, 0, len(garbage), 80) is None
