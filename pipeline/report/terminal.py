"""A run on the terminal: a progress bar where somebody watches, plain lines elsewhere, and a summary that fits a screen.

Everything here goes to stderr, but for the summary and the tables: those are the command's result and go to stdout.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pipeline import metrics
from pipeline.errors import printable

if TYPE_CHECKING:
    from pipeline.extract.scheduler import Result
    from pipeline.plan import Plan

LINE_EVERY_S = 30.0
"""Between two lines where nobody watches: a night of 12 hours is 1,440 of them, however many shards it has."""
BAR_EVERY_S = 0.1
MAX_CELL = 48
"""Characters of a table's cell that comes from data."""


class _Bar(Progress):
    """How far a run is in one line that fits 80 columns, and below it how it comes along: in one line both would be cut off."""

    state = "starting actors"

    def get_renderables(self) -> Iterable[RenderableType]:
        """The two of them."""
        yield self.make_tasks_table(self.tasks)
        yield Text(self.state)


class Watch:
    """Tells how a run comes along. A context manager, and the driver's `Observer`."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar: _Bar | None = None
        self._task: TaskID | None = None
        self._start = self._last_line = time.monotonic()
        self._num_images = self._num_quarantined = self._num_failed = self._num_done = self._num_shards = 0
        self._bytes_done = self._bytes_total = 0
        self._stages: collections.Counter[str] = collections.Counter()
        self._run_id = ""
        self._last_finished = self._start
        self._over = threading.Event()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def started(self, run_id: str) -> None:
        """The run has a name now: lines in a log carry it, and the time."""
        self._run_id = run_id
        if self._console.is_terminal:
            self.note(f"Run {run_id}")

    def planned(self, plan: Plan) -> None:
        """The plan stands; extraction begins."""
        self._stop()
        self.note(plan_line(plan))
        if not plan.extract:
            return
        self._start = self._last_line = self._last_finished = time.monotonic()
        self._num_images, self._num_done, self._num_shards = 0, 0, len(plan.extract)
        self._bytes_done, self._bytes_total = 0, plan.num_bytes
        if self._console.is_terminal:
            columns = (SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TextColumn("shards{task.description}"))
            self._bar = _Bar(*columns, console=self._console)
            self._task = self._bar.add_task("", total=len(plan.extract))
            self._bar.start()
        else:
            self._over = threading.Event()
            threading.Thread(target=self._wait, args=(self._over,), name="progress", daemon=True).start()

    def finished(self, result: Result, num_actors: int) -> None:
        """One shard is done, or has failed."""
        now = self._last_finished = time.monotonic()
        self._num_done += 1
        self._bytes_done += result.task.shard.num_bytes
        if result.partition is not None:
            self._num_images += result.partition.num_rows
            self._num_quarantined += result.partition.num_quarantined
        else:
            self._num_failed += 1
        self._stages.update(result.stages)
        every_s = LINE_EVERY_S if self._bar is None else BAR_EVERY_S
        if now - self._last_line < every_s and self._num_done < self._num_shards:
            return  # a million shards are more than anybody reads
        self._last_line = now
        rate = self._num_images / max(now - self._start, 1e-9)
        actors = f"{num_actors} actor{'s' if num_actors != 1 else ''}"
        state = f"{self._num_images:,} images, {rate:,.0f}/s, {self._num_quarantined:,} quarantined, {actors}"
        state += f", bound by {metrics.bound_by(self._stages)} ({shares(metrics.busy(self._stages))})"
        if self._num_failed:
            state += f", {self._num_failed:,} shards failed"
        # By bytes: the large shards come first.
        seconds = (now - self._start) * (self._bytes_total - self._bytes_done) / max(self._bytes_done, 1)
        left = f"about {duration(seconds)} left"
        if self._bar is not None and self._task is not None:
            self._bar.state = state
            self._bar.update(self._task, completed=self._num_done, description=f", {left}")
        else:
            self.note(f"{self._done()}, {state}, {left}")

    def note(self, text: str) -> None:
        """A line for a person."""
        if self._run_id and not self._console.is_terminal:
            text = f"{time.strftime('%H:%M:%S', time.gmtime())} {self._run_id} {text}"
        self._console.print(Text(printable(text)), highlight=False, soft_wrap=True)

    def _done(self) -> str:
        return f"{self._num_done:,} of {self._num_shards:,} shards ({self._num_done / self._num_shards:.0%})"

    def _wait(self, over: threading.Event) -> None:
        """A line now and then although no shard is finished: they may be large, and actors slow to start."""
        while not over.wait(self._last_line + LINE_EVERY_S - time.monotonic()):
            now = time.monotonic()
            if now - self._last_line >= LINE_EVERY_S:
                self._last_line = now
                self.note(f"{self._done()}, none finished for {duration(now - self._last_finished)}")

    def _stop(self) -> None:
        self._over.set()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class Rows:
    """Tells how many rows of a dataset were gone through. A context manager, called with what was done and to how many more."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._done: collections.Counter[str] = collections.Counter()
        self._last_line = time.monotonic()

    def __enter__(self) -> Rows:
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True)
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, stage: str, num_rows: int) -> None:
        """So many rows more have been gone through in this stage."""
        self._done[stage] += num_rows
        now = time.monotonic()
        if self._bar is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bar.add_task(stage, total=self._num_rows)
            self._bar.advance(self._tasks[stage], num_rows)
        elif now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            line = f"{self._done[stage]:,} of {self._num_rows:,} rows {stage}"
            self._console.print(Text(line), highlight=False, soft_wrap=True)


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
    if summary["images_lent"]:
        helped = f"helped with {summary['images_lent']:,} images of the last shards"
        rows.append(("tail", f"{duration(summary['tail_s'])}, in which actors without a shard {helped}"))
    if summary["version"] is None:
        rows.append(("dataset", f"{output}: no version yet"))
    else:
        state = "committed" if summary["committed"] else "already up to date" if not summary["error"] else "stays"
        rows.append(("dataset", f"{output}  version {summary['version']} {state}, {images['total']:,} rows"))
    if probe:
        rows.append(("probe", probe_line(probe)))
        rows += [("", f"warning: {warning}") for warning in probe["warnings"]]
    if summary["report"]:
        rows.append(("page", summary["report"].removeprefix("file://")))
    if summary["version"] is not None and not summary["error"]:
        rows.append(("next", f"pipeline status {output}"))
        rows.append(("", f"python -c \"import pipeline; print(pipeline.open_dataset('{output}').to_numpy())\""))
    show_pairs(rows)


def probe_line(probe: dict[str, Any]) -> str:
    """How a probe did, in a line."""
    low, high = probe["interval"]
    between = f"(95 % between {low:.3f} and {high:.3f})"
    chosen = f"{probe['node']}, {probe['normalize']}, C = {probe['C']:.4g}"
    return f"test accuracy {probe['test_accuracy']:.3f} {between}, {chosen}, {probe['num_test']:,} tested"


def show_probe(report: dict[str, Any]) -> None:
    """What was compared, what was chosen, and how that does on the test part."""
    table = _table("node", "normalize", "best C", "validation accuracy", "NLL", "")
    for each in report["compared"]:
        is_chosen = all(each[name] == report[name] for name in ("node", "normalize"))
        numbers = [f"{each['C']:.4g}", f"{each['validation_accuracy']:.4f}", f"{each['validation_nll']:.4f}"]
        table.add_row(Text(printable(each["node"])), each["normalize"], *numbers, "chosen" if is_chosen else "")
    _print(table)
    parts = ", ".join(f"{report[f'num_{part}']:,} {part}" for part in ("train", "validation", "test"))
    not_used = {
        "num_unlabelled": "unlabelled",
        "num_without_split": "in no part",
        "num_copies_left_out": "of copies left out",
        "num_unmatched_keys": "keys of the file unknown",
    }
    parts += "".join(f", {report[name]:,} {what}" for name, what in not_used.items() if report[name])
    neighbours, top5 = report["knn"], report.get("test_top5")
    worst = [f"{each['class']} ({each['accuracy']:.3f} of {each['num_test']:,})" for each in report["worst_classes"]]
    mean = f"{report['mean_per_class_accuracy']:.3f} on average over {report['num_classes']:,} classes"
    show_pairs(
        [
            ("", ""),
            ("dataset", f"{report['output']}  version {report['version']}"),
            ("rows", parts),
            ("probe", probe_line(report)),
            *([("top-5", f"{top5:.3f}")] if top5 is not None else []),
            ("per class", f"{mean}; lowest: {', '.join(worst)}"),
            ("NLL, ECE", f"{report['test_nll']:.4f} nats, {report['test_ece']:.4f}"),
            ("kNN", f"test accuracy {neighbours['test_accuracy']:.3f} with k = {neighbours['k']}, without training"),
            ("time", f"{duration(report['seconds'])} on {report['device']}"),
            *[("warning" if not number else "", warning) for number, warning in enumerate(report["warnings"])],
            ("written", f"{report['output']}/{report['path']}"),
        ]
    )


def show_predictions(report: dict[str, Any]) -> None:
    """What a probe makes of a dataset."""
    most = [f"{each['class']} {each['rows']:,}" for each in report["predicted"][:10]]
    more = len(report["predicted"]) - len(most)
    rows = [
        ("dataset", f"{report['output']}  version {report['version']}, {report['rows']:,} rows"),
        ("probe", f"{report['probe']}, on {report['node']}"),
        ("predicted", ", ".join(most) + (f", and {more:,} more classes" if more else "")),
    ]
    if report["rows"]:
        rows.append(("probability", f"{report['mean_probability']:.3f} on average"))
    if report["num_labelled"]:
        share = report["num_agreeing"] / report["num_labelled"]
        rows.append(("label", f"as predicted in {share:.2%} of {report['num_labelled']:,} rows, those trained on among them"))
    if report["to"]:
        rows.append(("written", report["to"]))
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


def show_export(report: dict[str, Any]) -> None:
    """What an export has written."""
    files = report["files"]
    rate = report["bytes"] / max(report["seconds"], 1e-9)
    show_pairs(
        [
            ("dataset", f"{report['output']}  version {report['version']}"),
            ("rows", f"{report['rows']:,}"),
            *[("wrote" if not number else "", file) for number, file in enumerate(files[:4])],
            *([("", f"and {len(files) - 4:,} files more")] if len(files) > 4 else []),
            ("size", f"{size(report['bytes'])} in {duration(report['seconds'])}, {size(rate)}/s"),
        ]
    )


def show_search(report: dict[str, Any]) -> None:
    """What was found for each query."""
    where = f", where {' and '.join(report['where'])}" if report["where"] else ""
    show_pairs(
        [
            ("dataset", f"{report['output']}  version {report['version']}, {report['rows']:,} rows"),
            ("searched", f"{report['node']} by {report['metric']}{where} in {duration(report['seconds'])}"),
            *([("page", report["page"])] if report["page"] else []),
        ]
    )
    for query in report["queries"]:
        found = query["neighbours"]
        has_label = any("label" in row for row in found)
        show_pairs([("", ""), ("query", query["query"])])
        table = _table("key", "score", *(["label"] if has_label else []), "shard")
        for row in found:
            label = [_cell(str(row["label"]))] if has_label else []
            table.add_row(_cell(row["key"]), f"{row['score']:.4f}", *label, _cell(row["shard"].rpartition("/")[2]))
        if found:
            _print(table)
        else:
            show_pairs([("", "no row was found")])


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


def _cell(text: str) -> Text:
    """Text from data, no longer than leaves room for the others of its row."""
    text = printable(text)
    return Text(text if len(text) <= MAX_CELL else f"{text[: MAX_CELL - 1]}…")


def _print(table: Table) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160  # a pipe has none: lines are never broken there
    console.print()
    console.print(table)


def show_pairs(rows: list[tuple[str, str]], styles: dict[str, str] | None = None) -> None:
    """Names and values, aligned; values are data and never markup, and their lines are never broken.

    Args:
        rows: in this order.
        styles: of names that are more than bold. Colours are left out by rich where nobody sees them, and with NO_COLOR.
    """
    console = Console(highlight=False)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        style = (styles or {}).get(name, "bold")
        console.print(Text.assemble((name.ljust(width), style), "  ", printable(value)), soft_wrap=True)


def size(num_bytes: float) -> str:
    """`1.5 GB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"


def duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def ago(seconds: float) -> str:
    """`7 h ago`: how long since, in the largest unit of which there are at least two."""
    units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    length, unit = next(((length, unit) for length, unit in units if seconds >= 2 * length), units[-1])
    return f"{max(0, int(seconds // length))} {unit} ago"
