"""The members of a tar archive, in order, while it is read once from start to end. Nothing is ever extracted to disk."""

from __future__ import annotations

import collections
import tarfile
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal, Self

from pipeline.errors import SampleError, ShardError
from pipeline.source.sample import Shard, printable
from pipeline.storage import Store

MAX_GZIP_RATIO = 1100
"""Deflate cannot do better than 1032."""
FREE_BYTES = 1 << 20
"""Members up to this size are handed out without a question: they lie in memory already."""
MAX_PASSED_BYTES = 32 << 20
"""Members above this size that nobody wants are not read to get past them."""
MAX_NAME_BYTES = 1 << 16
_BLOCK = 512
_FILE_KINDS, _FOLDER, _LONG_NAME, _PAX = (b"0", b"\0"), b"5", b"L", b"x"
_IDLE_RECORDS = frozenset({b"mtime", b"atime", b"ctime", b"uid", b"gid", b"uname", b"gname"})
"""Extended headers that change neither what a member is called nor what it holds."""
_ADLER_BASE = 65521


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
    position: int | None = 0
    is_plain = shard.url.lower().endswith(".tar")
    if is_plain:
        position = yield from _plain_members(store.blocks(shard.files[0]), limit)
    if position is not None:
        with store.open(shard.files[0]) as file:
            file.seek(position)
            yield from _any_members(file, shard, is_plain, limit)


def _plain_members(blocks: Iterator[bytes], limit: Limit) -> Generator[Member, None, int | None]:
    """Members of an uncompressed archive for as long as they are plain files of plain size.

    `tarfile` holds the interpreter lock for longer over a header than a picture's decoding does; this takes a tenth. Whatever
    is out of the ordinary (links, sparse files, damage, the lack of an end) is left to it.

    Returns:
        Where it has to go on; None at the archive's end.
    """
    archive = _Blocks(blocks)
    name = ""
    start = 0
    while (view := archive.peek(_BLOCK)) is not None:
        header = bytes(view)
        if not header.strip(b"\0"):
            return None
        kind, num_bytes = header[156:157], _octal(header[124:136])
        if num_bytes is None or not _is_sound(header):
            return start
        padded = num_bytes + -num_bytes % _BLOCK
        if kind in (_PAX, _LONG_NAME):
            extended = archive.peek(_BLOCK + padded) if num_bytes <= MAX_NAME_BYTES else None
            found = _long_name(kind, bytes(extended[_BLOCK : _BLOCK + num_bytes])) if extended is not None else None
            if found is None:
                return start
            name = found or name
            archive.skip(_BLOCK + padded)
            continue  # `start` stays: a member begins with what extends its header
        name = name or _name(header)
        if kind == _FOLDER or (kind == b"\0" and name.endswith("/")):
            archive.skip(_BLOCK if kind == _FOLDER else _BLOCK + padded)
        elif kind not in _FILE_KINDS:
            return start
        else:
            most = limit(name) if num_bytes > FREE_BYTES else num_bytes
            if num_bytes > (MAX_PASSED_BYTES if most is None else most):
                return start
            member = Member(name, archive.position + _BLOCK, num_bytes, None)
            if most is not None:
                content = archive.peek(_BLOCK + padded)
                if content is None:
                    return start
                member.payload = content[_BLOCK : _BLOCK + num_bytes]
            yield member
            if not archive.skip(_BLOCK + padded):
                return start
        name, start = "", archive.position
    return start


class _Blocks:
    """Consecutive blocks as one stretch of bytes. What is taken from it is a view, copied only where it spans two blocks."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._source = blocks
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

    def skip(self, num_bytes: int) -> bool:
        """Go on; False where there are not so many bytes."""
        self._start += num_bytes
        self.position += num_bytes
        while self._start > len(self._held[0]):
            passed = len(self._held.popleft())
            self._start -= passed
            self._num_held -= passed
            if not self._held and not self._fetch():
                self._held.append(memoryview(b""))
                return self._start == 0
        return True

    def _fetch(self) -> bool:
        block = next(self._source, None)
        if block is None:
            return False
        self._held.append(memoryview(block))
        self._num_held += len(block)
        return True


def _is_sound(header: bytes) -> bool:
    """Whether the sum of the header's bytes is the one that it names.

    Adler-32's lower half is 1 + that sum, modulo a prime: one call in C.
    """
    field = header[148:156]
    named = _octal(field)
    return named is not None and zlib.adler32(header) & 0xFFFF == (1 + named - 8 * 32 + sum(field)) % _ADLER_BASE


def _octal(field: bytes) -> int | None:
    try:
        return int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return None


def _name(header: bytes) -> str:
    name, prefix = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _long_name(kind: bytes, payload: bytes) -> str | None:
    """The name in an extended header; empty where it has none, None where it says something else that matters."""
    if kind == _LONG_NAME:
        return payload.partition(b"\0")[0].decode("utf-8", "surrogateescape")
    name = ""
    while payload:
        size, _, _ = payload.partition(b" ")
        if not size.isdigit() or not 0 < int(size) <= len(payload):
            return None
        keyword, equals, value = payload[len(size) + 1 : int(size) - 1].partition(b"=")
        if keyword == b"path":
            name = value.decode("utf-8", "surrogateescape").rstrip("/")
        elif not equals or keyword not in _IDLE_RECORDS:
            return None
        payload = payload[int(size) :]
    return name


class _Header(tarfile.TarInfo):
    """A header that is damaged, cut off or missing is an error: tarfile takes it for the end, and the rest would be lost."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # the zeros that end an archive
                raise
            raise tarfile.ReadError(f"{error} at byte {archive.offset}") from None


def _any_members(file: BinaryIO, shard: Shard, is_plain: bool, limit: Limit) -> Iterator[Member]:
    """The members from the file's position on, through `tarfile`."""
    most_bytes = shard.num_bytes * (1 if is_plain else MAX_GZIP_RATIO)
    try:
        # A stream has no offsets that a ranged read could use; a plain archive has.
        mode: Literal["r:", "r|*"] = "r:" if is_plain else "r|*"
        archive = tarfile.open(fileobj=file, mode=mode, errors="surrogateescape", tarinfo=_Header)  # noqa: SIM115
        while (header := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined] # or the list of members would grow with the archive
            if archive.offset > most_bytes:  # a stream would look for the next header for hours
                raise tarfile.ReadError(f"{printable(header.name)} has more bytes than the archive")
            if header.isdir():
                continue
            member = Member(header.name, header.offset_data if is_plain else None, header.size, None)
            most = limit(header.name)
            if most is not None:
                member.problem = _problem(header, most)
            if most is not None and member.problem is None:
                content = archive.extractfile(header)
                assert content is not None, "a regular file has content"
                member.payload = content.read()
                if len(member.payload) != header.size:
                    raise tarfile.ReadError("the archive ends inside a member")
            yield member
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise ShardError(f"{shard.url}: not a readable tar archive: {error}") from None


def _problem(header: tarfile.TarInfo, most: int) -> SampleError | None:
    if not header.isreg() or header.issparse():
        return SampleError("read", "NotAFile", f"{printable(header.name)} is no regular file of the archive")
    if header.size > most:
        return SampleError("read", "TooLarge", f"{printable(header.name)} has {header.size} bytes; at most {most} are read")
    return None
