"""HTTP's own dangers: keys, bodies that are too long or too slow, headers that never end.

Everything here is counted before memory is taken.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Callable, Sequence
from typing import Any

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from vitlib.serve.errors import RequestError
from vitlib.serve.settings import MIB, Limits

logger = logging.getLogger("vitlib")
MOST_HEAD = 64 * 1024  # bytes of a request line and its headers
LINGER = 5.0  # seconds in which a client that is still sending may read why it is refused
OPEN_PATHS = ("/", "/health", "/ping", "/ready", "/version")  # without a key; and /page/...


class DrainingTransport:
    """A connection's transport that does not close amid a body: the system would tell the client of
    a reset in place of the answer. What still comes is thrown away, for a while."""

    def __init__(self, transport: Any, guarded: HardenedProtocol) -> None:
        self._transport, self._guarded = transport, guarded
        self._end: asyncio.TimerHandle | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Whether it is, or is about to."""
        return self.lingers or self._transport.is_closing()

    @property
    def lingers(self) -> bool:
        """Whether the answer was sent and the rest of the request is awaited."""
        return self._end is not None

    def close(self) -> None:
        """Now, or when the client has sent all."""
        if self.lingers or not self._guarded.in_body or self._transport.is_closing():
            self.close_now()
            return
        self._end = self._guarded.loop.call_later(LINGER, self._transport.close)
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._transport.resume_reading()

    def close_now(self) -> None:
        """Whatever comes."""
        if self._end is not None:
            self._end.cancel()
        self._transport.close()


class HardenedProtocol(HttpToolsProtocol):
    """uvicorn's connection, which ends where a request's head is too long or does not come."""

    max_connections = 1000
    head_seconds = 20.0  # in which a request's head must have come
    origins: Sequence[str] = ()  # see cors()
    in_body = False
    _head = 0  # bytes since the last head or body was complete
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """As asyncio calls it."""
        super().connection_made(DrainingTransport(transport, self))  # type: ignore[arg-type]
        if len(self.connections) > self.max_connections:
            self.app = cors(overloaded, self.origins) if self.origins else overloaded
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """As asyncio calls it."""
        self._have_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """As asyncio calls it."""
        if self.transport.lingers:  # type: ignore[attr-defined]
            return
        if not self.in_body:
            if self._late is None:
                self._await_head()
            self._head += len(data)
            if self._head > MOST_HEAD and self._is_head(data):
                self._refuse(
                    431, "headers_too_large", f"expected headers of at most {MOST_HEAD} bytes"
                )
                return
        super().data_received(data)

    def _is_head(self, data: bytes) -> bool:
        """Whether all that came belongs to the head: a body may have come with its end."""
        return b"\r\n\r\n" not in data[:MOST_HEAD]

    def on_headers_complete(self) -> None:
        """As the parser calls it."""
        self._have_head()
        self.in_body = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """As the parser calls it."""
        self.in_body = False
        super().on_message_complete()

    def _await_head(self) -> None:
        self._head = 0
        self._late = self.loop.call_later(self.head_seconds, self._too_late)

    def _have_head(self) -> None:
        self._head = 0
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _too_late(self) -> None:
        self._late = None
        if not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete):
            self._refuse(
                408, "too_slow", f"expected a request within {self.head_seconds:g} seconds"
            )

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls where the bytes are no HTTP."""
        self._refuse(400, "bad_request", msg)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._have_head()
        error = RequestError(status, code, message, close=True)
        body = error.body()
        lines = [b"HTTP/1.1 %d Refused" % status]
        lines += [b"%b: %b" % pair for pair in error.headers()]
        if len(self.origins) == 1:  # of several, the head that names one was not understood
            lines.append(b"access-control-allow-origin: " + self.origins[0].encode("latin-1"))
        lines += [b"content-length: %d" % len(body), b"", body]
        self.transport.write(b"\r\n".join(lines))
        self.transport.close()


async def overloaded(_: Any, __: Any, send: Any) -> None:
    """The app of a connection that is one too many."""
    error = RequestError(
        429, "overloaded", "too many connections are open: try again later", retry_after=1,
        close=True,
    )  # fmt: skip
    body = error.body()
    headers = [*error.headers(), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def cors(app: Any, origins: Sequence[str]) -> CORSMiddleware:
    """The app, which lets pages of these origins ("*": all) read its answers, refusals too."""
    return CORSMiddleware(
        app,
        allow_origins=list(origins),
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type", "Content-Encoding", "X-API-Key"],
        expose_headers=["Retry-After", "Accept-Encoding"],
        allow_private_network=True,
    )


def error_response(error: RequestError) -> Response:
    """A RequestError as an answer."""
    answer = Response(error.body(), error.status)
    answer.raw_headers += error.headers()
    return answer


def check_key(request: Request, keys: Sequence[bytes]) -> None:
    """Raises RequestError, 401, where a key is asked for and none of them came."""
    path = request.scope["path"]
    if not keys or path in OPEN_PATHS or path.startswith("/page/"):
        return
    bearer, _, given = request.headers.get("authorization", "").partition(" ")
    if bearer.lower() != "bearer":
        given = request.headers.get("x-api-key", "")
    came = given.strip(" \t").encode("latin-1")  # the bytes as they came: UTF-8, as the keys are
    # Every key is compared, in a time that tells nothing about any.
    if not sum([hmac.compare_digest(came, key) for key in keys]):
        raise RequestError(
            401, "unauthorized", "expected a key: Authorization: Bearer KEY, or X-API-Key: KEY",
            close=True,
        )  # fmt: skip


async def read_body(request: Request, limits: Limits, take: Callable[[int], None]) -> bytes:
    """A request's body, bounded in length and time; `take` is told how many bytes came, and may
    raise, before they are kept. Raises RequestError."""
    most = limits.max_body_mib * MIB
    length = request.headers.get("content-length")
    if length is not None and (not length.isdecimal() or int(length) > most):
        raise too_large(limits)
    try:
        return await asyncio.wait_for(_all_of(request, most, limits, take), limits.body_timeout)
    except asyncio.TimeoutError:
        raise RequestError(
            408, "too_slow", f"the body did not come within {limits.body_timeout} seconds",
            close=True,
        ) from None  # fmt: skip


async def _all_of(
    request: Request, most: int, limits: Limits, take: Callable[[int], None]
) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise too_large(limits)
        take(len(part))
        parts.append(part)
    return b"".join(parts)


def too_large(limits: Limits) -> RequestError:
    """What a request gets whose body is too long, also once it is decompress."""
    return RequestError(
        413, "too_large", f"the body has more than {limits.max_body_mib} MiB", close=True
    )


async def wait_for_disconnect(request: Request) -> None:
    """Returns when the client has closed its connection; after the body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
