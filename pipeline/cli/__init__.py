"""The command line: parse, call the driver or an analysis, set the exit code.

Exit codes: 0 done, 1 the run failed or is incomplete, 2 the user's input is wrong. With `--json` the last line on stdout is
one JSON object; logs and progress go to stderr. Torch and ray are loaded only by the commands that need them.

A new command is a function in one of the modules here, and its name in `COMMANDS`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

import typer

from pipeline.cli import browse, curate, dataset, embed, export, init, probe, report, run, search, setup, submit, verify
from pipeline.cli.common import PlainFormatter
from pipeline.cli.usage import Commands

COMMANDS: tuple[Callable[..., None], ...] = (
    init.init,
    run.run,
    run.plan,
    submit.submit,
    dataset.status,
    report.report,
    probe.probe,
    probe.predict,
    dataset.diff,
    verify.verify,
    export.export,
    search.search,
    browse.browse,
    curate.curate,
    dataset.vacuum,
    embed.embed,
    run.bench,
    setup.demo,
    setup.schema,
)
"""In the order in which help lists them."""

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Turn images into embeddings with a frozen model: plan, extract, merge, probe.",
)
for command in COMMANDS:
    app.command()(command)


def main() -> None:
    """Entry point of the console script."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    sys.path.insert(0, os.getcwd())  # python/module:function finds modules of the working directory, as `python -m` would
    app()
