"""The end of a run: actors that have nothing left to do help those that still have a large shard.

Only references pass through here. The pool asks the actor that has most left to lend, hands the reference on to one that is
idle, and that of the answer back. Every loan is settled, with an answer or with none, unless its owner is gone.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import heapq
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from ray.exceptions import RayError, RayTaskError

from pipeline.errors import GuardError
from pipeline.extract.actors import Loan, Report
from pipeline.extract.scheduler import Result, Scheduler, Worker

logger = logging.getLogger(__name__)

LOANS_IN_FLIGHT = 2
"""What a helper has in hand: one that it computes, one to go on with."""
REST_S = 0.5
"""An owner that had nothing to lend is not asked again for so long."""

Continuation = Callable[["Future[Any]"], list[Result]]
"""What is done with the answer to a call; results that came of it."""


class Tail:
    """Who lends to whom, and how long the end of the run took.

    Args:
        scheduler: knows who has what.
        when_done: takes the reference of a call, and what to do with its answer.
        bury: forgets an actor that died or broke, and says why.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        when_done: Callable[[Any, Continuation], None],
        bury: Callable[[Worker, str], list[Result]],
    ) -> None:
        self._scheduler, self._when_done, self._bury = scheduler, when_done, bury
        self._since: float | None = None
        """When the first actor ran out of work."""
        self._asked: set[Worker] = set()
        self._not_before: dict[Worker, float] = {}
        self._left: dict[Worker, int] = {}
        """Bytes that an owner has not read, as it last said."""
        self.seconds = 0.0
        """From the moment that the first actor ran out of work to the end."""
        self._stages: collections.defaultdict[str, float] = collections.defaultdict(float)
        """Seconds by stage that helpers spent."""
        self.num_lent = 0
        """Images that were computed by another actor than the one whose shard they are of."""

    @property
    def is_on(self) -> bool:
        """Whether an actor has run out of work."""
        return self._since is not None

    def arrange(self) -> None:
        """Ask owners to lend, for every actor that has nothing to do."""
        idle = self._scheduler.idle()
        if self._scheduler.num_waiting:
            self._since = None
        elif idle and self._since is None:
            self._since = time.monotonic()
        helpers = [helper for helper in idle if helper.num_loans < LOANS_IN_FLIGHT]
        owners = self._owners(len(helpers)) if helpers else []
        for owner, helper in zip(owners, sorted(helpers, key=lambda helper: helper.num_loans), strict=False):
            self._asked.add(owner)
            helper.num_loans += 1
            loan, images = owner.actor.lend.options(num_returns=2).remote(_appetite(helper))
            self._when_done(loan, functools.partial(self._lent, owner, helper, images))

    def take_stages(self, stages: dict[str, float]) -> dict[str, float]:
        """Seconds by stage, and with them those that helpers spent since the last call."""
        if self._stages:
            helped, self._stages = self._stages, collections.defaultdict(float)
            return {stage: stages.get(stage, 0.0) + helped.get(stage, 0.0) for stage in {*stages, *helped}}
        return stages

    def end(self) -> None:
        """All shards have their result."""
        if self._since is not None:
            self.seconds += time.monotonic() - self._since
        self._since = None
        for state in (self._asked, self._not_before, self._left):
            state.clear()

    def _owners(self, count: int) -> list[Worker]:
        """The actors that have most left, of those that may be asked."""
        now = time.monotonic()
        owners = [
            owner for owner in self._scheduler.owners() if owner not in self._asked and self._not_before.get(owner, 0.0) <= now
        ]
        return heapq.nlargest(count, owners, key=self._bytes_left)

    def _bytes_left(self, owner: Worker) -> int:
        in_hand = sum(task.shard.num_bytes for task in owner.in_hand.values())
        return min(in_hand, self._left.get(owner, in_hand))

    def _lent(self, owner: Worker, helper: Worker, images: Any, answer: Future[Any]) -> list[Result]:
        """Hand a loan on."""
        self._asked.discard(owner)
        try:
            loan: Loan = answer.result()
        except RayError:  # whoever waits for the owner's shards hears of it
            loan = Loan(number=0, num_images=0, num_bytes_left=0)
        self._left[owner] = loan.num_bytes_left
        if not loan.num_images:
            helper.num_loans -= 1
            self._not_before[owner] = time.monotonic() + REST_S
        elif helper not in self._scheduler.workers:
            self._settle(owner, loan, None)
        else:
            report, found = helper.actor.embed_for.options(num_returns=2).remote(images)
            self._when_done(report, functools.partial(self._helped, owner, helper, loan, found))
        return []

    def _helped(self, owner: Worker, helper: Worker, loan: Loan, found: Any, answer: Future[Any]) -> list[Result]:
        """Hand the answer back."""
        helper.num_loans -= 1
        helper.busy_at = time.monotonic()
        try:
            report: Report = answer.result()
        except RayError as error:
            self._settle(owner, loan, None)
            cause = getattr(error, "cause", None)
            if isinstance(cause, GuardError):
                raise cause from None  # a broken promise: no other actor would fare better
            if isinstance(error, RayTaskError) and isinstance(cause, RayError):
                return []  # the loan was lost on its way, with its owner's node
            return self._bury(helper, "it broke" if isinstance(error, RayTaskError) else "it died")
        self.num_lent += loan.num_images
        for stage, seconds in report.stages.items():
            self._stages[stage] += seconds
        helper.info |= report.chosen
        self._settle(owner, loan, found)
        return []

    def _settle(self, owner: Worker, loan: Loan, found: Any) -> None:
        def settled(answer: Future[Any]) -> list[Result]:
            with contextlib.suppress(RayError):
                answer.result()
                return []
            if found is not None:
                self._settle(owner, loan, None)  # the answer was lost on its way, unless the owner is gone
            return []

        if owner in self._scheduler.workers:
            self._when_done(owner.actor.settle.remote(loan.number, found), settled)


def _appetite(helper: Worker) -> int:
    """Images that an actor computes at a time: a batch in every lane."""
    return int(helper.info["batch_size"]) * (int(helper.info["threads"]) if helper.info["device"] == "cpu" else 2)
