"""--levels: what is black and white in pictures deeper than 8 bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


class LevelsType(click.ParamType):  # type: ignore[type-arg]
    """A number, the value of white, or two, a window."""

    name = "levels"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float | tuple[float, float]:
        """4095 or -160,240 as numbers."""
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
    """For verbs that read pictures."""
    return click.option(
        "--levels",
        type=LevelsType(),
        metavar="WHITE|BLACK,WHITE",
        help="Of pictures deeper than 8 bits and of floats: the value of white (4095 for 12 bits), "
        "or a window (-160,240). Default: what the file says, else its dtype's range; of floats 1.",
    )(command)


def _number(text: str) -> float:
    number = float(text)
    return int(number) if number.is_integer() else number
