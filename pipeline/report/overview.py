"""The page of a run: what it did, and what the version that it made looks like. In: an opened version and what was found out
about it. Out: one HTML file that loads nothing and runs nothing, below 10 MB for any dataset.

What comes from the analyses, and from the run's record, is handed in; this reads the dataset, and its source for the pictures.
Memory: the sample (`sample.py`), the quarantine, the pictures (`pictures.py`), and what a search takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.dataset.read import Dataset
from pipeline.dataset.topk import nearest_rows
from pipeline.report import facts, plane, probe
from pipeline.report.page import Decode, Tile, render
from pipeline.report.pictures import Pictures
from pipeline.report.sample import SPREAD_BYTES, Sample

QUERIES, NEIGHBOURS = 5, 8
"""Rows whose neighbours are shown, and how many of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Strip:
    """Rows side by side."""

    rows: Sequence[Mapping[str, Any]]
    texts: Sequence[str]
    """What is said of each: a score."""
    row: Mapping[str, Any] | None = None
    """The row that they are compared with, where there is one."""
    name: str = ""
    """What it is called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What an analysis found: a section of the page."""

    title: str
    text: str
    strips: Sequence[Strip] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is known of the run that made a version."""

    run: Mapping[str, Any]
    """`run.json`; empty where it is not there."""
    source: Sequence[str] = ()
    """URLs of the source."""
    diff: Mapping[str, Any] | None = None
    """`Diff.as_json` with the version before."""
    probe: Mapping[str, Any] | None = None
    """`metrics.json`."""


def overview(
    dataset: Dataset,
    sample: Sample,
    record: Record,
    findings: Sequence[Finding],
    decode: Decode,
    method: plane.Method = "pca",
) -> str:
    """The page.

    Args:
        dataset: gives rows, quarantine, and the images of the rows.
        sample: of its rows.
        record: of the run.
        findings: sections from the analyses.
        decode: is called with images that may come from anyone.
        method: of the map.

    Raises:
        ConfigError: the method is not installed.
    """
    findings = [*([_neighbours(dataset, sample)] if len(sample.rows) > 1 else []), *findings]
    pictures = Pictures(dataset, decode)
    for finding in findings:
        for strip in finding.strips:
            pictures.load([*([strip.row] if strip.row is not None else []), *strip.rows])
    num_failed, failed = facts.failed(record.run)
    return render(
        "report.html",
        title=f"Embeddings, version {dataset.version}",
        facts=facts.head(dataset, record.run, record.source),
        error=record.run.get("error"),
        speed=facts.speed(record.run),
        changes=facts.changes(record.run, record.diff),
        num_failed=num_failed,
        failed=failed,
        quarantine=facts.quarantine(dataset.quarantine(), pictures),
        map=plane.draw(sample, pictures, method) if len(sample.rows) > 1 else None,
        findings=[
            {"title": finding.title, "text": finding.text, "strips": [tiles(strip, pictures) for strip in finding.strips]}
            for finding in findings
        ],
        probe=probe.section(record.probe) if record.probe is not None else None,
    )


def map_page(dataset: Dataset, sample: Sample, decode: Decode | None, method: plane.Method) -> str:
    """The map alone; without `decode` there are no pictures on it."""
    pictures = Pictures(dataset, decode) if decode is not None else None
    return render(
        "map.html", title=f"{dataset.url}, version {dataset.version}", facts=[], map=plane.draw(sample, pictures, method)
    )


def _neighbours(dataset: Dataset, sample: Sample) -> Finding:
    """The rows nearest to a few rows of the sample, of the whole dataset where that is small enough to be read through."""
    random = np.random.default_rng(dataset.version)
    chosen = np.sort(random.choice(len(sample.rows), min(QUERIES, len(sample.rows)), replace=False))
    strips = []
    if len(dataset) * 4 * sample.features.shape[1] <= SPREAD_BYTES:
        where = f"all {len(dataset):,} rows"
        found = dataset.search(sample.features[chosen], NEIGHBOURS + 1, node=sample.node)
        for number, each in zip(chosen.tolist(), found, strict=True):
            others = zip(each.positions.tolist(), each.scores.tolist(), each.rows.to_pylist(), strict=True)
            kept = [(score, row) for position, score, row in others if position != sample.positions[number]][:NEIGHBOURS]
            strips.append(_strip(sample.rows[number], kept))
    else:
        where = "the sample, since there are more rows than a page should read"
        scores_QK, rows_QK = nearest_rows(sample.features, sample.features[chosen], NEIGHBOURS + 1)
        for number, scores, rows in zip(chosen.tolist(), scores_QK.tolist(), rows_QK.tolist(), strict=True):
            others_of = [(score, sample.rows[row]) for score, row in zip(scores, rows, strict=True) if row not in (number, -1)]
            strips.append(_strip(sample.rows[number], others_of[:NEIGHBOURS]))
    text = f"Of {len(chosen)} random rows, by the cosine of {sample.node}, among {where}."
    return Finding(title="Nearest neighbours", text=text, strips=[strip for strip in strips if strip.rows])


def _strip(row: Mapping[str, Any], others: Sequence[tuple[float, Mapping[str, Any]]]) -> Strip:
    return Strip(row=row, name="row", rows=[other for _, other in others], texts=[f"{score:.4f}" for score, _ in others])


def tiles(strip: Strip, pictures: Pictures) -> dict[str, Any]:
    """A strip for the template: the tile in front, if there is one, and the others."""
    label = strip.row.get("label") if strip.row is not None else None
    found: list[Tile] = [
        dataclasses.replace(pictures.tile(row), score=text, rank=rank, is_same=label is not None and row.get("label") == label)
        for rank, (row, text) in enumerate(zip(strip.rows, strip.texts, strict=True), 1)
    ]
    return {"tile": pictures.tile(strip.row) if strip.row is not None else None, "kind": strip.name, "tiles": found}
