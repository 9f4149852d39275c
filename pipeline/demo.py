"""A small real data set to try everything on, and the pretrained model that goes with it. Needs the extra `demo`.

scikit-learn's digits: 1,797 handwritten digits, labelled, inside the package. EfficientNet-Lite0: pretrained on ImageNet,
18.8 MB of weights inside a package. So nothing is downloaded beyond the package index.
"""

from __future__ import annotations

import io
import tarfile
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.storage import Store, join

if TYPE_CHECKING:
    from torch import nn

IMAGES_PER_SHARD = 180
SIDE = 64
"""The 8 x 8 digits are enlarged to this many pixels before they are written as PNG."""


def write_digits(url: str) -> tuple[int, int]:
    """Write the digits as WebDataset shards (`key.png`, `key.cls`) below `url`; the same bytes on every call.

    Returns:
        Number of images and of shards.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the demo data comes from scikit-learn; install frozen-pipeline[demo]") from None
    from PIL import Image

    digits = load_digits()
    store, num_images = Store(), len(digits.target)
    starts = range(0, num_images, IMAGES_PER_SHARD)
    for shard, start in enumerate(starts):
        with store.publish(join(url, f"digits-{shard:03d}.tar")) as file, tarfile.open(fileobj=file, mode="w|") as tar:
            for index in range(start, min(start + IMAGES_PER_SHARD, num_images)):
                picture = Image.fromarray((digits.images[index] * (255 / 16)).round().astype("uint8"))
                encoded = io.BytesIO()
                picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(encoded, "PNG")
                _add(tar, f"{index:05d}.png", encoded.getvalue())
                _add(tar, f"{index:05d}.cls", str(digits.target[index]).encode())
    return num_images, len(starts)


def _add(tar: tarfile.TarFile, name: str, payload: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(payload)
    tar.addfile(member, io.BytesIO(payload))


def efficientnet_lite0() -> nn.Module:
    """The architecture without weights: `python/pipeline.demo:efficientnet_lite0` in a config."""
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise UserError("EfficientNet-Lite0 comes from a package of its own; install frozen-pipeline[demo]") from None
    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    return model
