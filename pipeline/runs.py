"""What runs leave beside the data, in `_runs/<run id>/`: `config.yaml`, `run.json`, and `probe/` with metrics and weights."""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import uuid
from typing import Any

from pipeline.errors import ConfigError
from pipeline.storage import Store, join

RUNS_FOLDER = "_runs"
PROBE_FOLDER, PROBE_FILE, METRICS_FILE = "probe", "probe.safetensors", "metrics.json"
"""In the folder of a run."""
ID_FORMAT = "%Y%m%dT%H%M%SZ"
"""When a run began, the first part of its name."""


def new_id() -> str:
    """A run's name: they sort by time."""
    now = datetime.datetime.now(datetime.UTC)
    return f"{now:{ID_FORMAT}}-{uuid.uuid4().hex[:6]}"


def latest(store: Store, url: str) -> list[dict[str, Any]]:
    """`run.json` of the last runs, newest first."""
    files = store.list(join(url, RUNS_FOLDER), missing_ok=True)
    newest = sorted((file.url for file in files if file.url.endswith("/run.json")), reverse=True)[:20]
    found = []
    for each in newest:
        with contextlib.suppress(ValueError):  # half a file of a store that is not atomic
            found.append(json.loads(store.read(each)))
    return found


def unfinished(store: Store, url: str) -> dict[str, str] | None:
    """`run_id` and `began` of the newest run, if it has left no `run.json`: it is at work, or was killed."""
    names = {"config.yaml": "", "run.json": ""}
    for file in store.list(join(url, RUNS_FOLDER), missing_ok=True):
        run_id, name = file.url.split("/")[-2:]
        if name in names and re.match(r"\d{8}T\d{6}Z-", run_id):
            names[name] = max(names[name], run_id)
    newest = names["config.yaml"]
    if newest <= names["run.json"]:
        return None
    began = datetime.datetime.strptime(newest.partition("-")[0], ID_FORMAT).replace(tzinfo=datetime.UTC)
    return {"run_id": newest, "began": began.isoformat(timespec="seconds")}


def newest_probe(store: Store, url: str) -> str:
    """URL of the weights that were saved last.

    Raises:
        ConfigError: there are none.
    """
    files = store.list(join(url, RUNS_FOLDER), missing_ok=True)
    found = [file.url for file in files if file.url.endswith(f"/{PROBE_FOLDER}/{PROBE_FILE}")]
    if not found:
        raise ConfigError(f"{url}: there is no saved probe; `pipeline probe` trains one")
    return max(found)


def newest_metrics(store: Store, url: str, version: int) -> dict[str, Any] | None:
    """`metrics.json` of the probe that was trained last on this version, if one of the last probes was."""
    files = store.list(join(url, RUNS_FOLDER), missing_ok=True)
    found = [file.url for file in files if file.url.endswith(f"/{PROBE_FOLDER}/{METRICS_FILE}")]
    for each in sorted(found, reverse=True)[:20]:
        with contextlib.suppress(ValueError):
            metrics: dict[str, Any] = json.loads(store.read(each))
            if metrics.get("version") == version:
                return metrics
    return None
