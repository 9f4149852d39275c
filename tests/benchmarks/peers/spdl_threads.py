"""SPDL's thread pipeline around our decoder and our optimised model: what its scheduling costs, nothing else.

    python spdl_threads.py --tars DIR --out DIR [--decoders 2] [--threads 2] [--batch-size 32] [--compile 1]

With `--compile 1` the model is compiled before the clock starts, as for this package. Slots of reused batches are handed out by
the source and filled in place; one thread embeds. Parquet is written at the end.
"""

from __future__ import annotations

import queue
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common
import numpy as np
import pyarrow.parquet  # noqa: F401  imported before the clock starts, as in every competitor
import torch
import torchvision  # noqa: F401
from numpy.typing import NDArray
from spdl.pipeline import PipelineBuilder

from pipeline import config
from pipeline.extract import aot
from pipeline.extract.backbone import COMPILED, Backbone, Spec
from pipeline.extract.decode import Decoder

NUM_BATCHES = 4
MAX_PIXELS = 100_000_000

Job = tuple[torch.Tensor, int, str, bytes]
"""Batch, slot, key, encoded bytes."""
Placed = tuple[torch.Tensor, str]


class Run:
    """The stages, and the memory that they share."""

    def __init__(self, backbone: Backbone, program: str, decode: str, batch_size: int, stamps: common.Stamps) -> None:
        self._backbone, self._program, self._decode = backbone, program, decode
        self._batch_size, self._stamps = batch_size, stamps
        self._free: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        for _ in range(NUM_BATCHES):
            self._free.put(backbone.new_batch(batch_size))
        self._local = threading.local()

    def source(self, tars: list[Path]) -> Iterator[Job]:
        slot, images_BHWC = 0, self._free.get()
        for path in tars:
            with tarfile.open(path) as tar:
                for member in tar:
                    file = tar.extractfile(member)
                    assert file is not None
                    if slot == self._batch_size:
                        slot, images_BHWC = 0, self._free.get()
                    yield images_BHWC, slot, Path(member.name).stem, file.read()
                    slot += 1

    def decode(self, job: Job) -> Placed:
        if not hasattr(self._local, "decoder"):
            preprocess = self._backbone.preprocess
            self._local.decoder = Decoder(preprocess, fast=self._decode == "fast", max_pixels=MAX_PIXELS)
        images_BHWC, slot, key, data = job
        self._local.decoder(data, images_BHWC[slot])
        return images_BHWC, key

    def embed(self, placed: list[Placed]) -> tuple[list[str], NDArray[np.float32]]:
        images_BHWC = placed[0][0]  # the order of the source is kept, so all slots are of one batch
        embeddings_BD = self._backbone.launch(images_BHWC, self._program).wait()["embedding"][: len(placed)].copy()
        self._free.put(images_BHWC)
        self._stamps.mark(len(placed))
        return [key for _, key in placed], embeddings_BD


def main() -> None:
    arguments = common.arguments("SPDL", decoders=2, threads=2, batch_size=common.BATCH_SIZE, compile=0)
    torch.set_num_threads(arguments.threads)
    chosen = config.Backbone(
        model=f"torchvision/{arguments.model}", weights="seed:0", nodes={"embedding": config.Node(node="flatten")}
    )
    if arguments.compile:
        common.compiled(chosen, arguments.decode, arguments.batch_size)
    job = common.Job(arguments.out)
    backbone = Backbone(Spec(backbone=chosen, decode=arguments.decode, precision="float32"))
    program = ""
    if arguments.compile:
        _, path = common.compiled(chosen, arguments.decode, arguments.batch_size)
        images_BHWC = backbone.new_batch(arguments.batch_size)
        backbone.launch(images_BHWC).wait()
        backbone.adopt(arguments.batch_size, aot.load(path, ["embedding"], 1))
        program = COMPILED
    run = Run(backbone, program, arguments.decode, arguments.batch_size, common.Stamps(arguments.out))
    lane = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(arguments.threads,))
    pipeline = (
        PipelineBuilder()
        .add_source(run.source(sorted(arguments.tars.glob("*.tar"))))
        .pipe(run.decode, concurrency=arguments.decoders, output_order="input")
        .aggregate(arguments.batch_size)
        .pipe(run.embed, executor=lane)
        .add_sink(2)
        .build(num_threads=arguments.decoders)
    )
    keys: list[str] = []
    embeddings = []
    with pipeline.auto_stop():
        for names, embeddings_BD in pipeline:
            keys.extend(names)
            embeddings.append(embeddings_BD)
    common.write(arguments.out, keys, embeddings)
    job.done(
        len(keys),
        decoders=arguments.decoders,
        threads=arguments.threads,
        batch_size=arguments.batch_size,
        model=program or backbone.program,
    )


if __name__ == "__main__":
    main()
