"""Points of a module that is not vitlib's: the module, by its path, at which each tensor is.

How data flows: the blocks are the longest numbered list of modules of a known form; each point of
a block is then at the first of some usual names that the block has. The names are those of
transformers, timm, DINOv2's code, open_clip and torchvision.

A source is a path, for the output of a module there; "path:in" is its input; "a + b" are the
outputs of two modules, side by side. Queries, keys and values of one source are its thirds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from itertools import accumulate

import torch
from torch import nn

from vitlib.errors import ConfigError

Sources = dict[str, str]  # full name of a point -> its source

_ATTENTION = ("attn", "attention", "self_attn", "self_attention", "attention.attention", "mixer")
_MLP = ("mlp", "ffn", "feed_forward")


def _within(parents: tuple[str, ...], *names: str) -> tuple[str, ...]:
    """Join each parent to each name; " + " and ":in" in a name stay where they are."""
    return tuple(
        " + ".join(f"{parent}.{name}" for name in choice.split(" + "))
        for choice in names
        for parent in parents
    )


_NORM1 = (
    *("norm1", "layernorm_before", "layer_norm1", "ln_1", "rms_norm1", "ln1", "norm_1"),
    *("attention_norm", "attn_norm", "input_layernorm"),
)
_NORM2 = (
    *("norm2", "layernorm_after", "layer_norm2", "ln_2", "rms_norm2", "ln2", "norm_2"),
    *("ffn_norm", "mlp_norm", "post_attention_layernorm"),
)
_FUSED = _within(_ATTENTION, "qkv", "qkv_proj", "to_qkv", "in_proj", "Wqkv")
_PROJ = (
    *_within(_ATTENTION, "proj", "o_proj", "out_proj", "projection_layer", "to_out", "to_out.0"),
    *("attention.output.dense", "attention.output"),
)
_SUB_NORM = _within(_ATTENTION, "norm", "inner_attn_ln", "sub_norm")
_FC1 = (
    *_within(_MLP, "fc1", "c_fc", "w12", "gate_proj + up_proj", "fc1_g + fc1_x", "w1 + w2"),
    *_within(_MLP, "up_proj", "w1", "linear_1", "lin1", "net.0", "0"),
    *("intermediate.dense", "intermediate", "linear1", "fc1"),
)
_FC2 = (
    *_within(_MLP, "fc2", "c_proj", "w3", "down_proj", "w2", "linear_2", "lin2", "net.3", "3"),
    *("output.dense", "output", "linear2", "fc2"),
)


def _inputs(paths: Iterable[str]) -> tuple[str, ...]:
    """Return the sources of the inputs of modules."""
    return tuple(f"{path}:in" for path in paths)


# Sources of each point of a block, the most specific first. norm1.in and norm2.in are no points of
# vitlib: they show whether norms come before branches or after them.
BLOCK_SOURCES: dict[str, tuple[str, ...]] = {
    "norm1.in": _inputs(_NORM1),
    "norm1": _NORM1,
    **{
        f"attn.{letter}": (
            *_within(_ATTENTION, f"{letter}_proj", letter, name, f"to_{letter}", f"proj_{letter}"),
            *_FUSED,
        )
        for letter, name in (("q", "query"), ("k", "key"), ("v", "value"))
    },
    "attn.heads": _inputs((*_SUB_NORM, *_PROJ)),
    "attn.out": (*_PROJ, *_ATTENTION),
    "resid_mid": _inputs(_NORM2),
    "norm2.in": _inputs(_NORM2),
    "norm2": _NORM2,
    "mlp.fc1": _FC1,
    "mlp.hidden": (*_inputs(_within(_MLP, "norm", "ffn_ln", "sub_norm")), *_inputs(_FC2)),
    "mlp.out": (*_FC2, *_MLP),
}
# Sources in the trunk, below any module that encloses the blocks.
TRUNK_SOURCES: dict[str, tuple[str, ...]] = {
    "pixels": _inputs(
        _PATCH := (
            *("patch_embed.proj", "embeddings.patch_embeddings.projection", "patch_embedding"),
            *("embeddings.patch_embedding", "embeddings.patch_embeddings", "conv_proj", "conv1"),
            *("embeddings.patch_embed", "patch_embed", "patch_embeddings", "to_patch_embedding"),
        )
    ),
    "patch_embed.proj": _PATCH,
    "norm": ("norm", "layernorm", "post_layernorm", "rms_norm", "ln_post", "ln", "encoder.ln"),
    "pooled": _inputs(
        _HEAD := (
            "head",
            "classifier",
            "heads.head",
            "heads",
            "fc",
            "mlp_head",
            "visual_projection",
        )
    ),
    "logits": _HEAD,
}
# The order in which points are compared. Those that no forward of vitlib names are modules.
BLOCK_ORDER = ("resid_pre", *(n for n in BLOCK_SOURCES if not n.endswith(".in")), "resid")
_OTHER_TOWERS = {"text_model", "text", "decoder"}


def order_points(depth: int) -> list[str]:
    """List every point that can be compared, in the order of a forward.

    Args:
        depth: Number of blocks.
    """
    blocks = [f"blocks.{index}.{name}" for index in range(depth) for name in BLOCK_ORDER]
    return ["pixels", "patch_embed.proj", "embed", *blocks, "norm", "pooled", "logits"]


def find_blocks(module: nn.Module) -> list[str]:
    """Find the blocks of a module.

    Args:
        module: Any module.

    Returns:
        Paths of its blocks in order: of the longest list whose modules have a norm and attention
        or an MLP of a known name; empty if there is none.
    """
    # The longest list, as towers of texts and decoders are shorter or have known names.
    paths = {name for name, _ in module.named_modules()}
    lists = Counter[str]()
    for path in paths:
        match = re.fullmatch(r"(.*?)(\d+)", path)
        if match and _is_block(path, paths) and not set(path.split(".")) & _OTHER_TOWERS:
            lists[match[1]] += 1
    if not lists:
        return []
    prefix = max(sorted(lists), key=lambda name: lists[name])
    numbers = sorted(
        int(p[len(prefix) :]) for p in paths if re.fullmatch(re.escape(prefix) + r"\d+", p)
    )
    return [f"{prefix}{number}" for number in numbers if _is_block(f"{prefix}{number}", paths)]


def _is_block(path: str, paths: set[str]) -> bool:
    """Return True if a module has a norm, and attention or an MLP."""
    has_norm = any(f"{path}.{name}" in paths for name in _NORM1)
    return has_norm and any(f"{path}.{name}" in paths for name in (*_ATTENTION, *_MLP))


def guess_sources(module: nn.Module) -> Sources:
    """Guess the points of a module from the names of its modules.

    Args:
        module: Any module.

    Returns:
        Sources of the points that have one; empty if no blocks have a known form.
    """
    paths, blocks = {name for name, _ in module.named_modules()}, find_blocks(module)
    # TorchScript takes no hooks.
    if not blocks or isinstance(module, torch.jit.ScriptModule):
        return {}
    sources: Sources = {"embed": f"{blocks[0]}:in"}
    for index, block in enumerate(blocks):
        prefix = f"blocks.{index}."
        sources |= {f"{prefix}resid_pre": f"{block}:in", f"{prefix}resid": block}
        for name, choices in BLOCK_SOURCES.items():
            source = _first_present(choices, f"{block}.", paths)
            if source is not None:
                sources[prefix + name] = source
    parts = blocks[0].split(".")[:-1]
    above = ["", *(f"{prefix}." for prefix in accumulate(parts, lambda a, b: f"{a}.{b}"))]
    for name, choices in TRUNK_SOURCES.items():
        # SigLIP's trunk has a pool by the name of a head: the head is the outermost of its names.
        for prefix in above if name in ("pooled", "logits") else reversed(above):
            source = _first_present(choices, prefix, paths)
            if source is not None:
                sources[name] = source
                break
    return sources


def _first_present(choices: tuple[str, ...], prefix: str, paths: set[str]) -> str | None:
    """Return the first source whose modules exist, with a prefix, or None."""
    for choice in choices:
        source = " + ".join(prefix + part for part in choice.split(" + "))
        if all(path in paths for path, _ in split_source(source)):
            return source
    return None


def split_source(source: str) -> list[tuple[str, str]]:
    """Split a source into paths and sides.

    Args:
        source: Such as "blocks.0.mlp.fc2:in" or "mlp.gate_proj + mlp.up_proj".

    Returns:
        Each path with "in" or "out".
    """
    parts = [part.strip().partition(":") for part in source.split("+")]
    return [(path, side or "out") for path, _, side in parts]


def expand_sources(module: nn.Module, patterns: Mapping[str, str]) -> Sources:
    """Find the modules that a caller's map names.

    Args:
        module: The module.
        patterns: Points, and their sources in this module; `*` is the number of a block in both.

    Returns:
        Sources by the full names of points.

    Raises:
        ConfigError: A name is no point, or no module has the path.
    """
    paths = [name for name, _ in module.named_modules() if name]
    if isinstance(module, torch.jit.ScriptModule):
        raise ConfigError("points: TorchScript shows none: expected the module that was traced")
    sources: Sources = {}
    for point, source in patterns.items():
        check_point(point)
        if "*" not in point:
            expanded = {point: source}
        else:
            parts = [re.escape(path).replace(r"\*", r"(\d+)") for path, _ in split_source(source)]
            matches = (re.fullmatch(parts[0], path) for path in paths)
            numbers = sorted({int(match[1]) for match in matches if match and match.groups()})
            expanded = {
                point.replace("*", str(index)): source.replace("*", str(number))
                for index, number in enumerate(numbers)
            }
        missing = [p for s in expanded.values() for p, _ in split_source(s) if p not in paths]
        if missing or not expanded:
            near = get_close_matches((missing or [source])[0], paths, 1, 0.0)
            hint = f"; the nearest path is {near[0]!r}" if near else ""
            raise ConfigError(
                f"points[{point!r}]: {type(module).__name__} has no module {source!r}{hint}"
            )
        sources |= expanded
    return sources


# Points that are the input of a module at whose output another point is.
_INPUTS = {
    "norm1.in": "norm1",
    "norm2.in": "norm2",
    "resid_mid": "norm2",
    "resid_pre": "resid",
    "attn.heads": "attn.out",
    "mlp.hidden": "mlp.out",
    "pixels": "patch_embed.proj",
    "pooled": "logits",
}


def complete_sources(module: nn.Module, sources: Sources) -> Sources:
    """Add the points that follow from others: the inputs of their modules.

    Args:
        module: The module.
        sources: Sources by the full names of points.

    Returns:
        More sources; those that were there are unchanged.
    """
    more: Sources = {}
    for prefix in _block_prefixes(sources):
        for name, at in _INPUTS.items():
            source = sources.get(prefix + at, "")
            if not source or ":" in source or "+" in source:
                continue
            # Another module than a linear layer may hold a whole branch.
            is_branch = at in ("attn.out", "mlp.out", "logits")
            if not is_branch or isinstance(module.get_submodule(source), nn.Linear):
                more[prefix + name] = f"{source}:in"
    first = (more | sources).get("blocks.0.resid_pre")
    return more | ({} if first is None else {"embed": first}) | sources


def _block_prefixes(sources: Sources) -> set[str]:
    """Return the prefixes of names: of each block, and none for the trunk."""
    blocks = {".".join(name.split(".")[:2]) + "." for name in sources if name[:7] == "blocks."}
    return blocks | {""}


def check_point(point: str) -> None:
    """Check that a caller's name is that of a point.

    Args:
        point: Such as "blocks.*.attn.q" or "norm".

    Raises:
        ConfigError: It is none.
    """
    names = [name.replace("blocks.0.", "blocks.*.") for name in order_points(1)]
    if re.sub(r"^blocks\.\d+\.", "blocks.*.", point) not in names:
        near = get_close_matches(point, names, 1, 0.0)[0]
        raise ConfigError(f"points: no point {point!r}; the nearest is {near!r}")
