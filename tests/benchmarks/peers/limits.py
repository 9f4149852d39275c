"""What the machine allows: decoding alone, and the forward pass alone, on all cores, with everything else taken away.

    python limits.py --what decode|forward [--tars DIR] [--model NAME] [--decode exact|fast] [--seconds 3]

decode: encoded bytes in memory to normalised float32 in a channels-last batch that is used again, as fast as known here: our
decoder's uint8 picture, normalised while it is in cache by the fastest way of `WAYS`. Threads and processes, the better one.

forward: our optimised model on a batch that is ready and stays in memory: all cores in one pass, and a lane of one thread for
each core, of several batch sizes, and compiled. The best one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tarfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common
import torch

from pipeline import config
from pipeline.extract import aot
from pipeline.extract.backbone import Backbone, Spec
from pipeline.extract.decode import Decoder

MAX_PIXELS = 100_000_000
BATCH_SIZES = (8, 16, 32)
NUM_CORES = len(os.sched_getaffinity(0))
Way = Callable[[torch.Tensor, torch.Tensor], object]
"""(H, W, 3) uint8 to normalised (H, W, 3) float32 in the second argument."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what decoding and the forward pass allow.")
    parser.add_argument("--what", choices=("decode", "forward"), required=True)
    parser.add_argument("--tars", type=Path)
    parser.add_argument("--model", default="mobilenet_v3_small")
    parser.add_argument("--decode", choices=("exact", "fast"), default="exact")
    parser.add_argument("--way", choices=tuple(WAYS), default=BEST_WAY)
    parser.add_argument("--seconds", type=float, default=2.0)
    arguments = parser.parse_args()
    if arguments.what == "decode":
        rates = decode(images(arguments.tars), arguments.decode == "fast", arguments.way, arguments.seconds)
    else:
        rates = forward(arguments.model, arguments.seconds)
    best = max(rates, key=lambda way: rates[way])
    settings = {"best": best, **({"normalise": arguments.way} if arguments.what == "decode" else {})}
    print(json.dumps({"images_per_s": rates[best], "ways": rates, "settings": settings}))


# Decode


def normalise_in_two(mean_C: torch.Tensor, std_C: torch.Tensor) -> Way:
    """Subtract into the float picture, divide in place; a row of constants as long as the picture's, so it vectorises."""

    def way(slot_HWC: torch.Tensor, out_HWC: torch.Tensor) -> object:
        height, width, _ = slot_HWC.shape
        mean, std = rows(mean_C, std_C, width)
        out = out_HWC.view(height, -1)
        return torch.sub(slot_HWC.view(height, -1), mean, out=out).div_(std)

    return way


def normalise_by_copy(mean_C: torch.Tensor, std_C: torch.Tensor) -> Way:
    """Copy to float, then scale and shift in one pass."""
    scale_C, shift_C = 1 / std_C, -mean_C / std_C

    def way(slot_HWC: torch.Tensor, out_HWC: torch.Tensor) -> object:
        height, width, _ = slot_HWC.shape
        scale, shift = rows(scale_C, shift_C, width)
        out = out_HWC.view(height, -1).copy_(slot_HWC.view(height, -1))
        return torch.addcmul(shift, out, scale, out=out)

    return way


def normalise_in_numpy(mean_C: torch.Tensor, std_C: torch.Tensor) -> Way:
    """Two ufuncs that write into the float picture."""
    import numpy as np

    scale_C, shift_C = 1 / std_C, -mean_C / std_C

    def way(slot_HWC: torch.Tensor, out_HWC: torch.Tensor) -> object:
        height, width, _ = slot_HWC.shape
        scale, shift = rows(scale_C, shift_C, width)
        out = out_HWC.view(height, -1).numpy()
        np.multiply(slot_HWC.view(height, -1).numpy(), scale.numpy(), out=out)
        return np.add(out, shift.numpy(), out=out)

    return way


def normalise_compiled(mean_C: torch.Tensor, std_C: torch.Tensor) -> Way:
    """One fused pass that TorchInductor makes: needs a C++ compiler."""
    scale_C, shift_C = 1 / std_C, -mean_C / std_C

    @torch.compile(dynamic=False)
    def fused(slot: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(torch.addcmul(shift, slot.float(), scale))

    def way(slot_HWC: torch.Tensor, out_HWC: torch.Tensor) -> object:
        height, width, _ = slot_HWC.shape
        return fused(slot_HWC.view(height, -1), *rows(scale_C, shift_C, width), out_HWC.view(height, -1))

    return way


def normalise_nothing(mean_C: torch.Tensor, std_C: torch.Tensor) -> Way:
    """For comparison only: the uint8 picture stays what it is."""
    return lambda slot_HWC, out_HWC: None


_rows: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}


def rows(first_C: torch.Tensor, second_C: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Constants for a row of `width` pixels."""
    key = (id(first_C), width)
    if key not in _rows:
        _rows[key] = (first_C.repeat(width), second_C.repeat(width))
    return _rows[key]


WAYS: dict[str, Callable[[torch.Tensor, torch.Tensor], Way]] = {
    "sub, div": normalise_in_two,
    "copy, addcmul": normalise_by_copy,
    "numpy multiply, add": normalise_in_numpy,
    "compiled": normalise_compiled,
    "none": normalise_nothing,
}
BEST_WAY = "copy, addcmul"


def images(tars: Path) -> list[bytes]:
    """All encoded images, in memory."""
    found = []
    for path in sorted(tars.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [file.read() for member in tar if (file := tar.extractfile(member)) is not None]
    return found


def decode(encoded: list[bytes], fast: bool, way: str, seconds: float) -> dict[str, float]:
    rates = {}
    if way != "compiled":  # what is compiled lives in one process
        rates["processes"] = in_processes(lambda lane, barrier: decode_lane(encoded, fast, way, lane, barrier, seconds))
    rates["threads"] = in_threads(lambda lane, barrier: decode_lane(encoded, fast, way, lane, barrier, seconds))
    return rates


def decode_lane(encoded: list[bytes], fast: bool, way: str, lane: int, barrier: Any, seconds: float) -> float:
    """Images a second that one core decodes: every `NUM_CORES`-th image, round and round."""
    torch.set_num_threads(1)
    preprocess = config.Preprocess()
    side = preprocess.crop
    decoder = Decoder(preprocess, fast=fast, max_pixels=MAX_PIXELS)
    normalise = WAYS[way](torch.tensor(preprocess.mean) * 255, torch.tensor(preprocess.std) * 255)
    slot_HWC = torch.zeros(side, side, 3, dtype=torch.uint8)
    batch_BHWC = torch.zeros(common.BATCH_SIZE, side, side, 3)
    mine = encoded[lane::NUM_CORES]

    def one(number: int) -> None:
        decoder(mine[number % len(mine)], slot_HWC)
        normalise(slot_HWC, batch_BHWC[number % common.BATCH_SIZE])

    return rate(one, barrier, seconds)


# Forward


def forward(model: str, seconds: float) -> dict[str, float]:
    """Images a second of every way: all cores in one pass, or a lane for each; batch sizes; folded, or compiled."""
    rates = {}
    torch.set_num_threads(1)
    chosen = model_of(model)
    # The network without the normalisation in front of it, which the decode limit counts.
    module = Backbone(Spec(backbone=chosen, decode="exact", precision="float32"))._module.module
    for size in BATCH_SIZES:
        rates[f"{NUM_CORES} lanes, batches of {size}"] = in_threads(
            lambda _, barrier, size=size: forward_lane(module, size, 1, barrier, seconds)
        )
    rates[f"{NUM_CORES} threads, batches of {BATCH_SIZES[-1]}"] = forward_lane(
        module, BATCH_SIZES[-1], NUM_CORES, threading.Barrier(1), seconds
    )
    if model != "null":
        # With the normalisation, fused: it costs a twentieth of decoding.
        _, path = common.compiled(chosen, "exact", BATCH_SIZES[0])
        program = aot.load(path, ["embedding"], NUM_CORES)
        rates[f"{NUM_CORES} lanes, compiled for batches of {BATCH_SIZES[0]}"] = in_threads(
            lambda _, barrier: compiled_lane(program, BATCH_SIZES[0], barrier, seconds)
        )
    return rates


def model_of(name: str) -> config.Backbone:
    own = name == "null"
    return config.Backbone(
        model="python/null:model" if own else f"torchvision/{name}",
        weights="builtin" if own else "seed:0",
        nodes={"embedding": config.Node(node="flatten")},
    )


def forward_lane(module: Any, batch_size: int, num_threads: int, barrier: Any, seconds: float) -> float:
    torch.set_num_threads(num_threads)
    side = config.Preprocess().crop
    images_BCHW = torch.randn(batch_size, 3, side, side).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def one(_: int) -> None:
        module(images_BCHW)

    return rate(one, barrier, seconds) * batch_size


def compiled_lane(program: Callable[[torch.Tensor], Any], batch_size: int, barrier: Any, seconds: float) -> float:
    torch.set_num_threads(1)
    side = config.Preprocess().crop
    images_BHWC = torch.randint(0, 256, (batch_size, side, side, 3), dtype=torch.uint8)

    @torch.inference_mode()
    def one(_: int) -> None:
        program(images_BHWC)

    return rate(one, barrier, seconds) * batch_size


# Both


def rate(one: Callable[[int], None], barrier: Any, seconds: float) -> float:
    """Calls a second, after two that warm up; all lanes begin together."""
    one(0), one(1)
    barrier.wait()
    start, calls = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        one(calls)
        calls += 1
    return calls / elapsed


def in_threads(lane: Callable[[int, Any], float]) -> float:
    barrier = threading.Barrier(NUM_CORES)
    with ThreadPoolExecutor(NUM_CORES) as threads:
        return sum(threads.map(lambda number: lane(number, barrier), range(NUM_CORES)))


def in_processes(lane: Callable[[int, Any], float]) -> float:
    """Forked, so that what is in memory need not be copied."""
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(NUM_CORES), context.SimpleQueue()
    processes = [
        context.Process(target=lambda number=number: answers.put(lane(number, barrier))) for number in range(NUM_CORES)
    ]
    for process in processes:
        process.start()
    total = sum(answers.get() for _ in processes)
    for process in processes:
        process.join()
    return float(total)


if __name__ == "__main__":
    main()
