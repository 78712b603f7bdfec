"""The source of the model's files: syntax trees, the text of each node, and comments."""

from __future__ import annotations

import ast
import inspect
import io
import tokenize
from functools import cached_property
from types import ModuleType
from typing import Any


class SourceFile:
    """A file of the model.

    Args:
        module: The imported module.
    """

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.text = inspect.getsource(module)
        self.lines = self.text.splitlines()
        self.tree = ast.parse(self.text)
        self.functions: dict[tuple[str, str], ast.FunctionDef] = {}
        self.classes: dict[str, ast.ClassDef] = {}
        self.assigns: dict[str, ast.Assign] = {}
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef):
                self.functions["", node.name] = node
            elif isinstance(node, ast.ClassDef):
                self.classes[node.name] = node
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef):
                        self.functions[node.name, inner.name] = inner
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.assigns[node.targets[0].id] = node

    @property
    def names(self) -> dict[str, Any]:
        """Globals of the module."""
        return vars(self.module)

    def segment(self, start: tuple[int, int], end: tuple[int, int]) -> str:
        """Return the text between two positions.

        Args:
            start: Line from 1, and column in bytes; sources of the model are ASCII.
            end: The same of the end.
        """
        (first, left), (last, right) = start, end
        if first == last:
            return self.lines[first - 1][left:right]
        rows = [self.lines[first - 1][left:], *self.lines[first : last - 1]]
        return "\n".join([*rows, self.lines[last - 1][:right]])

    def text_of(self, node: ast.expr | ast.stmt) -> str:
        """Return the source of a node.

        Args:
            node: An expression or a statement.
        """
        return self.segment(start_of(node), end_of(node))

    @cached_property
    def comments(self) -> dict[int, tuple[str, bool]]:
        """By line, its comment, and True where it has the line for itself."""
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        return {
            token.start[0]: (token.string, not token.line[: token.start[1]].strip())
            for token in tokens
            if token.type == tokenize.COMMENT
        }

    def comments_above(self, line: int) -> list[str]:
        """Return the comments on the lines directly above a line.

        Args:
            line: Number of the line, from 1.
        """
        above: list[str] = []
        while line - 1 in self.comments and self.comments[line - 1][1]:
            line -= 1
            above.insert(0, self.comments[line][0])
        return above

    def trailing_comment(self, line: int) -> str:
        """Return the comment at the end of a line of code, two spaces before it; or nothing.

        Args:
            line: Number of the line, from 1.
        """
        text, is_alone = self.comments.get(line, ("", False))
        return f"  {text}" if text and not is_alone else ""


def stored_names(node: ast.AST) -> list[str]:
    """List the local names that a function stores, once for each store.

    Args:
        node: The function, whose node stores the list from then on.
    """
    facts = vars(node)
    if "stored_names" not in facts:
        names = [part for part in ast.walk(node) if isinstance(part, ast.Name)]
        facts["stored_names"] = [part.id for part in names if isinstance(part.ctx, ast.Store)]
    stored: list[str] = facts["stored_names"]
    return stored


def names_read_after(function: ast.FunctionDef, call: ast.expr) -> set[str]:
    """Return the names that a function reads after a call; in a loop all that it reads.

    Args:
        function: The function.
        call: A call in its body.
    """
    # The next turn of a loop reads what stands above the call, too.
    loops = [part for part in ast.walk(function) if isinstance(part, ast.For | ast.While)]
    in_loop = any(loop.lineno <= call.lineno <= (loop.end_lineno or 0) for loop in loops)
    return {
        part.id
        for part in ast.walk(function)
        if isinstance(part, ast.Name)
        and isinstance(part.ctx, ast.Load)
        and (in_loop or part.lineno > (call.end_lineno or call.lineno))
    }


def start_of(node: ast.expr | ast.stmt | ast.keyword) -> tuple[int, int]:
    """Return the position at which a node begins.

    Args:
        node: A node of a tree.
    """
    return node.lineno, node.col_offset


def end_of(node: ast.expr | ast.stmt | ast.keyword) -> tuple[int, int]:
    """Return the position after a node.

    Args:
        node: A node of a tree.
    """
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    return node.end_lineno, node.end_col_offset
