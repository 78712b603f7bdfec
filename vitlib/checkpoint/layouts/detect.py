"""Find the layout of a file by the names of its tensors."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from vitlib.checkpoint.layouts import hf, jax, meta, openclip, own, timm, torchvision
from vitlib.checkpoint.layouts.layout import Layout
from vitlib.checkpoint.layouts.table import NameMatch, summarise
from vitlib.errors import CheckpointError, ConfigError

LAYOUTS: Mapping[str, Layout] = {
    module.LAYOUT.name: module.LAYOUT
    for module in (hf, timm, meta, torchvision, openclip, jax, own)
}
# The first block stands for all: this keeps the matching of names short for deep models.
_LATER_BLOCK = re.compile(r"(?:blocks|layers?|encoder_layer|encoderblock)[._][1-9][0-9]*[./]")
# By vitlib's names: a file with these three tensors holds a whole ViT.
CORE_TENSORS = ("patch_embed.proj.weight", "blocks.0.attn.q.weight", "blocks.0.mlp.fc2.weight")


def get_layout(name: str) -> Layout:
    """Return a layout by its name.

    Args:
        name: One of LAYOUTS, as in load(layout=).

    Returns:
        The layout.

    Raises:
        ConfigError: No layout has this name.
    """
    if name not in LAYOUTS:
        raise ConfigError(f"layout={name!r}: expected one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def detect_layout(tensors: Mapping[str, Tensor], *, original: bool = False) -> Layout:
    """Return the layout that has most of a file's names.

    Args:
        tensors: Tensors by the names of the file.
        original: The file has marks of the original code, such as its wrapper. Most names of that
            code are also timm's; the marks decide between both layouts.

    Returns:
        The layout.

    Raises:
        CheckpointError: No layout has the names, or two layouts have a whole ViT each.
    """
    if not tensors:
        raise CheckpointError(
            "no tensors in this checkpoint: expected the weights of a ViT; give another file"
        )
    tensors = {name: tensors[name] for name in drop_later_blocks(tensors)}
    names = list(tensors)
    matches = {name: layout.find(layout.prepare(tensors)) for name, layout in LAYOUTS.items()}
    counts = {name: len(names) - len(match.unexpected) for name, match in matches.items()}
    complete = [name for name, match in matches.items() if _is_complete(match)]
    if not complete:
        raise CheckpointError(_explain_mismatch(names, matches))
    if len(complete) > 1 and counts[complete[0]] < len(names):
        _check_single_model(complete, matches)
    order = ["meta", "timm"] if original else ["timm", "meta"]
    best = max(complete, key=lambda name: (counts[name], name in order, -_rank(name, order)))
    return LAYOUTS[best]


def list_matching_layouts(tensors: Mapping[str, Tensor], layout: Layout) -> tuple[str, ...]:
    """List the layouts that have all names of a file: timm's and the original code's may coincide.

    Args:
        tensors: Tensors by the names of the file.
        layout: The layout that the file is read in.

    Returns:
        Names of the other layouts; empty unless `layout` is timm's or the original code's.
    """
    first = {name: tensors[name] for name in drop_later_blocks(tensors)}
    matches = {
        name: other.find(other.prepare(first))
        for name, other in LAYOUTS.items()
        if {name, layout.name} == {"timm", "meta"}
    }
    return tuple(
        name for name, match in matches.items() if not match.unexpected and _is_complete(match)
    )


def drop_later_blocks(names: Iterable[str]) -> list[str]:
    """Return the names without those of blocks after the first.

    Args:
        names: Names of a file's tensors.

    Returns:
        The names of the first block and of all that is outside the blocks, in the same order.
    """
    return [name for name in names if not _LATER_BLOCK.search(name)]


def _is_complete(match: NameMatch) -> bool:
    """Return True if the matched names include a whole ViT."""
    return all(name in match.matches for name in CORE_TENSORS)


def _rank(name: str, order: list[str]) -> int:
    """Return the position of a layout in an order, the end for layouts that are not in it."""
    return order.index(name) if name in order else len(order)


def _list_used(match: NameMatch) -> set[str]:
    """Return the names of a file that a layout has."""
    return {part.file_name for parts in match.matches.values() for part in parts}


def _check_single_model(complete: list[str], matches: Mapping[str, NameMatch]) -> None:
    """Raise CheckpointError if two layouts match a whole ViT in separate tensors."""
    used = {name: _list_used(matches[name]) for name in complete}
    for first, second in itertools.permutations(complete, 2):
        if first < second and not used[first] & used[second]:
            raise CheckpointError(
                f"two models in one file: {len(used[first])} tensors in the layout {first!r}, "
                f"{len(used[second])} in {second!r}: choose with layout={first!r} or "
                f"layout={second!r} (on the command line --source-layout), or split the file"
            )


def _explain_mismatch(names: list[str], matches: Mapping[str, NameMatch]) -> str:
    """Return why no layout fits, with the layout that has most of the names."""
    from vitlib.checkpoint.layouts.earth import explain_names  # only for an error

    if reason := explain_names(names):
        return reason
    counts = {name: len(_list_used(match)) for name, match in matches.items()}
    best = max(counts, key=lambda name: counts[name])
    if any(".lora_" in name for name in names):
        return (
            "a model with LoRA layers in separate tensors: expected merged weights; merge them "
            "first (peft: merge_and_unload())"
        )
    parts = [n for n in names if n.startswith("blocks.") and n.endswith((".up", ".up.weight"))]
    if parts or "patch_embed.prompt_token" in names:
        return (
            "added parts of a model without its base, as vitlib.save_delta writes them: load the "
            "base, and give it and this file to vitlib.load_delta"
        )
    if not counts[best]:
        return (
            f"{len(names)} tensors ({summarise(names[:4])}, …), and no name that a ViT has in the "
            f"layouts {', '.join(LAYOUTS)}: expected the weights of a ViT; give another file"
        )
    rest = [name for name in names if name in matches[best].unexpected]
    others = [
        f"{count} more are names of {name!r}"
        for name, match in matches.items()
        if name != best and (count := sum(other not in match.unexpected for other in rest))
    ]
    mixed = f"; {', '.join(others)}: is it half renamed?" if others else ""
    missing = [name for name in CORE_TENSORS if name not in matches[best].matches]
    return (
        f"no whole ViT: {counts[best]} of {len(names)} tensors are in the layout {best!r}, which "
        f"lacks {', '.join(missing)} (by vitlib's names){mixed}; unexpected: "
        f"{summarise(rest)[:400]}"
    )


def describe_mixed_names(names: Iterable[str], layout: Layout) -> str:
    """Describe unexpected names that belong to another layout.

    Args:
        names: Names of the file that `layout` does not have.
        layout: The layout that the file is read in.

    Returns:
        A sentence for the error message; empty if no other layout has any of the names.
    """
    rest = list(names)
    for other in LAYOUTS.values():
        if other.name != layout.name:
            count = len(rest) - len(other.find(rest).unexpected)
            if rest and count and {other.name, layout.name} != {"timm", "meta"}:
                return f"{count} of the unexpected are names of {other.name!r}: is it half renamed?"
    return ""
