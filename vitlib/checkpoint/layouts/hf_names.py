"""Find the ViT in a file of Hugging Face's, and match the names of its tensors.

A file holds a ViT alone, a ViT with a head, or a model of which a ViT is a part: the name of the
patch projection says under which prefix the part lies. Other parts of such a file (a text tower, a
language model, a connector, a decoder) are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from vitlib.checkpoint.families import get_family, list_families
from vitlib.checkpoint.layouts.table import NameIndex, NameMatch, Table, index_names, match_names
from vitlib.config import ViTConfig
from vitlib.errors import count_noun

HEAD: Table = {"head": "classifier"}
TWO_HEADS: Table = {"head": "cls_classifier", "head_dist": "distillation_classifier"}
PROJECTION: Table = {"projection": "visual_projection"}
_PROJ = "patch_embed.proj"
_PATCHES = re.compile(
    # Towers of Molmo2 alone have no module of embeddings.
    r"(?P<prefix>(?:.*\.)?)(?:(?:embeddings\.|(?<=vision_tower\.)|(?<=image_vit\.))"
    r"patch_embed(?:ding(?:s\.projection|s)?)?"
    r"|(?<=vision_encoder\.)patch_embed\.proj|radio_model\.model\.patch_generator\.embedder)\.weight"
)
# What transformers calls a ViT that is a part of a model; other prefixes are training code's.
_TOWERS = (
    "vision_model.",
    "vision_model.model.",
    "vision_tower.",
    "vision_tower.transformer.",  # Ovis2's
    "image_vit.",  # Molmo2's
    "image_model.",
    "backbone.",
    "encoder.",
    "dpt.",
)
# How parts beside the ViT begin, after the name of the whole model.
_WHOLE = re.compile(r"(?:model|git|clip|owlvit|owlv2|flava|vlm|encoder|radio_model\.model)\.")
_PARTS = (
    "decoder.",  # of masked pre-training, of captions, of masks
    "lm_head.",
    "text_model.",  # the other tower, and what compares the two
    "text_projection.",
    "text_encoder.",
    "text_decoder.",
    "text_proj.",
    "text_to_mm_projection.",
    "logit_scale",
    "logit_bias",
    "temperature",  # of TIPSv2
    "language_model.",
    "language_projection.",
    "multi_modal_projector.",
    "embedding_proj_layer.",
    "layerwise_projectors.",
    "spatial_projectors.",
    "high_res_vision_",
    "gated_cross_attn_layers.",
    "perceiver_resampler.",
    "dit.",  # of PI0, with the next three
    "paligemma_with_expert.",
    "action_",
    "state_proj.",
    "multimodal_model.",
    "image_newline",
    "image_projection.",
    "image_to_mm_projection.",
    "image_to_text_projection.",
    "image_codebook.",
    "connector.",
    "aligner.",
    "generation_",
    "vqmodel.",
    "qformer.",
    "query_tokens",
    "vision_proj",
    "visual_projection.",  # GIT's; CLIP's is found before
    "itm_head.",
    "mim_head.",
    "mlm_head.",
    "mmm_",
    "box_head.",
    "class_head.",
    "objectness_head.",
    "layer_norm.",  # OWL's, of the detector
    "enc_to_dec_proj.",
    "neck.",
    "head.",
    "patch_head.",
    "metric_head.",
    "relative_head.",
    "decode_head.",
    "auxiliary_head.",
    "mlp1.",  # of Nemotron Omni, with the next three
    "vision_final_layernorm.",
    "sound_encoder.",
    "sound_projection.",
    "depth_head.",  # of TIPSv2's DPT, with the next two
    "normals_head.",
    "segmentation_head.",
    "fpn1.",
    "fpn2.",
    "fpn3.",
    "fpn4.",
    "vision_tower.head_",  # Ovis2's, to words of an image, with the next
    "visual_embeddings_table.",
    "vision_backbone.image_p",  # Molmo2's, with the next
    "transformer.",
)
# Of the language part of GIT and BLIP-2, and of Idefics.
_TEXT = ("embeddings.", "encoder.", "output.", "embed_tokens.", "layers.", "norm.")
_BUFFERS = ("*position_ids", "*relative_position_index", "*num_batches_tracked")
# Of RADIO, in files and in memory.
_VIDEO = ("*patch_generator.video_embedder.weight", "*video_patch_projection.weight")
_IGNORED = (*_PARTS, "rope_embeddings.", *_VIDEO, *_BUFFERS)


def find(file_names: Iterable[str]) -> NameMatch:
    """Match the names of a file's tensors with vitlib's.

    Args:
        file_names: Names in files, or in the memory of transformers 5.

    Returns:
        The matches, and the names that have none.
    """
    file_names = list(file_names)
    prefix = find_tower(file_names)
    # A ViT of its own: every name may have the prefix of its family or not.
    if prefix is None:
        masked = _masked_norm(file_names)
        own = [name for name in file_names if name not in masked]
        prefixes = (*sorted(_family_prefixes()), "model.")
        name_match = match_names(own, _index_for(own), prefixes=prefixes, ignored=_IGNORED)
        name_match.ignored += masked
        return name_match
    inside = [name for name in file_names if name.startswith(prefix)]
    name_match = match_names(
        inside,
        _index_for([name.removeprefix(prefix) for name in inside]),
        prefixes=(prefix,),
        ignored=("rope_embeddings.", *_VIDEO, *_BUFFERS, *_SEGMENTATION),
    )
    _match_outside([name for name in file_names if not name.startswith(prefix)], name_match)
    return name_match


_SEGMENTATION = ("fpn1.", "fpn2.", "fpn3.", "fpn4.")


@cache
def _family_prefixes() -> frozenset[str]:
    """Return what stands before a family's names in files that hold a head."""
    types = [family.hf for family in list_families() if family.hf is not None]
    return frozenset(hf_type.prefix for hf_type in types) - {""}


def find_tower(file_names: Iterable[str]) -> str | None:
    """Return the prefix of a ViT that is a part of a larger model.

    Args:
        file_names: Names of the file's tensors.

    Returns:
        The prefix; None where the names stand as a ViT's own.
    """
    matches = (_PATCHES.fullmatch(name) for name in file_names)
    prefixes = {match["prefix"] for match in matches if match is not None}
    only = next(iter(prefixes)) if len(prefixes) == 1 else ""
    # With a family's prefix, names may have it or not: transformers 4 and 5 differ, MSN mixes it.
    optional = {"", "model.", *_family_prefixes()} - {"vision_model."}
    return only if only.endswith(_TOWERS) and only not in optional else None


def _match_outside(file_names: list[str], name_match: NameMatch) -> None:
    """Add the names outside the ViT: heads that read it, and parts that are left out."""
    fused = any(
        parts[0].file_name.endswith("self_attn.qkv.weight") for parts in name_match.matches.values()
    )
    # BLIP projects what is normed twice, which no pool here gives: it is left out.
    heads = match_names(file_names, _index_heads(with_projection=not fused))
    name_match.matches |= heads.matches
    name_match.repeated += heads.repeated
    for name in heads.unexpected:
        part = _WHOLE.sub("", name, count=1)
        unread = part.startswith((*_PARTS, *_TEXT)) or name.startswith((*_PARTS, *_TEXT))
        (name_match.ignored if unread else name_match.unexpected).append(name)


def _masked_norm(file_names: list[str]) -> list[str]:
    """Return the norms of a head for masked patches, where the ViT has its own norm inside.

    BEiT's masked model norms for its own head what its ViT has normed under "beit.".
    """
    types = [family.hf for family in list_families() if family.hf is not None]
    inner = [f"{hf_type.prefix}layernorm.weight" for hf_type in types if hf_type.masked_norm]
    own = ("layernorm.weight", "layernorm.bias")
    has_inner = any(name in inner for name in file_names)
    return [name for name in own if name in file_names] if has_inner else []


def list_parts(ignored: Iterable[str]) -> list[str]:
    """List the parts of a model that are not read.

    Args:
        ignored: Names of the tensors that are not read.

    Returns:
        Each part with the number of its tensors.
    """
    counts: dict[str, int] = {}
    for name in ignored:
        if name.endswith(tuple(end[1:] for end in _BUFFERS)) or name.startswith("rope_"):
            continue
        whole = _WHOLE.match(name)
        before = whole.group() if whole is not None else ""
        part = before + name[len(before) :].partition(".")[0]
        counts[part] = counts.get(part, 0) + 1
    return [f"{part} ({count_noun(n, 'tensor')})" for part, n in counts.items()]


def _index_for(file_names: Iterable[str]) -> NameIndex:
    """Return the names that a file's tensors may have: one family's, or those of all."""
    file_names = list(file_names)
    for family in list_families():
        starts = (*family.hf_starts, *(f"model.{start}" for start in family.hf_starts))
        if starts and any(name.startswith(starts) for name in file_names):
            gated = any(".gate_proj." in name for name in file_names)
            return _index_family(family.name, gated=gated)
    return _index_all()


@cache
def _index_family(name: str, *, gated: bool) -> NameIndex:
    """Index the names of one family, whose files are read by them alone."""
    hf_type = get_family(name).hf
    assert hf_type is not None
    more = hf_type.more_names(ViTConfig(activation="swiglu")) if gated else {}
    return index_names(({**hf_type.names, **more}, *get_family(name).hf_names, HEAD))


@cache
def _index_all() -> NameIndex:
    """Index every family's names: one name means the same in whichever family's file it stands."""
    families = [family for family in list_families() if not family.hf_starts]
    tables = [table for family in families for table in family.hf_names]
    own = [family.hf.names for family in families if family.hf is not None]
    # A patch projection alone says where a network lies, whichever family it is of. Under vitlib's
    # own name it says nothing: timm's models have that, too.
    patches = [
        {name: row}
        for family in list_families()
        for name, row in (family.hf.names if family.hf_starts and family.hf else {}).items()
        if name.startswith(_PROJ) and name != row
    ]
    return index_names((*tables, *own, *patches, HEAD, TWO_HEADS, PROJECTION))


@cache
def _index_heads(*, with_projection: bool) -> NameIndex:
    """Index the names of heads, which stand outside the ViT."""
    return index_names((HEAD, PROJECTION) if with_projection else (HEAD,))
