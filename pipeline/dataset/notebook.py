"""A dataset in a notebook: a small table to look at, and rows as a pandas DataFrame."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.dataset.read import Dataset

MAX_COLUMNS = 50
"""That are named; a dataset may carry thousands."""


def as_html(dataset: Dataset) -> str:
    """What the log knows of a version, as a table. No partition is read, and everything is escaped."""
    recipe, entries = dataset.recipe, dataset.table_.entries
    nodes = ", ".join(f"{name} ({width:,} x float32)" for name, width in dataset.nodes.items())
    columns = [f"{name} ({dataset.schema.field(name).type})" for name in dataset.columns]
    if len(columns) > MAX_COLUMNS:
        columns[MAX_COLUMNS:] = [f"and {len(columns) - MAX_COLUMNS:,} more"]
    rows = {
        "dataset": dataset.url,
        "version": str(dataset.version),
        "rows": f"{len(dataset):,} in {len(entries):,} partitions",
        "quarantined": f"{sum(entry.num_quarantined for entry in entries):,}",
        "model": f"{recipe.get('model')}, weights {recipe.get('weights')}, {recipe.get('precision')}",
        "embeddings": nodes,
        "columns": ", ".join(columns),
    }
    cells = (
        f'<tr><th style="text-align: left">{html.escape(name)}</th><td style="text-align: left">{html.escape(value)}</td></tr>'
        for name, value in rows.items()
    )
    return f"<table>{''.join(cells)}</table>"


def as_pandas(table: pa.Table) -> Any:
    """An Arrow table as a DataFrame: whole numbers stay such where some are missing, an embedding is an array in its cell.

    Raises:
        UserError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise UserError("pandas is not installed; `pip install 'frozen-pipeline[notebook]'` does it") from None
    return table.to_pandas(types_mapper={pa.int64(): pandas.Int64Dtype()}.get)
