"""The linear probe against scikit-learn, and the promises of its choice, its weights and its errors."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from functools import partial

import numpy as np
import pytest
from sklearn import metrics, preprocessing
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from pipeline import config
from pipeline.analysis import probe
from pipeline.analysis.probe import head, logistic, scores, split
from pipeline.errors import ConfigError, GuardError

SETTINGS = config.Probe(normalize="zscore")

pytestmark = pytest.mark.usefixtures("one_thread")


def hashes(count, prefix="image"):
    return [f"{prefix}{row}" for row in range(count)]


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


@pytest.fixture
def few_values(monkeypatch):
    """Every fourth C: for tests that look at what is chosen between, and not at C."""
    monkeypatch.setattr(logistic, "VALUES_OF_C", logistic.VALUES_OF_C[::4])


# Solver, against scikit-learn


def objective(standard, labels, weight, bias, C):
    """Of scikit-learn's problem, in float64."""
    logits = standard.astype(np.float64) @ weight.T + bias
    logits -= logits.max(1, keepdims=True)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]
    return losses.mean() + (weight**2).sum() / (2 * C * len(labels))


def test_accuracy_and_final_objective_are_those_of_scikit_learn(digits, result):
    features, labels = digits
    parts = split.draw(hashes(len(labels)), labels, SETTINGS)
    both, C = np.r_[parts.train, parts.validation], result.metrics["C"]
    mean, deviation = features[both].astype(np.float64).mean(0), features[both].astype(np.float64).std(0)
    deviation[deviation == 0] = 1
    standard = (features - mean) / deviation
    theirs = LogisticRegression(C=C, max_iter=5000).fit(standard[both], labels[both])
    assert result.metrics["test_accuracy"] > 0.93
    assert abs(result.metrics["test_accuracy"] - theirs.score(standard[parts.test], labels[parts.test])) <= 0.005
    weight, bias = result.head.weight.astype(np.float64) * deviation, result.head.bias + result.head.weight @ mean
    reference = objective(standard[both], labels[both], theirs.coef_, theirs.intercept_, C)
    assert objective(standard[both], labels[both], weight, bias, C) <= 1.001 * reference


@pytest.mark.parametrize("num_classes", [10, 2])
@pytest.mark.parametrize("normalize", ["none", "l2", "zscore"])
@pytest.mark.parametrize("turned", [True, False])
def test_objective_is_as_low_as_that_of_scikit_learn(digits, normalize, num_classes, turned, monkeypatch):
    monkeypatch.setattr(logistic, "MAX_TURNED", 64 if turned else 63)
    rows = np.flatnonzero(digits[1] < num_classes)[:600]
    features, labels = digits[0][rows], digits[1][rows]
    axes = logistic.axes(features, np.arange(len(rows)), normalize)
    mean, scale = axes.mean.numpy(), axes.scale.numpy()
    standard = ((preprocessing.normalize(features) if normalize == "l2" else features) - mean) / scale
    columns = axes.apply(features, np.arange(len(rows)))
    path = logistic.path(columns, labels, axes.spectrum, num_classes, logistic.VALUES_OF_C)
    heads = [axes.fold(head) for _, heads in path for head in heads]
    for index in range(0, 45, 11):
        C = logistic.VALUES_OF_C[index]
        weight, bias = heads[index][0].astype(np.float64) * scale, heads[index][1] + heads[index][0] @ mean
        # Their two-class model is a sigmoid: a softmax of plus and minus half its weights, whose norm is half as large.
        half = num_classes == 2
        # A tight tolerance where that is quick; elsewhere their own, with which they stop early.
        theirs = LogisticRegression(C=C * (2 if half else 1), max_iter=20_000, tol=1e-5 if C < 1 else 1e-4)
        theirs.fit(standard.astype(np.float64), labels)
        coefficients, intercept = theirs.coef_, theirs.intercept_
        if half:
            coefficients, intercept = np.r_[-coefficients, coefficients] / 2, np.r_[-intercept, intercept] / 2
        reference = objective(standard, labels, coefficients, intercept, C)
        # Without the axes the solver knows less of how far it still is from the optimum.
        assert objective(standard, labels, weight, bias, C) <= (1.001 if turned else 1.003) * reference, f"C = {C}"


def test_chunks_change_nothing(digits, result, monkeypatch):
    features, labels = digits
    monkeypatch.setattr(logistic, "LOGITS_BYTES", 1 << 18)
    monkeypatch.setattr(logistic, "ROWS_BYTES", 1 << 15)
    chunked = probe.fit(features, labels, hashes(len(labels)), SETTINGS)
    assert chunked.metrics["C"] == result.metrics["C"]
    assert np.allclose(chunked.head.weight * features.std(0), result.head.weight * features.std(0), atol=1e-3)
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
    test = split.draw(hashes(len(labels)), labels, SETTINGS).test
    predicted, probabilities = result.head.predict(features[test])
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
    bins = scores["reliability"]
    assert sum(each["num_test"] for each in bins) == len(test)
    assert sum(each["num_test"] * each["accuracy"] for each in bins) == pytest.approx((predicted == true).sum())
    gaps = sum(each["num_test"] * abs(each["accuracy"] - each["confidence"]) for each in bins)
    assert gaps / len(test) == pytest.approx(error, rel=1e-3)
    low, high = scores["interval"]
    assert low < scores["test_accuracy"] < high
    spread = np.sqrt(scores["test_accuracy"] * (1 - scores["test_accuracy"]) / len(test))
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.25)


def test_copies_do_not_narrow_the_interval():
    right = np.random.default_rng(0).random(200) < 0.8
    assert scores.interval(hashes(200) * 4, np.tile(right, 4), 0) == scores.interval(hashes(200), right, 0)


def test_counts_and_curve(digits, result):
    parts = split.draw(hashes(1797), digits[1], SETTINGS)
    found = result.metrics
    for name in ("train", "validation", "test"):
        assert found[f"num_{name}"] == len(getattr(parts, name))
    assert (found["num_classes"], found["num_unlabelled"], found["dim"]) == (10, 0, 64)
    assert np.allclose([point["C"] for point in found["curve"]], 10 ** np.linspace(-6, 5, 45))
    order = [(-point["validation_accuracy"], point["validation_nll"], point["C"]) for point in found["curve"]]
    assert found["C"] == found["curve"][order.index(min(order))]["C"]
    assert [warning for warning in found["warnings"] if "nearest neighbours" not in warning] == []


def test_same_input_gives_same_result(blobs):
    first, second = (probe.fit(*blobs, SETTINGS) for _ in range(2))
    assert np.array_equal(first.head.weight, second.head.weight)
    without_times = [{**each.metrics, "seconds": 0, "knn": {**each.metrics["knn"], "seconds": 0}} for each in (first, second)]
    assert without_times[0] == without_times[1]


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


# The choice between nodes and normalisations


def loaders(**features):
    """Nodes that count how often they are loaded, and are never held at once."""
    alive, loaded = [], []

    def load(name, rows):
        assert not [each for each in alive if each() is not None], "the features of another node are still held"
        array = np.array(features[name][rows])
        alive.append(weakref.ref(array))
        loaded.append(name)
        return array

    return {name: partial(load, name) for name in features}, loaded


@pytest.mark.usefixtures("few_values")
def test_the_best_node_is_chosen_on_validation_and_refitted(blobs):
    features, labels, names = blobs
    blurred = features + np.random.default_rng(0).normal(size=features.shape).astype(np.float32) * 12
    nodes, loaded = loaders(blurred=blurred, sharp=features, worse=blurred[:, :2])
    found, alone = probe.fit(nodes, labels, names, SETTINGS), probe.fit(features, labels, names, SETTINGS)
    assert loaded == ["blurred", "sharp", "worse", "sharp"]
    assert found.metrics["node"] == found.head.node == "sharp"
    assert np.array_equal(found.head.weight, alone.head.weight)
    assert found.metrics["test_accuracy"] == alone.metrics["test_accuracy"]
    compared = found.metrics["compared"]
    assert [each["node"] for each in compared] == ["blurred", "sharp", "worse"]
    for each in compared:
        points = [point for point in found.metrics["curve"] if point["node"] == each["node"]]
        assert len(points) == 12
        assert each["validation_accuracy"] == max(point["validation_accuracy"] for point in points)
    assert found.metrics["dim"] == 5


@pytest.mark.usefixtures("few_values")
def test_normalisations_are_compared_and_the_best_by_accuracy_then_loss_is_taken(blobs):
    features, labels, names = blobs
    features = features * np.float32([1, 3, 9, 1, 1]) + np.random.default_rng(1).normal(size=(120, 5)).astype(np.float32) * 4
    found = probe.fit(features, labels, names, config.Probe())
    compared = found.metrics["compared"]
    assert [each["normalize"] for each in compared] == ["none", "l2", "zscore"]
    best = min(compared, key=lambda each: (-each["validation_accuracy"], each["validation_nll"]))
    assert {name: found.metrics[name] for name in best} == best
    for each in compared:
        alone = probe.fit(features, labels, names, config.Probe(normalize=each["normalize"])).metrics
        assert {name: alone[name] for name in each} == each


def test_ties_go_to_what_is_named_first(blobs):
    features, labels, names = blobs
    nodes, _ = loaders(first=features, second=features)
    assert probe.fit(nodes, labels, names, SETTINGS).head.node == "first"


@pytest.mark.usefixtures("few_values")
def test_norms_that_carry_no_class_are_best_divided_out():
    random = np.random.default_rng(0)
    labels = np.arange(400) % 4
    directions = 3 * np.eye(4)[labels] + random.normal(size=(400, 4))
    features = (directions * 10 ** random.uniform(-2, 2, size=(400, 1))).astype(np.float32)
    found = probe.fit(features, labels, hashes(400), config.Probe())
    assert found.metrics["normalize"] == found.head.normalize == "l2"
    test = split.draw(hashes(400), labels, config.Probe()).test
    predicted, _ = found.head.predict(features[test])
    assert (predicted == labels[test]).mean() == found.metrics["test_accuracy"] > 0.8
    other = {each["normalize"]: each["validation_accuracy"] for each in found.metrics["compared"]}
    assert other["l2"] > other["none"]


# Splits that are given


@pytest.mark.usefixtures("few_values")
def test_a_planted_leak_is_not_rewarded():
    """The same pictures under other keys in train and test, with labels that can only be learned by heart."""
    random = np.random.default_rng(0)
    features, labels = random.normal(size=(100, 300)).astype(np.float32), random.permutation(100) % 2
    more, more_labels = random.normal(size=(100, 300)).astype(np.float32), random.permutation(100) % 2
    rows, targets = np.r_[features, features, more], np.r_[labels, labels, more_labels]
    given = ["train"] * 100 + ["test"] * 100 + ["train"] * 100
    settings = config.Probe(split="part", normalize="zscore")
    leaked = probe.fit(rows, targets, hashes(300), settings, parts=given).metrics
    assert leaked["test_accuracy"] > 0.8, "unrecognised, the leak pays"
    names = hashes(100) * 2 + hashes(100, "more")
    for parts, wanted in ((given, settings), (None, SETTINGS)):
        honest = probe.fit(rows, targets, names, wanted, parts=parts).metrics
        assert honest["test_accuracy"] < 0.68
        assert honest["knn"]["test_accuracy"] < 0.68
    held = probe.fit(rows, targets, names, settings, parts=given).metrics
    assert (held["num_test"], held["num_copies_left_out"]) == (100, 100)
    assert "100 rows to train on" in held["warnings"][0]


@pytest.mark.usefixtures("few_values")
def test_groups_are_observations_for_the_interval_too():
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 10)
    labels = random.permutation(60)[groups] % 2  # a row can be told by its group alone
    features = (random.normal(size=(60, 100))[groups] + random.normal(size=(600, 100))).astype(np.float32)
    alone = probe.fit(features, labels, hashes(600), SETTINGS).metrics
    grouped = probe.fit(features, labels, hashes(600), SETTINGS, groups=groups.tolist()).metrics
    assert alone["test_accuracy"] > 0.8
    assert grouped["test_accuracy"] < 0.7
    widths = [high - low for low, high in (alone["interval"], grouped["interval"])]
    assert widths[1] > 2 * widths[0]


@pytest.mark.usefixtures("few_values")
def test_classes_that_a_given_split_tests_and_does_not_train(blobs):
    features, labels, names = blobs
    given = ["test" if label == 2 or row < 30 else "train" for row, label in enumerate(labels)]
    found = probe.fit(features, labels, names, config.Probe(split="part"), parts=given).metrics
    assert any("1 of 3 classes have test rows and no train row" in warning for warning in found["warnings"])
    assert found["per_class"][2]["accuracy"] == 0
    with pytest.raises(ConfigError, match=r"^probe.split: column 'part': train has only the class 0\."):
        probe.fit(features, labels, names, config.Probe(split="part"), parts=["test" if label else "train" for label in labels])


def test_rows_in_no_part_are_not_looked_at(blobs):
    features, labels, names = blobs
    features[:5] = np.nan
    given = [None] * 5 + ["train"] * 60 + ["val"] * 20 + ["test"] * 35
    found = probe.fit(features, labels, names, config.Probe(split="part"), parts=given).metrics
    assert [found[f"num_{part}"] for part in ("train", "validation", "test", "without_split")] == [60, 20, 35, 5]
    assert found["test_accuracy"] > 0.9


def test_says_when_the_nearest_neighbours_do_better():
    random = np.random.default_rng(0)
    features = random.normal(size=(600, 2)).astype(np.float32)
    labels = (features[:, 0] * features[:, 1] > 0).astype(int)  # no line tells them apart
    found = probe.fit(features, labels, hashes(600), SETTINGS).metrics
    assert found["knn"]["test_accuracy"] > 0.85 > found["test_accuracy"]
    assert any("nearest neighbours do better" in warning for warning in found["warnings"])


# Labels and features


def test_folded_weights_give_the_logits(digits):
    features, labels = digits
    rows = np.arange(len(labels))
    axes = logistic.axes(features, rows, "zscore")
    columns = axes.apply(features, rows)
    *_, (_, heads) = logistic.path(columns, labels, axes.spectrum, 10, np.array([0.01]))
    weight, bias = axes.fold(heads[0])
    assert np.allclose(features @ weight.T + bias, (columns @ heads[0].T).numpy(), atol=1e-4)


def test_text_labels_and_unlabelled_rows(digits, result):
    features, labels = digits
    names = [f"digit {label}" for label in labels] + [None] * 3
    more = np.r_[features, np.full((3, 64), np.nan, np.float32)]  # nothing is asked of the features of an unlabelled row
    found = probe.fit(more, names, hashes(1800), SETTINGS)
    assert found.head.classes == [f"digit {label}" for label in range(10)]
    assert found.metrics["num_unlabelled"] == 3
    assert found.metrics["test_accuracy"] == result.metrics["test_accuracy"]
    assert np.array_equal(found.head.weight, result.head.weight)


def test_nan_is_no_label(blobs):
    features, labels, names = blobs
    found = probe.fit(features, np.where(np.arange(120) < 5, np.nan, labels), names, SETTINGS)
    assert found.metrics["num_unlabelled"] == 5
    assert found.head.classes == [0.0, 1.0, 2.0]


def test_constant_feature_gets_no_weight(blobs):
    features, labels, names = blobs
    with_constant = np.c_[features, np.full(120, 0.1, np.float32)]
    found, reference = probe.fit(with_constant, labels, names, SETTINGS), probe.fit(features, labels, names, SETTINGS)
    assert np.abs(found.head.weight[:, 5]).max() < 1e-6
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
    found = head.load(result.head.dump())
    weight, bias, classes = found.weight, found.bias, found.classes
    assert np.array_equal(weight, result.head.weight)
    assert np.array_equal(bias, result.head.bias)
    assert classes == result.head.classes == list(range(10))
    assert (weight.dtype, bias.dtype, weight.shape, bias.shape) == (np.float32, np.float32, (10, 64), (10,))
    predicted, probabilities = found.predict(digits[0])
    assert np.allclose(probabilities.sum(1), 1, atol=1e-5)
    assert np.array_equal(predicted, (digits[0] @ weight.T + bias).argmax(1))


def test_metrics_are_json(result):
    assert json.loads(result.metrics_json()) == {**result.metrics, "classes": result.head.classes}


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
from pipeline.analysis.probe import head, predict
result = head.Head(classes=["a", "b"], weight=np.eye(2, dtype=np.float32), bias=np.zeros(2, np.float32))
assert head.load(result.dump()).predict(np.eye(2, dtype=np.float32))[0].tolist() == [0, 1]
assert not {"torch", "ray", "sklearn", "scipy"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_threads_are_left_alone(blobs):
    import torch

    before = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    probe.fit(*blobs, SETTINGS)
    assert (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()) == before
