"""The limits of this machine: what storage, decoding and the forward pass allow by themselves, and how close the loop comes.

In: a config. Out: a mapping of numbers, images a second unless a name says otherwise. Nothing is written to the config's
output; the loop writes to a temporary folder. Machines drift, so what is compared alternates, and medians over the rounds are
told. What needs a memory of its own is measured in child processes, each of which measures once whenever it is asked to.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import pickle
import platform
import queue
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline import config, metrics
from pipeline.dataset import partition
from pipeline.dataset.partition import Target
from pipeline.errors import PipelineError, RunError, SampleError, ShardError, SourceError, UserError
from pipeline.extract import aot, loop
from pipeline.extract.backbone import COMPILED, Backbone, Pass, Program, Spec, freeze
from pipeline.extract.carry import Task
from pipeline.extract.decode import Decoder
from pipeline.extract.model import build, cut
from pipeline.extract.tune import Way
from pipeline.source import Sample, Shard, Source
from pipeline.storage import Store

TRIAL_S = 0.4
"""How long one trial of decoding or of a forward pass goes on, if one step is not longer."""
RUN_S = 1.5
"""What one run of the loop takes at least, if it comes close to the limit; the source's images go round until then."""
NUM_ROUNDS, NUM_PASSES = 3, 5
SLOW_S, NUM_SLOW_ROUNDS, NUM_SLOW_PASSES = 2.0, 1, 3
"""Where one pass takes longer than this, there are fewer rounds and passes."""
MAX_ENCODED_BYTES = 512 << 20
"""No more encoded images are held in memory."""
MACHINERY_BATCH = {"cpu": 16, "cuda": 128}
MACHINERY = {
    "train mode, grad": (True, torch.enable_grad),
    "eval mode, grad": (False, torch.enable_grad),
    "eval mode, no_grad": (False, torch.no_grad),
    "eval mode, inference_mode": (False, torch.inference_mode),
}
"""Mode to whether the model trains, and what its forward pass runs in. The last one is what this program does."""
LEAST_BYTES = 4096
"""A peak below one page counts as one."""

Note = Callable[[str], None]


def measure(settings: config.Config, num_images: int, note: Note) -> dict[str, Any]:
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
    limits = _Limits(settings, first.encoded, cores)
    note("trying programs and batch sizes")
    best = limits.survey(note)
    work = _Loop(
        settings=settings, device=limits.device, program=best.program, batch_size=best.batch_size,
        num_workers=cores if settings.run.threads == "auto" else settings.run.threads,
        num_wanted=round(RUN_S * limits.guess), shards=first.shards, counts=first.counts,
        pictures=limits.pictures_BHWC[: best.batch_size].numpy().tobytes(),
    )  # fmt: skip
    with _Child(work) as child:
        for number in range(1, 1 + (num_rounds := NUM_SLOW_ROUNDS if limits.pass_s > SLOW_S else NUM_ROUNDS)):
            note(f"round {number} of {num_rounds}: storage, decoding, forward pass, and the loop end to end")
            limits.round(_read(source, first.shards, first.counts))
            limits.runs.append(child.ask())
    machinery = _machinery(settings, limits, note)
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
        "training_machinery": machinery,
    }


# Source


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


# Decoding and forward pass


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A forward pass that might be the fastest."""

    program: str
    batch_size: int
    step: Callable[[], object]
    """One pass, waited for."""
    takes: str
    """`input`: normalised float32; `picture`: uint8, which the program normalises itself."""


class _Limits:
    """Decoding and forward pass, each with all of the machine to itself."""

    def __init__(self, settings: config.Config, encoded: list[bytes], cores: int) -> None:
        from pipeline.extract.actors import BATCH_SIZES  # here, so that the children need not import Ray

        self.settings, self._encoded, self._cores = settings, encoded, cores
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        run = settings.run
        self._sizes = BATCH_SIZES[self.device] if run.batch_size == "auto" else (run.batch_size,)
        self._lanes = cores if self.device == "cpu" else 1
        plain = Backbone(_spec(settings, fold=False), self.device)
        self._backbones = [plain] if run.optimize == "none" else [plain, Backbone(_spec(settings), self.device)]
        self.preprocess = plain.preprocess
        self.pictures_BHWC = self._decoded(max(*self._sizes, MACHINERY_BATCH[self.device]))
        self._read: list[tuple[float, float]] = []
        self._decode: dict[str, list[dict[str, float]]] = {"exact": [], "fast": []}
        self._forward: dict[_Candidate, list[float]] = {}
        self.runs: list[dict[str, Any]] = []
        self.pass_s = self.guess = 0.0
        """Seconds of one pass, and images a second of decoding and forward pass together, as the survey finds them."""

    def survey(self, note: Note) -> _Candidate:
        """Try all batch sizes of every program once; keep the best one of each, and return the best of all."""
        rates: dict[_Candidate, float] = {}
        for backbone in self._backbones:
            backbone.launch(self.pictures_BHWC[: self._sizes[0]]).wait()  # holds folded against eager
            for candidate in [self._program(backbone, size) for size in self._sizes]:
                with contextlib.suppress(torch.OutOfMemoryError):  # then a smaller size has to be the best
                    rates[candidate] = self._rate(candidate)
        if self.settings.run.optimize in ("auto", "compile"):
            best = max(rates, key=lambda each: rates[each])
            for candidate in self._compiled(best.batch_size, note):
                rates[candidate] = self._rate(candidate)
        kept = {each.program: each for each in sorted(rates, key=lambda each: rates[each])}
        self._forward = {each: [] for each in kept.values()}
        best = max(rates, key=lambda each: rates[each])
        self.pass_s = best.batch_size * self._lanes / rates[best]
        self.guess = self._both(self._decoding(self.settings.decode)[best.takes], rates[best])
        return best

    def round(self, read: tuple[float, float]) -> None:
        """Measure everything once; `read` is storage's images and bytes a second."""
        self._read.append(read)
        for decode, rates in self._decode.items():
            rates.append(self._decoding(decode))
        for candidate, taken in self._forward.items():
            taken.append(self._rate(candidate))

    def as_json(self, work: _Loop) -> dict[str, Any]:
        """Medians over the rounds; the share of the limit is that of each round, since machines drift."""
        decoded, median = self._decode[self.settings.decode], statistics.median
        limits = {
            candidate: [
                min(self._both(taken[candidate.takes], rate), read[0])
                for taken, rate, read in zip(decoded, rates, self._read, strict=True)
            ]
            for candidate, rates in self._forward.items()
        }
        best = max(limits, key=lambda each: median(limits[each]))
        parts = {
            "storage": median(images for images, _ in self._read),
            "decode": median(taken[best.takes] for taken in decoded),
            "forward": median(self._forward[best]),
        }
        storage = {"images_per_s": parts["storage"], "bytes_per_s": median(num_bytes for _, num_bytes in self._read)}
        ways = {
            way: {f"{name}s_per_s": median(each[name] for each in taken) for name in ("picture", "input")}
            for way, taken in self._decode.items()
        }
        programs = [
            {"program": each.program, "batch_size": each.batch_size, "takes": each.takes, "images_per_s": median(rates)}
            for each, rates in self._forward.items()
        ]
        rates = [run["images_per_s"] for run in self.runs]
        share = median(rate / limit for rate, limit in zip(rates, limits[best], strict=True))
        return {
            "rounds": len(self.runs),
            "storage": {**storage, "fetchers": loop.NUM_FETCHERS},
            "decode": {"configured": self.settings.decode, "threads": self._cores, **ways},
            "forward": {"lanes": self._lanes, "programs": programs},
            "limit": {
                "images_per_s": median(limits[best]),
                "program": best.program,
                "bound_by": min(parts, key=lambda name: parts[name]),
            },
            "end_to_end": {
                **self.runs[rates.index(statistics.median_low(rates))],
                "images_per_s": median(rates),
                "share_of_limit": share,
                "workers": work.num_workers,
            },
        }

    def _both(self, decode: float, forward: float) -> float:
        """On a CPU the same cores do both, one after the other; a GPU works beside them."""
        return 1 / (1 / decode + 1 / forward) if self.device == "cpu" else min(decode, forward)

    def _decoded(self, count: int) -> torch.Tensor:
        """(count, crop, crop, 3) uint8: real pictures, over again where there are fewer."""
        decoder = _decoder(self.settings, self.preprocess, self.settings.decode)
        pictures_BHWC = torch.zeros(count, self.preprocess.crop, self.preprocess.crop, 3, dtype=torch.uint8)
        for number, slot_HWC in enumerate(pictures_BHWC):
            if number < len(self._encoded):
                decoder(self._encoded[number], slot_HWC)
            else:
                slot_HWC.copy_(pictures_BHWC[number % len(self._encoded)])
        return pictures_BHWC

    def _decoding(self, decode: str) -> dict[str, float]:
        """Images a second on all cores, as far as the uint8 `picture` and as far as the float32 `input`."""
        lanes = [
            _DecodeLane(self._encoded[number :: self._cores] or self._encoded, self.settings, self.preprocess, decode)
            for number in range(self._cores)
        ]
        _in_lanes(lanes)
        return {
            "picture": sum(lane.num_decoded / lane.decode_s for lane in lanes),
            "input": sum(lane.num_decoded / (lane.decode_s + lane.normalise_s) for lane in lanes),
        }

    def _rate(self, candidate: _Candidate) -> float:
        """Images a second of this forward pass, on a CPU in one lane a core."""
        return _in_lanes([candidate.step] * self._lanes) * candidate.batch_size

    def _program(self, backbone: Backbone, size: int) -> _Candidate:
        """Eager or folded."""
        pictures_BHWC = self.pictures_BHWC[:size].to(self.device)
        program = backbone._module
        if self.device == "cuda":

            def embed() -> None:
                program(pictures_BHWC)
                torch.cuda.synchronize()

            return _Candidate(backbone.program, size, embed, "picture")
        # The network without the normalisation in front of it, which the decode limit counts.
        lines_BHL = torch.addcmul(program.offset_L, pictures_BHWC.flatten(2).float(), program.scale_L)
        inputs_BCHW = lines_BHL.view(pictures_BHWC.shape).permute(0, 3, 1, 2)
        half = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(self.settings.run.precision)

        def forward() -> None:
            with torch.autocast("cpu", dtype=half, enabled=half is not None):
                program.module(inputs_BCHW)

        return _Candidate(backbone.program, size, forward, "input")

    def _compiled(self, best_size: int, note: Note) -> Iterator[_Candidate]:
        """Programs that are compiled already; where the config insists, one is compiled now."""
        backbone = self._backbones[-1]
        orders = [aot.Order.of(backbone, size) for size in self._sizes]
        made = [order for order in orders if order.path.exists()]
        if not made and self.settings.run.optimize == "compile":
            note("compiling the model, which can take minutes")
            order = aot.Order.of(backbone, best_size)
            made = [order] if aot.compiled(order) else []
        for order in made:
            compiled = aot.load(order.path, list(backbone.recipe.widths), self._lanes)
            if backbone.adopt(order.batch_size, compiled):
                pictures_BHWC = self.pictures_BHWC[: order.batch_size].to(self.device)

                def step(compiled: Callable[..., object] = compiled, pictures_BHWC: torch.Tensor = pictures_BHWC) -> None:
                    compiled(pictures_BHWC)
                    if self.device == "cuda":
                        torch.cuda.synchronize()

                yield _Candidate(COMPILED, order.batch_size, step, "picture")


class _DecodeLane:
    """One core's decoding: every call makes one input, image after image, and counts its seconds."""

    def __init__(self, encoded: list[bytes], settings: config.Config, preprocess: config.Preprocess, decode: str) -> None:
        self.num_decoded, self.decode_s, self.normalise_s = 0, 0.0, 0.0
        self._encoded, self._decoder = encoded, _decoder(settings, preprocess, decode)
        side = preprocess.crop
        self._slot_HWC = torch.zeros(side, side, 3, dtype=torch.uint8)
        self._inputs_BHL = torch.zeros(8, side, side * 3)
        mean_C, std_C = torch.tensor(preprocess.mean) * 255, torch.tensor(preprocess.std) * 255
        self._scale_L, self._offset_L = (1 / std_C).repeat(side), (-mean_C / std_C).repeat(side)

    def __call__(self) -> None:
        start = time.perf_counter()
        self._decoder(self._encoded[self.num_decoded % len(self._encoded)], self._slot_HWC)
        decoded = time.perf_counter()
        input_HL = self._inputs_BHL[self.num_decoded % 8]
        input_HL.copy_(self._slot_HWC.view(input_HL.shape))
        torch.addcmul(self._offset_L, input_HL, self._scale_L, out=input_HL)
        self.num_decoded += 1
        self.decode_s += decoded - start
        self.normalise_s += time.perf_counter() - decoded


def _in_lanes(steps: Sequence[Callable[[], object]]) -> float:
    """Steps a second, summed over lanes: a thread each, which begin together after a step that warms up."""
    barrier = threading.Barrier(len(steps))

    @torch.inference_mode()
    def lane(step: Callable[[], object]) -> float:
        torch.set_num_threads(1)
        try:
            step()
        except BaseException:
            barrier.abort()
            raise
        barrier.wait()
        start, count = time.perf_counter(), 0
        while (seconds := time.perf_counter() - start) < TRIAL_S:
            step()
            count += 1
        return count / seconds

    with ThreadPoolExecutor(len(steps)) as threads:
        return sum(threads.map(lane, steps))


def _machinery(settings: config.Config, limits: _Limits, note: Note) -> dict[str, Any]:
    """What gradients and train mode would cost: the eager model, a process for each mode, which alternate."""
    batch_size = MACHINERY_BATCH[limits.device] if settings.run.batch_size == "auto" else settings.run.batch_size
    pictures = limits.pictures_BHWC[:batch_size].numpy().tobytes()
    passes: dict[str, list[dict[str, float]]] = {mode: [] for mode in MACHINERY}
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        note("what training machinery would cost: a process for each mode")
        jobs = {mode: _Machinery(settings=settings, device=limits.device, mode=mode, pictures=pictures) for mode in MACHINERY}
        children = {mode: stack.enter_context(_Child(job)) for mode, job in jobs.items()}
        num_passes, number = NUM_PASSES, 0
        while number <= num_passes:
            note(f"pass {number} of {num_passes}" if number else "a pass to warm up")
            for mode in [mode for mode in passes if mode not in failed]:
                try:
                    passes[mode].append(children[mode].ask())
                except PipelineError as error:  # not every model can train, and not every machine has the memory
                    failed[mode] = str(error)
                else:
                    num_passes = NUM_SLOW_PASSES if passes[mode][-1]["seconds"] > SLOW_S else num_passes
            number += 1
    rows = {}
    for mode, taken in passes.items():
        if mode not in failed:
            rows[mode] = {
                "seconds_per_image": statistics.median(each["seconds"] for each in taken[1:]) / batch_size,
                # Of the first pass: later on, what the allocator has not given back lies beside what is in use.
                "peak_bytes": max(LEAST_BYTES, taken[0]["peak_bytes"]),
            }
    least = rows.get("eval mode, inference_mode")
    for row in rows.values() if least else ():
        row |= {"seconds_ratio": row["seconds_per_image"] / least["seconds_per_image"]}  # type: ignore[index]
        row |= {"memory_ratio": row["peak_bytes"] / least["peak_bytes"]}  # type: ignore[index]
    return {"batch_size": batch_size, "passes": num_passes, "threads": 1, "modes": rows, "failed": failed}


# Child processes


@dataclass(frozen=True, kw_only=True)
class _Loop:
    """A job: the real loop, end to end, once whenever it is asked."""

    settings: config.Config
    device: str
    program: str
    batch_size: int
    num_workers: int
    num_wanted: int
    """Images of one run, at least; where the source's are fewer, they go round."""
    shards: list[Shard]
    counts: dict[str, int]
    """Shard's URL to how many of its samples there are to read."""
    pictures: bytes
    """At least a batch; see `_pictures`."""

    def results(self) -> Iterator[dict[str, Any]]:
        """Steady images a second, the share of its threads' time that each stage was busy, and what bounds it."""
        if self.device == "cpu":
            torch.set_num_threads(1)
        settings = self.settings
        backbone = _Clocked(_spec(settings, fold=settings.run.optimize != "none"), self.device)
        work = loop.Settings(decode=settings.decode, batch_sizes=(self.batch_size,), num_workers=self.num_workers)
        # A turn is a pass in every lane. Lanes tend to finish together, so only whole turns tell a rate; the first and last
        # ones, when lanes fill and run empty, do not count.
        turn = self.num_workers if self.device == "cpu" else 4
        num_wanted = max(self.num_wanted, 6 * turn * self.batch_size)
        source = _Source(settings.source, _cut(self.counts, num_wanted))
        shards = [shard for shard in self.shards if shard.url in source.counts]
        rounds = -(-num_wanted // sum(source.counts.values()))
        backbone.launch(_pictures(self.pictures, backbone.preprocess)[: self.batch_size]).wait()
        if self.program == COMPILED:
            backbone.adopt(
                self.batch_size,
                aot.load(aot.Order.of(backbone, self.batch_size).path, list(backbone.recipe.widths), self.num_workers),
            )
        layout, schema = source.layout(), partition.schema(backbone.recipe, source.fields())
        while True:
            backbone.finished.clear()
            with tempfile.TemporaryDirectory() as folder:
                target = Target(store=Store(), url=folder, recipe=backbone.recipe, layout=layout, schema=schema)
                start = time.perf_counter()
                running = loop.Loop(source, backbone, target, work)
                if self.program == COMPILED:
                    running.tuner.insist(Way(COMPILED, self.batch_size))
                futures = [running.submit(Task(shard=shard)) for _ in range(rounds) for shard in shards]
                num_images = sum(future.result().num_embedded for future in futures)
                seconds = time.perf_counter() - start
                running.close()  # only now has the last waiting been counted
                taken = running.stages.take()
            finished = sorted(backbone.finished)[turn - 1 :]
            passes = (len(finished) - 1 - turn) // turn * turn
            yield {
                # Where most images cannot be decoded, passes are too few.
                "images_per_s": passes * self.batch_size / (finished[passes] - finished[0])
                if passes > 0
                else num_images / seconds,
                "images": num_images,
                "seconds": seconds,
                "busy": metrics.busy(taken),
                "bound_by": metrics.bound_by(taken),
                "program": self.program if self.program == COMPILED else backbone.program,
                "batch_size": self.batch_size,
            }


class _Source(Source):
    """The first samples of shards."""

    def __init__(self, settings: config.Source, counts: dict[str, int]) -> None:
        super().__init__(settings)
        self.counts = counts

    def read(self, shard: Shard) -> Iterator[Sample]:
        """As many samples as `counts` says."""
        return itertools.islice(super().read(shard), self.counts[shard.url])


class _Clocked(Backbone):
    """Remembers when its passes were done, on a GPU when they were queued: in the long run as many as are done."""

    def __init__(self, spec: Spec, device: str) -> None:
        super().__init__(spec, device)
        self.finished: list[float] = []

    def launch(self, images_BHWC: torch.Tensor, program: str = "") -> Pass:
        """See `Backbone.launch`."""
        started = super().launch(images_BHWC, program)
        self.finished.append(time.perf_counter())
        return started


def _cut(counts: dict[str, int], num_wanted: int) -> dict[str, int]:
    """The first `num_wanted` samples."""
    kept = dict[str, int]()
    for url, count in counts.items():
        if num_wanted > 0:
            kept[url] = min(count, num_wanted)
            num_wanted -= count
    return kept


@dataclass(frozen=True, kw_only=True)
class _Machinery:
    """A job: forward passes of the eager model in one of the modes of `MACHINERY`, a pass whenever it is asked."""

    settings: config.Config
    device: str
    mode: str
    pictures: bytes

    def results(self) -> Iterator[dict[str, Any]]:
        """Seconds of a pass, and the highest bytes so far above what the process held once the model was built."""
        torch.set_num_threads(1)  # threads that wait for each other measure what else the machine does
        backbone, is_cuda = self.settings.backbone, self.device == "cuda"
        model, preprocess = build(backbone)
        program = Program(cut(freeze(model), backbone.nodes), backbone.nodes, preprocess, self.settings.run.precision)
        program = program.to(self.device).to(memory_format=torch.channels_last)
        trains, context = MACHINERY[self.mode]
        pictures_BHWC = _pictures(self.pictures, preprocess).to(self.device)
        with torch.no_grad():
            program(pictures_BHWC[:2])  # libraries load their kernels
        with contextlib.suppress(AttributeError):  # what that left free would hide as much of what is measured; glibc only
            ctypes.CDLL(None).malloc_trim(0)
        program.train(trains).requires_grad_(context is torch.enable_grad)
        if is_cuda:
            torch.backends.cudnn.allow_tf32 = self.settings.run.precision == "tf32"
            torch.cuda.reset_peak_memory_stats()
        least = torch.cuda.memory_allocated() if is_cuda else _resident_bytes()
        while True:
            start = time.perf_counter()
            with context():
                outputs = program(pictures_BHWC)
            if is_cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            del outputs
            peak = torch.cuda.max_memory_allocated() if is_cuda else _resident_bytes(peak=True)
            yield {"seconds": seconds, "peak_bytes": peak - least}


def _resident_bytes(peak: bool = False) -> int:
    """Resident memory of this process now, after which its peak counts anew; or that peak."""
    try:
        status = Path("/proc/self/status").read_text()
        if not peak:
            Path("/proc/self/clear_refs").write_text("5")
        return int(re.findall(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+)", status)[0]) << 10
    except (OSError, IndexError):  # not Linux: only the peak since the process began
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)


def _pictures(pixels: bytes, preprocess: config.Preprocess) -> torch.Tensor:
    """(B, crop, crop, 3) uint8."""
    return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(-1, preprocess.crop, preprocess.crop, 3)


class _Child:
    """A process with one job. Use as a context manager: the process ends with it."""

    def __init__(self, job: _Loop | _Machinery) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        command = [sys.executable, "-m", "pipeline.bench"]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, env=environment
        )
        self._to_send = pickle.dumps(job)  # more than a pipe holds: sent at the first question, while others start as well

    def ask(self) -> dict[str, Any]:
        """One measurement.

        Raises:
            PipelineError: it failed, or the process died.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it died: reading its answer says why
            self._process.stdin.write(self._to_send + b"again\n")
            self._process.stdin.flush()
        self._to_send = b""
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").strip().splitlines()
            raise RunError(f"a measurement died: {lines[-1][:300] if lines else f'exit code {self._process.returncode}'}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise (UserError if answer["exit_code"] == UserError.exit_code else RunError)(answer["error"])
        return answer

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def _answer(job: _Loop | _Machinery) -> None:
    """Measure once for each line on stdin; the answer is a line of JSON, and nothing else gets into it."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a model of one's own may print
    results = job.results()
    for _ in sys.stdin.buffer:
        try:
            answer = next(results)
        except PipelineError as error:
            answer = {"error": str(error), "exit_code": error.exit_code}
        print(json.dumps(answer), file=answers, flush=True)


# All


def _spec(settings: config.Config, fold: bool = True) -> Spec:
    return Spec(backbone=settings.backbone, decode=settings.decode, precision=settings.run.precision, fold=fold)


def _decoder(settings: config.Config, preprocess: config.Preprocess, decode: str) -> Decoder:
    return Decoder(preprocess, fast=decode == "fast", max_pixels=settings.source.max_pixels)


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError, IndexError):
        return str(re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0])
    return platform.machine()


if __name__ == "__main__":
    # The classes are not this script's, but those that were sent.
    from pipeline import bench

    bench._answer(pickle.load(sys.stdin.buffer))
