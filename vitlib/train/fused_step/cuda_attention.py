"""Attention in training on a GPU: which kernel computes it, and its gradient.

torch takes cuDNN on recent GPUs. Its gradient is NaN for some numbers of tokens where the scores
have a bias (pytorch#196678), and on some GPUs it corrupts models with few heads (pytorch#193893).
This file takes flash without a bias, and the memory-efficient kernel with one. It calls each as an
operation, so that no process-wide setting changes.

Shapes: B images, T tokens, Q tokens that ask (the first Q of T), H heads, K = D / H.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vitlib.fast.cuda_attention import CudaKernel, align_bias, run_kernel

HEAD_ALIGNMENT = 8  # K of what the fused kernels take is a multiple


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Attend by the kernel that serves the shapes, with its gradient.

    Args:
        q: Queries (B, H, Q, K) on a GPU.
        k: Keys (B, H, T, K).
        v: Values (B, H, T, K).
        bias: Of the scores, broadcast to (B, H, Q, T); or None.
        scale: Of the scores; None: 1 / sqrt(K).

    Returns:
        What the queries gather, (B, H, Q, K), in autocast's dtype where that is on.
    """
    narrow = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else q.dtype
    q, k, v = q.to(narrow), k.to(narrow), v.to(narrow)
    if bias is not None:
        bias = bias.to(narrow).expand(*bias.shape[:-1], k.shape[2])
    kernel = choose_for_training(q, k, v, bias)
    if bias is not None:
        bias = bias if kernel == "any" else align_bias(bias).expand(*q.shape[:3], -1)
    return run_kernel(kernel, q, k, v, bias, scale=scale, trains=True)


def choose_for_training(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> CudaKernel:
    """Choose among the kernels that torch can use for these tensors; never cuDNN's."""
    # cuDNN is NVIDIA's. The operations do not pad heads, which F.scaled_dot_product_attention does.
    if torch.version.hip is not None or q.shape[3] % HEAD_ALIGNMENT:
        return "any"
    params = torch.backends.cuda.SDPAParams(q, k, v, bias, 0.0, False, False)
    if bias is None and torch.backends.cuda.can_use_flash_attention(params):
        return "flash"
    return "efficient" if torch.backends.cuda.can_use_efficient_attention(params) else "any"


def pin_attention(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which every module on a GPU attends by attend().

    It is for modules that call F.scaled_dot_product_attention themselves. It holds for this thread,
    and for a backward pass that starts inside: torch hands the mode on to the backward thread.
    """
    return PinnedAttention() if device.type == "cuda" else nullcontext()


class PinnedAttention(TorchFunctionMode):
    """A mode that calls attend() for F.scaled_dot_product_attention, where both do the same."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch, or attend."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            simple = _simple_arguments(*args, **kwargs)
            if simple is not None:
                return attend(*simple)
        return func(*args, **kwargs)


def _simple_arguments(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float | None] | None:  # fmt: skip
    """Arguments of F.scaled_dot_product_attention -> those of attend; None: it takes others."""
    same = (
        query.dim() == key.dim() == value.dim() == 4
        and query.shape[:2] == key.shape[:2]
        and query.shape[3] == key.shape[3]
        and key.shape == value.shape
    )
    if not same or not query.is_cuda or dropout_p or is_causal or enable_gqa:
        return None
    if attn_mask is not None and not attn_mask.is_floating_point():
        return None
    return query, key, value, attn_mask, scale
