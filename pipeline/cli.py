"""The command line: parse, call the driver or an analysis, set the exit code.

Exit codes: 0 done, 1 the run failed or is incomplete, 2 the user's input is wrong. With `--json` the last line on stdout is
one JSON object; logs and progress go to stderr. Torch and ray are loaded only by the commands that need them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline import config
from pipeline.errors import ConfigError, PipelineError, printable

if TYPE_CHECKING:
    from pipeline.dataset.table import Table
    from pipeline.storage import Store

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Turn images into embeddings with a frozen model: plan, extract, merge, probe.",
)

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file with the config.")]
OutputUrl = Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder or URL of a dataset.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line on stdout.")]
EndpointUrl = Annotated[str | None, typer.Option(help="Endpoint of an S3-compatible store.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a field of the config.")]


@app.command()
def run(
    path: ConfigPath,
    overrides: Overrides = None,
    allow_removals: Annotated[
        bool, typer.Option("--allow-removals", help="Commit even if more than run.max_removed of the rows vanish.")
    ] = False,
    retry_quarantined: Annotated[
        bool, typer.Option("--retry-quarantined", help="Try the samples again that are in quarantine, and only those.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Bring the dataset up to date and train the probe. Doing it again does nothing.

    Example: pipeline run configs/quickstart.yaml
    """
    with _reporting(as_json) as report:
        settings = config.load(path, overrides or [])
        from pipeline import driver
        from pipeline.report import terminal

        with terminal.Watch() as watch:
            try:
                wishes = {"allow_removals": allow_removals, "retry_quarantined": retry_quarantined}
                report |= driver.run(settings, **wishes, observer=watch).as_json()
            except PipelineError as error:
                summary = getattr(error, "summary", None)
                report |= summary.as_json() if summary is not None else {}
                if summary is not None and not as_json:
                    terminal.show_run(report)
                raise
        if not as_json:
            terminal.show_run(report)


@app.command()
def plan(path: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Show what a run would do. Changes nothing.

    Example: pipeline plan configs/quickstart.yaml --set run.batch_size=64
    """
    with _reporting(as_json) as report:
        settings = config.load(path, overrides or [])
        from pipeline import driver
        from pipeline.report import terminal
        from pipeline.storage import Store

        table, todo = driver.make_plan(settings)
        # What the last run that read anything tells of this source: bytes of an image, and bytes in a second.
        runs = driver.runs(Store(settings.output.storage), settings.output.url)
        last = next((each for each in runs if each.get("bytes_per_second") and each.get("bytes_per_image")), None)
        images = round(todo.num_bytes / last["bytes_per_image"]) if last else None
        seconds = round(todo.num_bytes / last["bytes_per_second"], 1) if last else None
        report |= {
            "output": settings.output.url,
            "version": table.version if table is not None else None,
            "shards": {
                "total": todo.num_shards,
                "extract": len(todo.extract),
                "new": todo.num_new,
                "changed": len(todo.replaced),
                "adopt": len(todo.adopt),
                "unchanged": len(todo.unchanged),
                "removed": len(todo.removed),
            },
            "bytes": todo.num_bytes,
            "reasons": todo.reasons,
            "estimated_images": images,
            "estimated_seconds": seconds,
        }
        if not as_json:
            unknown = "not known before a first run"
            rows = [
                ("shards", terminal.plan_line(todo).removeprefix("Plan: ")),
                ("images", f"about {images:,} to read" if images is not None else unknown),
                ("time", f"about {terminal.duration(seconds)}" if seconds is not None else unknown),
            ]
            terminal.show_pairs([("dataset", _version_text(settings.output.url, report["version"])), *rows])


@app.command()
def status(url: OutputUrl, endpoint_url: EndpointUrl = None, as_json: AsJson = False) -> None:
    """Show version, rows, recipe, quarantine, the last versions and the last runs of a dataset.

    Example: pipeline status data/embeddings
    """
    with _reporting(as_json) as report:
        import collections

        from pipeline import driver
        from pipeline.dataset.read import Dataset
        from pipeline.dataset.table import Table
        from pipeline.storage import Store

        store = Store(config.Storage(endpoint_url=endpoint_url))
        table = Table.open(store, url)
        last_runs = driver.runs(store, url)
        waiting = _num_waiting(store, url) if table is None else 0
        if table is None and not last_runs and waiting is None:
            raise ConfigError(f"{url}: there is no dataset here; `pipeline run` makes one")
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
        }  # fmt: skip
        if not as_json:
            _show_status(report, quarantine[:3])


@app.command()
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
    with _reporting(as_json) as report:
        from pipeline.dataset.diff import diff as compare
        from pipeline.dataset.read import open_dataset
        from pipeline.report import terminal

        storage = config.Storage(endpoint_url=endpoint_url)
        found = compare(open_dataset(url, before, storage), open_dataset(url, after, storage), drift=not rows_only)
        report |= {"output": url, **found.as_json()}
        if not as_json:
            terminal.show_diff(report)


@app.command()
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
    with _reporting(as_json) as report:
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


@app.command()
def bench(
    path: ConfigPath,
    overrides: Overrides = None,
    images: Annotated[int, typer.Option(metavar="N", min=1, help="Images of the source to measure with, at most.")] = 1000,
    as_json: AsJson = False,
) -> None:
    """Measure the limits of this machine on this source, how close a run comes, and what gradients would cost.

    Changes nothing; takes a minute or two.

    Example: pipeline bench configs/quickstart.yaml --images 500
    """
    with _reporting(as_json) as report:
        settings = config.load(path, overrides or [])
        from pipeline import bench as limits
        from pipeline.report import terminal

        with terminal.Watch() as watch:
            report |= limits.measure(settings, images, watch.note)
        if not as_json:
            terminal.show_bench(report)


@app.command()
def demo(folder: Annotated[str, typer.Argument(metavar="DIR", help="Where to write.")], as_json: AsJson = False) -> None:
    """Write a small real labelled dataset (1,797 handwritten digits) as shards, to try everything on.

    Example: pipeline demo data/digits
    """
    with _reporting(as_json) as report:
        from pipeline.demo import write_digits

        num_images, num_shards = write_digits(folder)
        report |= {"folder": folder, "images": num_images, "shards": num_shards}
        if not as_json:
            typer.echo(f"{num_images:,} labelled images in {num_shards} shards: {folder}")


@app.command()
def schema(as_json: AsJson = False) -> None:
    """Print the JSON schema of a config file, for editors.

    Example: pipeline schema > config.schema.json
    """
    typer.echo(json.dumps(config.json_schema(), indent=None if as_json else 2))


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def main() -> None:
    """Entry point of the console script."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PlainFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    sys.path.insert(0, "")  # python/module:function finds modules of the working directory, as `python -m` would
    app()


@contextlib.contextmanager
def _reporting(as_json: bool) -> Iterator[dict[str, Any]]:
    """Collects what a command reports; prints it at the end, turns errors into a line and an exit code."""
    report: dict[str, Any] = {}
    code = 0
    try:
        yield report
    except PipelineError as error:
        typer.echo(f"error: {printable(str(error))}", err=True)
        report["error"] = str(error)
        code = error.exit_code
    except KeyboardInterrupt:
        typer.echo("interrupted; what was finished is kept for the next run", err=True)
        report["error"] = "interrupted"
        code = 1
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False, default=str))
    if code:
        raise typer.Exit(code)


def _version_text(url: str, version: int | None) -> str:
    return f"{url}  {'no version yet' if version is None else f'version {version}'}"


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


def _show_status(report: dict[str, Any], examples: list[Any]) -> None:
    from pipeline.report import terminal

    rows = [("dataset", _version_text(report["output"], report["version"]))]
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
