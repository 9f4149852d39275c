"""Log lines of actors: one JSON object a line, which says what run, node and shard it is about.

They go to the actor's stderr, which Ray keeps in a file on its node (`ray logs`, the dashboard); the driver repeats none.
"""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import json
import logging
import sys
from collections.abc import Iterator

_shard: contextvars.ContextVar[str] = contextvars.ContextVar("shard", default="")


@contextlib.contextmanager
def about(shard: str) -> Iterator[None]:
    """Lines of this thread that come from the block are about this shard."""
    token = _shard.set(shard)
    try:
        yield
    finally:
        _shard.reset(token)


def set_up(run_id: str, node: str) -> None:
    """Let this process say what its package has to say, a line a shard included."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(run_id, node))
    package = logging.getLogger("pipeline")
    package.handlers[:] = [handler]
    package.setLevel(logging.INFO)
    package.propagate = False  # whoever has set up the root has other lines in mind


class _Formatter(logging.Formatter):
    def __init__(self, run_id: str, node: str) -> None:
        super().__init__()
        self._whole = {"run_id": run_id, "node": node}

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {"time": when.isoformat(timespec="milliseconds"), "level": record.levelname, **self._whole}
        if shard := _shard.get():
            line["shard"] = shard
        line |= {"logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
