"""The main job as its user sees it: files, rows and exit codes of whole runs."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from commands import ROOT, TESTS, cli, last_line
from conftest import crops, settings, write_shards
from helpers import actors_below
from PIL import Image
from sklearn.datasets import load_digits

import pipeline
from pipeline import driver
from pipeline.errors import BackboneError, BudgetExceeded, DatasetError, GuardError, IncompleteRun, SourceError


def test_quickstart_embeds_the_digits_and_does_nothing_the_second_time(tmp_path: Path) -> None:
    where = ["--set", f"source.url={tmp_path}/digits/*.tar", "--set", f"output.url={tmp_path}/out"]
    assert cli("demo", tmp_path / "digits").returncode == 0

    first = cli("run", "configs/quickstart.yaml", *where, "--json")
    report = last_line(first)
    assert first.returncode == 0, first.stderr
    assert report["images"] == {"total": 1797, "embedded": 1797, "carried_over": 0, "quarantined": 0}
    assert report["probe"]["test_accuracy"] >= 0.94
    assert report["version"] == 0
    page = Path(report["report"].removeprefix("file://"))
    assert page == tmp_path / "out" / "_runs" / report["run_id"] / "report.html"
    assert "<h2>Probe</h2>" in page.read_text() and page.stat().st_size < 10_000_000

    second = cli("run", "configs/quickstart.yaml", *where, "--json")
    again = last_line(second)
    assert second.returncode == 0
    assert again["images"]["embedded"] == 0
    assert (again["version"], again["committed"]) == (0, False)
    assert again["probe"] == report["probe"]
    assert again["report"] is None, "the page of this version is there"
    assert again["shards"] == {"total": 10, "extracted": 0, "adopted": 0, "unchanged": 10, "removed": 0, "failed": 0}

    spoken = cli("status", tmp_path / "out")
    assert "1,797" in spoken.stdout
    assert "python/pipeline.demo:efficientnet_lite0" in spoken.stdout
    assert last_line(cli("status", tmp_path / "out", "--json"))["rows"] == 1797


@pytest.mark.usefixtures("local_ray")
class TestRows:
    """What stands in the dataset."""

    def test_every_reader_sees_every_row(self, shards: Path, photographs: list[bytes], tmp_path: Path) -> None:
        driver.run(settings(f"{shards}/*.tar", tmp_path / "out"))
        dataset = pipeline.open_dataset(str(tmp_path / "out"))
        files = dataset.files()
        local = [file.removeprefix("file://") for file in files]

        assert sum(pq.read_table(file).num_rows for file in local) == len(photographs)
        frame = pl.read_parquet(local)
        assert frame.height == len(photographs)
        assert frame["embedding"].list.len().unique().to_list() == [32]
        ((rows, mean),) = duckdb.sql(f"select count(*), avg(embedding[1]) from read_parquet({local})").fetchall()
        assert rows == len(photographs)
        assert mean == pytest.approx(dataset.to_numpy()[:, 0].mean(), rel=1e-5)
        assert pl.read_delta(str(tmp_path / "out")).height == len(photographs)

    def test_rows_lead_back_to_their_images(self, shards: Path, photographs: list[bytes], tmp_path: Path) -> None:
        driver.run(settings(f"{shards}/*.tar", tmp_path / "out"))
        rows = pipeline.open_dataset(str(tmp_path / "out")).table().to_pylist()
        assert [row["key"] for row in rows] == [f"{number:05d}" for number in range(60)]
        assert [row["index"] for row in rows] == list(range(15)) * 4
        for row, photograph in zip(rows, photographs, strict=True):
            with open(row["url"].removeprefix("file://"), "rb") as file:
                file.seek(row["offset"])
                assert file.read(row["nbytes"]) == photograph
            assert row["label"] == int(row["key"]) % 2
            assert (row["width"], row["height"]) == (320, 240)

    def test_a_corrupt_image_among_a_thousand_costs_one_row(self, tmp_path: Path) -> None:
        images = _digits(1000)
        images[123] = images[123][:60]
        write_shards(tmp_path / "shards", images, 250, "png")
        summary = driver.run(settings(f"{tmp_path}/shards/*.tar", tmp_path / "out"))
        dataset = pipeline.open_dataset(str(tmp_path / "out"))
        assert len(dataset) == 999
        assert summary.as_json()["images"]["quarantined"] == 1
        (row,) = dataset.quarantine()
        assert (row.key, row.index, row.stage) == ("00123", 123, "decode")
        assert row.shard.endswith("/000.tar")
        assert row.message
        assert row.key not in set(dataset.keys())

    def test_too_many_bad_images_commit_nothing(self, tmp_path: Path) -> None:
        images = _digits(100)
        for number in range(11):
            images[number] = b"not a picture"
        write_shards(tmp_path / "shards", images, 50, "png")
        wanted = settings(f"{tmp_path}/shards/*.tar", tmp_path / "out")
        for _ in range(2):  # the second run adopts the partitions of the first, and still may not commit
            with pytest.raises(BudgetExceeded, match=r"11 of 100 .*max_failed = 0.01 allows 10"):
                driver.run(wanted)
            with pytest.raises(DatasetError, match="no dataset yet"):
                pipeline.open_dataset(str(tmp_path / "out"))
        counted = settings(f"{tmp_path}/shards/*.tar", tmp_path / "out", run__max_failed=0.2, run__max_failed_samples=10)
        with pytest.raises(BudgetExceeded, match=r"11 of 100 .*run.max_failed_samples = 10 allows 10"):
            driver.run(counted)
        allowed = settings(f"{tmp_path}/shards/*.tar", tmp_path / "out", run__max_failed=0.2)
        summary = driver.run(allowed)
        assert len(summary.adopted) == 2
        assert len(pipeline.open_dataset(str(tmp_path / "out"))) == 89

    def test_several_nodes_of_several_shapes(self, shards: Path, tmp_path: Path) -> None:
        nodes = {
            "pooled": {"node": "flatten", "normalize": "l2"},
            "plain": {"node": "flatten"},
            "map": {"node": "layer4", "pool": "mean"},
        }
        model = {"model": "torchvision/resnet18", "weights": "seed:0", "nodes": nodes}
        driver.run(settings(f"{shards}/000.tar", tmp_path / "out", backbone=model))
        dataset = pipeline.open_dataset(str(tmp_path / "out"))
        assert dataset.nodes == {"pooled": 512, "plain": 512, "map": 512}
        assert np.abs(np.linalg.norm(dataset.to_numpy("pooled"), axis=1) - 1).max() <= 1e-5
        assert np.allclose(dataset.to_numpy("plain"), dataset.to_numpy("map"), atol=1e-4)

    def test_half_precision_is_stored_rounded_and_small(self, shards: Path, tmp_path: Path) -> None:
        nodes = {"embedding": {"node": "flatten", "normalize": "l2"}}
        wide = {"model": "torchvision/resnet18", "weights": "seed:0", "nodes": nodes}
        sizes = {}
        for precision in ("float32", "bfloat16"):
            output = tmp_path / precision
            driver.run(settings(f"{shards}/*.tar", output, backbone=wide, run__precision=precision))
            dataset = pipeline.open_dataset(str(output))
            embeddings = dataset.to_numpy()
            sizes[precision] = sum(pq.read_metadata(f.removeprefix("file://")).row_group(0).column(12).total_compressed_size
                                   for f in dataset.files())  # fmt: skip
            assert np.abs(np.linalg.norm(embeddings, axis=1) - 1).max() <= (1e-5 if precision == "float32" else 2e-4)
        assert np.array_equal(embeddings, embeddings.astype(np.float16).astype(np.float32))
        assert sizes["bfloat16"] < 0.65 * sizes["float32"]

    def test_embeddings_that_are_not_finite_are_quarantined(self, tmp_path: Path) -> None:
        white = io.BytesIO()
        Image.new("RGB", (64, 64), "white").save(white, "PNG")
        write_shards(tmp_path / "shards", [*_digits(5), white.getvalue()], 10, "png")
        driver.run(settings(f"{tmp_path}/shards/*.tar", tmp_path / "out", backbone__model="python/models:explodes"))
        dataset = pipeline.open_dataset(str(tmp_path / "out"))
        assert len(dataset) == 5
        assert [(row.key, row.stage) for row in dataset.quarantine()] == [("00005", "embed")]


@pytest.mark.usefixtures("local_ray")
class TestFrozen:
    """Promise 1."""

    def test_rows_do_not_depend_on_batch_size_or_neighbours(self, shards: Path, tmp_path: Path) -> None:
        embeddings = {}
        for name, source, batch_size in (("a", "*.tar", 1), ("b", "*.tar", 64), ("alone", "002.tar", 5)):
            wanted = settings(f"{shards}/{source}", tmp_path / name, backbone__model="python/models:restless",
                              backbone__nodes={"embedding": {"node": "flatten"}}, run__batch_size=batch_size)  # fmt: skip
            driver.run(wanted)
            embeddings[name] = pipeline.open_dataset(str(tmp_path / name)).to_numpy()
        limit = 1e-4 * np.abs(embeddings["a"]).max()
        assert np.abs(embeddings["a"] - embeddings["b"]).max() <= limit
        assert np.abs(embeddings["a"][30:45] - embeddings["alone"]).max() <= limit

    def test_a_model_that_mixes_a_batch_is_refused(self, shards: Path, tmp_path: Path) -> None:
        with pytest.raises(GuardError, match="changes with its neighbours"):
            driver.run(settings(f"{shards}/*.tar", tmp_path / "out", backbone__model="python/models:batch_statistics"))

    def test_a_model_that_cannot_be_traced_works_through_its_submodules(self, shards: Path, tmp_path: Path) -> None:
        model = {
            "backbone__model": "python/models:untraceable",
            "backbone__nodes": {"embedding": {"node": "conv", "pool": "mean"}},
        }
        driver.run(settings(f"{shards}/000.tar", tmp_path / "out", **model))
        assert pipeline.open_dataset(str(tmp_path / "out")).to_numpy().shape == (15, 8)
        model["backbone__nodes"] = {"embedding": {"node": "convv"}}
        with pytest.raises(BackboneError, match=r"cannot be traced.*did you mean conv"):
            driver.run(settings(f"{shards}/000.tar", tmp_path / "out", **model))


@pytest.mark.usefixtures("local_ray")
class TestFaults:
    """What goes wrong costs what it must and no more."""

    def test_a_killed_actor_costs_no_row(self, tmp_path: Path) -> None:
        write_shards(tmp_path / "shards", crops(200), 10)
        model = {"model": "torchvision/resnet18", "weights": "seed:0", "nodes": {"embedding": {"node": "flatten"}}}

        class Killer:
            killed = 0

            def started(self, run_id: str) -> None: ...

            def planned(self, plan: Any) -> None: ...

            def note(self, text: str) -> None: ...

            def finished(self, result: Any, num_actors: int) -> None:
                if not self.killed:
                    (actor,) = actors_below([os.getpid()])
                    self.killed = actor.pid
                    actor.kill()

        killer = Killer()
        summary = driver.run(settings(f"{tmp_path}/shards/*.tar", tmp_path / "out", backbone=model), observer=killer)
        assert killer.killed
        assert summary.num_actors_lost == 1
        assert not summary.failed
        keys = pipeline.open_dataset(str(tmp_path / "out")).keys()
        assert sorted(keys) == [f"{number:05d}" for number in range(200)]

    def test_an_unreadable_shard_fails_alone(self, shards: Path, tmp_path: Path) -> None:
        folder = tmp_path / "shards"
        folder.mkdir()
        for tar in sorted(shards.glob("*.tar"))[:2]:
            (folder / tar.name).write_bytes(tar.read_bytes())
        (folder / "broken.tar").write_bytes(b"<html>no tar</html>" * 100)
        finished = cli("run", _config_file(tmp_path, f"{folder}/*.tar"), "--json")
        report = last_line(finished)
        assert finished.returncode == 1
        assert "broken.tar" in report["error"]
        assert report["shards"]["failed"] == 1
        assert "Traceback" not in finished.stderr
        assert len(pipeline.open_dataset(str(tmp_path / "out"))) == 30

    def test_a_shard_that_breaks_its_actor_is_named(self, tmp_path: Path) -> None:
        white = io.BytesIO()
        Image.new("RGB", (64, 64), "white").save(white, "PNG")
        write_shards(tmp_path / "shards", [*_digits(3), white.getvalue()], 10, "png")
        model = {"backbone__model": "python/models:breaks", "backbone__nodes": {"embedding": {"node": "pool"}}}
        with pytest.raises(IncompleteRun, match=r"1 of 1 shards failed .*000\.tar: its actor broke: the device fell over"):
            driver.run(settings(f"{tmp_path}/shards/*.tar", tmp_path / "out", **model))

    def test_an_empty_source_is_the_users_mistake(self, tmp_path: Path) -> None:
        (tmp_path / "readme.txt").write_text("no shards here")
        with pytest.raises(SourceError, match=r"source\.url.*holds nothing"):
            driver.run(settings(tmp_path, tmp_path / "out", source__format="webdataset"))

    def test_a_newer_format_is_refused(self, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pipeline.source.FORMAT_VERSION", 99)
        wanted = settings(f"{shards}/000.tar", tmp_path / "out")
        driver.run(wanted)
        monkeypatch.undo()
        with pytest.raises(DatasetError, match=r"format version 99, this program reads up to 1"):
            driver.run(wanted)


def test_two_logical_gpus_give_two_actors_with_a_gpu_each(tmp_path: Path) -> None:
    # Work for long enough that the second actor still finds some, however much later it starts.
    write_shards(tmp_path / "shards", crops(300), 10)
    script = f"""
import json, ray, sys
sys.path.insert(0, {str(TESTS)!r})
from conftest import settings
from pipeline import driver
ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
model = {{"model": "torchvision/resnet18", "weights": "seed:0", "nodes": {{"embedding": {{"node": "flatten"}}}}}}
summary = driver.run(settings({f"{tmp_path}/shards/*.tar"!r}, {str(tmp_path / "out")!r}, backbone=model))
print(json.dumps(summary.as_json()))
"""
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    actors = last_line(finished)["actors"]
    assert len(actors) == 2
    assert sorted(actor["cuda_visible_devices"] for actor in actors) == ["0", "1"]
    assert len({actor["pid"] for actor in actors}) == 2
    assert len(pipeline.open_dataset(str(tmp_path / "out"))) == 300


def test_light_imports() -> None:
    script = "import sys, pipeline, pipeline.cli; assert not {'torch', 'ray'} & set(sys.modules), 'heavy'"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0
    shown = cli("--help")
    assert shown.returncode == 0
    assert all(command in shown.stdout for command in ("demo", "run", "plan", "status", "schema"))


def test_mistakes_are_one_line_and_exit_2(tmp_path: Path) -> None:
    path = _config_file(tmp_path, f"{tmp_path}/nothing/*.tar")
    mistakes: list[list[str | Path]] = [
        ["run", tmp_path / "missing.yaml"],
        ["run", path, "--set", "run.batch_size=0"],
        ["run", path],
        ["plan", path],
        ["status", tmp_path / "nowhere"],
    ]
    for arguments in mistakes:
        finished = cli(*arguments, "--json")
        assert finished.returncode == 2, finished
        assert "Traceback" not in finished.stderr
        assert finished.stderr.count("error: ") == 1
        assert last_line(finished)["error"]


def test_plan_changes_nothing(shards: Path, tmp_path: Path) -> None:
    finished = cli("plan", _config_file(tmp_path, f"{shards}/*.tar"), "--json")
    assert finished.returncode == 0, finished.stderr
    assert last_line(finished)["shards"] == {
        "total": 4, "extract": 4, "new": 4, "changed": 0, "adopt": 0, "unchanged": 0, "removed": 0,
    }  # fmt: skip
    assert not (tmp_path / "out").exists()


def _digits(count: int) -> list[bytes]:
    images = load_digits().images
    encoded = []
    for number in range(count):
        file = io.BytesIO()
        Image.fromarray((images[number] * 15.9).astype("uint8")).resize((32, 32)).save(file, "PNG")
        encoded.append(file.getvalue())
    return encoded


def _config_file(folder: Path, source: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(
        f"source: {{url: '{source}', format: webdataset, label: cls}}\n"
        "backbone: {model: 'python/models:tiny', weights: 'seed:0', nodes: {embedding: {node: flatten}}}\n"
        f"output: {{url: '{folder}/out'}}\n"
    )
    return path
