"""The HTTP app: routes, keys, metrics, the page, start and end.

docs/serving.md describes requests and answers; handlers.py computes them.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.resources import files

from fastapi import FastAPI, Security
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from vitlib import __version__
from vitlib.scores import Task
from vitlib.serve import docs_page, openapi
from vitlib.serve.dispatcher import Dispatcher
from vitlib.serve.errors import RequestError
from vitlib.serve.guard import check_key, cors, error_response
from vitlib.serve.handlers import InferenceHandlers
from vitlib.serve.settings import Settings
from vitlib.system.terminal import escape_surrogates

logger = logging.getLogger("vitlib")
Endpoint = Callable[[Request], Awaitable[Response]]
TASK_NAMES: dict[Task, str] = {  # in /version
    "single_label_classification": "single-label",
    "multi_label_classification": "multi-label",
    "regression": "regression",
}
PAGE_FILES = {"app.js": "text/javascript", "style.css": "text/css"}
# The page may load scripts, styles and data from this server only (Content-Security-Policy).
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE_HEADERS = {
    "content-security-policy": PAGE_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class Service:
    """State of the server: its handlers, the page, and what all routes have in common.

    Attributes:
        is_warm: True once the model has computed its first batches.
        is_draining: True once the server accepts no further connections.
    """

    def __init__(self, dispatcher: Dispatcher, settings: Settings, name: str) -> None:
        """Prepare the handlers.

        Args:
            dispatcher: Computes the rows of images.
            settings: The server's settings.
            name: The model's name in /version.
        """
        self.dispatcher, self.metrics = dispatcher, dispatcher.metrics
        self.keys = [key.encode() for key in settings.api_keys]
        self.is_warm = self.is_draining = False
        core, limits = dispatcher.core, settings.limits
        cfg, calibration = core.predictor.model.config, core.calibration
        self.about = {
            "version": __version__,
            "model": name,
            "task": TASK_NAMES[core.task],
            "classes": len(core.labels) if cfg.num_classes else 0,
            "calibration": None if calibration is None else calibration.summary(),
            "answers": list(core.kinds),
            "max_images": limits.max_images,
            "max_body_mib": limits.max_body_mib,
        }

    async def health(self, _: Request) -> Response:
        """Status of the process.

        Returns:
            {"status": "ok"}.
        """
        return JSONResponse({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """Status of the model: 200 once it is warm, 503 before that and while the server ends.

        Returns:
            {"ready": true} or {"ready": false}.
        """
        is_ready = self.is_warm and not self.is_draining
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    async def version(self, _: Request) -> Response:
        """Version of vitlib, name and task of the model, and limits.

        Returns:
            The fields of self.about.
        """
        return JSONResponse(self.about)

    async def show_metrics(self, _: Request) -> Response:
        """Metrics for Prometheus.

        Returns:
            Prometheus' text format.
        """
        text, media_type = self.metrics.text()
        return Response(text, headers={"content-type": media_type})

    def page(self, name: str, media_type: str) -> Endpoint:
        """Return a handler that sends a file of the page.

        Args:
            name: The file's name.
            media_type: The file's type.

        Returns:
            The handler.
        """
        text = files("vitlib.serve").joinpath("page", name).read_bytes()

        async def answer(_: Request) -> Response:
            return Response(text, media_type=media_type, headers=PAGE_HEADERS)

        return answer

    async def docs(self, request: Request) -> Response:
        """The routes as a page.

        Args:
            request: The request.

        Returns:
            HTML, made from the app's OpenAPI schema.
        """
        html = docs_page.render(request.app.openapi(), str(request.base_url))
        return Response(html, media_type="text/html", headers=PAGE_HEADERS)

    def wrap(self, route: str, endpoint: Endpoint) -> Endpoint:
        """Add to a handler: the check of the key, errors as JSON, and metrics.

        Args:
            route: The route, for metrics.
            endpoint: The handler.

        Returns:
            A handler that raises no exception.
        """

        async def answer(request: Request) -> Response:
            start = time.perf_counter()
            request.state.reserved_bytes = 0  # of its body
            try:
                check_key(request, self.keys)
                response = await endpoint(request)
            except RequestError as error:
                self.metrics.errors.labels(error.code).inc()
                response = error_response(error)
            except ClientDisconnect:
                response = Response(status_code=499)
            except Exception:
                logger.exception("%s failed", route)
                self.metrics.errors.labels("internal").inc()
                response = error_response(
                    RequestError(500, "internal", "the server failed; it is logged")
                )
            finally:
                self.dispatcher.release_bytes(request.state.reserved_bytes)
            self.metrics.requests.labels(route, str(response.status_code)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - start)
            return response

        return answer

    def drain(self, seconds: float) -> None:
        """Start the end of the server; in the event loop's thread.

        /ready answers 503 from now on, and requests that are not answered in time get 503.

        Args:
            seconds: Seconds for the accepted requests.
        """
        self.is_draining = True
        asyncio.get_running_loop().call_later(seconds, self.dispatcher.abort)

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Warm up beside the first requests; at the end answer the accepted ones.

        Yields:
            None, while the server runs.
        """

        def warm_up() -> None:
            self.dispatcher.warm_up()
            self.is_warm = True

        threading.Thread(target=warm_up, name="vitlib-warm-up", daemon=True).start()
        yield
        self.is_draining = True
        await asyncio.get_running_loop().run_in_executor(None, self.dispatcher.close)


def _summary(endpoint: Endpoint) -> str:
    """Return the first line of a handler's docstring."""
    return (endpoint.__doc__ or "").split("\n")[0]


def create_app(dispatcher: Dispatcher, settings: Settings, name: str) -> FastAPI:
    """Make the app.

    Args:
        dispatcher: Computes the rows of images.
        settings: The server's settings.
        name: The model's name in /version.

    Returns:
        The app; `app.state.drain` starts its end, see Service.drain.
    """
    name = escape_surrogates(name)
    service = Service(dispatcher, settings, name)
    handlers, task = InferenceHandlers(dispatcher, settings.limits), dispatcher.core.task
    app = FastAPI(
        title="vitlib", version=__version__, lifespan=service.lifespan, redoc_url=None,
        docs_url=None, description=f"{name}: photos in, labels and embeddings out.",
    )  # fmt: skip
    posts: dict[str, Endpoint] = {
        "/score": handlers.score,
        "/invocations": handlers.invocations,
        "/classify": handlers.classify,
        "/embed": handlers.embed,
        "/attend": handlers.attend,
    }
    operations = openapi.bodies(task)
    key = [Security(HTTPBearer(auto_error=False))] if settings.api_keys else []  # for /docs only
    for route, endpoint in posts.items():
        app.add_api_route(
            route, _annotate(service.wrap(route, endpoint)), methods=["POST"], dependencies=key,
            summary=_summary(endpoint), openapi_extra=operations[route],
            responses=openapi.answers(route, task), response_class=Response,
            name=route[1:],
        )  # fmt: skip
    gets: dict[str, Endpoint] = {
        "/health": service.health,
        "/ping": service.health,
        "/ready": service.ready,
        "/version": service.version,
        "/metrics": service.show_metrics,
    }
    for route, endpoint in gets.items():
        wrapped = service.wrap(route, endpoint)
        app.add_api_route(
            route, _annotate(wrapped), methods=["GET"], summary=_summary(endpoint),
            response_class=Response, name=route[1:],
        )  # fmt: skip
        app.add_route(route, wrapped, methods=["HEAD"], include_in_schema=False)
    app.add_route("/docs", service.docs)
    app.add_route("/", service.page("index.html", "text/html"))
    for file, media_type in PAGE_FILES.items():
        app.add_route(f"/page/{file}", service.page(file, media_type))
    app.add_exception_handler(HTTPException, _handle_http_error)
    if settings.allow_origins:
        app.add_middleware(cors, origins=settings.allow_origins)
    app.state.drain = service.drain
    return app


def _annotate(endpoint: Endpoint) -> Endpoint:
    """Return a handler with real classes as annotations, which FastAPI reads at run time.

    `from __future__ import annotations` would give it names, to be looked up in a module.
    """

    async def answer(request: Request) -> Response:
        return await endpoint(request)

    answer.__annotations__ = {"request": Request, "return": Response}
    return answer


async def _handle_http_error(_: Request, error: Exception) -> Response:
    """Answer unknown paths and methods in JSON."""
    assert isinstance(error, HTTPException)
    codes = {404: "not_found", 405: "method_not_allowed"}
    code = codes.get(error.status_code, "bad_request")
    response = error_response(RequestError(error.status_code, code, str(error.detail)))
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response
