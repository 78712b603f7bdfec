"""The Hugging Face layout: names in `model.safetensors`, keys in `config.json`, both ways.

Names are pairs ours -> theirs; `{}` is the block's number, and a name without .weight or .bias
stands for both. Files hold `encoder.layer.0.attention.attention.query`; transformers 5 holds the
same tensor in memory as `layers.0.attention.q_proj`, and some tools save that: both are read, files
get the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vitlib.config import Pool, ViTConfig, is_number
from vitlib.errors import CheckpointError, ConfigError
from vitlib.layouts.table import Located, Shape, Theirs, contradictions, kept, locate, rename

_EMBED = {
    "patch_embed.cls_token": "embeddings.cls_token",
    "patch_embed.pos_embed": "embeddings.position_embeddings",
    "patch_embed.mask_token": "embeddings.mask_token",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_ATTENTION = {
    "blocks.{}.attn.q": "encoder.layer.{}.attention.attention.query",
    "blocks.{}.attn.k": "encoder.layer.{}.attention.attention.key",
    "blocks.{}.attn.v": "encoder.layer.{}.attention.attention.value",
    "blocks.{}.attn.out": "encoder.layer.{}.attention.output.dense",
}
_VIT = {
    **_EMBED,
    **_ATTENTION,
    "blocks.{}.norm1": "encoder.layer.{}.layernorm_before",
    "blocks.{}.norm2": "encoder.layer.{}.layernorm_after",
    "blocks.{}.mlp.fc1": "encoder.layer.{}.intermediate.dense",
    "blocks.{}.mlp.fc2": "encoder.layer.{}.output.dense",
    "pooler": "pooler.dense",
}
_VIT_IN_MEMORY: dict[str, Theirs] = {
    "blocks.{}.attn.q": "layers.{}.attention.q_proj",
    "blocks.{}.attn.k": "layers.{}.attention.k_proj",
    "blocks.{}.attn.v": "layers.{}.attention.v_proj",
    "blocks.{}.attn.out": "layers.{}.attention.o_proj",
    "blocks.{}.norm1": "layers.{}.layernorm_before",
    "blocks.{}.norm2": "layers.{}.layernorm_after",
    "blocks.{}.mlp.fc1": "layers.{}.mlp.fc1",
    "blocks.{}.mlp.fc2": "layers.{}.mlp.fc2",
}
_DINOV2 = {
    **_EMBED,
    **_ATTENTION,
    "patch_embed.reg_token": "embeddings.register_tokens",
    "blocks.{}.norm1": "encoder.layer.{}.norm1",
    "blocks.{}.norm2": "encoder.layer.{}.norm2",
    "blocks.{}.scale1": "encoder.layer.{}.layer_scale1.lambda1",
    "blocks.{}.scale2": "encoder.layer.{}.layer_scale2.lambda1",
    "blocks.{}.mlp.fc1": "encoder.layer.{}.mlp.fc1",
    "blocks.{}.mlp.fc2": "encoder.layer.{}.mlp.fc2",
}
_DINOV2_IN_MEMORY: dict[str, Theirs] = {
    "blocks.{}.attn.q": "encoder.layer.{}.attention.q_proj",
    "blocks.{}.attn.k": "encoder.layer.{}.attention.k_proj",
    "blocks.{}.attn.v": "encoder.layer.{}.attention.v_proj",
    "blocks.{}.attn.out": "encoder.layer.{}.attention.o_proj",
}
# What a SwiGLU has instead: one tensor in files, gate and up in memory.
_SWIGLU = {
    "blocks.{}.mlp.fc1": "encoder.layer.{}.mlp.weights_in",
    "blocks.{}.mlp.fc2": "encoder.layer.{}.mlp.weights_out",
}
_SWIGLU_IN_MEMORY: dict[str, Theirs] = {
    "blocks.{}.mlp.fc1": ("encoder.layer.{}.mlp.gate_proj", "encoder.layer.{}.mlp.up_proj"),
    "blocks.{}.mlp.fc2": "encoder.layer.{}.mlp.down_proj",
}
_HEAD = {"head": "classifier"}
_TWO_HEADS = {"head": "cls_classifier", "head_dist": "distillation_classifier"}

# ours -> the key of config.json, and what transformers takes where the key is missing.
_NUMBERS: dict[str, tuple[str, Any]] = {
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 16),
    "in_channels": ("num_channels", 3),
    "embed_dim": ("hidden_size", 768),
    "depth": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 12),
    "qkv_bias": ("qkv_bias", True),
    "dropout": ("hidden_dropout_prob", 0.0),
    "attention_dropout": ("attention_probs_dropout_prob", 0.0),
    "drop_path": ("drop_path_rate", 0.0),
}
_VIT_NUMBERS = {
    **_NUMBERS,
    "mlp_dim": ("intermediate_size", 3072),
    "norm_eps": ("layer_norm_eps", 1e-12),
}
_DINOV2_NUMBERS = {
    **_NUMBERS,
    "patch_size": ("patch_size", 14),
    "norm_eps": ("layer_norm_eps", 1e-6),
    "layer_scale": ("layerscale_value", 1.0),
}
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
_ACTIVATION_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the files of one `model_type` hold and mean."""

    model_type: str
    prefix: str  # of every tensor but the heads', in files that hold a head
    class_name: str  # of the transformers classes: <class_name>Model and so on
    names: Mapping[str, str]
    in_memory: Mapping[str, Theirs]
    numbers: Mapping[str, tuple[str, Any]]
    fixed: Mapping[str, Any]  # fields of ViTConfig that the family itself decides
    head_pool: Pool  # what the head of the family's classification class reads
    flat_mask: bool = False  # mask_token is (1, D) in files, not (1, 1, D)
    ignored: tuple[str, ...] = ("decoder.",)  # of masked pre-training, by how the names begin


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            model_type="vit",
            prefix="vit.",
            class_name="ViT",
            names=_VIT,
            in_memory=_VIT_IN_MEMORY,
            numbers=_VIT_NUMBERS,
            fixed={"position_resize": "bicubic"},
            head_pool="cls",
        ),
        Family(
            model_type="deit",
            prefix="deit.",
            class_name="DeiT",
            names={**_VIT, "patch_embed.dist_token": "embeddings.distillation_token"},
            in_memory=_VIT_IN_MEMORY,
            numbers=_VIT_NUMBERS,
            fixed={"position_resize": "bicubic", "dist_token": True},
            head_pool="cls",
        ),
        Family(
            model_type="dinov2",
            prefix="dinov2.",
            class_name="Dinov2",
            names=_DINOV2,
            in_memory=_DINOV2_IN_MEMORY,
            numbers=_DINOV2_NUMBERS,
            fixed={"position_resize": "bicubic_fp32"},
            head_pool="cls+mean",
            flat_mask=True,
        ),
        Family(
            model_type="dinov2_with_registers",
            prefix="dinov2_with_registers.",
            class_name="Dinov2WithRegisters",
            names=_DINOV2,
            in_memory=_DINOV2_IN_MEMORY,
            numbers={**_DINOV2_NUMBERS, "num_registers": ("num_register_tokens", 4)},
            fixed={"position_resize": "bicubic_antialias"},
            head_pool="cls+mean",
            flat_mask=True,
        ),
    )
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that a config.json names. Raises CheckpointError where vitlib reads none such."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"config.json has model_type {model_type!r}: vitlib reads {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def find(names: Iterable[str], family: Family) -> Located:
    """Which of a file's tensors are which of ours, in either spelling, prefixed or not, each."""
    tables = (family.names, family.in_memory, _HEAD, _TWO_HEADS, _SWIGLU, _SWIGLU_IN_MEMORY)
    return locate(names, tables, prefix=family.prefix, ignored=family.ignored)


def read_config(
    config: Mapping[str, Any], shapes: Mapping[str, Shape], family: Family
) -> ViTConfig:
    """config.json and the shapes of the tensors found, by our names -> what the model is.

    Raises CheckpointError where the two contradict each other, ConfigError where no ViT is so.
    """
    values = {ours: config.get(key, default) for ours, (key, default) in family.numbers.items()}
    values |= family.fixed
    values["activation"] = _activation(config)
    if "mlp_dim" not in family.numbers:
        values["mlp_dim"] = _dinov2_mlp_dim(
            values["embed_dim"], config.get("mlp_ratio", 4), values["activation"] == "swiglu"
        )
    values |= _read_head(config, shapes, family)
    values |= kept(shapes)
    if values["pooler_dim"] and config.get("pooler_act", "tanh") != "tanh":
        raise CheckpointError(f"config.json has pooler_act {config['pooler_act']!r}: not tanh")
    keys = {ours: key for ours, (key, _) in family.numbers.items()}
    keys |= {"mlp_dim": keys.get("mlp_dim", "mlp_ratio"), "num_classes": "the number of labels"}
    clashes = contradictions(values, shapes)
    if clashes:
        told = "; ".join(
            f"{keys.get(ours, ours)} {said} (the tensors have {held})"
            for ours, said, held in clashes
        )
        raise CheckpointError(f"config.json contradicts the tensors: {told}")
    return ViTConfig(family=family.model_type, **values)


def _activation(config: Mapping[str, Any]) -> str:
    if config.get("use_swiglu_ffn", False):
        return "swiglu"
    name = config.get("hidden_act", "gelu")
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise CheckpointError(
            f"config.json has hidden_act {name!r}: vitlib computes {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _dinov2_mlp_dim(embed_dim: Any, ratio: Any, gated: bool) -> int:
    """Width of DINOv2's MLP; of a SwiGLU two thirds, rounded up to a multiple of 8."""
    if not is_number(embed_dim) or not is_number(ratio) or not 0 < ratio < 10_000:
        raise CheckpointError(
            f"config.json has hidden_size {embed_dim!r}, mlp_ratio {ratio!r}: expected two numbers"
        )
    width = int(embed_dim * ratio)
    return (int(width * 2 / 3) + 7) // 8 * 8 if gated else width


def _read_head(
    config: Mapping[str, Any], shapes: Mapping[str, Shape], family: Family
) -> dict[str, Any]:
    """num_classes, labels, pool and problem_type: a head is there in the tensors or in the name."""
    classes = config.get("architectures")
    named = str(classes[0]) if isinstance(classes, list) and classes else ""
    if "head.weight" not in shapes and "ForImageClassification" not in named:
        return {}
    labels = _labels(config)
    rows = shapes.get("head.weight") or (0,)
    count = len(labels) or config.get("num_labels") or rows[0] or 2  # transformers' default is 2
    if rows[0] and rows[0] != count:
        raise CheckpointError(
            f"config.json contradicts the tensors: {count} labels, a head of {rows[0]} classes"
        )
    return {
        "num_classes": count,
        "labels": labels,
        "problem_type": config.get("problem_type"),
        "pool": family.head_pool,
        "dist_head": "head_dist.weight" in shapes or named.endswith("WithTeacher"),
    }


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """id2label in order, or () where the config has none."""
    table = config.get("id2label") or {}
    if not isinstance(table, dict) or not all(isinstance(label, str) for label in table.values()):
        raise CheckpointError("config.json: expected id2label to map numbers to names")
    try:
        return tuple(table[str(number)] for number in range(len(table)))
    except KeyError as error:
        raise CheckpointError(
            f"config.json: expected id2label to number {len(table)} labels from 0, found no {error}"
        ) from error


def write_config(cfg: ViTConfig, dtype: str) -> dict[str, Any]:
    """What the model is -> config.json. Raises ConfigError where the layout cannot say it."""
    family = _writable(cfg)
    config = {key: getattr(cfg, ours) for ours, (key, _) in family.numbers.items()}
    for key in ("image_size", "patch_size"):  # one number wherever one will do: older tools want it
        config[key] = config[key][0] if len(set(config[key])) == 1 else list(config[key])
    kind = "Model"
    if cfg.num_classes:
        kind = "ForImageClassification" + ("WithTeacher" if cfg.dist_head else "")
        names = cfg.labels or tuple(f"LABEL_{i}" for i in range(cfg.num_classes))
        config["id2label"] = {str(i): label for i, label in enumerate(names)}
        config["label2id"] = {label: i for i, label in enumerate(names)}
    config |= {
        "architectures": [family.class_name + kind],
        "model_type": family.model_type,
        "hidden_act": _ACTIVATION_NAMES.get(cfg.activation, "gelu"),
        "dtype": dtype,
    }
    if cfg.problem_type is not None:
        config["problem_type"] = cfg.problem_type
    if cfg.pooler_dim:
        config |= {"pooler_output_size": cfg.pooler_dim, "pooler_act": "tanh"}
    if "mlp_dim" not in family.numbers:
        config["mlp_ratio"] = _dinov2_mlp_ratio(cfg)
        config["use_swiglu_ffn"] = cfg.activation == "swiglu"
        config["use_mask_token"] = cfg.mask_token
    return config


def _dinov2_mlp_ratio(cfg: ViTConfig) -> float:
    """The ratio that gives this width of MLP: 4 where it does, as in every published DINOv2."""
    gated = cfg.activation == "swiglu"
    for ratio in (4, cfg.mlp_dim / cfg.embed_dim * (1.5 if gated else 1.0)):
        if _dinov2_mlp_dim(cfg.embed_dim, ratio, gated) == cfg.mlp_dim:
            return int(ratio) if float(ratio).is_integer() else ratio
    raise ConfigError(f"no mlp_ratio gives mlp_dim={cfg.mlp_dim}: Hugging Face cannot say it")


def _writable(cfg: ViTConfig) -> Family:
    """The family, where all that the model does is what the family's class in transformers does."""
    if cfg.family not in FAMILIES:
        raise ConfigError(f"family={cfg.family!r}: Hugging Face files are of {', '.join(FAMILIES)}")
    family = FAMILIES[cfg.family]
    dinov2 = "mlp_dim" not in family.numbers
    wanted: dict[str, tuple[Any, ...]] = {
        "class_token": (True,),
        "dist_token": (False,),
        **{name: (value,) for name, value in family.fixed.items()},
        "pool": ("cls", "cls+mean") if dinov2 else ("cls",),
    }
    if "num_registers" not in family.numbers:
        wanted["num_registers"] = (0,)
    if not dinov2:
        wanted |= {"layer_scale": (None,), "activation": tuple(_ACTIVATION_NAMES)}
    wrong = [
        f"{name}={getattr(cfg, name)!r}"
        for name, allowed in wanted.items()
        if getattr(cfg, name) not in allowed
    ]
    if dinov2 and cfg.layer_scale is None:
        wrong.append("layer_scale=None")
    if wrong:
        raise ConfigError(
            f"transformers' {family.class_name} cannot run a model with {', '.join(wrong)}: "
            "it would open the files and give other numbers"
        )
    return family


def write_name(ours: str, cfg: ViTConfig) -> str:
    """Our name of a tensor -> its name in a file of this model; ours where files have none."""
    family = FAMILIES[cfg.family]
    heads = _TWO_HEADS if cfg.dist_head else _HEAD
    names = {**family.names, **_SWIGLU} if cfg.activation == "swiglu" else family.names
    try:
        if ours.partition(".")[0] in heads:
            return rename(ours, heads)
        return (family.prefix if cfg.num_classes else "") + rename(ours, names)
    except KeyError:
        return ours
