"""The k nearest rows of arrays, held against a product of everything in float64."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.dataset import topk
from pipeline.dataset.topk import Metric, TopK, nearest_rows
from pipeline.errors import ConfigError

METRICS: tuple[Metric, ...] = ("cosine", "inner")


def expected(
    rows_ND: NDArray[Any], queries_QD: NDArray[Any], k: int, metric: Metric
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """What `topk.py` says that a score and an order are, as straight as can be."""
    rows_ND, queries_QD = rows_ND.astype(np.float64), queries_QD.astype(np.float64)
    with np.errstate(all="ignore"):
        scores_QN = queries_QD @ rows_ND.T
        if metric == "cosine":
            lengths_QN = np.linalg.norm(queries_QD, axis=1)[:, None] * np.linalg.norm(rows_ND, axis=1)
            scores_QN = np.where(lengths_QN > 0, scores_QN / lengths_QN, 0)
        scores_QN = scores_QN.astype(np.float32)
    scores_QN[:, ~np.isfinite(rows_ND).all(axis=1)] = -np.inf
    order_QK = np.argsort(-scores_QN, axis=1, kind="stable")[:, :k]
    scores_QK = np.take_along_axis(scores_QN, order_QK, axis=1)
    return scores_QK, np.where(np.isneginf(scores_QK), -1, order_QK)


def gaussian(num_rows: int, width: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((num_rows, width)).astype(np.float32)


def copies(rows_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    """Every row many times."""
    return rows_ND[np.random.default_rng(1).integers(0, max(1, len(rows_ND) // 20), len(rows_ND))]


def not_finite(rows_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    random = np.random.default_rng(1)
    rows_ND[random.random(len(rows_ND)) < 0.3, 0] = np.nan
    rows_ND[random.random(len(rows_ND)) < 0.2, -1] = np.inf
    rows_ND[random.random(len(rows_ND)) < 0.1, 1] = -np.inf
    return rows_ND


def with_zeros(rows_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    rows_ND[::3] = 0
    return -np.abs(rows_ND)


def of_all_sizes(rows_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    """Norms whose squares are beyond float32 on both sides."""
    return rows_ND * (10.0 ** np.random.default_rng(1).integers(-25, 18, (len(rows_ND), 1))).astype(np.float32)


def nearly_alike(rows_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scores that float32 products confuse."""
    return 1 + rows_ND * np.float32(1e-4)


def ascending(rows_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    """Every row beats those before it."""
    return rows_ND[np.argsort(rows_ND @ gaussian(5, rows_ND.shape[1], seed=9)[0])]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("change", [np.copy, copies, not_finite, with_zeros, of_all_sizes, nearly_alike, ascending])
def test_rows_and_scores_are_those_of_the_whole_product_however_it_is_cut(
    change: Any, metric: Metric, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_ND, queries_QD = change(gaussian(700, 24)), gaussian(5, 24, seed=9)
    if change is nearly_alike:
        queries_QD = nearly_alike(queries_QD)
    if change is with_zeros:
        queries_QD = np.abs(queries_QD)
        queries_QD[1] = 0
    scores_QK, found_QK = expected(rows_ND, queries_QD, 12, metric)
    cuts = ((1000, 1 << 20, 1 << 20, 12), (7, 4 * 7 * 2, 1, 0), (64, 1, 24 * 8 * 3, 12), (64, 1 << 20, 1 << 20, 0))
    for block_rows, products, candidates, few in cuts:
        monkeypatch.setattr(topk, "FEW_QUERIES", few)
        monkeypatch.setattr(topk, "ARRAY_BYTES", block_rows * 24 * 4)
        monkeypatch.setattr(topk, "PRODUCTS_BYTES", products)
        monkeypatch.setattr(topk, "CANDIDATES_BYTES", candidates)
        scores, rows = nearest_rows(rows_ND, queries_QD, 12, metric)
        assert np.array_equal(rows, found_QK)
        assert np.array_equal(scores, scores_QK)
        assert (scores.dtype, rows.dtype) == (np.float32, np.int64)


def test_equal_rows_are_in_the_order_of_the_rows_even_when_blocks_are_not() -> None:
    rows_ND = np.tile(gaussian(3, 300), (50, 1))
    best = TopK(rows_ND[:1], 20, "cosine", num_rows=150, width=300)
    for start in (100, 0, 50):
        best.merge(best.candidates(rows_ND[start : start + 50], start))
    assert best.rows_QK[0].tolist() == list(range(0, 60, 3))
    assert best.scores_QK[0].tolist() == [1.0] * 20


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.4, 0.6, 1.0])
def test_rows_that_are_not_meant_never_win(share: float, metric: Metric) -> None:
    rows_ND, queries_QD = of_all_sizes(gaussian(400, 16)), gaussian(4, 16, seed=9)
    meant_N = np.random.default_rng(2).random(400) < share
    best = TopK(queries_QD, 10, metric, num_rows=400, width=16)
    for start in range(0, 400, 100):
        chosen = np.flatnonzero(meant_N[start : start + 100])
        best.merge(best.candidates(rows_ND[start : start + 100], start, chosen))
    left = np.where(meant_N[:, None], rows_ND, np.nan)
    scores_QK, found_QK = expected(left, queries_QD, 10, metric)
    assert np.array_equal(best.rows_QK, found_QK)
    assert np.array_equal(best.scores_QK, scores_QK)


def test_fewer_rows_than_asked_for() -> None:
    rows_ND = gaussian(4, 8)
    rows_ND[2, 3] = np.nan
    scores, rows = nearest_rows(rows_ND, rows_ND[:1], 10)
    assert scores.shape == (1, 4)
    assert rows[0, 0] == 0
    assert (rows[0, 3], scores[0, 3]) == (-1, -np.inf)
    assert [each.shape for each in nearest_rows(rows_ND[:0], rows_ND[:1], 10)] == [(1, 0), (1, 0)]
    assert [each.shape for each in nearest_rows(rows_ND, rows_ND[:0], 3)] == [(0, 3), (0, 3)]


def test_arrays_of_other_kinds_are_taken_a_block_at_a_time() -> None:
    rows_ND, queries_QD = gaussian(300, 16), gaussian(3, 16, seed=9)
    wanted = nearest_rows(rows_ND.astype(np.float16).astype(np.float32), queries_QD, 5)
    for other in (rows_ND.astype(np.float16), np.asfortranarray(rows_ND.astype(np.float16).astype(np.float64))):
        assert all(np.array_equal(a, b) for a, b in zip(nearest_rows(other, queries_QD, 5), wanted, strict=True))


@pytest.mark.parametrize(("num_rows", "num_queries", "is_alike"), [(20_000, 2000, False), (16_000, 300, True)])
def test_memory_does_not_follow_the_number_of_rows_times_queries(
    num_rows: int, num_queries: int, is_alike: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    rows_ND, queries_QD = gaussian(num_rows, 32), gaussian(num_queries, 32, seed=9)
    if is_alike:
        rows_ND[:] = queries_QD[:] = 1
    tracemalloc.start()
    try:
        nearest_rows(rows_ND, queries_QD, 5)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    limit = (5 if is_alike else 3) * topk.PRODUCTS_BYTES + 2 * topk.CANDIDATES_BYTES + num_queries * (12 * 32 + 80 * 5)
    assert peak_bytes < limit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k: 0 is not allowed; at least 1"),
        ({"metric": "l2"}, "metric: 'l2' is not allowed; allowed: cosine, inner"),
        ({"queries": np.ones((2, 5))}, r"vectors: shape \(2, 5\) does not fit; allowed: \(number of queries, 4\)"),
        ({"queries": np.ones(4)}, r"vectors: shape \(4,\) does not fit"),
        ({"queries": np.array([[1, 2, 3, 4], [1, np.nan, 3, 4]])}, "vectors: query 1 holds values that are not finite"),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str) -> None:
    arguments = {"queries": np.ones((1, 4)), "k": 3, "metric": "cosine"} | changes
    with pytest.raises(ConfigError, match=message):
        nearest_rows(gaussian(10, 4), arguments["queries"], arguments["k"], arguments["metric"])
