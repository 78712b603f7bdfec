"""Classes of the model as text: a class that only one subclass uses is written as one with it."""

from __future__ import annotations

import ast
import re

from vitlib.vendor.layout import docstring
from vitlib.vendor.program import Function, Program
from vitlib.vendor.source import SourceFile


class ClassWriter:
    """Writer of the classes of a model.

    Args:
        program: The model's source.
        bodies: Lines of each function of the file.
    """

    def __init__(self, program: Program, bodies: dict[Function, list[str]]) -> None:
        self.program, self.bodies = program, bodies

    def rename(self, text: str) -> str:
        """Write classes by the names of those that they are a part of.

        Args:
            text: Definitions that call them.

        Returns:
            The same definitions, with the names that the file has.
        """
        for kind, name in self.program.class_names.items():
            heir = self._heir(kind) if self.program.modules(kind) else None
            if heir is not None:
                text = re.sub(rf"\b{name}\b(?=\()", heir.__name__, text)
        return text

    def write(self, file: SourceFile, node: ast.ClassDef) -> str:
        """Write a class with the methods that the model runs.

        Args:
            file: File of the class.
            node: Its tree.

        Returns:
            The class; nothing for one that the model does not have, or that is written in another.
        """
        kind = getattr(file.module, node.name)
        if not isinstance(kind, type) or not self.program.modules(kind) or self._heir(kind):
            return ""
        chosen = [f for f in self.program.reached if f.owner is kind]
        parent, doc = kind.__mro__[1], node
        while parent.__module__ in self.program.files and self._heir(parent) is kind:
            names = {f.node.name for f in chosen}
            more = [f for f in self.program.reached if f.owner is parent]
            chosen = [f for f in more if f.node.name not in names] + chosen
            parent = parent.__mro__[1]
        branch = self._branch(kind)
        if branch is not None:
            own = self._methods(branch)
            chosen = [f for f in chosen if f.node.name not in own] + list(own.values())
            doc = self.program.files[branch.__module__].classes[branch.__name__]
        if not chosen:
            return ""
        is_own = parent.__module__ in self.program.files
        base = parent.__name__ if is_own else f"nn.{parent.__name__}"
        base = "nn.Module" if parent.__module__.startswith("vitlib.methods") else base
        lines = [f"class {node.name}({base}):", *docstring(ast.get_docstring(doc) or "", 1)]
        # A constructor stands first, and others in the order of the forward.
        chosen.sort(key=lambda f: f.node.name != "__init__")
        for function in chosen:
            lines += ["", *self.bodies[function]]
        return "\n".join(lines)

    def _methods(self, kind: type) -> dict[str, Function]:
        return {f.node.name: f for f in self.program.reached if f.owner is kind}

    def _calls_super(self, kind: type, above: type) -> bool:
        """Return True if methods of a class call those of the same name above it."""
        shared = self._methods(kind).keys() & self._methods(above).keys()
        lines = [line for name in shared for line in self.bodies[self._methods(kind)[name]]]
        return any("super()." in line for line in lines)

    def _heirs(self, kind: type) -> set[type]:
        """Return the direct subclasses of a class that the model has modules of."""
        modules = self.program.modules(kind)
        return {sub for m in modules for sub in type(m).__mro__ if kind in sub.__mro__[1:2]}

    def _heir(self, kind: type) -> type | None:
        """Return the class that a class is written as a part of, if any."""
        parent = kind.__mro__[1]
        if parent.__module__ in self.program.files and self._branch(parent) is kind:
            return parent
        if any(type(module) is kind for module in self.program.modules(kind)):
            return None
        heirs = self._heirs(kind)
        heir = next(iter(heirs)) if len(heirs) == 1 else None
        if heir is None or self._calls_super(heir, kind) or self._branch(kind) is not None:
            return None
        return heir

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
            is_hidden = mine <= self._methods(other).keys() and "__init__" not in mine
            if is_hidden and not self._calls_super(heir, kind) and not self._heirs(heir):
                return heir
        return None
