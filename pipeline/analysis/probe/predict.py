"""A saved probe applied to a version of a dataset: rows in batches in, predictions out, to a file if one is wanted.

Memory: one row group of the dataset, and `ROWS_AT_ONCE` predictions. The file is published whole or not at all.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import recipe
from pipeline.analysis.probe.head import Head
from pipeline.analysis.probe.logistic import ROWS_BYTES
from pipeline.dataset.partition import list_values
from pipeline.dataset.read import Dataset
from pipeline.errors import ConfigError, DatasetError
from pipeline.storage import Store

ROWS_AT_ONCE = 65_536
"""Predictions that are written together: a row group of a Parquet file."""


def predictions(head: Head, features_ND: NDArray[np.float32]) -> dict[str, pa.Array]:
    """The most probable class of each row and its probability, as the columns `predicted` and `probability`.

    Args:
        head: a probe.
        features_ND: (N, D) float32, made as its `recipe` says.
    """
    best_N, probabilities_NK = head.predict(features_ND)
    of_class = {type(label) for label in head.classes}
    classes = pa.array(head.classes if len(of_class) == 1 else map(str, head.classes))
    return {
        "predicted": classes.take(pa.array(best_N)),
        "probability": pa.array(np.take_along_axis(probabilities_NK, best_N[:, None], 1)[:, 0]),
    }


def check(head: Head, dataset: Dataset) -> None:
    """Whether the probe was trained on embeddings such as these.

    Raises:
        DatasetError: the dataset has no such column, or its embeddings are made otherwise.
    """
    width = dataset.nodes.get(head.node)
    if width is None:
        have = ", ".join(dataset.nodes)
        raise DatasetError(f"{dataset.url}: the probe is for the column {head.node!r}; version {dataset.version} has {have}")
    reasons = [] if width == head.weight.shape[1] else [f"width: {head.weight.shape[1]} -> {width}"]
    if head.recipe:
        reasons += recipe.differences(head.recipe, recipe.of_column(dataset.recipe, head.node))
    if reasons:
        raise DatasetError(
            f"{dataset.url}: the probe was trained on other embeddings than those in {head.node!r} of version"
            f" {dataset.version}: {'; '.join(reasons)}"
        )


def predict(head: Head, dataset: Dataset, store: Store, destination: str | None = None) -> dict[str, Any]:
    """Apply a probe to every row.

    Args:
        head: the probe.
        dataset: a version.
        store: how `destination` is reached.
        destination: URL of a .parquet or .csv file with the columns `key`, `shard`, `predicted`, `probability` and, where the
            dataset has the column that the probe learned from, `label`; None for no file.

    Returns:
        `rows`; `predicted`, a list of class and number of rows, the most frequent first; `mean_probability`; `num_labelled`
        rows, and `num_agreeing`, those of them whose label is predicted.

    Raises:
        ConfigError: the destination is neither .parquet nor .csv.
        DatasetError: the probe is not for these embeddings.
    """
    if destination is not None and not destination.lower().endswith((".parquet", ".csv")):
        raise ConfigError(f"--to: {destination}: give the URL of a .parquet or .csv file")
    check(head, dataset)
    count: collections.Counter[Any] = collections.Counter()
    num_labelled = num_agreeing = 0
    total_probability = 0.0
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(store.publish(destination)) if destination is not None else None
        writer = None
        for table in _tables(head, dataset):
            predicted = table.column("predicted").to_pylist()
            count.update(predicted)
            total_probability += float(np.sum(table.column("probability").to_numpy(), dtype=np.float64))
            if "label" in table.schema.names:
                labels = [None if label != label else label for label in table.column("label").to_pylist()]
                num_labelled += sum(label is not None for label in labels)
                num_agreeing += sum(label == guess for label, guess in zip(labels, predicted, strict=True) if label is not None)
            if file is not None:
                writer = writer or stack.enter_context(_writer(file, destination or "", table.schema))
                writer.write(table)
    num_rows = count.total()
    return {
        "rows": num_rows,
        "predicted": [{"class": label, "rows": number} for label, number in count.most_common()],
        "mean_probability": total_probability / num_rows if num_rows else None,
        "num_labelled": num_labelled,
        "num_agreeing": num_agreeing,
    }


def _tables(head: Head, dataset: Dataset) -> Iterator[pa.Table]:
    """Predictions for the rows of a dataset, in its order, `ROWS_AT_ONCE` at a time; a table without rows where it has none."""
    width, num_classes = head.weight.shape[1], len(head.classes)
    others = list(dict.fromkeys(["key", "shard", *([head.label] if head.label in dataset.schema.names else [])]))
    batch_size = max(1, min(ROWS_AT_ONCE, ROWS_BYTES // (4 * width + 24 * num_classes)))
    empty = {name: pa.array([], dataset.schema.field(name).type) for name in others}
    waiting = [_named(head, empty, np.empty((0, width), np.float32))]
    num_waiting = 0
    for batch in dataset.iter_batches([*others, head.node], batch_size):
        features_ND = list_values(pa.chunked_array([batch.column(head.node)])).reshape(batch.num_rows, width)
        if num_waiting + batch.num_rows > ROWS_AT_ONCE:
            yield pa.concat_tables(waiting)
            waiting, num_waiting = [], 0
        waiting.append(_named(head, {name: batch.column(name) for name in others}, features_ND))
        num_waiting += batch.num_rows
    yield pa.concat_tables(waiting)


def _named(head: Head, others: dict[str, pa.Array], features_ND: NDArray[np.float32]) -> pa.Table:
    columns = {name: others[name] for name in ("key", "shard")} | predictions(head, features_ND)
    return pa.table(columns | {"label": others[head.label]} if head.label in others else columns)


def _writer(file: BinaryIO, url: str, schema: pa.Schema) -> Any:
    return (
        pa_csv.CSVWriter(file, schema) if url.lower().endswith(".csv") else pq.ParquetWriter(file, schema, compression="zstd")
    )
