"""Causes of a difference inside a block, found by changing one module to be as the other."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlib.encoder import Attention, RotaryAttention
from vitlib.points.names import has_stock_forward
from vitlib.testing.case import (
    EQUAL,
    Case,
    Side,
    differ_in_parameters,
    match_rows,
    near,
    per_channel_ratio,
)
from vitlib.testing.distance import relative_distance
from vitlib.testing.states import States

_NOTHING = 1e-9  # relative size of a branch that is not added, in float64
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "GELU, erf form": F.gelu,
    "GELU, tanh form": lambda x: F.gelu(x, approximate="tanh"),
    "quick GELU, x sigmoid(1.702 x)": lambda x: x * torch.sigmoid(1.702 * x),
    "ReLU": F.relu,
    "SiLU": F.silu,
    "squared ReLU": lambda x: F.relu(x).square(),
    "SwiGLU, gate first": lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
    "SwiGLU, gate last": lambda x: F.silu(x.chunk(2, -1)[1]) * x.chunk(2, -1)[0],
    "GEGLU, gate first": lambda x: F.gelu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
    "no activation": lambda x: x,
}


def explain_qkv(case: Case) -> str | None:
    """Find why queries, keys or values differ: their order, scale, or weights.

    Args:
        case: The difference.

    Returns:
        A sentence, or None.
    """
    pairs = {letter: case.pair(f"attn.{letter}") for letter in "qkv"}
    a = {letter: pair[0] for letter, pair in pairs.items() if pair}
    b = {letter: pair[1] for letter, pair in pairs.items() if pair}
    if _are_swapped(a, b):
        return "q and k are swapped"
    for order in permutations(a):
        if order != tuple(a) and all(near(a[x], b[y]) for x, y in zip(a, order, strict=True)):
            if order[:2] == ("k", "q"):
                return "q and k are swapped"
            return f"order of q, k, v: the {', '.join(a)} of the model are the reference's " + (
                ", ".join(order)
            )
    letter = case.kind[-1]
    # A fused layer gives all q first in timm's code, and q, k, v head by head elsewhere.
    for side in case.sides():
        whole = side.state("attn.qkv")
        for count in _head_counts(side) if whole is not None else ():
            assert whole is not None
            by_head = whole.reshape(*whole.shape[:-1], count, 3, -1)
            if side.explains(by_head[..., "qkv".index(letter), :].flatten(-2)):
                return (
                    f"order of q, k, v: rows of the {side.own.role}'s fused layer are of head 1 "
                    "(q, k, v), head 2 (q, k, v), ..., not all q, all k, all v"
                )
        factor = (side.x * side.y).sum() / side.x.square().sum()
        if side.explains(side.x * factor):
            return f"{letter} of the {side.other.role} is {factor:.4g} times the {side.own.role}'s"
    text = differ_in_parameters(case, letter)
    if text is not None and not text.endswith("same numbers in another order"):
        return text
    if near(*(x.sort(dim=-1)[0] for x in (case.a[case.point], case.b[case.point]))):
        return (
            f"order of channels: {letter} has the same numbers in another order (rotary pairs as "
            "halves or as neighbours, heads in another order)"
        )
    return text


def _are_swapped(a: States, b: States) -> bool:
    """Return True if queries are the other's keys and keys its queries, in one order."""
    if not {"q", "k"} <= {*a} & {*b} or any(x.ndim != 3 for x in (*a.values(), *b.values())):
        return False
    orders = [match_rows(a[x][0].mT, b[y][0].mT) for x, y in (("q", "k"), ("k", "q"))]
    return orders[0] is not None and orders[0] == orders[1]


def _head_counts(side: Side) -> list[int]:
    """List numbers of heads to try, the known one first."""
    width = side.y.shape[-1]
    known = [s.vit.config.num_heads for s in (side.own, side.other) if s.vit is not None]
    return [*known, *(n for n in range(1, 65) if width % n == 0 and n not in known)]


def explain_heads(case: Case) -> str | None:
    """Find why equal queries, keys and values are attended to otherwise.

    Args:
        case: The difference.

    Returns:
        A sentence, or None.
    """
    for side in case.sides():
        if side.explains(_attend_swapped(side)):
            return "q and k are swapped"
        for label, heads in _attend_with_positions(side):
            if side.explains(heads):
                return f"{label}: that gives the {side.other.role}'s values in the {side.own.role}"
    labels = []
    for side in case.sides():
        tried = _attend_plainly(side)
        labels.append(next((label for label, heads in tried if near(heads, side.x)), None))
    if None not in labels and labels[0] != labels[1]:
        return f"attention: the model computes {labels[0]}, the reference {labels[1]}"
    return None


def usual_heads(case: Case) -> str:
    """Return what usually makes equal queries, keys and values give other heads.

    Args:
        case: The difference.
    """
    parts = [getattr(side.block(), "attn", None) for side in case.sides()]
    vits = [subject.vit for subject in (case.model, case.reference)]
    causes = [] if case.pair("attn.q") else ["weights or order of q, k and v"]
    if any(isinstance(attn, RotaryAttention) for attn in parts):
        causes.append(
            "rotary positions (table, base, order of axes, pairs as halves or as neighbours, "
            "tokens that are rotated)"
        )
    if any(vit is not None and vit.config.positions.relative for vit in vits):
        causes.append("relative position bias (table, order of its rows)")
    if any(isinstance(attn, Attention) and attn.q_norm is not None for attn in parts):
        causes.append("norms of queries and keys")
    return ", ".join([*causes, "number of heads, scale of the scores, or a mask"])


def _attend_swapped(side: Side) -> Tensor | None:
    """Attend with queries and keys exchanged, in a ViT of vitlib.

    Code that joins weights and biases when it is called shows no q and k that could be compared.
    """
    vit, block, x = side.own.vit, side.block(), side.state("norm1")
    if vit is None or block is None or x is None or not has_stock_forward(block.attn):
        return None
    attn = copy.deepcopy(block.attn)
    attn.q, attn.k = attn.k, attn.q
    position = list(vit.attn_positions(side.case.images))[side.case.index]
    q, k, bias = attn.project_qk(x, None, position)
    heads = F.scaled_dot_product_attention(q, k, attn.split_heads(attn.v(x)), bias)
    return heads.transpose(1, 2).flatten(2)


def _attend_with_positions(side: Side) -> Iterator[tuple[str, Tensor | None]]:
    """Yield attended values of a ViT of vitlib with other positions."""
    vit, block, x = side.own.vit, side.block(), side.state("norm1")
    if vit is None or block is None or x is None or not isinstance(block.attn, Attention):
        return
    position = list(vit.attn_positions(side.case.images))[side.case.index]
    if position is None:
        return
    if isinstance(block.attn, RotaryAttention):
        h, w = vit.patch_grid(side.case.images)
        tries = {
            "rotary positions without a rotation": torch.stack(
                (torch.ones_like(position[0]), torch.zeros_like(position[1]))
            ),
            "rotary table one patch later": position.roll(1, dims=-2),
            "rotary table one patch earlier": position.roll(-1, dims=-2),
            "rotary positions with the other sign of the angles": torch.stack(
                (position[0], -position[1])
            ),
        }
        if position.shape[-2] == h * w:
            grid = position.reshape(*position.shape[:-2], h, w, -1)
            flipped = grid.transpose(-3, -2).flatten(-3, -2)
            tries["rotary positions with rows and columns exchanged"] = flipped
    else:
        tries = {"no relative position bias": torch.zeros_like(position)}
    v = block.attn.split_heads(block.attn.v(x))
    for label, table in tries.items():
        q, k, bias = block.attn.project_qk(x, None, table)
        heads = F.scaled_dot_product_attention(q, k, v, bias)
        yield label, heads.transpose(1, 2).flatten(2)


def _attend_plainly(side: Side) -> Iterator[tuple[str, Tensor]]:
    """Yield attended values for numbers of heads, scales and masks, from a module's own q, k, v."""
    triple = [side.state(f"attn.{letter}") for letter in "qkv"]
    # Keys that heads share are narrower.
    if any(x is None or x.ndim != 3 or x.shape != side.x.shape for x in triple):
        return
    whole = side.state("attn.qkv")
    for count in _head_counts(side):
        q, k, v = (_split(x, count) for x in triple if x is not None)
        yield from _attend_variants(q, k, v, f"{count} heads")
        if whole is not None:
            q, k, v = whole.reshape(*whole.shape[:-1], count, 3, -1).permute(3, 0, 2, 1, 4)
            label = f"{count} heads in the order of q, k, v by head, not all q first"
            yield from _attend_variants(q, k, v, label)


def _attend_variants(q: Tensor, k: Tensor, v: Tensor, label: str) -> Iterator[tuple[str, Tensor]]:
    """Yield attended values for scales and masks, heads side by side."""
    count, width = q.shape[1], q.shape[-1]
    for scale, name in (
        (width**-0.5, ""), (1.0, " without a scale"), (1 / width, " and a scale of 1 / head_dim"),
        ((count * width) ** -0.5, " and a scale of embed_dim**-0.5"),
    ):  # fmt: skip
        scores = q @ k.mT * scale
        for axis, suffix in ((-1, ""), (-2, ", with a softmax over queries")):
            heads = scores.softmax(axis) @ v
            yield f"{label}{name}{suffix}", heads.transpose(1, 2).flatten(2)
    causal = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    yield f"{label} and a causal mask", causal.transpose(1, 2).flatten(2)


def _split(x: Tensor, count: int) -> Tensor:
    """Split channels into heads, (B, T, D) -> (B, H, T, K)."""
    return x.reshape(*x.shape[:-1], count, -1).transpose(1, 2)


def explain_residual(case: Case) -> str | None:
    """Find why a branch is added otherwise: LayerScale, its norm, or the residual.

    Args:
        case: The difference.

    Returns:
        A sentence, or None.
    """
    is_first = case.kind == "resid_mid"
    stream, branch = ("resid_pre", "attn.out") if is_first else ("resid_mid", "mlp.out")
    norm, scale, name = ("norm1", "ls1", "attention") if is_first else ("norm2", "ls2", "MLP")
    factors: list[Tensor | None] = []
    for side in case.sides():
        x, y = side.state(stream), side.state(branch)
        if x is None or x.shape != side.x.shape:
            return None
        # A fresh LayerScale of 1e-5 leaves nearly as little of a branch.
        if relative_distance(side.x, x) < _NOTHING:
            hint = ", or adds that of the MLP beside it (a parallel block)" if is_first else ""
            return f"residual: the {side.own.role} does not add the {name} branch{hint}"
        if y is None or y.shape != side.x.shape:
            return None
        normed = side.state(norm)
        if near(side.x, y):
            return f"residual: the {side.own.role} does not add the block's input"
        if normed is not None and not near(normed, x) and near(side.x - normed, y):
            return f"pre-norm: the {side.own.role} adds the branch to the normalised tokens"
        if normed is not None and near(side.x - x, normed) and not near(y, normed):
            return f"post-norm: the {side.own.role} normalises the branch before it is added"
        # A branch without LayerScale has a factor of 1 in every channel.
        factors.append(per_channel_ratio(y, side.x - x))
    a, b = factors
    if a is None or b is None:
        return None
    missing = [role for role, f in (("model", a), ("reference", b)) if near(f, torch.ones_like(f))]
    if missing:
        return f"LayerScale: missing in the {missing[0]} ({scale})"
    if relative_distance(a, b) <= case.eps:
        return None
    return (
        f"LayerScale: other factors ({scale}), or another scale of the {name} branch, relative "
        f"{relative_distance(a, b):.2g}"
    )


def explain_activation(case: Case) -> str | None:
    """Find which activations both modules compute.

    Args:
        case: The difference.

    Returns:
        A sentence, or None.
    """
    labels: list[str] = []
    for side in case.sides():
        x = side.state("mlp.fc1")
        if x is None or not near(x, side.others.get(f"{case.prefix}mlp.fc1")):
            return None
        # After small weights two forms are near, and one of them is nearer.
        outputs = ((name, _apply(activate, x)) for name, activate in _ACTIVATIONS.items())
        gaps = [(relative_distance(y, side.x), n) for n, y in outputs if y is not None]
        gap, name = min(gaps, default=(math.inf, ""))
        labels.append(name if gap < EQUAL else "another activation")
    a, b = labels
    return None if a == b else f"activation: the model computes {a}, the reference {b}"


def _apply(activate: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
    """Apply an activation; None for one of two halves, where the width is odd."""
    return activate(x) if x.shape[-1] % 2 == 0 else None


def explain_linear(case: Case) -> str | None:
    """Compare the weights of a linear layer, and the place of a norm before it.

    Args:
        case: The difference.

    Returns:
        A sentence, or None.
    """
    return differ_in_parameters(case, f"weights of {case.kind}")
