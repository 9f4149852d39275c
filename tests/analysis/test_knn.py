"""Nearest neighbours against a plain implementation of what DINOv2 does."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits

from pipeline.analysis.probe import knn

pytestmark = pytest.mark.usefixtures("one_thread")

TRAIN, VALIDATION, TEST = np.arange(0, 900), np.arange(900, 1300), np.arange(1300, 1797)


@pytest.fixture(scope="module")
def digits():
    features, labels = load_digits(return_X_y=True)
    return features.astype(np.float32), labels


def plain(features, labels, bank, queries, k):
    """Accuracy of the vote, query by query in float64."""
    normal = features.astype(np.float64) / np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    hits = 0
    for query in queries:
        cosines = normal[bank] @ normal[query]
        nearest = np.argsort(-cosines, kind="stable")[:k]
        votes = np.bincount(labels[bank[nearest]], np.exp(cosines[nearest] / 0.07), minlength=10)
        hits += votes.argmax() == labels[query]
    return hits / len(queries)


def test_accuracies_and_the_choice_of_k_are_those_of_the_definition(digits):
    features, labels = digits
    found = knn.score(features, labels, TRAIN, VALIDATION, TEST, 10, "cpu")
    on_validation = {k: plain(features, labels, TRAIN, VALIDATION, k) for k in (10, 20, 100, 200)}
    assert found["k"] == max(on_validation, key=lambda k: (on_validation[k], -k))
    assert found["validation_accuracy"] == pytest.approx(on_validation[found["k"]], abs=1e-9)
    bank = np.concatenate([TRAIN, VALIDATION])
    assert found["test_accuracy"] == pytest.approx(plain(features, labels, bank, TEST, found["k"]), abs=1 / len(TEST))
    assert found["test_accuracy"] > 0.9


def test_pieces_change_nothing(digits, monkeypatch):
    features, labels = digits
    whole = knn.score(features, labels, TRAIN, VALIDATION, TEST, 10, "cpu")
    monkeypatch.setattr(knn, "QUERIES", 100)
    monkeypatch.setattr(knn, "LOGITS_BYTES", 4 * 100 * 70)  # 70 rows of the bank at a time: less than most k
    monkeypatch.setattr("pipeline.analysis.probe.logistic.ROWS_BYTES", 1 << 15)
    pieces = knn.score(features, labels, TRAIN, VALIDATION, TEST, 10, "cpu")
    assert {**pieces, "seconds": 0} == {**whole, "seconds": 0}


def test_k_is_chosen_on_some_of_many_validation_rows(digits, monkeypatch):
    features, labels = digits
    monkeypatch.setattr(knn, "CHOOSE_ON", 50)
    found = knn.score(features, labels, TRAIN, VALIDATION, TEST, 10, "cpu")
    spread = VALIDATION[np.linspace(0, 399, 50).round().astype(int)]
    assert found["validation_accuracy"] == pytest.approx(plain(features, labels, TRAIN, spread, found["k"]))


def test_a_bank_smaller_than_every_k(digits):
    features, labels = digits
    found = knn.score(features, labels, TRAIN[:7], VALIDATION, TEST, 10, "cpu")
    assert found["k"] == 7


def test_rows_of_zeros_have_no_direction(digits):
    features, labels = digits
    features = features.copy()
    features[::50] = 0
    found = knn.score(features, labels, TRAIN, VALIDATION, TEST, 10, "cpu")
    assert 0.85 < found["test_accuracy"] < 1
