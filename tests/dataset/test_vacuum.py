"""What `vacuum` removes and what it spares, and what is left of versions whose files are gone."""

from __future__ import annotations

import datetime
import os
import shutil
import time
from pathlib import Path

import pytest
from bucket import Bucket
from commands import cli, last_line
from conftest import noise, settings, shard_members, tar_bytes, write_shards
from s3 import S3Server

import pipeline
from pipeline import driver
from pipeline.config import Storage
from pipeline.dataset import partition, table
from pipeline.dataset.diff import diff
from pipeline.dataset.table import Table, vacuum
from pipeline.errors import BudgetExceeded, ConfigError, DatasetError, PipelineError, StorageRefused
from pipeline.storage import Store

NOW = datetime.timedelta(0)


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    """Three versions of three shards: the second replaces shard 000, the third shard 001. Not to be changed."""
    folder = tmp_path_factory.mktemp("vacuum")
    images = noise(36)
    write_shards(folder / "shards", images[:30], 10, "png")
    for number in range(3):
        if number:
            changed = images[10 * number - 10 : 10 * number - 1] + images[30 + number :][:1]
            members = shard_members(changed, 10 * number - 10)
            (folder / "shards" / f"00{number - 1}.tar").write_bytes(tar_bytes(members))
        assert driver.run(settings(f"{folder}/shards/*.tar", folder / "out")).version == number
    return folder / "out"


@pytest.fixture
def output(history: Path, tmp_path: Path) -> Path:
    """A copy of it, in which every file is 10 days old."""
    shutil.copytree(history, tmp_path / "out")
    age(tmp_path / "out", 10)
    return tmp_path / "out"


def age(path: Path, days: float) -> None:
    """Set the time of a file, or of every file in a folder."""
    when = time.time() - 86400 * days
    for file in [path] if path.is_file() else path.rglob("*"):
        os.utime(file, (when, when))


def names(output: Path, version: int | None = None) -> set[str]:
    """Partitions that a version names, or all files in the data folder."""
    if version is None:
        return {f"data/{file.name}" for file in (output / "data").iterdir()}
    opened = Table.open(Store(), str(output), version)
    assert opened is not None
    return {entry.path for entry in opened.entries}


def test_what_no_kept_version_names_is_removed(output: Path) -> None:
    assert len(names(output)) == 5
    done = vacuum(Store(), str(output), keep_versions=2)
    assert names(output) == names(output, 1) | names(output, 2)
    assert done.kept_versions == [1, 2]
    assert {file.url.removeprefix(f"file://{output}/") for file in done.files} == names(output, 0) - names(output, 1)
    assert done.num_bytes > 1000
    assert len(pipeline.open_dataset(str(output), 1).keys()) == 30

    vacuum(Store(), str(output), keep_versions=1)
    assert names(output) == names(output, 2)
    assert len(pipeline.open_dataset(str(output)).keys()) == 30
    assert vacuum(Store(), str(output), keep_versions=1).files == []


def test_nothing_goes_while_versions_are_kept_or_files_are_young(output: Path) -> None:
    assert vacuum(Store(), str(output)).files == [], "10 versions are kept"
    age(output, 6.9)
    assert vacuum(Store(), str(output), keep_versions=1).files == []
    assert len(vacuum(Store(), str(output), keep_versions=1, keep_younger=NOW, dry_run=True).files) == 2
    assert len(names(output)) == 5


def test_leftovers_go_and_everything_else_stays(output: Path) -> None:
    kept = sorted(names(output, 2))[0].removesuffix(".parquet")
    gone = sorted(names(output, 0) - names(output, 1))[0].removesuffix(".parquet")
    uncommitted = partition.new_path("-".join(c * 16 for c in "af01")).removesuffix(".parquet")
    young = partition.new_path("-".join(c * 16 for c in "af01"))
    killed = f"{'a' * 32}.tmp"
    stays = [f"{kept}.quarantine.json", "data/notes.txt", "data/other.parquet", "_runs/x/run.json", "_delta_log/stray.json"]
    goes = [
        f"{gone}.quarantine.json", f"{uncommitted}.parquet", f"{uncommitted}.quarantine.json",
        f"{kept}.parquet.{killed}", f"{uncommitted}.quarantine.json.{killed}",
    ]  # fmt: skip
    for name in [*stays, *goes]:
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text("{}")
        age(output / name, 8)
    (output / young).write_text("being written")
    log = sorted((output / "_delta_log").iterdir())

    vacuum(Store(), str(output), keep_versions=2)
    assert not [name for name in goes if (output / name).exists()]
    assert all((output / name).exists() for name in [*stays, young])
    assert sorted((output / "_delta_log").iterdir()) == log, "vacuum commits nothing that a run could conflict with"
    assert len(names(output)) == 4 + 4


def test_a_vacuumed_version_says_so(output: Path) -> None:
    vacuum(Store(), str(output), keep_versions=1)
    old, new = pipeline.open_dataset(str(output), 0), pipeline.open_dataset(str(output))
    assert len(old) == 30, "the log still knows"
    gone = r"version 0 was vacuumed: its partition data/.*\.parquet is gone; the newest version is 2"
    reads = (old.keys, old.to_numpy, old.table, lambda: list(old.iter_batches()), lambda: old.image("00000"))
    for read in (*reads, lambda: diff(old, new), lambda: diff(old, new, drift=False)):
        with pytest.raises(DatasetError, match=gone):
            read()
    failed = cli("diff", str(output), "0", "2", "--json")
    assert failed.returncode == 2
    assert "version 0 was vacuumed" in last_line(failed)["error"]
    assert "Traceback" not in failed.stderr


def test_a_lost_partition_of_the_newest_version_is_no_vacuum(output: Path) -> None:
    path = sorted(names(output, 2) & names(output, 0))[0]
    (output / path).unlink()
    for version in (0, 2):
        with pytest.raises(StorageRefused, match=rf"{path}: there is no such file"):
            pipeline.open_dataset(str(output), version).keys()


def test_a_run_after_vacuum_does_nothing(history: Path, output: Path) -> None:
    vacuum(Store(), str(output), keep_versions=1)
    summary = driver.run(settings(f"{history.parent}/shards/*.tar", output))
    assert (summary.version, summary.committed, summary.num_unchanged) == (2, False, 3)


def test_nothing_is_removed_when_a_kept_version_cannot_be_read(output: Path) -> None:
    (output / "_delta_log" / f"{1:020d}.json").write_text("no log")
    with pytest.raises(PipelineError, match=f"{output}: "):
        vacuum(Store(), str(output), keep_versions=2)
    assert len(names(output)) == 5


def test_on_a_real_store(s3: S3Server, local_ray: None) -> None:
    images = noise(21)
    bucket = Bucket(s3)
    bucket.fill(images[:20], 10)
    driver.run(bucket.config())
    bucket.put("000", shard_members([*images[:9], images[20]], 0))
    driver.run(bucket.config())
    storage = Storage(**bucket.storage)
    assert vacuum(Store(storage), bucket.output, keep_versions=1).files == []
    assert len(vacuum(Store(storage), bucket.output, keep_versions=1, keep_younger=NOW).files) == 1
    assert len(bucket.fs.ls(f"{bucket.name}/out/data")) == 2
    assert len(pipeline.open_dataset(bucket.output, storage=storage).keys()) == 20
    with pytest.raises(DatasetError, match="version 0 was vacuumed"):
        pipeline.open_dataset(bucket.output, 0, storage).keys()
    with pytest.raises(DatasetError, match="version 0 was vacuumed"):
        pipeline.open_dataset(bucket.output, 0, storage).image("00000")


def test_wrong_arguments(output: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keep-versions: 0 is not allowed"):
        vacuum(Store(), str(output), keep_versions=0)
    with pytest.raises(ConfigError, match="older-than: -1 days is not allowed"):
        vacuum(Store(), str(output), keep_younger=datetime.timedelta(days=-1))
    (tmp_path / "nothing" / "data").mkdir(parents=True)
    with pytest.raises(DatasetError, match="no dataset yet"):
        vacuum(Store(), str(tmp_path / "nothing"))


def test_defaults_of_the_command_line() -> None:
    from pipeline.cli.dataset import vacuum as command

    assert command.__defaults__ is not None
    assert command.__defaults__[:2] == (table.KEEP_VERSIONS, table.KEEP_YOUNGER.days)


def test_cli(output: Path) -> None:
    dry = last_line(cli("vacuum", str(output), "--keep-versions", "1", "--dry-run", "--json"))
    assert (dry["dry_run"], dry["kept_versions"], len(dry["files"])) == (True, [2], 2)
    assert len(names(output)) == 5
    spoken = cli("vacuum", str(output), "--keep-versions", "1")
    assert spoken.returncode == 0, spoken.stderr
    assert "2 files" in spoken.stdout
    assert names(output) == names(output, 2)
    wrong = cli("vacuum", str(output), "--keep-versions", "0", "--json")
    assert wrong.returncode == 2
    assert "at least 1" in last_line(wrong)["error"]


def test_status_of_a_first_run_that_was_interrupted(tmp_path: Path, local_ray: None) -> None:
    output = tmp_path / "out"
    write_shards(tmp_path / "shards", [*noise(20), *[b"broken"] * 20], 10, "png")
    with pytest.raises(BudgetExceeded):
        driver.run(settings(f"{tmp_path}/shards/*.tar", output))
    report = last_line(cli("status", str(output), "--json"))
    assert (report["version"], report["waiting"], len(report["runs"])) == (None, 4, 1)

    shutil.rmtree(output / "_runs")  # as if it had been killed
    spoken = cli("status", str(output))
    assert spoken.returncode == 0, spoken.stderr
    assert "no version yet" in spoken.stdout
    assert "4 finished partitions, which the next run adopts" in spoken.stdout

    age(output / "data", 4)
    report = last_line(cli("status", str(output), "--json"))
    assert (report["version"], report["waiting"]) == (None, 0), "too old to be adopted"
    shutil.rmtree(output)
    assert cli("status", str(output)).returncode == 2
