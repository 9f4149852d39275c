"""Commands that look after a dataset: status, diff, vacuum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline import config
from pipeline.cli.common import AsJson, EndpointUrl, OutputUrl, reporting

if TYPE_CHECKING:
    from pipeline.dataset.table import Table
    from pipeline.storage import Store


def status(url: OutputUrl, endpoint_url: EndpointUrl = None, as_json: AsJson = False) -> None:
    """Show whether the last run went well and what to do next; version, rows, recipe, quarantine, last versions and runs.

    Example: pipeline status data/embeddings
    """
    with reporting(as_json) as report:
        import collections
        import datetime

        from pipeline import runs
        from pipeline.dataset.read import Dataset
        from pipeline.dataset.table import Table, missing
        from pipeline.report import status
        from pipeline.storage import Store

        store = Store(config.Storage(endpoint_url=endpoint_url))
        table = Table.open(store, url)
        last_runs = runs.latest(store, url)
        waiting = _num_waiting(store, url) if table is None else 0
        unfinished = runs.unfinished(store, url)
        if table is None and not last_runs and waiting is None and unfinished is None:
            raise missing(store, url)
        quarantine = Dataset(table).quarantine() if table is not None else []
        reasons = collections.Counter(f"{row.stage}: {row.error}" for row in quarantine)
        report |= {
            "output": url,
            "version": table.version if table is not None else None,
            "rows": table.num_rows if table is not None else 0,
            "shards": len(table.entries) if table is not None else 0,
            "nodes": table.widths if table is not None else {},
            "recipe": table.recipe_fields if table is not None else None,
            "quarantined": len(quarantine),
            "quarantine_reasons": dict(reasons.most_common(10)),
            "waiting": waiting or 0,
            "history": _history(table) if table is not None else [],
            "runs": [{name: each[name] for name in ("run_id", "finished", "version", "committed", "images", "seconds", "error")}
                     for each in last_runs[:5]],
            "unfinished": unfinished,
        }  # fmt: skip
        found = status.verdict(report, datetime.datetime.now(datetime.UTC))
        report |= {"state": found.state, "summary": found.text, "next": found.next}
        if not as_json:
            status.show(report, quarantine[:3])


def diff(
    url: OutputUrl,
    before: Annotated[int, typer.Argument(metavar="A", help="Number of the older version.")],
    after: Annotated[int, typer.Argument(metavar="B", help="Number of the newer version.")],
    rows_only: Annotated[
        bool, typer.Option("--rows-only", help="Leave out the drift, which reads the embeddings of every row.")
    ] = False,
    endpoint_url: EndpointUrl = None,
    as_json: AsJson = False,
) -> None:
    """Compare two versions: rows added, removed, changed and relabelled, recipe, drift of the embeddings.

    Example: pipeline diff data/embeddings 0 1
    """
    with reporting(as_json) as report:
        from pipeline.dataset.diff import diff as compare
        from pipeline.dataset.read import open_dataset
        from pipeline.report import terminal

        storage = config.Storage(endpoint_url=endpoint_url)
        found = compare(open_dataset(url, before, storage), open_dataset(url, after, storage), drift=not rows_only)
        report |= {"output": url, **found.as_json()}
        if not as_json:
            terminal.show_diff(report)


def vacuum(
    url: OutputUrl,
    keep_versions: Annotated[int, typer.Option(metavar="N", help="Newest versions that stay readable.")] = 10,
    older_than: Annotated[
        float,
        typer.Option(
            metavar="DAYS",
            help="Keep files that are younger. Below 4 a run in progress can lose what it finished or adopted.",
        ),
    ] = 7.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be removed.")] = False,
    endpoint_url: EndpointUrl = None,
    as_json: AsJson = False,
) -> None:
    """Remove partitions that no kept version names, and what killed writers left behind.

    Example: pipeline vacuum data/embeddings --dry-run
    """
    with reporting(as_json) as report:
        import datetime

        from pipeline.dataset import table
        from pipeline.report import terminal
        from pipeline.storage import Store

        store = Store(config.Storage(endpoint_url=endpoint_url))
        days = datetime.timedelta(days=older_than)
        done = table.vacuum(store, url, keep_versions=keep_versions, keep_younger=days, dry_run=dry_run)
        report |= {
            "output": url,
            "dry_run": dry_run,
            "kept_versions": done.kept_versions,
            "files": [file.url for file in done.files],
            "bytes": done.num_bytes,
        }
        if not as_json:
            kept = f"{min(done.kept_versions)} to {max(done.kept_versions)}"
            removed = f"{len(done.files):,} files, {terminal.size(done.num_bytes)}"
            terminal.show_pairs(
                [("dataset", url), ("kept versions", kept), ("would remove" if dry_run else "removed", removed)]
            )


def _num_waiting(store: Store, url: str) -> int | None:
    """Partitions of runs that did not commit which the next run can adopt; None where there is no partition of any age."""
    import time

    from pipeline.dataset import partition
    from pipeline.plan import ADOPT_WITHIN
    from pipeline.storage import join

    oldest = time.time() - ADOPT_WITHIN.total_seconds()
    listing = store.list(join(url, partition.DATA_FOLDER), missing_ok=True)
    files = [file for file in listing if partition.identity_of(file.url)]
    return len({partition.identity_of(file.url) for file in files if file.modified > oldest}) if files else None


def _history(table: Table) -> list[dict[str, Any]]:
    """The last commits; counts are None where another program committed."""
    import datetime

    return [
        {
            "version": commit["version"],
            "when": datetime.datetime.fromtimestamp(commit["timestamp"] / 1000, datetime.UTC).isoformat(timespec="seconds"),
            "run_id": commit.get("run_id"),
            **{name: int(commit[f"num_{name}"]) if f"num_{name}" in commit else None for name in ("rows", "added", "removed")},
        }
        for commit in table.history(10)
    ]
