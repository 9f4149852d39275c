"""The whole pipeline over hostile images and containers: what each becomes, and that its neighbours notice nothing.

One run has all images in one tar, with good photographs between them; one the tars; one the Parquet files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import cli
from conftest import crops, settings
from hostile import CANARY, IMAGES, NAMES, PLAIN, Row
from hostile_containers import PARQUETS, TARS, Container, Failed
from images import jpeg, tar
from meter import metered
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import functional as preset

import pipeline
from pipeline import driver
from pipeline.config import Preprocess
from pipeline.errors import IncompleteRun, SampleError
from pipeline.extract.decode import Decoder

GOOD = {f"good-{number:03}": photograph for number, photograph in enumerate(crops(30, seed=5))}
NAMED = {name: jpeg(100 + number) for number, name in enumerate(NAMES)}
COLUMNS = ["key", "label", "content_hash", "width", "height"]
DECODE_LIMIT_S, DECODE_LIMIT_BYTES = 5.0, 400 << 20
"""For one image, whatever it claims to be: with the default of `source.max_pixels`, which allows 100 million."""


@dataclass
class Finished:
    """A run, and what it left behind."""

    folder: Path
    summary: driver.Summary
    rows: dict[tuple[str, int], dict[str, Any]]
    """By the name of their shard, and their index in it."""
    quarantine: dict[tuple[str, int], dict[str, Any]]
    embeddings: dict[tuple[str, int], NDArray[np.float32]]

    def samples(self, shard: str) -> list[tuple[str, tuple[str, str] | None]]:
        """Keys of a shard's samples in their order, each with the error that it was refused with."""
        found: dict[int, tuple[str, tuple[str, str] | None]] = {}
        for (name, index), row in self.rows.items():
            if name == shard:
                found[index] = row["key"], None
        for (name, index), row in self.quarantine.items():
            if name == shard:
                assert index not in found
                found[index] = row["key"], (row["stage"], row["error"])
        return [found[index] for index in sorted(found)]


def finished(folder: Path, files: dict[str, bytes], **changes: Any) -> Finished:
    """Run the pipeline over these files."""
    (folder / "in").mkdir(parents=True)
    for name, data in files.items():
        (folder / "in" / name).write_bytes(data)
    try:
        summary = driver.run(settings(folder / "in", folder / "out", run__max_failed=1, **changes))
    except IncompleteRun as error:
        summary = error.summary  # type: ignore[attr-defined]
    dataset = pipeline.open_dataset(str(folder / "out"))
    table = dataset.table([*COLUMNS, "shard", "index"]).to_pylist()
    places = [(Path(row["shard"]).name, row["index"]) for row in table]
    refused = {(Path(row.shard).name, row.index): vars_of(row) for row in dataset.quarantine()}
    embeddings = dict(zip(places, dataset.to_numpy(), strict=True))
    return Finished(folder, summary, dict(zip(places, table, strict=True)), refused, embeddings)


def vars_of(row: Any) -> dict[str, Any]:
    return {name: getattr(row, name) for name in ("key", "stage", "error", "message")}


@pytest.fixture(scope="module")
def images(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """All of `IMAGES` in one tar, a good photograph after every few of them, and good ones under odd names."""
    hostile = [(f"{name}.{image.extension}", image.data) for name, image in IMAGES.items()]
    step = len(hostile) // len(GOOD)
    members = []
    for number, (name, photograph) in enumerate(GOOD.items()):
        last = None if number == len(GOOD) - 1 else step * (number + 1)
        members += [*hostile[step * number : last], (f"{name}.jpg", photograph)]
    members += [(f"{name}.jpg", data) for name, data in NAMED.items()]
    return finished(tmp_path_factory.mktemp("images"), {"images.tar": tar(members)}, source__format="webdataset")


@pytest.fixture(scope="module")
def alone(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The good photographs without the others."""
    members = [(f"{name}.jpg", photograph) for name, photograph in GOOD.items()]
    return finished(tmp_path_factory.mktemp("alone"), {"images.tar": tar(members)}, source__format="webdataset")


@pytest.fixture(scope="module")
def tars(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    files = {f"{name}{container.ending or '.tar'}": container.data for name, container in TARS.items()}
    return finished(tmp_path_factory.mktemp("tars"), files, source__format="webdataset")


@pytest.fixture(scope="module")
def parquets(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    files = {f"{name}.parquet": container.data for name, container in PARQUETS.items()}
    columns = {"source__label": "label", "source__key": "key", "source__image": "image"}
    return finished(tmp_path_factory.mktemp("parquets"), files, source__format="parquet", **columns)


# Images


@pytest.mark.parametrize("name", IMAGES)
def test_image_becomes_what_it_has_to(images: Finished, name: str) -> None:
    expected = IMAGES[name].expected
    rows = [row for row in images.rows.values() if row["key"] == name]
    refused = [row for row in images.quarantine.values() if row["key"] == name]
    if isinstance(expected, Row):
        assert refused == []
        assert [(row["width"], row["height"]) for row in rows] == [(expected.width, expected.height)]
    else:
        assert rows == []
        assert [(row["stage"], row["error"]) for row in refused] == [(expected.stage, expected.error)]
        assert refused[0]["message"]


@pytest.mark.filterwarnings("ignore")  # of PIL; a program has its filters from the import of the decoder, pytest resets them
@pytest.mark.parametrize("fast", [False, True], ids=["exact", "fast"])
@pytest.mark.parametrize("name", IMAGES)
def test_image_is_decoded_as_it_is_meant_or_refused_soon(name: str, fast: bool) -> None:
    expected, data = IMAGES[name].expected, IMAGES[name].data
    slot_HWC = torch.zeros(224, 224, 3, dtype=torch.uint8)
    decoder = Decoder(Preprocess(), fast=fast, max_pixels=100_000_000)
    with metered() as meter:
        try:
            outcome: Any = decoder(data, slot_HWC)
        except SampleError as error:
            outcome = error.stage, error.error
        seconds, num_bytes = meter()
    assert seconds < DECODE_LIMIT_S
    assert num_bytes < DECODE_LIMIT_BYTES
    if not isinstance(expected, Row):
        assert outcome == (expected.stage, expected.error)
        return
    assert outcome == (expected.width, expected.height)
    if expected.picture is not None:
        difference = abs(slot_HWC.numpy().astype(int) - shown(expected.picture()))
        assert difference.mean() <= 0.6
        assert difference.max() <= 8


def shown(image: Image.Image) -> NDArray[np.int64]:
    """What the presets of torchvision's weights make of it."""
    resized = preset.resize(image.convert("RGB"), [256], preset.InterpolationMode.BILINEAR, antialias=True)
    return np.asarray(preset.center_crop(resized, [224])).astype(np.int64)


def test_one_picture_in_many_wrappings_has_one_embedding(images: Finished) -> None:
    same = {name for name, image in IMAGES.items() if image.expected is PLAIN}
    embeddings_ND = np.stack([images.embeddings[place] for place, row in images.rows.items() if row["key"] in same])
    assert len(embeddings_ND) == len(same) > 10
    assert np.abs(embeddings_ND - embeddings_ND[0]).max() <= 1e-4 * np.abs(embeddings_ND).max()


def test_good_neighbours_are_what_they_are_alone(images: Finished, alone: Finished) -> None:
    among, apart = ({row["key"]: place for place, row in run.rows.items()} for run in (images, alone))
    assert apart.keys() == GOOD.keys() < among.keys()
    limit = 1e-4 * max(np.abs(each).max() for each in alone.embeddings.values())
    for key, place in apart.items():
        assert [images.rows[among[key]][name] for name in COLUMNS] == [alone.rows[place][name] for name in COLUMNS]
        assert np.abs(images.embeddings[among[key]] - alone.embeddings[place]).max() <= limit


def test_every_image_is_accounted_for(images: Finished) -> None:
    num_refused = sum(not isinstance(image.expected, Row) for image in IMAGES.values())
    (done,) = images.summary.extracted
    assert done.reconciles
    assert done.num_read == len(IMAGES) + len(GOOD) + len(NAMED) == done.num_rows + done.num_quarantined
    assert done.num_quarantined == num_refused == len(images.quarantine)
    assert images.summary.as_json()["images"]["quarantined"] == num_refused
    assert images.summary.num_actors_lost == 0


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_name_is_text_and_nothing_else(images: Finished, name: str) -> None:
    (row,) = [row for row in images.rows.values() if row["key"] == name]
    assert (row["width"], row["height"]) == (32, 24)


# Containers


def check(run: Finished, file: str, container: Container) -> None:
    (url, failure) = next(((url, why) for url, why in run.summary.failed.items() if Path(url).name == file), ("", None))
    if isinstance(container.expected, Failed):
        assert failure is not None
        assert url in failure
        assert container.expected.reason in failure
        assert run.samples(file) == []
    else:
        assert failure is None
        assert run.samples(file) == container.expected
        (done,) = [each for each in run.summary.extracted if Path(each.shard).name == file]
        assert done.reconciles
        assert done.num_read == len(container.expected)


@pytest.mark.parametrize("name", TARS)
def test_tar_becomes_what_it_has_to(tars: Finished, name: str) -> None:
    check(tars, f"{name}{TARS[name].ending or '.tar'}", TARS[name])


@pytest.mark.parametrize("name", PARQUETS)
def test_parquet_file_becomes_what_it_has_to(parquets: Finished, name: str) -> None:
    check(parquets, f"{name}.parquet", PARQUETS[name])


# What none of them may do


def test_nothing_is_created_but_the_dataset(images: Finished, tars: Finished, parquets: Finished) -> None:
    for run in (images, tars, parquets):
        files = [path.relative_to(run.folder) for path in run.folder.rglob("*") if path.is_file()]
        assert {path.parts[0] for path in files} == {"in", "out"}
        assert {path.parts[1] for path in files if path.parts[0] == "out"} == {"_delta_log", "data", "_runs"}
        assert not [path for path in files if path.parts[0] == "out" and "evil" in str(path)]
        assert len([path for path in files if path.parts[:2] == ("out", "data")]) == len(run.summary.extracted)
        beside = {path.name for path in run.folder.parent.iterdir()}
        assert not beside & {"above", "evil", "evil.jpg", "photo", "photo.jpg"}
    for path in ("/evil.jpg", "/evil", "/absolute", CANARY, f"{CANARY}.jpg"):
        assert not Path(path).exists()


def test_status_steers_no_terminal(tars: Finished) -> None:
    shown = cli("status", tars.folder / "out")
    assert shown.returncode == 0
    assert "quarantined" in shown.stdout
    assert not [each for each in shown.stdout + shown.stderr if not each.isprintable() and each != "\n"]
