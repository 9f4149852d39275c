"""Commands that work from a config: run, plan, bench."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline import config
from pipeline.cli.common import AllowRemovals, AsJson, ConfigPath, Overrides, RetryQuarantined, reporting, version_text
from pipeline.errors import PipelineError


def run(
    path: ConfigPath,
    overrides: Overrides = None,
    allow_removals: AllowRemovals = False,
    retry_quarantined: RetryQuarantined = False,
    as_json: AsJson = False,
) -> None:
    """Bring the dataset up to date and train the probe. Doing it again does nothing.

    Ctrl-C and SIGTERM stop it with exit code 1: what was finished is adopted by the next run. A second one ends it at once.

    Example: pipeline run configs/quickstart.yaml
    """
    with reporting(as_json) as report:
        settings = config.load(path, overrides or [])
        from pipeline import driver, stopping
        from pipeline.report import terminal

        with stopping.stoppable(), terminal.Watch() as watch:
            try:
                wishes = {"allow_removals": allow_removals, "retry_quarantined": retry_quarantined}
                report |= driver.run(settings, **wishes, observer=watch).as_json()
            except (PipelineError, KeyboardInterrupt) as error:
                summary = getattr(error, "summary", None)
                report |= summary.as_json() if summary is not None else {}
                if summary is not None and not as_json:
                    terminal.show_run(report)
                raise
        if not as_json:
            terminal.show_run(report)


def plan(path: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Show what a run would do. Changes nothing.

    Example: pipeline plan configs/quickstart.yaml --set run.batch_size=64
    """
    with reporting(as_json) as report:
        settings = config.load(path, overrides or [])
        from pipeline import driver, runs
        from pipeline.report import terminal
        from pipeline.storage import Store

        table, todo = driver.make_plan(settings)
        # What the last run that read anything tells of this source: bytes of an image, and bytes in a second.
        last_runs = runs.latest(Store(settings.output.storage), settings.output.url)
        last = next((each for each in last_runs if each.get("bytes_per_second") and each.get("bytes_per_image")), None)
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
            terminal.show_pairs([("dataset", version_text(settings.output.url, report["version"])), *rows])


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
    with reporting(as_json) as report:
        settings = config.load(path, overrides or [])
        from pipeline import bench as limits
        from pipeline.report import terminal

        with terminal.Watch() as watch:
            report |= limits.measure(settings, images, watch.note)
        if not as_json:
            terminal.show_bench(report)
