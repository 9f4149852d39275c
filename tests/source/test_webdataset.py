"""Tars as a source: what becomes a sample, where its bytes lie, and what is refused by name."""

from __future__ import annotations

import io
import pickle
import tarfile
import tracemalloc

import pyarrow as pa
import pytest
from images import jpeg, member, tar

import pipeline.source.tar
from pipeline import config
from pipeline.errors import ShardChanged, ShardError, SourceError
from pipeline.source import Source, webdataset
from pipeline.storage import Store


@pytest.fixture
def source(tmp_path):
    """Make a source of one shard with these bytes."""

    def make(payload, name="shard.tar", **settings):
        (tmp_path / name).write_bytes(payload)
        return Source(config.Source(url=str(tmp_path / name), **settings))

    return make


def samples(source):
    return [sample for shard in source.shards() for sample in source.read(shard)]


def error_of(sample):
    return sample.error and (sample.error.stage, sample.error.error)


def shard_error(source):
    with pytest.raises(ShardError) as caught:
        samples(source)
    return str(caught.value)


# What a sample is


def test_siblings_become_label_and_columns(source):
    members = []
    for number in range(3):
        members += [
            (f"{number:05}.jpg", jpeg(number)),
            (f"{number:05}.cls", f"{number + 7}\n".encode()),
            (f"{number:05}.json", b'{"author": {"name": "Zo\\u00eb"}, "score": 0.5}'),
            (f"{number:05}.txt", f"caption {number}".encode()),
        ]
    made = source(tar(members), label="cls")
    found = samples(made)
    assert [sample.key for sample in found] == ["00000", "00001", "00002"]
    assert [sample.index for sample in found] == [0, 1, 2]
    assert [sample.image for sample in found] == [jpeg(0), jpeg(1), jpeg(2)]
    assert [sample.columns["label"] for sample in found] == [7, 8, 9]
    assert found[1].columns["txt"] == "caption 1"
    assert found[1].columns["json"] == '{"author": {"name": "Zo\\u00eb"}, "score": 0.5}'
    assert all(sample.error is None for sample in found)
    assert [(field.name, field.type) for field in made.fields()] == [
        ("label", pa.int64()), ("txt", pa.string()), ("json", pa.string()),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "columns"),
    [
        ({}, {"txt": "a cat", "json": '{"w": 3, "deep": {"ok": true, "list": [1]}}'}),
        ({"columns": []}, {}),
        ({"columns": ["json.w", "json.deep.list"]}, {"w": "3", "list": "[1]"}),
        ({"columns": ["json.nothing"]}, {"nothing": None}),
        ({"label": "cls", "columns": []}, {"label": 1}),
        ({"label": "cls", "label_type": "string", "columns": []}, {"label": "1"}),
        ({"label": "cls", "label_type": "bool", "columns": []}, {"label": True}),
        ({"label": "txt", "columns": []}, {"label": "a cat"}),
        ({"label": "json.w", "label_type": "float64", "columns": []}, {"label": 3.0}),
        ({"label": "json.deep.ok", "label_type": "bool", "columns": []}, {"label": True}),
        ({"label": "absent", "columns": []}, {"label": None}),
    ],
)
def test_selectors(source, settings, columns):
    payload = tar(
        [("a.jpg", jpeg()), ("a.cls", b" 1\n"), ("a.txt", b"a cat"), ("a.json", b'{"w": 3, "deep": {"ok": true, "list": [1]}}')]
    )
    made = source(payload, **settings)
    (sample,) = samples(made)
    assert (sample.columns, sample.error) == (columns, None)
    assert {field.name for field in made.fields()} == set(columns)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("a.jpg", "a"),
        ("dir.v2/sub/a.jpg", "dir.v2/sub/a"),
        ("./a.jpg", "./a"),
        ("../../etc/a.jpg", "../../etc/a"),
        ("/abs/a.JPG", "/abs/a"),
        ("with space & ünïcödé %20.png", "with space & ünïcödé %20"),
        ("new\nline.jpg", "new\nline"),
        ("x" * 90 + "/" + "y" * 150 + ".jpg", "x" * 90 + "/" + "y" * 150),
    ],
)
@pytest.mark.parametrize("archive_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_keys_are_names_up_to_the_first_dot_of_the_basename(source, tmp_path, name, key, archive_format):
    (sample,) = samples(source(tar([(name, jpeg())], archive_format=archive_format)))
    assert (sample.key, sample.error) == (key, None)
    assert sample.image == jpeg()
    assert [path.name for path in tmp_path.iterdir()] == ["shard.tar"], "nothing is ever extracted"


def test_first_dot_ends_the_key_so_other_images_of_a_sample_do_not_count(source):
    (sample,) = samples(source(tar([("a.jpg", jpeg(1)), ("a.mask.png", b"a mask"), ("a.seg.tif", b"another")])))
    assert (sample.key, sample.image, sample.error) == ("a", jpeg(1), None)


def test_dotfiles_folders_and_names_without_extension_are_no_samples(source):
    folder = tarfile.TarInfo("folder.jpg")
    folder.type = tarfile.DIRTYPE
    names = [("._a.jpg", b"resource fork"), (".hidden", b""), ("README", b"hello"), (folder, b""), ("a.jpg", jpeg())]
    assert [sample.key for sample in samples(source(tar(names)))] == ["a"]


def test_same_name_in_two_folders_is_two_samples(source):
    found = samples(source(tar([("x/a.jpg", jpeg(1)), ("y/a.jpg", jpeg(2))])))
    assert [(sample.key, sample.image) for sample in found] == [("x/a", jpeg(1)), ("y/a", jpeg(2))]


def test_names_that_are_not_utf8_are_readable_and_distinct(source):
    odd = [(f"caf{char}.jpg", jpeg(number)) for number, char in enumerate(["\udce9", "\udcea", "é"])]
    found = samples(source(tar(odd, archive_format=tarfile.GNU_FORMAT)))
    assert [sample.key for sample in found] == ["caf\\xe9", "caf\\xea", "café"]
    assert [sample.image for sample in found] == [jpeg(0), jpeg(1), jpeg(2)]
    pa.array([sample.key for sample in found], pa.string())


# Where the bytes lie


@pytest.mark.parametrize("archive_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_one_ranged_read_gives_the_image_back(source, archive_format):
    names = [
        f"{'long-' * 20}{number}" if number == 1 and archive_format != tarfile.USTAR_FORMAT else f"k{number}"
        for number in range(4)
    ]
    members = [entry for n, name in enumerate(names) for entry in [(f"{name}.txt", b"t" * n * 600), (f"{name}.jpg", jpeg(n))]]
    made = source(tar(members, archive_format=archive_format))
    for number, sample in enumerate(samples(made)):
        assert sample.nbytes == len(jpeg(number))
        assert Store().read_range(sample.url, sample.offset, sample.nbytes) == jpeg(number)


@pytest.mark.parametrize(("name", "mode"), [("shard.tar.gz", "w:gz"), ("shard.TGZ", "w:gz")])
def test_compressed_archives_work_and_have_no_offset(source, name, mode):
    found = samples(source(tar([("a.jpg", jpeg(1)), ("a.cls", b"4"), ("b.jpg", jpeg(2))], mode), name, label="cls"))
    assert [(sample.key, sample.image, sample.offset) for sample in found] == [("a", jpeg(1), None), ("b", jpeg(2), None)]
    assert [sample.columns["label"] for sample in found] == [4, None]


def test_source_is_picklable_before_and_after_use(source):
    made = source(tar([("a.jpg", jpeg())]))
    samples(made)
    shard = next(made.shards())
    again, shard = pickle.loads(pickle.dumps((made, shard)))
    assert [sample.key for sample in again.read(shard)] == ["a"]


# Samples that cannot be read


def test_several_images_are_ambiguous_until_the_config_names_one(source):
    payload = tar([("a.jpg", jpeg(1)), ("a.png", b"p"), ("a.cls", b"3"), ("b.jpg", jpeg(2))])
    first, second = samples(source(payload))
    assert error_of(first) == ("read", "AmbiguousImage")
    assert "jpg, png" in first.error.message
    assert "source.image" in first.error.message
    assert second.error is None
    chosen = samples(source(payload, image="jpg"))
    assert [(sample.image, sample.error) for sample in chosen] == [(jpeg(1), None), (jpeg(2), None)]
    (png, none) = samples(source(payload, image="PNG"))
    assert png.image == b"p"
    assert error_of(none) == ("read", "NoImage")


def test_sample_without_image_says_what_it_has(source):
    (sample,) = samples(source(tar([("a.txt", b"no picture"), ("a.cls", b"3")])))
    assert error_of(sample) == ("read", "NoImage")
    assert "cls, txt" in sample.error.message


def test_label_of_the_wrong_type_costs_one_sample(source):
    values = [b"3", b"cat", b"", b"3.5", b"\xff\xfe", b"9" * 30, b"7"]
    payload = tar([entry for n, value in enumerate(values) for entry in [(f"{n}.jpg", jpeg(n)), (f"{n}.cls", value)]])
    found = samples(source(payload, label="cls"))
    assert [sample.columns.get("label") for sample in found] == [3, None, None, None, None, None, 7]
    assert [error_of(sample) for sample in found] == [
        None, ("label", "WrongType"), ("label", "WrongType"), ("label", "WrongType"), ("label", "UnicodeDecodeError"),
        ("label", "WrongType"), None,
    ]  # fmt: skip
    assert "'cat' is not int64" in found[1].error.message


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (b'{"x": ', "JSONDecodeError"),
        (b"[" * 100_000, "RecursionError"),
        (b'{"x": ' + b"1" * 5000 + b"}", "ValueError"),
        (b'{"x": "\\ud800"}', "WrongType"),
        (b'{"x": ["\\ud800"]}', "WrongType"),
        (b"\xff", "UnicodeDecodeError"),
    ],
)
def test_json_that_nobody_can_store_costs_one_sample(source, text, error):
    payload = tar([("a.jpg", jpeg(1)), ("a.json", text), ("b.jpg", jpeg(2)), ("b.json", b'{"x": "fine"}')])
    bad, good = samples(source(payload, columns=["json.x"]))
    assert error_of(bad) == ("label", error)
    pa.array([bad.error.message])
    assert (good.columns, good.error) == ({"x": "fine"}, None)


def test_repeated_extension_starts_a_sample_of_the_same_key(source):
    found = samples(
        source(tar([("a.jpg", jpeg(1)), ("a.cls", b"1"), ("a.jpg", jpeg(2)), ("b.jpg", jpeg(3)), ("a.jpg", jpeg(4))]))
    )
    assert [(sample.key, sample.index) for sample in found] == [("a", 0), ("a", 1), ("b", 2), ("a", 3)]
    assert [sample.image for sample in found] == [jpeg(1), jpeg(2), jpeg(3), jpeg(4)]


def test_zero_byte_image_is_a_sample(source):
    empty, good = samples(source(tar([("a.jpg", b""), ("b.jpg", jpeg())])))
    assert (empty.key, empty.image, empty.nbytes) == ("a", b"", 0)
    assert good.image == jpeg()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused_by_name(source, kind):
    payload = tar([("a.jpg", jpeg(1)), member("b.jpg", type=kind, linkname="a.jpg"), ("c.jpg", jpeg(3))])
    first, link, last = samples(source(payload))
    assert error_of(link) == ("read", "NotAFile")
    assert "b.jpg" in link.error.message
    assert (first.image, last.image) == (jpeg(1), jpeg(3))


def test_symlink_to_a_file_of_the_machine_is_not_followed(source):
    (sample,) = samples(source(tar([member("b.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")])))
    assert (sample.image, error_of(sample)) == (b"", ("read", "NotAFile"))


def test_sparse_member_is_refused_and_the_rest_is_read(source):
    info, _ = member(
        "b.jpg", pax_headers={"GNU.sparse.map": "0,512", "GNU.sparse.size": "1048576", "GNU.sparse.numblocks": "1"}
    )
    info.size = 512
    first, sparse, last = samples(source(tar([("a.jpg", jpeg(1)), (info, b"x" * 512), ("c.jpg", jpeg(3))])))
    assert error_of(sparse) == ("read", "NotAFile")
    assert (first.image, last.image) == (jpeg(1), jpeg(3))


def test_huge_members_are_refused_unread(source, monkeypatch):
    monkeypatch.setattr(webdataset, "MAX_IMAGE_BYTES", 1000)
    monkeypatch.setattr(webdataset, "MAX_SIBLING_BYTES", 100)
    monkeypatch.setattr(pipeline.source.tar, "FREE_BYTES", 50)
    payload = tar(
        [("a.jpg", b"x" * 1001), ("b.jpg", b"x" * 1000), ("b.txt", b"y" * 101), ("c.jpg", b"x"), ("c.npy", b"z" * 5000)]
    )
    found = samples(source(payload))
    assert [error_of(sample) for sample in found] == [("read", "TooLarge"), ("read", "TooLarge"), None]
    assert "1001 bytes" in found[0].error.message


# Shards that cannot be read


WHOLE = tar([(f"{n}.{kind}", payload) for n in range(6) for kind, payload in [("jpg", jpeg(n)), ("cls", b"1")]])


def test_truncated_archive_is_never_taken_for_a_short_one(source):
    end = len(WHOLE.rstrip(b"\0"))
    for cut in sorted({*range(0, end, 512), *range(100, end, 1031), end}):
        assert "shard.tar" in shard_error(source(WHOLE[:cut])), cut


def test_truncated_compressed_archive_is_never_taken_for_a_short_one(source):
    whole = tar([("a.jpg", jpeg(1)), ("b.jpg", jpeg(2))], "w:gz")
    refused = []
    for cut in range(0, len(whole), 41):
        made = source(whole[:cut], "shard.tar.gz")
        try:
            found = samples(made)
        except ShardError as error:
            refused.append(str(error))
        else:  # only padding and checksum are missing
            assert [sample.image for sample in found] == [jpeg(1), jpeg(2)]
    assert len(refused) > 0.9 * len(whole) / 41
    assert all("shard.tar.gz" in message for message in refused)


@pytest.mark.parametrize(
    "payload",
    [b"<!DOCTYPE html><html><body>404</body></html>" * 40, b"\x89PNG\r\n\x1a\n" * 200, b"PK\x03\x04" * 300, b"", b"\x01"],
)
@pytest.mark.parametrize("name", ["page.tar", "page.tar.gz"])
def test_what_is_no_archive_is_named(source, payload, name):
    assert name in shard_error(source(payload, name))


def test_compressed_archive_without_the_ending_is_named(source):
    assert "shard.tar" in shard_error(source(tar([("a.jpg", jpeg())], "w:gz")))


@pytest.mark.parametrize("number", range(3, 9, 2))
def test_damaged_header_loses_no_sample_in_silence(source, number):
    headers = [position for position in range(0, len(WHOLE), 512) if WHOLE[position + 257 : position + 262] == b"ustar"]
    damaged = bytearray(WHOLE)
    damaged[headers[number] + 3] ^= 0xFF
    assert "shard.tar" in shard_error(source(bytes(damaged)))


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "size", [b"\x80" + b"\x00" * 3 + b"\x7f" * 8, b"\xff" * 11 + b"\x00", b"77777777777\x00", b"\xc0" + b"\x01" * 11]
)
@pytest.mark.parametrize("name", ["shard.tar", "shard.tar.gz"])
def test_absurd_member_sizes_end_soon(source, size, name):
    damaged = bytearray(tar([("a.jpg", jpeg(1)), ("b.bin", b"x"), ("c.jpg", jpeg(2))], archive_format=tarfile.USTAR_FORMAT))
    header = damaged.index(b"b.bin")
    damaged[header + 124 : header + 136] = size
    damaged[header + 148 : header + 156] = b" " * 8
    damaged[header + 148 : header + 156] = b"%06o\0 " % sum(damaged[header : header + 512])
    if name.endswith("gz"):
        import gzip

        damaged = gzip.compress(bytes(damaged))
    assert name in shard_error(source(bytes(damaged), name))


def test_empty_archive_has_no_samples(source):
    assert samples(source(tar([]))) == []
    assert samples(source(tar([], "w:gz"), "empty.tar.gz")) == []


@pytest.mark.parametrize("change", ["longer", "same size", "gone"])
def test_file_changed_after_the_listing_is_noticed(source, tmp_path, change):
    made = source(tar([("a.jpg", jpeg(1))]))
    (shard,) = made.shards()
    path = tmp_path / "shard.tar"
    if change == "gone":
        path.unlink()
        assert made.relist(shard) is None
        return
    payload = tar([("a.jpg", jpeg(2))]) if change == "same size" else tar([("a.jpg", jpeg(1))] * 40)
    path.write_bytes(payload)
    with pytest.raises(ShardChanged, match=r"shard\.tar"):
        list(made.read(shard))
    now = made.relist(shard)
    assert now.fingerprint != shard.fingerprint
    assert next(made.read(now)).image in (jpeg(1), jpeg(2))


# Listings


def test_source_without_an_archive_is_the_users_mistake(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    for url in (tmp_path, tmp_path / "*.tar", tmp_path / "missing.tar", tmp_path / "missing" / "*.tar"):
        with pytest.raises(SourceError, match=r"source\.url") as caught:
            list(Source(config.Source(url=str(url), format="webdataset")).shards())
        assert str(url) in str(caught.value)
        assert caught.value.exit_code == 2


def test_one_shard_an_archive_whatever_lies_beside_it(tmp_path):
    for name in ("b.tar", "a.tar", "sub/c.tar", "d.tgz", "e.tar.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(tar([("a.jpg", jpeg())], "w:gz" if name.endswith("gz") else "w"))
    for name in ("index.json", "b.tar.idx", "tar", "x.tar.part"):
        (tmp_path / name).write_text("no archive")

    def urls(*patterns):
        settings = config.Source(url=[str(tmp_path / pattern) for pattern in patterns], format="webdataset")
        return [shard.url.removeprefix(f"file://{tmp_path}/") for shard in Source(settings).shards()]

    assert sorted(urls("")) == ["a.tar", "b.tar", "d.tgz", "e.tar.gz", "sub/c.tar"]
    assert sorted(urls("*.tar")) == ["a.tar", "b.tar"]
    assert sorted(urls("**/*.tar")) == ["a.tar", "b.tar", "sub/c.tar"]
    assert sorted(set(urls("*.tar", "a*", "sub"))) == ["a.tar", "b.tar", "sub/c.tar"]


def test_overlapping_globs_count_a_shard_once(tmp_path):
    from pipeline import plan, recipe
    from pipeline.dataset import partition

    for name in ("a.tar", "b.tar"):
        (tmp_path / name).write_bytes(tar([("a.jpg", jpeg())]))
    settings = config.Source(url=[str(tmp_path / "*.tar"), str(tmp_path / "a*"), str(tmp_path)], format="webdataset")
    made = Source(settings)
    goal = recipe.Recipe(fields={"precision": "float32"}, widths={"embedding": 2})
    schema = partition.schema(goal, made.fields())
    target = partition.Target(store=Store(), url=str(tmp_path / "out"), recipe=goal, layout=made.layout(), schema=schema)
    found = plan.make(made.shards(), None, target)
    assert found.num_shards == 2


def test_format_is_guessed_from_plain_urls_only():
    def guess(*urls):
        return Source(config.Source(url=list(urls))).format_name

    assert guess("s3://b/x-{0..9}.tar", "s3://b/*.tar.gz", "s3://b/y.TGZ") == "webdataset"
    assert guess("x/*.parquet") == "parquet"
    assert guess("x/images/") == "files"
    with pytest.raises(SourceError, match=r"source\.format"):
        guess("a.tar", "b.parquet")


# Bounds


def test_memory_does_not_grow_with_the_archive(tmp_path):
    path = tmp_path / "large.tar"
    zeros = io.BytesIO(bytes(4 << 20))
    with open(path, "wb") as file, tarfile.open(fileobj=file, mode="w|") as archive:
        for number in range(70):
            archive.addfile(*stream(f"{number:05}.bin", zeros, 4 << 20))
            archive.addfile(*stream(f"{number:05}.jpg", zeros, 64 << 10))
        for number in range(20_000):
            archive.addfile(*stream(f"many-{number:05}.jpg", zeros, 100))
    assert path.stat().st_size > 290 << 20
    made = Source(config.Source(url=str(path)))
    (shard,) = made.shards()
    tracemalloc.start()
    try:
        num_read = sum(len(sample.image) > 0 for sample in made.read(shard))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert num_read == 20_070
    assert peak_bytes < 10 << 20


def stream(name, file, size):
    info = tarfile.TarInfo(name)
    info.size = size
    file.seek(0)
    return info, file
