"""The probe against scikit-learn's LogisticRegressionCV, on the same features and split. A command of its own.

    python tests/benchmarks/probe.py --work DIR [--data digits fashion-mnist] [--values 45] [--max-iter 1000] [--repeats 5]
                                     [--threads 1] [--folds] [--sweep]

Ours is the whole of `pipeline.analysis.probe.fit` as `pipeline probe` calls it: labels, split, normalisation, the sweep over C,
refit, all scores with their bootstrap, and the nearest neighbours. `zscore` has that one normalisation, `three` chooses between
all of them. Theirs is StandardScaler, with the mean and deviation of train, and then

    LogisticRegressionCV(Cs=the same values, cv=PredefinedSplit(the same train and validation), scoring="accuracy",
                         solver="lbfgs", tol=1e-4, max_iter=1000, n_jobs=None)

on train and validation together, which chooses C on validation and refits with it; then one `score` on test. It goes up the
values of C from solution to solution, as ours does. `--values N`: theirs gets so many of the 45, evenly spread, which only
saves it time. `--folds` adds scikit-learn with the same values and cv=None, its default: 5 folds of train and validation.
`--sweep` adds the sweep alone: every value of C fitted on train and scored on validation, and the best of them on test, without
a refit; ours in one solve, `45 fits` a loop over LogisticRegression(C=value, max_iter=1000), each from zero. All sides get
float32 features and `--threads` threads; each run is a fresh process, one side after the other and then again, where it is
drawn with another seed for the split. Imports and loading features are in no time. Fits of theirs that stopped at `--max-iter`
are counted.

`seconds` are by the clock, `cpu_s` of all threads together: where others use the machine, look at these, with one thread.
Ours without the nearest neighbours, which theirs does not have, is what the ratios are of; `with_knn` is the whole.

Data, made once in DIR and read by every process:

    digits          the 1,797 digits of `pipeline demo`, embedded by the network of `configs/quickstart.yaml`: `middle`
    fashion-mnist   70,000 pictures of `fashion_mnist.py`, embedded by the same network at 64 pixels: `middle`. The split is its
                    own; validation is drawn from its train part
    easy, hard      `--rows` x `--dim` of 10 Gaussian classes, far apart, or overlapping with variances that fall as in real
                    embeddings (a power law)
    photographs     with `--photographs DIR` (what `photographs.py` made): EfficientNet-Lite0 of random parts of the small
                    photographs; a class is so many consecutive ones, and the parts of one photograph are a group

Besides, with ours alone: `seeds` draws the split by hash with two seeds, and says whether the 95 % interval of either test
accuracy holds the other; `shuffled` permutes the labels; `nodes` compares all three columns of the data that we embedded.

The goals: test accuracy at most 0.2 points below theirs, in a tenth of its time, with `zscore` and with `three`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from memory import RESULTS, ROOT, circumstances, save
from numpy.typing import NDArray

NUM_CLASSES = 10
PART = (300, 225)
GOAL = {"points": -0.2, "ratio": 10}
OURS, THEIRS, FOLDS = ("zscore", "three"), "scikit-learn", "5 folds"
SWEEP, FITS = "sweep", "45 fits"
DATA = ("digits", "fashion-mnist", "easy", "hard", "photographs")
NODES = {
    "embedding": {"node": "_avg_pooling", "normalize": "l2"},
    "middle": {"node": "_blocks.10", "pool": "mean"},
    "early": {"node": "_blocks.4", "pool": "mean"},
}
COMPARED = "middle"
PIXELS = {"digits": 128, "fashion-mnist": 64}
PARTS = ("train", "validation", "test")
TIMES = ("seconds", "cpu_s", "knn_s")
RATIOS = ("ratio", "cpu_ratio", "ratio_with_knn", "ratio_of_folds")

Arrays = dict[str, NDArray[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the probe with scikit-learn's LogisticRegressionCV.")
    parser.add_argument("--work", type=Path, required=True, help="folder for shards, datasets and features; kept")
    parser.add_argument("--data", nargs="+", default=DATA[:2], choices=DATA)
    parser.add_argument("--values", type=int, default=45, help="of C, for scikit-learn")
    parser.add_argument("--max-iter", type=int, default=1000, help="for scikit-learn")
    parser.add_argument("--threads", type=int, help="of both sides; all cores when left out")
    parser.add_argument("--folds", action="store_true", help="scikit-learn with its own folds too")
    parser.add_argument("--sweep", action="store_true", help="the sweep alone too")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=1280, help="of the synthetic features")
    parser.add_argument("--photographs", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, the table on stderr")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measured(arguments.child, arguments)))
        return
    out = sys.stderr if arguments.json else sys.stdout
    arguments.work.mkdir(parents=True, exist_ok=True)
    lines = []
    for name in arguments.data:
        if not (path := features_file(arguments.work, name)).exists():
            np.savez(path, **make(name, arguments))
        more = [*([FOLDS] if arguments.folds else []), *([SWEEP, FITS] if arguments.sweep else [])]
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in (*OURS, THEIRS, *more)}
        for seed in range(arguments.repeats):
            for side, found in runs.items():
                found.append(child(f"{name}:{side}:{seed}", arguments))
                print(shown(name, side, found[-1]), file=out, flush=True)
        line = compare(name, runs)
        for side in [each for each in (*OURS, SWEEP) if each in line]:
            ratios = ", ".join(f"{what} {line[side][what]:.1f}" for what in RATIOS if what in line[side])
            print(f"{name:<14} {side:<13} {ratios}; {line[side]['points']:+.2f} points", file=out, flush=True)
        checks = ["seeds", "shuffled", *(["nodes"] if name in PIXELS else [])]
        for check in checks:
            line[check] = child(f"{name}:{check}:0", arguments)
            print(f"{name:<14} {check:<13} {json.dumps(line[check])}", file=out, flush=True)
        lines.append(line)
    met = {side: {goal: all(line[side][goal] >= least for line in lines) for goal, least in GOAL.items()} for side in OURS} | {
        check: all(line[check]["is_met"] for line in lines) for check in ("seeds", "shuffled")
    }
    print(f"goals: {json.dumps(met)}", file=out)
    warm_up = "none: every process fits once; making the features is not measured"
    report = {
        "benchmark": "probe",
        "goal": GOAL,
        "met": met,
        **circumstances(arguments.repeats, warm_up, ("scikit-learn", "scipy")),
        "scikit-learn": {"num_values": arguments.values, "max_iter": arguments.max_iter},
        "threads": arguments.threads,
        "results": lines,
    }
    save(report, arguments.out, out)
    if arguments.json:
        print(json.dumps(report))


def child(what: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a fresh process found out."""
    options = {"--work": arguments.work, "--values": arguments.values, "--max-iter": arguments.max_iter, "--child": what}
    command = [sys.executable, __file__, *(str(word) for pair in options.items() for word in pair)]
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, **(dict.fromkeys(names, str(arguments.threads)) if arguments.threads else {})}
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return dict(json.loads(answer.stdout.splitlines()[-1]))


def compare(name: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of the times, means of the accuracies."""
    line: dict[str, Any] = {"data": name}
    for side, found in runs.items():
        times = {what: [run[what] for run in found] for what in found[0] if what in TIMES}
        line[side] = {
            **found[0],
            **{what: statistics.median(each) for what, each in times.items()},
            **{f"{what}_range": [min(each), max(each)] for what, each in times.items()},
            "test_accuracy": statistics.mean(run["test_accuracy"] for run in found),
            "test_accuracies": [run["test_accuracy"] for run in found],
            "chosen": [[run.get("normalize", "zscore"), run["C"]] for run in found],
        }
    for side, other in ((side, FITS if side == SWEEP else THEIRS) for side in (*OURS, SWEEP) if side in line):
        line[side]["ratio"] = line[other]["seconds"] / line[side]["seconds"]
        line[side]["cpu_ratio"] = line[other]["cpu_s"] / line[side]["cpu_s"]
        line[side]["points"] = 100 * (line[side]["test_accuracy"] - line[other]["test_accuracy"])
        if "knn_s" in line[side]:
            line[side]["ratio_with_knn"] = line[other]["seconds"] / (line[side]["seconds"] + line[side]["knn_s"])
        if FOLDS in line and side != SWEEP:
            line[side]["ratio_of_folds"] = line[FOLDS]["seconds"] / line[side]["seconds"]
    return line


def shown(name: str, side: str, found: dict[str, Any]) -> str:
    accuracy = f"validation {found['validation_accuracy']:7.2%}, test {found['test_accuracy']:7.2%}"
    return f"{name:<14} {side:<13} {found['seconds']:8.1f} s, {found['cpu_s']:8.1f} s of CPU, C {found['C']:9.3g}, {accuracy}"


def features_file(work: Path, name: str) -> Path:
    return work / f"{name}.npz"


# Data


def make(name: str, arguments: argparse.Namespace) -> Arrays:
    """`features` (N, D) float32, `labels` (N,) int64, `hashes` (N,), and perhaps `group` and `given` (N,), the parts."""
    if name in PIXELS:
        dataset = embedded(arguments.work, name)
        columns = ["label", "content_hash", *(["part"] if name == "fashion-mnist" else [])]
        rows = {column: np.array(dataset.table([column]).column(column).to_pylist()) for column in columns}
        found = {"features": dataset.to_numpy(COMPARED), "labels": rows["label"], "hashes": rows["content_hash"]}
        return found | ({"given": rows["part"]} if "part" in rows else {})
    if name == "photographs":
        features_ND, labels_N, group_N = of_photographs(arguments.photographs, arguments.rows)
        more: Arrays = {"group": group_N}
    else:
        features_ND, labels_N = synthetic(arguments.rows, arguments.dim, hard=name == "hard")
        more = {}
    hashes = np.array([f"row {row}" for row in range(len(labels_N))])
    return {"features": features_ND, "labels": labels_N, "hashes": hashes, **more}


def parts_of(data: Arrays, seed: int) -> NDArray[np.str_]:
    """(N,) the part of each row, empty for rows that no side gets."""
    from pipeline import config
    from pipeline.analysis.probe import split

    settings = config.Probe(split="part", seed=seed)
    hashes, labels_N, groups = data["hashes"].tolist(), data["labels"], data["group"].tolist() if "group" in data else None
    if "given" in data:
        parts = split.given(data["given"].tolist(), hashes, labels_N, settings, groups)
    else:
        parts = split.draw(hashes, labels_N, settings, groups)
    part_N = np.full(len(labels_N), "", "U10")
    for part in PARTS:
        part_N[getattr(parts, part)] = part
    return part_N


def embedded(work: Path, name: str) -> Any:
    """The dataset, embedded by this pipeline."""
    import pipeline

    output = work / f"{name}-embedded"
    if not output.exists():
        if name == "digits":
            subprocess.run([sys.executable, "-m", "pipeline", "demo", str(work / name)], check=True, cwd=ROOT)
        else:
            from fashion_mnist import make as make_fashion

            make_fashion(work / name)
        settings = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
        settings["source"]["url"] = f"{work.absolute()}/{name}/*.tar"
        settings["source"]["columns"] = ["json.part"] if name == "fashion-mnist" else []
        settings["backbone"]["nodes"] = NODES
        settings["backbone"]["preprocess"] |= {"resize": PIXELS[name], "crop": PIXELS[name]}
        settings["output"]["url"] = str(output.absolute())
        del settings["probe"]
        config = work / f"{name}.yaml"
        config.write_text(yaml.safe_dump(settings))
        subprocess.run([sys.executable, "-m", "pipeline", "run", str(config.absolute())], check=True, cwd=ROOT)
    return pipeline.open_dataset(str(output))


def synthetic(num_rows: int, dim: int, *, hard: bool) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Gaussian classes around random centres, seen through a random rotation."""
    random = np.random.default_rng(0)
    targets_N = np.arange(num_rows) % NUM_CLASSES
    deviation_D = np.arange(1, dim + 1) ** -0.5 if hard else np.ones(dim)
    centres_KD = random.standard_normal((NUM_CLASSES, dim)) * deviation_D * (0.07 if hard else 0.2)
    turned_DD, _ = np.linalg.qr(random.standard_normal((dim, dim)))
    noise_ND = random.standard_normal((num_rows, dim)) * deviation_D
    features_ND = (centres_KD[targets_N] + noise_ND) @ turned_DD + random.standard_normal(dim)
    return features_ND.astype(np.float32), targets_N


def of_photographs(photographs: Path, num_rows: int) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """Features, classes, and the photograph of each row."""
    from fidelity import Picture, embed, make_ways

    files = sorted((photographs / "small").glob("*.jpg"))
    each = -(-num_rows // len(files))
    pictures = [Picture(file, number, PART) for file in files for number in range(each)]
    photograph_N = np.repeat(np.arange(len(files)), each)
    features_ND = embed(pictures, {"exact": make_ways()["exact"]})["exact"]
    return features_ND.astype(np.float32), photograph_N * NUM_CLASSES // len(files), photograph_N


# In the child


def measured(what: str, arguments: argparse.Namespace) -> dict[str, Any]:
    name, side, seed = what.split(":")
    with np.load(features_file(arguments.work, name)) as stored:
        data = dict(stored)
    if side not in ("seeds", "shuffled"):
        data["part"] = parts_of(data, int(seed))
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "zscore": lambda: ours(data, normalize="zscore"),
        "three": lambda: ours(data),
        THEIRS: lambda: theirs(data, arguments.values, arguments.max_iter),
        FOLDS: lambda: theirs(data, arguments.values, arguments.max_iter, folds=True),
        SWEEP: lambda: our_sweep(data),
        FITS: lambda: their_sweep(data, arguments.values, arguments.max_iter),
        "seeds": lambda: seeds(data),
        "shuffled": lambda: shuffled(data),
        "nodes": lambda: nodes(arguments.work, name, data),
    }
    return ways[side]()


class Clock:
    """Seconds by the clock and of all threads since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._start[0], time.process_time() - self._start[1]


def ours(data: Arrays, **settings: Any) -> dict[str, Any]:
    import torch  # noqa: F401  imported before the clock starts, as scikit-learn is

    from pipeline import config
    from pipeline.analysis import probe
    from pipeline.analysis.probe import knn

    aside = [0.0, 0.0]
    score = knn.score

    def score_aside(*arguments: Any) -> dict[str, Any]:
        clock = Clock()
        found = score(*arguments)
        aside[:] = clock.read()
        return found

    knn.score = score_aside
    labels, hashes, parts = (data[name].tolist() for name in ("labels", "hashes", "part"))
    clock = Clock()
    result = probe.fit(data["features"], labels, hashes, config.Probe(split="part", **settings), parts=parts)
    seconds, cpu_s = clock.read()
    names = ("C", "normalize", "validation_accuracy", "test_accuracy", "interval", "test_nll", "test_ece", "knn", "compared")
    counts = {f"num_{part}": result.metrics[f"num_{part}"] for part in PARTS}
    times = {"seconds": seconds - aside[0], "cpu_s": cpu_s - aside[1], "knn_s": aside[0]}
    return {**times, **{name: result.metrics[name] for name in names}, **counts}


def theirs(data: Arrays, num_values: int, max_iter: int, *, folds: bool = False) -> dict[str, Any]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.model_selection import PredefinedSplit
    from sklearn.preprocessing import StandardScaler

    warnings.simplefilter("ignore", ConvergenceWarning)  # counted instead
    values = values_of_C(num_values)
    features_ND, labels_N, part_N = data["features"], data["labels"], data["part"]
    both, test = np.flatnonzero(np.isin(part_N, PARTS[:2])), np.flatnonzero(part_N == "test")
    clock = Clock()
    scaler = StandardScaler().fit(features_ND[part_N == "train"])
    predefined = PredefinedSplit(np.where(part_N[both] == "validation", 0, -1))
    classifier = LogisticRegressionCV(
        Cs=values,
        cv=None if folds else predefined,
        scoring="accuracy",
        l1_ratios=(0,),
        max_iter=max_iter,
        use_legacy_attributes=False,
    )
    classifier.fit(scaler.transform(features_ND[both]), labels_N[both])
    accuracy = float(classifier.score(scaler.transform(features_ND[test]), labels_N[test]))
    seconds, cpu_s = clock.read()
    curve = np.asarray(classifier.scores_).reshape(-1, num_values).mean(axis=0)
    return {
        "seconds": seconds,
        "cpu_s": cpu_s,
        "C": float(classifier.C_),
        "validation_accuracy": float(curve.max()),
        "test_accuracy": accuracy,
        "num_values": num_values,
        "num_stopped": int((np.ravel(classifier.n_iter_) >= max_iter).sum()),
    }


def values_of_C(num_values: int) -> NDArray[np.float64]:
    from pipeline.analysis.probe.logistic import VALUES_OF_C

    return VALUES_OF_C[np.linspace(0, len(VALUES_OF_C) - 1, num_values).round().astype(int)]


def our_sweep(data: Arrays) -> dict[str, Any]:
    import torch  # noqa: F401  see `ours`

    from pipeline.analysis import probe

    train, validation, test = (np.flatnonzero(data["part"] == part) for part in PARTS)
    clock = Clock()
    task = probe._Task(data["features"], data["labels"], NUM_CLASSES, "cpu")
    _, chosen = task.sweep({"node": "", "normalize": "zscore"}, train, validation)
    seconds, cpu_s = clock.read()
    weight_KD, bias_K = chosen.axes.fold(chosen.head_KP)
    predicted = (data["features"][test] @ weight_KD.T + bias_K).argmax(axis=1)
    return {
        "seconds": seconds,
        "cpu_s": cpu_s,
        "C": chosen.point["C"],
        "validation_accuracy": chosen.point["validation_accuracy"],
        "test_accuracy": float((predicted == data["labels"][test]).mean()),
    }


def their_sweep(data: Arrays, num_values: int, max_iter: int) -> dict[str, Any]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    warnings.simplefilter("ignore", ConvergenceWarning)  # counted instead
    features_ND, labels_N, part_N = data["features"], data["labels"], data["part"]
    clock = Clock()
    scaler = StandardScaler().fit(features_ND[part_N == "train"])
    scaled = {part: scaler.transform(features_ND[part_N == part]) for part in PARTS[:2]}
    fits = []
    for value in values_of_C(num_values):
        classifier = LogisticRegression(C=value, max_iter=max_iter).fit(scaled["train"], labels_N[part_N == "train"])
        fits.append((classifier.score(scaled["validation"], labels_N[part_N == "validation"]), classifier))
    seconds, cpu_s = clock.read()
    accuracy, best = max(fits, key=lambda fit: fit[0])
    return {
        "seconds": seconds,
        "cpu_s": cpu_s,
        "C": float(best.C),
        "validation_accuracy": float(accuracy),
        "test_accuracy": float(best.score(scaler.transform(features_ND[part_N == "test"]), labels_N[part_N == "test"])),
        "num_values": num_values,
        "num_stopped": sum(int(classifier.n_iter_.max()) >= max_iter for _, classifier in fits),
    }


def seeds(data: Arrays) -> dict[str, Any]:
    """Two splits drawn by hash."""
    from pipeline import config
    from pipeline.analysis import probe

    found = []
    for seed in (0, 1):
        settings = config.Probe(seed=seed, normalize="zscore")
        found.append(probe.fit(data["features"], data["labels"], data["hashes"].tolist(), settings).metrics)
    accuracies, intervals = [each["test_accuracy"] for each in found], [each["interval"] for each in found]
    holds = [low <= accuracy <= high for accuracy, (low, high) in zip(accuracies, reversed(intervals), strict=True)]
    return {"test_accuracy": accuracies, "interval": intervals, "is_met": all(holds)}


def shuffled(data: Arrays) -> dict[str, Any]:
    """Labels permuted over pictures, so that copies still agree: nothing can be learned, and nothing may seem to be."""
    from pipeline import config
    from pipeline.analysis import probe

    _, first, picture_N = np.unique(data["hashes"], return_index=True, return_inverse=True)
    labels = np.random.default_rng(0).permutation(data["labels"][first])[picture_N]
    found = probe.fit(data["features"], labels, data["hashes"].tolist(), config.Probe(normalize="zscore")).metrics
    chance = float(np.bincount(labels).max() / len(labels))
    low, high = found["interval"]
    is_met = low <= chance <= high
    return {"test_accuracy": found["test_accuracy"], "interval": [low, high], "chance": chance, "is_met": is_met}


def nodes(work: Path, name: str, data: Arrays) -> dict[str, Any]:
    """All columns under all normalisations."""
    from pipeline import config
    from pipeline.analysis import probe

    dataset = embedded(work, name)
    load = {node: lambda rows, node=node: dataset.to_numpy(node, rows) for node in dataset.nodes}
    labels, hashes, parts = (data[each].tolist() for each in ("labels", "hashes", "part"))
    found = probe.fit(load, labels, hashes, config.Probe(split="part"), parts=parts).metrics
    names = ("node", "normalize", "C", "test_accuracy", "interval", "test_nll", "test_ece", "knn", "compared", "seconds")
    return {each: found[each] for each in names}


if __name__ == "__main__":
    main()
