"""Encoded bytes to the uint8 picture that the backbone takes.

In: the bytes of one image. Out: the upright RGB picture, resized and cropped as the weights' own preset does, written into a
slot of the batch; float conversion and normalisation happen later, on the device. The picture of the default way `exact`
differs from the preset on PIL by at most rounding (0.01 of 255 on average). What cannot be decoded raises `SampleError`.

JPEGs go through libjpeg-turbo (`jpeg.py`) into memory that is used again; every other format, and the JPEGs that libjpeg-turbo
does not turn into RGB itself, go through PIL (`pil.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import Preprocess
from pipeline.errors import SampleError
from pipeline.extract import jpeg, pil

DECODE_VERSION = 3
"""Part of the recipe. Raise it with every change here that can change a pixel."""

SCRATCH_BYTES = 48 << 20
"""Decoded pixels up to this size are written into memory that is used again; larger ones get memory of their own."""
MAX_FITS = 256
"""Sizes of pictures whose resize is remembered: a kilobyte each."""
MAX_ASPECT = 8
"""Beyond it only the part of the picture that the crop shows is resized: the whole would not fit into memory."""

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
        pil.allow(max_pixels)
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
        image = pil.picture(data, self._max_pixels)
        self._fill(slot_HWC, np.asarray(image), image.width, image.height)
        return image.size

    def _jpeg(self, data: bytes | memoryview) -> tuple[NDArray[np.uint8], int, int, bool] | None:
        """Upright pixels (H, W, 3), the original's width and height, and whether they lie in the scratch memory.

        None where PIL has to decide.
        """
        header = jpeg.read_header(data)
        width, height, is_rgb = header.width, header.height, header.num_components != 4
        if not width or not height:
            return None
        pil.check_size(width, height, self._max_pixels)
        jpeg.check_scans(data, header)
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
        pixels_HWC = jpeg.strict(data, "RGB" if is_rgb else "CMYK", arguments)
        if pixels_HWC is None or not is_rgb:  # PIL knows how to print four inks; whether they are damaged was seen here
            return None
        if not header.may_be_turned or (orientation := pil.jpeg_orientation(data)) == 1:
            return pixels_HWC, width, height, "buffer" in arguments
        if orientation in (5, 6, 7, 8):
            width, height = height, width
        return _upright(pixels_HWC, orientation), width, height, False

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


def _upright(pixels_HWC: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undo an EXIF orientation; a view where it can be."""
    if orientation in (5, 6, 7, 8):
        pixels_HWC = pixels_HWC.transpose(1, 0, 2)
    flip_y = slice(None, None, -1) if orientation in (3, 4, 7, 8) else slice(None)
    flip_x = slice(None, None, -1) if orientation in (2, 3, 6, 7) else slice(None)
    return pixels_HWC[flip_y, flip_x]
