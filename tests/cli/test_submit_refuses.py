"""What `pipeline submit` refuses before a cluster hears of it. What it does on one: `integration/test_submit.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import cli, last_line
from conftest import settings

NOWHERE = "http://127.0.0.1:9"


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "photos.yaml"
    wanted = settings("s3://photos/*.tar", "s3://features/out", **changes)
    path.write_text(yaml.safe_dump(wanted.model_dump(mode="json")))
    return path


def refusal(*arguments: str | Path) -> str:
    """The one line that it says; a traceback would be more."""
    finished = cli("submit", *arguments, "--json")
    assert finished.returncode == 2
    assert finished.stderr == f"error: {last_line(finished)['error']}\n"
    assert "submission_id" not in last_line(finished)
    return finished.stderr


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({"output__url": "data/out"}, [], "output.url: 'data/out' is a path relative to this folder"),
        ({"source__url": "shards/*.tar"}, [], "source.url: 'shards/*.tar' is a path relative to this folder"),
        ({"source__storage": {"options": {"key": "AKIA", "secret": "hunter2"}}}, [], "source.storage.options.key: a secret"),
        ({"output__storage": {"options": {"a": {"sas_token": "hunter2"}}}}, [], "output.storage.options.a.sas_token: a secret"),
        ({}, ["--set", "output.storage.options.sas=hunter2"], "--set output.storage.options: whoever sees the cluster"),
        ({}, ["--set", "run.workers=none"], "run.workers: 'none' is wrong"),
        ({}, ["--working-dir", "tests/cli"], "--working-dir tests/cli: the config"),
        ({}, ["--working-dir", "tests/clo"], "--working-dir tests/clo: there is no such folder"),
        ({}, ["--address", "head:8265"], "--address head:8265: give the URL of the cluster's dashboard"),
        ({}, [], f"{NOWHERE}: no Ray cluster answers there"),
    ],
    ids=lambda each: "" if isinstance(each, (dict, list)) else each[:30],
)
def test_in_one_line_and_without_the_secret(tmp_path: Path, changes: dict[str, Any], options: list[str], said: str) -> None:
    path = written(tmp_path, **changes)
    where = [] if "--address" in options else ["--address", NOWHERE]
    line = refusal(path, *where, *options)
    assert said in line
    assert "hunter2" not in line
