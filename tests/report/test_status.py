"""The first lines of `pipeline status`: whether the last run went well, and what to do next."""

from __future__ import annotations

import datetime
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import ROOT, invoke, last_line
from datasets import write_dataset

from pipeline.report import status, terminal

NOW = datetime.datetime(2026, 11, 24, 12, tzinfo=datetime.UTC)


def at(hours: float) -> str:
    return (NOW - datetime.timedelta(hours=hours)).isoformat(timespec="seconds")


def ran(hours: float, *, committed: bool = True, error: str | None = None) -> dict[str, Any]:
    return {"run_id": "20261124T000000Z-a", "finished": at(hours), "committed": committed, "error": error}


WELL = {
    "version": 12,
    "rows": 1_203_000,
    "quarantined": 0,
    "waiting": 0,
    "history": [{"version": 12, "when": at(7), "run_id": "20261124T000000Z-a"}],
    "runs": [ran(7)],
    "unfinished": None,
}
UNFINISHED = {"run_id": "20261124T090000Z-b", "began": at(3)}
FIRST = {"version": None, "rows": 0, "history": [], "runs": []}


@pytest.mark.parametrize(
    ("changes", "state", "text", "to_do"),
    [
        ({}, "ok", "version 12 committed 7 h ago, 1,203,000 rows", "nothing to do; pipeline run CONFIG takes in"),
        ({"runs": []}, "ok", "version 12 committed 7 h ago, 1,203,000 rows", "nothing to do"),
        (
            {"runs": [ran(2, committed=False), ran(7)]},
            "ok",
            "version 12 committed 7 h ago, 1,203,000 rows, found up to date 2 h ago",
            "nothing to do",
        ),
        (
            {"quarantined": 1234},
            "ok",
            "version 12 committed 7 h ago, 1,203,000 rows, 1,234 quarantined",
            "pipeline run CONFIG --retry-quarantined",
        ),
        (
            {"runs": [ran(7, error="1 of 9 shards failed (the other shards were committed): s3://a.tar: gone")]},
            "incomplete",
            "version 12 committed 7 h ago, 1,203,000 rows; last run 7 h ago: 1 of 9 shards failed (the other shards were",
            "pipeline run CONFIG tries what is missing again",
        ),
        (
            {"runs": [ran(3, committed=False, error="the disk is full\n")], "waiting": 4},
            "failed",
            "last run 3 h ago: the disk is full; version 12 still stands",
            "mend that, then pipeline run CONFIG tries again, and adopts 4 finished partitions",
        ),
        (
            {**FIRST, "runs": [ran(3, committed=False, error="x" * 1000)]},
            "failed",
            f"last run 3 h ago: {'x' * 299}…; nothing was committed yet",
            "mend that, then pipeline run CONFIG tries again",
        ),
        (
            {"unfinished": UNFINISHED, "waiting": 2},
            "unfinished",
            "run 20261124T090000Z-b began 3 h ago and has no result: at work, or killed; version 12 still stands",
            "if it was killed: pipeline run CONFIG goes on, and adopts 2 finished partitions",
        ),
        (
            {"unfinished": {**UNFINISHED, "run_id": "20261124T000000Z-a"}, "runs": []},
            "ok",
            "version 12 committed 7 h ago",
            "nothing to do",
        ),
        (
            {**FIRST, "waiting": 4},
            "empty",
            "nothing was committed yet",
            "pipeline run CONFIG makes the first version, and adopts 4 finished partitions",
        ),
    ],
)
def test_verdict(changes: dict[str, Any], state: str, text: str, to_do: str) -> None:
    found = status.verdict({**WELL, **changes}, NOW)
    assert found.state == state
    assert found.text.startswith(text)
    assert found.next.startswith(to_do)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 s"),
        (119, "119 s"),
        (120, "2 min"),
        (7199, "119 min"),
        (7200, "2 h"),
        (172_799, "47 h"),
        (1e6, "11 d"),
        (-5, "0 s"),
    ],
)
def test_ago(seconds: float, shown: str) -> None:
    assert terminal.ago(seconds) == f"{shown} ago"


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("status") / "out"
    write_dataset(folder, np.ones((5, 3), np.float32), [0, 1, 0, 1, 0])
    return folder


def test_the_first_two_lines_and_json(output: Path) -> None:
    first, second, *_ = invoke("status", output).stdout.splitlines()
    assert re.fullmatch(r"ok    version 0 committed \d+ s ago, 5 rows", first)
    assert second == "next  nothing to do; pipeline run CONFIG takes in what changes in the source"
    report = last_line(invoke("status", output, "--json"))
    assert report["state"] == "ok"
    assert report["summary"].startswith("version 0 committed ")
    assert report["next"].startswith("nothing to do")


@pytest.mark.parametrize("run_id", ["20261124T090000Z-abcdef", "notes"])
def test_a_run_that_left_no_result(output: Path, run_id: str) -> None:
    folder = output / "_runs" / run_id
    folder.mkdir(parents=True)
    try:
        (folder / "config.yaml").write_text("source: {}")
        report = last_line(invoke("status", output, "--json"))
        assert report["state"] == ("ok" if run_id == "notes" else "unfinished")
        (folder / "run.json").write_text("{")  # half a file
        assert last_line(invoke("status", output, "--json"))["state"] == "ok"
    finally:
        for name in ("config.yaml", "run.json"):
            (folder / name).unlink()
        folder.rmdir()


def on_a_terminal(output: Path, **env: str) -> str:
    """What a person gets to see: both ends of a real pseudo-terminal."""
    ours, theirs = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm-256color", **env}
    command = [sys.executable, "-m", "pipeline", "status", str(output)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0, shown
    return shown.decode()


def test_colours_only_where_they_are_wanted(output: Path) -> None:
    green = "\x1b[1;32mok"
    assert on_a_terminal(output).startswith(green)
    without = on_a_terminal(output, NO_COLOR="1")
    assert "ok" in without.partition("\n")[0] and not re.search(r"\x1b\[(\d+;)?3\d", without)
    assert "\x1b" not in on_a_terminal(output, TERM="dumb")
    assert "\x1b" not in invoke("status", output).stdout, "into a pipe"
    assert invoke("status", output, env={"FORCE_COLOR": "1", "TERM": "xterm-256color"}).stdout.startswith(green)
