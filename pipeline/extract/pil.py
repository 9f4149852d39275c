"""Pictures of every format through PIL, held against what they may claim before a pixel of them is decoded."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from pipeline.errors import SampleError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF")
"""PIL tries no other decoder, whatever the bytes look like."""
MAX_TILES = 1 << 19
"""Of a TIFF: PIL makes 400 bytes of objects for each of them when it opens the file."""
MAX_TILED = 8
"""Times the area of a picture that its tiles may have: one for each channel, but not thousands on top of each other."""
MAX_TAG_VALUES = 3 << 16
"""Of a TIFF's tag that PIL makes a number of each; the longest that is sound is a colour map."""
MAX_RUN_LENGTH_PIXELS = 1 << 24
"""PIL decodes run-length encoded BMPs in Python, pixel by pixel at worst: a second."""
_TILE_WIDTH, _TILE_LENGTH, _STRIP_OFFSETS, _TILE_OFFSETS, _PLANAR = 322, 323, 273, 324, 284
_COUNTED_TAGS = frozenset(
    {_TILE_WIDTH, _TILE_LENGTH, _STRIP_OFFSETS, _TILE_OFFSETS}
    | {256, 257, 258, 259, 262, 266, 274, 277, 278, 282, 283, _PLANAR, 296, 320, 338, 339, 530}
)
"""Of a TIFF: those that PIL reads to open it."""

# PIL warns of odd metadata, for each odd value anew. Once here: `warnings.catch_warnings` is not safe between threads.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `max_pixels` is held against the header


def picture(data: bytes | memoryview, max_pixels: int) -> Image.Image:
    """The upright RGB picture.

    Raises:
        SampleError: stage `decode`, whatever PIL makes of the bytes.
    """
    try:
        if data[:2] in (b"II", b"MM"):
            _check_tiff(data, max_pixels)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_size(*image.size, max_pixels)
            _check_tiles(image)
            image.load()
            if image.format == "PNG" and _lacks_rows(image, data):
                raise SampleError("decode", "Truncated", "truncated PNG: its compressed rows end before the picture does")
            return ImageOps.exif_transpose(_rgb(image))
    except SampleError:
        raise
    except UnidentifiedImageError:
        raise not_an_image() from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many(f"its header claims more pixels than source.max_pixels = {max_pixels}") from None
    except Exception as error:  # a damaged file can make PIL's decoders raise nearly anything
        name = "Truncated" if "truncated" in str(error).lower() else "Corrupt"
        raise SampleError("decode", name, f"cannot be decoded: {type(error).__name__}: {error}") from None


def allow(max_pixels: int) -> None:
    """Let PIL's own limit stand behind ours: a GIF can have it fill the first frame before it says how large that is.

    It is one for the process, raises an error at twice its value, and is never lowered here.
    """
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, 2 * max_pixels)


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Refuse a picture of too many pixels."""
    if width * height > max_pixels:
        raise _too_many(f"{width} x {height} pixels are more than source.max_pixels = {max_pixels}")


def jpeg_orientation(data: bytes | memoryview) -> int:
    """Orientation (1 to 8) of a JPEG that PIL finds in its EXIF or XMP."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return _exif_orientation(image)
    except Exception:  # the pixels were decoded: EXIF that PIL cannot read changes nothing
        return 1


def not_an_image() -> SampleError:
    """Of bytes that no decoder takes."""
    return SampleError("decode", "NotAnImage", f"not a picture in any of {', '.join(FORMATS)}")


def _too_many(message: str) -> SampleError:
    return SampleError("decode", "TooManyPixels", message)


def _check_tiff(data: bytes | memoryview, max_pixels: int) -> None:
    """Refuse what PIL would take too much memory for as soon as it opens it, or libtiff for one tile."""
    tags = _tiff_tags(data)
    width, height = (tags[tag][1] if tag in tags else 1 for tag in (_TILE_WIDTH, _TILE_LENGTH))
    if width * height > max_pixels:
        raise _too_many(f"tiles of {width} x {height} pixels are more than source.max_pixels = {max_pixels}")
    for tag, (count, _) in tags.items():
        if count > (MAX_TILES if tag in (_STRIP_OFFSETS, _TILE_OFFSETS) else MAX_TAG_VALUES):
            raise SampleError("decode", "Corrupt", f"its tag {tag} claims {count} values")


def _check_tiles(image: Image.Image) -> None:
    """Refuse a picture of many pieces on top of each other, which would be decoded for hours, and one that lacks some."""
    width, height = image.size
    pieces = [each for each in getattr(image, "tile", []) if each[1] is not None]
    area = sum((right - left) * (bottom - top) for _, (left, top, right, bottom), *_ in pieces)
    if area > MAX_TILED * width * height:
        raise SampleError("decode", "Corrupt", f"its {len(pieces)} pieces lie on top of each other")
    if image.format == "TIFF":
        is_planar = image.tag_v2.get(_PLANAR) == 2 and pieces[0][0] == "raw"  # type: ignore[attr-defined]
        if area < width * height * (len(image.getbands()) if is_planar else 1):
            raise SampleError("decode", "Truncated", f"its {len(pieces)} pieces leave some of the picture out")
    if pieces and pieces[0][0] == "bmp_rle" and width * height > MAX_RUN_LENGTH_PIXELS:
        raise _too_many(f"{width} x {height} run-length encoded pixels are more than {MAX_RUN_LENGTH_PIXELS}")


def _tiff_tags(data: bytes | memoryview) -> dict[int, tuple[int, int]]:
    """Count of values of the tags that PIL makes numbers of, and the first where it stands in the entry.

    The larger where a tag comes twice. Raises SampleError where there are more tags than there can be.
    """
    order, is_big = "<" if data[:2] == b"II" else ">", data[2:3] == b"+"
    size, entry, at_value = (f"{order}Q", f"{order}HHQQ", 12) if is_big else (f"{order}I", f"{order}HHII", 8)
    number_of_entries = f"{order}Q" if is_big else f"{order}H"
    tags: dict[int, tuple[int, int]] = {}
    try:
        (at,) = struct.unpack_from(size, data, 8 if is_big else 4)
        (num_entries,) = struct.unpack_from(number_of_entries, data, at)
        at += struct.calcsize(number_of_entries)
        if num_entries > 1 << 16:
            raise SampleError("decode", "Corrupt", f"claims {num_entries} tags")
        for start in range(at, at + num_entries * struct.calcsize(entry), struct.calcsize(entry)):
            tag, kind, count, value = struct.unpack_from(entry, data, start)
            if tag in _COUNTED_TAGS:
                if kind in (3, 4):  # a shorter number lies at the beginning of its field
                    (value,) = struct.unpack_from(f"{order}{'H' if kind == 3 else 'I'}", data, start + at_value)
                known = tags.get(tag, (0, 0))
                tags[tag] = max(known[0], count), max(known[1], value)
    except struct.error:
        pass  # the directory goes beyond the end: PIL says so
    return tags


_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PNG_PASSES = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
"""Of an interlaced PNG: first column and row, and the steps from one to the next."""


def _lacks_rows(image: Image.Image, data: bytes | memoryview) -> bool:
    """Whether a PNG has fewer rows than its header says, which PIL leaves black without a word.

    They are counted only where the last row is black, or the picture interlaced.
    """
    width, height, depth, colour_type, _, _, is_interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    if not is_interlaced and np.asarray(image.crop((0, height - 1, width, height))).any():
        return False
    missing = 0
    for x, y, step_x, step_y in _PNG_PASSES if is_interlaced else [(0, 0, 1, 1)]:
        across, down = -(-(width - x) // step_x), -(-(height - y) // step_y)
        if across > 0:
            missing += down * (1 + (across * depth * _PNG_CHANNELS[colour_type] + 7) // 8)
    position, rows = 8, zlib.decompressobj()
    while missing > 0 and position + 8 <= len(data):
        (num_bytes,) = struct.unpack_from(">I", data, position)
        packed = data[position + 8 : position + 8 + num_bytes] if data[position + 4 : position + 8] == b"IDAT" else b""
        while packed and missing > 0:
            missing -= len(rows.decompress(packed, 1 << 20))
            packed = rows.unconsumed_tail
        position += 12 + num_bytes
    return missing > 0


def _rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode as RGB: 16 bits are scaled, not clipped; what is transparent lands on white, as on a page."""
    if image.mode.startswith("I;16"):
        return _from_16_bit(image, np.asarray(image))
    if image.mode == "I":
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise SampleError("decode", "UnknownRange", "32-bit pixels have no defined range")
        return _from_16_bit(image, values)
    if image.mode == "F":
        raise SampleError("decode", "UnknownRange", "floating-point pixels have no defined range")
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        flat = Image.new("RGBA", image.size, (255, 255, 255, 255))
        flat.alpha_composite(rgba)
        rgb = flat.convert("RGB")
    else:
        rgb = image.convert("RGB")
    return _with_exif(image, rgb)


def _from_16_bit(image: Image.Image, values_HW: NDArray[Any]) -> Image.Image:
    eight_bit = ((values_HW.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if isinstance(transparent := image.info.get("transparency"), int):
        eight_bit[values_HW == transparent] = 255
    return _with_exif(image, Image.fromarray(eight_bit).convert("RGB"))


def _with_exif(source: Image.Image, target: Image.Image) -> Image.Image:
    """Carry the orientation over a conversion; unreadable EXIF counts as none."""
    orientation = _exif_orientation(source)
    target.info.clear()
    if orientation != 1:
        target.getexif()[ExifTags.Base.Orientation] = orientation
    return target


def _exif_orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # malformed EXIF says nothing about the pixels
        return 1
    return orientation if orientation in range(1, 9) else 1
