"""A dataset as a run commits it, made by the loop in this process: for tests that need one and have no use for Ray."""

from __future__ import annotations

from pipeline import config
from pipeline.dataset import table
from pipeline.dataset.read import Dataset, open_dataset
from pipeline.driver import Goal
from pipeline.extract.backbone import Backbone, Spec
from pipeline.extract.carry import Task
from pipeline.extract.loop import Loop, Settings


def committed(settings: config.Config) -> Dataset:
    """The first version of a dataset."""
    goal = Goal.of(settings)
    spec = Spec(backbone=settings.backbone, decode=settings.decode, precision=settings.run.precision)
    loop = Loop(goal.source, Backbone(spec), goal.target, Settings(decode=settings.decode, batch_sizes=(8,), num_workers=1))
    futures = [loop.submit(Task(shard=shard)) for shard in goal.source.shards()]
    partitions = [future.result() for future in futures]
    loop.close()
    table.create(goal.target, "run", partitions)
    return open_dataset(settings.output.url, storage=settings.output.storage, source_storage=settings.source.storage)
