"""Time of each product and step of a block, of every attention kernel, and of their bounds."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.experiment import Experiment
from benchmarks.gpu.timing import measure_device_ms
from vitlib.fast import cuda_attention, fp8, row_ops
from vitlib.fast.quantized_rows import FP8

BF16 = torch.bfloat16
KERNELS = ("cudnn", "flash", "efficient", "any")
ATTENTION_SHAPES = ((128, 197), (1, 197), (128, 196), (16, 1370))  # (images, tokens)


def measure_limits(experiment: Experiment) -> None:
    """Measure the bounds of a model: device memory, products, and copies to the device."""
    small, device = experiment.is_dry, experiment.device
    with experiment.attempt("ops", step="copy on the device"):
        x = torch.zeros((1 if small else 512) * 2**20, dtype=BF16, device=device)
        y = torch.empty_like(x)
        ms = measure_device_ms(experiment, partial(y.copy_, x), 2)
        experiment.record(
            "ops", step="copy on the device", ms=round(ms, 3), gb_s=round(4e-6 * x.numel() / ms)
        )
        del x, y
    side = 64 if small else 8192
    for dtype in (BF16, torch.float16, torch.float32):
        step = f"product of {side} x {side} x {side}, {str(dtype)[6:]}"
        with experiment.attempt("ops", step=step):
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            ms = measure_device_ms(experiment, partial(torch.mm, a, b), 2)
            experiment.record("ops", step=step, ms=round(ms, 3), tflops=tflops(2 * side**3, ms))
    if experiment.on_gpu:
        measure_uploads(experiment)


def measure_uploads(experiment: Experiment) -> None:
    """Measure copies of 512 uint8 images to the device, from pinned and pageable memory."""
    shape = 512, 3, 224, 224
    target = torch.empty(shape, dtype=torch.uint8, device=experiment.device)
    pageable = torch.zeros(shape, dtype=torch.uint8)
    pinned = torch.zeros(shape, dtype=torch.uint8, pin_memory=True)
    uploads: dict[str, Callable[[], object]] = {
        "77 MB to the device, pinned": lambda: target.copy_(pinned, non_blocking=True),
        "77 MB to the device, pageable": lambda: target.copy_(pageable),
        "77 MB from pageable to pinned": lambda: pinned.copy_(pageable),
    }
    for step, upload in uploads.items():
        with experiment.attempt("ops", step=step):
            upload()
            experiment.synchronize()
            start = time.perf_counter()
            upload()
            experiment.synchronize()
            ms = 1e3 * (time.perf_counter() - start)
            experiment.record(
                "ops", step=step, ms=round(ms, 2), gb_s=round(1e-6 * pinned.numel() / ms, 1)
            )


def measure_steps(experiment: Experiment) -> None:
    """Measure every product and step of a block at several batch sizes."""
    config = experiment.sizes.config
    tokens = config.grid_size[0] * config.grid_size[1] + config.num_prefix_tokens
    for batch in (1, 2) if experiment.is_dry else (1, 64, 128):
        num_rows, embed_dim = batch * tokens, config.embed_dim
        mlp_dim = config.mlp_dim
        for step, (work, flop) in block_steps(
            experiment.device, num_rows, embed_dim, mlp_dim
        ).items():
            with experiment.attempt("ops", step=step, images=batch):
                ms = measure_device_ms(experiment, work)
                rate = {"tflops": tflops(flop, ms)} if flop else {}
                experiment.record("ops", step=step, images=batch, ms=round(ms, 4), **rate)


def block_steps(
    device: torch.device, m: int, d: int, hidden_dim: int
) -> dict[str, tuple[Callable[[], Any], int]]:
    """Map the name of each step of a block to its function and floating-point operations.

    Args:
        device: Device of the tensors.
        m: Rows: images times tokens.
        d: Width of a row.
        hidden_dim: Width inside the MLP.
    """

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=BF16)

    x, hidden, residual = random(m, d), random(m, hidden_dim), random(m, d)
    qkv, up, down, out = (
        random(3 * d, d),
        random(hidden_dim, d),
        random(d, hidden_dim),
        random(d, d),
    )
    qkv_bias, up_bias, bias = random(3 * d), random(hidden_dim), random(d)
    gain = torch.ones(d, device=device)
    bf16_gain = gain.to(BF16)
    norm_weights = row_ops.NormWeights(gain, gain, 1e-6)

    def separate_gelu() -> Any:
        return row_ops.activate(F.linear(x, up, up_bias), "gelu", False, BF16)

    steps: dict[str, tuple[Callable[[], Any], int]] = {
        "qkv": (lambda: F.linear(x, qkv, qkv_bias), 6 * m * d * d),
        "out": (lambda: F.linear(x, out, bias), 2 * m * d * d),
        "up": (lambda: F.linear(x, up, up_bias), 2 * m * d * hidden_dim),
        "up, fused GELU": (
            lambda: row_ops.linear_gelu(x, up, up_bias),
            2 * m * d * hidden_dim,
        ),
        "up, separate GELU": (separate_gelu, 2 * m * d * hidden_dim),
        "down": (lambda: F.linear(hidden, down, bias), 2 * m * d * hidden_dim),
        "down, residual in place": (
            lambda: residual.addmm_(hidden, down.t()),
            2 * m * d * hidden_dim,
        ),
        "norm": (lambda: row_ops.norm(x, norm_weights, BF16), 0),
        "norm by torch": (lambda: F.layer_norm(x, (d,), bf16_gain, bf16_gain), 0),
        "add and norm": (lambda: row_ops.add_norm(x, residual, norm_weights, gain, BF16), 0),
        "GELU": (lambda: row_ops.activate(hidden, "gelu", False, BF16), 0),
        "norm to fp8": (lambda: row_ops.norm(x, norm_weights, FP8), 0),
        "add and norm to fp8": (lambda: row_ops.add_norm(x, residual, norm_weights, gain, FP8), 0),
        "GELU to fp8": (lambda: row_ops.activate(hidden, "gelu", False, FP8), 0),
    }
    if device.type == "cpu" or fp8.has_fp8(device):
        linears = {"qkv": (qkv, qkv_bias), "out": (out, bias), "up": (up, up_bias)}
        linears["down"] = down, bias
        for name, (weight, linear_bias) in linears.items():
            steps[f"{name} in fp8"] = fp8_step(hidden if name == "down" else x, weight, linear_bias)
    return steps


def fp8_step(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Callable[[], Any], int]:
    """Return an fp8 product of rows that are already quantized, and its operations."""
    x_fp8, x_scale = row_ops.quantize_fp8(x)
    weight_fp8, weight_scale = row_ops.quantize_fp8(weight)
    flop = 2 * len(x) * weight.numel()
    return lambda: fp8.fp8_product(x_fp8, x_scale, weight_fp8, weight_scale, bias), flop


def measure_attention(experiment: Experiment) -> None:
    """Measure every attention kernel at several shapes, and compare it with float64."""
    config = experiment.sizes.config
    heads = config.num_heads
    shapes = ((2, 17),) if experiment.is_dry else ATTENTION_SHAPES
    names = KERNELS if experiment.on_gpu else ("any",)
    for images, tokens in shapes:
        for variant in ("all queries", "first query", "with a bias"):
            for dtype in (BF16, torch.float32) if variant == "all queries" else (BF16,):
                shape = images, tokens, 3, heads, config.embed_dim // heads
                qkv = torch.randn(shape, device=experiment.device).to(dtype)
                for name in names:
                    with experiment.attempt(
                        "attention", kernel=name, images=images, tokens=tokens, variant=variant
                    ):
                        measure_attention_kernel(experiment, name, qkv, variant)


def measure_attention_kernel(
    experiment: Experiment, kernel: Any, qkv: Tensor, variant: str
) -> None:
    """Record the time of a kernel and its error against float64.

    Args:
        experiment: The run.
        kernel: One of KERNELS.
        qkv: Output of a block's projection, (B, T, 3, H, K).
        variant: "all queries", "first query" or "with a bias".
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    q = q * q.shape[-1] ** -0.5
    bias = None
    if variant == "first query":
        q = q[:, :, :1]
    elif variant == "with a bias":
        bias = torch.randn(1, *q.shape[1:3], k.shape[2], device=q.device, dtype=q.dtype)
        bias = cuda_attention.align_bias(bias).expand(len(q), -1, -1, -1)
    exact_bias = None if bias is None else bias[:1].double()
    exact = F.scaled_dot_product_attention(
        *(x[:1].double() for x in (q, k, v)), attn_mask=exact_bias, scale=1.0
    )
    labels = {"kernel": kernel, "images": len(q), "tokens": k.shape[2], "variant": variant}
    labels["dtype"] = str(q.dtype)[6:]
    try:
        output = cuda_attention.run_kernel(kernel, q, k, v, bias)
        ms = measure_device_ms(experiment, lambda: cuda_attention.run_kernel(kernel, q, k, v, bias))
    except RuntimeError as error:  # flash does not support a bias, and cuDNN not float32
        experiment.record("attention", **labels, unsupported=str(error)[:80])
        return
    gpu = cuda_attention.get_gpu(experiment.device)
    sizes = q.shape[2], k.shape[2], q.shape[3]
    default_kernel = cuda_attention.choose_kernel(gpu, q.dtype, *sizes, has_bias=bias is not None)
    experiment.record(
        "attention",
        **labels,
        ms=round(ms, 4),
        tflops=tflops(4 * q.numel() * k.shape[2], ms),
        largest_relative=float((output[:1].double() - exact).abs().max() / exact.abs().max()),
        is_default=kernel == default_kernel,
    )


def tflops(flop: int, ms: float) -> float:
    """Return 10^12 floating-point operations per second."""
    return round(flop / ms / 1e9, 1)


def measure_ops(experiment: Experiment) -> None:
    """Measure limits, steps and attention kernels."""
    with torch.inference_mode():
        measure_limits(experiment)
        measure_steps(experiment)
        measure_attention(experiment)
