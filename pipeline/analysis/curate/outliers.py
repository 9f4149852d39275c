"""The least typical images of each class: those that resemble even the nearest others of their class little.

How typical an image is: the mean cosine with its `NEAREST` nearest neighbours in the class. With foreign pictures planted among
digits (`tests/benchmarks/curate.py`) that finds more of them than the distance to the class mean does, plain or whitened, and
also where a class has several kinds of pictures. Centred cosines are poor: what is far from everything has neighbours in its
direction.

Neighbours are looked for among `REFERENCE` random images of the class, so the time grows with N and not with N^2. Memory
besides the embeddings: those images as unit vectors, and 41 MB of similarities.

Legend: N rows, C images of one class, D features, R rows of a block, F references, M rows found.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.analysis.curate.directions import Directions

NEAREST = 20
"""More than a few, or a handful of foreign pictures that resemble each other would pass for typical."""
REFERENCE = 10_000
ROWS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Outliers:
    """Rows (M,), the one that falls most below what is usual in its class first."""

    rows: NDArray[np.int64]
    similarity: NDArray[np.float32]
    """Mean cosine with the nearest images of the class."""
    usual: NDArray[np.float32]
    """The median of that in the class."""
    rank: NDArray[np.int64]
    """In the class: 0 is the least typical."""
    num_judged: int
    """Distinct images that were looked at: those of a class with more than one."""


def find(features_ND: NDArray[np.float32], targets_N: NDArray[np.int64], first_N: NDArray[np.int64], most: int) -> Outliers:
    """The least typical images of each class.

    Args:
        features_ND: (N, D) float32, any scale; read a block at a time.
        targets_N: (N,) class indices. Rows without a label, which have -1, are a class of their own.
        first_N: (N,) the first row of equal bytes: copies would be each other's nearest neighbours.
        most: how many of each class.

    Raises:
        GuardError: an embedding holds a value that is not finite.
    """
    _, judged = np.unique((targets_N + 1) * len(first_N) + first_N, return_index=True)
    nothing = np.empty(0, np.int64)
    found = [(nothing, nothing.astype(np.float32), nothing.astype(np.float32), nothing)]
    num_judged = 0
    for target in np.unique(targets_N).tolist():
        rows_C = np.sort(judged[targets_N[judged] == target])
        if len(rows_C) > 1:
            num_judged += len(rows_C)
            similarity_C = typicality(Directions(features_ND, rows_C))
            least = np.argsort(similarity_C, kind="stable")[:most]
            usual = np.full(len(least), np.median(similarity_C), np.float32)
            found.append((rows_C[least], similarity_C[least], usual, np.arange(len(least))))
    rows, similarity, usual, rank = (np.concatenate(each) for each in zip(*found, strict=True))
    order = np.argsort(similarity - usual, kind="stable")
    return Outliers(rows=rows[order], similarity=similarity[order], usual=usual[order], rank=rank[order], num_judged=num_judged)


def typicality(directions: Directions) -> NDArray[np.float32]:
    """(C,) mean cosine of each image with its nearest neighbours; of fewer where there are not so many others."""
    count = len(directions)
    chosen_F = np.sort(np.random.default_rng(0).permutation(count)[:REFERENCE])
    references_FD = directions[chosen_F]
    number_C = np.full(count, -1)
    number_C[chosen_F] = np.arange(len(chosen_F))
    nearest = min(NEAREST, len(chosen_F) - 1)
    similarity_C = np.empty(count, np.float32)
    for start in range(0, count, ROWS):
        part = slice(start, start + ROWS)
        cosine_RF = directions[part] @ references_FD.T
        own_R = np.flatnonzero(number_C[part] >= 0)
        cosine_RF[own_R, number_C[part][own_R]] = -np.inf
        cosine_RF.partition(len(chosen_F) - nearest, axis=1)
        similarity_C[part] = cosine_RF[:, -nearest:].mean(1)
    return similarity_C
