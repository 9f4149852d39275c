"""The config file: what is accepted, and that every mistake is one line with field, value and what is allowed."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from pipeline import config
from pipeline.errors import ConfigError

MINIMAL = {
    "source": {"url": "s3://photos/*.tar", "label": "cls"},
    "backbone": {"model": "torchvision/resnet50", "weights": "IMAGENET1K_V2", "nodes": {"embedding": {"node": "flatten"}}},
    "output": {"url": "s3://features/photos"},
}
MISSING = object()
EXAMPLES = sorted((Path(__file__).parent.parent / "configs").glob("**/*.yaml"))


def changed(path, value):
    """The minimal config with one field changed."""
    raw = copy.deepcopy(MINIMAL)
    *parents, last = path.split("/")
    place = raw
    for parent in parents:
        place = place.setdefault(parent, {})
    if value is MISSING:
        del place[last]
    else:
        place[last] = value
    return raw


def message(raw):
    with pytest.raises(ConfigError) as caught:
        config.parse(raw, "my.yaml")
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.fixture
def write(tmp_path):
    """Write a config file with these bytes."""

    def make(payload=None, name="my.yaml"):
        if not isinstance(payload, bytes):
            payload = (payload if isinstance(payload, str) else yaml.safe_dump(payload or MINIMAL)).encode()
        (tmp_path / name).write_bytes(payload)
        return tmp_path / name

    return make


# Mistakes: path, value, the rest of the line behind `my.yaml: `

SECTION = "a section with keys of its own"
NAMES = "letters, digits and _, and not content_hash, height, index, key, label, nbytes, offset, shard, url, width"
PROVIDERS = "allowed are torchvision/NAME, timm/NAME, python/module:function"
NO_CREDENTIALS = "credentials do not belong into a URL; use the environment, a profile or storage.options"
MISTAKES = [
    # sections
    ("source", MISSING, "source: missing; it is required"),
    ("backbone", "resnet50", f"backbone: 'resnet50' is wrong; allowed: {SECTION}"),
    ("output", None, f"output: nothing is wrong; allowed: {SECTION}"),
    ("run", [1], f"run: [1] is wrong; allowed: {SECTION}"),
    ("probe", True, f"probe: true is wrong; allowed: {SECTION}, or nothing"),
    # unknown keys
    ("sources", {}, "sources: unknown key; did you mean source?"),
    ("source/lable", "cls", "source.lable: unknown key; did you mean label, label_type, image?"),
    ("run/batchsize", 8, "run.batchsize: unknown key; did you mean batch_size"),
    (
        "run/zzz",
        8,
        "run.zzz: unknown key; allowed are batch_size, decode_timeout_s, max_attempts, max_failed, max_failed_samples, ",
    ),
    (
        "probe/C",
        1.0,
        "probe.C: unknown key; allowed are group, label, labels, labels_key, node, normalize, seed, split, test, ",
    ),
    ("probe/standardize", True, "probe.standardize: unknown key; did you mean normalize"),
    ("source/storage/endpoint", "x", "source.storage.endpoint: unknown key; did you mean endpoint_url"),
    ("backbone/nodes/embedding/pooling", "mean", "backbone.nodes.embedding.pooling: unknown key; did you mean pool?"),
    ("backbone/preprocess/size", 9, "backbone.preprocess.size: unknown key; did you mean resize?"),
    # source
    ("source/url", MISSING, "source.url: missing; it is required"),
    ("source/url", "", "source.url: '': give a URL, a glob or a list of them"),
    ("source/url", [], "source.url: []: give a URL, a glob or a list of them"),
    ("source/url", ["a", " "], "source.url: ['a', ' ']: give a URL, a glob or a list of them"),
    ("source/url", 5, "source.url: 5 is wrong; allowed: text, or a list of text"),
    ("source/url", ["a", 5], "source.url: 5 is wrong; allowed: text, or a list of text"),
    ("source/url", None, "source.url: nothing is wrong; allowed: text, or a list of text"),
    ("source/format", "tar", "source.format: 'tar': allowed: auto, webdataset, parquet, files"),
    ("source/label", False, "source.label: false is wrong; allowed: text, or nothing"),
    ("source/label_type", "int", "source.label_type: 'int' is wrong; allowed: string, int64, float64, bool, or nothing"),
    ("source/columns", "txt", "source.columns: 'txt' is wrong; allowed: a list of text, or nothing"),
    ("source/columns", ["json.url"], f"source.columns: ['json.url']: 'url' cannot name a column; {NAMES}"),
    ("source/columns", ["a b"], f"source.columns: ['a b']: 'a b' cannot name a column; {NAMES}"),
    ("source/columns", ["txt", "json.TXT"], "source.columns: ['txt', 'json.TXT']: 'txt' appears twice"),
    ("source/group_size", 0, "source.group_size: 0 is wrong; allowed: a whole number from 1 to 100000"),
    ("source/group_size", True, "source.group_size: true is wrong; allowed: a whole number from 1 to 100000"),
    ("source/group_size", 1.5, "source.group_size: 1.5 is wrong; allowed: a whole number from 1 to 100000"),
    ("source/max_pixels", 2**31, "source.max_pixels: 2147483648 is wrong; allowed: a whole number from 1 to 2147483647"),
    ("source/storage/anonymous", "maybe", "source.storage.anonymous: 'maybe' is wrong; allowed: true or false"),
    ("source/storage/endpoint_url", 9000, "source.storage.endpoint_url: 9000 is wrong; allowed: text, or nothing"),
    # backbone
    ("backbone/model", "resnet50", f"backbone.model: 'resnet50': {PROVIDERS}"),
    ("backbone/model", "torchvision/", f"backbone.model: 'torchvision/': {PROVIDERS}"),
    (
        "backbone/model",
        "python/my.module",
        "backbone.model: 'python/my.module': python models are given as python/module:function",
    ),
    ("backbone/weights", MISSING, "backbone.weights: missing; it is required"),
    ("backbone/weights", "DEFAULT", "backbone.weights: 'DEFAULT': name the weights themselves, for example IMAGENET1K_V2: "),
    ("backbone/weights", "seed:x", "backbone.weights: 'seed:x': a seed is given as seed:N with N from 0 to 999999999"),
    ("backbone/nodes", {}, "backbone.nodes: name at least one node, for example embedding: {node: flatten}"),
    ("backbone/nodes", ["flatten"], "backbone.nodes: ['flatten'] is wrong; allowed: column names, each with a section such as"),
    ("backbone/nodes", {5: {"node": "flatten"}}, "backbone.nodes: 5 is wrong; allowed: column names, each with a section"),
    ("backbone/nodes/embedding", "flatten", "backbone.nodes.embedding: 'flatten' is wrong; allowed: column names, each with "),
    ("backbone/nodes/embedding/node", MISSING, "backbone.nodes.embedding.node: missing; it is required"),
    ("backbone/nodes/embedding/pool", "max", "backbone.nodes.embedding.pool: 'max' is wrong; allowed: none, mean, cls"),
    ("backbone/nodes/embedding/normalize", True, "backbone.nodes.embedding.normalize: true is wrong; allowed: none, l2"),
    ("backbone/nodes/Label", {"node": "flatten"}, f"backbone.nodes: 'Label' cannot name a column; {NAMES}"),
    ("backbone/nodes/my-node", {"node": "flatten"}, f"backbone.nodes: 'my-node' cannot name a column; {NAMES}"),
    ("backbone/nodes/EMBEDDING", {"node": "flatten"}, "backbone.nodes: 'embedding' appears twice"),
    ("backbone/nodes/txt", {"node": "flatten"}, "backbone.nodes.txt: source.columns carries a column of that name; rename the"),
    ("backbone/preprocess/resize", 0, "backbone.preprocess.resize: 0 is wrong; allowed: a whole number from 1 to 4096"),
    ("backbone/preprocess", {"resize": 100}, "backbone.preprocess: crop 224 is larger than resize 100"),
    ("backbone/preprocess/mean", [0.5], "backbone.preprocess.mean: [0.5] is wrong; allowed: a list of 3 finite numbers"),
    ("backbone/preprocess/mean", 0.5, "backbone.preprocess.mean: 0.5 is wrong; allowed: a list of 3 finite numbers"),
    ("backbone/preprocess/mean", [0.5, "x", 1], "backbone.preprocess.mean: 'x' is wrong; allowed: a list of 3 finite numbers"),
    (
        "backbone/preprocess/mean",
        [0, 0, math.inf],
        "backbone.preprocess.mean: inf is wrong; allowed: a list of 3 finite numbers",
    ),
    ("backbone/preprocess/std", [1, 1, 0], "backbone.preprocess.std: [1, 1, 0]: allowed: numbers above 0"),
    (
        "backbone/preprocess/interpolation",
        "nearest",
        "backbone.preprocess.interpolation: 'nearest' is wrong; allowed: bilinear, ",
    ),
    ("backbone/version", 2, "backbone.version: 2 is wrong; allowed: text"),
    # the rest
    ("decode", "quick", "decode: 'quick' is wrong; allowed: exact, fast"),
    ("output/url", " ", "output.url: ' ': give the folder of the dataset"),
    ("output/url", ["a"], "output.url: ['a'] is wrong; allowed: text"),
    ("run/workers", 0, "run.workers: 0 is wrong; allowed: a whole number from 1, or auto"),
    ("run/workers", "many", "run.workers: 'many' is wrong; allowed: a whole number from 1, or auto"),
    ("run/workers", True, "run.workers: true is wrong; allowed: a whole number from 1, or auto"),
    ("run/precision", "fp16", "run.precision: 'fp16' is wrong; allowed: float32, tf32, bfloat16, float16"),
    ("run/batch_size", 100_000, "run.batch_size: 100000 is wrong; allowed: a whole number from 1 to 65536, or auto"),
    ("run/num_gpus", 2, "run.num_gpus: 2 is wrong; allowed: a number above 0 and up to 1, or auto"),
    ("run/max_failed", "1%", "run.max_failed: '1%' is wrong; allowed: a number from 0 to 1"),
    ("run/max_failed", math.nan, "run.max_failed: nan is wrong; allowed: a number from 0 to 1"),
    ("run/max_failed", True, "run.max_failed: true is wrong; allowed: a number from 0 to 1"),
    ("probe/test", 0.5, "probe.test: 0.5 is wrong; allowed: a number above 0 and below 0.5"),
    ("probe/seed", -1, "probe.seed: -1 is wrong; allowed: a whole number from 0"),
    ("probe/node", "embeding", "probe.node: 'embeding' is none of backbone.nodes; allowed are embedding"),
    ("probe/node", ["embedding", "all"], "probe.node: 'all' is none of backbone.nodes; allowed are embedding"),
    ("probe/node", [], "probe.node: []: name at least one, and none twice"),
    ("probe/node", 5, "probe.node: 5 is wrong; allowed: text, or a list of text, or nothing"),
    ("probe/normalize", "l1", "probe.normalize: 'l1' is wrong; allowed: none, l2, zscore, or a list of them"),
    ("probe/normalize", ["l2", "l1"], "probe.normalize: 'l1' is wrong; allowed: none, l2, zscore, or a list of them"),
    ("probe/normalize", ["l2", "l2"], "probe.normalize: ['l2', 'l2']: name at least one, and none twice"),
    ("probe/labels", "labels.txt", "probe.labels: 'labels.txt': give the URL of a .csv or .parquet file"),
    ("probe/labels", "s3://me:secret@bucket/labels.csv", f"probe.labels: 's3://***@bucket/labels.csv': {NO_CREDENTIALS}"),
    ("source", {"url": "x", "label": None}, None),
]


def named(path, value, _):
    return f"{path} missing" if value is MISSING else f"{path}={value!r:.30}"


@pytest.mark.parametrize(("path", "value", "line"), MISTAKES, ids=[named(*mistake) for mistake in MISTAKES])
def test_a_mistake_is_one_line(path, value, line):
    raw = changed(path, value)
    if line is None:  # alone it is none: with a probe it is
        config.parse(raw)
        raw["probe"] = {}
        line = "probe.label: the dataset has no label; set source.label, or leave the probe section out"
    text = message(raw)
    assert text.startswith(f"my.yaml: {line}")
    assert "\n" not in text
    assert not re.search(r"[Ii]nput should|union|pydantic|\[type=|instance of|literal\[|\b(str|dict|int)\b(?!\x27)", text)


def test_every_mistake_has_its_line():
    raw = changed("run/workers", 0)
    raw["source"]["lable"] = "x"
    raw["backbone"]["nodes"]["embedding"]["pool"] = "max"
    del raw["output"]
    assert sorted(line.split(":")[1].strip() for line in message(raw).splitlines()) == [
        "backbone.nodes.embedding.pool", "output", "run.workers", "source.lable",
    ]  # fmt: skip


def test_long_values_are_cut():
    text = message(changed("run/precision", "x" * 10_000))
    assert len(text) < 200
    assert text.endswith("allowed: float32, tf32, bfloat16, float16")


@pytest.mark.parametrize("raw", [None, [], "text", 5, [{"source": 1}]])
def test_what_is_no_mapping(raw):
    assert message(raw) == "my.yaml: a config is a mapping with the sections backbone, decode, output, probe, run, source"


# Secrets


@pytest.mark.parametrize(
    ("path", "url"),
    [
        ("source/url", "s3://AKIA:hunter2@photos/*.tar"),
        ("source/url", "s3://AKIA:hun/hunter2@photos/*.tar"),
        ("source/url", ["s3://fine/*.tar", "https://me:hunter2@host/x.tar"]),
        ("source/url", "https://hunter2@host/x.tar"),
        ("output/url", "s3://AKIA:hunter2@features"),
        ("backbone/weights", "https://me:hunter2@host/model.pth"),
        ("source/storage/endpoint_url", "http://me:hunter2@127.0.0.1:9000"),
        ("output/storage/endpoint_url", "http://me:hunter2@127.0.0.1:9000"),
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(path, url):
    text = message(changed(path, url))
    assert text.startswith(f"my.yaml: {path.replace('/', '.')}: ")
    assert text.endswith(NO_CREDENTIALS)
    assert "hunter2" not in text
    assert "://***@" in text


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/photo@2x/*.tar",
        "http://host:9000/path@v2/x.tar",
        "http://host:9000",
        "abfs://container@account.dfs.core.windows.net/x/*.tar",
        "hdfs://user@namenode:8020/x.tar",
        "http://[::1]:9000/x.tar",
        "photos/a:b@c.tar",
        "memory://x.tar",
    ],
)
def test_what_only_looks_like_credentials_is_accepted(url):
    assert config.parse(changed("source/url", url)).source.urls == [url]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("source/storage/options", "hunter2"),
        ("source/storage/options", ["hunter2"]),
        ("source/storage", "hunter2"),
        ("output/storage", ["hunter2"]),
        ("output/storage/secret", "hunter2"),
        ("source/storage/options", {7: "hunter2"}),
        ("source/format", "s3://AKIA:hunter2@x"),
        ("source/format", "s3://AKIA:a/hunter2@x"),
    ],
)
def test_messages_repeat_no_secret(path, value):
    assert "hunter2" not in message(changed(path, value))


def test_options_are_in_no_dump_and_no_repr():
    settings = config.parse(
        changed("source/storage/options", {"key": "AKIAXYZ", "secret": "hunter2", "deep": {"x": "hunter2"}})
    )
    assert settings.source.storage.options["secret"] == "hunter2"
    assert "hunter2" not in config.dump(settings)
    assert "AKIAXYZ" not in config.dump(settings)
    assert "hunter2" not in repr(settings)
    assert yaml.safe_load(config.dump(settings))["source"]["storage"]["options"] == dict.fromkeys(
        ("key", "secret", "deep"), "(not saved)"
    )


# Overrides


@pytest.mark.parametrize(
    ("override", "place", "expected"),
    [
        ("run.workers=3", ("run", "workers"), 3),
        ("run.workers=auto", ("run", "workers"), "auto"),
        ("run.max_failed=0.5", ("run", "max_failed"), 0.5),
        ("run.max_failed=1e-3", ("run", "max_failed"), 0.001),
        ("source.storage.anonymous=true", ("source", "storage", "anonymous"), True),
        ("source.url=[a.tar, b.tar]", ("source", "urls"), ["a.tar", "b.tar"]),
        ("source.url=s3://b/x=1/*.tar", ("source", "url"), "s3://b/x=1/*.tar"),
        ("source.label=", ("source", "label"), None),
        ("backbone.nodes.embedding.pool=mean", ("backbone", "nodes", "embedding", "pool"), "mean"),
        ("backbone.nodes.second={node: layer4, pool: mean}", ("backbone", "nodes", "second", "node"), "layer4"),
        ("backbone.preprocess.resize=300", ("backbone", "preprocess", "resize"), 300),
        ("backbone.version='2'", ("backbone", "version"), "2"),
        ("probe.seed=7", ("probe", "seed"), 7),
        ("probe={}", ("probe", "label"), "label"),
        ("decode=fast", ("decode",), "fast"),
    ],
)
def test_overrides(write, override, place, expected):
    value = config.load(write(), [override])
    for name in place:
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    assert value == expected


def test_overrides_apply_in_order_and_leave_the_rest(write):
    settings = config.load(write(), ["run.workers=2", "probe.seed=1", "run.workers=5", "run.threads=2"])
    assert (settings.run.workers, settings.run.threads, settings.probe.seed) == (5, 2, 1)
    assert settings.source == config.parse(MINIMAL).source


def test_override_opens_a_section_that_the_file_leaves_empty(write):
    assert config.load(write(yaml.safe_dump(MINIMAL) + "run:\n"), ["run.workers=2"]).run.workers == 2


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("run.workers", "--set run.workers: write --set section.key=value"),
        ("=3", "--set : write --set section.key=value"),
        ("run.=3", "--set run.: write --set section.key=value"),
        ("run..workers=3", "--set run..workers: write --set section.key=value"),
        ("source.url.first=x", "--set source.url.first: source.url is a value, not a section"),
        ("backbone.model.x.y=fast", "--set backbone.model.x.y: backbone.model is a value, not a section"),
        ("run.workers=[1", "--set run.workers: the value is not valid YAML"),
        ("run.workers=!!python/object/apply:os.system [true]", "--set run.workers: the value is not valid YAML"),
        ("backbone.version=2024-13-45", "--set backbone.version: the value is not valid YAML"),
        ("run.worker=3", "{path}: run.worker: unknown key; did you mean workers"),
        ("run.workers=0", "{path}: run.workers: 0 is wrong; allowed: a whole number from 1, or auto"),
        ("runs.workers=0", "{path}: runs: unknown key; did you mean run?"),
        ("source=x", f"{{path}}: source: 'x' is wrong; allowed: {SECTION}"),
    ],
)
def test_wrong_overrides(write, override, text):
    path = write()
    with pytest.raises(ConfigError) as caught:
        config.load(path, [override])
    assert str(caught.value).startswith(text.format(path=path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override", ["source.url.x.secret=hunter2", "output.storage.options={secret: hunter2", "backbone.model.x=hunter2"]
)
def test_wrong_overrides_repeat_no_secret(write, override):
    with pytest.raises(ConfigError) as caught:
        config.load(write(), [override])
    assert "hunter2" not in str(caught.value)


# Files


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.name for path in EXAMPLES])
def test_examples_load_and_fit_the_schema(path):
    settings = config.load(path)
    assert settings.source.urls
    jsonschema.validate(yaml.safe_load(path.read_text(encoding="utf-8")), config.json_schema())


def test_there_are_examples():
    assert EXAMPLES


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (b"", "{path}: a config is a mapping with the sections backbone, decode"),
        (b"# only a comment\n", "{path}: a config is a mapping with the sections"),
        (b"- a\n- b\n", "{path}: a config is a mapping with the sections"),
        (b"just text", "{path}: a config is a mapping with the sections"),
        (b"source:\n\turl: x\n", "{path}, line 2: not valid YAML: found character '\\t' that cannot start any token"),
        (b"source: [a\noutput: b\n", "{path}, line 2: not valid YAML: "),
        (b"a: b: c\n", "{path}, line 1: not valid YAML: mapping values are not allowed here"),
        (b"source: {url: \xff\xfe}\n", "{path}: the config cannot be read: is not UTF-8 text"),
        ("source: {url: ü}".encode("utf-16"), "{path}: the config cannot be read: is not UTF-8 text"),
        (b"source: {url: \x00}\n", "{path}: not valid YAML: "),
        (
            b"source: !!python/object:os.system {}\n",
            "{path}, line 1: not valid YAML: could not determine a constructor for the tag",
        ),
        (b"source: !!python/name:os.system\n", "{path}, line 1: not valid YAML: could not determine a constructor for the tag"),
        (b"source: *nothing\n", "{path}, line 1: not valid YAML: found undefined alias"),
        (b"source: {version: 2024-13-45}\n", "{path}: not valid YAML: month must be in 1..12"),
        (b"[" * 1500, "{path}: not valid YAML: "),
        (b"a: 1\n---\nb: 2\n", "{path}, line 2: not valid YAML: "),
    ],
)
def test_files_that_are_no_config(write, payload, text):
    path = write(payload)
    for overrides in ([], ["run.workers=2"]):
        with pytest.raises(ConfigError) as caught:
            config.load(path, overrides)
        assert str(caught.value).startswith(text.format(path=path))
        assert "\n" not in str(caught.value)


def test_python_tags_run_nothing(write, tmp_path):
    path = write(f"source: !!python/object/apply:os.mkdir [{tmp_path}/made]\n")
    with pytest.raises(ConfigError):
        config.load(path)
    assert not (tmp_path / "made").exists()


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.yaml: the config cannot be read: No such file or directory"):
        config.load(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="the config cannot be read: Is a directory"):
        config.load(tmp_path)


def test_byte_order_mark_and_unicode_are_fine(write):
    text = yaml.safe_dump(changed("source/url", "s3://bücket/日本/*.tar"), allow_unicode=True)
    assert config.load(write(b"\xef\xbb\xbf" + text.encode())).source.url == "s3://bücket/日本/*.tar"


# What is accepted


def test_defaults_are_the_documented_ones():
    settings = config.parse(MINIMAL)
    assert (settings.source.format, settings.source.group_size, settings.source.max_pixels) == ("auto", 1000, 100_000_000)
    assert (settings.decode, settings.run.workers, settings.run.precision) == ("exact", "auto", "float32")
    assert (settings.run.max_failed, settings.run.max_removed, settings.run.max_attempts) == (0.01, 0.2, 3)
    assert settings.probe is None
    assert settings.backbone.nodes["embedding"].pool == "none"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("run/max_failed", 0),
        ("run/max_failed", 1),
        ("run/num_gpus", 0.25),
        ("run/batch_size", 65_536),
        ("source/group_size", 100_000),
        ("source/columns", []),
        ("source/columns", ["txt", "json.author", "json.meta.height_"]),
        ("backbone/model", "python/my.models:build"),
        ("backbone/model", "timm/vit_base_patch16_224.augreg_in21k"),
        ("backbone/weights", "seed:0"),
        ("backbone/weights", "https://host:8443/a@b.safetensors"),
        ("backbone/preprocess", {"resize": 224, "crop": 224, "interpolation": "bicubic"}),
        ("probe", {"node": "embedding", "label": "other"}),
        ("probe", {"node": "all", "normalize": "l2", "group": "patient", "split": "part"}),
        ("probe", {"node": ["embedding"], "normalize": ["l2", "none"], "labels": "s3://bucket/LABELS.CSV", "labels_key": "id"}),
    ],
)
def test_edges_are_accepted(path, value):
    config.parse(changed(path, value))


def test_labels_of_a_file_need_none_of_the_source():
    raw = changed("source/label", None)
    raw["probe"] = {"labels": "labels.csv"}
    assert config.parse(raw).probe.labels == "labels.csv"


def test_json_of_a_tar_frees_its_name_when_not_carried():
    raw = changed("source/columns", [])
    raw["backbone"]["nodes"]["json"] = {"node": "flatten"}
    config.parse(raw)


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(ValueError, match="frozen"):
        config.parse(MINIMAL).run.workers = 3


FULL = {
    "source": {
        "url": ["s3://a/*.tar", "s3://b/ü.tar"], "format": "webdataset", "label": "json.class", "label_type": "string",
        "columns": ["txt", "json.author"], "image": "png", "group_size": 7, "max_pixels": 1000,
        "storage": {"endpoint_url": "http://127.0.0.1:9000", "anonymous": True},
    },
    "backbone": {
        "model": "python/a.b:c", "weights": "seed:3", "version": "2",
        "nodes": {"one": {"node": "x", "pool": "mean"}, "two": {"node": "y", "normalize": "l2"}},
        "preprocess": {"resize": 64, "crop": 32, "interpolation": "bicubic", "mean": [0, 0.5, 1], "std": [1, 2, 3]},
    },
    "decode": "fast",
    "output": {"url": "out", "storage": {"profile": "me"}},
    "run": {"workers": 2, "precision": "float16", "batch_size": 8, "threads": 3, "num_gpus": 0.5, "max_failed": 0.25},
    "probe": {"label": "label", "node": ["two", "one"], "normalize": ["zscore"], "seed": 3, "labels": "labels.csv"},
}  # fmt: skip


@pytest.mark.parametrize("raw", [MINIMAL, FULL], ids=["minimal", "full"])
def test_dump_round_trips(raw):
    settings = config.parse(raw)
    again = config.parse(yaml.safe_load(config.dump(settings)))
    assert again == settings
    assert config.dump(again) == config.dump(settings)


# Schema


def test_schema_is_valid_and_describes_every_field():
    schema = config.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    models = {"Config": schema, **schema["$defs"]}
    assert set(models) >= {"Config", "Source", "Storage", "Backbone", "Node", "Preprocess", "Output", "Run", "Probe"}
    for model, definition in models.items():
        assert definition.get("description"), model
        assert definition["additionalProperties"] is False, model
        for name, field in definition["properties"].items():
            refs = [way["$ref"] for way in [field, *field.get("anyOf", [])] if "$ref" in way]
            described = [models[ref.rpartition("/")[2]]["description"] for ref in refs] or field.get("description")
            assert described, f"{model}.{name}"


@pytest.mark.parametrize("raw", [MINIMAL, FULL], ids=["minimal", "full"])
def test_schema_accepts_what_is_right(raw):
    jsonschema.validate(raw, config.json_schema())


@pytest.mark.parametrize(
    ("path", "value"),
    [("run/workers", 0), ("run/precison", "float32"), ("source/url", MISSING), ("run/max_failed", 2), ("decode", "quick")],
)
def test_schema_refuses_what_is_wrong(path, value):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed(path, value), config.json_schema())
