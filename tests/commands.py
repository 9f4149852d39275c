"""The command line, in processes of its own or in this one."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
ROOT = TESTS.parent


def start(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start `pipeline …`; models of the tests can be named in its config."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)]), **(env or {})}
    command = [sys.executable, "-m", "pipeline", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def cli(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `pipeline …` to its end."""
    process = start(*arguments, env=env)
    try:
        out, err = process.communicate(timeout=280)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def invoke(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`pipeline …` in this process: seconds of imports less, for what needs no process of its own."""
    from typer.testing import CliRunner

    from pipeline.cli import app

    result = CliRunner().invoke(app, list(map(str, arguments)), env=env)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)


def parsed(line: str) -> tuple[str, dict[str, Any]]:
    """A command line of `pipeline` as its own parser takes it: the command's name, and its parameters.

    Raises:
        UsageError: it does not take it.
    """
    import typer

    from pipeline.cli import app

    program, *arguments = shlex.split(line)
    assert program.rpartition("/")[2] == "pipeline"
    root: Any = typer.main.get_command(app)
    context = root.make_context("pipeline", list(arguments))
    name, found, rest = root.resolve_command(context, list(arguments))
    return name, found.make_context(name, rest, parent=context).params


def last_line(finished: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What `--json` printed."""
    return dict(json.loads(finished.stdout.strip().splitlines()[-1]))
