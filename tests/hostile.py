"""Images that are damaged, odd or meant to harm, each with what has to come out of it.

All are made here, the same every time, when they are first asked for: nothing in them is anybody's data. The table is `IMAGES`;
the names of its entries are those of the tests, and the keys of the samples.
"""

from __future__ import annotations

import io
import pickle
import random
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from images import encode, jpeg, photo
from PIL import Image

CANARY = Path(tempfile.gettempdir()) / "hostile-canary"
"""What unpickling one of these would create."""

Picture = Callable[[], Image.Image]


@dataclass(frozen=True)
class Row:
    """A good row."""

    width: int
    height: int
    picture: Picture | None = None
    """The upright picture that it has to be of; None where only the size is known."""


@dataclass(frozen=True)
class Refused:
    """A row of the quarantine."""

    stage: str
    error: str


@dataclass(frozen=True)
class Hostile:
    """An encoded image, or what claims to be one."""

    make: Callable[[], bytes]
    expected: Row | Refused
    extension: str = "jpg"

    @property
    def data(self) -> bytes:
        """Its bytes."""
        return made(self.make)


@cache
def made(make: Callable[[], bytes]) -> bytes:
    """What a table's entry makes, made once."""
    return make()


# Images


WIDTH, HEIGHT = 96, 72


@cache
def plain(image_format: str = "JPEG", mode: str = "RGB", **options: Any) -> bytes:
    """The picture that most of these are made from, undamaged."""
    options = {"quality": 90, **options} if image_format == "JPEG" else options
    return encode(photo(WIDTH, HEIGHT).convert(mode), image_format, **options)


def shown(image_format: str = "JPEG", mode: str = "RGB", **options: Any) -> Picture:
    """What PIL sees in `plain(…)`."""
    return lambda: Image.open(io.BytesIO(plain(image_format, mode, **options))).convert("RGB")


def turned() -> Image.Image:
    return shown()().transpose(Image.Transpose.ROTATE_270)


def flat(width: int, height: int, colour: tuple[int, int, int]) -> Picture:
    return lambda: Image.new("RGB", (width, height), colour)


PLAIN = Row(WIDTH, HEIGHT, shown())
NOT_AN_IMAGE = Refused("decode", "NotAnImage")
TRUNCATED = Refused("decode", "Truncated")
CORRUPT = Refused("decode", "Corrupt")
TOO_MANY_PIXELS = Refused("decode", "TooManyPixels")


def png(
    width: int = WIDTH,
    height: int = HEIGHT,
    *,
    rows: bytes | None = None,
    bit_depth: int = 8,
    colour_type: int = 2,
    interlaced: bool = False,
    before: Sequence[tuple[bytes, bytes]] = (),
) -> bytes:
    """A PNG whose header need not fit its rows; `before` are chunks that stand before those."""
    if rows is None:
        rows = b"".join(b"\0" + row.tobytes() for row in np.asarray(photo(WIDTH, HEIGHT)))
    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, interlaced)
    chunks = [(b"IHDR", header), *before, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*each) for each in chunks)


def png_chunk(name: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + name + payload + struct.pack(">I", zlib.crc32(name + payload))


def adam7() -> bytes:
    """The rows of the seven passes of an interlaced PNG."""
    pixels_HWC = np.asarray(photo(WIDTH, HEIGHT))
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    return b"".join(b"\0" + row.tobytes() for x, y, dx, dy in passes for row in pixels_HWC[y::dy, x::dx])


def deep_rows(channels: int) -> bytes:
    """The photograph with 16 bits a channel."""
    pixels_HWC = np.asarray(photo(WIDTH, HEIGHT).convert("RGB" if channels == 3 else "L"))
    return b"".join(b"\0" + (row.astype(np.uint16) * 257).astype(">u2").tobytes() for row in pixels_HWC)


def half_transparent_deep() -> bytes:
    """16 bits of grey, the left half of the colour that counts as transparent."""
    values_HW = np.full((HEIGHT, WIDTH), 20_000, np.uint16)
    values_HW[:, : WIDTH // 2] = 1_000
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values_HW)
    return png(rows=rows, bit_depth=16, colour_type=0, before=[(b"tRNS", struct.pack(">H", 1_000))])


def half_white() -> Image.Image:
    image = Image.new("RGB", (WIDTH, HEIGHT), (78, 78, 78))  # 20,000 / 257
    image.paste((255, 255, 255), (0, 0, WIDTH // 2, HEIGHT))
    return image


def transparent(mode: str) -> Image.Image:
    """The photograph, its left quarter transparent."""
    image = photo(WIDTH, HEIGHT).convert(mode.removesuffix("A"))
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (0, 0, WIDTH // 4, HEIGHT))
    image.putalpha(alpha)
    return image


def on_white(mode: str) -> Picture:
    def made() -> Image.Image:
        image = photo(WIDTH, HEIGHT).convert(mode).convert("RGB")
        image.paste((255, 255, 255), (0, 0, WIDTH // 4, HEIGHT))
        return image

    return made


def palette_with_transparency() -> bytes:
    image = photo(WIDTH, HEIGHT).quantize(8)
    image.paste(3, (0, 0, WIDTH // 4, HEIGHT))
    return encode(image, "PNG", transparency=3)


def palette_on_white() -> Image.Image:
    image = Image.open(io.BytesIO(palette_with_transparency())).convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    white.alpha_composite(image)
    return white.convert("RGB")


def segment(marker: int, payload: bytes) -> bytes:
    """A segment of a JPEG."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload


def with_segments(*segments: bytes, data: bytes | None = None) -> bytes:
    """A JPEG with more segments behind its first one."""
    data = data or plain()
    at = 4 + int.from_bytes(data[4:6], "big")
    return data[:at] + b"".join(segments) + data[at:]


def with_frame(data: bytes, *, width: int | None = None, height: int | None = None, bits: int | None = None) -> bytes:
    """A JPEG whose frame header claims something else."""
    changed = bytearray(data)
    at = next(found for marker in (b"\xff\xc0", b"\xff\xc2") if (found := data.find(marker)) > 0)
    if bits is not None:
        changed[at + 4] = bits
    if height is not None:
        changed[at + 5 : at + 7] = struct.pack(">H", height)
    if width is not None:
        changed[at + 7 : at + 9] = struct.pack(">H", width)
    return bytes(changed)


def damaged(data: bytes) -> bytes:
    """A JPEG with bytes of its entropy data overwritten, such that its decoder notices."""
    start = data.index(b"\xff\xda") + 14
    at = start + (len(data) - start) // 3
    return data[:at] + b"\x00\x5a\xa5\x3c\x81\x7e\x12" * 8 + data[at + 56 :]


def with_junk(data: bytes) -> bytes:
    """A JPEG with bytes between two segments of its header."""
    at = data.index(b"\xff\xdb")
    return data[:at] + b"junk" + data[at:]


def of_the_future(data: bytes) -> bytes:
    """A JPEG of a version of JFIF that there is not."""
    return data[:11] + b"\x07" + data[12:]


def without_restarts() -> bytes:
    """A JPEG that promises restart markers and has none."""
    data = plain(restart_marker_rows=1)
    start = data.index(b"\xff\xda")
    scan = data[start:]
    for number in range(8):
        scan = scan.replace(bytes([0xFF, 0xD0 + number]), b"")
    return data[:start] + scan


def two_sizes() -> bytes:
    """A JPEG that is 60,000 pixels wide for libjpeg, and small for who takes a restart marker for a segment with a length."""
    bomb = with_frame(plain(), width=60_000, height=60_000)
    small = with_frame(plain(), width=4_500, height=4_500)
    real, length = bomb[2:], int.from_bytes(bomb[2:4], "big")
    return b"\xff\xd8\xff\xd0" + real + b"\0" * (length - len(real)) + small[2:]


def many_scans(count: int) -> bytes:
    """A progressive JPEG that refines nothing, over and over."""
    data = plain(progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + b"\xff\xd9"


def arithmetic(value: int = 194) -> bytes:
    """A flat grey JPEG of 16 x 8 pixels with arithmetic coding (ITU T.81, annex D), which PIL does not write.

    With two blocks of this grey every context sees the same decision each time, so two states of its table are enough.
    """
    states = [(0x5A1D, 1), (0x2586, 2), (0x1114, 3)]
    known: dict[tuple[str, int], tuple[int, int]] = {}
    low, size, shifts = 0, 0x10000, 0

    def code(context: tuple[str, int], bit: int) -> None:
        nonlocal low, size, shifts
        state, likely = known.get(context, (0, 0))
        part, following = states[state]
        size -= part
        if bit == likely and size >= 0x8000:
            return
        if (bit == likely) == (size < part):
            low, size = low + size, part
        assert bit == likely or state == 0, "a decision that came out otherwise before"
        known[context] = following, bit
        while size < 0x8000:
            low, size, shifts = low << 1, size << 1, shifts + 1

    rest = (value - 128) * 8 // 16 - 1
    num_bits = rest.bit_length() - 1
    for context, bit in ((0, 1), (1, 0), (2, 1), *((20 + step, 1) for step in range(num_bits)), (20 + num_bits, 0)):
        code(("dc", context), bit)
    for bit in reversed(range(num_bits)):
        code(("dc", 34 + num_bits), rest >> bit & 1)
    code(("ac", 0), 1)
    code(("dc", 12), 0)
    code(("ac", 0), 1)
    padding = -(16 + shifts) % 8
    entropy = (low << padding).to_bytes((16 + shifts + padding) // 8, "big").replace(b"\xff", b"\xff\0")
    frame = struct.pack(">BHHBBBB", 8, 8, 16, 1, 1, 0x11, 0)
    parts = [segment(0xDB, b"\0" + bytes([16]) * 64), segment(0xC9, frame), segment(0xDA, b"\1\1\0\0\x3f\0"), entropy]
    return b"\xff\xd8" + b"".join(parts) + b"\xff\xd9"


def exif(*entries: tuple[int, int, int, bytes], after: int = 0, payload: bytes = b"") -> bytes:
    """EXIF of one directory: tag, type, count, and the four bytes of value or offset."""
    directory = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + directory + struct.pack("<I", after) + payload


ORIENTED = exif((274, 3, 1, b"\6\0\0\0"))


def amplified_exif() -> bytes:
    """60 kB that claim 240 MB: each of 4,000 tags is all of it."""
    return exif(*((tag, 7, 60_000, struct.pack("<I", 8)) for tag in range(1_000, 5_000)), payload=bytes(12_000))


def thumbnail_bomb() -> bytes:
    thumbnail = with_frame(plain(), width=65_500, height=65_500)
    return ORIENTED[:-4] + struct.pack("<I", 26) + struct.pack(
        "<HHHIIHHIII", 2, 513, 4, 1, 56, 514, 4, 1, len(thumbnail), 0
    ) + thumbnail  # fmt: skip


def gif(screen: tuple[int, int], frame: tuple[int, int], disposal: int = 0) -> bytes:
    control = b"!\xf9\x04" + bytes([disposal << 2]) + b"\0\0\0\0"
    descriptor = b"," + struct.pack("<HHHHB", 0, 0, *frame, 0)
    return b"GIF89a" + struct.pack("<HH", *screen) + b"\x80\0\0" + bytes(6) + control + descriptor + b"\2\2D\1\0;"


def webp(width: int, height: int) -> bytes:
    """An animation of one small frame on a canvas of any size."""
    picture = encode(photo(16, 16), "WEBP")[12:]
    extended = b"VP8X" + struct.pack("<IB3x", 10, 2) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    frame = bytes(6) + (15).to_bytes(3, "little") * 2 + bytes(4) + picture
    body = b"WEBP" + extended + b"ANIM" + struct.pack("<I6x", 6) + b"ANMF" + struct.pack("<I", len(frame)) + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


def bmp(width: int, height: int, rows: bytes, *, bits: int = 24, compression: int = 0, palette: bytes = b"") -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(rows), 0, 0, len(palette) // 4, 0)
    start = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + header + palette + rows


def run_length() -> bytes:
    """An 8-bit BMP: upper half of one grey, lower of another, in runs, literals and jumps."""
    grey = b"".join(bytes([level, level, level, 0]) for level in range(256))
    rows = b"".join(b"\x60\x28\0\0" for _ in range(36)) + b"".join(b"\x5c\xc8\0\4\xc8\xc8\xc8\xc8\0\0" for _ in range(36))
    return bmp(96, 72, rows + b"\0\1", bits=8, compression=1, palette=grey)


def two_greys() -> Image.Image:
    image = Image.new("RGB", (96, 72), (200, 200, 200))
    image.paste((40, 40, 40), (0, 36, 96, 72))
    return image


DATA = -1
"""Stands for the offset of a TIFF's data in the value of a tag; DATA - n for what lies n bytes further on."""


def tiff(*tags: tuple[int, int, list[int]], data: bytes = b"", after: int = 0) -> bytes:
    """A TIFF of these tags, each with type (3 or 4) and values."""
    arrays_at = 8 + 2 + 12 * len(tags) + 4
    sizes = [{3: 2, 4: 4}[kind] * len(values) for _, kind, values in tags]
    data_at = arrays_at + sum(size for size in sizes if size > 4)
    entries, arrays = b"", b""
    for (tag, kind, values), size in zip(tags, sizes, strict=True):
        placed = [data_at + DATA - each if each <= DATA else each for each in values]
        packed = struct.pack(f"<{len(values)}{'H' if kind == 3 else 'I'}", *placed)
        field = packed.ljust(4, b"\0") if size <= 4 else struct.pack("<I", arrays_at + len(arrays))
        entries += struct.pack("<HHI", tag, kind, len(values)) + field
        arrays += packed if size > 4 else b""
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + struct.pack("<I", after) + arrays + data


def rgb_tiff(width: int, height: int, *tags: tuple[int, int, list[int]], compression: int = 1, **parts: Any) -> bytes:
    """A TIFF of three channels; `tags` say where its pixels are."""
    first = [(256, 4, [width]), (257, 4, [height]), (258, 3, [8, 8, 8]), (259, 3, [compression]), (262, 3, [2])]
    return tiff(*sorted([*first, (277, 3, [3]), *tags]), **parts)


def photo_rows() -> bytes:
    return np.asarray(photo(WIDTH, HEIGHT)).tobytes()


def channels_apart() -> bytes:
    return np.asarray(photo(WIDTH, HEIGHT)).transpose(2, 0, 1).tobytes()


STRIP = [(273, 4, [DATA]), (278, 4, [HEIGHT]), (279, 4, [WIDTH * HEIGHT * 3])]


class Touch:
    """Creates the canary when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (CANARY,)


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.jpg", plain())
    return file.getvalue()


def ycck() -> bytes:
    """Four inks, three of them as brightness and colour: what Photoshop writes, and PIL does not."""
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(photo(WIDTH, HEIGHT).convert("CMYK")), 90, "CMYK", "444"))


def ycck_picture() -> Image.Image:
    return Image.open(io.BytesIO(ycck())).convert("RGB")


def frames(image_format: str, **options: Any) -> bytes:
    """An animation, or a document of three pages."""
    pictures = [photo(WIDTH, HEIGHT, seed) for seed in range(3)]
    if image_format == "GIF":
        pictures = [picture.quantize(64) for picture in pictures]
    return encode(pictures[0], image_format, save_all=True, append_images=pictures[1:], **options)


SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'
PHOTO = Row(WIDTH, HEIGHT, lambda: photo(WIDTH, HEIGHT))

IMAGES: dict[str, Hostile] = {
    # Bombs: little data that claims, or becomes, very much
    "png-bomb": Hostile(lambda: png(50_000, 50_000, rows=b"\0\1\2\3"), TOO_MANY_PIXELS),
    "png-bomb-below-the-limit": Hostile(lambda: png(5_000, 5_000, rows=b"\0\1\2\3"), TRUNCATED),
    "png-text-bomb": Hostile(lambda: png(before=[(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(64 << 20)))]), CORRUPT),
    "png-profile-bomb": Hostile(lambda: png(before=[(b"iCCP", b"icc\0\0" + zlib.compress(bytes(64 << 20)))]), CORRUPT),
    "png-rows-bomb": Hostile(lambda: png(rows=png_rows() + bytes(64 << 20)), PHOTO, "png"),
    "png-huge-chunk": Hostile(
        lambda: png(before=[(b"teXt", b"x")]).replace(b"\0\0\0\1teXt", b"\x7f\xff\xff\xffteXt"), TRUNCATED
    ),
    "jpeg-bomb": Hostile(lambda: with_frame(plain(), width=65_500, height=65_500), TOO_MANY_PIXELS),
    "jpeg-bomb-in-two-sizes": Hostile(two_sizes, TOO_MANY_PIXELS),
    "jpeg-of-many-scans": Hostile(lambda: many_scans(3_000), Refused("decode", "TooManyScans")),
    "jpeg-of-repeated-scans": Hostile(lambda: many_scans(20), CORRUPT),
    "jpeg-of-many-exif-segments": Hostile(lambda: with_segments(segment(0xE1, b"Exif\0\0II") * 50_000), CORRUPT),
    "jpeg-of-many-comments": Hostile(lambda: with_segments(segment(0xFE, b"") * 300_000), CORRUPT),
    "jpeg-exif-amplified": Hostile(lambda: with_segments(segment(0xE1, amplified_exif())), PLAIN),
    "jpeg-thumbnail-bomb": Hostile(lambda: with_segments(segment(0xE1, thumbnail_bomb())), Row(HEIGHT, WIDTH, turned)),
    "gif-bomb-screen": Hostile(lambda: gif((65_535, 65_535), (1, 1)), TOO_MANY_PIXELS, "gif"),
    "gif-bomb-frame": Hostile(lambda: gif((8, 8), (65_535, 65_535)), TOO_MANY_PIXELS, "gif"),
    "gif-bomb-disposed-of": Hostile(lambda: gif((8, 8), (65_535, 65_535), disposal=2), TOO_MANY_PIXELS, "gif"),
    "webp-bomb": Hostile(lambda: webp(16_383, 16_383), TOO_MANY_PIXELS, "webp"),
    "webp-bomb-wide": Hostile(lambda: webp(1 << 24, 100), TOO_MANY_PIXELS, "webp"),
    "bmp-bomb": Hostile(lambda: bmp(60_000, 60_000, bytes(64)), TOO_MANY_PIXELS, "bmp"),
    "bmp-run-length-bomb": Hostile(lambda: bmp(30_000, 3_000, b"\0\0" * 3_000, bits=8, compression=1), TOO_MANY_PIXELS, "bmp"),
    "tiff-bomb": Hostile(lambda: rgb_tiff(100_000, 100_000, *STRIP), TOO_MANY_PIXELS, "tif"),
    "tiff-tile-bomb": Hostile(
        lambda: rgb_tiff(
            64, 64, (322, 4, [24_000]), (323, 4, [24_000]), (324, 4, [DATA]), (325, 4, [9]), compression=8, data=b"x"
        ),
        TOO_MANY_PIXELS,
        "tif",
    ),
    "tiff-strips-on-top-of-each-other": Hostile(
        lambda: rgb_tiff(900, 900, (273, 4, [DATA] * 50_000), (278, 4, [899]), data=bytes(900 * 900 * 3)), CORRUPT, "tif"
    ),
    "tiff-of-many-strips": Hostile(lambda: rgb_tiff(8, 8, (273, 4, [DATA] * 600_000), (278, 4, [8])), CORRUPT, "tif"),
    "tiff-of-many-channels": Hostile(lambda: tiff((256, 4, [8]), (257, 4, [8]), (258, 3, [8] * 300_000)), CORRUPT, "tif"),
    # Cut short
    "jpeg-cut": Hostile(lambda: plain()[: len(plain()) // 2], TRUNCATED),
    "jpeg-progressive-cut": Hostile(lambda: plain(progressive=True)[: len(plain()) // 2], TRUNCATED),
    "jpeg-cut-in-header": Hostile(lambda: plain()[:100], TRUNCATED),
    "jpeg-then-zeros": Hostile(lambda: plain()[:300] + bytes(1 << 20), NOT_AN_IMAGE),
    "jpeg-then-zeros-in-scan": Hostile(lambda: plain()[:1_500] + bytes(1 << 16), TRUNCATED),
    "png-cut": Hostile(lambda: plain("PNG")[:5_000], TRUNCATED, "png"),
    "webp-cut": Hostile(lambda: plain("WEBP")[:1_000], CORRUPT, "webp"),
    "gif-cut": Hostile(lambda: plain("GIF", "P")[:2_000], TRUNCATED, "gif"),
    "bmp-cut": Hostile(lambda: plain("BMP")[:5_000], TRUNCATED, "bmp"),
    "tiff-cut": Hostile(lambda: rgb_tiff(WIDTH, HEIGHT, *STRIP, data=photo_rows()[:9_000]), TRUNCATED, "tif"),
    # Damaged
    "jpeg-damaged": Hostile(lambda: damaged(plain()), CORRUPT),
    "jpeg-progressive-damaged": Hostile(lambda: damaged(plain(progressive=True)), CORRUPT),
    "jpeg-damaged-behind-junk": Hostile(lambda: with_junk(damaged(plain())), CORRUPT),
    "jpeg-damaged-of-the-future": Hostile(lambda: of_the_future(damaged(plain())), CORRUPT),
    "jpeg-cut-behind-junk": Hostile(lambda: with_junk(plain()[: len(plain()) // 2]), TRUNCATED),
    "jpeg-restarts-missing": Hostile(without_restarts, CORRUPT),
    "jpeg-claims-more-rows": Hostile(lambda: with_frame(plain(), height=2 * HEIGHT), CORRUPT),
    "jpeg-claims-fewer-rows": Hostile(lambda: with_frame(plain(), height=HEIGHT // 2), CORRUPT),
    "jpeg-of-no-rows": Hostile(lambda: with_frame(plain(), height=0), NOT_AN_IMAGE),
    "jpeg-of-12-bits": Hostile(lambda: with_frame(plain(), bits=12), NOT_AN_IMAGE),
    "png-damaged": Hostile(lambda: plain("PNG")[:900] + b"\x55" + plain("PNG")[901:], CORRUPT, "png"),
    "png-of-no-pixels": Hostile(lambda: png(0, 0, rows=b""), NOT_AN_IMAGE, "png"),
    "png-claims-more-rows": Hostile(lambda: png(WIDTH, 2 * HEIGHT), TRUNCATED, "png"),
    "png-interlaced-rows-missing": Hostile(lambda: png(rows=adam7()[: -7 * 289], interlaced=True), TRUNCATED, "png"),
    "webp-claims-more-bytes": Hostile(lambda: plain("WEBP")[:4] + b"\xff\xff\0\0" + plain("WEBP")[8:], CORRUPT, "webp"),
    "gif-of-no-pixels": Hostile(lambda: gif((0, 0), (0, 0)), NOT_AN_IMAGE, "gif"),
    "bmp-of-unknown-compression": Hostile(lambda: bmp(8, 8, bytes(200), compression=4), CORRUPT, "bmp"),
    "tiff-directory-outside": Hostile(lambda: b"II*\0\xff\xff\xff\x7f" + bytes(100), NOT_AN_IMAGE, "tif"),
    "tiff-strip-outside": Hostile(lambda: rgb_tiff(9, 9, (273, 4, [1 << 30]), (278, 4, [9])), TRUNCATED, "tif"),
    "tiff-strips-missing": Hostile(lambda: rgb_tiff(WIDTH, 2 * HEIGHT, *STRIP, data=photo_rows()), TRUNCATED, "tif"),
    "tiff-channel-missing": Hostile(
        lambda: rgb_tiff(WIDTH, HEIGHT, (273, 4, [DATA] * 2), (278, 4, [HEIGHT]), (284, 3, [2]), data=photo_rows()),
        TRUNCATED,
        "tif",
    ),
    "tiff-of-floats": Hostile(
        lambda: encode(Image.fromarray(np.zeros((9, 9), np.float32)), "TIFF"), Refused("decode", "UnknownRange"), "tif"
    ),
    # Nothing, or hardly anything
    "zero-bytes": Hostile(lambda: b"", Refused("decode", "Empty")),
    "one-byte": Hostile(lambda: b"\xff", NOT_AN_IMAGE),
    "only-zeros": Hostile(lambda: bytes(10_000), NOT_AN_IMAGE),
    "only-noise": Hostile(lambda: random.Random(0).randbytes(10_000), NOT_AN_IMAGE),
    "only-jpeg-magic": Hostile(lambda: b"\xff\xd8\xff", NOT_AN_IMAGE),
    "only-png-magic": Hostile(lambda: b"\x89PNG\r\n\x1a\n", NOT_AN_IMAGE, "png"),
    "only-gif-magic": Hostile(lambda: b"GIF89a", NOT_AN_IMAGE, "gif"),
    "only-webp-magic": Hostile(lambda: b"RIFF\x10\0\0\0WEBPVP8 ", CORRUPT, "webp"),
    "only-bmp-magic": Hostile(lambda: b"BM", NOT_AN_IMAGE, "bmp"),
    "only-tiff-magic": Hostile(lambda: b"II*\0", NOT_AN_IMAGE, "tif"),
    # Under another name
    "png-named-jpg": Hostile(lambda: plain("PNG"), PHOTO),
    "jpeg-named-png": Hostile(plain, PLAIN, "png"),
    "html-named-jpg": Hostile(lambda: b"<!DOCTYPE html><html><title>404</title></html>", NOT_AN_IMAGE),
    "json-named-jpg": Hostile(lambda: b'{"error": "AccessDenied"}', NOT_AN_IMAGE),
    "svg": Hostile(lambda: SVG, NOT_AN_IMAGE),
    "pickle-named-jpg": Hostile(lambda: pickle.dumps(Touch()), NOT_AN_IMAGE),
    "zip-named-jpg": Hostile(zipped, NOT_AN_IMAGE),
    "ico": Hostile(lambda: encode(photo(32, 32), "ICO"), NOT_AN_IMAGE),
    "pdf": Hostile(lambda: encode(photo(32, 32), "PDF"), NOT_AN_IMAGE),
    "eps": Hostile(lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", NOT_AN_IMAGE),
    "heic-that-is-none": Hostile(lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500), NOT_AN_IMAGE),
    "avif-that-is-none": Hostile(lambda: b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(500), NOT_AN_IMAGE),
    # Odd and good
    "jpeg-progressive": Hostile(lambda: plain(progressive=True), Row(WIDTH, HEIGHT, shown(progressive=True))),
    "jpeg-arithmetic": Hostile(arithmetic, Row(16, 8, flat(16, 8, (194, 194, 194)))),
    "jpeg-restarts": Hostile(lambda: plain(restart_marker_rows=1), PLAIN),
    "jpeg-four-inks": Hostile(lambda: plain(mode="CMYK"), Row(WIDTH, HEIGHT, shown(mode="CMYK"))),
    "jpeg-ycck": Hostile(ycck, Row(WIDTH, HEIGHT, ycck_picture)),
    "jpeg-without-end": Hostile(lambda: plain()[:-2], PLAIN),
    "jpeg-then-garbage": Hostile(lambda: plain() + random.Random(1).randbytes(5_000), PLAIN),
    "jpeg-twice": Hostile(lambda: plain() + jpeg(3), PLAIN),
    "jpeg-junk-in-header": Hostile(lambda: with_junk(plain()), PLAIN),
    "jpeg-of-the-future": Hostile(lambda: of_the_future(plain()), PLAIN),
    "jpeg-restart-marker-in-header": Hostile(lambda: plain()[:2] + b"\xff\xd0" + plain()[2:], PLAIN),
    "jpeg-fill-bytes": Hostile(lambda: plain()[:2] + b"\xff\xff\xff" + plain()[2:], PLAIN),
    "jpeg-oriented": Hostile(lambda: with_segments(segment(0xE1, ORIENTED)), Row(HEIGHT, WIDTH, turned)),
    "jpeg-orientation-99": Hostile(lambda: with_segments(segment(0xE1, exif((274, 3, 1, b"\x63\0\0\0")))), PLAIN),
    "jpeg-exif-offsets-outside": Hostile(
        lambda: with_segments(segment(0xE1, exif((271, 2, 5_000, b"\xff\xff\xff\x7f"), (34_665, 4, 1, b"\xff\xff\0\0")))), PLAIN
    ),
    "jpeg-exif-loop": Hostile(lambda: with_segments(segment(0xE1, exif((34_665, 4, 1, b"\x08\0\0\0"), after=8))), PLAIN),
    "jpeg-exif-no-directory": Hostile(lambda: with_segments(segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\x7f")), PLAIN),
    "jpeg-profile-malformed": Hostile(lambda: with_segments(segment(0xE2, b"ICC_PROFILE\0\1\1" + b"no profile" * 9)), PLAIN),
    "jpeg-profile-huge": Hostile(
        lambda: with_segments(
            *(segment(0xE2, b"ICC_PROFILE\0" + bytes([number, 40]) + bytes(65_000)) for number in range(1, 41))
        ),
        PLAIN,
    ),
    "jpeg-xmp-malformed": Hostile(
        lambda: with_segments(segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<!ENTITY a "&a;&a;">tiff:Orientation="9"')), PLAIN
    ),
    "png-interlaced": Hostile(lambda: png(rows=adam7(), interlaced=True), PHOTO, "png"),
    "png-16-bit-grey": Hostile(
        lambda: png(rows=deep_rows(1), bit_depth=16, colour_type=0),
        Row(WIDTH, HEIGHT, lambda: photo(WIDTH, HEIGHT).convert("L").convert("RGB")),
        "png",
    ),
    "png-16-bit-rgb": Hostile(lambda: png(rows=deep_rows(3), bit_depth=16), PHOTO, "png"),
    "png-16-bit-grey-transparent": Hostile(half_transparent_deep, Row(WIDTH, HEIGHT, half_white), "png"),
    "png-1-bit": Hostile(lambda: plain("PNG", "1"), Row(WIDTH, HEIGHT, shown("PNG", "1")), "png"),
    "png-palette-transparent": Hostile(palette_with_transparency, Row(WIDTH, HEIGHT, palette_on_white), "png"),
    "png-grey-alpha": Hostile(lambda: encode(transparent("LA"), "PNG"), Row(WIDTH, HEIGHT, on_white("L")), "png"),
    "png-alpha": Hostile(lambda: encode(transparent("RGBA"), "PNG"), Row(WIDTH, HEIGHT, on_white("RGB")), "png"),
    "png-black": Hostile(lambda: encode(Image.new("RGB", (30, 20)), "PNG"), Row(30, 20, flat(30, 20, (0, 0, 0))), "png"),
    "png-one-pixel": Hostile(
        lambda: encode(Image.new("RGB", (1, 1), (9, 200, 60)), "PNG"), Row(1, 1, flat(1, 1, (9, 200, 60))), "png"
    ),
    "png-one-column": Hostile(
        lambda: encode(Image.new("RGB", (1, 20_000), (90, 160, 30)), "PNG"), Row(1, 20_000, flat(1, 400, (90, 160, 30))), "png"
    ),
    "jpeg-one-row": Hostile(lambda: encode(Image.new("RGB", (20_000, 1), (90, 160, 30))), Row(20_000, 1)),
    "apng": Hostile(lambda: frames("PNG"), PHOTO, "png"),
    "gif-animated": Hostile(lambda: frames("GIF"), Row(WIDTH, HEIGHT, lambda: photo(WIDTH, HEIGHT).quantize(64)), "gif"),
    "webp-animated": Hostile(lambda: frames("WEBP", lossless=True), PHOTO, "webp"),
    "tiff-pages": Hostile(lambda: frames("TIFF"), PHOTO, "tif"),
    "tiff-directory-loop": Hostile(lambda: rgb_tiff(WIDTH, HEIGHT, *STRIP, data=photo_rows(), after=8), PHOTO, "tif"),
    "tiff-channels-apart": Hostile(
        lambda: rgb_tiff(
            WIDTH,
            HEIGHT,
            (273, 4, [DATA - number * WIDTH * HEIGHT for number in range(3)]),
            (278, 4, [HEIGHT]),
            (284, 3, [2]),
            data=channels_apart(),
        ),
        PHOTO,
        "tif",
    ),
    "tiff-deflated": Hostile(lambda: plain("TIFF", compression="tiff_deflate"), PHOTO, "tif"),
    "bmp-run-length": Hostile(run_length, Row(96, 72, two_greys), "bmp"),
    "bmp-upside-down": Hostile(
        lambda: bmp(WIDTH, -HEIGHT, np.asarray(photo(WIDTH, HEIGHT))[..., ::-1].tobytes()), PHOTO, "bmp"
    ),
}


def png_rows() -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in np.asarray(photo(WIDTH, HEIGHT)))


NAMES = [
    "../../above/photo",
    "/absolute/photo",
    "./here",
    "with space & ünïcödé %20",
    "new\nline",
    "\x1b[31mred\x1b[0m",
    "\u202etxt",
    "%s%n{0}$(touch x)`touch y`'; DROP TABLE rows; --",
    "con",
    "[bold]markup[/bold]",
    "long-" * 1_000,
]
"""Keys that are text and nothing else."""
