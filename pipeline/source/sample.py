"""What a source consists of: shards, their samples, and the columns that samples carry."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.config import Source
from pipeline.errors import SampleError
from pipeline.recipe import digest
from pipeline.storage import FileStat, Store

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "jpe", "png", "webp", "gif", "bmp", "tif", "tiff"})
MAX_IMAGE_BYTES = 256 << 20
"""An encoded image above this is quarantined unread: it would have to be held whole."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One unit of input that is read whole: an object, or a stable group of loose files."""

    url: str
    """The object; for a group its first file."""
    files: tuple[FileStat, ...]
    """What it is read from, as the listing saw it."""
    root: str = ""
    """Loose files: their keys are relative to this URL."""

    @cached_property
    def fingerprint(self) -> str:
        """Digest of URL, size and version of its files: changes when the content, or a loose file's key, may have."""
        parts = [file.fingerprint for file in self.files]
        return parts[0] if len(parts) == 1 and not self.root else digest(self.root, *parts)

    @property
    def num_bytes(self) -> int:
        """Encoded size."""
        return sum(file.num_bytes for file in self.files)


@dataclass(slots=True, kw_only=True)
class Sample:
    """One image of a shard, still encoded, or what is known of one that cannot be read."""

    key: str
    index: int
    """Position in the shard."""
    url: str
    """The object that holds the image."""
    image: bytes | memoryview = b""
    """Often a view of the block that was read, which lives as long as one of its samples does."""
    offset: int | None = None
    """Of the encoded image in the object; None where its bytes are not contiguous."""
    nbytes: int | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    """Label and carried columns by name."""
    error: SampleError | None = None
    """Why there is no image."""


class Format(Protocol):
    """One container format: a module with these functions."""

    def fields(self, source: Source, store: Store) -> list[pa.Field]:
        """Arrow fields of the label, if there is one, and of the carried columns."""
        ...

    def shards(self, source: Source, store: Store) -> Iterator[Shard]:
        """What there is to read now. Opens no shard."""
        ...

    def suggest(self, source: Source, store: Store) -> Suggestion:
        """Look at a source of which only URL and format are known, and say what the other fields could be."""

    def read(self, source: Source, store: Store, shard: Shard) -> Iterator[Sample]:
        """The samples in order, streamed. A sample that cannot be read has an `error`.

        Raises:
            ShardError: the container itself cannot be read.
            ShardChanged: it is no longer what was listed.
        """
        ...


LABEL_NAMES = ("label", "labels", "cls", "class", "class_name", "category", "target", "y")
KEY_NAMES = ("key", "id", "uid", "image_id", "photo_id", "file_name", "filename", "path", "url", "name", "__key__")
"""What people call such columns, the likeliest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """What a look at a source found."""

    fields: dict[str, Any]
    """Of the config's section `source`."""
    notes: list[str]
    """What there is, for people."""


def named(names: Iterable[str], likely: Sequence[str]) -> str | None:
    """The likeliest of some names, whatever its case."""
    by_lower = {name.lower(): name for name in names}
    return next((by_lower[each] for each in likely if each in by_lower), None)


_CONVERT: dict[str, Callable[[Any], Any]] = {"int64": int, "float64": float}
_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def arrow_type(name: str) -> pa.DataType:
    """Arrow type of a column type of the config."""
    import pyarrow as pa

    return {"string": pa.string(), "int64": pa.int64(), "float64": pa.float64(), "bool": pa.bool_()}[name]


def convert(value: Any, type_name: str, column: str) -> Any:
    """A text or JSON value as the column's type; None stays None.

    Raises:
        SampleError: it is not of that type.
    """
    if value is None:
        return None
    try:
        if type_name == "string":
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            text.encode()  # JSON can spell half a character (a lone surrogate), which no store can hold
            return text
        if type_name == "bool":
            return value if isinstance(value, bool) else _TRUTH[str(value).strip().lower()]
        if isinstance(value, float) and type_name == "int64" and not value.is_integer():
            raise ValueError
        number = _CONVERT[type_name](value)
        if type_name == "int64" and not -(2**63) <= number < 2**63:
            raise OverflowError
        return number
    except (ValueError, TypeError, KeyError, OverflowError):
        raise SampleError("label", "WrongType", f"column {column}: {str(value)[:80]!r} is not {type_name}") from None


def printable(name: str) -> str:
    """A name as valid Unicode: bytes that are not UTF-8 are shown as \\xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def select(siblings: Mapping[str, bytes], selector: str) -> Any:
    """The value that `ext` or `ext.field.field` names among the siblings of an image; None where it is missing.

    Raises:
        SampleError: the sibling is not UTF-8 text, or not JSON where a field of it is asked for.
    """
    extension, _, path = selector.partition(".")
    raw = siblings.get(extension)
    if raw is None:
        return None
    try:
        text = raw.decode("utf-8")
        if not path:
            return text.strip()
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # of bytes that are no text, of text that is no JSON, of endless digits
        raise SampleError("label", type(error).__name__, f"sibling .{extension}: {error}") from None
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value
