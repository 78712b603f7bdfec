"""The access log: a line on stderr for each request, after its answer.

    2026-11-29T01:20:00Z 192.0.2.7 POST /classify?top_k=5 200 12.3 ms 345 bytes

A line has the values of vitlib's own parameters. Other parts of a query may be secrets (a key, the
signature of a link) and are written as "...". The client is the address of the connection: behind a
proxy, the proxy's. Control characters are escaped.
"""

from __future__ import annotations

import logging
import time
from typing import Any
from urllib.parse import parse_qsl, quote

from vitlib.system.terminal import escape_unprintable

logger = logging.getLogger("vitlib").getChild("access")
MAX_PATH = 200  # characters of a path or of a value
PARAMETERS = ("top_k", "threshold", "format", "on_error", "method", "class")


class AccessLog:
    """An ASGI app that calls another one, and logs each request."""

    def __init__(self, app: Any) -> None:
        """Wrap an app.

        Args:
            app: The ASGI app.
        """
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request by the app, and log it.

        Args:
            scope: The request.
            receive: Receives an ASGI message.
            send: Sends an ASGI message.
        """
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status, size = time.perf_counter(), 0, 0

        async def count(message: Any) -> None:
            nonlocal status, size
            status = message.get("status", status)
            size += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, count)
        finally:
            seconds = time.perf_counter() - start
            path = describe_path(scope["raw_path"], scope["query_string"])
            log_request(scope["client"], scope["method"], path, status, seconds, size)


def describe_path(path: bytes, query: bytes) -> str:
    """Return a path and its query for a log.

    Args:
        path: The path as it was sent.
        query: The query as it was sent, without the question mark.

    Returns:
        The path, and the parameters of PARAMETERS; "..." in place of any others.
    """
    text = path.decode("utf-8", "backslashreplace")[:MAX_PATH]
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True) if query else []
    parts = [f"{name}={quote(value[:MAX_PATH])}" for name, value in pairs if name in PARAMETERS]
    if len(parts) < len(pairs) or (query and not pairs):
        parts.append("...")
    return f"{text}?{'&'.join(parts)}" if parts else text


def start() -> None:
    """Send the lines to stderr, each by one write: the lines of several workers do not mix."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def log_request(
    client: tuple[str, int] | None, method: str, path: str, status: int, seconds: float, size: int
) -> None:
    """Write the line of a request.

    Args:
        client: The address and the port of the client, if it is known.
        method: The HTTP method.
        path: The path, from describe_path().
        status: The HTTP status; 0 where no answer was sent.
        seconds: Seconds until the answer was sent.
        size: Bytes of the answer's body.
    """
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    line = f"{now} {client[0] if client else '-'} {method} {path} {status}"
    logger.info("%s %.1f ms %d bytes", escape_unprintable(line), 1000 * seconds, size)
