"""A linear classifier trained on frozen embeddings: features (N, D) float32 and one label a row in, scores and weights out.

Nodes, normalisations and 45 values of C are compared on the validation part, the best one is refitted on train and validation,
and the test part is scored once. It writes no file: `ProbeResult` gives bytes that the caller publishes.

`labels.py` finds the labels, `split.py` the parts, `logistic.py` is the solver; `scores.py` and `knn.py` judge what comes out;
`head.py` is what is saved. Memory: the features of one node in the rows that are used, on the host, and what the solver takes.

Legend: N rows, U of them used, D features, K classes.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline import config, recipe
from pipeline.analysis.probe import knn, logistic, scores
from pipeline.analysis.probe.head import Head, Label
from pipeline.analysis.probe.labels import encode, read
from pipeline.analysis.probe.split import Split, draw, given
from pipeline.dataset.read import Dataset, open_dataset
from pipeline.errors import ConfigError, DatasetError, GuardError

if TYPE_CHECKING:  # torch takes seconds to load, and reading or applying weights does without it
    import torch

Features = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""Ascending rows to their features (rows, D) float32."""

LARGE = frozenset({"confusion", "curve", "per_class", "reliability"})
"""Metrics that grow with the number of classes, or are only for drawing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """The trained classifier and how it did on the test part."""

    metrics: dict[str, Any]
    """Native values only, ready for JSON. `test_top5` is there with more than 5 classes only; `interval` is [low, high]."""
    head: Head

    def metrics_json(self) -> bytes:
        """The metrics and the class names as UTF-8 JSON."""
        content = {**self.metrics, "classes": self.head.classes}
        return json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False).encode()

    def summary(self) -> dict[str, Any]:
        """The metrics but for those in `LARGE`."""
        return {name: value for name, value in self.metrics.items() if name not in LARGE}


def train(url: str, version: int | None, storage: config.Storage, settings: config.Probe) -> ProbeResult:
    """Train and score a probe on one version of a dataset, on this process's GPU if it has one.

    It opens the dataset itself, so that it can be sent to where a GPU is: no feature travels.

    Args:
        url: of the dataset.
        version: the newest when None.
        storage: how to reach the dataset, and the file with the labels.
        settings: the `probe` section of the config.

    Raises:
        DatasetError: no such dataset, version, node or column.
        ConfigError: labels, groups or split are not what they should be.
        GuardError: a labelled row holds a value that is not finite.
    """
    import torch

    dataset = open_dataset(url, version, storage)
    nodes = _nodes(dataset, settings)
    rows = read(dataset, settings)
    result = fit(
        {node: partial(_features, dataset, node, rows.index) for node in nodes},
        rows.labels,
        rows.content_hashes,
        settings,
        groups=rows.groups,
        parts=rows.given,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    metrics = result.metrics | {
        "version": dataset.version,
        "num_unlabelled": result.metrics["num_unlabelled"] + rows.num_unlabelled,
        "num_unmatched_keys": rows.num_unmatched_keys,
        "warnings": rows.warnings + result.metrics["warnings"],
    }
    made_by = recipe.of_column(dataset.recipe, result.head.node)
    return ProbeResult(metrics=metrics, head=dataclasses.replace(result.head, recipe=made_by))


def fit(
    features: NDArray[np.float32] | Mapping[str, Features],
    labels: Sequence[Label | None] | NDArray[Any],
    content_hashes: Sequence[str],
    settings: config.Probe,
    *,
    groups: Sequence[Hashable] | None = None,
    parts: Sequence[Any] | None = None,
    device: str = "cpu",
) -> ProbeResult:
    """Choose node, normalisation and C on the validation part, refit on train and validation, score once on test.

    The best has the highest validation accuracy; where several share it, the lowest validation loss, then the smallest C, then
    it is named first.

    Args:
        features: (N, D) float32, any scale, finite in the rows that are used; or several nodes to choose from, each with the
            function that loads its features, of which one at a time is held.
        labels: N of them; None and NaN are unlabelled rows, which are left out and counted.
        content_hashes: N of them; equal for copies.
        settings: the `probe` section of the config; `node` is not looked at.
        groups: N of them, None for rows without one; rows of a group are on one side.
        parts: N names of parts as a split column holds them; drawn by hash when left out.
        device: torch device of the solver.

    Raises:
        ConfigError: the labels are not scalars, or are too few for two classes and three parts; or parts that do not work.
        GuardError: a row that is used holds a value that is not finite.
    """
    started = time.perf_counter()
    loaders = features if isinstance(features, Mapping) else {"": partial(_rows_of, features)}
    classes, targets_N = encode(labels, settings.label)
    labelled = np.flatnonzero(targets_N >= 0)
    split = _split(targets_N, labelled, content_hashes, groups, parts, settings)
    used = np.sort(np.concatenate([split.train, split.validation, split.test]))
    rows, targets_U, unit_U = labelled[used], targets_N[labelled[used]], split.unit[used]
    train, validation, test = (np.searchsorted(used, part) for part in (split.train, split.validation, split.test))
    warnings = [*split.warnings, *_check_classes(targets_U, train, test, classes, settings)]

    curve, chosen, task = _compared(loaders, settings, rows, targets_U, train, validation, len(classes), device)
    best = chosen.point
    if best["C"] in (logistic.VALUES_OF_C[0], logistic.VALUES_OF_C[-1]):
        warnings.append(f"The best C is {best['C']:g}, at the edge of the grid: a better one may lie outside.")
    weight_KD, bias_K, converged = task.refit(chosen, np.sort(np.concatenate([train, validation])))
    if not converged:
        warnings.append(f"The final fit was stopped after {logistic.MAX_EVALUATIONS} evaluations, before it had converged.")
    head = Head(
        weight=weight_KD,
        bias=bias_K,
        classes=classes,
        normalize="l2" if best["normalize"] == "l2" else "none",
        node=best["node"],
        label=settings.label,
    )
    scored = scores.score(task.features_UD, targets_U, test, unit_U, head, settings.seed)
    neighbours = knn.score(task.features_UD, targets_U, train, validation, test, len(classes), device)
    if neighbours["test_accuracy"] > scored["interval"][1]:
        warnings.append(
            f"The nearest neighbours do better ({neighbours['test_accuracy']:.3f}) than the probe"
            f" ({scored['test_accuracy']:.3f}): what tells the classes apart may not be linear."
        )
    metrics = {
        **scored,
        **best,
        "knn": neighbours,
        "compared": [
            min((point for point in curve if (point["node"], point["normalize"]) == pair), key=_rank)
            for pair in dict.fromkeys((point["node"], point["normalize"]) for point in curve)
        ],
        "num_train": len(train),
        "num_validation": len(validation),
        "num_test": len(test),
        "num_classes": len(classes),
        "num_unlabelled": len(targets_N) - len(labelled),
        "num_without_split": split.num_without_split,
        "num_copies_left_out": split.num_copies_left_out,
        "dim": task.features_UD.shape[1],
        "device": device,
        "curve": curve,
        "warnings": warnings,
        "seconds": time.perf_counter() - started,
    }
    return ProbeResult(metrics=metrics, head=head)


def _nodes(dataset: Dataset, settings: config.Probe) -> list[str]:
    """The embedding columns to compare."""
    if settings.node == config.ALL_NODES:
        return list(dataset.nodes)
    wanted = settings.node or next(iter(dataset.nodes))
    names = [wanted] if isinstance(wanted, str) else wanted
    for name in names:
        if name not in dataset.nodes:
            have = ", ".join(dataset.nodes)
            raise DatasetError(f"probe.node: the dataset has no embedding column {name!r}; it has {have}, or say all")
    return names


def _features(dataset: Dataset, node: str, index: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.float32]:
    return dataset.to_numpy(node, index[rows])


def _rows_of(features_ND: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """No copy where all are asked for."""
    return features_ND if len(rows) == len(features_ND) else features_ND[rows]


def _split(
    targets_N: NDArray[np.int64],
    labelled: NDArray[np.int64],
    content_hashes: Sequence[str],
    groups: Sequence[Hashable] | None,
    parts: Sequence[Any] | None,
    settings: config.Probe,
) -> Split:
    """The parts as positions in `labelled`."""
    assert len(targets_N) == len(content_hashes)
    hashes, targets = [content_hashes[row] for row in labelled.tolist()], targets_N[labelled]
    groups = None if groups is None else [groups[row] for row in labelled.tolist()]
    if parts is None:
        split = draw(hashes, targets, settings, groups)
    else:
        split = given([parts[row] for row in labelled.tolist()], hashes, targets, settings, groups)
    if not len(split.validation) or not len(split.test):
        num_classes = len(np.unique(targets))
        what = "distinct images" if groups is None else "distinct images or groups"
        raise ConfigError(
            f"probe.label: column {settings.label!r} has {len(labelled)} labelled rows in {num_classes} classes, too few"
            f" {what} in each for probe.validation: {settings.validation} and probe.test: {settings.test}."
        )
    return split


def _check_classes(
    targets_U: NDArray[np.int64],
    train: NDArray[np.int64],
    test: NDArray[np.int64],
    classes: list[Label],
    settings: config.Probe,
) -> list[str]:
    """Warnings of classes that the parts are without."""
    trained, tested = np.unique(targets_U[train]), np.unique(targets_U[test])
    if len(trained) < 2:
        raise ConfigError(f"probe.split: column {settings.split!r}: train has only the class {classes[trained[0]]!r}.")
    warnings = []
    if unseen := len(classes) - len(tested):
        warnings.append(f"{unseen} of {len(classes)} classes have no test row, and no part in the scores.")
    if untrained := len(np.setdiff1d(tested, trained)):
        warnings.append(f"{untrained} of {len(classes)} classes have test rows and no train row: these are all wrong.")
    return warnings


def _loaded(load: Features, rows: NDArray[np.int64], node: str) -> NDArray[np.float32]:
    """Features of these rows, all finite."""
    features_UD = load(rows)
    assert features_UD.dtype == np.float32 and len(features_UD) == len(rows)
    bad = []
    for _, chunk in logistic.chunks(np.arange(len(rows)), 4 * features_UD.shape[1]):
        bad.append(chunk[~np.isfinite(features_UD[chunk]).all(1)])
    if num_bad := sum(map(len, bad)):
        first = rows[np.concatenate(bad)[0]]
        column = f"column {node!r}: " if node else ""
        raise GuardError(f"{column}{num_bad} embeddings hold values that are not finite, the first in row {first}.")
    return features_UD


def _compared(
    loaders: Mapping[str, Features],
    settings: config.Probe,
    rows: NDArray[np.int64],
    targets_U: NDArray[np.int64],
    train: NDArray[np.int64],
    validation: NDArray[np.int64],
    num_classes: int,
    device: str,
) -> tuple[list[dict[str, Any]], _Chosen, _Task]:
    """Every point of the comparison, the best of them, and its node's features, which are loaded again if they have to be."""
    curve: list[dict[str, Any]] = []
    chosen: _Chosen | None = None
    node, task = "", None
    for node, load in loaders.items():
        task = None  # the features of the node before, before those of this one are loaded
        task = _Task(_loaded(load, rows, node), targets_U, num_classes, device)
        for normalize in settings.normalizations:
            points, found = task.sweep({"node": node, "normalize": normalize}, train, validation)
            curve += points
            if chosen is None or _rank(found.point) < _rank(chosen.point):
                chosen = found
    assert chosen is not None and task is not None, "there is a node and a normalisation"
    if chosen.point["node"] != node:
        task = None
        node = chosen.point["node"]
        task = _Task(_loaded(loaders[node], rows, node), targets_U, num_classes, device)
    return curve, chosen, task


def _rank(point: Mapping[str, Any]) -> tuple[float, float, float]:
    """Lower is better."""
    return -point["validation_accuracy"], point["validation_nll"], point["C"]


@dataclass(frozen=True, slots=True)
class _Chosen:
    """A point of the comparison and what made it."""

    point: dict[str, Any]
    axes: logistic.Axes
    head_KP: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Task:
    """Telling classes apart by one node's features."""

    features_UD: NDArray[np.float32]
    targets_U: NDArray[np.int64]
    num_classes: int
    device: str

    def sweep(
        self, way: dict[str, Any], train: NDArray[np.int64], validation: NDArray[np.int64]
    ) -> tuple[list[dict[str, Any]], _Chosen]:
        """Fit every C on train; accuracy and mean NLL (nats) of each on validation, and the best of them.

        Args:
            way: `node` and `normalize`; they become part of each point.
            train: rows.
            validation: rows.
        """
        import torch

        axes = logistic.axes(self.features_UD, train, way["normalize"], self.device)
        columns_NP, columns_VP = axes.apply(self.features_UD, train), axes.apply(self.features_UD, validation)
        targets_V = torch.from_numpy(self.targets_U[validation]).to(self.device)
        best: _Chosen | None = None
        curve = []
        for values, heads_AKP in logistic.path(
            columns_NP, self.targets_U[train], axes.spectrum, self.num_classes, logistic.VALUES_OF_C
        ):
            hits_A, nll_A = torch.zeros(2, len(values), dtype=torch.float64)
            for rows, logits_AKV in logistic.logits(columns_VP, heads_AKP):
                hits_A += (logits_AKV.argmax(1) == targets_V[rows]).sum(1).cpu()
                nll_A += logistic.losses(logits_AKV.log_softmax(1), targets_V[rows]).cpu()
            accuracy_A, nll_A = hits_A / len(validation), nll_A / len(validation)
            for C, accuracy, nll, head_KP in zip(values.tolist(), accuracy_A.tolist(), nll_A.tolist(), heads_AKP, strict=True):
                point = {**way, "C": C, "validation_accuracy": accuracy, "validation_nll": nll}
                curve.append(point)
                if best is None or _rank(point) < _rank(best.point):
                    best = _Chosen(point, axes, head_KP)
        assert best is not None, "the grid has values"
        return curve, best

    def refit(self, chosen: _Chosen, rows: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32], bool]:
        """Folded weight (K, D) and bias (K,) at the C that was chosen, and whether the solver converged."""
        C, normalize = chosen.point["C"], chosen.point["normalize"]
        axes = logistic.axes(self.features_UD, rows, normalize, self.device, like=chosen.axes)
        columns_NP, targets_N = axes.apply(self.features_UD, rows), self.targets_U[rows]
        # From the head that was chosen: where C hardly binds there are many as good, and this is the one that did best.
        heads_AKP, converged = logistic.solve(
            columns_NP, targets_N, axes.spectrum, np.array([C]), chosen.head_KP[None], logistic.FINAL_TOLERANCE
        )
        return *axes.fold(heads_AKP[0]), converged
