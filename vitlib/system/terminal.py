"""Escaping of text that goes to a terminal, a log or a JSON file.

A label or a file name can hold escape sequences that set a terminal's title or its clipboard,
newlines that forge another line, and characters that reverse the reading order. Here, and only
here, they become the escapes of Python's string literals. JSON is written as it is.
"""

from __future__ import annotations

import json
import logging
import unicodedata
from typing import Any

# Joiners that Persian, Indic scripts and emoji need; they neither move nor hide other characters.
_JOINERS = "\u200c\u200d"


def escape_unprintable(text: object) -> str:
    """Escape characters that move the cursor, reverse the reading order or are not assigned.

    Args:
        text: A text, or anything with a str().

    Returns:
        The text, such characters as Python's escapes of them.
    """
    whole = str(text)
    if whole.isprintable():
        return whole
    return "".join(c if _is_printable(c) else repr(c)[1:-1] for c in whole)


def _is_printable(character: str) -> bool:
    return (
        character.isprintable()
        or character in _JOINERS
        or unicodedata.category(character) == "Zs"  # spaces of any width
    )


def escape_surrogates(text: str) -> str:
    """Escape lone surrogates, which UTF-8 cannot encode.

    Args:
        text: A text. Python puts surrogates into file names that are not UTF-8.

    Returns:
        The text, surrogates as Python's escapes of them.
    """
    return text.encode("utf-8", "backslashreplace").decode()


def dump_json(value: Any, indent: int | None = 2) -> str:
    """Encode a value as JSON with Unicode characters.

    Args:
        value: Any value that json encodes.
        indent: Spaces a level; None writes one line.

    Returns:
        The JSON text; lone surrogates as JSON's own escapes.
    """
    return escape_surrogates(json.dumps(value, indent=indent, ensure_ascii=False))


def escape_record(record: logging.LogRecord) -> bool:
    """Escape the message of a log record, as a filter of vitlib's logger.

    Args:
        record: The record, changed in place. Each line of a traceback stays a line.

    Returns:
        True: no record is dropped.
    """
    record.msg, record.args = escape_unprintable(record.getMessage()), ()
    if record.exc_info:
        text = record.exc_text or logging.Formatter().formatException(record.exc_info)
        record.exc_text = "\n".join(map(escape_unprintable, text.split("\n")))
    return True
