"""How well a classifier does on rows that it has not seen: its probabilities, and the scores made from them.

Legend: N rows, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.analysis.logistic import chunks

NUM_BINS, NUM_RESAMPLES, TOP = 15, 1000, 5


def log_probabilities(
    features_ND: NDArray[np.float32], weight_KD: NDArray[np.float32], bias_K: NDArray[np.float32]
) -> NDArray[np.float64]:
    """(N, K), finite even where a probability is too small for a float."""
    logits_NK = (features_ND @ weight_KD.T + bias_K).astype(np.float64)
    logits_NK -= logits_NK.max(1, keepdims=True)
    logits_NK -= np.log(np.exp(logits_NK).sum(1, keepdims=True))
    return logits_NK


def score(
    features_ND: NDArray[np.float32],
    targets_N: NDArray[np.int64],
    test: NDArray[np.int64],
    content_hashes: Sequence[str],
    weight_KD: NDArray[np.float32],
    bias_K: NDArray[np.float32],
    seed: int,
) -> dict[str, Any]:
    """Scores of the folded weights, the ones that are handed out, on the test rows."""
    num_classes = len(weight_KD)
    predicted, rank = np.empty(len(test), np.int64), np.empty(len(test), np.int64)
    confidence, log_true = np.empty(len(test)), np.empty(len(test))
    for start, rows in chunks(test, 4 * features_ND.shape[1] + 24 * num_classes):
        piece = slice(start, start + len(rows))
        log_NK = log_probabilities(features_ND[rows], weight_KD, bias_K)
        predicted[piece], confidence[piece] = log_NK.argmax(1), np.exp(log_NK.max(1))
        log_true[piece] = log_NK[np.arange(len(rows)), targets_N[rows]]
        rank[piece] = (log_NK >= log_true[piece, None]).sum(1)
    true, right = targets_N[test], predicted == targets_N[test]

    confusion_KK = np.bincount(true * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)
    count_K = confusion_KK.sum(1)
    per_class = confusion_KK.diagonal()[count_K > 0] / count_K[count_K > 0]
    bins = np.minimum((confidence * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    gap = np.bincount(bins, right - confidence, NUM_BINS)  # accuracy minus confidence, times the number of rows in the bin
    scores = {
        "test_accuracy": float(right.mean()),
        "mean_per_class_accuracy": float(per_class.mean()),
        "test_nll": float(-log_true.mean()),
        "test_ece": float(np.abs(gap).sum() / len(test)),
        "interval": interval([content_hashes[row] for row in test.tolist()], right, seed),
        "confusion": confusion_KK.tolist(),
    }
    return scores | ({"test_top5": float((rank <= TOP).mean())} if num_classes > TOP else {})


def interval(content_hashes: Sequence[str], right_N: NDArray[np.bool_], seed: int) -> list[float]:
    """95 % bootstrap interval [low, high] of the accuracy.

    The unit that is drawn is the distinct hash, because copies are right or wrong together. Hashes with as many rows and as
    many right ones are alike, so it is enough to draw how many of each kind there are.
    """
    _, code_N = np.unique(np.asarray(content_hashes), return_inverse=True)
    rows_and_right_H2 = np.stack([np.bincount(code_N), np.bincount(code_N, right_N).astype(np.int64)], 1)
    kinds, counts = np.unique(rows_and_right_H2, axis=0, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), size=NUM_RESAMPLES)
    low, high = np.quantile((draws @ kinds[:, 1]) / (draws @ kinds[:, 0]), [0.025, 0.975])
    return [float(low), float(high)]
