"""Functions of the model's source that are called once: their body stands in place of the call."""

from __future__ import annotations

import ast
import re
from abc import abstractmethod

from vitlib.vendor.calls import CallWriter
from vitlib.vendor.layout import split_arguments
from vitlib.vendor.peephole import Line
from vitlib.vendor.program import Function, Program
from vitlib.vendor.source import SourceFile, names_read_after, stored_names
from vitlib.vendor.values import Values

MAX_TUPLE = 88  # characters of an assignment to several names


class Splicing:
    """Writer of calls as the body of what they call.

    Args:
        program: The model's source.
        function: The function that has the calls.
    """

    env: dict[str, Values]
    expressions: CallWriter
    file: SourceFile

    def __init__(self, program: Program, function: Function) -> None:
        self.program, self.function = program, function

    @abstractmethod
    def write(self) -> list[Line]:
        """Write the body of the function."""

    @abstractmethod
    def bind(self, target: ast.expr, values: Values, source: ast.expr | None) -> None:
        """Note the values of a local name.

        Args:
            target: The name.
            values: Its values.
            source: The expression that it gets; None for one that is not written.
        """

    def _can_splice(
        self, call: ast.Call, function: Function, target: ast.Tuple | None = None
    ) -> bool:
        """Return True if a function's body can stand in place of its only call."""
        args = [arg.id for arg in call.args if isinstance(arg, ast.Name)]
        needed = [name for name in function.params if name in function.needed]
        is_method = re.fullmatch(r"(self|super\(\))\.\w+", ast.unparse(call.func)) is not None
        same = all(name in args or name in ("cfg", "config") for name in needed)
        if not is_method or self._collides(function, call, set(_names(target))):
            return False
        return same and self.program.count_calls(function) == 1

    def _collides(self, function: Function, call: ast.expr, targets: set[str]) -> bool:
        """Return True if a function stores local names that this one reads after the call."""
        stored = set(stored_names(function.node)) - targets
        later = names_read_after(self.function.node, call)
        return bool(stored & later)

    def _splice_assign(self, target: ast.Name, call: ast.expr, level: int) -> list[Line]:
        """Write the body of a function in place of `y = f(x)`, its only call; or nothing."""
        function = self._only_call(call)
        if function is None or self._collides(function, call, {target.id}):
            return []
        assert isinstance(call, ast.Call)
        self.expressions.write(call)
        needed = [param for param in function.params if param in function.needed]
        bound = zip(function.params, call.args, strict=False)
        texts = {param: self.expressions.write(arg) for param, arg in bound if param in needed}
        lines = type(self)(self.program, function).write()
        body = "\n".join(line.text for line in lines)
        if len(texts) != len(needed) or body.count("return ") != 1 or len(lines) < 2:
            return []
        # An argument is computed once: it may stand in the body once.
        for param, text in texts.items():
            if param != text and len(re.findall(rf"(?<![\w.]){param}\b(?!=)", body)) != 1:
                return []
        self.program.spliced.add(function)
        self.program.note_edge(self.function, [function], inline=True)
        result = []
        for line in lines:
            text = line.text
            for param, arg in texts.items():
                text = re.sub(rf"(?<![\w.]){param}\b(?!=)", arg, text) if param != arg else text
            text = re.sub(r"^return ", f"{target.id} = ", text)
            result.append(Line(level + line.level, text))
        self.bind(target, None, None)
        return result

    def splice_argument(self, call: ast.Call, function: Function) -> str:
        """Write the body of a function above the statement that has its only call.

        Args:
            call: The call, whose arguments are parameters of this function under the same names.
            function: The function that it runs.

        Returns:
            The expression that the function returns; nothing where its body cannot stand there.
        """
        names = [arg.id if isinstance(arg, ast.Name) else "" for arg in call.args]
        needed = [param for param in function.params if param in function.needed]
        is_plain = all(name in names and name in self.function.params for name in needed)
        if self._only_call(call) is not function or not is_plain or call.keywords:
            return ""
        if self._collides(function, call, set()):
            return ""
        lines = type(self)(self.program, function).write()
        is_flat = all(line.level == 0 for line in lines) and len(lines) > 1
        if not is_flat or not lines[-1].text.startswith("return "):
            return ""
        self.program.spliced.add(function)
        self.program.note_edge(self.function, [function], inline=True)
        above = [line.text for line in lines[:-1]]
        self.expressions.pending += [text for text in above if text not in self.expressions.pending]
        return lines[-1].text.removeprefix("return ")

    def _only_call(self, call: ast.expr) -> Function | None:
        """Return the function whose only call this is, if its body can stand here."""
        if not isinstance(call, ast.Call) or call.keywords:
            return None
        functions = self.expressions.resolve(call.func)
        if len(functions) != 1 or functions[0].node.name in self.program.public:
            return None
        function, text = functions[0], ast.unparse(call.func)
        is_own = function.owner is None or re.fullmatch(r"self\.\w+", text)
        return function if is_own and self.program.count_calls(function) == 1 else None

    def _splice(self, function: Function, level: int) -> list[Line]:
        """Write the body of a function that returns nothing, in place of its call."""
        self.program.spliced.add(function)
        self.program.note_edge(self.function, [function], inline=True)
        inner = type(self)(self.program, function)
        lines = inner.write()
        for name in ("cfg", "config"):
            if name in function.needed and name in self.function.params:
                self.program.need(self.function, name)
        return [Line(level + line.level, line.text) for line in lines if line.text != "pass"]

    def _splice_result(
        self, target: ast.Tuple, slots: set[int], function: Function, level: int
    ) -> list[Line]:
        """Write the body of a function in place of the call that unpacks what it returns."""
        self.program.spliced.add(function)
        self.program.note_edge(self.function, [function], inline=True)
        for param in function.needed:
            self.program.need(self.function, param)
        lines = type(self)(self.program, function).write()
        for index, part in enumerate(target.elts):
            self.bind(part, (None,) if index in slots else None, None)
        stored = [self.file.text_of(p) for i, p in enumerate(target.elts) if i not in slots]
        result = lines[-1].text.removeprefix("return ")
        text, parts = f"{', '.join(stored)} = {result}", split_arguments(result)
        last = [Line(0, text)] if result != ", ".join(stored) else []
        apart = not any(re.search(rf"\b{name}\b", result) for name in stored)
        if len(text) > MAX_TUPLE and len(parts) == len(stored) and apart:
            last = [Line(0, f"{a} = {b}") for a, b in zip(stored, parts, strict=True)]
        return [Line(level + line.level, line.text) for line in [*lines[:-1], *last]]

    def _splice_tail(self, call: ast.expr, level: int) -> list[Line]:
        """Write the body of a function in place of `return f(x)`, its only call; or nothing."""
        function = self._only_call(call)
        if function is None:
            return []
        assert isinstance(call, ast.Call)
        self.expressions.write(call)
        bound = zip(function.params, call.args, strict=False)
        pairs = [(p, self.expressions.write(arg)) for p, arg in bound if p in function.needed]
        changed = [(param, text) for param, text in pairs if param != text]
        if len(pairs) != len(function.needed) or len(changed) > 1 or "\n" not in function.body:
            return []
        self.program.spliced.add(function)
        self.program.note_edge(self.function, [function], inline=True)
        lines = [Line(0, f"{param} = {text}") for param, text in changed]
        lines += type(self)(self.program, function).write()
        return [Line(level + line.level, line.text) for line in lines]

    def _generator(self, node: ast.For) -> Function | None:
        """Return the generator of `for state in self.f(x): y = state`, its only call, or None."""
        if not isinstance(node.iter, ast.Call) or len(node.body) != 1:
            return None
        functions = self.expressions.resolve(node.iter.func)
        if len(functions) != 1:
            return None
        names = ast.unparse(node.body[0]).split(" = ")
        is_last = len(names) == 2 and names[1] == ast.unparse(node.target)
        self.expressions.write(node.iter)
        function = functions[0]
        args = [ast.unparse(arg) for arg in node.iter.args]
        args += [ast.unparse(keyword.value) for keyword in node.iter.keywords]
        same = all(param in args for param in function.needed)
        is_only = self.program.count_calls(function) == 1
        return function if is_last and same and is_only else None

    def _splice_generator(self, node: ast.For, function: Function, level: int) -> list[Line]:
        """Write a generator's body in place of a loop that takes its last value."""
        self.program.spliced.add(function)
        self.program.note_edge(self.function, [function], inline=True)
        for param in function.needed:
            self.program.need(self.function, param)
        name = ast.unparse(node.body[0]).split(" = ")[0]
        lines = []
        for line in type(self)(self.program, function).write():
            if line.text.startswith("yield "):
                value = line.text.removeprefix("yield ")
                if value == name:
                    continue
                line = Line(line.level, f"{name} = {value}")
            lines.append(Line(level + line.level, line.text))
        return lines


def _names(target: ast.Tuple | None) -> list[str]:
    return [part.id for part in target.elts if isinstance(part, ast.Name)] if target else []
