"""The probe of a version as the page shows it: from `metrics.json`, as `pipeline probe` leaves it. Classes come from data.

Legend: K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.report import charts
from pipeline.report.page import short

if TYPE_CHECKING:
    from markupsafe import Markup

MAX_TABLE = 20
"""Classes of a confusion matrix with numbers and names; of more, only the shades are drawn."""
MAX_HEAT = 200
"""Classes up to which they are."""
MAX_CLASSES = 15
"""Rows of the table of classes: the lowest accuracies where there are more."""
MAX_CONFUSED = 8
"""Pairs of classes."""


def section(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows of a probe."""
    names = [short(str(each)) for each in metrics["classes"]]
    confusion_KK = np.array(metrics["confusion"], np.int64)
    by_accuracy = sorted(metrics["per_class"], key=lambda each: each["accuracy"])
    lines, legend = _lines(metrics)
    return {
        "accuracy": f"{metrics['test_accuracy']:.1%}",
        "interval": " and ".join(f"{each:.1%}" for each in metrics["interval"]),
        "facts": _facts(metrics),
        "warnings": [short(each) for each in metrics["warnings"]],
        "compared": [
            {**each, "is_chosen": all(each[name] == metrics[name] for name in ("node", "normalize"))}
            for each in metrics.get("compared", [])
        ],
        "classes": [{**each, "class": short(str(each["class"]))} for each in by_accuracy[:MAX_CLASSES]],
        "num_classes": len(by_accuracy),
        "table": _table(confusion_KK, names) if len(names) <= MAX_TABLE else None,
        "heat": charts.heat(_shares(confusion_KK)) if MAX_TABLE < len(names) <= MAX_HEAT else None,
        "confused": _confused(confusion_KK, names),
        "curve": charts.curves(lines, x="C", y="validation accuracy", log=True) if lines else None,
        "legend": legend,
        "reliability": _reliability(metrics),
    }


def _facts(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    parts = ", ".join(f"{metrics[f'num_{part}']:,} {part}" for part in ("train", "validation", "test"))
    facts = [("rows", parts), ("classes", f"{metrics['num_classes']:,}")]
    if "node" in metrics:  # of today's probes; those of earlier versions have no choice to tell of
        facts.append(("chosen", f"{metrics['node']}, {metrics['normalize']}, C = {metrics['C']:.3g}"))
    facts.append(("mean accuracy of the classes", f"{metrics['mean_per_class_accuracy']:.1%}"))
    if "test_top5" in metrics:
        facts.append(("top-5 accuracy", f"{metrics['test_top5']:.1%}"))
    facts.append(("NLL", f"{metrics['test_nll']:.3f} nats"))
    facts.append(("calibration error (ECE)", f"{metrics['test_ece']:.3f}"))
    if "knn" in metrics:
        facts.append((f"{metrics['knn']['k']} nearest neighbours", f"{metrics['knn']['test_accuracy']:.1%}"))
    return facts


def _reliability(metrics: Mapping[str, Any]) -> Markup | None:
    """Accuracy over confidence; None of probes of earlier versions, which kept only the error."""
    bins = metrics.get("reliability") or []
    return charts.reliability([(each["confidence"], each["accuracy"]) for each in bins]) if bins else None


def _shares(confusion_KK: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of the rows with a label, the share that was predicted as each class (K, K)."""
    return np.asarray(confusion_KK / np.maximum(confusion_KK.sum(axis=1, keepdims=True), 1))


def _table(confusion_KK: NDArray[np.int64], names: list[str]) -> dict[str, Any]:
    shares_KK = _shares(confusion_KK).round(3).tolist()
    rows = [
        {"name": name, "cells": list(zip(counts, shares, strict=True))}
        for name, counts, shares in zip(names, confusion_KK.tolist(), shares_KK, strict=True)
    ]
    return {"names": names, "rows": rows}


def _confused(confusion_KK: NDArray[np.int64], names: list[str]) -> list[dict[str, Any]]:
    """The pairs of label and prediction with the most test rows."""
    wrong_KK = confusion_KK.copy()
    np.fill_diagonal(wrong_KK, 0)
    order = np.argsort(-wrong_KK, axis=None, kind="stable")[:MAX_CONFUSED]
    found = []
    for row, column in (divmod(int(place), len(names)) for place in order):
        if count := int(wrong_KK[row, column]):
            of = int(confusion_KK[row].sum())
            found.append({"label": names[row], "predicted": names[column], "count": count, "of": of})
    return found


def _lines(metrics: Mapping[str, Any]) -> tuple[list[list[tuple[float, float]]], list[dict[str, Any]]]:
    """Accuracy over C for each node and normalisation, the best lines first, and their names."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in metrics["curve"]:
        name = f"{point['node']}, {point['normalize']}" if "node" in point else "this probe"
        lines.setdefault(name, []).append((point["C"], point["validation_accuracy"]))
    best = sorted(lines, key=lambda name: -max(accuracy for _, accuracy in lines[name]))[: charts.NUM_COLORS - 1]
    legend = [{"color": number, "name": short(name), "num_rows": 0} for number, name in enumerate(best)]
    return [lines[name] for name in best], legend
