"""Guards of one HTTP connection: head size and time, number of connections, API keys, CORS.

Everything is counted before memory is taken. bodies.py bounds the bodies of requests.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Sequence
from typing import Any

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from vitlib.serve.access_log import AccessLog
from vitlib.serve.errors import RequestError, overload_error

MAX_HEAD_BYTES = 64 * 1024  # of a request line and its headers
DRAIN_SECONDS = 5.0  # for a client that is still sending, to read why its request is refused
OPEN_PATHS = ("/", "/health", "/ping", "/ready", "/version")  # without a key; and /page/...


class DrainingTransport:
    """A transport that does not close in the middle of a request body.

    Where a socket with unread data is closed, the system resets the connection, and the client
    sees the reset in place of the answer. This transport sends the answer, discards what still
    comes for DRAIN_SECONDS, and closes then.
    """

    def __init__(self, transport: Any, protocol: HardenedProtocol) -> None:
        """Wrap a transport.

        Args:
            transport: asyncio's transport.
            protocol: The protocol of the connection.
        """
        self._transport, self._protocol = transport, protocol
        self._close_timer: asyncio.TimerHandle | None = None

    def __getattr__(self, name: str) -> Any:
        """Return any other attribute of the wrapped transport."""
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Return True if the transport is closing, or draining before that.

        Returns:
            True if no further answer can be sent.
        """
        return self.is_draining or self._transport.is_closing()

    @property
    def is_draining(self) -> bool:
        """True if the answer was sent and the rest of the request is discarded."""
        return self._close_timer is not None

    def close(self) -> None:
        """Close at the end of the request, or after DRAIN_SECONDS."""
        if self.is_draining or not self._protocol.in_body or self._transport.is_closing():
            self.close_now()
            return
        loop = self._protocol.loop
        self._close_timer = loop.call_later(DRAIN_SECONDS, self._transport.close)
        # The client reads the answer's end now. Reading goes on, else its send buffer stays full.
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._transport.resume_reading()

    def close_now(self) -> None:
        """Close without waiting for the rest of the request."""
        if self._close_timer is not None:
            self._close_timer.cancel()
        self._transport.close()


class HardenedProtocol(HttpToolsProtocol):
    """The HTTP protocol of uvicorn with limits on heads of requests and on connections.

    Attributes:
        max_connections: Open connections, beyond which requests get 429.
        head_seconds: Seconds within which the head of a request must arrive.
        origins: Origins of other pages that may read answers; see cors().
        log_refusal: Logs a request that is refused without the app; see access_log.py.
        in_body: True from a request's head to the end of its body.
    """

    max_connections = 1000
    head_seconds = 20.0
    origins: Sequence[str] = ()
    log_refusal: Callable[..., None] | None = None
    in_body = False
    # Since the last head or body was complete.
    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Wrap the transport, and start the clock for the first head; called by asyncio."""
        super().connection_made(DrainingTransport(transport, self))  # type: ignore[arg-type]
        if len(self.connections) > self.max_connections:
            self.app = cors(refuse_connection, self.origins) if self.origins else refuse_connection
            self.app = self.app if self.log_refusal is None else AccessLog(self.app)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock; called by asyncio."""
        self._stop_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count bytes of the head before the parser gets them; called by asyncio."""
        if self.transport.is_draining:  # type: ignore[attr-defined]
            return
        if not self.in_body:
            if self._head_timer is None:
                self._start_head_timer()
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and self._is_head(data):
                self._refuse(
                    431, "headers_too_large", f"expected headers of at most {MAX_HEAD_BYTES} bytes"
                )
                return
        super().data_received(data)

    def _is_head(self, data: bytes) -> bool:
        """Return True if all data belong to the head; a body may have come with its end."""
        return b"\r\n\r\n" not in data[:MAX_HEAD_BYTES]

    def on_headers_complete(self) -> None:
        """Note the end of a head; called by the parser."""
        self._stop_head_timer()
        self.in_body = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Note the end of a body; called by the parser."""
        self.in_body = False
        super().on_message_complete()

    def _start_head_timer(self) -> None:
        """Start the clock for a head."""
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(self.head_seconds, self._refuse_slow_head)

    def _stop_head_timer(self) -> None:
        """Stop the clock: the head is complete."""
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse_slow_head(self) -> None:
        """End the connection, unless an earlier request of it is still being answered."""
        self._head_timer = None
        if not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete):
            self._refuse(
                408, "too_slow", f"expected a request within {self.head_seconds:g} seconds"
            )

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that are not HTTP; called by uvicorn."""
        self._refuse(400, "bad_request", msg)

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Write an error as HTTP/1.1, without the app, and close."""
        self._stop_head_timer()
        error = RequestError(status, code, message, close=True)
        body = error.body()
        lines = [b"HTTP/1.1 %d Refused" % status]
        lines += [b"%b: %b" % pair for pair in error.headers()]
        # The origin is in the head, which was not parsed: only a single allowed one is certain.
        if len(self.origins) == 1:
            lines.append(b"access-control-allow-origin: " + self.origins[0].encode("latin-1"))
        lines += [b"content-length: %d" % len(body), b"", body]
        if self.log_refusal is not None:  # without method and path, which were not parsed
            self.log_refusal(self.client, "-", "-", status, 0.0, len(body))
        self.transport.write(b"\r\n".join(lines))
        self.transport.close()


async def refuse_connection(_scope: Any, _receive: Any, send: Any) -> None:
    """Answer 429; the ASGI app of connections beyond the limit.

    Args:
        send: Sends an ASGI message.
    """
    error = overload_error("too many connections are open", 1)
    error.close = True
    body = error.body()
    headers = [*error.headers(), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def cors(app: Any, origins: Sequence[str]) -> CORSMiddleware:
    """Let pages of other origins read the answers of an app, errors too.

    Args:
        app: The ASGI app.
        origins: The origins of the pages; "*" is all.

    Returns:
        The app with CORS headers.
    """
    return CORSMiddleware(
        app,
        allow_origins=list(origins),
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type", "Content-Encoding", "X-API-Key"],
        expose_headers=["Retry-After", "Accept-Encoding"],
        allow_private_network=True,
    )


def error_response(error: RequestError) -> Response:
    """Return an error as an answer.

    Args:
        error: The error.

    Returns:
        The answer.
    """
    answer = Response(error.body(), error.status)
    answer.raw_headers += error.headers()
    return answer


def check_key(request: Request, keys: Sequence[bytes]) -> None:
    """Check the API key of a request.

    Args:
        request: The request.
        keys: The valid keys, in UTF-8; empty where no key is needed.

    Raises:
        RequestError: Status 401: a key is needed, and the request has no valid one.
    """
    path = request.scope["path"]
    if not keys or path in OPEN_PATHS or path.startswith("/page/"):
        return
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        token = request.headers.get("x-api-key", "")
    # Starlette decodes headers as latin-1; this gives the bytes that were sent, which are UTF-8.
    key = token.strip(" \t").encode("latin-1")
    # All keys are compared, each in constant time: the time reveals nothing about any key.
    if not sum([hmac.compare_digest(key, valid) for valid in keys]):
        raise RequestError(
            401, "unauthorized", "expected a key: Authorization: Bearer KEY, or X-API-Key: KEY",
            close=True,
        )  # fmt: skip


async def wait_for_disconnect(request: Request) -> None:
    """Wait until the client closes its connection.

    Args:
        request: A request whose body was read.
    """
    while (await request.receive())["type"] != "http.disconnect":
        pass
