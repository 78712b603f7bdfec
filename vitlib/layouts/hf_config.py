"""config.json, key by key: what is said in a way of its own by a family or by a head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitlib.config import ViTConfig, is_number
from vitlib.errors import CheckpointError, ConfigError
from vitlib.layouts.held import Shape
from vitlib.layouts.hf_families import CLS, FAMILIES, Family

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
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
    if not isinstance(name, str) or name not in _ACTIVATIONS or config.get("use_gated_mlp"):
        raise CheckpointError(
            f"config.json has hidden_act {name!r}: vitlib computes {', '.join(_ACTIVATIONS)}, "
            "and silu where the MLP is gated"
        )
    return _ACTIVATIONS[name]


def special(dialect: str, config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """What some families say in keys of their own. Raises CheckpointError for what none can run."""
    if dialect == "dinov2":
        gated = values["activation"] == "swiglu"
        ratio = config.get("mlp_ratio", 4)
        return {"mlp_dim": _dinov2_mlp_dim(values["embed_dim"], ratio, gated)}
    if dialect == "dinov3":
        fixed = {"value_bias": values["qkv_bias"], "proj_bias": True, "mlp_bias": True}
        wrong = [f"{key} {config[key]}" for key, v in fixed.items() if config.get(key, v) is not v]
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
    if not isinstance(table, dict) or not all(isinstance(label, str) for label in table.values()):
        raise CheckpointError("config.json: expected id2label to map numbers to names")
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
