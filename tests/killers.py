"""Pictures that kill or hang whoever decodes them. Imported by a config's model, so by every process that decodes for it."""

from __future__ import annotations

import ctypes
import io
import os
import signal
import time
from typing import Any

from models import tiny
from PIL import GifImagePlugin, Image

__all__ = ["deadly", "tiny"]

_load = GifImagePlugin.GifImageFile.load


def deadly(what: str) -> bytes:
    """A GIF that does it: `kill`, `hang`, or `hold`, which hangs with the interpreter lock held."""
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "blue").save(file, "GIF", comment=what.encode())
    return file.getvalue()


def _deadly_load(self: GifImagePlugin.GifImageFile) -> Any:
    what = self.info.get("comment")
    if what == b"kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == b"hang":
        time.sleep(1000)
    elif what == b"hold":
        ctypes.PyDLL(None).sleep(1000)
    return _load(self)


GifImagePlugin.GifImageFile.load = _deadly_load
