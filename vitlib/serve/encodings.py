"""Content-Encoding: a compressed body -> what was compressed, bounded before memory is taken."""

from __future__ import annotations

import zlib
from collections.abc import Callable

from starlette.requests import Request

from vitlib.serve.errors import RequestError
from vitlib.serve.protocol import bad_request

ACCEPTED = "gzip, deflate, identity"
_GZIP, _ZLIB, _RAW = 31, 15, -15  # of zlib's window bits
_STEP = 2**20  # bytes that are decompress at once
_MEMBERS = 1000  # of a gzip body


def content_encoding(request: Request) -> str:
    """ "gzip", "deflate" or "identity". Raises RequestError, 415, for any other."""
    named = request.headers.get("content-encoding", "").strip().lower() or "identity"
    named = {"x-gzip": "gzip"}.get(named, named)
    if named not in ("gzip", "deflate", "identity"):
        raise RequestError(
            415, "unsupported_encoding", f"Content-Encoding: expected one of {ACCEPTED}",
            accept_encoding=ACCEPTED, close=True,
        )  # fmt: skip
    return named


def decompress(
    body: bytes, encoding: str, most: int, take: Callable[[int], None], too_large: RequestError
) -> bytes:
    """A body of an encoding that content_encoding() gave.

    most: bytes that it may become, beyond which too_large is raised. take: is told how many bytes
    more are to be kept, before they are; may raise. Raises RequestError, 400, for damaged data.
    """
    if encoding == "identity":
        return body
    if encoding == "gzip":
        windows = (_GZIP,)
    else:  # RFC 9110's deflate has a zlib header; some clients leave it out
        windows = (_ZLIB,) if body[:1] and body[0] & 15 == 8 else (_RAW,)
    parts: list[bytes] = []
    size = members = 0
    while True:
        members += 1
        if members > _MEMBERS:
            raise bad_request(f"the body has over {_MEMBERS} gzip members")
        stream = zlib.decompressobj(windows[0])
        try:
            while not stream.eof:
                part = stream.decompress(body, _STEP)
                body = stream.unconsumed_tail
                size += len(part)
                if size > most:
                    raise too_large
                if part:
                    take(len(part))
                    parts.append(part)
                elif not stream.eof and not body:
                    raise bad_request(f"the body is cut off: its Content-Encoding is {encoding}")
        except zlib.error:
            raise bad_request(f"the body is not {encoding}, as its Content-Encoding says") from None
        body = stream.unused_data
        if encoding != "gzip" or not body.strip(b"\0"):
            return b"".join(parts)
