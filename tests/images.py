"""Pictures, encoded images and tars, made in memory and the same every time."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from functools import cache

import numpy as np
from PIL import Image


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """An RGB picture that compresses like a photograph: soft gradients, an edge, a little texture."""
    return _photo(width, height, seed).copy()


@cache
def _photo(width: int, height: int, seed: int) -> Image.Image:
    random = np.random.default_rng(seed)
    y_H11, x_W1 = np.arange(height)[:, None, None], np.arange(width)[:, None]
    phases_C = random.uniform(0, 6, 3)
    across_W3, down_H13 = 60 * np.sin(x_W1 / 41 + phases_C), 50 * np.cos(y_H11 / 29 - phases_C)
    pixels_HWC = (120 + across_W3 + down_H13).astype(np.float32)
    pixels_HWC += 30 * ((x_W1 + 2 * y_H11) % 160 < 60)
    pixels_HWC += 8 * random.standard_normal((height, width, 1), np.float32)
    return Image.fromarray(np.clip(pixels_HWC, 0, 255).astype(np.uint8))


def encode(image: Image.Image, image_format: str = "JPEG", **options: object) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def jpeg(seed: int = 0, width: int = 32, height: int = 24) -> bytes:
    """A small JPEG; another seed is another picture."""
    return encode(photo(width, height, seed), quality=85)


def member(name: str, payload: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    """A member of a tar; `fields` are attributes of its TarInfo, `type` and `linkname` for example."""
    info = tarfile.TarInfo(name)
    info.size = len(payload)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, payload


def tar(
    members: Iterable[tuple[str, bytes] | tuple[tarfile.TarInfo, bytes]],
    mode: str = "w",
    archive_format: int = tarfile.PAX_FORMAT,
) -> bytes:
    """The bytes of an archive with these members in this order."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode, format=archive_format, errors="surrogateescape") as archive:
        for name, payload in members:
            info = member(name, payload)[0] if isinstance(name, str) else name
            archive.addfile(info, io.BytesIO(payload))
    return file.getvalue()
