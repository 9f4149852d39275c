"""Which rows a probe is trained, chosen and tested on: content hashes, classes and perhaps groups in, three parts out.

Copies of one picture never sit on both sides, nor do rows of one group. `draw` takes the parts by hash; `given` takes them from
a column, and leaves out of training what is tested too.

Legend: N rows, H distinct hashes, U units: what is never torn apart; P pairs of hash and class, Q pairs of unit and class.
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import config
from pipeline.errors import ConfigError

TRAIN, VALIDATION, TEST, NOWHERE = range(4)
NAMES = {"train": TRAIN, "validation": VALIDATION, "val": VALIDATION, "valid": VALIDATION, "dev": VALIDATION, "test": TEST}
"""What a split column may hold, in any case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Row indices of the three parts, int64, ascending and disjoint. Rows that are in none of them are counted."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]
    unit: NDArray[np.int64]
    """(N,) equal for rows that belong together: copies, and rows of one group."""
    num_without_split: int = 0
    """Rows for which the split column says nothing."""
    num_copies_left_out: int = 0
    """Rows left out of train or validation because their picture, or their group, is in a part that scores."""
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, part_N: NDArray[np.int64], unit_N: NDArray[np.int64], **more: Any) -> Split:
        """From the number of each row's part."""
        train, validation, test = (np.flatnonzero(part_N == part) for part in (TRAIN, VALIDATION, TEST))
        return cls(train=train, validation=validation, test=test, unit=unit_N, **more)


def draw(
    content_hashes: Sequence[str],
    labels: NDArray[np.int64],
    settings: config.Probe,
    groups: Sequence[Hashable] | None = None,
) -> Split:
    """Split rows into train, validation and test, by content hash and stratified by class.

    The unit is the distinct hash; with groups, all that hangs together by hash or by group. Its class is the one that most of
    its pictures have, the lowest where several are as frequent. Within a class the units are ordered by SHA-256 of seed and
    hash; the first go to test, the next to validation. A share of a class is rounded to whole units, halves down, and a unit
    that would overshoot it by more than it would fall short without is passed over; a class always has a unit in train.
    Depends on neither the order nor the number of copies.

    Args:
        content_hashes: N of them.
        labels: (N,) int64, not negative.
        settings: `validation`, `test` and `seed` are used.
        groups: N of them, or None for no groups; a row whose group is None or NaN is bound by its hash alone.
    """
    pictures = _Pictures(content_hashes, groups)
    part_U = _assign(pictures, labels, {TEST: settings.test, VALIDATION: settings.validation}, settings.seed)
    return Split.of(part_U[pictures.unit_N], pictures.unit_N)


def given(
    names: Sequence[Any],
    content_hashes: Sequence[str],
    labels: NDArray[np.int64],
    settings: config.Probe,
    groups: Sequence[Hashable] | None = None,
) -> Split:
    """Split rows as a column says.

    The test part stays as it was given, so that scores can be compared with those of others. What is in it is not trained on:
    rows of train and validation whose picture is in test too, or whose group is, are left out, and so are rows of train
    that share either with validation. Without a validation part it is drawn from train, as `draw` does.

    Args:
        names: N of them, one of `NAMES` in any case; a row where it is None or empty is in no part.
        content_hashes: as for `draw`.
        labels: as for `draw`.
        settings: as for `draw`.
        groups: as for `draw`.

    Raises:
        ConfigError: other names, or no row of train or of test.
    """
    part_N = _parse(names, settings.split)
    pictures = _Pictures(content_hashes, groups)
    counts = np.bincount(part_N, minlength=4)
    for part, name in ((TRAIN, "train"), (TEST, "test")):
        if not counts[part]:
            raise ConfigError(f"probe.split: column {settings.split!r} names no labelled row {name}; it has to name some.")
    for held, others in ((TEST, (TRAIN, VALIDATION)), (VALIDATION, (TRAIN,))):
        part_N[np.isin(part_N, others) & pictures.shared_with(part_N == held)] = NOWHERE
    num_left_out = int((part_N == NOWHERE).sum() - counts[NOWHERE])
    warnings = []
    if num_left_out:
        what = "picture" if groups is None else "picture or group"
        warnings.append(
            f"Column {settings.split!r} has {num_left_out} rows to train on whose {what} is also in a part that scores: they"
            " were left out of training."
        )
    train = np.flatnonzero(part_N == TRAIN)
    if not len(train):
        raise ConfigError(f"probe.split: column {settings.split!r}: no row is left to train on, all pictures are tested too.")
    if not (part_N == VALIDATION).any():
        hashes = [content_hashes[row] for row in train.tolist()]
        inside = _Pictures(hashes, None if groups is None else [groups[row] for row in train.tolist()])
        part_N[train] = _assign(inside, labels[train], {VALIDATION: settings.validation}, settings.seed)[inside.unit_N]
    if counts[NOWHERE]:
        warnings.append(f"Column {settings.split!r} says nothing of {counts[NOWHERE]} labelled rows: they were left out.")
    return Split.of(
        part_N,
        pictures.unit_N,
        num_without_split=int(counts[NOWHERE]),
        num_copies_left_out=num_left_out,
        warnings=warnings,
    )


class _Pictures:
    """Distinct hashes, and the units that they hang together in.

    Attributes:
        hash_N: number of each row's hash, in the order of the hashes.
        unit_H: number of each hash's unit.
        unit_N: number of each row's unit.
        names: the lowest hash of each unit.
    """

    def __init__(self, content_hashes: Sequence[str], groups: Sequence[Hashable] | None) -> None:
        hashes, self.hash_N = np.unique(np.asarray(content_hashes), return_inverse=True)
        self._group_N: NDArray[np.int64] | None = None
        root_H = np.arange(len(hashes))
        if groups is not None:
            numbers: dict[Hashable, int] = {}
            codes = (-1 if each is None or each != each else numbers.setdefault(each, len(numbers)) for each in groups)
            self._group_N = np.fromiter(codes, np.int64, len(groups))
            root_H = _components(self.hash_N, self._group_N, len(hashes))
        roots, self.unit_H = np.unique(root_H, return_inverse=True)
        self.unit_N: NDArray[np.int64] = self.unit_H[self.hash_N]
        self.names: list[str] = hashes[roots].tolist()

    def shared_with(self, held_N: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """(N,) whether a row has its picture, or its group, in common with one of these."""
        shared_N = np.isin(self.hash_N, self.hash_N[held_N])
        if self._group_N is not None:
            shared_N |= np.isin(self._group_N, self._group_N[held_N & (self._group_N >= 0)])
        return np.asarray(shared_N)


def _components(hash_N: NDArray[np.int64], group_N: NDArray[np.int64], num_hashes: int) -> NDArray[np.int64]:
    """(H,) the lowest hash of what hangs together: two hashes do when a row of each is in the same group."""
    parent = list(range(num_hashes))

    def root(code: int) -> int:
        while parent[code] != code:
            parent[code] = code = parent[parent[code]]
        return code

    first: dict[int, int] = {}
    pairs = np.unique(np.stack([hash_N, group_N])[:, group_N >= 0], axis=1)
    for code, group in zip(*pairs.tolist(), strict=True):
        low, high = sorted((root(code), root(first.setdefault(group, code))))
        parent[high] = low
    return np.fromiter(map(root, range(num_hashes)), np.int64, num_hashes)


def _assign(pictures: _Pictures, labels: NDArray[np.int64], shares: dict[int, float], seed: int) -> NDArray[np.int64]:
    """(U,) the part of each unit: one of those that have a share, in their order, else train."""
    num_classes = int(labels.max()) + 1
    # A picture counts once for each class that it has, however many copies there are.
    hash_P, label_P = np.divmod(np.unique(pictures.hash_N * num_classes + labels), num_classes)
    pairs, count_Q = np.unique(pictures.unit_H[hash_P] * num_classes + label_P, return_counts=True)
    unit_Q, label_Q = np.divmod(pairs, num_classes)
    rising = np.lexsort((-label_Q, count_Q))  # what is written last is the most frequent, and the lowest of these
    class_U = np.empty(len(pictures.names), np.int64)
    class_U[unit_Q[rising]] = label_Q[rising]
    size_U = np.bincount(pictures.unit_H)

    digests = b"".join(hashlib.sha256(f"{seed}:{name}".encode()).digest() for name in pictures.names)
    digest_U4 = np.frombuffer(digests, dtype=">u8").reshape(-1, 4)
    order_U = np.lexsort((*digest_U4.T[::-1], class_U))
    part_U = np.full(len(class_U), TRAIN)
    starts = np.flatnonzero(np.diff(class_U[order_U])) + 1
    for members in np.split(order_U, starts):
        sizes = size_U[members]
        part_U[members] = _assign_class(sizes.tolist(), {part: share * float(sizes.sum()) for part, share in shares.items()})
    return part_U


def _assign_class(sizes: Sequence[int], wanted: dict[int, float]) -> list[int]:
    """The parts of the units of one class, in order."""
    parts, held = [], dict.fromkeys(wanted, 0)
    for position, size in enumerate(sizes):
        is_needed = position == len(sizes) - 1 and TRAIN not in parts
        fitting = (part for part in wanted if held[part] + size / 2 < wanted[part])
        part = TRAIN if is_needed else next(fitting, TRAIN)
        if part != TRAIN:
            held[part] += size
        parts.append(part)
    return parts


def _parse(names: Sequence[Any], column: str | None) -> NDArray[np.int64]:
    """(N,) the part that each row is given to."""
    parts = {name: NOWHERE if _is_missing(name) else NAMES.get(str(name).strip().lower()) for name in set(names)}
    if None in parts.values():
        wrong = collections.Counter(str(name) for name in names if parts[name] is None)
        some = ", ".join(f"{name!r} ({count} rows)" for name, count in wrong.most_common(5))
        raise ConfigError(f"probe.split: column {column!r} holds {some}; allowed are {', '.join(NAMES)}.")
    return np.fromiter((parts[name] for name in names), np.int64, len(names))


def _is_missing(name: Any) -> bool:
    return name is None or name != name or not str(name).strip()
