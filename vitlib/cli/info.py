"""vitlib info"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from vitlib.cli.options import fail, hub_options, quiet

if TYPE_CHECKING:
    from vitlib.checks import Info
    from vitlib.config import ViTConfig


@click.command()
@click.argument("model", metavar="MODEL")
@hub_options
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def info(model: str, revision: str | None, local_files_only: bool, as_json: bool) -> None:
    """Say what a checkpoint is and what would be loaded, without running it.

    MODEL is a hub id, a folder or a weights file. Exit status 1 where it would not load.
    """
    from vitlib.checks import info as read_info

    quiet()
    found = read_info(model, revision=revision, local_files_only=local_files_only)
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=2, ensure_ascii=False))
    else:
        width = max(len(name) for name, _ in rows(found))
        for name, value in rows(found):
            click.echo(f"{name:<{width}}  {value}")
    for problem in found.problems:
        fail(f"{model!r} would not load: {problem}")
    if found.problems:
        sys.exit(1)


def rows(found: Info) -> list[tuple[str, str]]:
    """The table, as (what, value)."""
    cfg, processor = found.config, found.image_processor
    labels = "; ".join(cfg.labels[:3]) + ("; …" if len(cfg.labels) > 3 else "")
    task = cfg.problem_type or ("single_label_classification" if cfg.num_classes else "features")
    preprocessing = found.no_image_processor if processor is None else processor.describe()
    return [
        ("source", found.source),
        ("files", ", ".join(found.files)),
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
            f"{cfg.position_resize}",
        ),
        ("pool", cfg.pool),
        ("classes", f"{cfg.num_classes}" + (f" ({labels})" if labels else "")),
        ("task", task),
        ("parameters", f"{found.parameters:,} in {', '.join(found.dtypes)}"),
        ("preprocessing", preprocessing),
        ("loads", f"{found.tensors} tensors"),
        ("keeps unread", ", ".join(found.kept) or "none"),
        ("ignores", ", ".join(found.ignored) or "none"),
    ]


def by(size: tuple[int, int]) -> str:
    """(height, width) -> "224x224"."""
    return f"{size[0]}x{size[1]}"


def tokens(cfg: ViTConfig) -> str:
    """How many, and which come first."""
    first = ["class"] * cfg.class_token + ["distillation"] * cfg.dist_token
    first += [f"{cfg.num_registers} registers"] if cfg.num_registers else []
    total = cfg.num_prefix_tokens + cfg.grid_size[0] * cfg.grid_size[1]
    return f"{total} ({', '.join([*first, 'patches'])})"
