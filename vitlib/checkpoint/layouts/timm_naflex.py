"""Read timm's NaFlexVit: a plain ViT whose embedding has names, axes and arguments of its own.

Its linear projection of patches is a convolution, its positions are a grid, and the rule that
resizes them is an argument. Positions of rows and of columns are read as their sum: interpolation
is linear, so that of the sum is the sum of both. vitlib computes what timm's class computes from
images (B, C, H, W), not its batches of patches of several grids.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vitlib.checkpoint.layouts.facts import Facts, resolve_facts
from vitlib.checkpoint.layouts.infer import Shape, compact_size, infer_config
from vitlib.checkpoint.layouts.layout import ParsedConfig
from vitlib.checkpoint.layouts.table import LINEAR_PATCHES, NameMatch
from vitlib.checkpoint.layouts.timm_config import (
    build_signature,
    infer_final_norm,
    infer_spelling,
    read_tower,
)
from vitlib.checkpoint.layouts.timm_models import Architecture, get_architecture, list_candidates
from vitlib.checkpoint.layouts.timm_sizes import get_object
from vitlib.config import ViTConfig
from vitlib.config_parts import PositionResize
from vitlib.errors import CheckpointError, to_pair
from vitlib.patch_embed import POSITION_RESIZE, ResizeRule

_PATCH, _POS = "patch_embed.proj.weight", "patch_embed.pos_embed"
_QKV = re.compile(r"(blocks\.\d+\.attn\.[qkv])\.weight$")
# Rules of tensors that no published model has.
_USUAL_RULE: PositionResize = "bicubic_antialias"
_USUAL_FACTORIZED: PositionResize = "bilinear_square"
# Arguments of the rule -> the field of ResizeRule.
_RULE = {
    "pos_embed_interp_mode": "mode",
    "pos_embed_antialias": "antialias",
    "pos_embed_align_corners": "align_corners",
    "pos_embed_ar_preserving": "square",
}
_ROTARY = ("temperature", "ref_feat_shape", "grid_offset", "grid_indexing", "rotate_half")
# Arguments for batches of several grids, for kernels and blocks that these models do not have, and
# those that timm's class does not read.
_HARMLESS = {
    *("pos_embed_use_grid_sample", "use_key_only_attn_mask", "enable_patch_interpolator"),
    *("embed_proj_type", "img_size", "qkv_fused", "swiglu_align_to", "input_norm_layer"),
    *(f"rope_{name}" for name in (*_ROTARY, "shift_coords", "jitter_coords", "rescale_coords")),
}
# Arguments for which vitlib computes these values only.
_SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "rope_type": ("", "none", None),
    "patchify_channels_last": (True,),
    "attn_type": ("standard",),
    "attn_gated": (False,),
    "attn_only_layer_scale": (False,),
    "num_kv_heads": (None,),
    "swiglu_mlp": (False,),
}
_POSITIONS = ("learned", "factorized", "none", "", None)


def read_naflex(
    config: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    name_match: NameMatch,
    facts: Facts,
    image_size: tuple[int, int] | None,
) -> ParsedConfig:
    """Return the config of a NaFlexVit.

    Args:
        config: architecture, model_args, pretrained_cfg and labels; empty for a bare file.
        shapes: Shapes by vitlib's names.
        name_match: The names of the file for each of vitlib's names.
        facts: Facts that the caller states.
        image_size: Pixels (height, width) of the photos; None if no file gives them.

    Returns:
        The config, and the fields that no file gives.

    Raises:
        CheckpointError: The architecture or an argument is unknown or not computed, the tensors are
            another model's, or no file tells which of several models it is.
    """
    name = facts.published or config.get("architecture") or facts.architecture
    model = None if name is None else get_architecture(str(name))
    if model is not None and model.position_resize is None:
        raise CheckpointError(
            f"{model.name!r} is no NaFlexVit, and the tensors (embeds.proj) are those of one: "
            "state the architecture of these weights, such as 'naflexvit_base_patch16_gap', in "
            "config.json or with architecture= (--architecture)"
        )
    args = dict(get_object(config, "model_args"))
    patch = args.get("patch_size") or (None if model is None else model.structure["patch_size"])
    shapes = add_kernel_shape(shapes, patch)
    size = _infer_image_size(shapes, name_match, args) or image_size
    if model is None:
        return _read_bare(shapes, name_match, facts, size)
    rule = _read_rule(model, args, name_match)
    args = _drop_own_args(args)
    parsed = read_tower({**config, "model_args": args}, shapes, name_match, "timm", facts, size)
    assumed = tuple(name for name in parsed.assumed if name != "position_resize")
    return parsed._replace(config=set_rule(parsed.config, rule), assumed=assumed)


def _read_bare(
    shapes: Mapping[str, Shape],
    name_match: NameMatch,
    facts: Facts,
    image_size: tuple[int, int] | None,
) -> ParsedConfig:
    """Take what no file gives, and the rule of positions, from the models with these tensors."""
    parsed = read_tower({}, shapes, name_match, "timm", facts, image_size)
    inferred = infer_config(shapes, image_size) | infer_final_norm(name_match)
    models = list_candidates(build_signature(inferred, name_match), facts.saved_as)
    rules = {model.name: {"position_resize": model.position_resize} for model in models}
    is_factorized = "factorized" in infer_spelling(name_match)["spelling"]
    usual = _USUAL_FACTORIZED if is_factorized else _USUAL_RULE
    rule = resolve_facts(rules, Facts()).get("position_resize", usual)
    doubtful = parsed.doubtful if models else (*parsed.doubtful, "position_resize")
    return parsed._replace(config=set_rule(parsed.config, rule), doubtful=doubtful)


def set_rule(cfg: ViTConfig, rule: PositionResize) -> ViTConfig:
    """Return the config of a NaFlexVit, with its rule of positions and its family.

    Args:
        cfg: The config as a plain ViT.
        rule: As in ViTConfig.

    Returns:
        The config. SigLIP 2 NaFlex has the family of transformers' class, and every pool has biases
        of queries, keys and values.
    """
    is_siglip2 = cfg.family == "siglip" and not cfg.num_prefix_tokens
    is_siglip2 &= rule == "bilinear_antialias"
    family = "siglip" if is_siglip2 else "naflexvit"
    biases = replace(cfg.biases, qkv=cfg.biases.qkv or cfg.attention_pool is not None)
    positions = replace(cfg.positions, resize=rule)
    return replace(cfg, positions=positions, family=family, biases=biases)


def sum_positions(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace positions of rows and of columns by their sum, the position of each patch.

    Args:
        tensors: By the file's names, with embeds.pos_embed_y (1, h, D) and _x (1, w, D).

    Returns:
        The tensors, with embeds.pos_embed_yx (1, h, w, D).

    Raises:
        CheckpointError: The two have other shapes, or one is missing.
    """
    changed = dict(tensors)
    for name in [name for name in tensors if name.endswith("embeds.pos_embed_y")]:
        stem = name.removesuffix("y")
        rows = changed.pop(name)
        columns = changed.pop(f"{stem}x", rows.new_empty(0))
        if (rows.ndim, columns.ndim) != (3, 3) or rows.shape[::2] != columns.shape[::2]:
            shapes = ["x".join(map(str, tensor.shape)) for tensor in (rows, columns)]
            raise CheckpointError(
                f"{name} is {shapes[0]}, and {stem}x {shapes[1]}: expected 1 x rows x width, and "
                "1 x columns x width"
            )
        changed[f"{stem}yx"] = rows[:, :, None] + columns[:, None]
    return changed


def add_kernel_shape(shapes: Mapping[str, Shape], patch_size: Any = None) -> dict[str, Shape]:
    """Return the shapes, with that of a linear projection of patches as a convolution's.

    Args:
        shapes: Shapes by vitlib's names.
        patch_size: Pixels of a patch, one side or two; None: patches are square, of 3 channels or
            1.

    Returns:
        The shapes that the tensors have after `absorb_naflex`.
    """
    weight = shapes.get(_PATCH, ())
    if len(weight) != 2:
        return dict(shapes)
    kernel = tuple(LINEAR_PATCHES.read(torch.empty(weight, device="meta")).shape)
    if patch_size is not None:
        p, q = to_pair("patch_size", patch_size)
        channels, rest = divmod(weight[1], p * q)
        kernel = (weight[0], channels, p, q) if channels and not rest else kernel
    return {**shapes, _PATCH: kernel}


def absorb_naflex(cfg: ViTConfig, state: dict[str, Tensor]) -> None:
    """Turn the linear projection of patches into a convolution, and fill in biases of zeros.

    The attention pool has biases of queries, keys and values even where the blocks have none, which
    then get zeros.

    Args:
        cfg: The model's config.
        state: Its tensors by vitlib's names; changed in place.
    """
    names = {name: _QKV.sub(r"\1.bias", name) for name in state if _QKV.match(name)}
    if cfg.biases.qkv and "attn_pool.q.bias" in state and not names.values() & state.keys():
        for name, bias in names.items():
            state[bias] = state[name].new_zeros(len(state[name]))
    weight, (p, q) = state.get(_PATCH), cfg.patch_size
    if weight is not None and weight.ndim == 2 and weight.shape[1] == p * q * cfg.in_channels:
        state[_PATCH] = weight.reshape(-1, p, q, cfg.in_channels).permute(0, 3, 1, 2)


def drop_zero_bias(cfg: ViTConfig, state: dict[str, Tensor]) -> ViTConfig:
    """Drop the biases that `absorb_naflex` fills in.

    Args:
        cfg: The model's config.
        state: Its tensors by vitlib's names; changed in place.

    Returns:
        The config that fits the new tensors; unchanged if a bias of a block has another number than
        0, or those of the pool are zeros, too, as in an untrained model.
    """
    names = [_QKV.sub(r"\1.bias", name) for name in state if _QKV.match(name)]
    is_filled = not any(bool(state[name].any()) for name in names if name in state)
    pool = [f"attn_pool.{name}.bias" for name in "qkv"]
    if not is_filled or not any(bool(state[name].any()) for name in pool if name in state):
        return cfg
    for name in names:
        state.pop(name, None)
    return replace(cfg, biases=replace(cfg.biases, qkv=False))


def _infer_image_size(
    shapes: Mapping[str, Shape], name_match: NameMatch, args: Mapping[str, Any]
) -> tuple[int, int] | None:
    """Return the pixels of the grid of positions; None if the file does not hold a grid.

    Raises CheckpointError if model_args give another grid.
    """
    if _POS not in name_match.matches or len(shapes[_PATCH]) != 4:
        return None
    shape, (p, q) = name_match.shapes.get(name_match.file_name(_POS), ()), shapes[_PATCH][2:]
    stated = args.get("pos_embed_grid_size")
    grid = None if stated is None else to_pair("pos_embed_grid_size", stated)
    if len(shape) == 4 and grid not in (None, shape[1:3]):
        raise CheckpointError(
            f"config.json contradicts the tensors: pos_embed_grid_size {stated!r} (the tensors "
            f"have {compact_size((shape[1], shape[2]))})"
        )
    if len(shape) == 4:
        return shape[1] * p, shape[2] * q
    return None if grid is None else (grid[0] * p, grid[1] * q)


def _read_rule(
    model: Architecture, args: Mapping[str, Any], name_match: NameMatch
) -> PositionResize:
    """Return the rule that resizes the positions of an architecture with its arguments.

    Raises CheckpointError for a rule that vitlib does not have, and for positions that the tensors
    do not have.
    """
    was_factorized = "factorized" in str(model.structure["spelling"])
    kind = args.get("pos_embed", "factorized" if was_factorized else "learned")
    if kind not in _POSITIONS:
        raise CheckpointError(
            f"config.json has model_args pos_embed={kind!r}: expected learned, factorized or none"
        )
    is_factorized = "factorized" in infer_spelling(name_match)["spelling"]
    if _POS in name_match.matches and is_factorized != (kind == "factorized"):
        tensors = "factorized" if is_factorized else "learned"
        raise CheckpointError(
            f"{model.name!r} with the model_args of its config has pos_embed {kind!r} (the tensors "
            f"have {tensors!r}): set pos_embed of its model_args to {tensors!r}"
        )
    assert model.position_resize is not None
    rule = POSITION_RESIZE[model.position_resize]
    if was_factorized:  # the table has the rule of such positions, which ignores two arguments
        rule = ResizeRule("bicubic", antialias=True, square=rule.square)
    rule = rule._replace(**{_RULE[name]: value for name, value in args.items() if name in _RULE})
    if kind == "factorized":
        rule = ResizeRule("bilinear", square=rule.square)
    names = {other: name for name, other in POSITION_RESIZE.items()}
    if rule not in names:
        stated = ", ".join(f"{name}={args[name]!r}" for name in _RULE if name in args)
        raise CheckpointError(
            f"config.json has model_args {stated}: vitlib resizes positions by none of its rules "
            f"so, which are {', '.join(POSITION_RESIZE)}"
        )
    return names[rule]


def _drop_own_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that a plain ViT has, too, under its names.

    Raises CheckpointError for an argument of NaFlexVit alone that vitlib does not compute.
    """
    rest: dict[str, Any] = {}
    for name, value in args.items():
        if name in _SUPPORTED and value not in _SUPPORTED[name]:
            raise CheckpointError(
                f"config.json has model_args {name}={value!r}, which vitlib does not run: it "
                "changes the numbers; expected timm's default"
            )
        if name not in {*_SUPPORTED, *_RULE, *_HARMLESS, "pos_embed_grid_size"}:
            rest["scale_attn_norm" if name == "scale_attn_inner_norm" else name] = value
    return rest
