"""Where images come from: list shards with their fingerprints, read a shard as samples.

A new format is a module with the functions of `sample.Format`, and a line in `FORMATS`; or in a package of its own, see
`plugins.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, cast

from pipeline import config, plugins
from pipeline.errors import SourceError, StorageError, StorageRefused
from pipeline.recipe import FORMAT_VERSION, Layout
from pipeline.source.sample import Format, Sample, Shard, Suggestion
from pipeline.storage import Store

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["FORMATS", "Sample", "Shard", "Source"]

FORMATS = {
    "webdataset": "pipeline.source.webdataset",
    "parquet": "pipeline.source.parquet",
    "files": "pipeline.source.files",
}
"""Name in the config to module; imported when it is used."""


class Source:
    """A source as configured. Picklable: connections are made in the process that uses them."""

    def __init__(self, settings: config.Source) -> None:
        self.settings = settings
        self.store = Store(settings.storage)

    def __reduce__(self) -> tuple[type[Source], tuple[config.Source]]:
        return Source, (self.settings,)

    @property
    def format_name(self) -> str:
        """The configured format, or the one that the URLs' endings say."""
        if self.settings.format != "auto":
            return self.settings.format
        endings = {"parquet": (".parquet", ".pq"), "webdataset": (".tar", ".tar.gz", ".tgz")}
        guesses = {
            next((name for name, ends in endings.items() if url.rstrip("/").lower().endswith(ends)), "files")
            for url in self.settings.urls
        }
        if len(guesses) > 1:
            found = ", ".join(sorted(guesses))
            raise SourceError(f"source.url: the URLs look like different formats ({found}); set source.format")
        return guesses.pop()

    @cached_property
    def _format(self) -> Format:
        if (home := FORMATS.get(self.format_name)) is not None:
            return cast(Format, importlib.import_module(home))
        return cast(Format, plugins.load(plugins.SOURCES, self.format_name))

    def fields(self) -> list[pa.Field]:
        """Arrow fields of the label, if there is one, and of the carried columns.

        Raises:
            ConfigError: the source has no such label, column, key or image column.
            SourceError: nothing there to look at.
        """
        try:
            return self._format.fields(self.settings, self.store)
        except StorageRefused as error:
            raise SourceError(f"source.url: {error}") from None

    def layout(self) -> Layout:
        """What key, label and carried columns are made from; another layout rewrites every row."""
        settings = self.settings
        return Layout(
            fields={
                "format_version": FORMAT_VERSION,
                "format": self.format_name,
                "label": settings.label,
                "key": settings.key,
                "image": settings.image,
                "columns": {field.name: str(field.type) for field in self.fields()},
                "selectors": settings.columns,
            }
        )

    def shards(self) -> Iterator[Shard]:
        """List the shards that exist now.

        Raises:
            SourceError: nothing there, or nothing of that format.
        """
        found = False
        try:
            for shard in self._format.shards(self.settings, self.store):
                found = True
                yield shard
        except StorageRefused as error:
            raise SourceError(f"source.url: {error}") from None
        if not found:
            raise SourceError(
                f"source.url: {', '.join(self.settings.urls)} holds nothing of the format {self.format_name}; "
                f"check the URL, or set source.format to one of {', '.join(FORMATS)}"
            )

    def suggest(self) -> Suggestion:
        """What the other fields of the config could be, from a look at the first shard.

        Raises:
            SourceError: nothing there to look at, or no images.
            WorldError: it cannot be read.
        """
        return self._format.suggest(self.settings, self.store)

    def relist(self, shard: Shard) -> Shard | None:
        """The shard as it is now, when it was found changed; None when it is gone."""
        files = []
        for file in shard.files:
            with contextlib.suppress(StorageError):
                files.append(self.store.stat(file.url))
        return dataclasses.replace(shard, files=tuple(files)) if files else None

    def read(self, shard: Shard) -> Iterator[Sample]:
        """Stream the samples of a shard; see `Format.read`."""
        return self._format.read(self.settings, self.store, shard)
