"""The command that writes a first config: init."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline import config
from pipeline.cli.common import AsJson, EndpointUrl, reporting
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.source.inspect import Inspected

MIN_REDUCED = 4 * 256
"""Shorter side from which on `decode: fast` decodes at a reduced scale, for weights that resize to 256."""


def init(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Images: a folder, a file or a glob, at any URL.")],
    to: Annotated[str, typer.Option(metavar="FILE", help="Where to write the config.")] = "config.yaml",
    output: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Where the dataset is to lie; `data/` and the source's name when left out."),
    ] = None,
    label: Annotated[str | None, typer.Option(metavar="NAME", help="The label; looked for when left out.")] = None,
    model: Annotated[str, typer.Option(metavar="PROVIDER/NAME", help="The frozen model.")] = "torchvision/resnet50",
    weights: Annotated[str, typer.Option(metavar="NAME", help="Its weights.")] = "IMAGENET1K_V2",
    node: Annotated[str, typer.Option(metavar="NODE", help="The point of its graph that becomes the column.")] = "flatten",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a config that is there.")] = False,
    endpoint_url: EndpointUrl = None,
    as_json: AsJson = False,
) -> None:
    """Look at images and write a config for them: format, image and label are found, the rest is what most people want.

    Reads the listing and the first shard. What to do next is printed.

    Example: pipeline init photos/ --to photos.yaml
    """
    with reporting(as_json) as report:
        place = Path(to)
        if place.exists() and not overwrite:
            raise ConfigError(f"to: {to} is there already; --overwrite replaces it")
        import yaml

        from pipeline.report import terminal
        from pipeline.source.inspect import inspect

        found = inspect(source, config.Storage(endpoint_url=endpoint_url), label)
        text = _config(found, output or _output(source, model), model, weights, node)
        config.parse(yaml.safe_load(text))  # what is wrong with it, it says now
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")
        report |= {
            "config": to,
            "format": found.source.format,
            "label": found.source.label,
            "shards": found.num_shards,
            "bytes": found.num_bytes,
            "width": found.width,
            "height": found.height,
            "notes": found.notes,
        }
        if not as_json:
            size = f", {found.width:,} × {found.height:,} pixels" if found.width and found.height else ""
            rows = [
                ("source", f"{found.source.format}, {found.num_shards:,} shards, {terminal.size(found.num_bytes)}{size}"),
                *(("", note) for note in found.notes),
                ("config", to),
                ("next", f"pipeline plan {to}    # what a run would do"),
                ("", f"pipeline run {to}"),
            ]
            terminal.show_pairs(rows)


def _output(source: str, model: str) -> str:
    """A folder that is named for what lies in it."""
    parts = [part for part in source.split("/") if part and not set(part) & set("*?[") and "." not in part and ":" not in part]
    return f"data/{parts[-1] if parts else 'images'}-{model.rpartition('/')[2].rpartition(':')[2]}"


def _config(found: Inspected, output: str, model: str, weights: str, node: str) -> str:
    """The config as a person would write it."""
    import yaml

    def line(name: str, value: Any, comment: str = "") -> str:
        text = yaml.safe_dump(value, allow_unicode=True, width=10**6, default_flow_style=True).removesuffix("...\n").strip()
        return f"  {name}: {text}{comment}"

    given = found.source.model_dump(mode="json", exclude_defaults=True)
    storage = given.pop("storage", {})
    endpoint = storage.get("endpoint_url")
    reached = ["  storage:", f"  {line('endpoint_url', endpoint)}"] if endpoint else []
    lines = ["# What every field means: `pipeline schema`. What a run would do: `pipeline plan` with this file.", "source:"]
    lines += [*(line(name, value) for name, value in given.items()), *reached]
    lines += ["backbone:", line("model", model), line("weights", weights), "  nodes:"]
    lines += [f"  {line('embedding', {'node': node, 'normalize': 'l2'}, '    # l2: inner product becomes cosine similarity')}"]
    if found.width and found.height:
        is_large = min(found.width, found.height) >= MIN_REDUCED
        why = f"# images are {found.width} x {found.height}"
        lines.append(
            f"decode: {'fast' if is_large else 'exact'}    {why}" + (": exact takes twice as long" if is_large else "")
        )
    lines += ["output:", line("url", output), *reached]
    lines += ["run:", "  batch_size: auto    # measured on the first batches"]
    if found.source.label is not None:
        lines += ["probe:    # a linear classifier on the embeddings, to see what they are good for", "  label: label"]
    return "\n".join(lines) + "\n"
