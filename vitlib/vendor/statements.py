"""Statements of the model's source, written for one model: branches that it never takes are left out."""

from __future__ import annotations

import ast
import re

from torch import Tensor, nn

from vitlib.vendor.expressions import Expressions
from vitlib.vendor.layout import split_arguments
from vitlib.vendor.peephole import Line, tidy
from vitlib.vendor.program import Function, Program
from vitlib.vendor.source import names_read_after, stored_names
from vitlib.vendor.values import Values, join_values

# Words of vitlib's messages that mean nothing outside of it.
FOREIGN = re.compile(r"ImageProcessor makes|vitlib\.|model\.attn_position")


class FunctionWriter:
    """Writer of the body of one function.

    Args:
        program: The model's source.
        function: The function.
    """

    def __init__(self, program: Program, function: Function) -> None:
        self.program, self.function = program, function
        self.file = function.file
        env: dict[str, Values] = dict.fromkeys(stored_names(function.node))
        env |= {param: function.values.get(param) for param in function.params}
        if function.owner is not None:
            env["self"] = program.modules(function.owner)
        self.env = env
        self.expressions = Expressions(program, function, env)
        self.results: list[list[Values]] = []
        self.live = set(env)  # local names that the body reads

    def write(self) -> list[Line]:
        """Write the body, without its docstring."""
        body = self.function.node.body
        if ast.get_docstring(self.function.node) is not None:
            body = body[1:]
        start = dict(self.env)
        lines: list[Line] = []
        for _ in range(6):
            self.env.clear()
            self.env.update(start)
            self.expressions.aliases.clear()
            self.expressions.texts.clear()
            self.expressions.lists.clear()
            self.results = []
            lines, _ = self._block(body, 0)
            live = _loaded(lines)
            if live == self.live:
                break
            self.live = live
        lines = tidy(lines)
        self.function.results = _merge(self.results)
        self.function.body = "\n".join(line.text for line in lines)
        return lines or [Line(0, "pass")]

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
        lines, ends = method(node, level)
        simple = isinstance(node, ast.Assign | ast.AnnAssign | ast.Return | ast.Expr | ast.Raise)
        if lines and simple and node.end_lineno is not None:
            lines[-1].text += self.file.trailing_comment(node.end_lineno)
        return lines, ends

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
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "self.register_buffer":
            if self.expressions.evaluate(value.args[1]) == (None,):
                return [], False
        if self.program.compact and ast.unparse(value).startswith("nn.init."):
            return [], False  # load() has all weights
        if isinstance(value, ast.Call) and self._extends_list(value, level):
            return [], False
        if isinstance(value, ast.Call):
            targets = self.expressions.resolve(value.func)
            if isinstance(targets, list) and targets:
                text = self.expressions.write(value)
                is_init = targets[0].node.name == "__init__"
                if len(targets) == 1 and self._can_splice(value, targets[0]):
                    return self._splice(targets[0], level), False
                if all(t.body == "pass" or not t.body for t in targets) and not is_init:
                    return [], False
                return [Line(level, text)], False
        return [Line(level, self.expressions.write(value))], False

    def _write_raise(self, node: ast.Raise, level: int) -> tuple[list[Line], bool]:
        assert node.exc is not None
        return [Line(level, f"raise {self.expressions.write(node.exc)}")], True

    def _write_return(self, node: ast.Return, level: int) -> tuple[list[Line], bool]:
        if node.value is None:
            return [Line(level, "return")], True
        if isinstance(node.value, ast.Tuple):
            slots = self.program.none_slots(self.function)
            self.results.append([self.expressions.evaluate(part) for part in node.value.elts])
            texts = [self.expressions.write(part) for part in node.value.elts]
            return [
                Line(level, "return " + ", ".join(t for i, t in enumerate(texts) if i not in slots))
            ], True
        self.results.append([])
        tail = self._splice_tail(node.value, level)
        if tail:
            return tail, True
        return [Line(level, f"return {self.expressions.write(node.value)}")], True

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
        if kept and len(node.targets) == 1 and isinstance(kept[0], ast.Name):
            if kept[0].id not in self.live and isinstance(node.value, ast.Call):  # it is a check
                return [Line(level, self.expressions.write(node.value))], False
        text = self.expressions.write(node.value) if kept else ""
        for target in node.targets:
            self._bind(target, values, node.value)
        targets = [self.expressions.write(target) for target in kept]
        if not kept or targets == [text]:
            return [], False
        if targets[0].startswith("self.") and re.fullmatch(r"[\d.]+", text):
            self._note_literal(targets[0][5:])
        return [Line(level, " = ".join([*targets, text]))], False

    def _lists(self, target: ast.expr, value: ast.expr, level: int) -> bool:
        """Note the members of a list that the forward builds, so that its uses have them."""
        if level or not isinstance(target, ast.Name) or not isinstance(value, ast.List | ast.ListComp):
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
        if level or not isinstance(func, ast.Attribute) or not isinstance(func.value, ast.Name):
            return False
        members = self.expressions.lists.get(func.value.id)
        if members is None or func.attr not in ("append", "insert"):
            return False
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
        self._bind(node.target, values, node.value)
        if not keeps:
            return [], False
        target = self.expressions.write(node.target)
        # An empty list needs its type said; the type of other values is clear.
        annotation = f": {self.file.text_of(node.annotation)}" if text == "[]" else ""
        return [Line(level, f"{target}{annotation} = {text}")], False

    def _write_tuple(self, target: ast.Tuple, value: ast.expr, level: int) -> list[Line]:
        """Write an assignment to several targets, without those that nothing reads."""
        if isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts):
            pairs = list(zip(target.elts, value.elts, strict=True))
            results = [self.expressions.evaluate(part) for _, part in pairs]
            kept = [
                (a, b)
                for (a, b), values in zip(pairs, results, strict=True)
                if self._keeps(a, values, b)
            ]
            right = [self.expressions.write(part) for _, part in kept]
            for (part, source), values in zip(pairs, results, strict=True):
                self._bind(part, values, source)
            left = [self._target(part) for part, _ in kept]
            for name, text in zip(left, right, strict=True):
                if name.startswith("self.") and re.fullmatch(r"[\d.]+", text):
                    self._note_literal(name[5:])
            if not kept or left == right:
                return []
            if len(kept) == 1 and left[0].startswith("("):
                left[0] = left[0][1:-1]
            text = f"{', '.join(left)} = {', '.join(right)}"
            if len(text) > 90 and all(name.startswith("self.") for name in left):
                return [Line(level, f"{a} = {b}") for a, b in zip(left, right, strict=True)]
            return [Line(level, text)]
        slots: set[int] = set()
        if isinstance(value, ast.Call):
            self.expressions.unpacking = True
            functions = self.expressions.resolve(value.func)
            if isinstance(functions, list) and functions:
                dead = {
                    index for index, part in enumerate(target.elts)
                    if isinstance(part, ast.Name) and part.id not in self.live
                }  # fmt: skip
                for function in functions:
                    self.program.dead[function, (value.lineno, value.col_offset)] = dead
                slots = self.program.none_slots(functions[0])
        text = self.expressions.write(value)
        self.expressions.unpacking = False
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
            single = isinstance(functions, list) and len(functions) == 1
            if single and self._can_splice(value, functions[0], target):
                return self._splice_result(target, slots, functions[0], level)
        names = []
        for index, part in enumerate(target.elts):
            self._bind(part, (None,) if index in slots else None, None)
            if index not in slots:
                names.append(self._target(part))
        if text.isidentifier() and not set(names) & self.live:
            return []
        if names == [text] or ", ".join(names) == text:
            return []
        return [Line(level, f"{', '.join(names)} = {text}")]

    def _can_splice(
        self, call: ast.Call, function: Function, target: ast.Tuple | None = None
    ) -> bool:
        """Return True if a function's body can stand in place of its only call."""
        args = [arg.id for arg in call.args if isinstance(arg, ast.Name)]
        needed = [name for name in function.params if name in function.needed]
        is_method = re.fullmatch(r"(self|super\(\))\.\w+", ast.unparse(call.func)) is not None
        is_first = function.owner in (self.function.owner, *(self.function.owner or object).__mro__)
        same = all(name in args or name in ("cfg", "config") for name in needed)
        if not is_method or self._collides(function, call, set(_names(target))):
            return False
        return is_method and is_first and same and self.program.count_calls(function) == 1

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
        texts = {p: self.expressions.write(a) for p, a in zip(function.params, call.args, strict=False)
                 if p in needed}  # fmt: skip
        lines = FunctionWriter(self.program, function).write()
        body = "\n".join(line.text for line in lines)
        if len(texts) != len(needed) or body.count("return ") != 1 or len(lines) < 2:
            return []
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
        self._bind(target, None, None)
        return result

    def _only_call(self, call: ast.expr) -> Function | None:
        """Return the function whose only call this is, if its body can stand here."""
        if not isinstance(call, ast.Call) or call.keywords:
            return None
        functions = self.expressions.resolve(call.func)
        if not isinstance(functions, list) or len(functions) != 1:
            return None
        function, text = functions[0], ast.unparse(call.func)
        is_own = function.owner is None or re.fullmatch(r"self\.\w+", text)
        if not is_own or function.node.name in self.program.public or self.program.count_calls(function) != 1:
            return None
        return function

    def _splice(self, function: Function, level: int) -> list[Line]:
        """Write the body of a function that returns nothing, in place of its call."""
        self.program.spliced.add(function)
        self.program.note_edge(self.function, [function], inline=True)
        inner = FunctionWriter(self.program, function)
        inner.env.update({name: values for name, values in self.env.items() if name in ("cfg", "config")})
        if not set(function.params) & {"cfg", "config"}:
            inner.env.update(function.values)
        lines = inner.write()
        for name in ("cfg", "config"):
            if name in function.needed and name in self.function.params:
                self.program.need(self.function, name)
        return [Line(level + line.level, line.text) for line in lines if line.text != "pass"]

    def _splice_result(
        self, target: ast.Tuple, slots: set[int], function: Function, level: int
    ) -> list[Line]:
        """Write the body of a function that returns a tuple, in place of the call that unpacks it."""
        self.program.spliced.add(function)
        self.program.note_edge(self.function, [function], inline=True)
        for param in function.needed:
            self.program.need(self.function, param)
        lines = FunctionWriter(self.program, function).write()
        for index, part in enumerate(target.elts):
            self._bind(part, (None,) if index in slots else None, None)
        names = ", ".join(self._target(p) for i, p in enumerate(target.elts) if i not in slots)
        result = lines[-1].text.removeprefix("return ")
        last = [] if result == names else [Line(0, f"{names} = {result}")]
        parts = split_arguments(result)
        stored = [self._target(p) for i, p in enumerate(target.elts) if i not in slots]
        apart = not any(re.search(rf"\b{name}\b", result) for name in stored)
        if len(f"{names} = {result}") > 88 and len(parts) == len(stored) and apart:
            last = [Line(0, f"{a} = {b}") for a, b in zip(stored, parts, strict=True)]
        return [Line(level + line.level, line.text) for line in [*lines[:-1], *last]]

    def _splice_tail(self, call: ast.expr, level: int) -> list[Line]:
        """Write the body of a function in place of `return f(x)`, its only call; or nothing."""
        function = self._only_call(call)
        if function is None:
            return []
        assert isinstance(call, ast.Call)
        self.expressions.write(call)
        bound = {p: a for p, a in zip(function.params, call.args, strict=False) if p in function.needed}
        pairs = [(param, self.expressions.write(arg)) for param, arg in bound.items()]
        changed = [(param, text) for param, text in pairs if param != text]
        if len(bound) != len(function.needed) or len(changed) > 1 or "\n" not in function.body:
            return []
        self.program.spliced.add(function)
        self.program.note_edge(self.function, [function], inline=True)
        lines = [Line(0, f"{param} = {text}") for param, text in changed]
        lines += FunctionWriter(self.program, function).write()
        return [Line(level + line.level, line.text) for line in lines]

    def _stores(self, name: str) -> int:
        return stored_names(self.function.node).count(name)

    def _note_literal(self, attribute: str) -> None:
        """Note that an attribute is a number that the file has, and no size of the model."""
        for module in self.env["self"] or ():
            if (type(module).__name__, attribute) not in self.program.literals:
                self.program.literals.add((type(module).__name__, attribute))
                self.program.changed = True

    def _target(self, node: ast.expr) -> str:
        return self.file.text_of(node)

    def _keeps(self, target: ast.expr, values: Values, source: ast.expr | None = None) -> bool:
        """Return True if an assignment is written: something reads it, or it holds weights."""
        if isinstance(target, ast.Name):
            return target.id in self.live or (values is None and source is not None and not _is_pure(source))
        if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
            current = self.expressions.evaluate(_load(target))
            if current is not None and all(isinstance(v, nn.Module | Tensor) for v in current):
                identity = all(isinstance(value, nn.Identity) for value in current)
                return values != (None,) and not identity
            if current == (None,):
                return False
            if current is not None and any(isinstance(v, nn.Module | Tensor) for v in current):
                return True
            return target.attr in self.program.attributes
        return True

    def _bind(self, target: ast.expr, values: Values, source: ast.expr | None) -> None:
        """Note the values of a local name."""
        if isinstance(target, ast.Name) and isinstance(source, ast.Tuple):
            self.expressions.tuples[target.id] = source
        if not isinstance(target, ast.Name):
            for part in target.elts if isinstance(target, ast.Tuple) else ():
                self._bind(part, None, None)
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

    def _write_if(self, node: ast.If, level: int) -> tuple[list[Line], bool]:
        self._bind_walrus(node.test)
        answer = self.expressions.truth(node.test)
        if answer is not None:
            return self._block(node.body if answer else node.orelse, level)
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
                self._bind(part.target, self.expressions.evaluate(part.value), part.value)

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
        counted = re.fullmatch(r"enumerate\((.*)\)", head)
        if counted and isinstance(node.target, ast.Tuple) and isinstance(node.target.elts[0], ast.Name):
            if node.target.elts[0].id not in _loaded(body):  # nothing reads the index
                head, target = counted[1], target.partition(", ")[2]
                target = target[1:-1] if target.startswith("(") else target
        return [Line(level, f"for {target} in {head}:"), *body], False

    def _generator(self, node: ast.For) -> Function | None:
        """Return the generator of `for state in self.f(x): y = state`, its only call, or None."""
        if not isinstance(node.iter, ast.Call) or len(node.body) != 1:
            return None
        functions = self.expressions.resolve(node.iter.func)
        if not isinstance(functions, list) or len(functions) != 1:
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
        for line in FunctionWriter(self.program, function).write():
            if line.text.startswith("yield "):
                value = line.text.removeprefix("yield ")
                if value == name:
                    continue
                line = Line(line.level, f"{name} = {value}")
            lines.append(Line(level + line.level, line.text))
        return lines

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

    def _write_functiondef(self, node: ast.FunctionDef, level: int) -> tuple[list[Line], bool]:
        for arg in node.args.args:
            self.env[arg.arg] = None
        self.env[node.name] = None
        if len(node.body) == 1 and isinstance(node.body[0], ast.Return) and len(node.args.args) == 1:
            self.expressions.local_functions[node.name] = node
            return [], False
        if self.live and node.name not in self.live:
            return [], False
        head = self.file.segment((node.lineno, node.col_offset), _before(node.body[0], self.file))
        body, _ = self._block(node.body, level + 1)
        return [Line(level, ""), Line(level, head.strip()), *body, Line(level, "")], False


def _is_pure(node: ast.expr) -> bool:
    """Return True if an expression does no more than compute numbers of the forward's shapes."""
    calls = [ast.unparse(part.func) for part in ast.walk(node) if isinstance(part, ast.Call)]
    return set(calls) <= {"zip", "len", "max", "min", "int", "float", "bool", "range"}


def _names(target: ast.Tuple | None) -> list[str]:
    return [part.id for part in target.elts if isinstance(part, ast.Name)] if target else []


def _before(node: ast.stmt, file: object) -> tuple[int, int]:  # noqa: ARG001
    return node.lineno - 1, 10_000


def _load(node: ast.Attribute) -> ast.Attribute:
    copy = ast.Attribute(node.value, node.attr, ast.Load())
    return ast.copy_location(copy, node)


def _loaded(lines: list[Line]) -> set[str]:
    """List the names that lines read."""
    base = min((line.level for line in lines), default=0)
    text = "\n".join("    " * (line.level - base) + line.text for line in lines)
    text = re.sub("\x02[^\x02]*\x02", "", text).replace("\x01", " ")
    wrapped = "def f():\n" + "\n".join("    " + row for row in text.splitlines()) + "\n    pass"
    names = set()
    for node in ast.walk(ast.parse(wrapped)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            names.add(node.id)
    return names


def _merge(results: list[list[Values]]) -> list[Values] | None:
    """Join the values of each element over all returns of a tuple."""
    if not results or any(len(result) != len(results[0]) for result in results):
        return None
    merged: list[Values] = []
    for column in zip(*results, strict=True):
        values: Values = ()
        for entry in column:
            values = join_values(values, entry)
        merged.append(values)
    return merged

