"""WebDataset tars: members that share the name before the first dot are one sample.

`key.jpg` is the image, its siblings (`key.cls`, `key.json`, `key.txt`) are label and metadata.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pipeline.config import Source
from pipeline.errors import SampleError
from pipeline.source import tar
from pipeline.source.sample import (
    IMAGE_EXTENSIONS,
    LABEL_NAMES,
    MAX_IMAGE_BYTES,
    Sample,
    Shard,
    Suggestion,
    arrow_type,
    convert,
    named,
    printable,
    select,
)
from pipeline.storage import Store

if TYPE_CHECKING:
    import pyarrow as pa

TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")
MAX_SIBLING_BYTES = 16 << 20
LOOKED_AT = 64
"""Samples that a suggestion is made from."""


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
    nothing = dict.fromkeys(name for name, _, _ in columns)
    for index, group in enumerate(_groups(source, shard, store, wanted)):
        sample = group.finish(index, shard.url)
        sample.columns = nothing
        if group.siblings:
            try:
                sample.columns = {name: convert(select(group.siblings, how), kind, name) for name, how, kind in columns}
            except SampleError as error:
                sample.error = sample.error or error
        yield sample


def suggest(source: Source, store: Store) -> Suggestion:
    """Siblings of the first samples."""
    shard = next(shards(source, store))
    groups = list(itertools.islice(_groups(source, shard, store, {"cls", "json"}), LOOKED_AT))
    seen = collections.Counter(extension for group in groups for extension in group.seen)
    fields: dict[str, Any] = {}
    notes = [f"members of a sample: {', '.join(sorted(seen))}"]
    images = collections.Counter(extension for group in groups for extension, *_ in group.images)
    if any(len(group.images) > 1 for group in groups):
        fields["image"] = images.most_common(1)[0][0]
        notes.append(f"samples have several images ({', '.join(sorted(images))}): {fields['image']} is taken")
    values = {"cls": [group.siblings["cls"].decode("utf-8", "replace").strip() for group in groups if "cls" in group.siblings]}
    for group in groups:
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(group.siblings.get("json", b"{}"))
            for name, value in found.items() if isinstance(found, dict) else ():
                if isinstance(value, str | int):
                    values.setdefault(f"json.{name}", []).append(str(value))
    values = {name: each for name, each in values.items() if len(each) > len(groups) / 2}
    label = named(values, [name for each in LABEL_NAMES for name in (each, f"json.{each}")])
    if label is not None:
        fields["label"] = label
        if label == "cls" and not all(re.fullmatch(r"-?\d{1,18}", value) for value in values["cls"]):
            fields["label_type"] = "string"
        notes.append(f"label: {label}, such as {', '.join(dict.fromkeys(values[label][:3]))}")
    return Suggestion(fields=fields, notes=notes)


class _Group:
    """The members of one sample."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.siblings: dict[str, bytes] = {}
        self.seen: set[str] = set()
        self.images: list[tuple[str, int | None, int, bytes | memoryview]] = []
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


def _groups(source: Source, shard: Shard, store: Store, wanted: set[str]) -> Iterator[_Group]:
    """Consecutive members of equal key. A repeated extension starts a new sample, whose key is then a duplicate."""
    images = {source.image.lower()} if source.image else IMAGE_EXTENSIONS

    def limit(name: str) -> int | None:
        parts = _split(name)
        if parts is None or not (parts[1] in images or parts[1] in wanted):
            return None
        return MAX_IMAGE_BYTES if parts[1] in images else MAX_SIBLING_BYTES

    group: _Group | None = None
    for member in tar.members(store, shard, limit):
        parts = _split(member.name)
        if parts is None:
            continue
        key, extension = parts
        if group is None or group.key != key or extension in group.seen:
            if group is not None:
                yield group
            group = _Group(key)
        group.seen.add(extension)
        if member.problem is not None:
            group.error = member.problem
        elif member.payload is not None:
            if extension in images:
                group.images.append((extension, member.offset, member.num_bytes, member.payload))
            elif extension in wanted:
                group.siblings[extension] = bytes(member.payload)
    if group is not None:
        yield group


def _split(name: str) -> tuple[str, str] | None:
    """Key and extension: what lies before and after the first dot of the last part of the name."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot:
        return None
    key, extension = folder + slash + stem, extension.lower()
    return (key, extension) if name.isascii() else (printable(key), printable(extension))
