"""One shard or picture that kills whoever touches it, among good ones: it is named, and it costs nobody else a row.

Twenty shards. `PIPELINE_POISON_SHARDS=100 pytest tests/chaos/test_poison.py` tries a hundred.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import yaml
from commands import cli, last_line
from conftest import noise, settings, shard_members, tar_bytes
from killers import deadly
from PIL import Image

import pipeline

NUM_SHARDS = int(os.environ.get("PIPELINE_POISON_SHARDS", "20"))
PER_SHARD = 5
POISONED = NUM_SHARDS // 2
"""Number of the shard with the poison, in the middle: its actor has others in hand too."""


def write(folder: Path, poison: dict[int, bytes]) -> None:
    """All shards, some of them with poison as their second image."""
    folder.mkdir()
    for number in range(NUM_SHARDS):
        write_shard(folder, number, poison.get(number))


def write_shard(folder: Path, number: int, poison: bytes | None = None) -> None:
    images = noise(PER_SHARD, seed=number)
    if poison is not None:
        images[2] = poison
    (folder / f"{number:03d}.tar").write_bytes(tar_bytes(shard_members(images, number * PER_SHARD)))


def keys(output: Path) -> list[str]:
    return sorted(pipeline.open_dataset(str(output)).keys())


def all_keys() -> list[str]:
    return [f"{number:05d}" for number in range(NUM_SHARDS * PER_SHARD)]


def config_file(folder: Path, **changes: object) -> Path:
    path = folder / "config.yaml"
    wanted = settings(f"{folder}/shards/*.tar", folder / "out", **changes)
    path.write_text(yaml.safe_dump(wanted.model_dump(mode="json")))
    return path


def white() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (24, 24), "white").save(file, "PNG")
    return file.getvalue()


def test_a_shard_that_kills_every_actor_is_named_and_the_others_are_committed(tmp_path: Path) -> None:
    write(tmp_path / "shards", {POISONED: white()})
    path = config_file(tmp_path, backbone__model="python/models:kills", backbone__nodes={"embedding": {"node": "pool"}})
    poisoned = f"{POISONED:03d}.tar"

    first = cli("run", path, "--json")
    report = last_line(first)
    assert first.returncode == 1, first.stderr
    assert report["shards"]["extracted"] == NUM_SHARDS - 1
    assert [Path(url).name for url in report["failed"]] == [poisoned]
    (said,) = [line for line in first.stderr.splitlines() if line.startswith("error: ")]
    assert poisoned in said
    assert "Traceback" not in first.stderr
    spared = [key for key in all_keys() if int(key) // PER_SHARD != POISONED]
    assert keys(tmp_path / "out") == spared

    planned = last_line(cli("plan", path, "--json"))
    assert (planned["shards"]["extract"], planned["shards"]["unchanged"]) == (1, NUM_SHARDS - 1)
    write_shard(tmp_path / "shards", POISONED)
    second = cli("run", path, "--json")
    assert second.returncode == 0, second.stderr
    shards = last_line(second)["shards"]
    assert (shards["extracted"], shards["unchanged"]) == (1, NUM_SHARDS - 1)
    assert keys(tmp_path / "out") == all_keys()


def test_a_picture_that_ends_its_decoder_is_one_row_of_the_quarantine(tmp_path: Path) -> None:
    ends = {"kill": "Crashed", "hang": "Hung", "hold": "Hung"}
    poisoned = dict(zip(range(1, NUM_SHARDS, 6), ends, strict=False))
    write(tmp_path / "shards", {number: deadly(what) for number, what in poisoned.items()})
    path = config_file(tmp_path, backbone__model="python/killers:tiny", run__decode_timeout_s=2)
    finished = cli("run", path, "--json")
    report = last_line(finished)
    assert finished.returncode == 0, finished.stderr
    assert (report["shards"]["extracted"], report["shards"]["failed"]) == (NUM_SHARDS, 0)
    assert report["actors_lost"] > len(ends)
    dataset = pipeline.open_dataset(str(tmp_path / "out"))
    quarantine = {row.key: (Path(row.shard).name, row.stage, row.error) for row in dataset.quarantine()}
    assert quarantine == {
        f"{number * PER_SHARD + 2:05d}": (f"{number:03d}.tar", "decode", ends[what]) for number, what in poisoned.items()
    }
    assert sorted(dataset.keys()) == [key for key in all_keys() if key not in quarantine]
