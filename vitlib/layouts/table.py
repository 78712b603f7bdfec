"""How a layout's table of names is read, both ways, and what the shapes it finds say of the model.

A table pairs our name with theirs. `{}` stands for the block's number; a name without .weight or
.bias stands for both; a tuple of theirs is joined along the first axis to make ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vitlib.config import as_pair

Theirs = str | tuple[str, ...]
Shape = tuple[int, ...]

_NUMBER = re.compile(r"(?<=\.)(0|[1-9][0-9]*)(?=\.)")


@dataclass
class Located:
    """Which tensors of a file are which of ours."""

    ours: dict[str, list[str]] = field(default_factory=dict)  # our name -> theirs, to be joined
    ignored: list[str] = field(default_factory=list)  # known, and read by no forward
    unexpected: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)  # a second tensor for the same of ours


_Known = Mapping[str, tuple[str, int, int]]  # their name -> ours, which part of it, of how many


def _known_names(tables: Sequence[Mapping[str, Theirs]]) -> _Known:
    """The tables read from their side; where two spell a name, the first holds."""
    known: dict[str, tuple[str, int, int]] = {}
    for table in tables:
        for ours, theirs in table.items():
            parts = (theirs,) if isinstance(theirs, str) else theirs
            for part, name in enumerate(parts):
                known.setdefault(name, (ours, part, len(parts)))
    return known


def locate(
    names: Iterable[str],
    tables: Sequence[Mapping[str, Theirs]],
    *,
    prefix: str,
    ignored: tuple[str, ...],
) -> Located:
    """Find what each of a file's names is, by whichever table spells it, prefixed or not."""
    known, located = _known_names(tables), Located()
    joined: dict[str, dict[int, str]] = {}
    for name in names:
        bare = name.removeprefix(prefix)
        found = _lookup(bare, known)
        if found is None:
            wanted = located.ignored if bare.startswith(ignored) else located.unexpected
            wanted.append(name)
            continue
        ours, part, count = found
        parts_so_far = joined.setdefault(ours, {})
        if part in parts_so_far or (parts_so_far and count == 1):
            located.repeated.append(name)
        parts_so_far[part] = name
    located.ours = {ours: [parts[i] for i in sorted(parts)] for ours, parts in joined.items()}
    return located


def _lookup(name: str, known: _Known) -> tuple[str, int, int] | None:
    """Their name -> (our name, which part of it, of how many), or None."""
    number = _NUMBER.search(name)
    pattern = name if number is None else f"{name[: number.start()]}{{}}{name[number.end() :]}"
    module, dot, leaf = pattern.rpartition(".")
    for candidate, suffix in ((pattern, ""), (module, dot + leaf)):
        if candidate in known and suffix in ("", ".weight", ".bias"):
            ours, part, count = known[candidate]
            filled = ours if number is None else ours.replace("{}", number.group())
            return filled + suffix, part, count
    return None


def rename(ours: str, table: Mapping[str, str]) -> str:
    """Our name -> the one that a file has for it. Raises KeyError where the table has none."""
    number = _NUMBER.search(ours)
    pattern = ours if number is None else f"{ours[: number.start()]}{{}}{ours[number.end() :]}"
    module, dot, leaf = pattern.rpartition(".")
    theirs = table[pattern] if pattern in table else table[module] + dot + leaf
    return theirs if number is None else theirs.replace("{}", number.group())


def summarise(names: Iterable[str]) -> str:
    """Names in one line, the blocks' numbers as ranges: "encoder.layer.0-11.output.dense.bias"."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for name in names:
        found = _NUMBER.search(name)
        cut = (name, "") if found is None else (name[: found.start()], name[found.end() :])
        numbers.setdefault(cut, []).extend([] if found is None else [int(found.group())])
    return ", ".join(
        before + (ranges(found) if found else "") + after
        for (before, after), found in numbers.items()
    )


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers in order, runs as ranges: "0-4,6"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def kept(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The fields that say which tensors there are that no forward reads, and files keep."""
    return {
        "mask_token": "patch_embed.mask_token" in shapes,
        "pooler_dim": (shapes.get("pooler.weight") or (0,))[0],
    }


def contradictions(
    values: Mapping[str, Any], shapes: Mapping[str, Shape]
) -> list[tuple[str, Any, Any]]:
    """(field, what the config says, what the tensors hold) wherever the two differ.

    It comes before anything is built, so a config can make vitlib build no more than its file
    holds.
    """
    said = {"num_registers": 0, "dist_token": False, **values}
    said["patch_size"] = as_pair("patch_size", said["patch_size"])
    h, w = as_pair("image_size", said["image_size"])
    blocks = {int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")}
    held: dict[str, Any] = {
        "depth": len(blocks) if blocks == set(range(len(blocks))) else f"blocks {ranges(blocks)}",
        "num_registers": 0,
    }
    match shapes.get("patch_embed.proj.weight"):
        case (embed_dim, in_channels, p, q):
            held |= {"embed_dim": embed_dim, "in_channels": in_channels, "patch_size": (p, q)}
    match shapes.get("blocks.0.mlp.fc2.weight"):
        case (_, mlp_dim):
            held["mlp_dim"] = mlp_dim
    match shapes.get("patch_embed.reg_token"):
        case (_, registers, _):
            held["num_registers"] = registers
    clashes = [(name, said[name], value) for name, value in held.items() if said[name] != value]
    match shapes.get("patch_embed.pos_embed"):
        case (_, rows, _) if held.get("patch_size") == said["patch_size"]:
            p, q = held["patch_size"]
            needed = (h // p) * (w // q) + 1 + said["dist_token"]
            if needed != rows:
                clashes.append(("image_size", f"{h}x{w}, {needed} positions", f"{rows} positions"))
    return clashes
