"""`pipeline init`: what it finds in sources of every layout, and that a run can begin with what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import invoke, last_line
from conftest import crops, shard_members, tar_bytes

import pipeline
from pipeline import config, driver

MODEL = ("--model", "python/models:tiny", "--weights", "seed:0")


def init(source: Path | str, to: Path, *arguments: str) -> tuple[dict[str, Any], config.Config]:
    """What it says, and the config that it wrote."""
    finished = invoke("init", source, "--to", to, *arguments, "--json")
    assert finished.returncode == 0, finished.stderr
    return last_line(finished), config.load(to)


def tars(folder: Path, **siblings: Any) -> Path:
    """Two tars of six samples; each sibling is made from the sample's number."""
    folder.mkdir()
    for number in range(2):
        members = {}
        for each in range(6):
            members[f"{number}{each}.jpg"] = crops(6)[each]
            members |= {f"{number}{each}.{name}": make(each).encode() for name, make in siblings.items()}
        (folder / f"{number}.tar").write_bytes(tar_bytes(members))
    return folder


def test_tars_with_classes(tmp_path: Path) -> None:
    found, written = init(tars(tmp_path / "shards", cls=lambda each: str(each % 2)), tmp_path / "c.yaml")
    assert (found["format"], found["label"], found["shards"]) == ("webdataset", "cls", 2)
    assert (written.source.format, written.source.label, written.source.label_type) == ("webdataset", "cls", None)
    assert written.decode == "exact" and written.probe is not None
    assert written.output.url == "data/shards-resnet50"
    (tmp_path / "words").mkdir()
    _, written = init(tars(tmp_path / "words" / "in", cls=lambda each: "cat"), tmp_path / "w.yaml")
    assert (written.source.label, written.source.label_type) == ("cls", "string")


def test_labels_within_json_and_no_label_at_all(tmp_path: Path) -> None:
    source = tars(tmp_path / "shards", json=lambda each: json.dumps({"author": "x", "category": f"c{each}"}))
    assert init(source, tmp_path / "a.yaml")[1].source.label == "json.category"
    found, written = init(tars(tmp_path / "plain", txt=str), tmp_path / "b.yaml")
    assert (found["label"], written.source.label, written.probe) == (None, None, None)


def test_parquet_columns_by_type_and_name(tmp_path: Path) -> None:
    images = crops(4, size=(1200, 1100))
    columns = {"thumb": images, "Image": [{"bytes": each, "path": "x"} for each in images], "id": [1, 1, 2, 3],
               "file_name": list("abcd"), "category": ["u", "v", "u", "v"], "score": [0.5] * 4}  # fmt: skip
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "in" / "0.parquet")
    found, written = init(tmp_path / "in", tmp_path / "c.yaml")
    assert (written.source.format, written.source.image) == ("parquet", "Image")
    assert (written.source.key, written.source.label) == ("file_name", "category"), "ids come twice"
    assert (found["width"], found["height"], written.decode) == (1200, 1100, "fast")


def test_a_run_begins_with_what_it_wrote(tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, image in enumerate(crops(12)):
        (tmp_path / "photos" / f"class {number % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / f"class {number % 2}" / f"{number}.jpg").write_bytes(image)
    found, written = init("photos", tmp_path / "config.yaml", *MODEL)
    assert (found["format"], found["label"]) == ("files", "folder")
    plan = invoke("plan", tmp_path / "config.yaml", "--json")
    assert plan.returncode == 0 and last_line(plan)["shards"]["extract"] == found["shards"]
    driver.run(written.model_copy(update={"probe": None}))
    dataset = pipeline.open_dataset(str(tmp_path / written.output.url))
    assert sorted(dataset.table(["label"]).column("label").to_pylist()) == ["class 0"] * 6 + ["class 1"] * 6


def test_what_is_shown_says_what_to_do_next(tmp_path: Path) -> None:
    finished = invoke("init", tars(tmp_path / "in", cls=str), "--to", tmp_path / "c.yaml")
    assert finished.returncode == 0
    assert f"pipeline run {tmp_path}/c.yaml" in " ".join(finished.stdout.split())
    assert "label: cls, such as 0, 1, 2" in finished.stdout


@pytest.mark.parametrize(
    ("files", "arguments", "message"),
    [
        ({}, [], "there is no such file or folder"),
        ({"in/a.txt": b"x", "in/b.csv": b"y"}, [], "holds no images and no shards, only 1 .txt, 1 .csv; looked for .tar"),
        ({"in/a.jpg": b"x", "c.yaml": b"mine"}, [], "is there already; --overwrite replaces it"),
        ({"in/a.jpg": b"x"}, ["--label", "cls"], "source.label: 'cls' is wrong for loose files; allowed: folder"),
        ({"in/a.jpg": b"x"}, ["--weights", "DEFAULT"], "name the weights themselves"),
        ({"in/a.parquet": b"x" * 100}, [], "not a readable Parquet file"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, files: dict[str, bytes], arguments: list[str], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    finished = invoke("init", tmp_path / "in", "--to", tmp_path / "c.yaml", *arguments, "--json")
    assert finished.returncode in (1, 2)
    assert message in last_line(finished)["error"]
    assert (tmp_path / "c.yaml").exists() == ("c.yaml" in files), "nothing is left, and nothing overwritten"
    if "c.yaml" in files:
        assert (tmp_path / "c.yaml").read_bytes() == b"mine"


def test_shards_of_members_with_several_images(tmp_path: Path) -> None:
    members = {}
    for name, image in shard_members(crops(6), 0, "jpg").items():
        members[name] = image
        if name.endswith(".jpg"):
            members[name.replace(".jpg", ".mask.png")] = image
            members[name.replace(".jpg", ".png")] = image
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    _, written = init(tmp_path / "a.tar", tmp_path / "c.yaml")
    assert written.source.image in ("jpg", "png")
