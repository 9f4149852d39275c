"""Pages: one HTML file each, which loads nothing and runs nothing. A frame for all of them, and what is put into it.

Templates lie in `templates/`: `frame.html` is the page around everything, `strip.html` has thumbnails with their captions.
All that is put into one is escaped, and characters that would steer the text around them (a change of direction, for example)
are spelled out: keys and labels may come from anyone.
"""

from __future__ import annotations

import base64
import functools
import html as markup
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import RESERVED_COLUMNS
from pipeline.errors import PipelineError, printable

if TYPE_CHECKING:
    from jinja2 import Environment
    from PIL.Image import Image

THUMBNAIL_SIDE = 240
"""Longer side in pixels: sharp on dense screens at the size in which pages show it."""
THUMBNAIL_QUALITY = 80
FRAME_HEIGHT = 760
"""Pixels of a page within a notebook."""
MAX_CHARACTERS = 300
"""Of one text from data."""

Decode = Callable[[bytes], "Image"]
"""Encoded image to an RGB picture; a PipelineError says why there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thumbnail:
    """A small picture inside the page, or why there is none."""

    jpeg: bytes = b""
    """Empty where there is no picture."""
    uri: str = ""
    """`data:image/jpeg;base64,…`, or where a server has it."""
    width: int = 0
    """Pixels."""
    height: int = 0
    why: str = ""

    @classmethod
    def of(cls, image: Image, side: int = THUMBNAIL_SIDE) -> Thumbnail:
        """A picture made small, its longer side to `side` pixels; `image` may be changed."""
        image.thumbnail((side, side), reducing_gap=2.0)
        file = io.BytesIO()
        image.convert("RGB").save(file, "JPEG", quality=THUMBNAIL_QUALITY)
        uri = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        return cls(jpeg=file.getvalue(), uri=uri, width=image.width, height=image.height)

    @classmethod
    def made(cls, image: bytes | PipelineError, decode: Decode, where: str = "", side: int = THUMBNAIL_SIDE) -> Thumbnail:
        """An encoded image made small, or why it cannot be shown, without `where` in front."""
        try:
            if isinstance(image, PipelineError):
                raise image
            return cls.of(decode(image), side)
        except PipelineError as error:
            return cls(why=short(str(error).removeprefix(where)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A row of a dataset in a strip of thumbnails."""

    thumbnail: Thumbnail
    key: str
    label: str | None = None
    is_same: bool = False
    """Whether the label is the one that was asked for."""
    score: str | None = None
    rank: int | None = None
    more: tuple[tuple[str, str], ...] = ()
    """Names and values below."""

    @classmethod
    def of(cls, row: Mapping[str, Any], thumbnail: Thumbnail) -> Tile:
        """A row with its label, the columns that were carried along, and its shard."""
        carried = [(name, str(value)) for name, value in row.items() if name not in RESERVED_COLUMNS and value is not None]
        place = f"{row['shard'].rpartition('/')[2]}, {row['index']}"
        return cls(
            thumbnail=thumbnail,
            key=short(row["key"]),
            label=short(str(row["label"])) if row.get("label") is not None else None,
            more=tuple((name, short(value)) for name, value in [*carried, ("shard", place)]),
        )


@dataclass(frozen=True, slots=True)
class Page:
    """A page in a notebook: in a frame of its own, which runs nothing."""

    html: str

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{markup.escape(self.html)}" sandbox style="width:100%;height:{FRAME_HEIGHT}px;border:0"></iframe>'
        )

    def save(self, path: str | Path) -> None:
        """Write it to a local file."""
        Path(path).write_text(self.html, "utf-8", "backslashreplace")


def short(text: str, most: int = MAX_CHARACTERS) -> str:
    """Text from data, of bounded length."""
    return text if len(text) <= most else f"{text[:most]}…"


def render(template: str, **values: Any) -> str:
    """A page from its template."""
    return _environment().get_template(template).render(**values)


@functools.cache
def _environment() -> Environment:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,  # markup is a str of its own kind
        trim_blocks=True,
        lstrip_blocks=True,
    )
