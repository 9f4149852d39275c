"""The k best rows of many for each of some queries, exactly, in one pass over blocks of rows.

Lies here and not in `analysis/`, because `Dataset.search` offers it and imports only point up.

A score is the product of query and row in float64 (of both divided by their norms, for the cosine), rounded to float32. Equal
scores are in the order of the rows. So the answer depends neither on how the rows were cut into blocks, nor on the other
queries, nor on the library that multiplies: products in float32 only choose candidates, with room for all that they can be
wrong by. Rows that hold NaN or infinity have no score and never win. The cosine with a zero vector is 0.

Memory of each thread that looks at a block, besides the block: `PRODUCTS_BYTES` 3 times, or 5 times where all rows are alike,
and `CANDIDATES_BYTES` twice. In all for each query 12 bytes a value, and 80 for each of its k.

Shapes: B rows of a block, N of all, D values, Q queries, M candidates.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from pipeline.ahead import ahead
from pipeline.errors import ConfigError

Metric = Literal["cosine", "inner"]

ARRAY_BYTES, FEW_ARRAY_BYTES = 8 << 20, 64 << 20
"""Of an array so many rows at a time. For a matrix product so few that its scores are still in the cores' caches when they are
looked at (205 MB and 100 queries: 110 ms, at 32 MiB 150). For few queries so many that threads seldom wait for each other in
the Python between the products (one query: 11 ms, at 32 MiB 13)."""
PRODUCTS_BYTES = 4 << 20
"""A block is multiplied with so many queries at a time as this holds products of."""
CANDIDATES_BYTES = 4 << 20
"""So many candidates are looked at at a time, in float64."""
CACHED_BYTES = 2 << 20
"""Of rows that are read twice while they are in a core's cache, for products and norms."""
FEW_QUERIES = 12
"""Up to so many are multiplied one by one, each thread its rows. For 205 MB and one query that takes 8 ms of a core and the
matrix product 19; at 10 queries they are equal, and the threads of the matrix product wait for each other."""
MAX_THREADS = 8
_RANGE = 1e-30, 1e30
"""Squared norms of rows whose products in float32 lose nothing to its range."""
_LOWEST = np.finfo(np.float32).min
_SPARSE = 0.5
"""When fewer of a block's rows are meant they are copied out before the product, else all take part in it."""


def nearest_rows(
    embeddings_ND: NDArray[np.float32], queries_QD: NDArray[np.float32], k: int, metric: Metric = "cosine"
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k rows of an array that are nearest to each query.

    Args:
        embeddings_ND: (N, D) numbers.
        queries_QD: (Q, D) numbers.
        k: how many.
        metric: `cosine` or `inner`.

    Returns:
        Scores (Q, K) float32, best first, and rows (Q, K) int64, with K = min(k, N). Where fewer rows have a score the rest is
        -inf and -1.

    Raises:
        ConfigError: metric or k is not allowed, or the queries do not fit.
    """
    num_rows, width = embeddings_ND.shape
    best = TopK(queries_QD, k, metric, num_rows=num_rows, width=width)
    num_threads, step = shares(num_rows, width, FEW_ARRAY_BYTES if len(queries_QD) <= FEW_QUERIES else ARRAY_BYTES)

    def look(start: int) -> Candidates:
        return best.candidates(np.asarray(embeddings_ND[start : start + step], np.float32), start)

    with ThreadPoolExecutor(num_threads) as pool:
        for found in ahead(pool, look, range(0, num_rows, step), num_threads + 1):
            best.merge(found)
    return best.scores_QK, best.rows_QK


def shares(num_rows: int, width: int, block_bytes: int) -> tuple[int, int]:
    """How many threads to use, and how many rows to give one of them at a time so that each gets as many."""
    num_threads = min(MAX_THREADS, os.cpu_count() or 1)
    num_blocks = -(-num_rows * 4 * width // block_bytes)
    return num_threads, max(1, -(-num_rows // max(1, -(-num_blocks // num_threads) * num_threads)))


class Rows(Protocol):
    """Rows of a block (B, D) float32, wherever they lie."""

    def __len__(self) -> int: ...

    def parts(self) -> Iterator[NDArray[np.float32]]:
        """All of them in order, as many at a time as a core's cache holds; each part may be gone when the next one comes."""
        ...

    def take(self, rows_M: NDArray[np.int64], /) -> NDArray[np.float32]:
        """Single ones."""
        ...

    def whole(self) -> NDArray[np.float32]:
        """All of them in memory."""
        ...


class _Array:
    """Rows that are in memory."""

    def __init__(self, block_BD: NDArray[np.float32]) -> None:
        self._block_BD = block_BD

    def __len__(self) -> int:
        return len(self._block_BD)

    def parts(self) -> Iterator[NDArray[np.float32]]:
        step = cached_rows(self._block_BD.shape[1])
        return (self._block_BD[first : first + step] for first in range(0, len(self), step))

    def take(self, rows_M: NDArray[np.int64], /) -> NDArray[np.float32]:
        return self._block_BD[rows_M]

    def whole(self) -> NDArray[np.float32]:
        return self._block_BD


def cached_rows(width: int) -> int:
    """Rows that a core's cache holds, or one."""
    return max(1, CACHED_BYTES // (4 * max(1, width)))


class Candidates(NamedTuple):
    """Pairs of query and row that may be among the best."""

    queries_M: NDArray[np.int64]
    rows_M: NDArray[np.int64]
    scores_M: NDArray[np.float32]


class TopK:
    """The best rows so far. Many threads may look for candidates while one merges them.

    Attributes:
        scores_QK: (Q, K) float32, best first; -inf where there is no row yet.
        rows_QK: (Q, K) int64; -1 where there is no row yet.
    """

    def __init__(self, queries_QD: NDArray[np.float32], k: int, metric: Metric, *, num_rows: int, width: int) -> None:
        if metric not in get_args(Metric):
            raise ConfigError(f"metric: {metric!r} is not allowed; allowed: {', '.join(get_args(Metric))}")
        if k < 1:
            raise ConfigError(f"k: {k} is not allowed; at least 1")
        exact_QD = np.asarray(queries_QD, np.float64)
        if exact_QD.ndim != 2 or exact_QD.shape[1] != width:
            raise ConfigError(f"vectors: shape {exact_QD.shape} does not fit; allowed: (number of queries, {width})")
        if not np.isfinite(exact_QD).all():
            first = int(np.argmin(np.isfinite(exact_QD).all(axis=1)))
            raise ConfigError(f"vectors: query {first} holds values that are not finite")
        self._is_cosine = metric == "cosine"
        norms_Q = np.sqrt(np.vecdot(exact_QD, exact_QD))
        if self._is_cosine:
            exact_QD = exact_QD / np.where(norms_Q > 0, norms_Q, 1)[:, None]
        self._exact_QD, self._queries_QD = exact_QD, exact_QD.astype(np.float32)
        # Twice what float32 can be wrong by over D products, a norm of D squares and the roundings around them.
        self._slack_Q = (2 * width + 8) * 2.0**-23 * (np.ones_like(norms_Q) if self._is_cosine else norms_Q)
        self._multiplying = threading.Lock()
        self.scores_QK = np.full((len(exact_QD), min(k, num_rows)), -np.inf, np.float32)
        self.rows_QK = np.full(self.scores_QK.shape, -1, np.int64)

    def candidates(
        self, block: Rows | NDArray[np.float32], start: int, chosen_M: NDArray[np.int64] | None = None
    ) -> Candidates:
        """Rows of a block that may be among the best, with their scores.

        Args:
            block: (B, D) float32; an array may be changed afterwards.
            start: number of the block's first row.
            chosen_M: ascending positions in the block of the rows that are meant; all when left out.
        """
        rows: Rows = _Array(block) if isinstance(block, np.ndarray) else block
        if chosen_M is not None or len(self._queries_QD) > FEW_QUERIES:
            rows = _Array(rows.whole())
        numbers_B, meant_B = np.arange(start, start + len(rows)), np.ones(len(rows), np.bool_)
        if chosen_M is not None and len(chosen_M) < _SPARSE * len(rows):
            rows, numbers_B, meant_B = _Array(rows.take(chosen_M)), numbers_B[chosen_M], meant_B[chosen_M]
        elif chosen_M is not None:
            meant_B[:] = False
            meant_B[chosen_M] = True
        num_queries, k = self.rows_QK.shape
        few_BQ, squares_B = self._products_and_squares(rows)
        plain_B, odd_M = _kinds(rows, squares_B, meant_B)
        # Rows that only float64 can multiply are candidates for every query; there are hardly ever any.
        odd = np.add.outer(odd_M * num_queries, np.arange(num_queries)).ravel()
        found = [self._exact(rows, odd, slice(0, num_queries))]
        step = max(1, PRODUCTS_BYTES // (4 * max(1, len(rows))))
        for first in range(0, num_queries if len(rows) else 0, step):
            some = slice(first, min(first + step, num_queries))
            with np.errstate(over="ignore", invalid="ignore"):
                scores_BQ = few_BQ[:, some] if few_BQ is not None else self._products(rows.whole(), some)
            found.append(self._exact(rows, self._hits(scores_BQ, squares_B, plain_B, some), some))
        best = _best(found, k)
        return best._replace(rows_M=numbers_B[best.rows_M])

    def merge(self, found: Candidates) -> None:
        """Keep the k best of what was kept and what was found."""
        k, touched = self.rows_QK.shape[1], np.unique(found.queries_M)
        kept = Candidates(np.repeat(touched, k), self.rows_QK[touched].ravel(), self.scores_QK[touched].ravel())
        best = _best([kept, found], k)  # k of every query: so many there were
        self.scores_QK[touched] = best.scores_M.reshape(-1, k)
        self.rows_QK[touched] = best.rows_M.reshape(-1, k)

    def _products(self, block_BD: NDArray[np.float32], queries: slice) -> NDArray[np.float32]:
        """(B, Q)"""
        with self._multiplying:  # it has threads of its own, and others that call it meanwhile would spin
            return block_BD @ self._queries_QD[queries].T

    def _products_and_squares(self, rows: Rows) -> tuple[NDArray[np.float32] | None, NDArray[np.float32]]:
        """Products (B, Q) where the queries are few, and squared norms (B,)."""
        is_few = len(self._queries_QD) <= FEW_QUERIES
        products_BQ = np.empty((len(rows), len(self._queries_QD)), np.float32) if is_few else None
        squares_B, first = np.empty(len(rows), np.float32), 0
        with np.errstate(over="ignore", invalid="ignore"):
            for part_PD in rows.parts():
                some = slice(first, first + len(part_PD))
                np.vecdot(part_PD, part_PD, out=squares_B[some])
                if products_BQ is not None:
                    np.vecdot(part_PD[:, None], self._queries_QD, out=products_BQ[some])
                first = some.stop
        return products_BQ, squares_B

    def _hits(
        self,
        scores_BQ: NDArray[np.float32],
        squares_B: NDArray[np.float32],
        plain_B: NDArray[np.bool_],
        queries: slice,
    ) -> NDArray[np.int64]:
        """Positions in the flattened (B, Q) of the scores that may be among the k best. Changes the scores."""
        k, num_rows, slack_Q = self.rows_QK.shape[1], len(scores_BQ), self._slack_Q[queries]
        if self._is_cosine:
            scores_BQ /= np.sqrt(np.where(plain_B & (squares_B > 0), squares_B, 1))[:, None]
        else:
            slack_Q = slack_Q * np.sqrt(squares_B.max(initial=0, where=plain_B))
        if not plain_B.all():
            scores_BQ[~plain_B] = -np.inf
        # What is no candidate is -inf, so the limit never is.
        limit_Q = np.maximum(self.scores_QK[queries, -1] - slack_Q, _LOWEST).astype(np.float32)
        hits = np.flatnonzero(scores_BQ >= limit_Q)
        if len(hits) <= (4 * k + 64) * len(limit_Q) or num_rows <= k:
            return hits
        # The best so far are not good yet, or every row is as good as another: the k best of this block set the limit.
        crowded = np.flatnonzero(np.bincount(hits % len(limit_Q), minlength=len(limit_Q)) > 4 * k + 64)
        crowded_QB = np.take(scores_BQ.T, crowded, axis=0)
        crowded_QB.partition(num_rows - k, axis=1)
        limit_Q[crowded] = np.maximum(limit_Q[crowded], crowded_QB[:, num_rows - k] - slack_Q[crowded])
        return np.flatnonzero(scores_BQ >= limit_Q)

    def _exact(self, rows: Rows, pairs: NDArray[np.int64], queries: slice) -> Candidates:
        """The k best of each query by their scores as they are defined.

        Args:
            rows: the block.
            pairs: of row and query, as positions in the flattened (B, Q).
            queries: which ones.
        """
        nothing = np.empty(0, np.int64)
        best = Candidates(nothing, nothing, np.empty(0, np.float32))
        step = max(1, CANDIDATES_BYTES // (8 * max(1, self._queries_QD.shape[1])))
        for first in range(0, len(pairs), step):
            rows_C, queries_C = np.divmod(pairs[first : first + step], queries.stop - queries.start)
            queries_C += queries.start
            rows_CD = rows.take(rows_C).astype(np.float64)
            scores_C = np.vecdot(rows_CD, self._exact_QD[queries_C])
            if self._is_cosine:
                norms_C = np.sqrt(np.vecdot(rows_CD, rows_CD))
                scores_C /= np.where(norms_C > 0, norms_C, 1)
            best = _best([best, Candidates(queries_C, rows_C, scores_C.astype(np.float32))], self.rows_QK.shape[1])
        return best


def _best(found: Sequence[Candidates], k: int) -> Candidates:
    """The k best of each query, queries ascending, the best first."""
    queries_M, rows_M, scores_M = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    order = np.lexsort((rows_M, -scores_M, queries_M))
    queries_M = queries_M[order]
    is_among_M = np.arange(len(order)) - np.searchsorted(queries_M, queries_M) < k
    order = order[is_among_M]
    return Candidates(queries_M[is_among_M], rows_M[order], scores_M[order])


def _kinds(
    rows: Rows, squares_B: NDArray[np.float32], meant_B: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Of the rows that are meant: those that float32 can multiply (B,), and positions (M,) of those that only float64 can.

    Neither are rows that hold NaN or infinity.
    """
    plain_B = (squares_B >= _RANGE[0]) & (squares_B <= _RANGE[1])
    rows_M = np.flatnonzero(~plain_B & meant_B)
    values_MD = rows.take(rows_M)
    is_zero_M = ~values_MD.any(axis=1)
    plain_B[rows_M[is_zero_M]] = True
    return plain_B & meant_B, rows_M[np.isfinite(values_MD).all(axis=1) & ~is_zero_M]
