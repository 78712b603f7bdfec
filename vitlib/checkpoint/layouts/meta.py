"""The layout of the original PyTorch code: DeiT, DINO, MAE, MSN, I-JEPA, DINOv2, DINOv3, BEiT.

The names are timm's, except for registers, gated MLPs and the bias of queries, keys and values.
Code with other names, as EVA-02's, is described by its family; see original.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vitlib.checkpoint.families import default_num_heads, get_family, list_families, with_profile
from vitlib.checkpoint.layouts import original, timm_names
from vitlib.checkpoint.layouts.computed import DINOV3_ROPE, PERIODS, check_computed_tensors
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
from vitlib.config_parts import Norms
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
_IGNORED = (
    "decoder_",  # of MAE, for pre-training
    "lm_head.",  # of BEiT
    "criterion.",
    "head.mlp.",  # the projection heads of DINO
    "head.last_layer.",
    "dino_head.",
    "ibot_head.",
    PERIODS,  # vitlib computes the periods again, as Hugging Face does
    "local_cls_norm.",  # of DINOv3, for training
    "temporal_embed_enc.",  # of Prithvi, which adds nothing without a date and a place
    "location_embed_enc.",
    "*bias_mask",
    "*relative_position_index",
)
_PATCH = "patch_embed.proj.weight"
_CHUNK = re.compile(r"blocks\.\d+\.(\d+)\.")


def _prepare(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renumber blocks that were saved in chunks: blocks.0.7 becomes blocks.7.

    Raises CheckpointError if a tensor differs from what vitlib computes in its place.
    """
    check_computed_tensors(tensors)
    if (code := original.find_code(tensors)) is not None:
        code[1].check(tensors)
        return dict(tensors)
    if not any(_CHUNK.match(name) for name in tensors):
        return dict(tensors)
    return {_CHUNK.sub(r"blocks.\1.", name, count=1): tensor for name, tensor in tensors.items()}


def _find(names: Iterable[str]) -> NameMatch:
    """Match names of all original code, and ignore the tensors of pre-training."""
    names = list(names)
    if (code := original.find_code(names)) is not None:
        return original.find(names, *code)
    has_decoder = any(name.startswith("decoder_") for name in names)
    marks = [mark for family in list_families() for mark in family.original_marks]
    ignored = (*_IGNORED, *marks, *(["mask_token"] if has_decoder else []))
    tables = _READ
    if has_decoder:
        # In MAE the mask token is an input of the decoder and has its width.
        encoder = {name: row for name, row in _OWN.items() if name != "patch_embed.mask_token"}
        tables = (encoder, *_READ[1:])
    name_match = match_names(names, tables, prefixes=timm_names.PREFIXES, ignored=ignored)
    for name in names:
        if name.endswith("qkv.bias_mask"):
            # DINOv3 multiplies the bias of keys by zero: the model has none.
            name_match.matches.pop(name.replace("qkv.bias_mask", "k.bias"), None)
    return name_match


def _read(
    json: Json, shapes: Mapping[str, Shape], name_match: NameMatch, facts: Facts
) -> ParsedConfig:
    """Infer the config from the shapes and names; no config is in such a file."""
    inferred = infer_config(shapes, sidecar_size(json)) | infer_final_norm(name_match)
    check_distilled_pool(inferred, facts)
    if inferred["norms"] != Norms():
        raise CheckpointError(
            f"{inferred['norms']} in names that most original code shares, as EVA-CLIP-8B and -18B "
            "have: no tensor says the order of norms; give config=ViTConfig(...)"
        )
    is_rotary = not (inferred["pos_embed"] or inferred["relative_position"])
    inferred["rope"] = DINOV3_ROPE if is_rotary else None
    for name, shape in name_match.shapes.items():
        if name.endswith(PERIODS) and len(shape) == 1 and shape[0]:
            # DINOv3 has one period for every four channels of a head.
            inferred["num_heads"] = inferred["embed_dim"] // (4 * shape[0])
    family = infer_family(inferred, rope=inferred["rope"])
    if any(name.startswith("decoder_") for name in name_match.ignored):
        family = "vit_mae"
    for other in list_families():
        marks = other.original_marks
        if family == "vit" and marks and any(n.startswith(marks) for n in name_match.ignored):
            family = other.name
    if family == "deit3" and inferred["mask_token"]:
        family = "dinov2"
    pooled = inferred["final_norm"] == "pooled"
    # Only the fine-tuning code of MAE has this norm.
    if pooled and family == "vit":
        family = "vit_mae"
    inferred["pool"] = "mean" if pooled or not inferred["class_token"] else "cls"
    # All original code has a norm: report it as missing.
    if inferred["final_norm"] == "none":
        inferred["final_norm"] = "tokens"
    open_fields = (
        () if "num_heads" in inferred or "num_heads" in read_sidecar(json) else ("num_heads",)
    )
    is_settled = bool(open_fields) and _settle_heads(inferred, name_match, facts)
    family = inferred.pop("family", family)
    if not is_settled:
        _refuse_ambiguous(inferred, facts, bool(open_fields))
    inferred.setdefault("num_heads", default_num_heads(inferred["embed_dim"], family))
    cfg = with_profile(ViTConfig(family=family, **inferred), "original")
    # Without a head and a norm of its own, the pool is the caller's choice.
    free_pool = facts.pool is not None and not cfg.num_classes and not pooled
    assumed = (*open_fields, "norm_eps", "activation", "position_resize", *["pool"] * free_pool)
    return ParsedConfig(cfg, assumed, () if is_settled else open_fields)


def _refuse_ambiguous(inferred: Mapping[str, Any], facts: Facts, is_open: bool) -> None:
    """Raise CheckpointError for unpublished tensors that two codes name alike.

    Args:
        inferred: Fields of ViTConfig.
        facts: What the caller states.
        is_open: No file says the facts that no tensor holds.
    """
    is_added = inferred["pos_embed"] and not inferred["relative_position"]
    if is_added and not inferred["key_bias"]:
        # Tensors do not show the order of norms. BEiT, whose biases these are, has no such model.
        raise CheckpointError(
            "biases of queries and values alone, and positions that are added: in EVA's code norms "
            "stand before the branches of such a model or after them (EVA-02-E), and no published "
            "model has these tensors: state a model with architecture= (--architecture), or give "
            "config=ViTConfig(...)"
        )
    is_gated = inferred.get("activation") == "swiglu" and inferred["num_registers"]
    if is_gated and is_open and facts.num_heads is None:
        raise CheckpointError(
            "no published model of DINOv2 or TIPSv2 has these tensors, and the names of both are "
            "the same: state num_heads= (--num-heads), and layout='hf' (--source-layout hf) for a "
            "TIPSv2 of transformers"
        )


def _read_image_or_frame(
    json: Json, shapes: Mapping[str, Shape], name_match: NameMatch, facts: Facts
) -> ParsedConfig:
    """Read a config as _read() does, and give a model of frames the facts of its code."""
    if (code := original.choose_code(json, name_match.shapes, facts)) is not None:
        return original.read(json, shapes, name_match, facts, *code)
    parsed = _read(json, shapes, name_match, facts)
    if len(name_match.shapes.get(name_match.file_name(_PATCH), ())) != 5:
        return parsed
    from vitlib.checkpoint.layouts.earth import fit_config  # few checkpoints need it

    return fit_config(parsed, json("config.json") or {}, facts, name_match.ignored)


def _finish(state: dict[str, Tensor], _: tuple[int, int] | None) -> dict[str, Tensor]:
    """Return the tensors; of a model of several frames, those of the first frame."""
    kernel, table = state.get(_PATCH), state.get("patch_embed.pos_embed")
    is_video = kernel is not None and kernel.ndim == 5
    if is_video or (kernel is not None and table is not None and table.shape[-1] < kernel.shape[0]):
        from vitlib.checkpoint.layouts import earth  # few checkpoints need it

        earth.check_position_width(state)
        return earth.take_frame(state)
    return state


def _settle_heads(inferred: dict[str, Any], name_match: NameMatch, facts: Facts) -> bool:
    """Set num_heads, and a family that names alone tell, as published; False if nothing fits."""
    signature = build_signature(inferred, name_match)
    if inferred["num_registers"]:  # timm adds the position of [CLS] to the token
        signature["pos_embed_cls"] = False
    models = list_candidates(signature, facts.saved_as, spelling=False)
    if facts.architecture is not None:
        stated = get_architecture(facts.architecture)
        if stated not in models:
            raise CheckpointError(
                f"architecture={stated.name!r} has other tensors than this file: state another "
                "one, or leave it out"
            )
        models = [stated]
    names = ("num_heads", "rope", "post_norm")
    rows = {
        model.name: {"not_read": model.reason, **{name: model.facts[name] for name in names}}
        for model in models
    }
    settled = resolve_facts(rows, Facts(num_heads=facts.num_heads))
    if settled.get("not_read"):
        get_architecture(next(name for name, row in rows.items() if row["not_read"]))
    if settled:
        if all(get_family("eva02").timm_word in name for name in rows):
            # Without rotary tables its files have the names of BEiT's; timm computes the same.
            inferred |= {"family": "eva02", "rope": settled["rope"]}
            inferred["norms"] = replace(inferred["norms"], post=bool(settled["post_norm"]))
        elif settled["rope"] != inferred["rope"] or settled["post_norm"]:
            raise CheckpointError(
                f"{next(iter(rows))!r} is a model of timm, whose code orders these tensors "
                "otherwise: give layout='timm' (on the command line --source-layout timm)"
            )
        inferred["num_heads"] = settled["num_heads"]
        families = {infer_family(inferred, name, inferred["rope"]) for name in rows}
        if len(families) == 1 and get_family(next(iter(families))).timm_only:
            inferred["family"] = families.pop()
    return bool(settled)


def _write(cfg: ViTConfig, state: dict[str, Tensor]) -> Serialized:
    """Write a .pth with the names and the outer key of the family's own code."""
    if (code := get_family(cfg.family).original) is not None:
        return original.write(cfg, state, code)
    state = dict(state)
    supported: dict[str, tuple[Any, ...]] = {
        "pre_norm": (False,),
        "patch_bias": (True,),
        "attention_pool": (None,),
        "pooler_dim": (0,),
        "projection_dim": (0,),
        "pool": ("mean",) if cfg.final_norm == "pooled" or not cfg.tokens.cls else ("cls",),
        "final_norm": ("tokens", "pooled"),
        "activation": ("gelu", "gelu_tanh", "swiglu"),
        "dist_head": (cfg.tokens.dist,),  # without heads, DeiT returns the mean of two tokens
        "rope": (None, DINOV3_ROPE),
    }
    # A file without positions is read as DINOv3.
    if cfg.positions.relative is None:
        supported["pos_embed"] = (cfg.rope is None,)
    if cfg.num_classes and cfg.family in ("dinov2", "dinov2_with_registers", "dinov3_vit"):
        supported["num_classes"] = (0,)
    if cfg.family == "vit_mae" or (cfg.family == "ijepa" and cfg.tokens.mask):
        state.pop("patch_embed.mask_token", None)
        cfg = replace(cfg, tokens=replace(cfg.tokens, mask=False))
    if cfg.outputs.pooler_dim and cfg.pool != "pooler":
        state = {name: t for name, t in state.items() if not name.startswith("pooler.")}
        cfg = replace(cfg, outputs=replace(cfg.outputs, pooler_dim=0))
    check_supported(cfg, supported, "the original code")
    if cfg.family == "deit3":
        cfg = fold_class_position(cfg, state)
    elif cfg.positions.embed and cfg.tokens.cls:
        cfg = add_class_position(cfg, state)
    has_bias_mask = cfg.rope is not None and cfg.biases.qkv and not cfg.biases.key
    if has_bias_mask or (cfg.positions.relative is None and cfg.rope is None):
        cfg = add_key_bias(cfg, state)
    tensors = write_state(state, _table(cfg), cfg)
    if has_bias_mask:
        tensors |= _bias_masks(cfg, tensors)
    if cfg.rope is not None:
        tensors["rope_embed.periods"] = _periods(cfg)
    wrapper = get_family(cfg.family).original_wrapper
    with_head = "model" if cfg.num_classes and "dino" not in cfg.family else None
    return Serialized(tensors, weights="model.pth", wrapper=wrapper or with_head)


def _bias_masks(cfg: ViTConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the factors of DINOv3's qkv bias: ones for queries and values, zeros for keys."""
    masks = {}
    for name in tensors:
        if name.endswith("attn.qkv.bias"):
            mask = torch.ones(3, cfg.embed_dim, dtype=torch.float32)
            mask[1] = 0
            masks[name + "_mask"] = mask.flatten()
    return masks


def _periods(cfg: ViTConfig) -> Tensor:
    """Return the periods (head_dim / 4) of the rotary angles, which DINOv3's code loads."""
    assert cfg.rope is not None
    steps = torch.arange(cfg.head_dim // 4, dtype=torch.float32)
    return cfg.rope.theta ** (2 * steps / (cfg.head_dim // 2))


def _table(cfg: ViTConfig) -> Table:
    """Return the names in a file of this model."""
    if (code := get_family(cfg.family).original) is not None:
        return code.names(cfg)
    table = dict(_OWN)
    if cfg.rope is not None:
        table |= _STORAGE
    if cfg.activation == "swiglu":
        table |= _W12 if cfg.rope is None else _W1_W2
    is_beit = "beit" in (cfg.family, get_family(cfg.family).hf_twin)
    if is_beit or cfg.family == "deit3":
        table |= timm_names.GAMMAS
    if is_beit:
        table["patch_embed.mask_token"] = "mask_token"
        if not cfg.biases.key:
            table = {k: v for k, v in table.items() if not k.startswith("blocks.{}.attn.")}
            table |= {**timm_names.Q_AND_V, "blocks.{}.attn.proj": "blocks.{}.attn.proj"}
        if cfg.positions.relative == "shared":
            table |= timm_names.SHARED
    if cfg.final_norm == "pooled":
        table |= timm_names.POOLED_NORM
    return table


def _file_name(name: str, cfg: ViTConfig) -> str:
    """Return a tensor's name in a file of this model; its own where files have none."""
    return rename(name, _table(cfg))


LAYOUT = Layout(
    name="meta",
    profile="original",
    find=_find,
    read=_read_image_or_frame,
    write=_write,
    file_name=_file_name,
    prepare=_prepare,
    finish=_finish,
    absorb=original.absorb,
)
