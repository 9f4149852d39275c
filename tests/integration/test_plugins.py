"""A format and a provider of an installed package of somebody else, in a real run: nothing of ours knows their names."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import ROOT, TESTS, cli, invoke, last_line
from conftest import crops

import pipeline

FORMAT = '''
"""Zip archives of images that are stored, not compressed."""
import zipfile

import pyarrow as pa

from pipeline.source.sample import Sample, Shard, Suggestion

TRUE_HEADER = 30


def fields(source, store):
    return []


def suggest(source, store):
    return Suggestion(fields={}, notes=[])


def shards(source, store):
    for url in source.urls:
        for file in store.list(url):
            if file.url.endswith(".zip"):
                yield Shard(url=file.url, files=(file,))


def read(source, store, shard):
    with store.open(shard.files[0]) as handle, zipfile.ZipFile(handle) as archive:
        for index, info in enumerate(archive.infolist()):
            start = info.header_offset + TRUE_HEADER + len(info.filename)
            image = archive.read(info)
            yield Sample(key=info.filename, index=index, url=shard.url, image=image, offset=start, nbytes=len(image))
'''
PROVIDER = """
from torch import nn

from pipeline.config import Preprocess
from pipeline.errors import BackboneError


def build(name, settings):
    if name != "pool":
        raise BackboneError(f"backbone.model: pooling has no model {name!r}")
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten()), Preprocess(resize=32, crop=32), True
"""
ENTRY_POINTS = """
[frozen_pipeline.sources]
zip = zippy.archives
torn = zippy.missing

[frozen_pipeline.backbones]
pooling = zippy.models:build
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pip would have put the package."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "zippy").mkdir()
    (folder / "zippy" / "__init__.py").touch()
    (folder / "zippy" / "archives.py").write_text(FORMAT)
    (folder / "zippy" / "models.py").write_text(PROVIDER)
    (folder / "zippy-1.0.dist-info").mkdir()
    (folder / "zippy-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: zippy\nVersion: 1.0\n")
    (folder / "zippy-1.0.dist-info" / "entry_points.txt").write_text(ENTRY_POINTS)
    return folder


def config(folder: Path, **changes: str) -> Path:
    raw = {
        "source": {"url": str(folder / "in"), "format": changes.get("format", "zip")},
        "backbone": {
            "model": changes.get("model", "pooling/pool"),
            "weights": "builtin",
            "nodes": {"embedding": {"node": "1"}},
        },
        "output": {"url": str(folder / "out")},
        "run": {"report": False},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    return folder / "config.yaml"


def path(site: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS), str(site)])}


def test_a_run(site: Path, tmp_path: Path) -> None:
    images = crops(6)
    (tmp_path / "in").mkdir()
    with zipfile.ZipFile(tmp_path / "in" / "a.zip", "w", zipfile.ZIP_STORED) as archive:
        for number, image in enumerate(images):
            archive.writestr(f"{number}.jpg", image)
    finished = cli("run", config(tmp_path), "--json", env=path(site))
    assert finished.returncode == 0, finished.stderr
    assert last_line(finished)["images"]["embedded"] == 6
    dataset = pipeline.open_dataset(str(tmp_path / "out"))
    keys = dataset.keys()
    assert keys == [f"{number}.jpg" for number in range(6)]
    assert [dataset.image(key) for key in keys] == images
    assert dataset.to_numpy().shape == (6, 48) and np.isfinite(dataset.to_numpy()).all()
    assert dataset.recipe["model"] == "pooling/pool"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "rar"}, "allowed: auto, webdataset, parquet, files, torn, zip"),
        ({"format": "torn"}, "frozen_pipeline.sources: torn (zippy.missing) cannot be imported: ModuleNotFoundError"),
        ({"model": "other/pool"}, "allowed are torchvision/NAME, timm/NAME, python/module:function, pooling/NAME"),
        ({"model": "pooling/none"}, "pooling has no model 'none'"),
    ],
)
def test_mistakes(site: Path, tmp_path: Path, changes: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    with zipfile.ZipFile(tmp_path / "in" / "a.zip", "w") as archive:
        archive.writestr("0.jpg", crops(1)[0])
    monkeypatch.syspath_prepend(str(site))
    finished = invoke("plan", config(tmp_path, **changes), "--json")
    assert finished.returncode == 2, finished.stderr
    assert message in last_line(finished)["error"]
