"""Importing what is large, quickly."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """For imports of torch and Ray: what they make stays, and nobody looks for garbage among it, now or later.

    That takes as long as the imports themselves, and at the end of the process once more.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
