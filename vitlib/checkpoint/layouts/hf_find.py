"""Where in a file of Hugging Face's the ViT lies, and which of its tensors are which of ours.

A file holds a ViT alone, a ViT with a head, or a model of which a ViT is one part: the name of the
patch projection says under which prefix the part lies. What else such a file holds (a text tower, a
language model, what connects them, a decoder) is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from vitlib.checkpoint.layouts import hf_names as names
from vitlib.checkpoint.layouts.hf_families import FAMILIES
from vitlib.checkpoint.layouts.table import NameIndex, NameMatch, index_names, match_names

_PREFIXES = (*sorted({f.prefix for f in FAMILIES.values()} - {""}), "model.")
_PATCHES = re.compile(
    r"(?P<prefix>(?:.*\.)?)embeddings\.patch_embedding(?:s\.projection|s)?\.weight"
)
# Under these every name may have the prefix or not: transformers 4 and 5 differ, MSN's mix it.
_OPTIONAL = {"", "model.", *(f.prefix for f in FAMILIES.values())} - {"vision_model."}
# What transformers calls a ViT that is a part of a model; other prefixes are training code's.
_TOWERS = (
    "vision_model.",
    "vision_model.model.",
    "vision_tower.",
    "image_model.",
    "backbone.",
    "encoder.",
    "dpt.",
)
# How parts beside the ViT begin, after the name of the whole model.
_WHOLE = re.compile(r"(?:model|git|clip|owlvit|owlv2|flava)\.")
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
    "language_model.",
    "language_projection.",
    "multi_modal_projector.",
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
    "fpn1.",
    "fpn2.",
    "fpn3.",
    "fpn4.",
)
_TEXT = ("embeddings.", "encoder.", "output.")  # of GIT's and BLIP-2's language part
_BUFFERS = ("*position_ids", "*relative_position_index", "*num_batches_tracked")
_IGNORED = (*_PARTS, "rope_embeddings.", *_BUFFERS)


def find(theirs: Iterable[str]) -> NameMatch:
    """Which of a file's tensors are which of ours, in either spelling."""
    theirs = list(theirs)
    prefix = tower(theirs)
    if prefix is None:
        masked = _masked_norm(theirs)
        own = [name for name in theirs if name not in masked]
        name_match = match_names(own, _known(own), prefixes=_PREFIXES, ignored=_IGNORED)
        name_match.ignored += masked
        return name_match
    inside = [name for name in theirs if name.startswith(prefix)]
    name_match = match_names(
        inside, _known([name.removeprefix(prefix) for name in inside]), prefixes=(prefix,),
        ignored=("rope_embeddings.", *_BUFFERS, *_SEGMENTATION),
    )  # fmt: skip
    _find_beside([name for name in theirs if not name.startswith(prefix)], name_match)
    return name_match


_SEGMENTATION = ("fpn1.", "fpn2.", "fpn3.", "fpn4.")


def tower(theirs: Iterable[str]) -> str | None:
    """The prefix of a ViT that is one part of a file; None where names stand as a ViT's own."""
    matches = (_PATCHES.fullmatch(name) for name in theirs)
    prefixes = {match["prefix"] for match in matches if match is not None}
    only = next(iter(prefixes)) if len(prefixes) == 1 else ""
    return only if only.endswith(_TOWERS) and only not in _OPTIONAL else None


def _find_beside(theirs: list[str], name_match: NameMatch) -> None:
    """Add what lies beside the ViT: the heads that read it, and the parts that are left out."""
    fused = any(
        f[0].file_name.endswith("self_attn.qkv.weight") for f in name_match.matches.values()
    )
    # BLIP projects what is normed twice, which no pool here gives: it is left out.
    heads = match_names(theirs, _heads(with_projection=not fused))
    name_match.matches |= heads.matches
    name_match.repeated += heads.repeated
    for name in heads.unexpected:
        part = _WHOLE.sub("", name, count=1)
        unread = part.startswith((*_PARTS, *_TEXT)) or name.startswith((*_PARTS, *_TEXT))
        (name_match.ignored if unread else name_match.unexpected).append(name)


def _masked_norm(theirs: list[str]) -> list[str]:
    """BEiT's masked model norms for its own head what its ViT has normed under "beit."."""
    inner = ("beit.layernorm.weight", "data2vec_vision.layernorm.weight")
    own = ("layernorm.weight", "layernorm.bias")
    return [name for name in own if name in theirs] if any(n in theirs for n in inner) else []


def parts_left_out(ignored: Iterable[str]) -> list[str]:
    """The parts of a model that are not read, each with the number of its tensors."""
    counts: dict[str, int] = {}
    for name in ignored:
        if name.endswith(tuple(end[1:] for end in _BUFFERS)) or name.startswith("rope_"):
            continue
        whole = _WHOLE.match(name)
        before = whole.group() if whole is not None else ""
        part = before + name[len(before) :].partition(".")[0]
        counts[part] = counts.get(part, 0) + 1
    return [f"{part} ({n} tensor{'s' * (n > 1)})" for part, n in counts.items()]


def _known(theirs: Iterable[str]) -> NameIndex:
    kind = "other"
    theirs = list(theirs)
    if any(name.startswith(("layer.", "model.layer.")) for name in theirs):
        kind = "gated" if any(".gate_proj." in name for name in theirs) else "dinov3"
    return _tables(kind)


@cache
def _tables(kind: str) -> NameIndex:
    """DINOv3's names are read alone: its up_proj is a whole MLP, or half of a gated one."""
    tables = {"dinov3": (names.DINOV3, names.HEAD), "gated": (names.DINOV3_GATED, names.HEAD)}
    return index_names(tables.get(kind, names.READ))


@cache
def _heads(*, with_projection: bool) -> NameIndex:
    beside = (names.HEAD, names.PROJECTION) if with_projection else (names.HEAD,)
    return index_names(beside)
