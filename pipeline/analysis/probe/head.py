"""A trained probe as it is saved and applied: features (N, D) float32 in, classes and probabilities out.

It needs NumPy only. The file is safetensors: `weight` (K, D) and `bias` (K,), float32, and in the metadata as JSON what else
applying it takes: the classes, the column that it was trained on, what was done to the features, and what they were made by.

Legend: N rows, D features, K classes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigError

Label = str | int | float
"""What a class may be; `bool` is an `int`."""

_TENSORS = ("weight", "bias")


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A linear classifier over the features of one node."""

    weight: NDArray[np.float32]
    """(K, D), for features as they are, or divided by their norms; standardising is folded in."""
    bias: NDArray[np.float32]
    """(K,)."""
    classes: list[Label]
    """Class of each row of `weight`, sorted."""
    normalize: Literal["none", "l2"] = "none"
    """`l2`: features are divided by their Euclidean norms first. That is not linear, so it cannot be folded in."""
    node: str = ""
    """Embedding column that it was trained on."""
    label: str = ""
    """Column of the labels that it was trained on."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """What the features were made by, as `recipe.of_column` gives it; empty where nobody said."""

    def log_probabilities(self, features_ND: NDArray[np.float32]) -> NDArray[np.float64]:
        """(N, K), finite even where a probability is too small for a float."""
        if self.normalize == "l2":
            norms_N1 = np.sqrt(np.einsum("nd,nd->n", features_ND, features_ND))[:, None]
            features_ND = features_ND / np.maximum(norms_N1, np.finfo(np.float32).tiny)
        logits_NK = (features_ND @ self.weight.T + self.bias).astype(np.float64)
        logits_NK -= logits_NK.max(1, keepdims=True)
        logits_NK -= np.log(np.exp(logits_NK).sum(1, keepdims=True))
        return logits_NK

    def predict(self, features_ND: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Position in `classes` (N,) int64 of the most probable class, and probabilities (N, K) float32."""
        probabilities_NK = np.exp(self.log_probabilities(features_ND))
        return probabilities_NK.argmax(1), probabilities_NK.astype(np.float32)

    def dump(self) -> bytes:
        """The file."""
        from safetensors.numpy import save

        others = {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if each.name not in _TENSORS}
        metadata = {name: json.dumps(value, ensure_ascii=False) for name, value in others.items()}
        return save({name: np.ascontiguousarray(getattr(self, name)) for name in _TENSORS}, metadata=metadata)


def load(payload: bytes, name: str = "probe") -> Head:
    """The head in a file that `Head.dump` made.

    Raises:
        ConfigError: it is no such file; the message names it.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load as load_tensors

    try:
        tensors = load_tensors(payload)
        header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])  # `load` drops the metadata
        others = {key: json.loads(value) for key, value in header["__metadata__"].items()}
        head = Head(weight=tensors["weight"], bias=tensors["bias"], **others)
        is_whole = head.weight.shape[:1] == head.bias.shape == (len(head.classes),) and head.normalize in ("none", "l2")
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        raise ConfigError(f"{name}: not a probe; it is a file probe.safetensors that `pipeline run` or `pipeline probe` wrote")
    return head
