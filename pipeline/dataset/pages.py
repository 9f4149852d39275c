"""Embeddings out of the pages of a Parquet column chunk, straight into the memory where they are wanted.

What `PartitionWriter` writes of a float32 model is a plain copy of the numbers, behind levels that say of each of them whether
it begins a row. Arrow decodes those levels one by one: 250 ms of a core for 205 MB, where reading the bytes takes 25. Only
chunks whose pages hold nothing but full lists of numbers are read here; of others, and of damaged ones, Arrow decides.

Format: https://parquet.apache.org/docs/file-format/data-pages/, with page headers in Thrift's compact protocol.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

HEADER_BYTES = 512
"""A page's header is shorter, unless it has statistics, which embeddings never have."""
Spans = list[tuple[int, int]]
_DATA_PAGE, _PLAIN, _RLE = 0, 0, 3


class PlainNumbers:
    """The numbers of a column chunk as one stretch, read from any place on."""

    def __init__(self, file: BinaryIO, start: int, spans: Spans) -> None:
        """Begin with the first.

        Args:
            file: unbuffered, or in memory.
            start: where the first page begins.
            spans: what `plain_spans` has found.
        """
        self._file, self._start, self._spans = file, start, spans
        self._ends = list(itertools.accumulate(num_bytes for _, num_bytes in spans))
        self._position = 0

    def seek(self, number: int) -> None:
        """Go on with this one."""
        self._position = 4 * number

    def readinto(self, out: NDArray[np.float32]) -> None:
        """Fill `out`, contiguous float32, with the next numbers.

        Raises:
            ValueError: there are not so many.
        """
        target, filled = out.reshape(-1).view(np.uint8).data, 0
        page = bisect.bisect_right(self._ends, self._position)
        while filled < len(target):
            if page == len(self._spans):
                raise ValueError("its pages end early")
            offset, num_bytes = self._spans[page]
            passed = self._position - (self._ends[page] - num_bytes)
            size = min(num_bytes - passed, len(target) - filled)
            self._file.seek(self._start + offset + passed)
            if self._file.readinto(target[filled : filled + size]) != size:  # type: ignore[attr-defined]
                raise ValueError("a page ends early")
            filled, self._position, page = filled + size, self._position + size, page + 1


def plain_spans(file: BinaryIO, start: int, num_bytes: int, count: int) -> Spans | None:
    """Where the float32 numbers of a column chunk lie that is not compressed.

    Args:
        file: unbuffered, or in memory.
        start: where the first page begins.
        num_bytes: of all pages.
        count: numbers that there should be.

    Returns:
        Where they begin, counted from `start`, and their bytes, page by page. None if they do not lie there plainly, or are not
        exactly so many.
    """
    position, end = start, start + num_bytes
    spans: Spans = []
    try:
        while position < end:
            header, length = _struct(_read(file, position, min(HEADER_BYTES, end - position)), 0)
            values, position = position + length, position + length + header[3]
            data = header[5]
            if header[1] != _DATA_PAGE or header[2] != header[3] or (data[2], data[3], data[4]) != (_PLAIN, _RLE, _RLE):
                return None
            for _ in ("repetition levels", "definition levels"):
                values += 4 + int.from_bytes(_read(file, values, 4), "little")
            # Nulls and empty lists have levels, but no number.
            size = 4 * data[1]
            if not 0 < size == position - values or position > end:
                return None
            spans.append((values - start, size))
    except (IndexError, KeyError, TypeError, ValueError, RecursionError):
        return None
    return spans if sum(size for _, size in spans) == 4 * count else None


def _read(file: BinaryIO, position: int, num_bytes: int) -> bytes:
    file.seek(position)
    return file.read(num_bytes)


def _struct(data: bytes, position: int) -> tuple[Mapping[int, Any], int]:
    """A Thrift struct in the compact protocol: values by field number, and where it ends.

    Raises:
        IndexError: it does not end.
        ValueError: it has what no page header has.
    """
    fields: dict[int, Any] = {}
    number = 0
    while (head := data[position]) != 0:
        position += 1
        kind, step = head & 15, head >> 4
        if step:
            number += step
        else:
            number, position = _integer(data, position)
        if kind in (1, 2):
            fields[number] = kind == 1
        elif kind in (4, 5, 6):
            fields[number], position = _integer(data, position)
        elif kind == 12:
            fields[number], position = _struct(data, position)
        else:
            raise ValueError(f"kind {kind}")
    return fields, position + 1


def _integer(data: bytes, position: int) -> tuple[int, int]:
    """A number in zigzag, seven bits a byte."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return (value >> 1) ^ -(value & 1), position
        shift += 7
