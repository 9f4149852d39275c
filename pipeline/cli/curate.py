"""The command that helps to curate a dataset: duplicates, outliers, label errors."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from pipeline import config
from pipeline.cli.common import AsJson, EndpointUrl, OutputUrl, reporting, version_text
from pipeline.errors import ConfigError


def curate(
    url: OutputUrl,
    label: Annotated[
        str | None, typer.Option(metavar="NAME", help="Column with the classes; `label` where there is one.")
    ] = None,
    node: Annotated[str | None, typer.Option(metavar="N", help="Embedding column to compare by; default the first.")] = None,
    threshold: Annotated[float | None, typer.Option(metavar="T", help="Least cosine of near duplicates; default 0.95.")] = None,
    most: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Label errors to list, and outliers of each class; default as many errors as there seem to be, 10 outliers.",
        ),
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="DIR", help="Folder or URL to write the lists to, as Parquet.")
    ] = None,
    version: Annotated[int | None, typer.Option(metavar="N", help="Version to look at; default the newest.")] = None,
    max_rows: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Compare up to so many rows; default 200,000.")
    ] = None,
    endpoint_url: EndpointUrl = None,
    as_json: AsJson = False,
) -> None:
    """List duplicates, near duplicates, outliers and likely label errors. Changes nothing.

    Example: pipeline curate data/digits-efficientnet --node middle --to data/curated
    """
    with reporting(as_json) as report:
        if threshold is not None and not 0 < threshold < 1:
            raise ConfigError(
                f"--threshold: {threshold:g} is no cosine of alike images; allowed is more than 0 and less than 1"
            )
        # Before torch is loaded. Where other programs want the cores as well, its threads would wait for each other in loops
        # that take them away from those waited for: label errors of 600 digits took 48 s that way, and 0.5 s like this.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        from pipeline.analysis import curate as analysis
        from pipeline.dataset.read import open_dataset
        from pipeline.report import terminal
        from pipeline.storage import Store

        storage = config.Storage(endpoint_url=endpoint_url)
        with terminal.Watch() as watch:
            found = analysis.curate(
                open_dataset(url, version, storage),
                node=node,
                label=label,
                threshold=analysis.THRESHOLD if threshold is None else threshold,
                most=most,
                max_rows=analysis.MAX_ROWS if max_rows is None else max_rows,
                note=watch.note,
            )
        report |= found.summary
        report["files"] = found.write(Store(storage), to) if to is not None else []
        if not as_json:
            terminal.show_pairs(_rows(report))


def _rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The summary, line by line."""
    copies, strange, wrong = report["duplicates"], report["outliers"], report["label_errors"]
    rows = [
        ("dataset", f"{version_text(report['output'], report['version'])}, {report['rows']:,} rows, {report['node']}"),
        (
            "copies",
            f"{copies['copies']:,} rows of {copies['copied_images']:,} images that are there already"
            f" ({copies['copied_across_shards']:,} of them in other shards)",
        ),
        (
            "near copies",
            f"{copies['near_groups']:,} groups of {copies['near_images']:,} images alike to {report['threshold']:g}"
            f" (two images at random: {copies['chance_similarity']['median']:.2f})",
        ),
        ("superfluous", f"{copies['superfluous_rows']:,} rows, if one of each group stays"),
    ]
    if report["label"] is not None:
        rows.append(("", f"{copies['groups_with_several_labels']:,} groups have several labels"))
    rows += [
        ("", f"{_name(each)}  {each['group_rows']} rows, least similarity {each['group_least_similarity']:.3f}")
        for each in copies["first"]
    ]
    rows.append(("outliers", f"{strange['listed']:,} of {strange['judged']:,} images listed"))
    rows += [
        ("", f"{_name(each)}  similarity {each['similarity']:.3f}, usual {each['usual_similarity']:.3f}")
        for each in strange["first"]
    ]
    if wrong is not None:
        rows.append(("label errors", f"about {wrong['estimated']:,} of {wrong['judged']:,} labels; {wrong['listed']:,} listed"))
        rows += [
            (
                "",
                f"{_name(each)}  probably {each['predicted']}: {each['probability_of_predicted']:.3f},"
                f" label {each['probability_of_label']:.2g}",
            )
            for each in wrong["first"]
        ]
    rows += [("warning", warning) for warning in report["warnings"]]
    rows += [("written" if not number else "", file) for number, file in enumerate(report["files"])]
    return rows


def _name(row: dict[str, Any]) -> str:
    label = f" (label {row['label']})" if row.get("label") is not None else ""
    return f"{row['shard'].rpartition('/')[2]} {row['key']}{label}"
