"""Request bodies: read within limits, decompress, and detect the format.

The length is bounded before memory is taken, both of a compressed body and of its content. The
format is detected by the bytes where they determine it, else by Content-Type. Clients send photos
without a type, as application/octet-stream, or with a wrong type.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable
from typing import Literal

from starlette.requests import Request

from vitlib.image.decode import has_image_signature
from vitlib.image.open_files import FORMATS
from vitlib.serve.errors import RequestError, bad_request
from vitlib.serve.settings import MIB, Limits

Format = Literal["photo", "form", "json", "csv"]
_JSON = ("application/json", "text/json")
_PHOTO = ("image/", "application/octet-stream", "binary/octet-stream")
_CLIENT_DEFAULTS = ("", "application/x-www-form-urlencoded", "text/plain")
_BOM = b"\xef\xbb\xbf"

ACCEPTED_ENCODINGS = "gzip, deflate, identity"
_GZIP, _ZLIB, _RAW = 31, 15, -15  # zlib's wbits for each container
_CHUNK = 2**20  # bytes that are decompressed at a time
_MAX_MEMBERS = 1000  # of a gzip body: each is at least 20 bytes and can be empty


async def read_body(request: Request, limits: Limits, reserve: Callable[[int], None]) -> bytes:
    """Read a body of bounded length within a bounded time.

    Args:
        request: The request.
        limits: max_body_mib and body_timeout are used.
        reserve: Called with the number of bytes that came, before they are stored; may raise.

    Returns:
        The body.

    Raises:
        RequestError: The body is too long or too slow, or `reserve` refuses it.
    """
    max_bytes = limits.max_body_mib * MIB
    length = request.headers.get("content-length")
    if length is not None and (not length.isdecimal() or int(length) > max_bytes):
        raise too_large(limits)
    try:
        return await asyncio.wait_for(_read_all(request, limits, reserve), limits.body_timeout)
    except asyncio.TimeoutError:
        raise RequestError(
            408, "too_slow", f"the body did not come within {limits.body_timeout} seconds",
            close=True,
        ) from None  # fmt: skip


async def _read_all(request: Request, limits: Limits, reserve: Callable[[int], None]) -> bytes:
    """Read all parts of a body."""
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limits.max_body_mib * MIB:
            raise too_large(limits)
        reserve(len(part))
        parts.append(part)
    return b"".join(parts)


def too_large(limits: Limits) -> RequestError:
    """Return the error of a body that is too long, as it is sent or decompressed.

    Args:
        limits: The limits.

    Returns:
        Status 413, code "too_large".
    """
    return RequestError(
        413, "too_large", f"the body has more than {limits.max_body_mib} MiB", close=True
    )


def content_encoding(request: Request) -> str:
    """Return the compression of a body.

    Args:
        request: The request.

    Returns:
        "gzip", "deflate" or "identity".

    Raises:
        RequestError: Status 415, for any other.
    """
    name = request.headers.get("content-encoding", "").strip().lower() or "identity"
    name = {"x-gzip": "gzip"}.get(name, name)
    if name not in ("gzip", "deflate", "identity"):
        raise RequestError(
            415, "unsupported_encoding", f"Content-Encoding: expected one of {ACCEPTED_ENCODINGS}",
            accept_encoding=ACCEPTED_ENCODINGS, close=True,
        )  # fmt: skip
    return name


def decompress(body: bytes, encoding: str, limits: Limits, reserve: Callable[[int], None]) -> bytes:
    """Decompress a body of bounded length.

    Args:
        body: The body.
        encoding: Its compression, from content_encoding().
        limits: max_body_mib bounds the content.
        reserve: Called with a number of further bytes, before they are stored; may raise.

    Returns:
        The content.

    Raises:
        RequestError: The content is too long or damaged, or `reserve` refuses it.
    """
    if encoding == "identity":
        return body
    # deflate has a zlib header (RFC 9110), whose low bits are 8. Some clients leave it out.
    deflate = _ZLIB if body[:1] and body[0] & 15 == 8 else _RAW
    wbits = _GZIP if encoding == "gzip" else deflate
    parts: list[bytes] = []
    size = members = 0
    while True:
        members += 1
        if members > _MAX_MEMBERS:
            raise bad_request(f"the body has over {_MAX_MEMBERS} gzip members")
        stream = zlib.decompressobj(wbits)
        try:
            while not stream.eof:
                # Bounded output for each call: a few bytes can expand to a thousand times as many.
                part = stream.decompress(body, _CHUNK)
                body = stream.unconsumed_tail
                size += len(part)
                if size > limits.max_body_mib * MIB:
                    raise too_large(limits)
                if part:
                    reserve(len(part))
                    parts.append(part)
                elif not stream.eof and not body:
                    raise bad_request(f"the body is cut off: its Content-Encoding is {encoding}")
        except zlib.error:
            raise bad_request(f"the body is not {encoding}, as its Content-Encoding says") from None
        body = stream.unused_data
        # gzip allows several members one after another, and zeros as padding at the end.
        if encoding != "gzip" or not body.strip(b"\0"):
            return b"".join(parts)


def detect_format(request: Request, body: bytes, *, accepts_photos: bool) -> Format:
    """Detect the format of a body.

    Args:
        request: The request, for its Content-Type.
        body: The decompressed body.
        accepts_photos: True if the route accepts photos as they are, and forms.

    Returns:
        The format.

    Raises:
        RequestError: Status 415, for any other format and for text that is not UTF-8; status 400,
            for a body that looks neither like a photo nor like JSON.
    """
    header = request.headers.get("content-type", "").lower()
    media_type, _, options = header.partition(";")
    media_type = media_type.strip()
    expected = "application/json or text/csv in UTF-8; photos go to /classify"
    if accepts_photos:
        expected = "a photo (image/*), multipart/form-data, application/json or text/csv"
    unsupported = RequestError(415, "unsupported_media_type", f"expected {expected}")
    if has_image_signature(body):
        if accepts_photos:
            return "photo"
        raise unsupported
    if accepts_photos and media_type == "multipart/form-data":
        return "form"
    if accepts_photos and not body:  # curl sends one where it cannot read the file
        raise bad_request("the body is empty: expected a photo or JSON")
    if accepts_photos and media_type.startswith(_PHOTO) and not _looks_like_json(body):
        # In a format that the decoder will name in its error.
        return "photo"
    _check_charset(options)
    if media_type == "text/csv":
        return "csv"
    is_untyped = media_type == "" and not accepts_photos
    if media_type in _JSON or _looks_like_json(body) or is_untyped:
        return "json"
    if accepts_photos and media_type in _CLIENT_DEFAULTS:
        raise RequestError(
            400, "bad_image",
            f"expected a photo ({', '.join(FORMATS)}) or JSON, got a body that is neither; curl "
            "sends a file as it is with --data-binary",
        )  # fmt: skip
    raise unsupported


def _looks_like_json(body: bytes) -> bool:
    """Return True if a body starts with a JSON object or list."""
    return body[:64].removeprefix(_BOM).lstrip(b" \t\r\n")[:1] in (b"{", b"[")


def _check_charset(options: str) -> None:
    """Raise RequestError for a charset other than UTF-8 and its subset ASCII."""
    charset = options.partition("charset=")[2].strip(' "')
    if charset and not charset.startswith(("utf-8", "utf8", "us-ascii")):
        raise RequestError(415, "unsupported_media_type", "expected text in UTF-8")
