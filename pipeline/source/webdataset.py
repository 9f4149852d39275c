"""WebDataset tars: members that share the name before the first dot are one sample.

`key.jpg` is the image, its siblings (`key.cls`, `key.json`, `key.txt`) are label and metadata. The archive is streamed:
members are never extracted to disk, and only the sample at hand is in memory.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO, Literal, Self

from pipeline.config import Source
from pipeline.errors import SampleError, ShardError
from pipeline.source.sample import IMAGE_EXTENSIONS, MAX_IMAGE_BYTES, Sample, Shard, arrow_type, convert, printable, select
from pipeline.storage import Store

if TYPE_CHECKING:
    import pyarrow as pa

TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")
MAX_SIBLING_BYTES = 16 << 20
MAX_GZIP_RATIO = 1100
"""Deflate cannot do better than 1032."""
_SPLIT = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)", re.DOTALL)


def _columns(source: Source) -> list[tuple[str, str, str]]:
    """Column, selector and type of the label and of what is carried."""
    columns: list[tuple[str, str, str]] = []
    if source.label is not None:
        columns.append(("label", source.label, source.label_type or ("int64" if source.label == "cls" else "string")))
    for selector in ["txt", "json"] if source.columns is None else source.columns:
        columns.append((selector.rpartition(".")[2], selector, "string"))
    return columns


def fields(source: Source, store: Store) -> list[pa.Field]:
    """See `Format.fields`."""
    import pyarrow as pa

    return [pa.field(name, arrow_type(type_name)) for name, _, type_name in _columns(source)]


def shards(source: Source, store: Store) -> Iterator[Shard]:
    """One shard a tar file."""
    for url in source.urls:
        for file in store.list(url):
            if file.url.lower().endswith(TAR_ENDINGS):
                yield Shard(url=file.url, files=(file,))


def read(source: Source, store: Store, shard: Shard) -> Iterator[Sample]:
    """See `Format.read`."""
    columns = _columns(source)
    wanted = {selector.partition(".")[0] for _, selector, _ in columns}
    with store.open(shard.files[0]) as file:
        for index, group in enumerate(_groups(source, shard, file, wanted)):
            sample = group.finish(index, shard.url)
            try:
                sample.columns = {name: convert(select(group.siblings, how), kind, name) for name, how, kind in columns}
            except SampleError as error:
                sample.error = sample.error or error
            yield sample


class _Member(tarfile.TarInfo):
    """A header that is damaged, cut off or missing is an error: tarfile takes it for the end, and the rest would be lost."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # the zeros that end an archive
                raise
            raise tarfile.ReadError(f"{error} at byte {archive.offset}") from None


class _Group:
    """The members of one sample."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.siblings: dict[str, bytes] = {}
        self.seen: set[str] = set()
        self.images: list[tuple[str, int | None, int, bytes]] = []
        self.error: SampleError | None = None

    def finish(self, index: int, url: str) -> Sample:
        sample = Sample(key=self.key, index=index, url=url, error=self.error)
        if len(self.images) > 1:
            names = ", ".join(extension for extension, *_ in self.images)
            message = f"has {len(self.images)} images ({names}); name one in source.image"
            sample.error = SampleError("read", "AmbiguousImage", message)
        elif self.images:
            _, sample.offset, sample.nbytes, sample.image = self.images[0]
        elif self.error is None:
            sample.error = SampleError("read", "NoImage", f"has no image, only {', '.join(sorted(self.seen))}")
        return sample


def _groups(source: Source, shard: Shard, file: BinaryIO, wanted: set[str]) -> Iterator[_Group]:
    """Consecutive members of equal key. A repeated extension starts a new sample, whose key is then a duplicate."""
    images = {source.image.lower()} if source.image else IMAGE_EXTENSIONS
    plain = shard.url.lower().endswith(".tar")
    most_bytes = shard.num_bytes * (1 if plain else MAX_GZIP_RATIO)
    group: _Group | None = None
    try:
        # A stream has no offsets that a ranged read could use; a plain archive has.
        mode: Literal["r:", "r|*"] = "r:" if plain else "r|*"
        archive = tarfile.open(fileobj=file, mode=mode, errors="surrogateescape", tarinfo=_Member)  # noqa: SIM115
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined] # or the list of members would grow with the archive
            if archive.offset > most_bytes:  # a stream would look for the next header for hours
                raise tarfile.ReadError(f"{printable(member.name)} has more bytes than the archive")
            parts = None if member.isdir() else _SPLIT.fullmatch(member.name)
            if parts is None:
                continue
            key, extension = printable(parts[1]), parts[2].lower()
            if group is None or group.key != key or extension in group.seen:
                if group is not None:
                    yield group
                group = _Group(key)
            group.seen.add(extension)
            is_image = extension in images
            if not is_image and extension not in wanted:
                continue
            if problem := _refuse(member, MAX_IMAGE_BYTES if is_image else MAX_SIBLING_BYTES):
                group.error = problem
                continue
            content = archive.extractfile(member)
            assert content is not None, "a regular file has content"
            payload = content.read()
            if len(payload) != member.size:
                raise tarfile.ReadError("the archive ends inside a member")
            if is_image:
                group.images.append((extension, member.offset_data if plain else None, member.size, payload))
            else:
                group.siblings[extension] = payload
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise ShardError(f"{shard.url}: not a readable tar archive: {error}") from None
    if group is not None:
        yield group


def _refuse(member: tarfile.TarInfo, limit: int) -> SampleError | None:
    if not member.isreg() or member.issparse():
        return SampleError("read", "NotAFile", f"{printable(member.name)} is no regular file of the archive")
    if member.size > limit:
        return SampleError("read", "TooLarge", f"{printable(member.name)} has {member.size} bytes; at most {limit} are read")
    return None
