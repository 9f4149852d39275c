"""The linear probe against scikit-learn, and the promises of its split, its weights and its errors."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from sklearn import metrics
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from pipeline import config
from pipeline.analysis import logistic, probe, scores
from pipeline.errors import ConfigError, GuardError

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


def objective(standard, labels, weight, bias, C):
    """Of scikit-learn's problem, in float64."""
    logits = standard.astype(np.float64) @ weight.T + bias
    logits -= logits.max(1, keepdims=True)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]
    return losses.mean() + (weight**2).sum() / (2 * C * len(labels))


def test_accuracy_and_final_objective_are_those_of_scikit_learn(digits, result):
    features, labels = digits
    parts = probe.split(hashes(len(labels)), labels, SETTINGS)
    both, C = np.r_[parts.train, parts.validation], result.metrics["C"]
    mean, deviation = features[both].astype(np.float64).mean(0), features[both].astype(np.float64).std(0)
    deviation[deviation == 0] = 1
    standard = (features - mean) / deviation
    theirs = LogisticRegression(C=C, max_iter=5000).fit(standard[both], labels[both])
    assert result.metrics["test_accuracy"] > 0.93
    assert abs(result.metrics["test_accuracy"] - theirs.score(standard[parts.test], labels[parts.test])) <= 0.005
    weight, bias = result.weight.astype(np.float64) * deviation, result.bias + result.weight @ mean
    reference = objective(standard[both], labels[both], theirs.coef_, theirs.intercept_, C)
    assert objective(standard[both], labels[both], weight, bias, C) <= 1.001 * reference


@pytest.mark.parametrize("num_classes", [10, 2])
@pytest.mark.parametrize("standardize", [True, False])
def test_objective_is_as_low_as_that_of_scikit_learn(digits, standardize, num_classes):
    rows = np.flatnonzero(digits[1] < num_classes)[:600]
    features, labels = digits[0][rows], digits[1][rows]
    axes = logistic.axes(features, np.arange(len(rows)), standardize)
    standard = (features - axes.mean) / axes.scale
    columns = axes.apply(features, np.arange(len(rows)))
    path = logistic.path(columns, labels, axes.spectrum, num_classes, logistic.VALUES_OF_C, logistic.WAVE)
    heads = [axes.fold(head) for _, heads, _ in path for head in heads]
    for index in range(0, 45, 11):
        C = logistic.VALUES_OF_C[index]
        weight, bias = heads[index][0].astype(np.float64) * axes.scale, heads[index][1] + heads[index][0] @ axes.mean
        # Their two-class model is a sigmoid: a softmax of plus and minus half its weights, whose norm is half as large.
        half = num_classes == 2
        # A tight tolerance where that is quick; elsewhere their own, with which they stop early.
        theirs = LogisticRegression(C=C * (2 if half else 1), max_iter=20_000, tol=1e-5 if C < 1 else 1e-4)
        theirs.fit(standard.astype(np.float64), labels)
        coefficients, intercept = theirs.coef_, theirs.intercept_
        if half:
            coefficients, intercept = np.r_[-coefficients, coefficients] / 2, np.r_[-intercept, intercept] / 2
        reference = objective(standard, labels, coefficients, intercept, C)
        assert objective(standard, labels, weight, bias, C) <= 1.001 * reference, f"C = {C}"


def test_chunks_change_nothing(digits, result, monkeypatch):
    features, labels = digits
    monkeypatch.setattr(logistic, "LOGITS_BYTES", 1 << 18)
    monkeypatch.setattr(logistic, "ROWS_BYTES", 1 << 15)
    chunked = probe.fit(features, labels, hashes(len(labels)), SETTINGS)
    assert chunked.metrics["C"] == result.metrics["C"]
    assert np.allclose(chunked.weight, result.weight, atol=2e-3)
    assert np.allclose(chunked.metrics["test_nll"], result.metrics["test_nll"], rtol=1e-2)


def test_shuffled_labels_give_chance(digits):
    features, labels = digits
    shuffled = np.random.default_rng(0).permutation(labels)
    assert probe.fit(features, shuffled, hashes(len(labels)), SETTINGS).metrics["test_accuracy"] < 0.2


def test_copies_across_the_split_would_have_leaked():
    """Random labels can be learned by heart only: with copies under one hash the test part stays at chance."""
    random = np.random.default_rng(0)
    features, labels = random.normal(size=(200, 400)).astype(np.float32), np.arange(200) % 2
    copies = np.tile(features, (4, 1)), np.tile(labels, 4)
    assert probe.fit(*copies, hashes(800), SETTINGS).metrics["test_accuracy"] > 0.95
    honest = probe.fit(*copies, hashes(200) * 4, SETTINGS).metrics
    assert honest["test_accuracy"] < 0.8
    spread = np.sqrt(honest["test_accuracy"] * (1 - honest["test_accuracy"]) / honest["num_test"])
    low, high = honest["interval"]
    assert high - low > 1.5 * 2 * 1.96 * spread  # 4 copies of a picture are not 4 observations: twice the naive width


# Scores


def test_scores_are_those_of_scikit_learn(digits, result):
    features, labels = digits
    test = probe.split(hashes(len(labels)), labels, SETTINGS).test
    predicted, probabilities = probe.predict(features[test], result.weight, result.bias)
    true, scores = labels[test], result.metrics
    assert scores["test_accuracy"] == pytest.approx(metrics.accuracy_score(true, predicted))
    assert scores["mean_per_class_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(true, predicted))
    assert scores["test_top5"] == pytest.approx(metrics.top_k_accuracy_score(true, probabilities, k=5))
    assert scores["confusion"] == metrics.confusion_matrix(true, predicted).tolist()
    log_true = np.log(probabilities[np.arange(len(test)), true])
    assert scores["test_nll"] == pytest.approx(-log_true.mean(), rel=1e-4)
    error, confidence = 0.0, probabilities.max(1)
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & ((confidence < low + 1 / 15) | (low > 0.93))
        if inside.any():
            error += inside.mean() * abs((predicted == true)[inside].mean() - confidence[inside].mean())
    assert scores["test_ece"] == pytest.approx(error, rel=1e-3)
    low, high = scores["interval"]
    assert low < scores["test_accuracy"] < high
    spread = np.sqrt(scores["test_accuracy"] * (1 - scores["test_accuracy"]) / len(test))
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.25)


def test_copies_do_not_narrow_the_interval():
    right = np.random.default_rng(0).random(200) < 0.8
    assert scores.interval(hashes(200) * 4, np.tile(right, 4), 0) == scores.interval(hashes(200), right, 0)


def test_counts_and_curve(digits, result):
    parts = probe.split(hashes(1797), digits[1], SETTINGS)
    found = result.metrics
    for name in ("train", "validation", "test"):
        assert found[f"num_{name}"] == len(getattr(parts, name))
    assert (found["num_classes"], found["num_unlabelled"], found["dim"]) == (10, 0, 64)
    assert np.allclose([point["C"] for point in found["curve"]], 10 ** np.linspace(-6, 5, 45))
    order = [(-point["validation_accuracy"], point["validation_nll"], point["C"]) for point in found["curve"]]
    assert found["C"] == found["curve"][order.index(min(order))]["C"]
    assert found["warnings"] == []


def test_same_input_gives_same_result(blobs):
    first, second = (probe.fit(*blobs, SETTINGS) for _ in range(2))
    assert np.array_equal(first.weight, second.weight)
    assert {**first.metrics, "seconds": 0} == {**second.metrics, "seconds": 0}


def test_warns_when_the_best_c_is_at_the_edge(blobs, monkeypatch):
    monkeypatch.setattr(logistic, "VALUES_OF_C", np.array([1e-6, 1e-3]))
    found = probe.fit(*blobs, SETTINGS).metrics
    assert "edge of the grid" in found["warnings"][0]


def test_warns_when_stopped_early(blobs, monkeypatch):
    monkeypatch.setattr(logistic, "MAX_EVALUATIONS", 2)
    assert any("converged" in warning for warning in probe.fit(*blobs, SETTINGS).metrics["warnings"])


def test_warns_of_classes_without_test_rows(blobs):
    features, labels, names = blobs
    labels = np.where(np.arange(120) == 0, 9, labels)
    found = probe.fit(features, labels, names, SETTINGS).metrics
    assert any("1 of 4 classes" in warning for warning in found["warnings"])
    assert "test_top5" not in found


# Labels and features


def test_folded_weights_give_the_logits(digits):
    features, labels = digits
    rows = np.arange(len(labels))
    axes = logistic.axes(features, rows, True)
    columns = axes.apply(features, rows)
    *_, (_, heads, _) = logistic.path(columns, labels, axes.spectrum, 10, np.array([0.01]), 1)
    weight, bias = axes.fold(heads[0])
    assert np.allclose(features @ weight.T + bias, (columns @ heads[0].T).numpy(), atol=1e-4)


def test_text_labels_and_unlabelled_rows(digits, result):
    features, labels = digits
    names = [f"digit {label}" for label in labels] + [None] * 3
    more = np.r_[features, np.full((3, 64), np.nan, np.float32)]  # nothing is asked of the features of an unlabelled row
    found = probe.fit(more, names, hashes(1800), SETTINGS)
    assert found.classes == [f"digit {label}" for label in range(10)]
    assert found.metrics["num_unlabelled"] == 3
    assert found.metrics["test_accuracy"] == result.metrics["test_accuracy"]
    assert np.array_equal(found.weight, result.weight)


def test_nan_is_no_label(blobs):
    features, labels, names = blobs
    found = probe.fit(features, np.where(np.arange(120) < 5, np.nan, labels), names, SETTINGS)
    assert found.metrics["num_unlabelled"] == 5
    assert found.classes == [0.0, 1.0, 2.0]


def test_constant_feature_gets_no_weight(blobs):
    features, labels, names = blobs
    with_constant = np.c_[features, np.full(120, 0.1, np.float32)]
    found, reference = probe.fit(with_constant, labels, names, SETTINGS), probe.fit(features, labels, names, SETTINGS)
    assert np.abs(found.weight[:, 5]).max() < 1e-6
    assert found.metrics["test_accuracy"] == reference.metrics["test_accuracy"] > 0.9


def test_scale_and_offset_of_features_do_not_matter(blobs):
    features, labels, names = blobs
    moved = (features * np.float32(1e-3) + np.float32(2)).astype(np.float32)
    found, reference = probe.fit(moved, labels, names, SETTINGS), probe.fit(features, labels, names, SETTINGS)
    assert found.metrics["test_accuracy"] == reference.metrics["test_accuracy"]
    assert found.metrics["test_nll"] == pytest.approx(reference.metrics["test_nll"], rel=0.05)


def test_more_features_than_rows_and_read_only_memory():
    random = np.random.default_rng(0)
    labels = np.arange(60) % 2
    features = random.normal(size=(60, 200)).astype(np.float32)
    features[:, 0] += 8 * labels
    features.flags.writeable = False
    assert probe.fit(features, labels, hashes(60), SETTINGS).metrics["test_accuracy"] > 0.6


# Weights


def test_weights_survive_safetensors(digits, result):
    weight, bias, classes = probe.load_weights(probe.weights_safetensors(result))
    assert np.array_equal(weight, result.weight)
    assert np.array_equal(bias, result.bias)
    assert classes == result.classes == list(range(10))
    assert (weight.dtype, bias.dtype, weight.shape, bias.shape) == (np.float32, np.float32, (10, 64), (10,))
    predicted, probabilities = probe.predict(digits[0], weight, bias)
    assert np.allclose(probabilities.sum(1), 1, atol=1e-5)
    assert np.array_equal(predicted, (digits[0] @ weight.T + bias).argmax(1))


def test_metrics_are_json(result):
    assert json.loads(probe.metrics_json(result)) == {**result.metrics, "classes": result.classes}


# Errors


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([None] * 120, "has no label in any of 120 rows"),
        (["cat"] * 120, "has the one class 'cat'"),
        (["cat", "dog"] + [None] * 118, "has 2 labelled rows in 2 classes, too few"),
        ([["cat"], ["dog"]] * 60, "holds list; a class is a text or a number"),
    ],
)
def test_unusable_labels(blobs, labels, message):
    features, _, names = blobs
    with pytest.raises(ConfigError, match=f"^probe.label: column 'breed' {message}"):
        probe.fit(features, labels, names, config.Probe(label="breed"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite(blobs, value):
    features, labels, names = blobs
    features[[7, 50], 2] = value
    with pytest.raises(GuardError, match="2 embeddings hold values that are not finite, the first in row 7"):
        probe.fit(features, labels, names, SETTINGS)


# Imports


def test_torch_is_loaded_by_fit_only():
    program = """
import sys
import numpy as np
from pipeline.analysis import probe
result = probe.ProbeResult(metrics={}, classes=["a", "b"], weight=np.eye(2, dtype=np.float32), bias=np.zeros(2, np.float32))
weight, bias, classes = probe.load_weights(probe.weights_safetensors(result))
assert probe.predict(np.eye(2, dtype=np.float32), weight, bias)[0].tolist() == [0, 1]
assert not {"torch", "sklearn", "scipy"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_threads_are_left_alone(blobs):
    import torch

    before = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    probe.fit(*blobs, SETTINGS)
    assert (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()) == before
