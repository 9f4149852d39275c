"""The S3 server and the fault proxy of the other tests: they do what they say."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import itertools
import os
import random
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import botocore.exceptions
import botocore.session
import pyarrow as pa
import pytest
import s3fs
from deltalake import DeltaTable, write_deltalake
from faults import FaultProxy, Request, Rule, delay, drop, hold, rewrite, slow, status, swallow, truncate
from s3 import S3Server

numbers = itertools.count()
botocore_session = botocore.session.get_session()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def bucket(server: S3Server) -> str:
    """An empty bucket for one test."""
    name = f"bucket-{next(numbers)}"
    server.create_bucket(name)
    return name


@pytest.fixture
def proxy(server: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(server.endpoint_url) as proxy:
        yield proxy


def filesystem(options: dict[str, Any], *, retries: bool = True) -> s3fs.S3FileSystem:
    config = {} if retries else {"config_kwargs": {"retries": {"max_attempts": 0}}}
    fs = s3fs.S3FileSystem(**options, **config, skip_instance_cache=True, use_listings_cache=False)
    if not retries:
        fs.retries = 1
    return fs


class RawClient:
    """`http.client` on one connection, with presigned URLs: no retries, and every response as it is."""

    def __init__(self, server: S3Server, proxy: FaultProxy) -> None:
        self._server, self._proxy = server, proxy
        self.connection = http.client.HTTPConnection(urlsplit(proxy.endpoint_url).netloc, timeout=20)

    def target(self, operation: str, path: str) -> str:
        client = botocore_session.create_client(
            "s3",
            "us-east-1",
            endpoint_url=self._proxy.endpoint_url,
            aws_access_key_id=self._server.access_key,
            aws_secret_access_key=self._server.secret_key,
        )
        with contextlib.closing(client):
            bucket, _, key = path.partition("/")
            url = urlsplit(client.generate_presigned_url(f"{operation}_object", {"Bucket": bucket, "Key": key}))
        return f"{url.path}?{url.query}"

    def __call__(self, operation: str, path: str, **arguments: Any) -> http.client.HTTPResponse:
        method = {"get": "GET", "put": "PUT", "head": "HEAD", "delete": "DELETE"}[operation]
        self.connection.request(method, self.target(operation, path), **arguments)
        return self.connection.getresponse()


@pytest.fixture
def raw(server: S3Server, proxy: FaultProxy) -> Iterator[RawClient]:
    client = RawClient(server, proxy)
    with contextlib.closing(client.connection):
        yield client


@pytest.fixture(scope="module")
def direct(server: S3Server) -> s3fs.S3FileSystem:
    """The server past any proxy."""
    return filesystem(server.s3fs_options())


@pytest.fixture
def photo(direct: s3fs.S3FileSystem, bucket: str) -> str:
    """An object of ten bytes."""
    direct.pipe_file(f"{bucket}/photo", b"0123456789")
    return f"{bucket}/photo"


def put(request: Request) -> bool:
    return request.method == "PUT"


def anything(request: Request) -> bool:
    return True


# The server


def test_server_puts_gets_lists_and_deletes(direct: s3fs.S3FileSystem, bucket: str) -> None:
    direct.pipe_file(f"{bucket}/folder/a", b"abc")
    direct.pipe_file(f"{bucket}/folder/b", b"")
    assert direct.cat_file(f"{bucket}/folder/a") == b"abc"
    assert direct.find(bucket) == [f"{bucket}/folder/a", f"{bucket}/folder/b"]
    direct.rm_file(f"{bucket}/folder/a")
    assert direct.find(bucket) == [f"{bucket}/folder/b"]
    with pytest.raises(FileNotFoundError):
        direct.cat_file(f"{bucket}/folder/a")


def test_create_bucket_may_be_repeated(server: S3Server, direct: s3fs.S3FileSystem, photo: str) -> None:
    server.create_bucket(photo.partition("/")[0])
    assert direct.exists(photo)


@pytest.mark.parametrize("wrong", [{"secret": "wrong"}, {"key": "nobody"}, {"key": None, "secret": None, "anon": True}])
def test_wrong_credentials_are_refused(server: S3Server, bucket: str, wrong: dict[str, Any]) -> None:
    fs = filesystem(server.s3fs_options() | wrong)
    with pytest.raises(PermissionError):
        fs.pipe_file(f"{bucket}/a", b"abc")
    with pytest.raises(PermissionError):
        fs.find(bucket)


def test_reader_reads_and_lists_but_cannot_write(server: S3Server, direct: s3fs.S3FileSystem, photo: str) -> None:
    bucket = photo.partition("/")[0]
    reader = filesystem(server.s3fs_options(reader=True))
    assert reader.cat_file(photo) == b"0123456789"
    assert reader.find(bucket) == [photo]
    for write in (
        lambda: reader.pipe_file(f"{bucket}/new", b"abc"),
        lambda: reader.pipe_file(photo, b"abc"),
        lambda: reader.rm_file(photo),
        lambda: reader.mkdir("of-the-reader"),
    ):
        with pytest.raises(PermissionError):
            write()
    assert direct.cat_file(photo) == b"0123456789"


def test_env_is_enough_for_another_process(server: S3Server, photo: str) -> None:
    bucket = photo.partition("/")[0]
    script = f"""
        import pyarrow as pa, s3fs
        from deltalake import DeltaTable, write_deltalake
        assert s3fs.S3FileSystem().cat_file("{photo}") == b"0123456789"
        write_deltalake("s3://{bucket}/table", pa.table({{"x": [1, 2]}}))
        assert DeltaTable("s3://{bucket}/table").version() == 0
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | server.env()
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment, check=True, timeout=60)


def test_server_listens_on_loopback_only(server: S3Server) -> None:
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            address, state = line.split()[1], line.split()[3]
            host, _, port = address.partition(":")
            if state == "0A" and int(port, 16) % 10_000 in {port % 10_000 for port in server.ports.values()}:
                listening.append((host, int(port, 16)))
    assert {host for host, _ in listening} == {"0100007F"}
    assert {port for _, port in listening} == {port + above for port in server.ports.values() for above in (0, 10_000)}


def test_data_survives_a_crash(server: S3Server, direct: s3fs.S3FileSystem, photo: str) -> None:
    pid = server.pid
    server.kill()
    assert pid is not None
    assert not is_alive(pid)
    with pytest.raises(botocore.exceptions.EndpointConnectionError):
        filesystem(server.s3fs_options(), retries=False).cat_file(photo)
    server.start()
    assert direct.cat_file(photo) == b"0123456789"
    direct.pipe_file(photo, b"after")
    server.restart()
    assert direct.cat_file(photo) == b"after"


def test_restart_in_a_thread_outlives_the_thread(server: S3Server, direct: s3fs.S3FileSystem, photo: str) -> None:
    thread = threading.Thread(target=server.restart)
    thread.start()
    thread.join()
    assert direct.cat_file(photo) == b"0123456789"


def test_server_dies_with_its_process(tmp_path: Path) -> None:
    script = f"""
        import pathlib, s3, time
        server = s3.S3Server(pathlib.Path({str(tmp_path)!r}))
        server.start()
        print(server.pid, flush=True)
        time.sleep(100)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, cwd=Path(__file__).parent
    ) as owner:
        assert owner.stdout
        pid = int(owner.stdout.readline())
        assert is_alive(pid)
        os.kill(owner.pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid))


def test_server_that_cannot_start_shows_its_log(tmp_path: Path) -> None:
    server = S3Server(tmp_path)
    with socket.create_server(("127.0.0.1", server.ports["master"])), pytest.raises(RuntimeError, match="is not available on"):
        server.start()
    assert server.pid is None


# The proxy


def test_proxy_counts_exactly(server: S3Server, proxy: FaultProxy, bucket: str) -> None:
    fs = filesystem(server.s3fs_options(endpoint_url=proxy.endpoint_url))
    fs.pipe_file(f"{bucket}/a b=c/photo", b"0123456789")
    fs.cat_file(f"{bucket}/a b=c/photo", start=2, end=5)
    fs.find(f"{bucket}/a b=c")
    with pytest.raises(OSError, match="pre-conditions"):
        fs.pipe_file(f"{bucket}/a b=c/photo", b"again", mode="create")
    fs.rm_file(f"{bucket}/a b=c/photo")
    path = f"/{bucket}/a b=c/photo"
    listing = proxy.requests[2]
    assert proxy.requests == [
        Request("PUT", path, "", {}, 10, 200, 0),
        Request("GET", path, "", {"range": "bytes=2-4"}, 0, 206, 3),
        Request("GET", f"/{bucket}", listing.query, {}, 0, 200, listing.num_bytes),
        Request("PUT", path, "", {"if-none-match": "*"}, 5, 412, proxy.requests[3].num_bytes),
        Request("DELETE", path, "", {}, 0, 204, 0),
    ]
    assert proxy.count() == 5
    assert proxy.count("PUT") == 2
    assert proxy.count(contains="prefix=a b=c/") == 1
    assert proxy.count("GET", "photo") == 1
    proxy.clear()
    assert proxy.requests == []


def test_large_bodies_pass_unchanged(server: S3Server, direct: s3fs.S3FileSystem, proxy: FaultProxy, bucket: str) -> None:
    fs = filesystem(server.s3fs_options(endpoint_url=proxy.endpoint_url))
    payload = random.Random(0).randbytes(20 << 20)
    fs.pipe_file(f"{bucket}/large", payload)
    assert hashlib.sha256(fs.cat_file(f"{bucket}/large")).digest() == hashlib.sha256(payload).digest()
    multipart = f"{bucket}/multipart"
    fs.pipe_file(multipart, payload, chunksize=8 << 20, max_concurrency=3)
    assert direct.cat_file(multipart) == payload
    with pytest.raises(PermissionError):
        filesystem(server.s3fs_options(endpoint_url=proxy.endpoint_url, reader=True)).pipe_file(f"{bucket}/large", payload)


def test_one_connection_serves_many_requests(raw: RawClient, proxy: FaultProxy, photo: str) -> None:
    ports = set()
    for operation, code, body in [("head", 200, b""), ("get", 200, b"0123456789"), ("delete", 204, b""), ("head", 404, b"")]:
        response = raw(operation, photo)
        assert (response.status, response.read()) == (code, body)
        ports.add(raw.connection.sock.getsockname()[1])
    assert len(ports) == 1
    assert [request.status for request in proxy.requests] == [200, 200, 204, 404]


def test_chunked_request(raw: RawClient, photo: str) -> None:
    headers = {"Transfer-Encoding": "chunked"}
    assert raw("put", photo, body=iter([b"abc", b"defg"]), headers=headers, encode_chunked=True).read() == b""
    assert raw("get", photo).read() == b"abcdefg"


def test_expect_100_continue(raw: RawClient, proxy: FaultProxy, photo: str) -> None:
    host, port = urlsplit(proxy.endpoint_url).netloc.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as client, client.makefile("rb") as answers:
        headers = [
            f"PUT {raw.target('put', photo)} HTTP/1.1",
            f"Host: {host}:{port}",
            "Content-Length: 3",
            "Expect: 100-continue",
        ]
        client.sendall("\r\n".join([*headers, "", ""]).encode())
        assert answers.readline() == b"HTTP/1.1 100 Continue\r\n"
        assert answers.readline() == b"\r\n"
        client.sendall(b"abc")
        assert answers.readline() == b"HTTP/1.1 200 OK\r\n"
    assert raw("get", photo).read() == b"abc"


class ChunkedHandler(BaseHTTPRequestHandler):
    """Answers in two chunks and a trailer, which SeaweedFS does not."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"3;name=value\r\nabc\r\n4\r\ndefg\r\n0\r\nTrailer: 1\r\n\r\n")

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def test_chunked_response() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), ChunkedHandler) as upstream:
        thread = threading.Thread(target=upstream.serve_forever)
        thread.start()
        with FaultProxy(f"http://127.0.0.1:{upstream.server_port}") as proxy:
            connection = http.client.HTTPConnection(urlsplit(proxy.endpoint_url).netloc, timeout=20)
            with contextlib.closing(connection):
                for _ in range(2):
                    connection.request("GET", "/")
                    assert connection.getresponse().read() == b"abcdefg"
        upstream.shutdown()
        thread.join()


def test_drop_does_not_reach_the_server(direct: s3fs.S3FileSystem, raw: RawClient, proxy: FaultProxy, bucket: str) -> None:
    rule = proxy.add(Rule(put, drop))
    with pytest.raises(http.client.RemoteDisconnected):
        raw("put", f"{bucket}/a", body=b"abc")
    assert rule.num_applied == 1
    assert proxy.requests[0].status is None
    assert not direct.exists(f"{bucket}/a")


def test_swallow_reaches_the_server(direct: s3fs.S3FileSystem, raw: RawClient, proxy: FaultProxy, bucket: str) -> None:
    proxy.add(Rule(put, swallow))
    with pytest.raises(http.client.RemoteDisconnected):
        raw("put", f"{bucket}/a", body=b"abc")
    assert proxy.requests[0].status == 200
    assert direct.cat_file(f"{bucket}/a") == b"abc"


def test_delay(raw: RawClient, proxy: FaultProxy, photo: str) -> None:
    proxy.add(Rule(anything, delay(0.3)))
    started = time.monotonic()
    assert raw("get", photo).read() == b"0123456789"
    assert time.monotonic() - started >= 0.3


def test_slow(raw: RawClient, proxy: FaultProxy, photo: str) -> None:
    proxy.add(Rule(anything, slow(1000)))
    started = time.monotonic()
    response = raw("get", photo)
    assert response.read() == b"0123456789"
    num_bytes = len(str(response.headers).encode()) + 10
    assert time.monotonic() - started >= num_bytes / 1000 - 0.1


def test_truncate(raw: RawClient, proxy: FaultProxy, photo: str) -> None:
    proxy.add(Rule(anything, truncate(4)))
    response = raw("get", photo)
    assert response.headers["Content-Length"] == "10"
    with pytest.raises(http.client.IncompleteRead) as caught:
        response.read()
    assert caught.value.partial == b"0123"
    assert proxy.requests[0].num_bytes == 4


def test_status_does_not_reach_the_server(direct: s3fs.S3FileSystem, raw: RawClient, proxy: FaultProxy, photo: str) -> None:
    proxy.add(Rule(anything, status(503)))
    for operation, contains in [("head", b""), ("put", b"<Code>SlowDown</Code>"), ("get", b"<Code>SlowDown</Code>")]:
        response = raw(operation, photo, body=b"abc" if operation == "put" else None)
        assert response.status == 503
        assert contains in response.read()
    assert direct.cat_file(photo) == b"0123456789"
    assert [request.status for request in proxy.requests] == [503, 503, 503]


def test_hold(raw: RawClient, proxy: FaultProxy, photo: str) -> None:
    event = threading.Event()
    proxy.add(Rule(anything, hold(event)))
    bodies: list[bytes] = []
    thread = threading.Thread(target=lambda: bodies.append(raw("get", photo).read()))
    thread.start()
    wait_until(lambda: proxy.count("GET", photo) == 1)
    thread.join(0.2)
    assert bodies == []
    assert proxy.requests[0].status is None
    event.set()
    thread.join(20)
    assert bodies == [b"0123456789"]


def test_close_ends_a_held_request(server: S3Server, photo: str) -> None:
    with FaultProxy(server.endpoint_url) as proxy:
        proxy.add(Rule(anything, hold(threading.Event())))
        raw = RawClient(server, proxy)
        raw.connection.request("GET", raw.target("get", photo))
        wait_until(lambda: proxy.count() == 1)
    with contextlib.closing(raw.connection), pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
        raw.connection.getresponse()


def test_rewrite_of_a_listing(server: S3Server, proxy: FaultProxy, bucket: str) -> None:
    def half(page: bytes) -> bytes:
        keep = itertools.cycle([True, False])
        return re.sub(rb"<Contents>.*?</Contents>", lambda found: found[0] if next(keep) else b"", page, flags=re.DOTALL)

    fs = filesystem(server.s3fs_options(endpoint_url=proxy.endpoint_url))
    fs.pipe({f"{bucket}/{number}": b"abc" for number in range(6)})
    proxy.add(Rule(lambda request: "list-type=2" in request.query, rewrite(half), times=1))
    assert fs.find(bucket) == [f"{bucket}/{number}" for number in (0, 2, 4)]
    assert len(fs.find(bucket)) == 6


def test_first_rule_that_applies_decides(raw: RawClient, proxy: FaultProxy, photo: str) -> None:
    proxy.add(Rule(put, drop))
    proxy.add(Rule(anything, status(500, "InternalError"), times=1))
    proxy.add(Rule(lambda request: proxy.count() == 2, status(429, "TooManyRequests")))
    codes = [(response.status, response.read())[0] for response in (raw("get", photo) for _ in range(3))]
    assert codes == [500, 429, 200]
    with pytest.raises(http.client.RemoteDisconnected):
        raw("put", photo, body=b"abc")
    proxy.remove_rules()
    assert raw("put", photo, body=b"abc").status == 200


def test_probability_follows_the_seed(server: S3Server, photo: str) -> None:
    def hits(seed: int) -> list[bool]:
        with FaultProxy(server.endpoint_url, seed=seed) as proxy:
            proxy.add(Rule(anything, status(503), probability=0.5))
            raw = RawClient(server, proxy)
            with contextlib.closing(raw.connection):
                for _ in range(40):
                    raw("get", photo).read()
            return [request.status == 503 for request in proxy.requests]

    first = hits(1)
    assert 5 < sum(first) < 35
    assert hits(1) == first
    assert hits(2) != first


def test_dead_server_closes_the_connection(server: S3Server, raw: RawClient, photo: str) -> None:
    server.kill()
    try:
        with pytest.raises(http.client.RemoteDisconnected):
            raw("get", photo)
    finally:
        server.start()
    assert raw("get", photo).read() == b"0123456789"


def test_mistake_in_a_rule_is_raised_at_the_end(server: S3Server, photo: str) -> None:
    proxy = FaultProxy(server.endpoint_url)
    proxy.add(Rule(lambda request: 1 / 0 > 0, drop))
    raw = RawClient(server, proxy)
    with contextlib.closing(raw.connection), pytest.raises(http.client.RemoteDisconnected):
        raw("get", photo)
    with pytest.raises(ZeroDivisionError):
        proxy.close()


# Clients through the proxy


@pytest.mark.parametrize("fault", [status(503), drop, swallow, truncate(3)])
def test_s3fs_tries_again(server: S3Server, proxy: FaultProxy, photo: str, fault: Any) -> None:
    fs = filesystem(server.s3fs_options(endpoint_url=proxy.endpoint_url))
    proxy.add(Rule(anything, fault, times=1))
    assert fs.cat_file(photo, start=0, end=10) == b"0123456789"
    assert proxy.count("GET") == 2


@pytest.mark.parametrize(
    ("fault", "error"),
    [(status(503), OSError), (drop, botocore.exceptions.ConnectionClosedError), (status(403, "AccessDenied"), PermissionError)],
)
def test_s3fs_gives_up(server: S3Server, proxy: FaultProxy, photo: str, fault: Any, error: type[Exception]) -> None:
    fs = filesystem(server.s3fs_options(endpoint_url=proxy.endpoint_url), retries=False)
    proxy.add(Rule(anything, fault))
    with pytest.raises(error):
        fs.cat_file(photo, start=0, end=10)


def test_delta_table_through_the_proxy(server: S3Server, proxy: FaultProxy, bucket: str) -> None:
    url, rows = f"s3://{bucket}/table", pa.table({"x": [1, 2, 3]})
    options = server.storage_options(endpoint_url=proxy.endpoint_url)
    write_deltalake(url, rows, storage_options=options)
    proxy.add(Rule(lambda request: put(request) and "_delta_log" in request.path, status(503), times=1))
    write_deltalake(url, rows, mode="append", storage_options=options)
    table = DeltaTable(url, storage_options=options)
    assert table.version() == 1
    assert table.to_pyarrow_table().num_rows == 6
    commits = [request for request in proxy.requests if put(request) and "_delta_log" in request.path]
    assert [request.status for request in commits] == [200, 503, 200]
    assert all(request.headers == {"if-none-match": "*"} for request in commits)


def test_reader_cannot_commit(server: S3Server, bucket: str) -> None:
    url, rows = f"s3://{bucket}/table", pa.table({"x": [1, 2, 3]})
    write_deltalake(url, rows, storage_options=server.storage_options())
    reader = server.storage_options(reader=True)
    assert DeltaTable(url, storage_options=reader).to_pyarrow_table().num_rows == 3
    with pytest.raises(Exception, match="lacked the necessary privileges"):
        write_deltalake(url, rows, mode="append", storage_options=reader)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
