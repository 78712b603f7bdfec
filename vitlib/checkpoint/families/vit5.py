"""ViT-5 (2602.08071): RMS norms, added and rotary positions, registers on a grid of their own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from vitlib.checkpoint.families.family import Config, Family, OriginalCode, Shapes, State
from vitlib.checkpoint.layouts import timm_names
from vitlib.checkpoint.layouts.table import Table
from vitlib.config import ViTConfig
from vitlib.config_parts import Norms, Rope
from vitlib.errors import CheckpointError
from vitlib.image.configs.transform import BICUBIC, IMAGENET_STATS, crop

_THETA, _REGISTER_THETA = 10000.0, 100.0
# Frequencies of patches and of registers, which the code saves in each block.
_FREQS = {"attn.rope.freqs": _THETA, "attn.rope_reg.freqs": _REGISTER_THETA}
_NAMES: Table = {
    **timm_names.TRUNK,
    **timm_names.GAMMAS,
    "patch_embed.reg_token": "reg_token",
    "blocks.{}.attn.q_norm": "blocks.{}.attn.q_norm",
    "blocks.{}.attn.k_norm": "blocks.{}.attn.k_norm",
}


def _is_own(names: Collection[str]) -> bool:
    return any(name.endswith("attn.rope_reg.freqs") for name in names)


def _build_rope(grid: tuple[int, int]) -> Rope:
    """Return the rotation of a model that was built for a grid, to which it scales others."""
    return Rope(theta=_THETA, coords="index", reference_grid=grid, register_theta=_REGISTER_THETA)


def _read(fields: Config, _: Shapes, __: Config) -> dict[str, Any]:
    """Return the rotation, and the class token as the pool."""
    if not fields["num_registers"]:
        raise CheckpointError(
            "frequencies of registers (rope_reg.freqs) and no registers (reg_token): expected "
            "both; give the whole file"
        )
    grid = tuple(n // p for n, p in zip(fields["image_size"], fields["patch_size"], strict=True))
    return {"rope": _build_rope((grid[0], grid[1])), "pool": "cls"}


def _make_freqs(theta: float, count: int) -> Tensor:
    return 1 / theta ** (torch.arange(count, dtype=torch.float32) / count)


def _compute(cfg: ViTConfig) -> State:
    """Return the frequencies that the code saves in each block."""
    return {
        f"blocks.{index}.{name}": _make_freqs(theta, cfg.head_dim // 4)
        for index in range(cfg.depth)
        for name, theta in _FREQS.items()
    }


def _check(tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError for frequencies of other periods."""
    for name, freqs in tensors.items():
        theta = next((theta for end, theta in _FREQS.items() if name.endswith(end)), None)
        if theta is None:
            continue
        count = freqs.numel()
        if not count or not torch.allclose(
            freqs.float().flatten(), _make_freqs(theta, count), rtol=2.0**-7, atol=0.0
        ):
            raise CheckpointError(
                f"{name}: its frequencies are not ViT-5's, of theta={theta:g}, which are those "
                "that vitlib computes"
            )


def _allow(cfg: ViTConfig) -> dict[str, tuple[Any, ...]]:
    """Return the values of fields that the code computes."""
    return {
        "rope": (_build_rope(cfg.grid_size),),
        "norms": (Norms(kind="rms", qk="head"),),
        "class_token": (True,),
        "num_registers": (cfg.tokens.registers,),
        "pos_embed": (True,),
        "pos_embed_cls": (False,),
        "qkv_bias": (False,),
        "final_norm": ("tokens",),
        "pool": ("cls",),
        "activation": ("gelu",),
        "layer_scale": (cfg.layer_scale if cfg.layer_scale is not None else 1.0,),
    }


FAMILY = Family(
    name="vit5",
    title="ViT-5",
    numerics={"original": {"norm_eps": 1e-6, "position_resize": "bicubic"}},
    original_wrapper="model",
    original=OriginalCode(
        is_own=_is_own,
        names=lambda _: _NAMES,
        spellings=(_NAMES,),
        ignored=tuple(f"*{name}" for name in _FREQS),
        read=_read,
        allowed=_allow,
        computed=_compute,
        check=_check,
    ),
    libraries=("original",),
    transforms={"original": crop(1.0, BICUBIC, IMAGENET_STATS)},
)
