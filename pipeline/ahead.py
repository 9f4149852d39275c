"""Work that threads do ahead of need: results in order, and no more of them at a time than was asked for."""

from __future__ import annotations

import collections
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def ahead(
    pool: Executor,
    work: Callable[[S], T],
    items: Iterable[S],
    limit: int,
    num_bytes: Callable[[S], int] = lambda item: 0,
    max_bytes: int = 0,
) -> Generator[T, None, None]:
    """`work` of every item, in order. Whoever leaves early drops what was not begun.

    Args:
        pool: its threads do the work; `work` must not wait for them itself.
        work: what to do with an item.
        items: taken one by one, not before there is room.
        limit: results there are at a time: the one handed out, and those that are done or under way.
        num_bytes: size of an item's result.
        max_bytes: what `limit` results may have together; a larger one comes alone.
    """
    begun: collections.deque[tuple[int, Future[T]]] = collections.deque()
    total = 0
    try:
        for item in items:
            size = num_bytes(item)
            while begun and (len(begun) >= limit or total + size > max_bytes):
                total -= begun[0][0]
                yield begun.popleft()[1].result()
            begun.append((size, pool.submit(work, item)))
            total += size
        while begun:
            yield begun.popleft()[1].result()
    finally:
        for _, future in begun:
            future.cancel()
