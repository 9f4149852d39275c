"""Mutated images and containers for the decoder and the readers. A command of its own; `test_fuzz.py` runs a little of it.

    python tests/chaos/fuzz.py [--inputs 100000] [--seed 0] [--processes 2] [--findings FOLDER]
    python tests/chaos/fuzz.py --replay FILE…

Each input is one of `hostile`'s, or a good one, after 1 to 64 mutations that its number and the seed determine: bytes flipped,
overwritten, cut, doubled, spliced with another's, lengths replaced. Often the checksums of tars and PNGs are set right again,
and what is compressed is mutated inside. An image goes through `Decoder`, exact and fast; a container through `Source.read`.

What may come out is a row, or an error of this package. All else is a finding: another exception, a process that dies, an
input that takes longer than `TIME_LIMIT_S` or more than `MEMORY_LIMIT_BYTES` on top of what the process had, a reader that
yields what no dataset can hold. Findings are saved by number, with what happened. The last line is JSON; the exit code is 1
with findings.

Linux only: peak memory of one input comes from /proc.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import gzip
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(path) for path in (TESTS, TESTS.parent) if str(path) not in sys.path]

import psutil  # noqa: E402
from hostile import IMAGES, plain, png  # noqa: E402
from hostile_containers import PARQUETS, TARS  # noqa: E402
from images import encode, jpeg, photo  # noqa: E402
from meter import metered  # noqa: E402

TIME_LIMIT_S = 5.0
MEMORY_LIMIT_BYTES = 256 << 20
"""For one input, on top of what the process had: with `MAX_PIXELS` a picture takes half of it at most."""
HARD_MEMORY_BYTES = 3 << 30
"""Of a process, whatever it had: then it is killed, for the machine's sake."""
MAX_PIXELS = 4_000_000
MAX_SEED_BYTES = 1 << 16
"""Larger ones of `hostile` are left out: what matters in them is their size."""
CHUNK = 100
"""Inputs that a process is given at a time."""


@dataclass(frozen=True)
class Input:
    """What is mutated, or has been. `kind` is the ending of its file's name."""

    kind: str
    data: bytes


@cache
def corpus() -> list[Input]:
    """Good and hostile images and containers."""
    small, large = photo(64, 48), photo(500, 375, 1)
    found = [Input("image", data) for data in (plain(), png(), jpeg(), encode(large, quality=85))]
    for image_format in ("PNG", "WEBP", "GIF", "BMP", "TIFF"):
        found.append(Input("image", encode(small, image_format)))
    for options in ({"progressive": True}, {"restart_marker_rows": 1}, {"subsampling": 0}):
        found.append(Input("image", plain(**options)))
    for options in ({"compression": name} for name in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits", "group4", "zstd")):
        mode = "1" if options["compression"] == "group4" else "RGB"
        with contextlib.suppress(OSError):  # not every libtiff has every codec
            found.append(Input("image", encode(small.convert(mode), "TIFF", **options)))
    found.append(Input("image", encode(small, "WEBP", lossless=True)))
    found += [Input("image", image.data) for image in IMAGES.values()]
    found += [Input((container.ending or ".tar")[1:], container.data) for container in TARS.values()]
    found += [Input("parquet", container.data) for container in PARQUETS.values()]
    return [each for each in found if len(each.data) <= MAX_SEED_BYTES]


# Mutations


def mutated(seed: int, number: int) -> Input:
    """The input of this number: the same for the same seed."""
    rng = random.Random(f"{seed}/{number}")
    seeds = corpus()
    images = [each for each in seeds if each.kind == "image"]
    containers = [each for each in seeds if each.kind != "image"]
    pool = images if rng.random() < 0.65 else containers
    chosen, other = rng.choice(pool), rng.choice(pool)
    data, count = chosen.data, 1 << rng.randrange(7)
    packed = chosen.kind in ("tar.gz", "tgz") and rng.random() < 0.7
    if packed:
        with contextlib.suppress(OSError, EOFError, zlib.error):
            data = gzip.decompress(data)[:MAX_SEED_BYTES]
    for _ in range(rng.randint(1, count)):
        data = rng.choice(MUTATIONS)(rng, data, other.data)[: 2 * MAX_SEED_BYTES]
    if rng.random() < 0.7:
        if data[:8] == b"\x89PNG\r\n\x1a\n":
            data = _with_right_crcs(data)
        elif chosen.kind.startswith("t"):
            data = _with_right_sums(data)
    return Input(chosen.kind, gzip.compress(data, 1) if packed else data)


def _flip(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return _overwrite(data, at := _place(rng, data), bytes([data[at] ^ 1 << rng.randrange(8)]) if data else b"")


def _noise(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return _overwrite(data, _place(rng, data), rng.randbytes(1 << rng.randrange(6)))


def _extreme(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return _overwrite(
        data, _place(rng, data), rng.choice([b"\0", b"\xff", b"\x7f", b"\x80", b"\x01"]) * rng.choice([1, 1, 2, 4, 8])
    )


def _length(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """A number where a length, count, offset or size may stand."""
    size = rng.choice("BHIQ")
    largest = (1 << 8 * struct.calcsize(size)) - 1
    near = [len(data) + rng.randint(-9, 9), rng.randrange(70_000), rng.randrange(16), 65_500, 20_000]
    number = rng.choice([0, 1, largest, largest >> 1, (largest >> 1) + 1, *near])
    return _overwrite(data, _place(rng, data), struct.pack(rng.choice("<>") + size, max(0, number) & largest))


def _octal(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """A number as tars write it."""
    number = rng.choice([0, 1, 511, 512, len(data), 1 << 20, (1 << 33) - 1])
    text = rng.choice([b"%011o\0" % number, b"-%010o\0" % number, b"\x80" + bytes(3) + number.to_bytes(8, "big"), b"\xff" * 12])
    return _overwrite(data, 512 * rng.randrange(len(data) // 512 + 1) + 124, text)


def _kind(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """A tar member of another kind."""
    return _overwrite(
        data, 512 * rng.randrange(len(data) // 512 + 1) + 156, rng.choice([bytes([each]) for each in b"01234567LKxgXSV\0"])
    )


def _cut(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: _place(rng, data)]


def _delete(rng: random.Random, data: bytes, other: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:start] + data[end:]


def _double(rng: random.Random, data: bytes, other: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:end] + data[start:end] * rng.choice([1, 1, 1, 2, 30]) + data[end:]


def _move(rng: random.Random, data: bytes, other: bytes) -> bytes:
    start, end = _span(rng, data)
    at = _place(rng, data)
    return _overwrite(data, at, data[start:end])


def _splice(rng: random.Random, data: bytes, other: bytes) -> bytes:
    start, end = _span(rng, other)
    at = _place(rng, data)
    return data[:at] + other[start:end] + data[at + (end - start) * rng.randrange(2) :]


MUTATIONS: list[Callable[[random.Random, bytes, bytes], bytes]] = [
    _flip, _flip, _noise, _extreme, _length, _length, _length, _octal, _kind, _cut, _delete, _double, _move, _splice
]  # fmt: skip


def _place(rng: random.Random, data: bytes) -> int:
    """A position; every second one in the first bytes or the last, where headers and footers are."""
    if not data or rng.random() < 0.5:
        return rng.randrange(len(data) or 1)
    near = min(len(data), rng.choice([16, 64, 300, 1_200]))
    return rng.randrange(near) if rng.random() < 0.7 else len(data) - 1 - rng.randrange(near)


def _span(rng: random.Random, data: bytes) -> tuple[int, int]:
    if rng.random() < 0.3:  # the blocks of a tar
        start = 512 * rng.randrange(len(data) // 512 + 1)
        return start, start + 512 * rng.randint(1, 6)
    start = _place(rng, data)
    return start, start + rng.randint(1, 1 << rng.randint(1, 12))


def _overwrite(data: bytes, at: int, content: bytes) -> bytes:
    return data[:at] + content + data[at + len(content) :]


def _with_right_crcs(data: bytes) -> bytes:
    """A PNG whose chunks have the right checksums, as far as their lengths lead."""
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        parts += [data[at:end], struct.pack(">I", zlib.crc32(data[at + 4 : end]))]
        at = end + 4
    return b"".join([*parts, data[at:]])


def _with_right_sums(data: bytes) -> bytes:
    """A tar with the right sum in every block that looks like a header."""
    fixed = bytearray(data)
    for at in range(0, len(fixed) - 511, 512):
        if fixed[at + 257 : at + 262] == b"ustar":
            fixed[at + 148 : at + 156] = b" " * 8
            fixed[at + 148 : at + 156] = b"%06o\0 " % sum(fixed[at : at + 512])
    return bytes(fixed)


# What is done with an input


Target = Callable[[Input], list[str]]
"""What came out of an input: `row`, or the kinds of errors. An exception that is not of this package is a finding."""


class Targets:
    """Decoder and readers; one `Target` for each process."""

    def __init__(self, folder: Path) -> None:
        import torch

        from pipeline.config import Preprocess
        from pipeline.extract.decode import Decoder

        torch.set_num_threads(1)
        preprocess = Preprocess(resize=64, crop=56)
        self._slot_HWC = torch.zeros(56, 56, 3, dtype=torch.uint8)
        self._decoders = [Decoder(preprocess, fast=fast, max_pixels=MAX_PIXELS) for fast in (False, True)]
        self._folder = folder

    def __call__(self, given: Input) -> list[str]:
        return self._decode(given.data) if given.kind == "image" else self._read(given)

    def _decode(self, data: bytes) -> list[str]:
        from pipeline.errors import SampleError

        outcomes = []
        for decoder in self._decoders:
            try:
                width, height = decoder(data, self._slot_HWC)
                assert 0 < width * height <= MAX_PIXELS, f"a row of {width} x {height} pixels"
                outcomes.append("row")
            except SampleError as error:
                outcomes.append(_name(error))
        assert outcomes[0] == outcomes[1] or "row" not in outcomes, f"exact and fast disagree: {outcomes}"
        return outcomes

    def _read(self, given: Input) -> list[str]:
        import pyarrow as pa

        from pipeline import config
        from pipeline.errors import PipelineError
        from pipeline.source import Source

        path = self._folder / f"shard.{given.kind}"
        path.write_bytes(given.data)
        settings: dict[str, Any] = (
            {"label": "label", "key": "key", "image": "image"} if given.kind == "parquet" else {"label": "cls"}
        )
        source = Source(config.Source(url=str(path), **settings))
        outcomes = []
        try:
            source.fields()
            for shard in source.shards():
                for index, sample in enumerate(source.read(shard)):
                    assert sample.index == index
                    pa.array([sample.key, sample.error.message if sample.error else ""], pa.string())
                    outcomes.append(_name(sample.error) if sample.error else "row")
        except PipelineError as error:
            outcomes.append(type(error).__name__)
        return outcomes or ["empty"]


def _name(error: Any) -> str:
    return f"{error.stage}.{error.error}"


# Processes


@dataclass
class Finding:
    """An input that did what none may do."""

    number: int
    what: str


@dataclass
class Tally:
    """What came out of some inputs."""

    num_inputs: int = 0
    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    findings: list[Finding] = field(default_factory=list)
    slowest_s: tuple[float, int] = (0.0, -1)
    """And the number of the input, as below."""
    peak_bytes: tuple[int, int] = (0, -1)

    def add(self, other: Tally) -> None:
        """Take in another one."""
        self.num_inputs += other.num_inputs
        self.outcomes += other.outcomes
        self.findings += other.findings
        self.slowest_s = max(self.slowest_s, other.slowest_s)
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)


def work(connection: Any, now: Any, seed: int, folder: Path, make: Callable[[Path], Target]) -> None:
    """A process: chunks of numbers come in, tallies go out. `now` has the number in hand and when it was taken up."""
    traces = open(folder / "crash.txt", "wb")  # noqa: SIM115  open for as long as the process is
    faulthandler.enable(traces)
    faulthandler.register(signal.SIGUSR1, traces)  # says where it hangs, in C as well
    targets = make(folder)
    for kind in ("image", "tar", "tar.gz", "parquet"):  # what loads with the first use is no input's memory
        targets(next(each for each in corpus() if each.kind == kind))
    connection.send(None)
    while (chunk := connection.recv()) is not None:
        tally = Tally()
        for number in range(*chunk):
            given = mutated(seed, number)
            now[0], now[1] = number, time.monotonic()
            with metered() as meter:
                try:
                    tally.outcomes.update(targets(given))
                except Exception:
                    tally.findings.append(Finding(number, traceback.format_exc()))
                seconds, num_bytes = meter()
            now[1] = 0.0
            tally.num_inputs += 1
            tally.slowest_s = max(tally.slowest_s, (seconds, number))
            tally.peak_bytes = max(tally.peak_bytes, (num_bytes, number))
            if num_bytes > MEMORY_LIMIT_BYTES:
                tally.findings.append(Finding(number, f"took {num_bytes >> 20} MiB"))
        connection.send(tally)


class Worker:
    """One process, and what it has in hand."""

    def __init__(self, seed: int, folder: Path, make: Callable[[Path], Target]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.folder = Path(tempfile.mkdtemp(dir=folder))
        self._now = context.Array("d", 2, lock=False)
        self.chunk: tuple[int, int] | None = None
        self._process = context.Process(target=work, args=(theirs, self._now, seed, self.folder, make), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def number(self) -> int:
        """Of the input in hand."""
        return int(self._now[0])

    def give(self, chunk: tuple[int, int] | None) -> None:
        """Numbers from the first to before the last; None to end."""
        self.chunk = chunk
        self.connection.send(chunk)

    def trouble(self) -> str:
        """Why it has to be ended, if so."""
        since = self._now[1]  # read once: the process goes on
        if since and time.monotonic() - since > TIME_LIMIT_S:
            return f"took longer than {TIME_LIMIT_S:g} s"
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(self._process.pid).memory_info().rss > HARD_MEMORY_BYTES:
                return f"took the process beyond {HARD_MEMORY_BYTES >> 20} MiB"
        return ""

    def end(self) -> str:
        """End it, however it is; how it ended, if it did so by itself, and where it was."""
        self._process.join(0.5)
        died = self._process.exitcode
        if died is None and self._now[1]:
            os.kill(self._process.pid or 0, signal.SIGUSR1)
            time.sleep(0.2)
        self._process.kill()
        self._process.join()
        traces = (self.folder / "crash.txt").read_text(errors="replace") if (self.folder / "crash.txt").exists() else ""
        return traces if died is None else f"{traces}exit code {died}\n"


def run(num_inputs: int, seed: int, num_processes: int, folder: Path, make: Callable[[Path], Target] = Targets) -> Tally:
    """Try inputs 0 to `num_inputs`; `folder` is for the processes' files, `make` for what the inputs are given to."""
    chunks = collections.deque((start, min(start + CHUNK, num_inputs)) for start in range(0, num_inputs, CHUNK))
    total, busy = Tally(), [Worker(seed, folder, make) for _ in range(min(num_processes, len(chunks)))]
    while busy:
        ready = multiprocessing.connection.wait([worker.connection for worker in busy], timeout=0.1)
        for worker in list(busy):
            what = worker.trouble()
            if not what and worker.connection in ready:
                try:
                    tally = worker.connection.recv()
                    if tally is not None:
                        total.add(tally)
                    worker.give(chunks.popleft() if chunks else None)
                    if worker.chunk is None:
                        worker.end()
                        busy.remove(worker)
                    continue
                except (EOFError, ConnectionError):
                    what = "the process died"
            if what:
                what = f"{worker.end()}{what}"
                busy.remove(worker)
                if worker.chunk is None:
                    raise RuntimeError(f"a process did not come up: {what}")
                total.num_inputs += 1
                total.findings.append(Finding(worker.number, what))
                # What came before in its chunk was not reported; it comes out the same again.
                halves = [(worker.chunk[0], worker.number), (worker.number + 1, worker.chunk[1])]
                chunks.extendleft(half for half in halves if half[0] < half[1])
                busy += [Worker(seed, folder, make)] if chunks else []
    return total


# Command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"), help="folder for what was found")
    parser.add_argument(
        "--replay", type=Path, nargs="*", help="files to try in this process instead; their endings say what they are"
    )
    arguments = parser.parse_args()
    memory = Path("/dev/shm")  # a disk that others write to can take seconds for a small file
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory if memory.is_dir() else None))
    try:
        if arguments.replay:
            targets = Targets(folder)
            for path in arguments.replay:
                with metered() as meter:
                    kind = path.name.partition(".")[2]
                    kind = kind if kind in {each.kind for each in corpus()} else "image"
                    outcomes = targets(Input(kind, path.read_bytes()))
                    seconds, num_bytes = meter()
                print(f"{path}: {', '.join(outcomes)}; {seconds:.2f} s, {num_bytes >> 20} MiB")
            return 0
        start = time.monotonic()
        total = run(arguments.inputs, arguments.seed, arguments.processes, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for finding in total.findings:
        save(finding, arguments.seed, arguments.findings)
        print(f"{arguments.seed}-{finding.number}: {finding.what.strip().splitlines()[-1]}", file=sys.stderr)
    print(json.dumps(report(total, time.monotonic() - start)))
    return 1 if total.findings else 0


def save(finding: Finding, seed: int, folder: Path) -> None:
    """The input, and what it did."""
    folder.mkdir(parents=True, exist_ok=True)
    given = mutated(seed, finding.number)
    (folder / f"{seed}-{finding.number}.{given.kind}").write_bytes(given.data)
    (folder / f"{seed}-{finding.number}.txt").write_text(finding.what)


def report(total: Tally, seconds: float) -> dict[str, Any]:
    """The last line."""
    refused = {name: count for name, count in total.outcomes.most_common() if name not in ("row", "empty")}
    return {
        "inputs": total.num_inputs,
        "rows": total.outcomes["row"],
        "empty": total.outcomes["empty"],
        "refused": refused,
        "findings": len(total.findings),
        "slowest_s": round(total.slowest_s[0], 3),
        "slowest": total.slowest_s[1],
        "peak_memory_mib": total.peak_bytes[0] >> 20,
        "peak_memory": total.peak_bytes[1],
        "seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
