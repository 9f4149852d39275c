"""A linear classifier trained on frozen embeddings: features (N, D) float32 and one label a row in, scores and weights out.

Rows are split by content hash, so that copies of one picture never sit on both sides. 45 values of C are compared on the
validation part, the best one is refitted on train and validation, and the test part is scored once. It reads no dataset and
writes no file: `metrics_json` and `weights_safetensors` give bytes that the caller publishes.

The objective is scikit-learn's: mean softmax cross-entropy + ||weight||^2 / (2 C N), the bias unregularised. The solver is an
L-BFGS over a batch of heads, one for each C, each with its own history and step: one matrix product with the features serves
all heads in flight. Two things make it quick and leave the optimum alone: the features are turned to their principal axes,
where the Hessian is diagonal at zero weights and near it later; and the values of C are solved in waves, smallest first, each
head starting where the heads before it point to. Memory: one float32 copy of the rows fitted on, besides the features.

Legend: N rows, D features, P = D + 1 (the last column is 1, for the bias), K classes, A heads in flight, H distinct hashes.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline import config
from pipeline.errors import ConfigError, GuardError

if TYPE_CHECKING:  # torch takes seconds to load, and reading or applying weights does without it
    import torch

Label = str | int | float
"""What a class may be; `bool` is an `int`."""

VALUES_OF_C: NDArray[np.float64] = 10 ** np.linspace(-6, 5, 45)
"""The grid of DINOv2's logistic regression."""
WAVE = 5
"""Heads solved together. On 7,000 x 1,280 rows of 10 classes all 45 at once, from zero, took 4.5 to 8 times the evaluations."""
HISTORY = 10
"""Pairs that each head remembers, as in SciPy."""
MAX_EVALUATIONS = 500
"""Of one wave, and so of one head. When the final fit gets here, the result says so."""
RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE = 1e-4, 1e-8
"""A head is done when a step promises to lower its objective by less than 1e-4 of it plus 1e-8 nats. Unlike a bound on the
gradient this depends neither on the scale of the features nor, where C is large, on how small the gradient is far from the
optimum. The second is for classes that can be separated: there the objective itself goes to zero with growing C."""
LOGITS_BYTES = 256 << 20
"""Most that the logits of one evaluation take; more rows than that go in several chunks."""
ROWS_BYTES = 64 << 20
"""Most that a temporary copy of features takes while they are checked, standardised or scored."""
NUM_BINS, NUM_RESAMPLES, TOP = 15, 1000, 5


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
    if best in (VALUES_OF_C[0], VALUES_OF_C[-1]):
        warnings.append(f"The best C is {best:g}, at the edge of the grid: a better one may lie outside.")

    both = np.sort(np.concatenate([train, validation]))
    weight_KD, bias_K, converged = _refit(features_ND, targets_N, both, len(classes), settings.standardize, best)
    if not converged:
        warnings.append(f"The final fit was stopped after {MAX_EVALUATIONS} evaluations, before it had converged.")
    scores = _score(features_ND, targets_N, test, content_hashes, weight_KD, bias_K, settings.seed)
    unseen = len(classes) - len(np.unique(targets_N[test]))
    if unseen:
        warnings.append(f"{unseen} of {len(classes)} classes have no test row, and no part in the scores.")
    metrics = {
        **scores,
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
    probabilities_NK = np.exp(_log_probabilities(features_ND, weight_KD, bias_K))
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


def _chunks(rows: NDArray[np.int64], row_bytes: int, most: int = ROWS_BYTES) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Offset and row indices of pieces that take `most` bytes, or one row."""
    count = max(1, most // row_bytes)
    for start in range(0, len(rows), count):
        yield start, rows[start : start + count]


def _check_finite(features_ND: NDArray[np.float32], rows: NDArray[np.int64]) -> None:
    bad = [chunk[~np.isfinite(features_ND[chunk]).all(1)] for _, chunk in _chunks(rows, 4 * features_ND.shape[1])]
    if num_bad := sum(map(len, bad)):
        raise GuardError(f"{num_bad} embeddings hold values that are not finite, the first in row {np.concatenate(bad)[0]}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Axes:
    """How features become the solver's columns: standardised, then turned to the principal axes of the rows fitted on."""

    mean: NDArray[np.float32]
    """(D,). Subtracted even where standardising is off: the bias is free, so it moves no optimum and helps the solver."""
    scale: NDArray[np.float32]
    """(D,). Divided by; 1 where a feature is constant, and everywhere when standardising is off."""
    rotation: torch.Tensor
    """(D, D) float32, orthonormal columns: the norm of the weights, and so the optimum, is the same in both bases."""
    spectrum: torch.Tensor
    """(P,) float32, positive: the variance along each axis, and 1 for the bias."""

    def apply(self, features_ND: NDArray[np.float32], rows: NDArray[np.int64]) -> torch.Tensor:
        """(rows, P) float32, contiguous."""
        import torch

        columns_NP = torch.ones(len(rows), len(self.spectrum), dtype=torch.float32)
        for start, chunk in _chunks(rows, 4 * features_ND.shape[1]):
            standard_ND = _standardised(features_ND, chunk, self.mean, self.scale)
            columns_NP[start : start + len(chunk), :-1] = standard_ND @ self.rotation
        return columns_NP

    def fold(self, head_KP: torch.Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Weight (K, D) and bias (K,) for features as they are."""
        weight_KD = (head_KP[:, :-1].double() @ self.rotation.double().T).numpy() / self.scale
        bias_K = head_KP[:, -1].double().numpy() - weight_KD @ self.mean.astype(np.float64)
        return weight_KD.astype(np.float32), bias_K.astype(np.float32)


def _standardised(
    features_ND: NDArray[np.float32], rows: NDArray[np.int64], mean_D: NDArray[np.float32], scale_D: NDArray[np.float32]
) -> torch.Tensor:
    import torch

    return torch.from_numpy((features_ND[rows] - mean_D) / scale_D)


def _axes(features_ND: NDArray[np.float32], rows: NDArray[np.int64], standardize: bool) -> _Axes:
    """Statistics of the given rows, in float64, and their principal axes."""
    import torch

    dim = features_ND.shape[1]
    # Sums of differences to one row: exactly 0 where a feature is constant, and no cancellation where its mean is large.
    origin_D = features_ND[rows[0]].astype(np.float64)
    first_D, second_D = np.zeros(dim), np.zeros(dim)
    for _, chunk in _chunks(rows, 8 * dim):
        difference_ND = features_ND[chunk] - origin_D
        first_D += difference_ND.sum(0)
        second_D += np.einsum("nd,nd->d", difference_ND, difference_ND)
    first_D /= len(rows)
    deviation_D = np.sqrt(np.maximum(second_D / len(rows) - first_D**2, 0))
    usable_D = deviation_D > np.finfo(np.float32).tiny  # its inverse must be a float32 as well
    scale_D = np.where(usable_D & standardize, deviation_D, 1).astype(np.float32)
    mean_D = (origin_D + first_D).astype(np.float32)

    gram_DD = torch.zeros(dim, dim, dtype=torch.float64)
    for _, chunk in _chunks(rows, 4 * dim):
        standard_ND = _standardised(features_ND, chunk, mean_D, scale_D)
        gram_DD += standard_ND.T @ standard_ND
    # float32 is enough: only the orthonormality of the axes matters for the optimum, their order of merit for speed.
    variance_D, rotation_DD = torch.linalg.eigh((gram_DD / len(rows)).float())
    floor = max(1e-6 * float(variance_D[-1]), float(np.finfo(np.float32).tiny))  # below it they are rounding, even negative
    spectrum_P = torch.cat([variance_D.clamp_min(floor), torch.ones(1, dtype=torch.float32)])
    return _Axes(mean=mean_D, scale=scale_D, rotation=rotation_DD, spectrum=spectrum_P)


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

    axes = _axes(features_ND, train, standardize)
    columns_NP, columns_VP = axes.apply(features_ND, train), axes.apply(features_ND, validation)
    targets_V = torch.from_numpy(targets_N[validation])
    curve = []
    for values, heads_AKP, _ in _path(columns_NP, targets_N[train], axes.spectrum, num_classes, VALUES_OF_C, WAVE):
        hits_A = nll_A = torch.zeros(len(values), dtype=torch.float64)
        for rows, logits_AKV in _logits(columns_VP, heads_AKP):
            hits_A = hits_A + (logits_AKV.argmax(1) == targets_V[rows]).sum(1)
            nll_A = nll_A + _losses(logits_AKV.log_softmax(1), targets_V[rows])
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
    axes = _axes(features_ND, rows, standardize)
    # Along the same path as in the sweep, one head a wave: quicker than from zero, and the same head where C hardly binds.
    waypoints = VALUES_OF_C[WAVE - 1 :: WAVE]
    values = np.append(waypoints[waypoints < C], C)
    columns_NP = axes.apply(features_ND, rows)
    *_, (_, heads_AKP, converged) = _path(columns_NP, targets_N[rows], axes.spectrum, num_classes, values, 1)
    return *axes.fold(heads_AKP[-1]), converged


def _path(
    columns_NP: torch.Tensor,
    targets_N: NDArray[np.int64],
    spectrum_P: torch.Tensor,
    num_classes: int,
    values: NDArray[np.float64],
    wave: int,
) -> Iterator[tuple[NDArray[np.float64], torch.Tensor, bool]]:
    """Solve for ascending values of C, `wave` at a time; yields the values, their heads (A, K, P) and whether all converged.

    The optimum moves smoothly with log C, so a head starts on the line through the last heads found. That takes a third of
    the evaluations of starting from the last head, and leads to better points where C is large and the optimum far from zero.
    """
    import torch

    targets = torch.from_numpy(targets_N)
    past: list[tuple[float, torch.Tensor]] = []  # log C and head (K, P), of three at most
    for begin in range(0, len(values), wave):
        some = values[begin : begin + wave]
        ridge_AP = torch.from_numpy(1 / (some * len(columns_NP))).float()[:, None].repeat(1, len(spectrum_P))
        ridge_AP[:, -1] = 0
        start_AKP = torch.zeros(len(some), num_classes, len(spectrum_P), dtype=torch.float32)
        if past:
            (first, first_KP), (last, last_KP) = past[0], past[-1]
            ahead_A = torch.from_numpy((np.log(some) - last) / ((last - first) or math.inf)).float()
            start_AKP = last_KP + ahead_A[:, None, None] * (last_KP - first_KP)
        heads_AKP, converged = _minimise(columns_NP, targets, spectrum_P, ridge_AP, start_AKP)
        past = [*past, *zip(np.log(some).tolist(), heads_AKP, strict=True)][-3:]
        yield some, heads_AKP, converged


def _minimise(
    columns_NP: torch.Tensor, targets_N: torch.Tensor, spectrum_P: torch.Tensor, ridge_AP: torch.Tensor, start_AKP: torch.Tensor
) -> tuple[torch.Tensor, bool]:
    """L-BFGS over a batch of heads that share nothing but the products with the features.

    Every round evaluates one trial point of every head. A head whose trial lowers its objective enough moves there and takes
    a new direction; any other shortens its step. A head that is done leaves the batch, and with it the product.

    Args:
        columns_NP: float32, from `_Axes.apply`.
        targets_N: int64 class indices.
        spectrum_P: float32, from `_Axes`.
        ridge_AP: float32, 1 / (C N), and 0 for the bias.
        start_AKP: float32, where each head starts.

    Returns:
        The heads (A, K, P) float32, and whether all of them converged.
    """
    import torch

    result_AKP = start_AKP.clone()
    num_classes = start_AKP.shape[1]
    flight_A = torch.arange(len(ridge_AP))  # which head of the result each one still in flight is
    heads_AKP = start_AKP
    loss_A, value_A, slope_AKP = _evaluate(columns_NP, targets_N, heads_AKP, ridge_AP)
    history: deque[_Pair] = deque(maxlen=HISTORY)
    direction_AKP = _direction(slope_AKP, history, _inverse_curvature(loss_A, spectrum_P, ridge_AP, num_classes))
    descent_A = _dot(slope_AKP, direction_AKP)
    step_A, gain_A = torch.ones_like(value_A), torch.full_like(value_A, math.inf)
    num_evaluations = 1
    while True:
        tolerance_A = RELATIVE_TOLERANCE * value_A + ABSOLUTE_TOLERANCE
        # The last two: what is promised is rounding, met by the gain of the last step, or by no step at all.
        done_A = (-descent_A / 2 <= tolerance_A) | (gain_A < 0.01 * tolerance_A) | (step_A < 1e-6)
        if done_A.any() or num_evaluations >= MAX_EVALUATIONS:
            result_AKP[flight_A] = heads_AKP
            if done_A.all() or num_evaluations >= MAX_EVALUATIONS:
                return result_AKP, bool(done_A.all())
            keep = ~done_A
            heads_AKP, slope_AKP, direction_AKP, ridge_AP = (x[keep] for x in (heads_AKP, slope_AKP, direction_AKP, ridge_AP))
            flight_A, value_A, descent_A, step_A, gain_A = (x[keep] for x in (flight_A, value_A, descent_A, step_A, gain_A))
            history = deque(([x[keep] for x in pair] for pair in history), maxlen=HISTORY)

        trial_AKP = heads_AKP + step_A.float()[:, None, None] * direction_AKP
        loss_A, trial_value_A, trial_slope_AKP = _evaluate(columns_NP, targets_N, trial_AKP, ridge_AP)
        num_evaluations += 1
        # Armijo, with room for the rounding of float32 logits. The objective is convex: curvature along a step is positive.
        accepted_A = trial_value_A <= value_A + 1e-4 * step_A * descent_A + 1e-6 * value_A
        excess_A = (trial_value_A - value_A) / step_A - descent_A
        shorter_A = step_A * (-descent_A / (2 * excess_A)).nan_to_num(0).clamp(0.1, 0.5)  # least point of a parabola
        step_A = torch.where(accepted_A, 1, shorter_A)
        if not accepted_A.any():
            continue
        mask = accepted_A[:, None, None]
        moved_AKP = torch.where(mask, trial_AKP - heads_AKP, 0)
        change_AKP = torch.where(mask, trial_slope_AKP - slope_AKP, 0)
        heads_AKP = torch.where(mask, trial_AKP, heads_AKP)
        slope_AKP = torch.where(mask, trial_slope_AKP, slope_AKP)
        gain_A = torch.where(accepted_A, value_A - trial_value_A, gain_A)
        value_A = torch.where(accepted_A, trial_value_A, value_A)
        history.append([moved_AKP, change_AKP, _dot(moved_AKP, change_AKP)])
        inverse_AKP = _inverse_curvature(loss_A, spectrum_P, ridge_AP, num_classes)
        direction_AKP = torch.where(mask, _direction(slope_AKP, history, inverse_AKP), direction_AKP)
        descent_A = _dot(slope_AKP, direction_AKP)


_Pair = list[Any]
"""A step (A, K, P), the change of slope over it (A, K, P), their product (A,) float64: all 0 for a head that did not move."""


def _dot(a_AKP: torch.Tensor, b_AKP: torch.Tensor) -> torch.Tensor:
    """(A,) float64."""
    import torch

    product_A: torch.Tensor = torch.linalg.vecdot(a_AKP.flatten(1), b_AKP.flatten(1))
    return product_A.double()


def _inverse_curvature(
    loss_A: torch.Tensor, spectrum_P: torch.Tensor, ridge_AP: torch.Tensor, num_classes: int
) -> torch.Tensor:
    """A diagonal guess (A, 1, P) of the inverse Hessian, from the mean cross-entropy (A,) alone.

    A row with probabilities p contributes (diag p - p p^T) times its features' outer product. Taking all rows as equally
    certain, which is exact at zero weights, that is a number times the covariance, and the covariance is diagonal here.
    """
    wrong_A = -(-loss_A.clamp(1e-8, math.log(num_classes))).expm1()
    curvature_A = (2 * wrong_A - wrong_A**2 * num_classes / (num_classes - 1)) / (num_classes - 1)
    return 1 / (curvature_A.float()[:, None] * spectrum_P + ridge_AP)[:, None]


def _direction(slope_AKP: torch.Tensor, history: deque[_Pair], inverse_A1P: torch.Tensor) -> torch.Tensor:
    """The two-loop recursion, with the diagonal guess scaled to the newest pair; (A, K, P), downhill."""
    import torch

    q_AKP = slope_AKP.clone()
    shares = []
    for moved_AKP, change_AKP, product_A in reversed(history):
        share_A = torch.where(product_A > 0, _dot(moved_AKP, q_AKP) / product_A, 0)
        q_AKP.addcmul_(share_A.float()[:, None, None], change_AKP, value=-1)
        shares.append(share_A)
    q_AKP *= inverse_A1P
    if history:
        _, change_AKP, product_A = history[-1]
        scale_A = torch.where(product_A > 0, product_A / _dot(change_AKP, change_AKP * inverse_A1P), 1)
        q_AKP *= scale_A.float()[:, None, None]
    for (moved_AKP, change_AKP, product_A), share_A in zip(history, reversed(shares), strict=True):
        other_A = torch.where(product_A > 0, _dot(change_AKP, q_AKP) / product_A, 0)
        q_AKP.addcmul_((share_A - other_A).float()[:, None, None], moved_AKP)
    return -q_AKP


def _logits(columns_NP: torch.Tensor, heads_AKP: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows and their logits (A, K, rows), in chunks. Rows come last: softmax over K is then four times as quick."""
    num_heads, num_classes, _ = heads_AKP.shape
    count = max(1, LOGITS_BYTES // (4 * num_heads * num_classes))
    for start in range(0, len(columns_NP), count):
        rows = slice(start, start + count)
        yield rows, (heads_AKP.flatten(0, 1) @ columns_NP[rows].T).view(num_heads, num_classes, -1)


def _losses(log_probabilities_AKN: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Cross-entropy summed over rows, nats: (A,) float64."""
    import torch

    index_A1N = targets_N.expand(len(log_probabilities_AKN), 1, -1)
    return -log_probabilities_AKN.gather(1, index_A1N).sum((1, 2), dtype=torch.float64)


def _evaluate(
    columns_NP: torch.Tensor, targets_N: torch.Tensor, heads_AKP: torch.Tensor, ridge_AP: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean cross-entropy (A,) and objective (A,), both float64, and the gradient of the objective (A, K, P) float32."""
    import torch

    loss_A = torch.zeros(len(heads_AKP), dtype=torch.float64)
    slope_AKP = torch.zeros_like(heads_AKP)
    for rows, logits_AKN in _logits(columns_NP, heads_AKP):
        residual_AKN = logits_AKN.log_softmax(1)
        loss_A += _losses(residual_AKN, targets_N[rows])
        # No probability below e^-60: it changes no sum, and denormal numbers slow the product down forty times (measured).
        residual_AKN.clamp_min_(-60).exp_()
        index_A1N = targets_N[rows].expand(len(heads_AKP), 1, -1)
        residual_AKN.scatter_add_(1, index_A1N, torch.full((), -1, dtype=torch.float32).expand_as(index_A1N))
        slope_AKP += (residual_AKN.flatten(0, 1) @ columns_NP[rows]).view_as(slope_AKP)
    loss_A /= len(columns_NP)
    slope_AKP /= len(columns_NP)
    slope_AKP += ridge_AP[:, None] * heads_AKP
    return loss_A, loss_A + 0.5 * (heads_AKP**2 * ridge_AP[:, None]).sum((1, 2), dtype=torch.float64), slope_AKP


def _log_probabilities(
    features_ND: NDArray[np.float32], weight_KD: NDArray[np.float32], bias_K: NDArray[np.float32]
) -> NDArray[np.float64]:
    """(N, K), finite even where a probability is too small for a float."""
    logits_NK = (features_ND @ weight_KD.T + bias_K).astype(np.float64)
    logits_NK -= logits_NK.max(1, keepdims=True)
    logits_NK -= np.log(np.exp(logits_NK).sum(1, keepdims=True))
    return logits_NK


def _score(
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
    for start, rows in _chunks(test, 4 * features_ND.shape[1] + 24 * num_classes):
        piece = slice(start, start + len(rows))
        log_NK = _log_probabilities(features_ND[rows], weight_KD, bias_K)
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
        "interval": _interval([content_hashes[row] for row in test.tolist()], right, seed),
        "confusion": confusion_KK.tolist(),
    }
    return scores | ({"test_top5": float((rank <= TOP).mean())} if num_classes > TOP else {})


def _interval(content_hashes: Sequence[str], right_N: NDArray[np.bool_], seed: int) -> list[float]:
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
