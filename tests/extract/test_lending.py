"""One loop lends work to another: the same rows as without, whoever computes them and whatever becomes of the helper."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import noise, settings, write_shards
from images import encode
from PIL import Image

from pipeline import config
from pipeline.dataset.partition import Partition, list_values, read_footer, read_quarantine
from pipeline.driver import Goal
from pipeline.extract.backbone import Backbone, Spec
from pipeline.extract.carry import NOTHING_KNOWN, KnownRows, Task, known_rows
from pipeline.extract.loop import Loop, Settings
from pipeline.storage import join

NUM_IMAGES = 160
BAD = {23: b"not a picture", 150: b""}
"""By number; the second one has no bytes at all."""

Lend = Callable[[Loop], None]


@pytest.fixture(scope="module")
def settings_(tmp_path_factory: pytest.TempPathFactory) -> config.Config:
    """One shard with two bad images, and a model that takes 5 ms a picture."""
    folder = tmp_path_factory.mktemp("lending")
    images = noise(NUM_IMAGES)
    for number, image in BAD.items():
        images[number] = image
    write_shards(folder / "shards", images, NUM_IMAGES, "png")
    model = {"model": "python/models:sleepy", "weights": "seed:0", "nodes": {"embedding": {"node": "pooled"}}}
    return settings(f"{folder}/shards/*.tar", folder / "out", backbone=model)


@pytest.fixture(scope="module")
def goal(settings_: config.Config) -> Goal:
    return Goal.of(settings_)


@pytest.fixture(scope="module")
def backbone(settings_: config.Config) -> Backbone:
    return Backbone(Spec(backbone=settings_.backbone, decode="exact", precision="float32"))


@pytest.fixture(scope="module")
def calm(goal: Goal, backbone: Backbone) -> Partition:
    """The shard's partition without any help."""
    return extracted(goal, backbone, lambda owner: None)


@contextlib.contextmanager
def running(goal: Goal, backbone: Backbone, known: KnownRows = NOTHING_KNOWN) -> Iterator[Loop]:
    work = Settings(decode="exact", batch_sizes=(8,), num_workers=1)
    loop = Loop(goal.source, backbone, goal.target, work, known)
    yield loop
    loop.close()


def extracted(goal: Goal, backbone: Backbone, lend: Lend, known: KnownRows = NOTHING_KNOWN, **task: Any) -> Partition:
    """The partition, made while `lend` is called over and over."""
    (shard,) = goal.source.shards()
    with running(goal, backbone, known) as owner:
        future: Future[Partition] = owner.submit(Task(shard=shard, **task))
        while not future.done():
            lend(owner)
            time.sleep(0.005)
        return future.result()


def assert_same(goal: Goal, found: Partition, expected: Partition) -> None:
    names = ("num_rows", "num_read", "num_embedded", "num_carried_over", "num_quarantined")
    assert [getattr(found, name) for name in names] == [getattr(expected, name) for name in names]
    tables, quarantines = [], []
    for each in (found, expected):
        file = goal.target.store.stat(join(goal.target.url, each.path))
        tables.append(pq.read_table(file.url.removeprefix("file://")))
        quarantines.append(read_quarantine(goal.target.store, goal.target.url, read_footer(goal.target.store, file)))
    assert tables[0].drop(["embedding"]).equals(tables[1].drop(["embedding"]))
    embeddings_ND, expected_ND = (list_values(table.column("embedding")) for table in tables)
    assert np.abs(embeddings_ND - expected_ND).max() <= 1e-4 * np.abs(expected_ND).max()
    assert quarantines[0] == quarantines[1]
    assert [row.index for row in quarantines[0]] == list(BAD)


def test_a_helpers_rows_are_the_owners(goal: Goal, backbone: Backbone, calm: Partition) -> None:
    num_lent = 0

    with running(goal, backbone) as helper:

        def lend(owner: Loop) -> None:
            nonlocal num_lent
            number, images = owner.lender.lend(16)
            if images:
                num_lent += len(images)
                owner.lender.settle(number, helper.embed(images).result())

        found = extracted(goal, backbone, lend)
    assert num_lent >= NUM_IMAGES // 3
    assert_same(goal, found, calm)


def test_what_both_have_computed_counts_once(goal: Goal, backbone: Backbone, calm: Partition) -> None:
    num_twice = 0
    with running(goal, backbone) as helper:

        def lend(owner: Loop) -> None:
            nonlocal num_twice
            number, images = owner.lender.lend(16)
            if images:
                num_twice += len(images)
                owner.lender._take_back(owner.lender._lent[number])
                owner.lender.settle(number, helper.embed(images).result())

        found = extracted(goal, backbone, lend)
    assert num_twice
    assert_same(goal, found, calm)


@pytest.mark.parametrize("comes_later", [False, True], ids=["never", "late"])
def test_an_owner_computes_what_has_no_answer(goal: Goal, backbone: Backbone, calm: Partition, comes_later: bool) -> None:
    """Whether it is told so, or has nothing else to do: then the answer comes after its own and does not count."""
    loans = dict[int, list[Any]]()

    def lend(owner: Loop) -> None:
        number, images = owner.lender.lend(16) if not loans else (0, [])
        if images:
            loans[number] = images
            if not comes_later:
                owner.lender.settle(number, None)

    with running(goal, backbone) as helper:
        (shard,) = goal.source.shards()
        with running(goal, backbone) as owner:
            future = owner.submit(Task(shard=shard))
            while not future.done():
                lend(owner)
                time.sleep(0.005)
            assert loans
            if comes_later:
                for number, images in loans.items():
                    owner.lender.settle(number, helper.embed(images).result())
                done = threading.Event()
                owner._results.put(done.set)
                assert done.wait(10)
    assert_same(goal, future.result(), calm)


def test_what_is_known_is_not_lent(goal: Goal, backbone: Backbone, calm: Partition) -> None:
    known = known_rows(goal.target, {calm.path: calm.num_rows})
    lent = list[int]()

    def lend(owner: Loop) -> None:
        number, images = owner.lender.lend(16)
        if images:
            lent.append(len(images))
            owner.lender.settle(number, None)

    found = extracted(goal, backbone, lend, known)
    assert found.num_carried_over == NUM_IMAGES - len(BAD)
    assert sum(lent) <= len(BAD)


def test_suspects_are_not_lent(goal: Goal, backbone: Backbone, calm: Partition) -> None:
    """A picture that kills its decoder would kill the helper."""
    lent = list[int]()
    found = extracted(goal, backbone, lambda owner: lent.append(len(owner.lender.lend(16)[1])), is_suspect=True)
    assert lent
    assert not any(lent)
    assert_same(goal, found, calm)


def test_a_helper_that_breaks_says_so(goal: Goal, settings_: config.Config) -> None:
    nodes = {"embedding": config.Node(node="pool")}
    model = settings_.backbone.model_copy(update={"model": "python/models:breaks", "nodes": nodes})
    white = np.frombuffer(encode(Image.new("RGB", (64, 64), "white"), "PNG"), np.uint8)
    with running(goal, Backbone(Spec(backbone=model, decode="exact", precision="float32"))) as helper:
        for _ in range(2):  # and no loan waits for an answer that never comes
            with pytest.raises(RuntimeError, match="the device fell over"):
                helper.embed([white]).result(timeout=10)
