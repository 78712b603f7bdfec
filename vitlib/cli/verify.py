"""vitlib verify"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from vitlib.cli.options import SourceOptions, quiet, source_options, table, unlogged
from vitlib.cli.printing import echo_json

if TYPE_CHECKING:
    from vitlib.checks import Verdict


@click.command()
@click.argument("model", metavar="MODEL")
@click.option(
    "--against",
    metavar="transformers|timm|FILE",
    help="The library, where it is installed, or another checkpoint.",
)
@source_options
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def verify(
    model: str,
    against: str | None,
    reading: SourceOptions,
    as_json: bool,
) -> None:
    """Run a checkpoint beside a reference, or look it over.

    With --against both get the same pixels, and what they give is compared after the embedding,
    after each block and at the end. Alone, its tensors are looked over for layers that no training
    leaves so, and what no file says and no tensor shows is listed. Exit status 1 where the two
    part, or something is suspicious.
    """
    from vitlib import checks

    quiet()
    with unlogged():
        found = checks.verify(
            model,
            against=against,
            **reading,
        )
    if as_json:
        echo_json(found.as_dict())
    else:
        table(rows(found))
    if not found.ok:
        sys.exit(1)


def rows(found: Verdict) -> list[tuple[str, str]]:
    """The table, as (what, value)."""
    if found.against is None:
        told = [(finding.what, finding.tensors) for finding in found.findings]
        told += [("unverified", ", ".join(found.unverified))] if found.unverified else []
        return [*told, ("verdict", found.verdict)]
    told = [("after", "max |a - b| / max |b|")]
    for name, error in found.errors:
        mark = "  <- first difference" if name == found.diverges_at else ""
        told.append((name, f"{error:.2g}{mark}"))
    told += [("not compared", ", ".join(found.not_compared))] if found.not_compared else []
    told.append(("diverges at", found.diverges_at or f"none (all within {found.tolerance:.2g})"))
    return [*told, ("verdict", found.verdict)]
