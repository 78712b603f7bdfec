"""The verb `vitlib convert`: write a checkpoint in another layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vitlib.cli.options import (
    LAYOUTS,
    SourceOptions,
    json_option,
    source_options,
    subject_option,
)
from vitlib.cli.predictors import logs_muted, mute_libraries
from vitlib.cli.printing import echo_json, print_table
from vitlib.cli.verb import Verb, positional_arguments

if TYPE_CHECKING:
    from vitlib.checkpoint.layouts.layout import LayoutName
    from vitlib.checks import Change, Conversion


@click.command(
    cls=Verb,
    examples=(
        "vitlib convert demo as_timm --layout timm",
        "vitlib convert mine as_torchvision --layout torchvision",
    ),
)
@positional_arguments("SRC", "DST", src="model", dst="out")
@subject_option
@click.option("--out", "-o", metavar="DST", help="DST as an option.")
@click.option("--layout", required=True, type=click.Choice(LAYOUTS), help="Layout to write.")
@click.option("--allow-drift", is_flag=True, help="Write it even if its logits differ.")
@source_options
@json_option
def convert(
    model: str,
    out: str,
    layout: LayoutName,
    allow_drift: bool,
    reading: SourceOptions,
    as_json: bool,
) -> None:
    """Write a checkpoint in another layout, and compare its logits.

    SRC is a hub id, a folder or a weights file; DST is the folder to write: new, empty, or with an
    earlier conversion. The written checkpoint is run with the numerics of the target's library.
    Where its logits differ by more than 1e-5, it is deleted and the exit status is 1, unless
    --allow-drift is given. A library that fixes the eps of its norms cannot hold another: up to
    1e-4 by this alone is written, with a line that says so. DST/conversion.json has the result.
    """
    from vitlib import checks

    mute_libraries()
    with logs_muted():
        conversion = checks.convert(
            model,
            out,
            layout=layout,
            source_layout=reading["layout"],
            allow_drift=allow_drift,
            **{name: value for name, value in reading.items() if name != "layout"},  # type: ignore[arg-type]
        )
    if as_json:
        echo_json(conversion.as_dict())
    else:
        print_table(_rows(conversion))


def _rows(conversion: Conversion) -> list[tuple[str, str]]:
    """List the conversion as (name, value)."""
    native = "{}x{}".format(*conversion.image_size)
    off = "{}x{}".format(*conversion.off_grid_size)
    source, target = conversion.source_profile, conversion.profile
    rows = [
        ("from", f"{conversion.source} ({conversion.source_layout}, run as {source})"),
        ("to", f"{conversion.folder} ({conversion.layout}, run as {target})"),
        ("files", ", ".join(conversion.files)),
        ("logits", f"{conversion.drift:.2g} apart at {native} (max |a - b| / max |b|)"),
        ("off the grid", f"{conversion.off_grid_drift:.2g} apart at {off}, not part of the check"),
    ]
    rows += [("cannot hold", _describe(change, off, conversion)) for change in conversion.changes]
    if conversion.not_written:
        rows.append(("not written", ", ".join(conversion.not_written)))
    rows += [("cannot hold", line) for line in conversion.preprocessing]
    if conversion.reads_as != conversion.layout:
        detected = conversion.reads_as or "two layouts"
        advice = f"load it with --source-layout {conversion.layout}"
        rows.append(("note", f"reads as {detected}: {advice}"))
    return rows


def _describe(change: Change, off: str, conversion: Conversion) -> str:
    """Describe a field that changes, and its effect on the logits."""
    source, target = _short(change.source_value), _short(change.target_value)
    effects = []
    if change.difference:
        effects.append(f"logits {change.difference:.2g} apart")
    if change.off_grid:
        effects.append(f"{change.off_grid:.2g} at {off}")
    effect = ", ".join(effects) or "same logits"
    if change.field == "norm_eps":
        fixed = f"{conversion.profile} cannot hold another"
        return f"norm_eps {source} becomes {target}: {effect}; {fixed}"
    return f"{change.field}: {source} becomes {target} ({effect})"


def _short(value: object) -> str:
    """Format a value of the config; a tuple by its length."""
    if isinstance(value, tuple):
        return f"{len(value)} {'entry' if len(value) == 1 else 'entries'}" if value else "none"
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
