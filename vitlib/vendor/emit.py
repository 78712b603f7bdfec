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
        self._settle()
        self.program.forget()
        self._settle()
        self.program.spliced.clear()
        self.program.edges.clear()
        self.bodies = {f: self._function_lines(f) for f in list(self.program.reached)}
        self.program.reached = [f for f in self.program.reached if f not in self.program.spliced]
        self.bodies = {f: lines for f, lines in self.bodies.items() if f in self.program.reached}
        self._drop_unused()
        self._merge_features()
        definitions = self._definitions()
        for name, kind in self._renamed().items():
            definitions = [re.sub(rf"\b{name}\b(?=\()", kind, text) for text in definitions]
        return definitions

    def _renamed(self) -> dict[str, str]:
        """Return the classes that are written under the name of another one."""
        names = {}
        for file in self.program.files.values():
            for name in file.classes:
                kind = getattr(file.module, name)
                heir, takes_name = self._heir(kind) if isinstance(kind, type) else (None, False)
                if heir is not None:
                    names[name] = heir.__name__
        return names

    def _merge_features(self) -> None:
        """Write _encode as forward_features where both compute the same."""
        kind = type(self.model)
        public, private = (self._methods(kind).get(n) for n in ("forward_features", "_encode"))
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
            text = (
                f"{arg.arg}: {self._annotation(file.text_of(arg.annotation))}"
                if arg.annotation
                else arg.arg
            )
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
        """Write a class with the methods that are reached; nothing for a class without any."""
        kind = getattr(file.module, node.name)
        if not isinstance(kind, type) or not self.program.modules(kind) or self._heir(kind)[0]:
            return ""
        chosen = [f for f in self.program.reached if f.owner is kind]
        parent, doc = kind.__mro__[1], node
        while parent.__module__ in self.program.files and self._heir(parent) == (kind, False):
            names = {f.node.name for f in chosen}
            more = [f for f in self.program.reached if f.owner is parent]
            chosen = [f for f in more if f.node.name not in names] + chosen
            parent = parent.__mro__[1]
        branch = self._branch(kind)
        if branch is not None:
            names = {f.node.name for f in self.program.reached if f.owner is branch}
            chosen = [f for f in chosen if f.node.name not in names]
            chosen += [f for f in self.program.reached if f.owner is branch]
            doc = self.program.files[branch.__module__].classes[branch.__name__]
        if not chosen:
            return ""
        is_own = parent.__module__ in self.program.files
        base = parent.__name__ if is_own else f"nn.{parent.__name__}"
        base = "nn.Module" if parent.__module__.startswith("vitlib.methods") else base
        text = self._doc(ast.get_docstring(doc) or "")
        lines = [f"class {node.name}({base}):", *docstring(text, 1)]
        for inner in node.body:
            if isinstance(inner, ast.Assign) and isinstance(inner.targets[0], ast.Name):
                if self._reads(inner.targets[0].id):
                    lines += [
                        "",
                        *fit_line(file.text_of(inner) + file.trailing_comment(inner.lineno), 1),
                    ]
        chosen.sort(key=lambda f: f.node.name != "__init__")
        for function in chosen:
            lines += ["", *self.bodies[function]]
        return "\n".join(lines)

    def _reads(self, name: str) -> bool:
        return any(f".{name}" in line for lines in self.bodies.values() for line in lines)

    def _methods(self, kind: type) -> dict[str, Function]:
        return {f.node.name: f for f in self.program.reached if f.owner is kind}

    def _calls_super(self, kind: type, above: type) -> bool:
        """Return True if methods of a class call those of the same name above it."""
        shared = self._methods(kind).keys() & self._methods(above).keys()
        return any(
            "super()." in line for name in shared for line in self.bodies[self._methods(kind)[name]]
        )

    def _heirs(self, kind: type) -> set[type]:
        """Return the direct subclasses of a class that the model has modules of."""
        modules = self.program.modules(kind)
        return {sub for m in modules for sub in type(m).__mro__ if kind in sub.__mro__[1:2]}

    def _heir(self, kind: type) -> tuple[type | None, bool]:
        """Return the class that a class is written as a part of, if any; False: under its own name."""
        parent = kind.__mro__[1]
        if parent.__module__ in self.program.files and self._branch(parent) is kind:
            return parent, True
        if any(type(module) is kind for module in self.program.modules(kind)):
            return None, False
        heirs = self._heirs(kind)
        heir = next(iter(heirs)) if len(heirs) == 1 else None
        if heir is None or self._calls_super(heir, kind) or self._branch(kind) is not None:
            return None, False
        return heir, False

    def _branch(self, kind: type) -> type | None:
        """Return the subclass that a class with several is written together with.

        The class has no modules of its own, and the others override what the subclass adds.
        """
        heirs = self._heirs(kind)
        if len(heirs) != 2 or any(type(m) is kind for m in self.program.modules(kind)):
            return None
        for heir in sorted(heirs, key=lambda heir: heir.__name__):
            (other,) = heirs - {heir}
            mine = self._methods(heir).keys()
            if mine <= self._methods(other).keys() and "__init__" not in mine:
                if not self._calls_super(heir, kind) and not self._heirs(heir):
                    return heir
        return None
