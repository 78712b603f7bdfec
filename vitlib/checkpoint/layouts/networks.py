"""Which network of a file is read, and what stands before its names: any prefix, by structure.

A ViT is told by its patch projection and its first block under one prefix, whatever that is. Where
a file has one such network, the names are cut to where a layout reads them; where it has several,
training code decides that is documented (a teacher before its student), else the caller.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from vitlib.checkpoint.layouts import detect, heads, hf, openclip, openclip_config
from vitlib.checkpoint.layouts.detect import CORE_TENSORS, LAYOUTS, drop_later_blocks
from vitlib.checkpoint.layouts.layout import Layout
from vitlib.checkpoint.layouts.timm_models import get_architecture
from vitlib.errors import CheckpointError
from vitlib.source.locate import Source
from vitlib.source.readers.state_dict import PATCH_WEIGHTS

# A layout's name of the patch projection, and how those of its blocks begin.
_PARTS: Mapping[str, tuple[str, ...]] = {
    "patch_embed.proj.weight": ("blocks.",),
    "embeddings.patch_embeddings.projection.weight": ("encoder.layer.", "layers."),
    "embeddings.patch_embeddings.weight": ("layer.", "model.layer."),
    "embeddings.patch_embedding.weight": ("encoder.layers.",),
    "conv1.weight": ("transformer.resblocks.",),
    "conv_proj.weight": ("encoder.layers.",),
    "embedding/kernel": ("Transformer/encoderblock",),
}
_BLOCKS = re.compile(
    r"(?<![^./])(?:" + "|".join(sorted({re.escape(b) for v in _PARTS.values() for b in v})) + ")"
)
_MOMENTS = ("opt/", "states/")  # of JAX's optimizers, which copy every name
_ORIGINAL = "opt/target/"
# Of several networks, those that published training code says to take.
_PREFERRED = (re.compile(r"(^|\.)teacher\."), re.compile(r"^backbone\.$"))
_TRUNK = "visual.trunk."
_MAX_PARTS = 8  # of a prefix that are tried
_SAMPLE = 2000  # names that tell what all begin with, where no ViT is among them
_SHOWN = 8


class Network(NamedTuple):
    """The names of one network."""

    names: dict[str, str]  # without what stands before them -> in the file
    prefix: str = ""  # what was cut
    left: tuple[str, ...] = ()  # groups of names that are not the network's, with counts


def select_network(
    tensors: Mapping[str, Tensor], layout: Layout | None = None, wanted: str | None = None
) -> Network:
    """Return the network of a file that is read, by names that a layout has.

    Args:
        tensors: By the file's names, or those under the prefix that the caller chose.
        layout: The one that the file is in, where that is known.
        wanted: The prefix that the caller chose; "" chooses the network without one.

    Raises:
        CheckpointError: The file has several networks, and nothing says which to take.
    """
    layouts = list(LAYOUTS.values()) if layout is None else [layout]
    prefixes = every = find_networks(tensors)
    if layout is not None and len(prefixes) > 1:
        prefixes = [p for p in prefixes if _knows(layout, p, tensors)] or prefixes
    if not prefixes:
        return _shared(tensors, layouts)
    if len(every) > 1 and _unexpected(tensors, "", prefixes[0], (), layouts) == 0:
        return Network(
            {name: name for name in tensors}
        )  # a layout knows the others as what it skips
    unprefixed = wanted == "" and "" in prefixes
    chosen = "" if unprefixed else _chosen(prefixes, wanted or "", tensors)
    others = tuple(prefix for prefix in every if not chosen.startswith(prefix))
    parts = re.findall(r"[^./]*[./]", chosen)[:_MAX_PARTS]
    ends = ["".join(parts[:count]) for count in range(len(parts))] + [chosen]
    if chosen.endswith(_TRUNK):  # what open_clip puts after it belongs to the same tower
        before = chosen.removesuffix(_TRUNK)
        if any(name.startswith(f"{before}visual.head.") for name in tensors):
            ends = [end for end in ends if len(end) <= len(before)]
    for start in ends:
        if any(other.startswith(start) for other in every if other != chosen):
            continue  # it would take a second network along
        if _unexpected(tensors, start, chosen, others, layouts) == 0:
            return _from(tensors, start, chosen, others)
    whole = [s for s in ends if _unexpected(tensors, s, chosen, others, layouts) is not None]
    return _from(tensors, (whole or ends)[-1], chosen, others)


def extract_network(
    src: Source, tensors: dict[str, Tensor], layout: str | None, prefix: str | None
) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of the network that is read, and what was cut from their names.

    Raises CheckpointError where there are several and nothing says which.
    """
    stated = None if layout is None else detect.get_layout(layout)
    described = {
        "config.json": (hf.LAYOUT, "model_type"),
        openclip_config.FILE: (openclip.LAYOUT, "model_cfg"),
    }
    for file, (own, key) in described.items():
        if stated is None and key in (src.json(file) or {}):
            name_match = own.find(drop_later_blocks(tensors))
            firsts = {re.split(r"[./]", name, maxsplit=1)[0] for name in tensors}
            wrapped = len(firsts) == 1 and any(not heads.is_head(n) for n in name_match.unexpected)
            if all(name in name_match.matches for name in CORE_TENSORS) and not wrapped:
                return tensors, ""
    network = select_network(tensors, stated, prefix)
    src.select(network.names, network.prefix, network.left)
    return {new: tensors[old] for new, old in network.names.items()}, network.prefix


def choose_layout(
    src: Source, tensors: Mapping[str, Tensor], layout: str | None, prefix: str = ""
) -> Layout:
    """The layout asked for, Hugging Face's where its config.json is there, or that of the names.

    prefix: what was cut from the names.
    """
    if layout is not None:
        return detect.get_layout(layout)
    raw = src.json("config.json") or {}
    if "model_type" in raw and "architecture" not in raw:
        hf.read_family(raw)  # says so where the model is none of vitlib's
        if hf.LAYOUT.find(
            drop_later_blocks(tensors)
        ).matches:  # else other weights lie beside that config
            return hf.LAYOUT
    # Published backbones of the original code come in a .pth and without a head; of timm, with one.
    bare = src.weights()[0].suffix != ".safetensors" and "head.weight" not in tensors
    marked = bool(src.wrapper_keys) or (bare and not raw)
    trunk = prefix.endswith("trunk.")  # as open_clip and CONCH call a tower that timm built
    try:
        return detect.detect_layout(tensors, original=marked and not trunk)
    except CheckpointError:
        name = raw.get("architecture") or openclip.get_timm_name(src.json)
        if isinstance(name, str):
            get_architecture(name)  # raises, with the reason, where it is known and refused
        raise


def find_networks(names: Iterable[str]) -> list[str]:
    """Return the prefixes under which a file has a patch projection and blocks, in its order."""
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


def _chosen(prefixes: list[str], wanted: str, names: Mapping[str, Tensor]) -> str:
    """Return the one to take. Raises CheckpointError where nothing says which."""
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
    listed = ", ".join(f"{wanted + p!r} ({counts[p]} tensors)" for p in prefixes[:_SHOWN])
    more = f" and {len(prefixes) - _SHOWN} more" if len(prefixes) > _SHOWN else ""
    named = next(p for p in prefixes if p)
    raise CheckpointError(
        f"{len(prefixes)} networks in one file, under {listed}{more}: choose one with "
        f"prefix={wanted + named!r} (on the command line --prefix){_by_layout(prefixes, names)}"
    )


def _unexpected(
    tensors: Mapping[str, Tensor],
    start: str,
    network: str,
    others: tuple[str, ...],
    layouts: list[Layout],
) -> int | None:
    """Return how many names under a prefix no layout knows; None where none has a whole ViT."""
    inner = {
        name.removeprefix(start): tensors[name]
        for name in drop_later_blocks(tensors)
        if name.startswith(start) and not (others and name.startswith(others))
    }
    # Without this, a file of many names would be read once for every layout and every prefix.
    anchor = next(n for n in PATCH_WEIGHTS if network + n in tensors)
    count = None
    for layout in layouts:
        if (network + anchor).removeprefix(start) not in _patches_of(layout, inner):
            continue
        name_match = layout.find(layout.prepare(inner))
        if all(name in name_match.matches for name in CORE_TENSORS):
            unknown = sum(not heads.is_head(name) for name in name_match.unexpected)
            count = unknown if count is None else min(unknown, count)
    return count


def _by_layout(prefixes: list[str], tensors: Mapping[str, Tensor]) -> str:
    """Return how a layout chooses, where no two of the networks are in the same one."""
    fitting = [
        [layout.name for layout in LAYOUTS.values() if _knows(layout, prefix, tensors)]
        for prefix in prefixes[:_SHOWN]
    ]
    several = [name for names in fitting for name in names]
    if len(several) != len(set(several)) or not all(fitting):
        return ""
    names = " or ".join(f"layout={names[0]!r}" for names in fitting)
    return f", or {names} (--source-layout)"


def _knows(layout: Layout, prefix: str, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether a layout has the name of a network's patch projection."""
    return any(
        "patch_embed.proj.weight" in layout.find([name]).matches
        for name in PATCH_WEIGHTS
        if prefix + name in tensors
    )


def _patches_of(layout: Layout, inner: Mapping[str, Tensor]) -> set[str]:
    """Return which of the names that end as a patch projection a layout knows as one."""
    named = {name: inner[name] for name in inner if name.endswith(PATCH_WEIGHTS)}
    name_match = layout.find(named)
    found = name_match.matches.get("patch_embed.proj.weight", [])
    return {part.file_name for part in found} | set(name_match.repeated)


def _from(
    tensors: Mapping[str, Tensor], start: str, network: str, others: tuple[str, ...]
) -> Network:
    """Return the names under a prefix, and count the rest."""
    patch = next((tensors[network + n] for n in PATCH_WEIGHTS if network + n in tensors), None)
    width = 0 if patch is None else heads.patch_width(patch)
    names = {
        name.removeprefix(start): name
        for name in tensors
        if name.startswith(start) and not (others and name.startswith(others))
    }
    head = heads.find_outer_head(tensors, start, width) if start else {}
    if not names.keys().isdisjoint(head):
        head = {}  # The network's own head is read; half of another would be mixed into it.
    taken = {*names.values(), *head.values()}
    left: dict[str, int] = {}
    for name in tensors:
        if name not in taken:
            group = next((o for o in others if name.startswith(o)), None)
            group = group.rstrip("./") if group else _group(name, start)
            left[group] = left.get(group, 0) + 1
    names |= head
    counted = [f"{group} ({count} tensor{'s' * (count > 1)})" for group, count in left.items()]
    between = [
        group for group in left if not group.startswith(tuple(o.rstrip("./") for o in others))
    ]
    if head and between and not all(heads.is_head(f"{group}.") for group in between):
        counted[-1] += " (if one of these stands before the head, its scores are not the file's)"
    return Network(names, start, tuple(counted))


def _group(name: str, start: str) -> str:
    """Return how a name begins, to the first part in which it differs from the prefix."""
    shared = 0
    for index, (mine, other) in enumerate(zip(name, start, strict=False)):
        if mine != other:
            break
        shared = index + 1 if mine in "./" else shared
    end = re.search(r"[./]", name[shared:])
    return name[: shared + end.start()] if end else name


def _shared(tensors: Mapping[str, Tensor], layouts: list[Layout]) -> Network:
    """Cut what all names begin with, as far as a layout then knows more of them."""
    names = list(tensors)
    if not names:
        return Network({})
    first, last = min(names), max(names)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
    parts = re.findall(r"[^./]*[./]", first[:same])[:_MAX_PARTS]
    sample = drop_later_blocks(names[:_SAMPLE])
    best, most = "", -1
    for count in range(len(parts) + 1):
        start = "".join(parts[:count])
        inner = [name.removeprefix(start) for name in sample]
        ours = max(len(layout.find(inner).matches) for layout in layouts)
        if ours > most:
            best, most = start, ours
    return Network({name.removeprefix(best): name for name in names}, best)
