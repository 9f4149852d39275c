"""Processes of our own beside an actor or a driver: they can import what it can, and none outlives it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: be sent a signal when the thread that started this process ends."""


def environment() -> dict[str, str]:
    """For a child: ours, with all that can be imported here on its path."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}


def die_with_parent() -> None:
    """Called in a child: it ends with the thread that started it, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
