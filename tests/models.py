"""Models for the tests, given in configs as `python/models:NAME`."""

from __future__ import annotations

import os
import signal
import time

import torch
from torch import nn


def tiny() -> nn.Module:
    """A convolution, pooled: fast, and every picture has its own embedding."""
    return Pooled(nn.Sequential(nn.Conv2d(3, 32, 7, stride=16), nn.ReLU()))


class Pooled(nn.Module):
    """Spatial mean of what `features` gives; its node in the graph is `flatten`, as in torchvision's models."""

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return torch.flatten(self.features(images_BCHW).mean(dim=(2, 3)), 1)


class Restless(nn.Module):
    """Everything that makes a row depend on more than its picture, handed over in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 16, 7, stride=8)
        self.norm = nn.BatchNorm2d(16)
        self.drop = nn.Dropout(0.5)
        nn.init.uniform_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        features_BCHW = self.drop(self.norm(self.conv(self.first(images_BCHW))))
        return torch.flatten(features_BCHW.mean(dim=(2, 3)), 1)


def restless() -> nn.Module:
    return Restless().train()


def batch_statistics() -> nn.Module:
    """Mixes the rows of a batch even in eval mode."""
    return Pooled(nn.Sequential(nn.Conv2d(3, 8, 7, stride=16), nn.BatchNorm2d(8, track_running_stats=False)))


class Untraceable(nn.Module):
    """Control flow that depends on data: torch.fx cannot trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 7, stride=16)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        features_BCHW = self.conv(images_BCHW)
        return features_BCHW.relu() if features_BCHW.mean() > 1e9 else features_BCHW


def untraceable() -> nn.Module:
    return Untraceable()


def explodes() -> nn.Module:
    """Not finite for a white picture."""
    return _Explodes()


class _Explodes(nn.Module):
    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        mean_BC = images_BCHW.mean(dim=(2, 3))
        return torch.flatten(mean_BC / (2.0 - mean_BC).clamp(min=0.0), 1)


class Breaks(nn.Module):
    """Raises for a white picture, as a driver or a kernel may; torch.fx cannot trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        pooled_BC11: torch.Tensor = self.pool(images_BCHW)
        if pooled_BC11.amin(dim=1).max() > 2:
            raise RuntimeError("the device fell over")
        return pooled_BC11


def breaks() -> nn.Module:
    return Breaks()


class Greedy(Pooled):
    """Asks for more memory than there is for more than five pictures at once; torch.fx cannot trace it."""

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        if len(images_BCHW) > 5 and images_BCHW.amax() > -9:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.features(images_BCHW).mean(dim=(2, 3))


def greedy() -> nn.Module:
    return Greedy(nn.Sequential(nn.Conv2d(3, 32, 7, stride=16), nn.ReLU()))


class _Sleepy(nn.Module):
    """Takes its time for every picture, and leaves the cores and the interpreter lock to others; torch.fx cannot trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.pooled = tiny()

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        time.sleep(0.005 * len(images_BCHW))
        pooled_BD: torch.Tensor = self.pooled(images_BCHW)
        return pooled_BD


def sleepy() -> nn.Module:
    """Five milliseconds a picture, as if on a device of its own; its node is `pooled`."""
    return _Sleepy()


def heavy() -> nn.Module:
    """Far more work than decoding a small picture."""
    layers = [nn.Conv2d(3, 64, 7, stride=4), *(nn.Conv2d(64, 64, 5, padding=2) for _ in range(4))]
    return Pooled(nn.Sequential(*layers))


def wide() -> nn.Module:
    """Hardly any work, and embeddings of 147 kB."""
    return _Wide()


class _Wide(nn.Module):
    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return torch.flatten(images_BCHW[:, :, ::2, ::2], 1)


class _Kills(Breaks):
    """Ends its process for a white picture, as a driver may that is given what it cannot bear."""

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        pooled_BC11: torch.Tensor = self.pool(images_BCHW)
        if pooled_BC11.amin(dim=1).max() > 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return pooled_BC11


def kills() -> nn.Module:
    return _Kills()


def two_layers() -> nn.Module:
    """Two convolutions for small pictures, with a node after each: `features.0` of 32 values, `features.2` of 64."""
    return Pooled(nn.Sequential(nn.Conv2d(3, 32, 5, stride=4), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU()))
