"""Which rows are meant: an Arrow expression over the columns, or conditions as a person writes them.

A row without a value in a column meets no condition on it.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.errors import ConfigError, DatasetError, nearest

OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_CONDITION = re.compile(r"\s*([^=!<>]*?)\s*(!=|<=|>=|=|<|>)\s*(.*?)\s*", re.DOTALL)
_POSITION = "position of the row"


class Filter:
    """An expression, and the columns that it looks at.

    Raises:
        DatasetError: it names a column that is not there, or compares one with what it cannot be compared with.
    """

    def __init__(self, expression: pc.Expression, schema: pa.Schema) -> None:
        self._expression = expression
        empty = schema.empty_table()
        try:
            empty.filter(expression)
        except (pa.ArrowException, TypeError) as error:
            text = str(error).splitlines()[0]
            allowed = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise DatasetError(f"where: {expression}: {text}; columns are {allowed}") from None
        named = [name for name in schema.names if not _does_without(expression, empty, name)]
        self.columns = named or schema.names[:1]
        """What has to be read of a row."""

    def positions(self, rows: pa.Table) -> NDArray[np.int64]:
        """(M,) positions, ascending, of the rows that are meant."""
        numbered = rows.append_column(_POSITION, pa.array(np.arange(rows.num_rows)))
        return np.sort(numbered.filter(self._expression).column(_POSITION).to_numpy())


def parse(conditions: Sequence[str], schema: pa.Schema) -> pc.Expression | None:
    """`label=3` and the like as one expression that wants all of them; None where there are none.

    Values are read as the column's type says; spaces around name and value do not count.

    Raises:
        ConfigError: no condition, no such column, or a value that is not of its type.
    """
    found: pc.Expression | None = None
    for condition in conditions:
        match = _CONDITION.fullmatch(condition)
        if match is None or not match[1]:
            raise ConfigError(f"where: {condition!r} is no condition; allowed: COLUMN, one of {' '.join(OPERATORS)}, a value")
        name, sign, text = match.groups()
        allowed = [field.name for field in schema if not pa.types.is_list(field.type)]
        if name not in allowed:
            hint = nearest(name, allowed) or f"allowed: {', '.join(allowed)}"
            raise ConfigError(f"where: {condition!r}: there is no column {name!r} to compare; {hint}")
        kind = schema.field(name).type
        try:
            value = pa.scalar(text, pa.string()).cast(kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeEncodeError):
            example = ", for example 2026-11-24T18:30:00Z" if pa.types.is_timestamp(kind) else ""
            raise ConfigError(f"where: {condition!r}: {text!r} is not allowed; {name} is {kind}{example}") from None
        each = OPERATORS[sign](pc.field(name), value)
        found = each if found is None else found & each
    return found


def _does_without(expression: pc.Expression, rows: pa.Table, name: str) -> bool:
    """Whether an expression can be evaluated without a column. Arrow does not tell which columns one names."""
    try:
        rows.drop_columns(name).filter(expression)
    except pa.ArrowInvalid:
        return False
    return True
