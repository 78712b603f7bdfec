"""Lists and tuples of the model's source, written with the members that one model has."""

from __future__ import annotations

import ast
import re

from vitlib.vendor.expressions import MAX_LIST, Expressions


class Sequences(Expressions):
    """Writer of expressions, lists and tuples too. Arguments: as for Expressions."""

    def list_members(self, node: ast.expr) -> list[str] | None:
        """Write the members of a list; None where they are not known.

        Args:
            node: A list, or a comprehension.
        """
        if isinstance(node, ast.ListComp):
            return self._filtered(node)
        if not isinstance(node, ast.List):
            return None
        members: list[str] = []
        for part in node.elts:
            if not isinstance(part, ast.Starred):
                members.append(self.write(part))
                continue
            inner = part.value
            if not isinstance(inner, ast.GeneratorExp) or len(inner.generators) != 1:
                return None
            loop = inner.generators[0]
            names = self._list_names(loop.iter)
            if not names or not isinstance(loop.target, ast.Name) or loop.ifs:
                return None
            iterated = [text for name in names for text in self.lists[name]]
            if len(iterated) > 1 or any(len(text) > MAX_LIST for text in iterated):
                self.set_aside(names[0], f"[{', '.join(iterated)}]")
                members.append(f"*({self.write(inner.elt)} for {loop.target.id} in {names[0]})")
                continue
            for text in iterated:
                self.texts[loop.target.id] = text
                members.append(self.write(inner.elt))
            self.texts.pop(loop.target.id, None)
        return members

    def _list_names(self, node: ast.expr) -> list[str]:
        """Return the known lists in `tokens` or in `(*tokens, *others)`; none where one is not."""
        parts = node.elts if isinstance(node, ast.Tuple) else [ast.Starred(node)]
        values = [part.value for part in parts if isinstance(part, ast.Starred)]
        names = [value.id for value in values if isinstance(value, ast.Name)]
        return names if len(names) == len(parts) and set(names) <= set(self.lists) else []

    def _write_list(self, node: ast.List) -> str:
        members = self.list_members(node)
        return self._compose(node) if members is None else "[" + ", ".join(members) + "]"

    def _write_tuple(self, node: ast.Tuple) -> str:
        """Write a tuple; `*(t for t in tokens if t is not None)` as the tokens that there are."""
        texts = []
        for part in node.elts:
            chosen = self._filtered(part.value) if isinstance(part, ast.Starred) else None
            texts += chosen if chosen is not None else [self.write(part)]
        if not any(isinstance(part, ast.Starred) for part in node.elts):
            return self._compose(node)
        return f"({', '.join(texts)})" if len(texts) != 1 else f"({texts[0]},)"

    def _filtered(self, node: ast.expr) -> list[str] | None:
        """List the members of a tuple that are not None, where a comprehension chooses these."""
        if not isinstance(node, ast.GeneratorExp | ast.ListComp) or not self._filters(node):
            return None
        members = node.generators[0].iter
        if isinstance(members, ast.Name) and members.id in self.tuples:
            members = self.tuples[members.id]
        if not isinstance(members, ast.Tuple):
            return None
        answers = [self.truth(_is_not_none(part)) for part in members.elts]
        if None in answers:
            return None
        chosen = zip(members.elts, answers, strict=True)
        return [self.write(part) for part, answer in chosen if answer]

    def _write_listcomp(self, node: ast.ListComp) -> str:
        chosen = self._filtered(node)
        if chosen is not None:
            return "[" + ", ".join(chosen) + "]"
        text = self._compose(node)
        match = re.fullmatch(r"\[(\w+) for (\w+) in (\w+)\]", text)
        return f"list({match[3]})" if match and match[1] == match[2] else text

    def _filters(self, node: ast.ListComp | ast.GeneratorExp) -> bool:
        inner = node.generators[0]
        return (
            isinstance(node.elt, ast.Name)
            and len(inner.ifs) == 1
            and ast.unparse(inner.ifs[0]) == f"{node.elt.id} is not None"
        )


def _is_not_none(node: ast.expr) -> ast.expr:
    test = ast.Compare(node, [ast.IsNot()], [ast.Constant(None)])
    return ast.copy_location(ast.fix_missing_locations(ast.copy_location(test, node)), node)
