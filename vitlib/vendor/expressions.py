"""Expressions of the model's source, written for one model: what is known of it is folded in."""

from __future__ import annotations

import ast
import re
from typing import Any

from torch import Tensor, nn

from vitlib.config import ViTConfig
from vitlib.config_parts import SHORT_NAMES, Rope
from vitlib.vendor.layout import join_lines
from vitlib.vendor.program import Function, Program
from vitlib.vendor.source import end_of, start_of
from vitlib.vendor.values import Values, evaluate, is_record, literal, truth

# Fields of the config that the file keeps as fields: sizes, which a reader may want to change.
SIZES = (
    "in_channels", "patch_size", "grid_size", "embed_dim", "depth", "num_heads", "mlp_dim",
    "num_features", "num_classes", "norm_eps",
)  # fmt: skip
# Calls of a config's facts, which are written as their result.
FOLDED_CALLS = {"int", "isinstance", "math.isqrt", "self.count_queries", "bool"}
# Messages that the file has no room for: see WORDS of file.py.
UNWRITTEN = {"_misfit"}
MAX_LIST = 48  # characters of a list that stands within an expression
ATOM = re.compile(r"[\w.]+|\"[^\"]*\"")


class Expressions:
    """Writer of the expressions of one function.

    Args:
        program: The model's source.
        function: The function.
        env: Values of its local names.
    """

    def __init__(self, program: Program, function: Function, env: dict[str, Values]) -> None:
        self.program, self.function, self.env = program, function, env
        self.file = function.file
        self.aliases: dict[str, str] = {}  # local names of constants -> the constant
        self.has_positions = program.model.attn_position is not None
        self.local_functions: dict[str, ast.FunctionDef] = {}  # of one argument and one expression
        self.pending: list[str] = []  # lines that stand above the statement that is written
        self.lists: dict[str, list[str]] = {}  # lists that a forward builds -> their members
        self.tuples: dict[str, ast.Tuple] = {}  # local names of tuples
        self.texts: dict[str, str] = {}  # local names of attributes -> the attribute
        self.unpacking = False
        self.class_names = program.class_names

    def evaluate(self, node: ast.expr) -> Values:
        """Return the values of an expression, None where they are unknown.

        Args:
            node: The expression.
        """
        return evaluate(node, self.env, self.file.names)

    def truth(self, node: ast.expr) -> bool | None:
        """Return the truth of a condition, or None where it is unknown.

        Args:
            node: The condition.
        """
        return truth(node, self.env, self.file.names)

    def write(self, node: ast.expr) -> str:
        """Write an expression on one line.

        Args:
            node: The expression.
        """
        if isinstance(getattr(node, "ctx", None), ast.Store):
            return self.file.text_of(node)
        method = getattr(self, f"_write_{type(node).__name__.lower()}", None)
        if method is not None:
            return str(method(node))
        if isinstance(node, ast.Compare | ast.UnaryOp):
            values = self.evaluate(node)
            if values is not None and len(values) == 1 and isinstance(values[0], bool):
                return repr(values[0])
        return self._compose(node)

    def _single(self, node: ast.expr) -> tuple[bool, Any]:
        """Return (True, value) where an expression has one value."""
        values = self.evaluate(node)
        if values is None or len(values) != 1:
            return False, None
        return True, values[0]

    def set_aside(self, name: str, text: str) -> str:
        """Note a line `name = text` that stands above the statement that is written.

        Args:
            name: A local name.
            text: Its value.

        Returns:
            The name.
        """
        line = f"{name} = {text}"
        # An expression may be written more than once before its statement is.
        if line not in self.pending:
            self.pending.append(line)
        return name

    def _compose(self, node: ast.expr) -> str:
        """Write a node as its source, with its parts written in their turn."""
        parts = sorted(_children(node), key=start_of)
        if not parts:
            return join_lines(self.file.text_of(node))
        start, end = start_of(node), end_of(node)
        # Source between the parts stays as it is, with its quotes, numbers and spaces.
        chunks, texts = [], []
        for part in parts:
            chunks.append(self.file.segment(start, start_of(part)))
            texts.append(self.write(part))
            start = end_of(part)
        chunks.append(self.file.segment(start, end))
        for index, part in enumerate(parts):
            is_operand = isinstance(node, ast.BinOp | ast.Compare | ast.UnaryOp | ast.BoolOp)
            is_head = isinstance(node, ast.Attribute | ast.Subscript) and index == 0
            if not (is_operand or is_head) or texts[index] == join_lines(self.file.text_of(part)):
                continue
            outside = re.sub(r"^[\w.]+\(.*\)$", "", texts[index])
            if isinstance(part, ast.Name | ast.Attribute) and re.search(r" [-+*/]+ ", outside):
                texts[index] = f"({texts[index]})"
            has_parens = chunks[index].endswith("(") and chunks[index + 1].startswith(")")
            if has_parens and ATOM.fullmatch(texts[index]):
                chunks[index], chunks[index + 1] = chunks[index][:-1], chunks[index + 1][1:]
        text = "".join(a + b for a, b in zip(chunks, [*texts, ""], strict=True))
        return join_lines(text)

    def _write_name(self, node: ast.Name) -> str:
        if node.id in self.texts:
            return self.texts[node.id]
        if node.id in self.lists:
            members = "[" + ", ".join(self.lists[node.id]) + "]"
            return self.set_aside(node.id, members) if len(members) > MAX_LIST else members
        is_single, value = self._single(node) if node.id in self.env else (False, None)
        if is_single:
            if isinstance(value, Rope):
                return self._write_rope(node, value)
            if value is None or isinstance(value, bool | str | type):
                text = literal(value, self.class_names)
                if text is not None:
                    return text
            if node.id in self.aliases:
                return self.aliases[node.id]
        if isinstance(node.ctx, ast.Load) and node.id in self.function.params:
            self.program.need(self.function, node.id)
        return node.id

    def _write_attribute(self, node: ast.Attribute) -> str:
        owners = self.evaluate(node.value)
        if owners is not None and owners and all(is_record(owner) for owner in owners):
            return self._write_field(node, owners)
        if owners and all(isinstance(owner, nn.Module) for owner in owners):
            is_single, value = self._single(node)
            if is_single and not isinstance(value, nn.Module | Tensor) and not is_record(value):
                is_own = all(node.attr in vars(owner) for owner in owners)
                is_literal = (type(owners[0]).__name__, node.attr) in self.program.literals
                if value is None or isinstance(value, bool | str) or not is_own or is_literal:
                    text = literal(value, self.class_names)
                    if text is not None:
                        return text
            if isinstance(node.ctx, ast.Load):
                self.program.note_attribute(node.attr)
        elif isinstance(node.ctx, ast.Load):
            self.program.note_attribute(node.attr)
        return self._compose(node)

    def _write_field(self, node: ast.Attribute, owners: tuple[Any, ...]) -> str:
        """Write a field of a config: its value, or for a size the field."""
        name = node.attr
        values = self.evaluate(node) or ()
        if all(isinstance(owner, ViTConfig) for owner in owners) and name in DERIVED:
            root = self._record_root(node)
            for size in DERIVED_FIELDS[name]:
                self.program.fields.setdefault(size, getattr(self.program.config, size))
            derived = DERIVED[name].format(root=root, config=self.program.config)
            return derived.removeprefix("0 + ")
        is_size = name in SIZES and isinstance(owners[0], ViTConfig)
        if len(values) == 1 and not is_size:
            if isinstance(values[0], Rope):
                return self._write_rope(node, values[0])
            text = literal(values[0], self.class_names)
            if text is not None:
                return text
            return self._compose(node)
        if isinstance(owners[0], Rope):
            if name not in self.program.rope_fields:
                self.program.rope_fields.add(name)
                self.program.change()
            return self._compose(node)
        short = name if is_size else _short_name(node)
        if short not in self.program.fields:
            self.program.fields[short] = _lookup(self.program.config, node, owners)
            self.program.change()
        return f"{self._record_root(node)}.{short}"

    def _write_rope(self, node: ast.expr, rope: Rope) -> str:
        """Write the rotation of some tokens, where it differs from that of others."""
        if isinstance(node, ast.Name) and node.id in self.function.params:
            self.program.need(self.function, node.id)
            return node.id
        fields = sorted(self.program.rope_fields)
        return f"Rope({', '.join(f'{f}={literal(getattr(rope, f), {})}' for f in fields)})"

    def _record_root(self, node: ast.Attribute) -> str:
        """Write the config that a chain of fields begins with."""
        inner: ast.expr = node.value
        while isinstance(inner, ast.Attribute):
            owners = self.evaluate(inner.value)
            if not owners or not is_record(owners[0]):
                break
            inner = inner.value
        if isinstance(inner, ast.Attribute):
            self.program.note_attribute(inner.attr)
            return self._compose(inner)
        assert isinstance(inner, ast.Name)
        if inner.id in self.texts:
            return self.texts[inner.id]
        if inner.id in self.function.params:
            self.program.need(self.function, inner.id)
        return inner.id if inner.id in self.function.params else "cfg"

    def _write_ifexp(self, node: ast.IfExp) -> str:
        answer = self.truth(node.test)
        if answer is None:
            body, orelse = self.write(node.body), self.write(node.orelse)
            return body if body == orelse else self._compose(node)
        return self.write(node.body if answer else node.orelse)

    def _write_boolop(self, node: ast.BoolOp) -> str:
        is_single, value = self._single(node)
        if is_single and (value is None or isinstance(value, bool)):
            return repr(value)
        ends, parts = isinstance(node.op, ast.Or), []
        for index, part in enumerate(node.values):
            answer = self.truth(part)
            if answer is ends:
                parts.append(self.write(part))
                break
            if answer is None or (index == len(node.values) - 1):
                parts.append(self.write(part))
        return (" or " if ends else " and ").join(parts)

    def _write_binop(self, node: ast.BinOp) -> str:
        left, right = self.write(node.left), self.write(node.right)
        if isinstance(node.op, ast.Mult) and left == "1":
            return right
        if isinstance(node.op, ast.Add) and right in ("0", "0.0"):
            return left
        is_single, value = self._single(node)
        numbers = all(re.fullmatch(r"-?[\d.e-]+", text) for text in (left, right))
        if is_single and numbers and isinstance(value, int) and not isinstance(value, bool):
            return repr(value)
        return self._compose(node)

    def _write_subscript(self, node: ast.Subscript) -> str:
        if isinstance(node.value, ast.Name) and isinstance(node.ctx, ast.Load):
            is_single, value = self._single(node)
            container = self.file.names.get(node.value.id)
            if is_single and isinstance(container, dict):
                text = literal(value, self.class_names)
                if text is not None:
                    return text
        text = self._compose(node)
        return re.sub(r"\[:(, :)*\]$", "", text)

    def _write_slice(self, node: ast.Slice) -> str:
        parts = [self.write(part) if part else "" for part in (node.lower, node.upper)]
        simple = all(re.fullmatch(r"-?\w*", part) for part in parts)
        if node.step:
            return self._compose(node)
        parts = ["" if part in ("0", "None") and part != start else part
                 for part, start in zip(parts, ("None", "0"), strict=True)]  # fmt: skip
        if simple:
            return ":".join(parts)
        return " : ".join(parts).strip()


# Fields that follow from others, written as they follow.
DERIVED = {
    "head_dim": "{root}.embed_dim // {root}.num_heads",
    "num_positions": "{config.num_prefix_positions} + {root}.grid_size[0] * {root}.grid_size[1]",
}
DERIVED_FIELDS = {"head_dim": ("embed_dim", "num_heads"), "num_positions": ("grid_size",)}


def _children(node: ast.AST) -> list[Any]:
    """List the expressions within a node that have a position of their own."""
    parts: list[Any] = []
    if isinstance(node, ast.JoinedStr):
        return parts
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            parts.append(child)
        elif isinstance(child, ast.keyword):
            parts.append(child.value)
        elif isinstance(child, ast.comprehension):
            parts += [child.target, child.iter, *child.ifs]
    return parts


def _short_name(node: ast.Attribute) -> str:
    """Return the short name of a field of a group, as vitlib's own configs have it."""
    group = node.value.attr if isinstance(node.value, ast.Attribute) else ""
    for short, path in SHORT_NAMES.items():
        if path == (group, node.attr):
            return short
    return f"{group}_{node.attr}" if group else node.attr


def _lookup(config: Any, node: ast.Attribute, owners: tuple[Any, ...]) -> Any:
    """Return the trunk's value of a field."""
    if isinstance(owners[0], ViTConfig):
        return getattr(config, node.attr)
    assert isinstance(node.value, ast.Attribute)
    return getattr(getattr(config, node.value.attr), node.attr)
