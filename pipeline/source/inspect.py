"""A look at a source of which nothing but the URL is known: its format, its label, how large its images are.

In: a URL. Out: the section `source` of a config that works, and what was seen. Only the listing and the first shard are read.
"""

from __future__ import annotations

import collections
import io
import itertools
import statistics
from dataclasses import dataclass

from pipeline import config
from pipeline.errors import SourceError, StorageError
from pipeline.source import Source
from pipeline.source.parquet import ENDINGS
from pipeline.source.sample import IMAGE_EXTENSIONS
from pipeline.source.webdataset import TAR_ENDINGS
from pipeline.storage import Store

LOOKED_AT = 16
"""Images whose size is looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspected:
    """What was found."""

    source: config.Source
    num_shards: int
    num_bytes: int
    width: int | None
    """Median of the images looked at, in pixels; None where none could be read."""
    height: int | None
    image_bytes: int | None
    """Median."""
    notes: list[str]


def inspect(url: str, storage: config.Storage, label: str | None = None) -> Inspected:
    """Look at a source.

    Args:
        url: a file, folder or glob.
        storage: how to reach it.
        label: what the label is; looked for when left out.

    Raises:
        SourceError: nothing there, no images, or files that are not what their names say.
        ConfigError: there is no such label.
        WorldError: it cannot be read.
    """
    draft = config.Source(url=url, storage=storage)
    source = Source(draft.model_copy(update={"format": _format(url, Source(draft).store)}))
    found = source.suggest()
    fields = {**found.fields, **({"label": label} if label is not None else {})}
    if label is not None and label != found.fields.get("label"):
        fields.pop("label_type", None)
    settings = config.Source(url=url, format=source.format_name, storage=storage, **fields)
    source = Source(settings)
    source.fields()  # says what is wrong with a label of the user's
    shards = list(source.shards())
    sizes, image_bytes = [], []
    for sample in itertools.islice(source.read(shards[0]), LOOKED_AT):
        if sample.error is None and (size := _size(bytes(sample.image))) is not None:
            sizes.append(size)
            image_bytes.append(len(sample.image))
    middle = [round(statistics.median(side)) for side in zip(*sizes, strict=True)] or [None, None]
    return Inspected(
        source=settings,
        num_shards=len(shards),
        num_bytes=sum(shard.num_bytes for shard in shards),
        width=middle[0],
        height=middle[1],
        image_bytes=round(statistics.median(image_bytes)) if image_bytes else None,
        notes=found.notes,
    )


def _format(url: str, store: Store) -> str:
    """The format that most of the bytes at a URL are of, by the files' endings."""
    endings: dict[str, tuple[str, ...]] = {
        "webdataset": TAR_ENDINGS,
        "parquet": ENDINGS,
        "files": tuple(f".{each}" for each in sorted(IMAGE_EXTENSIONS)),
    }
    num_bytes: collections.Counter[str] = collections.Counter()
    others: collections.Counter[str] = collections.Counter()
    try:
        for file in store.list(url):
            name = file.url.rpartition("/")[2].lower()
            found = next((each for each, ends in endings.items() if name.endswith(ends)), None)
            if found is not None:
                num_bytes[found] += file.num_bytes
            else:
                others[f".{name.rpartition('.')[2]}" if "." in name else name] += 1
    except StorageError as error:
        raise SourceError(f"source: {error}") from None
    if not num_bytes:
        seen = ", ".join(f"{count:,} {ending}" for ending, count in others.most_common(5))
        allowed = ", ".join(ending for ends in endings.values() for ending in ends)
        raise SourceError(f"source: {url} holds no images and no shards, only {seen}; looked for {allowed}")
    return num_bytes.most_common(1)[0][0]


def _size(image: bytes) -> tuple[int, int] | None:
    """Width and height as the header has them; None of what is no image."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(image)) as opened:
            return opened.size
    except Exception:  # of anything that somebody called an image
        return None
