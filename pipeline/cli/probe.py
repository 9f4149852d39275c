"""Commands around the linear probe: probe, predict."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline import config
from pipeline.cli.common import AsJson, EndpointUrl, OutputUrl, reporting

Version = Annotated[int | None, typer.Option(metavar="N", help="Version of the dataset; the newest when left out.")]


def probe(
    url: OutputUrl,
    label: Annotated[str, typer.Option(metavar="NAME", help="Column with the class.")] = "label",
    nodes: Annotated[
        list[str] | None,
        typer.Option("--node", metavar="COLUMN", help="Embedding column; give several, or all, to have the best one taken."),
    ] = None,
    labels: Annotated[
        str | None, typer.Option(metavar="FILE", help="URL of a .csv or .parquet file with the label for each key.")
    ] = None,
    labels_key: Annotated[str, typer.Option(metavar="COLUMN", help="Column of that file with the key.")] = "key",
    group: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Rows with equal values stay on one side of the split.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column with train, validation and test; drawn when left out.")
    ] = None,
    normalize: Annotated[
        list[str] | None,
        typer.Option(metavar="HOW", help="none, l2 or zscore; give several to have the best one taken. Default: all three."),
    ] = None,
    version: Version = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Changes the split.")] = 0,
    endpoint_url: EndpointUrl = None,
    as_json: AsJson = False,
) -> None:
    """Train a linear probe: sweep, choose, refit, test. Writes metrics and weights below _runs/ of the dataset.

    Example: pipeline probe data/embeddings --label label --node all
    """
    with reporting(as_json) as report:
        named = {"label": label, "labels": labels, "labels_key": labels_key, "group": group, "split": split, "seed": seed}
        several = {"node": nodes[0] if nodes and len(nodes) == 1 else nodes, "normalize": normalize}
        given = {name: value for name, value in {**named, **several}.items() if value}
        wanted = config.parse_probe(given, "pipeline probe")
        from pipeline import driver
        from pipeline.report import terminal

        output = config.Output(url=url, storage=config.Storage(endpoint_url=endpoint_url))
        report |= {"output": url, **driver.train_probe(output, version, wanted)}
        if not as_json:
            terminal.show_probe(report)


def predict(
    url: OutputUrl,
    probe: Annotated[
        str | None, typer.Option(metavar="URL", help="Weights of a probe; those saved last with the dataset when left out.")
    ] = None,
    to: Annotated[str | None, typer.Option("--to", metavar="FILE", help="URL of a .parquet or .csv file to write.")] = None,
    version: Version = None,
    endpoint_url: EndpointUrl = None,
    as_json: AsJson = False,
) -> None:
    """Apply a saved probe to every row of a dataset.

    Example: pipeline predict data/embeddings --to predictions.csv
    """
    with reporting(as_json) as report:
        from pipeline import runs
        from pipeline.analysis.probe import head
        from pipeline.analysis.probe.predict import predict as predict_rows
        from pipeline.dataset.read import open_dataset
        from pipeline.report import terminal
        from pipeline.storage import Store

        storage = config.Storage(endpoint_url=endpoint_url)
        store = Store(storage)
        dataset = open_dataset(url, version, storage)
        probe_url = probe or runs.newest_probe(store, url)
        classifier = head.load(store.read(probe_url), probe_url)
        report |= {"output": url, "version": dataset.version, "probe": probe_url, "node": classifier.node, "to": to}
        report |= predict_rows(classifier, dataset, store, to)
        if not as_json:
            terminal.show_predictions(report)
