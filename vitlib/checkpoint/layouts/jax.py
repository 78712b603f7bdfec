"""The layout of Google's JAX code, in .npz: vision_transformer and big_vision.

Kernels lie as (in, out), those of attention with the heads as an axis of their own, the patch
kernel as (h, w, in, out). big_vision may scan its blocks: one tensor with the depth in front.
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
from vitlib.errors import CheckpointError

# H heads of K: (D, H, K) <-> (H * K, D), (H, K) <-> (H * K), (H, K, D) <-> (D, H * K).
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


def _norm(ours: str, theirs: str) -> Table:
    return {f"{ours}.weight": f"{theirs}/scale", f"{ours}.bias": f"{theirs}/bias"}


def _dense(ours: str, theirs: str) -> Table:
    kernel = Slice(f"{theirs}/kernel", reshape=TRANSPOSED)
    return {f"{ours}.weight": kernel, f"{ours}.bias": f"{theirs}/bias"}


def _attention(ours: str, theirs: str) -> Table:
    table: dict[str, Slice | str] = {}
    for name, their in (("q", "query"), ("k", "key"), ("v", "value")):
        table[f"{ours}.{name}.weight"] = Slice(f"{theirs}/{their}/kernel", reshape=_INTO_HEADS)
        table[f"{ours}.{name}.bias"] = Slice(f"{theirs}/{their}/bias", reshape=_HEADS_BIAS)
    table[f"{ours}.proj.weight"] = Slice(f"{theirs}/out/kernel", reshape=_OUT_OF_HEADS)
    table[f"{ours}.proj.bias"] = f"{theirs}/out/bias"
    return table


def _block(numbers: tuple[int, int, int, int]) -> Table:
    """One block's rows; the numbers of its four parts differ between the two repositories' ages."""
    theirs = "Transformer/encoderblock_{}"
    norm1, attention, norm2, mlp = numbers
    return {
        **_norm("blocks.{}.norm1", f"{theirs}/LayerNorm_{norm1}"),
        **_attention("blocks.{}.attn", f"{theirs}/MultiHeadDotProductAttention_{attention}"),
        **_norm("blocks.{}.norm2", f"{theirs}/LayerNorm_{norm2}"),
        **_dense("blocks.{}.mlp.fc1", f"{theirs}/MlpBlock_{mlp}/Dense_0"),
        **_dense("blocks.{}.mlp.fc2", f"{theirs}/MlpBlock_{mlp}/Dense_1"),
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


def prepare(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Blocks that were scanned, one tensor for all, are cut into one for each."""
    cut: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if _SCANNED not in name or not tensor.ndim:
            cut[name] = tensor
            continue
        for index, part in enumerate(tensor):
            cut[name.replace(_SCANNED, f"Transformer/encoderblock_{index}/")] = part
    return cut


def find(names: Iterable[str]) -> NameMatch:
    """Which of a file's tensors are which of ours."""
    return match_names(names, (_VIT_JAX, _BIG_VISION), prefixes=_PREFIXES, ignored=_IGNORED)


def read(
    json: Json, shapes: Mapping[str, Shape], name_match: NameMatch, _facts: Facts
) -> ParsedConfig:
    """The shapes -> what the model is: the kernels say even how many heads there are."""
    held = infer_config(shapes, sidecar_size(json))
    if not held["pos_embed"]:
        raise CheckpointError(
            "no positions in this file: big_vision computes sine ones (posemb=sincos2d), which "
            "vitlib does not; save the model with them as pos_embedding"
        )
    kernel = name_match.shapes.get(name_match.file_name("blocks.0.attn.q.weight"), ())
    if len(kernel) != 3:
        raise CheckpointError(f"query kernel of {len(kernel)} axes: expected (width, heads, width)")
    held["num_heads"] = kernel[1]
    pool = "map" if held["attention_pool"] else "cls" if held["class_token"] else "mean"
    held["pool"] = "pooler" if pool == "cls" and held["pooler_dim"] else pool
    family = "siglip" if held["attention_pool"] and not held["num_classes"] else "vit"
    cfg = with_profile(ViTConfig(family=family, **held), "jax")
    return ParsedConfig(cfg, ("norm_eps", "activation", "position_resize"))


def write(cfg: ViTConfig, state: dict[str, Tensor]) -> Serialized:
    """The model as .npz: a ViT in vision_transformer's names, others in big_vision's (params/)."""
    state = dict(state)
    state.pop("patch_embed.mask_token", None)
    if cfg.pool != "pooler":
        state = {name: t for name, t in state.items() if not name.startswith("pooler.")}
    wanted: dict[str, tuple[Any, ...]] = {
        **BASIC_VIT,
        "pool": ("cls", "pooler") if cfg.class_token else ("mean", "map"),
        "attention_pool": (cfg.pool == "map",),
    }
    check_supported(cfg, wanted, "Google's ViT")
    cfg = add_key_bias(cfg, state)
    big = not (cfg.class_token and cfg.pos_embed_cls)
    prefix = "" if not big else "params/img/" if cfg.family == "siglip" else "params/"
    tensors = write_state(state, _BIG_VISION if big else _VIT_JAX, cfg)
    return Serialized({prefix + name: t for name, t in tensors.items()}, weights="model.npz")


def file_name(ours: str, cfg: ViTConfig) -> str:
    """Our name of a tensor -> its name in a file; ours where files have none."""
    return rename(ours, _VIT_JAX if cfg.class_token and cfg.pos_embed_cls else _BIG_VISION)


LAYOUT = Layout(
    name="jax",
    profile="jax",
    find=find,
    read=read,
    write=write,
    file_name=file_name,
    prepare=prepare,
)
