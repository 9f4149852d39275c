"""`pipeline embed`: new images with a dataset's recipe, as a user sees it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from bucket import Bucket
from commands import cli, invoke, last_line
from conftest import noise, settings, shard_members, tar_bytes
from quick import committed
from s3 import S3Server

import pipeline
from pipeline.cli import embed

IMAGES = noise(6)
NODES = {"raw": {"node": "flatten"}, "unit": {"node": "flatten", "normalize": "l2"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset `out`, and in `new` its images as files, one of them in a folder of its own and one that is broken."""
    folder = tmp_path_factory.mktemp("embed")
    (folder / "a.tar").write_bytes(tar_bytes(shard_members(IMAGES, 0)))
    committed(settings(f"{folder}/*.tar", folder / "out", backbone__nodes=NODES))
    (folder / "new" / "more").mkdir(parents=True)
    for number, image in enumerate(IMAGES[:4]):
        (folder / "new" / f"{number}.png").write_bytes(image)
    (folder / "new" / "more" / "4.png").write_bytes(IMAGES[4])
    (folder / "new" / "3.png").write_bytes(b"no image")
    (folder / "new" / "notes.txt").write_text("no image either")
    return folder


def test_a_folder_into_parquet(folder: Path) -> None:
    new = folder / "new"
    done = cli("embed", folder / "out", new, new / "1.png", "--to", folder / "new.parquet", "--json")
    report = last_line(done)
    assert done.returncode == 1, "one could not be embedded"
    assert done.stderr == "error: 1 of 5 images could not be embedded\n"
    assert (report["embedded"], report["version"], report["to"]) == (4, 0, str(folder / "new.parquet"))
    (failed,) = report["failed"]
    assert (failed["key"], failed["stage"], failed["error"]) == ("3.png", "decode", "NotAnImage")

    table = pq.read_table(folder / "new.parquet")
    assert table.schema.names == ["key", "url", "raw", "unit"]
    assert table.column("key").to_pylist() == ["0.png", "1.png", "2.png", "more/4.png"]
    assert table.column("url").to_pylist()[3] == f"file://{new}/more/4.png"
    dataset = pipeline.open_dataset(str(folder / "out"))
    for name in NODES:
        expected = dataset.to_numpy(name)[[0, 1, 2, 4]]
        assert abs(np.array(table.column(name).to_pylist()) - expected).max() <= 1e-4 * abs(expected).max()
    assert json.loads(table.schema.metadata[b"pipeline"])["recipe"] == dataset.recipe


def test_one_column_into_npy_beside_its_keys(folder: Path) -> None:
    done = invoke("embed", folder / "out", f"{folder}/new/[0-2].png", "--to", folder / "new.npy", "--node", "unit")
    assert (done.returncode, done.stdout) == (0, f"embedded  3 images: {folder}/new.npy\n")
    rows = np.load(folder / "new.npy")
    expected = pipeline.open_dataset(str(folder / "out")).to_numpy("unit")[:3]
    assert rows.dtype == np.float32
    assert abs(rows - expected).max() <= 1e-4 * abs(expected).max()
    assert json.loads((folder / "new.keys.json").read_text()) == ["0.png", "1.png", "2.png"]


def test_without_a_file_they_are_printed(folder: Path) -> None:
    report = last_line(
        invoke("embed", folder / "out", folder / "new" / "2.png", folder / "new" / "0.png", "--node", "raw", "--json")
    )
    assert [each["key"] for each in report["images"]] == ["2.png", "0.png"]
    expected = pipeline.open_dataset(str(folder / "out")).to_numpy("raw")[[2, 0]]
    assert abs(np.array([each["raw"] for each in report["images"]]) - expected).max() <= 1e-4 * abs(expected).max()
    assert (report["embedded"], report["failed"]) == (2, [])
    spoken = invoke("embed", folder / "out", folder / "new" / "0.png", folder / "new" / "3.png")
    assert spoken.returncode == 1
    lines = spoken.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["embedded", "raw", "unit", "failed"]
    assert lines[1].endswith(f", …]  file://{folder}/new/0.png")
    assert f"{folder}/new/3.png: " in lines[3]


def test_mistakes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "MAX_PRINTED", 2)
    out, new = folder / "out", folder / "new"
    cases = [
        ((out, new, "--to", "x.csv"), "--to: 'x.csv' is wrong; allowed: a name that ends in .parquet or .npy"),
        ((out, new, "--to", tmp_path / "x.npy"), "--node: missing; a .npy holds one column: raw, unit"),
        ((out, new, "--node", "x"), "--node: there is no embedding column 'x'; it has raw, unit"),
        ((out, new), "--to: missing; it is required for more than 2 images, and these are 5"),
        ((out, new / "notes.txt"), f"{new}/notes.txt: there is no image here: no name ends in bmp, "),
        ((out, new / "gone.png"), f"{new}/gone.png: there is no such file or folder"),
        ((out, "http://me:secret@host/a.png"), "IMAGES: a URL is neither empty nor holds credentials"),
        ((out, new / "0.png", "--version", "7"), "there is no version 7"),
        ((tmp_path, new / "0.png"), "there is no dataset yet"),
    ]
    for arguments, message in cases:
        refused = invoke("embed", *arguments)
        assert refused.returncode == 2, arguments
        assert message in refused.stderr, arguments
        assert "secret" not in refused.stderr
        assert refused.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_on_a_real_store(s3: S3Server, folder: Path) -> None:
    bucket = Bucket(s3)
    for number in range(3):
        bucket.fs.pipe_file(f"{bucket.name}/new/{number}.png", IMAGES[number])
    to = f"s3://{bucket.name}/new.parquet"
    images = f"s3://{bucket.name}/new/*.png"
    done = invoke("embed", folder / "out", images, "--to", to, "--endpoint-url", s3.endpoint_url, "--json", env=s3.env())
    assert last_line(done)["embedded"] == 3
    with bucket.fs.open(f"{bucket.name}/new.parquet") as file:
        assert pq.read_table(file).column("key").to_pylist() == ["0.png", "1.png", "2.png"]
