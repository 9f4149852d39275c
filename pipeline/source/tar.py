"""The members of a tar archive, in order, while it is read once from start to end. Nothing is ever extracted to disk.

Headers are read here and not by `tarfile`, which holds the interpreter lock for longer over a header than a picture's decoding
does, takes a damaged one for the archive's end, follows a negative size backwards for ever, and holds an extended header of
any size in memory. What is not understood, or is missing, is an error that names the byte: no sample is lost in silence.
"""

from __future__ import annotations

import collections
import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline.errors import SampleError, ShardError
from pipeline.source.sample import Shard, printable
from pipeline.storage import Store

FREE_BYTES = 1 << 20
"""Members up to this size are handed out without a question: they lie in memory already."""
MAX_PASSED_BYTES = 32 << 20
"""Members above this size that nobody wants are not read to get past them."""
MAX_EXTENDED_BYTES = 1 << 20
"""Of an extended header, which is held whole: a name, or what a member says beside it."""
INFLATED_BYTES = 1 << 20
"""Compressed archives are unpacked in pieces of this size."""
_BLOCK = 512
_ADLER_BASE = 65521
_FILE_KINDS = frozenset({b"0", b"\0", b"7"})
_FOLDER, _SPARSE = b"5", b"S"
_LONG_NAME, _LONG_LINK, _PAX, _SOLARIS_PAX, _GLOBAL_PAX = b"L", b"K", b"x", b"X", b"g"
_EXTENDED_KINDS = frozenset({_LONG_NAME, _LONG_LINK, _PAX, _SOLARIS_PAX, _GLOBAL_PAX})
_WITHOUT_DATA = frozenset({b"1", b"2", b"3", b"4", _FOLDER, b"6"})
"""Links, devices, folders and pipes: their size field says nothing about the archive."""
_MORE_SPARSE_AT, _MORE_SPARSE_STILL_AT = 482, 504
"""Whether a block with more of a sparse file's map follows: in its header, and in such a block."""


@dataclass(slots=True)
class Member:
    """A regular file of an archive, or what claims to be one."""

    name: str
    offset: int | None
    """Of its bytes in the archive; None in a compressed one."""
    num_bytes: int
    payload: bytes | memoryview | None
    """None where it was not wanted, or has a `problem`."""
    problem: SampleError | None = None


Limit = Callable[[str], int | None]
"""A member's name to the most bytes that are read of it; None where it is of no use."""


def members(store: Store, shard: Shard, limit: Limit) -> Iterator[Member]:
    """Every member but folders.

    Raises:
        ShardError: damaged, cut off, or no archive.
        ShardChanged: it is no longer what was listed.
    """
    file = shard.files[0]
    is_plain = shard.url.lower().endswith(".tar")
    if is_plain:
        archive = _Blocks(store.blocks(file), lambda start: store.blocks(file, start))
    else:
        archive = _Blocks(_inflated(store.blocks(file)))
    try:
        yield from _members(archive, limit, file.num_bytes if is_plain else None)
    except _Damaged as damage:
        raise ShardError(f"{shard.url}: not a readable tar archive: {damage}") from None


def _members(archive: _Blocks, limit: Limit, archive_bytes: int | None) -> Iterator[Member]:
    """The members; `archive_bytes` is None in a compressed archive, where nothing has an offset."""
    said = _Said()
    while True:
        view, at = archive.peek(_BLOCK), archive.position
        if view is None:
            raise _Damaged(f"it ends at byte {at}, or before, without the mark of its end")
        header = bytes(view)
        if not header.strip(b"\0"):
            if not said.is_empty:
                raise _Damaged(f"the extended header before byte {at} has no member")
            return
        if not _is_sound(header):
            raise _Damaged(f"bad checksum at byte {at}")
        kind, num_bytes = header[156:157], _number(header[124:136])
        if num_bytes is None:
            raise _Damaged(f"no number as the size at byte {at}")
        if kind in _EXTENDED_KINDS:
            if num_bytes > MAX_EXTENDED_BYTES:
                raise _Damaged(f"the extended header at byte {at} claims {num_bytes} bytes")
            extended = archive.peek(_BLOCK + num_bytes)
            if extended is None:
                raise _Damaged(f"it ends in the extended header at byte {at}")
            said.add(kind, bytes(extended[_BLOCK:]), at)
            archive.skip(_BLOCK + _padded(num_bytes))
            continue
        name, is_file = _name(header), kind in _FILE_KINDS
        if not said.is_empty:
            name, is_file = said.name or name, is_file and not said.is_sparse
            num_bytes = num_bytes if said.num_bytes is None else said.num_bytes
            said = _Said()
        if kind in _WITHOUT_DATA:
            num_bytes = 0
        elif kind == _SPARSE:
            _skip_sparse_map(archive, header)
        if archive_bytes is not None and archive.position + _BLOCK + num_bytes > archive_bytes:
            raise _Damaged(f"it ends inside the member at byte {at}")
        if kind != _FOLDER and not (kind == b"\0" and name.endswith("/")):
            member = Member(name, None if archive_bytes is None else archive.position + _BLOCK, num_bytes, None)
            most = num_bytes if is_file and num_bytes <= FREE_BYTES else limit(name)
            if most is not None:
                member.problem = _problem(member, is_file, most)
            if most is not None and member.problem is None:
                content = archive.peek(_BLOCK + num_bytes)
                if content is None:
                    raise _Damaged(f"it ends inside the member at byte {at}")
                member.payload = content[_BLOCK:]
            yield member
        archive.skip(_BLOCK + _padded(num_bytes))


@dataclass(slots=True)
class _Said:
    """What extended headers say of the member that follows them."""

    name: str = ""
    num_bytes: int | None = None
    is_sparse: bool = False
    is_empty: bool = True

    def add(self, kind: bytes, payload: bytes, position: int) -> None:
        """Take in one extended header."""
        if kind == _LONG_LINK:
            return
        if kind == _GLOBAL_PAX:
            # Of all members that follow: comments and owners. A name or a size of all of them makes no sense.
            names = [keyword for keyword, _ in _records(payload, position)]
            if any(name in (b"path", b"size") or name.startswith(b"GNU.sparse.") for name in names):
                raise _Damaged(f"the extended header at byte {position} names or measures every member")
            return
        self.is_empty = False
        if kind == _LONG_NAME:
            self.name = payload.partition(b"\0")[0].decode("utf-8", "surrogateescape")
            return
        for keyword, value in _records(payload, position):
            if keyword == b"path" and not self.is_sparse:
                self.name = value.decode("utf-8", "surrogateescape").rstrip("/")
            elif keyword == b"size":
                if not value.isdigit() or len(value) > 20:
                    raise _Damaged(f"the extended header at byte {position} has no number as the size")
                self.num_bytes = int(value)
            elif keyword.startswith(b"GNU.sparse."):
                self.is_sparse = True
                if keyword == b"GNU.sparse.name":
                    self.name = value.decode("utf-8", "surrogateescape")


def _records(payload: bytes, position: int) -> Iterator[tuple[bytes, bytes]]:
    """Keywords and values of an extended header: each `LENGTH KEYWORD=VALUE` and a line feed, the length that of the whole."""
    start = 0
    while start < len(payload) and payload[start]:
        size, _, _ = payload[start : start + 8].partition(b" ")
        end = start + int(size) if size.isdigit() else 0
        keyword, equals, value = payload[start + len(size) + 1 : end - 1].partition(b"=")
        if not keyword or not equals or payload[end - 1 : end] != b"\n":
            raise _Damaged(f"the extended header at byte {position} is damaged")
        yield keyword, value
        start = end


class _Blocks:
    """Consecutive blocks as one stretch of bytes. What is taken from it is a view, copied only where it spans two blocks."""

    def __init__(self, blocks: Iterator[bytes], reopen: Callable[[int], Iterator[bytes]] | None = None) -> None:
        self._source, self._reopen = blocks, reopen
        """`reopen` gives the blocks from some byte on, where that does not take reading up to it."""
        self._held = collections.deque([memoryview(b"")])
        self._num_held = 0
        self._start = 0
        self.position = 0

    def peek(self, num_bytes: int) -> memoryview | None:
        """The next bytes; None where there are not so many."""
        first, end = self._held[0], self._start + num_bytes
        if end <= len(first):
            return first[self._start : end]
        while self._num_held < end:
            if not self._fetch():
                return None
        parts, missing = [first[self._start :]], end - len(first)
        for part in list(self._held)[1:]:
            parts.append(part[:missing])
            missing -= len(parts[-1])
        return memoryview(b"".join(parts))

    def skip(self, num_bytes: int) -> None:
        """Go on, at most to the end."""
        self._start += num_bytes
        self.position += num_bytes
        if self._reopen is not None and self._start > self._num_held + MAX_PASSED_BYTES:
            self._source = self._reopen(self.position)
            self._held = collections.deque([memoryview(b"")])
            self._num_held = self._start = 0
        while self._start > len(self._held[0]):
            passed = len(self._held.popleft())
            self._start -= passed
            self._num_held -= passed
            if not self._held and not self._fetch():
                self._held.append(memoryview(b""))
                self._start = 0
                return

    def _fetch(self) -> bool:
        block = next(self._source, None)
        if block is None:
            return False
        self._held.append(memoryview(block))
        self._num_held += len(block)
        return True


def _inflated(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """What gzip packed into these blocks, in pieces of bounded size; what is not packed passes as it is."""
    first = next(blocks, b"")
    while len(first) < 2 and (more := next(blocks, b"")):
        first += more
    if first[:2] != b"\x1f\x8b":
        yield from itertools.chain([first], blocks)
        return
    stream = zlib.decompressobj(wbits=31)
    for block in itertools.chain([first], blocks):
        packed, piece = block, b""
        while packed or len(piece) == INFLATED_BYTES:
            try:
                piece = stream.decompress(packed, INFLATED_BYTES)
            except zlib.error as error:
                raise _Damaged(f"the compression is damaged: {error}") from None
            packed = stream.unconsumed_tail
            if piece:
                yield piece
            if stream.eof:  # files that were packed one by one and put together
                packed, piece, stream = stream.unused_data, b"", zlib.decompressobj(wbits=31)


class _Damaged(Exception):
    """No archive, or not a whole one; the message says where."""


def _is_sound(header: bytes) -> bool:
    """Whether the sum of the header's bytes is the one that it names.

    Adler-32's lower half is 1 + that sum, modulo a prime: one call in C.
    """
    stated = header[148:156]
    named = _number(stated)
    if named is None:
        return False
    if zlib.adler32(header) & 0xFFFF == (1 + named - 8 * 32 + sum(stated)) % _ADLER_BASE:
        return True
    # Old programs took bytes for signed.
    blank = header[:148] + b" " * 8 + header[156:]
    return named == sum(blank) - 256 * sum(each > 127 for each in blank)


def _number(stated: bytes) -> int | None:
    """A field of octal digits, or GNU's binary one behind a byte of 0x80; None where it is neither."""
    if stated[0] == 0x80:
        return int.from_bytes(stated[1:], "big")
    digits = stated.partition(b"\0")[0].strip()
    try:
        return int(digits, 8) if digits.isdigit() else None if digits else 0
    except ValueError:
        return None


def _padded(num_bytes: int) -> int:
    return num_bytes + -num_bytes % _BLOCK


def _name(header: bytes) -> str:
    name, prefix = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _skip_sparse_map(archive: _Blocks, header: bytes) -> None:
    """Go to the last block of a sparse file's header, which may have any number of them."""
    more = header[_MORE_SPARSE_AT]
    while more:
        archive.skip(_BLOCK)
        block = archive.peek(_BLOCK)
        if block is None:
            raise _Damaged(f"it ends in a header at byte {archive.position}")
        more = block[_MORE_SPARSE_STILL_AT]


def _problem(member: Member, is_file: bool, most: int) -> SampleError | None:
    if not is_file:
        return SampleError("read", "NotAFile", f"{printable(member.name)} is no regular file of the archive")
    if member.num_bytes > most:
        message = f"{printable(member.name)} has {member.num_bytes} bytes; at most {most} are read"
        return SampleError("read", "TooLarge", message)
    return None
