"""Tables that map vitlib's names of tensors to a layout's, both ways.

A table pairs vitlib's name with the file's. `{}` stands for the block's number; a name without
.weight or .bias stands for both. The file's side is a name, a Slice where the tensor lies otherwise
in the file, or a tuple of those, which are joined along the first axis.
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
    """A tensor that has other axes in a file than in vitlib.

    Attributes:
        ndim: Number of axes in the file. A tensor of another number is left as it is.
        read: The file's tensor -> vitlib's.
        write: vitlib's tensor and the model's config -> the file's.
    """

    ndim: int
    read: Callable[[Tensor], Tensor]
    write: Callable[[Tensor, ViTConfig], Tensor]


VECTOR = Reshape(1, lambda t: t.reshape(1, 1, -1), lambda t, _: t.reshape(-1))  # (D) <-> (1, 1, D)
ROWS = Reshape(2, lambda t: t[None], lambda t, _: t[0])  # (N, D) <-> (1, N, D)
TRANSPOSED = Reshape(2, lambda t: t.T, lambda t, _: t.T)  # (in, out) <-> (out, in)


def _to_kernel(weight: Tensor) -> Tensor:
    """(D, p * p * C), channels last -> (D, C, p, p), where 3 channels or 1 give square patches."""
    for channels in (3, 1):
        side = math.isqrt(weight.shape[1] // channels)
        if channels * side * side == weight.shape[1]:
            return weight.reshape(-1, side, side, channels).permute(0, 3, 1, 2)
    return weight


def _unflatten_kernel(weight: Tensor) -> Tensor:
    """(D, C * p * p), channels first -> (D, C, p, p), as `_to_kernel`."""
    kernel = _to_kernel(weight)
    return weight.reshape(kernel.shape) if kernel.ndim == 4 else weight


# SigLIP 2 NaFlex projects patches by a linear layer; RADIO does so with the channels first.
LINEAR_PATCHES = Reshape(2, _to_kernel, lambda t, _: t.permute(0, 2, 3, 1).flatten(1))
FLAT_PATCHES = Reshape(2, _unflatten_kernel, lambda t, _: t.flatten(1))
# RADIO holds class tokens and registers as the rows of one tensor.
FIRST_ROW = Reshape(2, lambda t: t[None, :1], lambda t, _: t[0])
LATER_ROWS = Reshape(2, lambda t: t[None, 1:], lambda t, _: t[0])


class Slice(NamedTuple):
    """A tensor of a file, or one of several equal chunks of it along the first axis.

    Attributes:
        name: The file's name of the tensor.
        chunk: Number of the chunk, from 0.
        chunks: Number of chunks of the tensor.
        reshape: How the tensor's axes differ from vitlib's.
    """

    name: str
    chunk: int = 0
    chunks: int = 1
    reshape: Reshape | None = None


FileName = str | Slice | tuple[str | Slice, ...]
Table = Mapping[str, FileName]

_NUMBER = re.compile(r"(?<=[._])(0|[1-9][0-9]*)(?=[./]|$)")


def fused_qkv(module: str, file_module: str, joint: str = "_") -> Table:
    """Pair queries, keys and values with one stacked tensor, as nn.MultiheadAttention has.

    Args:
        module: vitlib's name of the attention.
        file_module: The file's name, to which "weight" and "bias" are added.
        joint: Text between both.

    Returns:
        The rows of a table.
    """
    return {
        f"{module}.{name}.{leaf}": Slice(f"{file_module}{joint}{leaf}", chunk, 3)
        for chunk, name in enumerate("qkv")
        for leaf in ("weight", "bias")
    }


class Match(NamedTuple):
    """A tensor of a file that is one of vitlib's, or a part of one.

    Attributes:
        file_name: The file's name, with the block's number.
        piece: The part of the tensor, and its axes.
    """

    file_name: str
    piece: Slice


@dataclass
class NameMatch:
    """The names of a file, matched with vitlib's.

    Attributes:
        matches: vitlib's name -> tensors of the file that are joined to it.
        ignored: Names that the layout has and no forward reads.
        unexpected: Names that the layout does not have.
        repeated: Names of a second tensor for the same name of vitlib's.
        shapes: Shapes by the file's names.
    """

    matches: dict[str, list[Match]] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def file_name(self, name: str) -> str:
        """Return the file's name of a tensor, or of its first part.

        Args:
            name: vitlib's name, one of `matches`.

        Returns:
            The file's name.
        """
        return self.matches[name][0].file_name


class _Use(NamedTuple):
    """A use of one of the file's names: part `position` of `total` parts of vitlib's `name`."""

    name: str
    position: int
    total: int
    piece: Slice


def list_slices(row: FileName) -> tuple[Slice, ...]:
    """Return the file's side of a row as slices.

    Args:
        row: One name, one slice, or several.

    Returns:
        As many slices.
    """
    parts = row if isinstance(row, tuple) and not isinstance(row, Slice) else (row,)
    return tuple(part if isinstance(part, Slice) else Slice(part) for part in parts)


NameIndex = Mapping[str, "list[_Use]"]  # pattern of the file's names -> its uses


def index_names(tables: Sequence[Table]) -> NameIndex:
    """Index tables by the file's names.

    Args:
        tables: Where two have the same name of a file, the first counts.

    Returns:
        Patterns of the file's names -> what each is for.
    """
    index: dict[str, list[_Use]] = {}
    for table in tables:
        uses: dict[str, list[_Use]] = {}
        for name, row in table.items():
            parts = list_slices(row)
            for position, piece in enumerate(parts):
                uses.setdefault(piece.name, []).append(_Use(name, position, len(parts), piece))
        index = {**uses, **index}
    return index


def match_names(
    file_names: Iterable[str],
    tables: Sequence[Table] | NameIndex,
    *,
    prefixes: tuple[str, ...] = (),
    ignored: tuple[str, ...] = (),
) -> NameMatch:
    """Match a file's names by whichever table has them, with a prefix or without.

    Args:
        file_names: Names of the file's tensors.
        tables: Tables, or the index of tables.
        prefixes: Prefixes that a name may have.
        ignored: Beginnings of names that no forward reads; with a leading "*", endings.

    Returns:
        The matches.
    """
    # Indexing is slow for large tables: callers that match often pass a cached index.
    index = tables if isinstance(tables, Mapping) else index_names(tables)
    name_match = NameMatch()
    starts = tuple(name for name in ignored if not name.startswith("*"))
    ends = tuple(name[1:] for name in ignored if name.startswith("*"))
    joined: dict[str, dict[int, Match]] = {}
    for file_name in file_names:
        bare = next(
            (file_name.removeprefix(p) for p in prefixes if file_name.startswith(p)), file_name
        )
        uses = _look_up(bare, index)
        if not uses:
            unread = any(n.startswith(starts) or n.endswith(ends) for n in (bare, file_name))
            (name_match.ignored if unread else name_match.unexpected).append(file_name)
            continue
        for name, position, total, piece in uses:
            parts = joined.setdefault(name, {})
            # The same part twice, or a whole tensor besides parts: only one can be assigned.
            if position in parts or (parts and total == 1):
                name_match.repeated.append(file_name)
            parts[position] = Match(file_name, piece)
    name_match.matches = {name: [parts[i] for i in sorted(parts)] for name, parts in joined.items()}
    return name_match


def _look_up(file_name: str, index: NameIndex) -> list[_Use]:
    """Return the uses of a name, with numbers filled in; empty where no table has it."""
    uses = _find_uses(file_name, "", index)
    if uses:
        return uses
    # A name can hold other numbers than the block's: try each as the block's.
    for number in _NUMBER.finditer(file_name):
        pattern = f"{file_name[: number.start()]}{{}}{file_name[number.end() :]}"
        uses = _find_uses(pattern, number.group(), index)
        if uses:
            return uses
    return []


def _find_uses(pattern: str, number: str, index: NameIndex) -> list[_Use]:
    """Return the uses of a pattern, or of its module where the pattern is a weight or a bias."""
    module, dot, leaf = pattern.rpartition(".")
    uses, suffix = index.get(pattern), ""
    if uses is None and leaf in ("weight", "bias"):
        uses, suffix = index.get(module), dot + leaf
    return [use._replace(name=use.name.replace("{}", number) + suffix) for use in uses or ()]


def read_state(tensors: Mapping[str, Tensor], name_match: NameMatch) -> dict[str, Tensor]:
    """Return a file's tensors by vitlib's names, as views wherever nothing is joined.

    A tensor that does not lie as its row says is left as it is: its shape is then reported.

    Args:
        tensors: By the file's names.
        name_match: The matches; gets the shapes.

    Returns:
        Tensors by vitlib's names.
    """
    name_match.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    state: dict[str, Tensor] = {}
    for name, matches in name_match.matches.items():
        parts = [_read_slice(tensors[file_name], piece) for file_name, piece in matches]
        fits = len({part.shape[1:] for part in parts}) == 1 and parts[0].ndim
        state[name] = torch.cat(parts) if len(parts) > 1 and fits else parts[0]
    return state


def _read_slice(tensor: Tensor, piece: Slice) -> Tensor:
    """Return the chunk of a tensor, with vitlib's axes."""
    if piece.chunks > 1 and tensor.ndim and tensor.shape[0] % piece.chunks == 0:
        rows = tensor.shape[0] // piece.chunks
        tensor = tensor[piece.chunk * rows : (piece.chunk + 1) * rows]
    if piece.reshape is None or tensor.ndim != piece.reshape.ndim:
        return tensor
    return piece.reshape.read(tensor)


def write_state(state: Mapping[str, Tensor], table: Table, cfg: ViTConfig) -> dict[str, Tensor]:
    """Return vitlib's tensors under the names, and with the axes, of a table.

    Args:
        state: By vitlib's names.
        table: The names in files of this model.
        cfg: The model.

    Returns:
        Tensors by the file's names.

    Raises:
        KeyError: The table has no row for a tensor.
    """
    written: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        row = _fill_row(name, table)
        parts = tensor.chunk(len(row)) if len(row) > 1 else [tensor]
        for piece, part in zip(row, parts, strict=True):
            reshaped = part if piece.reshape is None else piece.reshape.write(part, cfg)
            written.setdefault(piece.name, {})[piece.chunk] = reshaped
    return {
        name: torch.cat([chunks[i] for i in sorted(chunks)])
        if len(chunks) > 1
        else chunks[min(chunks)]
        for name, chunks in written.items()
    }


def _fill_row(name: str, table: Table) -> tuple[Slice, ...]:
    """Return a row with the block's number filled in; raise KeyError where there is no row."""
    number = None if name in table else _NUMBER.search(name)
    pattern = name if number is None else f"{name[: number.start()]}{{}}{name[number.end() :]}"
    module, dot, leaf = pattern.rpartition(".")
    row, suffix = (table[pattern], "") if pattern in table else (table[module], dot + leaf)
    filled = "" if number is None else number.group()
    return tuple(s._replace(name=s.name.replace("{}", filled) + suffix) for s in list_slices(row))


def rename(name: str, table: Table) -> str:
    """Return the file's name of a tensor, or of its first part.

    Args:
        name: vitlib's name.
        table: The names in files.

    Returns:
        The file's name; vitlib's where the table has no row.
    """
    try:
        return _fill_row(name, table)[0].name
    except KeyError:
        return name


def summarise(names: Iterable[str]) -> str:
    """Join names in one line, block numbers as ranges: "encoder.layer.0-11.output.dense.bias".

    Args:
        names: Names of tensors.

    Returns:
        The line.
    """
    numbers: dict[tuple[str, str], list[int]] = {}
    for name in names:
        number = _NUMBER.search(name)
        ends = (name, "") if number is None else (name[: number.start()], name[number.end() :])
        numbers.setdefault(ends, []).extend([] if number is None else [int(number.group())])
    return ", ".join(
        before + (ranges(blocks) if blocks else "") + after
        for (before, after), blocks in numbers.items()
    )


def ranges(numbers: Iterable[int]) -> str:
    """Join whole numbers in order, runs as ranges: "0-4,6".

    Args:
        numbers: In any order.

    Returns:
        The text.
    """
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
