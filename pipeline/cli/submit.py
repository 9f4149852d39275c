"""The command that runs a config on a Ray cluster: submit.

It is `ray job submit` with what a person would forget: the config is checked here and travels with the job, secrets do not, the
cluster's token is found, and the exit code is the run's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline import config
from pipeline.cli.common import AllowRemovals, AsJson, ConfigPath, Overrides, RetryQuarantined, reporting
from pipeline.errors import ClusterError, ConfigError, WorldError, printable

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
"""Where the dashboard of a cluster on this machine listens, and `kubectl port-forward` or `ray dashboard` by default."""
PATIENCE_S = 300.0
"""For a cluster that does not answer while its job is followed: forwarded ports break, and come back."""
RETRY_S = 1.0

_SECRET = re.compile(r"(^|_)(key|secret|token|password|credentials?|connection_string|access_key_id)$")


def submit(
    path: ConfigPath,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help=f"Dashboard of the cluster. Default: RAY_API_SERVER_ADDRESS or RAY_ADDRESS, else {DEFAULT_ADDRESS}.",
        ),
    ] = None,
    overrides: Overrides = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Follow the job's log, and end with the run's exit code.")
    ] = True,
    working_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Folder with the config and modules of your own; all of it is uploaded. Default: nothing but the config.",
        ),
    ] = None,
    submission_id: Annotated[
        str | None, typer.Option(metavar="ID", help="Name of the job; a cluster takes each name once.")
    ] = None,
    allow_removals: AllowRemovals = False,
    retry_quarantined: RetryQuarantined = False,
    as_json: AsJson = False,
) -> None:
    """Run a config as a job on a Ray cluster: `pipeline run` on its head node, actors on its GPUs.

    Credentials stay where they are: the nodes' role or environment has them. The cluster's token is taken from where Ray looks:
    RAY_AUTH_TOKEN, the file that RAY_AUTH_TOKEN_PATH names, ~/.ray/auth_token.

    Example: pipeline submit config.yaml --address http://127.0.0.1:8265
    """
    with reporting(as_json) as report:
        settings = config.load(path, overrides or [])
        _refuse_secrets(settings, overrides or [])
        _refuse_relative(settings)
        flags = {"--allow-removals": allow_removals, "--retry-quarantined": retry_quarantined, "--json": as_json}
        options = [word for override in overrides or [] for word in ("--set", override)]
        options += [flag for flag, is_set in flags.items() if is_set]
        with _staged(path, working_dir) as (folder, name):
            entrypoint = shlex.join(["python", "-m", "pipeline", "run", name, *options])
            has_token = _find_token()
            client = _connect(address)
            report |= {"address": client.get_address(), "entrypoint": entrypoint}
            shown = _in_rays_words(report, working_dir or os.path.dirname(path) or ".", submission_id)
            _say(f"{'RAY_AUTH_MODE=token ' if has_token else ''}{shown}")
            with _one_line(report["address"]):
                report["submission_id"] = client.submit_job(
                    entrypoint=entrypoint, runtime_env={"working_dir": folder}, submission_id=submission_id
                )
        job = report["submission_id"]
        _say(f"submitted as {job}; `ray job stop {job}` stops it and keeps what is finished")
        if wait:
            report |= _outcome(client, job, as_json)
        elif not as_json:
            typer.echo(job)
    if report.get("exit_code"):
        raise typer.Exit(report["exit_code"])


def _refuse_secrets(settings: config.Config, overrides: list[str]) -> None:
    """A job's command line stands in its metadata and its log, and its files lie on every node.

    Raises:
        ConfigError: names the field, not the value.
    """
    named = [override.partition("=")[0] for override in overrides]
    for section, storage in (("source", settings.source.storage), ("output", settings.output.storage)):
        field = f"{section}.storage.options"
        for option in _secrets(storage.options):
            raise ConfigError(
                f"{field}.{option}: a secret would travel with the job; leave it to the nodes: their instance's role, or "
                f"AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in their environment"
            )
        if storage.options and any(path.startswith(field) or field.startswith(path) for path in named):
            raise ConfigError(
                f"--set {field}: whoever sees the cluster can read a job's command line; write it into the config"
            )


def _secrets(options: dict[str, Any], above: str = "") -> Iterator[str]:
    """Dotted names of options that name a secret."""
    for name, value in options.items():
        if isinstance(value, dict):
            yield from _secrets(value, f"{above}{name}.")
        elif _SECRET.search(name.lower()):
            yield above + name


def _refuse_relative(settings: config.Config) -> None:
    """On a cluster a relative path leads into the folder of a job, which is gone after it.

    Raises:
        ConfigError: names field and value.
    """
    places = [*(("source.url", url) for url in settings.source.urls), ("output.url", settings.output.url)]
    for field, url in places:
        if "://" not in url and not url.startswith("/"):
            raise ConfigError(
                f"{field}: {url!r} is a path relative to this folder, which the cluster's nodes do not have; allowed are "
                f"URLs such as s3://bucket/folder, and absolute paths of a file system that all nodes share"
            )


@contextlib.contextmanager
def _staged(path: str, working_dir: str | None) -> Iterator[tuple[str, str]]:
    """The folder to upload, and the config's path in it."""
    if working_dir is None:
        with tempfile.TemporaryDirectory(prefix="pipeline-submit-") as temporary:
            shutil.copy(path, temporary)
            yield temporary, os.path.basename(path)
        return
    folder, file = Path(working_dir).resolve(), Path(path).resolve()
    if not folder.is_dir():
        raise ConfigError(f"--working-dir {working_dir}: there is no such folder")
    if not file.is_relative_to(folder):
        raise ConfigError(f"--working-dir {working_dir}: the config {path} does not lie in it; the job sees nothing else")
    yield str(folder), str(file.relative_to(folder))


def _find_token() -> bool:
    """Let Ray's client use the token that there is; whether it would not have done so by itself.

    Must happen before Ray is imported.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return False
    places = [os.environ.get("RAY_AUTH_TOKEN_PATH"), os.path.expanduser("~/.ray/auth_token")]
    if not os.environ.get("RAY_AUTH_TOKEN") and not any(place and os.path.isfile(place) for place in places):
        return False
    os.environ["RAY_AUTH_MODE"] = "token"
    return True


def _connect(address: str | None) -> JobSubmissionClient:
    """A client of the cluster that option or environment name."""
    named = [address, os.environ.get("RAY_API_SERVER_ADDRESS"), os.environ.get("RAY_ADDRESS")]
    url = next((each for each in named if each), DEFAULT_ADDRESS)
    if not re.match(r"https?://\w", url):
        raise ClusterError(f"--address {url}: give the URL of the cluster's dashboard, for example {DEFAULT_ADDRESS}")
    os.environ["RAY_API_SERVER_ADDRESS"] = url  # which Ray would otherwise prefer to what it is told
    from ray.job_submission import JobSubmissionClient

    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.ERROR)  # it tells of every upload, and warns of what is an error one line later
    with _one_line(url):
        return JobSubmissionClient(url)


@contextlib.contextmanager
def _one_line(address: str) -> Iterator[None]:
    """What Ray's client raises, as one line that says what to do.

    Raises:
        ClusterError: nothing was submitted.
    """
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        what = "does not know this token" if "failed" in str(error) else "wants a token"
        raise ClusterError(
            f"{address}: the cluster {what}; RAY_AUTH_TOKEN_PATH names a file with the one that it was started with, "
            f"default ~/.ray/auth_token (`ray get-auth-token` prints it on the head node)"
        ) from None
    except ConnectionError:
        raise ClusterError(f"{address}: no Ray cluster answers there; is its dashboard's port 8265 forwarded?") from None
    except (RuntimeError, ValueError, OSError) as error:  # a status that is no 200, with the server's traceback in it
        lines = [line for line in str(error).rstrip(". \n").splitlines() if line.strip()]
        raise ClusterError(
            f"{address}: the job was not taken: {lines[-1].strip() if lines else type(error).__name__}"
        ) from None


def _in_rays_words(report: dict[str, Any], folder: str, submission_id: str | None) -> str:
    """The command line that does the same."""
    named = ["--submission-id", submission_id] if submission_id else []
    words = ["ray", "job", "submit", "--address", report["address"], "--working-dir", folder, *named, "--"]
    return f"{shlex.join(words)} {report['entrypoint']}"


def _outcome(client: JobSubmissionClient, job: str, as_json: bool) -> dict[str, Any]:
    """Follow a job to its end: its status and exit code, and what `pipeline run --json` reported there.

    Raises:
        WorldError: it can no longer be followed.
    """
    try:
        details, log = _follow(client, job)
    except KeyboardInterrupt:
        raise WorldError(f"{job} goes on; `ray job logs --follow {job}` shows its log") from None
    code = details.driver_exit_code if details.status == "FAILED" else 0 if details.status == "SUCCEEDED" else 1
    outcome: dict[str, Any] = {"status": str(details.status.value), "exit_code": 1 if code is None else code}
    if details.status == "FAILED" and details.driver_exit_code is None:
        outcome["error"] = str(details.message).strip().splitlines()[-1] if details.message else "the job could not be started"
        _say(f"error: {outcome['error']}")
    if as_json:
        outcome["run"] = _last_object(log)
    else:
        typer.echo(f"{job} {outcome['status'].lower()}")
    return outcome


def _follow(client: JobSubmissionClient, job: str) -> tuple[JobDetails, str]:
    """Show the log as it grows, over as many connections as it takes; the job's details and its log when it has ended."""
    import aiohttp
    import requests

    shown, silent_since = _Shown(), 0.0
    while True:
        try:
            details = client.get_job_info(job)
            silent_since = 0.0
            if details.status.is_terminal():
                log = client.get_job_logs(job)
                shown.add(log[shown.num_chars :])
                return details, log
            asyncio.run(shown.follow(client, job))
        except (OSError, RuntimeError, aiohttp.ClientError, requests.RequestException) as error:
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since > PATIENCE_S:
                raise WorldError(
                    f"{client.get_address()} does not answer any more ({type(error).__name__}); {job} may go on: "
                    f"`ray job status {job}`"
                ) from None
        time.sleep(RETRY_S)


class _Shown:
    """How much of a log was shown, on stderr. Every connection begins with the log's first line."""

    def __init__(self) -> None:
        self.num_chars = 0

    async def follow(self, client: JobSubmissionClient, job: str) -> None:
        """Show what one connection brings beyond what was shown."""
        place = 0
        async for text in client.tail_job_logs(job):
            place += len(text)
            if place > self.num_chars:
                self.add(text[-(place - self.num_chars) :])

    def add(self, text: str) -> None:
        """Show more."""
        self.num_chars += len(text)
        typer.echo(printable(text.expandtabs()), err=True, nl=False)


def _last_object(log: str) -> dict[str, Any] | None:
    """The JSON object that a log ends with."""
    with contextlib.suppress(ValueError, IndexError):
        found = json.loads(log.rstrip().splitlines()[-1])
        return found if isinstance(found, dict) else None
    return None


def _say(text: str) -> None:
    typer.echo(printable(text), err=True)
