"""A run from top to bottom: plan, extract, merge, probe, report.

The driver never sees a pixel or an embedding, but for the probe's. It holds the plan, hands shards to the pool, and commits
what came back in one atomic step. Everything that it needs to know it reads from the source and the dataset, so a run that
was killed is simply run again.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import json
import logging
import platform
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pipeline import config, metrics, plan, runs, stopping
from pipeline.analysis.probe import labels
from pipeline.dataset import partition, table
from pipeline.dataset.partition import Partition, Target
from pipeline.dataset.read import open_dataset
from pipeline.dataset.table import Table
from pipeline.errors import (
    BudgetExceeded,
    CommitConflict,
    IncompleteRun,
    PipelineError,
    RemovalRefused,
    StorageError,
)
from pipeline.imports import importing
from pipeline.plan import Plan
from pipeline.runs import RUNS_FOLDER
from pipeline.source import Source
from pipeline.storage import Store, join

if TYPE_CHECKING:
    from pipeline.extract.pool import Pool
    from pipeline.extract.scheduler import Result

logger = logging.getLogger(__name__)

COMMIT_ATTEMPTS = 10
"""Each lost race against another run costs one; what was extracted is adopted by the next attempt."""
ALWAYS_ALLOWED = 10
"""Quarantined samples that never exceed the budget."""


class Observer(Protocol):
    """Whoever wants to know how the run comes along: the progress bar of a terminal, lines in a log."""

    def started(self, run_id: str) -> None:
        """The run has a name now."""

    def planned(self, plan: Plan) -> None:
        """The plan stands; extraction begins."""

    def finished(self, result: Result, num_actors: int) -> None:
        """One shard is done, or has failed."""

    def note(self, text: str) -> None:
        """Something a person wants to read now."""


@dataclass(slots=True, kw_only=True)
class Summary:
    """What a run did; `as_json` is the last line of `pipeline run --json`."""

    run_id: str
    output: str
    recipe_id: str
    version: int | None = None
    committed: bool = False
    seconds: float = 0.0
    started_at: float = 0.0
    """Seconds since the epoch."""
    extract_seconds: float = 0.0
    num_bytes: int = 0
    """Encoded bytes of the shards that were extracted."""
    num_unchanged: int = 0
    num_removed: int = 0
    reasons: list[str] = field(default_factory=list)
    extracted: list[Partition] = field(default_factory=list)
    adopted: list[Partition] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Shard to what went wrong."""
    num_rows: int = 0
    """Of the version that stands after the run."""
    stages: collections.Counter[str] = field(default_factory=collections.Counter)
    pace: metrics.Pace = field(default_factory=metrics.Pace)
    actors: list[dict[str, Any]] = field(default_factory=list)
    num_actors_lost: int = 0
    tail_s: float = 0.0
    """From the moment that the first actor ran out of work until the last shard was done."""
    num_lent: int = 0
    """Images that were computed by another actor than the one whose shard they are of."""
    probe: dict[str, Any] | None = None
    report: str | None = None
    """URL of the page, where this run made one."""
    error: str = ""

    def as_json(self) -> dict[str, Any]:
        """A mapping of plain values."""
        embedded = sum(each.num_embedded for each in self.extracted)
        finished = [*self.extracted, *self.adopted]
        return {
            "run_id": self.run_id,
            "version": self.version,
            "committed": self.committed,
            "recipe_id": self.recipe_id,
            "started_at": round(self.started_at, 3),
            "seconds": round(self.seconds, 3),
            "first_batch_s": self._first_batch_s(),
            "images_per_second": round(embedded / self.extract_seconds, 2) if self.extract_seconds else 0.0,
            "bytes_per_second": round(self.num_bytes / self.extract_seconds) if self.extract_seconds else 0,
            "bytes_per_image": round(self.num_bytes / max(1, sum(each.num_read for each in self.extracted))),
            "bound_by": metrics.bound_by(self.stages) if self.extracted else None,
            "busy": {stage: round(share, 3) for stage, share in metrics.busy(self.stages).items()},
            "shards": {
                "total": len(self.extracted) + len(self.adopted) + self.num_unchanged + len(self.failed),
                "extracted": len(self.extracted),
                "adopted": len(self.adopted),
                "unchanged": self.num_unchanged,
                "removed": self.num_removed,
                "failed": len(self.failed),
            },
            "images": {
                "total": self.num_rows,
                "embedded": embedded,
                "carried_over": sum(each.num_carried_over for each in self.extracted),
                "quarantined": sum(each.num_quarantined for each in finished),
            },
            "output": self.output,
            "reasons": self.reasons,
            "failed": self.failed,
            "stage_seconds": {name: round(seconds, 3) for name, seconds in sorted(self.stages.items())},
            "pace": self.pace.as_json(),
            "actors": self.actors,
            "actors_lost": self.num_actors_lost,
            "tail_s": round(self.tail_s, 3),
            "images_lent": self.num_lent,
            "probe": self.probe,
            "report": self.report,
            "error": self.error or None,
        }

    def _first_batch_s(self) -> float | None:
        """From the run's begin until some actor had embedded a batch."""
        first = [at for actor in self.actors if (at := actor.get("first_batch_at")) is not None]
        return round(min(first) - self.started_at, 3) if first else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What the config asks for, worked out before anything is planned."""

    source: Source
    target: Target

    @classmethod
    def of(cls, settings: config.Config, crew: _Crew | None = None) -> Goal:
        """Build the model once on this machine's CPU: its weights' digest and its columns are part of the target.

        Where nothing was committed yet there will be work: then the crew's actors import and build at the same time.
        """
        store = Store(settings.output.storage)
        source = Source(settings.source)
        layout, carried = source.layout(), source.fields()
        if crew is not None and not store.exists(join(settings.output.url, table.LOG_FOLDER)):
            crew.pool().prepare()
        with importing():
            from pipeline.extract.backbone import Backbone, Spec

        spec = Spec(backbone=settings.backbone, decode=settings.decode, precision=settings.run.precision, fold=False)
        recipe = Backbone(spec).recipe
        target = Target(
            store=store,
            url=settings.output.url,
            recipe=recipe,
            layout=layout,
            schema=partition.schema(recipe, carried),
        )
        if settings.probe is not None:
            labels.check(target.schema, store, settings.probe)  # rather now than after hours of work
        return cls(source=source, target=target)

    def plan(self, *, retry_quarantined: bool = False) -> tuple[Table | None, Plan]:
        """The newest version, and what is to be done on top of it."""
        current = Table.open(self.target.store, self.target.url)
        return current, plan.make(self.source.shards(), current, self.target, retry_quarantined=retry_quarantined)


def make_plan(settings: config.Config) -> tuple[Table | None, Plan]:
    """What `run` would do now. Changes nothing."""
    return Goal.of(_absolute(settings)).plan()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What one run is asked to do beyond its config."""

    allow_removals: bool = False
    """Commit even if more than `run.max_removed` of the rows vanish."""
    retry_quarantined: bool = False
    """Try the samples again that are in quarantine, in unchanged shards too."""


def run(
    settings: config.Config,
    *,
    allow_removals: bool = False,
    retry_quarantined: bool = False,
    observer: Observer | None = None,
) -> Summary:
    """Bring the dataset up to date with source and config, and train the probe. Doing it again does nothing.

    Args:
        settings: the config.
        allow_removals: commit even if more than `run.max_removed` of the rows vanish.
        retry_quarantined: try the samples again that are in quarantine, in unchanged shards too.
        observer: is told how it comes along.

    Raises:
        UserError: config, source, model or output are not what they should be.
        RunError: nothing was committed, or (IncompleteRun) some shards failed while the rest was; says why.
        KeyboardInterrupt: it was stopped. What was finished waits for the next run, which adopts it.
    """
    start, started_at = time.monotonic(), time.time()
    settings = _absolute(settings)
    wishes = Wishes(allow_removals=allow_removals, retry_quarantined=retry_quarantined)
    run_id = runs.new_id()
    crew = _Crew(settings, run_id)
    try:
        goal = Goal.of(settings, crew)
    except BaseException:
        crew.close()
        raise
    summary = Summary(run_id=run_id, output=settings.output.url, recipe_id=goal.target.recipe.recipe_id)
    summary.started_at = started_at
    if observer is not None:
        observer.started(summary.run_id)
    try:
        with crew:
            _refresh(settings, goal, summary, crew, wishes, observer)
        if settings.probe is not None and summary.version is not None:
            summary.probe = _probe(settings, settings.probe, goal, summary)
        summary.seconds = time.monotonic() - start
        _save(goal, summary)
        _report(settings, summary)
    except (PipelineError, KeyboardInterrupt) as error:
        summary.error = str(error) if isinstance(error, PipelineError) else _stopped(summary)
        summary.seconds = time.monotonic() - start
        error.summary = summary  # type: ignore[union-attr] # for `--json`, which reports a failed run too
        with contextlib.suppress(StorageError):  # the store may be what failed
            _save(goal, summary)
        if summary.committed and isinstance(error, PipelineError):
            _report(settings, summary)
        raise
    return summary


class _Crew(contextlib.ExitStack):
    """The actors of a run, from the moment that there is work for them to the last row."""

    def __init__(self, settings: config.Config, run_id: str) -> None:
        super().__init__()
        self._settings, self._run_id = settings, run_id
        self._pool: Pool | None = None

    def pool(self) -> Pool:
        """The pool, on a Ray that is started when nothing else has."""
        with importing():
            from pipeline.extract.cluster import cluster
            from pipeline.extract.pool import Pool

        if self._pool is None:
            with stopping.despite_ray():
                self.enter_context(cluster())
            self._pool = self.enter_context(Pool(self._settings, self._run_id))
        return self._pool


def _refresh(
    settings: config.Config, goal: Goal, summary: Summary, crew: _Crew, wishes: Wishes, observer: Observer | None
) -> None:
    """Plan, extract and commit; again when another run committed in between."""
    for attempt in range(COMMIT_ATTEMPTS):
        current, todo = goal.plan(retry_quarantined=wishes.retry_quarantined)
        summary.version = current.version if current is not None else None
        summary.num_rows = sum(entry.num_rows for entry in current.entries) if current is not None else 0
        summary.reasons = todo.reasons
        # What is gone may have moved to new shards: then only the check before the commit can tell.
        if not wishes.allow_removals and not todo.num_new and todo.removed_share > settings.run.max_removed:
            raise _too_many_removed(todo.removed_share, settings)
        if attempt == 0:
            # Before hours of work: whether the output can be written at all.
            config_url = join(goal.target.url, RUNS_FOLDER, summary.run_id, "config.yaml")
            goal.target.store.write(config_url, config.dump(settings).encode())
        if observer is not None:
            observer.planned(todo)
        summary.num_unchanged, summary.num_removed = len(todo.unchanged), len(todo.removed)
        if attempt == 0:
            summary.adopted = todo.adopt  # later attempts adopt what this run itself has just extracted
        try:
            finished = todo.adopt + _extract(goal, todo, summary, crew, observer)
        except KeyboardInterrupt:
            if observer is not None:
                observer.note(_stopped(summary))  # now: whoever stops a job may not wait for its actors to end
            raise
        if observer is not None and (warning := _unlabelled(settings, goal.target, summary.extracted)):
            observer.note(warning)
        try:
            _merge(settings, goal, current, todo, finished, summary, wishes)
            break
        except CommitConflict as conflict:
            if attempt == COMMIT_ATTEMPTS - 1:
                raise
            logger.warning("another run committed first, planning again: %s", conflict)
    if summary.failed:
        named = "; ".join(f"{shard}: {why}" for shard, why in list(summary.failed.items())[:5])
        kept = "the other shards were committed" if summary.committed else "nothing was committed"
        raise IncompleteRun(f"{len(summary.failed)} of {todo.num_shards} shards failed ({kept}): {named}")


def _extract(goal: Goal, todo: Plan, summary: Summary, crew: _Crew, observer: Observer | None) -> list[Partition]:
    """Partitions of the shards in the plan; those that failed are noted in the summary."""
    summary.failed.clear()
    if not todo.extract:
        return []
    from pipeline.extract.carry import known_rows

    finished: list[Partition] = []
    known = known_rows(goal.target, todo.carry_over_from(goal.target.recipe))
    pool, start = crew.pool(), time.monotonic()
    try:
        # Large shards first: the last ones to finish are then small.
        for result in pool.extract(sorted(todo.extract, key=lambda task: -task.shard.num_bytes), goal.target, known):
            summary.stages.update(result.stages)
            embedded = result.partition.num_embedded if result.partition is not None else 0
            summary.pace.add(summary.extract_seconds + time.monotonic() - start, embedded, result.stages)
            if result.partition is not None:
                finished.append(result.partition)
                summary.num_bytes += result.task.shard.num_bytes
            else:
                summary.failed[result.task.shard.url] = str(result.error)
            if observer is not None:
                observer.finished(result, pool.num_ready)
    finally:
        summary.extract_seconds += time.monotonic() - start
        summary.actors, summary.num_actors_lost = pool.seen, pool.num_lost
        summary.tail_s, summary.num_lent = pool.tail_s, pool.num_lent
        summary.extracted += finished
    return finished


def _merge(
    settings: config.Config,
    goal: Goal,
    current: Table | None,
    todo: Plan,
    finished: list[Partition],
    summary: Summary,
    wishes: Wishes,
) -> None:
    """Check what was finished and commit it, if there is anything to commit.

    A shard that failed keeps its rows, unless they are of another recipe or layout: then nothing is committed, and what was
    finished waits for the next run.
    """
    if todo.rewrites and summary.failed:
        return
    done = {each.shard for each in finished}
    remove = [*todo.removed, *(entry for entry in todo.replaced if entry.shard in done)]
    if not finished and not remove:
        return
    _check_budget(settings, goal.target, finished)
    if not wishes.allow_removals:
        _check_shrinkage(settings, summary.num_rows, remove, finished)
    with ThreadPoolExecutor(16) as threads:
        for _ in threads.map(lambda each: partition.check(goal.target, each), finished):
            pass
    with stopping.held_back():  # whole it is anyway; but what the run says of it has to be true
        if current is None:
            summary.version = table.create(goal.target, summary.run_id, finished)
        else:
            summary.version = current.commit(goal.target, summary.run_id, finished, remove)
        summary.committed = True
        summary.num_rows += sum(each.num_rows for each in finished) - sum(entry.num_rows for entry in remove)


def _stopped(summary: Summary) -> str:
    """What a run that was stopped leaves behind."""
    if summary.committed:
        return f"stopped after version {summary.version} was committed"
    num_finished = len(summary.extracted) + len(summary.adopted)
    return f"stopped; {num_finished} finished shards wait for the next run, which adopts them; nothing was committed"


def _check_budget(settings: config.Config, target: Target, finished: list[Partition]) -> None:
    num_read = sum(each.num_read for each in finished)
    num_quarantined = sum(each.num_quarantined for each in finished)
    allowed = max(ALWAYS_ALLOWED, int(settings.run.max_failed * num_read))
    limit = f"run.max_failed = {settings.run.max_failed}"
    if settings.run.max_failed_samples is not None and settings.run.max_failed_samples < allowed:
        allowed = settings.run.max_failed_samples
        limit = f"run.max_failed_samples = {allowed}"
    if num_quarantined > allowed:
        worst = max(finished, key=lambda each: each.num_quarantined)
        raise BudgetExceeded(
            f"{num_quarantined} of {num_read} samples cannot be embedded, {limit} allows "
            f"{allowed}; nothing was committed; most are in {worst.shard} ({worst.num_quarantined} of {worst.num_read}"
            f"{_why(target, worst)}). "
            f"Mend the source, or raise {limit.partition(' ')[0]} and run again: finished shards are kept for that"
        )


def _unlabelled(settings: config.Config, target: Target, extracted: list[Partition]) -> str | None:
    """A warning where no sample at the begin of the largest partition has the label that the config names: mostly a typo.

    A sample without a label is none to refuse, so every row would silently have null.
    """
    largest = max(extracted, key=lambda each: each.num_rows, default=None)
    if settings.source.label is None or largest is None or not largest.num_rows:
        return None
    first = partition.first_rows(target.store, join(target.url, largest.path), largest.num_bytes, "label")
    if first.null_count < len(first):
        return None
    return f"warning: source.label: none of the first {len(first):,} images of {largest.shard} has {settings.source.label!r}"


def _why(target: Target, worst: Partition) -> str:
    """The reason that most of a partition's quarantined samples have; a label of another name is one for all of them."""
    footer = partition.read_footer(target.store, target.store.stat(join(target.url, worst.path)))
    rows = partition.read_quarantine(target.store, target.url, footer)
    (kind, _), *_ = collections.Counter((row.stage, row.error) for row in rows).most_common(1)
    first = next(row for row in rows if (row.stage, row.error) == kind)
    return f", the first of them {first.key}: {first.stage}: {first.message}"


def _check_shrinkage(settings: config.Config, num_before: int, remove: list[table.Entry], finished: list[Partition]) -> None:
    """Shards that are still there but have lost samples count like shards that are gone; samples that moved do not."""
    after, before = {each.shard: each.num_rows for each in finished}, {entry.shard for entry in remove}
    lost = sum(max(0, entry.num_rows - after.get(entry.shard, 0)) for entry in remove)
    lost -= sum(each.num_carried_over for each in finished if each.shard not in before)
    if num_before and lost / num_before > settings.run.max_removed:
        raise _too_many_removed(lost / num_before, settings)


def _too_many_removed(share: float, settings: config.Config) -> RemovalRefused:
    return RemovalRefused(
        f"{share:.0%} of the dataset's rows would vanish, run.max_removed = {settings.run.max_removed} allows "
        f"{settings.run.max_removed:.0%}; nothing was committed. If the source really shrank, run again with --allow-removals"
    )


def _probe(settings: config.Config, wanted: config.Probe, goal: Goal, summary: Summary) -> dict[str, Any]:
    """Train the probe on the version that stands; a probe that an earlier run trained on it just so is reported again."""
    asked = _asked(wanted, goal.target.store)
    for earlier in runs.latest(goal.target.store, goal.target.url):
        if earlier["version"] == summary.version and earlier["probe"] and asked.items() <= earlier["probe"].items():
            return dict(earlier["probe"])
    return train_probe(settings.output, summary.version, wanted, summary.run_id)


def train_probe(output: config.Output, version: int | None, wanted: config.Probe, run_id: str | None = None) -> dict[str, Any]:
    """Train the probe on a version, and leave metrics and weights in `_runs/<run id>/probe/`.

    Args:
        output: the dataset.
        version: the newest when None.
        wanted: the `probe` section.
        run_id: of the run that it belongs to; a new one when left out.

    Returns:
        The metrics but for the large ones, which stay in `metrics.json`, with `path` and `settings`.

    Raises:
        UserError: dataset, labels or columns are not what they should be.
    """
    from pipeline.analysis import probe
    from pipeline.extract import cluster

    store = Store(output.storage)
    wanted, url = _located(wanted, store), store.absolute(output.url)
    asked = _asked(wanted, store)
    result = cluster.on_gpu(probe.train, url, version, output.storage, wanted)
    folder = join(RUNS_FOLDER, run_id or runs.new_id(), runs.PROBE_FOLDER)
    store.write(join(url, folder, runs.METRICS_FILE), result.metrics_json())
    store.write(join(url, folder, runs.PROBE_FILE), result.head.dump())
    return {**result.summary(), "path": folder, **asked}


def _asked(wanted: config.Probe, store: Store) -> dict[str, Any]:
    """What determines a probe besides the version."""
    return {"settings": wanted.model_dump(mode="json"), "labels_fingerprint": labels.fingerprint(store, wanted)}


def _save(goal: Goal, summary: Summary) -> None:
    """Leave what came of the run beside the data; its config lies there already."""
    content: Mapping[str, Any] = {
        **{name: value for name, value in summary.as_json().items() if name != "report"},  # which is made from this
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "recipe": dict(goal.target.recipe.fields),
        "versions": _versions(),
    }
    run_url = join(goal.target.url, RUNS_FOLDER, summary.run_id, "run.json")
    goal.target.store.write(run_url, json.dumps(content, indent=1, ensure_ascii=False).encode())


def _report(settings: config.Config, summary: Summary) -> None:
    """Make the page, if the run changed what it shows or there is none. The run is done: whatever fails now is a warning."""
    if not settings.run.report or summary.version is None:
        return
    try:
        from pipeline import reports  # what draws is 90 MB, and only the page needs it

        output = settings.output
        dataset = open_dataset(output.url, summary.version, output.storage, settings.source.storage)
        run_id = summary.run_id if summary.committed else reports.run_of(dataset) or summary.run_id
        is_trained = summary.probe is not None and summary.run_id in summary.probe["path"]
        is_there = dataset.table_.store.exists(reports.url_of(output.url, run_id))
        if summary.committed or is_trained or not is_there:
            summary.report = reports.write(dataset, run_id)
    except Exception as error:
        logger.warning("the report could not be made: %s: %s; `pipeline report` tries again", type(error).__name__, error)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("frozen-pipeline", "torch", "torchvision", "ray", "pyarrow", "deltalake", "numpy", "pillow", "simplejpeg")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _absolute(settings: config.Config) -> config.Config:
    """Actors have other working directories: source and output are named in full."""
    output = Store(settings.output.storage).absolute(settings.output.url)
    store = Store(settings.source.storage)
    urls = [store.absolute(url) for url in settings.source.urls]
    return settings.model_copy(
        update={
            "output": settings.output.model_copy(update={"url": output}),
            "source": settings.source.model_copy(update={"url": urls}),
            "probe": settings.probe and _located(settings.probe, Store(settings.output.storage)),
        }
    )


def _located(wanted: config.Probe, store: Store) -> config.Probe:
    """The file with the labels named in full."""
    return wanted.model_copy(update={"labels": wanted.labels and store.absolute(wanted.labels)})
