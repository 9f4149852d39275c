"""What a terminal shows of names that come from data."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from commands import cli, last_line
from conftest import settings

from pipeline import driver
from pipeline.report import terminal

HOSTILE = "cat\x1b[2J\x07\u202egpj.\u2028[red]x[/red]\udc80 naïve 猫"
SHOWN = r"cat\x1b[2J\x07\u202egpj.\u2028[red]x[/red]\udc80 naïve 猫"


STATE = r"\d+/s, 0 quarantined, 1 actor, bound by \w+ \(fetch \d+%, decode \d+%, forward \d+%, write \d+%\)"


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


@pytest.mark.usefixtures("local_ray")
def test_a_log_has_a_line_now_and_then_and_not_one_a_shard(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = time.monotonic()
    with terminal.Watch() as watch:
        summary = driver.run(settings(f"{shards}/*.tar", tmp_path / "out"), observer=watch)
    num_seconds = time.monotonic() - start
    plan, *lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"\d\d:\d\d:\d\d {summary.run_id} Plan: 4 shards to extract .*", plan)
    progress = rf"4 of 4 shards \(100%\), 60 images, {STATE}, about 0.0 s left"
    assert re.fullmatch(rf"\d\d:\d\d:\d\d {summary.run_id} {progress}", lines[-1])
    assert len(lines) <= 2 + num_seconds / terminal.LINE_EVERY_S, "the last one, and what the actors took to start"


@pytest.mark.usefixtures("local_ray")
def test_a_log_goes_on_while_no_shard_is_finished(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "LINE_EVERY_S", 0.1)
    with terminal.Watch() as watch:
        driver.run(settings(f"{shards}/000.tar", tmp_path / "out"), observer=watch)
    first = capsys.readouterr().err.splitlines()[1]  # an actor takes seconds to start
    assert re.search(r" 0 of 1 shards \(0%\), none finished for 0\.[12] s$", first)
    time.sleep(0.3)
    assert capsys.readouterr().err == "", "it ends with the run"


@pytest.mark.usefixtures("local_ray")
def test_a_bar_fits_a_terminal_of_80_columns(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm-256color"), ("COLUMNS", "80"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    with terminal.Watch() as watch:
        driver.run(settings(f"{shards}/*.tar", tmp_path / "out"), observer=watch)
    frames = re.sub(r"\r|\x1b\[\d*[AK]", "\n", capsys.readouterr().err)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", frames)
    *_, bar, state, rest = (line.rstrip() for line in shown.splitlines() if line.strip())
    assert re.fullmatch(r"━+ 4/4 shards, about 0.0 s left", bar.strip())
    assert re.fullmatch(f"60 images, {STATE}", f"{state} {rest}")
    assert max(len(line) for line in (bar, state, rest)) <= 80
    assert "starting actors" in shown
