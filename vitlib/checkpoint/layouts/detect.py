"""Which layout a file is in, by the names of its tensors."""

from __future__ import annotations

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
_LATER_BLOCK = re.compile(r"(?:blocks|layers?|encoder_layer|encoderblock)[._][1-9][0-9]*[./]")
CORE_TENSORS = ("patch_embed.proj.weight", "blocks.0.attn.q.weight", "blocks.0.mlp.fc2.weight")


def get_layout(name: str) -> Layout:
    """One by its name. Raises ConfigError where there is none such."""
    if name not in LAYOUTS:
        raise ConfigError(f"layout={name!r}: expected one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def detect_layout(tensors: Mapping[str, Tensor], *, original: bool = False) -> Layout:
    """The layout that knows the names of these tensors.

    original: the file has marks of the original code (its wrapper), whose names are mostly timm's.
    Raises CheckpointError where two layouts hold a whole ViT each, and where none knows the names.
    """
    if not tensors:
        raise CheckpointError("no tensors in this checkpoint")
    tensors = {name: tensors[name] for name in drop_later_blocks(tensors)}
    names = list(tensors)
    found = {name: layout.find(layout.prepare(tensors)) for name, layout in LAYOUTS.items()}
    known = {name: len(names) - len(name_match.unexpected) for name, name_match in found.items()}
    whole = [
        name
        for name, name_match in found.items()
        if all(n in name_match.matches for n in CORE_TENSORS)
    ]
    if not whole:
        raise CheckpointError(_no_vit(names, found))
    if len(whole) > 1 and known[whole[0]] < len(names):
        _refuse_two(whole, found)
    order = ["meta", "timm"] if original else ["timm", "meta"]
    best = max(whole, key=lambda name: (known[name], name in order, -_rank(name, order)))
    return LAYOUTS[best]


def list_matching_layouts(tensors: Mapping[str, Tensor], layout: Layout) -> tuple[str, ...]:
    """Other layouts that know all these names too: timm's plain names are the original code's."""
    first = {name: tensors[name] for name in drop_later_blocks(tensors)}
    found = {
        name: other.find(other.prepare(first))
        for name, other in LAYOUTS.items()
        if {name, layout.name} == {"timm", "meta"}
    }
    whole = [
        n
        for n, x in found.items()
        if not x.unexpected and all(w in x.matches for w in CORE_TENSORS)
    ]
    return tuple(whole)


def drop_later_blocks(names: Iterable[str]) -> list[str]:
    """The names without those of later blocks: the first speaks for all."""
    return [name for name in names if not _LATER_BLOCK.search(name)]


def _rank(name: str, order: list[str]) -> int:
    return order.index(name) if name in order else len(order)


def _refuse_two(whole: list[str], found: Mapping[str, NameMatch]) -> None:
    """Raise CheckpointError where two layouts each hold a whole ViT of tensors of its own."""
    used = {
        name: {f.file_name for several in found[name].matches.values() for f in several}
        for name in whole
    }
    for one in whole:
        for other in whole:
            if one < other and not used[one] & used[other]:
                raise CheckpointError(
                    f"two models in one file: {len(used[one])} tensors in the layout {one!r}, "
                    f"{len(used[other])} in {other!r}: choose with layout={one!r} or "
                    f"layout={other!r} (on the command line --source-layout), or split the file"
                )


def _no_vit(names: list[str], found: Mapping[str, NameMatch]) -> str:
    """Why no layout takes them: whose names they nearly are."""
    count = {
        name: len({f.file_name for v in x.matches.values() for f in v}) for name, x in found.items()
    }
    best = max(count, key=lambda name: count[name])
    first = summarise(names[:4])
    if any(".lora_" in name for name in names):
        return (
            "a model with LoRA layers beside its own: merge them first (peft: merge_and_unload())"
        )
    if not count[best]:
        return (
            f"{len(names)} tensors ({first}, …) and none that a ViT has in the layouts "
            f"{', '.join(LAYOUTS)}: this is another model"
        )
    rest = [name for name in names if name in found[best].unexpected]
    others = [
        f"{n} more are {name}'s"
        for name, name_match in found.items()
        if name != best and (n := sum(r not in name_match.unexpected for r in rest))
    ]
    mixed = f"; {', '.join(others)}: is it half renamed?" if others else ""
    lacking = [name for name in CORE_TENSORS if name not in found[best].matches]
    return (
        f"no whole ViT: {count[best]} of {len(names)} tensors are in the layout {best!r}, which "
        f"lacks {', '.join(lacking)} (our names){mixed}; unexpected: {summarise(rest)[:400]}"
    )


def describe_mixed_names(names: Iterable[str], layout: Layout) -> str:
    """What to say of names that a layout does not know and another does; empty where none does."""
    rest = list(names)
    for other in LAYOUTS.values():
        if other.name != layout.name:
            mine = len(rest) - len(other.find(rest).unexpected)
            if rest and mine and {other.name, layout.name} != {"timm", "meta"}:
                return f"{mine} of the unexpected are names of {other.name!r}: is it half renamed?"
    return ""
