"""What all commands share: their usual arguments, and how a command reports and ends."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from pipeline.errors import NotFound, PipelineError, nearby, printable

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file with the config.")]
OutputUrl = Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder or URL of a dataset.")]
Version = Annotated[int | None, typer.Option("--version", metavar="N", help="Number of a version; the newest when left out.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line on stdout.")]
EndpointUrl = Annotated[str | None, typer.Option(help="Endpoint of an S3-compatible store.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a field of the config.")]
AllowRemovals = Annotated[
    bool, typer.Option("--allow-removals", help="Commit even if more than run.max_removed of the rows vanish.")
]
RetryQuarantined = Annotated[
    bool, typer.Option("--retry-quarantined", help="Try the samples again that are in quarantine, and only those.")
]


@contextlib.contextmanager
def reporting(as_json: bool) -> Iterator[dict[str, Any]]:
    """Collects what a command reports; prints it at the end, turns errors into a line and an exit code."""
    report: dict[str, Any] = {}
    code = 0
    try:
        yield report
    except PipelineError as error:
        report["error"] = _with_hint(error)
        typer.echo(f"error: {printable(report['error'])}", err=True)
        code = error.exit_code
    except KeyboardInterrupt:
        report["error"] = report.get("error") or "stopped; what was finished is kept for the next run"
        typer.echo(f"error: {printable(report['error'])}", err=True)
        code = 1
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False, default=str))
    if code:
        raise typer.Exit(code)


def _with_hint(error: PipelineError) -> str:
    """Its message; of a path that leads to nothing also where it leaves what is there."""
    missing = next((each for each in (error, error.__context__) if isinstance(each, NotFound)), None)
    hint = nearby(missing.url) if missing is not None else ""
    return f"{error}; {hint}" if hint else str(error)


def version_text(url: str, version: int | None) -> str:
    """A dataset and which version of it."""
    return f"{url}  {'no version yet' if version is None else f'version {version}'}"


class PlainFormatter(logging.Formatter):
    """Log lines without control characters: they may hold names from data."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        return printable(super().format(record))
