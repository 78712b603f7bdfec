"""Checkpoints of earth observation: a frame of Prithvi's as a ViT, and reasons against others.

Prithvi (2310.18660, 2412.02732) is MAE's ViT with patches of one frame, which a kernel of three
dimensions reads, and with fixed sine positions of frame, row and column. Of one frame, both are
exactly a plain ViT's: the kernel without its axis of time, and the positions of the first frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vitlib.checkpoint.layouts.facts import Facts
from vitlib.checkpoint.layouts.infer import square_side
from vitlib.checkpoint.layouts.layout import ParsedConfig
from vitlib.errors import CheckpointError, is_number

_KERNEL, _POS = "patch_embed.proj.weight", "patch_embed.pos_embed"
_MAX_FRAMES = 32  # published models have at most 4
_TOLERANCE = 1e-4  # of the stored positions, which are float32 or float16
# Scales of the sines of date and place, which Prithvi's code adds only where it is given both.
COORDINATES = ("temporal_embed_enc.", "location_embed_enc.")
_NO_COORDINATES = "read as the model is without a date and a place"
_SENTINEL = "B2 B3 B4 B8, B5 B6 B7 B8A and B11 B12 of Sentinel-2"
# Beginnings of names that only these models have, and why vitlib does not read the models.
_REASONS = {
    "patch_embed.weight_generator.": "DOFA makes its patch kernel for the wavelengths of each "
    "image, from 0.49 (blue, in micrometres) on, and its patches overlap a border of zeros",
    "patch_embedding.weight_generator.": "Clay makes its patch kernel for the wavelengths of each "
    "image, and adds date, place and ground resolution to its positions",
    "channel_embed": f"SatMAE with groups of bands ({_SENTINEL}) has a token of each group for "
    "each patch",
}


def explain_names(names: Iterable[str]) -> str:
    """Explain why vitlib does not read a model of earth observation.

    Args:
        names: Names of the file's tensors.

    Returns:
        The reason; empty if the names are not those of such a model.
    """
    ends = {name.removeprefix("model.").removeprefix("encoder.") for name in names}
    return next(
        (
            f"{reason}: vitlib does not read it; the nearest that it reads is Prithvi (one frame)"
            for start, reason in _REASONS.items()
            if any(name.startswith(start) for name in ends)
        ),
        "",
    )


def take_frame(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make a model of several frames that of its first frame.

    Args:
        state: Tensors by vitlib's names; changed in place.

    Returns:
        The same dict: a kernel (D, C, p, q), and positions of the class token and one frame.

    Raises:
        CheckpointError: The patches are of several frames, or the positions are not Prithvi's.
    """
    kernel, table = state[_KERNEL], state.get(_POS)
    if kernel.ndim != 5:
        return state
    if kernel.shape[2] != 1:
        raise CheckpointError(
            f"patches of {kernel.shape[2]} frames, as of a model of videos: expected patches of "
            "one image, or of one frame as Prithvi's"
        )
    if table is None or table.ndim != 3 or table.shape[2] != kernel.shape[0]:
        raise CheckpointError("patches of frames without positions: expected those of Prithvi")
    state[_KERNEL] = kernel.squeeze(2)
    state[_POS] = table[:, : 1 + _count_patches(table)]
    return state


def _count_patches(table: Tensor) -> int:
    """Return the number of patches a frame, by the positions of all frames (1, 1 + T h w, D).

    Raises CheckpointError if they are not the sines of any number of frames.
    """
    rows = table.shape[1] - 1
    for frames in range(1, _MAX_FRAMES + 1):
        side = square_side(rows // frames)
        if rows % frames == 0 and side and table.shape[2] % 16 == 0:
            expected = _make_positions(table.shape[2], frames, side)
            if torch.allclose(table[0, 1:].double(), expected, atol=_TOLERANCE, rtol=0):
                return side * side
    raise CheckpointError(
        f"{rows} positions of frames that are not the fixed sines of Prithvi on a square grid: "
        "vitlib cannot tell one frame from the others"
    )


def _make_positions(width: int, frames: int, side: int) -> Tensor:
    """Return the sines of column, row and frame, (T h w, D) in float64.

    Of the width, 6 sixteenths are of the column, 6 of the row and 4 of the frame.
    """
    column, row = (_make_sines(width // 16 * 6, side) for _ in range(2))
    frame = _make_sines(width // 16 * 4, frames)
    shape = (frames, side, side)
    parts = [
        column.expand(*shape, -1),
        row[:, None].expand(*shape, -1),
        frame[:, None, None].expand(*shape, -1),
    ]
    return torch.cat(parts, dim=-1).flatten(0, 2)


def _make_sines(width: int, count: int) -> Tensor:
    """Return sines and cosines of the numbers 0 .. count - 1, (count, width) in float64."""
    steps = torch.arange(width // 2, dtype=torch.float64) / (width / 2)
    angles = torch.arange(count, dtype=torch.float64)[:, None] / 10000**steps
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def check_position_width(state: Mapping[str, Tensor]) -> None:
    """Refuse positions that are narrower than the model.

    Args:
        state: Tensors by vitlib's names.

    Raises:
        CheckpointError: The rest of the width is of something that no tensor holds.
    """
    kernel, table = state.get(_KERNEL), state.get(_POS)
    if kernel is None or table is None or table.ndim != 3 or table.shape[2] >= kernel.shape[0]:
        return
    raise CheckpointError(
        f"positions of width {table.shape[2]} in a model of width {kernel.shape[0]}: SatMAE for "
        "series of images fills the rest with the dates of each image, which vitlib does not read"
    )


def fit_config(
    parsed: ParsedConfig, config: Mapping[str, Any], facts: Facts, ignored: Iterable[str]
) -> ParsedConfig:
    """Give a model of one frame the facts of Prithvi's code.

    Args:
        parsed: The model by its tensors.
        config: The content of config.json; empty if there is none.
        facts: What the caller states.
        ignored: Names of tensors that vitlib does not read.

    Returns:
        The model, with the pool as an assumption: Prithvi's code pools nothing.

    Raises:
        CheckpointError: config.json has a number of heads that no such model can have.
    """
    rule = config.get("pretrained_cfg")
    heads = rule.get("num_heads") if isinstance(rule, dict) else None
    cfg = parsed.config
    if heads is not None:
        if not is_number(heads) or heads < 1 or cfg.embed_dim % heads:
            raise CheckpointError(
                f"config.json has num_heads {heads!r}: expected a divisor of {cfg.embed_dim}"
            )
        cfg = replace(cfg, num_heads=int(heads))
    positions = replace(cfg.positions, resize="bicubic_corners")
    cfg = replace(cfg, family="vit", norm_eps=1e-5, activation="gelu", positions=positions)
    settled = ("num_heads",) if heads is not None else ()
    assumed = tuple(dict.fromkeys((*parsed.assumed, "pool")))
    doubtful = (*parsed.doubtful, *(() if facts.pool else ("pool",)))
    return ParsedConfig(
        cfg,
        tuple(name for name in assumed if name not in settled),
        tuple(name for name in doubtful if name not in settled),
        parsed.notes + (_NO_COORDINATES,) * any(n.startswith(COORDINATES) for n in ignored),
    )
