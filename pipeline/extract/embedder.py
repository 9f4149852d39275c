"""Images outside of a run, embedded by the recipe of a dataset: for a look at its rows again, and for new images.

In: a recipe as a dataset holds it, and encoded images. Out: rows that equal those of a run. The parts are the loop's own, one
after the other in the thread that calls: a folder of millions is a case for a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import config
from pipeline.errors import BackboneError, ConfigError, SampleError
from pipeline.extract.backbone import Backbone, Spec
from pipeline.extract.decode import Decoder
from pipeline.recipe import Recipe, differences
from pipeline.source import Sample

BATCH_SIZE = 16
"""Pictures in one forward pass; fewer are padded."""
DEFAULT_MAX_PIXELS: int = config.Source.model_fields["max_pixels"].default


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """What became of some samples."""

    samples: list[Sample]
    """The M that have a row, without their encoded images."""
    columns: dict[str, NDArray[np.float32]]
    """Column to (M, D) float32."""
    refused: list[tuple[Sample, SampleError]]


class Embedder:
    """The model of a dataset's recipe, as it was built: nothing faster runs in its place. Used by one thread at a time.

    Attributes:
        recipe: the recipe, with the widths of its columns.
    """

    def __init__(self, recipe_fields: Mapping[str, Any], device: str = "auto", max_pixels: int = DEFAULT_MAX_PIXELS) -> None:
        """Build the model that the recipe names. One given as `python/module:function` is imported and run.

        Args:
            recipe_fields: what `Dataset.recipe` gives.
            device: `cpu`, `cuda`, or `auto`: the GPU where there is one.
            max_pixels: an image whose header claims more is refused, as by `source.max_pixels`.

        Raises:
            BackboneError: the recipe cannot be read, its model cannot be had, or what is built here has another recipe.
            GuardError: the model mixes the rows of a batch.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._backbone = Backbone(_spec(recipe_fields), device)
        self.recipe: Recipe = self._backbone.recipe
        if differing := differences(recipe_fields, self.recipe.fields):
            raise BackboneError(
                "the dataset's embeddings cannot be made here: its recipe and that of the model built from it differ in "
                f"{'; '.join(differing)}"
            )
        fast = self._backbone.spec.decode == "fast"
        self._decoder = Decoder(self._backbone.preprocess, fast=fast, max_pixels=max_pixels)
        self._batch_BHWC = self._backbone.new_batch(BATCH_SIZE)

    def embed(self, images: Sequence[bytes | memoryview]) -> tuple[dict[str, NDArray[np.float32]], dict[int, SampleError]]:
        """Embed encoded images.

        Returns:
            Column to (M, D) float32 of the M images that have an embedding, in order; and by position in `images` why the
            others have none.

        Raises:
            GuardError: the model changed itself.
        """
        columns = {name: [np.empty((0, width), np.float32)] for name, width in self.recipe.widths.items()}
        errors: dict[int, SampleError] = {}
        placed: list[int] = []

        def flush() -> None:
            outputs = self._backbone.launch(self._batch_BHWC).wait()
            rows = []
            for row, (position, refusal) in enumerate(zip(placed, self._backbone.refusals(outputs), strict=False)):
                if refusal is None:
                    rows.append(row)
                else:
                    errors[position] = refusal
            for name, values_BD in outputs.items():
                columns[name].append(values_BD[rows])
            placed.clear()

        with torch.inference_mode():
            for position, image in enumerate(images):
                try:
                    self._decoder(image, self._batch_BHWC[len(placed)])
                except Exception as error:  # as in the loop: whatever a decoder raises is the image's fault
                    errors[position] = SampleError.of(error)
                    continue
                placed.append(position)
                if len(placed) == BATCH_SIZE:
                    flush()
            if placed:
                flush()
        self._backbone.check_frozen()
        return {name: np.concatenate(parts) for name, parts in columns.items()}, errors

    def embed_samples(self, samples: Iterable[Sample]) -> Iterator[Embedded]:
        """Embed what a source reads, a batch at a time; the encoded images of one batch are held."""
        batch: list[Sample] = []
        for sample in samples:
            batch.append(sample)
            if len(batch) == BATCH_SIZE:
                yield self._embedded(batch)
                batch = []
        if batch:
            yield self._embedded(batch)

    def _embedded(self, batch: list[Sample]) -> Embedded:
        refused = [(sample, sample.error) for sample in batch if sample.error is not None]
        readable = [sample for sample in batch if sample.error is None]
        columns, errors = self.embed([sample.image for sample in readable])
        for sample in batch:
            sample.image = b""
        refused += [(readable[position], error) for position, error in errors.items()]
        return Embedded(
            samples=[sample for position, sample in enumerate(readable) if position not in errors],
            columns=columns,
            refused=refused,
        )


def _spec(recipe_fields: Mapping[str, Any]) -> Spec:
    """The backbone of a recipe, held against the same rules as that of a config."""
    try:
        preprocess = dict(recipe_fields["preprocess"])
        decode, _ = preprocess.pop("decode"), preprocess.pop("decode_version")
        backbone = {name: recipe_fields[name] for name in ("model", "weights", "version", "nodes")}
        settings = config.parse(
            {
                "source": {"url": "not read"},
                "backbone": {**backbone, "preprocess": preprocess},
                "decode": decode,
                "output": {"url": "not written"},
                "run": {"precision": recipe_fields["precision"]},
            },
            "recipe",
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BackboneError(f"the dataset's recipe cannot be read: {type(error).__name__}: {error}") from None
    except ConfigError as error:
        raise BackboneError(f"the dataset's recipe cannot be read by this program: {error}") from None
    return Spec(backbone=settings.backbone, decode=settings.decode, precision=settings.run.precision, fold=False)
