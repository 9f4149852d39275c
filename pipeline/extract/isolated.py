"""Decoding in a process of its own: a picture that kills or hangs its decoder costs that process, and becomes one row of the
quarantine. For shards that an actor died of; a tenth slower than decoding in the loop, and seconds to start.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import torch

from pipeline.config import Preprocess
from pipeline.errors import SampleError, WorldError
from pipeline.extract import child
from pipeline.extract.decode import Decoder

START_TIMEOUT_S = 120.0
"""Imports of the child, on a machine that is busy."""
MEMORY_BYTES = 4 << 30
"""What decoding may allocate on top of what the child has after its imports."""


class IsolatedDecoder:
    """Used like a `Decoder`, by one thread. The process starts with the first picture and after each that ended it.

    Args:
        preprocess: as for `Decoder`, like `fast` and `max_pixels`.
        imports: modules that may have taught PIL a format: those that the model comes from.
        timeout_s: for one picture.
    """

    def __init__(
        self, preprocess: Preprocess, *, fast: bool, max_pixels: int, imports: Sequence[str] = (), timeout_s: float
    ) -> None:
        self._order = {
            "preprocess": preprocess.model_dump(mode="json"),
            "fast": fast,
            "max_pixels": max_pixels,
            "imports": list(imports),
        }
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def __call__(self, data: bytes | memoryview, slot_HWC: torch.Tensor) -> tuple[int, int]:
        """Fill `slot_HWC` (crop, crop, 3) uint8 with the picture; width and height of the upright original.

        Raises:
            SampleError: stage `decode`; `Crashed` or `Hung` where the process had to be given up.
            WorldError: no process can be started.
        """
        connection = self._connection or self._start()
        try:
            connection.send_bytes(data)
            if not connection.poll(self._timeout_s):
                self.close()
                raise SampleError("decode", "Hung", f"decoding it took longer than {self._timeout_s:g} s")
            answer: dict[str, Any] = json.loads(connection.recv_bytes())
            if "error" in answer:
                raise SampleError(answer["stage"], answer["error"], answer["message"])
            connection.recv_bytes_into(slot_HWC.view(-1).numpy().data)
        except (EOFError, OSError):
            raise SampleError("decode", "Crashed", f"the process that decoded it {self._end()}") from None
        return answer["width"], answer["height"]

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None

    def _start(self) -> Connection:
        ours, theirs = Pipe()
        command = [sys.executable, "-m", __name__, str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, env=child.environment(), pass_fds=[theirs.fileno()]
            )
        self._connection = ours
        ready = False
        with contextlib.suppress(EOFError, OSError):
            ours.send_bytes(json.dumps(self._order).encode())
            ready = ours.poll(START_TIMEOUT_S) and ours.recv_bytes() == b"ready"
        if not ready:
            self.close()
            raise WorldError("the process to decode suspects in did not start; the actor's log says why")
        return ours

    def _end(self) -> str:
        """How the process ended, after a verb's subject."""
        code = self._process.wait() if self._process is not None else 0
        self.close()
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _serve(connection: Connection) -> None:
    """Decode what comes, until nothing comes any more."""
    order = json.loads(connection.recv_bytes())
    for module in order["imports"]:
        importlib.import_module(module)
    preprocess = Preprocess.model_validate(order["preprocess"])
    decoder = Decoder(preprocess, fast=order["fast"], max_pixels=order["max_pixels"])
    slot_HWC = torch.zeros(preprocess.crop, preprocess.crop, 3, dtype=torch.uint8)
    torch.set_num_threads(1)
    _bound_memory()
    connection.send_bytes(b"ready")
    while True:
        try:
            data = connection.recv_bytes()
        except EOFError:
            return
        try:
            with torch.inference_mode():
                width, height = decoder(data, slot_HWC)
        except Exception as error:
            refusal = SampleError.of(error)
            answer = {"stage": refusal.stage, "error": refusal.error, "message": refusal.message}
            connection.send_bytes(json.dumps(answer).encode())
        else:
            connection.send_bytes(json.dumps({"width": width, "height": height}).encode())
            connection.send_bytes(slot_HWC.numpy().tobytes())


def _bound_memory() -> None:
    """Let an allocation fail that the machine's out-of-memory killer would answer, perhaps with another process."""
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            in_use = int(file.read().split()[0]) * resource.getpagesize()
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        wanted = in_use + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (wanted if most == resource.RLIM_INFINITY else min(wanted, most), most))


if __name__ == "__main__":
    child.die_with_parent()
    with Connection(int(sys.argv[1])) as _connection:
        _serve(_connection)
