"""Two processes that are kept for many runs: a Ray cluster of several nodes, and one that drivers are forked from.

Each is a script of this folder that answers a line of JSON with another, and ends when its input does. So no test process
ever connects to this Ray, whatever other Ray it has, and no run pays for the imports of its driver.

    with Cluster(logs) as cluster, Drivers(logs, cluster.env) as drivers:
        driver = drivers.start("run", "config.yaml", "--json")
        cluster.actors()[0].kill()
        assert driver.wait(60) == 0
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

FOLDER = Path(__file__).parent
TESTS = FOLDER.parent
ROOT = TESTS.parent
START_TIMEOUT_S = 90.0
NUM_NODES = 2


class Helper:
    """One such process. Its requests may come from any thread; what it prints goes to a log."""

    def __init__(self, script: str, logs: Path, env: dict[str, str] | None = None, arguments: Sequence[str] = ()) -> None:
        path = os.pathsep.join([str(ROOT), str(TESTS)])
        with open(logs / f"{script}.log", "ab") as log:
            self._process = subprocess.Popen(
                # -P: what lies beside the script is no module of a driver's.
                [sys.executable, "-P", str(FOLDER / script), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONPATH": path, **(env or {})},
                cwd=ROOT,
                start_new_session=True,
                text=True,
            )
        self._asking = threading.Lock()
        self._answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._log = logs / f"{script}.log"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End its input, and wait until it has cleaned up."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._process.stdout.close()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        assert self._process.stdin is not None
        with self._asking:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return self.hear(START_TIMEOUT_S)

    def hear(self, timeout_s: float) -> dict[str, Any]:
        """Its next line.

        Raises:
            TimeoutError: none came.
            RuntimeError: it has ended.
        """
        try:
            answer = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError(f"no answer in {timeout_s:g} s; see {self._log}") from None
        if answer is None:
            self._answers.put(None)
            raise RuntimeError(f"the helper has ended:\n{self._log.read_text(errors='replace')[-2000:]}")
        return answer

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(json.loads(line))
        self._answers.put(None)


class Cluster(Helper):
    """A head without CPUs, which drivers connect to, and `NUM_NODES` nodes of one CPU: one actor on each.

    Args:
        logs: folder for what it prints, and for its token.
        env: more for the environment of its processes.
        arguments: of `cluster_process.py`.
    """

    def __init__(self, logs: Path, env: Mapping[str, str] | None = None, arguments: Sequence[str] = ()) -> None:
        self.token_path = new_token(logs)
        self._ray_folder = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
        env = {
            # Jobs find their cluster by a file there, which in /tmp/ray would be the one that was started last.
            "RAY_TMPDIR": self._ray_folder.name,
            **(env or {}),
            **private(self.token_path),
            # A node that was killed is found dead after 15 s otherwise.
            "RAY_health_check_initial_delay_ms": "1000",
            "RAY_health_check_period_ms": "300",
            "RAY_health_check_timeout_ms": "3000",
            "RAY_health_check_failure_threshold": "3",
        }
        super().__init__("cluster_process.py", logs, env, arguments)
        self._raylets: list[int] = []
        self.env = {**env, "RAY_ADDRESS": ""}
        """What a driver needs to connect."""
        try:
            self.env["RAY_ADDRESS"] = self.hear(START_TIMEOUT_S)["address"]
            self.restore()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        super().close()
        self._ray_folder.cleanup()

    @property
    def num_nodes(self) -> int:
        """Nodes that can have an actor."""
        return len(self._raylets)

    def add_node(self) -> None:
        """A new node joins."""
        self._raylets.append(self.ask(do="add")["raylet"])

    def kill_node(self) -> list[int]:
        """SIGKILL all processes of the node that joined first; their ids."""
        return list(self.ask(do="kill", raylet=self._raylets.pop(0))["killed"])

    def drain_node(self) -> int:
        """Give the node that joined first notice, as a cloud does before it takes a spot instance away; its raylet."""
        answer = self.ask(do="drain", raylet=self._raylets[0])
        assert answer["accepted"], answer
        return self._raylets[0]

    def restore(self) -> None:
        """Let as many nodes join as are missing."""
        while self.num_nodes < NUM_NODES:
            self.add_node()

    def actors(self) -> list[psutil.Process]:
        """Processes that run an `Extractor`. Those of a driver that was killed are among them for a moment."""
        return actors_below(self._raylets)


class Autoscaled(Helper):
    """A head without CPUs, and Ray's autoscaler, which adds nodes of one CPU and one GPU where they are asked for."""

    def __init__(self, logs: Path) -> None:
        env = private(new_token(logs))
        super().__init__("autoscaling_process.py", logs, env)
        self.env = {**env, "RAY_ADDRESS": ""}
        """What a driver needs to connect."""
        try:
            self.env["RAY_ADDRESS"] = self.hear(START_TIMEOUT_S)["address"]
        except BaseException:
            self.close()
            raise

    @property
    def num_nodes(self) -> int:
        """Nodes that there are now, besides the head."""
        return int(self.ask(do="nodes")["nodes"])


def new_token(folder: Path) -> Path:
    """A file with a token for one cluster: nobody else on this machine can run code there."""
    path = folder / "auth_token"
    path.write_text(secrets.token_hex(32))
    path.chmod(0o600)
    return path


def private(token_path: Path) -> dict[str, str]:
    """Environment of a cluster that nobody else on this machine has to do with."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Means here: 127.0.0.1 stays what it is, for the cluster and for what connects to it.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Actors are as nice as the rest of the run.
        "RAY_worker_niceness": "0",
    }


def actors_below(parents: Sequence[int]) -> list[psutil.Process]:
    """Processes below these that run an `Extractor`: Ray names them after their class."""
    found = []
    for parent in parents:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(parent).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    if "".join(process.cmdline()).startswith("ray::Extractor"):
                        found.append(process)
    return found


class Drivers(Helper):
    """Forks `pipeline …` from a process that has imported torch and Ray. One at a time."""

    def __init__(self, logs: Path, env: dict[str, str]) -> None:
        super().__init__("driver_process.py", logs, env)  # Ray reads its settings when it is imported
        self._logs = logs
        self._number = 0
        self._running: Driver | None = None
        try:
            self.hear(START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    def start(self, *arguments: str | Path) -> Driver:
        """Start `pipeline` with these arguments."""
        assert self._running is None or self._running.code is not None, "one at a time"
        self._number += 1
        stdout, stderr = (self._logs / f"driver-{self._number}.{name}" for name in ("out", "err"))
        order = {"arguments": [str(each) for each in arguments], "stdout": str(stdout), "stderr": str(stderr)}
        self._running = Driver(self, self.ask(**order)["pid"], stdout, stderr)
        return self._running

    def close(self) -> None:
        if self._running is not None:
            self._running.kill()
        super().close()


class Driver:
    """A process that runs one command to its end, unless it is killed."""

    def __init__(self, drivers: Drivers, pid: int, stdout: Path, stderr: Path) -> None:
        self._drivers, self._stdout, self._stderr = drivers, stdout, stderr
        self.pid = pid
        self._process = psutil.Process(pid)
        self.code: int | None = None
        """Exit code once it has ended; the negative number of the signal that killed it."""
        self.was_killed = False

    def wait(self, timeout_s: float) -> int | None:
        """Its exit code, None when it has not ended by then."""
        if self.code is None:
            with contextlib.suppress(TimeoutError):
                self.code = self._drivers.hear(timeout_s)["code"]
        return self.code

    def kill(self) -> None:
        """SIGKILL, unless it has ended."""
        if self.code is None:
            self.was_killed = True
            with contextlib.suppress(psutil.NoSuchProcess):
                self._process.kill()

    @property
    def stderr(self) -> str:
        """What it has said so far."""
        return self._stderr.read_text(errors="replace")

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return self._stdout.read_text(errors="replace")
