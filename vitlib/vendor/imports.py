"""Imports of a vendored file: those of the model's files that its source still reads."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from vitlib.vendor.program import Program

STANDARD = {"collections.abc", "dataclasses", "functools", "itertools", "math", "pathlib", "typing"}
# Names that the head and the end of the file read: name -> module.
OWN = {
    "Path": "pathlib",
    "dataclass": "dataclasses",
    "replace": "dataclasses",
    "NamedTuple": "typing",
    "load_file": "safetensors.torch",
}


def write_imports(program: Program, code: str) -> list[str]:
    """Write the imports of the names that code reads, in the order of isort.

    Args:
        program: The model's source, with its own imports.
        code: The file without imports.

    Returns:
        Lines, with an empty one between the standard library and other packages.
    """
    used = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    sources = {name: (module, f"from {module} import") for name, module in OWN.items()}
    for name, module, line in _list_imports(program):
        sources.setdefault(name, (module, line))
    groups: dict[bool, dict[str, list[str]]] = {True: {}, False: {}}
    for name in used & sources.keys():
        module, line = sources[name]
        groups[module in STANDARD].setdefault(line, []).append(name)
    lines = ["from __future__ import annotations"]
    for group in groups.values():
        lines.append("")
        # Imports of modules come before those of names, as ruff sorts them.
        for line in sorted(group, key=lambda line: (line.startswith("from"), line)):
            names = sorted(group[line], key=lambda name: (name[0].islower(), name))
            lines.append(f"{line} {', '.join(names)}" if line.startswith("from") else line)
    return lines


def _list_imports(program: Program) -> Iterator[tuple[str, str, str]]:
    """Yield (name, module, line) of each import of the model's files from other packages."""
    for file in program.files.values():
        for node in file.tree.body:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    renamed = f" as {alias.asname}" if alias.asname else ""
                    name = (alias.asname or alias.name).split(".")[0]
                    yield name, alias.name, f"import {alias.name}{renamed}"
            elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith("vitlib"):
                for alias in node.names:
                    yield alias.name, str(node.module), f"from {node.module} import"
