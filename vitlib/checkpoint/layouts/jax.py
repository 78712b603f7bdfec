"""The layout of Google's JAX code, in .npz: vision_transformer and big_vision.

Kernels are (in, out), those of attention have the heads as an axis of their own, and the patch
kernel is (h, w, in, out). big_vision may scan its blocks: one tensor with the depth in front.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from vitlib.checkpoint.families import with_profile
from vitlib.checkpoint.layouts.equivalences import BASIC_VIT, add_key_bias, check_supported
from vitlib.checkpoint.layouts.facts import Facts
from vitlib.checkpoint.layouts.infer import Shape, infer_config
from vitlib.checkpoint.layouts.layout import Json, Layout, ParsedConfig, Serialized, sidecar_size
from vitlib.checkpoint.layouts.table import (
    TRANSPOSED,
    NameMatch,
    Reshape,
    Slice,
    Table,
    match_names,
    rename,
    write_state,
)
from vitlib.config import ViTConfig
from vitlib.config_parts import Pooling
from vitlib.errors import CheckpointError

# Shapes in the file <-> in vitlib, with H heads of width K. Queries, keys and values: kernels
# (D, H, K) <-> (H * K, D), biases (H, K) <-> (H * K). Output: kernels (H, K, D) <-> (D, H * K).
_PATCH = Reshape(4, lambda t: t.permute(3, 2, 0, 1), lambda t, _: t.permute(2, 3, 1, 0))
_INTO_HEADS = Reshape(
    3, lambda t: t.flatten(1).T, lambda t, cfg: t.T.reshape(-1, cfg.num_heads, cfg.head_dim)
)
_HEADS_BIAS = Reshape(
    2, lambda t: t.flatten(), lambda t, cfg: t.reshape(cfg.num_heads, cfg.head_dim)
)
_OUT_OF_HEADS = Reshape(
    3, lambda t: t.flatten(0, 1).T, lambda t, cfg: t.T.reshape(cfg.num_heads, cfg.head_dim, -1)
)


def _norm(module: str, file_module: str) -> Table:
    """Return the rows of a LayerNorm."""
    return {f"{module}.weight": f"{file_module}/scale", f"{module}.bias": f"{file_module}/bias"}


def _dense(module: str, file_module: str) -> Table:
    """Return the rows of a linear layer, whose kernel is transposed."""
    kernel = Slice(f"{file_module}/kernel", reshape=TRANSPOSED)
    return {f"{module}.weight": kernel, f"{module}.bias": f"{file_module}/bias"}


def _attention(module: str, file_module: str) -> Table:
    """Return the rows of an attention layer, whose tensors have an axis of heads."""
    table: dict[str, Slice | str] = {}
    for name, file_name in (("q", "query"), ("k", "key"), ("v", "value")):
        table[f"{module}.{name}.weight"] = Slice(
            f"{file_module}/{file_name}/kernel", reshape=_INTO_HEADS
        )
        table[f"{module}.{name}.bias"] = Slice(
            f"{file_module}/{file_name}/bias", reshape=_HEADS_BIAS
        )
    table[f"{module}.proj.weight"] = Slice(f"{file_module}/out/kernel", reshape=_OUT_OF_HEADS)
    table[f"{module}.proj.bias"] = f"{file_module}/out/bias"
    return table


def _block(numbers: tuple[int, int, int, int]) -> Table:
    """Return the rows of a block; flax numbers its four parts otherwise in each repository."""
    file_module = "Transformer/encoderblock_{}"
    norm1, attention, norm2, mlp = numbers
    return {
        **_norm("blocks.{}.norm1", f"{file_module}/LayerNorm_{norm1}"),
        **_attention("blocks.{}.attn", f"{file_module}/MultiHeadDotProductAttention_{attention}"),
        **_norm("blocks.{}.norm2", f"{file_module}/LayerNorm_{norm2}"),
        **_dense("blocks.{}.mlp.fc1", f"{file_module}/MlpBlock_{mlp}/Dense_0"),
        **_dense("blocks.{}.mlp.fc2", f"{file_module}/MlpBlock_{mlp}/Dense_1"),
    }


_REST: Table = {
    "patch_embed.cls_token": "cls",
    "patch_embed.proj.weight": Slice("embedding/kernel", reshape=_PATCH),
    "patch_embed.proj.bias": "embedding/bias",
    **_norm("norm", "Transformer/encoder_norm"),
    **_dense("pooler", "pre_logits"),
    **_dense("head", "head"),
    "attn_pool.probe": "MAPHead_0/probe",
    **_attention("attn_pool", "MAPHead_0/MultiHeadDotProductAttention_0"),
    **_norm("attn_pool.norm", "MAPHead_0/LayerNorm_0"),
    **_dense("attn_pool.mlp.fc1", "MAPHead_0/MlpBlock_0/Dense_0"),
    **_dense("attn_pool.mlp.fc2", "MAPHead_0/MlpBlock_0/Dense_1"),
}
_VIT_JAX: Table = {
    **_REST,
    **_block((0, 1, 2, 3)),
    "patch_embed.pos_embed": "Transformer/posembed_input/pos_embedding",
}
_BIG_VISION: Table = {**_REST, **_block((0, 0, 1, 0)), "patch_embed.pos_embed": "pos_embedding"}
_PREFIXES = tuple(
    outer + inner
    for outer in ("opt/target/params/", "params/params/", "opt/target/", "params/", "")
    for inner in ("img/", "")
    if outer + inner
)
_IGNORED = ("opt/", "params/txt/", "params/t", "params/b", "txt/", "states/")
_SCANNED = "Transformer/encoderblock/"


def _prepare(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split the tensors of scanned blocks, one for all blocks, into one for each."""
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if _SCANNED not in name or not tensor.ndim:
            split[name] = tensor
            continue
        for index, part in enumerate(tensor):
            split[name.replace(_SCANNED, f"Transformer/encoderblock_{index}/")] = part
    return split


def _find(names: Iterable[str]) -> NameMatch:
    """Match names of both repositories."""
    return match_names(names, (_VIT_JAX, _BIG_VISION), prefixes=_PREFIXES, ignored=_IGNORED)


def _read(
    json: Json, shapes: Mapping[str, Shape], name_match: NameMatch, _facts: Facts
) -> ParsedConfig:
    """Infer the config from the shapes; the kernels of attention give the number of heads."""
    inferred = infer_config(shapes, sidecar_size(json))
    if not inferred["pos_embed"]:
        raise CheckpointError(
            "no positions in this file: expected pos_embedding; big_vision computes those of "
            "posemb=sincos2d, which vitlib does not: save the model with them as pos_embedding"
        )
    kernel = name_match.shapes.get(name_match.file_name("blocks.0.attn.q.weight"), ())
    if len(kernel) != 3:
        raise CheckpointError(
            f"query kernel of {len(kernel)} axes: expected (width, heads, head width), as flax "
            "saves it"
        )
    inferred["num_heads"] = kernel[1]
    pool = "map" if inferred["attention_pool"] else "cls" if inferred["class_token"] else "mean"
    inferred["pool"] = "pooler" if pool == "cls" and inferred["pooler_dim"] else pool
    family = "siglip" if inferred["attention_pool"] and not inferred["num_classes"] else "vit"
    cfg = with_profile(ViTConfig(family=family, **inferred), "jax")
    return ParsedConfig(cfg, ("norm_eps", "activation", "position_resize"))


def _write(cfg: ViTConfig, state: dict[str, Tensor]) -> Serialized:
    """Write .npz: a ViT by the names of vision_transformer, others by big_vision's (params/)."""
    state = dict(state)
    state.pop("patch_embed.mask_token", None)
    if cfg.pool != "pooler":
        state = {name: t for name, t in state.items() if not name.startswith("pooler.")}
    supported: dict[str, tuple[Any, ...]] = {
        **BASIC_VIT,
        "pool": ("cls", "pooler") if cfg.tokens.cls else ("mean", "map"),
        "attention_pool": (Pooling() if cfg.pool == "map" else None,),
    }
    check_supported(cfg, supported, "Google's ViT")
    cfg = add_key_bias(cfg, state)
    is_big_vision = not (cfg.tokens.cls and cfg.positions.cls)
    prefix = "" if not is_big_vision else "params/img/" if cfg.family == "siglip" else "params/"
    tensors = write_state(state, _BIG_VISION if is_big_vision else _VIT_JAX, cfg)
    return Serialized({prefix + name: t for name, t in tensors.items()}, weights="model.npz")


def _file_name(name: str, cfg: ViTConfig) -> str:
    """Return a tensor's name in a file; its own where files have none."""
    return rename(name, _VIT_JAX if cfg.tokens.cls and cfg.positions.cls else _BIG_VISION)


LAYOUT = Layout(
    name="jax",
    profile="jax",
    find=_find,
    read=_read,
    write=_write,
    file_name=_file_name,
    prepare=_prepare,
)
