"""A real S3 server for tests: SeaweedFS in a child process, bound to 127.0.0.1, its data in a folder that outlives a kill.

with S3Server(tmp_path) as server:
    server.create_bucket("photos")
    fs = s3fs.S3FileSystem(**server.s3fs_options(), skip_instance_cache=True, use_listings_cache=False)
    table = DeltaTable("s3://photos/table", storage_options=server.storage_options())
"""

from __future__ import annotations

import json
import os
import random
import secrets
import socket
import subprocess
import sysconfig
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

READY_TIMEOUT_S = 60
REGION = "us-east-1"
PORTS = range(20_000, 22_700)
"""With the second port that each one takes, 10,000 above, below Linux's ephemeral ports and above Ray's worker ports."""


class S3Server:
    """One server with a random secret, an identity that may do everything and one that may only read and list.

    `start()`, `kill()` and `restart()` may be called from any thread. `kill()` is a crash: SIGKILL, nothing is flushed.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory / "weed.log"
        self.access_key, self.secret_key = f"admin-{secrets.token_hex(4)}", secrets.token_hex(20)
        self.reader_access_key, self.reader_secret_key = f"reader-{secrets.token_hex(4)}", secrets.token_hex(20)
        self.ports = dict(zip(("s3", "master", "volume", "filer", "admin"), free_ports(5), strict=True))
        self.endpoint_url = f"http://127.0.0.1:{self.ports['s3']}"
        self._session = botocore.session.get_session()  # kept: it holds the parsed description of S3, 0.1 s each time
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()

    @property
    def pid(self) -> int | None:
        """The running server's process."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the server and wait until it stores an object.

        Raises:
            RuntimeError: it ended, or was not ready in `READY_TIMEOUT_S`; with the end of its log.
        """
        if self._process:
            raise RuntimeError(f"the server runs already, as process {self.pid}")
        (self.directory / "data").mkdir(parents=True, exist_ok=True)
        config = self.directory / "s3.json"
        config.write_text(json.dumps({"identities": [
            _identity(self.access_key, self.secret_key, "Admin", "Read", "Write", "List", "Tagging"),
            _identity(self.reader_access_key, self.reader_secret_key, "Read", "List"),
        ]}))  # fmt: skip
        command = [
            f"{sysconfig.get_path('scripts')}/weed", "-logtostderr=true", "mini", f"-dir={self.directory / 'data'}",
            # Without these it listens on every interface and reports to its makers.
            "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false",
            *(f"-{part}.port={port}" for part, port in self.ports.items()),
            "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
            f"-s3.config={config}", "-s3.autoCreateBucket=false", "-s3.allowDeleteBucketNotEmpty=false",
            # A master that resumes its state refuses the first heartbeat of the volume server: 5 to 16 s until the next.
            "-volume.max=100", "-master.volumeSizeLimitMB=128", "-master.resumeState=false",
        ]  # fmt: skip
        with self.log.open("ab") as log:
            # A session of its own: Ctrl-C reaches the tests, which then end the server.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env=os.environ | {"GOMEMLIMIT": "400MiB"},
            )  # fmt: skip
        # Its input ends when this process dies in any way. PR_SET_PDEATHSIG would fire when the *thread* that started it ends.
        self._guard = subprocess.Popen(
            ["sh", "-c", 'read -r _ || { kill -9 "$0"; rm -f "$@"; }', str(self.pid), *self._socket_files],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            self._wait_until_ready()
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """SIGKILL the server that `start()` started; does nothing when there is none."""
        if self._guard:
            # First, while the process id is still ours. A line rather than closing: a fork may hold the other end open.
            self._guard.communicate(b"\n")
            self._guard = None
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None
            for left_behind in self._socket_files:
                Path(left_behind).unlink(missing_ok=True)

    def restart(self) -> None:
        """Crash, and come back with the same ports, keys and data."""
        self.kill()
        self.start()

    def create_bucket(self, name: str) -> None:
        """Create an empty bucket; fine when it is there already."""
        self._call("create_bucket", Bucket=name)

    def s3fs_options(self, *, endpoint_url: str | None = None, reader: bool = False) -> dict[str, Any]:
        """Arguments for `s3fs.S3FileSystem`; `endpoint_url` names a proxy, `reader` takes the read-only identity."""
        key, secret = self._credentials(reader)
        return {"key": key, "secret": secret, "endpoint_url": endpoint_url or self.endpoint_url}

    def storage_options(self, *, endpoint_url: str | None = None, reader: bool = False) -> dict[str, str]:
        """The `storage_options` of deltalake and Polars."""
        key, secret = self._credentials(reader)
        return {
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_REGION": REGION,
            "AWS_ENDPOINT_URL": endpoint_url or self.endpoint_url,
            "AWS_ALLOW_HTTP": "true",
        }

    def env(self, *, endpoint_url: str | None = None, reader: bool = False) -> dict[str, str]:
        """Environment of a process whose botocore, s3fs and deltalake are to find this server by themselves."""
        return self.storage_options(endpoint_url=endpoint_url, reader=reader) | {"AWS_DEFAULT_REGION": REGION}

    @property
    def _socket_files(self) -> list[str]:
        """What a killed server leaves in /tmp."""
        plain = [f"/tmp/seaweedfs-{part}-{port}.sock" for part, port in self.ports.items()]
        return plain + [f"/tmp/seaweedfs-{part}-grpc-{port + 10_000}.sock" for part, port in self.ports.items()]

    def _credentials(self, reader: bool) -> tuple[str, str]:
        return (self.reader_access_key, self.reader_secret_key) if reader else (self.access_key, self.secret_key)

    def _wait_until_ready(self) -> None:
        assert self._process
        deadline, problem = time.monotonic() + READY_TIMEOUT_S, "no attempt was made"
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                # Listing works before the first volume takes an object.
                self.create_bucket("ready")
                self._call("put_object", Bucket="ready", Key="ready", Body=b"ready")
                return
            except (BotoCoreError, ClientError) as error:
                problem = str(error)
            time.sleep(0.05)
        log = self.log.read_text(errors="replace")[-4000:]
        raise RuntimeError(f"the S3 server is not ready (exit code {self._process.poll()}; {problem}); its log ends:\n{log}")

    def _call(self, operation: str, **arguments: Any) -> None:
        client = self._session.create_client(
            "s3",
            REGION,
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(connect_timeout=2, read_timeout=10, retries={"max_attempts": 0}),
        )
        try:
            getattr(client, operation)(**arguments)
        except client.exceptions.BucketAlreadyOwnedByYou:
            pass
        finally:
            client.close()


def free_ports(count: int) -> list[int]:
    """Ports on 127.0.0.1 that are free now, as is the port 10,000 above each."""
    found = []
    for port in random.sample(PORTS, len(PORTS)):
        if _is_free(port) and _is_free(port + 10_000):
            found.append(port)
            if len(found) == count:
                return found
    raise RuntimeError(f"found {len(found)} free pairs of ports in {PORTS}, {count} are needed")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _identity(access_key: str, secret_key: str, *actions: str) -> dict[str, Any]:
    return {"name": access_key, "credentials": [{"accessKey": access_key, "secretKey": secret_key}], "actions": actions}
