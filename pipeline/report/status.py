"""Whether a dataset is well, at a glance: the first line of `pipeline status`, what to do next, and all that stands below."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.report import terminal

State = Literal["ok", "incomplete", "failed", "unfinished", "empty"]
STYLES: dict[str, str] = {
    "ok": "bold green",
    "incomplete": "bold yellow",
    "failed": "bold red",
    "unfinished": "bold yellow",
    "empty": "bold yellow",
}
MAX_ERROR = 300
"""Characters of a run's error in the first line; its own line below has all of it."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of the last run."""

    state: State
    """`ok`: it ended well. `incomplete`: it committed, but some shards failed. `failed`: it committed nothing. `unfinished`: it
    left no result, so it is at work or was killed. `empty`: there was none."""
    text: str
    next: str
    """What to do."""


def verdict(report: dict[str, Any], now: datetime.datetime) -> Verdict:
    """Of what `pipeline status` reports.

    Args:
        report: with `version`, `rows`, `quarantined`, `waiting`, `history`, `runs` and `unfinished`.
        now: with a time zone.
    """

    def since(when: str) -> str:
        return terminal.ago((now - datetime.datetime.fromisoformat(when)).total_seconds())

    version, history, last = report["version"], report["history"], next(iter(report["runs"]), None)
    stands = f"version {version} still stands" if version is not None else "nothing was committed yet"
    waiting = f", and adopts {report['waiting']:,} finished partitions" if report["waiting"] else ""
    # One that was killed after its commit has done what it was to do.
    if report["unfinished"] is not None and report["unfinished"]["run_id"] not in [each["run_id"] for each in history]:
        began = since(report["unfinished"]["began"])
        text = f"run {report['unfinished']['run_id']} began {began} and has no result: at work, or killed; {stands}"
        return Verdict("unfinished", text, f"if it was killed: pipeline run CONFIG goes on{waiting}")
    if last is not None and last["error"] and not last["committed"]:
        text = f"last run {since(last['finished'])}: {_short(last['error'])}; {stands}"
        return Verdict("failed", text, f"mend that, then pipeline run CONFIG tries again{waiting}")
    if version is None:
        return Verdict("empty", stands, f"pipeline run CONFIG makes the first version{waiting}")
    committed = f" committed {since(history[0]['when'])}" if history else ""
    text = f"version {version}{committed}, {report['rows']:,} rows"
    if last is not None and last["error"]:
        text += f"; last run {since(last['finished'])}: {_short(last['error'])}"
        return Verdict("incomplete", text, "pipeline run CONFIG tries what is missing again")
    if last is not None and not last["committed"]:
        text += f", found up to date {since(last['finished'])}"
    if report["quarantined"]:
        text += f", {report['quarantined']:,} quarantined"
        return Verdict("ok", text, "pipeline run CONFIG --retry-quarantined tries the quarantined again")
    return Verdict("ok", text, "nothing to do; pipeline run CONFIG takes in what changes in the source")


def _short(error: str) -> str:
    error = " ".join(error.split())
    return error if len(error) <= MAX_ERROR else f"{error[: MAX_ERROR - 1]}…"


def show(report: dict[str, Any], examples: Sequence[Any]) -> None:
    """All of it; `examples` are some rows of the quarantine."""
    terminal.show_pairs([(report["state"], report["summary"]), ("next", report["next"]), ("", "")], STYLES)
    version = "no version yet" if report["version"] is None else f"version {report['version']}"
    rows = [("dataset", f"{report['output']}  {version}")]
    rows.append(("rows", f"{report['rows']:,} from {report['shards']:,} shards"))
    rows += [("column", f"{name}: {width} x float32") for name, width in report["nodes"].items()]
    if report["recipe"]:
        recipe = report["recipe"]
        rows.append(("recipe", f"{recipe['model']}, weights {recipe['weights']}, {recipe['precision']}"))
    rows.append(("quarantined", f"{report['quarantined']:,}"))
    rows += [("", f"{count:,} x {reason}") for reason, count in report["quarantine_reasons"].items()]
    rows += [("", f"{row.shard} {row.key}: {row.message}") for row in examples]
    if report["waiting"]:
        rows.append(("waiting", f"{report['waiting']:,} finished partitions, which the next run adopts"))
    for each in report["history"]:
        what = "by another program" if each["rows"] is None else (
            f"{each['rows']:,} rows, {each['added']:,} partitions added, {each['removed']:,} removed"
        )  # fmt: skip
        rows.append(("version", f"{each['version']}  {each['when']}  {what}"))
    for each in report["runs"]:
        outcome = each["error"] or f"{each['images']['embedded']:,} embedded, {each['images']['quarantined']:,} quarantined"
        rows.append(("run", f"{each['finished']}  {outcome}, {terminal.duration(each['seconds'])}"))
    terminal.show_pairs(rows)
