"""Values that expressions of the model's source have for one model, without running its forward.

An expression is evaluated by Python itself, with the model's own modules as `self`: `self.q_norm is
None` has an answer for each attention of the model, and is known where all of them agree.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from types import CodeType
from typing import Any

from torch import Tensor, nn

# The values that an expression may have; None means that they are unknown.
Values = tuple[Any, ...] | None
MAX_VALUES = 4

# Calls without effect whose result follows from the config.
PURE_CALLS = {
    "bool", "build_pair", "float", "int", "isinstance", "len", "max", "min", "replace",
    "Norms", "Pooling", "Biases", "math.isqrt", "self.count_queries", "counts.get",
}  # fmt: skip
# Questions about how a forward runs, which have one answer in a file that runs by itself.
FALSE_CALLS = {
    "is_tracing", "torch.compiler.is_compiling", "torch.compiler.is_exporting",
    "torch.onnx.is_in_onnx_export",
}  # fmt: skip
EVALUATED = (
    ast.Name, ast.Attribute, ast.Constant, ast.Compare, ast.BoolOp, ast.UnaryOp, ast.BinOp,
    ast.IfExp, ast.Tuple, ast.Subscript, ast.Call, ast.keyword, ast.expr_context, ast.operator,
    ast.unaryop, ast.boolop, ast.cmpop, ast.NamedExpr, ast.Dict,
)  # fmt: skip


def is_same(a: Any, b: Any) -> bool:
    """Return True if two values are interchangeable in the source of a model.

    Args:
        a: A value.
        b: Another one. Modules of one class, and tensors, are interchangeable.
    """
    # Weights differ between blocks, and source does not depend on them.
    if isinstance(a, nn.Module | Tensor):
        return type(a) is type(b)
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(is_same, a, b))
    return bool(a == b)


def join_values(first: Values, second: Values) -> Values:
    """Return the values that either expression may have.

    Args:
        first: Values of one expression.
        second: Values of another one.
    """
    if first is None or second is None:
        return None
    distinct: list[Any] = []
    for value in (*first, *second):
        if not any(is_same(value, other) for other in distinct):
            distinct.append(value)
    return tuple(distinct) if len(distinct) <= MAX_VALUES else None


def evaluate(node: ast.expr, names: Mapping[str, Values], module: dict[str, Any]) -> Values:
    """Evaluate an expression for every combination of the values of its names.

    Args:
        node: The expression.
        names: Values of local names; `self` has the model's modules of the class.
        module: Globals of the file that the expression stands in.

    Returns:
        Its values; None where they are not known before a forward.
    """
    if isinstance(node, ast.BoolOp):
        return _evaluate_bool(node, names, module)
    if isinstance(node, ast.IfExp):
        return _evaluate_choice(node, names, module)
    shape = _shape(node)
    # A file that runs by itself is not traced and not exported by vitlib.
    if shape.false_call:
        return (False,)
    if shape.code is None:
        return None
    if not all(name in names or name in module or name in _BUILTINS for name in shape.names):
        return None
    used = [name for name in shape.names if name in names]
    # One name with two values, as the rotation of patches and of registers, gives two results.
    candidates = [names[name] for name in used]
    if any(values is None for values in candidates):
        return None
    result: Values = ()
    for combination in itertools.product(*(values or () for values in candidates)):
        try:
            value = eval(shape.code, module, dict(zip(used, combination, strict=True)))
        except (AttributeError, KeyError, TypeError, IndexError):
            # Not for this module: a branch that the model never takes may read what it has not.
            return None
        result = join_values(result, (value,))
    return result or None


@dataclass(frozen=True)
class _Shape:
    """Facts of an expression that do not depend on the model.

    Attributes:
        names: Names that it reads.
        code: Its code; None where evaluating it may have effects.
        false_call: True for a question about the run, whose answer is no.
    """

    names: tuple[str, ...] = ()
    code: CodeType | None = None
    false_call: bool = False


def _shape(node: ast.expr) -> _Shape:
    """Return the facts of an expression, which its node stores from then on."""
    # Stored with the node, which an expression is evaluated by hundreds of times.
    facts = vars(node)
    if "shape" not in facts:
        facts["shape"] = _read_shape(node)
    shape: _Shape = facts["shape"]
    return shape


def _read_shape(node: ast.expr) -> _Shape:
    parts = list(ast.walk(node))
    if not all(isinstance(part, EVALUATED) for part in parts):
        return _Shape()
    calls = {ast.unparse(part.func) for part in parts if isinstance(part, ast.Call)}
    if isinstance(node, ast.Call) and ast.unparse(node.func) in FALSE_CALLS:
        return _Shape(false_call=True)
    if not calls <= PURE_CALLS:
        return _Shape()
    names = {part.id for part in parts if isinstance(part, ast.Name)}
    stored = {part.target.id for part in parts if isinstance(part, ast.NamedExpr)}
    code = compile(ast.Expression(node), "<model>", "eval")
    return _Shape(tuple(sorted(names - stored)), code)


_BUILTINS = {"bool", "float", "int", "isinstance", "len", "max", "min"}


def truth(node: ast.expr, names: Mapping[str, Values], module: dict[str, Any]) -> bool | None:
    """Return the truth of a condition, or None where it is not known before a forward.

    Args:
        node: The condition.
        names: As for `evaluate`.
        module: As for `evaluate`.
    """
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        inner = truth(node.operand, names, module)
        return None if inner is None else not inner
    if isinstance(node, ast.BoolOp):
        ends = isinstance(node.op, ast.Or)
        parts = [truth(part, names, module) for part in node.values]
        if ends in parts:
            return ends
        return None if None in parts else not ends
    values = evaluate(node, names, module)
    if values is None or any(isinstance(value, Tensor) and value.numel() != 1 for value in values):
        return None
    # A module is true even where it is an empty list of blocks.
    answers = {bool(value) if not isinstance(value, nn.Module) else True for value in values}
    return answers.pop() if len(answers) == 1 else None


def _evaluate_bool(node: ast.BoolOp, names: Mapping[str, Values], module: Any) -> Values:
    """Evaluate `and` and `or` as far as the first part that decides."""
    ends = isinstance(node.op, ast.Or)
    for part in node.values[:-1]:
        answer = truth(part, names, module)
        if answer is None:
            return None
        if answer is ends:
            return evaluate(part, names, module)
    return evaluate(node.values[-1], names, module)


def _evaluate_choice(node: ast.IfExp, names: Mapping[str, Values], module: Any) -> Values:
    """Evaluate the branch that the condition takes; both where it differs between modules."""
    answer = truth(node.test, names, module)
    if answer is not None:
        return evaluate(node.body if answer else node.orelse, names, module)
    return join_values(evaluate(node.body, names, module), evaluate(node.orelse, names, module))


def literal(value: Any, class_names: Mapping[type, str]) -> str | None:
    """Write a value as source; None where it has no short form.

    Args:
        value: The value.
        class_names: Names of the model's classes in the file.
    """
    if value is None or isinstance(value, bool | int):
        return repr(value)
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        parts = [literal(part, class_names) for part in value]
        if None in parts:
            return None
        return "(" + ", ".join(map(str, parts)) + ("," if len(parts) == 1 else "") + ")"
    if isinstance(value, type):
        return class_names.get(value)
    return None


def is_record(value: Any) -> bool:
    """Return True for a config, a group of its fields, or a rule: an object that fields describe.

    Args:
        value: The value.
    """
    return (is_dataclass(value) and not isinstance(value, type)) or hasattr(value, "_fields")


def modules_of(model: nn.Module, kind: type) -> tuple[nn.Module, ...]:
    """List a model's modules of a class, one for each set of attributes that differ.

    Args:
        model: The model.
        kind: The class.
    """
    chosen: dict[Any, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, kind):
            state = {**vars(module), **module._modules, **module._parameters}
            usual = {name: _describe(value) for name, value in state.items()}
            chosen.setdefault((type(module), repr(sorted(usual.items()))), module)
    return tuple(chosen.values())


def _describe(value: Any) -> str:
    """Return a value as text, a module or a tensor by its class."""
    is_plain_value = value is None or isinstance(value, bool | int | float | str | tuple)
    return repr(value if is_plain_value else type(value))
