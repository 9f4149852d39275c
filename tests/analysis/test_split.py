"""Which rows go into which part: nothing that belongs together is torn apart, whatever the order of the rows."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline import config
from pipeline.analysis.probe import split
from pipeline.errors import ConfigError

SETTINGS = config.Probe()
PARTS = ("train", "validation", "test")


def hashes(count, prefix="image"):
    return [f"{prefix}{row}" for row in range(count)]


def parts_by_hash(content_hashes, labels, settings=SETTINGS):
    parts = split.draw(content_hashes, np.asarray(labels), settings)
    return {name: {content_hashes[row] for row in getattr(parts, name)} for name in PARTS}


# Drawn by content hash


def test_split_is_a_partition_in_the_shares_of_every_class():
    labels = np.repeat([0, 1, 2], [1000, 200, 40])
    parts = split.draw(hashes(1240), labels, config.Probe(validation=0.2, test=0.1))
    assert np.array_equal(np.sort(np.concatenate([parts.train, parts.validation, parts.test])), np.arange(1240))
    assert np.bincount(labels[parts.test]).tolist() == [100, 20, 4]
    assert np.bincount(labels[parts.validation]).tolist() == [200, 40, 8]


def test_copies_never_straddle():
    random = np.random.default_rng(0)
    distinct = random.integers(0, 300, size=2000)
    names, labels = [f"image{number}" for number in distinct], distinct % 4
    labels = np.where(random.random(2000) < 0.05, random.integers(0, 4, 2000), labels)  # some copies disagree on the class
    parts = parts_by_hash(names, labels)
    assert all(parts.values())
    assert sum(map(len, parts.values())) == len(set(names))


def test_split_depends_on_neither_row_order_nor_copies():
    random = np.random.default_rng(0)
    names, labels = hashes(500), random.integers(0, 5, 500)
    order = random.permutation(np.r_[np.arange(500), np.arange(100), np.arange(50)])
    assert parts_by_hash([names[row] for row in order], labels[order]) == parts_by_hash(names, labels)


def test_split_of_conflicting_copies_does_not_depend_on_row_order():
    random = np.random.default_rng(0)
    names, labels = hashes(60) * 2, random.integers(0, 3, 120)
    order = random.permutation(120)
    assert parts_by_hash([names[row] for row in order], labels[order]) == parts_by_hash(names, labels)


def test_seed_changes_the_split():
    names, labels = hashes(100), np.arange(100) % 2
    assert parts_by_hash(names, labels) == parts_by_hash(names, labels, config.Probe(seed=0))
    assert parts_by_hash(names, labels) != parts_by_hash(names, labels, config.Probe(seed=1))


def test_a_class_is_never_without_train():
    names, labels = hashes(16), np.r_[np.arange(10), np.repeat([10, 11, 12], 2)]  # singles and pairs
    parts = split.draw(names, labels, config.Probe(validation=0.49, test=0.49))
    assert set(labels[parts.train]) == set(range(13))


# Groups


def components(content_hashes, groups):
    """What hangs together, by SciPy: number of each row's component."""
    _, hash_N = np.unique(content_hashes, return_inverse=True)
    codes = {group: code for code, group in enumerate(dict.fromkeys(groups))}
    group_N = np.array([codes[group] for group in groups]) + hash_N.max() + 1
    has_one = np.array([group is not None for group in groups])
    size = group_N.max() + 1
    edges = coo_array((np.ones(has_one.sum()), (hash_N[has_one], group_N[has_one])), shape=(size, size))
    return connected_components(edges, directed=False)[1][hash_N]


@pytest.mark.parametrize("seed", range(5))
def test_what_hangs_together_by_picture_or_group_is_on_one_side(seed):
    random = np.random.default_rng(seed)
    names = [f"image{number}" for number in random.integers(0, 400, 900)]
    groups = [None if number > 350 else f"patient {number}" for number in random.integers(0, 500, 900)]
    parts = split.draw(names, random.integers(0, 3, 900), config.Probe(seed=seed), groups)
    whole_N = components(names, groups)
    both = set(zip(parts.unit.tolist(), whole_N.tolist(), strict=True))
    assert len(both) == len(set(parts.unit.tolist())) == len(set(whole_N.tolist())), "the units are the components"
    sides = [set(whole_N[getattr(parts, part)].tolist()) for part in PARTS]
    assert sum(map(len, sides)) == len(set.union(*sides)) == len(set(whole_N.tolist()))
    assert all(sides)


def test_chains_of_groups_and_copies_are_followed_to_their_end():
    names, groups = [], []
    for link in range(500):  # image n and image n + 1 are in group n
        names += [f"image{link:03d}", f"image{link + 1:03d}"]
        groups += [link, link]
    order = np.random.default_rng(0).permutation(1000)
    chained, loose = [names[row] for row in order], [f"other{row}" for row in range(1000)]
    labels = np.zeros(2000, np.int64)
    parts = split.draw(chained + loose, labels, SETTINGS, [groups[row] for row in order] + [None] * 1000)
    sides = [name for name in PARTS if (getattr(parts, name) < 1000).any()]
    assert len(sides) == 1
    assert all((getattr(parts, name) >= 1000).any() for name in PARTS), "rows without a group are not one group"


def test_groups_of_unequal_size_fill_the_shares_of_pictures():
    random = np.random.default_rng(0)
    sizes = [3000, *random.integers(1, 60, 300).tolist()]  # the largest is a quarter of all: it fits into no share
    groups = np.repeat(np.arange(301), sizes)
    labels = np.zeros(len(groups), np.int64)
    for seed in range(5):
        parts = split.draw(hashes(len(groups)), labels, config.Probe(seed=seed), groups.tolist())
        assert len(parts.test) / len(groups) == pytest.approx(0.15, abs=0.005)
        assert len(parts.validation) / len(groups) == pytest.approx(0.15, abs=0.005)
        assert not set(groups[parts.train]) & set(groups[parts.test])


def test_a_class_with_a_single_group_is_in_train():
    labels = np.repeat([0, 1], [100, 30])
    groups = [f"patient {row // 10}" for row in range(100)] + ["patient 99"] * 30
    parts = split.draw(hashes(130), labels, SETTINGS, groups)
    assert set(labels[parts.train]) == {0, 1}
    assert set(labels[parts.test]) == {0}


def test_split_with_groups_does_not_depend_on_row_order():
    random = np.random.default_rng(0)
    names, groups = hashes(300), random.integers(0, 100, 300)
    labels, order = random.integers(0, 3, 300), random.permutation(300)

    def found(rows):
        parts = split.draw([names[row] for row in rows], labels[rows], SETTINGS, groups[rows].tolist())
        return [{names[rows[row]] for row in getattr(parts, part)} for part in PARTS]

    assert found(order) == found(np.arange(300))


# Given by a column


COLUMN = config.Probe(split="part")


def test_a_column_is_obeyed_however_it_spells_the_parts():
    names = ["train", "Train", "TRAIN ", "val", "Valid", "dev", "validation", "test", "TEST", None, "", float("nan")]
    parts = split.given(names, hashes(12), np.arange(12) % 2, COLUMN)
    assert [getattr(parts, part).tolist() for part in PARTS] == [[0, 1, 2], [3, 4, 5, 6], [7, 8]]
    assert (parts.num_without_split, parts.num_copies_left_out) == (3, 0)
    assert parts.warnings == ["Column 'part' says nothing of 3 labelled rows: they were left out."]


def test_what_is_tested_is_not_trained_on():
    #        train            validation        test
    names = list("abcdecaef")
    given = ["train"] * 3 + ["val"] * 3 + ["test"] * 3
    parts = split.given(given, names, np.arange(9) % 2, COLUMN)
    assert parts.test.tolist() == [6, 7, 8], "the test part stays as it is: scores can be compared"
    assert parts.validation.tolist() == [3, 5]
    assert parts.train.tolist() == [1], "a is tested, c is chosen on"
    assert parts.num_copies_left_out == 3
    assert "3 rows to train on whose picture is also in a part that scores" in parts.warnings[0]


def test_groups_that_a_column_tears_apart_are_left_out_of_training():
    given = ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    parts = split.given(given, hashes(8), np.arange(8) % 2, COLUMN, [1, 2, None, 3, 4, 3, 1, None])
    assert [getattr(parts, part).tolist() for part in PARTS] == [[1, 2], [4, 5], [6, 7]]
    assert parts.num_copies_left_out == 2
    assert "picture or group" in parts.warnings[0]


def test_validation_is_drawn_from_train_where_the_column_has_none():
    random = np.random.default_rng(0)
    names = [f"image{number}" for number in random.integers(0, 300, 1000)]
    given = np.array(["test" if name.endswith("0") else "train" for name in names])
    labels = random.integers(0, 4, 1000)
    for groups in (None, [name[-2:] for name in names]):
        parts = split.given(given.tolist(), names, labels, COLUMN, groups)
        assert np.array_equal(parts.test, np.flatnonzero(given == "test"))
        sides = [{names[row] for row in getattr(parts, part)} for part in PARTS]
        assert sum(map(len, sides)) == len(set.union(*sides))
        if groups is None:
            assert len(sides[1]) / len(sides[0] | sides[1]) == pytest.approx(0.15, abs=0.01)
        else:
            assert not {name[-2:] for name in sides[0]} & {name[-2:] for name in sides[1]}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["train", "held out", "test", "held out"],
            r"column 'part' holds 'held out' \(2 rows\); allowed are train, validation, v",
        ),
        ([0, 1, 1, 0], r"column 'part' holds '0' \(2 rows\), '1' \(2 rows\); allowed are train"),
        (["train", "train", "val", "val"], "column 'part' names no labelled row test; it has to name some"),
        (["test", "val", "val", None], "column 'part' names no labelled row train; it has to name some"),
        (["train", "test", "test", "test"], None),
    ],
)
def test_columns_that_do_not_work(given, message):
    names = ["same", "same", "other", "one"] if message is None else hashes(4)
    message = message or "column 'part': no row is left to train on, all pictures are tested too"
    with pytest.raises(ConfigError, match=f"^probe.split: {message}"):
        split.given(given, names, np.arange(4) % 2, COLUMN)
