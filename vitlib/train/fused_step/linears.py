"""Linear layers of one input, with the operation before and the sum after, in one autograd node.

How data flows: forward computes the operation before the layers (prologue.py), multiplies by all
weights at once (matmul.py), and saves its input alone. Backward computes that operation again, and
only the gradients that are needed: frozen weights get none.

Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vitlib.train.fused_step import matmul, prologue
from vitlib.train.fused_step.prologue import NormStats, Prologue


class LinearSpec(NamedTuple):
    """Settings of a call of apply_linears.

    Attributes:
        prologue: Operation before the layers.
        dtype: Of the products and their results, float32 or bfloat16.
        eps: Of the norm.
    """

    prologue: Prologue
    dtype: torch.dtype
    eps: float = 0.0


class LinearFunction(torch.autograd.Function):
    """The autograd node of apply_linears, which describes the arguments."""

    @staticmethod
    def forward(
        ctx: Any, spec: LinearSpec, residual: Tensor | None, x: Tensor,
        gamma: Tensor | None, beta: Tensor | None, *layers: Tensor | None,
    ) -> Any:  # fmt: skip
        """Compute one output a weight; a single tensor for a single weight."""
        weights: list[Any] = list(layers[::2])
        ctx.spec, ctx.shape, ctx.x_dtype = spec, x.shape, x.dtype
        ctx.widths = [len(weight) for weight in weights]
        with torch.autocast("cpu", enabled=False):
            rows = x.reshape(-1, x.shape[-1])
            if spec.prologue == "none":
                rows = rows.to(spec.dtype)
            inner, _ = _run_prologue(spec, rows, gamma, beta)
            weight, bias = _concat_weights(weights), _concat_biases(layers[1::2], ctx.widths)
            if residual is None:
                output = matmul.linear(inner, weight, bias)
            else:
                flat = residual.reshape(-1, residual.shape[-1]).contiguous()
                output = matmul.linear_add(inner, weight, bias, flat)
        # A prologue needs its input for its own gradient, a product for that of its weights. So the
        # input of frozen layers without a prologue is not saved.
        saved = rows if spec.prologue != "none" or any(ctx.needs_input_grad[5::2]) else None
        ctx.save_for_backward(saved, gamma, beta, *weights)
        output = output.view(*x.shape[:-1], output.shape[-1])
        return output if len(weights) == 1 else torch.split(output, ctx.widths, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Compute a gradient for each input of forward that needs it."""
        spec, needed = ctx.spec, ctx.needs_input_grad
        x, gamma, beta, *weights = ctx.saved_tensors
        # By the positions of forward's arguments: spec, residual, x, gamma, beta, then pairs.
        results: list[Tensor | None] = [None] * len(needed)
        results[1] = gradients[0] if needed[1] else None
        stats: NormStats | None = None
        with torch.autocast("cpu", enabled=False):
            output_grad = torch.cat(gradients, dim=-1) if len(gradients) > 1 else gradients[0]
            output_grad = output_grad.reshape(-1, output_grad.shape[-1])
            narrow_grad = output_grad.to(spec.dtype)
            if any(needed[5::2]):
                assert x is not None
                inner, stats = _run_prologue(spec, x, gamma, beta)
                weight_grad = matmul.weight_gradient(narrow_grad, inner)
                # Before the next product, which is the peak of memory.
                del inner
                _assign(torch.split(weight_grad, ctx.widths), needed, results, 5)
            if any(needed[6::2]):
                bias_grad = output_grad.sum(dim=0, dtype=torch.float32)
                _assign(torch.split(bias_grad, ctx.widths), needed, results, 6)
            if any(needed[2:5]):
                inner_grad = matmul.input_gradient(narrow_grad, _concat_weights(weights))
                del narrow_grad, output_grad
                results[2:5] = _prologue_backward(
                    spec, inner_grad, x, gamma, beta, stats, list(needed[2:5])
                )
                if results[2] is not None:
                    results[2] = results[2].to(ctx.x_dtype).view(ctx.shape)
        return tuple(results)


_apply: Any = LinearFunction.apply  # torch does not type it


def apply_linears(
    spec: LinearSpec, residual: Tensor | None, x: Tensor, gamma: Tensor | None,
    beta: Tensor | None, *layers: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Apply linear layers to one input, with a graph.

    Args:
        spec: The operation before the layers, and the dtype.
        residual: (..., N) float32, added to the output of a single layer; or None.
        x: (..., K), for SwiGLU (..., 2K); float32 before a norm.
        gamma: Weight of the norm, (K,); or None.
        beta: Bias of the norm, (K,); or None.
        *layers: weight (N, K) float32 and bias (N,) or None of each layer in turn.

    Returns:
        An output (..., N) of each layer, in the dtype of spec; with a residual in float32.
    """
    outputs: Tensor | tuple[Tensor, ...] = _apply(spec, residual, x, gamma, beta, *layers)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _concat_weights(weights: Sequence[Tensor]) -> Tensor:
    """Concatenate weights (N, K), so that one product computes all layers."""
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))


def _concat_biases(biases: Sequence[Tensor | None], widths: list[int]) -> Tensor | None:
    """Concatenate biases (N,), zeros for None; None if no layer has a bias."""
    bias = next((bias for bias in biases if bias is not None), None)
    if bias is None or len(biases) == 1:
        return bias
    padded = [bias.new_zeros(n) if b is None else b for b, n in zip(biases, widths, strict=True)]
    return torch.cat(padded)


def _assign(
    parts: Sequence[Tensor], needed: Sequence[bool], results: list[Tensor | None], first: int
) -> None:
    """Put each layer's gradient at its position, every second one from `first`, if needed."""
    for position, part in zip(range(first, len(results), 2), parts, strict=False):
        if needed[position]:
            results[position] = part


def _run_prologue(
    spec: LinearSpec, x: Tensor, gamma: Tensor | None, beta: Tensor | None
) -> tuple[Tensor, NormStats | None]:
    """Return the input of the products, (M, K) in the spec's dtype, and a norm's statistics."""
    if spec.prologue == "none":
        return x, None
    if spec.prologue == "norm":
        assert gamma is not None
        assert beta is not None
        normed, stats = prologue.layer_norm(x, gamma, beta, spec.eps)
        return normed.to(spec.dtype), stats
    return prologue.activate(x, spec.prologue), None


def _prologue_backward(
    spec: LinearSpec, gradient: Tensor, x: Tensor | None, gamma: Tensor | None,
    beta: Tensor | None, stats: NormStats | None, needed: list[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Return gradients of x, gamma and beta; the gradient of the product may be overwritten."""
    if spec.prologue == "none":
        return [gradient, None, None]
    assert x is not None
    if spec.prologue == "norm":
        assert gamma is not None
        assert beta is not None
        stats = stats or prologue.layer_norm(x, gamma, beta, spec.eps)[1]
        return list(prologue.layer_norm_backward(gradient.float(), x, gamma, beta, stats, needed))
    return [prologue.activate_backward(gradient, x, spec.prologue), None, None]
