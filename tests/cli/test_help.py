"""What `--help` shows: for every command an example, which the command takes."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from commands import ROOT, invoke, parsed

from pipeline.cli import COMMANDS


@pytest.mark.parametrize("command", COMMANDS, ids=[command.__name__ for command in COMMANDS])
def test_every_command_has_an_example_that_it_takes(command: Callable[..., None]) -> None:
    (example,) = re.findall(r"^ *Example: (.+)$", command.__doc__ or "", re.MULTILINE)
    words, _, redirected = example.partition(" > ")
    name, parameters = parsed(words)
    assert name == command.__name__
    assert parameters["as_json"] is False
    assert not redirected or "/" not in redirected
    for file in re.findall(r"configs/\S+", example):
        assert (ROOT / file).is_file() or name == "submit", "one for a cluster has URLs of its own"

    shown = invoke(name, "--help", env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"})
    assert shown.returncode == 0
    assert f"Example: {example}" in shown.stdout


def test_help_lists_every_command_with_what_it_does() -> None:
    shown = invoke("--help", env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"})
    for command in COMMANDS:
        first = (command.__doc__ or "").partition("\n")[0]
        assert re.search(rf"\b{command.__name__} +{re.escape(first)}", shown.stdout), command.__name__
