"""The verdict, from seconds by stage."""

from __future__ import annotations

import pytest

from pipeline.metrics import ADVICE, MAX_STRETCHES, Pace, bound_by, busy

WORKERS = {
    "fetch": {"no_sample": 90, "decode": 5, "forward": 5, "fetch": 95, "no_shard": 5, "write": 1, "no_rows": 99},
    "starved": {"no_sample": 90, "decode": 5, "forward": 5, "fetch": 5, "no_shard": 95, "write": 1, "no_rows": 99},
    "decode": {"no_sample": 5, "decode": 60, "forward": 35, "fetch": 20, "no_shard": 80, "write": 10, "no_rows": 90},
    "forward": {"no_sample": 5, "decode": 35, "forward": 60, "fetch": 20, "no_shard": 80, "write": 10, "no_rows": 90},
    "write": {"no_batch": 80, "decode": 10, "forward": 10, "fetch": 5, "no_shard": 95, "write": 90, "no_rows": 10},
}


@pytest.mark.parametrize("verdict", WORKERS)
def test_verdict(verdict: str) -> None:
    assert bound_by(WORKERS[verdict]) == verdict
    assert verdict in ADVICE


def test_few_open_shards_that_wait_for_their_upload_are_no_lack_of_shards() -> None:
    assert (
        bound_by({"no_sample": 90, "decode": 5, "forward": 5, "fetch": 5, "no_shard": 95, "write": 90, "no_rows": 10})
        == "write"
    )


def test_a_gpu_that_is_behind_shows_as_workers_without_a_free_batch() -> None:
    seconds = {"no_batch": 80, "decode": 20, "forward": 1, "device": 95, "elapsed": 100, "write": 5, "no_rows": 95}
    assert bound_by(seconds) == "forward"
    assert busy(seconds)["forward"] == 0.95


def test_shares_of_nothing_are_zero() -> None:
    assert set(busy({}).values()) == {0.0}


@pytest.mark.parametrize(("num_shards", "every_s"), [(400, 0.1), (400, 7.0), (20_000, 3.0), (40, 60.0)])
def test_the_pace_of_a_run_of_any_length(num_shards: int, every_s: float) -> None:
    """Half way through it becomes half as fast, and waits for the source."""
    pace = Pace()
    for number in range(num_shards):
        slow = number > num_shards / 2
        stages = {"fetch": 0.9, "no_shard": 0.1, "no_sample": 9.0, "decode": 1.0} if slow else {"decode": 6.0, "forward": 4.0}
        pace.add(number * every_s, 50 if slow else 100, stages)
    found = pace.as_json()
    assert found is not None
    rates = found["images_per_second"]
    assert 4 <= len(rates) <= MAX_STRETCHES
    total = sum(rates) * found["stretch_s"]
    assert total == pytest.approx(75 * num_shards, rel=0.3), "but for the last stretch"
    assert rates[0] == pytest.approx(100 / every_s, rel=0.35)
    assert rates[-1] == pytest.approx(50 / every_s, rel=0.35)
    assert [found["busy"]["decode"][0], found["busy"]["decode"][-1]] == [0.6, 0.1]
    assert [found["busy"]["fetch"][0], found["busy"]["fetch"][-1]] == [0.0, 0.9]


def test_a_short_run_has_no_pace() -> None:
    pace = Pace()
    assert pace.as_json() is None
    for number in range(7):
        pace.add(0.1 * number, 10, {"decode": 1.0})
    assert pace.as_json() is None
