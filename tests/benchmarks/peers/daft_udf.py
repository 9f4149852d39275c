"""Daft as its documentation does batch inference: glob, download, a class with a batch method, write_parquet.

    python daft_udf.py --images DIR --out DIR [--instances 1] [--threads 2] [--processes 0]

Daft reads no tars, so it gets the same images as loose files. `--processes 1` runs each instance in a process of its own.
"""

from __future__ import annotations

import functools
import io
import os
from pathlib import Path
from typing import Any

os.environ["DAFT_PROGRESS_BAR"] = "0"

import common
import daft
import numpy as np
import pyarrow.parquet as pq
import torch
import torchvision  # noqa: F401  imported before the clock starts, as in every competitor
from daft import DataType, Series, col
from PIL import Image

WIDTHS = {"mobilenet_v3_small": 576, "resnet50": 2048}


@functools.cache
def build(model: str, channels_last: bool) -> Any:
    """One model a process, which its instances share: while torch.fx traces it no other thread may call a module."""
    return common.build(model, channels_last=channels_last)


class Embed:
    """Encoded bytes to embeddings, a batch at a time."""

    def __init__(self, model: str, channels_last: bool, threads: int, stamps: common.Stamps) -> None:
        torch.set_num_threads(threads)
        self._model, self._preset = build(model, channels_last)
        self._channels_last, self._threads, self._stamps = channels_last, threads, stamps

    def embed(self, data: Series) -> Any:
        torch.set_num_threads(self._threads)  # the engine may call from another thread than it built the instance in
        images = [self._preset(Image.open(io.BytesIO(each)).convert("RGB")) for each in data.to_pylist()]
        embeddings_BD = common.forward(self._model, torch.stack(images), channels_last=self._channels_last)
        self._stamps.mark(len(embeddings_BD))
        return np.ascontiguousarray(embeddings_BD)


def main() -> None:
    arguments = common.arguments("Daft", instances=2, threads=1, processes=0, batch_size=common.BATCH_SIZE)
    daft.set_runner_native()
    build(arguments.model, arguments.channels_last)
    job, stamps = common.Job(arguments.out), common.Stamps(arguments.out)
    width = WIDTHS[arguments.model]
    Embed.embed = daft.method.batch(  # type: ignore[method-assign]
        return_dtype=DataType.embedding(DataType.float32(), width), batch_size=arguments.batch_size
    )(Embed.embed)
    embedder = daft.cls(Embed, max_concurrency=arguments.instances, use_process=bool(arguments.processes))(
        arguments.model, arguments.channels_last, arguments.threads, stamps
    )
    (
        daft.from_glob_path(f"{arguments.images.absolute()}/*.jpg")
        .into_batches(arguments.batch_size)
        .with_column("data", col("path").download())
        .with_column("embedding", embedder.embed(col("data")))
        .select(col("path").alias("key"), col("embedding"))
        .write_parquet(str(arguments.out))
    )
    num_images = sum(pq.read_metadata(file).num_rows for file in Path(arguments.out).rglob("*.parquet"))
    job.done(
        num_images,
        instances=arguments.instances,
        threads=arguments.threads,
        processes=bool(arguments.processes),
        batch_size=arguments.batch_size,
    )


if __name__ == "__main__":
    main()
