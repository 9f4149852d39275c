"""Some rows of a dataset that stand for all of them: their embeddings and their other columns.

Legend: N rows of the dataset, M of the sample, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.dataset.read import Dataset

MAX_ROWS = 3000
MAX_BYTES = 64 << 20
"""Of the sample's embeddings: wide ones are fewer, so that the principal axes of any take seconds at most."""
SPREAD_BYTES = 4 << 30
"""Embeddings that are read through for a sample. Of larger datasets whole stretches are taken, from `STRETCHES` places."""
STRETCHES = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Rows of one version, in their order."""

    node: str
    positions: NDArray[np.int64]
    """(M,) where the rows stand in the dataset."""
    features: NDArray[np.float32]
    """(M, D), all finite."""
    rows: list[dict[str, Any]]
    """M, every column that is no embedding."""
    how: str
    """How they were chosen, for people."""


def draw(dataset: Dataset, node: str, most: int = MAX_ROWS) -> Sample:
    """Rows at equal distances, the same on every call. Rows that hold a value that is not finite are left out."""
    num_rows, row_bytes = len(dataset), 4 * dataset.nodes[node]
    wanted = min(num_rows, most, max(200, MAX_BYTES // row_bytes))
    if wanted == num_rows:
        positions_M, how = np.arange(num_rows), "all rows"
    elif num_rows * row_bytes <= SPREAD_BYTES:
        positions_M = (np.arange(wanted) * num_rows) // wanted
        how = f"{wanted:,} of {num_rows:,} rows, at equal distances"
    else:
        length = -(-wanted // STRETCHES)
        starts = np.linspace(0, num_rows - length, STRETCHES).astype(np.int64)
        positions_M = np.unique(starts[:, None] + np.arange(length))
        how = f"{len(positions_M):,} of {num_rows:,} rows, from {STRETCHES} places at equal distances"
    features_MD = dataset.to_numpy(node, positions_M)
    finite_M = np.isfinite(features_MD).all(axis=1)
    if not finite_M.all():
        how += f"; {np.count_nonzero(~finite_M):,} with values that are not finite are left out"
        positions_M, features_MD = positions_M[finite_M], features_MD[finite_M]
    rows = dataset.take(positions_M, dataset.columns).to_pylist()
    return Sample(node=node, positions=positions_M, features=features_MD, rows=rows, how=how)
