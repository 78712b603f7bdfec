"""Exceptions of vitlib, for mistakes in calls, files and images; checks of single values.

Each message states what is expected, what was given and what to do. The command line prints it as
one line.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral


class VitlibError(Exception):
    """Base of every error that vitlib raises on purpose."""


class ConfigError(VitlibError):
    """A number or a choice that no ViT can have, or that contradicts another number."""


class SourceError(VitlibError):
    """A hub id, folder or file that does not exist or cannot be read."""


class CheckpointError(VitlibError):
    """A checkpoint whose tensors or config do not suit the model."""


class DataError(VitlibError):
    """A labelled data set that cannot be used."""


class TrainError(VitlibError):
    """A training run that cannot start or resume."""


class ServeError(VitlibError):
    """A server that cannot start."""


class BatchError(VitlibError):
    """A batch run that cannot start or resume."""


class InstallationError(VitlibError, ImportError):
    """A package that vitlib needs is absent, too old or broken."""


class ImageError(VitlibError):
    """An image, or a preprocessing config, that cannot become pixels."""


class NotFiniteError(ImageError):
    """An image for which the model's output is not finite."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message.

    Args:
        error: Any exception.

    Returns:
        The line; the name of the error's class where the message is empty.
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def count_noun(count: int, noun: str) -> str:
    """Return a number and its noun, "1 photo" or "2 photos".

    Args:
        count: The number.
        noun: The noun in the singular, one that takes s, es after s, or ies for y.
    """
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun[:-1] + 'ies' if noun.endswith('y') else noun + 'es'[noun[-1] != 's' :]}"


def is_number(value: object) -> bool:
    """Return True for a finite int or float; a bool is not one.

    Args:
        value: Anything.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    # An int may be too large for a float.
    return abs(value) < 1e300 and math.isfinite(value)


def check_int(name: str, value: object, *, at_least: int) -> int:
    """Check a whole number.

    Args:
        name: Name of the field, for the message.
        value: Anything; a bool is no number.
        at_least: The smallest number that is allowed.

    Returns:
        The number.

    Raises:
        ConfigError: The value is no whole number, or too small or too large.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ConfigError(f"{name}={value!r}: expected a whole number of at least {at_least}")
    # Far more than fits in memory; larger sizes overflow in torch.
    if value >= 2**31:
        raise ConfigError(f"{name}={value}: expected less than 2**31")
    return value


def to_pair(name: str, value: object) -> tuple[int, int]:
    """Return a size as (height, width).

    Args:
        name: Name of the field, for the message.
        value: An int for a square, or two.

    Returns:
        Height and width.

    Raises:
        ConfigError: The value is anything else, or a side is below 1.
    """
    sides = list(value) if isinstance(value, list | tuple) else [value, value]
    if len(sides) != 2:
        raise ConfigError(f"{name}={value!r}: expected one whole number or (height, width)")
    return check_int(name, sides[0], at_least=1), check_int(name, sides[1], at_least=1)


def resolve_block_indices(indices: int | Sequence[int] | None, count: int, name: str) -> set[int]:
    """Resolve a choice of blocks, as in timm, to their indices.

    Args:
        indices: None means all blocks, a number the last so many, a list their indices from 0,
            negative ones from the end.
        count: Number of blocks of the model.
        name: The argument's name, for the message.

    Returns:
        Indices in 0..count - 1.

    Raises:
        ConfigError: An index is out of range.
    """
    if indices is None:
        return set(range(count))
    if isinstance(indices, Integral) and not isinstance(indices, bool):
        last = int(indices)
        if not 1 <= last <= count:
            raise ConfigError(f"{name}={last}: expected 1 to {count}, the last so many blocks")
        return set(range(count - last, count))
    blocks = list(indices) if isinstance(indices, Iterable) else [indices]
    if isinstance(indices, str | bool) or not all(
        isinstance(i, Integral) and -count <= int(i) < count for i in blocks
    ):
        raise ConfigError(
            f"{name}={indices!r}: expected numbers of blocks, 0 to {count - 1}, or from the end, "
            f"-1 to {-count}"
        )
    return {int(i) % count for i in blocks}
