"""The pictures of a page's rows: each read once from the source, by one ranged read, and made small.

They may take `MAX_SECONDS` and `MAX_BYTES` of the page; what is asked for later than that is shown without its picture. So a
slow store, or photographs of fifty megapixels, make a page with fewer pictures and none that is late or huge.
Memory: the small pictures, `IMAGES_AHEAD` encoded images, one that is decoded.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.dataset.read import Dataset
from pipeline.report.page import Decode, Thumbnail, Tile, short

MAX_SECONDS = 30.0
MAX_BYTES = 6_000_000
MAX_TEXT, MAX_COLUMNS = 100, 3
"""Characters of a text below a picture, and columns that were carried along: spelled out, a character can become ten."""
SMALL_SIDE = 144
"""Of pictures that are seen only one at a time."""


class Pictures:
    """Small pictures of rows by where they come from. Those loaded first are the last to be left out."""

    def __init__(self, dataset: Dataset, decode: Decode) -> None:
        self._dataset, self._decode = dataset, decode
        self._deadline = time.monotonic() + MAX_SECONDS
        self._bytes_left = MAX_BYTES
        self._made: dict[tuple[str, int], Thumbnail] = {}

    def load(self, rows: Sequence[Mapping[str, Any]], side: int | None = None) -> None:
        """Make the pictures of these rows that there are not yet, in this order."""
        wanted = list({_place(row): row for row in rows if _place(row) not in self._made}.values())
        sizes = {"side": side} if side else {}
        for row, image in zip(wanted, self._dataset.images_of(wanted), strict=True):
            if self._bytes_left <= 0 or time.monotonic() > self._deadline:
                return
            made = Thumbnail.made(image, self._decode, f"{row['url']}: ", **sizes)
            self._made[_place(row)] = made
            self._bytes_left -= len(made.uri)

    def tile(self, row: Mapping[str, Any]) -> Tile:
        """A row with its picture, and with less text than in a gallery: there are hundreds of them."""
        tile = Tile.of(row, self._made.get(_place(row)) or Thumbnail(why="no picture: the page has as many as it may"))
        more = [*tile.more[:-1][:MAX_COLUMNS], tile.more[-1]]  # the last one is the shard
        return dataclasses.replace(
            tile,
            key=short(tile.key, MAX_TEXT),
            label=short(tile.label, MAX_TEXT) if tile.label is not None else None,
            more=tuple((name, short(value, MAX_TEXT)) for name, value in more),
        )

    def picture(self, row: Mapping[str, Any]) -> Thumbnail | None:
        """The picture of this row, if there is one."""
        found = self._made.get(_place(row))
        return found if found is not None and found.uri else None


def _place(row: Mapping[str, Any]) -> tuple[str, int]:
    return row["shard"], row["index"]  # a key may come twice, once in quarantine
