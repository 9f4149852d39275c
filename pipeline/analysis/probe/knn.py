"""Nearest neighbours on the same split as the probe: what the features tell without any training.

As DINOv2 does it: features divided by their norms, the k nearest by cosine vote with weight exp(cosine / 0.07). k is 10, 20,
100 or 200, chosen on validation, or on `CHOOSE_ON` rows of it, and scored on all of test.

Legend: N rows of the bank, Q queries, D features, K classes, T neighbours kept.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.analysis.probe.logistic import LOGITS_BYTES, pieces

if TYPE_CHECKING:
    import torch

NUMBERS = (10, 20, 100, 200)
TEMPERATURE = 0.07
CHOOSE_ON = 2000
"""Validation rows, evenly spread, that are enough to tell values of k apart: the cost is that of every pair of rows."""
QUERIES = 1024
"""Compared at a time with as much of the bank as gives `LOGITS_BYTES` of cosines."""


def score(
    features_ND: NDArray[np.float32],
    targets_N: NDArray[np.int64],
    train: NDArray[np.int64],
    validation: NDArray[np.int64],
    test: NDArray[np.int64],
    num_classes: int,
    device: str,
) -> dict[str, Any]:
    """k with its accuracies: train votes on validation, train and validation vote on test.

    Memory on the device: one float32 copy of the rows that vote, and twice `LOGITS_BYTES`.
    """
    started = time.perf_counter()
    validated = validation[np.linspace(0, len(validation) - 1, min(CHOOSE_ON, len(validation))).round().astype(np.int64)]
    numbers = [k for k in NUMBERS if k <= len(train)] or [len(train)]
    found = _accuracies(features_ND, targets_N, train, validated, numbers, num_classes, device)
    best = max(numbers, key=lambda k: (found[k], -k))
    bank = np.sort(np.concatenate([train, validation]))
    tested = _accuracies(features_ND, targets_N, bank, test, [best], num_classes, device)
    return {
        "k": best,
        "validation_accuracy": found[best],
        "test_accuracy": tested[best],
        "seconds": time.perf_counter() - started,
    }


def _accuracies(
    features_ND: NDArray[np.float32],
    targets_N: NDArray[np.int64],
    bank: NDArray[np.int64],
    queries: NDArray[np.int64],
    numbers: list[int],
    num_classes: int,
    device: str,
) -> dict[int, float]:
    """k to the share of queries whose class wins the vote of the k nearest of the bank."""
    import torch

    bank_ND = torch.empty(len(bank), features_ND.shape[1], dtype=torch.float32, device=device)
    for where, piece_ND in pieces(features_ND, bank, "l2", device):
        bank_ND[where] = piece_ND
    classes_N = torch.from_numpy(targets_N[bank]).to(device)
    hits = dict.fromkeys(numbers, 0)
    for where, piece_QD in pieces(features_ND, queries, "l2", device):
        targets_Q = torch.from_numpy(targets_N[queries[where]]).to(device)
        for start in range(0, len(piece_QD), QUERIES):
            some = slice(start, start + QUERIES)
            cosines_QT, nearest_QT = _nearest(piece_QD[some], bank_ND, max(numbers))
            weights_QT = ((cosines_QT - cosines_QT[:, :1]) / TEMPERATURE).exp_()
            for k in numbers:
                votes_QK = weights_QT.new_zeros(len(weights_QT), num_classes)
                votes_QK.scatter_add_(1, classes_N[nearest_QT[:, :k]], weights_QT[:, :k])
                hits[k] += int((votes_QK.argmax(1) == targets_Q[some]).sum())
    return {k: hits[k] / len(queries) for k in numbers}


def _nearest(queries_QD: torch.Tensor, bank_ND: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines (Q, T), falling, and rows of the bank (Q, T)."""
    import torch

    cosines_QT = queries_QD.new_empty(len(queries_QD), 0)
    rows_QT = torch.empty(len(queries_QD), 0, dtype=torch.int64, device=queries_QD.device)
    step = LOGITS_BYTES // (4 * QUERIES)
    for start in range(0, len(bank_ND), step):
        part_QN = queries_QD @ bank_ND[start : start + step].T
        found_QT, where_QT = part_QN.topk(min(count, part_QN.shape[1]), dim=1)
        cosines_QT, rows_QT = torch.cat([cosines_QT, found_QT], 1), torch.cat([rows_QT, where_QT + start], 1)
        cosines_QT, kept_QT = cosines_QT.topk(min(count, cosines_QT.shape[1]), dim=1)
        rows_QT = rows_QT.gather(1, kept_QT)
    return cosines_QT, rows_QT
