"""Lines of Python of at most 100 characters, broken as ruff format and black break them.

A line of code arrives as one string. `COMMENT` marks in it stand for a comment before an argument,
and `BREAK` for the joint of two string literals.
"""

from __future__ import annotations

import io
import re
import tokenize

from vitlib.vendor.words import in_own_words

WIDTH = 100
INDENT = "    "
BREAK = "\x01"  # a joint of implicitly joined strings
COMMENT = "\x02"  # around a comment: \x02# text\x02
_OPENING, _CLOSING = "([{", ")]}"


def fit_line(text: str, level: int) -> list[str]:
    """Break a line of code so that it fits.

    Args:
        text: The code, without indentation.
        level: Levels of indentation.

    Returns:
        Lines with their indentation.
    """
    if not text:
        return [""]
    pad = INDENT * level
    if BREAK in text and (match := re.fullmatch(r"(return|\w+ =) ([fr]?[\"'].*)", text)):
        text = f"{match[1]} ({match[2]})"
    if COMMENT not in text and BREAK not in text and len(pad) + len(text) <= WIDTH:
        return [pad + text]
    code, comment = _split_comment(text)
    if COMMENT not in code and BREAK not in code and comment and len(pad + code) <= WIDTH:
        return [pad + comment, pad + code]
    pair = _last_pair(code)
    if pair is None:
        return [pad + text]
    start, end = pair
    head, body, tail = code[: start + 1], code[start + 1 : end], code[end:]
    first = pad + head + ("  " + comment if comment else "")
    inner = pad + INDENT
    if COMMENT not in body and BREAK not in body and len(inner + body) <= WIDTH:
        comma = "," if head.endswith("(") and _is_lone_tuple(body) else ""
        return [first, inner + body + comma, pad + tail]
    lines = [first]
    clauses = _split_clauses(body)
    if len(clauses) > 1:
        return [first, *(inner + clause for clause in clauses), pad + tail]
    for part in split_arguments(body):
        while part.startswith(COMMENT):
            _, note, part = part.split(COMMENT, 2)
            lines.append(inner + note)
        pieces = part.split(BREAK)
        if len(pieces) > 1:
            lines += [inner + piece for piece in pieces]
        else:
            lines += fit_line(part + ",", level + 1)
    return [*lines, pad + tail]


def fit_signature(head: str, params: list[str], tail: str, level: int, note: str = "") -> list[str]:
    """Lay out the first line of a function.

    Args:
        head: Code up to the opening parenthesis, as "def forward".
        params: Parameters with annotations and defaults.
        tail: Code after the closing parenthesis, as " -> Tensor:".
        level: Levels of indentation.
        note: Comment for the line of the parameters.

    Returns:
        Lines with their indentation.
    """
    pad, body = INDENT * level, ", ".join(params)
    if len(pad + head + body + tail) + 2 <= WIDTH:
        return [f"{pad}{head}({body}){tail}{note}"]
    if len(pad + INDENT + body) <= WIDTH:
        return [f"{pad}{head}(", f"{pad}{INDENT}{body}{note}", f"{pad}){tail}"]
    return [f"{pad}{head}(", *(f"{pad}{INDENT}{param}," for param in params), f"{pad}){tail}"]


def join_lines(text: str) -> str:
    """Join the lines of an expression, without the comma before a closing bracket.

    Args:
        text: Source of an expression, or of a part of it, without comments.
    """
    text = re.sub(r"([(\[{])[ ]*\n\s*", r"\1", text)
    text = re.sub(r",?\s*\n\s*([)\]}])", r"\1", text)
    text = re.sub(r"([\"'])[ ]*\n\s*([fr]?[\"'])", rf"\1{BREAK}\2", text)
    return re.sub(r"\s*\n\s*", " ", text)


def _split_comment(text: str) -> tuple[str, str]:
    """Split a trailing comment from a line."""
    marked = text.replace(COMMENT, "\x03")
    if "\x03" in marked:
        return text, ""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text.replace(BREAK, " ")).readline))
    except tokenize.TokenError:
        return text, ""
    for token in tokens:
        if token.type == tokenize.COMMENT:
            return text[: token.start[1]].rstrip(), token.string
    return text, ""


def _pairs(code: str) -> list[tuple[int, int]]:
    """List the outermost pairs of brackets, outside of strings and comments."""
    pairs, stack, quote, index = [], [], "", 0
    while index < len(code):
        char = code[index]
        if quote:
            if char == "\\":
                index += 1
            elif char == quote:
                quote = ""
        elif char in "\"'":
            quote = char
        elif char == COMMENT:
            index = code.index(COMMENT, index + 1)
        elif char in _OPENING:
            stack.append(index)
        elif char in _CLOSING and stack:
            start = stack.pop()
            if not stack:
                pairs.append((start, index))
        index += 1
    return pairs


def _last_pair(code: str) -> tuple[int, int] | None:
    """Return the last outermost pair of brackets that holds anything."""
    pairs = [pair for pair in _pairs(code) if pair[1] > pair[0] + 1]
    return pairs[-1] if pairs else None


def split_arguments(body: str) -> list[str]:
    """Split code at commas outside of brackets and strings.

    Args:
        body: Arguments, or the members of a tuple.
    """
    covered = set()
    for start, end in _pairs(body):
        covered |= set(range(start, end + 1))
    parts, part, quote, index = [], "", "", 0
    while index < len(body):
        char = body[index]
        if char == COMMENT and not quote:
            end = body.index(COMMENT, index + 1)
            part += body[index : end + 1]
            index = end + 1
            continue
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'" and index not in covered:
            quote = char
        if char == "," and index not in covered and not quote:
            parts.append(part.strip())
            part = ""
        else:
            part += char
        index += 1
    return [*parts, part.strip()] if part.strip() else parts


def _split_clauses(body: str) -> list[str]:
    """Split a comprehension before its `for` and `if`."""
    covered = {i for start, end in _pairs(body) for i in range(start, end + 1)}
    if not re.match(r"[^,]* for ", "".join("_" if i in covered else c for i, c in enumerate(body))):
        return [body]
    cuts = [m.start() for m in re.finditer(r" (?=for |if )", body) if m.start() not in covered]
    ends = [*cuts[1:], len(body)]
    return [body[: cuts[0]], *(body[a + 1 : b] for a, b in zip(cuts, ends, strict=True))]


def _is_lone_tuple(body: str) -> bool:
    return body.endswith(",")


def docstring(text: str, level: int) -> list[str]:
    """Write the first line of a docstring as one of its own.

    Args:
        text: The docstring; nothing gives no line.
        level: Levels of indentation.

    Returns:
        The line, if any.
    """
    if not text:
        return []
    text = in_own_words(text.splitlines()[0])
    line = "    " * level + f'"""{text}"""'
    if len(line) > WIDTH:  # the last reference in parentheses is left out
        line = re.sub(r" \([^()]*\)\.\"\"\"$", '."""', line)
    return [line]
