"""Images outside of a run, embedded by the recipe of a dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import config
from pipeline.errors import BackboneError, SampleError
from pipeline.extract.backbone import Backbone, Spec
from pipeline.extract.decode import Decoder
from pipeline.recipe import differences

BATCH_SIZE = 16
"""Pictures in one forward pass; fewer are padded."""


class Embedder:
    """The model of a dataset's recipe, for images outside of a run."""

    def __init__(self, recipe_fields: Mapping[str, Any]) -> None:
        """Build the model.

        Raises:
            BackboneError: it cannot be had, or is not the one of the recipe.
        """
        preprocess = dict(recipe_fields["preprocess"])
        decode, _ = preprocess.pop("decode"), preprocess.pop("decode_version")
        names = ("model", "weights", "version", "nodes")
        backbone = config.Backbone(**{name: recipe_fields[name] for name in names}, preprocess=config.Preprocess(**preprocess))
        self._backbone = Backbone(
            Spec(backbone=backbone, decode=decode, precision=recipe_fields["precision"], fold=False),
            "cuda" if torch.cuda.is_available() else "cpu",
        )
        if differing := differences(recipe_fields, self._backbone.recipe.fields):
            raise BackboneError(f"the model built from the dataset's recipe is another one: {'; '.join(differing)}")
        max_pixels = config.Source.model_fields["max_pixels"].default
        self._decoder = Decoder(self._backbone.preprocess, fast=decode == "fast", max_pixels=max_pixels)

    def embed(self, images: Sequence[bytes]) -> tuple[dict[str, NDArray[np.float32]], dict[int, SampleError]]:
        """Embed encoded images.

        Returns:
            Column to (M, D) float32 of the M images that could be decoded, in order; and by position why the others could not.
        """
        columns = {name: [np.empty((0, width), np.float32)] for name, width in self._backbone.recipe.widths.items()}
        errors: dict[int, SampleError] = {}
        for start in range(0, len(images), BATCH_SIZE):
            batch_BHWC, num_decoded = self._backbone.new_batch(BATCH_SIZE), 0
            for position, image in enumerate(images[start : start + BATCH_SIZE], start):
                try:
                    self._decoder(image, batch_BHWC[num_decoded])
                    num_decoded += 1
                except Exception as error:  # as in the loop: whatever a decoder raises is the image's fault
                    errors[position] = SampleError.of(error)
            for name, values_BD in self._backbone.launch(batch_BHWC).wait().items():
                columns[name].append(values_BD[:num_decoded])
        return {name: np.concatenate(parts) for name, parts in columns.items()}, errors
