"""JPEGs through libjpeg-turbo, which passes over damage with a warning at most: what it warns of is refused here, unless the
picture is whole.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from pipeline.errors import SampleError
from pipeline.extract.pil import not_an_image

MAX_SCANS = 64
"""Each scan of a progressive JPEG is a pass over the whole picture, and may be 20 bytes long. Encoders write about 10."""
MAX_SEGMENTS, MAX_EXIF_SEGMENTS, MAX_JUNK_BYTES = 4096, 64, 1 << 16
"""In the header of a JPEG. PIL copies EXIF anew with each segment of it, and passes over junk byte by byte."""
_JUNK = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
_MARKER = re.compile(rb"\xff+([^\x00\xff])")
_SCAN_MARKER = re.compile(rb"\xff+([^\x00\x01\xd0-\xd7\xff])")
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_BARE = frozenset([0x01, *range(0xD0, 0xD8)])
"""Markers that nothing belongs to: libjpeg passes over them in a header."""
_SEGMENTS = frozenset([*_FRAMES, 0xC4, 0xCC, 0xDB, 0xDC, 0xDD, *range(0xE0, 0xF0), 0xFE])
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_WARNINGS = (
    "Corrupt JPEG data",
    "Premature end",
    "Inconsistent progression",
    "Invalid SOS parameters",
    "Unknown Adobe",
    "Warning: unknown JFIF",
)
"""What libjpeg only warns of, the first time: PIL hears nothing of it."""


@dataclass(slots=True)
class Header:
    """What the header of a JPEG says before its first scan."""

    width: int = 0
    height: int = 0
    num_components: int = 0
    may_be_turned: bool = False
    """A segment names an orientation."""
    may_have_many_scans: bool = False
    scan_at: int = 0


def read_header(data: bytes | memoryview) -> Header:
    """Read the header just as libjpeg does: what it takes for the frame has to be what was held against `max_pixels`.

    libjpeg-turbo's own would be a second call, and says nothing of EXIF.

    Raises:
        SampleError: no picture follows, or there is more of it than anyone writes.
    """
    header, frame, position, num_bytes_junk, num_exif = Header(), 0, 2, 0, 0
    end = len(data) - 10
    for _ in range(MAX_SEGMENTS):
        if position <= end and data[position] == 0xFF and data[position + 1] not in (0, 0xFF):
            marker, position = data[position + 1], position + 2
        elif (found := _MARKER.search(data, position)) is not None:
            num_bytes_junk += found.start() - position
            marker, position = found[1][0], found.end()
        else:
            raise not_an_image() if position <= len(data) else _cut_in_header()
        if num_bytes_junk > MAX_JUNK_BYTES:
            break
        if marker in _BARE:
            continue
        if position > end + 2 or marker == _END_OF_IMAGE:
            raise not_an_image() if marker == _END_OF_IMAGE else _cut_in_header()
        if marker == _START_OF_SCAN:
            header.scan_at = position - 2
            header.may_have_many_scans = frame in (0xC2, 0xCA) or data[position + 2] < header.num_components
            return header
        if marker in _FRAMES and not frame:
            frame = marker
            header.height = data[position + 3] << 8 | data[position + 4]
            header.width = data[position + 5] << 8 | data[position + 6]
            header.num_components = data[position + 7]
        num_bytes = data[position] << 8 | data[position + 1]
        if marker == 0xE1:
            segment = bytes(data[position + 2 : position + num_bytes])
            has_exif = segment.startswith(b"Exif\0\0")
            header.may_be_turned = header.may_be_turned or has_exif or b"tiff:Orientation" in segment
            num_exif += has_exif
        elif marker not in _SEGMENTS:
            break
        if num_exif > MAX_EXIF_SEGMENTS:
            break
        position += max(2, num_bytes)
    raise SampleError("decode", "Corrupt", "damaged JPEG: its header does not lead to a picture")


def check_scans(data: bytes | memoryview, header: Header) -> None:
    """Refuse a picture of more scans than anyone writes."""
    if header.may_have_many_scans and _num_scans(data, header.scan_at) > MAX_SCANS:
        raise SampleError("decode", "TooManyScans", f"has more than {MAX_SCANS} scans, each a pass over the whole picture")


def _num_scans(data: bytes | memoryview, position: int) -> int:
    """Scans from `position` to the end of the picture; not counted beyond one more than `MAX_SCANS`."""
    num_scans = 0
    while num_scans <= MAX_SCANS and (found := _SCAN_MARKER.search(data, position)) is not None:
        if found[1][0] == _END_OF_IMAGE:
            break
        num_scans += found[1][0] == _START_OF_SCAN
        position = found.end() + max(2, int.from_bytes(data[found.end() : found.end() + 2], "big"))
    return num_scans


def strict(encoded: bytes | memoryview, colorspace: str, arguments: dict[str, Any]) -> NDArray[np.uint8] | None:
    """Pixels of an undamaged JPEG; None where PIL has to decide, which passes over damaged entropy data in silence."""
    try:
        pixels_HWC: NDArray[np.uint8] = simplejpeg.decode_jpeg(encoded, colorspace, **arguments)
        return pixels_HWC
    except ValueError as error:
        message, data = str(error), bytes(encoded)
    if message.startswith("Premature end") and b"\xff\xc2" not in data:
        # Perhaps only the end marker is missing: given one, a picture that was cut short still lacks data. Not so a
        # progressive one that was cut between two scans, so PIL refuses all of those.
        try:
            complete_HWC: NDArray[np.uint8] = simplejpeg.decode_jpeg(data + b"\xff\xd9", colorspace, **arguments)
            return complete_HWC
        except ValueError as error:
            raise SampleError("decode", "Truncated", f"truncated JPEG: {error}") from None
    if not message.startswith(_WARNINGS) or message.startswith("Premature end") or _is_padding(message, data):
        return None
    # The first warning hides all others. What comes from an odd but harmless header is mended, and the rest is held against
    # the same measure.
    mended = _mended(data, ycck=colorspace == "CMYK")
    if mended != data:
        try:
            mended_HWC: NDArray[np.uint8] = simplejpeg.decode_jpeg(mended, colorspace, **arguments)
            return mended_HWC
        except ValueError as error:
            message = str(error)
    raise SampleError("decode", "Truncated" if "Premature end" in message else "Corrupt", f"damaged JPEG: {message}")


def remains(encoded: bytes | memoryview) -> NDArray[np.uint8] | None:
    """What a damaged JPEG still shows, (H, W, 3) RGB, for a person to look at; None where that is nothing."""
    try:
        pixels_HWC: NDArray[np.uint8] = simplejpeg.decode_jpeg(encoded, "RGB", strict=False)
        return pixels_HWC
    except ValueError:
        return None


def _is_padding(message: str, data: bytes) -> bool:
    """Whether libjpeg-turbo complains only of zeros before the end marker.

    Entropy data that lost its place has bytes left over before the next restart, table, scan or end marker.
    """
    junk = _JUNK.search(message)
    end = data.rfind(b"\xff\xd9")
    return junk is not None and not data[max(0, end - int(junk[1])) : end].strip(b"\0")


def _mended(data: bytes, *, ycck: bool) -> bytes:
    """A JPEG without what decoders pass over in its header: bytes between segments, versions and codes of the future, and
    parameters that a sequential picture does not use.
    """
    parts, position, is_sequential = [b"\xff\xd8"], 2, False
    while (found := _MARKER.search(data, position)) is not None:
        marker, start = found[1][0], found.end()
        position = start if marker in _BARE else start + max(2, int.from_bytes(data[start : start + 2], "big"))
        segment = data[start:position]
        if marker in _FRAMES:
            is_sequential = marker in (0xC0, 0xC1, 0xC9)
        elif marker == 0xE0 and segment[2:7] == b"JFIF\0" and segment[7:8] not in (b"\1", b"\2"):
            segment = segment[:7] + b"\1" + segment[8:]
        elif marker == 0xEE and segment[2:7] == b"Adobe" and segment[13:14] not in (b"\0", b"\2" if ycck else b"\1"):
            segment = segment[:13] + (b"\2" if ycck else b"\1") + segment[14:]  # what libjpeg takes it for
        elif marker == _START_OF_SCAN and is_sequential:
            segment = segment[:-3] + b"\x00\x3f\x00"
        parts += [b"\xff", found[1], segment]
        if marker == _START_OF_SCAN:
            break
    return b"".join([*parts, data[position:]])


def _cut_in_header() -> SampleError:
    return SampleError("decode", "Truncated", "truncated JPEG: it ends in its header")
