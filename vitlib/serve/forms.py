"""What a browser or curl sends: a photo as the body, or several in a form.

Beside JSON, /classify, /embed and /attend take these.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from vitlib.serve.errors import too_many_images
from vitlib.serve.protocol import bad_request
from vitlib.serve.settings import MIB, Limits

FIELDS = 20  # of a form, beside its photos


async def read_form(body: bytes, headers: Headers, limits: Limits) -> list[bytes]:
    """The files of a multipart form, in order. Raises RequestError."""

    async def once() -> AsyncGenerator[bytes, None]:
        yield body
        yield b""

    try:
        form = await MultiPartParser(
            headers, once(), max_files=limits.most_images, max_fields=FIELDS, max_part_size=MIB
        ).parse()
    except (MultiPartException, KeyError, ValueError) as error:
        said = getattr(error, "message", None) or "it has no boundary, or is cut off"
        if said.startswith("Too many files"):
            raise too_many_images(limits.most_images) from None
        raise bad_request(f"the form cannot be read: {said}") from None
    if not _has_end(body, headers):
        raise bad_request("the form is cut off: its last boundary is not there")
    fields = [name for name, value in form.multi_items() if not isinstance(value, UploadFile)]
    if fields:
        raise bad_request(
            f"the form's part {fields[0][:40]!r} is no file: expected photos, each with a "
            "filename, and parameters in the URL"
        )
    try:
        found = [
            await value.read() for _, value in form.multi_items() if isinstance(value, UploadFile)
        ]
    finally:
        await form.close()
    if not found:
        raise bad_request("the form holds no file: expected photos as files")
    return found


def _has_end(body: bytes, headers: Headers) -> bool:
    """Whether the form's closing boundary came: without it the parser drops the last part."""
    _, given = parse_options_header(headers["content-type"])
    return body.rfind(b"--" + given[b"boundary"] + b"--") >= 0


def parse_query(query: Mapping[str, str], allowed: Mapping[str, type]) -> dict[str, Any]:
    """A URL's query -> values of these kinds. Raises RequestError for what is not among them."""
    found: dict[str, Any] = {}
    for name, text in query.items():
        if name not in allowed:
            raise bad_request(
                f"no parameter {name[:40]!r}: expected {', '.join(allowed) or 'none'}"
            )
        try:
            found[name] = allowed[name](text)
        except ValueError:
            raise bad_request(f"{name}={text[:40]!r}: expected a number") from None
    return found


def choice(query: dict[str, Any], name: str, *options: str) -> str:
    """A value of a fixed list, out of the query; the first is the default."""
    value = str(query.pop(name, options[0]))
    if value not in options:
        raise bad_request(f"{name}={value[:40]!r}: expected {' or '.join(options)}")
    return value
