"""Types of values that options of several verbs take."""

from __future__ import annotations

from typing import Any, Literal

import click
from click.shell_completion import CompletionItem

Size = tuple[int, int] | Literal["keep"]


class ImageSize(click.ParamType):  # type: ignore[type-arg]
    """Size of pixels: one side, height and width, or each photo's own shape."""

    name = "N|HxW|keep"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Size:
        """Convert text such as 384, 384x256 or keep.

        Args:
            value: text of the command line.
            param: the option.
            ctx: context of the command.

        Returns:
            (height, width), or "keep".
        """
        if value == "keep":
            return "keep"
        sides = str(value).lower().split("x")
        if len(sides) > 2 or not all(side.isdecimal() and 0 < int(side) < 2**31 for side in sides):
            self.fail(f"{value}: expected N, HxW or keep", param, ctx)
        return int(sides[0]), int(sides[-1])


class CountOrAll(click.ParamType):  # type: ignore[type-arg]
    """A number from 1, or all."""

    name = "N|all"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | Literal["all"]:
        """Convert text such as 3 or all.

        Args:
            value: text of the command line.
            param: the option.
            ctx: context of the command.

        Returns:
            The number, or "all".
        """
        if value == "all":
            return "all"
        text = str(value)
        if not (text.isdecimal() and 0 < int(text) < 2**31):
            self.fail(f"{value}: expected a number from 1, or all", param, ctx)
        return int(text)


class PathOrName(click.types.StringParamType):
    """Text that may be a path: shells complete it as a file or folder."""

    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002
        param: click.Parameter,  # noqa: ARG002
        incomplete: str,
    ) -> list[CompletionItem]:
        """Return what lets the shell complete names of files and folders.

        Args:
            ctx: context of the command.
            param: the argument or option.
            incomplete: text that was typed.

        Returns:
            One item, which stands for the shell's own completion.
        """
        return [CompletionItem(incomplete, type="file")]
