"""Fixtures that many tests share: real photographs as shards, and one Ray for the tests that run in this process."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from PIL import Image
from sklearn.datasets import load_sample_images

from pipeline import config


def crops(count: int, seed: int = 0, size: tuple[int, int] = (320, 240)) -> list[bytes]:
    """JPEG crops of the two photographs that scikit-learn ships; no two alike."""
    rng = np.random.default_rng(seed)
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    encoded = []
    for number in range(count):
        photograph = photographs[number % 2]
        width = int(rng.uniform(0.3, 0.9) * photograph.width)
        height = min(int(width * rng.uniform(0.6, 0.8)), photograph.height)
        left, top = rng.integers(0, photograph.width - width), rng.integers(0, photograph.height - height + 1)
        file = io.BytesIO()
        photograph.crop((left, top, left + width, top + height)).resize(size).save(file, "JPEG", quality=92)
        encoded.append(file.getvalue())
    return encoded


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    """A tar with these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, payload in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(payload)
            tar.addfile(member, io.BytesIO(payload))


def write_shards(folder: Path, images: list[bytes], per_shard: int, extension: str = "jpg") -> None:
    """Images as WebDataset shards with their number modulo 2 as the class."""
    for start in range(0, len(images), per_shard):
        members = {}
        for number in range(start, min(start + per_shard, len(images))):
            members[f"{number:05d}.{extension}"] = images[number]
            members[f"{number:05d}.cls"] = str(number % 2).encode()
        write_tar(folder / f"{start // per_shard:03d}.tar", members)


def settings(source: Path | str, output: Path | str, **changes: Any) -> config.Config:
    """A config for a small model; `changes` are dotted keys with `__` for the dot."""
    raw: dict[str, Any] = {
        "source": {"url": str(source), "label": "cls"},
        "backbone": {"model": "python/models:tiny", "weights": "seed:0", "nodes": {"embedding": {"node": "flatten"}}},
        "output": {"url": str(output)},
        "run": {"batch_size": 16},
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = raw
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return config.parse(raw)


@pytest.fixture(scope="session")
def photographs() -> list[bytes]:
    """60 JPEG photographs."""
    return crops(60)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, photographs: list[bytes]) -> Path:
    """The photographs as four tars of 15."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, photographs, 15)
    return folder


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray with two cores and no GPU, for the runs of this process."""
    ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()
