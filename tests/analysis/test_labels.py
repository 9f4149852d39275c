"""Labels, groups and parts out of a real dataset, and out of files that are joined to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline
from pipeline import config
from pipeline.analysis import probe
from pipeline.analysis.probe import labels
from pipeline.dataset.read import Dataset
from pipeline.errors import ConfigError, DatasetError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dataset(embedded: str) -> Dataset:
    return pipeline.open_dataset(embedded)


@pytest.fixture(scope="module")
def rows(dataset: Dataset) -> list[dict[str, object]]:
    return list(dataset.table(["key", "label", "patient", "part", "content_hash"]).to_pylist())


def write_csv(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_columns_of_the_dataset(dataset: Dataset, rows: list[dict[str, object]]) -> None:
    found = labels.read(dataset, config.Probe(group="patient", split="part"))
    assert found.index.tolist() == list(range(260))
    assert found.labels == [row["label"] for row in rows]
    assert found.content_hashes == [row["content_hash"] for row in rows]
    assert found.groups == [row["patient"] for row in rows]
    assert found.given == [row["part"] for row in rows]
    assert (found.num_unlabelled, found.num_unmatched_keys, found.warnings) == (0, 0, [])


@pytest.mark.parametrize("extension", ["csv", "parquet"])
def test_a_file_gives_the_same_as_the_column(
    dataset: Dataset, rows: list[dict[str, object]], tmp_path: Path, extension: str
) -> None:
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    table = pa.table({
        "digit": pa.array([f"digit {rows[row]['label']}" for row in order]).dictionary_encode(),
        "name": [rows[row]["key"] for row in order],
        "who": [rows[row]["patient"] for row in order],
    })  # fmt: skip
    url = tmp_path / f"labels.{extension}"
    if extension == "parquet":
        pq.write_table(table, url)
    else:
        table.to_pandas().to_csv(url, index=False)
    settings = config.Probe(labels=str(url), labels_key="name", label="digit", group="who", split="part")
    found, own = labels.read(dataset, settings), labels.read(dataset, config.Probe(group="patient", split="part"))
    assert found.labels == [f"digit {label}" for label in own.labels]
    for name in ("content_hashes", "groups", "given", "num_unlabelled"):
        assert getattr(found, name) == getattr(own, name), name


def test_a_file_for_some_rows_and_for_others_that_are_not_there(dataset: Dataset, tmp_path: Path) -> None:
    text = "key,label\n" + "".join(f"{row:05d},{'NA' if row % 2 else 'null'}\n" for row in range(50, 90))
    text += "00100,\n00101,\nno such key,NA\n77,NA\n00050,null\n"
    found = labels.read(dataset, config.Probe(labels=write_csv(tmp_path / "labels.csv", text)))
    assert found.index.tolist() == list(range(50, 90))
    assert set(found.labels) == {"NA", "null"}, "these may be names; only what is empty is missing"
    assert (found.num_unlabelled, found.num_unmatched_keys) == (220, 2)


def test_features_of_unlabelled_rows_are_not_kept(embedded: str, dataset: Dataset, tmp_path: Path) -> None:
    text = "key,label\n" + "".join(f"{row:05d},{row % 2}\n" for row in range(195, 240))
    settings = config.Probe(labels=write_csv(tmp_path / "labels.csv", text), normalize="none")
    found = probe.train(embedded, None, config.Storage(), settings)
    assert [found.metrics[name] for name in ("num_unlabelled", "num_unmatched_keys", "version")] == [215, 0, 0]
    whole = dataset.to_numpy("small")
    index = np.arange(195, 240)
    assert np.array_equal(dataset.to_numpy("small", index), whole[index])
    assert np.array_equal(dataset.to_numpy("small", index[5:]), whole[200:240]), "all of the second shard"
    assert dataset.to_numpy("small", index[:0]).shape == (0, 32)
    same = probe.fit(
        whole[index], [row % 2 for row in index], dataset.table(["content_hash"])[0].to_pylist()[195:240], settings
    )
    assert np.array_equal(found.head.weight, same.head.weight)


def test_numbers_are_numbers_and_keys_are_texts(dataset: Dataset, tmp_path: Path) -> None:
    text = "label,key\n3,00007\n5,00008\n"
    found = labels.read(dataset, config.Probe(labels=write_csv(tmp_path / "labels.csv", text)))
    assert (found.index.tolist(), found.labels) == ([7, 8], [3, 5])


def test_keys_that_stand_for_several_pictures_are_pointed_out(tmp_path: Path, local_ray: None) -> None:
    from conftest import noise, settings, write_shards

    from pipeline import driver

    for folder, seed in (("a", 0), ("b", 1)):
        write_shards(tmp_path / folder, noise(10, seed), 10, "png")
    driver.run(settings("", tmp_path / "out", source__url=[f"{tmp_path}/a/*.tar", f"{tmp_path}/b/*.tar"]))
    url = write_csv(tmp_path / "labels.csv", "key,label\n00001,cat\n00002,dog\n")
    found = labels.read(pipeline.open_dataset(str(tmp_path / "out")), config.Probe(labels=url))
    assert found.labels == ["cat", "dog"] * 2
    assert found.warnings[0].startswith("2 rows have the key of another picture")


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("key,label\n00001,cat\n00002,dog\n00001,dog\n", {}, "labels: .*: key '00001' has the labels 'cat' and 'dog'; 1 "),
        ("key,label,g\n00001,cat,1\n00001,cat,2\n", {"group": "g"}, "labels: .*: key '00001' has the groups '1' and '2'"),
        ("key,label\n1,cat\n2,dog\n", {}, "labels: .*: none of the 2 keys in its column 'key' is in the dataset: its first "),
        ("key,label\n", {}, "labels: .*: none of the 0 keys in its column 'key' is in the dataset\\."),
        ("id,label\n00001,cat\n", {}, "labels_key: .*labels.csv has no column 'key'; it has id, label"),
        ("key,class\n00001,cat\n", {}, "label: .*labels.csv has no column 'label'; it has key, class"),
        ("key,label\n00001,cat\n", {"group": "who"}, "group: neither the dataset nor the file has a column 'who'; there "),
        ("", {}, "labels: .*labels.csv: cannot be read as CSV: "),
        ("key,label\n00001,cat,3\n", {}, "labels: .*labels.csv: cannot be read as CSV: "),
        ("key,label\n00001,\n", {}, "label: column 'label' has no label in any of 260 rows"),
    ],
)  # fmt: skip
def test_files_that_do_not_work(dataset: Dataset, tmp_path: Path, text: str, settings: dict[str, str], message: str) -> None:
    url = write_csv(tmp_path / "labels.csv", text)
    with pytest.raises((ConfigError, DatasetError), match=f"^probe.{message}"):
        labels.read(dataset, config.Probe(labels=url, **settings))


def test_files_that_are_not_there_or_not_what_their_names_say(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^probe.labels: .*nothing.csv: there is no such file"):
        labels.read(dataset, config.Probe(labels=str(tmp_path / "nothing.csv")))
    (tmp_path / "labels.parquet").write_text("key,label\n00001,cat\n")
    with pytest.raises(ConfigError, match=r"^probe.labels: .*labels.parquet: cannot be read as Parquet"):
        labels.read(dataset, config.Probe(labels=str(tmp_path / "labels.parquet")))
    pq.write_table(pa.table({"key": ["00001"], "label": [["cat", "dog"]]}), tmp_path / "several.parquet")
    with pytest.raises(ConfigError, match=r"^probe.label: column 'label' holds list<.*>; a class is a text or a number"):
        labels.read(dataset, config.Probe(labels=str(tmp_path / "several.parquet")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label": "breed"}, "label: the dataset has no column 'breed'; there are key, label, patient"),
        ({"label": "small"}, "label: column 'small' holds list<.*>; a class is a text or a number"),
        ({"group": "camera"}, "group: the dataset has no column 'camera'"),
        ({"split": "large"}, "split: column 'large' holds list<.*>; a part is a text or a number"),
    ],
)
def test_columns_that_do_not_work(dataset: Dataset, settings: dict[str, str], message: str) -> None:
    with pytest.raises((ConfigError, DatasetError), match=f"^probe.{message}"):
        labels.read(dataset, config.Probe(**settings))
