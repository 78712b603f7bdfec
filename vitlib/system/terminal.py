"""Text of files, labels and names as a terminal and a log may have it.

A label or a file's name can hold escape sequences that set a terminal's title or its clipboard,
newlines that write another line, and characters that turn the reading order. Here, and only here,
they become the escapes that Python writes them with. JSON is left as it is.
"""

from __future__ import annotations

import json
import logging
import unicodedata
from typing import Any

# Joiners that Persian, Indic scripts and emoji need; they neither move nor hide other characters.
_JOINERS = "\u200c\u200d"


def escape_unprintable(text: object) -> str:
    """Text in which what is no character, and what moves the cursor or turns the reading order, is
    written as its escape."""
    whole = str(text)
    if whole.isprintable():
        return whole
    return "".join(c if _is_shown(c) else repr(c)[1:-1] for c in whole)


def _is_shown(character: str) -> bool:
    return (
        character.isprintable()
        or character in _JOINERS
        or unicodedata.category(character) == "Zs"  # spaces of any width
    )


def escape_surrogates(text: str) -> str:
    """Text that UTF-8 can hold: a lone surrogate, as in a name that is not UTF-8, as its escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def dump_json(value: Any, indent: int | None = 2) -> str:
    """A value as JSON, in Unicode; a lone surrogate as JSON's own escape of it."""
    return escape_surrogates(json.dumps(value, indent=indent, ensure_ascii=False))


def escape_record(record: logging.LogRecord) -> bool:
    """A filter of vitlib's logger: what a record quotes cannot write to the terminal.

    Every line of a traceback is kept as a line.
    """
    record.msg, record.args = escape_unprintable(record.getMessage()), ()
    if record.exc_info:
        text = record.exc_text or logging.Formatter().formatException(record.exc_info)
        record.exc_text = "\n".join(map(escape_unprintable, text.split("\n")))
    return True
