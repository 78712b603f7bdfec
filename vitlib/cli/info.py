"""The verb `vitlib info`: describe a checkpoint."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from vitlib.cli.exported import is_exported, list_file_rows
from vitlib.cli.options import SourceOptions, json_option, source_options, subject_option
from vitlib.cli.predictors import logs_muted, mute_libraries
from vitlib.cli.printing import echo_json, fail, print_columns, print_table
from vitlib.cli.verb import Verb, positional_arguments
from vitlib.errors import count_noun

if TYPE_CHECKING:
    from vitlib.checks import Info, Profiles
    from vitlib.config import ViTConfig
    from vitlib.fast.report import FastReport, ModelCoverage, PrecisionSupport
    from vitlib.image.processor import ImageProcessor


@click.command(cls=Verb, examples=("vitlib info demo", "vitlib info mine --fast"))
@positional_arguments("MODEL")
@subject_option
@source_options
@click.option(
    "--profiles", "show_profiles", is_flag=True, help="Show how each library would run it."
)
@click.option("--fast", "show_fast", is_flag=True, help="Show the operations of vitlib.optimize.")
@json_option
def info(
    model: str,
    reading: SourceOptions,
    show_profiles: bool,
    show_fast: bool,
    as_json: bool,
) -> None:
    """Describe a checkpoint and its preprocessing, without running it.

    MODEL is a hub id, a folder or a weights file. Exit status 1 where it cannot be loaded. Of an
    exported file (.onnx, .pt2, .xml), its own statements are shown.

    With --profiles: the numerics and the preprocessing of each library for the model's family. A
    star marks the column that the files follow.

    With --fast: the operations of each precision on this machine's CPU, and the parts of the model
    that they compute.
    """
    from vitlib import checks

    mute_libraries()
    if is_exported(model):
        if show_profiles or show_fast:
            raise click.UsageError("--profiles and --fast are for checkpoints: leave them out")
        file = checks.describe_file(model)
        if as_json:
            echo_json(file.as_dict())
        else:
            print_table(list_file_rows(file))
        return
    if show_profiles:
        if reading["profile"] is not None or show_fast:
            other = "--fast" if show_fast else "--profile"
            raise click.UsageError(f"--profiles shows every profile: leave {other} out")
        profiles = checks.profiles(
            model,
            **{name: value for name, value in reading.items() if name != "profile"},  # type: ignore[arg-type]
        )
        if as_json:
            echo_json(profiles.as_dict())
        else:
            print_columns(_profile_rows(profiles))
        return
    if show_fast:
        report = _report_fast(model, reading)
        if as_json:
            echo_json(report.as_dict())
        else:
            print_table(_fast_rows(report))
        return
    result = checks.info(model, **reading)
    if as_json:
        echo_json(result.as_dict())
    else:
        print_table(_rows(result))
    if result.problems:
        fail(f"{model!r} would not load: {'; '.join(result.problems)}")
        sys.exit(1)


def _report_fast(model: str, reading: SourceOptions) -> FastReport:
    """Report the operations of optimize, without reading the weights."""
    from vitlib.checkpoint.layouts.facts import Facts
    from vitlib.checkpoint.read import read_checkpoint
    from vitlib.errors import CheckpointError
    from vitlib.fast import report
    from vitlib.source.locate import Source

    src = Source(model, revision=reading["revision"], local_files_only=reading["local_files_only"])
    facts = Facts(**{n: reading[n] for n in Facts.__dataclass_fields__ if n in reading})  # type: ignore[literal-required]
    result = read_checkpoint(
        src,
        layout=reading["layout"],
        profile=reading["profile"],
        prefix=reading["prefix"],
        facts=facts,
    )
    if result.problems:
        raise CheckpointError(f"{model!r} would not load: {'; '.join(result.problems)}")
    with logs_muted():
        return report.fast_report(result.model)


def _fast_rows(report: FastReport) -> list[tuple[str, str]]:
    """List machine, operations and parts of the model as (name, value)."""
    machine, threads = report.machine, report.threads
    rows = [
        ("cpu", f"{machine.model} ({machine.architecture}; {machine.features})"),
        ("torch", f"{report.torch}, {count_noun(threads, 'thread')}"),
        ("cuda", report.cuda),
    ]
    for precision in report.precisions:
        rows += _precision_rows(precision)
    rows += list(report.operations.items())
    return rows if report.model is None else rows + _part_rows(report.model)


def _precision_rows(served: PrecisionSupport) -> list[tuple[str, str]]:
    """List the operations of one precision."""
    name = served.precision
    if served.error:
        return [(name, f"not available: {served.error}")]
    return [
        (name, served.reason),
        (f"{name} linears", served.linears),
        (f"{name} attention", f"{served.attention}, {served.attention_dtype}"),
    ]


def _part_rows(model: ModelCoverage) -> list[tuple[str, str]]:
    """List the parts of the model that optimize replaces, and those that stay."""
    fast = [f"{model.blocks} of {model.depth} blocks"]
    fast += ["the patch projection"] * model.patch_embed + ["the positions"] * model.positions
    fast += [f"{model.linears} single linears"] if model.linears else []
    unchanged = ", ".join(model.unoptimized_modules) or "none"
    return [("optimized", ", ".join(fast)), ("not optimized", unchanged)]


def _rows(result: Info) -> list[tuple[str, str]]:
    """List the facts of a checkpoint as (name, value)."""
    from vitlib.checkpoint.layouts.facts import PREPROCESSING_REMEDY
    from vitlib.checkpoint.layouts.table import summarise
    from vitlib.scores import task_of

    cfg, processor = result.config, result.image_processor
    labels = "; ".join(cfg.labels[:3]) + ("; …" if len(cfg.labels) > 3 else "")
    task = task_of(cfg) if cfg.num_classes else "features"
    preprocessing = result.image_processor_error if processor is None else processor.describe()
    if result.assumed_preprocessing:
        preprocessing += f" (assumed, because no file states it. {PREPROCESSING_REMEDY})"
    return [
        ("source", result.source),
        ("files", ", ".join(result.files)),
        ("layout", _layout(result)),
        ("prefix", result.prefix or "none"),
        ("profile", result.profile),
        ("family", cfg.family),
        ("image", f"{_format_size(cfg.image_size)} pixels, {cfg.in_channels} channels"),
        ("patch", f"{_format_size(cfg.patch_size)} pixels, {_format_size(cfg.grid_size)} patches"),
        ("tokens", _tokens(cfg)),
        (
            "trunk",
            f"{count_noun(cfg.depth, 'block')}, embed_dim {cfg.embed_dim}, "
            f"{count_noun(cfg.num_heads, 'head')}, "
            f"mlp_dim {cfg.mlp_dim}",
        ),
        (
            "numerics",
            f"{cfg.activation}, norm_eps {cfg.norm_eps:g}{_norms(cfg)}, positions off the grid: "
            f"{_position_resize(cfg)}",
        ),
        ("assumed", _assumptions(result)),
        ("pool", cfg.pool),
        ("classes", f"{cfg.num_classes}" + (f" ({labels})" if labels else "")),
        ("task", task),
        ("parameters", f"{result.parameters:,} in {', '.join(result.dtypes)}"),
        ("preprocessing", preprocessing),
        ("loads", count_noun(result.tensors, "tensor")),
        ("calibration", result.calibration or "none"),
        ("not used", "; ".join(result.notes) or "nothing"),
        ("stored unused", ", ".join(result.auxiliary) or "none"),
        ("ignores", summarise(result.ignored) or "none"),
    ]


def _norms(cfg: ViTConfig) -> str:
    """List the norms that few families have, after a comma."""
    norms = [name for name in ("patch", "attn", "mlp", "post") if getattr(cfg.norms, name)]
    norms += [f"qk {cfg.norms.qk}"] if cfg.norms.qk else []
    kind = ", RMSNorm" if cfg.norms.kind == "rms" else ""
    return kind + (f", norms {', '.join(norms)}" if norms else "")


def _position_resize(cfg: ViTConfig) -> str:
    """Name the resize rule of position embeddings at other image sizes."""
    others = [] if cfg.positions.relative is None else [f"offsets {cfg.positions.relative_resize}"]
    if cfg.rope is not None:
        kind = "learned frequencies" if cfg.rope.learned else f"theta {cfg.rope.theta:g}"
        others = [f"rotary, nothing to resize ({kind})"]
    return " and ".join([cfg.positions.resize] * cfg.positions.embed + others)


def _format_size(size: tuple[int, int]) -> str:
    """Format (height, width) as "224x224"."""
    return f"{size[0]}x{size[1]}"


def _tokens(cfg: ViTConfig) -> str:
    """Count the tokens, and name the prefix tokens."""
    first = ["class"] * cfg.tokens.cls + ["distillation"] * cfg.tokens.dist
    first += [f"{cfg.tokens.registers} registers"] if cfg.tokens.registers else []
    total = cfg.num_prefix_tokens + cfg.grid_size[0] * cfg.grid_size[1]
    return f"{total} ({', '.join([*first, 'patches'])})"


def _layout(result: Info) -> str:
    """Name the layout, and others that the tensors' names fit."""
    others = " or ".join(result.also_fits)
    more = f" (the names fit {others} too: choose with --source-layout)" if others else ""
    return result.layout + more


def _assumptions(result: Info) -> str:
    """Name the fields that no file states, and the options that state them."""
    values = [f"{name} {_format_value(getattr(result.config, name))}" for name in result.assumed]
    if not values:
        return "nothing"
    single = [name for name in ("num_heads", "activation", "pool") if name in result.assumed]
    options = ["--" + name.replace("_", "-") for name in single]
    options.append("vitlib.load(..., config=ViTConfig(...))")
    return f"{', '.join(values)} (no file says it; give it with {' or '.join(options)})"


def _format_value(value: object) -> str:
    """Format a field of the config."""
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value in ((), None) else str(value)


def _profile_rows(profiles: Profiles) -> list[list[str]]:
    """List numerics and preprocessing by library; the first row names the libraries."""
    names = list(profiles.numbers)
    rows = [["", *(f"{name} *" if name == profiles.own else name for name in names)]]
    for field in profiles.numbers[profiles.own]:
        rows.append([field, *(_format_value(profiles.numbers[name][field]) for name in names)])
    steps = [_preprocessing_cells(profiles.image_processors[name]) for name in names]
    return rows + [[step, *(cells[step] for cells in steps)] for step in steps[0]]


def _preprocessing_cells(processor: ImageProcessor | None) -> dict[str, str]:
    """Describe each step of preprocessing in a short cell."""
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
