"""The verb `vitlib list`: the architectures that vitlib knows by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vitlib.cli.options import json_option
from vitlib.cli.printing import echo, echo_json, print_columns
from vitlib.cli.verb import Verb
from vitlib.errors import count_noun

if TYPE_CHECKING:
    from vitlib.checkpoint.architectures import ListedArchitecture

HEAD = ["name", "library", "family", "size", "status"]


@click.command(
    "list", cls=Verb, examples=("vitlib list siglip", "vitlib list 'vit_*dinov?' --json")
)
@click.argument("pattern", required=False)
@json_option
def list_verb(pattern: str | None, as_json: bool) -> None:
    """List the architectures that vitlib loads, and those that it refuses.

    PATTERN is a part of a name, or in quotes a pattern of the whole name with *, ? and [...]; small
    and capital letters are the same. Exit status 1 where no name matches.

    The names are those of timm's architectures, of transformers' model types and published models,
    and of open_clip's configs. ViTConfig.named takes those of timm and open_clip.
    """
    from vitlib.checkpoint.architectures import list_architectures

    entries = list_architectures(pattern)
    if as_json:
        echo_json([entry.as_dict() for entry in entries])
        return
    print_columns([HEAD, *(_cells(entry) for entry in entries)])
    num_loads = sum(entry.loads for entry in entries)
    echo(f"{count_noun(len(entries), 'architecture')}, of which {num_loads} load", err=True)


def _cells(entry: ListedArchitecture) -> list[str]:
    """Return the cells of an architecture's row, a dash for what no table says."""
    texts = (entry.name, entry.library, entry.family, entry.size, entry.status)
    return [text or "-" for text in texts]
