"""The verdict, from seconds by stage."""

from __future__ import annotations

import pytest

from pipeline.metrics import ADVICE, bound_by, busy

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
