"""A file of Hugging Face's without its config.json: its tensors and the published models say.

The tensors do not say the number of heads, the norms' eps or the form of GELU. Where all published
models of a shape agree, their value is right. Where they differ, and where no published model has
the shape, the caller states it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vitlib.checkpoint.families import get_family, list_families
from vitlib.checkpoint.families.family import HfType, Published
from vitlib.checkpoint.layouts.facts import Facts, resolve_facts
from vitlib.checkpoint.layouts.hf_config import ACTIVATIONS, fit_pool, refuse_transposed_table
from vitlib.checkpoint.layouts.hf_types import list_published, list_types
from vitlib.checkpoint.layouts.infer import Shape, infer_config
from vitlib.checkpoint.layouts.layout import Json, ParsedConfig, sidecar_size
from vitlib.checkpoint.layouts.table import NameMatch
from vitlib.config import ViTConfig
from vitlib.errors import CheckpointError

RADIO_V4_TOKENS = 10


def read(
    json: Json, shapes: Mapping[str, Shape], name_match: NameMatch, facts: Facts
) -> ParsedConfig:
    """Read a ViT from its tensors, the published models of their shape and what is stated.

    Args:
        json: The checkpoint's JSON files by name.
        shapes: By vitlib's names.
        name_match: The file's names.
        facts: What the caller states.

    Returns:
        The model.

    Raises:
        CheckpointError: The tensors are not a ViT, or a number stays open: the message says how to
            state it.
    """
    fields = infer_config(shapes, sidecar_size(json))
    types = _candidates(fields, name_match)
    wanted = facts.architecture
    if wanted is not None:
        types = _narrow(types, fields, wanted)
    rows = [row for row in list_published() if _fits(row, fields, types)]
    rows = [row for row in rows if row.repository == wanted] or rows
    settled = resolve_facts({row.repository: _list_facts(row) for row in rows}, facts)
    if rows:
        model_type = next(row.model_type for row in rows if _list_facts(row) == settled)
    else:
        model_type, settled = _state_facts(fields, types, facts, json("config.json") is not None)
    family, hf_type = list_types()[model_type]
    fields |= hf_type.head if fields["num_classes"] and hf_type.head else hf_type.base
    fields |= hf_type.infer_pooling(name_match, bool(fields["num_classes"]))
    fit_pool(fields)
    fields |= hf_type.bare_fields
    assumed = ["norm_eps", "activation", "position_resize", "labels", "pool"]
    assumed += [] if "num_heads" in fields else ["num_heads"]
    fields = settled | fields
    fields |= {"norm_eps": _eps(hf_type)}
    fields.setdefault("position_resize", hf_type.fixed["position_resize"])
    doubtful = [] if rows else ["norm_eps"]
    doubtful += ["activation"] if not rows and facts.activation is None else []
    cfg = ViTConfig(family=family, **fields)
    refuse_transposed_table(cfg)
    _refuse_other_numbers(json("config.json") or {}, cfg, hf_type)
    return ParsedConfig(cfg, tuple(assumed), tuple(doubtful))


def _refuse_other_numbers(config: Mapping[str, Any], cfg: ViTConfig, hf_type: HfType) -> None:
    """Raise CheckpointError where a config.json without model_type says another model."""
    values = {
        hf_type.numbers[name][0]: getattr(cfg, name)
        for name in ("num_heads", "norm_eps")
        if name in hf_type.numbers
    }
    if cfg.rope is not None:
        values["rope_theta"] = cfg.rope.theta
    clashes = [
        f"{key} {config[key]!r} (read as {value!r})"
        for key, value in values.items()
        if key in config and config[key] != value
    ]
    act = config.get("hidden_act")
    if act is not None and cfg.activation != "swiglu" and ACTIVATIONS.get(act) != cfg.activation:
        clashes.append(f"hidden_act {act!r} (read as {cfg.activation!r})")
    if clashes:
        raise CheckpointError(
            f"config.json has no model_type, and {'; '.join(clashes)} of the published models of "
            "these tensors: write the model_type there"
        )


def _candidates(fields: Mapping[str, Any], name_match: NameMatch) -> tuple[str, ...]:
    """Return the types whose files have such tensors, by their structure and their names."""
    names = {part.file_name for parts in name_match.matches.values() for part in parts}
    if any(".attention.projection_layer." in name for name in names):
        return ("internvl_vision",)
    if any(re.search(r"(?:^|\.)layer\.0\.(?:attention|mlp)\..*_proj\.", name) for name in names):
        return ("dinov3_vit",)
    if any(".attn.wq." in name for name in names) or "blocks.0.attn.q_norm.weight" in (
        name_match.matches
    ):
        return ("sapiens2",)
    if any(name.startswith(("radio_model.", "embeddings.patch_projection.")) for name in names):
        return _candidates_of_radio(fields)
    if any(".mlp.c_fc." in name or ".mlp.w12." in name for name in names):
        return ("tipsv2_vision_model",)
    if any("rms_norm1" in name for name in names):
        return ("aimv2_vision_model",)
    if any("self_attn.qkv." in name for name in names):
        return ("blip_vision_model", "blip_2_vision_model")
    if any("layer_norm1" in name for name in names):
        return _candidates_of_clip(fields, name_match, names)
    if any(name.startswith("dpt.") for name in names):
        return ("dpt",)
    if fields["relative_position"] or not fields["key_bias"] or not fields["pos_embed"]:
        return _twins("beit")
    if any(".layer_scale1." in name for name in names):
        return ("dinov2_with_registers",) if fields["num_registers"] else ("dinov2",)
    if fields["num_registers"]:
        return ("pixio",)
    if not fields["class_token"]:
        return ("ijepa",)
    if fields["dist_token"]:
        return ("deit",)
    for family in list_families():
        starts = family.hf_marks
        if starts and any(name.startswith(starts) for name in [*name_match.ignored, *names]):
            return _types_of(family.name)
    return ("vit",) if fields["pooler_dim"] or fields["num_classes"] else _twins("vit")


def _candidates_of_radio(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Return RADIO's type; raise CheckpointError for the tokens of another version than the fourth.

    NVIDIA's own code resizes the positions of some of the third by another rule, and no tensor
    says of which.
    """
    count = fields["num_registers"] + 1
    if count != RADIO_V4_TOKENS:
        raise CheckpointError(
            f"RADIO with {count} class tokens and registers: C-RADIOv4 has {RADIO_V4_TOKENS}, and "
            "older versions resize positions by other rules: put a config.json of transformers' "
            "class beside it, or give config=ViTConfig(...)"
        )
    return ("radio",)


def _types_of(family: str) -> tuple[str, ...]:
    """Return a family's own type in transformers."""
    hf_type = get_family(family).hf
    return () if hf_type is None else (hf_type.model_type,)


def _twins(family: str) -> tuple[str, ...]:
    """Return a family's own type, and those of the families whose files have the same tensors."""
    twins = [twin.name for twin in list_families() if twin.hf_twin == family]
    return tuple(name for twin in (family, *twins) for name in _types_of(twin))


def _candidates_of_clip(
    fields: Mapping[str, Any], name_match: NameMatch, names: set[str]
) -> tuple[str, ...]:
    """Return the types whose blocks have CLIP's names."""
    for part, model_type in _BY_NAME.items():
        if any(part in name for name in names):
            return (model_type,)
    if fields["class_token"]:
        return ("clip_vision_model",)
    patches = name_match.shapes.get(name_match.file_name("patch_embed.proj.weight"), ())
    if len(patches) == 2:
        return ("siglip2_vision_model",)
    idefics = any("connector." in name for name in name_match.ignored)
    return ("idefics3_vision",) if idefics else ("siglip_vision_model",)


_BY_NAME = {
    "class_pos_emb": "mlcd_vision_model",
    "image_encoder.vision_model.": "git_vision_model",
    "vision_model.model.": "kosmos_2_vision_model",
    "pre_layernorm": "owlvit_vision_model",
    "clip.vision_model.": "clipseg_vision_model",
    ".projection_layer.": "janus_vision_model",
}


def _fits(row: Published, fields: Mapping[str, Any], types: tuple[str, ...]) -> bool:
    """Return True if a published model has such tensors."""
    p, q = fields["patch_size"]
    gated = fields.get("activation") == "swiglu"
    shape = (row.embed_dim, row.mlp_dim, row.activation == "swiglu")
    same = shape == (fields["embed_dim"], fields["mlp_dim"], gated)
    return row.model_type in types and same and p == q and p in row.patches


def _list_facts(row: Published) -> dict[str, Any]:
    """Return the facts of a published model that no tensor holds."""
    _, hf_type = list_types()[row.model_type]
    activation = row.activation or _activation(hf_type)
    return {"num_heads": row.num_heads, "activation": activation, "norm_eps": _eps(hf_type)}


def _activation(hf_type: HfType) -> str:
    """Return the activation of a type's models, where no key and no gate says another."""
    return "swiglu" if hf_type.gated else ACTIVATIONS[hf_type.activation]


def _eps(hf_type: HfType) -> float:
    """Return the eps of a type's published models, which may differ from the class's default."""
    return float(hf_type.bare_fields.get("norm_eps", hf_type.numbers["norm_eps"][1]))


def _narrow(types: tuple[str, ...], fields: Mapping[str, Any], wanted: str) -> tuple[str, ...]:
    """Return the type that a stated architecture is: a model_type, or a published model's name.

    Types of the family CLIP differ in no name of a tensor: each may be stated. Raises
    CheckpointError where the architecture has other tensors.
    """
    if types == ("clip_vision_model",):
        types = tuple(name for name, (family, _) in list_types().items() if family == "clip")
    published = {
        row.repository: row.model_type for row in list_published() if _fits(row, fields, types)
    }
    if wanted not in types and wanted not in published:
        raise CheckpointError(
            f"architecture={wanted!r}: with these tensors vitlib knows "
            f"{', '.join([*types, *published])}"
        )
    return (published.get(wanted, wanted),)


def _state_facts(
    fields: Mapping[str, Any], types: tuple[str, ...], facts: Facts, has_config: bool
) -> tuple[str, dict[str, Any]]:
    """Return the type and the facts that the caller states of a shape that nobody published.

    has_config says that a config.json lies in the folder, without a model_type. Raises
    CheckpointError where a number stays open.
    """
    model_type = types[0]
    hf_type = list_types()[model_type][1]
    open_numbers = []
    if len(types) > 1:
        open_numbers.append(f"architecture={' or '.join(map(repr, types))} (--architecture)")
    if facts.num_heads is None and "num_heads" not in fields:
        open_numbers.append("num_heads= (--num-heads)")
    if hf_type.model_type == "clip_vision_model" and facts.activation is None:
        open_numbers.append("activation='quick_gelu' or 'gelu' (--activation)")
    if open_numbers:
        p, q = fields["patch_size"]
        lacking = "the config.json beside this file has no model_type"
        mend = "write it there" if has_config else "put its config.json beside it"
        raise CheckpointError(
            f"{lacking if has_config else 'no config.json lies beside this file'}, and no "
            f"published model is of width {fields['embed_dim']}, MLP {fields['mlp_dim']} and "
            f"patches of {p}x{q}: {mend}, or state {', '.join(open_numbers)}"
        )
    activation = facts.activation or _activation(hf_type)
    heads = fields.get("num_heads", facts.num_heads)
    return model_type, {"num_heads": heads, "activation": activation}
