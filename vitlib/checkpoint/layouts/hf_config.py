"""config.json, key by key: what is said in a way of its own by a family or by a head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vitlib.checkpoint.layouts.hf_families import CLS, FAMILIES, Family
from vitlib.checkpoint.layouts.infer import Shape, square_side
from vitlib.checkpoint.layouts.table import NameMatch
from vitlib.config import ViTConfig, is_number, to_pair
from vitlib.errors import CheckpointError, ConfigError

# transformers' names of three functions; gelu_10 is another, which it cuts off at 10.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
ACTIVATION_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}


def activation(config: Mapping[str, Any], family: Family) -> str:
    """hidden_act, or the gated MLP that two families say in other keys. Raises CheckpointError."""
    if config.get("use_swiglu_ffn", False):
        return "swiglu"
    name = config.get("hidden_act", family.activation)
    if config.get("use_gated_mlp", False) and name == "silu":
        return "swiglu"
    if not isinstance(name, str) or name not in ACTIVATIONS or config.get("use_gated_mlp"):
        raise CheckpointError(
            f"config.json has hidden_act {name!r}: vitlib computes {', '.join(ACTIVATIONS)}, "
            "and silu where the MLP is gated"
        )
    return ACTIVATIONS[name]


def special(dialect: str, config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """What some families say in keys of their own. Raises CheckpointError for what none can run."""
    if dialect == "dinov2":
        gated = values["activation"] == "swiglu"
        ratio = config.get("mlp_ratio", 4)
        return {"mlp_dim": _dinov2_mlp_dim(values["embed_dim"], ratio, gated)}
    if dialect == "siglip2":
        return {"image_size": naflex_size(config, FAMILIES["siglip"])}
    if dialect == "janus":
        return _janus(config, values)
    if dialect == "idefics":
        _refuse_moved_positions(values)
    if dialect == "dinov3":
        fixed = {"value_bias": values["qkv_bias"], "proj_bias": True, "mlp_bias": True}
        wrong = [f"{key} {config[key]}" for key, v in fixed.items() if config.get(key, v) is not v]
        if values["key_bias"] and not values["qkv_bias"]:
            wrong.append("key_bias True with query_bias False")
        if wrong:
            raise CheckpointError(f"config.json has {', '.join(wrong)}: not in vitlib's block")
    if dialect == "beit":
        shared = bool(config.get("use_shared_relative_position_bias", False))
        block = bool(config.get("use_relative_position_bias", False))
        if shared and block:
            raise CheckpointError("config.json has a shared and a per-block relative position bias")
        return {
            "relative_position": "block" if block else "shared" if shared else None,
            "relative_resize": "bilinear",
            "layer_scale": values["layer_scale"] or None,
        }
    return {}


def naflex_size(config: Mapping[str, Any], family: Family) -> tuple[int, int]:
    """Pixels of the square grid that SigLIP 2 NaFlex learned. Raises CheckpointError."""
    count = config.get("num_patches", 256)
    p, q = to_pair("patch_size", config.get("patch_size", family.numbers["patch_size"][1]))
    side = square_side(count) if isinstance(count, int) else 0
    if not side:
        raise CheckpointError(f"config.json has num_patches {count!r}: expected a square number")
    return side * p, side * q


def _janus(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Janus's width of MLP, a ratio; its norms of queries and keys are refused."""
    ratio = config.get("mlp_ratio", 4.0)
    if config.get("use_qk_norm", False) or not is_number(ratio) or not 0 < ratio < 10_000:
        raise CheckpointError(
            f"config.json has use_qk_norm {config.get('use_qk_norm')!r}, mlp_ratio {ratio!r}: "
            "expected false and a number"
        )
    return {
        "mlp_dim": int(values["embed_dim"] * ratio),
        "qkv_bias": bool(config.get("attention_bias", True)),
    }


def _refuse_moved_positions(values: Mapping[str, Any]) -> None:
    """Idefics looks its positions up by fractions, in float32: on some grids they fall beside."""
    side = to_pair("image_size", values["image_size"])[0] // max(
        to_pair("patch_size", values["patch_size"])[0], 1
    )
    numbers = torch.arange(side, dtype=torch.float32)
    places = numbers * (1.0 / torch.tensor([side], dtype=torch.float32))
    edges = torch.arange(1 / max(side, 1), 1.0, 1 / max(side, 1), dtype=torch.float32)
    found = torch.bucketize(places.clamp(max=1 - 1e-6), edges, right=True)
    if not torch.equal(found, torch.arange(side, dtype=torch.int64)):
        raise CheckpointError(
            f"config.json has {side}x{side} patches, of which transformers' rounding gives some "
            "the position of their neighbour: vitlib does not"
        )


def is_turned(cfg: ViTConfig) -> bool:
    """Return whether transformers reads the table of relative positions with its axes exchanged.

    BeitRelativePositionBias reshapes the table to (width, height), which only a square grid allows.
    """
    return cfg.relative_position is not None and cfg.grid_size[0] != cfg.grid_size[1]


def refuse_turned_table(cfg: ViTConfig) -> None:
    """Refuse relative positions of a grid that is not square.

    Args:
        cfg: The model, as a file of transformers says it.

    Raises:
        CheckpointError: transformers exchanges height and width of the table; vitlib does not.
    """
    if is_turned(cfg):
        h, w = cfg.grid_size
        raise CheckpointError(
            f"relative positions of a grid of {h}x{w} patches: transformers exchanges its height "
            "and width, which vitlib does not: where the table is by height and width, as timm "
            "and BEiT's own code have it, give config=ViTConfig(...)"
        )


# The types whose attention takes its width from head_dim; all others pass the key over.
_READ_HEAD_DIM = {"vit", "deit", "vit_mae", "vit_msn", "ijepa", "beit"}
_READ_HEAD_DIM |= {"dinov2", "dinov2_with_registers"}


def refuse_head_dim(family: Family, flat: Mapping[str, Any], cfg: ViTConfig) -> None:
    """Refuse a head_dim that is not the width of the model by the number of its heads.

    Args:
        family: How the ViT's model_type says things.
        flat: The ViT's own config.
        cfg: What it says of the model.

    Raises:
        CheckpointError: transformers would build, or fail to build, attention of another width.
    """
    value = flat.get("head_dim", cfg.head_dim)
    if family.model_type in _READ_HEAD_DIM and value != cfg.head_dim:
        raise CheckpointError(
            f"config.json has head_dim {value!r}, and hidden_size {cfg.embed_dim} by "
            f"{cfg.num_heads} heads is {cfg.head_dim}: put that there, or take head_dim out"
        )


def beit_norm(name_match: NameMatch | None, *, has_head: bool) -> dict[str, Any]:
    """Return what BEiT pools and norms, by the names of its tensors.

    Args:
        name_match: The tensors of the file; None: there are none, and BEiT's default is returned.
        has_head: The model has a classifier, which transformers never builds without a norm.

    Returns:
        pool and final_norm of ViTConfig.
    """
    norm = _beit_norm_name(name_match)
    if norm == _MASKED_NORM:
        return {"pool": "cls", "final_norm": "none"}
    if norm and not norm.endswith(_POOLER_NORM):
        return CLS
    if name_match is not None and not norm and not has_head:
        return {"pool": "mean", "final_norm": "none"}  # its base model without a pooler
    return {"pool": "mean", "final_norm": "pooled"}


_POOLER_NORM = "pooler.layernorm.weight"
_MASKED_NORM = "the norm of a masked head"


def _beit_norm_name(name_match: NameMatch | None) -> str:
    """Return the file's name of BEiT's last norm, _MASKED_NORM, or "" where there is none."""
    if name_match is None or "norm.weight" not in name_match.matches:
        return ""
    name = name_match.file_name("norm.weight")
    inner = ("beit.", "data2vec_vision.")
    if name == "layernorm.weight" and any(
        part.file_name.startswith(inner) for parts in name_match.matches.values() for part in parts
    ):
        return _MASKED_NORM
    return name


def contradicted_parts(
    config: Mapping[str, Any],
    flat: Mapping[str, Any],
    family: Family,
    shapes: Mapping[str, Shape],
    name_match: NameMatch | None,
) -> list[tuple[str, Any, Any]]:
    """Return the keys that say another pooler, projection or pooling head than the tensors have.

    transformers drops such tensors, or draws new ones at random, with no more than a warning.

    Args:
        config: The whole config.json.
        flat: The part of it that describes the ViT; the same where there is one part.
        family: How the ViT's model_type says things.
        shapes: The shapes of the tensors, by vitlib's names.
        name_match: The tensors by the file's names; None: there is no file.

    Returns:
        (key, value in config.json, value in the tensors) of each contradiction.
    """
    if name_match is None:
        return []
    clashes: list[tuple[str, Any, Any]] = []
    stated = {
        "projection_dim": (config.get("projection_dim"), shapes.get("projection.weight")),
        "pooler_output_size": (flat.get("pooler_output_size"), shapes.get("pooler.weight")),
    }
    for key, (value, shape) in stated.items():
        if value is not None and shape and value != shape[0]:
            clashes.append((key, value, shape[0]))
    if family.dialect in ("siglip", "siglip2") and "head.weight" not in shapes:
        has_head = any(name.startswith("attn_pool.") for name in shapes)
        # A tower inside another model (LLaVA) gives its tokens: without a word on a head it may
        # have none. SigLIP itself would draw one at random.
        is_siglip = str(config.get("model_type")).startswith("siglip")
        pools = bool(flat.get("vision_use_head", is_siglip or has_head))
        if pools != has_head:
            actual = "no pooling head" if pools else "a pooling head"
            clashes.append(("vision_use_head", pools, actual))
    norm = _beit_norm_name(name_match) if family.dialect == "beit" else ""
    if norm and norm != _MASKED_NORM:
        mean = bool(flat.get("use_mean_pooling", True))
        if mean != norm.endswith(_POOLER_NORM):
            clashes.append(("use_mean_pooling", mean, norm))
    return clashes


def _dinov2_mlp_dim(embed_dim: Any, ratio: Any, gated: bool) -> int:
    """Width of DINOv2's MLP; of a SwiGLU two thirds, rounded up to a multiple of 8."""
    if not is_number(embed_dim) or not is_number(ratio) or not 0 < ratio < 10_000:
        raise CheckpointError(
            f"config.json has hidden_size {embed_dim!r}, mlp_ratio {ratio!r}: expected two numbers"
        )
    width = int(embed_dim * ratio)
    return (int(width * 2 / 3) + 7) // 8 * 8 if gated else width


def read_head(
    config: Mapping[str, Any], shapes: Mapping[str, Shape], family: Family
) -> dict[str, Any]:
    """num_classes, labels, pool and problem_type: a head is there in the tensors or in the name."""
    classes = config.get("architectures")
    named = str(classes[0]) if isinstance(classes, list) and classes else ""
    if "head.weight" not in shapes and "ForImageClassification" not in named:
        return dict(family.base)
    labels = read_labels(config)
    rows = shapes.get("head.weight") or (0,)
    count = len(labels) or config.get("num_labels") or rows[0] or 2  # transformers' default is 2
    if rows[0] and rows[0] != count:
        raise CheckpointError(
            f"config.json contradicts the tensors: {count} labels, a head of {rows[0]} classes"
        )
    return {
        **(CLS if family.head is None else family.head),
        "num_classes": count,
        "labels": labels,
        "problem_type": config.get("problem_type"),
        "dist_head": "head_dist.weight" in shapes or named.endswith("WithTeacher"),
    }


def read_labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """id2label in order, or () where the config has none."""
    table = config.get("id2label") or {}
    if not isinstance(table, dict) or not all(
        isinstance(label, str | int | float) for label in table.values()
    ):
        raise CheckpointError("config.json: expected id2label to map numbers to names")
    table = {number: str(label) for number, label in table.items()}
    if all(label == f"LABEL_{number}" for number, label in table.items()):
        return ()  # what transformers writes where nobody named the classes
    try:
        return tuple(table[str(number)] for number in range(len(table)))
    except KeyError as error:
        raise CheckpointError(
            f"config.json: expected id2label to number {len(table)} labels from 0, found no {error}"
        ) from error


def write_config(cfg: ViTConfig, dtype: str) -> dict[str, Any]:
    """What the model is, of a family that transformers has -> config.json."""
    family = FAMILIES[cfg.family]
    numbers = {key: getattr(cfg, ours) for ours, (key, _) in family.numbers.items()}
    for key in ("image_size", "patch_size"):  # one number wherever one will do: older tools want it
        numbers[key] = numbers[key][0] if len(set(numbers[key])) == 1 else list(numbers[key])
    numbers["hidden_act"] = ACTIVATION_NAMES.get(cfg.activation, "gelu")
    numbers |= _write_special(cfg)
    kind = "Model"
    labels: dict[str, Any] = {}
    if cfg.num_classes:
        kind = "ForImageClassification" + ("WithTeacher" if cfg.dist_head else "")
        told = cfg.labels or tuple(f"LABEL_{i}" for i in range(cfg.num_classes))
        labels["id2label"] = {str(i): label for i, label in enumerate(told)}
        labels["label2id"] = {label: i for i, label in enumerate(told)}
    if cfg.problem_type is not None:
        labels["problem_type"] = cfg.problem_type
    if cfg.projection_dim:
        kind = "ModelWithProjection"
    config = {**numbers, **labels}
    class_name, model_type = family.class_name, family.model_type
    if cfg.num_classes and family.nested is not None:
        class_name, model_type = class_name.removesuffix("Vision"), family.nested
        config = {**labels, "vision_config": {**numbers, "model_type": family.model_type}}
    return {
        "architectures": [class_name + kind],
        **config,
        "model_type": model_type,
        "dtype": dtype,
    }


def _write_special(cfg: ViTConfig) -> dict[str, Any]:
    """What one family says in a way of its own."""
    special: dict[str, Any] = {}
    dialect = FAMILIES[cfg.family].dialect
    gated = cfg.activation == "swiglu"
    if cfg.pooler_dim:
        special |= {"pooler_output_size": cfg.pooler_dim, "pooler_act": "tanh"}
    if dialect == "dinov2":
        special["mlp_ratio"] = _dinov2_mlp_ratio(cfg)
        special |= {"use_swiglu_ffn": gated, "use_mask_token": cfg.mask_token}
    if dialect == "dinov3":
        special |= {"use_gated_mlp": gated, "value_bias": cfg.qkv_bias}
        special |= {"hidden_act": "silu"} if gated else {}
        special["key_bias"] = cfg.qkv_bias and cfg.key_bias
    if dialect == "mae":
        special["mask_ratio"] = 0.0  # an encoder hides no patches; transformers' default is 0.75
    if dialect == "clip":
        special["projection_dim"] = cfg.projection_dim or 512
    if dialect == "siglip":
        special["vision_use_head"] = cfg.attention_pool
    if dialect == "beit":
        special |= {
            "use_relative_position_bias": cfg.relative_position == "block",
            "use_shared_relative_position_bias": cfg.relative_position == "shared",
            "use_mean_pooling": cfg.final_norm == "pooled",
            "use_mask_token": cfg.mask_token,
            "layer_scale_init_value": float(cfg.layer_scale or 0),
        }
    return special


def _dinov2_mlp_ratio(cfg: ViTConfig) -> int:
    """The whole ratio that gives this width of MLP: transformers 5 takes no other."""
    gated = cfg.activation == "swiglu"
    ratio: int
    for ratio in (4, *range(1, 100)):
        if _dinov2_mlp_dim(cfg.embed_dim, ratio, gated) == cfg.mlp_dim:
            return ratio
    raise ConfigError(f"mlp_dim={cfg.mlp_dim}: Hugging Face's DINOv2 has a whole mlp_ratio")
