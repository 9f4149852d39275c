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
from s3 import S3Server
from sklearn.datasets import load_sample_images

from pipeline import config


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: where several workers share them, they end together."""
    items.sort(key=lambda item: item.path.parent.name not in ("chaos", "integration"))


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


def write_shards(folder: Path, images: list[bytes], per_shard: int, extension: str = "jpg") -> None:
    """Images as WebDataset shards with their number modulo 2 as the class."""
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(images), per_shard):
        members = shard_members(images[start : start + per_shard], start, extension)
        (folder / f"{start // per_shard:03d}.tar").write_bytes(tar_bytes(members))


def settings(source: Path | str, output: Path | str, **changes: Any) -> config.Config:
    """A config for a small model; `changes` are dotted keys with `__` for the dot."""
    raw: dict[str, Any] = {
        "source": {"url": str(source), "label": "cls"},
        "backbone": {"model": "python/models:tiny", "weights": "seed:0", "nodes": {"embedding": {"node": "flatten"}}},
        "output": {"url": str(output)},
        "run": {"batch_size": 16, "report": False},  # a page takes seconds: for the tests that look at one
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = raw
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return config.parse(raw)


def noise(count: int, seed: int = 0, side: int = 24) -> list[bytes]:
    """Small PNGs, no two alike: for tests that count images and do not look at them."""
    rng = np.random.default_rng(seed)
    encoded = []
    for _ in range(count):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(file, "PNG")
        encoded.append(file.getvalue())
    return encoded


def tar_bytes(members: dict[str, bytes]) -> bytes:
    """A tar with these members, in this order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, payload in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(payload)
            tar.addfile(member, io.BytesIO(payload))
    return buffer.getvalue()


def shard_members(images: list[bytes], first: int, extension: str = "png") -> dict[str, bytes]:
    """Members of one WebDataset shard; the class is the image's number modulo 2."""
    members = {}
    for number, image in enumerate(images, start=first):
        members[f"{number:05d}.{extension}"] = image
        members[f"{number:05d}.cls"] = str(number % 2).encode()
    return members


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


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """PyTorch with one thread: on small problems several mostly wait for each other, and turn while they do."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> str:
    """A dataset of 260 digits with labels, groups and parts; see `digits.embed`."""
    import digits

    return digits.embed(tmp_path_factory.mktemp("embedded"))


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server on this machine."""
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server
