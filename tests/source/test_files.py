"""Loose files as a source: groups that stay, keys, labels, and names that are hard to spell."""

from __future__ import annotations

import os
import random

import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from images import jpeg

from pipeline import config
from pipeline.errors import ConfigError, ShardChanged, SourceError, StorageError
from pipeline.source import Source
from pipeline.storage import Store


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


# Groups: where they end depends on the URLs, so these lie where the URL is the same every time


NAMES = [f"{number % 17:02}/{number:05}.jpg" for number in range(2000)]
GROUP_SIZE = 50


@pytest.fixture
def memory():
    """An empty filesystem in memory."""
    fs = MemoryFileSystem(skip_instance_cache=True)
    fs.store.clear()
    yield fs
    fs.store.clear()


@pytest.fixture
def many(memory):
    for name in NAMES:
        memory.pipe_file(f"/many/{name}", b"text that is never opened")
    return Source(config.Source(url="memory://many", format="files", group_size=GROUP_SIZE))


def test_every_file_is_in_one_group_in_order(many):
    found = groups(many)
    assert [url for group in found for url in group] == sorted(f"memory:///many/{name}" for name in NAMES)
    assert all(0 < len(group) <= 4 * GROUP_SIZE for group in found)
    assert 25 < len(found) < 60, "the mean size is 50, so 40 groups"
    assert groups(many) == found


def test_listing_does_not_open_files(many, monkeypatch):
    monkeypatch.setattr(Store, "open", lambda *_: pytest.fail("opened"))
    assert sum(len(shard.files) for shard in many.shards()) == 2000


def difference(before, after):
    """How many groups are gone and how many are new."""
    return len(set(before) - set(after)), len(set(after) - set(before))


def test_one_file_more_changes_one_group(many, memory):
    before, found = groups(many), []
    for seed in range(40):
        path = f"/many/{seed % 17:02}/{random.Random(seed).randrange(2000):05}-new.jpg"
        memory.pipe_file(path, b"new")
        after = groups(many)
        assert sum(map(len, after)) == 2001
        found.append(difference(before, after))
        memory.rm_file(path)
    assert_local(found)


def test_one_file_less_changes_one_group(many, memory):
    before, found = groups(many), []
    for name in random.Random(0).sample(NAMES, 40):
        memory.rm_file(f"/many/{name}")
        after = groups(many)
        assert sum(map(len, after)) == 1999
        found.append(difference(before, after))
        memory.pipe_file(f"/many/{name}", b"back")
    assert_local(found)


def test_first_file_of_a_group_may_go_too(many, memory):
    before = groups(many)
    for group in before:
        memory.rm_file(group[0])
        after = groups(many)
        memory.pipe_file(group[0], b"back")
        gone = sorted(set(before) - set(after))
        assert len(gone) <= 3, "its group and the one before, which it now joins; a cut of theirs may move"
        assert group in gone
        assert sum(map(len, after)) == 1999


def assert_local(differences):
    """One group changes, is cut in two or joined to its neighbour; a run that was too long may be cut elsewhere, rarely."""
    strict = [pair for pair in differences if pair in {(1, 1), (1, 2), (2, 1), (1, 0), (0, 1)}]
    assert len(strict) >= 0.95 * len(differences), sorted(differences)
    assert max(map(sum, differences)) <= 5


@pytest.mark.parametrize("group_size", [1, 2, 5])
def test_long_runs_are_cut_at_four_times_the_mean_and_stay_stable(memory, group_size):
    for number in range(1500):
        memory.pipe_file(f"/cut/{number:04}.jpg", b"")
    source = Source(config.Source(url="memory://cut", format="files", group_size=group_size))
    before, found = groups(source), []
    assert sum(map(len, before)) == 1500
    assert max(map(len, before)) == (4 * group_size if group_size > 1 else 1)
    for number in range(0, 1500, 31):
        memory.pipe_file(f"/cut/{number:04}-new.jpg", b"")
        found.append(difference(before, groups(source)))
        memory.rm_file(f"/cut/{number:04}-new.jpg")
    if group_size > 1:
        assert_local(found)


def test_file_with_other_content_changes_one_fingerprint_only(photos):
    made = photos(dict.fromkeys(NAMES[:400], b"text"), group_size=GROUP_SIZE)
    before = {shard.url: shard.fingerprint for shard in made.shards()}
    (photos.root / NAMES[300]).write_bytes(b"more")
    after = {shard.url: shard.fingerprint for shard in made.shards()}
    assert before.keys() == after.keys()
    assert sum(before[url] != after[url] for url in before) == 1


# Samples


def test_sample_is_the_whole_file(photos):
    found = samples(photos({"b.jpg": jpeg(2), "a.jpg": jpeg(1)}))
    assert [(sample.key, sample.index, sample.image) for sample in found] == [("a.jpg", 0, jpeg(1)), ("b.jpg", 1, jpeg(2))]
    assert [(sample.offset, sample.nbytes) for sample in found] == [(0, len(jpeg(1))), (0, len(jpeg(2)))]
    assert found[0].url == f"file://{photos.root}/a.jpg"
    assert found[0].columns == {}


def test_only_images_count(photos):
    files = dict.fromkeys(
        [
            "a.JPG",
            "b.jpeg",
            "c.png",
            "d.webp",
            "e.gif",
            "f.bmp",
            "g.tif",
            "h.tiff",
            "a.txt",
            "b.json",
            "jpg",
            ".jpg",
            "c.jpg.part",
        ],
        b"x",
    )
    assert keys(photos(files)) == ["a.JPG", "b.jpeg", "c.png", "d.webp", "e.gif", "f.bmp", "g.tif", "h.tiff"]
    assert keys(photos(files, image="txt")) == ["a.txt"]


def test_links_to_files_are_files(photos, tmp_path):
    (tmp_path / "elsewhere.jpg").write_bytes(jpeg())
    source = photos({"a.jpg": jpeg()})
    (photos.root / "b.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    assert keys(source) == ["a.jpg", "b.jpg"]
    before = [shard.fingerprint for shard in source.shards()]
    (tmp_path / "elsewhere.jpg").write_bytes(jpeg() + b"more")
    assert [shard.fingerprint for shard in source.shards()] != before  # what counts is the file behind the link


def test_link_to_nothing_is_named(photos):
    source = photos({"a.jpg": jpeg()})
    (photos.root / "b.jpg").symlink_to(photos.root / "gone.jpg")
    with pytest.raises((SourceError, StorageError), match=r"b\.jpg: is a link to a file that is not there"):
        list(source.shards())


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


FILES = {"x/1/a.jpg": b"1", "x/2/b.jpg": b"2", "y/c.jpg": b"3", "png/d.png": b"4", "png/e.jpg/f.jpg": b"5"}


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("", ["png/d.png", "png/e.jpg/f.jpg", "x/1/a.jpg", "x/2/b.jpg", "y/c.jpg"]),
        ("x", ["1/a.jpg", "2/b.jpg"]),
        ("x/*/*.jpg", ["1/a.jpg", "2/b.jpg"]),
        ("x/1/*", ["a.jpg"]),
        ("**/*.jpg", ["png/e.jpg/f.jpg", "x/1/a.jpg", "x/2/b.jpg", "y/c.jpg"]),
        ("?/c.jpg", ["y/c.jpg"]),
        ("y/c.jpg", ["c.jpg"]),
        (["x/1", "y"], ["a.jpg", "c.jpg"]),
        (["x", "x/1", "x/*/a.jpg", "y"], ["1/a.jpg", "2/b.jpg", "c.jpg"]),
        (["x/1", "x"], ["2/b.jpg", "a.jpg"]),
        ("png", ["d.png", "e.jpg/f.jpg"]),
        ("png/e.jpg", ["f.jpg"]),
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
