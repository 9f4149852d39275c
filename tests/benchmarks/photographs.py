"""Photographs to measure with: crops of the pictures in Debian's wallpaper packages, loose and in tars.

    python tests/benchmarks/photographs.py DIR [--small 2000] [--large 900]

    DIR/small/NNNNNN.jpg   500 x 375, quality 95, about 58 kB: the shape of ImageNet      DIR/small-tar: 250 to a tar
    DIR/large/NNNNNN.jpg   2048 x 1536, quality 88, about 470 kB: the shape of a camera   DIR/large-tar: 50 to a tar

The same pictures on every call. A size that is there already stays as it is. Needs Debian's apt-get and dpkg, and Pillow.
"""

from __future__ import annotations

import argparse
import itertools
import random
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

PACKAGES = ("plasma-workspace-wallpapers", "mate-backgrounds", "gnome-backgrounds")
MIN_SOURCE_BYTES = 150_000
"""Smaller files in the packages are thumbnails and drawings."""
SHARDS_AT_LEAST = 6
"""A selection is packed into at least so many tars: readers that take a tar each have something to share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """One kind of photograph."""

    pixels: tuple[int, int]
    quality: int
    per_shard: int


SIZES = {
    "small": Size(pixels=(500, 375), quality=95, per_shard=250),
    "large": Size(pixels=(2048, 1536), quality=88, per_shard=50),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make photographs to measure with.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", type=int, default=2000)
    parser.add_argument("--large", type=int, default=900)
    arguments = parser.parse_args()
    make(arguments.folder, {"small": arguments.small, "large": arguments.large})


def make(folder: Path, numbers: dict[str, int]) -> None:
    """Fill `folder` with so many photographs of each size, where it has none."""
    missing = [name for name in numbers if not any(folder.glob(f"{name}/*.jpg"))]
    if missing:
        with tempfile.TemporaryDirectory(prefix="photographs-") as unpacked:
            originals = sources(Path(unpacked))
            for name in missing:
                crops(originals, SIZES[name], numbers[name], folder / name)
    for name in numbers:
        if not any(folder.glob(f"{name}-tar/*.tar")):
            pack(sorted((folder / name).glob("*.jpg")), folder / f"{name}-tar", SIZES[name].per_shard)


def sources(folder: Path) -> list[Path]:
    """The photographs in the packages, which are downloaded and unpacked, not installed."""
    subprocess.run(["apt-get", "download", "-q", *PACKAGES], cwd=folder, check=True)
    for package in sorted(folder.glob("*.deb")):
        subprocess.run(["dpkg", "-x", package, folder / "unpacked"], check=True)
    files = (file for file in (folder / "unpacked").rglob("*") if file.suffix.lower() in {".jpg", ".jpeg"})
    return sorted(file for file in files if file.is_file() and not file.is_symlink() and file.stat().st_size > MIN_SOURCE_BYTES)


def crops(originals: list[Path], size: Size, number: int, out: Path) -> None:
    """Random parts of the originals, each scaled to `size`."""
    out.mkdir(parents=True, exist_ok=True)
    opened, image = None, Image.new("RGB", (1, 1))
    for made, (original, box) in enumerate(boxes(originals, number)):
        if original != opened:
            opened, image = original, Image.open(original).convert("RGB")
        crop = image.crop(box).resize(size.pixels, Image.Resampling.LANCZOS)
        crop.save(out / f"{made:06d}.jpg", quality=size.quality)


def boxes(originals: list[Path], number: int) -> Iterator[tuple[Path, tuple[int, int, int, int]]]:
    """Which part of which original each photograph shows, in pixels: left, top, right, bottom. The same on every call."""
    Image.MAX_IMAGE_PIXELS = None
    random_ = random.Random(0)
    per_original, made = -(-number // len(originals)), 0
    for original in originals:
        with Image.open(original) as image:
            whole = image.size
        for _ in range(min(per_original, number - made)):
            width = int(whole[0] * random_.uniform(0.25, 0.8))
            height = min(int(width * 0.75), whole[1])
            width = int(height / 0.75)
            left, top = random_.randint(0, whole[0] - width), random_.randint(0, whole[1] - height)
            yield original, (left, top, left + width, top + height)
            made += 1


def pack(files: list[Path], out: Path, per_shard: int) -> None:
    """Tars of `per_shard` files each."""
    out.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(files), per_shard):
        with tarfile.open(out / f"shard-{start // per_shard:05d}.tar", "w") as tar:
            for file in files[start : start + per_shard]:
                tar.add(file, file.name)


def select(folder: Path, name: str, number: int, out: Path) -> tuple[Path, Path, int]:
    """Folders with `number` photographs as tars and as loose files, and how many there are.

    The folder's own where it has as many, an even selection of it under `out` where it has more. Where it has fewer there are
    several links to each of its tars, and the loose files are its own.
    """
    files = sorted((folder / name).glob("*.jpg"))
    if len(files) == number:
        return folder / f"{name}-tar", folder / name, number
    if len(files) < number:
        tars, times = out / f"{name}-{number}-tar", number // len(files)
        tars.mkdir(exist_ok=True)
        for time, tar in itertools.product(range(times), (folder / f"{name}-tar").glob("*.tar")):
            link = tars / f"{tar.stem}-{time}.tar"
            if not link.exists():
                link.symlink_to(tar.absolute())
        return tars, folder / name, times * len(files)
    chosen = [files[position * len(files) // number] for position in range(number)]
    tars, images = out / f"{name}-{number}-tar", out / f"{name}-{number}"
    if not tars.exists():
        images.mkdir(parents=True)
        for file in chosen:
            (images / file.name).write_bytes(file.read_bytes())
        pack(chosen, tars, min(SIZES[name].per_shard, -(-number // SHARDS_AT_LEAST)))
    return tars, images, number


if __name__ == "__main__":
    main()
