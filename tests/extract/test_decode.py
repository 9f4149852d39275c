"""Decoding against torchvision on PIL, every format and mode, and the inputs that must never become a row in silence."""

from __future__ import annotations

import importlib
import io
import struct
import threading
import tracemalloc
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch
from images import encode, jpeg, photo
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as preset

from pipeline.config import Preprocess
from pipeline.errors import SampleError
from pipeline.extract import pil as pil_module
from pipeline.extract.decode import Decoder

SIZES = [
    (640, 480),
    (333, 501),
    (256, 256),
    (224, 900),
    (900, 224),
    (300, 257),
    (64, 48),
    (2000, 260),
    (17, 120),
    (320, 240),
    (240, 320),
    (282, 212),
    (226, 170),
    (300, 240),
    (283, 256),
    (256, 283),
]


@pytest.fixture(scope="module", autouse=True)
def one_lane():
    """One thread a decoder, as the loop has it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def decode(data, *, fast=False, max_pixels=100_000_000, **settings):
    """The picture as int (crop, crop, 3), and the size that was reported."""
    preprocess = Preprocess(**settings)
    slot_HWC = torch.full((preprocess.crop, preprocess.crop, 3), 77, dtype=torch.uint8)
    size = Decoder(preprocess, fast=fast, max_pixels=max_pixels)(data, slot_HWC)
    return slot_HWC.numpy().astype(int), size


def expected(image, resize=256, crop=224, interpolation="bilinear"):
    """What the presets of torchvision's weights do to a PIL image."""
    resized = preset.resize(image.convert("RGB"), [resize], InterpolationMode(interpolation), antialias=True)
    return np.asarray(preset.center_crop(resized, [crop])).astype(int)


def assert_close(picture_HWC, reference_HWC, mean=0.05, most=2):
    difference = abs(picture_HWC - reference_HWC)
    assert difference.mean() <= mean
    assert difference.max() <= most


def refused(data, **options):
    """Name of the error that this input is refused with."""
    with pytest.raises(SampleError) as caught:
        decode(data, **options)
    assert caught.value.stage == "decode"
    assert caught.value.message
    assert "\n" not in caught.value.message
    return caught.value.error


# The same picture as the preset's


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_jpeg_is_the_preset(size, interpolation):
    data = encode(photo(*size), quality=90)
    picture, reported = decode(data, interpolation=interpolation)
    assert reported == size
    assert_close(picture, expected(Image.open(io.BytesIO(data)), interpolation=interpolation))


@pytest.mark.parametrize(("resize", "crop"), [(232, 224), (224, 224), (128, 96), (33, 31), (518, 518)])
def test_sizes_of_other_presets(resize, crop):
    data = encode(photo(500, 375), quality=90)
    assert_close(decode(data, resize=resize, crop=crop)[0], expected(Image.open(io.BytesIO(data)), resize, crop))


@pytest.mark.parametrize(
    "options",
    [{"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"restart_marker_rows": 1}, {"optimize": True}],
    ids=str,
)
def test_jpeg_of_every_kind(options):
    data = encode(photo(400, 300), quality=90, **options)
    assert_close(decode(data)[0], expected(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize(
    ("image_format", "options"),
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True, "method": 0}),
        ("BMP", {}),
        ("DIB", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_deflate"}),
        ("TIFF", {"compression": "jpeg", "quality": 100}),
    ],
    ids=str,
)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_every_format(image_format, options, interpolation):
    data = encode(photo(333, 277), image_format, **options)
    picture, size = decode(data, interpolation=interpolation)
    assert size == (333, 277)
    assert_close(picture, expected(Image.open(io.BytesIO(data)), interpolation=interpolation))


def test_gif_is_its_first_frame():
    frames = [photo(300, 300, seed).quantize(64) for seed in range(3)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert_close(decode(data)[0], expected(frames[0]))


def test_animated_webp_and_tiff_are_their_first_frame():
    frames = [photo(300, 300, seed) for seed in range(2)]
    for image_format, options in (("WEBP", {"lossless": True, "method": 0}), ("TIFF", {}), ("PNG", {})):
        data = encode(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
        assert_close(decode(data)[0], expected(frames[0]))


def test_multi_picture_jpeg_is_its_first_picture():
    data = encode(photo(400, 300), "MPO", save_all=True, append_images=[photo(100, 80, 1)], quality=90)
    assert data.count(b"\xff\xd8\xff") == 2
    picture, size = decode(data)
    assert size == (400, 300)
    assert_close(picture, expected(Image.open(io.BytesIO(data))))


# Modes


def alpha(width, height):
    """Transparent on the left, opaque on the right."""
    return Image.fromarray(np.tile(np.linspace(0, 255, width).astype(np.uint8), (height, 1)))


def on_white(image):
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    white.alpha_composite(image.convert("RGBA"))
    return white


RGB = photo(300, 260)
PALETTE = RGB.quantize(200)
RGBA = RGB.copy()
RGBA.putalpha(alpha(300, 260))
LA = RGB.convert("L")
LA.putalpha(alpha(300, 260))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF", "BMP"])
def test_grey(image_format):
    data = encode(RGB.convert("L"), image_format)
    picture, _ = decode(data)
    assert_close(picture, expected(Image.open(io.BytesIO(data))))
    assert (picture[..., 0] == picture[..., 2]).all()


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "BMP"])
def test_one_bit(image_format):
    assert_close(decode(encode(RGB.convert("1"), image_format))[0], expected(RGB.convert("1")))


@pytest.mark.parametrize("image_format", ["PNG", "GIF", "BMP", "TIFF"])
def test_palette(image_format):
    assert_close(decode(encode(PALETTE, image_format))[0], expected(PALETTE))


@pytest.mark.parametrize(
    ("image", "image_format"), [(RGBA, "PNG"), (RGBA, "TIFF"), (LA, "PNG"), (LA, "TIFF")], ids=["RGBA", "RGBA", "LA", "LA"]
)
def test_alpha_lands_on_white(image, image_format):
    picture, _ = decode(encode(image, image_format))
    assert_close(picture, expected(on_white(image)))
    assert (picture[:, 0] > 220).all(), "the left is nearly transparent"


def test_alpha_of_webp_lands_on_white():
    assert_close(decode(encode(RGBA, "WEBP", lossless=True, exact=True, method=0))[0], expected(on_white(RGBA)))


@pytest.mark.parametrize(
    ("image_format", "transparency"), [("PNG", 3), ("GIF", 3), ("PNG", bytes([0, 128, 255, 255, 0, 64, 255, 200]))], ids=str
)
def test_transparent_palette_entries_land_on_white(image_format, transparency):
    data = encode(RGB.quantize(8), image_format, transparency=transparency)
    reference = on_white(Image.open(io.BytesIO(data)))
    assert np.asarray(reference.convert("RGB")).max() == 255
    assert_close(decode(data)[0], expected(reference))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_transparent_colour_lands_on_white(mode):
    image = RGB.convert("P", palette=Image.Palette.WEB).convert(mode)
    key = image.getpixel((150, 130))
    data = encode(image, "PNG", transparency=key)
    assert decode(data)[0].max() == 255
    assert_close(decode(data)[0], expected(on_white(Image.open(io.BytesIO(data)))))


@pytest.mark.parametrize("image_format", ["JPEG", "TIFF"])
def test_four_inks(image_format):
    data = encode(RGB.convert("CMYK"), image_format, **({"quality": 95} if image_format == "JPEG" else {}))
    assert_close(decode(data)[0], expected(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(image_format):
    ramp_HW = np.tile(np.linspace(0, 65535, 300).astype(np.uint16), (300, 1))
    picture, _ = decode(encode(Image.fromarray(ramp_HW), image_format))
    eight_bit = Image.fromarray(np.rint(ramp_HW / 257).astype(np.uint8))
    assert_close(picture, expected(eight_bit))
    assert picture.min() > 5
    assert picture.max() < 250
    assert (np.diff(picture[100, :, 0]) >= 0).all()


def png(width, height, bit_depth, colour_type, rows, size=None):
    """A PNG made by hand; `size` is what its header claims."""

    def chunk(name, payload):
        return struct.pack(">I", len(payload)) + name + payload + struct.pack(">I", zlib.crc32(name + payload))

    header = struct.pack(">IIBBBBB", *(size or (width, height)), bit_depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (6, 4), (0, 1)])
def test_16_bits_a_channel(colour_type, channels):
    values_HWC = np.linspace(0, 65535, 300 * 300 * channels).reshape(300, 300, channels).astype(">u2")
    if channels == 4:
        values_HWC[..., 3] = 65535
    rows = b"".join(b"\0" + row.tobytes() for row in values_HWC)
    picture, _ = decode(png(300, 300, 16, colour_type, rows))
    eight_bit = np.rint(values_HWC[..., :3] / 257).astype(np.uint8)
    assert_close(picture, expected(Image.fromarray(eight_bit.repeat(3, 2) if channels == 1 else eight_bit)), mean=0.6)


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("image_format", "mode"),
    [("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB"), ("PNG", "1"), ("TIFF", "RGB"), ("WEBP", "RGB"), ("MPO", "RGB")],
)
def test_orientation_is_undone(image_format, mode, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    options = {"lossless": True, "method": 0} if image_format == "WEBP" else {}
    data = encode(photo(400, 280).convert(mode), image_format, exif=exif, **options)
    with Image.open(io.BytesIO(data)) as image:
        reference = ImageOps.exif_transpose(image)
    picture, size = decode(data)
    assert size == reference.size == ((400, 280) if orientation < 5 else (280, 400))
    assert_close(picture, expected(reference))


@pytest.mark.parametrize("orientation", [3, 6])
def test_orientation_of_four_inks_and_16_bits(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    deep = Image.fromarray(np.asarray(photo(400, 280).convert("L")).astype(np.uint16) * 257)
    for data in (
        encode(photo(400, 280).convert("CMYK"), exif=exif),
        encode(deep, "PNG", exif=exif),
        encode(RGBA, "PNG", exif=exif),
    ):
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
        reference = on_white(upright) if upright.mode == "RGBA" else upright
        if reference.mode.startswith("I"):
            reference = Image.fromarray((np.asarray(reference) // 257).astype(np.uint8))
        picture, size = decode(data)
        assert size == upright.size
        assert_close(picture, expected(reference))


@pytest.mark.parametrize("orientation", [1, 6, 8])
def test_orientation_that_only_xmp_names(orientation):
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()
    data = encode(photo(400, 280), "JPEG", xmp=xmp)
    with Image.open(io.BytesIO(data)) as image:
        reference = ImageOps.exif_transpose(image)
    picture, size = decode(data)
    assert size == reference.size == ((400, 280) if orientation == 1 else (280, 400))
    assert_close(picture, expected(reference))


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0garbage that is no TIFF header",
        b"Exif\0\0II*\0\xff\xff\xff\x7f",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x0f\x01\x03\0\x01\0\0\0\x06\0\0\0",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0" + b"\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0" + b"\x12\x01\x02\0\x04\0\0\0abc\0\0\0\0\0",
    ],
)
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_malformed_exif_is_no_error(image_format, exif):
    options = {"lossless": True, "method": 0} if image_format == "WEBP" else {}
    plain = encode(photo(300, 280), image_format, **options)
    data = encode(photo(300, 280), image_format, exif=exif, **options)
    picture, size = decode(data)
    assert size == (300, 280)
    assert_close(picture, decode(plain)[0], most=0)


def test_odd_metadata_is_no_news():
    exif = b"Exif\0\0II*\0\x08\0\0\0\x09\0" + b"\x0f\x01\x03\0\x01\0\0\0\x06\0\0\0"
    data = encode(photo(30, 20), "PNG", exif=exif)
    with Image.open(io.BytesIO(data)) as image, pytest.warns(UserWarning, match="Corrupt EXIF data"):
        image.getexif()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        importlib.reload(pil_module)  # what an import does to a program's filters, which pytest resets for each test
        assert decode(data)[1] == (30, 20)
    assert seen == []


# Harmless oddities of JPEGs


@pytest.mark.parametrize("size", [(200, 150), (333, 501)])
def test_missing_end_marker_is_harmless(size):
    whole = encode(photo(*size), quality=85)
    for data in (whole[:-2], whole[:-1]):
        assert_close(decode(data)[0], decode(whole)[0], most=0)


@pytest.mark.parametrize("trailer", [b"\0" * 7, b"\r\n", b"<html>", b"\xff\xd9\xff\xd9", b"x" * 100_000])
def test_bytes_after_the_end_are_harmless(trailer):
    assert_close(decode(jpeg() + trailer)[0], decode(jpeg())[0], most=0)


@pytest.mark.parametrize("marker", [b"\xff\xdb", b"\xff\xc0"])
def test_bytes_between_header_segments_are_harmless(marker):
    whole = encode(photo(200, 150), quality=85)
    at = whole.index(marker)
    assert_close(decode(whole[:at] + b"junk" + whole[at:])[0], decode(whole)[0], most=0)


def test_zeros_before_the_end_marker_are_harmless():
    whole = encode(photo(200, 150), quality=85)
    assert_close(decode(whole[:-2] + bytes(50) + whole[-2:])[0], decode(whole)[0], most=0)


# Fast


@pytest.mark.parametrize("size", [(2048, 1536), (1536, 2048), (2400, 1100)])
def test_fast_stays_close(size):
    data = encode(photo(*size), quality=90)
    exact, _ = decode(data)
    fast, reported = decode(data, fast=True)
    assert reported == size
    a, b = (picture.ravel() - picture.mean() for picture in (exact, fast))
    assert a @ b / np.sqrt((a @ a) * (b @ b)) > 0.99
    assert abs(exact - fast).mean() < 4


@pytest.mark.parametrize("size", [(2048, 1536), (640, 513), (512, 512), (600, 300), (100, 80), (30, 4000)])
def test_fast_never_reduces_below_twice_the_target(size, monkeypatch):
    import simplejpeg

    decoded = []

    def spy(*arguments, original=simplejpeg.decode_jpeg, **options):
        decoded.append(original(*arguments, **options))
        return decoded[-1]

    monkeypatch.setattr(simplejpeg, "decode_jpeg", spy)
    decode(encode(photo(*size)), fast=True)
    height, width, _ = decoded[0].shape
    assert min(width, height) >= min(512, *size)
    if min(size) < 1024:
        assert (width, height) == size
    else:
        assert width < size[0]


def test_fast_undoes_orientation():
    exif = Image.Exif()
    exif[274] = 6
    data = encode(photo(2000, 1400), quality=90, exif=exif)
    fast, size = decode(data, fast=True)
    assert size == (1400, 2000)
    assert abs(fast - decode(data)[0]).mean() < 4


def test_fast_is_exact_for_what_is_no_large_jpeg():
    for data in (encode(photo(500, 400), quality=90), encode(photo(600, 530), "PNG")):
        assert_close(decode(data, fast=True)[0], decode(data)[0], most=0)


# Shapes


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 3), (3, 3)])
@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_tiny(size, image_format):
    data = encode(Image.new("RGB", size, (200, 100, 50)), image_format, **({"quality": 100} if image_format == "JPEG" else {}))
    picture, reported = decode(data)
    assert reported == size
    assert_close(picture, np.broadcast_to([200, 100, 50], (224, 224, 3)), mean=2, most=3)


@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1), (30_000, 2), (2, 30_000), (60_000, 3)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_absurd_aspect_ratios_work_and_stay_bounded(size, interpolation, image_format):
    data = encode(Image.new("RGB", size, (90, 160, 30)), image_format)
    tracemalloc.start()
    try:
        picture, reported = decode(data, interpolation=interpolation)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert reported == size
    assert peak_bytes < 60 << 20
    assert_close(picture, np.broadcast_to([90, 160, 30], (224, 224, 3)), mean=2, most=3)


@pytest.mark.parametrize("size", [(40, 500), (700, 50)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_beyond_the_aspect_limit_the_crop_is_still_the_presets(size, interpolation):
    data = encode(photo(*size), "PNG")
    assert_close(
        decode(data, interpolation=interpolation)[0], expected(photo(*size), interpolation=interpolation), mean=0.6, most=8
    )


def test_one_decoder_keeps_no_trace_of_earlier_pictures():
    decoder = Decoder(Preprocess(), fast=False, max_pixels=10**8)
    datas = [encode(photo(*size, seed), quality=90) for seed, size in enumerate([(900, 700), (64, 48), (300, 800), (900, 700)])]
    for data in [*datas, jpeg()[:300], *reversed(datas)]:
        slot_HWC = torch.zeros(224, 224, 3, dtype=torch.uint8)
        if data == jpeg()[:300]:
            with pytest.raises(SampleError):
                decoder(data, slot_HWC)
            continue
        decoder(data, slot_HWC)
        assert_close(slot_HWC.numpy().astype(int), decode(data)[0], most=0)


def test_input_bytes_and_neighbouring_slots_stay_untouched():
    batch_BHWC = torch.full((3, 224, 224, 3), 5, dtype=torch.uint8)
    data = bytearray(encode(photo(400, 300)))
    before = bytes(data)
    Decoder(Preprocess(), fast=False, max_pixels=10**8)(bytes(data), batch_BHWC[1])
    assert bytes(data) == before
    assert (batch_BHWC[[0, 2]] == 5).all()
    assert not (batch_BHWC[1] == 5).all()


def test_threads_do_not_disturb_each_other():
    datas = [encode(photo(300 + 40 * n, 400, n), quality=90) for n in range(4)] + [encode(photo(300, 300), "PNG")]
    alone = [decode(data)[0] for data in datas]
    wrong = []

    def work(offset):
        decoder = Decoder(Preprocess(), fast=False, max_pixels=10**8)
        slot_HWC = torch.zeros(224, 224, 3, dtype=torch.uint8)
        for step in range(15):
            number = (step + offset) % len(datas)
            decoder(datas[number], slot_HWC)
            if not np.array_equal(slot_HWC.numpy(), alone[number]):
                wrong.append((offset, number))

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# Bad input


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.jpg", jpeg())
    return file.getvalue()


SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", "Empty"),
        (b"\0", "NotAnImage"),
        (bytes(10_000), "NotAnImage"),
        (b"<!DOCTYPE html><html><head><title>404</title></head></html>", "NotAnImage"),
        (b'{"error": "AccessDenied"}', "NotAnImage"),
        (np.random.default_rng(0).bytes(20_000), "NotAnImage"),
        (SVG, "NotAnImage"),
        (EPS, "NotAnImage"),
        (encode(photo(30, 30), "PDF"), "NotAnImage"),
        (encode(photo(30, 30), "EPS"), "NotAnImage"),
        (encode(photo(32, 32), "ICO"), "NotAnImage"),
        (encode(photo(32, 32), "PPM"), "NotAnImage"),
        (encode(photo(32, 32), "TGA"), "NotAnImage"),
        (zipped(), "NotAnImage"),
        (b"\xff\xd8\xff\xe0" + bytes(500), "NotAnImage"),
        (b"\xff\xd8\xff\xd9", "NotAnImage"),
        (b"\x89PNG\r\n\x1a\n", "NotAnImage"),
        (b"GIF89a", "NotAnImage"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "Corrupt"),
        (encode(photo(300, 200))[:5000], "Truncated"),
        (encode(photo(300, 200), progressive=True)[:5000], "Truncated"),
        (encode(photo(300, 200), "PNG")[:5000], "Truncated"),
        (encode(photo(300, 200), "BMP")[:5000], "Truncated"),
        (encode(photo(300, 200), "GIF")[:5000], "Truncated"),
        (encode(photo(300, 200), "WEBP")[:5000], "Corrupt"),
        (encode(Image.fromarray(np.zeros((9, 9), np.float32)), "TIFF"), "UnknownRange"),
        (encode(Image.fromarray(np.full((9, 9), 70_000, np.int32)), "TIFF"), "UnknownRange"),
        (encode(Image.fromarray(np.full((9, 9), -1, np.int32)), "TIFF"), "UnknownRange"),
    ],
    ids=range(28),
)
@pytest.mark.parametrize("fast", [False, True])
def test_bad_input_has_a_stable_name(data, error, fast):
    assert refused(data, fast=fast) == error


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning", "ignore:Truncated File Read:UserWarning")
def test_truncated_anywhere_is_refused(image_format):
    whole = encode(photo(120, 100), image_format)
    cuts = sorted({*range(1, 80, 17), *range(80, len(whole), len(whole) // 20), *range(len(whole) - 30, len(whole), 3)})
    num_refused = 0
    for cut in cuts:
        try:
            picture, _ = decode(whole[:cut])
        except SampleError as error:
            num_refused += (error.stage, error.error in {"NotAnImage", "Truncated", "Corrupt"}) == ("decode", True)
        else:  # only an end marker or a checksum is missing
            assert cut > len(whole) - 25
            assert_close(picture, decode(whole)[0], most=0)
    assert num_refused >= len(cuts) - 8


KINDS = [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"subsampling": 0, "quality": 95}, {"cmyk": True}]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_damaged_jpeg_data_is_never_taken_for_the_picture(options):
    """libjpeg notices most damage and only warns; what it does not notice at all stays a picture (of about one in three)."""
    import simplejpeg

    options = dict(options)
    colorspace = "CMYK" if options.pop("cmyk", False) else "RGB"
    whole = encode(photo(320, 240).convert(colorspace), **({"quality": 85} | options))
    start = whole.index(b"\xff\xda") + 14
    num_refused = 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        num_bytes = [1, 4, 64][seed % 3]
        at = int(random.integers(start, len(whole) - num_bytes - 2))
        data = whole[:at] + random.bytes(num_bytes) + whole[at + num_bytes :]
        try:
            simplejpeg.decode_jpeg(data, colorspace)
        except ValueError:
            assert refused(data) == "Corrupt", seed
            num_refused += 1
    assert num_refused >= 20


@pytest.mark.parametrize("seed", range(20))
def test_damaged_png_is_refused(seed):
    whole = encode(photo(120, 100), "PNG")
    random = np.random.default_rng(seed)
    at = int(random.integers(8, len(whole) - 20))
    assert refused(whole[:at] + bytes([whole[at] ^ (1 << seed % 8)]) + whole[at + 1 :]) in {
        "Corrupt",
        "NotAnImage",
        "Truncated",
    }


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "BMP", "GIF"])
def test_bomb_is_refused_by_its_header_without_allocating(image_format, fast):
    claimed = (30_000, 30_000)
    if image_format == "PNG":
        data = png(1, 1, 8, 2, b"\0\1\2\3", size=claimed)
    elif image_format == "JPEG":
        data = bytearray(jpeg())
        frame = data.index(b"\xff\xc0")
        data[frame + 5 : frame + 9] = struct.pack(">HH", *claimed)
        data = bytes(data)
    elif image_format == "BMP":
        data = bytearray(encode(photo(9, 9), "BMP"))
        data[18:26] = struct.pack("<ii", *claimed)
        data = bytes(data)
    else:
        data = bytearray(encode(photo(9, 9), "GIF"))
        data[6:10] = struct.pack("<HH", *claimed)
        data = bytes(data)
    tracemalloc.start()
    try:
        assert refused(data, fast=fast) == "TooManyPixels"
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_pixel_limit_is_the_configs_and_inclusive():
    for data in (encode(photo(300, 200)), encode(photo(300, 200), "PNG")):
        decode(data, max_pixels=60_000)
        with pytest.raises(SampleError, match=r"300 x 200 pixels are more than source\.max_pixels = 59999"):
            decode(data, max_pixels=59_999)


@pytest.mark.parametrize("size", [(0, 0), (0, 9), (9, 0)])
def test_picture_without_pixels_is_refused(size):
    frame = bytearray(jpeg())
    at = frame.index(b"\xff\xc0")
    frame[at + 5 : at + 9] = struct.pack(">HH", size[1], size[0])
    gif = bytearray(encode(photo(9, 9), "GIF"))
    gif[6:10] = struct.pack("<HH", *size)
    frame_header = gif.index(b"," + struct.pack("<HHHH", 0, 0, 9, 9))
    gif[frame_header + 5 : frame_header + 9] = struct.pack("<HH", *size)
    bmp = bytearray(encode(photo(9, 9), "BMP"))
    bmp[18:26] = struct.pack("<ii", *size)
    tiff = encode(photo(9, 9), "TIFF")
    for tag, length in zip((256, 257), size, strict=True):
        tiff = tiff.replace(struct.pack("<HHII", tag, 4, 1, 9), struct.pack("<HHII", tag, 4, 1, length))
    for data in (png(*size, 8, 2, b""), bytes(frame), bytes(gif), bytes(bmp), tiff):
        assert refused(data) in {"NotAnImage", "Corrupt", "Truncated"}
