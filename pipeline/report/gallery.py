"""The gallery: what was asked with, and the pictures that were found for it, in one page.

Pictures of rows come from the source, one ranged read each, as the rows say where they lie; the partitions are not touched.
Memory: the page with its thumbnails (about 10 kB each, up to `MAX_TILES`), `IMAGES_AHEAD` encoded images, one that is decoded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.dataset.read import Dataset
from pipeline.report.page import Decode, Thumbnail, Tile, render, short

MAX_ROWS = 100
"""Of one query that a page shows."""
MAX_TILES = 1000
"""Of all queries together: what is too many for it is left out, whole queries at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One query and its neighbours."""

    kind: str
    """What it is: `image`, `key`, `vector`."""
    name: str
    scores: Sequence[float]
    """K, best first."""
    rows: Sequence[Mapping[str, Any]]
    """K rows of the dataset, all columns but the embeddings."""
    row: Mapping[str, Any] | None = None
    """The query's own row, where it has one."""
    image: bytes | None = None
    """The query's own image, where it is no row."""


def gallery(dataset: Dataset, sections: Sequence[Section], decode: Decode, facts: Iterable[tuple[str, str]] = ()) -> str:
    """The page.

    Args:
        dataset: gives the images of the rows.
        sections: of too many, or too many rows, only the first are shown; the page says so.
        decode: is called with images that may come from anyone.
        facts: names and values for the head of the page.
    """
    shown = _fitting(sections)
    rows = [row for section in shown for row in (*([section.row] if section.row is not None else []), *section.rows)]
    # Read in this order, and taken in this order below.
    images = zip(dataset.images_of(rows), rows, strict=True)
    thumbnails = (Thumbnail.made(image, decode, f"{row['url']}: ") for image, row in images)
    return render(
        "gallery.html",
        title="Nearest neighbours",
        facts=[("dataset", dataset.url), ("version", str(dataset.version)), ("rows", f"{len(dataset):,}"), *facts],
        note=""
        if shown == list(sections)
        else (f"Shown are {len(shown):,} of {len(sections):,} queries, and of each at most {MAX_ROWS} rows."),
        sections=[
            {"kind": section.kind, "tile": _query(section, thumbnails, decode), "tiles": _tiles(section, thumbnails)}
            for section in shown
        ],
    )


def _fitting(sections: Sequence[Section]) -> list[Section]:
    """The first sections, as many as a page has room for."""
    shown: list[Section] = []
    left = MAX_TILES
    for section in sections:
        if len(section.rows) > MAX_ROWS:
            section = dataclasses.replace(section, rows=section.rows[:MAX_ROWS], scores=section.scores[:MAX_ROWS])
        left -= len(section.rows)
        if left < 0:
            break
        shown.append(section)
    return shown


def _query(section: Section, thumbnails: Iterator[Thumbnail], decode: Decode) -> Tile:
    if section.row is not None:
        return Tile.of(section.row, next(thumbnails))
    if section.image is not None:
        image = Thumbnail.made(section.image, decode)
    else:
        image = Thumbnail(why=f"a {section.kind} has no picture")
    folder, _, name = section.name.rpartition("/")
    return Tile(thumbnail=image, key=short(name), more=(("in", short(folder)),) if folder else ())


def _tiles(section: Section, thumbnails: Iterator[Thumbnail]) -> list[Tile]:
    wanted = section.row.get("label") if section.row is not None else None
    return [
        dataclasses.replace(
            Tile.of(row, next(thumbnails)),
            score=f"{score:.4f}",
            rank=rank,
            is_same=wanted is not None and row.get("label") == wanted,
        )
        for rank, (score, row) in enumerate(zip(section.scores, section.rows, strict=True), 1)
    ]
