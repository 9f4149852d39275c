"""Work ahead of need: in order, bounded, and dropped when nobody wants it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.ahead import ahead


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def test_results_come_in_the_order_of_the_items(pool: ThreadPoolExecutor) -> None:
    def slow_first(number: int) -> int:
        time.sleep(0.05 if number == 0 else 0)
        return number

    assert list(ahead(pool, slow_first, range(20), 4)) == list(range(20))


def test_no_more_is_begun_than_was_asked_for(pool: ThreadPoolExecutor) -> None:
    begun: list[int] = []
    results = ahead(pool, begun.append, range(20), 4)
    for number in range(20):
        next(results)
        time.sleep(0.002)
        assert len(begun) <= number + 4
    assert next(results, "end") == "end"


def test_sizes_bound_what_is_begun_and_a_large_one_comes_alone(pool: ThreadPoolExecutor) -> None:
    lock, now, most = threading.Lock(), 0, 0

    def hold(size: int) -> int:
        nonlocal now, most
        with lock:
            now += size
            most = max(most, now)
        time.sleep(0.005)
        with lock:
            now -= size
        return size

    sizes = [3, 4, 2, 50, 1, 9, 1, 8]
    assert list(ahead(pool, hold, sizes, 8, lambda size: size, 10)) == sizes
    assert most == 50


def test_an_error_comes_in_its_place_and_the_rest_is_dropped(pool: ThreadPoolExecutor) -> None:
    begun = []

    def fail(number: int) -> int:
        begun.append(number)
        if number == 3:
            raise ValueError("three")
        return number

    results = ahead(pool, fail, range(100), 4)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
    assert max(begun) <= 7
