"""What a run says and does about its own speed: the verdict in built cases, a device that is too small, the first batch."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bucket import Bucket
from commands import cli, last_line
from conftest import noise, settings, write_shards
from faults import FaultProxy, Request, Rule, delay
from PIL import Image
from s3 import S3Server

import pipeline
from pipeline import config
from pipeline.extract import aot
from pipeline.extract.backbone import Backbone, Spec

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3.endpoint_url) as proxy:
        yield proxy


def enlarged(photographs: list[bytes], side: int) -> list[bytes]:
    """The same photographs as a camera gives them: large."""
    large = []
    for encoded in photographs:
        file = io.BytesIO()
        Image.open(io.BytesIO(encoded)).convert("RGB").resize((side, side)).save(file, "JPEG", quality=95)
        large.append(file.getvalue())
    return large


def test_a_slow_decoder(tmp_path: Path, photographs: list[bytes]) -> None:
    write_shards(tmp_path / "source", enlarged(photographs, 2000), 30)
    summary = pipeline.run(settings(tmp_path / "source" / "*.tar", tmp_path / "output")).as_json()
    assert summary["bound_by"] == "decode"
    assert summary["busy"]["decode"] > summary["busy"]["forward"]


def test_a_heavy_model(tmp_path: Path, shards: Path) -> None:
    made = settings(shards / "*.tar", tmp_path / "output", backbone__model="python/models:heavy")
    summary = pipeline.run(made).as_json()
    assert summary["bound_by"] == "forward"
    assert summary["busy"]["forward"] > 0.5


@pytest.mark.parametrize("verdict", ["fetch", "write"])
def test_a_slow_store(s3: S3Server, proxy: FaultProxy, verdict: str) -> None:
    bucket = Bucket(s3, proxy.endpoint_url)
    bucket.fill(noise(240), 20)

    def is_slow(request: Request) -> bool:
        is_shard = request.method == "GET" and request.path.endswith(".tar")
        return is_shard if verdict == "fetch" else request.method == "PUT" and request.path.endswith(".parquet")

    proxy.add(Rule(is_slow, delay(1.0)))
    assert pipeline.run(bucket.config()).as_json()["bound_by"] == verdict


def test_a_batch_that_does_not_fit_is_halved_and_no_row_is_lost(tmp_path: Path, shards: Path) -> None:
    runs = {}
    for name, size in (("small", 4), ("large", 64)):
        made = settings(
            shards / "*.tar",
            tmp_path / name,
            run__batch_size=size,
            backbone__model="python/models:greedy",
            backbone__nodes={"embedding": {"node": "features", "pool": "mean"}},
        )
        runs[name] = pipeline.run(made)
    assert runs["large"].as_json()["actors"][0]["batch_size"] == 4
    rows = {name: pipeline.open_dataset(str(tmp_path / name)) for name in runs}
    assert rows["large"].keys() == rows["small"].keys() and len(rows["large"].keys()) == 60
    np.testing.assert_allclose(rows["large"].to_numpy(), rows["small"].to_numpy(), rtol=1e-4, atol=1e-5)


def test_a_summary_says_when_the_first_batch_was_done(tmp_path: Path, shards: Path) -> None:
    summary = pipeline.run(settings(shards / "*.tar", tmp_path / "output")).as_json()
    assert 0 < summary["first_batch_s"] < summary["seconds"]
    again = pipeline.run(settings(shards / "*.tar", tmp_path / "output")).as_json()
    assert again["first_batch_s"] is None and again["bound_by"] is None


def test_a_compiled_model_gives_equal_rows(tmp_path: Path, photographs: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_shards(tmp_path / "source", photographs * 4, 15)
    rows, chosen = {}, {}
    for mode in ("none", "compile"):
        path = tmp_path / f"{mode}.yaml"
        made = settings(
            tmp_path / "source" / "*.tar", tmp_path / mode, backbone__model="python/models:heavy", run__optimize=mode
        )
        path.write_text(config.dump(made))
        if mode == "compile":  # as an earlier run leaves it
            spec = Spec(backbone=made.backbone, decode="exact", precision="float32")
            recipe_id = Backbone(spec).recipe.recipe_id
            order = aot.Order(spec=spec, recipe_id=recipe_id, device="cpu", batch_size=16)
            assert aot.compiled(order) is not None
        done = cli("run", str(path), "--json")
        assert done.returncode == 0, done.stderr
        chosen[mode] = last_line(done)["actors"][0]
        rows[mode] = pipeline.open_dataset(str(tmp_path / mode))
    assert [(each["model"], each["batch_size"]) for each in chosen.values()] == [("eager", 16), ("compiled", 16)]
    assert chosen["compile"]["model_because"] == "the config says so"
    assert rows["none"].keys() == rows["compile"].keys()
    found, expected = rows["compile"].to_numpy(), rows["none"].to_numpy()
    assert abs(found - expected).max() <= 1e-4 * abs(expected).max()
    assert not np.array_equal(found, expected), "the compiled program made some of the rows"
