"""Twenty runs under chaos, two or three of each kind. `PIPELINE_CHAOS_RUNS=40 pytest tests/chaos/test_chaos.py` tries forty.

`python tests/chaos/chaos.py` runs as many as you like and makes a table of them; the same seed is the same run.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from bucket import Bucket
from chaos import Site, endure, opened, written
from conftest import noise
from faults import FaultProxy, Rule, delay
from helpers import Driver, actors_below
from oracle import Contents, difference, tolerance
from scenarios import KINDS, NUM_SHARDS, drawn

NUM_RUNS = int(os.environ.get("PIPELINE_CHAOS_RUNS", "20"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Site(tmp_path_factory.mktemp("chaos")) as site:
        yield site


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(NUM_RUNS), ids=lambda seed: f"{seed}-{KINDS[seed % len(KINDS)]}")
def test_nothing_is_lost(site: Site, seed: int) -> None:
    outcome = endure(site, drawn(seed))
    assert not outcome.problems, outcome


@pytest.mark.timeout(600)
def test_a_node_that_is_about_to_leave_finishes_what_it_has_and_gets_no_more(site: Site) -> None:
    noticed: list[int] = []
    with FaultProxy(site.server.endpoint_url) as proxy:
        bucket = Bucket(site.server, proxy.endpoint_url)
        bucket.fill(noise(NUM_SHARDS * 40), 10)
        proxy.add(Rule(lambda request: request.method == "GET" and request.path.endswith(".tar"), delay(1.0)))

        def give_notice(driver: Driver) -> None:
            """One node is told to go, another joins; the one that goes is taken away once no actor is left on it."""
            actors = site.cluster.actors()
            if not noticed and len(actors) == 2 and proxy.count("GET", ".tar") > 6:
                noticed.append(site.cluster.drain_node())
                site.cluster.add_node()
            elif noticed and len(noticed) == 1 and not actors_below(noticed):
                noticed.extend(site.cluster.kill_node())

        ended = site.run(written(bucket, site.folder, is_large=False), give_notice)
    assert ended.code == 0, ended
    assert len(noticed) > 1, "the actor stayed on the node that had to go"
    assert ended.report["actors_lost"] == 0
    assert len({actor["node"] for actor in ended.report["actors"]}) == 3, "the node that joined was not used"
    assert sorted(opened(bucket).keys()) == [f"{number:05d}" for number in range(NUM_SHARDS * 40)]


@pytest.mark.timeout(600)
def test_a_node_that_dies_tells_nothing_of_the_shard_that_it_had_in_hand(site: Site) -> None:
    killed: list[int] = []
    with FaultProxy(site.server.endpoint_url) as proxy:
        bucket = Bucket(site.server, proxy.endpoint_url)
        bucket.fill(noise(20), 10)
        proxy.add(Rule(lambda request: request.method == "GET" and request.path.endswith(".tar"), delay(3.0)))

        def kill(driver: Driver) -> None:
            """Two nodes have one shard each, and one of them goes."""
            if not killed and len(site.cluster.actors()) == 2 and proxy.count("GET", ".tar") == 2:
                killed.extend(site.cluster.kill_node())
                proxy.remove_rules()
                site.cluster.add_node()

        ended = site.run(written(bucket, site.folder, is_large=False, run__max_attempts=1), kill)
    assert killed
    assert ended.code == 0, ended
    assert ended.report["actors_lost"] == 1
    assert sorted(opened(bucket).keys()) == [f"{number:05d}" for number in range(20)]


def lose(found: Contents) -> None:
    for column in (found["001"].keys, found["001"].others, found["001"].embeddings):
        column.pop(3)


def lose_a_shard(found: Contents) -> None:
    del found["001"]


def double(found: Contents) -> None:
    shard = found["001"]
    for column in (shard.keys, shard.others, shard.embeddings):
        column.append(column[3])


def blur(found: Contents) -> None:
    shard, limit = found["001"], tolerance(found.values())
    shard.embeddings[3] = shard.embeddings[3] + np.float32(1.01 * limit)


def blank(found: Contents) -> None:
    found["001"].embeddings[3] = np.full_like(found["001"].embeddings[3], np.nan)


def relabel(found: Contents) -> None:
    found["001"].others[3] = (*found["001"].others[3][:-1], False)


def rename(found: Contents) -> None:
    found["001"].keys[3] = "another"


def forgive(found: Contents) -> None:
    found["002"].quarantine.clear()


@pytest.mark.parametrize(
    ("damage", "counts"),
    [
        (lose, {"lost": 1}),
        (lose_a_shard, {"lost": 10}),
        (double, {"doubled": 1}),
        (blur, {"torn": 1}),
        (blank, {"torn": 1}),
        (relabel, {"torn": 1}),
        (rename, {"lost": 1, "strange": 1}),
        (forgive, {"quarantine": 1}),
    ],
)
@pytest.mark.timeout(600)
def test_the_oracle_sees_one_row(site: Site, damage: Callable[[Contents], None], counts: dict[str, int]) -> None:
    expected = site.expected({f"{number:03d}": 0 for number in range(NUM_SHARDS)}, is_large=False)
    found = copy.deepcopy(expected)
    assert not difference(found, expected)
    damage(found)
    seen = difference(found, expected)
    names = ("lost", "doubled", "torn", "strange", "quarantine")
    assert {name: getattr(seen, name) for name in names} == dict.fromkeys(names, 0) | counts
