"""Attention in training on a GPU: the kernel that computes it and its gradient.

By itself torch chooses cuDNN on recent GPUs. Its gradient is NaN for some numbers of tokens if the
scores have a bias (pytorch#196678). On some GPUs it corrupts models with few heads
(pytorch#193893). So this file chooses flash attention without a bias, and the memory-efficient
kernel with a bias. It calls each as an operation, so that no process-wide setting changes.

Shapes: B images, T tokens, Q queries (the first Q of T tokens), H heads, K = D / H.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vitlib.fast.cuda_attention import CudaKernel, align_bias, has_kernel, run_kernel

HEAD_ALIGNMENT = 8  # the fused kernels take a K that is a multiple of it


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Attend by a kernel for these shapes, with a graph.

    Args:
        q: Queries (B, H, Q, K) on a GPU.
        k: Keys (B, H, T, K).
        v: Values (B, H, T, K).
        bias: Of the scores, broadcast to (B, H, Q, T); or None.
        scale: Factor of the scores; None for 1 / sqrt(K).

    Returns:
        (B, H, Q, K), in autocast's dtype while autocast is on.
    """
    # The operations below do not take part in autocast, so the cast is made here.
    narrow = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else q.dtype
    q, k, v = q.to(narrow), k.to(narrow), v.to(narrow)
    if bias is not None:
        bias = bias.to(narrow).expand(*bias.shape[:-1], k.shape[2])
    kernel = choose_for_training(q, k, v, bias)
    if bias is not None:
        is_fused = kernel not in ("any", "math")
        bias = align_bias(bias).expand(*q.shape[:3], -1) if is_fused else bias
    return run_kernel(kernel, q, k, v, bias, scale=scale, trains=True)


def choose_for_training(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> CudaKernel:
    """Choose among the kernels that torch can use for these tensors, but for cuDNN.

    Args:
        q: Queries (B, H, Q, K) on a GPU.
        k: Keys (B, H, T, K).
        v: Values (B, H, T, K).
        bias: Of the scores, (B, H, Q, T); or None.

    Returns:
        "flash", "efficient", "any" for torch's own choice, or "math" where that could be wrong.
    """
    # AMD's GPUs have no cuDNN, so torch's choice is sound.
    if torch.version.hip is not None:
        return "any"
    efficient_works = has_kernel(q.device, "efficient")
    if q.shape[3] % HEAD_ALIGNMENT == 0:  # the operations do not pad heads
        params = torch.backends.cuda.SDPAParams(q, k, v, bias, 0.0, False, False)
        can_flash = bias is None and torch.backends.cuda.can_use_flash_attention(params)
        if can_flash and has_kernel(q.device, "flash"):
            return "flash"
        if efficient_works and torch.backends.cuda.can_use_efficient_attention(params):
            return "efficient"
    return "any" if efficient_works else "math"  # as torch's choice may be that kernel


def pin_attention(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which every module on a GPU attends by attend().

    It is for modules that call F.scaled_dot_product_attention themselves. It applies to this
    thread, and to a backward pass that starts inside: torch passes the mode to its backward thread.

    Args:
        device: Device of the model; nothing changes unless it is a GPU.

    Returns:
        The context.
    """
    return PinnedAttention() if device.type == "cuda" else nullcontext()


class PinnedAttention(TorchFunctionMode):
    """A mode that replaces F.scaled_dot_product_attention by attend() for arguments it supports."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch, or attend() in its place."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            supported = _supported_arguments(*args, **kwargs)
            if supported is not None:
                return attend(*supported)
        return func(*args, **kwargs)


def _supported_arguments(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float | None] | None:  # fmt: skip
    """Map arguments of F.scaled_dot_product_attention to attend's; None if it has no such case."""
    is_self_attention = (
        query.dim() == key.dim() == value.dim() == 4
        and query.shape[:2] == key.shape[:2]
        and query.shape[3] == key.shape[3]
        and key.shape == value.shape
    )
    if not is_self_attention or not query.is_cuda or dropout_p or is_causal or enable_gqa:
        return None
    if attn_mask is not None and not attn_mask.is_floating_point():
        return None
    return query, key, value, attn_mask, scale
