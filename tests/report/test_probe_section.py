"""What the page shows of a probe's metrics: of few classes, of many, and of an earlier version's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.report import probe


def metrics(num_classes: int, curve: list[dict[str, Any]]) -> dict[str, Any]:
    """Ten test rows a class; of class i every i-th one, up to nine, is taken for the next class."""
    confusion = np.zeros((num_classes, num_classes), int)
    for number in range(num_classes):
        wrong = number % 10
        confusion[number, number] += 10 - wrong
        confusion[number, (number + 1) % num_classes] += wrong
    shares = (confusion.diagonal() / 10).tolist()
    classes = [f"<{number}>" for number in range(num_classes)]
    return {
        "classes": classes,
        "confusion": confusion.tolist(),
        "per_class": [{"class": name, "accuracy": share, "num_test": 10} for name, share in zip(classes, shares, strict=True)],
        "curve": curve,
        "test_accuracy": float(np.mean(shares)),
        "mean_per_class_accuracy": float(np.mean(shares)),
        "interval": [0.25, 0.5],
        "warnings": [],
        "num_train": 100,
        "num_validation": 10,
        "num_test": 10 * num_classes,
        "num_classes": num_classes,
        "C": 1.0,
        "test_nll": 0.5,
        "test_ece": 0.1,
    }


CURVE = [{"C": 10.0**power, "validation_accuracy": 0.5 + power / 20, "validation_nll": 1.0} for power in range(-6, 6)]


def test_few_classes_are_a_table_and_more_are_shades() -> None:
    few, more, most = (probe.section(metrics(count, CURVE)) for count in (20, 40, 201))
    assert few["heat"] is None and more["table"] is None and most["table"] is most["heat"] is None
    assert few["table"]["names"][:2] == ["<0>", "<1>"]
    assert few["table"]["rows"][3]["cells"][3:5] == [(7, 0.7), (3, 0.3)]
    assert str(more["heat"]).count('fill="var(--accent)"') == 40 + 36, "a cell for each count above 0"
    assert few["confused"][0] == {"label": "<9>", "predicted": "<10>", "count": 9, "of": 10}
    assert [each["class"] for each in most["classes"][:2]] == ["<9>", "<19>"] and len(most["classes"]) == probe.MAX_CLASSES


def test_lines_of_each_node_the_best_ones_only() -> None:
    assert probe.section(metrics(3, CURVE))["legend"] == [{"color": 0, "name": "this probe", "num_rows": 0}]
    curve = [
        {**point, "node": f"n{node}", "normalize": "l2", "validation_accuracy": node / 20}
        for node in range(12)
        for point in CURVE
    ]
    section = probe.section(metrics(3, curve))
    assert [each["name"] for each in section["legend"]] == [f"n{node}, l2" for node in range(11, 2, -1)]
    assert all(str(section["curve"]).count(f'stroke="var(--c{color})"') == 1 for color in range(9))


def test_numbers_as_people_write_them() -> None:
    section = probe.section(metrics(4, CURVE) | {"test_top5": 0.875, "knn": {"k": 7, "test_accuracy": 0.625}})
    facts = dict(section["facts"])
    assert (section["accuracy"], section["interval"]) == ("85.0%", "25.0% and 50.0%")
    assert facts["rows"] == "100 train, 10 validation, 40 test"
    assert (facts["top-5 accuracy"], facts["7 nearest neighbours"]) == ("87.5%", "62.5%")


@pytest.mark.parametrize("empty", [[], [{"class": "<0>", "accuracy": 1.0, "num_test": 3}]])
def test_a_class_without_test_rows_has_no_share(empty: list[dict[str, Any]]) -> None:
    found = probe.section(metrics(2, []) | {"confusion": [[0, 0], [0, 0]], "per_class": empty})
    assert found["confused"] == [] and found["curve"] is None
    assert [cell for row in found["table"]["rows"] for cell in row["cells"]] == [(0, 0.0)] * 4


def test_calibration_is_drawn_where_it_is_known() -> None:
    few = metrics(3, CURVE)
    assert probe.section(few)["reliability"] is None
    bins = [{"confidence": share, "accuracy": share / 2, "num_test": 10} for share in (0.2, 0.5, 0.9)]
    drawn = str(probe.section(few | {"reliability": bins})["reliability"])
    assert drawn.count("stroke-dasharray") >= 1 and drawn.count('stroke="var(--c0)"') == 1
