"""Polars: mean norm and number of rows of each label. It reads the Delta log by itself; this package is not needed.

python docs/examples/polars_query.py data/embeddings
"""

import sys

import polars as pl

# Columns that begin with an underscore are the log's own, and empty here. `version=3` opens an older version.
rows = pl.scan_delta(sys.argv[1]).select(~pl.selectors.starts_with("_"))
node = next(name for name, kind in rows.collect_schema().items() if kind == pl.List(pl.Float32))

norm = pl.col(node).list.eval(pl.element() ** 2).list.sum().sqrt()
print(rows.group_by("label").agg(pl.len().alias("rows"), norm.mean().alias("mean norm")).sort("label").collect())

# As an array: all lists are equally long, which a list column does not say.
column = rows.sort("shard", "index").select(node).collect()[node]
embeddings = column.list.to_array(len(column[0])).to_numpy()
print(f"{node}: {embeddings.shape[0]} x {embeddings.shape[1]} {embeddings.dtype}")
