"""Loose image files, gathered into stable groups that play the part of shards.

Paths are sorted; a group ends before a path whose hash is 0 modulo `group_size`, and what has more than 4 x `group_size`
files is cut before its path of the smallest hash. So where groups end depends on the names there and on nothing else: a file
that is added or removed changes its group, at most cuts it or joins it to the next, and leaves all others alone.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.config import Source
from pipeline.errors import ConfigError, SampleError, ShardChanged
from pipeline.recipe import digest
from pipeline.source.sample import IMAGE_EXTENSIONS, MAX_IMAGE_BYTES, Sample, Shard, Suggestion, arrow_type, convert, printable
from pipeline.storage import FileStat, Store

if TYPE_CHECKING:
    import pyarrow as pa

MAX_GROUP = 4
"""Times `group_size`."""


def fields(source: Source, store: Store) -> list[pa.Field]:
    """See `Format.fields`."""
    import pyarrow as pa

    if source.columns:
        raise ConfigError("source.columns: loose files carry no columns; leave it out")
    if source.label not in (None, "folder"):
        raise ConfigError(f"source.label: {source.label!r} is wrong for loose files; allowed: folder, or nothing")
    return [pa.field("label", arrow_type(source.label_type or "string"))] if source.label else []


def shards(source: Source, store: Store) -> Iterator[Shard]:
    """Groups of the image files at each URL."""
    seen: set[str] = set()  # URLs of a list may overlap: a file belongs to the first
    for url in source.urls:
        files = sorted((f for f in store.list(url) if f.url not in seen and _is_image(f.url, source)), key=lambda f: f.url)
        if len(source.urls) > 1:
            seen.update(file.url for file in files)
        root = _root(store.absolute(url), files)
        for group in _groups(files, source.group_size):
            yield Shard(url=printable(group[0].url), files=tuple(group), root=root)


def read(source: Source, store: Store, shard: Shard) -> Iterator[Sample]:
    """See `Format.read`."""
    readable = [file for file in shard.files if _problem(file) is None]
    contents = store.read_files(readable)
    for index, file in enumerate(shard.files):
        key, url = printable(file.url.removeprefix(shard.root)), printable(file.url)
        sample = Sample(key=key, index=index, url=url, offset=0, nbytes=file.num_bytes)
        sample.error = _problem(file)
        if sample.error is None:
            sample.image = next(contents)
            if len(sample.image) != file.num_bytes:
                raise ShardChanged(f"{file.url}: was written anew since it was listed")
        if source.label:
            try:
                sample.columns = {"label": convert(file.url.split("/")[-2], source.label_type or "string", "label")}
            except SampleError as error:
                sample.error = sample.error or error
        yield sample


def suggest(source: Source, store: Store) -> Suggestion:
    """Folders with several images each are classes."""
    files = [file for url in source.urls for file in store.list(url) if _is_image(file.url, source)]
    folders = collections.Counter(file.url.split("/")[-2] for file in files)
    notes = [f"{len(files):,} images in {len(folders):,} folders"]
    if 1 < len(folders) <= len(files) / 2:
        notes.append(f"label: the folder, such as {', '.join(printable(name) for name in list(folders)[:3])}")
        return Suggestion(fields={"label": "folder"}, notes=notes)
    return Suggestion(fields={}, notes=notes)


def _problem(file: FileStat) -> SampleError | None:
    """Why a file is not even read."""
    if printable(file.url) != file.url:
        return SampleError("read", "NotUnicode", "the file's name is not UTF-8, so no URL can name it")
    if file.num_bytes > MAX_IMAGE_BYTES:
        return SampleError("read", "TooLarge", f"has {file.num_bytes} bytes; at most {MAX_IMAGE_BYTES} are read")
    return None


def _groups(files: list[FileStat], group_size: int) -> Iterator[list[FileStat]]:
    group: list[FileStat] = []
    for file in files:
        if group and int(digest(file.url)[:16], 16) % group_size == 0:
            yield from _cut(group, MAX_GROUP * group_size)
            group = []
        group.append(file)
    yield from _cut(group, MAX_GROUP * group_size)


def _cut(group: list[FileStat], max_files: int) -> Iterator[list[FileStat]]:
    if len(group) > max_files:
        first = min(range(1, len(group)), key=lambda position: digest(group[position].url))
        yield from _cut(group[:first], max_files)
        yield from _cut(group[first:], max_files)
    elif group:
        yield group


def _is_image(url: str, source: Source) -> bool:
    stem, _, extension = url.rpartition("/")[2].rpartition(".")
    return bool(stem) and (extension.lower() == source.image.lower() if source.image else extension.lower() in IMAGE_EXTENSIONS)


def _root(url: str, files: list[FileStat]) -> str:
    """The part of a URL that every match shares: up to the last slash before a glob, or the folder itself."""
    fixed = re.split(r"[*?\[]", url, maxsplit=1)[0]
    if fixed != url or any(file.url == url for file in files):
        return fixed[: fixed.rfind("/") + 1]
    return url.rstrip("/") + "/"
