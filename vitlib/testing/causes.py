"""The usual causes of a difference, by the point that differs first."""

from __future__ import annotations

from collections.abc import Callable

from vitlib.testing.block_causes import (
    explain_activation,
    explain_heads,
    explain_linear,
    explain_qkv,
    explain_residual,
    usual_heads,
)
from vitlib.testing.case import TOKENS, Case
from vitlib.testing.norm_causes import explain_norm
from vitlib.testing.token_causes import (
    explain_between,
    explain_block,
    explain_count,
    explain_embedding,
    explain_exchange,
    usual_embedding,
)
from vitlib.testing.trunk_causes import (
    explain_output,
    explain_patches,
    explain_pixels,
    explain_pooled,
)

Explain = Callable[[Case], str | None]
Usual = str | Callable[[Case], str]


def usual_between(case: Case) -> str:
    """Return what usually makes a block take other tokens.

    Args:
        case: The difference.
    """
    if case.index <= 0:
        return usual_embedding(case)
    before = f"blocks.{case.index - 1}.resid"
    if before in case.a and before in case.b:
        return "what runs between two blocks: a norm, prompts, or tokens that one drops or merges"
    return f"a part of block {case.index - 1}"


# For each kind of point the search, and what is usual where it finds nothing.
CAUSES: dict[str, tuple[Explain, Usual]] = {
    "pixels": (explain_pixels, "preprocessing range, or order of channels"),
    "patch_embed.proj": (
        explain_patches,
        "weights of the patch projection, or preprocessing range",
    ),
    "embed": (explain_embedding, usual_embedding),
    "resid_pre": (explain_between, usual_between),
    "norm1": (explain_norm, "eps or weights of the norm, or pre-norm in place of post-norm"),
    "attn.q": (explain_qkv, "order of q, k and v, their weights, or another block"),
    "attn.k": (explain_qkv, "order of q, k and v, their weights, or another block"),
    "attn.v": (explain_qkv, "order of q, k and v, their weights, or another block"),
    "attn.heads": (explain_heads, usual_heads),
    "attn.out": (explain_linear, "weights of the output projection, or a norm before it"),
    "resid_mid": (explain_residual, "LayerScale, a norm after the branch, or the residual"),
    "norm2": (explain_norm, "eps or weights of the norm, or pre-norm in place of post-norm"),
    "mlp.fc1": (explain_linear, "weights of the first layer of the MLP"),
    "mlp.hidden": (explain_activation, "activation: erf, tanh or quick GELU"),
    "mlp.out": (explain_linear, "weights of the second layer of the MLP, or a norm before it"),
    "resid": (explain_block, "LayerScale, a norm after the branch, or the residual"),
    "norm": (explain_norm, "final norm: missing, its eps or weights"),
    "pooled": (explain_pooled, "pooling: class token or mean of patches, or a final norm"),
}
_OUTPUT: tuple[Explain, Usual] = (
    explain_output,
    "head, pooling, final norm, or preprocessing range",
)
# Modules of two files that have the same paths, but no known names.
_UNKNOWN: tuple[Explain, Usual] = (explain_linear, "weights or settings of this module")


def explain(case: Case, *, is_output: bool, is_exact: bool) -> tuple[str, bool]:
    """Find the cause of a difference.

    Args:
        case: The first point that differs.
        is_output: The point is an output of both modules.
        is_exact: Both modules are in float64. Others may not take the tensors of a trial.

    Returns:
        A sentence, and True where a trial shows it, False where it is only usual.
    """
    a, b = case.a[case.point], case.b[case.point]
    for role, x in (("model", a), ("reference", b)):
        if not bool(x.isfinite().all()):
            return f"values that are not finite in the {role}", True
    search, words = _OUTPUT if is_output else CAUSES.get(case.kind, _UNKNOWN)
    usual = words if isinstance(words, str) else words(case)
    if a.shape != b.shape and case.kind in TOKENS:
        search = explain_count
    elif a.shape != b.shape and search not in (explain_patches, explain_output):
        return usual, False
    try:
        cause = search(case) or (explain_exchange(case) if case.prefix else None)
    except RuntimeError:
        if is_exact:
            raise
        cause = None
    return (usual, False) if cause is None else (cause, True)
