"""EVA-02 (2303.11331) and its CLIP towers: rotary positions, norms inside its branches."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from vitlib.checkpoint.families.family import Config, Family, OriginalCode, Shapes, State
from vitlib.checkpoint.layouts import timm_names
from vitlib.checkpoint.layouts.infer import square_side
from vitlib.checkpoint.layouts.table import Table
from vitlib.config import ViTConfig
from vitlib.config_parts import Norms, Rope
from vitlib.errors import CheckpointError
from vitlib.image.configs.transform import BICUBIC, CLIP_STATS, CROP_PCT, crop, uncropped_from
from vitlib.positions import rotary_angles

ROPE = Rope(theta=10000.0, coords="index", reference_grid=(16, 16))
_COS, _SIN = "rope.freqs_cos", "rope.freqs_sin"
_MARKS = (_COS, "mlp.ffn_ln.weight", "attn.inner_attn_ln.weight")
_ROUNDED = 2.0**-7  # published files hold the tables in float16 and bfloat16, too
_TRUNK: Table = {
    **{name: row for name, row in timm_names.TRUNK.items() if not name.startswith("blocks.{}.mlp")},
    "patch_embed.mask_token": "mask_token",
    "blocks.{}.attn.sub_norm": "blocks.{}.attn.inner_attn_ln",
    "blocks.{}.mlp.sub_norm": "blocks.{}.mlp.ffn_ln",
    **timm_names.GAMMAS,
    **timm_names.Q_AND_V,
}
_SPLIT_QKV: Table = {
    f"blocks.{{}}.attn.{name}.weight": f"blocks.{{}}.attn.{name}_proj.weight" for name in "qkv"
}
_MLP: Table = {f"blocks.{{}}.mlp.{name}": f"blocks.{{}}.mlp.{name}" for name in ("fc1", "fc2")}
_W1_W2: Table = {
    "blocks.{}.mlp.fc1": ("blocks.{}.mlp.w1", "blocks.{}.mlp.w2"),
    "blocks.{}.mlp.fc2": "blocks.{}.mlp.w3",
}
_W12: Table = {"blocks.{}.mlp.fc1": "blocks.{}.mlp.w12", "blocks.{}.mlp.fc2": "blocks.{}.mlp.w3"}


def _is_own(names: Collection[str]) -> bool:
    return any(name.endswith(_MARKS) for name in names)


def _name_tensors(cfg: ViTConfig) -> Table:
    """Return the names in a file: models with norms inside have separate projections."""
    gated = _W1_W2 if cfg.norms.mlp else _W12
    table = {**_TRUNK, **(gated if cfg.activation == "swiglu" else _MLP)}
    if cfg.norms.mlp:
        table |= _SPLIT_QKV
    if cfg.final_norm == "pooled":
        table |= timm_names.POOLED_NORM
    return table


def _read(fields: Config, shapes: Shapes, published: Config) -> dict[str, Any]:
    """Take the rotation and the heads from the tables in the file, else from published models.

    Only EVA-02-E has no rotation, and its norms are after its branches.
    """
    tables = [shape for name, shape in shapes.items() if name.endswith(_COS)]
    if not tables and not published:
        raise CheckpointError(
            f"no rotary table ({_COS}) in a file of EVA-02's code, and no published model has "
            "these tensors: state a model with architecture= (--architecture), or give "
            "config=ViTConfig(...)"
        )
    is_rotary = bool(tables) or published.get("is_rotary", fields.get("activation") == "swiglu")
    facts: dict[str, Any] = {"rope": ROPE if is_rotary else None, "post_norm": int(not is_rotary)}
    if tables and len(tables[0]) == 2 and tables[0][1] and fields["embed_dim"] % tables[0][1] == 0:
        facts["num_heads"] = fields["embed_dim"] // tables[0][1]
    if fields["final_norm"] == "pooled":
        return facts | {"pool": "mean"}
    return facts | {"pool": "cls", "open_pool": not fields["num_classes"]}


def _make_tables(grid: tuple[int, int], head_dim: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines as files hold them, (N, K): each angle twice, side by side."""
    angles = rotary_angles(grid, head_dim, ROPE, torch.device("cpu")).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


def _compute(cfg: ViTConfig) -> State:
    """Return the rotary tables, which the code saves once for the model and once a block."""
    if cfg.rope is None:
        return {}
    tables = _make_tables(cfg.grid_size, cfg.head_dim)
    modules = ["", *(f"blocks.{index}.attn." for index in range(cfg.depth))]
    return {
        module + name: table
        for module in modules
        for name, table in zip((_COS, _SIN), tables, strict=True)
    }


def _check(tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError for rotary tables of other periods or of another reference grid."""
    checked: list[Tensor] = []
    for position, end in enumerate((_COS, _SIN)):
        for name, table in tensors.items():
            is_new = all(
                table.dtype != other.dtype or not torch.equal(table, other) for other in checked
            )
            if not (name.endswith(end) and is_new):
                continue
            side = square_side(table.shape[0]) if table.ndim == 2 else 0
            if side and table.shape[1] % 4 == 0:
                expected = _make_tables((side, side), table.shape[1])[position]
                if torch.allclose(table.float(), expected, atol=_ROUNDED, rtol=0.0):
                    checked.append(table)
                    continue
            raise CheckpointError(
                f"{name}: its angles are not EVA-02's, of patches on a grid of 16x16, which are "
                "those that vitlib computes"
            )


def _allow(cfg: ViTConfig) -> dict[str, tuple[Any, ...]]:
    """Return the values of fields that the code computes."""
    has_norms, is_rotary = cfg.norms.mlp, cfg.rope is not None
    norms = Norms(attn=cfg.norms.attn and has_norms, mlp=has_norms)
    return {
        # The largest tower, EVA-02-E, has norms after its branches and no rotation.
        "rope": (ROPE, None),
        "norms": (norms if is_rotary else Norms(post=True),),
        "activation": ("swiglu",) if is_rotary else ("gelu",),
        "class_token": (True,),
        "pos_embed": (True,),
        "pos_embed_cls": (True,),
        "qkv_bias": (True,),
        "key_bias": (False,),
        "final_norm": ("tokens", "pooled"),
        "pool": ("mean",) if cfg.final_norm == "pooled" else ("cls",),
    }


# timm's config.json of each model states its transform: this is that of most.
FAMILY = Family(
    name="eva02",
    title="EVA-02",
    numerics={
        "timm": {"norm_eps": 1e-06},
        "original": {"norm_eps": 1e-6, "position_resize": "bicubic"},
    },
    timm_architecture="eva02_base_patch14_224",
    timm_only=True,
    timm_word="eva02",
    original_wrapper="model",
    original=OriginalCode(
        is_own=_is_own,
        names=_name_tensors,
        spellings=(_TRUNK, _SPLIT_QKV, _W1_W2, _W12, timm_names.POOLED_NORM),
        ignored=("lm_head.", f"*{_COS}", f"*{_SIN}"),
        read=_read,
        allowed=_allow,
        computed=_compute,
        check=_check,
        # Only towers of CLIP have norms inside attention, or after the branches.
        choose_transform=lambda cfg: "eva02_clip" if cfg.norms.attn or cfg.norms.post else "eva02",
    ),
    libraries=("timm", "original"),
    transforms={
        "timm": crop(0.9, BICUBIC, CLIP_STATS),
        "original": uncropped_from(384, crop(CROP_PCT, BICUBIC, CLIP_STATS)),
    },
    transform_variants={"eva02_clip": {"original": crop(1.0, BICUBIC, CLIP_STATS)}},
)
