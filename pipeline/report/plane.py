"""The map of a dataset: a sample of its embeddings in a plane, coloured by label: along their two principal axes, or by UMAP.

The points are a chart. The picture that is shown on pointing at one of them, or tapping on it, is a tile of the page that the
style sheet hides until then: no script.

Legend: M rows of the sample, D features, P axes of a subspace.
"""

from __future__ import annotations

import collections
import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigError
from pipeline.report import charts
from pipeline.report.page import Tile, short
from pipeline.report.pictures import SMALL_SIDE, Pictures
from pipeline.report.sample import Sample

if TYPE_CHECKING:
    from markupsafe import Markup

MAX_SPOTS = 300
"""Points with a picture."""
MARGIN = 0.02
"""Of the width and the height, left free around the points."""
SUBSPACE, ITERATIONS = 12, 8
"""Axes that are looked for at once, and how often: as many as make the first two exact to more than a pixel."""
MIN_UMAP = 10
"""Rows below which there are no neighbourhoods to keep."""
FAR = 0.005
"""Share of the points at either end of an axis that may stand at the edge, lest a few press all others together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spot:
    """A point with a picture."""

    left: str
    """Per cent of the width."""
    top: str
    side: str
    """Where its tile has room: `east` or `west`, `south` or `north`."""
    tile: Tile


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Points of one colour."""

    color: int
    name: str
    num_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Map:
    """What the template draws."""

    node: str
    how: str
    """What the sample is."""
    by: str
    """What the colours tell apart."""
    axes: str
    """What the plane is."""
    chart: Markup
    groups: list[Group]
    spots: list[Spot]


Method = Literal["pca", "umap"]


def draw(sample: Sample, pictures: Pictures | None, method: Method = "pca") -> Map:
    """The map of a sample of at least two rows, with pictures where there are any to load.

    Raises:
        ConfigError: UMAP is wanted and not installed.
    """
    return draw_together([sample], [pictures], method)[0]


def draw_together(samples: Sequence[Sample], pictures: Sequence[Pictures | None], method: Method = "pca") -> list[Map]:
    """Maps of samples of the same node, in the plane of all of them together, with the same colours."""
    features_MD = np.concatenate([sample.features for sample in samples])
    if method == "umap" and len(features_MD) >= MIN_UMAP:
        places_M2, axes = (
            neighbourhoods(features_MD),
            "by UMAP, which keeps near rows near; how far apart groups lie says little",
        )
    else:
        places_M2, shares = plane(features_MD)
        held = " and ".join(f"{share:.0%}" for share in shares)
        axes = f"along {'its' if len(samples) == 1 else 'their'} two principal axes, which hold {held} of the variance"
    unit_M2 = _fitted(places_M2)
    by, groups, group_M = _grouped([row for sample in samples for row in sample.rows])
    maps, start = [], 0
    for sample, of_sample in zip(samples, pictures, strict=True):
        mine = slice(start, start + len(sample.rows))
        start = mine.stop
        counts = np.bincount(group_M[mine], minlength=charts.NUM_COLORS).tolist()
        maps.append(
            Map(
                node=sample.node,
                how=sample.how,
                by=by,
                axes=axes,
                chart=charts.scatter(unit_M2[mine], group_M[mine]),
                groups=[dataclasses.replace(group, num_rows=counts[group.color]) for group in groups],
                spots=_spots(sample, unit_M2[mine], of_sample) if of_sample is not None else [],
            )
        )
    return maps


def _spots(sample: Sample, unit_M2: NDArray[np.float64], pictures: Pictures) -> list[Spot]:
    """Points with a picture, at equal distances in the sample."""
    chosen = np.unique(np.linspace(0, len(sample.rows) - 1, min(MAX_SPOTS, len(sample.rows))).round().astype(np.int64))
    pictures.load([sample.rows[row] for row in chosen], SMALL_SIDE)
    return [
        _spot(unit_M2[row], pictures.tile(sample.rows[row])) for row in chosen.tolist() if pictures.picture(sample.rows[row])
    ]


def plane(features_MD: NDArray[np.float32]) -> tuple[NDArray[np.float64], list[float]]:
    """The sample along its two principal axes.

    Returns:
        (M, 2) float64 in any unit, and the share of the variance that lies along each axis. An axis points to where its largest
        value is, so equal data are drawn the same way round.
    """
    centred_MD = features_MD - features_MD.mean(axis=0, dtype=np.float64).astype(np.float32)
    centred_MD /= np.abs(centred_MD).max(initial=0) or 1  # squares of the largest float32 numbers are none
    # Subspace iteration (Halko et al., https://arxiv.org/abs/0909.4061, algorithm 4.4): all products are with a few columns. A
    # full decomposition of 1,280 features took 2 s, and 8 s where others wanted the cores.
    start_DP = np.random.default_rng(0).standard_normal((centred_MD.shape[1], SUBSPACE), np.float32)
    basis_MP = np.linalg.qr(centred_MD @ start_DP)[0]
    for _ in range(ITERATIONS):
        basis_DP = np.linalg.qr(centred_MD.T @ basis_MP)[0]
        basis_MP = np.linalg.qr(centred_MD @ basis_DP)[0]
    left_PP, lengths_P, _ = np.linalg.svd((basis_MP.T @ centred_MD).astype(np.float64), full_matrices=False)
    places_M2 = (basis_MP @ left_PP)[:, :2] * lengths_P[:2]
    if places_M2.shape[1] < 2:
        places_M2 = np.column_stack([places_M2, np.zeros(len(places_M2))])
    places_M2 *= np.where(np.abs(places_M2).max(axis=0) > places_M2.max(axis=0), -1, 1)
    total = float(np.vdot(centred_MD, centred_MD))
    return places_M2, [float(length) ** 2 / total if total > 0 else 0.0 for length in lengths_P[:2]]


def neighbourhoods(features_MD: NDArray[np.float32]) -> NDArray[np.float64]:
    """(M, 2) float64, by UMAP (https://arxiv.org/abs/1802.03426) of the cosines; the same on every call.

    Raises:
        ConfigError: umap-learn is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it finds no tensorflow, and that a seed makes it run in one thread
        try:
            import umap
        except ImportError:
            raise ConfigError("map: umap-learn is not installed; `pip install 'frozen-pipeline[umap]'` does it") from None
        reducer = umap.UMAP(n_neighbors=min(15, len(features_MD) - 1), metric="cosine", random_state=0)
        return np.asarray(reducer.fit_transform(features_MD), np.float64)


def _fitted(places_M2: NDArray[np.float64]) -> NDArray[np.float64]:
    """Places from 0 to 1 from the left and from the top, each axis by itself; what lies far out stands at the edge."""
    low_2, high_2 = np.quantile(places_M2, [FAR, 1 - FAR], axis=0)
    reach_2 = np.maximum(high_2 - low_2, np.finfo(np.float64).tiny) * 0.1
    low_2, high_2 = np.maximum(low_2 - reach_2, places_M2.min(axis=0)), np.minimum(high_2 + reach_2, places_M2.max(axis=0))
    span_2 = high_2 - low_2
    middle_M2 = np.full_like(places_M2, 0.5)
    unit_M2 = np.clip(np.divide(places_M2 - low_2, span_2, out=middle_M2, where=span_2 > 0), 0, 1)
    unit_M2[:, 1] = 1 - unit_M2[:, 1]
    return np.asarray(MARGIN + (1 - 2 * MARGIN) * unit_M2)


def _spot(place_2: NDArray[np.float64], tile: Tile) -> Spot:
    left, top = place_2.tolist()
    side = ("west" if left > 0.5 else "east") + (" north" if top > 0.5 else " south")
    return Spot(left=f"{100 * left:.2f}", top=f"{100 * top:.2f}", side=side, tile=tile)


def _grouped(rows: Sequence[dict[str, Any]]) -> tuple[str, list[Group], NDArray[np.int64]]:
    """What colours tell apart, the groups, and the colour of each row (M,)."""
    labels = [row.get("label") for row in rows]
    if all(label is None or label != label for label in labels):
        names = [row["shard"].rpartition("/")[2] for row in rows]
        numbers = {shard: number for number, shard in enumerate(dict.fromkeys(row["shard"] for row in rows))}
        return _stretches("shard", [numbers[row["shard"]] for row in rows], names)
    known = {label for label in labels if label is not None and label == label}
    if len(known) >= charts.NUM_COLORS and all(type(label) is float for label in known):
        order = {label: number for number, label in enumerate(sorted(known))}
        names = [f"{label:g}" if label in order else "none" for label in labels]
        return _stretches("label", [order.get(label, -1) for label in labels], names)
    names = [str(label) if label in known else "no label" for label in labels]
    counts = collections.Counter(names)
    room = charts.NUM_COLORS - (len(counts) > charts.NUM_COLORS)
    shown = [name for name, _ in counts.most_common(room)]
    if len(counts) <= charts.NUM_COLORS:
        shown = [str(label) for label in sorted(known)] + (["no label"] if len(known) < len(counts) else [])
    color = {name: number for number, name in enumerate(shown)}
    group_M = np.array([color.get(name, charts.NUM_COLORS - 1) for name in names])
    groups = [Group(color=number, name=short(name), num_rows=counts[name]) for name, number in color.items()]
    if len(counts) > len(shown):
        rest = sum(counts.values()) - sum(counts[name] for name in shown)
        groups.append(Group(color=charts.NUM_COLORS - 1, name=f"{len(counts) - len(shown):,} others", num_rows=rest))
    return "label", groups, group_M


def _stretches(by: str, numbers: Sequence[int], names: Sequence[str]) -> tuple[str, list[Group], NDArray[np.int64]]:
    """Values that have an order, as stretches of it where there are more of them than colours."""
    numbers_M = np.asarray(numbers)
    distinct, code_M = np.unique(numbers_M, return_inverse=True)
    count = min(len(distinct), charts.NUM_COLORS - 1)
    group_M = code_M * count // max(1, len(distinct))
    groups = []
    for number in range(count):
        rows = np.flatnonzero(group_M == number)
        first, last = (names[rows[pick(numbers_M[rows])]] for pick in (np.argmin, np.argmax))
        groups.append(Group(color=number, name=short(first if first == last else f"{first} … {last}"), num_rows=len(rows)))
    return by, groups, group_M
