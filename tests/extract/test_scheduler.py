"""Who gets which shard, with actors that are played by the test."""

from __future__ import annotations

import dataclasses

import pytest

from pipeline.errors import IncompleteRun, StorageError, WorldError
from pipeline.extract.carry import Task
from pipeline.extract.scheduler import MAX_FRUITLESS, SHARDS_IN_FLIGHT, Place, Scheduler, Worker
from pipeline.source import Shard
from pipeline.storage import FileStat


def tasks(count: int, first: int = 0) -> list[Task]:
    files = [FileStat(url=f"s3://photos/{number:03d}.tar", num_bytes=1, version="") for number in range(first, first + count)]
    return [Task(shard=Shard(url=file.url, files=(file,))) for file in files]


def scheduler(
    num_ready: int, num_pending: int = 0, num_shards: int = 100, max_attempts: int = 3
) -> tuple[Scheduler, list[Worker]]:
    made = Scheduler(max_attempts)
    made.waiting.extend(tasks(num_shards))
    workers = [Worker(number, Place()) for number in range(num_ready + num_pending)]
    for worker in workers:
        made.hired(worker)
    for worker in workers[:num_ready]:
        made.placed(worker, f"node {worker.actor}")
        made.ready(worker)
    return made, workers


def deal(made: Scheduler) -> list[tuple[Worker, Task]]:
    return list(made.deal())


def test_every_shard_is_dealt_once_and_no_actor_has_more_than_it_may() -> None:
    made, workers = scheduler(4)
    seen, most = list[str](), 0
    while not made.is_done:
        for worker, task in deal(made):
            assert made.has(worker, task)
            seen.append(task.shard.url)
        most = max(most, *(len(worker.in_hand) for worker in workers))
        busiest = max(workers, key=lambda worker: len(worker.in_hand))
        made.returned(busiest, next(iter(busiest.in_hand.values())))
    assert sorted(seen) == [task.shard.url for task in tasks(100)]
    assert most == SHARDS_IN_FLIGHT


def test_the_actor_with_the_fewest_shards_is_next() -> None:
    made, workers = scheduler(3)
    deal(made)
    first, second, _ = workers
    for worker, count in ((first, 1), (second, 2)):
        for task in list(worker.in_hand.values())[:count]:
            made.returned(worker, task)
    assert [worker for worker, _ in deal(made)] == [second, first, second]


@pytest.mark.parametrize(
    ("num_ready", "num_pending", "num_shards", "dealt"),
    [
        (4, 0, 4, [1, 1, 1, 1]),
        (2, 2, 4, [1, 1]),  # those that start will find a shard each
        (1, 9, 10, [3]),
        (1, 9, 4, [2]),  # as if one more came: perhaps none ever does
        (4, 0, 9, [3, 2, 2, 2]),
    ],
)
def test_nobody_takes_what_others_would_then_lack(num_ready: int, num_pending: int, num_shards: int, dealt: list[int]) -> None:
    made, workers = scheduler(num_ready, num_pending, num_shards)
    deal(made)
    assert [len(worker.in_hand) for worker in workers[:num_ready]] == dealt


def test_a_lost_actors_shards_are_tried_alone_then_as_suspects_then_given_up() -> None:
    made, (first, second) = scheduler(2, num_shards=2 * SHARDS_IN_FLIGHT, max_attempts=2)
    deal(made)
    had = list(first.in_hand.values())
    assert made.lost(first, had[0], "it died") == []
    assert not any(made.has(first, task) for task in had)
    for task in list(second.in_hand.values()):
        made.returned(second, task)
    for task in had:  # one after the other, never two
        assert deal(made) == [(second, task)]
        if task is not had[1]:
            made.returned(second, task)
            continue
        assert made.lost(second, task, "it died") == []
        made.hired(second)
        made.ready(second)
    ((_, suspect),) = deal(made)
    assert suspect == dataclasses.replace(had[1], is_suspect=True)
    (result,) = made.lost(second, suspect, "it died")
    assert isinstance(result.error, WorldError)
    assert result.task.shard == had[1].shard
    assert made.is_done


def test_while_others_wait_some_actors_go_on_with_them() -> None:
    made, workers = scheduler(5)
    deal(made)
    victim, *others = workers
    made.lost(victim, next(iter(victim.in_hand.values())), "it died")
    deal(made)
    assert sum(worker.for_one for worker in others) == 2
    for worker in others:
        for task in list(worker.in_hand.values()):
            made.returned(worker, task)
    given = deal(made)
    assert [len(worker.in_hand) for worker in others if worker.for_one] == [1, 1]
    assert len(given) == 2 + 2 * SHARDS_IN_FLIGHT


def test_a_passing_fault_is_tried_again_so_often_and_no_more() -> None:
    made, (worker,) = scheduler(1, num_shards=1)
    fault = StorageError("503")
    for _ in range(2):
        ((_, task),) = deal(made)
        made.returned(worker, task)
        assert made.again(task, fault) == []
    ((_, task),) = deal(made)
    made.returned(worker, task)
    (result,) = made.again(task, fault)
    assert result.error is fault
    assert made.is_done


def test_an_actor_whose_node_goes_gets_no_more() -> None:
    made, (going, staying) = scheduler(2)
    deal(made)
    made.leaving(going, True)
    for worker in (going, staying):
        for task in list(worker.in_hand.values()):
            made.returned(worker, task)
    assert {worker for worker, _ in deal(made)} == {staying}
    made.leaving(going, False)
    assert {worker for worker, _ in deal(made)} == {going}


def test_actors_that_are_lost_again_and_again_end_the_run() -> None:
    made, _ = scheduler(0)

    def lose_one() -> None:
        worker = Worker(None, Place())
        made.hired(worker)
        made.placed(worker, "node")
        made.ready(worker)
        deal(made)
        made.lost(worker, next(iter(worker.in_hand.values())), "it died", is_blamed=False)

    for _ in range(MAX_FRUITLESS):
        lose_one()
    with pytest.raises(IncompleteRun, match="lost again and again"):
        lose_one()
