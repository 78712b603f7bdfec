"""Keys of config.json that every family's config has, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitlib.checkpoint.families import get_family
from vitlib.checkpoint.families.family import CLS, Config, HfType, Mismatch, Shapes
from vitlib.checkpoint.layouts.table import NameMatch
from vitlib.config import ViTConfig
from vitlib.errors import CheckpointError

# transformers' names of three functions; gelu_10 is another function, cut off at 10.
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


def parse_activation(config: Config, hf_type: HfType) -> str:
    """Read the activation: hidden_act, or a gated MLP, which two families say in other keys.

    Args:
        config: The ViT's own config.
        hf_type: How its model_type says things.

    Returns:
        `ViTConfig.activation`.

    Raises:
        CheckpointError: vitlib does not compute the activation.
    """
    if config.get("use_swiglu_ffn", False):
        return "swiglu"
    name = config.get("hidden_act", hf_type.activation)
    gated = config.get("use_gated_mlp", hf_type.gated)
    if gated and name == "silu":
        return "swiglu"
    if not isinstance(name, str) or name not in ACTIVATIONS or gated:
        raise CheckpointError(
            f"config.json has hidden_act {name!r}: vitlib computes {', '.join(ACTIVATIONS)}, "
            "and silu where the MLP is gated"
        )
    return ACTIVATIONS[name]


def has_transposed_table(cfg: ViTConfig) -> bool:
    """Return True if transformers reads the relative positions with their axes exchanged.

    BeitRelativePositionBias reshapes the table to (width, height), which only a square grid allows.

    Args:
        cfg: The model.

    Returns:
        True for relative positions of a grid that is not square.
    """
    return cfg.positions.relative is not None and cfg.grid_size[0] != cfg.grid_size[1]


def refuse_transposed_table(cfg: ViTConfig) -> None:
    """Refuse relative positions of a grid that is not square.

    Args:
        cfg: The model, as a file of transformers describes it.

    Raises:
        CheckpointError: transformers exchanges height and width of the table; vitlib does not.
    """
    if has_transposed_table(cfg):
        h, w = cfg.grid_size
        raise CheckpointError(
            f"relative positions of a grid of {h}x{w} patches: transformers exchanges its height "
            "and width, which vitlib does not: where the table is by height and width, as timm "
            "and BEiT's own code have it, give config=ViTConfig(...)"
        )


def refuse_head_dim(hf_type: HfType, values: Config, cfg: ViTConfig) -> None:
    """Refuse a head_dim that is not the width of the model by the number of its heads.

    Args:
        hf_type: How the ViT's model_type says things.
        values: The ViT's own config.
        cfg: What it says of the model.

    Raises:
        CheckpointError: transformers would build, or fail to build, attention of another width.
    """
    value = values.get("head_dim", cfg.head_dim)
    if hf_type.reads_head_dim and value != cfg.head_dim:
        raise CheckpointError(
            f"config.json has head_dim {value!r}, and hidden_size {cfg.embed_dim} by "
            f"{cfg.num_heads} heads is {cfg.head_dim}: put that there, or take head_dim out"
        )


def list_part_mismatches(
    config: Config, values: Config, hf_type: HfType, shapes: Shapes, name_match: NameMatch | None
) -> list[Mismatch]:
    """List the keys that say another pooler, projection or pooling head than the tensors have.

    transformers drops such tensors, or draws new ones at random, with no more than a warning.

    Args:
        config: The whole config.json.
        values: The part of it that describes the ViT; the same where there is one part.
        hf_type: How the ViT's model_type says things.
        shapes: The shapes of the tensors, by vitlib's names.
        name_match: The tensors by the file's names; None: there is no file.

    Returns:
        (key, value in config.json, value in the tensors) of each.
    """
    if name_match is None:
        return []
    sizes = {
        "projection_dim": (config.get("projection_dim"), shapes.get("projection.weight")),
        "pooler_output_size": (values.get("pooler_output_size"), shapes.get("pooler.weight")),
    }
    mismatches: list[Mismatch] = [
        (key, value, shape[0])
        for key, (value, shape) in sizes.items()
        if value is not None and shape and value != shape[0]
    ]
    return mismatches + hf_type.list_mismatches(config, values, shapes, name_match)


def read_head(config: Config, shapes: Shapes, hf_type: HfType) -> dict[str, Any]:
    """Read the head, which the tensors or the name of the class say is there.

    Args:
        config: The whole config.json.
        shapes: The shapes of the tensors, by vitlib's names.
        hf_type: How the ViT's model_type says things.

    Returns:
        pool and final_norm, and with a head num_classes, labels, problem_type and dist_head.

    Raises:
        CheckpointError: The labels are not as many as the head's rows.
    """
    classes = config.get("architectures")
    class_name = str(classes[0]) if isinstance(classes, list) and classes else ""
    # ShieldGemma 2 classifies by the words that it generates.
    is_own = hf_type.model_type.startswith(str(config.get("model_type")))
    names_head = "ForImageClassification" in class_name and is_own
    if "head.weight" not in shapes and not names_head:
        return dict(hf_type.base)
    labels = read_labels(config)
    rows = shapes.get("head.weight") or (0,)
    count = len(labels) or config.get("num_labels") or rows[0] or 2  # transformers' default is 2
    if rows[0] and rows[0] != count:
        raise CheckpointError(
            f"config.json contradicts the tensors: {count} labels, a head of {rows[0]} classes"
        )
    return {
        **(CLS if hf_type.head is None else hf_type.head),
        "num_classes": count,
        "labels": labels,
        "problem_type": config.get("problem_type"),
        "dist_head": "head_dist.weight" in shapes or class_name.endswith("WithTeacher"),
    }


def fit_pool(fields: dict[str, Any]) -> None:
    """Set the pool to one that the tensors allow.

    Args:
        fields: Of ViTConfig; changed in place.
    """
    if fields["pool"] == "map" and not fields["attention_pool"]:
        fields["pool"] = "mean"
    if fields["projection_dim"] and fields["pooler_dim"]:
        fields["pool"] = "pooler"  # vision-text-dual-encoder projects the pooler's output


def read_labels(config: Config) -> tuple[str, ...]:
    """Read id2label.

    Args:
        config: The whole config.json.

    Returns:
        The labels in order; empty where nobody named the classes.

    Raises:
        CheckpointError: id2label does not number names from 0.
    """
    table = config.get("id2label") or {}
    if not isinstance(table, dict) or not all(
        isinstance(label, str | int | float) for label in table.values()
    ):
        raise CheckpointError("config.json: expected id2label to map numbers to names")
    table = {number: str(label) for number, label in table.items()}
    if all(label == f"LABEL_{number}" for number, label in table.items()):
        return ()  # transformers writes these where nobody named the classes
    try:
        return tuple(table[str(number)] for number in range(len(table)))
    except KeyError as error:
        raise CheckpointError(
            f"config.json: expected id2label to number {len(table)} labels from 0, found no {error}"
        ) from error


def write_config(cfg: ViTConfig, dtype: str) -> dict[str, Any]:
    """Describe a model of a family that transformers has as config.json.

    Args:
        cfg: The model.
        dtype: Of its weights, as torch names it.

    Returns:
        The file's content.
    """
    hf_type = get_family(cfg.family).choose_hf(cfg)
    assert hf_type is not None
    numbers = {key: getattr(cfg, name) for name, (key, _) in hf_type.numbers.items()}
    # Older tools read one number, where one is enough.
    for key in (hf_type.numbers[name][0] for name in ("image_size", "patch_size")):
        numbers[key] = numbers[key][0] if len(set(numbers[key])) == 1 else list(numbers[key])
    numbers["hidden_act"] = ACTIVATION_NAMES.get(cfg.activation, "gelu")
    if cfg.outputs.pooler_dim:
        numbers |= {"pooler_output_size": cfg.outputs.pooler_dim, "pooler_act": "tanh"}
    numbers |= hf_type.write_more(cfg)
    kind = "Model"
    labels: dict[str, Any] = {}
    if cfg.num_classes:
        kind = "ForImageClassification" + ("WithTeacher" if cfg.outputs.dist_head else "")
        names = cfg.labels or tuple(f"LABEL_{i}" for i in range(cfg.num_classes))
        labels["id2label"] = {str(i): label for i, label in enumerate(names)}
        labels["label2id"] = {label: i for i, label in enumerate(names)}
    if cfg.problem_type is not None:
        labels["problem_type"] = cfg.problem_type
    if cfg.outputs.projection_dim:
        kind = "ModelWithProjection"
    config: Mapping[str, Any] = {**numbers, **labels}
    class_name, model_type = hf_type.class_name, hf_type.model_type
    if cfg.num_classes and hf_type.nested is not None:
        class_name, model_type = class_name.removesuffix("Vision"), hf_type.nested
        config = {**labels, "vision_config": {**numbers, "model_type": hf_type.model_type}}
    return {
        "architectures": [class_name + kind],
        **config,
        "model_type": model_type,
        "dtype": dtype,
    }
