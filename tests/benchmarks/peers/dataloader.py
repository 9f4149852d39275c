"""A torch DataLoader over tars as tutorials write it: workers decode with PIL, the main process embeds.

    python dataloader.py --tars DIR --out DIR [--workers 2] [--threads 2]

The tars are shared out among the workers; Parquet is written at the end.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np  # noqa: F401  imported before the clock starts, as in every competitor
import pyarrow.parquet  # noqa: F401
import torch
import torchvision  # noqa: F401
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info


class Tars(IterableDataset[tuple[str, torch.Tensor]]):
    """Key and preprocessed picture of every member."""

    def __init__(self, tars: list[Path], transform: Callable[[Any], Any]) -> None:
        self._tars, self._transform = tars, transform

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        worker = get_worker_info()
        tars = self._tars if worker is None else self._tars[worker.id :: worker.num_workers]
        for path in tars:
            with tarfile.open(path) as tar:
                for member in tar:
                    file = tar.extractfile(member)
                    assert file is not None
                    image = Image.open(io.BytesIO(file.read())).convert("RGB")
                    yield Path(member.name).stem, self._transform(image)


def main() -> None:
    arguments = common.arguments("DataLoader", workers=2, threads=2, batch_size=common.BATCH_SIZE)
    torch.set_num_threads(arguments.threads)
    job, stamps = common.Job(arguments.out), common.Stamps(arguments.out)
    model, transform = common.build(arguments.model, channels_last=arguments.channels_last)
    dataset = Tars(sorted(arguments.tars.glob("*.tar")), transform)
    keys: list[str] = []
    embeddings = []
    for names, images_BCHW in DataLoader(dataset, batch_size=arguments.batch_size, num_workers=arguments.workers):
        embeddings.append(common.forward(model, images_BCHW, channels_last=arguments.channels_last))
        keys.extend(names)
        stamps.mark(len(names))
    common.write(arguments.out, keys, embeddings)
    job.done(len(keys), workers=arguments.workers, threads=arguments.threads, batch_size=arguments.batch_size)


if __name__ == "__main__":
    main()
