"""Find the networks of a file by structure, choose one, and remove the prefix of its names.

A patch projection and a first block under one prefix, of any name, make a ViT. The prefix of a
single network is cut until a layout has its names. Of several networks, one is chosen as published
training code documents (a teacher before its student), else by the caller.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from vitlib.checkpoint.layouts import detect, heads, hf, openclip, openclip_config
from vitlib.checkpoint.layouts.detect import CORE_TENSORS, LAYOUTS, drop_later_blocks
from vitlib.checkpoint.layouts.layout import Layout
from vitlib.checkpoint.layouts.timm_models import find_architecture, get_architecture
from vitlib.errors import CheckpointError, count_noun
from vitlib.source.locate import Source
from vitlib.source.readers.state_dict import PATCH_WEIGHTS

# Names of the patch projection in the layouts, each with the beginnings of its blocks' names.
_PARTS: Mapping[str, tuple[str, ...]] = {
    "patch_embed.proj.weight": ("blocks.",),
    "patch_embed.projection.weight": ("blocks.",),
    "embeddings.patch_embeddings.projection.weight": ("encoder.layer.", "layers."),
    "embeddings.patch_embeddings.weight": ("layer.", "model.layer."),
    "embeddings.patch_embedding.weight": ("encoder.layers.",),
    "embeddings.patch_embed.weight": ("encoder.layers.",),
    "conv1.weight": ("transformer.resblocks.",),
    "conv_proj.weight": ("encoder.layers.",),
    "vision_embed.proj.weight": ("encoder.layers.",),
    "embedding/kernel": ("Transformer/encoderblock",),
}
_BLOCKS = re.compile(
    r"(?<![^./])(?:" + "|".join(sorted({re.escape(b) for v in _PARTS.values() for b in v})) + ")"
)
_MOMENTS = ("opt/", "states/")  # of JAX's optimizers, which copy every name
_ORIGINAL = "opt/target/"
# Published training code evaluates these networks.
_PREFERRED = (re.compile(r"(^|\.)teacher\."), re.compile(r"^backbone\.$"))
_TRUNK = "visual.trunk."
# Limits for hostile files: each tried prefix matches every name with every layout.
_MAX_PARTS = 8  # parts of a prefix that are tried
_SAMPLE = 2000  # names that are matched to find a common prefix, if the file has no ViT
_SHOWN = 8  # prefixes in an error message


class Network(NamedTuple):
    """The names of one network.

    Attributes:
        names: Name without the prefix -> name in the file.
        prefix: The prefix that was removed.
        skipped: Groups of names outside the network, with counts.
    """

    names: dict[str, str]
    prefix: str = ""
    skipped: tuple[str, ...] = ()


def select_network(
    tensors: Mapping[str, Tensor], layout: Layout | None = None, wanted: str | None = None
) -> Network:
    """Choose the network to read and name its tensors as a layout does.

    Args:
        tensors: Tensors by the names of the file, or those under the prefix that the caller chose.
        layout: The layout of the file; None: any.
        wanted: The prefix that the caller chose; "" chooses the network without a prefix.

    Returns:
        The network.

    Raises:
        CheckpointError: The file has several networks, and neither the caller nor its names choose.
    """
    layouts = list(LAYOUTS.values()) if layout is None else [layout]
    prefixes = all_prefixes = find_networks(tensors)
    if layout is not None and len(prefixes) > 1:
        prefixes = [p for p in prefixes if _has_patch_weight(layout, p, tensors)] or prefixes
    if not prefixes:
        return _cut_common_prefix(tensors, layouts)
    if len(all_prefixes) > 1 and _count_unexpected(tensors, "", prefixes[0], (), layouts) == 0:
        # A layout ignores the names of the other networks itself.
        return Network({name: name for name in tensors})
    is_unprefixed = wanted == "" and "" in prefixes
    network = "" if is_unprefixed else _choose_prefix(prefixes, wanted or "", tensors)
    others = tuple(prefix for prefix in all_prefixes if not network.startswith(prefix))
    parts = re.findall(r"[^./]*[./]", network)[:_MAX_PARTS]
    ends = ["".join(parts[:count]) for count in range(len(parts))] + [network]
    if network.endswith(_TRUNK):
        # The projection that open_clip adds to a tower of timm is outside the trunk: do not cut it.
        before = network.removesuffix(_TRUNK)
        if any(name.startswith(f"{before}visual.head.") for name in tensors):
            ends = [end for end in ends if len(end) <= len(before)]
    for start in ends:
        if any(other.startswith(start) for other in all_prefixes if other != network):
            # This shorter prefix includes a second network.
            continue
        if _count_unexpected(tensors, start, network, others, layouts) == 0:
            return _cut_prefix(tensors, start, network, others)
    complete = [
        s for s in ends if _count_unexpected(tensors, s, network, others, layouts) is not None
    ]
    return _cut_prefix(tensors, (complete or ends)[-1], network, others)


def extract_network(
    src: Source, tensors: dict[str, Tensor], layout: str | None, prefix: str | None
) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of the network to read, and the prefix that was removed from their names.

    Args:
        src: The checkpoint; it records the groups of names that are skipped.
        tensors: Its tensors by the names of the file.
        layout: Name of the layout that the caller states; None: any.
        prefix: The prefix that the caller chose; None: none.

    Returns:
        Tensors by names of a layout, and the prefix.

    Raises:
        CheckpointError: The file has several networks, and neither the caller nor its names choose.
        ConfigError: No layout has the stated name.
    """
    stated = None if layout is None else detect.get_layout(layout)
    # A config of the whole model describes names without a prefix: they are taken as they are.
    configs = {
        "config.json": (hf.LAYOUT, "model_type"),
        openclip_config.FILE: (openclip.LAYOUT, "model_cfg"),
    }
    for file, (described, key) in configs.items():
        if stated is None and key in (src.json(file) or {}):
            name_match = described.find(drop_later_blocks(tensors))
            firsts = {re.split(r"[./]", name, maxsplit=1)[0] for name in tensors}
            is_wrapped = len(firsts) == 1 and any(
                not heads.is_head(n) for n in name_match.unexpected
            )
            if all(name in name_match.matches for name in CORE_TENSORS) and not is_wrapped:
                return tensors, ""
    selected = select_network(tensors, stated, prefix)
    src.select(selected.names, selected.prefix, selected.skipped)
    return {new: tensors[old] for new, old in selected.names.items()}, selected.prefix


def choose_layout(
    src: Source, tensors: Mapping[str, Tensor], layout: str | None, prefix: str = ""
) -> Layout:
    """Return the stated layout, Hugging Face's for its config.json, or that of the names.

    Args:
        src: The checkpoint.
        tensors: Tensors of the network that is read, without the prefix.
        layout: Name of the layout that the caller states; None: detect it.
        prefix: The prefix that was removed from the names.

    Returns:
        The layout.

    Raises:
        CheckpointError: No layout has the names, or vitlib does not compute the model.
        ConfigError: No layout has the stated name.
    """
    if layout is not None:
        return detect.get_layout(layout)
    raw = src.json("config.json") or {}
    if "model_type" in raw and "architecture" not in raw:
        # Raises if vitlib does not compute the model.
        hf.read_family(raw)
        # Without a match, the folder has other weights next to this config.
        if hf.LAYOUT.find(drop_later_blocks(tensors)).matches:
            return hf.LAYOUT
    if str(raw.get("architecture")).startswith("prithvi_eo"):
        return LAYOUTS["meta"]
    # Backbones of the original code are published as .pth without a head, timm's have a head.
    is_bare = src.weights()[0].suffix != ".safetensors" and "head.weight" not in tensors
    # timm's train.py wraps its state dict too, and saves timm's name of the model with it.
    is_timm_run = src.arch is not None and find_architecture(src.arch) is not None
    is_original = not is_timm_run and (bool(src.wrapper_keys) or (is_bare and not raw))
    is_timm_trunk = prefix.endswith("trunk.")  # a tower of timm in open_clip or CONCH
    try:
        return detect.detect_layout(tensors, original=is_original and not is_timm_trunk)
    except CheckpointError:
        name = raw.get("architecture") or openclip_config.get_timm_name(src.json)
        if isinstance(name, str):
            get_architecture(name)  # raises the reason if vitlib does not compute it
        raise


def find_networks(names: Iterable[str]) -> list[str]:
    """Return the prefixes under which a file has a patch projection and blocks.

    Args:
        names: Names of the file's tensors.

    Returns:
        One prefix for each network, in the order of the file; "" for names without a prefix.
    """
    patches: dict[str, set[str]] = {}
    blocks: set[tuple[str, str]] = set()
    for name in names:
        if name.endswith(PATCH_WEIGHTS):
            for patch in PATCH_WEIGHTS:
                before = name.removesuffix(patch)
                if before != name and (not before or before[-1] in "./"):
                    patches.setdefault(before, set()).add(patch)
        for block in _BLOCKS.finditer(name):
            blocks.add((name[: block.start()], block.group()))
    return [
        prefix
        for prefix, kinds in patches.items()
        if any((prefix, block) in blocks for kind in kinds for block in _PARTS[kind])
        if not prefix.startswith(_MOMENTS) or prefix.startswith(_ORIGINAL)
    ]


def _choose_prefix(prefixes: list[str], wanted: str, names: Mapping[str, Tensor]) -> str:
    """Return the prefix to take, or raise CheckpointError if nothing decides."""
    if len(prefixes) == 1:
        return prefixes[0]
    for pattern in _PREFERRED:
        preferred = [prefix for prefix in prefixes if pattern.search(prefix)]
        if len(preferred) == 1:
            return preferred[0]
    counts = dict.fromkeys(prefixes, 0)
    for name in names:
        owner = max((p for p in prefixes[:_SHOWN] if name.startswith(p)), key=len, default=None)
        if owner is not None:
            counts[owner] += 1
    listed = ", ".join(
        f"{wanted + p!r} ({count_noun(counts[p], 'tensor')})" for p in prefixes[:_SHOWN]
    )
    more = f" and {len(prefixes) - _SHOWN} more" if len(prefixes) > _SHOWN else ""
    example = next(p for p in prefixes if p)
    raise CheckpointError(
        f"{len(prefixes)} networks in one file, under {listed}{more}: choose one with "
        f"prefix={wanted + example!r} (on the command line --prefix)"
        f"{_describe_layout_choice(prefixes, names)}"
    )


def _count_unexpected(
    tensors: Mapping[str, Tensor],
    start: str,
    network: str,
    others: tuple[str, ...],
    layouts: list[Layout],
) -> int | None:
    """Count the names under a prefix that no layout has; None if no layout matches a whole ViT."""
    inner = {
        name.removeprefix(start): tensors[name]
        for name in drop_later_blocks(tensors)
        if name.startswith(start) and not (others and name.startswith(others))
    }
    # Skipping layouts without this patch projection avoids matching all names with each layout.
    anchor = next(n for n in PATCH_WEIGHTS if network + n in tensors)
    count = None
    for layout in layouts:
        if (network + anchor).removeprefix(start) not in _find_patch_weights(layout, inner):
            continue
        name_match = layout.find(layout.prepare(inner))
        if all(name in name_match.matches for name in CORE_TENSORS):
            unknown = sum(not heads.is_head(name) for name in name_match.unexpected)
            count = unknown if count is None else min(unknown, count)
    return count


def _describe_layout_choice(prefixes: list[str], tensors: Mapping[str, Tensor]) -> str:
    """Return how layout= chooses a network, or "" if two networks have the same layout."""
    fitting = [
        [layout.name for layout in LAYOUTS.values() if _has_patch_weight(layout, prefix, tensors)]
        for prefix in prefixes[:_SHOWN]
    ]
    several = [name for names in fitting for name in names]
    if len(several) != len(set(several)) or not all(fitting):
        return ""
    names = " or ".join(f"layout={names[0]!r}" for names in fitting)
    return f", or {names} (--source-layout)"


def _has_patch_weight(layout: Layout, prefix: str, tensors: Mapping[str, Tensor]) -> bool:
    """Return True if a layout has the name of a network's patch projection."""
    return any(
        "patch_embed.proj.weight" in layout.find([name]).matches
        for name in PATCH_WEIGHTS
        if prefix + name in tensors
    )


def _find_patch_weights(layout: Layout, inner: Mapping[str, Tensor]) -> set[str]:
    """Return the names that a layout matches to the patch projection."""
    candidates = {name: inner[name] for name in inner if name.endswith(PATCH_WEIGHTS)}
    name_match = layout.find(candidates)
    parts = name_match.matches.get("patch_embed.proj.weight", [])
    return {part.file_name for part in parts} | set(name_match.repeated)


def _cut_prefix(
    tensors: Mapping[str, Tensor], start: str, network: str, others: tuple[str, ...]
) -> Network:
    """Return the names under a prefix, with its classifier, and count the others."""
    patch = next((tensors[network + n] for n in PATCH_WEIGHTS if network + n in tensors), None)
    width = 0 if patch is None else heads.patch_width(patch)
    names = {
        name.removeprefix(start): name
        for name in tensors
        if name.startswith(start) and not (others and name.startswith(others))
    }
    head = heads.find_outer_head(tensors, start, width) if start else {}
    if not names.keys().isdisjoint(head):
        # The network has a head: a tensor of another one must not be mixed into it.
        head = {}
    taken = {*names.values(), *head.values()}
    groups: dict[str, int] = {}
    for name in tensors:
        if name not in taken:
            group = next((o for o in others if name.startswith(o)), None)
            group = group.rstrip("./") if group else _common_group(name, start)
            groups[group] = groups.get(group, 0) + 1
    names |= head
    counted = [f"{group} ({count_noun(count, 'tensor')})" for group, count in groups.items()]
    between = [
        group for group in groups if not group.startswith(tuple(o.rstrip("./") for o in others))
    ]
    if head and between and not all(heads.is_head(f"{group}.") for group in between):
        counted[-1] += " (if one of these precedes the head, its scores differ from the file's)"
    return Network(names, start, tuple(counted))


def _common_group(name: str, start: str) -> str:
    """Return the beginning of a name up to the first part that differs from the prefix."""
    shared = 0
    for index, (mine, other) in enumerate(zip(name, start, strict=False)):
        if mine != other:
            break
        shared = index + 1 if mine in "./" else shared
    end = re.search(r"[./]", name[shared:])
    return name[: shared + end.start()] if end else name


def _cut_common_prefix(tensors: Mapping[str, Tensor], layouts: list[Layout]) -> Network:
    """Remove the common prefix of all names, if a layout then matches more of them."""
    names = list(tensors)
    if not names:
        return Network({})
    first, last = min(names), max(names)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
    parts = re.findall(r"[^./]*[./]", first[:same])[:_MAX_PARTS]
    sample = drop_later_blocks(names[:_SAMPLE])
    best, most = "", -1
    for end in range(len(parts) + 1):
        start = "".join(parts[:end])
        inner = [name.removeprefix(start) for name in sample]
        count = max(len(layout.find(inner).matches) for layout in layouts)
        if count > most:
            best, most = start, count
    return Network({name.removeprefix(best): name for name in names}, best)
