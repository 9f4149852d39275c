"""An HTTP proxy between an S3 client and its server that records every request and injects faults.

In: the client's signed bytes, forwarded unchanged, with the `Host` that the client signed. Out: the server's responses, with
their chunks joined. Whole bodies are held in memory, one upstream connection serves one request, and there is no TLS.

with FaultProxy(server.endpoint_url) as proxy:
    proxy.add(Rule(lambda request: request.method == "PUT" and "_delta_log" in request.path, swallow, times=1))
    ... a client of `proxy.endpoint_url` ...
    assert proxy.count("PUT", "_delta_log") == 2
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from http import HTTPStatus
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

RECORDED_HEADERS = ("range", "if-match", "if-none-match")
SLOW_STEP_S = 0.05
"""Pause between the pieces of a slow response."""


@dataclass(slots=True)
class Request:
    """One request as it came in; `status` and `num_bytes` are filled before the client sees the response."""

    method: str
    path: str
    """Without percent-encoding, like `query`."""
    query: str
    headers: dict[str, str]
    """Those of `RECORDED_HEADERS` that there were."""
    num_sent_bytes: int
    """Size of the request's body."""
    status: int | None = None
    """What the client got; what the server answered if the client got nothing; None if nobody answered."""
    num_bytes: int = 0
    """Size of the response's body as far as it was sent."""

    def matches(self, method: str | None = None, contains: str | None = None) -> bool:
        """Whether it has this method and this text in `path?query`; None matches all."""
        return method in (None, self.method) and (contains or "") in f"{self.path}?{self.query}"


@dataclass(slots=True)
class Response:
    """A response with its whole body."""

    status: int
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes
    cut: bool = False
    """Whether the connection is closed after it."""
    bytes_per_s: float | None = None
    """How fast it is sent; None as fast as it goes."""


Forward = Callable[[], Awaitable[Response]]
"""Sends the request to the server and waits for its response."""
Action = Callable[[Request, Forward], Awaitable[Response | None]]
"""What happens to a request; None closes the connection without a response."""


@dataclass(slots=True)
class Rule:
    """Applies `action` to the requests that `match`, at most `times`, each with `probability`."""

    match: Callable[[Request], bool]
    action: Action
    times: int | None = None
    probability: float = 1.0
    num_applied: int = field(default=0, init=False)


async def drop(request: Request, forward: Forward) -> None:
    """Close the connection; the server never hears of it."""


async def swallow(request: Request, forward: Forward) -> None:
    """Let the server act, then close the connection without its response."""
    await forward()


def delay(seconds: float) -> Action:
    """Wait, then forward."""

    async def action(request: Request, forward: Forward) -> Response:
        await asyncio.sleep(seconds)
        return await forward()

    return action


def hold(event: threading.Event) -> Action:
    """Wait until `event` is set, then forward."""

    async def action(request: Request, forward: Forward) -> Response:
        while not event.is_set():
            await asyncio.sleep(0.01)
        return await forward()

    return action


def truncate(num_bytes: int) -> Action:
    """Send the first `num_bytes` of the response's body, then close the connection."""

    async def action(request: Request, forward: Forward) -> Response:
        response = await forward()
        response.body, response.cut = response.body[:num_bytes], True
        return response

    return action


def slow(bytes_per_s: float) -> Action:
    """Send the response no faster than this."""

    async def action(request: Request, forward: Forward) -> Response:
        response = await forward()
        response.bytes_per_s = bytes_per_s
        return response

    return action


def status(code: int, error: str = "SlowDown") -> Action:
    """Answer with an S3 error; the server never hears of it."""
    body = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{error}</Code><Message>injected</Message></Error>".encode()

    async def action(request: Request, forward: Forward) -> Response:
        headers = {"content-type": "application/xml", "content-length": str(len(body))}
        return Response(code, headers, b"" if request.method == "HEAD" else body)

    return action


def rewrite(function: Callable[[bytes], bytes]) -> Action:
    """Replace the response's body by `function` of it."""

    async def action(request: Request, forward: Forward) -> Response:
        response = await forward()
        response.body = function(response.body)
        response.headers["content-length"] = str(len(response.body))
        return response

    return action


class FaultProxy:
    """Listens on a free port of 127.0.0.1 in a thread of its own. The first rule that applies to a request decides.

    `seed` decides which requests are hit by rules with a probability, given their order. When the server cannot be reached
    the connection is closed. An exception in a rule closes the connection and is raised again by `close()`.

    It needs the GIL: deltalake 1.6.6 holds it in `is_deltatable`, `history`, `restore` and `alter.*`, so that these wait for
    their timeout (30 s, six times) unless they run in another process than the proxy.
    """

    def __init__(self, upstream_endpoint: str, *, seed: int = 0) -> None:
        self._upstream = urlsplit(upstream_endpoint)
        self._random = random.Random(seed)
        self._lock = threading.RLock()  # a rule may count
        self._requests: list[Request] = []
        self._rules: list[Rule] = []
        self._errors: list[Exception] = []
        self._tasks: set[asyncio.Task[None]] = set()
        started: Future[int] = Future()
        self._thread = threading.Thread(target=asyncio.run, args=[self._run(started)], name="fault-proxy", daemon=True)
        self._thread.start()
        self.endpoint_url = f"http://127.0.0.1:{started.result(timeout=10)}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection and end the thread; raises what went wrong in a rule."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join()
        if self._errors:
            raise self._errors.pop()

    def add(self, rule: Rule) -> Rule:
        """Apply `rule` from now on, after those added before."""
        with self._lock:
            self._rules.append(rule)
        return rule

    def remove_rules(self) -> None:
        """Forward everything again."""
        with self._lock:
            self._rules.clear()

    @property
    def requests(self) -> list[Request]:
        """Every request since the last `clear()`, in order of arrival; one appears before its rule acts."""
        with self._lock:
            return list(self._requests)

    def clear(self) -> None:
        """Forget the requests so far; rules stay."""
        with self._lock:
            self._requests.clear()

    def count(self, method: str | None = None, contains: str | None = None) -> int:
        """Number of requests with this method and this text in `path?query`."""
        return sum(request.matches(method, contains) for request in self.requests)

    async def _run(self, started: Future[int]) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        started.set_result(server.sockets[0].getsockname()[1])
        await self._stopped.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """All requests of one connection."""
        try:
            while await self._answer(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # one of the two sides left
        except asyncio.CancelledError:
            writer.transport.abort()
            raise
        except Exception as error:
            self._errors.append(error)
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; whether the connection stays open."""
        head, first, headers = await _read_head(reader)
        if headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        wire, body = await _read_body(reader, headers)
        method, target, _ = first.split(" ")
        path, _, query = target.partition("?")
        recorded = {name: headers[name] for name in RECORDED_HEADERS if name in headers}
        request = Request(method, unquote(path), unquote(query), recorded, len(body))

        async def forward() -> Response:
            response = await self._forward(method, head + wire)
            request.status = response.status
            return response

        action = self._record(request)
        response = await (action(request, forward) if action else forward())
        if response is None:
            return False
        request.status, request.num_bytes = response.status, len(response.body)
        lines = [f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in response.headers.items()]
        payload = "\r\n".join([*lines, "", ""]).encode("latin-1") + response.body
        if response.bytes_per_s is not None:
            piece = max(1, int(response.bytes_per_s * SLOW_STEP_S))
            while len(payload) > piece:
                writer.write(payload[:piece])
                await writer.drain()
                payload = payload[piece:]
                await asyncio.sleep(SLOW_STEP_S)
        writer.write(payload)
        await writer.drain()
        return not response.cut and "close" not in (headers.get("connection"), response.headers.get("connection"))

    def _record(self, request: Request) -> Action | None:
        with self._lock:
            self._requests.append(request)
            for rule in self._rules:
                is_due = rule.times is None or rule.num_applied < rule.times
                if is_due and rule.match(request) and (rule.probability >= 1 or self._random.random() < rule.probability):
                    rule.num_applied += 1
                    return rule.action
        return None

    async def _forward(self, method: str, payload: bytes) -> Response:
        reader, writer = await asyncio.open_connection(self._upstream.hostname, self._upstream.port)
        try:
            writer.write(payload)  # not awaited: the server may refuse before it has read everything
            code = 100
            while code < 200:  # 100 Continue comes before the response proper
                _, first, headers = await _read_head(reader)
                code = int(first.split(" ")[1])
            body = b""
            if method != "HEAD" and code not in (204, 304):
                _, body = await _read_body(reader, headers)
                headers.pop("transfer-encoding", None)
                headers["content-length"] = str(len(body))
            return Response(code, headers, body)
        finally:
            writer.transport.abort()


async def _read_head(reader: asyncio.StreamReader) -> tuple[bytes, str, dict[str, str]]:
    """The bytes up to the empty line, the first line, and the headers with their names in lower case."""
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").strip().split("\r\n")
    fields = (line.partition(":") for line in lines)
    return head, first, {name.lower(): value.strip() for name, _, value in fields}


async def _read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> tuple[bytes, bytes]:
    """The body as it is on the wire, and without the framing of its chunks."""
    if "chunked" not in headers.get("transfer-encoding", ""):
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        return body, body
    wire, chunks, size = bytearray(), bytearray(), -1
    while size:
        line = await reader.readuntil(b"\n")
        size = int(line.partition(b";")[0], 16)
        chunk = await reader.readexactly(size)
        wire += line + chunk
        chunks += chunk
        end = b""
        while end != b"\r\n":  # after the last chunk there may be trailers
            end = await reader.readuntil(b"\n")
            wire += end
    return bytes(wire), bytes(chunks)
