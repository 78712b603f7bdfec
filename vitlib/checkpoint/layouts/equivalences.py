"""Rewrite a model exactly with other tensors, where a layout cannot store them as they are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vitlib.checkpoint.layouts.infer import SIZE_REMEDY, square_side
from vitlib.config import ViTConfig
from vitlib.config_parts import Norms
from vitlib.errors import CheckpointError, ConfigError

_POS, _CLS = "patch_embed.pos_embed", "patch_embed.cls_token"

# Field values of the original ViT (2010.11929): all that jax and torchvision compute.
BASIC_VIT: Mapping[str, tuple[Any, ...]] = {
    "dist_token": (False,),
    "num_registers": (0,),
    "pos_embed": (True,),
    "relative_position": (None,),
    "rope": (None,),
    "layer_scale": (None,),
    "pre_norm": (False,),
    "patch_bias": (True,),
    "qkv_bias": (True,),
    "projection_dim": (0,),
    "activation": ("gelu", "gelu_tanh"),
    "final_norm": ("tokens",),
}


def add_class_position(cfg: ViTConfig, state: dict[str, Tensor]) -> ViTConfig:
    """Give class tokens without a position row a row of zeros.

    Args:
        cfg: The model's config.
        state: Its tensors by vitlib's names; changed in place.

    Returns:
        The config that fits the new tensors.
    """
    if cfg.pos_embed_cls:
        return cfg
    table = state[_POS]
    zeros = table.new_zeros(1, 1 + cfg.dist_token, table.shape[2])
    state[_POS] = torch.cat([zeros, table], dim=1)
    return replace(cfg, pos_embed_cls=True)


def fold_class_position(cfg: ViTConfig, state: dict[str, Tensor]) -> ViTConfig:
    """Add the position rows of class tokens to the tokens and remove the rows.

    Args:
        cfg: The model's config.
        state: Its tensors by vitlib's names; changed in place.

    Returns:
        The config that fits the new tensors.
    """
    if not (cfg.pos_embed_cls and cfg.class_token and cfg.pos_embed):
        return cfg
    table = state[_POS]
    state[_CLS] = state[_CLS] + table[:, :1]
    if cfg.dist_token:
        state["patch_embed.dist_token"] = state["patch_embed.dist_token"] + table[:, 1:2]
    state[_POS] = table[:, 1 + cfg.dist_token :]
    return replace(cfg, pos_embed_cls=False)


def split_class_tokens(state: dict[str, Tensor]) -> None:
    """Make registers of all class tokens but the first, and add their position rows to them.

    Attention treats class tokens and registers alike: they differ in what has a position.

    Args:
        state: Tensors by vitlib's names; changed in place.
    """
    tokens, table = state.get(_CLS), state.get(_POS)
    if tokens is None or table is None or (tokens.ndim, table.ndim) != (3, 3):
        return
    count = tokens.shape[1]
    if count < 2 or table.shape[1] <= count or tokens.shape[2] != table.shape[2]:
        return
    state[_CLS] = tokens[:, :1]
    state["patch_embed.reg_token"] = tokens[:, 1:] + table[:, 1:count]
    state[_POS] = torch.cat([table[:, :1], table[:, count:]], dim=1)


def join_class_tokens(state: dict[str, Tensor]) -> None:
    """Join registers to the class token, with positions of zeros: undoes `split_class_tokens`.

    Args:
        state: Tensors by vitlib's names, with a position of the class token; changed in place.
    """
    registers, table = state.pop("patch_embed.reg_token", None), state[_POS]
    if registers is not None:
        state[_CLS] = torch.cat([state[_CLS], registers], dim=1)
        zeros = torch.zeros_like(registers)
        state[_POS] = torch.cat([table[:, :1], zeros, table[:, 1:]], dim=1)


def fold_register_positions(
    state: dict[str, Tensor], image_size: tuple[int, int] | None
) -> dict[str, Tensor]:
    """Add the position rows of registers to the registers and remove the rows.

    Args:
        state: Tensors by vitlib's names; changed in place.
        image_size: Pixels (height, width); None if no file gives them.

    Returns:
        The tensors, with positions of class tokens and patches only.

    Raises:
        CheckpointError: The number of positions does not tell whether registers have any.
    """
    table, registers = state.get(_POS), state.get("patch_embed.reg_token")
    kernel = state.get("patch_embed.proj.weight")
    if table is None or registers is None or kernel is None:
        return state
    if (table.ndim, registers.ndim, kernel.ndim) != (3, 3, 4):
        return state
    first = int(_CLS in state) + int("patch_embed.dist_token" in state)
    count = registers.shape[1]
    if table.shape[2] != registers.shape[2]:
        return state
    p, q = kernel.shape[2:]
    grid = None if image_size is None else (image_size[0] // p, image_size[1] // q)
    if _registers_have_positions(table.shape[1], first, count, grid):
        state["patch_embed.reg_token"] = registers + table[:, first : first + count]
        state[_POS] = torch.cat([table[:, :first], table[:, first + count :]], 1)
    return state


def _registers_have_positions(
    rows: int, first: int, count: int, grid: tuple[int, int] | None
) -> bool:
    """Return True if `rows` positions are those of `first` class tokens, `count` registers, a grid.

    Raises CheckpointError if they may also be those of another grid without registers.
    """
    # The number of patches if registers have no positions, and if class tokens have none either.
    without = (rows - first, rows)
    if grid is not None:
        patches = grid[0] * grid[1]
        if patches in (rows - first - count, *without):
            return patches == rows - first - count
    with_positions = square_side(rows - first - count) > 0
    if with_positions and any(square_side(patches) for patches in without):
        raise CheckpointError(
            f"{rows} positions may belong to patches only, or to {count} registers too: "
            f"{SIZE_REMEDY}"
        )
    return with_positions


def add_key_bias(cfg: ViTConfig, state: dict[str, Tensor]) -> ViTConfig:
    """Give keys without a bias a bias of zeros.

    Args:
        cfg: The model's config.
        state: Its tensors by vitlib's names; changed in place.

    Returns:
        The config that fits the new tensors.
    """
    if cfg.key_bias or not cfg.qkv_bias:
        return cfg
    for name in [name for name in state if name.endswith("attn.q.bias")]:
        state[name.replace("attn.q", "attn.k")] = torch.zeros_like(state[name])
    return replace(cfg, key_bias=True)


def drop_key_bias(cfg: ViTConfig, state: dict[str, Tensor]) -> ViTConfig:
    """Remove the bias of keys.

    A key bias adds one constant to all scores of a query, which softmax removes.

    Args:
        cfg: The model's config.
        state: Its tensors by vitlib's names; changed in place.

    Returns:
        The config that fits the new tensors.

    Raises:
        ConfigError: Queries and values have no bias.
    """
    if not cfg.qkv_bias:
        raise ConfigError(
            "qkv_bias=False: expected True, for queries and values have a bias in this layout; "
            "save the model in another layout"
        )
    for name in [name for name in state if name.endswith("attn.k.bias")]:
        del state[name]
    return replace(cfg, key_bias=False)


def fill_layer_scale(cfg: ViTConfig, state: dict[str, Tensor]) -> None:
    """Give branches without LayerScale a gamma of ones, where the other branch has one.

    Args:
        cfg: The model's config.
        state: Its tensors by vitlib's names; changed in place.
    """
    if cfg.layer_scale is None:
        return
    for name in [name for name in state if name.endswith("ls1.gamma")]:
        other = name.replace("ls1", "ls2")
        if other not in state:
            state[other] = torch.ones_like(state[name])


def drop_unit_layer_scale(cfg: ViTConfig, state: dict[str, Tensor]) -> None:
    """Drop the LayerScale of MLPs, if it is one everywhere: the inverse of `fill_layer_scale`.

    Args:
        cfg: The model's config.
        state: Its tensors by vitlib's names; changed in place.

    Raises:
        ConfigError: A gamma is another number.
    """
    for name in [name for name in state if name.endswith("ls2.gamma")]:
        if not bool((state[name] == 1).all()):
            raise ConfigError(
                f"{name} has other numbers than 1: family={cfg.family!r} has no LayerScale on its "
                "MLPs; save the model in another layout"
            )
        del state[name]


_ROTATED = re.compile(r"blocks\.\d+\.attn\.[qk](_norm)?\.(weight|bias)$")
_SHARED = re.compile(r"blocks\.\d+\.attn\.[kv]\.(weight|bias)$")


def _split_heads(tensor: Tensor, cfg: ViTConfig) -> Tensor:
    """Split the rows of a weight or bias into heads, (H K, ...) -> (H, K, ...)."""
    return tensor.reshape(-1, cfg.head_dim, *tensor.shape[1:])


def join_rotary_pairs(cfg: ViTConfig, state: dict[str, Tensor], *, inverse: bool = False) -> None:
    """Reorder queries and keys whose neighbouring channels turn together, so that halves do.

    Scores do not change: a permutation of the channels of a head is the same for both.

    Args:
        cfg: The model's config.
        state: Its tensors by vitlib's names; changed in place.
        inverse: From halves to neighbours.
    """
    order = torch.arange(cfg.head_dim, dtype=torch.int64).view(-1, 2).T.flatten()
    order = order.argsort() if inverse else order
    for name in [name for name in state if _ROTATED.match(name)]:
        tensor = state[name]
        if tensor.ndim and tensor.shape[0] % cfg.head_dim == 0:
            heads = _split_heads(tensor, cfg)
            state[name] = heads[:, order.to(tensor.device)].flatten(0, 1)


def expand_key_heads(cfg: ViTConfig, state: dict[str, Tensor]) -> None:
    """Give each head its own keys and values, where groups of heads share them (2305.13245).

    Args:
        cfg: The model's config.
        state: Its tensors by vitlib's names; changed in place.
    """
    for name in [name for name in state if _SHARED.match(name)]:
        rows = state[name].shape[0] if state[name].ndim else 0
        if 0 < rows < cfg.embed_dim and cfg.embed_dim % rows == 0 and rows % cfg.head_dim == 0:
            heads = _split_heads(state[name], cfg)
            state[name] = heads.repeat_interleave(cfg.embed_dim // rows, 0).flatten(0, 1)


def share_key_heads(cfg: ViTConfig, state: dict[str, Tensor]) -> list[int]:
    """Keep one copy of equal keys and values: the inverse of `expand_key_heads`.

    Args:
        cfg: The model's config.
        state: Its tensors by vitlib's names; changed in place.

    Returns:
        Number of heads of keys and values of each block.
    """
    counts = []
    for index in range(cfg.depth):
        names = [n for n in state if n.startswith(f"blocks.{index}.") and _SHARED.match(n)]
        heads = {name: _split_heads(state[name], cfg) for name in names}
        size = max(
            size
            for size in range(1, cfg.num_heads + 1)
            if cfg.num_heads % size == 0
            and all(torch.equal(h[::size].repeat_interleave(size, 0), h) for h in heads.values())
        )
        for name in names:
            state[name] = heads[name][::size].flatten(0, 1)
        counts.append(cfg.num_heads // size)
    return counts


def convert_head_to_projection(cfg: ViTConfig, state: dict[str, Tensor]) -> ViTConfig:
    """Turn a head with a zero bias and without labels into a projection.

    Args:
        cfg: The model's config.
        state: Its tensors by vitlib's names; changed in place.

    Returns:
        The config; unchanged if the head cannot be a projection.
    """
    if cfg.labels or cfg.projection_dim or bool(state["head.bias"].any()):
        return cfg
    state["projection.weight"] = state.pop("head.weight")
    del state["head.bias"]
    return replace(cfg, num_classes=0, projection_dim=cfg.num_classes)


def convert_projection_to_head(cfg: ViTConfig, state: dict[str, Tensor]) -> ViTConfig:
    """Turn a projection into a head with a bias of zeros.

    Args:
        cfg: The model's config.
        state: Its tensors by vitlib's names; changed in place.

    Returns:
        The config; unchanged if there is no projection, or a head already.
    """
    if not cfg.projection_dim or cfg.num_classes:
        return cfg
    state["head.weight"] = state.pop("projection.weight")
    state["head.bias"] = state["head.weight"].new_zeros(cfg.projection_dim)
    return replace(cfg, num_classes=cfg.projection_dim, projection_dim=0)


def check_supported(cfg: ViTConfig, supported: Mapping[str, tuple[Any, ...]], target: str) -> None:
    """Check that the code of a layout computes a model.

    Args:
        cfg: The model's config.
        supported: For each field that is checked, the values that the code computes.
        target: Name of the code, the subject of the error message.

    Raises:
        ConfigError: A field has another value.
    """
    # Few layouts have these: the others need not name them.
    usual: dict[str, tuple[Any, ...]] = {"norms": (Norms(),), "proj_bias": (True,), "rope": (None,)}
    if cfg.attention_pool is not None:
        usual["attention_pool"] = (replace(cfg.attention_pool, q_proj=True, mlp=True),)
    wrong = [
        f"{name}={getattr(cfg, name)!r}"
        for name, allowed in {**usual, **supported}.items()
        if getattr(cfg, name) not in allowed
    ]
    if wrong:
        raise ConfigError(
            f"{target} cannot run a model with {', '.join(wrong)}: "
            "it would open the files and compute other numbers, or fail; choose another layout"
        )
