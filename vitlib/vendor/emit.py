"""The model's source for one model as text: functions and classes in the order of their files."""

from __future__ import annotations

import ast
import re

from torch import nn

from vitlib.vendor.layout import WIDTH, fit_line, fit_signature
from vitlib.vendor.program import FILES, Function, Program
from vitlib.vendor.source import SourceFile
from vitlib.vendor.statements import FunctionWriter
from vitlib.vendor.words import in_own_words

ROOTS = ("__init__", "forward", "forward_features")
MAX_PASSES = 60


def docstring(text: str, level: int) -> list[str]:
    """Write a docstring of one line.

    Args:
        text: The line.
        level: Levels of indentation.
    """
    line = "    " * level + f'"""{text}"""'
    if len(line) > WIDTH:  # the last reference in parentheses is left out
        line = re.sub(r" \([^()]*\)\.\"\"\"$", '."""', line)
    return [line]


class Emitter:
    """Writer of all the classes and functions that a model's forward reaches.

    Args:
        model: The model, in eval mode, on the meta device or not.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.program = Program(model)
        self.program.attributes |= {"config"} - {"config"}
        self.bodies: dict[Function, list[str]] = {}

    def write(self) -> list[str]:
        """Write every definition.

        Returns:
            Definitions in order, each a text of several lines.
        """
        self._settle()
        self.program.forget()
        self._settle()
        self.program.spliced.clear()
        self.program.edges.clear()
        self.bodies = {f: self._function_lines(f) for f in list(self.program.reached)}
        self.program.reached = [f for f in self.program.reached if f not in self.program.spliced]
        self.bodies = {f: lines for f, lines in self.bodies.items() if f in self.program.reached}
        self._drop_unused()
        return self._definitions()

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
        self.program.reached = [f for f in self.program.reached if f in emitted and f in self.bodies]
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
            self.program.changed = False
            self.program.spliced.clear()
            self.program.edges.clear()
            for function in list(self.program.reached):
                FunctionWriter(self.program, function).write()
            self.program.share_needs()
            bodies = [function.body for function in self.program.reached]
            if not self.program.changed and bodies == previous:
                return
            previous = bodies
        raise RuntimeError("the source of the model does not settle")

    def _function_lines(self, function: Function, level: int = -1) -> list[str]:
        node, file = function.node, function.file
        depth = 1 if function.owner else 0
        body = FunctionWriter(self.program, function).write()
        texts = [line.text for line in body]
        params = ["self"] if function.owner else []
        unused = False
        star = bool(node.args.kwonlyargs)
        for arg in (*node.args.args, *node.args.kwonlyargs):
            if arg.arg not in function.needed:
                continue
            if star and arg in node.args.kwonlyargs and "*" not in params:
                params.append("*")
            text = f"{arg.arg}: {self._annotation(file.text_of(arg.annotation))}" if arg.annotation else arg.arg
            if arg.arg in function.defaults:
                text += f" = {file.text_of(function.defaults[arg.arg])}"
            params.append(text)
            unused |= not any(re.search(rf"\b{arg.arg}\b", line) for line in texts)
        returns = self._returns(function)
        note = "  # noqa: ARG002" if unused else ""
        lines = fit_signature(f"def {node.name}", params, f" -> {returns}:", depth, note)
        doc = ast.get_docstring(node)
        if doc:
            lines += docstring(self._doc(doc), depth + 1)
        for line in body:
            lines += fit_line(in_own_words(line.text), depth + 1 + line.level)
        return lines

    def _doc(self, doc: str) -> str:
        return in_own_words(doc.splitlines()[0])

    def _annotation(self, text: str) -> str:
        return in_own_words(re.sub(r"\bViTConfig\b", "Config", text))

    def _returns(self, function: Function) -> str:
        node, file = function.node, function.file
        text = file.text_of(node.returns) if node.returns else "None"
        alias = file.assigns.get(text)
        if alias is None and text in file.names:
            for other in self.program.files.values():
                alias = alias or other.assigns.get(text)
        if alias is not None:
            file = next(f for f in self.program.files.values() if f.assigns.get(text) is alias)
            text = file.text_of(alias.value)
        slots = self.program.none_slots(function)
        if slots and text.startswith("tuple["):
            tree = ast.parse(text, mode="eval").body
            assert isinstance(tree, ast.Subscript)
            assert isinstance(tree.slice, ast.Tuple)
            parts = [ast.unparse(p) for i, p in enumerate(tree.slice.elts) if i not in slots]
            text = f"tuple[{', '.join(parts)}]" if len(parts) > 1 else parts[0]
        return self._annotation(text)

    def _definitions(self) -> list[str]:
        chunks: list[str] = []
        for module in FILES:
            file = self.program.files[module.__name__]
            for node in file.tree.body:
                if isinstance(node, ast.FunctionDef):
                    for function in self.program.reached:
                        if function.node is node:
                            chunks.append("\n".join(self.bodies[function]))
                elif isinstance(node, ast.ClassDef):
                    text = self._class(file, node)
                    if text:
                        chunks.append(text)
        return chunks

    def _class(self, file: SourceFile, node: ast.ClassDef) -> str:
        methods = [f for f in self.program.reached if f.owner and f.owner.__name__ == node.name and f.file is file]
        kind = getattr(file.module, node.name)
        if not isinstance(kind, type) or not self.program.modules(kind) or not methods:
            return ""
        merged_into = self._merged(kind)
        if merged_into is not None and merged_into.__mro__[1] is kind:
            return ""
        bases = [base for base in kind.__mro__[1:] if base.__module__ in self.program.files]
        inherited: list[Function] = []
        names = {f.node.name for f in methods}
        parent = kind.__mro__[1]
        while parent.__module__ in self.program.files and self._merged(parent) is kind:
            more = [f for f in self.program.reached if f.owner is parent and f.node.name not in names]
            inherited = more + inherited
            names |= {f.node.name for f in more}
            parent = parent.__mro__[1]
        _ = bases
        base = parent.__name__ if parent.__module__ in self.program.files else f"nn.{parent.__name__}"
        if parent.__module__.startswith("vitlib.methods"):
            base = "nn.Module"
        doc = self._doc(ast.get_docstring(node) or "")
        lines = [f"class {node.name}({base}):", *docstring(doc, 1)]
        for inner in node.body:
            if isinstance(inner, ast.Assign) and isinstance(inner.targets[0], ast.Name):
                if inner.targets[0].id in self.program.attributes and self._reads(inner.targets[0].id):
                    lines += ["", *fit_line(file.text_of(inner) + file.trailing_comment(inner.lineno), 1)]
        order = {"__init__": -1}
        chosen = sorted([*inherited, *methods], key=lambda f: order.get(f.node.name, 0))
        for function in chosen:
            lines += ["", *self.bodies[function]]
        return "\n".join(lines)

    def _reads(self, name: str) -> bool:
        return any(f".{name}" in line for lines in self.bodies.values() for line in lines)

    def _merged(self, kind: type) -> type | None:
        """Return the only subclass that the model uses of a class, if it needs no super()."""
        modules = self.program.modules(kind)
        if any(type(module) is kind for module in modules):
            return None
        users = {sub for m in modules for sub in type(m).__mro__ if kind in sub.__mro__[1:2]}
        if len(users) != 1:
            return None
        user = users.pop()
        own = {f.node.name: f for f in self.program.reached if f.owner is user}
        base = {f.node.name for f in self.program.reached if f.owner is kind}
        for name in own:
            if name in base and any("super()" in line for line in self.bodies[own[name]]):
                return None
        return user
