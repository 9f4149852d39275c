"""Fashion-MNIST from Debian's package as WebDataset shards: 70,000 real labelled pictures to measure a probe with.

    python tests/benchmarks/fashion_mnist.py DIR

    DIR/fashion-NNN.tar   2,500 pictures each: KEY.png, 28 x 28; KEY.cls, 0 to 9; KEY.json, {"part": "train"} or "test"

The same bytes on every call; a folder that has them already stays as it is. Needs Debian's apt-get and dpkg, and Pillow.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PACKAGE = "dataset-fashion-mnist"
PER_SHARD = 2500
NAMES = {"train": "train", "test": "t10k"}
"""Part to the first word of its files."""
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write Fashion-MNIST as shards.")
    parser.add_argument("folder", type=Path)
    print(f"{make(parser.parse_args().folder):,} pictures")


def make(folder: Path) -> int:
    """Fill `folder`, where it is empty; the number of pictures."""
    with tempfile.TemporaryDirectory(prefix="fashion-mnist-") as unpacked:
        number = 0
        if not any(folder.glob("fashion-*.tar")):
            files = sources(Path(unpacked))
            folder.mkdir(parents=True, exist_ok=True)
            for part, name in NAMES.items():
                images_NHW = idx(files / f"{name}-images-idx3-ubyte.gz")
                labels_N = idx(files / f"{name}-labels-idx1-ubyte.gz")
                for start in range(0, len(labels_N), PER_SHARD):
                    some = slice(start, start + PER_SHARD)
                    write(folder / f"fashion-{number // PER_SHARD:03d}.tar", images_NHW[some], labels_N[some], part, number)
                    number += len(labels_N[some])
    return sum(sum(name.endswith(".png") for name in tarfile.open(tar).getnames()) for tar in folder.glob("fashion-*.tar"))


def sources(folder: Path) -> Path:
    """Where the package's files lie: it is downloaded and unpacked, not installed."""
    subprocess.run(["apt-get", "download", "-q", PACKAGE], cwd=folder, check=True)
    (package,) = folder.glob("*.deb")
    subprocess.run(["dpkg", "-x", package, folder / "unpacked"], check=True)
    return folder / "unpacked" / "usr/share/datasets/fashion-mnist"


def idx(path: Path) -> NDArray[np.uint8]:
    """An array as LeCun's MNIST has them: two zeros, the type (8 is uint8), the number of axes, their lengths, the bytes."""
    payload = gzip.decompress(path.read_bytes())
    assert payload[:3] == b"\x00\x00\x08", f"{path}: not an array of uint8"
    header = 4 + 4 * payload[3]
    lengths = np.frombuffer(payload[4:header], ">u4")
    return np.frombuffer(payload[header:], np.uint8).reshape(lengths)


def write(tar_path: Path, images_NHW: NDArray[np.uint8], labels_N: NDArray[np.uint8], part: str, first: int) -> None:
    with tarfile.open(tar_path, "w") as tar:
        for number, (image_HW, label) in enumerate(zip(images_NHW, labels_N, strict=True), start=first):
            encoded = io.BytesIO()
            Image.fromarray(image_HW).save(encoded, "PNG")
            add(tar, f"{number:05d}.png", encoded.getvalue())
            add(tar, f"{number:05d}.cls", str(label).encode())
            add(tar, f"{number:05d}.json", json.dumps({"part": part}).encode())


def add(tar: tarfile.TarFile, name: str, payload: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(payload)
    tar.addfile(member, io.BytesIO(payload))


if __name__ == "__main__":
    main()
