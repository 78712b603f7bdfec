"""Write public_api.txt: every public name of vitlib with its signature.

    cd tests && python public_api.py

test_public_api.py compares it with the code. Where it differs, CHANGELOG.md needs an entry.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import vitlib

SNAPSHOT = Path(__file__).with_name("public_api.txt")


def public_modules() -> Iterator[tuple[str, ModuleType]]:
    """Yield vitlib and its public packages."""
    yield "vitlib", vitlib
    for name in vitlib._MODULES:
        yield f"vitlib.{name}", getattr(vitlib, name)


def public_names(module: ModuleType) -> list[str]:
    """List the public names of a module, in order."""
    stated = getattr(module, "__all__", None)
    if stated is not None:
        return sorted(stated)
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and getattr(value, "__module__", "") == module.__name__
        and callable(value)
    )


def describe(name: str, value: object) -> Iterator[str]:
    """Yield a line for a name, and for a class one for each public method and property."""
    if not callable(value) or typing.get_origin(value) is not None:
        yield name
        return
    yield f"{name}{signature(value)}"
    if not inspect.isclass(value) or not value.__module__.startswith("vitlib"):
        return
    own = [kind for kind in value.__mro__ if kind.__module__.startswith("vitlib")]
    members = {key: part for kind in reversed(own) for key, part in vars(kind).items()}
    for member, definition in sorted(members.items()):
        if member.startswith("_"):
            continue
        target = inspect.unwrap(getattr(definition, "__func__", definition))
        if isinstance(definition, property):
            yield f"{name}.{member} (property)"
        elif inspect.isfunction(target):
            yield f"{name}.{member}{signature(target)}"


def signature(value: object) -> str:
    """Return the signature without annotations; "(...)" where Python has none."""
    try:
        found = inspect.signature(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return "(...)"
    empty = inspect.Parameter.empty
    plain = [p.replace(annotation=empty) for p in found.parameters.values()]
    # Defaults that are objects have an address in their text.
    shown = [
        p if p.default is empty or isinstance(p.default, int | float | str | bool | tuple | None)
        else p.replace(default=...)
        for p in plain
    ]  # fmt: skip
    return str(found.replace(parameters=shown, return_annotation=inspect.Signature.empty))


def snapshot() -> str:
    """Return the text of public_api.txt."""
    lines = []
    for prefix, module in public_modules():
        for name in public_names(module):
            lines += describe(f"{prefix}.{name}", getattr(module, name))
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    SNAPSHOT.write_text(snapshot(), encoding="utf-8")
