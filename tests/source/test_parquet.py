"""Parquet as a source: image columns of every kind, keys, labels, carried columns, and files that are damaged."""

from __future__ import annotations

import datetime
import io
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_containers import page_of_huge_length, parquet
from images import jpeg
from meter import metered

from pipeline import config
from pipeline.errors import ConfigError, ShardChanged, ShardError, SourceError
from pipeline.source import Source

IMAGES = [jpeg(number) for number in range(3)]


@pytest.fixture
def source(tmp_path):
    """Make a source of one Parquet file with these columns."""

    def make(table, **settings):
        write(tmp_path / "shard.parquet", table)
        return Source(config.Source(url=str(tmp_path / "shard.parquet"), **settings))

    return make


def write(path, columns, **options):
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)


def samples(source):
    return [sample for shard in source.shards() for sample in source.read(shard)]


def error_of(sample):
    return sample.error and (sample.error.stage, sample.error.error)


def structs(images=IMAGES, paths=None, kind=None):
    rows = [{"bytes": image, "path": path} for image, path in zip(images, paths or ["a.jpg", "b.jpg", "c.jpg"], strict=True)]
    return pa.array(rows, kind or pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


# Images


@pytest.mark.parametrize(
    "column",
    [
        pa.array(IMAGES, pa.binary()),
        pa.array(IMAGES, pa.large_binary()),
        pa.array(IMAGES, pa.binary_view()),
        structs(),
        structs(kind=pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])),
    ],
    ids=["binary", "large_binary", "binary_view", "struct", "struct of large_binary"],
)
@pytest.mark.parametrize("settings", [{}, {"image": "picture"}])
def test_every_kind_of_image_column(source, column, settings):
    found = samples(source({"id": [1, 2, 3], "picture": column}, **settings))
    assert [sample.image for sample in found] == IMAGES
    assert [sample.index for sample in found] == [0, 1, 2]
    assert [sample.key for sample in found] == ["0", "1", "2"]
    assert [(sample.offset, sample.nbytes) for sample in found] == [(None, None)] * 3
    assert not any(sample.error for sample in found)


def test_image_inside_a_struct_can_be_named(source):
    found = samples(source({"picture": structs(), "thumbnail": pa.array(IMAGES, pa.binary())}, image="picture.bytes"))
    assert [sample.image for sample in found] == IMAGES


def test_several_binary_columns_ask_for_one(source):
    columns = {"picture": structs(), "mask": pa.array([b"m"] * 3, pa.binary())}
    made = source(columns)
    with pytest.raises(ConfigError, match=r"^source\.image: 2 columns hold binary data \(picture, mask\); name one$"):
        made.fields()
    with pytest.raises(ShardError, match=r"shard\.parquet: source\.image: 2 columns"):
        samples(made)
    assert [sample.image for sample in samples(source(columns, image="mask"))] == [b"m"] * 3


@pytest.mark.parametrize(
    "column", [[1, 2, 3], ["a.jpg", "b.jpg", "c.jpg"], [[1], [2], [3]], [{"path": "a"}, {"path": "b"}, {"path": "c"}]]
)
def test_image_column_of_another_type_is_the_users_mistake(source, column):
    made = source({"picture": column}, image="picture")
    with pytest.raises(ConfigError, match=r"source\.image: 'picture' is .*; allowed: a column of binary, or of"):
        made.fields()
    with pytest.raises(ShardError, match=r"shard\.parquet: source\.image"):
        samples(made)
    with pytest.raises(ConfigError, match=r"source\.image: 0 columns hold binary data \(none\)"):
        source({"picture": column}).fields()


@pytest.mark.parametrize(
    "column",
    [
        pa.array([IMAGES[0], None, IMAGES[2]], pa.binary()),
        structs([IMAGES[0], None, IMAGES[2]]),
        pa.array([{"bytes": IMAGES[0]}, None, {"bytes": IMAGES[2]}], pa.struct([("bytes", pa.binary())])),
    ],
    ids=["binary", "bytes", "struct"],
)
def test_null_image_costs_one_sample(source, column):
    found = samples(source({"image": column, "text": ["a", "b", "c"]}, columns=["text"]))
    assert [error_of(sample) for sample in found] == [None, ("read", "NoImage"), None]
    assert [sample.image for sample in found] == [IMAGES[0], b"", IMAGES[2]]
    assert [sample.columns["text"] for sample in found] == ["a", "b", "c"]


def test_zero_byte_image_is_a_sample(source):
    (sample,) = samples(source({"image": pa.array([b""], pa.binary())}))
    assert (sample.image, sample.error) == (b"", None)


# Keys


@pytest.mark.parametrize(
    ("key", "keys"), [("id", ["7", "8", "9"]), ("name", ["x", "y", "z"]), ("image.path", ["a.jpg", "b.jpg", "c.jpg"])]
)
def test_key_column(source, key, keys):
    columns = {"id": [7, 8, 9], "name": pa.array(["x", "y", "z"]).dictionary_encode(), "image": structs()}
    found = samples(source(columns, key=key))
    assert [sample.key for sample in found] == keys
    assert [sample.image for sample in found] == IMAGES


def test_null_key_costs_one_sample_and_takes_no_other_key(source):
    found = samples(source({"id": [None, 0, 1], "image": structs()}, key="id"))
    assert [error_of(sample) for sample in found] == [("read", "NoKey"), None, None]
    assert len({sample.key for sample in found}) == 3
    assert "id is null" in found[0].error.message


# Labels and carried columns


CARRIED = [
    (pa.array([1, None, 3], pa.int8()), pa.int64(), [1, None, 3]),
    (pa.array([1, 2, 2**63 - 1], pa.uint64()), pa.int64(), [1, 2, 2**63 - 1]),
    (pa.array([0.5, None, 1.5], pa.float32()), pa.float64(), [0.5, None, 1.5]),
    (pa.array([True, None, False]), pa.bool_(), [True, None, False]),
    (pa.array(["ä", None, ""], pa.large_string()), pa.string(), ["ä", None, ""]),
    (pa.array(["a", None, "a"]).dictionary_encode(), pa.string(), ["a", None, "a"]),
    (pa.array([0, 1, None], pa.date32()), pa.date32(), [datetime.date(1970, 1, 1), datetime.date(1970, 1, 2), None]),
    (
        pa.array([1_234_567_891, 0, None], pa.timestamp("ns")),
        pa.timestamp("us"),
        [datetime.datetime(1970, 1, 1, 0, 0, 1, 234567), datetime.datetime(1970, 1, 1), None],
    ),
    (
        pa.array([1, 0, None], pa.timestamp("ms", "UTC")),
        pa.timestamp("us", "UTC"),
        [datetime.datetime(1970, 1, 1, 0, 0, 0, 1000, datetime.UTC), datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC), None],
    ),
]


@pytest.mark.parametrize(("column", "kind", "values"), CARRIED, ids=[str(column.type) for column, _, _ in CARRIED])
@pytest.mark.parametrize("role", ["label", "columns"])
def test_columns_keep_their_values_and_a_type_that_every_reader_has(source, column, kind, values, role):
    made = source({"image": structs(), "it": column}, **({"label": "it"} if role == "label" else {"columns": ["it"]}))
    (field,) = made.fields()
    assert (field.name, field.type) == ("label" if role == "label" else "it", kind)
    found = [sample.columns[field.name] for sample in samples(made)]
    assert found == values
    pa.array(found, field.type)


def test_carried_struct_field_takes_its_last_name(source):
    meta = [{"camera": {"iso": 100}}, {"camera": None}, None]
    made = source({"image": structs(), "meta": meta}, columns=["meta.camera.iso", "image.path"])
    assert [(field.name, field.type) for field in made.fields()] == [("iso", pa.int64()), ("path", pa.string())]
    assert [sample.columns for sample in samples(made)] == [
        {"iso": 100, "path": "a.jpg"}, {"iso": None, "path": "b.jpg"}, {"iso": None, "path": "c.jpg"},
    ]  # fmt: skip


def test_nothing_is_carried_unless_asked_for(source):
    made = source({"image": structs(), "txt": ["a", "b", "c"], "json": ["{}"] * 3, "label": [1, 2, 3]})
    assert made.fields() == []
    assert [sample.columns for sample in samples(made)] == [{}, {}, {}]


@pytest.mark.parametrize(
    ("label_type", "labels", "expected"),
    [
        ("int64", ["1", "2", None], [1, 2, None]),
        ("string", [1, 2, 3], ["1", "2", "3"]),
        ("float64", [1, 2, 3], [1.0, 2.0, 3.0]),
        ("bool", ["yes", "no", "true"], [True, False, True]),
    ],
)
def test_label_as_another_type(source, label_type, labels, expected):
    made = source({"image": structs(), "class": labels}, label="class", label_type=label_type)
    found = samples(made)
    assert [sample.columns["label"] for sample in found] == expected
    assert not any(sample.error for sample in found)
    pa.array(expected, made.fields()[0].type)


def test_label_that_is_not_of_the_type_costs_one_sample(source):
    found = samples(source({"image": structs(), "class": ["1", "cat", "3"]}, label="class", label_type="int64"))
    assert [error_of(sample) for sample in found] == [None, ("label", "WrongType"), None]
    assert "'cat' is not int64" in found[1].error.message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label": "clas"}, r"source\.label: there is no column 'clas'; did you mean class\?"),
        ({"key": "imge.path"}, r"source\.key: there is no column 'imge\.path'; did you mean image\?"),
        ({"key": "image.pth"}, r"source\.key: there is no column 'image\.pth'; did you mean path\?"),
        ({"columns": ["Caption"]}, r"source\.columns: there is no column 'Caption'; did you mean caption\?"),
        ({"image": "zzzz"}, r"source\.image: there is no column 'zzzz'; it has image, class, caption"),
        ({"label": "class.name"}, r"source\.label: there is no column 'class\.name'"),
    ],
)
def test_missing_column_is_named_with_the_nearest(source, settings, message):
    made = source({"image": structs(), "class": [1, 2, 3], "caption": ["a", "b", "c"]}, **settings)
    with pytest.raises(ConfigError, match=message):
        made.fields()
    with pytest.raises(ShardError, match=message) as caught:
        samples(made)
    assert str(caught.value).count("shard.parquet") == 1


@pytest.mark.parametrize("role", ["label", "columns"])
def test_column_that_no_dataset_holds_is_the_users_mistake(source, role):
    made = source(
        {"image": structs(), "boxes": [[1], [2], [3]]}, **({"label": "boxes"} if role == "label" else {"columns": ["boxes"]})
    )
    with pytest.raises(ConfigError, match=rf"^source\.{role}: 'boxes' is list<"):
        made.fields()


# Files


def test_zero_rows_are_no_samples(source):
    assert samples(source({"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())}, columns=["text"])) == []


def corrupt(column, **options):
    file = io.BytesIO()
    pq.write_table(pa.table({"image": pa.array(column, pa.binary())}), file, **options)
    return file.getvalue()


NOISE = np.random.default_rng(0).bytes(60_000)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"PAR1",
        b"<html>404</html>" * 100,
        corrupt(IMAGES)[:-30],
        corrupt(IMAGES)[:400] + bytes(600),
        corrupt([NOISE]).replace(NOISE[1000:30_000], b""),
        bytes(200) + corrupt(IMAGES, compression="zstd")[200:],
        corrupt(IMAGES)[:4] + b"\xff" * 60 + corrupt(IMAGES)[64:],
    ],
    ids=["empty", "magic only", "html", "cut", "zeros", "page too short", "page header zeroed", "page header damaged"],
)
def test_file_that_is_no_parquet_is_named(tmp_path, payload):
    (tmp_path / "broken.parquet").write_bytes(payload)
    made = Source(config.Source(url=str(tmp_path / "broken.parquet")))
    with pytest.raises(ShardError, match=r"broken\.parquet: not a readable Parquet file"):
        samples(made)


def test_text_that_is_not_utf8_is_named(source):
    text = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 1], np.int32)), pa.py_buffer(b"\xff"))
    with pytest.raises(ShardError, match=r"shard\.parquet: not a readable"):
        samples(source({"image": pa.array([IMAGES[0]], pa.binary()), "text": text}, columns=["text"]))


def test_what_a_file_claims_to_hold_takes_no_memory(tmp_path):
    assert len(samples(Source(config.Source(url=str(write_bytes(tmp_path / "good.parquet", parquet())), label="label")))) == 3
    made = Source(config.Source(url=str(write_bytes(tmp_path / "huge.parquet", page_of_huge_length())), label="label"))
    with metered() as meter:
        with pytest.raises(ShardError, match=r"huge\.parquet: not a readable Parquet file: .*Page was smaller"):
            samples(made)
        seconds, num_bytes = meter()
    assert num_bytes < 32 << 20
    assert seconds < 2


def write_bytes(path, payload):
    path.write_bytes(payload)
    return path


def test_one_damaged_file_does_not_stop_the_others(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"damaged")
    write(tmp_path / "b.parquet", {"image": structs(), "class": [1, 2, 3]})
    made = Source(config.Source(url=str(tmp_path), format="parquet", label="class"))
    assert [(field.name, field.type) for field in made.fields()] == [("label", pa.int64())]
    damaged, good = sorted(made.shards(), key=lambda shard: shard.url)
    with pytest.raises(ShardError, match=r"a\.parquet"):
        list(made.read(damaged))
    assert [sample.columns["label"] for sample in made.read(good)] == [1, 2, 3]
    (tmp_path / "b.parquet").unlink()
    with pytest.raises(ShardError, match=r"a\.parquet"):
        made.fields()


def test_file_without_the_column_fails_alone(tmp_path):
    write(tmp_path / "a.parquet", {"image": structs(), "class": [1, 2, 3]})
    write(tmp_path / "b.parquet", {"image": structs(), "klass": [1, 2, 3]})
    made = Source(config.Source(url=str(tmp_path / "*.parquet"), label="class"))
    first, second = sorted(made.shards(), key=lambda shard: shard.url)
    assert len(list(made.read(first))) == 3
    with pytest.raises(ShardError, match=r"b\.parquet: source\.label: there is no column 'class'; did you mean klass"):
        list(made.read(second))


def test_source_without_a_parquet_file_is_the_users_mistake(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    for url in (tmp_path, tmp_path / "*.parquet", tmp_path / "missing.parquet"):
        made = Source(config.Source(url=str(url), format="parquet"))
        for look in (lambda made=made: list(made.shards()), made.fields, made.layout):
            with pytest.raises(SourceError, match=r"source\.url") as caught:
                look()
            assert str(url) in str(caught.value)


def test_file_changed_after_the_listing_is_noticed(source, tmp_path):
    made = source({"image": structs()})
    (shard,) = made.shards()
    write(tmp_path / "shard.parquet", {"image": structs([IMAGES[2], IMAGES[1], IMAGES[0]])})
    with pytest.raises(ShardChanged, match=r"shard\.parquet"):
        list(made.read(shard))


def test_order_and_index_go_on_across_row_groups(tmp_path):
    images = [f"{number}".encode() for number in range(100)]
    write(tmp_path / "shard.parquet", {"image": pa.array(images, pa.binary())}, row_group_size=7)
    found = samples(Source(config.Source(url=str(tmp_path / "shard.parquet"))))
    assert [sample.image for sample in found] == images
    assert [sample.index for sample in found] == list(range(100))


def test_memory_does_not_grow_with_the_row_group(tmp_path):
    payload = np.random.default_rng(0).bytes(200_000)
    # A page is read whole, so it has to be smaller than the row group.
    write(
        tmp_path / "shard.parquet", {"image": pa.array([payload] * 600, pa.binary())}, use_dictionary=False, write_batch_size=8
    )
    assert (tmp_path / "shard.parquet").stat().st_size > 100 << 20
    made = Source(config.Source(url=str(tmp_path / "shard.parquet")))
    (shard,) = made.shards()
    arrow_bytes = 0
    tracemalloc.start()
    try:
        before = pa.total_allocated_bytes()
        for sample in made.read(shard):
            assert len(sample.image) == 200_000
            arrow_bytes = max(arrow_bytes, pa.total_allocated_bytes() - before)
        python_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert arrow_bytes + python_bytes < 25 << 20
