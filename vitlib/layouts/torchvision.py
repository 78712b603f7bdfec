"""The torchvision layout: a ViT's state dict, `class_token`, `conv_proj`, `encoder.layers...`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from vitlib.config import ViTConfig
from vitlib.layouts.facts import Facts
from vitlib.layouts.families import as_profile, num_heads
from vitlib.layouts.held import Shape, structure
from vitlib.layouts.layout import Json, Layout, Reading, Written, size_beside
from vitlib.layouts.moves import PLAIN, refuse, with_class_position, with_key_bias
from vitlib.layouts.table import Located, Table, fused_qkv, locate, rename, write_state

_BLOCK = "encoder.layers.encoder_layer_{}"
_OWN: Table = {
    "patch_embed.cls_token": "class_token",
    "patch_embed.proj": "conv_proj",
    "patch_embed.pos_embed": "encoder.pos_embedding",
    "blocks.{}.norm1": f"{_BLOCK}.ln_1",
    **fused_qkv("blocks.{}.attn", f"{_BLOCK}.self_attention.in_proj"),
    "blocks.{}.attn.out": f"{_BLOCK}.self_attention.out_proj",
    "blocks.{}.norm2": f"{_BLOCK}.ln_2",
    "blocks.{}.mlp.fc1": f"{_BLOCK}.mlp.0",
    "blocks.{}.mlp.fc2": f"{_BLOCK}.mlp.3",
    "norm": "encoder.ln",
    "pooler": "heads.pre_logits",
    "head": "heads.head",
}
_LEGACY: Table = {
    "blocks.{}.mlp.fc1": f"{_BLOCK}.mlp.linear_1",
    "blocks.{}.mlp.fc2": f"{_BLOCK}.mlp.linear_2",
}


def find(names: Iterable[str]) -> Located:
    """Which of a file's tensors are which of ours."""
    return locate(names, (_OWN, _LEGACY))


def read(json: Json, shapes: Mapping[str, Shape], _: Located, _facts: Facts) -> Reading:
    """The shapes -> what the model is; nothing else in such a file says it."""
    held = structure(shapes, size_beside(json))
    held["pool"] = "pooler" if held["pooler_dim"] else "cls"
    held["num_heads"] = num_heads(held["embed_dim"], "vit")
    cfg = as_profile(ViTConfig(family="vit", **held), "torchvision")
    assumed = ("num_heads", "norm_eps", "activation", "position_resize")
    return Reading(cfg, assumed, ("num_heads",))


def write(cfg: ViTConfig, state: dict[str, Tensor]) -> Written:
    """The model as the state dict of torchvision's VisionTransformer, in a .pth."""
    state = dict(state)
    if cfg.pool != "pooler":
        state = {name: t for name, t in state.items() if not name.startswith("pooler.")}
    state.pop("patch_embed.mask_token", None)
    wanted: dict[str, tuple[Any, ...]] = {
        "class_token": (True,),
        **PLAIN,
        "pool": ("cls", "pooler"),
        "in_channels": (3,),
        "image_size": ((cfg.image_size[0],) * 2,),
        "patch_size": ((cfg.patch_size[0],) * 2,),
        "attention_pool": (False,),
    }
    refuse(cfg, wanted, "torchvision's VisionTransformer")
    cfg = with_key_bias(with_class_position(cfg, state), state)
    return Written(write_state(state, _OWN, cfg), weights="model.pth")


def name_of(ours: str, cfg: ViTConfig) -> str:  # noqa: ARG001
    """Our name of a tensor -> its name in a file; ours where files have none."""
    return rename(ours, _OWN)


LAYOUT = Layout(
    name="torchvision",
    profile="torchvision",
    find=find,
    read=read,
    write=write,
    name_of=name_of,
)
