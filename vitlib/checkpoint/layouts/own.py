"""The layout of vitlib itself: names of ViT.state_dict(), and the ViTConfig in vitlib.json."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from vitlib.checkpoint.families import default_num_heads, with_profile
from vitlib.checkpoint.layouts.computed import DINOV3_ROPE
from vitlib.checkpoint.layouts.facts import Facts
from vitlib.checkpoint.layouts.infer import Shape, infer_config, sizes
from vitlib.checkpoint.layouts.layout import (
    SIDECAR,
    Json,
    Layout,
    ParsedConfig,
    Serialized,
    read_sidecar,
    sidecar_size,
)
from vitlib.checkpoint.layouts.table import NameMatch, Table, match_names
from vitlib.checkpoint.layouts.timm_config import infer_family
from vitlib.config import ViTConfig, config_to_json
from vitlib.config_parts import SHORT_NAMES, Norms
from vitlib.errors import CheckpointError, to_pair

_MODULES = (
    "patch_embed.cls_token",
    "patch_embed.dist_token",
    "patch_embed.reg_token",
    "patch_embed.pos_embed",
    "patch_embed.mask_token",
    "patch_embed.proj",
    "patch_embed.norm",
    "norm_pre",
    "blocks.{}.norm1",
    "blocks.{}.attn.q",
    "blocks.{}.attn.k",
    "blocks.{}.attn.v",
    "blocks.{}.attn.q_norm",
    "blocks.{}.attn.k_norm",
    "blocks.{}.attn.sub_norm",
    "blocks.{}.attn.proj",
    "blocks.{}.ls1.gamma",
    "blocks.{}.norm2",
    "blocks.{}.mlp.fc1",
    "blocks.{}.mlp.sub_norm",
    "blocks.{}.mlp.fc2",
    "blocks.{}.ls2.gamma",
    "attn_position.tables.{}",
    "attn_position.freqs",
    "attn_position.cls_angles",
    "norm",
    "pooler",
    "attn_pool.probe",
    "attn_pool.q",
    "attn_pool.k",
    "attn_pool.v",
    "attn_pool.proj",
    "attn_pool.norm",
    "attn_pool.mlp.fc1",
    "attn_pool.mlp.fc2",
    "projection",
    "head",
    "head_dist",
)
_TABLE: Table = {name: name for name in _MODULES}
_CONFIG = "config"  # key of vitlib.json with all fields of ViTConfig
# 1: before modules had timm's names (attn.proj, ls1, ls2, norm_pre) and the config had pos_embed.
FORMAT_VERSION = 2
_VERSION_1 = re.compile(r"attn(_pool)?\.out\.(weight|bias)$")  # names of version 1 alone
# Fields that no tensor determines; a bare state dict may be of any family.
_OPEN = ("num_heads", "activation", "norm_eps", "pool", "rope")


def upgrade_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a ViTConfig in a JSON file, of this version or an older one.

    Args:
        values: The fields by name. Older files have rope_theta in place of rope.

    Returns:
        The fields, lists as tuples.
    """
    fields = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    if "rope_theta" in fields:
        theta = fields.pop("rope_theta")
        fields["rope"] = None if theta is None else {"theta": theta}
    return fields


def _find(names: Iterable[str]) -> NameMatch:
    """Match names that are vitlib's own."""
    return match_names(names, (_TABLE,))


def _read(json: Json, shapes: Mapping[str, Shape], match: NameMatch, facts: Facts) -> ParsedConfig:
    """Parse vitlib.json where save() wrote one, else infer the config from the shapes."""
    content = json(SIDECAR) or {}
    config = content.get(_CONFIG)
    is_version_1 = any(_VERSION_1.search(name) for name in match.unexpected)
    version = 1 if is_version_1 else FORMAT_VERSION
    if config is not None:
        version = content.get("format_version", 1)
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"vitlib's own layout has format version {version!r:.20}: expected {FORMAT_VERSION}: "
            "save the model in the layout 'hf' or 'timm' with the version of vitlib that wrote it"
        )
    if config is not None:
        return ParsedConfig(_parse_config(config, shapes))
    inferred = infer_config(shapes, sidecar_size(json))
    _check_usual(inferred, shapes)
    family = read_sidecar(json).get("family") or infer_family(inferred)
    if family == "dinov3_vit":
        inferred["rope"] = DINOV3_ROPE
    pooled = "pooler" if inferred["pooler_dim"] else "cls" if inferred["class_token"] else "mean"
    inferred["pool"] = "map" if inferred["attention_pool"] else pooled
    assumed = [name for name in _OPEN if name not in inferred or name in ("pool", "rope")]
    if inferred["relative_position"]:
        assumed.remove("rope")  # no model has both
    inferred.setdefault(
        "num_heads", facts.num_heads or default_num_heads(inferred["embed_dim"], family)
    )
    cfg = with_profile(ViTConfig(family=family, **inferred), "timm")
    return ParsedConfig(cfg, (*assumed, "position_resize"), tuple(assumed))


def _check_usual(inferred: Mapping[str, Any], shapes: Mapping[str, Shape]) -> None:
    """Raise CheckpointError for tensors whose rotary table or order of norms no shape shows."""
    is_learned = not {"attn_position.freqs", "attn_position.cls_angles"}.isdisjoint(shapes)
    if is_learned or inferred["norms"] != Norms() or not inferred["proj_bias"]:
        raise CheckpointError(
            "norms, biases or rotary angles of no usual ViT, and no vitlib.json beside the file: "
            "expected the folder of vitlib.save(layout='vitlib'), or config=ViTConfig(...)"
        )


def _parse_config(config: object, shapes: Mapping[str, Shape]) -> ViTConfig:
    """Return the config in vitlib.json; raise CheckpointError if it contradicts the tensors."""
    known = {field.name for field in fields(ViTConfig)} | SHORT_NAMES.keys()
    config = upgrade_fields(config) if isinstance(config, dict) else config
    if not isinstance(config, dict) or config.keys() - known:
        unknown = sorted(config.keys() - known) if isinstance(config, dict) else config
        raise CheckpointError(
            f"{SIDECAR} has {_CONFIG} {unknown!r:.80}: expected ViTConfig's fields; save the model "
            "again"
        )
    try:
        cfg = ViTConfig(**config)
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{SIDECAR} has a {_CONFIG} that is no ViTConfig: {error}; save the model again"
        ) from error
    inferred = sizes(shapes) | {"num_positions": (shapes.get("patch_embed.pos_embed") or (1, 0))[1]}
    clashes = [
        (n, getattr(cfg, n), value) for n, value in inferred.items() if getattr(cfg, n) != value
    ]
    if clashes:
        listed = "; ".join(f"{name} {a} (the tensors have {b})" for name, a, b in clashes)
        raise CheckpointError(f"{SIDECAR} contradicts the tensors: {listed}")
    return cfg


def _write(cfg: ViTConfig, state: dict[str, Tensor]) -> Serialized:
    """Write the tensors by their names, and all fields of the config."""
    content = config_to_json(cfg)
    return Serialized(
        dict(state), json={SIDECAR: {"format_version": FORMAT_VERSION, _CONFIG: content}}
    )


def _file_name(name: str, _: ViTConfig) -> str:
    """Return a tensor's name, which is the same in the file."""
    return name


def _read_image_size(json: Json) -> tuple[int, int] | None:
    """Return pixels (height, width) of the positions from vitlib.json; None if it has none."""
    config = (json(SIDECAR) or {}).get(_CONFIG)
    size = config.get("image_size") if isinstance(config, dict) else None
    return to_pair("image_size", size) if size else sidecar_size(json)


LAYOUT = Layout(
    name="vitlib",
    profile="timm",
    find=_find,
    read=_read,
    write=_write,
    file_name=_file_name,
    read_image_size=_read_image_size,
)
