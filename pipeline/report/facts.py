"""What a run's record says, in words: the head of the page, how busy its stages were, what changed, what failed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline import metrics
from pipeline.dataset.partition import Quarantined
from pipeline.dataset.read import Dataset
from pipeline.report import charts
from pipeline.report.page import short
from pipeline.report.pictures import SMALL_SIDE, Pictures
from pipeline.report.terminal import duration, size

MAX_LISTED = 20
"""Of what may be any number of things: shards, kinds of failure."""
MAX_KEYS = 3
"""Of each kind of failure."""
NEVER_SHOWN = frozenset({"Hung", "Crashed"})
"""Kinds of failure whose images are not decoded once more for a page."""

Pairs = list[tuple[str, str]]


def head(dataset: Dataset, run: Mapping[str, Any], source: Sequence[str]) -> Pairs:
    """Names and values for the head of the page; of the run only what is known of it."""
    recipe = dataset.recipe
    pairs = [("dataset", dataset.url), ("version", str(dataset.version)), ("rows", f"{len(dataset):,}")]
    pairs += [("column", f"{name}: {width:,} × float32") for name, width in dataset.nodes.items()]
    pairs.append(("model", recipe["model"]))
    pairs.append(("weights", f"{recipe['weights']}"))
    pairs.append(("precision", recipe["precision"]))
    entries = dataset.entries()
    pairs.append(("recipe", entries[0].recipe_id if entries else run.get("recipe_id", "")))
    if source:
        more = f" and {len(source) - 3:,} more" if len(source) > 3 else ""
        pairs.append(("source", ", ".join(source[:3]) + more))
    pairs.append(("shards", f"{len(entries):,}"))
    pairs.append(("dataset's size", size(sum(entry.num_bytes for entry in entries))))
    if run:
        pairs.append(("run", run["run_id"]))
        pairs.append(("finished", run["finished"].replace("T", " ").replace("+00:00", " UTC")))
        pairs.append(("took", duration(run["seconds"])))
    return [(name, short(value)) for name, value in pairs if value]


def speed(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """How fast the run was, and why not faster; None where it extracted nothing."""
    if not run.get("bound_by"):
        return None
    actors = run.get("actors") or []
    num_gpus = sum(len(actor.get("gpus") or []) for actor in actors)
    by = f"{len(actors):,} actor{'' if len(actors) == 1 else 's'}" + (f" on {num_gpus:,} GPUs" if num_gpus else "")
    return {
        "rate": f"{run['images_per_second']:,.0f}",
        "bound_by": run["bound_by"],
        "advice": metrics.ADVICE[run["bound_by"]],
        "busy": [(stage, round(100 * share)) for stage, share in run["busy"].items()],
        "facts": [("read", f"{size(run.get('bytes_per_second', 0))}/s"), ("by", by)],
        **_over_time(run.get("pace")),
    }


def _over_time(pace: Mapping[str, Any] | None) -> dict[str, Any]:
    """Charts of the rate and of the stages; None of them where the run was too short, or of a program that kept none."""
    if not pace:
        return {"pace": None, "stages": None, "legend": []}
    num_stretches = len(pace["images_per_second"])
    seconds = (np.arange(num_stretches) + 0.5) * pace["stretch_s"]
    unit, name = next((each for each in ((3600, "hours"), (60, "minutes")) if seconds[-1] > 3 * each[0]), (1, "seconds"))
    times = (seconds / unit).round(3).tolist()

    def line(values: Sequence[float]) -> list[tuple[float, float]]:
        return list(zip(times, values, strict=True))

    fastest = max(pace["images_per_second"])
    return {
        "pace": charts.curves(
            [line(pace["images_per_second"])], x=name, y="images/s", domain=(0, 1.1 * fastest if fastest else 1)
        ),
        "stages": charts.curves(
            [line([100 * share for share in shares]) for shares in pace["busy"].values()], x=name, y="busy, %", domain=(0, 100)
        ),
        "legend": [{"color": number, "name": stage, "num_rows": 0} for number, stage in enumerate(pace["busy"])],
    }


def changes(run: Mapping[str, Any], diff: Mapping[str, Any] | None) -> Pairs:
    """What the run did to the dataset, and how its version differs from the one before."""
    return [(name, short(value)) for name, value in _changes(run, diff)]


def _changes(run: Mapping[str, Any], diff: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    if run:
        images, shards = run["images"], run["shards"]
        names = {"embedded": "embedded", "carried_over": "carried over", "quarantined": "quarantined"}
        yield "images", ", ".join(f"{images[name]:,} {text}" for name, text in names.items())
        counts = [f"{count:,} {name}" for name, count in shards.items() if count or name == "extracted"]
        yield "shards", ", ".join(counts)
        yield from (("made anew, because", reason) for reason in run["reasons"][:MAX_LISTED])
    if diff is None:
        return
    rows = diff["rows"]
    names = {name: f"{rows[name]:,} {name}" for name in ("added", "removed", "changed", "relabelled", "unchanged")}
    if rows["moved"]:
        names["added"] += f" ({rows['moved']:,} of them moved)"
    yield f"rows since version {diff['before']}", f"{rows['before']:,} → {rows['after']:,}: {', '.join(names.values())}"
    for column, drift in diff["drift"].items():
        if drift["relative_mean_shift"] is not None:
            yield f"drift of {column}", f"its mean moved by {drift['relative_mean_shift']:.2%} of the mean norm"
        if drift["num_compared"]:
            cosines = ", ".join(f"{name} {drift[f'cosine_{name}']:.4f}" for name in ("mean", "min"))
            yield f"changed rows, {column}", f"cosine before and after: {cosines}"


def failed(run: Mapping[str, Any]) -> tuple[int, Pairs]:
    """How many shards failed, and the first of them with their reasons."""
    shards = run.get("failed") or {}
    return len(shards), [(short(shard), short(why)) for shard, why in list(shards.items())[:MAX_LISTED]]


def quarantine(rows: Sequence[Quarantined], pictures: Pictures) -> dict[str, Any] | None:
    """Samples that could not be embedded by stage and kind, the most frequent first, with the pictures that there are of the
    first of each kind; None where there are none.
    """
    kinds: dict[tuple[str, str], list[Quarantined]] = {}
    for row in rows:
        kinds.setdefault((row.stage, row.error), []).append(row)
    if not kinds:
        return None
    ordered = sorted(kinds.items(), key=lambda kind: -len(kind[1]))
    first = {kind: [dataclasses.asdict(row) for row in found[:MAX_KEYS]] for kind, found in ordered[:MAX_LISTED]}
    wanted = [row for (_, error), examples in first.items() if error not in NEVER_SHOWN for row in examples]
    pictures.load([row for row in wanted if row["content_hash"] is not None], SMALL_SIDE)
    shown = [
        {
            "stage": stage,
            "error": error,
            "count": len(kinds[stage, error]),
            "examples": [
                {
                    "key": short(row["key"]),
                    "shard": short(row["shard"].rpartition("/")[2]),
                    "message": short(row["message"]),
                    "thumbnail": pictures.picture(row),
                }
                for row in examples
            ],
        }
        for (stage, error), examples in first.items()
    ]
    return {"total": len(rows), "kinds": shown, "num_more": max(0, len(ordered) - MAX_LISTED)}
