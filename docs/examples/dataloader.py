"""PyTorch DataLoader: shuffled batches straight from the partitions, by several workers, the dataset never in memory.

python docs/examples/dataloader.py data/embeddings
"""

import sys
from collections.abc import Iterator

import numpy as np
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pipeline.dataset.read import Dataset, open_dataset


class Rows(IterableDataset):
    """Batches of keys and embeddings, another order in each epoch. Rows of `mixed` partitions are shuffled together."""

    def __init__(self, dataset: Dataset, batch_size: int = 256, mixed: int = 4) -> None:
        self.files, (self.node, self.width) = dataset.files(), next(iter(dataset.nodes.items()))
        self.batch_size, self.mixed = batch_size, mixed

    def __iter__(self) -> Iterator[tuple[list[str], torch.Tensor]]:
        worker = get_worker_info()
        # The workers of an epoch agree on its order, and each takes a share of it.
        random = np.random.default_rng(worker.seed - worker.id if worker else torch.initial_seed())
        files = random.permutation(self.files)[worker.id :: worker.num_workers] if worker else random.permutation(self.files)
        for start in range(0, len(files), self.mixed):
            table = pq.read_table(files[start : start + self.mixed].tolist(), columns=["key", self.node])
            embeddings = table.column(self.node).combine_chunks().flatten().to_numpy().reshape(-1, self.width)
            for rows in np.array_split(random.permutation(len(table)), range(self.batch_size, len(table), self.batch_size)):
                yield table.column("key").take(rows).to_pylist(), torch.from_numpy(embeddings[rows])


if __name__ == "__main__":
    loader = DataLoader(Rows(open_dataset(sys.argv[1])), batch_size=None, num_workers=2)
    for epoch in range(2):
        sizes, norms = zip(*((len(keys), embeddings.norm(dim=1).sum()) for keys, embeddings in loader), strict=True)
        print(f"epoch {epoch}: {sum(sizes)} rows in {len(sizes)} batches, mean norm {sum(norms) / sum(sizes):.4f}")
