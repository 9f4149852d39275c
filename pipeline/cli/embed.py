"""The command that embeds images outside of a run: embed."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline import config
from pipeline.cli.common import AsJson, EndpointUrl, OutputUrl, Version, reporting
from pipeline.errors import ConfigError, DatasetError, IncompleteRun, SourceError
from pipeline.imports import importing

if TYPE_CHECKING:
    from pipeline.extract.embedder import Embedded
    from pipeline.recipe import Recipe
    from pipeline.source import Sample, Shard
    from pipeline.storage import Store

ENDINGS = (".parquet", ".npy")
MAX_PRINTED = 1000
"""Images whose embeddings are printed."""
NUM_VALUES = 4
"""Of an embedding, on a terminal."""


def embed(
    url: OutputUrl,
    images: Annotated[list[str], typer.Argument(metavar="IMAGES...", help="Files, folders or globs at any fsspec URL.")],
    to: Annotated[
        str | None, typer.Option(metavar="FILE", help="A .parquet with key, url and embeddings, or a .npy of one column.")
    ] = None,
    node: Annotated[str | None, typer.Option(metavar="COLUMN", help="Only this embedding column.")] = None,
    version: Version = None,
    endpoint_url: EndpointUrl = None,
    as_json: AsJson = False,
) -> None:
    """Embed new images with the recipe of a dataset, into rows that equal those of a run; prints them without --to.

    Exit code 1 when an image could not be embedded: it is named with the reason, and the others are written. The rows of a
    .npy are in the order of the .keys.json beside it. The model of the recipe is built here; one of your own is imported.

    Example: pipeline embed data/embeddings photos/ --to new.parquet
    """
    with reporting(as_json) as report:
        from pipeline.dataset.read import open_dataset
        from pipeline.storage import Store

        storage = config.Storage(endpoint_url=endpoint_url)
        dataset = open_dataset(url, version, storage)
        nodes = _nodes(dataset.nodes, node, to)
        store = Store(storage)
        found = _listed(store, images, storage)
        if to is None and (count := sum(len(shard.files) for _, shard in found)) > MAX_PRINTED:
            raise ConfigError(f"--to: missing; it is required for more than {MAX_PRINTED:,} images, and these are {count:,}")
        with importing():
            from pipeline.extract.embedder import Embedder

        embedder = Embedder(dataset.recipe)
        failed: list[dict[str, str]] = []
        embedded = _noting(embedder.embed_samples(_samples(store, found)), failed)
        report |= {"output": url, "version": dataset.version, "recipe_id": embedder.recipe.recipe_id, "to": to}
        if to is None:
            report["images"] = list(_rows(embedded, nodes))
            report["embedded"] = len(report["images"])
        elif to.endswith(".npy"):
            report["embedded"] = _write_npy(store, to, embedded, nodes[0], embedder.recipe.widths[nodes[0]])
        else:
            report["embedded"] = _write_parquet(store, to, embedded, embedder.recipe, nodes)
        report["failed"] = failed
        if not as_json:
            _show(report, nodes)
        if failed:
            raise IncompleteRun(f"{len(failed):,} of {report['embedded'] + len(failed):,} images could not be embedded")


def _nodes(widths: dict[str, int], node: str | None, to: str | None) -> list[str]:
    """The columns that are wanted, which the file has to be able to hold."""
    if to is not None and not to.endswith(ENDINGS):
        raise ConfigError(f"--to: {to!r} is wrong; allowed: a name that ends in {' or '.join(ENDINGS)}")
    if node is not None and node not in widths:
        raise DatasetError(f"--node: there is no embedding column {node!r}; it has {', '.join(widths)}")
    nodes = [node] if node is not None else list(widths)
    if to is not None and to.endswith(".npy") and len(nodes) > 1:
        raise ConfigError(f"--node: missing; a .npy holds one column: {', '.join(nodes)}")
    return nodes


def _listed(store: Store, urls: Sequence[str], storage: config.Storage) -> list[tuple[config.Source, Shard]]:
    """Groups of the images at each URL.

    Raises:
        SourceError: a URL holds none.
        StorageRefused: nothing there, or no access.
    """
    from pipeline.source import files
    from pipeline.source.sample import IMAGE_EXTENSIONS

    found = []
    for url in urls:
        try:
            settings = config.Source(url=url, format="files", storage=storage)
        except ValueError:
            raise ConfigError("IMAGES: a URL is neither empty nor holds credentials") from None
        shards = [(settings, shard) for shard in files.shards(settings, store)]
        if not shards:
            raise SourceError(f"{url}: there is no image here: no name ends in {', '.join(sorted(IMAGE_EXTENSIONS))}")
        found += shards
    return found


def _samples(store: Store, found: Iterable[tuple[config.Source, Shard]]) -> Iterator[Sample]:
    """Every image once, though URLs may overlap."""
    from pipeline.source import files

    seen: set[str] = set()
    for settings, shard in found:
        for sample in files.read(settings, store, shard):
            if sample.url not in seen:
                seen.add(sample.url)
                yield sample


def _noting(embedded: Iterable[Embedded], failed: list[dict[str, str]]) -> Iterator[Embedded]:
    """Pass on what was embedded; note what was not."""
    for each in embedded:
        failed += [
            {"key": sample.key, "url": sample.url, "stage": error.stage, "error": error.error, "message": error.message}
            for sample, error in each.refused
        ]
        yield each


def _rows(embedded: Iterable[Embedded], nodes: Sequence[str]) -> Iterator[dict[str, Any]]:
    for each in embedded:
        for number, sample in enumerate(each.samples):
            yield {"key": sample.key, "url": sample.url, **{name: each.columns[name][number].tolist() for name in nodes}}


def _write_npy(store: Store, url: str, embedded: Iterable[Embedded], node: str, width: int) -> int:
    """(N, D) float32, put together in memory: its length comes first in the file."""
    import numpy as np

    parts, keys = [np.empty((0, width), np.float32)], []
    for each in embedded:
        parts.append(each.columns[node])
        keys += [sample.key for sample in each.samples]
    file = io.BytesIO()
    np.save(file, np.concatenate(parts), allow_pickle=False)
    store.write(url.removesuffix(".npy") + ".keys.json", json.dumps(keys, ensure_ascii=False).encode())
    store.write(url, file.getvalue())
    return len(keys)


def _write_parquet(store: Store, url: str, embedded: Iterable[Embedded], recipe: Recipe, nodes: Sequence[str]) -> int:
    """As in a partition: `list<float32>` columns with their width, and the recipe in the footer. One row group is held."""
    import numpy as np
    import pyarrow as pa

    from pipeline.dataset import partition

    text = [pa.field(name, pa.string(), nullable=False) for name in ("key", "url")]
    schema = pa.schema([*text, *(partition.embedding_field(name, recipe.widths[name]) for name in nodes)])
    waiting: list[Embedded] = []
    with store.publish(url) as file:
        writer = partition.PartitionWriter(file, schema, rounded=recipe.rounded)

        def write() -> None:
            samples = [sample for each in waiting for sample in each.samples]
            columns = {"key": [sample.key for sample in samples], "url": [sample.url for sample in samples]}
            writer.write(columns, {name: np.concatenate([each.columns[name] for each in waiting]) for name in nodes})
            waiting.clear()

        for each in embedded:
            waiting.append(each)
            if sum(len(each.samples) for each in waiting) >= partition.rows_per_group(recipe):
                write()
        if waiting:
            write()
        writer.close({"recipe": dict(recipe.fields), "widths": dict(recipe.widths)})
    return writer.num_rows


def _show(report: dict[str, Any], nodes: Sequence[str]) -> None:
    from pipeline.report import terminal

    shown = [("embedded", f"{report['embedded']:,} images" + (f": {report['to']}" if report["to"] else ""))]
    for row in report.get("images", []):
        for name in nodes:
            values = ", ".join(f"{value:.4g}" for value in row[name][:NUM_VALUES])
            shown.append((name, f"[{values}{', …' if len(row[name]) > NUM_VALUES else ''}]  {row['url']}"))
    shown += [
        ("failed" if not number else "", f"{each['url']}: {each['message']}") for number, each in enumerate(report["failed"])
    ]
    terminal.show_pairs(shown)
