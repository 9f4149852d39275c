"""Rows whose label is probably wrong: a probe that has never seen a row is sure that it belongs to another class.

Every labelled row is judged by a linear classifier that was trained on the other folds. Rows of one image are in one fold, or
they would vouch for each other. How many labels are wrong is counted as in confident learning (Northcutt et al. 2021): the
rows that another class claims with no less than the mean probability which it gives to rows of its own.

Memory besides the embeddings: one float32 copy of them, as columns of the solver, and 4 K bytes for each row.

Legend: N rows, J of them judged, D features, P columns of the solver, K classes, A heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.analysis.probe import logistic

if TYPE_CHECKING:  # torch takes seconds to load
    import torch

FOLDS = 5
PATIENCE = 2
"""Waves without a better C after which a sweep ends: large values take the most time, and seldom win."""
ENOUGH = 2000
"""Rows held out that are enough to choose C by. From 10,000 rows on that is one fold, which takes most of the time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelErrors:
    """The M rows whose labels are least credible, the worst first."""

    rows: NDArray[np.int64]
    """(M,)."""
    predicted: NDArray[np.int64]
    """(M,) class index; never that of the row's label."""
    log_label: NDArray[np.float32]
    """(M,) log probability of the label, out of fold."""
    log_predicted: NDArray[np.float32]
    """(M,) log probability of the predicted class."""
    estimated: int
    """How many labels are wrong in all, by confident learning."""
    num_judged: int
    num_unjudged: int
    """Labelled rows of classes that have a single image: there is nothing to learn them from."""
    accuracy: float
    """Share of the judged rows that are predicted to be what their label says."""
    C: float

    @property
    def margin(self) -> NDArray[np.float32]:
        """(M,) by how many nats the label is less likely than the predicted class: what the rows are ordered by."""
        return self.log_label - self.log_predicted


def find(
    features_ND: NDArray[np.float32], targets_N: NDArray[np.int64], images: NDArray[np.bytes_], most: int | None = None
) -> LabelErrors | None:
    """The rows whose labels are least credible. None with fewer than two classes that have two images.

    Args:
        features_ND: (N, D) float32, any scale, finite.
        targets_N: (N,) class indices, -1 for rows without a label.
        images: (N,) names, equal for rows that show the same image.
        most: length of the list; as many as seem to be wrong when left out. A row that is predicted to be what its label
            says is never in it.
    """
    rows, fold_J = folds(targets_N, images)
    classes_K, target_J = np.unique(targets_N[rows], return_inverse=True)
    if len(classes_K) < 2:
        return None
    log_JK, C = out_of_fold(features_ND, rows, target_J, fold_J, len(classes_K))
    given_J, predicted_J = log_JK[np.arange(len(rows)), target_J], log_JK.argmax(1)
    margin_J = given_J - log_JK.max(1)
    estimated = estimate(log_JK, target_J)
    order = np.argsort(margin_J, kind="stable")[: estimated if most is None else most]
    order = order[predicted_J[order] != target_J[order]]
    return LabelErrors(
        rows=rows[order],
        predicted=classes_K[predicted_J[order]],
        log_label=given_J[order],
        log_predicted=log_JK[order, predicted_J[order]],
        estimated=estimated,
        num_judged=len(rows),
        num_unjudged=int((targets_N >= 0).sum()) - len(rows),
        accuracy=float((predicted_J == target_J).mean()),
        C=C,
    )


def folds(targets_N: NDArray[np.int64], images: NDArray[np.bytes_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows that can be judged (J,), and the fold of each (J,).

    The images of a class, in the order of their names, are dealt to the folds in turn: every fold has its share of every
    class. The class of an image is the lowest label of its rows. Names are content hashes, so their order is chance, and the
    same in every version of a dataset.
    """
    labelled = np.flatnonzero(targets_N >= 0)
    _, image_L = np.unique(images[labelled], return_inverse=True)
    class_I = np.full(int(image_L.max(initial=-1)) + 1, np.iinfo(np.int64).max)
    np.minimum.at(class_I, image_L, targets_N[labelled])
    judged_L = np.bincount(class_I)[class_I[image_L]] > 1 if len(labelled) else np.zeros(0, np.bool_)
    fold_I = np.empty(len(class_I), np.int64)
    fold_I[np.argsort(class_I, kind="stable")] = np.arange(len(class_I)) % FOLDS
    return labelled[judged_L], fold_I[image_L[judged_L]]


def out_of_fold(
    features_ND: NDArray[np.float32],
    rows: NDArray[np.int64],
    target_J: NDArray[np.int64],
    fold_J: NDArray[np.int64],
    num_classes: int,
) -> tuple[NDArray[np.float32], float]:
    """Log probabilities (J, K) of the rows, each by a classifier that was trained on the other folds, and the C of them all.

    C is the one whose probabilities fit held-out labels best. Wrong ones are among them, and cost every C alike.
    """
    loss_C = np.zeros(len(logistic.VALUES_OF_C))
    num_held = 0
    for fold in np.unique(fold_J).tolist():
        curve = _Fold(features_ND, rows, target_J, fold_J == fold, num_classes).losses()
        loss_C = loss_C[: len(curve)] + curve[: len(loss_C)]
        num_held += int((fold_J == fold).sum())
        if num_held >= ENOUGH:
            break
    C = float(logistic.VALUES_OF_C[loss_C.argmin()])
    log_JK = np.empty((len(rows), num_classes), np.float32)
    for fold in np.unique(fold_J).tolist():
        _Fold(features_ND, rows, target_J, fold_J == fold, num_classes).predict(C, log_JK)
    return log_JK, C


class _Fold:
    """Rows to train on (T) and rows held out (H), as columns of the solver: a copy of the features, and never two at once."""

    def __init__(
        self,
        features_ND: NDArray[np.float32],
        rows: NDArray[np.int64],
        target_J: NDArray[np.int64],
        held_J: NDArray[np.bool_],
        num_classes: int,
    ) -> None:
        train, self._held = np.flatnonzero(~held_J), np.flatnonzero(held_J)
        axes = logistic.axes(features_ND, rows[train], "zscore")
        self._spectrum_P, self._num_classes = axes.spectrum, num_classes
        self._columns_TP, self._columns_HP = axes.apply(features_ND, rows[train]), axes.apply(features_ND, rows[self._held])
        self._target_T, self._target_H = target_J[train], target_J[self._held]

    def losses(self) -> NDArray[np.float64]:
        """Summed loss on the rows held out at each of `logistic.VALUES_OF_C`, up to where it has long been rising."""
        import torch

        target_H = torch.from_numpy(self._target_H)
        found: list[float] = []
        for values, heads_AKP in self._path(logistic.VALUES_OF_C):
            loss_A = torch.zeros(len(values), dtype=torch.float64)
            for part, logits_AKH in logistic.logits(self._columns_HP, heads_AKP):
                loss_A += logistic.losses(logits_AKH.log_softmax(1), target_H[part])
            found += loss_A.tolist()
            if len(found) - int(np.argmin(found)) > PATIENCE * logistic.WAVE:
                break
        return np.array(found)

    def predict(self, C: float, log_JK: NDArray[np.float32]) -> None:
        """Train with one C, and write the log probabilities of the rows held out to their places."""
        ways = logistic.VALUES_OF_C[logistic.WAVE - 1 :: logistic.WAVE]  # C is reached by larger and larger ones, as in a sweep
        *_, (_, heads_AKP) = self._path(np.append(ways[ways < C], C))
        for part, logits_1KH in logistic.logits(self._columns_HP, heads_AKP[-1:]):
            log_JK[self._held[part]] = logits_1KH[0].log_softmax(0).T.numpy()

    def _path(self, values: NDArray[np.float64]) -> Iterator[tuple[NDArray[np.float64], torch.Tensor]]:
        return logistic.path(self._columns_TP, self._target_T, self._spectrum_P, self._num_classes, values)


def estimate(log_JK: NDArray[np.float32], target_J: NDArray[np.int64]) -> int:
    """How many labels are wrong: what lies beside the diagonal of the confident joint."""
    number = np.arange(len(target_J))
    given_J = np.exp(log_JK[number, target_J].astype(np.float64))
    num_classes = log_JK.shape[1]
    threshold_K = np.bincount(target_J, given_J, num_classes) / np.bincount(target_J, minlength=num_classes)
    num_wrong = 0
    for _, some in logistic.chunks(number, 24 * num_classes):
        probability_SK = np.exp(log_JK[some].astype(np.float64))
        claimed_SK = np.where(probability_SK >= threshold_K, probability_SK, -1)
        other_S = (claimed_SK.argmax(1) != target_J[some]) & (claimed_SK.max(1) >= 0)
        num_wrong += int((other_S & (log_JK[some].argmax(1) != target_J[some])).sum())
    return num_wrong
