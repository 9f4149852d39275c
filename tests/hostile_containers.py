"""Containers that are damaged, odd or meant to harm, each with what has to come out of it: tars in `TARS`, Parquet files in
`PARQUETS`. Like `hostile`, all are made here.
"""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hostile import CANARY, Touch, made, zipped
from images import jpeg, member, tar


@dataclass(frozen=True)
class Failed:
    """A shard that fails by name, for this reason."""

    reason: str


@dataclass(frozen=True)
class Container:
    """A shard, and its samples by key in their order: None where a sample is a row, else the error it is refused with."""

    make: Callable[[], bytes]
    expected: list[tuple[str, tuple[str, str] | None]] | Failed
    ending: str = ""
    """Of its name, where that is not its format's."""

    @property
    def data(self) -> bytes:
        """Its bytes."""
        return made(self.make)


# Tars


GOOD = jpeg(1)
"""The image of the members that are rows."""
BOTH: list[tuple[str, tuple[str, str] | None]] = [("a", None), ("c", None)]
NOT_A_FILE = ("read", "NotAFile")


def three(middle: Any, **options: Any) -> bytes:
    """A tar of two good images, and something between them."""
    return tar([("a.jpg", jpeg(1)), middle, ("c.jpg", jpeg(2))], **options)


def with_header(name: bytes, **fields: bytes) -> bytes:
    """A tar of three images, where one header has other bytes in some of its fields, and a sum that is right."""
    places = {"size": (124, 136), "kind": (156, 157), "mode": (100, 108)}
    data = bytearray(three(("b.jpg", GOOD), archive_format=tarfile.USTAR_FORMAT))
    at = data.index(name)
    for field, content in fields.items():
        start, end = places[field]
        data[at + start : at + end] = content
    return summed(data, at)


def summed(data: bytearray, at: int) -> bytes:
    """The archive with the right sum in the header at this byte."""
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return bytes(data)


def extended(payload: bytes, kind: bytes = b"x", size: bytes | None = None) -> bytes:
    """An extended header, for in front of a member; `size` is what its size field says instead."""
    info = tarfile.TarInfo("PaxHeader")
    info.type, info.size = kind, len(payload)
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    if size is not None:
        header[124:136] = size
    return summed(header, 0) + payload + bytes(-len(payload) % 512)


def between(part: bytes) -> bytes:
    """A tar of two images with raw bytes between them."""
    first, second = (
        tar([(name, jpeg(seed))], archive_format=tarfile.USTAR_FORMAT) for name, seed in (("a.jpg", 1), ("c.jpg", 2))
    )
    return first[: 512 + len(jpeg(1)) + -len(jpeg(1)) % 512] + part + second


def record(keyword: bytes, value: bytes) -> bytes:
    """A record of an extended header."""
    length = len(keyword) + len(value) + 3
    while len(b"%d" % length) + len(keyword) + len(value) + 3 != length:
        length = len(b"%d" % length) + len(keyword) + len(value) + 3
    return b"%d %s=%s\n" % (length, keyword, value)


def sparse() -> bytes:
    """A sparse file as GNU tar writes it by default."""
    info, payload = member("b.jpg", b"x" * 512)
    info.pax_headers = {"GNU.sparse.map": "0,512", "GNU.sparse.size": "1048576", "GNU.sparse.numblocks": "1"}
    return three((info, payload))


def old_sparse() -> bytes:
    """A sparse file of the old kind, whose map goes on for two blocks."""
    header = bytearray(tarfile.TarInfo("b.jpg").tobuf(tarfile.GNU_FORMAT))
    header[156:157], header[124:136], header[482:483] = b"S", b"%011o\0" % 512, b"\1"
    more, last = bytearray(512), bytes(512)
    more[504] = 1
    return between(summed(header, 0) + bytes(more) + last + b"x" * 512)


def specials() -> bytes:
    kinds = {"link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "char": tarfile.CHRTYPE, "block": tarfile.BLKTYPE}
    odd = [member(f"{name}.jpg", type=kind, linkname="/etc/passwd") for name, kind in kinds.items()]
    return tar([("a.jpg", GOOD), *odd, member("pipe.jpg", type=tarfile.FIFOTYPE), ("c.jpg", GOOD)])


def signed_sum() -> bytes:
    """A header whose sum takes bytes for signed ones, as some old programs did, with a name that makes a difference."""
    data = bytearray(tar([("a.jpg", GOOD), ("ü.jpg", GOOD)], archive_format=tarfile.GNU_FORMAT))
    at = data.index("ü.jpg".encode())
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % (sum(data[at : at + 512]) - 512)
    return bytes(data)


def end_of(data: bytes) -> int:
    """Where the zeros of an archive's end begin."""
    return -(-len(data.rstrip(b"\0")) // 512) * 512


def whole() -> bytes:
    return three(("b.jpg", GOOD))


ALL: list[tuple[str, tuple[str, str] | None]] = [("a", None), ("b", None), ("c", None)]

TARS: dict[str, Container] = {
    "whole": Container(whole, ALL),
    "empty-file": Container(lambda: b"", Failed("not a readable tar")),
    "empty-archive": Container(lambda: tar([]), []),
    "html": Container(lambda: b"<!DOCTYPE html><html><body>404</body></html>" * 40, Failed("bad checksum at byte 0")),
    "zip": Container(zipped, Failed("bad checksum")),
    "cut-in-header": Container(lambda: whole()[:1_700], Failed("without the mark of its end")),
    "cut-in-body": Container(lambda: whole()[:2_200], Failed("ends inside the member")),
    "without-end": Container(lambda: whole()[: end_of(whole())], Failed("without the mark of its end")),
    "half-an-end": Container(lambda: whole()[: end_of(whole()) + 512], ALL),
    "bytes-behind-the-end": Container(lambda: whole() + b"x" * 999, ALL),
    "bad-checksum": Container(lambda: whole().replace(b"b.jpg\0", b"d.jpg\0"), Failed("bad checksum")),
    "signed-checksum": Container(signed_sum, [("a", None), ("ü", None)]),
    "sparse": Container(sparse, [("a", None), ("b", NOT_A_FILE), ("c", None)]),
    "sparse-of-the-old-kind": Container(old_sparse, [("a", None), ("b", NOT_A_FILE), ("c", None)]),
    "sparse-cut-in-its-map": Container(lambda: old_sparse()[:2_560], Failed("it ends in a header")),
    "links-devices-pipes": Container(
        specials, [("a", None), *((name, NOT_A_FILE) for name in ("link", "hard", "char", "block", "pipe")), ("c", None)]
    ),
    "folder-with-a-size": Container(lambda: with_header(b"b.jpg", kind=b"5", size=b"77777777777\0"), Failed("bad checksum")),
    "unknown-kind": Container(lambda: with_header(b"b.jpg", kind=b"V"), [("a", None), ("b", NOT_A_FILE), ("c", None)]),
    "contiguous-file": Container(lambda: with_header(b"b.jpg", kind=b"7"), ALL),
    "names-that-lead-away": Container(
        lambda: tar([("../../../evil.jpg", GOOD), ("/evil.jpg", jpeg(2)), (f"{CANARY}.jpg", jpeg(3)), ("a/../b.jpg", jpeg(4))]),
        [("../../../evil", None), ("/evil", None), (str(CANARY), None), ("a/../b", None)],
    ),
    "names-not-utf8": Container(
        lambda: tar([("caf\udce9.jpg", GOOD), ("caf\udcea.jpg", jpeg(2))], archive_format=tarfile.GNU_FORMAT),
        [("caf\\xe9", None), ("caf\\xea", None)],
    ),
    "names-not-utf8-extended": Container(
        lambda: between(extended(record(b"path", b"caf\xe9.jpg")) + tar([("x.jpg", GOOD)])[: 512 + 1024]),
        [("a", None), ("caf\\xe9", None), ("c", None)],
    ),
    "extension-not-utf8": Container(
        lambda: tar([("a.jpg", GOOD), ("b.j\udce9g", jpeg(2)), ("c.jpg", jpeg(3))], archive_format=tarfile.GNU_FORMAT),
        [("a", None), ("b", ("read", "NoImage")), ("c", None)],
    ),
    "name-of-another-line": Container(
        lambda: tar([("a\n../../b.jpg", GOOD), ("\x1b]0;evil\x07.jpg", jpeg(2))]),
        [("a\n../../b", None), ("\x1b]0;evil\x07", None)],
    ),
    "key-twice": Container(
        lambda: tar([("a.jpg", GOOD), ("b.jpg", jpeg(2)), ("a.jpg", jpeg(3))]),
        [("a", None), ("b", None), ("a", ("read", "DuplicateKey"))],
    ),
    "two-images-of-one-key": Container(
        lambda: tar([("a.jpg", GOOD), ("a.png", b"x"), ("c.jpg", GOOD)]), [("a", ("read", "AmbiguousImage")), ("c", None)]
    ),
    "no-image": Container(lambda: three(("b.txt", b"text")), [("a", None), ("b", ("read", "NoImage")), ("c", None)]),
    "zero-bytes": Container(lambda: three(("b.jpg", b"")), [("a", None), ("b", ("decode", "Empty")), ("c", None)]),
    "label-that-is-none": Container(
        lambda: tar([("a.jpg", GOOD), ("a.cls", b"\xff"), ("b.jpg", jpeg(2)), ("b.cls", b"1e9999"), ("c.jpg", jpeg(3))]),
        [("a", ("label", "UnicodeDecodeError")), ("b", ("label", "WrongType")), ("c", None)],
    ),
    "size-huge": Container(lambda: with_header(b"b.jpg", size=b"77777777777\0"), Failed("ends inside the member")),
    "size-binary-huge": Container(lambda: with_header(b"b.jpg", size=b"\x80" + b"\x7f" * 11), Failed("ends inside the member")),
    "size-binary": Container(lambda: with_header(b"b.jpg", size=b"\x80" + len(GOOD).to_bytes(11, "big")), ALL),
    "size-negative": Container(lambda: with_header(b"b.jpg", size=b"-0000001000\0"), Failed("no number as the size")),
    "size-binary-negative": Container(
        lambda: with_header(b"b.jpg", size=b"\xff" * 11 + b"\0"), Failed("no number as the size")
    ),
    "size-of-letters": Container(lambda: with_header(b"b.jpg", size=b"0000000_100\0"), Failed("no number as the size")),
    "extended-size-negative": Container(
        lambda: between(extended(record(b"size", b"-1024")) + tar([("b.jpg", GOOD)])), Failed("no number as the size")
    ),
    "extended-size": Container(
        lambda: between(
            extended(record(b"size", b"%d" % len(GOOD))) + with_header(b"b.jpg", size=b"0" * 11 + b"\0")[1_536:][:1_536]
        ),
        ALL,
    ),
    "extended-huge": Container(lambda: between(extended(b"", size=b"77777777777\0")), Failed("claims 8589934591 bytes")),
    "extended-lies-about-its-length": Container(
        lambda: between(extended(b"99 path=x\n")), Failed("extended header at byte 1536 is damaged")
    ),
    "extended-length-zero": Container(lambda: between(extended(b"0 path=x\n")), Failed("is damaged")),
    "extended-flood-of-digits": Container(lambda: between(extended(b"1" * 500_000)), Failed("is damaged")),
    "extended-without-member": Container(
        lambda: between(extended(record(b"path", b"x.jpg")) + bytes(1_024)), Failed("has no member")
    ),
    "extended-two-thousand-times": Container(
        lambda: between(extended(record(b"path", b"x.jpg")) * 2_000 + tar([("b.jpg", GOOD)])[: 512 + 1024]),
        [("a", None), ("x", None), ("c", None)],
    ),
    "extended-for-all": Container(lambda: between(extended(record(b"comment", b"abc"), kind=b"g")), BOTH),
    "extended-name-for-all": Container(
        lambda: between(extended(record(b"path", b"x.jpg"), kind=b"g")), Failed("names or measures every member")
    ),
    "long-link": Container(lambda: between(extended(b"l" * 300 + b"\0", kind=b"K")), BOTH),
    "gzip": Container(lambda: gzip.compress(whole()), ALL, ".tar.gz"),
    "gzip-of-several-files": Container(
        lambda: b"".join(gzip.compress(whole()[start : start + 1_000]) for start in range(0, len(whole()), 1_000)),
        ALL,
        ".tar.gz",
    ),
    "gzip-cut": Container(lambda: gzip.compress(whole())[:900], Failed("not a readable tar"), ".tar.gz"),
    "gzip-damaged": Container(
        lambda: gzip.compress(whole())[:200] + b"\xff" * 200 + gzip.compress(whole())[400:],
        Failed("not a readable tar"),
        ".tgz",
    ),
    "gzip-bomb": Container(
        lambda: gzip.compress(three(("b.bin", bytes(64 << 20)))),
        [("a", None), ("b", ("read", "NoImage")), ("c", None)],
        ".tar.gz",
    ),
    "gzip-size-huge": Container(
        lambda: gzip.compress(with_header(b"b.jpg", size=b"77777777777\0")), Failed("without the mark of its end"), ".tar.gz"
    ),
    "gzip-named-tar": Container(lambda: gzip.compress(whole()), Failed("bad checksum")),
    "tar-named-gzip": Container(whole, ALL, ".tar.gz"),
    "gzip-of-html": Container(lambda: gzip.compress(b"<html>" * 500), Failed("bad checksum"), ".tgz"),
}


# Parquet


def parquet(**columns: Any) -> bytes:
    """A file with the columns `key`, `image` and `label`, unless they are given otherwise; None leaves one out."""
    keys = pa.array(["a", "b", "c"])
    table = {"key": keys, "image": pa.array([jpeg(1), jpeg(2), jpeg(3)], pa.binary()), "label": pa.array([1, 2, 3])} | columns
    return written(pa.table({name: column for name, column in table.items() if column is not None}))


def written(table: pa.Table, **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


def structs() -> pa.Array:
    """Images as Hugging Face writes them."""
    rows = [{"bytes": jpeg(number), "path": f"{number}.jpg"} for number in range(3)]
    return pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def invalid_text() -> pa.Array:
    offsets = pa.py_buffer(np.array([0, 1, 2, 3], np.int32))
    return pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"a\xffc"))


def pickled_type() -> bytes:
    """A column of a type that old versions of pyarrow made by unpickling."""
    metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(Touch())}
    schema = pa.schema(
        [pa.field("key", pa.string(), metadata=metadata), pa.field("image", pa.binary()), pa.field("label", pa.int64())]
    )
    return written(pa.table([["a", "b", "c"], [jpeg(1), jpeg(2), jpeg(3)], [1, 2, 3]], schema=schema))


def page_of_huge_length(columns: dict[str, list[Any]] | None = None) -> bytes:
    """The header of the last column's page claims 2,000,000,000 bytes: a number of Thrift's compact protocol."""
    table = pa.table(columns or {"key": ["a"], "image": [jpeg(1)], "label": [1]})
    data = written(table, compression="none", use_dictionary=False)
    at = pq.read_metadata(io.BytesIO(data)).row_group(0).column(table.num_columns - 1).data_page_offset
    assert (data[at : at + 3], data[at + 4]) == (b"\x15\0\x15", 0x15), "the page's kind, its size unpacked, then packed"
    return data[: at + 5] + b"\x80\xd0\xac\xf3\x0e" + data[at + 6 :]


PARQUETS: dict[str, Container] = {
    "a-whole": Container(parquet, ALL),
    "hugging-face": Container(lambda: parquet(image=structs()), ALL),
    "wide-types": Container(
        lambda: parquet(
            image=pa.array([jpeg(1), jpeg(2), jpeg(3)], pa.large_binary()),
            key=pa.array(["a", "b", "c"], pa.large_string()),
            label=pa.array([1, 2, 3], pa.int8()),
        ),
        ALL,
    ),
    "zero-rows": Container(
        lambda: written(
            pa.table({"key": pa.array([], pa.string()), "image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())})
        ),
        [],
    ),
    "null-images": Container(
        lambda: parquet(image=pa.array([jpeg(1), None, b""], pa.binary())),
        [("a", None), ("b", ("read", "NoImage")), ("c", ("decode", "Empty"))],
    ),
    "null-keys": Container(
        lambda: parquet(key=pa.array(["a", None, None])),
        [("a", None), ("row 1", ("read", "NoKey")), ("row 2", ("read", "NoKey"))],
    ),
    "keys-twice": Container(
        lambda: parquet(key=pa.array(["a", "a", "c"])), [("a", None), ("a", ("read", "DuplicateKey")), ("c", None)]
    ),
    "null-labels": Container(lambda: parquet(label=pa.array([1, None, None], pa.int64())), ALL),
    "not-images": Container(
        lambda: parquet(image=pa.array([b"<html>", jpeg(2), pickle.dumps(Touch())], pa.binary())),
        [("a", ("decode", "NotAnImage")), ("b", None), ("c", ("decode", "NotAnImage"))],
    ),
    "huge-key": Container(lambda: parquet(key=pa.array(["a", "b", "x" * 1_000_000])), [*ALL[:2], ("x" * 1_000_000, None)]),
    "keys-that-are-text-only": Container(
        lambda: parquet(key=pa.array(["../../a", "\x1b[31m\0", "'; DROP TABLE"])),
        [("../../a", None), ("\x1b[31m\0", None), ("'; DROP TABLE", None)],
    ),
    "type-to-unpickle": Container(pickled_type, ALL),
    "image-of-text": Container(lambda: parquet(image=pa.array(["x", "y", "z"])), Failed("source.image")),
    "image-of-lists": Container(lambda: parquet(image=pa.array([[1], [2], [3]])), Failed("source.image")),
    "no-image-column": Container(lambda: parquet(image=None, img=pa.array([b"x"] * 3)), Failed("there is no column 'image'")),
    "no-label-column": Container(lambda: parquet(label=None), Failed("there is no column 'label'")),
    "column-twice": Container(
        lambda: written(
            pa.table(
                [["a", "b"], ["c", "d"], pa.array([jpeg(1), jpeg(2)], pa.binary()), [1, 2]],
                names=["key", "key", "image", "label"],
            )
        ),
        Failed("there are 2 columns 'key'"),
    ),
    "key-not-utf8": Container(lambda: parquet(key=invalid_text()), Failed("not a readable Parquet file")),
    "key-of-no-time-zone": Container(
        lambda: parquet(key=pa.array([1, 2, 3], pa.timestamp("us", "Nowhere/Land"))), Failed("not a readable Parquet file")
    ),
    "empty-file": Container(lambda: b"", Failed("not a readable Parquet file")),
    "only-magic": Container(lambda: b"PAR1PAR1", Failed("not a readable Parquet file")),
    "html": Container(lambda: b"<!DOCTYPE html><html><body>404</body></html>" * 40, Failed("not a readable Parquet file")),
    "cut": Container(lambda: parquet()[:-30], Failed("not a readable Parquet file")),
    "cut-and-ended": Container(lambda: parquet()[:500] + b"PAR1", Failed("not a readable Parquet file")),
    "footer-of-huge-length": Container(lambda: parquet()[:-8] + b"\xff\xff\xff\x7fPAR1", Failed("not a readable Parquet file")),
    "page-of-huge-length": Container(page_of_huge_length, Failed("not a readable Parquet file")),
    "encrypted": Container(lambda: b"PARE" + parquet()[4:-4] + b"PARE", Failed("not a readable Parquet file")),
    "pages-zeroed": Container(lambda: parquet()[:60] + bytes(500) + parquet()[560:], Failed("not a readable Parquet file")),
}
