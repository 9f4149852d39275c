"""The process that `helpers.Drivers` forks drivers from: what takes seconds to import is imported once.

In: lines `{"arguments", "stdout", "stderr"}`. Out: for each `{"pid"}`, and when that driver has ended `{"code"}`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any


def main() -> None:
    """Serve; a fork of this process comes back from here as a driver."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing but answers may come in between
    import_all()
    gc.freeze()  # or a fork would go through all of it when it ends, and copy every page: 2 s
    tell(answers, ready=True)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            answers.close()
            become(order)
            return
        tell(answers, pid=pid)
        _, status = os.waitpid(pid, 0)
        tell(answers, code=os.waitstatus_to_exitcode(status))
    sys.exit()


def import_all() -> None:
    """What a run imports in the course of it. Nothing is called: threads would not survive the fork."""
    import aiobotocore.session  # noqa: F401
    import botocore.session  # noqa: F401
    import ray  # noqa: F401
    import s3fs  # noqa: F401
    import torch  # noqa: F401
    import torchvision  # noqa: F401

    import pipeline.cli
    import pipeline.driver
    import pipeline.extract.loop
    import pipeline.extract.pool
    import pipeline.report.terminal
    import pipeline.source.webdataset  # noqa: F401


def tell(answers: Any, **answer: Any) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def become(order: dict[str, Any]) -> None:
    """Take on the arguments and the streams of a command."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        file = os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    sys.argv = ["pipeline", *order["arguments"]]


if __name__ == "__main__":
    main()
    from pipeline.cli import main as pipeline_main

    pipeline_main()
