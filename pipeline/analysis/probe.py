"""A linear classifier trained on frozen embeddings: features (N, D) float32 and one label a row in, scores and weights out.

Rows are split by content hash, so that copies of one picture never sit on both sides. 45 values of C are compared on the
validation part, the best one is refitted on train and validation, and the test part is scored once. It reads no dataset and
writes no file: `metrics_json` and `weights_safetensors` give bytes that the caller publishes.

The solver is `logistic.py`, the scores are `scores.py`.

Legend: N rows, D features, K classes, H distinct hashes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline import config
from pipeline.analysis import logistic, scores
from pipeline.errors import ConfigError, GuardError

if TYPE_CHECKING:  # torch takes seconds to load, and reading or applying weights does without it
    pass

Label = str | int | float
"""What a class may be; `bool` is an `int`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Row indices of the three parts, int64, ascending, disjoint and together all rows."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """The trained classifier and how it did on the test part."""

    metrics: dict[str, Any]
    """Native values only, ready for JSON. `test_top5` is there with more than 5 classes only; `interval` is [low, high]."""
    classes: list[Label]
    """Class of each row of `weight`, sorted."""
    weight: NDArray[np.float32]
    """(K, D), for features as they are: standardising is folded in."""
    bias: NDArray[np.float32]
    """(K,)."""


def split(content_hashes: Sequence[str], labels: NDArray[np.int64], settings: config.Probe) -> Split:
    """Split rows into train, validation and test, by content hash and stratified by class.

    The unit is the distinct hash; its class is the lowest label of its rows. Within a class the hashes are ordered by
    SHA-256 of seed and hash; the first go to test, the next to validation. Depends on neither the order nor the number of
    copies. A share of a class is rounded to whole hashes, halves down: a class with a single hash goes to train.

    Args:
        content_hashes: N of them.
        labels: (N,) int64, not negative.
        settings: `validation`, `test` and `seed` are used.
    """
    codes: dict[str, int] = {}
    code_N = np.fromiter((codes.setdefault(name, len(codes)) for name in content_hashes), np.int64, len(content_hashes))
    class_H = np.full(len(codes), np.iinfo(np.int64).max)
    np.minimum.at(class_H, code_N, labels)  # the lowest, not the first: copies may disagree, and row order must not matter
    digests = b"".join(hashlib.sha256(f"{settings.seed}:{name}".encode()).digest() for name in codes)
    digest_H4 = np.frombuffer(digests, dtype=">u8").reshape(-1, 4)
    order_H = np.lexsort((*digest_H4.T[::-1], class_H))

    _, start, size = np.unique(class_H[order_H], return_index=True, return_counts=True)
    num_test = np.ceil(settings.test * size - 0.5)
    num_held = np.minimum(num_test + np.ceil(settings.validation * size - 0.5), size - 1)  # a class is never without train
    rank_H = np.arange(len(order_H)) - np.repeat(start, size)
    part_H = np.empty(len(order_H), "U10")
    part_H[order_H] = np.select(
        [rank_H < np.repeat(num_test, size), rank_H < np.repeat(num_held, size)], ["test", "validation"], "train"
    )
    part_N = part_H[code_N]
    return Split(**{part: np.flatnonzero(part_N == part) for part in ("train", "validation", "test")})


def fit(
    features_ND: NDArray[np.float32],
    labels: Sequence[Label | None] | NDArray[Any],
    content_hashes: Sequence[str],
    settings: config.Probe,
) -> ProbeResult:
    """Choose C on the validation part, refit on train and validation, score once on test.

    Args:
        features_ND: (N, D) float32, any scale; finite in the labelled rows.
        labels: N of them; None and NaN are unlabelled rows, which are left out and counted.
        content_hashes: N of them; equal for copies.
        settings: the `probe` section of the config.

    Raises:
        ConfigError: the labels are not scalars, or are too few for two classes and three parts.
        GuardError: a labelled row holds a value that is not finite.
    """
    started = time.perf_counter()
    assert len(features_ND) == len(labels) == len(content_hashes)
    assert features_ND.dtype == np.float32
    classes, targets_N = _encode(labels, settings)
    labelled = np.flatnonzero(targets_N >= 0)
    if not len(labelled):
        raise ConfigError(f"probe.label: column {settings.label!r} has no label in any of {len(labels)} rows.")
    if len(classes) < 2:
        raise ConfigError(f"probe.label: column {settings.label!r} has the one class {classes[0]!r}; at least 2 are needed.")
    _check_finite(features_ND, labelled)
    parts = split([content_hashes[row] for row in labelled.tolist()], targets_N[labelled], settings)
    train, validation, test = labelled[parts.train], labelled[parts.validation], labelled[parts.test]
    if not len(validation) or not len(test):
        raise ConfigError(
            f"probe.label: column {settings.label!r} has {len(labelled)} labelled rows in {len(classes)} classes, too few"
            f" distinct images in each for probe.validation: {settings.validation} and probe.test: {settings.test}."
        )

    curve = _sweep(features_ND, targets_N, train, validation, len(classes), settings.standardize)
    best = min(curve, key=lambda point: (-point["validation_accuracy"], point["validation_nll"], point["C"]))["C"]
    warnings = []
    if best in (logistic.VALUES_OF_C[0], logistic.VALUES_OF_C[-1]):
        warnings.append(f"The best C is {best:g}, at the edge of the grid: a better one may lie outside.")

    both = np.sort(np.concatenate([train, validation]))
    weight_KD, bias_K, converged = _refit(features_ND, targets_N, both, len(classes), settings.standardize, best)
    if not converged:
        warnings.append(f"The final fit was stopped after {logistic.MAX_EVALUATIONS} evaluations, before it had converged.")
    scored = scores.score(features_ND, targets_N, test, content_hashes, weight_KD, bias_K, settings.seed)
    unseen = len(classes) - len(np.unique(targets_N[test]))
    if unseen:
        warnings.append(f"{unseen} of {len(classes)} classes have no test row, and no part in the scores.")
    metrics = {
        **scored,
        "C": best,
        "num_train": len(train),
        "num_validation": len(validation),
        "num_test": len(test),
        "num_classes": len(classes),
        "num_unlabelled": len(labels) - len(labelled),
        "dim": features_ND.shape[1],
        "curve": curve,
        "warnings": warnings,
        "seconds": time.perf_counter() - started,
    }
    return ProbeResult(metrics=metrics, classes=classes, weight=weight_KD, bias=bias_K)


def predict(
    features_ND: NDArray[np.float32], weight_KD: NDArray[np.float32], bias_K: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Class index (N,) int64 and probabilities (N, K) float32 of features (N, D) as they are."""
    probabilities_NK = np.exp(scores.log_probabilities(features_ND, weight_KD, bias_K))
    return probabilities_NK.argmax(1), probabilities_NK.astype(np.float32)


def metrics_json(result: ProbeResult) -> bytes:
    """The metrics and the class names as UTF-8 JSON."""
    return json.dumps({**result.metrics, "classes": result.classes}, ensure_ascii=False, indent=1, allow_nan=False).encode()


def weights_safetensors(result: ProbeResult) -> bytes:
    """A safetensors file with `weight` (K, D) and `bias` (K,), float32; its metadata field `classes` is a JSON list."""
    from safetensors.numpy import save

    classes = json.dumps(result.classes, ensure_ascii=False)
    return save({"weight": result.weight, "bias": result.bias}, metadata={"classes": classes})


def load_weights(payload: bytes) -> tuple[NDArray[np.float32], NDArray[np.float32], list[Label]]:
    """`weight` (K, D), `bias` (K,) and the classes out of what `weights_safetensors` gave."""
    from safetensors.numpy import load

    tensors = load(payload)
    header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])  # `load` drops the metadata
    return tensors["weight"], tensors["bias"], json.loads(header["__metadata__"]["classes"])


def _encode(labels: Sequence[Label | None] | NDArray[Any], settings: config.Probe) -> tuple[list[Label], NDArray[np.int64]]:
    """The sorted classes, and for each row its class index (N,) int64, -1 where there is no label."""
    plain = [label.item() if isinstance(label, np.generic) else label for label in labels]
    plain = [None if label != label else label for label in plain]  # NaN: how NumPy and pandas write a missing label
    for kind in {type(label) for label in plain} - {type(None)}:
        if not issubclass(kind, (str, int, float)):
            raise ConfigError(f"probe.label: column {settings.label!r} holds {kind.__name__}; a class is a text or a number.")
    classes = sorted({label for label in plain if label is not None}, key=lambda label: (isinstance(label, str), label))
    index = {label: row for row, label in enumerate(classes)}
    return classes, np.fromiter((-1 if label is None else index[label] for label in plain), np.int64, len(plain))


def _check_finite(features_ND: NDArray[np.float32], rows: NDArray[np.int64]) -> None:
    bad = [chunk[~np.isfinite(features_ND[chunk]).all(1)] for _, chunk in logistic.chunks(rows, 4 * features_ND.shape[1])]
    if num_bad := sum(map(len, bad)):
        raise GuardError(f"{num_bad} embeddings hold values that are not finite, the first in row {np.concatenate(bad)[0]}.")


def _sweep(
    features_ND: NDArray[np.float32],
    targets_N: NDArray[np.int64],
    train: NDArray[np.int64],
    validation: NDArray[np.int64],
    num_classes: int,
    standardize: bool,
) -> list[dict[str, float]]:
    """Fit every C on train; accuracy and mean NLL (nats) of each on validation."""
    import torch

    axes = logistic.axes(features_ND, train, standardize)
    columns_NP, columns_VP = axes.apply(features_ND, train), axes.apply(features_ND, validation)
    targets_V = torch.from_numpy(targets_N[validation])
    curve = []
    for values, heads_AKP, _ in logistic.path(
        columns_NP, targets_N[train], axes.spectrum, num_classes, logistic.VALUES_OF_C, logistic.WAVE
    ):
        hits_A = nll_A = torch.zeros(len(values), dtype=torch.float64)
        for rows, logits_AKV in logistic.logits(columns_VP, heads_AKP):
            hits_A = hits_A + (logits_AKV.argmax(1) == targets_V[rows]).sum(1)
            nll_A = nll_A + logistic.losses(logits_AKV.log_softmax(1), targets_V[rows])
        accuracy_A, nll_A = hits_A / len(validation), nll_A / len(validation)
        for C, accuracy, nll in zip(values.tolist(), accuracy_A.tolist(), nll_A.tolist(), strict=True):
            curve.append({"C": C, "validation_accuracy": accuracy, "validation_nll": nll})
    return curve


def _refit(
    features_ND: NDArray[np.float32],
    targets_N: NDArray[np.int64],
    rows: NDArray[np.int64],
    num_classes: int,
    standardize: bool,
    C: float,
) -> tuple[NDArray[np.float32], NDArray[np.float32], bool]:
    """Folded weight (K, D) and bias (K,) at one C, and whether the solver converged."""
    axes = logistic.axes(features_ND, rows, standardize)
    # Along the same path as in the sweep, one head a wave: quicker than from zero, and the same head where C hardly binds.
    waypoints = logistic.VALUES_OF_C[logistic.WAVE - 1 :: logistic.WAVE]
    values = np.append(waypoints[waypoints < C], C)
    columns_NP = axes.apply(features_ND, rows)
    *_, (_, heads_AKP, converged) = logistic.path(columns_NP, targets_N[rows], axes.spectrum, num_classes, values, 1)
    return *axes.fold(heads_AKP[-1]), converged
