"""The command that makes the page of a version: report."""

from __future__ import annotations

import time
from typing import Annotated, cast, get_args

import typer

from pipeline import config
from pipeline.cli.common import AsJson, EndpointUrl, OutputUrl, Version, reporting, version_text
from pipeline.errors import ConfigError


def report(
    url: OutputUrl,
    before: Annotated[
        int | None, typer.Argument(metavar="A", help="Compare two versions instead: number of the one.", show_default=False)
    ] = None,
    after: Annotated[int | None, typer.Argument(metavar="B", help="Number of the other one.", show_default=False)] = None,
    version: Version = None,
    to: Annotated[
        str | None, typer.Option(metavar="FILE", help="Where to write it, at any URL; beside the run when left out.")
    ] = None,
    node: Annotated[str | None, typer.Option(metavar="COLUMN", help="Embedding column; the first when left out.")] = None,
    method: Annotated[str, typer.Option("--map", help="pca, or umap (needs the extra of that name).")] = "pca",
    endpoint_url: EndpointUrl = None,
    as_json: AsJson = False,
) -> None:
    """Make the page of a version: what its run did, a map, neighbours, quarantine, outliers, the probe. One HTML file.

    `pipeline run` makes it too. It loads nothing and runs nothing, so it can be opened from a bucket or a mail. With two
    versions, as in `pipeline report OUTPUT 0 1 --to FILE`: the page of both side by side.

    Example: pipeline report data/embeddings --to report.html
    """
    with reporting(as_json) as found:
        from pipeline import reports
        from pipeline.dataset.read import open_dataset
        from pipeline.report import terminal
        from pipeline.report.plane import Method

        if before is not None and (after is None or to is None or version is not None):
            raise ConfigError("two versions are compared by `pipeline report OUTPUT A B --to FILE`, without --version")
        if method not in get_args(Method):
            raise ConfigError(f"map: {method!r} is not allowed; allowed: {', '.join(get_args(Method))}")
        storage = config.Storage(endpoint_url=endpoint_url)
        dataset = open_dataset(url, after if before is not None else version, storage)
        start = time.monotonic()
        run_id = reports.run_of(dataset)
        if before is not None:
            assert to is not None, "checked above"
            page = reports.write_comparison(open_dataset(url, before, storage), dataset, to, node)
            found["before"] = before
        else:
            page = reports.write(dataset, run_id, to, node, cast(Method, method))
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
