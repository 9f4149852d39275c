"""Two versions of a dataset side by side, in one page: what made them, how their rows and their embeddings differ, what their
probes say. In: both opened versions and what was found out about them. Out: one HTML file, as `overview.py` makes them.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.dataset.read import Dataset
from pipeline.errors import DatasetError
from pipeline.report import facts, plane
from pipeline.report.overview import Record, Strip, tiles
from pipeline.report.page import Decode, render, short
from pipeline.report.pictures import Pictures
from pipeline.report.sample import Sample

MAX_KINDS, MAX_CLASSES = 20, 15
"""Rows of a table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two."""

    dataset: Dataset
    sample: Sample
    record: Record


def comparison(before: Side, after: Side, diff: Mapping[str, Any], decode: Decode) -> str:
    """The page.

    Args:
        before: the version that the other one is compared with.
        after: the other one.
        diff: `Diff.as_json` of the two.
        decode: is called with images that may come from anyone.
    """
    sides = before, after
    pictures = [Pictures(side.dataset, decode) for side in sides]
    findings = [
        _rows("Added", f"Rows that only version {diff['after']} has.", after, pictures[1], diff["examples"]["added"]),
        _rows("Removed", f"Rows that only version {diff['before']} has.", before, pictures[0], diff["examples"]["removed"]),
        *(
            _rows(
                f"Farthest in {short(name)}",
                "Rows whose content or recipe differs, by the cosine between their embeddings, the least first.",
                after,
                pictures[1],
                drift["farthest"],
            )
            for name, drift in diff["drift"].items()
        ),
    ]
    names = [f"version {side.dataset.version}" for side in sides]
    return render(
        "comparison.html",
        title=f"Version {diff['before']} and version {diff['after']}",
        facts=[("dataset", short(after.dataset.url))],
        names=names,
        facts_of_both=_facts(before, after),
        recipe=[short(each) for each in diff["recipe"]],
        changes=facts.changes({}, diff),
        maps=_maps(sides, pictures),
        findings=[each for each in findings if each is not None],
        quarantine=_quarantine(sides),
        classes=_classes(before.record.probe, after.record.probe),
    )


def _facts(before: Side, after: Side) -> list[dict[str, Any]]:
    """Names, with what each of the two has."""
    both = [_facts_of(side) for side in (before, after)]
    names = dict.fromkeys(name for side in both for name in side)
    return [
        {"name": name, "texts": (texts := [side.get(name, "") for side in both]), "differs": texts[0] != texts[1]}
        for name in names
    ]


def _facts_of(side: Side) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in facts.head(side.dataset, run := side.record.run, side.record.source):
        if name not in ("dataset", "version"):  # these are in the head of the page, and of the table
            found[name] = f"{found[name]}, {value}" if name in found else value
    found["quarantined"] = f"{sum(entry.num_quarantined for entry in side.dataset.entries()):,}"
    if run.get("bound_by"):
        found["speed"] = f"{run['images_per_second']:,.0f} images/s, bound by {run['bound_by']}"
    if (probe := side.record.probe) is not None:
        low, high = probe["interval"]
        found["probe's accuracy"] = f"{probe['test_accuracy']:.1%} (95% between {low:.1%} and {high:.1%})"
    return found


def _maps(sides: Sequence[Side], pictures: Sequence[Pictures]) -> dict[str, Any] | None:
    """Both samples: on the same axes where the recipes are the same, else embeddings have nothing in common but their names."""
    samples = [side.sample for side in sides]
    if any(len(sample.rows) < 2 for sample in samples):
        return None
    nodes = [side.dataset.nodes[side.sample.node] for side in sides]
    alike = sides[0].dataset.recipe == sides[1].dataset.recipe and nodes[0] == nodes[1]
    if alike:
        maps = plane.draw_together(samples, pictures)
    else:
        maps = [plane.draw(sample, of_sample) for sample, of_sample in zip(samples, pictures, strict=True)]
    return {"maps": maps, "alike": alike}


def _rows(
    title: str, text: str, side: Side, pictures: Pictures, examples: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """A strip of rows by their shards and keys; None where there are none."""
    rows, texts = [], []
    for each in examples:
        with contextlib.suppress(DatasetError):  # a key that is twice in its shard
            rows += side.dataset.find([each["key"]], each["shard"], side.dataset.columns).to_pylist()
            texts.append(f"{each['cosine']:.4f}" if "cosine" in each else "")
    if not rows:
        return None
    pictures.load(rows)
    return {"title": title, "text": text, "strip": tiles(Strip(rows=rows, texts=texts), pictures)["tiles"]}


def _quarantine(sides: Sequence[Side]) -> list[dict[str, Any]]:
    """Stage and kind of error with the number of samples in each of the two, the most frequent first."""
    counts = [collections.Counter((row.stage, row.error) for row in side.dataset.quarantine()) for side in sides]
    kinds = sorted(counts[0].keys() | counts[1].keys(), key=lambda kind: (-max(count[kind] for count in counts), kind))
    return [
        {"stage": stage, "error": error, "counts": [count[stage, error] for count in counts]}
        for stage, error in kinds[:MAX_KINDS]
    ]


def _classes(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Classes that both probes were tested on, by how much their accuracy moved."""
    if before is None or after is None:
        return []
    accuracies = [{str(each["class"]): each["accuracy"] for each in probe["per_class"]} for probe in (before, after)]
    shared = [name for name in accuracies[0] if name in accuracies[1]]
    moved = sorted(shared, key=lambda name: -abs(accuracies[1][name] - accuracies[0][name]))
    return [{"name": short(name), "accuracies": [each[name] for each in accuracies]} for name in moved[:MAX_CLASSES]]
