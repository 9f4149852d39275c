"""DuckDB: rows of each label, and the nearest neighbours of one row, in SQL.

python docs/examples/duckdb_query.py data/embeddings
"""

import sys

import duckdb

import pipeline

dataset = pipeline.open_dataset(sys.argv[1])
node = next(iter(dataset.nodes))

rows = duckdb.read_parquet(dataset.files())  # nothing is read yet
print(duckdb.sql("SELECT label, count(*) AS num_rows FROM rows GROUP BY label ORDER BY label"))

# Statistics on key let DuckDB skip the row groups that cannot hold it.
key = dataset.keys()[0]
neighbours = duckdb.sql(
    f"""
    WITH query AS (SELECT "{node}" AS embedding FROM rows WHERE key = $key LIMIT 1)
    SELECT key, label, list_cosine_similarity(rows."{node}", query.embedding) AS cosine
    FROM rows, query ORDER BY cosine DESC, key LIMIT 5
    """,
    params={"key": key},
)
print(f"nearest to {key}")
print(neighbours)
