"""The option --levels: black and white of images deeper than 8 bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


class LevelsType(click.ParamType):  # type: ignore[type-arg]
    """The value of white, or the values of black and white."""

    name = "levels"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float | tuple[float, float]:
        """Convert text such as 4095 or -160,240.

        Args:
            value: text of the command line.
            param: the option.
            ctx: context of the command.

        Returns:
            The value of white, or (black, white).
        """
        try:
            numbers = [_number(text) for text in str(value).replace(":", ",").split(",")]
        except ValueError:
            numbers = []
        if len(numbers) == 1 and 0 < numbers[0] < math.inf:
            return numbers[0]
        if len(numbers) == 2 and -math.inf < numbers[0] < numbers[1] < math.inf:
            return numbers[0], numbers[1]
        self.fail(
            f"{value}: expected the value of white, such as 4095, or a window BLACK,WHITE, such as "
            "-160,240",
            param,
            ctx,
        )


def levels_option(command: F) -> F:
    """Add --levels, for a verb that reads images.

    Args:
        command: function of the verb.

    Returns:
        The command with the option.
    """
    return click.option(
        "--levels",
        type=LevelsType(),
        metavar="WHITE|BLACK,WHITE",
        help="Value of white in images deeper than 8 bits and in floats (4095 for 12 bits), or a "
        "window (-160,240). Default: from the file, else the range of its dtype; 1 for floats.",
    )(command)


def _number(text: str) -> float:
    """Parse a number, as an int where it is whole."""
    number = float(text)
    return int(number) if number.is_integer() else number
