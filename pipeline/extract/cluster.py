"""The Ray that a run or an analysis is on, and a GPU of it for what is no extraction.

With `actors.py` and `pool.py` the only room that talks to Ray.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.errors import ClusterError, WorldError

T = TypeVar("T")


@contextlib.contextmanager
def cluster() -> Iterator[None]:
    """Ray for the duration of a run: the cluster that RAY_ADDRESS names or that this job runs on, else a local one."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    quiet: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, configure_logging=False, **quiet)
    except ConnectionError as error:
        why = str(error.__cause__ or error).strip().splitlines()[-1]
        raise ClusterError(f"RAY_ADDRESS: {address!r} is no Ray cluster, or does not know this token: {why}") from None
    try:
        yield
    finally:
        ray.shutdown()


def on_gpu(function: Callable[..., T], *arguments: Any) -> T:
    """`function(*arguments)` in a task on a GPU of the cluster, else in this process where there is no cluster or no GPU.

    The function reads its data itself: only its arguments and what it returns travel.

    Raises:
        WorldError: the task's process died; otherwise what the function raises.
    """
    if not ray.is_initialized() and not os.environ.get("RAY_ADDRESS"):
        return function(*arguments)
    with cluster():
        if not ray.cluster_resources().get("GPU"):  # type: ignore[no-untyped-call]
            return function(*arguments)
        remote: Any = ray.remote(num_gpus=1, max_retries=1)(function)
        try:
            result: T = ray.get(remote.remote(*arguments))
        except RayTaskError as error:
            raise cause(error) from None
        except RayError as error:
            raise WorldError(f"what ran on a GPU of the cluster died: {first_line(error)}") from None
        return result


def first_line(error: BaseException) -> str:
    """What went wrong, without the traceback of another process."""
    return str(error).partition("\n")[0]


def cause(error: BaseException) -> BaseException:
    """The exception that was raised over there, where Ray carries it."""
    inner = getattr(error, "cause", None)
    return inner if isinstance(inner, BaseException) else error
