"""The ViTConfig of a published architecture, by its name in timm or open_clip.

It is the config that load() gives a checkpoint of the architecture: the table of the library says
the sizes and the facts, and the library's profile the numerics.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from vitlib.checkpoint.families import with_profile
from vitlib.checkpoint.layouts import openclip_models, timm_models
from vitlib.checkpoint.layouts.hf_types import (
    list_containers,
    list_published,
    list_reasons,
    list_types,
)
from vitlib.checkpoint.layouts.timm_args import POOLS
from vitlib.checkpoint.layouts.timm_config import infer_family
from vitlib.config import SIZES, ViTConfig, config_to_json
from vitlib.config_parts import Pooling
from vitlib.errors import CheckpointError, ConfigError, to_pair

_NUM_SHOWN = 3


def build_named_config(
    name: str,
    *,
    image_size: int | tuple[int, int] | None = None,
    in_channels: int = 3,
    num_classes: int | None = None,
) -> ViTConfig:
    """Build the config of a published architecture.

    Args:
        name: A name of timm, current or older, with or without the tag of weights; or a name of
            a config of open_clip.
        image_size: Pixels, (height, width) or an int for a square; None: the published size.
        in_channels: Channels of an image.
        num_classes: Number of classes. None: no head in timm's architectures, and the embedding
            that open_clip computes in its configs.

    Returns:
        The config.

    Raises:
        ConfigError: There is no such architecture, or vitlib does not compute it.
    """
    text, rows = str(name), openclip_models.load_rows()
    try:
        if find_timm(text) is not None:
            cfg = _read_timm(text)
        elif text in rows:
            cfg = read_openclip(rows[text])
        else:
            raise ConfigError(_explain_unknown(name))
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    size = cfg.image_size if image_size is None else to_pair("image_size", image_size)
    classes = cfg.num_classes if num_classes is None else num_classes
    # timm's distilled models have a second head with the first.
    has_two_heads = cfg.tokens.dist and cfg.pool == "cls" and bool(classes)
    return replace(
        cfg,
        image_size=size,
        in_channels=in_channels,
        num_classes=classes,
        outputs=replace(cfg.outputs, dist_head=has_two_heads),
    )


def read_openclip(row: openclip_models.Row) -> ViTConfig:
    """Build the config of an image tower of open_clip.

    Args:
        row: A row of open_clip's table.

    Returns:
        The config.

    Raises:
        CheckpointError: vitlib does not compute the tower.
    """
    reason = explain_openclip_refusal(row)
    if reason:
        raise CheckpointError(f"open_clip's tower {row['name']!r} is not read: {reason}")
    if not row["timm_model_name"]:
        tower = openclip_models.parse_tower(row)
        return with_profile(ViTConfig(family="clip", **tower), "original")
    cfg = _read_timm(row["timm_model_name"], row["timm_pool"])
    width = int(row["output_dim"])
    # open_clip projects by a layer of its own, or else by the head of timm's model.
    if row["timm_proj"] == "linear":
        return replace(cfg, outputs=replace(cfg.outputs, projection_dim=width))
    return cfg if row["timm_proj"] == "none" else replace(cfg, num_classes=width)


def explain_openclip_refusal(row: openclip_models.Row) -> str:
    """Explain why vitlib does not compute an image tower of open_clip.

    Args:
        row: A row of open_clip's table.

    Returns:
        The reason; empty if vitlib computes the tower.
    """
    name = row["timm_model_name"]
    model = find_timm(name) if name else None
    if name and model is None:
        return f"timm's {name!r}, which is no plain ViT"
    if model is not None and model.reason:
        return f"timm's {name!r}: {model.reason}"
    return openclip_models.explain_refusal(row)


def find_timm(name: str) -> timm_models.Architecture | None:
    """Find an architecture of timm, also one that vitlib does not compute.

    Args:
        name: A current or older name, with or without the tag of weights.

    Returns:
        The architecture; None if timm's table has no such name.
    """
    current = timm_models.normalize_name(name)
    models = (model for model in timm_models.list_architectures() if model.name == current)
    return next(models, None)


def list_names() -> list[str]:
    """List the names that build_named_config computes, without those that it refuses."""
    current = [model.name for model in timm_models.list_architectures() if not model.reason]
    old = [name for name, new in timm_models.list_old_names().items() if new in current]
    rows = openclip_models.load_rows()
    towers = [name for name, row in rows.items() if not explain_openclip_refusal(row)]
    return [*current, *old, *towers]


def find_nearest(name: str, names: Iterable[str]) -> str:
    """Find the names most similar to a misspelled one.

    Args:
        name: The misspelled name.
        names: The right names.

    Returns:
        The end of a sentence; empty if no name is similar.
    """
    by_lower = {candidate.lower(): candidate for candidate in names}
    close = difflib.get_close_matches(name.lower(), by_lower, _NUM_SHOWN)
    return f"; the nearest are {', '.join(by_lower[lower] for lower in close)}" if close else ""


def _read_timm(name: str, global_pool: str = "") -> ViTConfig:
    """Build the config of an architecture of timm; raise CheckpointError if it is refused.

    A global_pool replaces the architecture's own pool, as the argument of timm.create_model does.
    """
    model = timm_models.get_architecture(name)
    values = _convert_columns({**model.structure, **model.facts})
    pool = POOLS.get(global_pool, values["pool"])
    if pool != values["pool"]:
        # timm moves the norm behind a mean, and before any other pool.
        values |= {"pool": pool, "final_norm": "pooled" if pool == "mean" else "tokens"}
        values["attention_pool"] = Pooling() if pool == "map" else None
    # The tag of weights names the family of some models, such as MAE's.
    full_name = f"{model.name}.{name.partition('.')[2]}"
    family = infer_family(values, full_name, values["rope"])
    cfg = with_profile(ViTConfig(family=family, **values), "timm")
    cfg = replace(cfg, norm_eps=values["norm_eps"], activation=values["activation"])
    if model.position_resize is None:
        return cfg
    from vitlib.checkpoint.layouts.timm_naflex import set_rule  # few architectures need it

    return set_rule(cfg, model.position_resize)


def _convert_columns(columns: dict[str, Any]) -> dict[str, Any]:
    """Convert the columns of timm's table to fields of ViTConfig; the inverse of build_signature.

    The column `gated` is left out: `activation` says the same.
    """
    defaults = config_to_json(ViTConfig())
    values = {
        name: bool(value) if isinstance(defaults[name], bool) else value
        for name, value in columns.items()
        if name in defaults
    }
    pooling = Pooling(mlp_dim=columns["pool_mlp_dim"]) if columns["attention_pool"] else None
    values |= {"layer_scale": 1.0 if columns["layer_scale"] else None, "attention_pool": pooling}
    facts = {name: columns[name] for name in timm_models.FACTS if name not in values}
    return timm_models.to_fields(values, facts)


def _explain_unknown(name: str) -> str:
    """Explain a name that neither library has."""
    if any(row.repository == name for row in list_published()):
        return f"{name!r} is a checkpoint, which says its sizes: vitlib.load({name!r}).config"
    if name in list_types() or name in list_containers():
        return (
            f"{name!r} is a model_type of transformers, of models of any size: expected one of "
            "timm's architectures or open_clip's configs, which `vitlib list` prints"
        )
    names, kind = list_names(), str(name).partition("_")[0]
    reason = list_reasons().get(kind)
    if reason and not any(known.startswith(f"{kind}_") for known in names):
        return f"{name!r} is no plain ViT, and not read: {reason}"
    return (
        f"no ViT is called {name!r}: expected {', '.join(SIZES)}, a slash and the patch in pixels, "
        f"as in 'B/16', or a name that `vitlib list` prints{find_nearest(str(name), names)}"
    )
