"""Small rewrites of neighbouring lines that folding leaves behind."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

from vitlib.vendor.layout import WIDTH


@dataclass
class Line:
    """A line of code, before it is broken to the width of the file.

    Attributes:
        level: Levels of indentation within the function's body.
        text: Code or comment.
    """

    level: int
    text: str


def tidy(lines: list[Line]) -> list[Line]:
    """Join lines that are clearer as one.

    Args:
        lines: Body of a function.

    Returns:
        The body. `x = f(x)`, `return x` becomes `return f(x)`; `x = f(y)`, `x = x[0]` becomes
        `x = f(y)[0]`; and `steps = f(x)`, `for x in steps:` becomes `for x in f(x):`.
    """
    result: list[Line] = []
    for line in lines:
        joined = _join(result[-1], line, lines) if result else None
        if joined is None:
            result.append(line)
        else:
            result[-1] = joined
    return result


def _join(first: Line, second: Line, lines: list[Line]) -> Line | None:
    """Return two lines as one, or None."""
    match = re.fullmatch(r"(\w+) = (.*)", first.text)
    if not match or first.level != second.level or "  #" in first.text:
        return None
    name, value = match.groups()
    if second.text == f"return {name}":
        return Line(first.level, f"return {value}")
    if re.match(rf"{name} = {name}[\[.]", second.text) and not re.search(r" [-+*/@]+ | if ", value):
        suffix = second.text[len(f"{name} = {name}") :]
        if not re.search(rf"\b{name}\b", suffix):
            return _if_short(first.level, f"{name} = {value}{suffix}")
    uses = sum(len(re.findall(rf"\b{name}\b", line.text)) for line in lines)
    if uses == 2 and second.text.startswith("for ") and second.text.endswith(f" in {name}:"):
        return _if_short(first.level, f"{second.text[: -len(name) - 1]}{value}:")
    match = re.fullmatch(rf"(\w+ = \w+ \+ ){name}", second.text)
    if uses == 2 and match:  # x = x + f(y)
        return _if_short(first.level, match[1] + value)
    if uses == 2 and re.fullmatch(r"list\(\w+\)", value):
        return Line(first.level, re.sub(rf"\b{name}\b", value[5:-1], second.text))
    return None


def _if_short(level: int, text: str) -> Line | None:
    return Line(level, text) if 4 * (level + 2) + len(text) <= WIDTH else None


def loaded_names(lines: list[Line]) -> set[str]:
    """List the names that lines read.

    Args:
        lines: Lines of a function's body.
    """
    base = min((line.level for line in lines), default=0)
    text = "\n".join("    " * (line.level - base) + line.text for line in lines)
    text = re.sub("\x02[^\x02]*\x02", "", text).replace("\x01", " ")
    wrapped = "def f():\n" + "\n".join("    " + row for row in text.splitlines()) + "\n    pass"
    names = set()
    for node in ast.walk(ast.parse(wrapped)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            names.add(node.id)
    return names
