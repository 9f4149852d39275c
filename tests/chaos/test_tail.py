"""One shard far larger than the others: its images are computed by whoever has nothing else to do, and some of those die."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from commands import ROOT, TESTS, last_line
from conftest import noise, shard_members, tar_bytes
from oracle import broken_promises, contents, difference

import pipeline

NUM_KILLS = 2
"""Both of the helpers."""
NUM_SMALL, PER_SHARD, NUM_LARGE = 6, 10, 1200
BAD = {13: b"not a picture", 700: b"", 1100: b"<html>not found</html>"}
"""By number."""


def test_helpers_that_die_cost_no_row_of_the_shard_that_they_help_with(tmp_path: Path) -> None:
    images = noise(NUM_SMALL * PER_SHARD + NUM_LARGE)
    for number, image in BAD.items():
        images[number] = image
    (tmp_path / "shards").mkdir()
    for name, first, count in [
        *((f"{number:03d}", number * PER_SHARD, PER_SHARD) for number in range(NUM_SMALL)),
        ("large", NUM_SMALL * PER_SHARD, NUM_LARGE),
    ]:
        (tmp_path / "shards" / f"{name}.tar").write_bytes(tar_bytes(shard_members(images[first : first + count], first)))

    command = [sys.executable, "-P", str(Path(__file__).with_name("lending_process.py")), str(tmp_path), str(NUM_KILLS)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)])}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT, env=environment)
    assert finished.returncode == 0, finished.stderr
    answer = last_line(finished)
    report = answer["report"]
    assert len(answer["killed"]) == NUM_KILLS, report
    assert report["actors_lost"] == NUM_KILLS
    assert report["images_lent"] > 0
    assert report["images"]["embedded"] == len(images) - len(BAD)
    assert report["images"]["quarantined"] == len(BAD)

    found, expected = (pipeline.open_dataset(str(tmp_path / name)) for name in ("lent", "calm"))
    assert len(found) == len(images) - len(BAD)
    differs = difference(contents(found), contents(expected))
    assert not differs, differs
    source = {file.url: file for file in found.table_.store.list(f"{tmp_path}/shards/*.tar")}
    assert not broken_promises(found, source)
