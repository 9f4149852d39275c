"""Ray Data: a function over all rows, a batch at a time, on every core of a cluster.

python docs/examples/ray_data.py data/embeddings
"""

import sys

import numpy as np
import ray

import pipeline

dataset = pipeline.open_dataset(sys.argv[1])
node = next(iter(dataset.nodes))


def norms(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the workers do with a batch."""
    embeddings = np.stack(batch[node])  # (rows, D) float32
    return {"key": batch["key"], "norm": np.linalg.norm(embeddings, axis=1)}


rows = ray.data.read_parquet(dataset.files(), columns=["key", node])
normed = rows.map_batches(norms, batch_size=1024).materialize()  # or .write_parquet(…), where there are many
found = np.concatenate([batch["norm"] for batch in normed.iter_batches()])
print(f"{normed.count()} rows, norms from {found.min():.4f} to {found.max():.4f}")
for row in normed.take(3):
    print(f"{row['key']}  {row['norm']:.4f}")
