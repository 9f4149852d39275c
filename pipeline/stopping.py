"""SIGTERM and SIGINT: the first one stops a run cleanly, a second one ends the process at once.

Both arrive as `KeyboardInterrupt` in the main thread: Ray's native calls let nothing else through. Nothing here knows what is
stopped; the driver does.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""What `ray job stop`, systemd and Kubernetes send, and Ctrl-C."""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """In this block the first signal raises `KeyboardInterrupt`, a second one ends the process."""

    def stop(number: int, _: Any) -> None:
        _let_the_next_one_end_us()
        raise KeyboardInterrupt(signal.Signals(number).name)

    with _handled_by(stop):
        yield


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """A signal that arrives in this block takes effect behind it. For what is short, and has to be known to be done or not."""
    arrived: list[int] = []

    def note(number: int, _: Any) -> None:
        _let_the_next_one_end_us()
        arrived.append(number)

    try:
        with _handled_by(note):
            yield
    finally:  # also where the block failed: who was told to stop may not try again
        for number in arrived:
            signal.raise_signal(number)


@contextlib.contextmanager
def despite_ray() -> Iterator[None]:
    """Around `ray.init`, which makes SIGTERM a `SystemExit` of its own for good: a handler that was there before stays."""
    before = _handlers()
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt(signal.Signals.SIGTERM.name) from error
    finally:
        _set({number: handler for number, handler in before.items() if handler is not signal.SIG_DFL})


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, Any], None]) -> Iterator[None]:
    before = _handlers()
    try:
        _set(dict.fromkeys(before, handler))
        yield
    finally:
        _set(before)


def _handlers() -> dict[int, Any]:
    """Only the main thread can set any: elsewhere there are none, and nothing is done."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.getsignal(number) for number in STOP_SIGNALS}


def _set(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _let_the_next_one_end_us() -> None:
    _set(dict.fromkeys(STOP_SIGNALS, signal.SIG_DFL))
