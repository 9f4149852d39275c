"""`pipeline search` as a user sees it, on a dataset that a run made."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from bucket import Bucket
from commands import cli, last_line
from conftest import noise, settings
from s3 import S3Server
from typer.testing import CliRunner

import pipeline
from pipeline import driver
from pipeline.cli import app


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, shards: Path, local_ray: None) -> Path:
    """The 60 photographs, whose label is their number modulo 2."""
    output = tmp_path_factory.mktemp("searched") / "out"
    driver.run(settings(f"{shards}/*.tar", output))
    return output


def test_an_image_of_the_dataset_is_its_own_nearest_neighbour(output: Path, photographs: list[bytes], tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.jpg" for number in (17, 4)]
    for file, number in zip(files, (17, 4), strict=True):
        file.write_bytes(photographs[number])
    page = tmp_path / "page.html"
    finished = cli("search", output, "--image", files[0], "--image", files[1], "-k", "3", "--page", page, "--json")
    assert finished.returncode == 0, finished.stderr
    report = last_line(finished)
    assert {name: report[name] for name in ("output", "version", "rows", "node", "metric", "k", "where", "page")} == {
        "output": str(output), "version": 0, "rows": 60, "node": "embedding", "metric": "cosine", "k": 3, "where": [],
        "page": str(page),
    }  # fmt: skip
    assert [query["query"] for query in report["queries"]] == [str(file) for file in files]
    for query, number in zip(report["queries"], (17, 4), strict=True):
        first = query["neighbours"][0]
        assert (first["key"], first["label"], first["index"]) == (f"{number:05d}", number % 2, number % 15)
        assert first["score"] == pytest.approx(1, abs=1e-5)
        assert len(query["neighbours"]) == 3
    html = page.read_text()
    assert html.count("data:image/jpeg;base64,") == 2 * (1 + 3)
    assert "<script" not in html


def test_a_row_and_a_filter(output: Path) -> None:
    finished = cli("search", output, "--key", "00007", "-k", "4", "--where", "label=0", "--where", "key<00040")
    assert finished.returncode == 0, finished.stderr
    dataset = pipeline.open_dataset(str(output))
    scores = (dataset.to_numpy() / np.linalg.norm(dataset.to_numpy(), axis=1, keepdims=True)) @ dataset.to_numpy()[7]
    expected = [f"{row:05d}" for row in np.argsort(-scores) if row % 2 == 0 and row < 40][:4]
    lines = finished.stdout.splitlines()
    table = [line.split() for line in lines[lines.index(next(line for line in lines if line.startswith("key "))) + 1 :]]
    assert [row[0] for row in table] == expected
    assert [row[2] for row in table] == ["0"] * 4
    assert "where label=0 and key<00040" in finished.stdout
    none = cli("search", output, "--key", "00007", "--where", "label=9", "--json")
    assert last_line(none)["queries"] == [{"query": "00007", "neighbours": []}]


def test_vectors_against_a_dataset_in_a_store(s3: S3Server, local_ray: None, tmp_path: Path) -> None:
    bucket = Bucket(s3)
    bucket.fill(noise(20), 10)
    driver.run(bucket.config())
    np.save(tmp_path / "q.npy", np.eye(3, 32))
    bucket.fs.put_file(str(tmp_path / "q.npy"), f"{bucket.name}/q.npy")
    environment = {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key}
    options = ["--endpoint-url", s3.endpoint_url, "--metric", "inner", "--json"]
    page = f"s3://{bucket.name}/page.html"
    finished = cli("search", bucket.output, "--vectors", f"s3://{bucket.name}/q.npy", "--page", page, *options, env=environment)
    assert finished.returncode == 0, finished.stderr
    report = last_line(finished)
    embeddings = pipeline.open_dataset(bucket.output, storage=bucket.config().output.storage).to_numpy()
    for number, query in enumerate(report["queries"]):
        assert [row["score"] for row in query["neighbours"]] == sorted(embeddings[:, number].tolist(), reverse=True)[:10]
    assert bucket.fs.cat_file(f"{bucket.name}/page.html").count(b"data:image/jpeg") == 30


def test_mistakes_are_one_line_and_exit_2(output: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "narrow.npy", np.ones((2, 5), np.float32))
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    mistakes: list[tuple[list[str | Path], str]] = [
        ([], "give one of --image, --key (either may be repeated) or --vectors"),
        (["--key", "00001", "--vectors", "x.npy"], "give one of"),
        (["--key", "zzz"], "version 0 has no key 'zzz'"),
        (["--key", "00001", "--version", "7"], "there is no version 7"),
        (["--key", "00001", "--node", "x"], "there is no embedding column 'x'; it has embedding"),
        (["--key", "00001", "-k", "0"], "k: 0 is not allowed; at least 1"),
        (["--key", "00001", "--metric", "l2"], "metric: 'l2' is not allowed; allowed: cosine, inner"),
        (["--key", "00001", "--where", "label=x"], "where: 'label=x': 'x' is not allowed; label is int64"),
        (["--vectors", tmp_path / "narrow.npy"], "vectors: shape (2, 5) does not fit"),
        (["--vectors", tmp_path / "missing.npy"], "missing.npy: there is no such file"),
        (["--image", tmp_path / "broken.jpg"], "broken.jpg: not a picture in any of JPEG"),
    ]
    for arguments, message in mistakes:
        finished = CliRunner().invoke(app, ["search", str(output), *map(str, arguments), "--json"])
        assert finished.exit_code == 2, finished.output
        assert message in json.loads(finished.stdout.splitlines()[-1])["error"]
        assert finished.stderr.count("\n") == finished.stderr.count("error: ") == 1


def test_names_that_would_steer_a_terminal(output: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "q.npy", np.ones(32))
    shown = cli("search", output, "--vectors", tmp_path / "q.npy", "--where", "key!=[red]\x1b[31m")
    assert shown.returncode == 0, shown.stderr
    assert "\x1b" not in shown.stdout
    assert r"key!=[red]\x1b[31m" in shown.stdout
