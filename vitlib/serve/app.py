"""The HTTP app: routes over an Dispatcher. What they take and give: protocol.py, docs/serving.md.

How data flows: a route checks the key and whether there is room, takes the body within its limits,
has the dispatcher answer, and writes JSON (or .npy). Where the client goes away, the dispatcher
is told, and what was not begun is dropped.
"""

from __future__ import annotations

import asyncio
import io
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

import numpy as np
from fastapi import FastAPI, Security
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from vitlib import __version__
from vitlib.scores import TOP_K, Task, predict_labels
from vitlib.serve import forms, openapi
from vitlib.serve.bodies import body_format
from vitlib.serve.core import Kind
from vitlib.serve.dispatcher import Dispatcher
from vitlib.serve.encodings import content_encoding, decompress
from vitlib.serve.errors import RequestError, bad_images
from vitlib.serve.guard import (
    check_key,
    cors,
    error_response,
    read_body,
    too_large,
    wait_for_disconnect,
)
from vitlib.serve.protocol import InferenceRequest, Params, Writer, bad_request, parse_request
from vitlib.serve.settings import MIB, Settings
from vitlib.system.terminal import escape_surrogates

logger = logging.getLogger("vitlib")
Endpoint = Callable[[Request], Awaitable[Response]]
TASKS: dict[Task, str] = {  # as /version says them
    "single_label_classification": "single-label",
    "multi_label_classification": "multi-label",
    "regression": "regression",
}
PAGE = {"app.js": "text/javascript", "style.css": "text/css"}
POLICY = (  # of the page: nothing but this server's own
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Service:
    """The routes, and what they share."""

    def __init__(self, dispatcher: Dispatcher, settings: Settings, name: str) -> None:
        self.dispatcher, self.limits, self.metrics = dispatcher, settings.limits, dispatcher.metrics
        self.keys = [key.encode() for key in settings.api_keys]
        self.writer = Writer(dispatcher.core.labels, dispatcher.core.task)
        self.warm = self.draining = False
        cfg, calibration = dispatcher.core.predictor.model.config, dispatcher.core.calibration
        self.about = {
            "version": __version__,
            "model": name,
            "task": TASKS[dispatcher.core.task],
            "classes": len(dispatcher.core.labels) if cfg.num_classes else 0,
            "calibration": None if calibration is None else calibration.summary(),
            "answers": list(dispatcher.core.kinds),
            "max_images": self.limits.max_images,
            "max_body_mib": self.limits.max_body_mib,
        }

    # --- answers ----------------------------------------------------------------------------------

    async def score(self, request: Request) -> Response:
        """The model card's request, and MLflow's -> probabilities of every class, or the numbers of
        a regression."""
        body = await self._body(request)
        rows, params = await self._asked(request, "classify", body, Params())
        return Response(self.writer.answer(rows, params), media_type="application/json")

    async def invocations(self, request: Request) -> Response:
        """As score, in MLflow's wrapping."""
        body = await self._body(request)
        rows, params = await self._asked(request, "classify", body, Params())
        found = b'{"predictions":' + self.writer.answer(rows, params) + b"}"
        return Response(found, media_type="application/json")

    async def classify(self, request: Request) -> Response:
        """Photos -> the best labels of each, or the numbers of a regression."""
        query = forms.parse_query(
            request.query_params, {"top_k": int, "threshold": float, "on_error": str}
        )
        params = Params.of(query)
        params.check(self.dispatcher.core.task)
        rows, params = await self._photos(request, "classify", params)
        if params.format != Params.format:
            raise bad_request("params.format is for /score and /invocations")
        labels, core = self.writer.labels, self.dispatcher.core
        limits = core.engine.thresholds if params.threshold is None else params.threshold

        def entry(row: Any) -> Any:
            if isinstance(row, RequestError):
                return _plain(row)
            pairs = predict_labels(row, core.task, params.top_k or TOP_K, limits)
            return [{"label": labels[i], "score": s, "index": i} for i, s in pairs]

        return JSONResponse({"predictions": [entry(row) for row in rows]})

    async def embed(self, request: Request) -> Response:
        """Photos -> the vectors that the head reads, as JSON or .npy."""
        query = forms.parse_query(request.query_params, {"format": str, "on_error": str})
        form = forms.choice(query, "format", "json", "npy")
        rows, _ = await self._photos(request, "embed", Params.of(query))
        if form == "json":
            return JSONResponse({"embeddings": [_plain(row) for row in rows]})
        nan = np.full(self.dispatcher.core.engine.model.num_features, np.nan, np.float32)
        file = io.BytesIO()
        np.save(file, np.stack([nan if isinstance(row, RequestError) else row for row in rows]))
        return Response(file.getvalue(), media_type="application/octet-stream")

    async def attend(self, request: Request) -> Response:
        """Photos -> where the class token looks: rows of patches, 0..1; and the part of the photo
        that the model sees, as shares of its height and width."""
        query = forms.parse_query(request.query_params, {"on_error": str})
        rows, _ = await self._photos(request, "attend", Params.of(query))
        pairs = [(row, None) if isinstance(row, RequestError) else row for row in rows]
        return JSONResponse(
            {"maps": [_plain(one) for one, _ in pairs], "shown": [shown for _, shown in pairs]}
        )

    async def _body(self, request: Request) -> bytes:
        """The request's, if there is room: else it is refused before it is taken."""
        self.dispatcher.check_attention_memory()

        def take(size: int) -> None:
            self.dispatcher.take(size)
            request.state.held += size

        encoding = content_encoding(request)
        body = await read_body(request, self.limits, take)
        if encoding == "identity":
            return body
        most, error = self.limits.max_body_mib * MIB, too_large(self.limits)
        return await asyncio.to_thread(decompress, body, encoding, most, take, error)

    async def _asked(
        self, request: Request, kind: Kind, body: bytes, params: Params
    ) -> tuple[list[Any], Params]:
        """Rows of a JSON or CSV request, and how they are wanted: as it says, else by `params`."""
        form = body_format(request, body, photos=False)
        found: list[InferenceRequest] = []

        def images() -> Sequence[Any]:
            found.append(parse_request(body, "text/csv" if form == "csv" else ""))
            found[0].params.check(self.dispatcher.core.task)
            return found[0].images

        rows = await self._rows(request, kind, images)
        params = found[0].params.over(params)
        return self._checked(rows, kind, params.on_error), params

    async def _photos(
        self, request: Request, kind: Kind, params: Params
    ) -> tuple[list[Any], Params]:
        """Rows of photos as they are: the body, the files of a form, or JSON as score takes it."""
        body = await self._body(request)
        form = body_format(request, body, photos=True)
        if form == "form":
            photos = await forms.read_form(body, request.headers, self.limits)
        elif form == "photo":
            photos = [body]
        else:
            return await self._asked(request, kind, body, params)
        rows = await self._rows(request, kind, lambda: photos)
        return self._checked(rows, kind, params.on_error), params

    async def _rows(
        self, request: Request, kind: Kind, images: Callable[[], Sequence[Any]]
    ) -> list[Any]:
        """The dispatcher's rows, unless the client goes away before."""
        if kind not in self.dispatcher.core.kinds:
            can = ", ".join(self.dispatcher.core.kinds)
            raise RequestError(404, "not_found", f"this model cannot {kind}: it can {can}")
        work = asyncio.ensure_future(self.dispatcher.answer(kind, images))
        watch = asyncio.ensure_future(wait_for_disconnect(request))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientDisconnect
            return await work
        finally:
            work.cancel()
            watch.cancel()

    def _checked(self, rows: list[Any], kind: Kind, on_error: str) -> list[Any]:
        """The rows, where none is bad or bad ones are wanted in their places."""
        for row in rows:
            if isinstance(row, Exception) and not isinstance(row, RequestError):
                raise row
            if isinstance(row, RequestError) and row.status == 429:
                raise row
        wrong = [(i, row) for i, row in enumerate(rows) if isinstance(row, RequestError)]
        for index, row in wrong:
            row.index = index
        # Where the request fails, it is counted itself, by the first of them.
        for _, row in wrong[1:] if on_error == "fail" else wrong:
            self.metrics.errors.labels(row.code).inc()
        self.metrics.images.labels(kind).inc(len(rows) - len(wrong))
        if wrong and on_error == "fail":
            raise bad_images(len(rows), wrong)
        return rows

    # --- the rest ---------------------------------------------------------------------------------

    async def health(self, _: Request) -> Response:
        """The process is there."""
        return JSONResponse({"status": "ok"})

    async def is_ready(self, _: Request) -> Response:
        """It is warm, and not about to end."""
        ready = self.warm and not self.draining
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    async def version(self, _: Request) -> Response:
        """What runs here."""
        return JSONResponse(self.about)

    async def show_metrics(self, _: Request) -> Response:
        """For Prometheus."""
        text, kind = self.metrics.text()
        return Response(text, headers={"content-type": kind})

    def page(self, name: str, media_type: str) -> Endpoint:
        """A file of the page."""
        text = files("vitlib.serve").joinpath("page", name).read_bytes()
        headers = {
            "content-security-policy": POLICY,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
        }

        async def answer(_: Request) -> Response:
            return Response(text, media_type=media_type, headers=headers)

        return answer

    def wrap(self, route: str, endpoint: Endpoint) -> Endpoint:
        """An endpoint with key, errors as JSON, and its time and status counted."""

        async def answer(request: Request) -> Response:
            start = time.perf_counter()
            request.state.held = 0  # bytes of its body
            try:
                check_key(request, self.keys)
                found = await endpoint(request)
            except RequestError as error:
                self.metrics.errors.labels(error.code).inc()
                found = error_response(error)
            except ClientDisconnect:
                found = Response(status_code=499)
            except Exception:
                logger.exception("%s failed", route)
                self.metrics.errors.labels("internal").inc()
                found = error_response(
                    RequestError(500, "internal", "the server failed; it is logged")
                )
            finally:
                self.dispatcher.give(request.state.held)
            self.metrics.requests.labels(route, str(found.status_code)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - start)
            return found

        return answer

    def drain(self, seconds: float) -> None:
        """The server takes no connection more: from now on is_ready() says so, and after so many
        seconds what is not answered gets 503. Called by the event loop's thread."""
        self.draining = True
        asyncio.get_running_loop().call_later(seconds, self.dispatcher.abandon)

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Warm up beside the first requests; at the end answer all that was accepted."""

        def warm_up() -> None:
            self.dispatcher.warm_up()
            self.warm = True

        threading.Thread(target=warm_up, name="vitlib-warm-up", daemon=True).start()
        yield
        self.draining = True
        await asyncio.get_running_loop().run_in_executor(None, self.dispatcher.close)


def _plain(row: Any) -> Any:
    """An array as JSON has it, or what is wrong in its place."""
    return {"error": row.as_dict()} if isinstance(row, RequestError) else row.tolist()


def create_app(dispatcher: Dispatcher, settings: Settings, name: str) -> FastAPI:
    """The app for one dispatcher. name: of the model, as /version says it."""
    name = escape_surrogates(name)
    service = Service(dispatcher, settings, name)
    app = FastAPI(
        title="vitlib", version=__version__, lifespan=service.lifespan, redoc_url=None,
        description=f"{name}: photos in, labels and embeddings out.",
    )  # fmt: skip
    posts: tuple[tuple[str, Endpoint], ...] = (
        ("/score", service.score),
        ("/invocations", service.invocations),
        ("/classify", service.classify),
        ("/embed", service.embed),
        ("/attend", service.attend),
    )
    bodies = openapi.bodies(dispatcher.core.task)
    key = [Security(HTTPBearer(auto_error=False))] if settings.api_keys else []  # for /docs alone
    for route, endpoint in posts:
        app.add_api_route(
            route, _typed(service.wrap(route, endpoint)), methods=["POST"], dependencies=key,
            summary=(endpoint.__doc__ or "").split("\n")[0], openapi_extra=bodies[route],
            responses=openapi.answers(route, dispatcher.core.task), response_class=Response,
            name=route[1:],
        )  # fmt: skip
    gets: tuple[tuple[str, Endpoint], ...] = (
        ("/health", service.health),
        ("/ping", service.health),
        ("/ready", service.is_ready),
        ("/version", service.version),
        ("/metrics", service.show_metrics),
    )
    for route, endpoint in gets:
        wrapped = service.wrap(route, endpoint)
        app.add_api_route(
            route, _typed(wrapped), methods=["GET"], summary=endpoint.__doc__,
            response_class=Response, name=route[1:],
        )  # fmt: skip
        app.add_route(route, wrapped, methods=["HEAD"], include_in_schema=False)
    app.add_route("/", service.page("index.html", "text/html"))
    for file, kind in PAGE.items():
        app.add_route(f"/page/{file}", service.page(file, kind))
    app.add_exception_handler(HTTPException, _not_there)
    if settings.allow_origins:
        app.add_middleware(cors, origins=settings.allow_origins)
    app.state.draining = service.drain
    return app


def _typed(endpoint: Endpoint) -> Endpoint:
    """An endpoint whose parameter FastAPI knows by its class, whatever module made it."""

    async def answer(request: Request) -> Response:
        return await endpoint(request)

    answer.__annotations__ = {"request": Request, "return": Response}
    return answer


async def _not_there(_: Request, error: Exception) -> Response:
    """Paths and methods that are none, as JSON."""
    assert isinstance(error, HTTPException)
    codes = {404: "not_found", 405: "method_not_allowed"}
    code = codes.get(error.status_code, "bad_request")
    found = error_response(RequestError(error.status_code, code, str(error.detail)))
    for name, value in (error.headers or {}).items():
        found.headers[name] = value
    return found
