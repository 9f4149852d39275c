"""The command that makes the page of a version: report."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from pipeline import config
from pipeline.cli.common import AsJson, EndpointUrl, OutputUrl, Version, reporting, version_text


def report(
    url: OutputUrl,
    version: Version = None,
    to: Annotated[
        str | None, typer.Option(metavar="FILE", help="Where to write it, at any URL; beside the run when left out.")
    ] = None,
    node: Annotated[str | None, typer.Option(metavar="COLUMN", help="Embedding column; the first when left out.")] = None,
    endpoint_url: EndpointUrl = None,
    as_json: AsJson = False,
) -> None:
    """Make the page of a version: what its run did, a map, neighbours, quarantine, outliers, the probe. One HTML file.

    `pipeline run` makes it too. It loads nothing and runs nothing, so it can be opened from a bucket or a mail.

    Example: pipeline report data/embeddings --to report.html
    """
    with reporting(as_json) as found:
        from pipeline import reports
        from pipeline.dataset.read import open_dataset
        from pipeline.report import terminal

        dataset = open_dataset(url, version, config.Storage(endpoint_url=endpoint_url))
        start = time.monotonic()
        run_id = reports.run_of(dataset)
        page = reports.write(dataset, run_id, to, node)
        num_bytes = dataset.table_.store.stat(page).num_bytes
        found |= {
            "output": url,
            "version": dataset.version,
            "rows": len(dataset),
            "run_id": run_id,
            "page": page,
            "bytes": num_bytes,
            "seconds": round(time.monotonic() - start, 3),
        }
        if not as_json:
            rows = [("dataset", f"{version_text(url, dataset.version)}, {len(dataset):,} rows"), ("page", page)]
            terminal.show_pairs([*rows, ("size", f"{terminal.size(num_bytes)}, made in {terminal.duration(found['seconds'])}")])
