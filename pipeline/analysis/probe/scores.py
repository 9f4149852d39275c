"""How well a classifier does on rows that it has not seen: scores made from its probabilities.

Legend: N rows, D features, K classes, B bins of confidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.analysis.probe.head import Head
from pipeline.analysis.probe.logistic import chunks

NUM_BINS, NUM_RESAMPLES, TOP = 15, 1000, 5


def score(
    features_ND: NDArray[np.float32],
    targets_N: NDArray[np.int64],
    test: NDArray[np.int64],
    units_N: NDArray[np.int64],
    head: Head,
    seed: int,
) -> dict[str, Any]:
    """Scores of the head, as it is handed out, on the test rows.

    Args:
        features_ND: (N, D) float32.
        targets_N: (N,) positions in the head's classes.
        test: the rows to score.
        units_N: (N,) equal for rows that are right or wrong together: copies, rows of one group.
        head: weights for these features.
        seed: of the bootstrap.
    """
    num_classes = len(head.classes)
    predicted, rank = np.empty(len(test), np.int64), np.empty(len(test), np.int64)
    confidence, log_true = np.empty(len(test)), np.empty(len(test))
    for start, rows in chunks(test, 4 * features_ND.shape[1] + 24 * num_classes):
        piece = slice(start, start + len(rows))
        log_NK = head.log_probabilities(features_ND[rows])
        predicted[piece], confidence[piece] = log_NK.argmax(1), np.exp(log_NK.max(1))
        log_true[piece] = log_NK[np.arange(len(rows)), targets_N[rows]]
        rank[piece] = (log_NK >= log_true[piece, None]).sum(1)
    true, right = targets_N[test], predicted == targets_N[test]

    confusion_KK = np.bincount(true * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)
    count_K = confusion_KK.sum(1)
    seen_K = np.flatnonzero(count_K)
    per_class = confusion_KK.diagonal()[seen_K] / count_K[seen_K]
    bins = np.minimum((confidence * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    count_B, confidence_B, right_B = (np.bincount(bins, each, NUM_BINS) for each in (None, confidence, right))
    seen_B = np.flatnonzero(count_B)
    reliability = [
        {"confidence": float(confidence_B[bin] / count_B[bin]), "accuracy": float(right_B[bin] / count_B[bin]),
         "num_test": int(count_B[bin])}
        for bin in seen_B
    ]  # fmt: skip
    classes = [
        {"class": head.classes[row], "accuracy": float(share), "num_test": int(count_K[row])}
        for row, share in zip(seen_K.tolist(), per_class, strict=True)
    ]
    scores = {
        "test_accuracy": float(right.mean()),
        "mean_per_class_accuracy": float(per_class.mean()),
        "per_class": classes,
        "worst_classes": sorted(classes, key=lambda each: each["accuracy"])[:TOP],
        "test_nll": float(-log_true.mean()),
        "test_ece": float(np.abs(right_B - confidence_B).sum() / len(test)),
        "reliability": reliability,
        "interval": interval(units_N[test], right, seed),
        "confusion": confusion_KK.tolist(),
    }
    return scores | ({"test_top5": float((rank <= TOP).mean())} if num_classes > TOP else {})


def interval(units: Sequence[Any] | NDArray[Any], right_N: NDArray[np.bool_], seed: int) -> list[float]:
    """95 % bootstrap interval [low, high] of the accuracy.

    What is drawn is the unit, because copies are right or wrong together, and rows of one group often. Units with as many rows
    and as many right ones are alike, so it is enough to draw how many of each kind there are.
    """
    _, code_N = np.unique(np.asarray(units), return_inverse=True)
    rows_and_right_U2 = np.stack([np.bincount(code_N), np.bincount(code_N, right_N).astype(np.int64)], 1)
    kinds, counts = np.unique(rows_and_right_U2, axis=0, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), size=NUM_RESAMPLES)
    low, high = np.quantile((draws @ kinds[:, 1]) / (draws @ kinds[:, 0]), [0.025, 0.975])
    return [float(low), float(high)]
