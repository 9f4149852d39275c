"""FAISS: nearest neighbours of the first rows. `pipeline export --to faiss` writes such an index as a file.

python docs/examples/faiss_search.py data/embeddings
"""

import sys

import faiss

import pipeline

dataset = pipeline.open_dataset(sys.argv[1])
node, width = next(iter(dataset.nodes.items()))

index = faiss.IndexFlatIP(width)  # the cosine, where the recipe normalises
keys: list[str] = []
for batch in dataset.iter_batches(["key", node]):
    index.add(batch.column(node).flatten().to_numpy().reshape(-1, width))
    keys += batch.column("key").to_pylist()

queries = index.reconstruct_n(0, min(3, len(keys)))
scores, neighbours = index.search(queries, min(5, len(keys)))
for row, key in enumerate(keys[: len(queries)]):
    found = zip(neighbours[row], scores[row], strict=True)
    print(key, "->", ", ".join(f"{keys[neighbour]} ({score:.3f})" for neighbour, score in found))
