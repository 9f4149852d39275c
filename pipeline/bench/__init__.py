"""The limits of this machine: what storage, decoding and the forward pass allow by themselves, and how close the loop comes.

In: a config. Out: a mapping of numbers, images a second unless a name says otherwise. Nothing is written to the config's
output; the loop writes to a temporary folder. Machines drift, so what is compared alternates, and medians over the rounds are
told. What needs a memory of its own is measured in child processes, each of which measures once whenever it is asked to.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import queue
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline import config
from pipeline.bench import machinery
from pipeline.bench.end_to_end import EndToEnd
from pipeline.bench.jobs import Child
from pipeline.bench.limits import Limits
from pipeline.errors import SampleError, ShardError, SourceError
from pipeline.extract import loop
from pipeline.extract.decode import Decoder
from pipeline.source import Sample, Shard, Source

RUN_S = 1.5
"""What one run of the loop takes at least, if it comes close to the limit; the source's images go round until then."""
NUM_ROUNDS = 3
SLOW_S, NUM_SLOW_ROUNDS = 2.0, 1
"""Where one pass takes longer than this, there are fewer rounds."""
MAX_ENCODED_BYTES = 512 << 20
"""No more encoded images are held in memory."""


def measure(settings: config.Config, num_images: int, note: Callable[[str], None]) -> dict[str, Any]:
    """All limits, on up to `num_images` of the source's first images; what is being done is told to `note`.

    Raises:
        UserError: the config is wrong, or the source has no image that can be decoded.
        PipelineError: source or loop failed.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    source = Source(settings.source)
    source.fields()
    note("reading the first images")
    first = _first_images(source, num_images)
    torch.set_num_threads(1)  # every lane is a thread of its own
    note("building the model")
    limits = Limits(settings, first.encoded, cores)
    note("trying programs and batch sizes")
    best = limits.survey(note)
    work = EndToEnd(
        settings=settings, device=limits.device, program=best.program, batch_size=best.batch_size,
        num_workers=cores if settings.run.threads == "auto" else settings.run.threads,
        num_wanted=round(RUN_S * limits.guess), shards=first.shards, counts=first.counts,
        pixels=limits.pictures_BHWC[: best.batch_size].numpy().tobytes(),
    )  # fmt: skip
    with Child(work) as child:
        for number in range(1, 1 + (num_rounds := NUM_SLOW_ROUNDS if limits.pass_s > SLOW_S else NUM_ROUNDS)):
            note(f"round {number} of {num_rounds}: storage, decoding, forward pass, and the loop end to end")
            limits.round(_read(source, first.shards, first.counts))
            limits.runs.append(child.ask())
    costs = machinery.measure(settings, limits.device, limits.pictures_BHWC, note)
    return {
        "machine": {"device": limits.device, "name": _device_name(limits.device), "cores": cores, "torch": torch.__version__},
        "model": settings.backbone.model,
        "precision": settings.run.precision,
        "images": {
            "read": sum(first.counts.values()),
            "unreadable": sum(first.counts.values()) - len(first.encoded),
            "mean_bytes": round(sum(map(len, first.encoded)) / len(first.encoded)),
        },
        **limits.as_json(work),
        "training_machinery": costs,
    }


class _First(NamedTuple):
    """The first images of a source."""

    shards: list[Shard]
    counts: dict[str, int]
    """Shard's URL to the number of its samples that were read."""
    encoded: list[bytes]
    """Those that can be decoded."""


def _first_images(source: Source, num_images: int) -> _First:
    # As many shards as images: more are never needed, and a listing can be endless.
    shards = list(itertools.islice(source.shards(), num_images))
    counts, encoded, num_bytes = dict[str, int](), list[bytes](), 0
    reason = "they are empty"
    decoder = Decoder(config.Preprocess(), fast=False, max_pixels=source.settings.max_pixels)
    slot_HWC = torch.zeros(224, 224, 3, dtype=torch.uint8)
    for shard in shards:
        wanted = num_images - sum(counts.values())
        if wanted <= 0 or num_bytes > MAX_ENCODED_BYTES:
            break
        counts[shard.url] = 0
        for sample in _samples(source, shard, wanted):
            counts[shard.url] += 1
            try:
                if sample.error is not None:
                    raise sample.error
                decoder(sample.image, slot_HWC)
            except SampleError as error:
                reason = str(error)
                continue
            encoded.append(bytes(sample.image))
            num_bytes += len(encoded[-1])
            if num_bytes > MAX_ENCODED_BYTES:
                break
    if not encoded:
        raise SourceError(f"source.url: none of the first {sum(counts.values())} images can be decoded: {reason}")
    return _First([shard for shard in shards if shard.url in counts], counts, encoded)


def _samples(source: Source, shard: Shard, count: int) -> Iterator[Sample]:
    try:
        yield from itertools.islice(source.read(shard), count)
    except ShardError as error:
        raise SourceError(f"source.url: {error}") from None


def _read(source: Source, shards: Sequence[Shard], counts: dict[str, int]) -> tuple[float, float]:
    """Images and bytes a second of reading the shards' first samples with the loop's number of fetchers, and nothing else."""
    waiting: queue.SimpleQueue[Shard] = queue.SimpleQueue()
    for shard in shards:
        waiting.put(shard)

    def fetch(_: int) -> int:
        num_bytes = 0
        with contextlib.suppress(queue.Empty):
            while shard := waiting.get_nowait():
                num_bytes += sum(len(sample.image) for sample in _samples(source, shard, counts[shard.url]))
        return num_bytes

    start = time.perf_counter()
    with ThreadPoolExecutor(loop.NUM_FETCHERS) as threads:
        num_bytes = sum(threads.map(fetch, range(loop.NUM_FETCHERS)))
    seconds = time.perf_counter() - start
    return sum(counts.values()) / seconds, num_bytes / seconds


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError, IndexError):
        return str(re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0])
    return platform.machine()
