"""Images outside of a run: the rows of a run again, and the same refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import noise, settings, shard_members, tar_bytes
from images import encode, photo
from PIL import Image
from quick import committed

from pipeline.dataset.read import Dataset
from pipeline.errors import BackboneError, GuardError
from pipeline.extract.embedder import BATCH_SIZE, Embedder
from pipeline.recipe import differences
from pipeline.source import Sample

NODES = {"raw": {"node": "flatten"}, "unit": {"node": "flatten", "normalize": "l2"}}
PICTURES = [*(encode(photo(1200, 900, seed)) for seed in range(3)), *(encode(photo(300, 200, seed)) for seed in range(17))]


def dataset_of(folder: Path, images: list[bytes], **changes: Any) -> Dataset:
    (folder / "a.tar").write_bytes(tar_bytes(shard_members(images, 0, "jpg")))
    return committed(settings(f"{folder}/*.tar", folder / "out", **({"backbone__nodes": NODES} | changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone__model": "python/models:restless"},  # whose BatchNorm the run folds
        {"decode": "fast", "backbone__preprocess": {"resize": 96, "crop": 90, "interpolation": "bicubic"}},
        {"run__precision": "bfloat16", "backbone__version": "2"},
    ],
    ids=["folded", "fast", "rounded"],
)
def test_rows_are_those_of_a_run(changes: dict[str, Any], tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, PICTURES, **changes)
    embedder = Embedder(dataset.recipe, "cpu")
    assert embedder.recipe.fields == dataset.recipe
    rows, errors = embedder.embed(PICTURES)
    assert errors == {}
    for name in NODES:
        expected = dataset.to_numpy(name)
        assert (rows[name].shape, rows[name].dtype) == (expected.shape, np.float32)
        limit = embedder.recipe.tolerance * abs(expected).max(axis=1)
        assert (abs(rows[name] - expected).max(axis=1) <= limit).all()
    assert abs(rows["raw"][0] - rows["raw"][1]).max() > embedder.recipe.tolerance * abs(rows["raw"]).max(), "no two alike"


def test_what_cannot_be_decoded_leaves_the_others_in_order(tmp_path: Path) -> None:
    images = noise(2 * BATCH_SIZE + 3)
    embedder = Embedder(dataset_of(tmp_path, images[:1]).recipe)
    alone = np.concatenate([embedder.embed([image])[0]["raw"] for image in images])
    mixed = [*images]
    for position in (0, 5, 6, len(images)):
        mixed.insert(position, b"" if position == 5 else b"no image")
    rows, errors = embedder.embed(mixed)
    assert {position: error.error for position, error in errors.items()} == {
        0: "NotAnImage", 5: "Empty", 6: "NotAnImage", len(images): "NotAnImage",
    }  # fmt: skip
    assert np.array_equal(rows["raw"], alone), "batches are padded, and neighbours make no difference"
    rows, errors = embedder.embed([b"no image"])
    assert (rows["raw"].shape, rows["unit"].shape, list(errors)) == ((0, 32), (0, 32), [0])
    assert embedder.embed([])[0]["raw"].shape == (0, 32)


def test_what_is_not_finite_is_refused_as_by_a_run(tmp_path: Path) -> None:
    white = encode(Image.new("RGB", (32, 32), "white"), "PNG")
    nodes = {"embedding": {"node": "flatten"}}
    images = [*noise(2), white, *noise(1, seed=1)]
    dataset = dataset_of(tmp_path, images, backbone__model="python/models:explodes", backbone__nodes=nodes)
    (refused,) = dataset.quarantine()
    rows, errors = Embedder(dataset.recipe).embed(images)
    assert len(rows["embedding"]) == 3
    assert list(errors) == [2]
    assert (errors[2].stage, errors[2].error, errors[2].message) == (refused.stage, refused.error, refused.message)


def test_an_image_of_too_many_pixels(tmp_path: Path) -> None:
    recipe = dataset_of(tmp_path, noise(1)).recipe
    large = encode(photo(300, 200))
    _, errors = Embedder(recipe, max_pixels=300 * 200 - 1).embed([large])
    assert [error.error for error in errors.values()] == ["TooManyPixels"]
    assert Embedder(recipe, max_pixels=300 * 200).embed([large])[1] == {}


def test_samples_of_a_source(tmp_path: Path) -> None:
    images = noise(BATCH_SIZE + 2)
    embedder = Embedder(dataset_of(tmp_path, images[:1]).recipe)
    samples = [Sample(key=str(number), index=number, url="u", image=image) for number, image in enumerate(images)]
    samples[3].image = b"no image"
    samples[BATCH_SIZE].error = embedder.embed([b""])[1][0]
    parts = list(embedder.embed_samples(iter(samples)))
    assert [len(part.samples) for part in parts] == [BATCH_SIZE - 1, 1]
    assert [[sample.key for sample, _ in part.refused] for part in parts] == [["3"], [str(BATCH_SIZE)]]
    rows = np.concatenate([part.columns["raw"] for part in parts])
    kept = [int(sample.key) for part in parts for sample in part.samples]
    assert np.array_equal(rows, embedder.embed([images[number] for number in kept])[0]["raw"])
    assert not any(sample.image for part in parts for sample in part.samples), "encoded images are let go"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights_digest": "0" * 32}, "differ in weights_digest: 0{32} -> [0-9a-f]{32}$"),
        ({"pruned": True}, "differ in pruned: true -> none"),
        ({"weights": None}, "cannot be read by this program: recipe: backbone.weights: "),
        ({"precision": "float8"}, "recipe: run.precision: 'float8' is wrong; allowed: float32"),
        ({"model": "python/models:gone"}, "backbone.model: models:gone cannot be imported"),
        ({"preprocess": {"resize": 9}}, "recipe cannot be read: KeyError: 'decode'"),
        ({"nodes": {"raw": {"node": "flaten"}}}, "has no node 'flaten'; did you mean flatten"),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_a_recipe_that_cannot_be_followed(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    recipe = dataset_of(tmp_path, noise(1)).recipe
    with pytest.raises(BackboneError, match=message) as refused:
        Embedder(recipe | change)
    assert refused.value.exit_code == 2


def test_another_way_of_decoding_is_named(tmp_path: Path) -> None:
    recipe = dataset_of(tmp_path, noise(1)).recipe
    older = recipe | {"preprocess": recipe["preprocess"] | {"decode_version": 2}}
    with pytest.raises(BackboneError, match=r"differ in preprocess\.decode_version: 2 -> 3$"):
        Embedder(older)
    assert differences(recipe, Embedder(recipe).recipe.fields) == []


def test_a_model_that_changes_itself_gives_no_rows(tmp_path: Path) -> None:
    recipe = dataset_of(tmp_path, noise(1), backbone__model="python/models:restless").recipe
    embedder = Embedder(recipe)
    norm = next(each for each in embedder._backbone._module.modules() if isinstance(each, torch.nn.BatchNorm2d))
    norm.running_mean.add_(1e-3)  # type: ignore[union-attr]
    with pytest.raises(GuardError, match="a buffer changed"):
        embedder.embed(noise(1))
