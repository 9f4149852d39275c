"""Loose files as a source: groups that stay, keys, labels, and names that are hard to spell."""

from __future__ import annotations

import os
import random

import pyarrow as pa
import pytest
from images import jpeg

from pipeline import config
from pipeline.errors import ConfigError, ShardChanged, SourceError, StorageError
from pipeline.source import Source


@pytest.fixture
def photos(tmp_path):
    """Write files below a folder and make a source of them."""
    root = tmp_path / "photos"

    def make(files, url=None, **settings):
        for name, payload in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(payload)
        urls = [f"{root}/{each}".rstrip("/") for each in ([url] if isinstance(url, str) else url or [""])]
        return Source(config.Source(url=urls, format="files", **settings))

    make.root = root
    return make


def samples(source):
    return [sample for shard in source.shards() for sample in source.read(shard)]


def keys(source):
    return sorted(sample.key for sample in samples(source))


def groups(source):
    return [tuple(file.url for file in shard.files) for shard in source.shards()]


def error_of(sample):
    return sample.error and (sample.error.stage, sample.error.error)


# Groups


NAMES = [f"{number % 17:02}/{number:05}.jpg" for number in range(2000)]
GROUP_SIZE = 50


@pytest.fixture
def many(photos):
    return photos(dict.fromkeys(NAMES, b"text that is never opened"), group_size=GROUP_SIZE)


def test_every_file_is_in_one_group_in_order(many, photos):
    found = groups(many)
    assert [url for group in found for url in group] == sorted(f"file://{photos.root}/{name}" for name in NAMES)
    assert all(len(group) <= 4 * GROUP_SIZE for group in found)
    assert 20 <= len(found) <= 80, "the mean is 40"
    assert groups(many) == found


def test_listing_does_not_open_files(many, monkeypatch):
    from pipeline.storage import Store

    monkeypatch.setattr(Store, "open", lambda *_: pytest.fail("opened"))
    assert sum(len(shard.files) for shard in many.shards()) == 2000


def num_changed(before, after):
    """Groups with something else in them: a group that was cut in two, or grew together with the next, counts once."""
    gone, new = set(before) - set(after), set(after) - set(before)
    return min(len(gone), len(new))


def test_one_file_more_changes_one_group(many, photos):
    before = groups(many)
    for seed in range(25):
        path = photos.root / f"{seed % 17:02}/{random.Random(seed).randrange(2000):05}-new.jpg"
        path.write_bytes(b"new")
        after = groups(many)
        assert sum(map(len, after)) == 2001
        assert num_changed(before, after) == 1, path
        assert len(set(before) - set(after)) == 1
        path.unlink()


def test_one_file_less_changes_one_group(many, photos):
    before = groups(many)
    for name in random.Random(0).sample(NAMES, 25):
        (photos.root / name).rename(photos.root.parent / "aside")
        after = groups(many)
        assert sum(map(len, after)) == 1999
        assert num_changed(before, after) <= 1, name
        assert len(set(after) - set(before)) <= 1
        (photos.root.parent / "aside").rename(photos.root / name)


def test_first_file_of_a_group_may_go_too(many, photos):
    before = groups(many)
    for group in before[1:6]:
        path = group[0].removeprefix("file://")
        os.rename(path, photos.root.parent / "aside")
        after = groups(many)
        assert num_changed(before, after) <= 1
        os.rename(photos.root.parent / "aside", path)


def test_file_with_other_content_changes_one_fingerprint_only(many, photos):
    before = {shard.url: shard.fingerprint for shard in many.shards()}
    (photos.root / NAMES[700]).write_bytes(b"other text")
    after = {shard.url: shard.fingerprint for shard in many.shards()}
    assert before.keys() == after.keys()
    assert sum(before[url] != after[url] for url in before) == 1


@pytest.mark.parametrize("group_size", [1, 2, 5])
def test_groups_never_exceed_four_times_the_mean(photos, group_size):
    found = groups(photos({f"{number:04}.jpg": b"" for number in range(600)}, group_size=group_size))
    assert sum(map(len, found)) == 600
    assert max(map(len, found)) == 4 * group_size if group_size > 1 else len(found) == 600


# Samples


def test_sample_is_the_whole_file(photos):
    found = samples(photos({"b.jpg": jpeg(2), "a.jpg": jpeg(1)}))
    assert [(sample.key, sample.index, sample.image) for sample in found] == [("a.jpg", 0, jpeg(1)), ("b.jpg", 1, jpeg(2))]
    assert [(sample.offset, sample.nbytes) for sample in found] == [(0, len(jpeg(1))), (0, len(jpeg(2)))]
    assert found[0].url == f"file://{photos.root}/a.jpg"
    assert found[0].columns == {}


def test_only_images_count(photos):
    files = dict.fromkeys(
        ["a.JPG", "b.jpeg", "c.png", "d.webp", "e.gif", "f.bmp", "g.tif", "h.tiff"]
        + ["a.txt", "b.json", "jpg", "c.jpg.part", ".DS_Store", "Thumbs.db", "x.jpg/readme.md"],
        b"x",
    )
    assert keys(photos(files)) == ["a.JPG", "b.jpeg", "c.png", "d.webp", "e.gif", "f.bmp", "g.tif", "h.tiff"]
    assert keys(photos(files, image="txt")) == ["a.txt"]


def test_label_is_the_folder(photos):
    made = photos({"cats/a.jpg": b"x", "dogs/big/b.jpg": b"x", "c.jpg": b"x"}, label="folder")
    assert [(field.name, field.type) for field in made.fields()] == [("label", pa.string())]
    assert {sample.key: sample.columns["label"] for sample in samples(made)} == {
        "cats/a.jpg": "cats", "dogs/big/b.jpg": "big", "c.jpg": "photos",
    }  # fmt: skip


def test_folders_can_be_numbers(photos):
    made = photos({"3/a.jpg": b"x", "x/b.jpg": b"x"}, label="folder", label_type="int64")
    three, wrong = samples(made)
    assert (three.columns["label"], three.error) == (3, None)
    assert error_of(wrong) == ("label", "WrongType")
    assert made.fields()[0].type == pa.int64()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"label": "cls"}, r"source\.label: 'cls' .* folder"), ({"columns": ["txt"]}, r"source\.columns: loose files carry no")],
)
def test_what_loose_files_do_not_have(photos, settings, message):
    with pytest.raises(ConfigError, match=message):
        photos({"a.jpg": b"x"}, **settings).fields()


def test_empty_file_is_a_sample(photos):
    (sample,) = samples(photos({"a.jpg": b""}))
    assert (sample.image, sample.nbytes, sample.error) == (b"", 0, None)


def test_huge_file_is_refused_unread(photos):
    made = photos({"b.jpg": b"x"})
    with open(photos.root / "a.jpg", "wb") as file:
        file.truncate((256 << 20) + 1)
    huge, good = samples(made)
    assert (error_of(huge), huge.image) == (("read", "TooLarge"), b"")
    assert good.image == b"x"


# URLs


FILES = {"x/1/a.jpg": b"1", "x/2/b.jpg": b"2", "y/c.jpg": b"3"}


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("", ["x/1/a.jpg", "x/2/b.jpg", "y/c.jpg"]),
        ("x", ["1/a.jpg", "2/b.jpg"]),
        ("x/*/*.jpg", ["1/a.jpg", "2/b.jpg"]),
        ("x/1/*", ["a.jpg"]),
        ("**/*.jpg", ["x/1/a.jpg", "x/2/b.jpg", "y/c.jpg"]),
        ("?/c.jpg", ["y/c.jpg"]),
        ("y/c.jpg", ["c.jpg"]),
        (["x/1", "y"], ["a.jpg", "c.jpg"]),
        (["x", "x/1", "x/*/a.jpg", "y"], ["1/a.jpg", "2/b.jpg", "c.jpg"]),
        (["x/1", "x"], ["2/b.jpg", "a.jpg"]),
    ],
)
def test_keys_are_relative_to_the_url(photos, url, expected):
    made = photos(FILES, url)
    assert keys(made) == expected
    assert len({sample.url for sample in samples(made)}) == len(expected), "a file belongs to one URL"


def test_other_root_means_other_keys_and_so_another_fingerprint(photos):
    outer, inner = photos({"x/a.jpg": b"1"}), photos({"x/a.jpg": b"1"}, "x")
    assert (keys(outer), keys(inner)) == (["x/a.jpg"], ["a.jpg"])
    assert next(outer.shards()).fingerprint != next(inner.shards()).fingerprint


def test_relative_url_and_trailing_slash_are_the_same_source(photos, monkeypatch):
    made = photos(FILES)
    monkeypatch.chdir(photos.root.parent)
    for url in ("photos", "photos/", "./photos", f"file://{photos.root}"):
        other = Source(config.Source(url=url, format="files"))
        assert [shard.fingerprint for shard in other.shards()] == [shard.fingerprint for shard in made.shards()]
        assert keys(other) == keys(made)


@pytest.mark.parametrize(
    "name", ["with space.jpg", "ünï/cödé.jpg", "a%20b.jpg", "100%.jpg", "a#b&c=d.jpg", "日本/画像.jpg", "a'b\".jpg"]
)
def test_names_that_are_hard_to_spell(photos, name):
    (sample,) = samples(photos({name: jpeg()}))
    assert (sample.key, sample.image) == (name, jpeg())
    assert photos({}).store.read(sample.url) == jpeg()
    assert photos({}).store.read_range(sample.url, sample.offset, sample.nbytes) == jpeg()


def test_name_that_is_not_utf8_costs_one_sample(photos):
    made = photos({"b.jpg": b"x"})
    with open(os.fsencode(photos.root) + b"/a\xff.jpg", "wb") as file:
        file.write(jpeg())
    odd, good = samples(made)
    assert error_of(odd) == ("read", "NotUnicode")
    assert odd.key == "a\\xff.jpg"
    assert (good.key, good.error) == ("b.jpg", None)
    (shard,) = made.shards()
    pa.array([odd.key, odd.url, shard.url], pa.string())


@pytest.mark.parametrize("url", ["", "missing", "*.jpg", "missing/a.jpg"])
def test_source_without_images_is_the_users_mistake(photos, url):
    made = photos({"notes.txt": b"nothing here"}, url)
    with pytest.raises(SourceError, match=r"source\.url"):
        list(made.shards())


# Change


def test_file_changed_after_the_listing_is_noticed(photos):
    made = photos({"a.jpg": jpeg(1), "b.jpg": jpeg(2)})
    (shard,) = made.shards()
    (photos.root / "b.jpg").write_bytes(jpeg(3))
    reading = made.read(shard)
    assert next(reading).key == "a.jpg"
    with pytest.raises(ShardChanged, match=r"b\.jpg"):
        next(reading)
    assert [sample.image for sample in made.read(made.relist(shard))] == [jpeg(1), jpeg(3)]


def test_file_gone_after_the_listing_leaves_a_smaller_group(photos):
    made = photos({"a.jpg": jpeg(1), "b.jpg": jpeg(2)})
    (shard,) = made.shards()
    (photos.root / "a.jpg").unlink()
    with pytest.raises(StorageError, match=r"a\.jpg"):
        list(made.read(shard))
    assert [sample.key for sample in made.read(made.relist(shard))] == ["b.jpg"]
    (photos.root / "b.jpg").unlink()
    assert made.relist(shard) is None
