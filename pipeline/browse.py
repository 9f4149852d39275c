"""Pages to look around in a dataset, served on this machine alone: rows at random, the neighbours of one or of an image that is
uploaded, a filter, the quarantine. Nothing is written and nothing is run.

In: an opened version. Out: an ASGI application. It answers who has its token, at its own address, and nobody else: another
page in the same browser can neither read it nor make it work. All pages are made here and run no script.

Memory: `KEPT_ROWS` rows without embeddings, `KEPT_PICTURES` small pictures of about 10 kB, what a search takes, and the model
once an image is uploaded. One search and one embedding at a time.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from urllib.parse import urlencode

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from pipeline.analysis import search as searches
from pipeline.analysis.search import Answer, Query
from pipeline.config import RESERVED_COLUMNS
from pipeline.dataset import filter as filters
from pipeline.dataset.read import Dataset
from pipeline.errors import ConfigError, DatasetError, PipelineError, SampleError
from pipeline.imports import importing
from pipeline.report import facts
from pipeline.report.page import Decode, Thumbnail, Tile, render, short
from pipeline.report.pictures import Pictures

if TYPE_CHECKING:
    from pipeline.extract.embedder import Embedder

HOST = "127.0.0.1"
SHOWN = 48
"""Rows of a page."""
KEPT_ROWS, KEPT_PICTURES, KEPT_UPLOADS = 20_000, 2_000, 50
MAX_UPLOAD_BYTES = 64 << 20
MAX_PICTURES_AT_ONCE = 4
MAX_QUARANTINED = 500
"""Samples that the page of the quarantine names."""
MAX_LABELS = 200
"""Labels that are offered."""
SEPARATOR = ";"
"""Between the conditions of a filter."""
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'; "
        "base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}

K = TypeVar("K")
V = TypeVar("V")


class Kept(Generic[K, V]):
    """The newest few values by their keys."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self._values: collections.OrderedDict[K, V] = collections.OrderedDict()

    def get(self, key: K) -> V | None:
        """The value, which is the newest now."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: K, value: V) -> None:
        """Keep one more, and drop the oldest."""
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > self._most:
                self._values.popitem(last=False)


class Browser:
    """The pages of one version."""

    def __init__(self, dataset: Dataset, decode: Decode, node: str | None = None) -> None:
        """Open it.

        Args:
            dataset: the version.
            decode: is called with images that may come from anyone.
            node: embedding column to search in; the first one when left out.

        Raises:
            DatasetError: no such column.
        """
        self._dataset, self._decode, self._node = dataset, decode, dataset.node(node)
        self._rows: Kept[int, dict[str, Any]] = Kept(KEPT_ROWS)
        self._pictures: Kept[int, Thumbnail] = Kept(KEPT_PICTURES)
        self._uploads: Kept[str, tuple[Query, Thumbnail]] = Kept(KEPT_UPLOADS)
        self._searching, self._embedding = threading.Lock(), threading.Lock()
        self._decoding = threading.Semaphore(MAX_PICTURES_AT_ONCE)
        self._embedder: Embedder | None = None
        self._labels: list[str] | None = None

    def application(self, token: str) -> Starlette:
        """What a server runs.

        Args:
            token: whoever comes with it is let in.
        """
        return Starlette(
            routes=[
                Route("/", self.start),
                Route("/rows/{position:int}", self.row),
                Route("/uploads", self.upload, methods=["POST"]),
                Route("/uploads/{name}", self.uploaded),
                Route("/quarantine", self.quarantine),
                Route("/pictures/{position:int}", self.picture),
                Route("/favicon.ico", lambda request: Response(status_code=204)),  # every browser asks for one
            ],
            middleware=[
                Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"], www_redirect=False),
                Middleware(BaseHTTPMiddleware, dispatch=_guard(token)),
            ],
            exception_handlers={PipelineError: self._failed, HTTPException: self._failed},
        )

    # Pages

    def start(self, request: Request) -> Response:
        """Rows at random, of those that the filter leaves."""
        where = request.query_params.get("where", "")
        condition = self._condition(where)
        if condition is None:
            positions_M, count = None, len(self._dataset)
        else:
            with self._searching:
                positions_M = self._dataset.positions(condition)
            count = len(positions_M)
        seed = request.query_params.get("seed", "0")
        random = np.random.default_rng(int(seed) if seed.isdecimal() else 0)
        chosen_M = np.sort(random.choice(count, min(SHOWN, count), replace=False)) if count else np.empty(0, np.int64)
        shown_M = chosen_M if positions_M is None else positions_M[chosen_M]
        more = urlencode({**({"where": where} if where else {}), "seed": random.integers(1 << 30)})
        text = f"{len(shown_M):,} of {count:,} rows{' with ' + where if where else ''}, at random."
        return self._html("Rows", text=text, tiles=self._tiles(shown_M), where=where, more=f"/?{more}" if count > SHOWN else "")

    def row(self, request: Request) -> Response:
        """The rows nearest to one of the dataset."""
        position = int(request.path_params["position"])
        row = self._known([position])[0]
        vector_D = self._dataset.to_numpy(self._node, np.array([position]))[0]
        query = Query(name=row["key"], vector_D=vector_D, row=row)
        return self._neighbours(request, query, Tile.of(row, self._placed(position)), "row")

    def uploaded(self, request: Request) -> Response:
        """The rows nearest to an image that was uploaded."""
        found = self._uploads.get(request.path_params["name"])
        if found is None:
            raise HTTPException(404, "this image is not kept any more: upload it again")
        query, thumbnail = found
        return self._neighbours(request, query, Tile(thumbnail=thumbnail, key=short(query.name)), "image")

    async def upload(self, request: Request) -> Response:
        """Embed an image, and lead to the rows nearest to it."""
        from starlette.concurrency import run_in_threadpool

        length = request.headers.get("content-length", "")
        if not length.isdecimal() or int(length) > MAX_UPLOAD_BYTES:
            raise HTTPException(413, f"an image may have {MAX_UPLOAD_BYTES >> 20} MiB")
        async with request.form(max_files=1, max_fields=4) as form:
            file = form.get("image")
            if file is None or isinstance(file, str):
                raise HTTPException(400, "no image was sent")
            name, data = file.filename or "image", await file.read()
            where = str(form.get("where") or "")
        vector_D, thumbnail = await run_in_threadpool(self._embedded, name, data)
        place = secrets.token_urlsafe(12)
        self._uploads.put(place, (Query(name=name, vector_D=vector_D), thumbnail))
        return RedirectResponse(f"/uploads/{place}" + (f"?{urlencode({'where': where})}" if where else ""), 303)

    def quarantine(self, request: Request) -> Response:
        """What could not be embedded."""
        rows = self._dataset.quarantine()
        with self._decoding:
            kinds = facts.quarantine(rows, Pictures(self._dataset, self._decode))
        named = [
            {"key": short(row.key), "shard": short(row.shard.rpartition("/")[2]), "stage": row.stage, "error": row.error,
             "message": short(row.message)}
            for row in rows[:MAX_QUARANTINED]
        ]  # fmt: skip
        return self._html("Quarantine", quarantine=kinds, named=named, num_all=len(rows))

    def picture(self, request: Request) -> Response:
        """The small picture of a row."""
        position = int(request.path_params["position"])
        thumbnail = self._pictures.get(position)
        if thumbnail is None:
            row = self._known([position])[0]
            with self._decoding:
                (image,) = self._dataset.images_of([row])
                thumbnail = Thumbnail.made(image, self._decode, f"{row['url']}: ")
            self._pictures.put(position, thumbnail)
        if not thumbnail.jpeg:
            return PlainTextResponse(thumbnail.why, 404)
        return Response(thumbnail.jpeg, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

    # Parts

    def _neighbours(self, request: Request, query: Query, tile: Tile, kind: str) -> Response:
        where = request.query_params.get("where", "")
        start = time.monotonic()
        with self._searching:
            (answer,) = searches.answers(self._dataset, [query], SHOWN, node=self._node, where=self._condition(where))
        text = f"The rows nearest to this {kind} among {len(self._dataset):,}{', with ' + where if where else ''}, "
        text += f"by the cosine of {self._node}; found in {time.monotonic() - start:.2f} s."
        return self._html("Nearest neighbours", text=text, tiles=self._found(answer), where=where, query=tile, kind=kind)

    def _found(self, answer: Answer) -> list[tuple[Tile, str]]:
        label = answer.query.row.get("label") if answer.query.row is not None else None
        tiles = []
        for rank, (position, score, row) in enumerate(
            zip(answer.neighbours.positions.tolist(), answer.neighbours.scores.tolist(), answer.rows(), strict=True), 1
        ):
            self._rows.put(position, row)
            tile = dataclasses.replace(
                Tile.of(row, self._placed(position)),
                score=f"{score:.4f}",
                rank=rank,
                is_same=label is not None and row.get("label") == label,
            )
            tiles.append((tile, f"/rows/{position}"))
        return tiles

    def _tiles(self, positions_M: NDArray[np.int64]) -> list[tuple[Tile, str]]:
        rows = self._known(positions_M.tolist())
        return [
            (Tile.of(row, self._placed(position)), f"/rows/{position}")
            for position, row in zip(positions_M.tolist(), rows, strict=True)
        ]

    def _placed(self, position: int) -> Thumbnail:
        """A picture that the page asks for, or why there is none where that is known."""
        made = self._pictures.get(position)
        return made if made is not None and not made.jpeg else Thumbnail(uri=f"/pictures/{position}")

    def _known(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """Rows without their embeddings."""
        rows = {position: self._rows.get(position) for position in positions}
        missing = [position for position, row in rows.items() if row is None]
        if missing:
            for position, row in zip(missing, self._dataset.take(missing, self._dataset.columns).to_pylist(), strict=True):
                rows[position] = row
                self._rows.put(position, row)
        return [row for position in positions if (row := rows[position]) is not None]

    def _condition(self, where: str) -> pc.Expression | None:
        conditions = [each for each in where.split(SEPARATOR) if each.strip()]
        return filters.parse(conditions, self._dataset.schema)

    def _embedded(self, name: str, data: bytes) -> tuple[NDArray[np.float32], Thumbnail]:
        with self._embedding:
            if self._embedder is None:
                with importing():
                    from pipeline.extract.embedder import Embedder
                self._embedder = Embedder(self._dataset.recipe)
            columns, errors = self._embedder.embed([data])
        if errors:
            raise ConfigError(f"{name}: {errors[0]}")
        return columns[self._node][0], Thumbnail.made(data, self._decode)

    def labels(self) -> list[str]:
        """Labels to choose from, the most frequent of the first rows first."""
        if self._labels is None:
            found: collections.Counter[str] = collections.Counter()
            if "label" in self._dataset.columns:
                for batch in self._dataset.iter_batches(["label"], 65_536):
                    found.update(str(each) for each in batch.column("label").to_pylist() if each is not None and each == each)
                    if found.total() > 100_000:
                        break
            self._labels = [label for label, _ in found.most_common(MAX_LABELS)]
        return self._labels

    def _html(self, title: str, status: int = 200, **values: Any) -> Response:
        dataset = self._dataset
        page = render(
            "browse.html",
            title=title,
            facts=[("dataset", short(dataset.url)), ("version", str(dataset.version)), ("rows", f"{len(dataset):,}")],
            columns=[name for name in dataset.columns if name == "label" or name not in RESERVED_COLUMNS],
            labels=self.labels(),
            num_quarantined=sum(entry.num_quarantined for entry in dataset.entries()),
            **{**_NOTHING, **values},
        )
        return HTMLResponse(page.encode("utf-8", "backslashreplace"), status)

    def _failed(self, request: Request, error: Exception) -> Response:
        """What went wrong, for a person."""
        if isinstance(error, HTTPException):
            status, text = error.status_code, error.detail
        else:
            kinds = {DatasetError: 404, ConfigError: 400, SampleError: 400}
            status, text = next((code for kind, code in kinds.items() if isinstance(error, kind)), 502), str(error)
        where = request.query_params.get("where", "")
        return self._html("That did not work", status, text=text, where=where)


_NOTHING: Mapping[str, Any] = {
    "text": "", "tiles": (), "where": "", "more": "", "query": None, "kind": "", "quarantine": None, "named": (), "num_all": 0,
}  # fmt: skip


def cookie_of(token: str) -> str:
    """Name of the cookie that holds a token: cookies know no ports, and two servers of one machine must not share theirs."""
    return f"frozen-pipeline-{hashlib.sha256(token.encode()).hexdigest()[:8]}"


def _guard(token: str) -> Callable[[Request, Callable[[Request], Awaitable[Response]]], Awaitable[Response]]:
    """Lets in who has the token: once in the address, from then on in a cookie that only this address gets."""

    cookie = cookie_of(token)

    async def dispatch(request: Request, proceed: Callable[[Request], Awaitable[Response]]) -> Response:
        if secrets.compare_digest(request.query_params.get("token", "").encode(), token.encode()):
            response: Response = RedirectResponse(request.url.path, 303)
            response.set_cookie(cookie, token, httponly=True, samesite="strict")
        elif secrets.compare_digest(request.cookies.get(cookie, "").encode(), token.encode()):
            response = await proceed(request)
        else:
            response = PlainTextResponse("open the address that `pipeline browse` has printed, with its token\n", 403)
        for name, value in HEADERS.items():
            response.headers[name] = value
        return response

    return dispatch


def serve(application: Starlette, port: int, ready: Callable[[int], None]) -> None:
    """Serve until the process is interrupted.

    Args:
        application: what `Browser.application` gives.
        port: to listen on; any free one for 0.
        ready: is told the port, once it listens.

    Raises:
        ConfigError: the port is taken, or not for us.
    """
    import socket

    import uvicorn

    with contextlib.closing(socket.socket()) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise ConfigError(f"port: {port}: {error}; 0 takes any that is free") from None
        listening.listen()
        settings = uvicorn.Config(application, log_level="warning", access_log=False, lifespan="off", server_header=False)
        with contextlib.suppress(KeyboardInterrupt):  # how it is meant to end
            ready(listening.getsockname()[1])
            uvicorn.Server(settings).run(sockets=[listening])
