"""Assignments of the model's source, written for one model: what nothing reads is left out."""

from __future__ import annotations

import ast
import re

from torch import Tensor, nn

from vitlib.vendor.peephole import Line
from vitlib.vendor.source import stored_names
from vitlib.vendor.splicing import Splicing
from vitlib.vendor.values import Values

NUMBER = re.compile(r"-?[\d.]+")


class Assignments(Splicing):
    """Writer of the assignments of one function. Arguments: as for Splicing."""

    live: set[str]  # local names that the body reads

    def _write_assign(self, node: ast.Assign, level: int) -> tuple[list[Line], bool]:
        if len(node.targets) == 1 and isinstance(node.targets[0], ast.Tuple):
            return self._write_tuple(node.targets[0], node.value, level), False
        if isinstance(node.targets[0], ast.Name):
            if self._names_attribute(node) or self._lists(node.targets[0], node.value, level):
                return [], False
            spliced = self._splice_assign(node.targets[0], node.value, level)
            if spliced:
                return spliced, False
        values = self.expressions.evaluate(node.value)
        kept = [target for target in node.targets if self._keeps(target, values, node.value)]
        name = kept[0].id if len(kept) == 1 and isinstance(kept[0], ast.Name) else ""
        # A call whose result nothing reads is a check, as of the images: it stays.
        if name and name not in self.live and isinstance(node.value, ast.Call):
            return [Line(level, self.expressions.write(node.value))], False
        text = self.expressions.write(node.value) if kept else ""
        for target in node.targets:
            self.bind(target, values, node.value)
        targets = [self.expressions.write(target) for target in kept]
        if not kept or targets == [text]:
            return [], False
        if targets[0].startswith("self.") and NUMBER.fullmatch(text):
            self._note_literal(targets[0][5:])
        return [Line(level, " = ".join([*targets, text]))], False

    def _lists(self, target: ast.expr, value: ast.expr, level: int) -> bool:
        """Note the members of a list that the forward builds, so that its uses have them."""
        is_list = isinstance(value, ast.List | ast.ListComp)
        if level or not isinstance(target, ast.Name) or not is_list:
            return False
        members = self.expressions.list_members(value)
        if members is None:
            return False
        self.env[target.id] = None
        self.expressions.lists[target.id] = members
        return True

    def _extends_list(self, call: ast.Call, level: int) -> bool:
        """Note a member that is added to such a list."""
        func = call.func
        if not isinstance(func, ast.Attribute) or not isinstance(func.value, ast.Name):
            return False
        members = self.expressions.lists.get(func.value.id)
        if members is None:
            return False
        assert not level, "a list grows where its members are not known"
        assert func.attr in ("append", "insert")
        text = self.expressions.write(call.args[-1])
        members.insert(0 if func.attr == "insert" else len(members), text)
        return True

    def _names_attribute(self, node: ast.Assign) -> bool:
        """Return True if an assignment gives an attribute a second name, which is not needed."""
        target = node.targets[0]
        assert isinstance(target, ast.Name)
        if self._stores(target.id) != 1 or len(node.targets) != 1:
            return False
        text = self.expressions.write(node.value)
        if not re.fullmatch(r"self\.\w+(\[[^\]]*\])?", text):
            return False
        self.env[target.id] = self.expressions.evaluate(node.value)
        self.expressions.texts[target.id] = text
        return True

    def _write_annassign(self, node: ast.AnnAssign, level: int) -> tuple[list[Line], bool]:
        if node.value is None:
            return [], False
        if self._lists(node.target, node.value, level):
            return [], False
        values = self.expressions.evaluate(node.value)
        keeps = self._keeps(node.target, values, node.value)
        text = self.expressions.write(node.value) if keeps else ""
        self.bind(node.target, values, node.value)
        if not keeps:
            return [], False
        target = self.expressions.write(node.target)
        # An empty list needs its type said; the type of other values is clear.
        annotation = f": {self.file.text_of(node.annotation)}" if text == "[]" else ""
        return [Line(level, f"{target}{annotation} = {text}")], False

    def _write_tuple(self, target: ast.Tuple, value: ast.expr, level: int) -> list[Line]:
        """Write an assignment to several targets, without those that nothing reads."""
        if isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts):
            return self._write_pairs(target, value, level)
        return self._write_unpacking(target, value, level)

    def _write_pairs(self, target: ast.Tuple, value: ast.Tuple, level: int) -> list[Line]:
        """Write `a, b = x, y`."""
        pairs = list(zip(target.elts, value.elts, strict=True))
        results = [self.expressions.evaluate(part) for _, part in pairs]
        kept = [
            (a, b)
            for (a, b), values in zip(pairs, results, strict=True)
            if self._keeps(a, values, b)
        ]
        right = [self.expressions.write(part) for _, part in kept]
        for (part, source), values in zip(pairs, results, strict=True):
            self.bind(part, values, source)
        left = [self.file.text_of(part) for part, _ in kept]
        for name, text in zip(left, right, strict=True):
            if name.startswith("self.") and NUMBER.fullmatch(text):
                self._note_literal(name[5:])
        if not kept or left == right:
            return []
        if len(kept) == 1 and left[0].startswith("("):
            left[0] = left[0][1:-1]
        text = f"{', '.join(left)} = {', '.join(right)}"
        if len(text) > 90 and all(name.startswith("self.") for name in left):
            return [Line(level, f"{a} = {b}") for a, b in zip(left, right, strict=True)]
        return [Line(level, text)]

    def _write_unpacking(self, target: ast.Tuple, value: ast.expr, level: int) -> list[Line]:
        """Write `a, b = f(x)`, without elements that are None or that nothing reads."""
        slots: set[int] = set()
        functions = self.expressions.resolve(value.func) if isinstance(value, ast.Call) else []
        if functions:
            parts = [part.id if isinstance(part, ast.Name) else "" for part in target.elts]
            dead = {index for index, name in enumerate(parts) if name and name not in self.live}
            for function in functions:
                self.program.note_dead(function, value, dead)
            slots = self.program.none_slots(functions[0])
        self.expressions.unpacking = True
        text = self.expressions.write(value)
        self.expressions.unpacking = False
        only = functions[0] if len(functions) == 1 else None
        if isinstance(value, ast.Call) and only and self._can_splice(value, only, target):
            return self._splice_result(target, slots, only, level)
        names = []
        for index, part in enumerate(target.elts):
            self.bind(part, (None,) if index in slots else None, None)
            if index not in slots:
                names.append(self.file.text_of(part))
        if text.isidentifier() and not set(names) & self.live:
            return []
        left = ", ".join(names)
        return [] if left == text else [Line(level, f"{left} = {text}")]

    def _stores(self, name: str) -> int:
        return stored_names(self.function.node).count(name)

    def _note_literal(self, attribute: str) -> None:
        """Note that an attribute is a number that the file has, and no size of the model."""
        for module in self.env["self"] or ():
            if (type(module).__name__, attribute) not in self.program.literals:
                self.program.literals.add((type(module).__name__, attribute))
                self.program.change()

    def _keeps(self, target: ast.expr, values: Values, source: ast.expr | None = None) -> bool:
        """Return True if an assignment is written: something reads it, or it holds weights."""
        if isinstance(target, ast.Name):
            has_effect = values is None and source is not None and not _is_pure(source)
            return target.id in self.live or has_effect
        if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
            current = self.expressions.evaluate(_load(target))
            if current is not None and all(isinstance(v, nn.Module | Tensor) for v in current):
                identity = all(isinstance(value, nn.Identity) for value in current)
                return values != (None,) and not identity
            # None in every module: each read of it is folded.
            if current == (None,):
                return False
            if current is not None and any(isinstance(v, nn.Module | Tensor) for v in current):
                return True
            return target.attr in self.program.attributes
        return True

    def bind(self, target: ast.expr, values: Values, source: ast.expr | None) -> None:
        """Note the values of a local name.

        Args:
            target: The name.
            values: Its values.
            source: The expression that it gets; None for one that is not written.
        """
        if isinstance(target, ast.Name) and isinstance(source, ast.Tuple):
            self.expressions.tuples[target.id] = source
        if not isinstance(target, ast.Name):
            for part in target.elts if isinstance(target, ast.Tuple) else ():
                self.bind(part, None, None)
            return
        if source is not None and values is not None and len(values) == 1:
            value = values[0]
            if isinstance(value, int | float | tuple) and not isinstance(value, bool):
                text = self.expressions.write(source)
                if re.fullmatch(r"-?[\d.e-]+", text):
                    self.expressions.aliases[target.id] = text
        if values and any(isinstance(v, list | dict | Tensor) for v in values):
            values = None
        self.env[target.id] = values


def _is_pure(node: ast.expr) -> bool:
    """Return True if an expression does no more than compute numbers of the forward's shapes."""
    calls = [ast.unparse(part.func) for part in ast.walk(node) if isinstance(part, ast.Call)]
    return set(calls) <= {"zip", "len", "max", "min", "int", "float", "bool", "range"}


def _load(node: ast.Attribute) -> ast.Attribute:
    copy = ast.Attribute(node.value, node.attr, ast.Load())
    return ast.copy_location(copy, node)
