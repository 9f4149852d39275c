"""What a dataset holds twice, what hardly belongs in it, and which labels are probably wrong.

In: a committed version of a dataset. Out: a `Curation`, whose tables lead from every row they name back to its image; `write`
publishes them. Nothing is removed or relabelled: what becomes of a row is for people to decide.

The three parts have a module each: `duplicates.py`, `outliers.py`, `label_errors.py`. All embeddings are in memory, and each is
compared with each, so this is for datasets of up to `MAX_ROWS` rows. Memory: the embeddings; beside them 0.4 GB for the first
two parts, and for the third one more copy; and 300 bytes + 4 K for each row.

Legend: N rows, D features, K classes, M rows of a table.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.analysis.curate import duplicates, label_errors, outliers
from pipeline.analysis.curate.duplicates import Duplicates, Note
from pipeline.analysis.curate.label_errors import LabelErrors
from pipeline.analysis.curate.outliers import Outliers
from pipeline.config import RESERVED_COLUMNS
from pipeline.dataset.read import PLACE_COLUMNS, Dataset
from pipeline.errors import DatasetError, nearest
from pipeline.storage import Store, join

THRESHOLD = 0.95
"""Chosen on copies of one half of the photographs, and as good on the other: `tests/benchmarks/curate.py`."""
MAX_ROWS = 200_000
"""More need a word from the user: the time grows with N^2. 100,000 x 1,280 took 2 minutes on two cores."""
SMALL = 10_000
"""Rows of which nobody wants to know how long they will take."""
OUTLIERS = 10
"""Of each class, unless told otherwise."""
CROWDED = 0.01
"""Share of pairs above the threshold from which on it says little."""
SHOWN = 3
"""Of each kind, in the summary."""
TABLES = ("duplicates", "outliers", "label_errors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Curation:
    """What was found in one version of a dataset."""

    summary: dict[str, Any]
    """Native values only, ready for JSON: numbers, and the first few of each kind."""
    tables: dict[str, pa.Table]
    """`duplicates`, `outliers` and, where there are labels, `label_errors`."""

    def write(self, store: Store, url: str) -> list[str]:
        """Publish each table as a Parquet file in a folder, in place of what an earlier call left there.

        Returns:
            The URLs of the files.
        """
        origin = {name: self.summary[name] for name in ("output", "version", "node", "label", "threshold")}
        for name in TABLES:
            file_url = join(url, f"{name}.parquet")
            if name in self.tables:
                table = self.tables[name].replace_schema_metadata({"pipeline": json.dumps(origin)})
                with store.publish(file_url) as file:
                    pq.write_table(table, file, compression="zstd")
            else:
                store.delete(file_url)
        return [join(url, f"{name}.parquet") for name in self.tables]


def curate(
    dataset: Dataset,
    *,
    node: str | None = None,
    label: str | None = None,
    threshold: float = THRESHOLD,
    most: int | None = None,
    max_rows: int = MAX_ROWS,
    note: Note | None = None,
) -> Curation:
    """Look for duplicates, outliers and label errors in a version of a dataset.

    Args:
        dataset: the version.
        node: embedding column to compare by; the first one when left out.
        label: column with the classes; `label` when left out, and no classes where there is no such column.
        threshold: least cosine of two embeddings that count as near duplicates.
        most: length of the list of label errors, and of the outliers of each class; see `label_errors.find` and `OUTLIERS`.
        max_rows: refuse a dataset with more.
        note: told in a line what takes long, and how far it is.

    Raises:
        DatasetError: no such column, labels that are neither texts nor numbers, too many rows, or the version was vacuumed.
        GuardError: an embedding holds a value that is not finite.
    """
    started = time.perf_counter()
    node = node or next(iter(dataset.nodes))
    label = _label_column(dataset, label)
    _check_size(dataset, node, max_rows, note)
    features_ND = dataset.to_numpy(node)
    columns = dataset.table(["content_hash", "width", "height", *([label] if label else [])])
    hashes_N = np.array(columns.column("content_hash").to_pylist(), "S32")
    sizes_N = columns.column("width").to_numpy().astype(np.int64) * columns.column("height").to_numpy()
    classes: list[Any] = []
    targets_N = np.full(len(dataset), -1)
    if label:
        classes, targets_N = _encode(columns.column(label), f"{dataset.url}: column {label!r}")

    copies = duplicates.find(features_ND, hashes_N, threshold, sizes_N, note)
    strange = outliers.find(features_ND, targets_N, copies.first, OUTLIERS if most is None else most)
    wrong = label_errors.find(features_ND, targets_N, hashes_N, most) if label else None

    tables = {
        "duplicates": _duplicates_table(dataset, copies, label),
        "outliers": _outliers_table(dataset, strange, label),
    }
    if label and wrong is not None:
        predicted = pa.array([classes[index] for index in wrong.predicted.tolist()], columns.column(label).type)
        tables["label_errors"] = _label_errors_table(dataset, wrong, label, predicted)
    summary = {
        "output": dataset.url,
        "version": dataset.version,
        "rows": len(dataset),
        "node": node,
        "label": label,
        "threshold": threshold,
        "duplicates": _duplicates_summary(dataset, copies, targets_N) | _first(tables["duplicates"], "representative"),
        "outliers": {"judged": strange.num_judged, "listed": len(strange.rows)} | _first(tables["outliers"]),
        "label_errors": wrong and _label_errors_summary(wrong) | _first(tables["label_errors"]),
        "warnings": _warnings(label, classes, wrong, copies, threshold),
        "seconds": time.perf_counter() - started,
    }
    return Curation(summary=summary, tables=tables)


def _label_column(dataset: Dataset, label: str | None) -> str | None:
    """The column with the classes; None where there is none and none was asked for."""
    others = [name for name in dataset.schema.names if name not in RESERVED_COLUMNS - {"label"} and name not in dataset.nodes]
    if label is None:
        return "label" if "label" in others else None
    if label not in others:
        hint = nearest(label, others) or (f"it has {', '.join(others)}" if others else "it has none that could be one")
        raise DatasetError(f"{dataset.url}: there is no label column {label!r}; {hint}")
    return label


def _check_size(dataset: Dataset, node: str, max_rows: int, note: Note | None) -> None:
    """Refuse what would take too long, and say what will take long."""
    num_rows, width = len(dataset), dataset.nodes.get(node, 0)
    if num_rows <= min(max_rows, SMALL):
        return
    seconds = duplicates.seconds(num_rows, width)
    if num_rows > max_rows:
        raise DatasetError(
            f"{dataset.url}: version {dataset.version} has {num_rows:,} rows: comparing each with each would take about"
            f" {seconds / 60:,.0f} min and {8e-9 * num_rows * width:,.1f} GB here; more than {max_rows:,} need --max-rows"
        )
    if note is not None and seconds > duplicates.NOTE_EVERY_S:
        note(f"{num_rows:,} images are compared with each other: about {seconds:,.0f} s")


def _encode(column: pa.ChunkedArray, where: str) -> tuple[list[Any], NDArray[np.int64]]:
    """The classes in order, and for each row the index of its class (N,), -1 where there is none."""
    kind = column.type
    of_a_class = ("is_string", "is_large_string", "is_integer", "is_floating", "is_boolean", "is_null")
    if not any(getattr(pa.types, test)(kind) for test in of_a_class):
        raise DatasetError(f"{where} holds {kind}; a class is a text or a number")
    values = pa.array(column.to_pylist(), kind, from_pandas=True)  # from pandas: NaN is no label
    classes = sorted(value for value in values.unique().to_pylist() if value is not None)
    index = pc.index_in(values, pa.array(classes, kind)) if classes else pa.nulls(len(values), pa.int32())
    return classes, index.fill_null(-1).to_numpy().astype(np.int64)


def _table(dataset: Dataset, rows_M: NDArray[np.int64], label: str | None, scores: Mapping[str, Any]) -> pa.Table:
    """What was found out about some rows, and what leads from them back to their images; reads one partition at a time."""
    names = [*PLACE_COLUMNS, *([label] if label else [])]
    order = np.argsort(rows_M, kind="stable")
    pieces = [pa.schema([dataset.schema.field(name).remove_metadata() for name in names]).empty_table()]
    stop = 0
    for entry in dataset.entries():
        start, stop = stop, stop + entry.num_rows
        wanted = rows_M[order[slice(*np.searchsorted(rows_M[order], (start, stop)))]] - start
        if len(wanted):
            pieces.append(dataset.read(entry, names).select(names).take(pa.array(wanted)).cast(pieces[0].schema))
    places = pa.concat_tables(pieces).take(pa.array(np.argsort(order)))
    columns = dict(scores) | {"label" if name == label else name: places.column(name) for name in names}
    return pa.table(columns)


def _duplicates_table(dataset: Dataset, copies: Duplicates, label: str | None) -> pa.Table:
    """The rows of every group, the largest group first."""
    rows_M = copies.grouped
    leader_M = copies.representative[rows_M]
    group_M = np.cumsum(leader_M == rows_M) - 1
    least_G = np.ones(group_M.max(initial=-1) + 1, np.float32)
    np.minimum.at(least_G, group_M, copies.similarity[rows_M])
    return _table(
        dataset,
        rows_M,
        label,
        {
            "group": group_M,
            "group_rows": np.bincount(group_M)[group_M],
            "group_least_similarity": least_G[group_M],
            "representative": leader_M == rows_M,
            "copy": copies.first[rows_M] != rows_M,
            "similarity": copies.similarity[rows_M],
        },
    )


def _outliers_table(dataset: Dataset, strange: Outliers, label: str | None) -> pa.Table:
    """The least typical images of each class, the strangest of all first."""
    columns = {"similarity": strange.similarity, "usual_similarity": strange.usual, "rank_in_class": strange.rank}
    return _table(dataset, strange.rows, label, columns)


def _label_errors_table(dataset: Dataset, wrong: LabelErrors, label: str, predicted: pa.Array) -> pa.Table:
    """The rows whose labels are least credible, the worst first."""
    columns = {
        "predicted": predicted,
        "probability_of_label": np.exp(wrong.log_label),
        "probability_of_predicted": np.exp(wrong.log_predicted),
        "margin": wrong.margin,
    }
    return _table(dataset, wrong.rows, label, columns)


def _duplicates_summary(dataset: Dataset, copies: Duplicates, targets_N: NDArray[np.int64]) -> dict[str, Any]:
    """Counts of rows, of images (equal bytes are one) and of groups."""
    entries = dataset.entries()
    shard_N = np.repeat(np.arange(len(entries)), [entry.num_rows for entry in entries])
    copied = copies.copies
    elsewhere = copied[shard_N[copied] != shard_N[copies.first[copied]]]
    is_image_N = copies.first == np.arange(len(copies.first))
    images_N = np.bincount(copies.representative[is_image_N], minlength=len(targets_N))
    rows_M = copies.grouped
    labelled = rows_M[targets_N[rows_M] >= 0]
    disagree = labelled[targets_N[labelled] != _lowest(targets_N, copies.representative, labelled)]
    middle, high = copies.chance
    return {
        "images": int(is_image_N.sum()),
        "copies": len(copied),
        "copied_images": len(np.unique(copies.first[copied])),
        "copied_across_shards": len(np.unique(copies.first[elsewhere])),
        "near_groups": int((images_N > 1).sum()),
        "near_images": int(images_N[images_N > 1].sum()),
        "superfluous_rows": int((copies.representative != np.arange(len(targets_N))).sum()),
        "groups_with_several_labels": len(np.unique(copies.representative[disagree])),
        "alike_pairs_share": copies.share,
        "chance_similarity": {"median": middle, "one_in_1000": high},
    }


def _lowest(targets_N: NDArray[np.int64], representative_N: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each row, the lowest class of these rows in its group."""
    lowest_N = np.full(len(targets_N), np.iinfo(np.int64).max)
    np.minimum.at(lowest_N, representative_N[rows], targets_N[rows])
    return lowest_N[representative_N[rows]]


def _label_errors_summary(wrong: LabelErrors) -> dict[str, Any]:
    return {
        "estimated": wrong.estimated,
        "listed": len(wrong.rows),
        "judged": wrong.num_judged,
        "not_judged": wrong.num_unjudged,
        "accuracy": wrong.accuracy,
        "C": wrong.C,
    }


def _first(table: pa.Table, which: str | None = None) -> dict[str, Any]:
    """The first few rows; of those that are marked, if need be."""
    return {"first": (table.filter(table.column(which)) if which else table).slice(0, SHOWN).to_pylist()}


def _warnings(
    label: str | None, classes: list[Any], wrong: LabelErrors | None, copies: Duplicates, threshold: float
) -> list[str]:
    found = []
    if label is None:
        found.append("There is no column `label`: without --label there are no label errors, and all rows are one class.")
    elif wrong is None:
        found.append(f"No label errors: column {label!r} has no two classes with two images each, but {len(classes)} in all.")
    elif wrong.num_unjudged:
        found.append(f"{wrong.num_unjudged:,} labels are of classes with a single image, and were not judged.")
    if copies.share > CROWDED:
        found.append(
            f"{copies.share:.0%} of all pairs are alike to {threshold:g}, so that says little; one random pair in 1,000"
            f" is alike to {copies.chance[1]:.3f}."
        )
    return found
