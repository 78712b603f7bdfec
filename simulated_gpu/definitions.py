"""Operations of torch for CUDA that have no kernel for a CPU, by their definitions.

Shapes: B images, H heads, Q queries, T tokens, K channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten: Any = torch.ops.aten


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attend in float32.

    Args:
        q: Queries (B, H, Q, K).
        k: Keys (B, H, T, K).
        v: Values (B, H, T, K).
        bias: Of the scores, broadcast to (B, H, Q, T); or None.
        scale: Factor of the scores; None is 1 / sqrt(K).

    Returns:
        (B, H, Q, K) in q's dtype, and the logarithm of the sum of exponentials (B, H, Q) float32.
    """
    scores = q.float() @ k.float().transpose(-1, -2)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias.float()
    x = (scores.softmax(-1) @ v.float()).to(q.dtype)
    return x, scores.logsumexp(-1)


def attend_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None
) -> tuple[Tensor, ...]:
    """Compute the gradients of attend().

    Args:
        gradient: Of the result (B, H, Q, K).
        q: Queries (B, H, Q, K).
        k: Keys (B, H, T, K).
        v: Values (B, H, T, K).
        bias: Of the scores, or None.
        scale: Factor of the scores; None is 1 / sqrt(K).

    Returns:
        The gradients of q, k and v, and of the bias where there is one.
    """
    inputs = [x for x in (q, k, v, bias) if x is not None]
    with torch.inference_mode(False), torch.enable_grad():
        wide = [x.detach().clone().float().requires_grad_() for x in inputs]
        x, _ = attend(*wide[:3], wide[3] if bias is not None else None, scale)
        found = torch.autograd.grad(x, wide, gradient.clone().to(x.dtype))
    return tuple(g.to(x.dtype) for g, x in zip(found, inputs, strict=True))


def _flash(q: Tensor, k: Tensor, v: Tensor, *_: Any, scale: float | None = None) -> Any:
    return attend(q, k, v, None, scale)


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, has_sums: bool, *_: Any,
    scale: float | None = None,
) -> Any:  # fmt: skip
    x, sums = attend(q, k, v, bias, scale)
    return (x, sums) if has_sums else (x,)


def _cudnn(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, has_sums: bool, *_: Any,
    scale: float | None = None,
) -> Any:  # fmt: skip
    x, sums = attend(q, k, v, bias, scale)
    return (x, sums.unsqueeze(-1)) if has_sums else (x,)


def _flash_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, scale: float | None = None
) -> Any:
    return attend_backward(gradient, q, k, v, None, scale)


def _efficient_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *_: Any,
    scale: float | None = None,
) -> Any:  # fmt: skip
    return attend_backward(gradient, q, k, v, bias, scale)


def _linear_activation(
    bias: Tensor, x: Tensor, weight: Tensor, *, use_gelu: bool = False, **_: Any
) -> Tensor:
    y = x.float() @ weight.float() + bias.float()
    return (F.gelu(y, approximate="tanh") if use_gelu else y.relu()).to(x.dtype)


def _scaled_product(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None,
    scale_result: Tensor | None = None, out_dtype: torch.dtype | None = None, *_: Any,
) -> Tensor:  # fmt: skip
    assert scale_result is None
    y = (a.float() @ b.float()) * scale_a * scale_b
    return (y if bias is None else y + bias.float()).to(out_dtype or a.dtype)


DEFINITIONS: dict[Any, Callable[..., Any]] = {
    aten._scaled_dot_product_flash_attention.default: _flash,
    aten._scaled_dot_product_efficient_attention.default: _efficient,
    aten._scaled_dot_product_cudnn_attention.default: _cudnn,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    aten._addmm_activation.default: _linear_activation,
    aten._scaled_mm.default: _scaled_product,
}
