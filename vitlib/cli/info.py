"""The verb `vitlib info`: describe a checkpoint."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from vitlib.cli.options import (
    SourceOptions,
    logs_muted,
    mute_libraries,
    source_options,
)
from vitlib.cli.printing import echo, echo_json, fail, print_table

if TYPE_CHECKING:
    from vitlib.checks import Info, Profiles
    from vitlib.config import ViTConfig
    from vitlib.fast.report import FastReport, OfModel, Served
    from vitlib.image.processor import ImageProcessor


@click.command()
@click.argument("model", metavar="MODEL")
@source_options
@click.option("--profiles", "as_profiles", is_flag=True, help="How each library would run it.")
@click.option("--fast", "as_fast", is_flag=True, help="What vitlib.optimize would run, and why.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def info(
    model: str,
    reading: SourceOptions,
    as_profiles: bool,
    as_fast: bool,
    as_json: bool,
) -> None:
    """Say what a checkpoint is and what would be loaded, without running it.

    MODEL is a hub id, a folder or a weights file. Exit status 1 where it would not load.

    With --profiles: the numerics and the preprocessing that each library has for its family; the
    column with a star is how the files themselves are read.

    With --fast: which operations serve each precision on this machine's CPU, and which parts of the
    model they serve.
    """
    from vitlib import checks

    mute_libraries()
    if as_profiles:
        if reading["profile"] is not None or as_fast:
            other = "--fast" if as_fast else "--profile"
            raise click.UsageError(f"--profiles shows every profile: leave {other} out")
        both = checks.profiles(
            model,
            **{name: value for name, value in reading.items() if name != "profile"},  # type: ignore[arg-type]
        )
        show(both, as_json)
        return
    if as_fast:
        show(what_runs(model, reading), as_json)
        return
    found = checks.info(model, **reading)
    show(found, as_json)
    if found.problems:
        fail(f"{model!r} would not load: {'; '.join(found.problems)}")
        sys.exit(1)


def show(found: Info | Profiles | FastReport, as_json: bool) -> None:
    """For programs or as a table."""
    from vitlib import checks

    if as_json:
        echo_json(found.as_dict())
    elif isinstance(found, checks.Profiles):
        columns(profile_rows(found))
    else:
        print_table(rows(found) if isinstance(found, checks.Info) else fast_rows(found))


def what_runs(model: str, reading: SourceOptions) -> FastReport:
    """The report of --fast; of the checkpoint no more is read than for the other tables."""
    from vitlib.checkpoint.layouts.facts import Facts
    from vitlib.errors import CheckpointError
    from vitlib.fast import report
    from vitlib.source.locate import Source
    from vitlib.weights import read

    src = Source(model, revision=reading["revision"], local_files_only=reading["local_files_only"])
    facts = Facts(**{n: reading[n] for n in Facts.__dataclass_fields__ if n in reading})  # type: ignore[literal-required]
    found = read(
        src,
        layout=reading["layout"],
        profile=reading["profile"],
        prefix=reading["prefix"],
        facts=facts,
    )
    if found.problems:
        raise CheckpointError(f"{model!r} would not load: {'; '.join(found.problems)}")
    with logs_muted():
        return report.what_runs(found.model)


def fast_rows(found: FastReport) -> list[tuple[str, str]]:
    """The table of --fast, as (what, value)."""
    machine, threads = found.machine, found.threads
    told = [
        ("cpu", f"{machine.model} ({machine.architecture}; {machine.features})"),
        ("torch", f"{found.torch}, {threads} thread{'s' * (threads > 1)}"),
        ("cuda", found.cuda),
    ]
    for one in found.precisions:
        told += serving(one)
    told += list(found.operations.items())
    return told if found.model is None else told + parts(found.model)


def serving(one: Served) -> list[tuple[str, str]]:
    """A precision's rows of the table."""
    if one.error:
        return [(one.precision, f"not here: {one.error}")]
    return [
        (one.precision, one.why),
        (f"{one.precision} linears", one.linears),
        (f"{one.precision} attention", f"{one.attention}, {one.attention_dtype}"),
    ]


def parts(of: OfModel) -> list[tuple[str, str]]:
    """The model's rows of the table."""
    fast = [f"{of.blocks} of {of.depth} blocks"]
    fast += ["the patch projection"] * of.patch_embed + ["the positions"] * of.positions
    fast += [f"{of.linears} single linears"] if of.linears else []
    return [("sped up", ", ".join(fast)), ("run as they are", ", ".join(of.as_they_are) or "none")]


def rows(found: Info) -> list[tuple[str, str]]:
    """The table, as (what, value)."""
    from vitlib.checkpoint.layouts.facts import PREPROCESSING_REMEDY
    from vitlib.checkpoint.layouts.table import summarise
    from vitlib.scores import task_of

    cfg, processor = found.config, found.image_processor
    labels = "; ".join(cfg.labels[:3]) + ("; …" if len(cfg.labels) > 3 else "")
    task = task_of(cfg) if cfg.num_classes else "features"
    preprocessing = found.image_processor_error if processor is None else processor.describe()
    if found.assumed_preprocessing:
        preprocessing += f" (assumed, for no file says it: {PREPROCESSING_REMEDY})"
    return [
        ("source", found.source),
        ("files", ", ".join(found.files)),
        ("layout", layout(found)),
        ("prefix", found.prefix or "none"),
        ("profile", found.profile),
        ("family", cfg.family),
        ("image", f"{by(cfg.image_size)} pixels, {cfg.in_channels} channels"),
        ("patch", f"{by(cfg.patch_size)} pixels, {by(cfg.grid_size)} patches"),
        ("tokens", tokens(cfg)),
        (
            "trunk",
            f"{cfg.depth} blocks, embed_dim {cfg.embed_dim}, {cfg.num_heads} heads, "
            f"mlp_dim {cfg.mlp_dim}",
        ),
        (
            "numerics",
            f"{cfg.activation}, norm_eps {cfg.norm_eps:g}, positions off the grid: "
            f"{off_the_grid(cfg)}",
        ),
        ("assumed", assumed(found)),
        ("pool", cfg.pool),
        ("classes", f"{cfg.num_classes}" + (f" ({labels})" if labels else "")),
        ("task", task),
        ("parameters", f"{found.parameters:,} in {', '.join(found.dtypes)}"),
        ("preprocessing", preprocessing),
        ("loads", f"{found.tensors} tensors"),
        ("calibration", found.calibration or "none"),
        ("not used", "; ".join(found.notes) or "nothing"),
        ("keeps unread", ", ".join(found.auxiliary) or "none"),
        ("ignores", summarise(found.ignored) or "none"),
    ]


def off_the_grid(cfg: ViTConfig) -> str:
    """What becomes of the positions there."""
    if cfg.rope_theta is not None:
        return f"rotary, nothing to resize (theta {cfg.rope_theta:g})"
    offsets = [] if cfg.relative_position is None else [f"offsets {cfg.relative_resize}"]
    return " and ".join([cfg.position_resize] * cfg.pos_embed + offsets)


def by(size: tuple[int, int]) -> str:
    """(height, width) -> "224x224"."""
    return f"{size[0]}x{size[1]}"


def tokens(cfg: ViTConfig) -> str:
    """How many, and which come first."""
    first = ["class"] * cfg.class_token + ["distillation"] * cfg.dist_token
    first += [f"{cfg.num_registers} registers"] if cfg.num_registers else []
    total = cfg.num_prefix_tokens + cfg.grid_size[0] * cfg.grid_size[1]
    return f"{total} ({', '.join([*first, 'patches'])})"


def layout(found: Info) -> str:
    """Its name; and where the names fit another too, which, and how to choose it."""
    others = " or ".join(found.also_fits)
    more = f" (the names fit {others} too: choose with --source-layout)" if others else ""
    return found.layout + more


def assumed(found: Info) -> str:
    """What nothing in the files says, and how to say it."""
    values = [f"{name} {value(getattr(found.config, name))}" for name in found.assumed]
    if not values:
        return "nothing"
    single = [name for name in ("num_heads", "activation", "pool") if name in found.assumed]
    options = ["--" + name.replace("_", "-") for name in single]
    options.append("vitlib.load(..., config=ViTConfig(...))")
    return f"{', '.join(values)} (no file says it; give it with {' or '.join(options)})"


def value(of: object) -> str:
    """A field of the config in a table: 1e-06, none."""
    if isinstance(of, float):
        return f"{of:g}"
    return "none" if of in ((), None) else str(of)


def profile_rows(both: Profiles) -> list[list[str]]:
    """The table of --profiles, a list of cells a row; the first names the libraries."""
    names = list(both.numbers)
    table = [["", *(f"{name} *" if name == both.own else name for name in names)]]
    fields = list(both.numbers[both.own])
    table += [[field, *(value(both.numbers[name][field]) for name in names)] for field in fields]
    rules = [rule(both.image_processors[name]) for name in names]
    table += [[what, *(one[what] for one in rules)] for what in rules[0]]
    return table


def rule(processor: ImageProcessor | None) -> dict[str, str]:
    """Preprocessing, a short cell for each of its steps."""
    cells = dict.fromkeys(("resize", "crop", "mean", "std"), "none")
    if processor is None:
        return dict.fromkeys(cells, "no file says it")
    for step in processor.describe().split("; "):
        if step.startswith("resize"):
            short = step.removeprefix("resize ").removeprefix("to ")
            cells["resize"] = short.replace("the shorter edge to", "short edge")
        elif step.startswith("crop"):
            cells["crop"] = step.removeprefix("crop ")
        elif step.startswith("minus"):
            mean, std = step.removeprefix("minus ").split(", over ")
            cells |= {"mean": mean, "std": std}
    return cells


def columns(table: list[list[str]]) -> None:
    """Rows of cells, each column as wide as its widest."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        echo("  ".join(cells).rstrip())
