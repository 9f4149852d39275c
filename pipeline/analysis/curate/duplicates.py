"""Copies in a dataset: images of equal bytes, and images that look alike. Embeddings and content hashes in, groups out.

Images of equal bytes are one image from here on. All others are compared, each with each, by the cosine of their embeddings.
A group is one image that stands for it and the images that are alike enough to *that one*: a chain, in which every image
resembles the next and the last no longer the first, is no group. Measured on re-encoded, resized and cropped photographs
(`tests/benchmarks/curate.py`), that finds more copies than chains do and fewer other pictures. Subtracting the mean embedding
does not help there, and a threshold found in the middle of the network does not hold for other pictures.

Time: 2 D operations for each of U (U - 1) / 2 pairs. Memory besides the embeddings, which are read where they lie: 100 MB of
blocks at 1,280 features, 0.4 GB where whole blocks are alike, and 100 bytes for each image.

Legend: N rows, U distinct images, D features, R and C rows and columns of a block, M pairs, E pairs from both ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.analysis.curate.directions import ROWS, Directions

COLUMNS = 1024
"""Of a block of similarities, which then takes 17 MB; larger ones are not quicker."""
MAX_PAIRS = 2_000_000
"""Pairs that wait to become groups. Where there are more, a few pictures are there a thousand times."""
TRIED = 1024
"""Images on either side of the pairs that tell how alike two images are by chance."""
NOTE_EVERY_S = 10.0

Note = Callable[[str], None]
"""Takes a line on how far something is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Duplicates:
    """Groups of alike images. A row that is alone stands for itself."""

    first: NDArray[np.int64]
    """(N,) the first row of equal bytes."""
    representative: NDArray[np.int64]
    """(N,) the row that stands for the group; it is the first of its bytes."""
    similarity: NDArray[np.float32]
    """(N,) cosine with the representative; 1 for itself and for rows of its bytes."""
    share: float
    """Of all pairs of distinct images, those that are alike."""
    chance: tuple[float, float]
    """Similarity of two distinct images at random: the median, and what one pair in a thousand exceeds."""

    @property
    def copies(self) -> NDArray[np.int64]:
        """Rows whose bytes an earlier row has."""
        return np.flatnonzero(self.first != np.arange(len(self.first)))

    @property
    def grouped(self) -> NDArray[np.int64]:
        """Rows that are not alone, the largest group first; in it the representative comes first, then what is most like it."""
        size_N = np.bincount(self.representative, minlength=len(self.representative))[self.representative]
        rows = np.flatnonzero(size_N > 1)
        leader = self.representative[rows]
        return rows[np.lexsort((rows, -self.similarity[rows], leader != rows, leader, -size_N[rows]))]


def find(
    features_ND: NDArray[np.float32],
    content_hashes: NDArray[np.bytes_],
    threshold: float,
    sizes: NDArray[np.int64] | None = None,
    note: Note | None = None,
) -> Duplicates:
    """Groups of images of equal bytes, or whose embeddings are alike.

    Args:
        features_ND: (N, D) float32, any scale; read a block at a time.
        content_hashes: (N,).
        threshold: least cosine of two embeddings that are alike.
        sizes: (N,) pixels of each image; of those that are alike to equally many others the largest stands for the group.
        note: told how far it is, every 10 s.

    Raises:
        GuardError: an embedding holds a value that is not finite.
    """
    _, first_H, code_N = np.unique(content_hashes, return_index=True, return_inverse=True)
    distinct_U, first_N = np.sort(first_H), first_H[code_N]
    directions = Directions(features_ND, distinct_U)
    groups = _Groups(sizes[distinct_U] if sizes is not None else np.zeros(len(distinct_U), np.int64))
    for pairs in _pairs(directions, threshold, note):
        groups.add(*pairs)
    groups.settle()
    position_N = np.searchsorted(distinct_U, first_N)
    return Duplicates(
        first=first_N,
        representative=distinct_U[groups.leader_U[position_N]],
        similarity=groups.similarity_U[position_N],
        share=groups.num_pairs / max(1, len(distinct_U) * (len(distinct_U) - 1) // 2),
        chance=_chance(directions),
    )


def seconds(num_images: int, width: int) -> float:
    """How long this machine takes to compare so many images with each other, from the product of one block."""
    rows_RD, columns_CD = np.ones((ROWS, width), np.float32), np.ones((COLUMNS, width), np.float32)
    for _ in range(2):  # the first one starts the threads
        started = time.perf_counter()
        rows_RD @ columns_CD.T
    return (time.perf_counter() - started) * num_images**2 / 2 / (ROWS * COLUMNS)


_Pairs = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]
"""Positions (M,) of one image and of the other, and their similarity."""


def _pairs(directions: Directions, threshold: float, note: Note | None) -> Iterator[_Pairs]:
    """Every pair that is alike enough, once."""
    count = len(directions)
    started = told = time.monotonic()
    for top in range(0, count, ROWS):
        rows_RD = directions[top : top + ROWS]
        for left in range(top, count, COLUMNS):
            similarity_RC = rows_RD @ directions[left : left + COLUMNS].T
            row_M, column_M = np.divmod(np.flatnonzero(similarity_RC >= threshold), similarity_RC.shape[1])
            above_M = top + row_M < left + column_M  # below the diagonal are the same pairs again
            row_M, column_M = row_M[above_M], column_M[above_M]
            if len(row_M):
                yield (top + row_M).astype(np.int32), (left + column_M).astype(np.int32), similarity_RC[row_M, column_M]
            if note is not None and time.monotonic() - told >= NOTE_EVERY_S:
                told = time.monotonic()
                done = 1 - ((count - top) ** 2 - 2 * len(rows_RD) * (left + similarity_RC.shape[1] - top)) / count**2
                note(f"{done:.0%} of all pairs compared, about {(told - started) * (1 - done) / done:.0f} s left")


def _chance(directions: Directions) -> tuple[float, float]:
    """Median and 99.9th percentile over pairs of two disjoint random sets of images; 0 where there are no two."""
    order = np.random.default_rng(0).permutation(len(directions))
    count = min(TRIED, len(order) // 2)
    if not count:
        return 0.0, 0.0
    similarities = directions[order[:count]] @ directions[order[count : 2 * count]].T
    middle, high = np.quantile(similarities, [0.5, 0.999])
    return float(middle), float(high)


class _Groups:
    """Pairs in, groups out: images that many others resemble become leaders, and those others their members."""

    def __init__(self, sizes_U: NDArray[np.int64]) -> None:
        self._sizes_U = sizes_U
        self.leader_U = np.arange(len(sizes_U))
        """Position of the image that stands for each; it stands for itself."""
        self.similarity_U = np.ones(len(sizes_U), np.float32)
        self.num_pairs = 0
        self._leads_U = np.zeros(len(sizes_U), np.bool_)
        self._waiting: list[_Pairs] = []
        self._num_waiting = 0

    def add(self, one_M: NDArray[np.int32], other_M: NDArray[np.int32], similarity_M: NDArray[np.float32]) -> None:
        """Take pairs. When more wait than there is room for, they are made groups, to which later pairs only add."""
        self.num_pairs += len(one_M)
        free_M = (self.leader_U[one_M] == one_M) & (self.leader_U[other_M] == other_M)
        self._waiting.append((one_M[free_M], other_M[free_M], similarity_M[free_M]))
        self._num_waiting += int(free_M.sum())
        if self._num_waiting > MAX_PAIRS:
            self.settle()

    def settle(self) -> None:
        """Make groups of the pairs that wait."""
        if not self._num_waiting:
            return
        one_M, other_M, similarity_M = (np.concatenate(each) for each in zip(*self._waiting, strict=True))
        self._waiting, self._num_waiting = [], 0
        from_E, to_E = np.concatenate([one_M, other_M]), np.concatenate([other_M, one_M])
        order = np.argsort(from_E, kind="stable")
        from_E, to_E, similarity_E = from_E[order], to_E[order], np.concatenate([similarity_M, similarity_M])[order]
        begin_U = np.searchsorted(from_E, np.arange(len(self.leader_U) + 1))

        degree_U = np.diff(begin_U)
        touched = np.flatnonzero(degree_U)
        rank = np.lexsort((touched, -self._sizes_U[touched], -degree_U[touched], ~self._leads_U[touched]))
        member_U = np.zeros(len(self.leader_U), np.bool_)
        for each in touched[rank].tolist():
            if not member_U[each]:
                near = to_E[begin_U[each] : begin_U[each + 1]]
                near = near[~self._leads_U[near]]
                self._leads_U[each] |= not member_U[near].all()
                member_U[near] = True

        joins_E = self._leads_U[from_E] & member_U[to_E]
        from_E, to_E, similarity_E = from_E[joins_E], to_E[joins_E], similarity_E[joins_E]
        order = np.argsort(similarity_E, kind="stable")  # what is written last stays: the leader that is most alike
        self.leader_U[to_E[order]] = from_E[order]
        self.similarity_U[to_E[order]] = np.minimum(similarity_E[order], 1)  # and no rounding above it
