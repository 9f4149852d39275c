"""A run on the terminal: a progress bar where somebody watches, plain lines elsewhere, and a summary that fits a screen.

Everything here goes to stderr, but for the summary and the tables: those are the command's result and go to stdout.
"""

from __future__ import annotations

import collections
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pipeline import metrics
from pipeline.errors import printable

if TYPE_CHECKING:
    from pipeline.extract.actors import Result
    from pipeline.plan import Plan

LINE_EVERY_S = 30.0
"""Between two lines where nobody watches: a night of 12 hours is 1,440 of them, however many shards it has."""


class Watch:
    """Tells how a run comes along. A context manager, and the driver's `Observer`."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._start = self._last_line = time.monotonic()
        self._num_images = self._num_quarantined = self._num_failed = self._num_done = self._num_shards = 0
        self._bytes_done = self._bytes_total = 0
        self._stages: collections.Counter[str] = collections.Counter()
        self._run_id = ""

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop_bar()

    def started(self, run_id: str) -> None:
        """The run has a name now: lines in a log carry it, and the time."""
        self._run_id = run_id
        if self._console.is_terminal:
            self.note(f"Run {run_id}")

    def planned(self, plan: Plan) -> None:
        """The plan stands; extraction begins."""
        self._stop_bar()
        self.note(plan_line(plan))
        if not plan.extract:
            return
        self._start = self._last_line = time.monotonic()
        self._num_images, self._num_done, self._num_shards = 0, 0, len(plan.extract)
        self._bytes_done, self._bytes_total = 0, plan.num_bytes
        if self._console.is_terminal:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("shards"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("starting actors", total=len(plan.extract))
            self._bar.start()

    def finished(self, result: Result, num_actors: int) -> None:
        """One shard is done, or has failed."""
        now = time.monotonic()
        self._num_done += 1
        self._bytes_done += result.task.shard.num_bytes
        if result.partition is not None:
            self._num_images += result.partition.num_rows
            self._num_quarantined += result.partition.num_quarantined
        else:
            self._num_failed += 1
        rate = self._num_images / max(now - self._start, 1e-9)
        self._stages.update(result.stages)
        state = f"{self._num_images:,} images, {rate:,.0f}/s, {self._num_quarantined} quarantined, {num_actors} actors"
        state += f", bound by {metrics.bound_by(self._stages)} ({shares(metrics.busy(self._stages))})"
        if self._num_failed:
            state += f", {self._num_failed} shards failed"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._num_done, description=state)
        elif now - self._last_line >= LINE_EVERY_S or self._num_done == self._num_shards:
            self._last_line = now
            left = (now - self._start) * (self._bytes_total - self._bytes_done) / max(self._bytes_done, 1)
            done = f"{self._num_done:,} of {self._num_shards:,} shards ({self._num_done / self._num_shards:.0%})"
            self.note(f"{done}, {state}, about {duration(left)} left")

    def note(self, text: str) -> None:
        """A line for a person."""
        if self._run_id and not self._console.is_terminal:
            text = f"{time.strftime('%H:%M:%S', time.gmtime())} {self._run_id} {text}"
        self._console.print(Text(printable(text)), highlight=False, soft_wrap=True)

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def plan_line(plan: Plan) -> str:
    """The plan in a line."""
    parts = [f"{len(plan.extract)} shards to extract ({size(plan.num_bytes)})"]
    if plan.adopt:
        parts.append(f"{len(plan.adopt)} to adopt")
    parts.append(f"{len(plan.unchanged)} unchanged")
    if plan.removed:
        parts.append(f"{len(plan.removed)} removed")
    why = f"; everything anew, because {'; '.join(plan.reasons)}" if plan.rewrites else ""
    return f"Plan: {', '.join(parts)}{why}"


def show_run(summary: dict[str, Any]) -> None:
    """The summary of a run that is over."""
    images, shards, probe = summary["images"], summary["shards"], summary["probe"]
    output = summary["output"].removeprefix("file://")
    rows = []
    embedded = (
        f"{images['embedded']:,} embedded, {images['carried_over']:,} carried over, {images['quarantined']:,} quarantined"
    )
    rows.append(("images", embedded))
    rows.append(("shards", ", ".join(f"{count:,} {name}" for name, count in shards.items() if count or name == "extracted")))
    speed = f", {summary['images_per_second']:,.0f} images/s" if summary["bound_by"] else ""
    rows.append(("time", f"{duration(summary['seconds'])}{speed}"))
    if summary["bound_by"]:
        rows.append(("bound by", f"{summary['bound_by']} ({shares(summary['busy'])})"))
        rows.append(("", metrics.ADVICE[summary["bound_by"]]))
    if summary["version"] is None:
        rows.append(("dataset", f"{output}: no version yet"))
    else:
        state = "committed" if summary["committed"] else "already up to date" if not summary["error"] else "stays"
        rows.append(("dataset", f"{output}  version {summary['version']} {state}, {images['total']:,} rows"))
    if probe:
        low, high = probe["interval"]
        between = f" (95 % between {low:.3f} and {high:.3f})"
        rows.append(
            ("probe", f"test accuracy {probe['test_accuracy']:.3f}{between}, C = {probe['C']:.3g}, {probe['num_test']} tested")
        )
        rows += [("", f"warning: {warning}") for warning in probe["warnings"]]
    if summary["version"] is not None and not summary["error"]:
        rows.append(("next", f"pipeline status {output}"))
        rows.append(("", f"python -c \"import pipeline; print(pipeline.open_dataset('{output}').to_numpy())\""))
    show_pairs(rows)


def shares(busy: dict[str, float]) -> str:
    """How busy each stage is, in a few words."""
    return ", ".join(f"{stage} {share:.0%}" for stage, share in busy.items())


def show_diff(report: dict[str, Any]) -> None:
    """What changed between two versions."""
    rows, partitions, nodes = report["rows"], report["partitions"], report["nodes"]
    counts = [f"{rows[name]:,} {name}" for name in ("added", "removed", "changed", "relabelled", "unchanged")]
    if rows["moved"]:
        counts[0] += f" ({rows['moved']:,} of them moved)"
    pairs = [
        ("dataset", f"{report['output']}  version {report['before']} to {report['after']}"),
        ("rows", f"{rows['before']:,} to {rows['after']:,}: {', '.join(counts)}"),
        ("partitions", ", ".join(f"{count:,} {name}" for name, count in partitions.items())),
    ]
    for what in ("recipe", "layout"):
        pairs += [(what if not number else "", each) for number, each in enumerate(report[what] or ["the same"])]
    pairs += [("columns", f"{', '.join(names)} {what}") for what, names in nodes.items() if names]
    for column, drift in report["drift"].items():
        if drift["mean_shift"] is not None:
            share = f" ({drift['relative_mean_shift']:.2%} of the norm)" if drift["relative_mean_shift"] is not None else ""
            norms = f"{drift['mean_norm_before']:.4g} to {drift['mean_norm_after']:.4g}"
            pairs.append((column, f"norm {norms}, mean moved by {drift['mean_shift']:.4g}{share}"))
        if drift["num_compared"]:
            cosines = ", ".join(f"{name} {drift[f'cosine_{name}']:.4f}" for name in ("mean", "median", "min"))
            pairs.append(("", f"cosine of {drift['num_compared']:,} rows before and after: {cosines}"))
    show_pairs(pairs)


def show_bench(report: dict[str, Any]) -> None:
    """The limits of this machine, how close the loop comes, and what training machinery would cost."""
    machine, storage, decode, forward = (report[name] for name in ("machine", "storage", "decode", "forward"))
    limit, run, machinery = report["limit"], report["end_to_end"], report["training_machinery"]
    show_pairs(
        [
            ("machine", f"{machine['name']}, {machine['cores']} cores, torch {machine['torch']}"),
            ("model", f"{report['model']}, {report['precision']}"),
            ("images", f"{report['images']['read']:,}, {size(report['images']['mean_bytes'])} on average"),
        ]
    )
    table = _table("limit", "images/s")
    table.add_row(
        "storage", _rate(storage["images_per_s"]), f"{size(storage['bytes_per_s'])}/s, {storage['fetchers']} fetchers"
    )
    for name in ("exact", "fast"):
        mark = ", as configured" if name == decode["configured"] else ""
        table.add_row(f"decode: {name}", _rate(decode[name]["inputs_per_s"]), f"{decode['threads']} threads{mark}")
    for each in forward["programs"]:
        lanes = f" in {forward['lanes']} lanes" if forward["lanes"] > 1 else ""
        table.add_row(f"forward: {each['program']}", _rate(each["images_per_s"]), f"batches of {each['batch_size']}{lanes}")
    table.add_row("all together", _rate(limit["images_per_s"]), f"{limit['program']}; most of it is {limit['bound_by']}")
    bound = f"{run['share_of_limit']:.0%} of the limit, bound by {run['bound_by']}"
    table.add_row("end to end", _rate(run["images_per_s"]), bound)
    _print(table)
    show_pairs([("busy", f"{shares(run['busy'])} of their threads' time, end to end")])
    batch = machinery["batch_size"]
    table = _table("forward pass in", "ms an image", "ratio", f"peak memory for {batch}", "ratio")
    for mode, row in machinery["modes"].items():
        ratios = [f"{row[name]:.2f}" if name in row else "" for name in ("seconds_ratio", "memory_ratio")]
        table.add_row(mode, f"{row['seconds_per_image'] * 1000:.2f}", ratios[0], size(row["peak_bytes"]), ratios[1])
    for mode, reason in machinery["failed"].items():
        table.add_row(mode, Text(printable(f"failed: {reason}")))
    _print(table)
    show_pairs([("", ""), ("medians", f"of {report['rounds']} rounds and of {machinery['passes']} passes")])


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _print(table: Table) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160  # a pipe has none: lines are never broken there
    console.print()
    console.print(table)


def show_pairs(rows: list[tuple[str, str]]) -> None:
    """Names and values, aligned; values are data and never markup, and their lines are never broken."""
    console = Console(highlight=False)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        console.print(Text.assemble((name.ljust(width), "bold"), "  ", printable(value)), soft_wrap=True)


def size(num_bytes: float) -> str:
    """`1.5 GB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"


def duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
