"""What a terminal shows of names that come from data."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import cli, last_line

from pipeline.report import terminal

HOSTILE = "cat\x1b[2J\x07\u202egpj.\u2028[red]x[/red]\udc80 naïve 猫"
SHOWN = r"cat\x1b[2J\x07\u202egpj.\u2028[red]x[/red]\udc80 naïve 猫"


def test_names_neither_steer_the_terminal_nor_are_taken_for_markup(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show_pairs([("key", HOSTILE)])
    assert SHOWN in capsys.readouterr().out


def test_notes_too(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.Watch() as watch:
        watch.note(HOSTILE)
    assert SHOWN in capsys.readouterr().err


def test_errors_too(tmp_path: Path) -> None:
    finished = cli("status", tmp_path / "\x1b[31mred", "--json")
    assert finished.returncode == 2
    assert "\x1b" not in finished.stderr and r"\x1b[31mred" in finished.stderr
    assert "\x1b[31mred" in last_line(finished)["error"]
