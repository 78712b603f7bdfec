"""Calls of the model's source, written for one model: which functions they run, and with what."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch.nn.functional as F
from torch import nn

from vitlib.config import ViTConfig
from vitlib.vendor.expressions import ATOM
from vitlib.vendor.layout import COMMENT
from vitlib.vendor.program import Function
from vitlib.vendor.sequences import Sequences
from vitlib.vendor.values import Values, evaluate, literal

# Calls of a config's facts, which are written as their result.
FOLDED_CALLS = {"int", "isinstance", "math.isqrt", "self.count_queries", "bool"}
# Messages that the file has no room for: see WORDS of words.py.
UNWRITTEN = {"_misfit"}


class CallWriter(Sequences):
    """Writer of all expressions of one function, calls too. Arguments: as for Expressions."""

    def _write_call(self, node: ast.Call) -> str:
        name = ast.unparse(node.func)
        if name == "islice" and self.evaluate(node.args[1]) == (None,):
            return self.write(node.args[0])
        if name == "zip" and not self.has_positions and len(node.args) == 2:
            is_positions = ast.unparse(node.args[1]).startswith("self.attn_positions(")
            if is_positions:  # there are none to walk along with the blocks
                return self.write(node.args[0])
        if name == "torch.cat":
            first = node.args[0]
            members = self.lists.get(first.id) if isinstance(first, ast.Name) else None
            members = self.list_members(first) if members is None else members
            if members is not None and len(members) == 1:
                return members[0]
        if name in self.local_functions:
            return self._write_local_call(self.local_functions[name], node.args[0])
        is_single, value = self._single(node)
        if is_single and name in FOLDED_CALLS:
            text = literal(value, self.class_names)
            if text is not None:
                return text
        if is_single and isinstance(value, bool):
            return repr(value)
        if is_single and isinstance(value, ViTConfig):
            return self._write_config_change(value)
        unpacking, self.unpacking = self.unpacking, False
        targets = self.resolve(node.func)
        modules = self.evaluate(node.func) or ()
        if modules and all(isinstance(module, nn.Identity) for module in modules):
            return self.write(node.args[0])
        if targets:
            self.program.note_site(targets, unpacks=unpacking)
            self.program.note_call(self.function, node, targets)
            return self._write_known_call(node, targets)
        return self._join_call(node, self._callee(node.func), node.args, node.keywords)

    # Writes a function's body above the statement, and returns what its result is; see splicing.py.
    splice_argument: Callable[[ast.Call, Function], str]

    def _write_local_call(self, function: ast.FunctionDef, arg: ast.expr) -> str:
        """Write the expression that a local function returns for an argument."""
        param, result = function.args.args[0].arg, function.body[0]
        assert isinstance(result, ast.Return)
        assert result.value is not None
        self.env[param], self.texts[param] = self.evaluate(arg), self.write(arg)
        text = self.write(result.value)
        del self.env[param], self.texts[param]
        return text

    def _callee(self, func: ast.expr) -> str:
        text = self.write(func)
        if isinstance(func, ast.IfExp) and not ATOM.fullmatch(text):
            return f"({text})"
        return text

    def _write_config_change(self, config: ViTConfig) -> str:
        """Write dataclasses.replace() of fields that the file has; where none differ, `cfg`."""
        changes = []
        for short, usual in self.program.fields.items():
            value = _by_short_name(config, short)
            if value != usual:
                changes.append(f"{short}={literal(value, self.class_names)}")
        return f"replace(cfg, {', '.join(changes)})" if changes else "cfg"

    def _write_known_call(self, node: ast.Call, targets: list[Function]) -> str:
        """Write a call of the model's own functions, with the arguments that they read."""
        first = targets[0]
        positional: list[tuple[str, ast.expr]] = []
        has_star = any(isinstance(arg, ast.Starred) for arg in node.args)
        params = first.params
        if has_star:
            self.program.note_edge(self.function, targets, inline=False)
            for target in targets:
                for param in target.params:
                    self.program.note_argument(target, param, None)
                    self.program.need(target, param)
            return self._join_call(node, self._callee(node.func), node.args, node.keywords)
        for target in targets:
            bound = dict(zip(target.params, node.args, strict=False))
            bound |= {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
            for param in target.params:
                default = target.defaults.get(param)
                if param in bound:
                    self.program.note_argument(target, param, self.evaluate(bound[param]))
                elif default is not None:
                    self.program.need_default(target, param)
                    values = evaluate(default, {}, target.file.names)
                    self.program.note_argument(target, param, values)
        positional = list(zip(params, node.args, strict=False))
        args = [arg for param, arg in positional if param in first.needed]
        by_arg = {id(arg): param for param, arg in positional}
        # `f(x, None)` is `f(x)` where None is the default.
        while args:
            default = first.defaults.get(by_arg[id(args[-1])])
            if default is None or self.write(args[-1]) != ast.unparse(default):
                break
            self.program.need_default(first, by_arg[id(args.pop())])
        keywords = [keyword for keyword in node.keywords if keyword.arg in first.needed]
        is_method = re.fullmatch(r"(self|super\(\))\.\w+", ast.unparse(node.func))
        if first.owner is not None and not is_method and "self" in first.body:
            self.program.note_edge(self.function, targets, inline=False)
            return self._join_call(node, self._callee(node.func), args, keywords)
        if self.program.compact and len(targets) == 1 and is_method:
            spliced = self.splice_argument(node, first)
            if spliced:
                return spliced
        inlined = self._inline(first, targets, args)
        self.program.note_edge(self.function, targets, inline=bool(inlined))
        return inlined or self._join_call(node, self._callee(node.func), args, keywords)

    def _inline(
        self, target: Function, targets: list[Function], args: list[ast.expr]
    ) -> str | None:
        """Write a function that does no more than `return x` or `return f(x)` in place."""
        if len(targets) > 1 or not target.body.startswith("return "):
            return None
        names = [name for name in target.params if name in target.needed]
        if len(names) != len(args):
            return None
        texts = dict(zip(names, args, strict=True))
        return self._substitute(target, {name: self.write(texts[name]) for name in names})

    def _substitute(self, target: Function, texts: dict[str, str]) -> str | None:
        """Write the expression that a function returns, with arguments in place of parameters."""
        body = target.body[len("return ") :]
        if target.node.name in self.program.public | {"split_heads"}:
            return None
        if any(mark in body for mark in ("\n", COMMENT, "  #")):
            return None
        if re.search(r"\bself\b", body) and target.owner not in _classes(self.function):
            return None
        is_short = len(body) <= 50 and "self" not in body
        sites = sum(target in functions for functions, _ in self.program.sites)
        if (not is_short and self.program.count_calls(target) > 1) or not sites:
            return None
        for name, text in texts.items():
            uses = len(re.findall(rf"(?<![\w.]){name}\b(?!=)", body))
            if uses != 1 and not re.fullmatch(r"[\w.]+", text):
                return None
            if not re.fullmatch(r"[\w.]+|[\w.]+\(.*\)", text) and not _is_argument(name, body):
                return None
        pattern = r"(?<![\w.])(" + "|".join(texts) + r")\b(?!=)"
        return re.sub(pattern, lambda match: texts[match[1]], body) if texts else body

    def _join_call(
        self, node: ast.Call, callee: str, args: Iterable[ast.expr], keywords: Iterable[ast.keyword]
    ) -> str:
        """Write a call: arguments that became None by what is known are left out."""
        texts = []
        args = list(args)
        # Attention without a bias is called without it.
        attends = self.evaluate(node.func) == (F.scaled_dot_product_attention,)
        while attends and self.evaluate(args[-1]) == (None,):
            args.pop()
        for arg in args:
            texts.append(self._notes(node, arg) + self.write(arg))
        for keyword in keywords:
            text = self.write(keyword.value)
            if text == "None" and not isinstance(keyword.value, ast.Constant):
                continue
            prefix = f"{keyword.arg}=" if keyword.arg else "**"
            texts.append(self._notes(node, keyword) + prefix + text)
        if len(texts) == 1 and isinstance(args[0] if args else None, ast.GeneratorExp):
            return f"{callee}{texts[0]}" if texts[0].startswith("(") else f"{callee}({texts[0]})"
        return f"{callee}({', '.join(texts)})"

    def _notes(self, call: ast.Call, arg: ast.expr | ast.keyword) -> str:
        """Return the comments above an argument, marked for the layout."""
        if arg.lineno == call.lineno:
            return ""
        notes = self.file.comments_above(arg.lineno)
        return "".join(f"{COMMENT}{note}{COMMENT}" for note in notes)

    def resolve(self, func: ast.expr) -> list[Function]:
        """Return the functions that a call runs.

        Args:
            func: The called expression.

        Returns:
            Functions of the model's files; none for other calls.
        """
        if isinstance(func, ast.Attribute) and func.attr in UNWRITTEN:
            return []
        if isinstance(func, ast.Attribute) and ast.unparse(func.value) == "super()":
            kinds = {type(module) for module in self.env.get("self") or ()}
            owner = self.function.owner
            return self._distinct(self.program.method(k, func.attr, owner) for k in kinds)
        if isinstance(func, ast.Name) and func.id not in self.env:
            value = self.file.names.get(func.id)
            if isinstance(value, type):
                return self._distinct([self.program.method(value, "__init__")])
            module = getattr(value, "__module__", None)
            function = self.program.function(str(module), None, func.id)
            return self._distinct([function])
        if isinstance(func, ast.Name) and func.id == "block":
            # The variable of the loop over the blocks, which evaluation does not follow.
            block = self.program.model.get_submodule("blocks.0")
            values: Values = tuple(self.program.modules(type(block)))
        else:
            values = self.evaluate(func)
        if values and all(isinstance(value, type) for value in values):
            return self._distinct(self.program.method(value, "__init__") for value in values)
        if values and all(isinstance(value, nn.Module) for value in values):
            return self._distinct(self.program.method(type(v), "forward") for v in values)
        if isinstance(func, ast.Attribute):
            owners = self.evaluate(func.value)
            if owners and all(isinstance(owner, nn.Module) for owner in owners):
                return self._distinct(self.program.method(type(o), func.attr) for o in owners)
        return []

    def _distinct(self, functions: Iterable[Function | None]) -> list[Function]:
        chosen = list(dict.fromkeys(f for f in functions if f is not None))
        return sorted(chosen, key=lambda f: (f.node.lineno, f.file.module.__name__))


def _classes(function: Function) -> tuple[type, ...]:
    return function.owner.__mro__ if function.owner else ()


def _is_argument(name: str, body: str) -> bool:
    """Return True if a parameter stands alone between brackets or commas of an expression."""
    return bool(re.search(rf"[(,] ?{name}[,)]", body))


def _by_short_name(config: Any, short: str) -> Any:
    """Return a field of a config by the name that `_short_name` gives it."""
    group, _, entry = short.partition("_")
    if group in ("norms",):
        return getattr(getattr(config, group), entry)
    return getattr(config, short)
