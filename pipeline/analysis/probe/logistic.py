"""Logistic regression at many values of C in one solve: columns (N, P) float32 and class indices in, heads out.

The objective is scikit-learn's: mean softmax cross-entropy + ||weight||^2 / (2 C N), the bias unregularised. The solver is an
L-BFGS over a batch of heads, one for each C, each with its own history and step: one matrix product with the features serves
all heads in flight. Two things make it quick and leave the optimum alone: the features are turned to their principal axes,
where the Hessian is diagonal at zero weights and near it later; and the values of C are solved in waves, smallest first, each
head starting where the heads before it point to. Everything runs on the torch device that `axes` is given; features come from
host memory in pieces. Memory on it: one float32 copy of the rows fitted on and of those chosen on.

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

from pipeline.config import Standardize

if TYPE_CHECKING:  # torch takes seconds to load, and reading or applying weights does without it
    import torch

VALUES_OF_C: NDArray[np.float64] = 10 ** np.linspace(-6, 5, 45)
"""The grid of DINOv2's logistic regression."""
WAVE = 3
"""Heads solved together. Fewer make poor use of the matrix product; more start farther from what is known: on 51,000 x 112 rows
waves of 3 take as many evaluations as waves of 5, of 2/3 as many heads. All 45 at once, from zero, took 4.5 to 8 times."""
HISTORY = 10
"""Pairs that each head remembers, as in SciPy."""
MAX_EVALUATIONS = 500
"""Of one wave, and so of one head. When the final fit gets here, the result says so."""
RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE = 1e-4, 1e-8
"""A head is done when a step promises to lower its objective by less than 1e-4 of it plus 1e-8 nats. Unlike a bound on the
gradient this depends neither on the scale of the features nor, where C is large, on how small the gradient is far from the
optimum. The second is for classes that can be separated: there the objective itself goes to zero with growing C."""
FINAL_TOLERANCE = 3e-5
"""In place of the first for the one head that is handed out: it ends as near the optimum as scikit-learn's does by default, or
nearer (objectives on four data sets)."""
LOGITS_BYTES = 256 << 20
"""Most that the logits of one evaluation take; more rows than that go in several chunks."""
CACHE_BYTES, MIN_ROWS = 1 << 20, 1024
"""On a processor a chunk, with its columns, is what the cores' own caches hold: between the two products they stay there."""
ROWS_BYTES = 64 << 20
"""Most that a temporary copy of features takes while they are checked, standardised or scored."""
MAX_TURNED = 4096
"""Features up to which they are turned to their principal axes. Beyond it finding those takes minutes, and each feature is its
own axis: the same optimum in more evaluations."""


def chunks(rows: NDArray[np.int64], row_bytes: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Offset and row indices of pieces that take `ROWS_BYTES`, or one row."""
    count = max(1, ROWS_BYTES // row_bytes)
    for start in range(0, len(rows), count):
        yield start, rows[start : start + count]


def pieces(
    features_ND: NDArray[np.float32], rows: NDArray[np.int64], normalize: Standardize, device: str | torch.device
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Where in `rows` a piece lies, and its features (n, D) float32 on the device; with `l2` each row divided by its norm."""
    import torch

    for start, chunk in chunks(rows, 4 * features_ND.shape[1]):
        piece_ND = torch.from_numpy(features_ND[chunk]).to(device)
        if normalize == "l2":
            piece_ND /= torch.linalg.vector_norm(piece_ND, dim=1, keepdim=True).clamp_min(TINY)
        yield slice(start, start + len(chunk)), piece_ND


TINY = float(np.finfo(np.float32).tiny)
"""The smallest number that has an inverse in float32."""


def _wide(device: torch.device) -> torch.dtype:
    """float64 where the device has it."""
    import torch

    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """How features become the solver's columns: normalised, then turned to the principal axes of the rows fitted on."""

    normalize: Standardize
    mean: torch.Tensor
    """(D,) float32. Subtracted without `zscore` too: the bias is free, so it moves no optimum and helps the solver."""
    scale: torch.Tensor
    """(D,) float32. Divided by; 1 where a feature is constant, and everywhere without `zscore`."""
    rotation: torch.Tensor | None
    """(D, D) float32, orthonormal columns: the norm of the weights, and so the optimum, is the same in both bases. None above
    `MAX_TURNED` features."""
    spectrum: torch.Tensor
    """(P,) float32, positive: the variance along each axis, and 1 for the bias."""

    def apply(self, features_ND: NDArray[np.float32], rows: NDArray[np.int64]) -> torch.Tensor:
        """(rows, P) float32, contiguous."""
        import torch

        columns_NP = torch.ones(len(rows), len(self.spectrum), dtype=torch.float32, device=self.mean.device)
        for where, piece_ND in pieces(features_ND, rows, self.normalize, self.mean.device):
            piece_ND.sub_(self.mean).div_(self.scale)
            columns_NP[where, :-1] = piece_ND if self.rotation is None else piece_ND @ self.rotation
        return columns_NP

    def fold(self, head_KP: torch.Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Weight (K, D) and bias (K,) for features as they are, or, with `l2`, for features divided by their norms."""
        head = head_KP.cpu().double()
        turned_KD = head[:, :-1] if self.rotation is None else head[:, :-1] @ self.rotation.cpu().double().T
        weight_KD = turned_KD / self.scale.cpu().double()
        bias_K = head[:, -1] - weight_KD @ self.mean.cpu().double()
        return weight_KD.float().numpy(), bias_K.float().numpy()


def axes(
    features_ND: NDArray[np.float32],
    rows: NDArray[np.int64],
    normalize: Standardize,
    device: str = "cpu",
    like: Axes | None = None,
) -> Axes:
    """Statistics of the given rows, in float64 where the device has it, and their principal axes.

    With `like` the axes are those of other rows of the same features: the optimum is the same, and finding them is saved.
    """
    import torch

    wide, dim = _wide(torch.device(device)), features_ND.shape[1]
    # Sums of differences to one row: exactly 0 where a feature is constant, and no cancellation where its mean is large.
    origin_D = next(pieces(features_ND, rows[:1], normalize, device))[1][0].to(wide)
    first_D, second_D = torch.zeros(2, dim, dtype=wide, device=device)
    for _, piece_ND in pieces(features_ND, rows, normalize, device):
        difference_ND = piece_ND.to(wide) - origin_D
        first_D += difference_ND.sum(0)
        second_D += difference_ND.square_().sum(0)
    first_D /= len(rows)
    deviation_D = (second_D / len(rows) - first_D**2).clamp_min_(0).sqrt_()
    is_scaled_D = (deviation_D > TINY) & (normalize == "zscore")
    scale_D = torch.where(is_scaled_D, deviation_D, 1).float()
    mean_D = (origin_D + first_D).float()
    if like is not None:
        return Axes(normalize=normalize, mean=mean_D, scale=scale_D, rotation=like.rotation, spectrum=like.spectrum)

    rotation_DD, variance_D = None, ((deviation_D / scale_D) ** 2).float()
    if dim <= MAX_TURNED:
        gram_DD = torch.zeros(dim, dim, dtype=wide, device=device)
        for _, piece_ND in pieces(features_ND, rows, normalize, device):
            piece_ND.sub_(mean_D).div_(scale_D)
            gram_DD += piece_ND.T @ piece_ND
        # float32 is enough: only the orthonormality of the axes matters for the optimum, their order of merit for speed. Not
        # every device can do it; D x D is small for the processor.
        variance_D, rotation_DD = (each.to(device) for each in torch.linalg.eigh((gram_DD / len(rows)).float().cpu()))
    floor = max(1e-6 * float(variance_D.max()), TINY)  # below it they are rounding, even negative
    spectrum_P = torch.cat([variance_D.clamp_min(floor), torch.ones(1, dtype=torch.float32, device=device)])
    return Axes(normalize=normalize, mean=mean_D, scale=scale_D, rotation=rotation_DD, spectrum=spectrum_P)


def path(
    columns_NP: torch.Tensor,
    targets_N: NDArray[np.int64],
    spectrum_P: torch.Tensor,
    num_classes: int,
    values: NDArray[np.float64],
) -> Iterator[tuple[NDArray[np.float64], torch.Tensor]]:
    """Solve for ascending values of C, `WAVE` at a time; yields the values and their heads (A, K, P).

    The optimum moves smoothly with log C, so a head starts on the line through the last heads found. That takes a third of
    the evaluations of starting from the last head, and leads to better points where C is large and the optimum far from zero.
    """
    import torch

    device = columns_NP.device
    past: list[tuple[float, torch.Tensor]] = []  # log C and head (K, P), of three at most
    for begin in range(0, len(values), WAVE):
        some = values[begin : begin + WAVE]
        start_AKP = torch.zeros(len(some), num_classes, len(spectrum_P), dtype=torch.float32, device=device)
        if past:
            (first, first_KP), (last, last_KP) = past[0], past[-1]
            ahead_A = torch.from_numpy((np.log(some) - last) / ((last - first) or math.inf)).float().to(device)
            start_AKP = last_KP + ahead_A[:, None, None] * (last_KP - first_KP)
        heads_AKP, _ = solve(columns_NP, targets_N, spectrum_P, some, start_AKP)
        past = [*past, *zip(np.log(some).tolist(), heads_AKP, strict=True)][-3:]
        yield some, heads_AKP


def solve(
    columns_NP: torch.Tensor,
    targets_N: NDArray[np.int64],
    spectrum_P: torch.Tensor,
    values: NDArray[np.float64],
    start_AKP: torch.Tensor,
    tolerance: float = RELATIVE_TOLERANCE,
) -> tuple[torch.Tensor, bool]:
    """The heads (A, K, P) for A values of C, each from where it starts, and whether all of them converged."""
    import torch

    ridge_AP = (
        torch.from_numpy(1 / (values * len(columns_NP))).float().to(columns_NP.device)[:, None].repeat(1, len(spectrum_P))
    )
    ridge_AP[:, -1] = 0
    targets = torch.from_numpy(targets_N).to(columns_NP.device)
    return _minimise(columns_NP, targets, spectrum_P, ridge_AP, start_AKP, tolerance)


def _minimise(
    columns_NP: torch.Tensor,
    targets_N: torch.Tensor,
    spectrum_P: torch.Tensor,
    ridge_AP: torch.Tensor,
    start_AKP: torch.Tensor,
    tolerance: float,
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
        tolerance: relative.

    Returns:
        The heads (A, K, P) float32, and whether all of them converged.
    """
    import torch

    result_AKP = start_AKP.clone()
    num_classes = start_AKP.shape[1]
    flight_A = torch.arange(len(ridge_AP), device=ridge_AP.device)  # which head of the result each one still in flight is
    heads_AKP = start_AKP
    loss_A, value_A, slope_AKP = _evaluate(columns_NP, targets_N, heads_AKP, ridge_AP)
    history: deque[_Pair] = deque(maxlen=HISTORY)
    direction_AKP = _direction(slope_AKP, history, _inverse_curvature(loss_A, spectrum_P, ridge_AP, num_classes))
    descent_A = _dot(slope_AKP, direction_AKP)
    step_A, gain_A = torch.ones_like(value_A), torch.full_like(value_A, math.inf)
    num_evaluations = 1
    while True:
        tolerance_A = tolerance * value_A + ABSOLUTE_TOLERANCE
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
"""A step (A, K, P), the change of slope over it (A, K, P), their product (A,): all 0 for a head that did not move."""


def _dot(a_AKP: torch.Tensor, b_AKP: torch.Tensor) -> torch.Tensor:
    """(A,), in float64 where the device has it."""
    import torch

    product_A: torch.Tensor = torch.linalg.vecdot(a_AKP.flatten(1), b_AKP.flatten(1))
    return product_A.to(_wide(product_A.device))


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
    import torch

    num_heads, num_classes, width = heads_AKP.shape
    count = max(1, LOGITS_BYTES // (4 * num_heads * num_classes))
    if columns_NP.device.type == "cpu":
        cached = torch.get_num_threads() * CACHE_BYTES // (4 * (width + num_heads * num_classes))
        count = min(count, max(MIN_ROWS, cached))
    for start in range(0, len(columns_NP), count):
        rows = slice(start, start + count)
        yield rows, (heads_AKP.flatten(0, 1) @ columns_NP[rows].T).view(num_heads, num_classes, -1)


def losses(log_probabilities_AKN: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Cross-entropy summed over rows, nats: (A,), in float64 where the device has it."""
    index_A1N = targets_N.expand(len(log_probabilities_AKN), 1, -1)
    return -log_probabilities_AKN.gather(1, index_A1N).sum((1, 2), dtype=_wide(targets_N.device))


def _evaluate(
    columns_NP: torch.Tensor, targets_N: torch.Tensor, heads_AKP: torch.Tensor, ridge_AP: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean cross-entropy (A,) and objective (A,), as wide as `losses`, and the gradient of the objective (A, K, P) float32."""
    import torch

    wide = _wide(columns_NP.device)
    # Each number is exponentiated once: `log_softmax`, and `exp` of it for the slope, would do it twice.
    loss_A = torch.zeros(len(heads_AKP), dtype=wide, device=columns_NP.device)
    slope_AKP = torch.zeros_like(heads_AKP)
    for rows, residual_AKN in logits(columns_NP, heads_AKP):
        index_A1N = targets_N[rows].expand(len(heads_AKP), 1, -1)
        residual_AKN -= residual_AKN.amax(1, keepdim=True)
        loss_A -= residual_AKN.gather(1, index_A1N).sum((1, 2), dtype=wide)
        # No number below e^-60: it changes no sum, and denormal ones slow the product down forty times (measured).
        residual_AKN.clamp_min_(-60).exp_()
        sum_A1N = residual_AKN.sum(1, keepdim=True)
        residual_AKN /= sum_A1N
        loss_A += sum_A1N.log_().sum((1, 2), dtype=wide)
        residual_AKN.scatter_add_(1, index_A1N, residual_AKN.new_full((), -1).expand_as(index_A1N))
        slope_AKP += (residual_AKN.flatten(0, 1) @ columns_NP[rows]).view_as(slope_AKP)
    loss_A /= len(columns_NP)
    slope_AKP /= len(columns_NP)
    slope_AKP += ridge_AP[:, None] * heads_AKP
    return loss_A, loss_A + 0.5 * (heads_AKP**2 * ridge_AP[:, None]).sum((1, 2), dtype=wide), slope_AKP
