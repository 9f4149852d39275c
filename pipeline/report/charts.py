"""Charts for a page: numbers in, SVG out, drawn here by Vega-Lite so that the page itself runs nothing.

No text that comes from data goes into a chart: what is drawn are numbers, and legends and labels stand beside it in the page,
escaped like everything else. Colours are the page's CSS variables, so a chart follows the page into the dark.

`vl-convert` is Vega-Lite in one wheel, with no browser, no Node.js and no network. The first chart of a process takes 1 s and
100 MB, another one 0.1 s and more with its marks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from markupsafe import Markup

NUM_COLORS = 10
"""`--c0` to `--c9` of the style sheet; the last one is for the rest."""
SCATTER_WIDTH, SCATTER_HEIGHT = 900, 600
POINT_SIZES = 22, 110
"""Area of a point where there are many, and where there are few."""
_FRAME = re.compile(r'<svg [^>]*?width="(\d+)" height="(\d+)"[^>]*>')
_TEXT = {"labelColor": "var(--muted)", "titleColor": "var(--muted)", "titleFontWeight": "normal", "labelFontSize": 12,
         "titleFontSize": 12, "gridColor": "var(--line)", "domainColor": "var(--line)", "tickColor": "var(--line)"}  # fmt: skip
_CONFIG: Mapping[str, Any] = {
    "aria": False,  # a page of 3,000 points would be read out point by point
    "background": None,
    "padding": 0,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": _TEXT,
}


def scatter(places_M2: NDArray[np.float64], groups_M: ArrayLike) -> Markup:
    """Points in a plane.

    Args:
        places_M2: where each is, from 0 to 1 from the left and from the top.
        groups_M: integers below `NUM_COLORS`, what colour each has. Points of a higher group are drawn first.
    """
    groups = np.asarray(groups_M)
    order = np.argsort(-groups, kind="stable")
    x_M, y_M = (places_M2[order] * (SCATTER_WIDTH, SCATTER_HEIGHT)).round(1).T.tolist()
    rows = [{"x": x, "y": y, "g": group} for x, y, group in zip(x_M, y_M, groups[order].tolist(), strict=True)]
    return _svg(
        rows,
        width=SCATTER_WIDTH,
        height=SCATTER_HEIGHT,
        mark={
            "type": "circle",
            "size": float(np.clip(60_000 / max(1, len(rows)), *POINT_SIZES)),
            "opacity": 0.75,
            "strokeWidth": 0.5,
        },
        encoding={
            "x": {"field": "x", "type": "quantitative", "axis": None, "scale": {"domain": [0, SCATTER_WIDTH]}},
            "y": {"field": "y", "type": "quantitative", "axis": None, "scale": {"domain": [SCATTER_HEIGHT, 0]}},
            "fill": _color("g"),
            "stroke": _color("g"),  # so that the style sheet can make points larger where the page is narrow
        },
    )


def curves(
    lines: Sequence[Sequence[tuple[float, float]]],
    *,
    x: str,
    y: str,
    log: bool = False,
    domain: tuple[float, float] | None = None,
) -> Markup:
    """Lines, line i in colour i; at most `NUM_COLORS`.

    Args:
        lines: of each line its points.
        x: title of the axis, as y; from the program and not from data.
        y: its title.
        log: the axis of x is logarithmic, and x above 0.
        domain: what the axis of y shows; what the lines need when left out.
    """
    rows = [{"x": at, "y": value, "g": line} for line, points in enumerate(lines) for at, value in points]
    across = {"type": "log"} if log else {"nice": False}
    axis = {"format": "~e"} if log else {}
    return _svg(
        rows,
        width=360,
        height=190,
        mark={"type": "line", "strokeWidth": 2},
        encoding={
            "x": {"field": "x", "type": "quantitative", "scale": across,
                  "axis": {"title": x, **axis, "grid": False, "tickCount": 6, "labelOverlap": True}},
            "y": {"field": "y", "type": "quantitative", "scale": {"zero": False, **({"domain": domain} if domain else {})},
                  "axis": {"title": y, "tickCount": 5}},
            "color": _color("g"),
        },
    )  # fmt: skip


def reliability(bins: Sequence[tuple[float, float]]) -> Markup:
    """Accuracy over confidence, from 0 to 1 both, and the diagonal where they agree.

    Args:
        bins: confidence and accuracy of each.
    """
    rows = [{"x": confidence, "y": accuracy, "g": 0} for confidence, accuracy in bins]
    diagonal = [{"x": 0, "y": 0}, {"x": 1, "y": 1}]
    axes = {
        name: {"field": name, "type": "quantitative", "scale": {"domain": [0, 1]},
               "axis": {"title": title, "tickCount": 5, "grid": False, "format": "%"}}
        for name, title in (("x", "confidence"), ("y", "accuracy"))
    }  # fmt: skip
    return _svg(
        rows,
        width=260,
        height=260,
        encoding=axes,
        layer=[
            {"data": {"values": diagonal}, "mark": {"type": "line", "strokeWidth": 1, "strokeDash": [4, 4]},
             "encoding": {"color": {"value": "var(--muted)"}}},
            {"mark": {"type": "line", "strokeWidth": 2, "point": {"size": 40}}, "encoding": {"color": _color("g")}},
        ],
    )  # fmt: skip


def heat(shares_KK: NDArray[np.float64]) -> Markup:
    """A square of cells, the darker the nearer to 1; cells of 0 are not drawn."""
    side = max(2, 480 // len(shares_KK))
    at_M = np.argwhere(shares_KK > 0)
    values_M = shares_KK[at_M[:, 0], at_M[:, 1]].round(3).tolist()
    rows = [{"r": row, "c": column, "s": share} for (row, column), share in zip(at_M.tolist(), values_M, strict=True)]
    numbers = list(range(len(shares_KK)))
    axis = {"labels": False, "ticks": False}
    return _svg(
        rows,
        width={"step": side},
        height={"step": side},
        mark="rect",
        encoding={
            "x": {"field": "c", "type": "ordinal", "scale": {"domain": numbers}, "axis": {**axis, "title": "predicted"}},
            "y": {"field": "r", "type": "ordinal", "scale": {"domain": numbers}, "axis": {**axis, "title": "label"}},
            "opacity": {"field": "s", "type": "quantitative", "legend": None, "scale": {"domain": [0, 1], "range": [0.15, 1]}},
            "color": {"value": "var(--accent)"},
        },
    )


def _color(field: str) -> dict[str, Any]:
    numbers = list(range(NUM_COLORS))
    colors = [f"var(--c{number})" for number in numbers]
    return {"field": field, "type": "nominal", "legend": None, "scale": {"domain": numbers, "range": colors}}


def _svg(rows: list[dict[str, Any]], **view: Any) -> Markup:
    """The drawing, as wide as the page lets it be."""
    # Loaded here: 90 MB of it, which only a page needs.
    import vl_convert
    from markupsafe import Markup

    drawn = vl_convert.vegalite_to_svg({"data": {"values": rows}, "config": _CONFIG, **view})
    return Markup(_FRAME.sub(r'<svg viewBox="0 0 \1 \2" role="img" aria-hidden="true">', drawn, count=1))  # numbers only
