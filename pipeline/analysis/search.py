"""Rows of a dataset that are nearest to what somebody asks with: rows of its own by their keys, vectors, or images.

Images are embedded by whoever calls: this sees the dataset and no model. The search itself is `Dataset.search`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.config import RESERVED_COLUMNS
from pipeline.dataset.read import Dataset, Neighbours
from pipeline.dataset.topk import Metric
from pipeline.errors import ConfigError

ROW_COLUMNS = ("key", "label", "shard", "index")
"""Of a neighbour, beside what was carried along: enough to know the row and to find it again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """What is asked with."""

    name: str
    """What a person calls it: a key, a file, `vector 3`."""
    vector_D: NDArray[np.float32]
    row: Mapping[str, Any] | None = None
    """The row of the dataset that it is; it is left out of its own answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What was found for a query."""

    query: Query
    neighbours: Neighbours

    def rows(self) -> list[dict[str, Any]]:
        """The rows as mappings, best first."""
        rows: list[dict[str, Any]] = self.neighbours.rows.to_pylist()
        return rows

    def as_json(self) -> dict[str, Any]:
        """A mapping of plain values; what was carried along is in `columns`."""
        found = []
        for score, row in zip(self.neighbours.scores.tolist(), self.rows(), strict=True):
            carried = {name: _plain(value) for name, value in row.items() if name not in RESERVED_COLUMNS}
            place = {name: _plain(row[name]) for name in ROW_COLUMNS if name in row}
            found.append({"score": score, **place, "columns": carried})
        return {"query": self.query.name, "neighbours": found}


def by_keys(dataset: Dataset, keys: Sequence[str], node: str | None = None, shard: str | None = None) -> list[Query]:
    """Rows of the dataset as queries; see `Dataset.find`."""
    name = dataset.node(node)
    rows = dataset.find(keys, shard, [*dataset.columns, name])
    vectors_QD = rows.column(name).to_pylist()
    others = rows.drop_columns(name).to_pylist()
    return [
        Query(name=key, vector_D=np.array(vector_D, np.float32), row=row)
        for key, vector_D, row in zip(keys, vectors_QD, others, strict=True)
    ]


def by_vectors(name: str, payload: bytes) -> list[Query]:
    """The rows of a .npy file as queries.

    Args:
        name: of the file, for the error.
        payload: its bytes: numbers of shape (Q, D), or (D,) for one.

    Raises:
        ConfigError: it is nothing of the kind.
    """
    try:
        array = np.lib.format.read_array(io.BytesIO(payload), allow_pickle=False)
    except (ValueError, EOFError, MemoryError) as error:
        raise ConfigError(f"vectors: {name}: not a readable .npy file: {error}") from None
    if array.ndim not in (1, 2) or array.dtype.kind not in "fiu":
        raise ConfigError(
            f"vectors: {name}: shape {array.shape} of {array.dtype} is not allowed; allowed: numbers of shape (Q, D) or (D,)"
        )
    vectors_QD = np.atleast_2d(array).astype(np.float32)
    return [Query(name=f"vector {number}", vector_D=vector_D) for number, vector_D in enumerate(vectors_QD)]


def answers(
    dataset: Dataset,
    queries: Sequence[Query],
    k: int = 10,
    *,
    node: str | None = None,
    metric: Metric = "cosine",
    where: pc.Expression | None = None,
) -> list[Answer]:
    """The nearest rows of every query; see `Dataset.search`. A query that is a row of the dataset is not among its own."""
    more = any(query.row is not None for query in queries)
    vectors = np.stack([query.vector_D for query in queries]) if queries else np.empty((0, dataset.nodes[dataset.node(node)]))
    found = dataset.search(vectors, k + (more and k > 0), node=node, metric=metric, where=where)
    return [
        Answer(query=query, neighbours=_others(neighbours, query.row, k))
        for query, neighbours in zip(queries, found, strict=True)
    ]


def _others(neighbours: Neighbours, row: Mapping[str, Any] | None, k: int) -> Neighbours:
    """The first k, without one row."""
    places = zip(*(neighbours.rows.column(name).to_pylist() for name in ("shard", "key")), strict=True)
    kept = [number for number, place in enumerate(places) if row is None or place != (row["shard"], row["key"])][:k]
    return Neighbours(neighbours.scores[kept], neighbours.positions[kept], neighbours.rows.take(pa.array(kept, pa.int64())))


def _plain(value: Any) -> Any:
    """JSON knows no NaN."""
    return None if value != value else value
