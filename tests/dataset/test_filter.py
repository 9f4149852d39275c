"""Conditions as people write them, and the rows that they mean."""

from __future__ import annotations

import datetime

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipeline.dataset.filter import Filter, parse
from pipeline.errors import ConfigError, DatasetError

DAY = datetime.date(2026, 11, 24)
ROWS = pa.table(
    {
        "key": ["a", "b", "a=b", "", "<x>", "é"],
        "label": [1, 2, 3, None, 3, -1],
        "weight": [0.5, float("nan"), 2.0, 1e9, None, -3.0],
        "good": [True, False, None, True, False, True],
        "day": [DAY, None, DAY.replace(day=25), DAY, DAY, DAY.replace(year=1999)],
        "when": pa.array(
            [datetime.datetime(2026, 11, day, tzinfo=datetime.UTC) for day in range(1, 7)], pa.timestamp("us", "UTC")
        ),
        "embedding": [[1.0]] * 6,
    }
)


@pytest.mark.parametrize(
    ("conditions", "positions"),
    [
        ([], [0, 1, 2, 3, 4, 5]),
        (["label=3"], [2, 4]),
        (["label != 3"], [0, 1, 5]),
        (["label<2"], [0, 5]),
        (["label<=2"], [0, 1, 5]),
        ([" label >  -1 "], [0, 1, 2, 4]),
        (["label>=3", "key!=a=b"], [4]),
        (["key=a=b"], [2]),
        (["key="], [3]),
        (["key=<x>"], [4]),
        (["key=é"], [5]),
        (["weight>=2"], [2, 3]),
        (["weight!=2"], [0, 1, 3, 5]),
        (["good=true", "label=1"], [0]),
        (["day>2026-11-24"], [2]),
        (["when>=2026-11-05T00:00:00Z"], [4, 5]),
    ],
)
def test_conditions_mean_these_rows(conditions: list[str], positions: list[int]) -> None:
    expression = parse(conditions, ROWS.schema)
    if expression is None:
        assert positions == list(range(6))
        return
    assert Filter(expression, ROWS.schema).positions(ROWS).tolist() == positions


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("label", "where: 'label' is no condition; allowed: COLUMN, one of = != < <= > >=, a value"),
        ("=3", "where: '=3' is no condition"),
        ("labl=3", "where: 'labl=3': there is no column 'labl' to compare; did you mean label"),
        ("zzzz=3", "there is no column 'zzzz' to compare; allowed: key, label, weight, good, day, when$"),
        ("embedding=3", "there is no column 'embedding' to compare"),
        ("label=x", "where: 'label=x': 'x' is not allowed; label is int64$"),
        ("label=3.5", "'3.5' is not allowed; label is int64"),
        ("label=", "'' is not allowed; label is int64"),
        ("good=maybe", "'maybe' is not allowed; good is bool"),
        ("day=yesterday", "'yesterday' is not allowed; day is date32"),
        ("when>2026-11-05", r"'2026-11-05' is not allowed; when is timestamp\[us, tz=UTC\], for example 2026-11-24T18:30:00Z"),
        ("key=\udc80", "is not allowed; key is string"),
    ],
)
def test_mistakes_name_column_value_and_what_is_allowed(condition: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse([condition], ROWS.schema)


def test_an_expression_names_the_columns_that_have_to_be_read() -> None:
    wanted = (pc.field("label") == 3) | pc.field("key").isin(["a"])
    assert Filter(wanted, ROWS.schema).columns == ["key", "label"]
    assert Filter(wanted, ROWS.schema).positions(ROWS.select(["key", "label"])).tolist() == [0, 2, 4]
    assert Filter(pc.scalar(True), ROWS.schema).positions(ROWS.select(["key"])).tolist() == list(range(6))


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        (pc.field("labl") == 3, r"where: \(labl == 3\): .*labl.*; columns are key \(string\), label \(int64\)"),
        (pc.field("label") == "x", r"where: \(label == \"x\"\): .*int64.*string.*; columns are"),
        (pc.field("label"), "where: label: .*bool"),
        (3, "where: 3: "),
    ],
)
def test_expressions_that_cannot_be_evaluated(expression: pc.Expression, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        Filter(expression, ROWS.schema)
