"""A model that costs next to nothing: what a run reaches with it is what decoding and transport allow."""

from __future__ import annotations

import torch
from torch import nn

STRIDE = 32


class Null(nn.Module):
    """A few pixels of the normalised picture: (B, 3, 224, 224) to (B, 147), at the node `flatten`."""

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return images_BCHW[:, :, ::STRIDE, ::STRIDE].flatten(1)


def model() -> nn.Module:
    return Null()
