"""The kind of a request's body: by its bytes where they tell, else by its Content-Type.

curl, browsers and SDKs send photos without a type, as application/octet-stream, as a form's, or
with one that is wrong.
"""

from __future__ import annotations

from typing import Literal

from starlette.requests import Request

from vitlib.image.decode import has_image_signature
from vitlib.serve.errors import RequestError
from vitlib.serve.protocol import bad_request

Body = Literal["photo", "form", "json", "csv"]
_JSON = ("application/json", "text/json")
_PHOTO = ("image/", "application/octet-stream", "binary/octet-stream")
_ANY = ("", "application/x-www-form-urlencoded", "text/plain")  # what clients send unasked
BOM = b"\xef\xbb\xbf"


def body_format(request: Request, body: bytes, *, photos: bool) -> Body:
    """What a body is; photos: whether the route takes photos as they are.

    Raises RequestError, 415, for what is none of it, and for text that is not UTF-8.
    """
    whole = request.headers.get("content-type", "").lower()
    named, _, rest = whole.partition(";")
    named = named.strip()
    if photos and has_image_signature(body):
        return "photo"
    if photos and named == "multipart/form-data":
        return "form"
    if photos and named.startswith(_PHOTO):
        if not body:
            raise bad_request("the body is empty: expected a photo")
        if not _is_json(body):
            return "photo"
    _check_charset(rest)
    if named == "text/csv":
        return "csv"
    if named in _JSON or _is_json(body) or (named == "" and not (photos and body)):
        return "json"
    if photos and named in _ANY and body:
        raise RequestError(400, "bad_image", "the body is neither a photo that is read, nor JSON")
    raise RequestError(
        415, "unsupported_media_type",
        "expected application/json or text/csv in UTF-8; photos go to /classify"
        if not photos
        else "expected a photo (image/*), multipart/form-data, application/json or text/csv",
    )  # fmt: skip


def _is_json(body: bytes) -> bool:
    return body[:64].removeprefix(BOM).lstrip(b" \t\r\n")[:1] in (b"{", b"[")


def _check_charset(rest: str) -> None:
    charset = rest.partition("charset=")[2].strip(' "')
    if charset and not charset.startswith(("utf-8", "utf8", "us-ascii")):
        raise RequestError(415, "unsupported_media_type", "expected text in UTF-8")
