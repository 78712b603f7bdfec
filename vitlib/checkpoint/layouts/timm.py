"""The layout of timm: its names, most of which the original code shares, and its config.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from vitlib.checkpoint.layouts.computed import check_computed_tensors
from vitlib.checkpoint.layouts.equivalences import (
    expand_key_heads,
    fill_layer_scale,
    fold_register_positions,
    join_rotary_pairs,
)
from vitlib.checkpoint.layouts.facts import Facts
from vitlib.checkpoint.layouts.infer import Shape
from vitlib.checkpoint.layouts.layout import Json, Layout, ParsedConfig, Serialized, sidecar_size
from vitlib.checkpoint.layouts.table import NameMatch, match_names, rename
from vitlib.checkpoint.layouts.timm_config import infer_spelling, read_tower
from vitlib.checkpoint.layouts.timm_models import is_naflex_name, normalize_name
from vitlib.checkpoint.layouts.timm_names import FACTORIZED, NAFLEX, PREFIXES, READ
from vitlib.checkpoint.layouts.timm_sizes import get_position_size
from vitlib.config import ViTConfig
from vitlib.errors import ConfigError

_IGNORED = ("*relative_position_index", "*attn.k_bias", "criterion.")


def _find(names: Iterable[str]) -> NameMatch:
    """Match names of timm, older ones too."""
    tables = (*READ, NAFLEX, FACTORIZED)
    return match_names(names, tables, prefixes=PREFIXES, ignored=_IGNORED)


def _read(
    json: Json, shapes: Mapping[str, Shape], name_match: NameMatch, facts: Facts
) -> ParsedConfig:
    """Parse config.json if there is one, and infer the rest from the shapes."""
    config = json("config.json") or {}
    name = config.get("architecture")
    stated = facts.architecture
    if (
        isinstance(name, str)
        and stated is not None
        and normalize_name(name) != normalize_name(stated)
    ):
        raise ConfigError(
            f"architecture={stated!r}: expected {name!r} as in config.json: leave it out, or give "
            "config=ViTConfig(...)"
        )
    stated_config = config if isinstance(name, str) else {}
    size = _read_image_size(json)
    if _is_naflex(name_match, facts.published or name or stated):
        from vitlib.checkpoint.layouts.timm_naflex import read_naflex  # few checkpoints need it

        return read_naflex(stated_config, shapes, name_match, facts, size)
    return read_tower(stated_config, shapes, name_match, "timm", facts, size)


def _is_naflex(name_match: NameMatch, architecture: object) -> bool:
    """Return True for the names of a NaFlexVit, or of its architecture."""
    if "naflex" in infer_spelling(name_match)["spelling"]:
        return True
    return isinstance(architecture, str) and is_naflex_name(architecture)


def _prepare(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, or raise CheckpointError if one differs from what vitlib computes.

    The positions of NaFlexVit's rows and columns become their sum.
    """
    check_computed_tensors(tensors)
    if not any(name.endswith("embeds.pos_embed_y") for name in tensors):
        return dict(tensors)
    from vitlib.checkpoint.layouts.timm_naflex import sum_positions  # few checkpoints need it

    return sum_positions(tensors)


def _read_image_size(json: Json) -> tuple[int, int] | None:
    """Return pixels (height, width) of the positions from the JSON files, or None."""
    config = json("config.json") or {}
    size = get_position_size(config) if isinstance(config.get("architecture"), str) else None
    return sidecar_size(json) or size


def absorb(cfg: ViTConfig, state: dict[str, Tensor], _: Json) -> dict[str, Tensor]:
    """Rewrite tensors of timm's classes exactly as vitlib's, whose forward has one form of each.

    Args:
        cfg: The model's config.
        state: Its tensors by vitlib's names; changed in place.
        _: The checkpoint's JSON files by name, which do not matter.

    Returns:
        The same dict: heads that share keys and values have copies, pairs of channels that turn
        together are halves of a head, a branch without LayerScale has a gamma of ones, and a linear
        projection of patches is a convolution.
    """
    kernel = state.get("patch_embed.proj.weight")
    if writes_naflex(cfg) or (kernel is not None and kernel.ndim == 2):
        from vitlib.checkpoint.layouts.timm_naflex import absorb_naflex  # few checkpoints need it

        absorb_naflex(cfg, state)
    expand_key_heads(cfg, state)
    fill_layer_scale(cfg, state)
    if cfg.rope is not None and cfg.rope.coords == "index":
        join_rotary_pairs(cfg, state)
    return state


def _write(cfg: ViTConfig, state: dict[str, Tensor]) -> Serialized:
    """Write model.safetensors and config.json, for timm.create_model("local-dir:...")."""
    if writes_naflex(cfg):
        from vitlib.checkpoint.layouts.timm_naflex_write import write_naflex

        return write_naflex(cfg, state)
    from vitlib.checkpoint.layouts.timm_write import write

    return write(cfg, state)


def _file_name(name: str, cfg: ViTConfig) -> str:
    """Return a tensor's name in a file of this model; its own where files have none."""
    from vitlib.checkpoint.layouts.timm_write import build_table

    table = {**build_table(cfg), **(NAFLEX if writes_naflex(cfg) else {})}
    return rename(name, table)


def writes_naflex(cfg: ViTConfig) -> bool:
    """Return True for a model that is written as timm's NaFlexVit.

    Args:
        cfg: The model's config. SigLIP 2 NaFlex of transformers is one by its rule of positions.
    """
    is_siglip2 = cfg.family == "siglip" and cfg.positions.resize == "bilinear_antialias"
    return cfg.family == "naflexvit" or (is_siglip2 and cfg.positions.embed)


LAYOUT = Layout(
    name="timm",
    profile="timm",
    find=_find,
    read=_read,
    write=_write,
    file_name=_file_name,
    prepare=_prepare,
    read_image_size=_read_image_size,
    finish=fold_register_positions,
    absorb=absorb,
)
