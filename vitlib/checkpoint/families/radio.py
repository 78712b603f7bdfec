"""C-RADIO (2312.06709, 2601.17237): several class tokens, positions cut from a large grid.

Its model normalises pixels itself. vitlib's takes normalised pixels, and the numbers are a part of
the preprocessing: image/configs/hf.py reads them there, and files are written with none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from vitlib.checkpoint.families.dinov2 import IN_MEMORY as BLOCKS_IN_MEMORY
from vitlib.checkpoint.families.dinov2 import NAMES as DINOV2_NAMES
from vitlib.checkpoint.families.dinov2 import (
    allow_layer_scale,
    find_mlp_ratio,
    read_mlp_dim,
)
from vitlib.checkpoint.families.family import (
    HUGE,
    Config,
    Container,
    Family,
    HfType,
    Mismatch,
    Published,
    Shapes,
    State,
)
from vitlib.checkpoint.families.vit import DROP_PATH, NUMBERS
from vitlib.checkpoint.layouts.equivalences import fold_class_position
from vitlib.checkpoint.layouts.table import (
    FIRST_ROW,
    FLAT_PATCHES,
    LATER_ROWS,
    NameMatch,
    Slice,
    Table,
    fused_qkv,
)
from vitlib.config import ViTConfig
from vitlib.config_parts import LEADING_TOKENS
from vitlib.errors import CheckpointError, is_number
from vitlib.image.configs.transform import BICUBIC, CLIP_STATS, crop

_NUMBERS: dict[str, tuple[str, Any]] = {
    **NUMBERS,
    **DROP_PATH,
    "image_size": ("max_img_size", 2048),
    "embed_dim": ("hidden_size", 1280),
    "depth": ("num_hidden_layers", 32),
    "num_heads": ("num_attention_heads", 16),
    "norm_eps": ("layer_norm_eps", 1e-6),
    "qkv_bias": ("qkv_bias", True),
    "attention_dropout": ("attention_probs_dropout_prob", 0.0),
    "layer_scale": ("layerscale_value", 1.0),
}
_CLS, _REG = "patch_embed.cls_token", "patch_embed.reg_token"
# Tensors that no forward reads: `_absorb` takes them out, and `_to_hf` puts them back.
_CHOSEN, _MEAN, _STD = "summary_idxs", "pixel_mean", "pixel_std"
_NAMES: Table = {
    _CLS: Slice("radio_model.model.patch_generator.cls_token.token", reshape=FIRST_ROW),
    _REG: Slice("radio_model.model.patch_generator.cls_token.token", 1, reshape=LATER_ROWS),
    "patch_embed.pos_embed": "radio_model.model.patch_generator.pos_embed",
    "patch_embed.proj.weight": Slice(
        "radio_model.model.patch_generator.embedder.weight", reshape=FLAT_PATCHES
    ),
    **fused_qkv("blocks.{}.attn", "radio_model.model.blocks.{}.attn.qkv", "."),
    "blocks.{}.attn.proj": "radio_model.model.blocks.{}.attn.proj",
    "blocks.{}.norm1": "radio_model.model.blocks.{}.norm1",
    "blocks.{}.norm2": "radio_model.model.blocks.{}.norm2",
    "blocks.{}.ls1.gamma": "radio_model.model.blocks.{}.layer_scale1.lambda1",
    "blocks.{}.ls2.gamma": "radio_model.model.blocks.{}.layer_scale2.lambda1",
    "blocks.{}.mlp.fc1": "radio_model.model.blocks.{}.mlp.fc1",
    "blocks.{}.mlp.fc2": "radio_model.model.blocks.{}.mlp.fc2",
    _CHOSEN: "radio_model.summary_idxs",
    _MEAN: "radio_model.input_conditioner.norm_mean",
    _STD: "radio_model.input_conditioner.norm_std",
}
_GATED: Table = {
    "blocks.{}.mlp.fc1": (
        "radio_model.model.blocks.{}.mlp.gate_proj",
        "radio_model.model.blocks.{}.mlp.up_proj",
    ),
    "blocks.{}.mlp.fc2": "radio_model.model.blocks.{}.mlp.down_proj",
}
# transformers holds these tensors by other names in memory, those of blocks by DINOv2's.
_IN_MEMORY: Table = {
    **{name: row for name, row in DINOV2_NAMES.items() if name.startswith("blocks.")},
    _CLS: Slice("embeddings.cls_register_token", reshape=FIRST_ROW),
    _REG: Slice("embeddings.cls_register_token", 1, reshape=LATER_ROWS),
    "patch_embed.pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": Slice("embeddings.patch_projection.weight", reshape=FLAT_PATCHES),
    _CHOSEN: "summary_idxs",
    _MEAN: "input_conditioner.norm_mean",
    _STD: "input_conditioner.norm_std",
}
_POOLS = {1: "cls", **{count: pool for pool, count in LEADING_TOKENS.items() if count > 1}}
_DEFAULT = (0, 1)  # class tokens that are joined


def _read_more(config: Config, fields: Config) -> dict[str, Any]:
    """Read the width of the MLP, a ratio, and all prefix tokens but the first as registers."""
    counts = config.get("num_cls_tokens", 3), config.get("num_registers", 7)
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in counts) or not counts[0]:
        raise CheckpointError(
            f"config.json has num_cls_tokens {counts[0]!r}, num_registers {counts[1]!r}: expected "
            "1 or more, and 0 or more"
        )
    return {**read_mlp_dim(config, fields), "num_registers": sum(counts) - 1}


def _infer_parts(match: NameMatch | None, _: bool) -> dict[str, Any]:
    """Return the pool, which joins as many tokens as are chosen, and no LayerScale without one."""
    if match is None:
        return {}
    scale = {} if "blocks.0.ls1.gamma" in match.matches else {"layer_scale": None}
    if _CHOSEN not in match.matches:
        return scale
    shape = match.shapes.get(match.file_name(_CHOSEN), ())
    if len(shape) != 1 or shape[0] not in _POOLS:
        raise CheckpointError(
            f"{match.file_name(_CHOSEN)} has the shape {shape}: vitlib's pool joins 1 to "
            f"{max(_POOLS)} class tokens"
        )
    return {"pool": _POOLS[shape[0]], **scale}


def _list_mismatches(_: Config, tower: Config, shapes: Shapes, __: NameMatch) -> list[Mismatch]:
    """Return keys that say other tensors; transformers would draw these or keep their defaults."""
    scale = tower.get("layerscale_value", 1.0)
    chosen, count = _chosen(tower), shapes.get(_CHOSEN, (len(_DEFAULT),))[0]
    mismatches: list[Mismatch] = []
    if len(chosen) != count:
        mismatches.append(("summary_idxs", chosen, f"{count} numbers"))
    if "blocks.0.ls1.gamma" not in shapes and scale != 1:
        mismatches.append(("layerscale_value", scale, "no LayerScale"))
    return mismatches


def _chosen(config: Config) -> list[Any]:
    """Return the class tokens whose vectors are joined."""
    chosen = config.get("summary_idxs")
    return list(chosen) if isinstance(chosen, list | tuple) else list(_DEFAULT)


def _absorb(cfg: ViTConfig, state: State, config: Config) -> None:
    """Put the chosen class tokens first, and check the numbers that stand in config.json, too.

    Attention treats all prefix tokens alike, so their order is free.
    """
    nested = config.get("vision_config")
    config = nested if isinstance(nested, Mapping) else config
    defaults = dict(zip((_MEAN, _STD), CLIP_STATS, strict=True))
    for name, key in ((_MEAN, "norm_mean"), (_STD, "norm_std")):
        numbers = config.get(key, defaults[name])
        if not isinstance(numbers, list | tuple) or not all(map(is_number, numbers)):
            raise CheckpointError(f"config.json has {key} {numbers!r}: expected a list of numbers")
        stated = torch.tensor(numbers, dtype=torch.float32)
        tensor = state.pop(name, stated)
        # A file in half precision holds the rounded numbers.
        if not torch.equal(stated.to(tensor.dtype).flatten(), tensor.flatten()):
            raise CheckpointError(
                f"{key} is {tensor.flatten().tolist()} in the tensors, and {stated.tolist()} in "
                "config.json, or for want of it: expected the same numbers; write those of the "
                "tensors into config.json"
            )
    chosen = state.pop(_CHOSEN).flatten().tolist() if _CHOSEN in state else _chosen(config)
    _check_chosen(chosen, config, cfg)
    if _CLS not in state or any(state[name].ndim != 3 for name in (_CLS, _REG) if name in state):
        return  # missing or of another shape, which is reported with all other problems
    tokens = torch.cat([state[_CLS], state[_REG]], dim=1) if _REG in state else state[_CLS]
    order = [*chosen, *(i for i in range(tokens.shape[1]) if i not in chosen)]
    if order != list(range(len(order))):
        state[_CLS], state[_REG] = tokens[:, order[:1]], tokens[:, order[1:]]


def _check_chosen(chosen: list[Any], config: Config, cfg: ViTConfig) -> None:
    """Raise CheckpointError for a choice that is not of different class tokens."""
    count = config.get("num_cls_tokens")
    count = count if isinstance(count, int) else cfg.num_prefix_tokens
    stated = _chosen(config) if "summary_idxs" in config else chosen
    is_valid = all(isinstance(index, int) and 0 <= index < count for index in chosen)
    if stated != chosen or not is_valid or len(set(chosen)) < len(chosen):
        raise CheckpointError(
            f"summary_idxs is {stated} in config.json and {chosen} in the file: expected the same "
            f"different numbers from 0 to {count - 1}"
        )


def _to_hf(cfg: ViTConfig, state: State) -> ViTConfig:
    """Return the config with tokens without positions; add what the class holds as buffers."""
    if cfg.final_norm != "none" or not (cfg.tokens.cls and cfg.positions.embed):
        return cfg
    for name in [name for name in state if name.startswith("norm.")]:
        del state[name]
    cfg = fold_class_position(cfg, state)
    if not cfg.num_classes and cfg.pool not in _POOLS.values():
        cfg = replace(cfg, pool="cls")  # transformers returns the tokens: save logs another pool
    state[_CHOSEN] = torch.arange(LEADING_TOKENS.get(cfg.pool, 1), dtype=torch.int64)
    state[_MEAN] = torch.zeros(cfg.in_channels, 1, 1, dtype=torch.float32)
    state[_STD] = torch.ones(cfg.in_channels, 1, 1, dtype=torch.float32)
    return cfg


def _write_more(cfg: ViTConfig) -> dict[str, Any]:
    """Return the keys of config.json that are RADIO's own."""
    count = LEADING_TOKENS.get(cfg.pool, 1)
    return {
        "max_img_size": cfg.image_size[0],
        "mlp_ratio": float(find_mlp_ratio(cfg, whole=False)),
        "use_swiglu_ffn": cfg.activation == "swiglu",
        "layerscale_value": 1.0 if cfg.layer_scale is None else float(cfg.layer_scale),
        "num_cls_tokens": count,
        "num_registers": cfg.num_prefix_tokens - count,
        "summary_idxs": list(range(count)),
        "norm_mean": [0.0] * cfg.in_channels,
        "norm_std": [1.0] * cfg.in_channels,
    }


def _allow(cfg: ViTConfig) -> dict[str, tuple[Any, ...]]:
    """Return the values that RADIO's class computes: squares, any number of registers."""
    return {
        **allow_layer_scale(cfg),
        "layer_scale": (cfg.layer_scale,),
        "num_registers": (cfg.tokens.registers,),
        "in_channels": (1, 3),  # a file does not tell others from larger patches
        "image_size": (cfg.image_size[:1] * 2,),
        "patch_size": (cfg.patch_size[:1] * 2,),
    }


def _detach_normalisation(reference: Any, _: ViTConfig, __: int) -> dict[str, Any]:
    """Let transformers' model take normalised pixels, as vitlib's does."""
    reference.make_preprocessor_external()
    return {}


_TYPE = "radio"
_TRANSFORM = replace(crop(1.0, BICUBIC, CLIP_STATS), image_size=512)

FAMILY = Family(
    name=_TYPE,
    title="C-RADIO",
    hf=HfType(
        model_type=_TYPE,
        class_name="Radio",
        prefix="",
        trunk="",
        run_arguments=_detach_normalisation,
        names=_NAMES,
        more_names=lambda cfg: _GATED if cfg.activation == "swiglu" else {},
        numbers=_NUMBERS,
        fixed={"position_resize": "bilinear_square", "pos_embed_cls": False, "patch_bias": False},
        base={"pool": "cls+reg", "final_norm": "none"},
        base_pools=dict.fromkeys(_POOLS.values(), "none"),
        head=None,
        reads_head_dim=True,
        read_more=_read_more,
        write_more=_write_more,
        infer_pooling=_infer_parts,
        list_mismatches=_list_mismatches,
        allowed=_allow,
        absorb=_absorb,
    ),
    hf_containers={"nemotron_h_omni": Container(model_type=_TYPE)},
    hf_names=(_IN_MEMORY, BLOCKS_IN_MEMORY),
    hf_starts=("radio_model.model.blocks.0.", "embeddings.patch_projection."),
    hf_published=(
        Published(_TYPE, *HUGE, (16,), "", "nvidia/C-RADIOv4-H"),
        Published(_TYPE, 1152, 4304, 16, (16,), "", "nvidia/C-RADIOv4-SO400M"),
    ),
    to_hf=_to_hf,
    numerics={"hf": {"norm_eps": 1e-6, "position_resize": "bilinear_square"}},
    libraries=("hf",),
    transforms={"hf": replace(_TRANSFORM, crop_rounding="floor")},
)
