"""For how long the loop holds the interpreter lock over an image, and how many decoders it can keep busy. A command of its own.

    python tests/benchmarks/interpreter.py [--images 20000] [--repeats 5] [--photographs DIR] [--json]

One process feeds a device, and Python lets one of its threads run at a time: with H microseconds under the lock for an image,
no number of cores gets it beyond 1e6 / H images a second.

tiny        JPEGs of 16 x 16 pixels through the whole loop (tars in, Parquet out, a model that does nothing) with 1 and 2
            workers. Decoding such an image takes next to nothing, so the wall time an image is nearly all lock; what libjpeg,
            SHA-256, Parquet and the file system do without the lock is still in it, so it is an upper bound.
decoder     the same images through `Decoder` alone, by 1 and 2 threads at once.
wait        the same with decoding replaced by a wait of `WAIT_S` without the lock, 16 workers: the share of the time for which
            they were all kept waiting, that is, busy.
profile     with `--photographs`: a run on real photographs, sampled by py-spy, which says how often some thread held the
            lock; the rest of the second the process was inside C. Needs py-spy and the right to trace.

Medians over the repeats, each of which is a loop over all images; the spread lies in the JSON.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory import RESULTS, circumstances, save
from PIL import Image

from pipeline import config
from pipeline.driver import Goal
from pipeline.extract.backbone import Backbone, Spec
from pipeline.extract.carry import Task
from pipeline.extract.decode import Decoder
from pipeline.extract.loop import Loop, Settings

HERE = Path(__file__).parent
NUM_SHARDS = 4
WAIT_S = 0.0015
"""What a small photograph takes to decode on the machines tried."""
NUM_DECODERS = 16
SAMPLES_PER_S, PROFILE_S = 100, 10
GOAL = {"lock_us": 40.0, "busy": 0.9}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the loop's hold on the interpreter.")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--photographs", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, the table on stderr")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_photographs(Path(arguments.child))
        return
    sys.path.insert(0, str(HERE / "peers"))  # where the model that does nothing lies
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        image = write_tiny(Path(folder), arguments.images)
        rows: dict[str, list[float]] = {}
        goal, backbone = parts(Path(folder))
        gc.collect()
        gc.freeze()  # as the actors do
        for repeat in range(arguments.repeats + 1):
            found = {
                **{f"tiny, {n} workers, us": per_image(goal, backbone, n) for n in (1, 2)},
                **{f"decoder, {n} threads, us": decoding(image, n) for n in (1, 2)},
                f"wait, {NUM_DECODERS} workers, busy": waiting(goal, backbone, arguments.images),
            }
            if repeat:  # the first one finds the kernels
                for name, value in found.items():
                    rows.setdefault(name, []).append(value)
    if arguments.photographs:
        rows["profile, lock us"] = [profile(arguments.photographs) for _ in range(arguments.repeats)]
    report: dict[str, Any] = {
        "benchmark": "interpreter",
        **circumstances(arguments.repeats, "one repeat of everything", ["simplejpeg", "pyarrow"]),
        "goal": GOAL,
        "samples": rows,
    }
    report["medians"] = {name: round(statistics.median(values), 3) for name, values in rows.items()}
    lock_us = report["medians"]["tiny, 2 workers, us"]
    report["images_per_second_one_process"] = round(1e6 / lock_us)
    out = sys.stderr if arguments.json else sys.stdout
    for name, value in report["medians"].items():
        print(f"{name:32} {value:10.3f}   {min(rows[name]):.3f} to {max(rows[name]):.3f}", file=out)
    print(f"one process stops scaling at {report['images_per_second_one_process']:,} images/s, or later", file=out)
    save(report, arguments.out, out)
    if arguments.json:
        print(json.dumps(report))


def write_tiny(folder: Path, num_images: int) -> bytes:
    """Tars of different JPEGs of 16 x 16 noise; one of them."""
    rng, payload = np.random.default_rng(0), b""
    for number in range(NUM_SHARDS):
        with tarfile.open(folder / f"{number}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for index in range(num_images // NUM_SHARDS):
                file = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(file, "JPEG")
                payload = file.getvalue()
                member = tarfile.TarInfo(f"{index:06}.jpg")
                member.size = len(payload)
                archive.addfile(member, io.BytesIO(payload))
    return payload


def parts(folder: Path) -> tuple[Goal, Backbone]:
    settings = config.parse(
        {
            "source": {"url": str(folder / "*.tar")},
            "backbone": {
                "model": "python/null:model",
                "weights": "builtin",
                "nodes": {"embedding": {"node": "flatten"}},
                "preprocess": {"resize": 16, "crop": 16},
            },
            "output": {"url": str(folder / "output")},
        }
    )
    spec = Spec(backbone=settings.backbone, decode="exact", precision="float32")
    return Goal.of(settings), Backbone(spec)


def through_loop(goal: Goal, backbone: Backbone, num_workers: int) -> tuple[int, float]:
    """Images and seconds of one pass over the source."""
    loop = Loop(goal.source, backbone, goal.target, Settings(decode="exact", batch_sizes=(32,), num_workers=num_workers))
    start = time.perf_counter()
    futures = [loop.submit(Task(shard=shard)) for shard in goal.source.shards()]
    num_images = sum(future.result().num_embedded for future in futures)
    seconds = time.perf_counter() - start
    loop.close()
    shutil.rmtree(goal.target.url.removeprefix("file://"), ignore_errors=True)
    return num_images, seconds


def per_image(goal: Goal, backbone: Backbone, num_workers: int) -> float:
    num_images, seconds = through_loop(goal, backbone, num_workers)
    return seconds / num_images * 1e6


def decoding(image: bytes, num_threads: int, num_images: int = 20_000) -> float:
    def work() -> None:
        decoder = Decoder(config.Preprocess(resize=16, crop=16), fast=False, max_pixels=1 << 20)
        slot_HWC = torch.empty(16, 16, 3, dtype=torch.uint8)
        with torch.inference_mode():
            for _ in range(num_images // num_threads):
                decoder(image, slot_HWC)

    return together(work, num_threads) / num_images * 1e6


def together(work: Callable[[], None], num_threads: int) -> float:
    threads = [threading.Thread(target=work) for _ in range(num_threads)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start


def waiting(goal: Goal, backbone: Backbone, num_images: int) -> float:
    """Share of the decoders' time that they spent decoding, were they not only waiting."""
    original, waited, lock = Decoder.__call__, [0.0], threading.Lock()

    def wait(_self: Decoder, _data: Any, _slot_HWC: torch.Tensor) -> tuple[int, int]:
        start = time.perf_counter()
        time.sleep(WAIT_S)
        with lock:
            waited[0] += min(time.perf_counter() - start, 2 * WAIT_S)
        return 16, 16

    Decoder.__call__ = wait  # type: ignore[method-assign]
    try:
        _, seconds = through_loop(goal, backbone, NUM_DECODERS)
    finally:
        Decoder.__call__ = original  # type: ignore[method-assign]
    return waited[0] / seconds / NUM_DECODERS


def profile(photographs: Path) -> float:
    """Microseconds of the lock an image, on photographs, with a model that does nothing."""
    command = [sys.executable, __file__, "--child", str(photographs)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        child.stdout.readline()  # it is under way
        with tempfile.NamedTemporaryFile("r") as file:
            spy = [str(Path(sys.executable).with_name("py-spy")), "record", "--gil", "--nonblocking", "-f", "raw"]
            # Not stopped while it is looked at, or the lock's holder would seem to hold it for longer.
            spy += ["-r", str(SAMPLES_PER_S), "-d", str(PROFILE_S), "-o", file.name, "-p", str(child.pid)]
            subprocess.run(spy, check=True, capture_output=True)
            held = sum(int(line.rsplit(" ", 1)[1]) for line in file) / (SAMPLES_PER_S * PROFILE_S)
        child.terminate()
        rate = float(child.stdout.readline() or "nan")
    return held / rate * 1e6


def run_photographs(photographs: Path) -> None:
    """Go through the small photographs until told to stop, then tell the rate."""
    sys.path.insert(0, str(HERE / "peers"))
    torch.set_num_threads(1)
    import signal

    with tempfile.TemporaryDirectory() as folder:
        settings = config.parse(
            {
                "source": {"url": str(photographs / "small-tar" / "*.tar")},
                "backbone": {
                    "model": "python/null:model",
                    "weights": "builtin",
                    "nodes": {"embedding": {"node": "flatten"}},
                },
                "output": {"url": folder},
            }
        )
        goal, backbone = Goal.of(settings), Backbone(Spec(backbone=settings.backbone, decode="exact", precision="float32"))
        gc.collect()
        gc.freeze()
        stop = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
        through_loop(goal, backbone, 2)
        print("ready", flush=True)
        num_images, seconds = 0, 0.0
        while not stop.is_set():
            more, taken = through_loop(goal, backbone, os.cpu_count() or 1)
            num_images, seconds = num_images + more, seconds + taken
        print(num_images / seconds, flush=True)


if __name__ == "__main__":
    main()
