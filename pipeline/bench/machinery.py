"""What gradients and train mode would cost on this model, in time and peak memory: the eager model, a process for each mode."""

from __future__ import annotations

import contextlib
import ctypes
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline import config
from pipeline.bench.jobs import Child, pictures
from pipeline.errors import PipelineError
from pipeline.extract.backbone import Program, freeze
from pipeline.extract.model import build, cut

NUM_PASSES = 5
SLOW_S, NUM_SLOW_PASSES = 2.0, 3
"""Where one pass takes longer than this, there are fewer."""
BATCH_SIZE = {"cpu": 16, "cuda": 128}
MODES = {
    "train mode, grad": (True, torch.enable_grad),
    "eval mode, grad": (False, torch.enable_grad),
    "eval mode, no_grad": (False, torch.no_grad),
    "eval mode, inference_mode": (False, torch.inference_mode),
}
"""Mode to whether the model trains, and what its forward pass runs in. The last one is what this program does."""
LEAST_BYTES = 4096
"""A peak below one page counts as one."""


def measure(settings: config.Config, device: str, pictures_BHWC: torch.Tensor, note: Callable[[str], None]) -> dict[str, Any]:
    """What gradients and train mode would cost: the eager model, a process for each mode, which alternate."""
    batch_size = BATCH_SIZE[device] if settings.run.batch_size == "auto" else settings.run.batch_size
    pixels = pictures_BHWC[:batch_size].numpy().tobytes()
    passes: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        note("what training machinery would cost: a process for each mode")
        jobs = {mode: Mode(settings=settings, device=device, mode=mode, pixels=pixels) for mode in MODES}
        children = {mode: stack.enter_context(Child(job)) for mode, job in jobs.items()}
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


@dataclass(frozen=True, kw_only=True)
class Mode:
    """A job: forward passes of the eager model in one of the modes of `MODES`, a pass whenever it is asked."""

    settings: config.Config
    device: str
    mode: str
    pixels: bytes
    """See `jobs.pictures`."""

    def results(self) -> Iterator[dict[str, Any]]:
        """Seconds of a pass, and the highest bytes so far above what the process held once the model was built."""
        torch.set_num_threads(1)  # threads that wait for each other measure what else the machine does
        backbone, is_cuda = self.settings.backbone, self.device == "cuda"
        model, preprocess = build(backbone)
        program = Program(cut(freeze(model), backbone.nodes), backbone.nodes, preprocess, self.settings.run.precision)
        program = program.to(self.device).to(memory_format=torch.channels_last)
        trains, context = MODES[self.mode]
        pictures_BHWC = pictures(self.pixels, preprocess).to(self.device)
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
