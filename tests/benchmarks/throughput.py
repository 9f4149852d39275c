"""Whole jobs side by side: tars of photographs in, Parquet with embeddings out, and what the machine allows at most.

    pip install -e '.[bench]'
    python tests/benchmarks/throughput.py [--photographs DIR] [--rounds 5] [--rows NAME,…] [--peers NAME,…] [--json]

A row is a model, a size of photograph and a way of decoding; the competitors are the scripts in `peers/`, each run in a fresh
process. Within a round they alternate, in an order that is rotated from round to round. All of them use torchvision's model
with the same seeded weights and give the same keys and embeddings, which is checked. Random weights give embeddings that
nearly agree whatever the picture, so cosines are taken after the mean over all pictures is subtracted.

ours        this package                                    dataloader  torch DataLoader over tars, PIL and the preset
ray         Ray Data: PIL and the weights' preset           daft        Daft: loose files, PIL and the preset
spdl        SPDL's threads around our decoder and model     ray-documented  the stages as Ray Data's documentation has them

Rows named `limit` run long, links to the same tars, so that neither start nor end counts for much.

All get a short trial of each of their settings in `CANDIDATES` before the first round of a row; the fastest one is used.
Programs are compiled before the clock starts, for `ours` and for `spdl`. The limits (`peers/limits.py`) run like competitors.

Columns: `job`, images by seconds from the end of imports (and of `ray.init`) to the written Parquet, start of workers and
building of models included; `steady`, images a second once it runs: from the third of the images that was embedded
first, whose batches were decoded ahead, to the last one (ours: from the first batch to the last shard that is published, which
is less); peak memory of all processes of the job in MB (10^6
bytes); `ours/…`, the median over rounds of the ratio within a round; `limit`, 1 / (1 / decode-limit + 1 / forward-limit).

Peak memory is the proportional set size, so shared memory counts once; it is taken whenever the sum of the resident sizes,
looked at every 0.2 s, has grown by 2 %. The cores may be shared with other work: compare ratios. Linux only.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import photographs

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
PEERS = Path(__file__).parent / "peers"
SCRIPTS = {
    "ours": "ours.py",
    "ray": "ray_data.py",
    "ray-documented": "ray_data.py",
    "dataloader": "dataloader.py",
    "daft": "daft_udf.py",
    "spdl": "spdl_threads.py",
}
LIMITS = ("decode-limit", "forward-limit")
CANDIDATES: dict[str, list[dict[str, int]]] = {
    "ours": [
        {"batch-size": 8, "compile": 1},
        {"batch-size": 32},
    ],
    "ray": [
        {"actors": 2, "threads": 1, "actor-cpus": 50},  # decoding fused into two actors
    ],
    "ray-documented": [
        {"actors": 1, "threads": 1, "actor-cpus": 100},  # a stage of decoding before one actor
    ],
    "dataloader": [
        {"workers": 2, "threads": 2},
        {"workers": 2, "threads": 1},
    ],
    "daft": [
        {"instances": 2, "threads": 1, "processes": 1},
    ],
    "spdl": [
        {"decoders": 2, "threads": 1, "batch-size": 32, "compile": 1},
        {"decoders": 2, "threads": 2},
    ],
}
"""Settings worth a trial; others that were tried were slower everywhere (`threads` above the cores, one decoder)."""
OWN_DECODER = ("ours", "spdl")
MIN_COSINE = 0.999
"""Median, of those that decode with PIL against ours in `exact`."""
INTERVAL_S = 0.2
GROWTH = 1.02
TIMEOUT_S, TRIAL_TIMEOUT_S = 1800.0, 180.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One comparison."""

    model: str
    size: str
    decode: str = "exact"
    channels_last: bool = False
    """Those that build the model themselves run it in channels-last layout."""
    num_images: int
    num_trial: int
    """Images in the trial of a setting."""
    competitors: tuple[str, ...] = tuple(SCRIPTS)
    limits: tuple[str, ...] = LIMITS


ROWS = {
    "mobilenet-small-exact": Row(model="mobilenet_v3_small", size="small", num_images=2000, num_trial=300, limits=()),
    "mobilenet-large-fast": Row(
        model="mobilenet_v3_small",
        size="large",
        decode="fast",
        num_images=900,
        num_trial=80,
        competitors=("ours", "ray", "ray-documented", "dataloader"),
        limits=(),
    ),
    "mobilenet-large-exact": Row(
        model="mobilenet_v3_small",
        size="large",
        num_images=900,
        num_trial=80,
        competitors=("ours", "dataloader"),
        limits=(),
    ),
    "resnet50-small-exact": Row(
        model="resnet50",
        size="small",
        num_images=240,
        num_trial=80,
        competitors=("ours", "ray-documented", "dataloader"),
        limits=(),
    ),
    "resnet50-small-channels-last": Row(
        model="resnet50",
        size="small",
        channels_last=True,
        num_images=240,
        num_trial=80,
        competitors=("ours", "ray", "dataloader"),
        limits=(),
    ),
    "mobilenet-limit": Row(model="mobilenet_v3_small", size="small", num_images=10_000, num_trial=300, competitors=("ours",)),
    "resnet50-limit": Row(model="resnet50", size="small", num_images=1000, num_trial=80, competitors=("ours",)),
    "null-limit": Row(
        model="null", size="small", num_images=10_000, num_trial=400, competitors=("ours",), limits=("decode-limit",)
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure throughput against others and against the machine.")
    parser.add_argument("--photographs", type=Path, default=ROOT / "build" / "photographs", help="made where they are missing")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=lambda text: text.split(","), default=list(ROWS))
    parser.add_argument("--peers", type=lambda text: text.split(","), default=list(SCRIPTS))
    parser.add_argument("--limit-images", type=int, help="no row takes more")
    parser.add_argument("--no-trials", action="store_true", help="take the first setting of each peer")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on stdout")
    arguments = parser.parse_args()
    for name, known in (*((row, ROWS) for row in arguments.rows), *((peer, SCRIPTS) for peer in arguments.peers)):
        if name not in known:
            parser.error(f"{name!r} is none of {', '.join(known)}")
    photographs.make(arguments.photographs, {"small": 2000, "large": 900})
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    report: dict[str, Any] = {"benchmark": "throughput", **circumstances(arguments, started), "results": []}
    path = RESULTS / f"throughput-{started[:10]}-{report['hardware']['cpus']}cpu{suffix(arguments)}.json"
    path.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        for name in arguments.rows:
            result = compare(name, arguments, Path(folder))
            report["results"].append(result)
            print(shown(result), file=sys.stderr, flush=True)
            path.write_text(json.dumps(report, indent=1) + "\n")  # after each row: a run takes long
    print(f"written to {path}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(report))
    if not all(check["passed"] for result in report["results"] for check in result["checks"].values()):
        sys.exit("a peer's embeddings differ: see `checks`")


def suffix(arguments: argparse.Namespace) -> str:
    """Parts of the benchmark never overwrite the result of all of it."""
    rows = "" if arguments.rows == list(ROWS) else "-" + "+".join(arguments.rows)
    return rows + ("" if arguments.limit_images is None and arguments.rounds >= 5 else "-trial")


def compare(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All rounds of a row."""
    row = ROWS[name]
    number = min(row.num_images, arguments.limit_images or row.num_images)
    tars, images, number = photographs.select(arguments.photographs, row.size, number, folder)
    job = Jobs(row, tars, images, folder)
    competitors = [peer for peer in row.competitors if peer in arguments.peers]
    say(f"{name}: {number} images")
    # Warms the page cache up, and is what all others are compared with.
    reference = job.run("ours", decode="exact", keep=True)
    trials, settings = {}, {}
    for peer in competitors:
        if peer in CANDIDATES:
            few = photographs.select(arguments.photographs, row.size, min(row.num_trial, number), folder)
            trial = Jobs(row, few[0], few[1], folder)
            candidates = CANDIDATES[peer][:1] if arguments.no_trials else CANDIDATES[peer]
            if len(candidates) == 1:
                settings[peer] = candidates[0]
                continue
            trials[peer] = [{"flags": each, **trial.attempt(peer, each)} for each in candidates]
            settings[peer] = max(trials[peer], key=pace)["flags"]
            say(f"  trial  {peer:<14} {settings[peer]}")
    samples: dict[str, list[dict[str, Any]]] = {who: [] for who in (*competitors, *row.limits)}
    checks: dict[str, Any] = {}
    order = list(samples)
    for round_ in range(arguments.rounds):
        for who in order[round_ % len(order) :] + order[: round_ % len(order)]:
            first = round_ == 0 and who in competitors
            sample = job.run(who, settings.get(who, {}), keep=first)
            if first:
                checks[who] = {**agreement(reference["out"], sample.pop("out"), row, who)}
            samples[who].append({"round": round_, **sample})
            say(f"  {round_ + 1}/{arguments.rounds}  {who:<14} {pace(sample):8.1f}/s")
    return {
        "row": name,
        "model": row.model,
        "size": row.size,
        "decode": row.decode,
        "channels_last": row.channels_last,
        "num_images": number,
        "checks": checks,
        "trials": {peer: [brief(each) for each in tried] for peer, tried in trials.items()},
        "summary": summary(samples),
        "samples": samples,
    }


SHORT = ("images_per_s", "steady_images_per_s")


def brief(trial: dict[str, Any]) -> dict[str, Any]:
    return {name: trial[name] for name in ("flags", *SHORT, "error") if name in trial}


def pace(sample: dict[str, Any]) -> float:
    return float(sample.get("steady_images_per_s") or sample.get("images_per_s") or 0)


@dataclass(slots=True)
class Jobs:
    """Runs competitors on one folder of photographs."""

    row: Row
    tars: Path
    images: Path
    folder: Path

    def attempt(self, who: str, settings: dict[str, int]) -> dict[str, Any]:
        """A trial: a setting that does not work is none, and not the end of the benchmark."""
        try:
            return self.run(who, settings, timeout_s=TRIAL_TIMEOUT_S)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            return {"error": type(error).__name__}

    def run(
        self,
        who: str,
        settings: dict[str, int] | None = None,
        *,
        decode: str = "",
        keep: bool = False,
        timeout_s: float = TIMEOUT_S,
    ) -> dict[str, Any]:
        """What a fresh process printed, its peak memory, and with `keep` the folder that it wrote."""
        out = self.folder / f"{self.tars.name}-{who}-{uuid.uuid4().hex}"
        decode = decode or self.row.decode
        if who in LIMITS:
            flags = ["--what", who.removesuffix("-limit"), "--tars", self.tars, "--model", self.row.model, "--decode", decode]
            command = [PEERS / "limits.py", *flags]
        else:
            command = [PEERS / SCRIPTS[who], "--tars", self.tars, "--images", self.images, "--model", self.row.model]
            command += ["--out", out, *(["--decode", decode] if who in OWN_DECODER else [])]
            command += ["--channels-last"] if self.row.channels_last and who not in OWN_DECODER else []
            command += [part for name, value in (settings or {}).items() for part in (f"--{name}", value)]
        answer = measured([sys.executable, *map(str, command)], timeout_s, str(self.folder / "cache"))
        if "images" in answer:
            answer["images_per_s"] = answer["images"] / answer["job_s"]
        if keep:
            answer["out"] = out
        else:
            subprocess.run(["rm", "-rf", out, f"{out}.stamps"], check=True)
        return answer


def measured(command: list[str], timeout_s: float, cache: str) -> dict[str, Any]:
    """Run a command in a session of its own; its last line of JSON, and the peak memory of all its processes."""
    mark = f"THROUGHPUT_JOB={uuid.uuid4().hex}"
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": cache,
        "PYTHONPATH": f"{ROOT}:{PEERS}",
        mark.partition("=")[0]: mark.partition("=")[2],
    }
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, start_new_session=True
        )
        memory = Memory(mark)
        memory.start()
        try:
            stdout, _ = process.communicate(timeout=timeout_s)
        finally:
            memory.stop()
        errors.seek(0)
        if process.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{errors.read()[-4000:]}")
    return {**json.loads(stdout.splitlines()[-1]), "peak_bytes": memory.peak_bytes, "num_processes": memory.most}


class Memory(threading.Thread):
    """Watches the processes of a job: those that carry its mark in their environment, and their children.

    Ray's workers overwrite their environment with a title, and its daemons may outlive their parent: hence both.
    """

    def __init__(self, mark: str) -> None:
        super().__init__(daemon=True)
        self._mark = mark.encode()
        self._ours: set[int] = set()
        self._others: set[int] = {os.getpid()}
        self._over = threading.Event()
        self.peak_bytes, self.most, self._peak_resident = 0, 0, 0

    def run(self) -> None:
        while not self._over.wait(INTERVAL_S):
            self._look()

    def stop(self) -> None:
        """The job is over: what it left behind ends too."""
        self._over.set()
        self.join()
        deadline = time.monotonic() + 5
        while self._alive() and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in self._alive():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def _look(self) -> None:
        alive = self._alive()
        self.most = max(self.most, len(alive))
        resident = sum(int((read(pid, "statm") or b"0 0").split()[1]) for pid in alive)
        if resident > self._peak_resident * GROWTH:
            self._peak_resident = resident
            self.peak_bytes = max(self.peak_bytes, sum(proportional(pid) for pid in alive))

    def _alive(self) -> set[int]:
        pids = {int(name) for name in os.listdir("/proc") if name.isdigit()}
        self._ours &= pids
        self._others &= pids
        for pid in sorted(pids - self._ours - self._others):
            stat = read(pid, "stat").rpartition(b")")[2].split()
            is_ours = bool(stat) and (int(stat[1]) in self._ours or self._mark in read(pid, "environ"))
            (self._ours if is_ours else self._others).add(pid)
        return {pid for pid in self._ours if read(pid, "stat").rpartition(b")")[2].split()[:1] not in ([], [b"Z"])}


def read(pid: int, name: str) -> bytes:
    """A file of /proc, empty when the process is gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""


def proportional(pid: int) -> int:
    for line in read(pid, "smaps_rollup").splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * 1024
    return 0


# What was found


def agreement(reference: Path, out: Path, row: Row, who: str) -> dict[str, Any]:
    """Whether a competitor has the same keys, and how far its embeddings are from ours in `exact`."""
    import numpy as np

    expected, found = embeddings(reference), embeddings(out)
    answer: dict[str, Any] = {"same_keys": expected.keys() == found.keys(), "num_keys": len(found)}
    if answer["same_keys"]:
        keys = sorted(expected)
        expected_ND, found_ND = (np.stack([each[key] for key in keys]).astype(np.float64) for each in (expected, found))
        mean_D = expected_ND.mean(axis=0)
        plain_N, centred_N = cosines(expected_ND, found_ND), cosines(expected_ND - mean_D, found_ND - mean_D)
        for name, cosines_N in (("cosine", plain_N), ("cosine_centred", centred_N)):
            answer[name] = {"median": float(np.median(cosines_N)), "min": float(cosines_N.min())}
    # A reduced decode is another picture: there the figure is for the reader.
    is_exact = row.decode == "exact" or who not in OWN_DECODER
    answer["passed"] = answer["same_keys"] and (not is_exact or answer["cosine_centred"]["median"] >= MIN_COSINE)
    return answer


def cosines(first_ND: Any, second_ND: Any) -> Any:
    import numpy as np

    norms_N = np.linalg.norm(first_ND, axis=1) * np.linalg.norm(second_ND, axis=1)
    return (first_ND * second_ND).sum(axis=1) / np.maximum(norms_N, 1e-30)


def embeddings(out: Path) -> dict[str, Any]:
    """Key to embedding, from all Parquet files of a folder; a path counts by its stem."""
    import numpy as np
    import pyarrow.parquet as pq

    found: dict[str, Any] = {}
    for file in out.rglob("*.parquet"):
        table = pq.ParquetFile(file).read(columns=["key", "embedding"])
        for key, embedding in zip(table["key"].to_pylist(), table["embedding"].to_pylist(), strict=True):
            name = Path(key).name.removesuffix(".jpg")
            values = np.asarray(embedding, np.float32).reshape(-1)
            assert np.allclose(found.setdefault(name, values), values, atol=1e-4), f"{name} appears twice and differs"
    return found


def summary(samples: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians with their range, and ratios that were taken within a round."""
    found: dict[str, Any] = {}
    for who, runs in samples.items():
        found[who] = {
            name: spread([run[name] for run in runs])
            for name in ("images_per_s", "steady_images_per_s", "job_s", "total_s", "peak_bytes")
            if all(run.get(name) is not None for run in runs)
        }
    for name in SHORT:
        ours = [run.get(name) for run in samples.get("ours", [])]
        if not ours or None in ours:
            continue
        for who, runs in samples.items():
            others = [run.get(name) for run in runs]
            if who != "ours" and who not in LIMITS and None not in others:
                found[who][f"ours_by_{name}"] = spread([mine / other for mine, other in zip(ours, others, strict=True)])
        limits = [[run["images_per_s"] for run in samples[limit]] for limit in LIMITS if limit in samples]
        if limits:
            together = [1 / sum(1 / rate for rate in rates) for rates in zip(*limits, strict=True)]
            limit = found.setdefault("limit", {"images_per_s": spread(together)})
            limit[f"ours_by_{name}"] = spread([mine / most for mine, most in zip(ours, together, strict=True)])
    return found


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def shown(result: dict[str, Any]) -> str:
    """A row as a table."""
    lines = [
        f"\n{result['row']}: {result['num_images']} images",
        f"{'':<14} {'job/s':>8} {'(min - max)':>17} {'steady/s':>9} {'(min - max)':>17} {'peak MB':>8}"
        f" {'ours/ job':>9} {'steady':>7} {'cosine':>8}",
    ]
    for who, found in result["summary"].items():
        rates = [rate_shown(found.get(name), width) for name, width in zip(SHORT, (8, 9), strict=True)]
        peak = f"{found['peak_bytes']['median'] / 1e6:8.0f}" if "peak_bytes" in found else f"{'':>8}"
        ratios = [ratio_shown(found.get(f"ours_by_{name}"), width) for name, width in zip(SHORT, (9, 7), strict=True)]
        check = result["checks"].get(who, {}).get("cosine_centred")
        cosine = f"{check['median']:8.5f}" if check else ""
        lines.append(f"{who:<14} {rates[0]} {rates[1]} {peak} {ratios[0]} {ratios[1]} {cosine}".rstrip())
    return "\n".join(lines)


def rate_shown(found: dict[str, float] | None, width: int) -> str:
    if found is None:
        return f"{'':>{width + 18}}"
    between = f"({found['min']:.1f} - {found['max']:.1f})"
    return f"{found['median']:{width}.1f} {between:>17}"


def ratio_shown(found: dict[str, float] | None, width: int) -> str:
    return f"{found['median']:{width}.2f}" if found else " " * width


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def circumstances(arguments: argparse.Namespace, started: str) -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    models = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    status = ["git", "status", "--porcelain", "--", "pipeline"]
    changed = subprocess.run(status, cwd=ROOT, capture_output=True, text=True, check=False)
    flags = {"rounds": arguments.rounds, "rows": ",".join(arguments.rows), "peers": ",".join(arguments.peers)}
    if arguments.limit_images:
        flags["limit-images"] = arguments.limit_images
    packages = ("torch", "torchvision", "ray", "daft", "spdl", "pyarrow", "pillow", "simplejpeg", "numpy")
    return {
        "command": " ".join(["python tests/benchmarks/throughput.py", *(f"--{name} {value}" for name, value in flags.items())]),
        "date": started,
        "commit": commit.stdout.strip() or None,
        "uncommitted_changes": bool(changed.stdout.strip()),
        "hardware": {
            "cpus": len(os.sched_getaffinity(0)),
            "model": models[0] if models else platform.machine(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "load_average": list(os.getloadavg()),
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "warm_up": "one run of ours in `exact`, and the trials of the peers' settings",
        "rounds": arguments.rounds,
        "statistic": "median",
    }


if __name__ == "__main__":
    main()
