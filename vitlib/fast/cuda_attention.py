"""Attention on a GPU, by a kernel chosen here instead of by torch's process-wide settings.

torch.nn.attention.sdpa_kernel() would choose too, but it sets flags of the whole process: two
threads that use it at once leave them wrong. Each fused kernel is an operation of its own, and is
called as that. docs/performance.md says which kernel serves which case, and why.

Shapes: B images, Q queries (the first Q of T tokens), T tokens, H heads, K = D / H.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# "any" leaves the choice to torch, "math" multiplies without a fused kernel.
CudaKernel = Literal["cudnn", "flash", "efficient", "any", "math"]

# cuDNN before 9.15.1 reads out of bounds where the number of tokens is no multiple of 128
# (pytorch#169849, #171627), as it is for nearly every ViT.
MIN_CUDNN = 91501
# Elements: the efficient kernel refuses bias rows at other offsets; torch's own attention copies a
# bias that has them.
BIAS_ALIGNMENT = 16


class Gpu(NamedTuple):
    """The properties of a GPU that decide which attention kernel serves.

    Attributes:
        capability: The compute capability, (major, minor).
        cudnn: The version of cuDNN, 91501 for 9.15.1; 0 where it is absent.
        is_nvidia: False for AMD's GPUs.
        wrong: Kernels that fail on it, or compute something else.
    """

    capability: tuple[int, int]
    cudnn: int = 0
    is_nvidia: bool = True
    wrong: frozenset[CudaKernel] = frozenset()


def get_gpu(device: torch.device) -> Gpu:
    """Return the properties of a device.

    Args:
        device: A GPU, or a CPU in tests, where every kernel runs as its definition.

    Returns:
        The properties.
    """
    if device.type != "cuda":
        return Gpu((0, 0))
    cudnn: Any = torch.backends.cudnn  # its version() has no annotations
    gpu = Gpu(
        torch.cuda.get_device_capability(device), cudnn.version() or 0, torch.version.hip is None
    )
    used: tuple[CudaKernel, ...] = ("efficient",)
    if has_bfloat16(device):
        used = "flash", "efficient"
    if choose_kernel(gpu, torch.bfloat16, 197, 197, 64, has_bias=False) == "cudnn":
        used = "cudnn", *used
    return gpu._replace(wrong=frozenset(name for name in used if not has_kernel(device, name)))


def has_bfloat16(device: torch.device) -> bool:
    """Return True if a GPU computes in bfloat16; NVIDIA's before Ampere emulate it.

    Args:
        device: The GPU.

    Returns:
        False where float16 is the better choice.
    """
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def choose_kernel(
    gpu: Gpu, dtype: torch.dtype, queries: int, tokens: int, head_dim: int, *, has_bias: bool
) -> CudaKernel:
    """Choose the kernel of an attention.

    Args:
        gpu: The GPU.
        dtype: Of queries, keys and values.
        queries: Q.
        tokens: T.
        head_dim: K.
        has_bias: A bias is added to the scores.

    Returns:
        The name of the kernel, for run_kernel.
    """
    if head_dim % 8 or head_dim > 256:  # the fused kernels would need padded heads
        return "math" if "efficient" in gpu.wrong else "any"  # torch would pad and take it
    # Flash takes neither float32 nor a bias, nor a GPU before Ampere.
    kernels: tuple[CudaKernel, ...] = ("efficient",)
    if dtype != torch.float32 and not has_bias and (not gpu.is_nvidia or gpu.capability >= (8, 0)):
        kernels = "flash", "efficient"
        # cuDNN on Hopper alone. By published figures it gains nothing elsewhere (0.82 to 1.0 of
        # flash on A100, L40S and RTX PRO 6000), and on a B200 it corrupts models of fewer than 8
        # heads (pytorch#193893).
        hopper = gpu.is_nvidia and gpu.capability == (9, 0)
        if hopper and gpu.cudnn >= MIN_CUDNN and queries == tokens and head_dim <= 128:
            kernels = "cudnn", *kernels
    return next((name for name in kernels if name not in gpu.wrong), "math")


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, gpu: Gpu) -> Tensor:
    """Attend by the kernel that serves the shapes.

    Args:
        q: Scaled queries (B, H, Q, K).
        k: Keys (B, H, T, K).
        v: Values (B, H, T, K).
        bias: Bias of the scores in the same dtype, broadcast to (B, H, Q, T), or None.
        gpu: The GPU that they lie on.

    Returns:
        (B, Q, D).
    """
    kernel: CudaKernel = "any"
    if q.is_cuda and len(q):  # flash refuses an empty batch (pytorch#133780)
        sizes = q.shape[2], k.shape[2], q.shape[3]
        kernel = choose_kernel(gpu, q.dtype, *sizes, has_bias=bias is not None)
    if bias is not None:
        # CudaAttentionPosition has aligned its tables; a table of the user's, or a cast one, may
        # have rows of an odd number of elements, which the efficient kernel refuses.
        if kernel == "efficient" and any(n % BIAS_ALIGNMENT for n in bias.stride()[:-1]):
            bias = align_bias(bias)
        bias = bias.expand(*q.shape[:3], -1)
    return run_kernel(kernel, q, k, v, bias).transpose(1, 2).flatten(2)


def run_kernel(
    kernel: CudaKernel, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *,
    scale: float | None = 1.0, trains: bool = False,
) -> Tensor:  # fmt: skip
    """Attend by a kernel.

    Args:
        kernel: The name that choose_kernel returned.
        q: Queries (B, H, Q, K).
        k: Keys (B, H, T, K).
        v: Values (B, H, T, K).
        bias: Bias of the scores (B, H, Q, T), or None.
        scale: Factor of the scores; None is 1 / sqrt(K).
        trains: The kernel keeps what its gradient needs.

    Returns:
        (B, H, Q, K).
    """
    ops: Any = torch.ops.aten
    if kernel == "any":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    if kernel == "cudnn":
        outputs = ops._scaled_dot_product_cudnn_attention(q, k, v, bias, trains, scale=scale)
    elif kernel == "flash":
        outputs = ops._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    elif kernel == "math":
        outputs = ops._scaled_dot_product_attention_math(q, k, v, bias, scale=scale)
    else:
        outputs = ops._scaled_dot_product_efficient_attention(q, k, v, bias, trains, scale=scale)
    x: Tensor = outputs[0]
    return x


def align_bias(bias: Tensor) -> Tensor:
    """Copy a bias so that its rows begin at multiples of BIAS_ALIGNMENT.

    Args:
        bias: Bias of the scores (1, H, T, T).

    Returns:
        The same numbers, a view of a wider tensor.
    """
    width = bias.shape[-1]
    rows = bias.new_zeros(*bias.shape[:-1], -(-width // BIAS_ALIGNMENT) * BIAS_ALIGNMENT)
    rows[..., :width] = bias
    return rows[..., :width]


@lru_cache(maxsize=32)
def has_kernel(device: torch.device, kernel: CudaKernel) -> bool:
    """Return True if an attention kernel runs on a device and equals its definition.

    Builds of torch differ in it: one that holds the efficient kernel for a GPU which that kernel
    does not know prints an error on the GPU, and gives zeros (pytorch#176093). Flash refuses such
    a GPU, and a version of cuDNN may be wrong.

    Args:
        device: The GPU.
        kernel: "cudnn", "flash" or "efficient".

    Returns:
        False also where it fails.
    """
    try:
        return all(_agrees(device, kernel, tokens) for tokens in (50, 197, 261))
    except (RuntimeError, AttributeError, TypeError):  # absent, or a plan that fails as it runs
        return False


def _agrees(device: torch.device, kernel: CudaKernel, tokens: int) -> bool:
    """Compare an attention kernel with float64 on a fixed input."""
    count = 2 * tokens * 3 * 4 * 64
    numbers = torch.sin(torch.arange(count, dtype=torch.float64, device="cpu") * 0.7)
    # Every GPU has the efficient kernel in float32, also those without bfloat16.
    dtype = torch.float32 if kernel == "efficient" else torch.bfloat16
    # As the product of a block leaves them: each token's queries, keys and values together.
    qkv = numbers.view(2, tokens, 3, 4, 64).to(dtype)
    q, k, v = qkv.double().permute(2, 0, 3, 1, 4)
    exact = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    q, k, v = qkv.to(device).permute(2, 0, 3, 1, 4)
    actual = run_kernel(kernel, q, k, v, None).cpu().double()
    return bool((actual - exact).abs().max() <= 2e-2 * exact.abs().max())
