"""Errors of requests, as an HTTP status and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from vitlib.system.terminal import escape_surrogates

MAX_LISTED = 100  # bad images that an error lists one by one


@dataclass
class RequestError(Exception):
    """An error that a client gets as JSON.

    The body is {"error": {"code", "message", "index"}}, with "errors" for several bad images.

    Attributes:
        status: HTTP status.
        code: A word of a fixed list, for programs: see docs/serving.md.
        message: A sentence for people.
        index: The first bad image of the request; None for an error of the whole request.
        errors: Every bad image: index, code and message.
        retry_after: Seconds after which another try makes sense.
        close: True if the connection cannot be used for another request.
        accept_encoding: Content encodings that are accepted, for a body in another one.
    """

    status: int
    code: str
    message: str
    index: int | None = None
    errors: tuple[tuple[int, str, str], ...] = ()
    retry_after: int | None = None
    close: bool = False
    accept_encoding: str | None = None

    def as_dict(self) -> dict[str, object]:
        """Return the value of "error" in the body.

        Returns:
            "code", "message" and "index"; "errors" where several images are bad.
        """
        value: dict[str, object] = {
            "code": self.code, "message": escape_surrogates(self.message), "index": self.index
        }  # fmt: skip
        if len(self.errors) > 1:
            value["errors"] = [
                {"index": i, "code": code, "message": escape_surrogates(message)}
                for i, code, message in self.errors[:MAX_LISTED]
            ]
        return value

    def body(self) -> bytes:
        """Return the body of the answer.

        Returns:
            JSON in UTF-8.
        """
        return json.dumps({"error": self.as_dict()}, ensure_ascii=False).encode()

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers of the answer, without its length.

        Returns:
            Names in lower case, and values.
        """
        headers = [(b"content-type", b"application/json")]
        if self.retry_after is not None:
            headers.append((b"retry-after", str(self.retry_after).encode()))
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if self.accept_encoding is not None:
            headers.append((b"accept-encoding", self.accept_encoding.encode()))
        if self.close:
            headers.append((b"connection", b"close"))
        return headers


def bad_request(message: str) -> RequestError:
    """Return the error of a request that is not understood.

    Args:
        message: What was expected, and what came.

    Returns:
        Status 400, code "bad_request".
    """
    return RequestError(400, "bad_request", message)


def too_many_images(limit: int) -> RequestError:
    """Return the error of a request with too many images.

    Args:
        limit: The largest number of images of a request.

    Returns:
        Status 413, code "too_many_images".
    """
    return RequestError(413, "too_many_images", f"expected at most {limit} images a request")


def overload_error(reason: str, seconds: float) -> RequestError:
    """Return the error of a request that comes while there is too much to do.

    Args:
        reason: What is at its limit.
        seconds: Seconds after which the client may try again, rounded to at least 1.

    Returns:
        Status 429, code "overloaded".
    """
    return RequestError(
        429, "overloaded", f"{reason}: try again later", retry_after=max(1, round(seconds))
    )


def shutdown_error() -> RequestError:
    """Return the error of a request that the server does not answer before it ends.

    Returns:
        Status 503, code "ending".
    """
    return RequestError(503, "ending", "the server ends: try again", retry_after=1, close=True)


def bad_images(count: int, errors: Sequence[tuple[int, RequestError]]) -> RequestError:
    """Return the error of a request with bad images.

    Args:
        count: The number of images of the request.
        errors: Index and error of each bad image, at least one.

    Returns:
        Status and code of the first bad image; every bad image is in "errors".
    """
    index, first = errors[0]
    if count == 1:
        return RequestError(first.status, first.code, first.message, 0)
    listed = "; ".join(f"image {i}: {error.message}" for i, error in errors[:MAX_LISTED])
    more = f"; and {len(errors) - MAX_LISTED} more" if len(errors) > MAX_LISTED else ""
    each = tuple((i, error.code, error.message) for i, error in errors)
    return RequestError(first.status, first.code, listed + more, index, each)
