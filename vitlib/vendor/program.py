"""Facts of one model that hold for every function of its source: arguments, results, attributes.

They are gathered by rendering the functions that a forward reaches again and again, until nothing
new is learned: a parameter whose argument is always None, an attribute that no function reads.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from vitlib import encoder, patch_embed, positions, variants
from vitlib import vit as vit_file
from vitlib.vendor.source import SourceFile
from vitlib.vendor.values import Values, join_values, modules_of

# Classes that differ from torch's in initial weights, autocast or TF32 alone.
TORCH_CLASSES = {
    "Linear": "nn.Linear", "LayerNorm": "nn.LayerNorm", "RMSNorm": "nn.RMSNorm",
    "PatchProjection": "nn.Conv2d",
}  # fmt: skip
FILES = (encoder, positions, variants, patch_embed, vit_file)


@dataclass(eq=False)
class Function:
    """A function of the model's source, and what the model does with it.

    Attributes:
        file: File that it stands in.
        owner: Its class; None for a function of the file.
        node: Its tree.
        values: Values of each parameter, over all calls.
        needed: Parameters that its body reads for this model.
        results: For each element of the tuple that it returns, True if it is always None.
        live: Local names that its body reads.
        body: Its body as last rendered.
        rendered: State of the program that this body belongs to.
        lines: Lines of the body: levels of indentation, and text.
    """

    file: SourceFile
    owner: type | None
    node: ast.FunctionDef
    values: dict[str, Values] = field(default_factory=dict)
    needed: set[str] = field(default_factory=set)
    results: list[bool] | None = None
    live: set[str] = field(default_factory=set)
    body: str = ""
    rendered: int = -1
    lines: list[tuple[int, str]] = field(default_factory=list)

    @property
    def params(self) -> list[str]:
        """Names of the parameters, without `self`."""
        names = [arg.arg for arg in (*self.node.args.args, *self.node.args.kwonlyargs)]
        return names[1:] if self.owner else names

    @property
    def defaults(self) -> dict[str, ast.expr]:
        """Defaults by parameter."""
        args = self.node.args
        names = [arg.arg for arg in args.args]
        pairs = dict(zip(reversed(names), reversed(args.defaults), strict=False))
        keyword = zip(args.kwonlyargs, args.kw_defaults, strict=True)
        return pairs | {arg.arg: value for arg, value in keyword if value is not None}


class Program:
    """The source of a model, with the facts that all its functions share.

    Args:
        model: The model, in eval mode.
        compact: Write methods of a single call in place, and no initial weights.
    """

    def __init__(self, model: nn.Module, *, compact: bool = False) -> None:
        self.model, self.compact = model, compact
        # Methods that a reader calls: they stay methods.
        self.public = {"forward", "forward_features"}
        self.public |= set() if compact else {"forward_head", "pool"}
        self.config: Any = model.config
        self.files = {module.__name__: SourceFile(module) for module in FILES}
        self.class_names = {
            getattr(file.module, name): name
            for file in self.files.values()
            for name in file.classes
        }
        self.functions: dict[tuple[str, str, str], Function] = {}
        self.reached: list[Function] = []
        self.fields: dict[str, Any] = {}  # fields of the config that the file reads
        self.rope_fields: set[str] = set()
        self.literals: set[tuple[str, str]] = set()  # attributes that are numbers of the file
        self.attributes: set[str] = set()  # attributes that some function reads
        self.sites: list[tuple[frozenset[Function], bool]] = []
        self.calls: dict[Function, set[tuple[int, int, int]]] = {}
        # By function, those that its body calls or contains; and those that only stand in others.
        self.edges: dict[Function, dict[Function, bool]] = {}
        self.used_defaults: set[tuple[Function, str]] = set()
        self.spliced: set[Function] = set()  # functions whose body stands at their only call
        # By function and the place of a call: elements of the result that the caller never reads.
        self.dead: dict[tuple[Function, tuple[int, int]], set[int]] = {}
        self.changed, self.version = False, 0
        self._modules: dict[type, tuple[nn.Module, ...]] = {}
        self._slots: dict[Function, set[int]] = {}

    def modules(self, kind: type) -> tuple[nn.Module, ...]:
        """List the model's modules of a class, without those that are alike.

        Args:
            kind: The class.
        """
        if kind not in self._modules:
            self._modules[kind] = modules_of(self.model, kind)
        return self._modules[kind]

    def function(self, module: str, owner: type | None, name: str) -> Function | None:
        """Return a function of the model's files, and note that the model reaches it.

        Args:
            module: Name of its module.
            owner: Its class, or None.
            name: Its name.

        Returns:
            The function; None where it is not of these files.
        """
        if owner is not None and owner.__name__ in TORCH_CLASSES:
            return None
        key = module, owner.__name__ if owner else "", name
        if key not in self.functions:
            file = self.files.get(module)
            node = file.functions.get(key[1:]) if file else None
            if file is None or node is None:
                return None
            self.functions[key] = Function(file, owner, node)
        function = self.functions[key]
        if function not in self.reached:
            self.reached.append(function)
            self.change()
        return function

    def method(self, kind: type, name: str, above: type | None = None) -> Function | None:
        """Return the method that a module of a class runs.

        Args:
            kind: Class of the module.
            name: Name of the method.
            above: Start after this class, as super() does.
        """
        order = kind.__mro__
        for owner in order[order.index(above) + 1 :] if above else order:
            if name in vars(owner):
                return self.function(owner.__module__, owner, name)
        return None

    def change(self) -> None:
        """Note that a fact is new: what was rendered before it may differ."""
        self.changed = True
        self.version += 1

    def start_pass(self) -> None:
        """Forget what each pass notes again."""
        self.changed = False
        self.version += 1
        self.spliced.clear()
        self.edges.clear()

    def note_argument(self, function: Function, param: str, values: Values) -> None:
        """Add the values that a call gives to a parameter.

        Args:
            function: The function called.
            param: The parameter.
            values: Values of the argument.
        """
        old = function.values.get(param, ())
        new = join_values(old, values)
        if param not in function.values or _differ(old, new):
            function.values[param] = new
            self.change()

    def need(self, function: Function, param: str) -> None:
        """Keep a parameter in a function, and in all that the same calls reach.

        Args:
            function: The function.
            param: The parameter.
        """
        if param not in function.needed:
            function.needed.add(param)
            self.change()

    def need_default(self, function: Function, param: str) -> None:
        """Keep the default of a parameter, which a call relies on.

        Args:
            function: The function called.
            param: The parameter.
        """
        self.used_defaults.add((function, param))

    def note_site(self, functions: list[Function], *, unpacks: bool) -> None:
        """Note which functions one call may reach, and if it unpacks a tuple.

        Args:
            functions: The functions.
            unpacks: True if the call's result is unpacked at once.
        """
        site = frozenset(functions), unpacks
        if site not in self.sites:
            self.sites.append(site)
            self.change()

    def note_dead(self, function: Function, call: ast.expr, dead: set[int]) -> None:
        """Note the elements of a result that a caller never reads.

        Args:
            function: The function called.
            call: The call.
            dead: Indices of the elements.
        """
        key = function, (call.lineno, call.col_offset)
        if self.dead.get(key) != dead:
            self.dead[key] = dead
            self.change()

    def note_call(self, function: Function, node: ast.Call, targets: list[Function]) -> None:
        """Note that a function has a call.

        Args:
            function: The function.
            node: The call.
            targets: Functions that it may reach.
        """
        for target in targets:
            places, place = self.calls.setdefault(target, set()), (node.lineno, node.col_offset)
            if (id(function), *place) not in places:
                places.add((id(function), *place))
                self.change()

    def count_calls(self, function: Function) -> int:
        """Count the calls of a function in the source.

        Args:
            function: The function.
        """
        return len(self.calls.get(function, ()))

    def note_edge(self, function: Function, targets: Iterable[Function], *, inline: bool) -> None:
        """Note that a function's text calls others, or has their text in it.

        Args:
            function: The function.
            targets: The others.
            inline: True where their text stands in it.
        """
        edges = self.edges.setdefault(function, {})
        for target in targets:
            edges[target] = edges.get(target, True) and inline

    def note_attribute(self, name: str) -> None:
        """Note that a function reads an attribute.

        Args:
            name: The attribute.
        """
        if name not in self.attributes:
            self.attributes.add(name)
            self.change()

    def forget(self) -> None:
        """Forget what passes over half of the facts noted too much of; values remain."""
        self.reached.clear()
        self.attributes.clear()
        self.sites.clear()
        self.calls.clear()
        self.dead.clear()
        self.fields.clear()
        self.spliced.clear()
        for function in self.functions.values():
            function.needed.clear()

    def none_slots(self, function: Function) -> set[int]:
        """List the elements of a returned tuple that are None for this model, and are left out.

        Args:
            function: The function.
        """
        # Functions that one call may reach return tuples of one length.
        group, grown = {function}, True
        while grown:
            linked = {f for functions, _ in self.sites if functions & group for f in functions}
            grown = not linked <= group
            group |= linked
        # A call that passes the tuple on needs all of it.
        if not all(unpacks for functions, unpacks in self.sites if functions & group):
            return set()
        slots: set[int] | None = None
        for member in group:
            results = member.results or []
            mine = {index for index, is_none in enumerate(results) if is_none}
            unread = [dead for (target, _), dead in self.dead.items() if target is member]
            if unread and len(unread) == self.count_calls(member):
                mine |= set.intersection(*unread)
            slots = mine if slots is None else slots & mine
        count = min((len(member.results or ()) for member in group), default=0)
        return slots if slots and len(slots) < count else set()

    def share_needs(self) -> None:
        """Give functions that one call may reach the same parameters."""
        for functions, _ in self.sites:
            for param in {name for function in functions for name in function.needed}:
                for function in functions:
                    if param in function.params:
                        self.need(function, param)

    def class_of(self, name: str) -> type | None:
        """Return a class of the model's files by its name.

        Args:
            name: The name.
        """
        for module, file in self.files.items():
            if name in file.classes:
                kind: type = getattr(sys.modules[module], name)
                return kind
        return None


def _differ(old: Values, new: Values) -> bool:
    """Return True if values were added, or became unknown."""
    if old is None or new is None:
        return old is not new
    return len(old) != len(new)
