"""What the scripts of all competitors share: arguments, the model as a tutorial builds it, the clock, the last line."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BATCH_SIZE = 32


def arguments(description: str, **extra: Any) -> argparse.Namespace:
    """The flags that every competitor takes; `extra` are the defaults of its own settings, whole numbers or texts."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--tars", type=Path, help="folder of tars")
    parser.add_argument("--images", type=Path, help="folder of the same images as loose files")
    parser.add_argument("--model", default="mobilenet_v3_small")
    parser.add_argument("--out", type=Path, required=True, help="folder for the Parquet files, not there yet")
    parser.add_argument("--decode", choices=("exact", "fast"), default="exact", help="for those that use our decoder")
    parser.add_argument("--channels-last", action="store_true", help="for those that build the model themselves")
    for name, default in extra.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    return parser.parse_args()


def build(name: str, *, channels_last: bool) -> tuple[Any, Callable[[Any], Any]]:
    """The model up to its penultimate features, with seeded weights, and the preset that its first weights come with."""
    import torch
    import torchvision
    from torchvision.models.feature_extraction import create_feature_extractor

    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None)
    model = create_feature_extractor(model.eval(), {"flatten": "embedding"})
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model, preset(name)


def preset(name: str) -> Callable[[Any], Any]:
    """PIL image to (3, 224, 224) float32, as the weights' own documentation does it."""
    import torchvision

    return next(iter(torchvision.models.get_model_weights(name))).transforms()


def forward(model: Any, images_BCHW: Any, *, channels_last: bool) -> Any:
    """(B, D) float32 in an array."""
    import torch

    with torch.inference_mode():
        if channels_last:
            images_BCHW = images_BCHW.to(memory_format=torch.channels_last)
        return model(images_BCHW)["embedding"].numpy()


def compiled(model: Any, decode: str, batch_size: int) -> Any:
    """Our backbone, and the file of its program for batches of this size, made unless it is there."""
    from pipeline.extract import aot
    from pipeline.extract.backbone import Backbone, Spec

    backbone = Backbone(Spec(backbone=model, decode=decode, precision="float32"))
    order = aot.Order(spec=backbone.spec, recipe_id=backbone.recipe.recipe_id, device="cpu", batch_size=batch_size)
    path = aot.compiled(order)
    assert path is not None, "a compiler is there"
    return backbone, path


def write(out: Path, keys: list[str], embeddings: list[Any]) -> None:
    """One Parquet file of batches that were collected."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    embeddings_ND = np.concatenate(embeddings)
    values = pa.FixedSizeListArray.from_arrays(pa.array(embeddings_ND.reshape(-1)), embeddings_ND.shape[1])
    out.mkdir(parents=True)
    pq.write_table(pa.table({"key": keys, "embedding": values}), out / "embeddings.parquet")


class Stamps:
    """Notes when how many images were embedded. Processes may share one file: a line is one append."""

    def __init__(self, out: Path) -> None:
        self.path = out.with_name(f"{out.name}.stamps")

    def mark(self, num_images: int) -> None:
        line = f"{time.monotonic()} {num_images}\n".encode()
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, line)
        os.close(file)

    def steady_images_per_s(self) -> float | None:
        """From a third of the images to the last: neither start-up, nor what was decoded ahead of it, nor the end is in it."""
        lines = [line.split() for line in self.path.read_text().splitlines()] if self.path.exists() else []
        stamps = sorted((float(when), int(number)) for when, number in lines)
        total = sum(number for _, number in stamps)
        embedded = list(itertools.accumulate(number for _, number in stamps))
        first = next((index for index, number in enumerate(embedded) if number >= total / 3), 0)
        if first >= len(stamps) - 1:
            return None
        return (total - embedded[first]) / (stamps[-1][0] - stamps[first][0])


class Job:
    """The clock: starts when the imports are done and, where Ray is used, `ray.init` has returned; ends with the Parquet."""

    def __init__(self, out: Path) -> None:
        self._stamps, self._start = Stamps(out), time.monotonic()

    def done(self, num_images: int, *, steady_images_per_s: float | None = None, **settings: Any) -> None:
        """Print the result as the last line of stdout.

        The steady rate is that of the stamps, where none is given.
        """
        job_s = time.monotonic() - self._start
        result = {
            "images": num_images,
            "job_s": job_s,
            "total_s": time.time() - _process_start(),
            "steady_images_per_s": steady_images_per_s or self._stamps.steady_images_per_s(),
            "settings": settings,
        }
        print(json.dumps(result), flush=True)


def _process_start() -> float:
    import psutil

    return float(psutil.Process().create_time())
