"""Planted copies, foreign pictures and wrong labels, found in committed datasets; what the command prints and writes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from commands import cli, last_line
from datasets import write_dataset
from meter import metered
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

import pipeline
from pipeline.analysis.curate import curate, directions, duplicates, label_errors, outliers
from pipeline.errors import DatasetError, GuardError
from pipeline.recipe import digest
from pipeline.storage import Store


def names(count: int) -> NDArray[np.bytes_]:
    """Content hashes of so many different images."""
    return np.array([digest(str(number)) for number in range(count)], "S32")


def at(*degrees: float) -> NDArray[np.float32]:
    """Embeddings (N, 2) in these directions, of different lengths."""
    radians = np.radians(degrees)
    return (np.stack([np.cos(radians), np.sin(radians)], 1) * np.arange(1, len(degrees) + 1)[:, None]).astype(np.float32)


def within(degrees: float) -> float:
    """The threshold for directions that are so far apart."""
    return float(np.cos(np.radians(degrees))) - 1e-4


def groups(found: duplicates.Duplicates) -> set[frozenset[int]]:
    """Rows of each group."""
    rows = found.grouped
    return {
        frozenset(rows[found.representative[rows] == leader].tolist()) for leader in set(found.representative[rows].tolist())
    }


def family(num_images: int, copies: int, dim: int, noise: float, seed: int = 0) -> NDArray[np.float32]:
    """Embeddings of images and of copies that differ a little, the copies of an image one after the other."""
    random = np.random.default_rng(seed)
    images_MD = np.repeat(random.standard_normal((num_images, dim), np.float32), copies, axis=0)
    return images_MD + noise * random.standard_normal(images_MD.shape, np.float32)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The problems are small, and threads that wait for each other on a busy machine take a hundred times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Pixels (1797, 64) float32 and labels."""
    features, labels = load_digits(return_X_y=True)
    return features.astype(np.float32), labels.astype(np.int64)


def flipped(labels: NDArray[np.int64], share: float, seed: int = 0) -> NDArray[np.int64]:
    """Some labels changed to another class."""
    random, changed = np.random.default_rng(seed), labels.copy()
    rows = random.permutation(len(labels))[: round(share * len(labels))]
    changed[rows] = (changed[rows] + random.integers(1, 10, len(rows))) % 10
    return changed


def photographs(count: int) -> NDArray[np.float32]:
    """Parts of two photographs as grey as the digits, and of as few pixels (N, 64)."""
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(image).convert("L") for image in load_sample_images().images]
    parts = []
    for number in range(count):
        side = int(random.integers(60, 300))
        left, top = int(random.integers(0, 640 - side)), int(random.integers(0, 427 - side))
        part = pictures[number % 2].crop((left, top, left + side, top + side)).resize((8, 8))
        parts.append(np.asarray(part, np.float32).ravel() / 255 * 16)
    return np.stack(parts)


class TestDuplicates:
    """Groups of images of equal bytes, and of images that look alike."""

    def test_copies_of_bytes_are_one_image_however_they_are_embedded(self) -> None:
        hashes = names(5)[[0, 1, 0, 2, 1, 0]]
        found = duplicates.find(at(0, 90, 170, 100, 90, 0), hashes, within(15))
        assert found.first.tolist() == [0, 1, 0, 3, 1, 0]
        assert groups(found) == {frozenset({0, 2, 5}), frozenset({1, 3, 4})}
        assert found.similarity[[0, 1, 2, 4, 5]].tolist() == [1] * 5
        assert found.similarity[3] == pytest.approx(np.cos(np.radians(10)), abs=1e-6)
        assert found.copies.tolist() == [2, 4, 5]

    def test_a_chain_is_not_a_group(self) -> None:
        found = duplicates.find(at(0, 15, 30, 45, 60), names(5), within(15))
        assert groups(found) == {frozenset({0, 1, 2}), frozenset({3, 4})}
        assert found.representative.tolist() == [1, 1, 1, 3, 3]

    def test_the_image_that_most_are_like_stands_for_the_group_and_the_largest_of_several(self) -> None:
        assert set(duplicates.find(at(-10, 0, 10), names(3), within(12)).representative.tolist()) == {1}
        for largest in range(3):
            sizes = np.where(np.arange(3) == largest, 640 * 480, 320 * 240)
            found = duplicates.find(at(0, 1, 2), names(3), within(12), sizes)
            assert set(found.representative.tolist()) == {largest}
            assert found.grouped[0] == largest
        twins = duplicates.find(at(0, 0), names(2), 0.9, np.array([1, 2]))
        assert (twins.grouped.tolist(), twins.similarity.tolist()) == ([1, 0], [1, 1])

    def test_a_member_goes_to_the_representative_that_is_most_like_it(self) -> None:
        """Two hubs 24 degrees apart with six and five spokes of 15 degrees; between them a picture 10 from the smaller one."""
        hubs = np.zeros((3, 13))
        hubs[:, :2] = at(0, 24, 14) / np.arange(1, 4)[:, None]
        near = np.radians(15)
        spokes = [np.cos(near) * hubs[int(each >= 6)] + np.sin(near) * np.eye(13)[2 + each] for each in range(11)]
        found = duplicates.find(np.array([*hubs, *spokes], np.float32), names(14), within(16))
        assert found.representative.tolist() == [0, 1, 1, *[0] * 6, *[1] * 5]
        assert found.similarity[2] == pytest.approx(np.cos(np.radians(10)), abs=1e-6)

    @pytest.mark.parametrize("rows", [64, 4096])
    def test_the_same_pairs_as_every_pair_compared_by_itself(self, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (directions, duplicates):
            monkeypatch.setattr(module, "ROWS", rows)
        monkeypatch.setattr(duplicates, "COLUMNS", rows // 2 + 1)
        features = family(70, 5, 24, 0.25) * np.random.default_rng(1).uniform(0.1, 10, (350, 1)).astype(np.float32)
        unit = features.astype(np.float64) / np.linalg.norm(features, axis=1, keepdims=True)
        cosine = unit @ unit.T
        found = duplicates.find(features, names(350), 0.93)
        alike = np.triu(cosine >= 0.93, 1)
        assert found.share == alike.sum() / (350 * 349 / 2) > 0
        own = cosine[np.arange(350), found.representative]
        assert np.allclose(own, found.similarity, atol=1e-6)
        assert own.min() >= 0.93
        assert set(np.flatnonzero((alike | alike.T).any(1))) >= set(found.grouped.tolist())
        leaders = np.flatnonzero(found.representative == np.arange(350))
        members = np.bincount(found.representative, minlength=350) > 1
        assert not alike[np.ix_(leaders[members[leaders]], leaders[~members[leaders]])].any(), "who is like a leader joins it"

    def test_planted_copies_are_found_and_nothing_else(self) -> None:
        features = family(300, 4, 64, 0.1)
        found = duplicates.find(features, names(1200), 0.95)
        assert groups(found) == {frozenset(range(start, start + 4)) for start in range(0, 1200, 4)}
        assert abs(found.chance[0]) < 0.02
        assert duplicates.find(features[::4], names(300), 0.95).chance[1] == pytest.approx(3.1 / 8, abs=0.03)

    def test_more_pairs_than_there_is_room_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """400 pictures of one wall: 79,800 pairs."""
        monkeypatch.setattr(duplicates, "MAX_PAIRS", 500)
        for module in (directions, duplicates):
            monkeypatch.setattr(module, "ROWS", 50)
        monkeypatch.setattr(duplicates, "COLUMNS", 20)
        features = np.concatenate([family(1, 400, 16, 0.01), family(20, 2, 16, 0.01, seed=1)])
        settled = []
        settle = duplicates._Groups.settle
        monkeypatch.setattr(duplicates._Groups, "settle", lambda self: (settled.append(self._num_waiting), settle(self))[1])
        found = duplicates.find(features, names(440), 0.99)
        assert len(settled) > 2
        assert max(settled) <= 500 + 50 * 20
        assert groups(found) == {frozenset(range(400)), *(frozenset({row, row + 1}) for row in range(400, 440, 2))}
        assert found.similarity.min() >= 0.99

    def test_who_stands_for_a_group_is_no_member_of_another(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Rows 4 and 5, alike themselves, have their groups before they are compared."""
        monkeypatch.setattr(duplicates, "MAX_PAIRS", 1)
        monkeypatch.setattr(duplicates, "ROWS", 4)
        sizes = np.array([1, 1, 1, 1, 2, 2])
        found = duplicates.find(at(-8, -14, 20, 26, 0, 12), names(6), within(15), sizes)
        assert found.representative.tolist() == [4, 4, 5, 5, 4, 5]

    def test_what_has_no_direction_is_like_nothing(self) -> None:
        features = np.zeros((4, 8), np.float32)
        features[2:, 0] = [1e-20, 1e15]
        assert groups(duplicates.find(features, names(4), 0.5)) == {frozenset({2, 3})}

    def test_embeddings_that_are_not_finite(self) -> None:
        features = family(5, 2, 8, 0.1)
        features[[3, 7], 2] = [np.nan, np.inf]
        with pytest.raises(GuardError, match="2 embeddings hold values that are not finite, the first in row 3"):
            duplicates.find(features, names(10), 0.9)

    def test_embeddings_are_never_copied_whole(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (directions, duplicates):
            monkeypatch.setattr(module, "ROWS", 128)
        monkeypatch.setattr(duplicates, "COLUMNS", 128)
        features = np.random.default_rng(0).standard_normal((600, 10_000), np.float32)
        features.flags.writeable = False
        hashes = names(600)
        monkeypatch.setattr(duplicates, "TRIED", 64)
        duplicates.find(features[:200], hashes[:200], 0.9)  # the library's own memory
        with metered() as meter:
            assert not len(duplicates.find(features, hashes, 0.9).grouped)
            assert meter()[1] < 15_000_000, "the embeddings are 24 MB, a block is 5"


class TestOutliers:
    """The least typical images."""

    def test_photographs_among_digits(self, digits: tuple[NDArray[np.float32], NDArray[np.int64]]) -> None:
        features, labels = np.concatenate([digits[0], photographs(30)]), np.concatenate([digits[1], np.arange(30) % 10])
        rows = np.arange(len(labels))
        found = outliers.find(features, labels, rows, most=3)
        assert (found.rows >= 1797).mean() >= 0.9
        assert found.num_judged == 1827
        assert np.bincount(labels[found.rows]).tolist() == [3] * 10
        few = outliers.find(features[:1807], np.full(1807, -1), rows[:1807], most=10)
        assert (few.rows >= 1797).mean() >= 0.9

    def test_a_small_kind_of_picture_is_no_outlier(self) -> None:
        """The mean of the class is far from 40 of its pictures, and they are near each other."""
        random = np.random.default_rng(0)
        features = 0.05 * random.standard_normal((341, 16)).astype(np.float32)
        features[:300, 0] += 1
        features[300:340, 1] += 1
        features[340, 2] += 1
        features[340, 0] += 0.9  # nearer to the mean than the 40
        found = outliers.find(features, np.zeros(341, np.int64), np.arange(341), most=1)
        assert found.rows.tolist() == [340]

    def test_how_typical_is_the_mean_over_the_nearest_others(self) -> None:
        features = family(10, 8, 16, 1).astype(np.float64)
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        cosine = unit @ unit.T
        expected = [np.sort(np.delete(row, number))[-20:].mean() for number, row in enumerate(cosine)]
        found = outliers.typicality(directions.Directions(features.astype(np.float32), np.arange(80)))
        assert np.allclose(found, expected, atol=1e-6)
        few = outliers.typicality(directions.Directions(features.astype(np.float32), np.arange(3)))
        assert np.allclose(few, (cosine[:3, :3].sum(1) - 1) / 2, atol=1e-6)

    def test_references_are_of_all_kinds_whatever_the_order(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(outliers, "REFERENCE", 100)
        random = np.random.default_rng(0)
        features = 0.05 * random.standard_normal((401, 16)).astype(np.float32)
        features[:200, 0] += 1
        features[200:400, 1] += 1
        features[400, [0, 2]] += [0.7, 1]
        assert outliers.find(features, np.zeros(401, np.int64), np.arange(401), most=1).rows.tolist() == [400]

    def test_copies_do_not_vouch_for_each_other(self) -> None:
        features = np.concatenate([family(1, 100, 16, 0.2), family(1, 1, 16, 0.2, seed=1).repeat(40, axis=0)])
        first = np.minimum(np.arange(140), 100)
        found = outliers.find(features, np.zeros(140, np.int64), first, most=2)
        assert found.rows[0] == 100
        assert found.num_judged == 101
        assert outliers.find(features, np.zeros(140, np.int64), np.arange(140), most=2).rows[0] != 100

    def test_classes_apart_and_rows_without_a_label_as_one(self) -> None:
        features = np.concatenate([family(1, 30, 16, 0.1, seed) for seed in range(3)] + [family(1, 1, 16, 0.1, 9)])
        features[[7, 40]] = family(2, 1, 16, 0, seed=5)
        targets = np.array([0] * 30 + [1] * 30 + [-1] * 30 + [2])
        found = outliers.find(features, targets, np.arange(91), most=2)
        assert targets[found.rows].tolist().count(-1) == 2
        assert 90 not in found.rows, "there is nothing to compare it with"
        assert set(found.rows[:2].tolist()) == {7, 40}
        assert sorted(found.rank.tolist()) == [0, 0, 0, 1, 1, 1]
        assert np.all(np.diff(found.similarity - found.usual) >= 0)

    def test_some_references_are_nearly_as_good_as_all(
        self, digits: tuple[NDArray[np.float32], NDArray[np.int64]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        features = np.concatenate([digits[0], photographs(10)])
        monkeypatch.setattr(outliers, "REFERENCE", 600)
        monkeypatch.setattr(outliers, "ROWS", 100)
        found = outliers.find(features, np.zeros(1807, np.int64), np.arange(1807), most=10)
        assert (found.rows >= 1797).mean() >= 0.8


class TestLabelErrors:
    """Rows whose label is probably wrong."""

    @pytest.mark.parametrize("seed", [0, 1])
    def test_changed_labels_of_digits(self, digits: tuple[NDArray[np.float32], NDArray[np.int64]], seed: int) -> None:
        features, labels = digits
        given = flipped(labels, 0.05, seed)
        found = label_errors.find(features, given, names(1797))
        assert found is not None
        assert 60 <= found.estimated == len(found.rows) <= 110
        assert (given != labels)[found.rows].mean() >= 0.9
        assert (labels[found.rows] == found.predicted).mean() >= 0.9
        assert np.all(np.diff(found.margin) >= 0)
        assert found.margin.max() < 0
        assert (found.num_judged, found.num_unjudged) == (1797, 0)
        longer = label_errors.find(features, given, names(1797), most=90)
        assert longer is not None
        assert longer.rows[: len(found.rows)].tolist() == found.rows.tolist()
        assert (given != labels)[longer.rows].mean() >= 0.8

    def test_clean_labels_give_a_short_list(self, digits: tuple[NDArray[np.float32], NDArray[np.int64]]) -> None:
        found = label_errors.find(*digits, names(1797))
        assert found is not None
        assert found.estimated < 0.01 * 1797
        everything = label_errors.find(*digits, names(1797), most=1797)
        assert everything is not None
        assert len(everything.rows) == round((1 - everything.accuracy) * 1797), "never a row that is what its label says"

    def test_folds_keep_copies_together_and_classes_apart(self) -> None:
        random = np.random.default_rng(0)
        image = random.integers(0, 300, 2000)
        targets = np.where(random.random(2000) < 0.1, -1, image % 4)
        rows, fold = label_errors.folds(targets, names(300)[image])
        assert rows.tolist() == np.flatnonzero(targets >= 0).tolist()
        assert all(len(set(fold[image[rows] == each].tolist())) <= 1 for each in range(300))
        for target in range(4):
            images_of_folds = [len(set(image[rows[(fold == k) & (targets[rows] == target)]].tolist())) for k in range(5)]
            assert max(images_of_folds) - min(images_of_folds) <= 1

    def test_folds_depend_neither_on_the_order_of_rows_nor_on_copies_that_disagree(self) -> None:
        random = np.random.default_rng(0)
        image = random.integers(0, 300, 2000)
        targets = np.where(random.random(2000) < 0.1, random.integers(0, 4, 2000), image % 4)
        rows, fold = label_errors.folds(targets, names(300)[image])
        order = random.permutation(2000)
        again_rows, again = label_errors.folds(targets[order], names(300)[image][order])
        assert again[np.argsort(order[again_rows])].tolist() == fold.tolist()
        assert rows.tolist() == list(range(2000))

    def test_copies_do_not_vouch_for_each_other(self) -> None:
        """More features than images: what has been seen is known by heart, wrong labels too."""
        random = np.random.default_rng(0)
        labels = np.arange(300) % 3
        features = (random.standard_normal((300, 400)) + random.standard_normal((3, 400))[labels]).astype(np.float32)
        given = np.where(random.random(300) < 0.1, (labels + 1) % 3, labels)
        wrong = np.tile(given != labels, 3)
        copies, hashes = np.tile(features, (3, 1)), np.tile(names(300), 3)
        found = label_errors.find(copies, np.tile(given, 3), hashes, most=int(wrong.sum()))
        fooled = label_errors.find(copies, np.tile(given, 3), names(900), most=int(wrong.sum()))
        assert found is not None and fooled is not None
        assert wrong[found.rows].sum() > 0.9 * wrong.sum()
        assert wrong[fooled.rows].sum() < 0.1 * wrong.sum()

    def test_the_count_is_that_of_confident_learning(self) -> None:
        random = np.random.default_rng(0)
        given = random.integers(0, 4, 400)
        logits = random.standard_normal((400, 4)) + 2 * np.eye(4)[np.where(random.random(400) < 0.2, (given + 1) % 4, given)]
        probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        thresholds = [np.mean([p[k] for p, label in zip(probabilities, given, strict=True) if label == k]) for k in range(4)]
        count = 0
        for row, label in zip(probabilities, given, strict=True):
            claims = [k for k in range(4) if row[k] >= thresholds[k]]
            if claims and max(claims, key=lambda k: row[k]) != label and row.argmax() != label:
                count += 1
        assert label_errors.estimate(np.log(probabilities).astype(np.float32), given) == count > 20

    def test_classes_of_one_image_are_not_judged(self, digits: tuple[NDArray[np.float32], NDArray[np.int64]]) -> None:
        features, labels = digits[0][:200], digits[1][:200] + 1
        labels[:4] = [0, 11, 11, -1]
        hashes = names(200)
        hashes[2] = hashes[1]
        found = label_errors.find(features, labels, hashes, most=200)
        without = label_errors.find(features[4:], labels[4:] - 1, hashes[4:], most=200)
        assert found is not None and without is not None
        assert (found.num_judged, found.num_unjudged) == (196, 3)
        assert len(found.rows)
        assert found.rows.tolist() == (without.rows + 4).tolist()
        assert found.predicted.tolist() == (without.predicted + 1).tolist()
        assert label_errors.find(features, np.where(labels == 1, 1, -1), hashes) is None

    def test_chunks_change_nothing(
        self, digits: tuple[NDArray[np.float32], NDArray[np.int64]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        features, labels = digits[0][:500], flipped(digits[1][:500], 0.1)
        whole = label_errors.find(features, labels, names(500))
        monkeypatch.setattr(label_errors.logistic, "LOGITS_BYTES", 1 << 11)
        monkeypatch.setattr(label_errors.logistic, "ROWS_BYTES", 1 << 12)
        pieces = label_errors.find(features, labels, names(500))
        assert whole is not None and pieces is not None
        assert (whole.rows.tolist(), whole.estimated, whole.C) == (pieces.rows.tolist(), pieces.estimated, pieces.C)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, digits: tuple[NDArray[np.float32], NDArray[np.int64]]) -> Path:
    """600 digits with wrong labels, 10 rows of them once more in another shard, 5 of these labelled anew; 5 photographs."""
    folder = tmp_path_factory.mktemp("curate") / "out"
    pixels, labels = digits[0][:600], flipped(digits[1][:600], 0.05)
    features = np.concatenate([pixels, pixels[:10], photographs(5)])
    text = [f"digit {label}" for label in np.concatenate([labels, labels[:5], (labels[5:10] + 1) % 10, np.full(5, 3)])]
    text[300] = None
    write_dataset(
        folder,
        {"embedding": features, "half": features[:, ::2].copy()},
        text,
        content_hashes=[digest(str(number)) for number in [*range(600), *range(10), *range(600, 605)]],
        rows_per_shard=100,
        columns={"species": ["x"] * 614 + ["y"]},
    )
    return folder


class TestCommand:
    """What `pipeline curate` prints and writes."""

    def test_lists_lead_back_to_the_rows(
        self, output: Path, tmp_path: Path, digits: tuple[NDArray[np.float32], NDArray[np.int64]]
    ) -> None:
        finished = cli("curate", output, "--to", tmp_path / "lists", "--json")
        assert finished.returncode == 0, finished.stderr
        report = last_line(finished)
        assert report["files"] == [f"{tmp_path}/lists/{name}.parquet" for name in ("duplicates", "outliers", "label_errors")]
        assert (report["rows"], report["version"], report["node"], report["label"]) == (615, 0, "embedding", "label")
        lists = {Path(file).stem: pq.read_table(file) for file in report["files"]}
        assert sorted(path.name for path in (tmp_path / "lists").iterdir()) == sorted(f"{name}.parquet" for name in lists)
        dataset = pipeline.open_dataset(str(output))
        places = ["key", "shard", "index", "url", "offset", "nbytes", "content_hash", "label"]
        rows = {row["key"]: row for row in dataset.table(places).to_pylist()}
        for table in lists.values():
            assert table.num_rows
            assert [row == rows[row["key"]] for row in table.select(places).to_pylist()] == [True] * table.num_rows
            described = json.loads(table.schema.metadata[b"pipeline"])
            assert described == {name: report[name] for name in ("output", "version", "node", "label", "threshold")}

        copies, counts = lists["duplicates"], report["duplicates"]
        assert (counts["copies"], counts["copied_images"], counts["copied_across_shards"]) == (10, 10, 10)
        assert sum(copies.column("copy").to_pylist()) == 10
        assert counts["superfluous_rows"] == copies.num_rows - sum(copies.column("representative").to_pylist())
        several = 0
        for _, members in itertools.groupby(copies.to_pylist(), lambda row: row["group"]):
            some = list(members)
            several += len({row["label"] for row in some} - {None}) > 1
            assert [row["representative"] for row in some] == [True] + [False] * (len(some) - 1)
            assert {row["group_rows"] for row in some} == {len(some)}
            assert {row["group_least_similarity"] for row in some} == {min(row["similarity"] for row in some)}
            assert 0.95 <= some[-1]["similarity"] <= some[0]["similarity"] == 1
        assert counts["groups_with_several_labels"] == several >= 5
        assert report["outliers"]["judged"] == 609
        strange = lists["outliers"].to_pylist()
        planted = {
            f"{row:05d}" for row in [*np.flatnonzero(flipped(digits[1][:600], 0.05) != digits[1][:600]), *range(605, 615)]
        }
        assert {row["key"] for row in strange[:5]} <= planted, "photographs, and digits of another class"
        assert strange[:3] == report["outliers"]["first"]

        wrong = lists["label_errors"].to_pylist()
        assert len(wrong) == report["label_errors"]["estimated"] == report["label_errors"]["listed"]
        assert report["label_errors"]["judged"] == 614
        assert all(row["predicted"] != row["label"] for row in wrong)
        assert all(row["probability_of_label"] < row["probability_of_predicted"] for row in wrong)
        margins = [row["margin"] for row in wrong]
        assert margins == sorted(margins)
        assert report["warnings"] == []

    def test_the_summary_fits_a_screen(self, output: Path, tmp_path: Path) -> None:
        finished = cli("curate", output, "--node", "half", "--most", 7, "--to", tmp_path)
        assert finished.returncode == 0, finished.stderr
        lines = finished.stdout.splitlines()
        assert len(lines) <= 24
        assert max(map(len, lines)) < 130
        text = finished.stdout
        for expected in ("615 rows, half", "10 rows of 10 images", "groups have several labels", "7 listed", "probably digit "):
            assert expected in text
        assert pq.read_table(tmp_path / "label_errors.parquet").num_rows == 7
        assert pq.read_table(tmp_path / "outliers.parquet").num_rows == 10 * 7 + 0

    def test_without_labels(self, tmp_path: Path) -> None:
        write_dataset(tmp_path / "out", family(20, 2, 16, 0.05))
        (tmp_path / "label_errors.parquet").write_bytes(b"of an earlier call")
        finished = cli("curate", tmp_path / "out", "--to", tmp_path, "--json")
        assert finished.returncode == 0, finished.stderr
        report = last_line(finished)
        assert (report["label"], report["label_errors"]) == (None, None)
        assert "no column `label`" in report["warnings"][0]
        assert [Path(file).name for file in report["files"]] == ["duplicates.parquet", "outliers.parquet"]
        assert sorted(path.name for path in tmp_path.glob("*.parquet")) == ["duplicates.parquet", "outliers.parquet"]
        assert report["duplicates"]["near_groups"] == 20
        assert "label" not in pq.read_schema(tmp_path / "outliers.parquet").names

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--label", "speces"], "there is no label column 'speces'; did you mean species?"),
            (["--label", "qqq"], "there is no label column 'qqq'; it has label, species"),
            (["--label", "embedding"], "there is no label column 'embedding'; it has label, species"),
            (["--node", "middle"], "there is no embedding column 'middle'; it has embedding, half"),
            (["--threshold", "95"], "--threshold: 95 is no cosine of alike images; allowed is more than 0 and less than 1"),
            (["--max-rows", "100"], "has 615 rows: comparing each with each would take about"),
            (["--version", "3"], "there is no version 3"),
        ],
    )
    def test_mistakes(self, output: Path, arguments: list[str], message: str) -> None:
        from typer.testing import CliRunner

        from pipeline.cli import app

        result = CliRunner().invoke(app, ["curate", str(output), *arguments])
        assert result.exit_code == 2
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1

    def test_lists_are_published_whole(self, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        found = curate(pipeline.open_dataset(str(output)))

        def broken(table: object, file: object, **options: object) -> None:
            file.write(b"PAR1")
            raise OSError("disk on fire")

        monkeypatch.setattr(pq, "write_table", broken)
        with pytest.raises(OSError, match="disk on fire"):
            found.write(Store(), str(tmp_path / "lists"))
        assert list((tmp_path / "lists").iterdir()) == []


class TestLabels:
    """Which rows have which class."""

    def test_numbers_and_missing_labels(self, tmp_path: Path) -> None:
        features = family(3, 60, 16, 0.3)
        labels = [float(row // 60) for row in range(180)]
        labels[5], labels[6], labels[65] = float("nan"), float("nan"), 2.0
        found = curate(write_dataset(tmp_path / "out", features, labels), threshold=0.999)
        assert found.summary["label_errors"]["judged"] == 178
        (row,) = found.tables["label_errors"].to_pylist()
        assert (row["key"], row["label"], row["predicted"]) == ("00065", 2.0, 1.0)

    def test_one_class(self, tmp_path: Path) -> None:
        found = curate(write_dataset(tmp_path / "out", family(30, 1, 16, 0), ["cat"] * 30))
        assert found.summary["label_errors"] is None
        assert "no two classes with two images each, but 1 in all" in found.summary["warnings"][0]
        assert set(found.tables) == {"duplicates", "outliers"}

    def test_lists_are_no_labels(self, tmp_path: Path) -> None:
        dataset = write_dataset(tmp_path / "out", family(4, 1, 16, 0), [["a"], ["b"], [], None])
        with pytest.raises(DatasetError, match=r"column 'label' holds list<.*a class is a text or a number"):
            curate(dataset)

    def test_a_crowd_is_told(self, tmp_path: Path) -> None:
        found = curate(write_dataset(tmp_path / "out", family(2, 30, 16, 0.05)))
        assert any("49% of all pairs are alike to 0.95" in warning for warning in found.summary["warnings"])
