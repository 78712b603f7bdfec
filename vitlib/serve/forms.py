"""Photos in a multipart form, and parameters in a URL's query; browsers and curl send these."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from vitlib.image.decode import has_image_signature
from vitlib.serve.errors import bad_request, too_many_images
from vitlib.serve.settings import Limits


class _BytesParser(MultiPartParser):
    """A parser that keeps the bytes of every part, also of one without a filename.

    Starlette decodes such a part as text, which a photo does not survive.
    """

    def on_headers_finished(self) -> None:
        """Add an empty filename where a part has none; called by the parser."""
        part = self._current_part
        _, options = parse_options_header(part.content_disposition)
        if part.content_disposition is not None and b"filename" not in options:
            part.content_disposition += b'; filename=""'
        super().on_headers_finished()


async def read_form(body: bytes, headers: Headers, limits: Limits) -> list[bytes]:
    """Return the photos of a multipart form: its files, and other parts that start as an image.

    Args:
        body: The body.
        headers: The request's headers; Content-Type has the form's boundary.
        limits: The largest number of images is used.

    Returns:
        The photos in their order, at least one.

    Raises:
        RequestError: The form is damaged, holds too many files or none, or has other parts.
    """

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body
        yield b""

    try:
        form = await _BytesParser(headers, stream(), max_files=limits.max_images_of_request).parse()
    except (MultiPartException, KeyError, ValueError) as error:
        reason = getattr(error, "message", None) or "it has no boundary, or is cut off"
        if reason.startswith("Too many files"):
            raise too_many_images(limits.max_images_of_request) from None
        raise bad_request(f"the form cannot be read: {reason}") from None
    if not _is_complete(body, headers):
        raise bad_request("the form is cut off: its last boundary is missing")
    photos: list[bytes] = []
    try:
        for name, value in form.multi_items():
            assert isinstance(value, UploadFile)
            photos.append(await value.read())
            if not (_has_filename(value) or has_image_signature(photos[-1])):
                raise bad_request(
                    f"the form's part {name[:40]!r} is not a file, nor a photo by its bytes: "
                    "expected photos, and parameters in the URL"
                )
    finally:
        await form.close()
    if not photos:
        raise bad_request("the form has no file: expected photos as files")
    return photos


def _has_filename(part: UploadFile) -> bool:
    """Return True if the client gave a filename with a part."""
    disposition = part.headers.get("content-disposition", "")
    return b"filename" in parse_options_header(disposition)[1]


def _is_complete(body: bytes, headers: Headers) -> bool:
    """Return True if the form's closing boundary came; the parser drops a part that is cut off."""
    _, options = parse_options_header(headers["content-type"])
    return body.rfind(b"--" + options[b"boundary"] + b"--") >= 0


def parse_query(query: Mapping[str, str], types: Mapping[str, type]) -> dict[str, Any]:
    """Parse the parameters of a URL.

    Args:
        query: Names to text.
        types: The allowed names, and the type of each.

    Returns:
        Names to values.

    Raises:
        RequestError: A name is not allowed, or a text is not of its type.
    """
    values: dict[str, Any] = {}
    for name, text in query.items():
        if name not in types:
            raise bad_request(f"no parameter {name[:40]!r}: expected {', '.join(types) or 'none'}")
        try:
            values[name] = types[name](text)
        except ValueError:
            raise bad_request(f"{name}={text[:40]!r}: expected a number") from None
    return values


def pop_choice(query: dict[str, Any], name: str, *options: str) -> str:
    """Take a parameter with a fixed list of values out of a parsed query.

    Args:
        query: The query; the parameter is removed.
        name: The parameter.
        *options: The allowed values; the first is the default.

    Returns:
        The value.

    Raises:
        RequestError: The value is not in the list.
    """
    value = str(query.pop(name, options[0]))
    if value not in options:
        raise bad_request(f"{name}={value[:40]!r}: expected {' or '.join(options)}")
    return value
