"""RequestError: why a request gets no answer, as a status and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from vitlib.system.terminal import escape_surrogates

MOST_NAMED = 100  # bad images that a message names one by one


@dataclass
class RequestError(Exception):
    """Raised anywhere while a request is served; the client gets it as

    {"error": {"code", "message", "index"}}, with "errors" naming each where several images are bad.
    """

    status: int
    code: str  # of a fixed list, for programs: see docs/serving.md
    message: str
    index: int | None = None  # of the first bad image
    errors: tuple[tuple[int, str, str], ...] = ()  # every bad image: its index, code and why
    retry_after: int | None = None  # seconds
    close: bool = False  # whether the connection cannot be used again
    accept_encoding: str | None = None  # what a body may be compressed with

    def as_dict(self) -> dict[str, object]:
        """What stands under "error"."""
        said: dict[str, object] = {
            "code": self.code, "message": escape_surrogates(self.message), "index": self.index
        }  # fmt: skip
        if len(self.errors) > 1:
            said["errors"] = [
                {"index": i, "code": code, "message": escape_surrogates(why)}
                for i, code, why in self.errors[:MOST_NAMED]
            ]
        return said

    def body(self) -> bytes:
        """The answer's body."""
        return json.dumps({"error": self.as_dict()}, ensure_ascii=False).encode()

    def headers(self) -> list[tuple[bytes, bytes]]:
        """The answer's headers, its length but for."""
        found = [(b"content-type", b"application/json")]
        if self.retry_after is not None:
            found.append((b"retry-after", str(self.retry_after).encode()))
        if self.status == 401:
            found.append((b"www-authenticate", b"Bearer"))
        if self.accept_encoding is not None:
            found.append((b"accept-encoding", self.accept_encoding.encode()))
        if self.close:
            found.append((b"connection", b"close"))
        return found


def too_many_images(most: int) -> RequestError:
    """What a request with more images gets."""
    return RequestError(413, "too_many_images", f"expected at most {most} images a request")


def bad_images(count: int, errors: Sequence[tuple[int, RequestError]]) -> RequestError:
    """What a request with bad images among its `count` gets."""
    index, first = errors[0]
    if count == 1:
        return RequestError(first.status, first.code, first.message, 0)
    shown = "; ".join(f"image {i}: {one.message}" for i, one in errors[:MOST_NAMED])
    more = f"; and {len(errors) - MOST_NAMED} more" if len(errors) > MOST_NAMED else ""
    named = tuple((i, one.code, one.message) for i, one in errors)
    return RequestError(first.status, first.code, shown + more, index, named)
