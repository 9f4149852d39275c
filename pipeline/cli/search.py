"""The command that finds the rows nearest to an image, to a row or to a vector: search."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline import config
from pipeline.cli.common import AsJson, EndpointUrl, OutputUrl, reporting
from pipeline.errors import ConfigError
from pipeline.imports import importing

if TYPE_CHECKING:
    from PIL.Image import Image

    from pipeline.analysis.search import Answer, Query
    from pipeline.dataset.read import Dataset
    from pipeline.storage import Store


def search(
    url: OutputUrl,
    images: Annotated[
        list[str] | None, typer.Option("--image", metavar="FILE", help="Image to search with, at any URL; may be repeated.")
    ] = None,
    keys: Annotated[
        list[str] | None, typer.Option("--key", metavar="KEY", help="Row of the dataset to search with; may be repeated.")
    ] = None,
    vectors: Annotated[
        str | None, typer.Option(metavar="FILE", help="A .npy file of vectors to search with, (Q, D) or (D,).")
    ] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="URL", help="Shard of the keys, needed where several shards have one.")
    ] = None,
    node: Annotated[str | None, typer.Option(metavar="COLUMN", help="Embedding column; the first when left out.")] = None,
    k: Annotated[int, typer.Option("-k", metavar="N", help="Rows to find for each query.")] = 10,
    metric: Annotated[str, typer.Option(help="cosine or inner (product).")] = "cosine",
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="CONDITION", help="Only rows with this, such as label=3, of = != < <= > >=; all have to hold."),
    ] = None,
    version: Annotated[int | None, typer.Option(metavar="N", help="Number of a version; the newest when left out.")] = None,
    page: Annotated[str | None, typer.Option(metavar="FILE", help="Write a page with the pictures, at any URL.")] = None,
    endpoint_url: EndpointUrl = None,
    as_json: AsJson = False,
) -> None:
    """Find the rows whose embeddings are nearest to an image, to a row of the dataset or to a vector. Exact.

    An image is embedded by the dataset's own recipe, whose model is built here; one of your own is imported.

    Example: pipeline search data/embeddings --image photo.jpg -k 20 --where label=3 --page neighbours.html
    """
    with reporting(as_json) as report:
        if sum(map(bool, (images, keys, vectors))) != 1:
            raise ConfigError("search: give one of --image, --key (either may be repeated) or --vectors")
        from pipeline.analysis import search as searches
        from pipeline.dataset import filter as filters
        from pipeline.dataset.read import open_dataset
        from pipeline.report import terminal
        from pipeline.storage import Store

        storage = config.Storage(endpoint_url=endpoint_url)
        store = Store(storage)
        dataset = open_dataset(url, version, storage)
        column = dataset.node(node)
        condition = filters.parse(where or [], dataset.schema)
        payloads: list[bytes] = []
        if images:
            payloads = [store.read(image) for image in images]
            queries = _embedded(dataset, column, images, payloads)
        elif keys:
            queries = searches.by_keys(dataset, keys, column, shard)
        else:
            assert vectors is not None
            queries = searches.by_vectors(vectors, store.read(vectors))
        start = time.monotonic()
        options: dict[str, Any] = {"node": column, "metric": metric, "where": condition}
        answers = searches.answers(dataset, queries, k, **options)
        report |= {
            "output": url,
            "version": dataset.version,
            "rows": len(dataset),
            "node": column,
            "metric": metric,
            "k": k,
            "where": where or [],
            "seconds": round(time.monotonic() - start, 3),
            "queries": [answer.as_json() for answer in answers],
            "page": page,
        }
        if page:
            _write_page(store, page, dataset, answers, payloads, report)
        if not as_json:
            terminal.show_search(report)


def _embedded(dataset: Dataset, column: str, names: list[str], images: list[bytes]) -> list[Query]:
    """Images as queries."""
    from pipeline.analysis.search import Query

    with importing():
        from pipeline.extract.embedder import Embedder

    columns, errors = Embedder(dataset.recipe).embed(images)
    if errors:
        raise ConfigError("; ".join(f"image: {names[position]}: {error}" for position, error in errors.items()))
    return [Query(name=name, vector_D=vector_D) for name, vector_D in zip(names, columns[column], strict=True)]


def _write_page(
    store: Store, page: str, dataset: Dataset, answers: list[Answer], images: list[bytes], report: dict[str, Any]
) -> None:
    from pipeline.extract import pil
    from pipeline.report.gallery import Section, gallery

    max_pixels: int = config.Source.model_fields["max_pixels"].default
    pil.allow(max_pixels)

    def decode(image: bytes) -> Image:
        return pil.picture(image, max_pixels)

    sections = [
        Section(
            kind="image" if images else "key" if answer.query.row is not None else "vector",
            name=answer.query.name,
            scores=answer.neighbours.scores.tolist(),
            rows=answer.rows(),
            row=answer.query.row,
            image=images[number] if images else None,
        )
        for number, answer in enumerate(answers)
    ]
    facts = [("embedding", report["node"]), ("metric", report["metric"])]
    facts += [("where", " and ".join(report["where"]))] if report["where"] else []
    store.write(page, gallery(dataset, sections, decode, facts).encode("utf-8", "backslashreplace"))
