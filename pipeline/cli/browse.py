"""The command that serves pages to look around in a dataset: browse."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline import config
from pipeline.cli.common import AsJson, EndpointUrl, OutputUrl, Version, reporting, version_text
from pipeline.errors import ConfigError


def browse(
    url: OutputUrl,
    version: Version = None,
    node: Annotated[str | None, typer.Option(metavar="COLUMN", help="Embedding column; the first when left out.")] = None,
    port: Annotated[int, typer.Option(metavar="N", help="Port of 127.0.0.1; any that is free for 0.")] = 0,
    open_page: Annotated[bool, typer.Option("--open", help="Open it in the browser of this machine.")] = False,
    endpoint_url: EndpointUrl = None,
    as_json: AsJson = False,
) -> None:
    """Look around in a dataset: search by a click or by an image of your own, filter, see the quarantine. Serves until Ctrl-C.

    The pages are for this machine alone: they listen on 127.0.0.1 and want the token of the address. Nothing is written.

    Example: pipeline browse data/embeddings
    """
    with reporting(as_json) as report:
        try:
            from pipeline import browse as pages
        except ImportError as error:
            raise ConfigError(f"{error.name} is not installed; `pip install 'frozen-pipeline[browse]'` does it") from None
        import secrets

        from pipeline.dataset.read import open_dataset
        from pipeline.reports import decode

        dataset = open_dataset(url, version, config.Storage(endpoint_url=endpoint_url))
        token = secrets.token_urlsafe(24)
        application = pages.Browser(dataset, decode, node).application(token)

        def ready(port: int) -> None:
            address = f"http://{pages.HOST}:{port}/?token={token}"
            report.update({"output": url, "version": dataset.version, "rows": len(dataset), "address": address})
            text = f"{version_text(url, dataset.version)}, {len(dataset):,} rows\n{address}\nCtrl-C ends it."
            typer.echo(text, err=as_json)  # what was served is told in the end
            if open_page:
                typer.launch(address)

        pages.serve(application, port, ready)
