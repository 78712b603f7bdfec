"""How a layout's table of names is read, both ways.

A table pairs our name with theirs. `{}` stands for the block's number; a name without .weight or
.bias stands for both. Theirs is a name, a Piece where the tensor lies otherwise in the file, or a
tuple of those, which are joined along the first axis to make ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from vitlib.config import ViTConfig


class Reshape(NamedTuple):
    """How a tensor of so many axes lies in a file, where it is not as we hold it."""

    ndim: int
    read: Callable[[Tensor], Tensor]
    write: Callable[[Tensor, ViTConfig], Tensor]


VECTOR = Reshape(1, lambda t: t.reshape(1, 1, -1), lambda t, _: t.reshape(-1))  # (D) <-> (1, 1, D)
ROWS = Reshape(2, lambda t: t[None], lambda t, _: t[0])  # (N, D) <-> (1, N, D)
TRANSPOSED = Reshape(2, lambda t: t.T, lambda t, _: t.T)  # (in, out) <-> (out, in)


def _as_kernel(weight: Tensor) -> Tensor:
    """(D, p * p * C), channels last -> (D, C, p, p), where 3 channels or 1 give square patches."""
    for channels in (3, 1):
        side = math.isqrt(weight.shape[1] // channels)
        if channels * side * side == weight.shape[1]:
            return weight.reshape(-1, side, side, channels).permute(0, 3, 1, 2)
    return weight


LINEAR_PATCHES = Reshape(2, _as_kernel, lambda t, _: t.permute(0, 2, 3, 1).flatten(1))  # SigLIP 2


class Slice(NamedTuple):
    """A tensor of a file, or one of `of` equal parts of it along its first axis, in a form."""

    name: str
    chunk: int = 0
    chunks: int = 1
    reshape: Reshape | None = None


FileName = str | Slice | tuple[str | Slice, ...]
Table = Mapping[str, FileName]

_NUMBER = re.compile(r"(?<=[._])(0|[1-9][0-9]*)(?=[./]|$)")


def fused_qkv(ours: str, theirs: str) -> Table:
    """Queries, keys and values stacked in one weight and one bias, as nn.MultiheadAttention has."""
    return {
        f"{ours}.{name}.{leaf}": Slice(f"{theirs}_{leaf}", part, 3)
        for part, name in enumerate("qkv")
        for leaf in ("weight", "bias")
    }


class Match(NamedTuple):
    """One tensor of a file that is ours, or a part of ours."""

    file_name: str
    piece: Slice


@dataclass
class NameMatch:
    """Which tensors of a file are which of ours."""

    matches: dict[str, list[Match]] = field(
        default_factory=dict
    )  # our name -> theirs, to be joined
    ignored: list[str] = field(default_factory=list)  # known, and read by no forward
    unexpected: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)  # a second tensor for the same of ours
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of theirs, as in the file

    def file_name(self, ours: str) -> str:
        """What the file calls it."""
        return self.matches[ours][0].file_name


class _Use(NamedTuple):
    """What one of their names is for."""

    name: str  # ours
    position: int  # in what is joined
    total: int
    piece: Slice


def slices(theirs: FileName) -> tuple[Slice, ...]:
    """One or several of theirs, as pieces."""
    several = theirs if isinstance(theirs, tuple) and not isinstance(theirs, Slice) else (theirs,)
    return tuple(part if isinstance(part, Slice) else Slice(part) for part in several)


NameIndex = Mapping[str, "list[_Use]"]  # their patterns -> what each is for


def index_names(tables: Sequence[Table]) -> NameIndex:
    """The tables read from their side; where two spell a name, the first holds."""
    known: dict[str, list[_Use]] = {}
    for table in tables:
        here: dict[str, list[_Use]] = {}
        for ours, theirs in table.items():
            parts = slices(theirs)
            for place, piece in enumerate(parts):
                here.setdefault(piece.name, []).append(_Use(ours, place, len(parts), piece))
        known = {**here, **known}
    return known


def match_names(
    names: Iterable[str],
    tables: Sequence[Table] | NameIndex,
    *,
    prefixes: tuple[str, ...] = (),
    ignored: tuple[str, ...] = (),
) -> NameMatch:
    """Find what each of a file's names is, by whichever table spells it, prefixed or not.

    tables: or what known_names made of them, where that is kept.
    ignored: how names begin or end that are known and not read; a leading "*" marks an end.
    """
    known = tables if isinstance(tables, Mapping) else index_names(tables)
    name_match = NameMatch()
    starts = tuple(name for name in ignored if not name.startswith("*"))
    ends = tuple(name[1:] for name in ignored if name.startswith("*"))
    joined: dict[str, dict[int, Match]] = {}
    for name in names:
        bare = next((name.removeprefix(p) for p in prefixes if name.startswith(p)), name)
        uses = _lookup(bare, known)
        if not uses:
            unread = any(n.startswith(starts) or n.endswith(ends) for n in (bare, name))
            (name_match.ignored if unread else name_match.unexpected).append(name)
            continue
        for ours, place, count, piece in uses:
            so_far = joined.setdefault(ours, {})
            if place in so_far or (so_far and count == 1):
                name_match.repeated.append(name)
            so_far[place] = Match(name, piece)
    name_match.matches = {ours: [found[i] for i in sorted(found)] for ours, found in joined.items()}
    return name_match


def _lookup(name: str, known: NameIndex) -> list[_Use]:
    """Their name -> what it is for, our names filled in; empty where it is not known."""
    found = _uses(name, "", known)
    if found:
        return found
    for number in _NUMBER.finditer(name):
        pattern = f"{name[: number.start()]}{{}}{name[number.end() :]}"
        found = _uses(pattern, number.group(), known)
        if found:
            return found
    return []


def _uses(pattern: str, number: str, known: NameIndex) -> list[_Use]:
    module, dot, leaf = pattern.rpartition(".")
    uses, suffix = known.get(pattern), ""
    if uses is None and leaf in ("weight", "bias"):
        uses, suffix = known.get(module), dot + leaf
    return [use._replace(name=use.name.replace("{}", number) + suffix) for use in uses or ()]


def read_state(tensors: Mapping[str, Tensor], name_match: NameMatch) -> dict[str, Tensor]:
    """A file's tensors as ours, views wherever nothing is joined.

    One that does not lie as its row says is left as it is: its shape is then reported as wrong.
    """
    name_match.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    state: dict[str, Tensor] = {}
    for ours, found in name_match.matches.items():
        parts = [_read_piece(tensors[theirs], piece) for theirs, piece in found]
        fits = len({part.shape[1:] for part in parts}) == 1 and parts[0].ndim
        state[ours] = torch.cat(parts) if len(parts) > 1 and fits else parts[0]
    return state


def _read_piece(tensor: Tensor, piece: Slice) -> Tensor:
    if piece.chunks > 1 and tensor.ndim and tensor.shape[0] % piece.chunks == 0:
        rows = tensor.shape[0] // piece.chunks
        tensor = tensor[piece.chunk * rows : (piece.chunk + 1) * rows]
    return (
        tensor
        if piece.reshape is None or tensor.ndim != piece.reshape.ndim
        else piece.reshape.read(tensor)
    )


def write_state(state: Mapping[str, Tensor], table: Table, cfg: ViTConfig) -> dict[str, Tensor]:
    """Rename and reshape tensors to those of a table. Raises KeyError for one without a row."""
    parts: dict[str, dict[int, Tensor]] = {}
    for ours, tensor in state.items():
        row = _row(ours, table)
        for piece, part in zip(
            row, tensor.chunk(len(row)) if len(row) > 1 else [tensor], strict=True
        ):
            form = piece.reshape
            parts.setdefault(piece.name, {})[piece.chunk] = (
                part if form is None else form.write(part, cfg)
            )
    return {
        name: torch.cat([found[i] for i in sorted(found)]) if len(found) > 1 else found[min(found)]
        for name, found in parts.items()
    }


def _row(ours: str, table: Table) -> tuple[Slice, ...]:
    """Our name -> where a file has it. Raises KeyError where the table has no row for it."""
    number = None if ours in table else _NUMBER.search(ours)
    pattern = ours if number is None else f"{ours[: number.start()]}{{}}{ours[number.end() :]}"
    module, dot, leaf = pattern.rpartition(".")
    row, suffix = (table[pattern], "") if pattern in table else (table[module], dot + leaf)
    filled = "" if number is None else number.group()
    return tuple(p._replace(name=p.name.replace("{}", filled) + suffix) for p in slices(row))


def rename(ours: str, table: Table) -> str:
    """Our name -> the one, or the first, that a file has for it; ours where the table has none."""
    try:
        return _row(ours, table)[0].name
    except KeyError:
        return ours


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
