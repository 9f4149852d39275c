"""Seconds and memory of a stretch of this process. Linux only."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def metered() -> Iterator[Callable[[], tuple[float, int]]]:
    """Seconds since it began, and the most memory that this process had meanwhile on top of what it had, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is the present again
    before, start = _status("VmRSS"), time.monotonic()
    yield lambda: (time.monotonic() - start, max(0, _status("VmHWM") - before))


def _status(name: str) -> int:
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(f"{name}:"))
