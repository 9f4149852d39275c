"""Logistic regression at many values of C in one solve: columns (N, P) float32 and class indices in, heads out.

The objective is scikit-learn's: mean softmax cross-entropy + ||weight||^2 / (2 C N), the bias unregularised. The solver is an
L-BFGS over a batch of heads, one for each C, each with its own history and step: one matrix product with the features serves
all heads in flight. Two things make it quick and leave the optimum alone: the features are turned to their principal axes,
where the Hessian is diagonal at zero weights and near it later; and the values of C are solved in waves, smallest first, each
head starting where the heads before it point to. Memory: one float32 copy of the rows fitted on, besides the features.

Legend: N rows, D features, P = D + 1 (the last column is 1, for the bias), K classes, A heads in flight.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # torch takes seconds to load, and reading or applying weights does without it
    import torch

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


def chunks(rows: NDArray[np.int64], row_bytes: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Offset and row indices of pieces that take `ROWS_BYTES`, or one row."""
    count = max(1, ROWS_BYTES // row_bytes)
    for start in range(0, len(rows), count):
        yield start, rows[start : start + count]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
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
        for start, chunk in chunks(rows, 4 * features_ND.shape[1]):
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


def axes(features_ND: NDArray[np.float32], rows: NDArray[np.int64], standardize: bool) -> Axes:
    """Statistics of the given rows, in float64, and their principal axes."""
    import torch

    dim = features_ND.shape[1]
    # Sums of differences to one row: exactly 0 where a feature is constant, and no cancellation where its mean is large.
    origin_D = features_ND[rows[0]].astype(np.float64)
    first_D, second_D = np.zeros(dim), np.zeros(dim)
    for _, chunk in chunks(rows, 8 * dim):
        difference_ND = features_ND[chunk] - origin_D
        first_D += difference_ND.sum(0)
        second_D += np.einsum("nd,nd->d", difference_ND, difference_ND)
    first_D /= len(rows)
    deviation_D = np.sqrt(np.maximum(second_D / len(rows) - first_D**2, 0))
    usable_D = deviation_D > np.finfo(np.float32).tiny  # its inverse must be a float32 as well
    scale_D = np.where(usable_D & standardize, deviation_D, 1).astype(np.float32)
    mean_D = (origin_D + first_D).astype(np.float32)

    gram_DD = torch.zeros(dim, dim, dtype=torch.float64)
    for _, chunk in chunks(rows, 4 * dim):
        standard_ND = _standardised(features_ND, chunk, mean_D, scale_D)
        gram_DD += standard_ND.T @ standard_ND
    # float32 is enough: only the orthonormality of the axes matters for the optimum, their order of merit for speed.
    variance_D, rotation_DD = torch.linalg.eigh((gram_DD / len(rows)).float())
    floor = max(1e-6 * float(variance_D[-1]), float(np.finfo(np.float32).tiny))  # below it they are rounding, even negative
    spectrum_P = torch.cat([variance_D.clamp_min(floor), torch.ones(1, dtype=torch.float32)])
    return Axes(mean=mean_D, scale=scale_D, rotation=rotation_DD, spectrum=spectrum_P)


def path(
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
        columns_NP: float32, from `Axes.apply`.
        targets_N: int64 class indices.
        spectrum_P: float32, from `Axes`.
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


def logits(columns_NP: torch.Tensor, heads_AKP: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows and their logits (A, K, rows), in chunks. Rows come last: softmax over K is then four times as quick."""
    num_heads, num_classes, _ = heads_AKP.shape
    count = max(1, LOGITS_BYTES // (4 * num_heads * num_classes))
    for start in range(0, len(columns_NP), count):
        rows = slice(start, start + count)
        yield rows, (heads_AKP.flatten(0, 1) @ columns_NP[rows].T).view(num_heads, num_classes, -1)


def losses(log_probabilities_AKN: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
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
    for rows, logits_AKN in logits(columns_NP, heads_AKP):
        residual_AKN = logits_AKN.log_softmax(1)
        loss_A += losses(residual_AKN, targets_N[rows])
        # No probability below e^-60: it changes no sum, and denormal numbers slow the product down forty times (measured).
        residual_AKN.clamp_min_(-60).exp_()
        index_A1N = targets_N[rows].expand(len(heads_AKP), 1, -1)
        residual_AKN.scatter_add_(1, index_A1N, torch.full((), -1, dtype=torch.float32).expand_as(index_A1N))
        slope_AKP += (residual_AKN.flatten(0, 1) @ columns_NP[rows]).view_as(slope_AKP)
    loss_A /= len(columns_NP)
    slope_AKP /= len(columns_NP)
    slope_AKP += ridge_AP[:, None] * heads_AKP
    return loss_A, loss_A + 0.5 * (heads_AKP**2 * ridge_AP[:, None]).sum((1, 2), dtype=torch.float64), slope_AKP
