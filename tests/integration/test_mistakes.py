"""What people get wrong, over all commands: one line that names the thing and the mend, exit code 2, and nothing lost.

Mistakes in the fields of a config: `test_config.py`. With a store: `test_store_errors.py`. The options of one command alone:
beside the tests of that command.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from bucket import Bucket
from commands import invoke, last_line
from conftest import noise, settings, shard_members, tar_bytes
from deltalake import write_deltalake
from quick import committed
from s3 import S3Server

CONFIG = """
source: {{url: '{folder}/shards/*.tar', label: cls}}
backbone: {{model: 'python/models:tiny', weights: 'seed:0', nodes: {{embedding: {{node: flatten}}}}}}
output: {{url: '{folder}/out'}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset `out` with its config and shards, and around it what is taken for one."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name in ("shards", "empty", "folder"):
        (folder / name).mkdir()
    (folder / "folder" / "notes.txt").write_text("no image")
    (folder / "shards" / "a.tar").write_bytes(tar_bytes(shard_members(noise(12), 0)))
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder))
    nodes = {"raw": {"node": "flatten"}, "unit": {"node": "flatten", "normalize": "l2"}}
    committed(settings(f"{folder}/shards/*.tar", folder / "out", backbone__nodes=nodes))
    write_deltalake(str(folder / "foreign"), pa.table({"a": [1]}))
    np.save(folder / "wide.npy", np.ones((2, 7), np.float32))
    np.save(folder / "text.npy", np.array(["a"]))
    (folder / "file").write_text("mine")
    (folder / "labels.csv").write_text("name,label\n00001,0\n")
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


# Command line (`~` is the folder), and what its line has to say: what is wrong, and what to do.

NO_DATASET = "there is no dataset yet; `pipeline run` makes one"
MISTAKES: list[tuple[str, str, str]] = [
    # the command line itself
    ("rum ~/config.yaml", "No such command 'rum'", "Did you mean 'run'?"),
    ("run", "run: Missing argument 'CONFIG'", "run --help` shows how it is used"),
    ("run ~/config.yaml --retry", "run: there is no option --retry", "did you mean --retry-quarantined?"),
    ("vacuum ~/out --keep 3", "vacuum: there is no option --keep", "did you mean --keep-versions?"),
    ("probe ~/out --nodes all", "probe: there is no option --nodes", "did you mean --node?"),
    ("search ~/out --zzzzzz 1", "search: there is no option --zzzzzz", "search --help` shows how it is used"),
    ("verify ~/out --version new", "Invalid value for '--version'", "it should be a valid integer"),
    ("verify ~/out --rows -1", "Invalid value for '--rows'", "it should be greater than or equal to 0"),
    ("bench ~/config.yaml --images 0", "Invalid value for '--images'", "it should be greater than or equal to 1"),
    ("export ~/out ~/x", "Missing option '--to'", "Choose from: npy, parquet, faiss"),
    ("export ~/out --to hdf5 ~/x", "'hdf5' is not one of", "'npy', 'parquet', 'faiss'"),
    ("diff ~/out 0", "Missing argument 'B'", "diff --help` shows how it is used"),
    ("diff ~/out old 1", "Invalid value for 'A'", "it should be a valid integer"),
    ("embed ~/out", "Missing argument 'IMAGES...'", "embed --help` shows how it is used"),
    ("demo", "Missing argument 'DIR'", "demo --help` shows how it is used"),
    # a config
    ("run ~/confg.yaml", "~/confg.yaml: the config cannot be read", "did you mean config.yaml?"),
    ("plan ~/out", "~/out: the config cannot be read: Is a directory", "give the YAML file"),
    ("submit ~/nowhere/config.yaml", "~/nowhere/config.yaml: the config cannot be read", "~ has no 'nowhere'"),
    ("run ~/config.yaml --set batch_size", "--set batch_size", "write --set section.key=value"),
    ("bench ~/config.yaml --set backbone.wieghts=x", "backbone.wieghts: unknown key", "did you mean weights?"),
    # a source
    ("plan ~/config.yaml --set source.url=~/shard/*.tar", "~/shard/*.tar: there is no such", "did you mean shards?"),
    ("plan ~/config.yaml --set source.url=~/shards/*.tgz", "~/shards/*.tgz: there is no such", "~/shards matches '*.tgz'"),
    ("bench ~/config.yaml --set source.url=~/file/x.tar", "~/file/x.tar: ", "~/file is a file, not a folder"),
    ("plan ~/config.yaml --set source.url=s4://b/x.tar", "s4://b/x.tar: Protocol not known: s4", "did you mean s3"),
    ("plan ~/config.yaml --set source.url=~/folder", "source.label: 'cls' is wrong for loose files", "allowed: folder, or"),
    # a model
    (
        "plan ~/config.yaml --set backbone.model=torchvision/resnet_50",
        "torchvision has no classification model 'resnet_50'",
        "did you mean resnet50",
    ),
    ("run ~/config.yaml --set backbone.model=torchvision/zzz", "no classification model 'zzz'", "for example resnet50"),
    ("plan ~/config.yaml --set backbone.model=python/models:tinny", "no attribute 'tinny'", "did you mean tiny?"),
    (
        "plan ~/config.yaml --set backbone.model=python/modells:tiny",
        "No module named 'modells'",
        "modules are looked for in the working directory",
    ),
    (
        "plan ~/config.yaml --set backbone.model=torchvision/resnet18 --set backbone.weights=IMAGENET1K_V2",
        "resnet18 has no weights 'IMAGENET1K_V2'",
        "allowed are IMAGENET1K_V1",
    ),
    ("plan ~/config.yaml --set backbone.weights=~/w.pth", "backbone.weights: ~/w.pth: there is no such", "~ has no 'w.pth'"),
    ("bench ~/config.yaml --set backbone.weights=package:no_such/w", "'no_such' is not installed", "install it, or give"),
    (
        "plan ~/config.yaml --set backbone.nodes.embedding.node=flaten",
        "the model has no node 'flaten'",
        "did you mean flatten",
    ),
    # an output
    ("plan ~/config.yaml --set output.url=~/file", "~/file: is a file", "a dataset is a folder"),
    ("plan ~/config.yaml --set output.url=~/foreign", "that this program did not write", "name another folder"),
    ("plan ~/config.yaml --set probe.label=breed", "probe.label: the dataset has no column 'breed'", "there are key, label"),
    ("plan ~/config.yaml --set probe.labels=~/label.csv", "~/label.csv: there is no such", "did you mean labels.csv?"),
    # a dataset
    ("status ~/config.yaml", "~/config.yaml: is a file", "a dataset is a folder, which `pipeline run` makes"),
    ("status ~", f"~: {NO_DATASET}", "did you mean ~/out?"),
    ("verify ~/out/data", f"~/out/data: {NO_DATASET}", "did you mean ~/out?"),
    ("curate ~/outt", f"~/outt: {NO_DATASET}", "did you mean out?"),
    ("vacuum ~/empty", f"~/empty: {NO_DATASET}", "`pipeline run` makes one"),
    ("predict s3:/bucket/out", f"s3:/bucket/out: {NO_DATASET}", "did you mean s3://bucket/out?"),
    ("search ~/foreign --key 1", "~/foreign: a Delta table that this program did not write", "name another folder"),
    ("diff ~/out 0 1", "~/out: there is no version 1", "the newest is 0"),
    ("report ~/out --version 9", "~/out: there is no version 9", "the newest is 0"),
    ("report ~/out --node large", "~/out: there is no embedding column 'large'", "it has "),
    ("embed ~/out ~/broken.jpg --version 3", "~/out: there is no version 3", "the newest is 0"),
    ("browse ~/outt", f"~/outt: {NO_DATASET}", "did you mean out?"),
    ("init ~/folder --to ~/new.yaml", "~/folder holds no images and no shards, only 1 .txt", "looked for .tar"),
    # what is looked for in it
    ("browse ~/out --node embedding", "there is no embedding column 'embedding'", "it has raw, unit"),
    ("probe ~/out --labels ~/labels.csv", "labels.csv has no column 'key'", "it has name, label"),
    ("predict ~/out", "~/out: there is no saved probe", "`pipeline probe` trains one"),
    ("search ~/out --key 1", "version 0 has no key '1'", "its keys are such as '00000'"),
    ("search ~/out --key 00001 --shard a.tar", "has no shard 'a.tar'", "did you mean file://~/shards/a.tar?"),
    ("search ~/out --key 00001 --where lable=3", "no column 'lable' to compare", "did you mean label?"),
    ("search ~/out --vectors ~/wide.npy", "vectors: shape (2, 7) does not fit", "allowed: (number of queries, 32)"),
    ("search ~/out --vectors ~/text.npy", "shape (1,) of <U1 is not allowed", "allowed: numbers of shape"),
    ("search ~/out --vectors ~/wide.npz", "~/wide.npz: there is no such file", "did you mean wide.npy?"),
    ("curate ~/out --node embedding", "there is no embedding column 'embedding'", "it has raw, unit"),
    ("embed ~/out ~/broken.jgp", "~/broken.jgp: there is no such file", "did you mean broken.jpg?"),
    ("embed ~/out ~/folder", "~/folder: there is no image here", "no name ends in bmp, "),
    # where something is to be written
    ("init ~/shards --to ~/config.yaml", "~/config.yaml is there already", "--overwrite replaces it"),
    ("export ~/out --to npy ~/file", "~/file: exists already", "--overwrite replaces it"),
    ("export ~/out --to npy ~/empty", "~/empty: is a folder", "name a file"),
    ("export ~/out --to parquet ~/out/sorted", "~/out/sorted: lies in the dataset", "name another place"),
    ("export ~/out --to faiss ~/x.index --faiss-index IVF", "faiss-index: 'IVF': could not parse", "such as Flat, HNSW32"),
    ("search ~/out --key 00001 --page ~/empty", "~/empty: is a folder", "name a file"),
    ("embed ~/out ~/broken.jpg --node raw --to ~/file/x.npy", "~/file/", "is a file where a folder has to be; name another"),
    ("demo ~/file", "~/file/digits-000.tar: a part of this path is a file", "name another place"),
]


@pytest.mark.parametrize(("line", "wrong", "mend"), MISTAKES, ids=[line.replace("~", "") for line, _, _ in MISTAKES])
def test_one_line_says_what_is_wrong_and_what_to_do(place: Path, line: str, wrong: str, mend: str) -> None:
    before = contents(place)
    refused = invoke(*line.replace("~", str(place)).split(), "--json")
    assert refused.returncode == 2, refused
    said = refused.stderr.replace(str(place), "~")
    (error,) = [each for each in said.splitlines() if each.startswith("error: ")]
    assert said.endswith(f"{error}\n") and "Traceback" not in said
    assert wrong in error and mend in error
    assert last_line(refused)["error"].replace(str(place), "~") == error.removeprefix("error: ")
    assert contents(place) == before


def test_every_command_that_can_be_used_wrongly_is_here() -> None:
    from pipeline.cli import COMMANDS

    assert {command.__name__ for command in COMMANDS} - {line.split()[0] for line, _, _ in MISTAKES} == {"schema"}


def test_without_json_nothing_is_on_stdout(place: Path) -> None:
    for line in ("status ~/outt", "run --set", "vacuum ~/out --keep 3"):
        refused = invoke(*line.replace("~", str(place)).split())
        assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)


def test_no_command_at_all_shows_help() -> None:
    shown = invoke()
    assert shown.returncode == 2
    assert "error:" not in shown.stderr
    assert all(command in shown.stdout + shown.stderr for command in ("run", "status", "schema"))


@pytest.mark.usefixtures("local_ray")
def test_a_label_that_no_sample_has_is_warned_of(place: Path, tmp_path: Path) -> None:
    for label, warnings in (("clss", 1), ("cls", 0)):
        changes = ["--set", f"source.label={label}", "--set", f"output.url={tmp_path}/{label}"]
        done = invoke("run", place / "config.yaml", *changes)
        assert done.returncode == 0, done.stderr
        warning = f"warning: source.label: none of the first 12 images of file://{place}/shards/a.tar has 'clss'"
        assert done.stderr.count(warning) == done.stderr.count("warning") == warnings


@pytest.mark.usefixtures("local_ray")
def test_pictures_that_are_none_name_a_key_and_the_reason(place: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.tar").write_bytes(tar_bytes(shard_members([b"no picture"] * 11, 0)))
    source, output = f"source.url={tmp_path}/bad.tar", f"output.url={tmp_path}/out"
    refused = invoke("run", place / "config.yaml", "--set", source, "--set", output)
    assert refused.returncode == 1
    (error,) = [each for each in refused.stderr.splitlines() if each.startswith("error: ")]
    assert "11 of 11 samples cannot be embedded" in error and "nothing was committed" in error
    assert "(11 of 11, the first of them 00000: decode: not a picture in any of JPEG" in error
    assert "Mend the source, or raise run.max_failed" in error
    first, then, *_ = invoke("status", tmp_path / "out").stdout.splitlines()
    assert re.match(r"failed  last run \d+ s ago: 11 of 11 samples cannot be embedded, .*; nothing was committed yet$", first)
    assert then == "next    mend that, then pipeline run CONFIG tries again, and adopts 1 finished partitions"


@pytest.mark.parametrize(
    "line",
    [
        lambda place: ("status", "s3://no-such-bucket-here/out"),
        lambda place: ("search", "s3://no-such-bucket-here/out", "--key", "1"),
        lambda place: ("export", place / "out", "--to", "npy", "s3://no-such-bucket-here/x.npy"),
        lambda place: ("predict", place / "out", "--probe", "s3://no-such-bucket-here/probe.safetensors"),
        lambda place: ("embed", place / "out", "s3://no-such-bucket-here/photos"),
    ],
    ids=["status", "search", "export", "predict", "embed"],
)
def test_a_bucket_that_is_not_there(s3: S3Server, place: Path, line: Callable[[Path], tuple[str | Path, ...]]) -> None:
    refused = invoke(*line(place), "--endpoint-url", Bucket(s3).server.endpoint_url, "--json", env=s3.env())
    assert refused.returncode == 2
    assert "no-such-bucket-here" in refused.stderr and "bucket" in refused.stderr.replace("no-such-bucket-here", "")
    assert refused.stderr.count("\n") == 1
