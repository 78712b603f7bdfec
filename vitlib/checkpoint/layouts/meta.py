"""The layout of the original PyTorch code: DeiT, DINO, MAE, MSN, I-JEPA, DINOv2, DINOv3, BEiT.

Their names are timm's, but for registers, gated MLPs and the bias of queries, keys and values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vitlib.checkpoint.families import guess_num_heads, with_profile
from vitlib.checkpoint.layouts import timm_names
from vitlib.checkpoint.layouts.computed import PERIODS, ROPE_THETA, check_computed_tensors
from vitlib.checkpoint.layouts.equivalences import (
    add_class_position,
    add_key_bias,
    check_supported,
    fold_class_position,
)
from vitlib.checkpoint.layouts.facts import Facts, resolve_facts
from vitlib.checkpoint.layouts.infer import Shape, infer_config
from vitlib.checkpoint.layouts.layout import (
    Json,
    Layout,
    ParsedConfig,
    Serialized,
    read_sidecar,
    sidecar_size,
)
from vitlib.checkpoint.layouts.table import (
    ROWS,
    NameMatch,
    Slice,
    Table,
    match_names,
    rename,
    write_state,
)
from vitlib.checkpoint.layouts.timm_config import (
    build_signature,
    check_distilled_pool,
    infer_family,
    infer_final_norm,
)
from vitlib.checkpoint.layouts.timm_models import get_architecture, list_candidates
from vitlib.config import ViTConfig
from vitlib.errors import CheckpointError

_OWN: Table = {
    **timm_names.TRUNK,
    **timm_names.LAYER_SCALE,
    "patch_embed.reg_token": "register_tokens",
    "patch_embed.mask_token": Slice("mask_token", reshape=ROWS),
    "attn_position.tables.{}": "blocks.{}.attn.relative_position_bias_table",
}
_STORAGE: Table = {"patch_embed.reg_token": "storage_tokens"}
_W12: Table = {"blocks.{}.mlp.fc1": "blocks.{}.mlp.w12", "blocks.{}.mlp.fc2": "blocks.{}.mlp.w3"}
_W1_W2: Table = {
    "blocks.{}.mlp.fc1": ("blocks.{}.mlp.w1", "blocks.{}.mlp.w2"),
    "blocks.{}.mlp.fc2": "blocks.{}.mlp.w3",
}
_READ = (
    _OWN,
    timm_names.GAMMAS,
    timm_names.Q_AND_V,
    _STORAGE,
    _W12,
    _W1_W2,
    timm_names.POOLED_NORM,
    timm_names.SHARED,
)
# MSN's projection head; a plain fc.weight is a classifier of training code.
_MSN_HEAD = ("fc.fc", "fc.bn")
_IGNORED = (
    "decoder_",  # MAE's, of pre-training
    "lm_head.",  # BEiT's
    "criterion.",
    "head.mlp.",  # DINO's projection heads
    "head.last_layer.",
    "dino_head.",
    "ibot_head.",
    *_MSN_HEAD,
    PERIODS,  # computed again, as Hugging Face does
    "local_cls_norm.",  # DINOv3: of training
    "*bias_mask",
    "*relative_position_index",
)
_CHUNK = re.compile(r"blocks\.\d+\.(\d+)\.")


def prepare(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Blocks that were cut into chunks, blocks.0.7, are numbered through: blocks.7.

    Raises CheckpointError where a tensor is not what vitlib computes in its place.
    """
    check_computed_tensors(tensors)
    if not any(_CHUNK.match(name) for name in tensors):
        return dict(tensors)
    return {_CHUNK.sub(r"blocks.\1.", name, count=1): tensor for name, tensor in tensors.items()}


def find(names: Iterable[str]) -> NameMatch:
    """Which of a file's tensors are which of ours."""
    names = list(names)
    decodes = any(name.startswith("decoder_") for name in names)
    ignored = (*_IGNORED, "mask_token") if decodes else _IGNORED
    tables = _READ
    if decodes:  # then the mask token is the decoder's, of its width
        own = {ours: row for ours, row in _OWN.items() if ours != "patch_embed.mask_token"}
        tables = (own, *_READ[1:])
    name_match = match_names(names, tables, prefixes=timm_names.PREFIXES, ignored=ignored)
    for name in names:
        if name.endswith("qkv.bias_mask"):  # the keys' part of the bias is masked away
            name_match.matches.pop(name.replace("qkv.bias_mask", "k.bias"), None)
    return name_match


def read(
    json: Json, shapes: Mapping[str, Shape], name_match: NameMatch, facts: Facts
) -> ParsedConfig:
    """The shapes -> what the model is; nothing else in such a file says it."""
    held = infer_config(shapes, sidecar_size(json)) | infer_final_norm(name_match)
    check_distilled_pool(held, facts)
    rotary = not (held["pos_embed"] or held["relative_position"])
    held["rope_theta"] = ROPE_THETA if rotary else None
    for name, shape in name_match.shapes.items():
        if name.endswith(PERIODS) and len(shape) == 1 and shape[0]:  # a quarter of a head's width
            held["num_heads"] = held["embed_dim"] // (4 * shape[0])
    family = infer_family(held, rope_theta=held["rope_theta"])
    if any(name.startswith("decoder_") for name in name_match.ignored):
        family = "vit_mae"
    if any(name.startswith(_MSN_HEAD) for name in name_match.ignored) and family == "vit":
        family = "vit_msn"
    if family == "deit3" and held["mask_token"]:
        family = "dinov2"
    pooled = held["final_norm"] == "pooled"
    if pooled and family == "vit":  # only MAE's fine-tuning pools so
        family = "vit_mae"
    held["pool"] = "mean" if pooled or not held["class_token"] else "cls"
    if held["final_norm"] == "none":  # which no original code does: its absence is reported
        held["final_norm"] = "tokens"
    open_fields = () if "num_heads" in held or "num_heads" in read_sidecar(json) else ("num_heads",)
    sure = bool(open_fields) and _settle_heads(held, name_match, facts)
    held.setdefault("num_heads", guess_num_heads(held["embed_dim"], family))
    cfg = with_profile(ViTConfig(family=family, **held), "original")
    assumed = (*open_fields, "norm_eps", "activation", "position_resize")
    return ParsedConfig(cfg, assumed, () if sure else open_fields)


def _settle_heads(held: dict[str, Any], name_match: NameMatch, facts: Facts) -> bool:
    """Set how many heads the published models with these tensors have; return whether any is."""
    models = list_candidates(build_signature(held, name_match), facts.saved_as, spelling=False)
    if facts.architecture is not None:
        named = get_architecture(facts.architecture)
        if named not in models:
            raise CheckpointError(f"architecture={named.name!r} has other tensors than this file")
        models = [named]
    rows = {
        model.name: {"num_heads": model.facts["num_heads"], "not_read": model.reason}
        for model in models
    }
    settled = resolve_facts(rows, Facts(num_heads=facts.num_heads))
    if settled.get("not_read"):
        get_architecture(next(name for name, row in rows.items() if row["not_read"]))
    if settled:
        held["num_heads"] = settled["num_heads"]
    return bool(settled)


def write(cfg: ViTConfig, state: dict[str, Tensor]) -> Serialized:
    """The model as a .pth in the names, and under the key, of its family's own code."""
    state = dict(state)
    wanted: dict[str, tuple[Any, ...]] = {
        "pre_norm": (False,),
        "patch_bias": (True,),
        "attention_pool": (False,),
        "pooler_dim": (0,),
        "projection_dim": (0,),
        "pool": ("mean",) if cfg.final_norm == "pooled" or not cfg.class_token else ("cls",),
        "final_norm": ("tokens", "pooled"),
        "activation": ("gelu", "gelu_tanh", "swiglu"),
        "dist_head": (cfg.dist_token,),  # without heads, DeiT gives the mean of the two tokens
        "rope_theta": (None, ROPE_THETA),
    }
    if cfg.relative_position is None:  # without any positions it would be read as a DINOv3
        wanted["pos_embed"] = (cfg.rope_theta is None,)
    if cfg.num_classes and cfg.family in ("dinov2", "dinov2_with_registers", "dinov3_vit"):
        wanted["num_classes"] = (0,)
    if cfg.family == "vit_mae" or (cfg.family == "ijepa" and cfg.mask_token):
        state.pop("patch_embed.mask_token", None)
        cfg = replace(cfg, mask_token=False)
    if cfg.pooler_dim and cfg.pool != "pooler":
        state = {name: t for name, t in state.items() if not name.startswith("pooler.")}
        cfg = replace(cfg, pooler_dim=0)
    check_supported(cfg, wanted, "the original code")
    if cfg.family == "deit3":
        cfg = fold_class_position(cfg, state)
    elif cfg.pos_embed and cfg.class_token:
        cfg = add_class_position(cfg, state)
    masked = cfg.rope_theta is not None and cfg.qkv_bias and not cfg.key_bias
    if masked or (cfg.relative_position is None and cfg.rope_theta is None):
        cfg = add_key_bias(cfg, state)
    tensors = write_state(state, _table(cfg), cfg)
    if masked:
        tensors |= _bias_masks(cfg, tensors)
    if cfg.rope_theta is not None:
        tensors["rope_embed.periods"] = _periods(cfg)
    wrapper = {"deit": "model", "deit3": "model", "vit_mae": "model"}
    wrapper |= {"beit": "model", "data2vec": "model"}
    wrapper |= {"vit_msn": "target_encoder", "ijepa": "encoder"}
    headed = "model" if cfg.num_classes and "dino" not in cfg.family else None
    return Serialized(tensors, weights="model.pth", wrapper=wrapper.get(cfg.family, headed))


def _bias_masks(cfg: ViTConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ones for queries and values, zeros for keys, as DINOv3's code multiplies the bias with."""
    masks = {}
    for name in tensors:
        if name.endswith("attn.qkv.bias"):
            mask = torch.ones(3, cfg.embed_dim, dtype=torch.float32)
            mask[1] = 0
            masks[name + "_mask"] = mask.flatten()
    return masks


def _periods(cfg: ViTConfig) -> Tensor:
    """(K / 4): the periods of the rotary angles, which DINOv3's code reads from its file."""
    assert cfg.rope_theta is not None
    steps = torch.arange(cfg.head_dim // 4, dtype=torch.float32)
    return cfg.rope_theta ** (2 * steps / (cfg.head_dim // 2))


def _table(cfg: ViTConfig) -> Table:
    """The names in a file of exactly this model."""
    table = dict(_OWN)
    if cfg.rope_theta is not None:
        table |= _STORAGE
    if cfg.activation == "swiglu":
        table |= _W12 if cfg.rope_theta is None else _W1_W2
    as_beit = cfg.family in ("beit", "data2vec")
    if as_beit or cfg.family == "deit3":
        table |= timm_names.GAMMAS
    if as_beit:
        table["patch_embed.mask_token"] = "mask_token"
        if not cfg.key_bias:
            table = {k: v for k, v in table.items() if not k.startswith("blocks.{}.attn.")}
            table |= {**timm_names.Q_AND_V, "blocks.{}.attn.proj": "blocks.{}.attn.proj"}
        if cfg.relative_position == "shared":
            table |= timm_names.SHARED
    if cfg.final_norm == "pooled":
        table |= timm_names.POOLED_NORM
    return table


def file_name(ours: str, cfg: ViTConfig) -> str:
    """Our name of a tensor -> its name in a file of this model; ours where files have none."""
    return rename(ours, _table(cfg))


LAYOUT = Layout(
    name="meta",
    profile="original",
    find=find,
    read=read,
    write=write,
    file_name=file_name,
    prepare=prepare,
)
