"""The command that holds a dataset against its log and its source: verify."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pipeline import config
from pipeline.cli.common import AsJson, EndpointUrl, OutputUrl, Version, reporting, version_text
from pipeline.errors import VerifyFailed
from pipeline.imports import importing

if TYPE_CHECKING:
    from pipeline.analysis.verify import Report

MAX_SHOWN = 100
"""Lines of one kind that a terminal gets; `--json` has them all."""


def verify(
    url: OutputUrl,
    version: Version = None,
    rows: Annotated[
        int, typer.Option(metavar="N", min=0, help="Rows whose image is embedded again; 0 needs neither model nor source.")
    ] = 100,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Draws other rows.")] = 0,
    deep: Annotated[
        bool | None,
        typer.Option("--deep/--quick", help="Read all columns of all rows, or none. Left out: up to 1 GiB of partitions."),
    ] = None,
    endpoint_url: EndpointUrl = None,
    as_json: AsJson = False,
) -> None:
    """Check every partition against the log, and a sample of the rows against their images. Changes nothing.

    Exit code 1 when the dataset is not what it should be, or none of the rows could be compared; what only the source has
    lost or changed since is told apart. The model of the recipe is built here; one of your own is imported.

    Example: pipeline verify data/embeddings --rows 500
    """
    with reporting(as_json) as report:
        from pipeline.analysis.verify import verify as check
        from pipeline.dataset.read import open_dataset
        from pipeline.report import terminal

        dataset = open_dataset(url, version, config.Storage(endpoint_url=endpoint_url))
        embed = None
        if rows and len(dataset):
            with importing():
                from pipeline.extract.embedder import Embedder

            # However large they are: the images of these rows were embedded before.
            embed = Embedder(dataset.recipe, max_pixels=config.MAX_PIXELS).embed
        with terminal.Watch() as watch:
            found = check(dataset, embed, rows, seed, deep=deep, note=watch.note)
        report |= {"output": url, **found.as_json()}
        if not as_json:
            _show(url, found)
        if found.verdict:
            raise VerifyFailed(f"{url}: {found.verdict}")


def _show(url: str, found: Report) -> None:
    from pipeline.report import terminal

    state = f"{found.num_damaged:,} of them damaged" if found.findings else "all as the log says"
    size = terminal.size(found.num_bytes)
    shown = [
        ("dataset", version_text(url, found.version)),
        ("partitions", f"{found.num_partitions:,}, {found.num_rows:,} rows, {size}: {state}"),
        ("columns", "all read" if found.deep else "not read; --deep reads them"),
    ]
    if found.num_sampled:
        largest = f"largest difference {found.max_difference:.2g} of the largest value, allowed is {found.tolerance:g}"
        shown.append(("sample", f"{found.num_compared:,} of {found.num_sampled:,} rows embedded again; {largest}"))
    without: dict[str, list[str]] = {}
    for finding in found.unavailable:
        without.setdefault(finding.shard, []).append(finding.message)
    no_image = [f"no image for {len(messages):,} of them: {messages[0]}" for messages in without.values()]
    for what, lines in (("source", no_image), ("wrong", [str(finding) for finding in found.findings])):
        rest = [f"and {len(lines) - MAX_SHOWN:,} more lines, which --json has"] if len(lines) > MAX_SHOWN else []
        shown += [(what if not number else "", line) for number, line in enumerate([*lines[:MAX_SHOWN], *rest])]
    shown.append(("time", terminal.duration(found.seconds)))
    terminal.show_pairs(shown)
