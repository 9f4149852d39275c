"""A saved probe applied to a dataset: the file that comes of it, and probes that do not fit."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

import pipeline
from pipeline import config
from pipeline.analysis import probe
from pipeline.analysis.probe import predict
from pipeline.analysis.probe.head import Head
from pipeline.dataset.read import Dataset
from pipeline.errors import ConfigError, DatasetError, StorageError
from pipeline.storage import Store

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dataset(embedded: str) -> Dataset:
    return pipeline.open_dataset(embedded)


@pytest.fixture(scope="module", params=["zscore", "l2"])
def head(embedded: str, request: pytest.FixtureRequest) -> Head:
    return probe.train(embedded, None, config.Storage(), config.Probe(normalize=request.param)).head


def test_the_file_has_what_the_probe_makes_of_every_row(dataset: Dataset, head: Head, tmp_path: Path) -> None:
    url = str(tmp_path / "predictions.parquet")
    report = predict.predict(head, dataset, Store(), url)
    features = dataset.to_numpy("small")
    if head.normalize == "l2":
        features = features / np.linalg.norm(features, axis=1, keepdims=True)
    logits = features.astype(np.float64) @ head.weight.T + head.bias
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)

    table = pq.read_table(url)
    assert table.schema.names == ["key", "shard", "predicted", "probability", "label"]
    assert [str(kind) for kind in table.schema.types] == ["string", "string", "int64", "float", "int64"]
    own = dataset.table(["key", "shard", "label"])
    for name in own.schema.names:
        assert table.column(name).to_pylist() == own.column(name).to_pylist(), name
    second, first = np.sort(probabilities, axis=1)[:, -2:].T
    clear = first - second > 0.01  # than float32 can tell
    predicted = np.array(table.column("predicted"))
    assert np.array_equal(predicted[clear], logits.argmax(1)[clear]) and clear.mean() > 0.9, "classes are 0 to 9"
    assert np.allclose(table.column("probability").to_numpy(), probabilities.max(1), atol=1e-3)

    assert report["rows"] == report["num_labelled"] == 260
    assert report["num_agreeing"] == (predicted == np.array(own.column("label"))).sum()
    assert report["mean_probability"] == pytest.approx(probabilities.max(1).mean(), rel=1e-3)
    counted = zip(*(part.tolist() for part in np.unique(predicted, return_counts=True)), strict=True)
    assert {each["class"]: each["rows"] for each in report["predicted"]} == dict(counted)


def test_csv_says_the_same(dataset: Dataset, head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predict.predict(head, dataset, Store(), str(tmp_path / "whole.parquet"))
    monkeypatch.setattr(predict, "ROWS_AT_ONCE", 37)
    report = predict.predict(head, dataset, Store(), str(tmp_path / "pieces.csv"))
    assert report["rows"] == 260
    text = pa_csv.ConvertOptions(column_types={"key": pa.string()})
    table = pa_csv.read_csv(tmp_path / "pieces.csv", convert_options=text)
    whole = pq.read_table(tmp_path / "whole.parquet")
    for name in ("key", "shard", "predicted", "label"):
        assert table.column(name).to_pylist() == whole.column(name).to_pylist(), name
    assert np.allclose(table.column("probability"), whole.column("probability"), atol=1e-3)


def test_classes_may_be_texts_and_labels_missing(dataset: Dataset, head: Head, tmp_path: Path) -> None:
    named = dataclasses.replace(head, classes=[f"digit {label}" for label in head.classes], label="breed")
    report = predict.predict(named, dataset, Store(), str(tmp_path / "out.parquet"))
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.schema.names == ["key", "shard", "predicted", "probability"]
    assert set(table.column("predicted").to_pylist()) <= set(named.classes)
    assert report["num_labelled"] == 0


def test_features_to_predictions_needs_no_dataset(head: Head) -> None:
    features = np.random.default_rng(0).normal(size=(7, 32)).astype(np.float32)
    found = predict.predictions(head, features)
    assert found["predicted"].to_pylist() == head.predict(features)[0].tolist()
    assert np.allclose(found["probability"], head.predict(features)[1].max(1))
    assert len(predict.predictions(head, features[:0])["predicted"]) == 0


def test_a_file_is_there_whole_or_not_at_all(embedded: str, head: Head, tmp_path: Path) -> None:
    shutil.copytree(embedded, tmp_path / "out")
    damaged = pipeline.open_dataset(str(tmp_path / "out"))
    Path(damaged.files()[1].removeprefix("file://")).unlink()
    for name in ("predictions.parquet", "predictions.csv"):
        with pytest.raises(StorageError):
            predict.predict(head, damaged, Store(), str(tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"node": "middle"}, "the probe is for the column 'middle'; version 0 has small, large"),
        ({"node": "large"}, "the probe was trained on other embeddings than those in 'large' of version 0: width: 32 -> 64; "),
        (
            {"recipe": {"weights_digest": "0" * 32}},
            "the probe was trained on other embeddings than those in 'small' of version 0: ",
        ),
    ],
)
def test_probes_for_other_embeddings_are_refused(dataset: Dataset, head: Head, changes: dict[str, str], message: str) -> None:
    if "recipe" in changes:
        changes = {"recipe": {**head.recipe, **changes["recipe"]}}
        message += "weights_digest: 0{32} -> "
    with pytest.raises(DatasetError, match=message):
        predict.predict(dataclasses.replace(head, **changes), dataset, Store())


def test_another_column_name_for_the_same_node_is_the_same(dataset: Dataset, head: Head) -> None:
    assert "weights" not in head.recipe, "where they lie does not matter"
    assert head.recipe["node"] == dataset.recipe["nodes"]["small"]
    assert "nodes" not in head.recipe


def test_only_parquet_and_csv(dataset: Dataset, head: Head, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--to: .*out\.txt: give the URL of a \.parquet or \.csv file"):
        predict.predict(head, dataset, Store(), str(tmp_path / "out.txt"))
