"""vitlib convert"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vitlib.cli.options import LAYOUTS, SourceOptions, quiet, source_options, table, unlogged
from vitlib.cli.printing import echo_json

if TYPE_CHECKING:
    from vitlib.checks import Change, Conversion


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("folder", metavar="DST")
@click.option("--layout", required=True, type=click.Choice(LAYOUTS), help="What to write.")
@click.option("--allow-drift", is_flag=True, help="Write it though its logits differ.")
@source_options
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def convert(
    source: str,
    folder: str,
    layout: str,
    allow_drift: bool,
    reading: SourceOptions,
    as_json: bool,
) -> None:
    """Write a checkpoint in another layout, and prove it.

    SRC is a hub id, a folder or a weights file; DST the folder to write. What was written is run as
    the target's library would: where its logits are more than 1e-5 off, nothing is kept and the
    exit status is 1, unless --allow-drift.
    """
    from vitlib import checks

    quiet()
    with unlogged():
        done = checks.convert(
            source,
            folder,
            layout=layout,
            source_layout=reading["layout"],
            allow_drift=allow_drift,
            **{name: value for name, value in reading.items() if name != "layout"},  # type: ignore[arg-type]
        )
    if as_json:
        echo_json(done.as_dict())
    else:
        table(rows(done))


def rows(done: Conversion) -> list[tuple[str, str]]:
    """The table, as (what, value)."""
    native, off = ("{}x{}".format(*size) for size in (done.image_size, done.off_grid_size))
    found = [
        ("from", f"{done.source} ({done.source_layout}, run as {done.source_profile})"),
        ("to", f"{done.folder} ({done.layout}, run as {done.profile})"),
        ("files", ", ".join(done.files)),
        ("logits", f"{done.drift:.2g} apart at {native} (max |a - b| / max |b|)"),
        ("off the grid", f"{done.off_grid_drift:.2g} apart at {off}, which does not count"),
    ]
    found += [("cannot hold", change_told(change, off)) for change in done.changes]
    found += [("not written", ", ".join(done.not_written))] if done.not_written else []
    found += [("cannot hold", line) for line in done.preprocessing]
    if done.reads_as != done.layout:
        seems = done.reads_as or "two layouts"
        found.append(("note", f"reads as {seems}: load it with --source-layout {done.layout}"))
    return found


def change_told(change: Change, off: str) -> str:
    """A field, its two values, and what it does to the logits."""
    told = f"{change.field}: {short(change.source_value)} becomes {short(change.target_value)}"
    effects = []
    if change.difference:
        effects.append(f"logits {change.difference:.2g} apart")
    if change.off_grid:
        effects.append(f"{change.off_grid:.2g} at {off}")
    return f"{told} ({', '.join(effects) or 'logits the same'})"


def short(value: object) -> str:
    """A value of the config; of many labels, how many."""
    if isinstance(value, tuple):
        return f"{len(value)} {'entry' if len(value) == 1 else 'entries'}" if value else "none"
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
