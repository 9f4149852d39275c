"""Decoding and forward pass, each with all of the machine to itself: programs and batch sizes are tried, the best ones kept."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from pipeline import config
from pipeline.bench import machinery
from pipeline.bench.end_to_end import EndToEnd
from pipeline.bench.jobs import decoder_of, spec
from pipeline.extract import aot, loop
from pipeline.extract.backbone import COMPILED, Backbone

TRIAL_S = 0.4
"""How long one trial of decoding or of a forward pass goes on, if one step is not longer."""

Note = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A forward pass that might be the fastest."""

    program: str
    batch_size: int
    step: Callable[[], object]
    """One pass, waited for."""
    takes: str
    """`input`: normalised float32; `picture`: uint8, which the program normalises itself."""


class Limits:
    """Decoding and forward pass, each with all of the machine to itself."""

    def __init__(self, settings: config.Config, encoded: list[bytes], cores: int) -> None:
        from pipeline.extract.actors import BATCH_SIZES  # here, so that the children need not import Ray

        self.settings, self._encoded, self._cores = settings, encoded, cores
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        run = settings.run
        self._sizes = BATCH_SIZES[self.device] if run.batch_size == "auto" else (run.batch_size,)
        self._lanes = cores if self.device == "cpu" else 1
        plain = Backbone(spec(settings, fold=False), self.device)
        self._backbones = [plain] if run.optimize == "none" else [plain, Backbone(spec(settings), self.device)]
        self.preprocess = plain.preprocess
        self.pictures_BHWC = self._decoded(max(*self._sizes, machinery.BATCH_SIZE[self.device]))
        self._read: list[tuple[float, float]] = []
        self._decode: dict[str, list[dict[str, float]]] = {"exact": [], "fast": []}
        self._forward: dict[Candidate, list[float]] = {}
        self.runs: list[dict[str, Any]] = []
        self.pass_s = self.guess = 0.0
        """Seconds of one pass, and images a second of decoding and forward pass together, as the survey finds them."""

    def survey(self, note: Note) -> Candidate:
        """Try all batch sizes of every program once; keep the best one of each, and return the best of all."""
        rates: dict[Candidate, float] = {}
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

    def as_json(self, work: EndToEnd) -> dict[str, Any]:
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
        decoder = decoder_of(self.settings, self.preprocess, self.settings.decode)
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

    def _rate(self, candidate: Candidate) -> float:
        """Images a second of this forward pass, on a CPU in one lane a core."""
        return _in_lanes([candidate.step] * self._lanes) * candidate.batch_size

    def _program(self, backbone: Backbone, size: int) -> Candidate:
        """Eager or folded."""
        pictures_BHWC = self.pictures_BHWC[:size].to(self.device)
        program = backbone._module
        if self.device == "cuda":

            def embed() -> None:
                program(pictures_BHWC)
                torch.cuda.synchronize()

            return Candidate(backbone.program, size, embed, "picture")
        # The network without the normalisation in front of it, which the decode limit counts.
        lines_BHL = torch.addcmul(program.offset_L, pictures_BHWC.flatten(2).float(), program.scale_L)
        inputs_BCHW = lines_BHL.view(pictures_BHWC.shape).permute(0, 3, 1, 2)
        half = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(self.settings.run.precision)

        def forward() -> None:
            with torch.autocast("cpu", dtype=half, enabled=half is not None):
                program.module(inputs_BCHW)

        return Candidate(backbone.program, size, forward, "input")

    def _compiled(self, best_size: int, note: Note) -> Iterator[Candidate]:
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

                yield Candidate(COMPILED, order.batch_size, step, "picture")


class _DecodeLane:
    """One core's decoding: every call makes one input, image after image, and counts its seconds."""

    def __init__(self, encoded: list[bytes], settings: config.Config, preprocess: config.Preprocess, decode: str) -> None:
        self.num_decoded, self.decode_s, self.normalise_s = 0, 0.0, 0.0
        self._encoded, self._decoder = encoded, decoder_of(settings, preprocess, decode)
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
