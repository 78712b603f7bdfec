"""The model's source for one model as text: functions and classes in the order of their files."""

from __future__ import annotations

import ast
import re

from torch import nn

from vitlib.vendor.classes import ClassWriter
from vitlib.vendor.layout import docstring, fit_line, fit_signature
from vitlib.vendor.program import Function, Program
from vitlib.vendor.statements import FunctionWriter
from vitlib.vendor.words import in_own_words

ROOTS = ("__init__", "forward", "forward_features")
MAX_PASSES = 60


class Emitter:
    """Writer of all the classes and functions that a model's forward reaches.

    Args:
        model: The model, in eval mode.
        compact: As for `Program`.
    """

    def __init__(self, model: nn.Module, *, compact: bool = False) -> None:
        self.model = model
        self.program = Program(model, compact=compact)
        self.bodies: dict[Function, list[str]] = {}

    def write(self) -> list[str]:
        """Write every definition.

        Returns:
            Definitions in order, each a text of several lines.
        """
        # The first round learns from calls that the second one no longer writes.
        self._settle()
        self.program.forget()
        self._settle()
        self.program.start_pass()
        self.bodies = {f: self._function_lines(f) for f in list(self.program.reached)}
        self.program.reached = [f for f in self.program.reached if f not in self.program.spliced]
        self.bodies = {f: lines for f, lines in self.bodies.items() if f in self.program.reached}
        self._drop_unused()
        self._merge_features()
        classes = ClassWriter(self.program, self.bodies)
        definitions = []
        for file in self.program.files.values():
            for node in file.tree.body:
                if isinstance(node, ast.FunctionDef):
                    lines = [self.bodies[f] for f in self.program.reached if f.node is node]
                    definitions += ["\n".join(body) for body in lines]
                elif isinstance(node, ast.ClassDef):
                    definitions.append(classes.write(file, node))
        return [classes.rename(text) for text in definitions if text]

    def _merge_features(self) -> None:
        """Write _encode as forward_features where both compute the same."""
        methods = {f.node.name: f for f in self.program.reached if f.owner is type(self.model)}
        public, private = methods.get("forward_features"), methods.get("_encode")
        if public is None or private is None or public.body != "return self._encode(images)":
            return
        head = len(self.bodies[private]) - len(self._body_lines(private))
        self.bodies[public] = self.bodies[public][:2] + self.bodies[private][head:]
        del self.bodies[private]
        self.program.reached.remove(private)
        self.bodies = {
            f: [line.replace("self._encode(", "self.forward_features(") for line in lines]
            for f, lines in self.bodies.items()
        }

    def _body_lines(self, function: Function) -> list[str]:
        """Return the lines of a body, after its docstring."""
        lines = self.bodies[function]
        last = max(i for i, line in enumerate(lines) if line.strip().startswith('"""'))
        return lines[last + 1 :]

    def _drop_unused(self) -> None:
        """Leave out functions whose every call was written in place."""
        roots = [self.program.method(type(self.model), name) for name in ROOTS]
        waiting, emitted = list(roots), set(roots)
        visited: set[Function | None] = set()
        while waiting:
            function = waiting.pop()
            if function is None or function in visited:
                continue
            visited.add(function)
            edges = self.program.edges.get(function, {})
            emitted |= {target for target, inline in edges.items() if not inline}
            waiting += edges
        self.program.reached = [
            f for f in self.program.reached if f in emitted and f in self.bodies
        ]
        self.bodies = {f: self.bodies[f] for f in self.program.reached}

    def _settle(self) -> None:
        """Render until no function learns anything new."""
        kind = type(self.model)
        for name in ROOTS:
            root = self.program.method(kind, name)
            assert root is not None
            for param in root.params:
                is_config = param in ("cfg", "config")
                root.values[param] = (self.program.config,) if is_config else None
                if not is_config:
                    root.needed.add(param)
        previous: list[str] = []
        for _ in range(MAX_PASSES):
            self.program.start_pass()
            for function in list(self.program.reached):
                FunctionWriter(self.program, function).write()
            self.program.share_needs()
            bodies = [function.body for function in self.program.reached]
            if not self.program.changed and bodies == previous:
                return
            previous = bodies
        raise RuntimeError("the source of the model does not settle")

    def _function_lines(self, function: Function) -> list[str]:
        """Write a function: its first line, the first line of its docstring, and its body."""
        node, depth = function.node, 1 if function.owner else 0
        body = FunctionWriter(self.program, function).write()
        params, unused = self._params(function), False
        for name in function.needed:
            unused |= not any(re.search(rf"\b{name}\b", line.text) for line in body)
        note = "  # noqa: ARG002" if unused else ""
        tail = f" -> {self._returns(function)}:"
        lines = fit_signature(f"def {node.name}", params, tail, depth, note)
        lines += docstring(ast.get_docstring(node) or "", depth + 1)
        for line in body:
            lines += fit_line(in_own_words(line.text), depth + 1 + line.level)
        return lines

    def _params(self, function: Function) -> list[str]:
        """Write the parameters that a function needs."""
        node, file = function.node, function.file
        params = ["self"] if function.owner else []
        for arg in node.args.args:
            if arg.arg in function.needed:
                assert arg.annotation is not None
                default = function.defaults.get(arg.arg)
                if self.program.compact and (function, arg.arg) not in self.program.used_defaults:
                    default = None
                suffix = "" if default is None else f" = {file.text_of(default)}"
                annotation = self._annotation(file.text_of(arg.annotation))
                params.append(f"{arg.arg}: {annotation}{suffix}")
        return params

    def _annotation(self, text: str) -> str:
        return in_own_words(re.sub(r"\bViTConfig\b", "Config", text))

    def _returns(self, function: Function) -> str:
        """Write the type of what a function returns."""
        returns, file = function.node.returns, function.file
        assert returns is not None
        text = file.text_of(returns)
        for other in self.program.files.values():  # QKBias and the like, by what they stand for
            if text in other.assigns:
                text = other.text_of(other.assigns[text].value)
        slots = self.program.none_slots(function)
        if slots and text.startswith("tuple["):
            tree = ast.parse(text, mode="eval").body
            assert isinstance(tree, ast.Subscript)
            assert isinstance(tree.slice, ast.Tuple)
            parts = [ast.unparse(p) for i, p in enumerate(tree.slice.elts) if i not in slots]
            text = f"tuple[{', '.join(parts)}]" if len(parts) > 1 else parts[0]
        return self._annotation(text)
