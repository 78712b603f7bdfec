"""Statements of the model's source, written for one model, without the branches it never takes."""

from __future__ import annotations

import ast
import re

from vitlib.vendor.assignments import Assignments
from vitlib.vendor.calls import CallWriter
from vitlib.vendor.peephole import Line, loaded_names, tidy
from vitlib.vendor.program import Function, Program
from vitlib.vendor.source import stored_names
from vitlib.vendor.values import Values, join_values

# Words of vitlib's messages that mean nothing outside of it.
FOREIGN = re.compile(r"ImageProcessor makes|vitlib\.|model\.attn_position")


class FunctionWriter(Assignments):
    """Writer of the body of one function.

    Args:
        program: The model's source.
        function: The function.
    """

    def __init__(self, program: Program, function: Function) -> None:
        super().__init__(program, function)
        self.file = function.file
        env: dict[str, Values] = dict.fromkeys(stored_names(function.node))
        env |= {param: function.values.get(param) for param in function.params}
        if function.owner is not None:
            env["self"] = program.modules(function.owner)
        self.env = env
        self.expressions = CallWriter(program, function, env)
        self.expressions.splice_argument = self.splice_argument
        self.results: list[list[bool]] = []  # of each return: the elements that are None
        self.live = function.live or set(env)  # local names that the body reads

    def write(self) -> list[Line]:
        """Write the body, without its docstring."""
        # Functions within functions are written once for each state of the facts.
        if self.function.rendered == self.program.version:
            return [Line(level, text) for level, text in self.function.lines]
        version = self.program.version
        body = self.function.node.body
        if ast.get_docstring(self.function.node) is not None:
            body = body[1:]
        start = dict(self.env)
        lines: list[Line] = []
        # What a line reads decides which lines above it stay, and so on up.
        for _ in range(6):
            self.env.clear()
            self.env.update(start)
            self.expressions.aliases.clear()
            self.expressions.texts.clear()
            self.expressions.lists.clear()
            self.results = []
            lines, _ = self._block(body, 0)
            live = loaded_names(lines)
            if live == self.live:
                break
            self.live = live
        lines = tidy(lines)
        self.function.live = self.live
        results, text = _merge(self.results), "\n".join(line.text for line in lines)
        if (results, text) != (self.function.results, self.function.body):
            self.function.results, self.function.body = results, text
            self.program.change()
        lines = lines or [Line(0, "pass")]
        self.function.lines = [(line.level, line.text) for line in lines]
        self.function.rendered = version if version == self.program.version else -1
        return lines

    def _block(self, body: list[ast.stmt], level: int) -> tuple[list[Line], bool]:
        """Write statements; also return True if none after them is reached."""
        lines: list[Line] = []
        for node in body:
            written, ends = self._statement(node, level)
            if written:
                notes = self.file.comments_above(node.lineno)
                lines += [Line(level, note) for note in notes]
            lines += written
            if ends:
                return lines, True
        return lines, False

    def _statement(self, node: ast.stmt, level: int) -> tuple[list[Line], bool]:
        method = getattr(self, f"_write_{type(node).__name__.lower()}", None)
        if method is None:
            return [Line(level, self.file.text_of(node))], False
        outer, self.expressions.pending = self.expressions.pending, []
        lines, ends = method(node, level)
        above = [Line(level, text) for text in self.expressions.pending] if lines else []
        self.expressions.pending = outer
        simple = isinstance(node, ast.Assign | ast.AnnAssign | ast.Return | ast.Expr | ast.Raise)
        if lines and simple and node.end_lineno is not None:
            lines[-1].text += self.file.trailing_comment(node.end_lineno)
        return [*above, *lines], ends

    def _write_assert(self, node: ast.Assert, level: int) -> tuple[list[Line], bool]:  # noqa: ARG002
        return [], False

    def _write_pass(self, node: ast.Pass, level: int) -> tuple[list[Line], bool]:  # noqa: ARG002
        return [], False

    def _write_delete(self, node: ast.Delete, level: int) -> tuple[list[Line], bool]:
        return [Line(level, self.file.text_of(node))], False

    def _write_expr(self, node: ast.Expr, level: int) -> tuple[list[Line], bool]:
        value = node.value
        if isinstance(value, ast.Yield):
            inner = self.expressions.write(value.value) if value.value else ""
            return [Line(level, f"yield {inner}".rstrip())], False
        if not isinstance(value, ast.Call):
            return [Line(level, self.expressions.write(value))], False
        name = ast.unparse(value.func)
        if name == "self.register_buffer" and self.expressions.evaluate(value.args[1]) == (None,):
            return [], False
        if self.program.compact and name.startswith("nn.init."):
            return [], False  # load() has all weights
        if self._extends_list(value, level):
            return [], False
        targets = self.expressions.resolve(value.func)
        text = self.expressions.write(value)
        if len(targets) == 1 and self._can_splice(value, targets[0]):
            return self._splice(targets[0], level), False
        return [Line(level, text)], False

    def _write_raise(self, node: ast.Raise, level: int) -> tuple[list[Line], bool]:
        assert node.exc is not None
        return [Line(level, f"raise {self.expressions.write(node.exc)}")], True

    def _write_return(self, node: ast.Return, level: int) -> tuple[list[Line], bool]:
        if node.value is None:
            return [Line(level, "return")], True
        if isinstance(node.value, ast.Tuple):
            slots = self.program.none_slots(self.function)
            values = [self.expressions.evaluate(part) for part in node.value.elts]
            self.results.append([value == (None,) for value in values])
            texts = [self.expressions.write(part) for part in node.value.elts]
            return [
                Line(level, "return " + ", ".join(t for i, t in enumerate(texts) if i not in slots))
            ], True
        self.results.append([])
        tail = self._splice_tail(node.value, level)
        if tail:
            return tail, True
        return [Line(level, f"return {self.expressions.write(node.value)}")], True

    def _write_if(self, node: ast.If, level: int) -> tuple[list[Line], bool]:
        self._bind_walrus(node.test)
        answer = self.expressions.truth(node.test)
        if answer is not None:
            return self._block(node.body if answer else node.orelse, level)
        # Names may have other values after either branch.
        before = dict(self.env)
        body, body_ends = self._block(node.body, level + 1)
        after = dict(self.env)
        self.env.clear()
        self.env.update(before)
        orelse, else_ends = self._block(node.orelse, level + 1) if node.orelse else ([], False)
        if not body_ends:
            for name in after:
                self.env[name] = (
                    after[name] if else_ends else join_values(after[name], self.env.get(name, ()))
                )
        text = "\n".join(self.file.text_of(part) for part in node.body)
        # Torch's own error says enough where vitlib's speaks of its own classes.
        if not node.orelse and body_ends and FOREIGN.search(text) and len(node.body) == 1:
            return [], False
        if not body and not orelse:
            return [], False
        test = self.expressions.write(node.test)
        comment = self.file.trailing_comment(node.test.end_lineno or node.lineno)
        lines = [Line(level, f"if {test}:{comment}"), *(body or [Line(level + 1, "pass")])]
        if orelse:
            lines += [Line(level, "else:"), *orelse]
        return lines, body_ends and else_ends and bool(node.orelse)

    def _bind_walrus(self, test: ast.expr) -> None:
        for part in ast.walk(test):
            if isinstance(part, ast.NamedExpr):
                self.bind(part.target, self.expressions.evaluate(part.value), part.value)

    def _write_for(self, node: ast.For, level: int) -> tuple[list[Line], bool]:
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                is_none = part.id == "attn_pos" and not self.expressions.has_positions
                self.env[part.id] = (None,) if is_none else None
        generator = self._generator(node)
        if generator is not None:
            return self._splice_generator(node, generator, level), False
        head = self.expressions.write(node.iter)
        body, _ = self._block(node.body, level + 1)
        if not body:
            return [], False
        target = self._loop_target(node)
        counted, (index, _, rest) = re.fullmatch(r"enumerate\((.*)\)", head), target.partition(", ")
        if counted and index not in loaded_names(body):  # nothing reads the number
            head, target = counted[1], rest.removeprefix("(").removesuffix(")")
        return [Line(level, f"for {target} in {head}:"), *body], False

    def _loop_target(self, node: ast.For) -> str:
        text = self.file.text_of(node.target)
        if not self.expressions.has_positions:
            text = re.sub(r"\((\w+), attn_pos\)", r"\1", text)
        return text

    def _write_while(self, node: ast.While, level: int) -> tuple[list[Line], bool]:
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                self.env[part.id] = None
        body, _ = self._block(node.body, level + 1)
        return [Line(level, f"while {self.expressions.write(node.test)}:"), *body], False

    def _write_with(self, node: ast.With, level: int) -> tuple[list[Line], bool]:
        items = ", ".join(self.expressions.write(item.context_expr) for item in node.items)
        body, ends = self._block(node.body, level + 1)
        return [Line(level, f"with {items}:"), *body], ends

    def _write_functiondef(self, node: ast.FunctionDef, level: int) -> tuple[list[Line], bool]:  # noqa: ARG002
        for arg in node.args.args:
            self.env[arg.arg] = None
        self.env[node.name] = None
        is_expression = len(node.body) == 1 and isinstance(node.body[0], ast.Return)
        assert is_expression, f"{node.name} is no expression of its argument"
        assert len(node.args.args) == 1
        self.expressions.local_functions[node.name] = node
        return [], False


def _merge(results: list[list[bool]]) -> list[bool] | None:
    """Return the elements that are None in all returns; None for other returns than tuples."""
    if not results or any(len(result) != len(results[0]) for result in results):
        return None
    return [all(column) for column in zip(*results, strict=True)]
