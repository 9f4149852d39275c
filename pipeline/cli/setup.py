"""Commands to get started with: demo, schema."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pipeline import config
from pipeline.cli.common import AsJson, reporting


def demo(folder: Annotated[str, typer.Argument(metavar="DIR", help="Where to write.")], as_json: AsJson = False) -> None:
    """Write a small real labelled dataset (1,797 handwritten digits) as shards, to try everything on.

    Example: pipeline demo data/digits
    """
    with reporting(as_json) as report:
        from pipeline.demo import write_digits

        num_images, num_shards = write_digits(folder)
        report |= {"folder": folder, "images": num_images, "shards": num_shards}
        if not as_json:
            typer.echo(f"{num_images:,} labelled images in {num_shards} shards: {folder}")


def schema(as_json: AsJson = False) -> None:
    """Print the JSON schema of a config file, for editors.

    Example: pipeline schema > config.schema.json
    """
    typer.echo(json.dumps(config.json_schema(), indent=None if as_json else 2))
