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

    with _handled_by(note):
        yield
    for number in arrived:
        signal.raise_signal(number)


@contextlib.contextmanager
def despite_ray() -> Iterator[None]:
    """Around `ray.init`, which makes SIGTERM a `SystemExit` of its own for good: here it is what it was before."""
    with _handled_by(None):
        try:
            yield
        except SystemExit as error:
            raise KeyboardInterrupt(signal.Signals.SIGTERM.name) from error


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, Any], None] | None) -> Iterator[None]:
    """Set a handler, and bring the earlier ones back. Only the main thread may; elsewhere nothing is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        if handler is not None:
            for number in STOP_SIGNALS:
                signal.signal(number, handler)
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _let_the_next_one_end_us() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
