"""Decoding of base64 as clients and spreadsheets write it."""

from __future__ import annotations

import binascii
from base64 import b64decode
from urllib.parse import unquote_to_bytes

_SPACE = b" \t\r\n\f\v"
_URL_SAFE = bytes.maketrans(b"-_", b"+/")


def is_data_url(text: str) -> bool:
    """Return True if a text starts as a data: URL, after any white space.

    Args:
        text: Any text.
    """
    return text[:64].lstrip()[:5].lower() == "data:"


def parse_base64(text: str) -> bytes:
    """Decode base64 (RFC 4648): standard or URL-safe, padded or not, with white space anywhere.

    Args:
        text: Base64, or a data: URL of any type that holds base64.

    Returns:
        The bytes.

    Raises:
        ValueError: The text is neither.
    """
    if is_data_url(text):
        head, comma, text = text.partition(",")
        if not comma or not head.rstrip().lower().endswith(";base64"):
            raise ValueError(
                "a data: URL of an image must be in base64: data:image/jpeg;base64,..."
            )
        data = unquote_to_bytes(text) if "%" in text else text.encode("ascii", "replace")
    else:
        data = text.encode("ascii", "replace")
    data = data.translate(_URL_SAFE, _SPACE)
    bare = data.rstrip(b"=")
    if len(data) - len(bare) > 2 or len(bare) % 4 == 1:
        raise ValueError("not base64 (RFC 4648): no base64 has this length")
    try:
        return b64decode(bare + b"=" * (-len(bare) % 4), validate=True)
    except binascii.Error:
        raise ValueError("not base64 (RFC 4648)") from None
