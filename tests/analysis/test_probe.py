"""The linear probe against scikit-learn, and the promises of its split, its weights and its errors."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from pipeline import config
from pipeline.analysis import probe

SETTINGS = config.Probe()


def hashes(count, prefix="image"):
    return [f"{prefix}{row}" for row in range(count)]


def parts_by_hash(content_hashes, labels, settings=SETTINGS):
    parts = probe.split(content_hashes, np.asarray(labels), settings)
    return {name: {content_hashes[row] for row in getattr(parts, name)} for name in ("train", "validation", "test")}


@pytest.fixture(scope="module")
def digits():
    """Pixels (1797, 64) float32, some of them constant, and labels (1797,)."""
    features, labels = load_digits(return_X_y=True)
    return features.astype(np.float32), labels


@pytest.fixture(scope="module")
def result(digits):
    features, labels = digits
    return probe.fit(features, labels, hashes(len(labels)), SETTINGS)


@pytest.fixture
def blobs():
    """Three well separated classes: features (120, 5) float32, labels, hashes."""
    random = np.random.default_rng(0)
    labels = np.arange(120) % 3
    features = random.normal(size=(120, 5)) + 6 * np.eye(3, 5)[labels]
    return features.astype(np.float32), labels, hashes(120)


# Split


def test_split_is_a_partition_in_the_shares_of_every_class():
    labels = np.repeat([0, 1, 2], [1000, 200, 40])
    parts = probe.split(hashes(1240), labels, config.Probe(validation=0.2, test=0.1))
    assert np.array_equal(np.sort(np.concatenate([parts.train, parts.validation, parts.test])), np.arange(1240))
    assert np.bincount(labels[parts.test]).tolist() == [100, 20, 4]
    assert np.bincount(labels[parts.validation]).tolist() == [200, 40, 8]


def test_copies_never_straddle():
    random = np.random.default_rng(0)
    distinct = random.integers(0, 300, size=2000)
    names, labels = [f"image{number}" for number in distinct], distinct % 4
    labels = np.where(random.random(2000) < 0.05, random.integers(0, 4, 2000), labels)  # some copies disagree on the class
    parts = parts_by_hash(names, labels)
    assert all(parts.values())
    assert sum(map(len, parts.values())) == len(set(names))


def test_split_depends_on_neither_row_order_nor_copies():
    random = np.random.default_rng(0)
    names, labels = hashes(500), random.integers(0, 5, 500)
    order = random.permutation(np.r_[np.arange(500), np.arange(100), np.arange(50)])
    assert parts_by_hash([names[row] for row in order], labels[order]) == parts_by_hash(names, labels)


def test_split_of_conflicting_copies_does_not_depend_on_row_order():
    random = np.random.default_rng(0)
    names, labels = hashes(60) * 2, random.integers(0, 3, 120)
    order = random.permutation(120)
    assert parts_by_hash([names[row] for row in order], labels[order]) == parts_by_hash(names, labels)


def test_seed_changes_the_split():
    names, labels = hashes(100), np.arange(100) % 2
    assert parts_by_hash(names, labels) == parts_by_hash(names, labels, config.Probe(seed=0))
    assert parts_by_hash(names, labels) != parts_by_hash(names, labels, config.Probe(seed=1))


def test_a_class_is_never_without_train():
    names, labels = hashes(16), np.r_[np.arange(10), np.repeat([10, 11, 12], 2)]  # singles and pairs
    parts = probe.split(names, labels, config.Probe(validation=0.49, test=0.49))
    assert set(labels[parts.train]) == set(range(13))


# Solver, against scikit-learn


def test_accuracy_is_that_of_scikit_learn(digits, result):
    features, labels = digits
    parts = probe.split(hashes(len(labels)), labels, SETTINGS)
    both = np.r_[parts.train, parts.validation]
    mean, deviation = features[both].mean(0), features[both].std(0)
    standard = (features - mean) / np.where(deviation > 0, deviation, 1)
    theirs = LogisticRegression(C=result.metrics["C"], max_iter=5000).fit(standard[both], labels[both])
    assert result.metrics["test_accuracy"] > 0.93
    assert abs(result.metrics["test_accuracy"] - theirs.score(standard[parts.test], labels[parts.test])) <= 0.005


def objective(standard, labels, weight, bias, C):
    """Of scikit-learn's problem, in float64."""
    logits = standard.astype(np.float64) @ weight.T + bias
    logits -= logits.max(1, keepdims=True)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]
    return losses.mean() + (weight**2).sum() / (2 * C * len(labels))


@pytest.mark.parametrize("num_classes", [10, 2])
@pytest.mark.parametrize("standardize", [True, False])
def test_objective_is_as_low_as_that_of_scikit_learn(digits, standardize, num_classes):
    rows = np.flatnonzero(digits[1] < num_classes)
    features, labels = digits[0][rows], digits[1][rows]
    axes = probe._axes(features, np.arange(len(rows)), standardize)
    standard = (features - axes.mean) / axes.scale
    path = probe._path(axes.apply(features, np.arange(len(rows))), labels, axes.spectrum, num_classes, probe.VALUES_OF_C, 9)
    heads = [axes.fold(head) for _, heads, _ in path for head in heads]
    for index in range(0, 45, 6):
        C = probe.VALUES_OF_C[index]
        weight, bias = heads[index][0].astype(np.float64) * axes.scale, heads[index][1] + heads[index][0] @ axes.mean
        # A tight tolerance where that is quick; elsewhere their own, with which they stop early.
        theirs = LogisticRegression(C=C, max_iter=20_000, tol=1e-6 if C < 1 else 1e-4).fit(standard.astype(np.float64), labels)
        coefficients, intercept = theirs.coef_, theirs.intercept_
        if num_classes == 2:  # their two-class model is a sigmoid: the same function as a softmax of half its weights
            coefficients, intercept = np.r_[-coefficients, coefficients] / 2, np.r_[-intercept, intercept] / 2
            C_theirs = objective(standard, labels, *best_scale(standard, labels, coefficients, intercept, C), C)
        else:
            C_theirs = objective(standard, labels, coefficients, intercept, C)
        assert objective(standard, labels, weight, bias, C) <= 1.001 * C_theirs, f"C = {C}"
