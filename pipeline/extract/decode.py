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
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from pipeline.config import Preprocess
from pipeline.errors import SampleError

DECODE_VERSION = 2
"""Part of the recipe. Raise it with every change here that can change a pixel."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF")
"""PIL tries no other decoder, whatever the bytes look like."""

SCRATCH_BYTES = 48 << 20
"""Decoded pixels up to this size are written into memory that is used again; larger ones get memory of their own."""
MAX_FITS = 256
"""Sizes of pictures whose resize is remembered: a kilobyte each."""
MAX_ASPECT = 8
"""Beyond it only the part of the picture that the crop shows is resized: the whole would not fit into memory."""
_JUNK = re.compile(r"(\d+) extraneous bytes before marker 0x(..)")
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_HEADER_MARKERS = frozenset([0xC0, 0xC1, 0xC2, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE])

# PIL warns of odd metadata, for each odd value anew. Once here: `warnings.catch_warnings` is not safe between threads.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
Image.MAX_IMAGE_PIXELS = None  # `max_pixels` is checked from the header instead, before any pixel is decoded

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
            raise SampleError("decode", "NotAnImage", f"not a picture in any of {', '.join(FORMATS)}") from None
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
        if header is None:
            return None
        width, height, is_rgb, may_be_turned = header
        self._check_size(width, height)
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
        if not may_be_turned or (orientation := _orientation(data)) == 1:
            return pixels_HWC, width, height, "buffer" in arguments
        if orientation in (5, 6, 7, 8):
            width, height = height, width
        return _upright(pixels_HWC, orientation), width, height, False

    def _pil(self, data: bytes | memoryview) -> Image.Image:
        """The upright RGB picture through PIL."""
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            self._check_size(*image.size)
            image.load()
            return ImageOps.exif_transpose(_rgb(image))

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self._max_pixels:
            raise SampleError(
                "decode", "TooManyPixels", f"{width} x {height} pixels are more than source.max_pixels = {self._max_pixels}"
            )

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
    if "Corrupt JPEG data" in message and not _is_padding(message, data):
        raise SampleError("decode", "Corrupt", f"damaged JPEG: {message}")
    return None


def _is_padding(message: str, data: bytes) -> bool:
    """Whether libjpeg-turbo complains only of bytes between header segments, or of zeros before the end marker.

    Entropy data that lost its place has bytes left over before the next restart, table, scan or end marker.
    """
    junk = _JUNK.search(message)
    if junk is None:
        return False
    num_bytes, marker = int(junk[1]), int(junk[2], 16)
    if marker == 0xD9:
        end = data.rfind(b"\xff\xd9")
        return not data[max(0, end - num_bytes) : end].strip(b"\0")
    return marker in _HEADER_MARKERS


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


def _header(data: bytes | memoryview) -> tuple[int, int, bool, bool] | None:
    """Width, height, whether it is no four-ink picture, and whether a segment names an orientation; None where it is damaged.

    libjpeg-turbo's own would be a second call, and says nothing of EXIF.
    """
    position, end = 2, len(data) - 10
    width = height = num_components = 0
    may_be_turned = False
    while position <= end and data[position] == 0xFF:
        marker, num_bytes = data[position + 1], data[position + 2] << 8 | data[position + 3]
        if marker == 0xDA:  # entropy data from here on
            return (width, height, num_components != 4, may_be_turned) if width and height else None
        if marker in _FRAMES and not num_components:
            height = data[position + 5] << 8 | data[position + 6]
            width = data[position + 7] << 8 | data[position + 8]
            num_components = data[position + 9]
        elif marker == 0xE1:
            segment = bytes(data[position + 4 : position + 2 + num_bytes])
            may_be_turned = may_be_turned or segment.startswith(b"Exif\0\0") or b"tiff:Orientation" in segment
        position += 2 + num_bytes if marker != 0xFF else 1
    try:  # bytes between segments, which libjpeg-turbo skips
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return width, height, colorspace in ("YCbCr", "Gray", "RGB"), True


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
