"""Attention on a GPU by a kernel that is chosen here, without torch's process-wide settings.

torch.nn.attention.sdpa_kernel() would choose too, but its flags are those of all threads: two at
once leave them as the other found them. Each fused kernel is an operation of its own, and is called
as that. docs/performance.md says which serves what, and why.

Shapes: B images, Q tokens that ask (the first Q of T), T tokens, H heads, K = D / H.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# "any": whatever torch's own dispatcher takes, at worst its plain products.
Kernel = Literal["cudnn", "flash", "efficient", "any"]

# cuDNN before 9.15.1 reads out of bounds where the tokens are no multiple of 128
# (pytorch#169849, #171627), which is nearly every number of tokens of a ViT.
SOUND_CUDNN = 91501
ALIGNMENT = 16  # elements of a bias's rows: otherwise the efficient kernel copies it at every call


class Card(NamedTuple):
    """A GPU, as far as the choice asks."""

    capability: tuple[int, int]
    cudnn: int = 0  # 91501 is 9.15.1; 0: there is none, or it does not compute what it should
    is_nvidia: bool = True


def card_of(device: torch.device) -> Card:
    """Return what a device is; of one that is no GPU, as a CPU runs all kernels' definition."""
    if device.type != "cuda":
        return Card((0, 0))
    card = Card(
        torch.cuda.get_device_capability(device),
        torch.backends.cudnn.version() or 0,  # type: ignore[no-untyped-call]
        torch.version.hip is None,
    )
    wanted = choose(card, torch.bfloat16, 197, 197, 64, has_bias=False) == "cudnn"
    return card._replace(cudnn=0) if wanted and not has_cudnn(device) else card


def has_bfloat16(device: torch.device) -> bool:
    """Whether a GPU computes in bfloat16; NVIDIA's before Ampere emulate it."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def choose(
    card: Card, dtype: torch.dtype, queries: int, tokens: int, head_dim: int, *, has_bias: bool
) -> Kernel:
    """Choose the kernel of an attention.

    Args:
        card: The GPU.
        dtype: Of queries, keys and values.
        queries: Q, the tokens that ask.
        tokens: T.
        head_dim: K.
        has_bias: Whether a bias is added to the scores.

    Returns:
        The name of the kernel, see serve.
    """
    if head_dim % 8 or head_dim > 256:  # which the fused kernels would have to pad
        return "any"
    if dtype == torch.float32 or has_bias:  # flash takes neither
        return "efficient"
    if card.is_nvidia and card.capability < (8, 0):
        return "efficient"
    # Hopper alone: elsewhere cuDNN is no faster (0.82 to 1.0 of flash on A100, L40S and RTX PRO
    # 6000), and on a B200 it corrupts models of fewer than 8 heads (pytorch#193893).
    hopper = card.is_nvidia and card.capability == (9, 0)
    if hopper and card.cudnn >= SOUND_CUDNN and queries == tokens and head_dim <= 128:
        return "cudnn"
    return "flash"


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, card: Card) -> Tensor:
    """Attend by the kernel that serves the shapes.

    Args:
        q: Queries times 1 / sqrt(K), (B, H, Q, K).
        k: Keys (B, H, T, K).
        v: Values (B, H, T, K).
        bias: Of the scores, (1, H, Q, T) in the same dtype, or None.
        card: The GPU that they lie on.

    Returns:
        What the queries gather, (B, Q, D).
    """
    kernel: Kernel = "any"
    if q.is_cuda and len(q):  # flash refuses an empty batch (pytorch#133780)
        sides = q.shape[2], k.shape[2], q.shape[3]
        kernel = choose(card, q.dtype, *sides, has_bias=bias is not None)
    if bias is not None:
        bias = bias.expand(len(q), -1, -1, -1)
    return serve(kernel, q, k, v, bias).transpose(1, 2).flatten(2)


def serve(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *,
    scale: float | None = 1.0, trains: bool = False,
) -> Tensor:  # fmt: skip
    """Attend by a kernel.

    Args:
        kernel: What choose() gave.
        q: Queries (B, H, Q, K).
        k: Keys (B, H, T, K).
        v: Values (B, H, T, K).
        bias: Of the scores, (B, H, Q, T), or None.
        scale: Of the scores; None: 1 / sqrt(K).
        trains: Whether the kernel keeps what its gradient needs.

    Returns:
        What the queries gather, (B, H, Q, K).
    """
    ops = torch.ops.aten
    if kernel == "cudnn":
        found = ops._scaled_dot_product_cudnn_attention(q, k, v, bias, trains, scale=scale)
    elif kernel == "flash":
        found = ops._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    elif kernel == "efficient":
        found = ops._scaled_dot_product_efficient_attention(q, k, v, bias, trains, scale=scale)
    else:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return found[0]  # type: ignore[no-any-return]


def align(bias: Tensor) -> Tensor:
    """Return a bias (1, H, T, T) whose rows begin at multiples of ALIGNMENT."""
    rows = bias.new_zeros(*bias.shape[:-1], -(-bias.shape[-1] // ALIGNMENT) * ALIGNMENT)
    rows[..., : bias.shape[-1]] = bias
    return rows[..., : bias.shape[-1]]


@lru_cache(maxsize=8)
def has_cudnn(device: torch.device) -> bool:
    """Whether cuDNN's attention runs on a device, and equals its definition."""
    try:
        return all(_agrees(device, tokens) for tokens in (50, 197, 261))
    except (RuntimeError, AttributeError, TypeError):  # a plan that fails as it is run
        return False


def _agrees(device: torch.device, tokens: int) -> bool:
    count = 3 * 2 * 4 * tokens * 64
    numbers = torch.sin(torch.arange(count, dtype=torch.float64, device="cpu") * 0.7)
    q, k, v = numbers.view(3, 2, 4, tokens, 64).to(torch.bfloat16)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=1.0)
    found = serve("cudnn", q.to(device), k.to(device), v.to(device), None).cpu().double()
    return bool((found - exact).abs().max() <= 2e-2 * exact.abs().max())
