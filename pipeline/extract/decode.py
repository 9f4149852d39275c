"""Encoded bytes to the uint8 picture that the backbone takes.

In: the bytes of one image. Out: the upright RGB picture, resized and cropped as the weights' own preset does, written into a
slot of the batch; float conversion and normalisation happen later, on the device. The picture of the default way `exact`
differs from the preset on PIL by at most rounding (0.01 of 255 on average). What cannot be decoded raises `SampleError`.

JPEGs go through libjpeg-turbo into memory that is used again; every other format, and the JPEGs that libjpeg-turbo does not
turn into RGB itself, go through PIL.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from pipeline.config import Preprocess
from pipeline.errors import SampleError

DECODE_VERSION = 3
"""Part of the recipe. Raise it with every change here that can change a pixel."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF")
"""PIL tries no other decoder, whatever the bytes look like."""

SCRATCH_BYTES = 48 << 20
"""Decoded pixels up to this size are written into memory that is used again; larger ones get memory of their own."""
MAX_FITS = 256
"""Sizes of pictures whose resize is remembered: a kilobyte each."""
MAX_ASPECT = 8
"""Beyond it only the part of the picture that the crop shows is resized: the whole would not fit into memory."""
MAX_SCANS = 64
"""Each scan of a progressive JPEG is a pass over the whole picture, and may be 20 bytes long. Encoders write about 10."""
MAX_SEGMENTS, MAX_EXIF_SEGMENTS, MAX_JUNK_BYTES = 4096, 64, 1 << 16
"""In the header of a JPEG. PIL copies EXIF anew with each segment of it, and passes over junk byte by byte."""
MAX_TILES = 1 << 19
"""Of a TIFF: PIL makes 400 bytes of objects for each of them when it opens the file."""
MAX_TILED = 8
"""Times the area of a picture that its tiles may have: one for each channel, but not thousands on top of each other."""
MAX_TAG_VALUES = 3 << 16
"""Of a TIFF's tag that PIL makes a number of each; the longest that is sound is a colour map."""
MAX_RUN_LENGTH_PIXELS = 1 << 24
"""PIL decodes run-length encoded BMPs in Python, pixel by pixel at worst: a second."""
_JUNK = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
_MARKER = re.compile(rb"\xff+([^\x00\xff])")
_SCAN_MARKER = re.compile(rb"\xff+([^\x00\x01\xd0-\xd7\xff])")
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_BARE = frozenset([0x01, *range(0xD0, 0xD8)])
"""Markers that nothing belongs to: libjpeg passes over them in a header."""
_SEGMENTS = frozenset([*_FRAMES, 0xC4, 0xCC, 0xDB, 0xDC, 0xDD, *range(0xE0, 0xF0), 0xFE])
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_TILE_WIDTH, _TILE_LENGTH, _STRIP_OFFSETS, _TILE_OFFSETS, _PLANAR = 322, 323, 273, 324, 284
_COUNTED_TAGS = frozenset(
    {_TILE_WIDTH, _TILE_LENGTH, _STRIP_OFFSETS, _TILE_OFFSETS}
    | {256, 257, 258, 259, 262, 266, 274, 277, 278, 282, 283, _PLANAR, 296, 320, 338, 339, 530}
)
"""Of a TIFF: those that PIL reads to open it."""
_WARNINGS = (
    "Corrupt JPEG data",
    "Premature end",
    "Inconsistent progression",
    "Invalid SOS parameters",
    "Unknown Adobe",
    "Warning: unknown JFIF",
)
"""What libjpeg only warns of, the first time: PIL hears nothing of it."""

# PIL warns of odd metadata, for each odd value anew. Once here: `warnings.catch_warnings` is not safe between threads.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `max_pixels` is held against the header

# The bindings behind `torch.nn.functional.interpolate(antialias=True)`: `torch.ops.aten` finds its operator anew on every call,
# which holds the interpreter lock for twice as long.
_RESIZE: dict[str, Any] = {
    "bilinear": torch._C._nn._upsample_bilinear2d_aa,
    "bicubic": torch._C._nn._upsample_bicubic2d_aa,
}
_PIL_RESIZE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class Decoder:
    """Decodes one image at a time into slots. One per thread: it holds that thread's scratch memory."""

    def __init__(self, preprocess: Preprocess, *, fast: bool, max_pixels: int) -> None:
        self._preprocess, self._fast, self._max_pixels = preprocess, fast, max_pixels
        # PIL's own limit stands behind ours: a GIF can have it fill the first frame before it says how large that is. It is one
        # for the process, raises an error at twice its value, and is never lowered here.
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, 2 * max_pixels)
        # Memory that is used again: blocks of this size that are freed between small ones that live on make glibc's heap grow
        # with every image. (250 kB each: 16 GB after 34,000.)
        self._scratch: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._resized = torch.empty(0, dtype=torch.uint8)
        self._fits: dict[tuple[Any, ...], _Fit] = {}
        """By size of pixels and original, for pixels in the scratch memory."""

    def __call__(self, data: bytes | memoryview, slot_HWC: torch.Tensor) -> tuple[int, int]:
        """Fill `slot_HWC` (crop, crop, 3) uint8 with the picture.

        Returns:
            Width and height in pixels of the upright original.

        Raises:
            SampleError: stage `decode`; the slot's content is then undefined.
        """
        if not data:
            raise SampleError("decode", "Empty", "the image has zero bytes")
        if data[:3] == b"\xff\xd8\xff":
            picture = self._jpeg(data)
            if picture is not None:
                pixels_HWC, width, height, in_scratch = picture
                self._fill(slot_HWC, pixels_HWC, width, height, in_scratch)
                return width, height
        try:
            image = self._pil(data)
        except SampleError:
            raise
        except UnidentifiedImageError:
            raise _not_an_image() from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise _too_many(f"its header claims more pixels than source.max_pixels = {self._max_pixels}") from None
        except Exception as error:  # a damaged file can make PIL's decoders raise nearly anything
            name = "Truncated" if "truncated" in str(error).lower() else "Corrupt"
            raise SampleError("decode", name, f"cannot be decoded: {type(error).__name__}: {error}") from None
        self._fill(slot_HWC, np.asarray(image), image.width, image.height)
        return image.size

    def _jpeg(self, data: bytes | memoryview) -> tuple[NDArray[np.uint8], int, int, bool] | None:
        """Upright pixels (H, W, 3), the original's width and height, and whether they lie in the scratch memory.

        None where PIL has to decide.
        """
        header = _header(data)
        width, height, is_rgb = header.width, header.height, header.num_components != 4
        if not width or not height:
            return None
        self._check_size(width, height)
        if header.may_have_many_scans and _num_scans(data, header.scan_at) > MAX_SCANS:
            raise SampleError("decode", "TooManyScans", f"has more than {MAX_SCANS} scans, each a pass over the whole picture")
        arguments: dict[str, Any] = {}
        if self._fast:
            # At least twice the target is kept on both sides, so antialiasing still has pixels to average. Halves only: between
            # them libjpeg-turbo has no vector code, and 3/8 takes longer than 4/8.
            reduced = 1
            while reduced < 8 and min(width, height) >= 4 * reduced * self._preprocess.resize:
                reduced *= 2
            arguments = {"min_height": -(-height // reduced), "min_width": -(-width // reduced)}
        if is_rgb and (num_bytes := width * height * 3) <= SCRATCH_BYTES:
            if self._scratch.size < num_bytes:
                self._scratch = np.empty(num_bytes, np.uint8)
                self._fits.clear()
            arguments["buffer"] = self._scratch
        pixels_HWC = _strict(data, "RGB" if is_rgb else "CMYK", arguments)
        if pixels_HWC is None or not is_rgb:  # PIL knows how to print four inks; whether they are damaged was seen here
            return None
        if not header.may_be_turned or (orientation := _orientation(data)) == 1:
            return pixels_HWC, width, height, "buffer" in arguments
        if orientation in (5, 6, 7, 8):
            width, height = height, width
        return _upright(pixels_HWC, orientation), width, height, False

    def _pil(self, data: bytes | memoryview) -> Image.Image:
        """The upright RGB picture through PIL."""
        if data[:2] in (b"II", b"MM"):
            self._check_tiff(data)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            self._check_size(*image.size)
            self._check_tiles(image)
            image.load()
            if image.format == "PNG" and _lacks_rows(image, data):
                raise SampleError("decode", "Truncated", "truncated PNG: its compressed rows end before the picture does")
            return ImageOps.exif_transpose(_rgb(image))

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self._max_pixels:
            raise _too_many(f"{width} x {height} pixels are more than source.max_pixels = {self._max_pixels}")

    def _check_tiff(self, data: bytes | memoryview) -> None:
        """Refuse what PIL would take too much memory for as soon as it opens it, or libtiff for one tile."""
        tags = _tiff_tags(data)
        width, height = (tags[tag][1] if tag in tags else 1 for tag in (_TILE_WIDTH, _TILE_LENGTH))
        if width * height > self._max_pixels:
            raise _too_many(f"tiles of {width} x {height} pixels are more than source.max_pixels = {self._max_pixels}")
        for tag, (count, _) in tags.items():
            if count > (MAX_TILES if tag in (_STRIP_OFFSETS, _TILE_OFFSETS) else MAX_TAG_VALUES):
                raise SampleError("decode", "Corrupt", f"its tag {tag} claims {count} values")

    @staticmethod
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

    def _fill(
        self, slot_HWC: torch.Tensor, pixels_HWC: NDArray[np.uint8], width: int, height: int, in_scratch: bool = False
    ) -> None:
        """Resize the shorter side and take the centre, as torchvision's Resize and CenterCrop do.

        `width` and `height` are the original's; after a reduced decode the pixels are fewer.
        """
        key = (pixels_HWC.shape, width, height)
        fit = self._fits.get(key) if in_scratch else None
        if fit is None:
            size = self._preprocess.resize
            if int(size * max(width, height) / min(width, height)) > MAX_ASPECT * size:
                self._fill_from_strip(slot_HWC, pixels_HWC, width, height)
                return
            fit = self._new_fit(pixels_HWC, width, height)
            if in_scratch and len(self._fits) < MAX_FITS:
                self._fits[key] = fit
        resize = _RESIZE[self._preprocess.interpolation]
        resize(fit.image_1CHW, fit.size, False, *fit.scale, out=fit.resized_1CHW)
        slot_HWC.copy_(fit.crop_HWC)

    def _new_fit(self, pixels_HWC: NDArray[np.uint8], width: int, height: int) -> _Fit:
        new_width, new_height, top, left = self._geometry(width, height)
        if not (pixels_HWC.flags.c_contiguous and pixels_HWC.flags.writeable):
            pixels_HWC = np.array(pixels_HWC, order="C")
        height, width, _ = pixels_HWC.shape  # after a reduced decode fewer than the original's
        # What lies right of and below the crop is not computed; the scale is that of the whole. (A side of equal length in and
        # out would not be resized at all, whatever the scale: it gets a line more.)
        crop = self._preprocess.crop
        bottom = top + crop + (top + crop == height != new_height)
        right = left + crop + (left + crop == width != new_width)
        if self._resized.numel() < bottom * right * 3:
            self._resized = torch.empty(bottom * right * 3, dtype=torch.uint8)
            self._fits.clear()
        # The uint8 kernel is fast only for this strided layout (0.6 ms against 2 ms for 500 x 375).
        return _Fit(
            image_1CHW=torch.from_numpy(pixels_HWC).as_strided((1, 3, height, width), (3 * height * width, 1, 3 * width, 3)),
            size=[bottom, right],
            scale=(new_height / height, new_width / width),
            resized_1CHW=self._resized.as_strided((1, 3, bottom, right), (3 * bottom * right, 1, 3 * right, 3)),
            crop_HWC=self._resized.as_strided((crop, crop, 3), (3 * right, 3, 1), 3 * (top * right + left)),
        )

    def _fill_from_strip(self, slot_HWC: torch.Tensor, pixels_HWC: NDArray[np.uint8], width: int, height: int) -> None:
        """The same for a picture whose whole would not fit into memory once its shorter side has the target's length."""
        new_width, new_height, top, left = self._geometry(width, height)
        crop = self._preprocess.crop
        scale_x, scale_y = pixels_HWC.shape[1] / new_width, pixels_HWC.shape[0] / new_height
        box = (left * scale_x, top * scale_y, (left + crop) * scale_x, (top + crop) * scale_y)
        fitted = Image.fromarray(pixels_HWC).resize((crop, crop), _PIL_RESIZE[self._preprocess.interpolation], box=box)
        slot_HWC.copy_(torch.from_numpy(np.array(fitted)))

    def _geometry(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Width and height after the resize, top and left of the crop in it."""
        size, crop = self._preprocess.resize, self._preprocess.crop
        scaled = int(size * max(width, height) / min(width, height))
        new_width, new_height = (size, scaled) if width <= height else (scaled, size)
        return new_width, new_height, round((new_height - crop) / 2), round((new_width - crop) / 2)


@dataclass(slots=True, kw_only=True)
class _Fit:
    """A resize and crop with its tensors made. Most pictures of a source have few sizes, and need them once."""

    image_1CHW: torch.Tensor
    size: list[int]
    scale: tuple[float, float]
    resized_1CHW: torch.Tensor
    crop_HWC: torch.Tensor


def _strict(encoded: bytes | memoryview, colorspace: str, arguments: dict[str, Any]) -> NDArray[np.uint8] | None:
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


@dataclass(slots=True)
class _Header:
    """What the header of a JPEG says before its first scan."""

    width: int = 0
    height: int = 0
    num_components: int = 0
    may_be_turned: bool = False
    """A segment names an orientation."""
    may_have_many_scans: bool = False
    scan_at: int = 0


def _header(data: bytes | memoryview) -> _Header:
    """Read the header just as libjpeg does: what it takes for the frame has to be what was held against `max_pixels`.

    libjpeg-turbo's own would be a second call, and says nothing of EXIF.

    Raises:
        SampleError: no picture follows, or there is more of it than anyone writes.
    """
    header, frame, position, num_bytes_junk, num_exif = _Header(), 0, 2, 0, 0
    end = len(data) - 10
    for _ in range(MAX_SEGMENTS):
        if position <= end and data[position] == 0xFF and data[position + 1] not in (0, 0xFF):
            marker, position = data[position + 1], position + 2
        elif (found := _MARKER.search(data, position)) is not None:
            num_bytes_junk += found.start() - position
            marker, position = found[1][0], found.end()
        else:
            raise _not_an_image() if position <= len(data) else _cut_in_header()
        if num_bytes_junk > MAX_JUNK_BYTES:
            break
        if marker in _BARE:
            continue
        if position > end + 2 or marker == _END_OF_IMAGE:
            raise _not_an_image() if marker == _END_OF_IMAGE else _cut_in_header()
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


def _num_scans(data: bytes | memoryview, position: int) -> int:
    """Scans from `position` to the end of the picture; not counted beyond one more than `MAX_SCANS`."""
    num_scans = 0
    while num_scans <= MAX_SCANS and (found := _SCAN_MARKER.search(data, position)) is not None:
        if found[1][0] == _END_OF_IMAGE:
            break
        num_scans += found[1][0] == _START_OF_SCAN
        position = found.end() + max(2, int.from_bytes(data[found.end() : found.end() + 2], "big"))
    return num_scans


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


def _not_an_image() -> SampleError:
    return SampleError("decode", "NotAnImage", f"not a picture in any of {', '.join(FORMATS)}")


def _cut_in_header() -> SampleError:
    return SampleError("decode", "Truncated", "truncated JPEG: it ends in its header")


def _too_many(message: str) -> SampleError:
    return SampleError("decode", "TooManyPixels", message)


def _orientation(data: bytes | memoryview) -> int:
    """Orientation (1 to 8) of a JPEG that PIL finds in its EXIF or XMP."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return _exif_orientation(image)
    except Exception:  # the pixels were decoded: EXIF that PIL cannot read changes nothing
        return 1


def _upright(pixels_HWC: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undo an EXIF orientation; a view where it can be."""
    if orientation in (5, 6, 7, 8):
        pixels_HWC = pixels_HWC.transpose(1, 0, 2)
    flip_y = slice(None, None, -1) if orientation in (3, 4, 7, 8) else slice(None)
    flip_x = slice(None, None, -1) if orientation in (2, 3, 6, 7) else slice(None)
    return pixels_HWC[flip_y, flip_x]
