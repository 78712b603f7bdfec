"""Names of points: the closed list, patterns, and the messages for names that are not there.

A point is a tensor of the forward: `blocks.3.attn.q` is the queries of block 3. Shapes: as in
vitlib/vit.py; K is the width of a head, M that of the hidden layer of the MLP.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from vitlib.encoder import MLP, Attention, Block, SwiGLU
from vitlib.errors import ConfigError
from vitlib.variants import AttentionPool, PostNormBlock, PromptedBlock, PromptedPostNormBlock
from vitlib.vit import ViT

# Points of a block in the order of the forward, and their shapes.
BLOCK_POINTS = {
    "resid_pre": "(B, T, D)",
    "attn.q": "(B, H, T, K)",
    "attn.k": "(B, H, T, K)",
    "attn.v": "(B, H, T, K)",
    "attn.scores": "(B, H, T, T)",
    "attn.probs": "(B, H, T, T)",
    "attn.heads": "(B, H, T, K)",
    "attn.out": "(B, T, D)",
    "resid_mid": "(B, T, D)",
    "mlp.hidden": "(B, T, M)",
    "mlp.out": "(B, T, D)",
    "resid": "(B, T, D)",
}
# Classes of blocks with points inside: their steps are known.
BLOCK_TYPES = (Block, PostNormBlock, PromptedBlock, PromptedPostNormBlock)
ATTENTION_POINTS = frozenset(name for name in BLOCK_POINTS if name.startswith("attn."))
# What the last block computes for the head's tokens alone, unless one of these is wanted.
ALL_TOKEN_POINTS = (
    *("attn.scores", "attn.probs", "attn.heads", "attn.out"),
    *("resid_mid", "mlp.hidden", "mlp.out", "resid"),
)


def list_points(model: ViT) -> list[str]:
    """List the points of a model, in the order of its forward.

    Args:
        model: The model. Parts of the user's own have no points inside.

    Returns:
        Names that `trace` reads and edits.
    """
    names = ["embed"]
    for index, block in enumerate(model.blocks):
        names += [f"blocks.{index}.{name}" for name in block_points(block)]
    names.append("norm")
    if has_pooled_point(model):
        if model.config.pool == "map" and type(model.attn_pool) is AttentionPool:
            names.append("pool.probs")
        names.append("pooled")
    return [*names, "logits"]


def has_pooled_point(model: ViT) -> bool:
    """Return True if one vector is all that the head reads, computed by vitlib's own methods.

    Args:
        model: The model. A distilled one has two heads.
    """
    return model.head_dist is None and type(model).forward_head is ViT.forward_head


def block_points(block: object) -> list[str]:
    """List the points of a block, without its number.

    Args:
        block: A block; of one that is not vitlib's the ends alone are points.

    Returns:
        Names from BLOCK_POINTS.
    """
    if type(block) not in BLOCK_TYPES:
        return ["resid_pre", "resid"]
    assert isinstance(block, Block)
    missing: set[str] = set()
    if not has_stock_forward(block.attn):
        missing |= ATTENTION_POINTS - {"attn.out"}
    elif block.attn.attend is not None:
        missing |= {"attn.scores", "attn.probs"}
    if type(block.mlp) not in (MLP, SwiGLU):
        missing.add("mlp.hidden")
    return [name for name in BLOCK_POINTS if name not in missing]


def has_stock_forward(attn: object) -> bool:
    """Return True if attention is computed as `Attention.forward` does, step by step.

    Args:
        attn: The attention of a block. A subclass may have a `project_qk` of its own.
    """
    return isinstance(attn, Attention) and type(attn).forward is Attention.forward


def expand_patterns(model: ViT, patterns: Iterable[str], argument: str) -> dict[str, list[str]]:
    """Find the points that each pattern names.

    Args:
        model: The model.
        patterns: Names of points, with `*` for any characters.
        argument: The argument that holds them, for messages.

    Returns:
        For each pattern the names of its points, in the order of the forward.

    Raises:
        ConfigError: A pattern names no point of the model; the message has the nearest name.
    """
    names = list_points(model)
    found: dict[str, list[str]] = {}
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ConfigError(f"{argument}={pattern!r}: expected names of points, such as 'norm'")
        if pattern in names:
            found[pattern] = [pattern]
        elif "*" in pattern:
            found[pattern] = [name for name in names if matches(name, pattern)]
        if not found.get(pattern):
            raise ConfigError(explain_unknown(model, pattern, names, argument))
        kind, depth = pattern.removeprefix("blocks.*."), len(model.blocks)
        if argument == "edit" and kind in BLOCK_POINTS and 0 < len(found[pattern]) < depth:
            without = [i for i in range(depth) if f"blocks.{i}.{kind}" not in found[pattern]]
            raise ConfigError(
                f"edit: blocks {', '.join(map(str, without))} have no point {kind!r}: name the "
                "others one by one"
            )
    return found


def matches(name: str, pattern: str) -> bool:
    """Return True if a name has the form of a pattern.

    Args:
        name: Name of a point.
        pattern: A name in which `*` stands for any characters. fnmatch's compiled patterns would
            break the graph of torch.compile.
    """
    first, *middle, last = pattern.split("*")
    if not (name.startswith(first) and name.endswith(last)):
        return False
    position, end = len(first), len(name) - len(last)
    for part in middle:
        position = name.find(part, position, end)
        if position < 0:
            return False
        position += len(part)
    return position <= end


def explain_unknown(model: ViT, pattern: str, names: list[str], argument: str) -> str:
    """Explain why a pattern names no point.

    Args:
        model: The model.
        pattern: The pattern.
        names: The points of the model.
        argument: The argument that holds the pattern, for the message.

    Returns:
        One line, with the nearest name.
    """
    depth = len(model.blocks)
    first, _, rest = pattern.removeprefix("blocks.").partition(".")
    if pattern.startswith("blocks.") and first.startswith("-") and first[1:].isdecimal():
        return (
            f"{argument}: no point {pattern!r}: blocks are counted from 0, and the last is "
            f"'blocks.{depth - 1}'"
        )
    if first.isdecimal() and pattern.startswith("blocks.") and int(first) >= depth:
        return f"{argument}: no point {pattern!r}: the model has blocks 0 to {depth - 1}"
    if rest in BLOCK_POINTS and pattern.startswith("blocks."):
        part = "mlp" if rest.startswith("mlp") else "attn"
        return (
            f"{argument}: no point {pattern!r} in this model: its blocks.{first} or its {part} is "
            "not vitlib's own, and only its ends are points"
        )
    short = {name.split(".")[-1]: f"blocks.*.{name}" for name in BLOCK_POINTS}
    short |= {f"blocks.*.{name}": f"blocks.*.{name}" for name in BLOCK_POINTS}
    choices = short | {name: name for name in names}
    if pattern.startswith("blocks.") and first.isdecimal():  # the nearest of this block
        choices = {name: name for name in names if name.startswith(f"blocks.{first}.")}
    lower = {name.lower(): name for name in choices}
    near = lower[(get_close_matches(pattern.lower(), lower, 1, 0.0) or ["embed"])[0]]
    ends = ", ".join(name for name in names if not name.startswith("blocks."))
    return (
        f"{argument}: no point {pattern!r}; the nearest is {choices[near]!r}; points are "
        f"{ends}, and of each block {', '.join(BLOCK_POINTS)}"
    )
