"""Test the number of kernels that a GPU launches, their results and the choice of attention."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fixtures.fake_gpu import (
    CPU,
    FAMILIES,
    GPU,
    Count,
    count_kernels,
    fake_mode,
    move_to_fake_gpu,
    optimize_on_cpu,
    small,
)
from fixtures.references import distance
from vitlib.fast import cuda, cuda_attention, fp8, row_ops
from vitlib.fast.cuda_attention import MIN_CUDNN, Gpu, choose_kernel
from vitlib.positions import apply_rope

# --- how many -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "most"), [("bf16", 9), ("fp8", 12), ("fp16", 10)])
@pytest.mark.parametrize("family", FAMILIES)
def test_block_launches_at_most_so_many_kernels(family: str, precision: str, most: int) -> None:
    """A block in bfloat16 launches two norms, four products with GELU and sum fused, attention."""
    fields = FAMILIES[family]
    block = count_kernels(precision, 4, **fields) - count_kernels(precision, 3, **fields)
    assert sum(block.values()) <= most, block
    # An operation that is not fused would add its own: this is no empty count.
    assert block["norm_rows"] == 2
    assert sum(block.values()) >= 7


@pytest.mark.parametrize(("precision", "count"), [("bf16", 7), ("fp16", 9), ("fp8", 10)])
def test_block_launches_as_performance_md_says(precision: str, count: int) -> None:
    """The page docs/performance.md states these numbers."""
    block = count_kernels(precision, 4) - count_kernels(precision, 3)
    assert sum(block.values()) == count, block


@pytest.mark.parametrize(
    ("norms", "count", "rows"),
    [
        ({"kind": "rms"}, 7, 2),  # as with LayerNorm
        ({"attn": True}, 8, 3),
        ({"mlp": True}, 8, 3),
        ({"qk": "head"}, 10, 4),  # and a copy of queries, keys and values beside each other
        ({"post": True}, 9, 2),  # the sums are not fused
    ],
)
def test_block_with_other_norms_launches_few_kernels(
    norms: dict[str, Any], count: int, rows: int
) -> None:
    block = count_kernels("bf16", 4, norms=norms) - count_kernels("bf16", 3, norms=norms)
    assert (sum(block.values()), block["norm_rows"]) == (count, rows), block


def test_model_launches_few_kernels_outside_its_blocks() -> None:
    actual = count_kernels("bf16", 12)
    assert sum(actual.values()) <= 100, actual


def test_float32_patch_projection_is_no_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default cuDNN convolves in TF32; a matrix product is float32."""
    model = small()
    images = torch.randn(2, 3, 36, 40)
    proj = model.patch_embed.proj
    with torch.no_grad():
        exact = proj(images)
        assert distance(proj.project_by_matmul(images), exact) <= 1e-6
    mode = fake_mode(monkeypatch)
    with mode, torch.no_grad(), Count() as count:
        move_to_fake_gpu(model)(torch.empty(2, 3, 32, 32, device=GPU))
    assert not [name for name in count.counts if "conv" in name]
    half = small().bfloat16()
    with mode, torch.no_grad(), Count() as count:
        move_to_fake_gpu(half)(torch.empty(2, 3, 32, 32, device=GPU))
    assert [name for name in count.counts if "conv" in name]  # the count would see one


# --- what they compute ----------------------------------------------------------------------------


def test_norm_and_add_norm_equal_layer_norm() -> None:
    x, y, gain, offset, extra = (
        torch.randn(*s) for s in ((2, 5, 48), (2, 5, 48), (48,), (48,), (48,))
    )
    norm_weights = row_ops.NormWeights(gain, offset, 1e-6)
    assert (
        distance(
            row_ops.norm(x, norm_weights, torch.float32), F.layer_norm(x, (48,), gain, offset, 1e-6)
        )
        <= 1e-6
    )
    stream, rows = row_ops.add_norm(x, y, norm_weights, extra, torch.float32)
    assert torch.equal(stream, x + y + extra)
    assert distance(rows, F.layer_norm(x + y, (48,), gain, offset, 1e-6)) <= 1e-6
    # The bias that is put into the stream is not normalised: with it the rows would differ.
    assert distance(rows, F.layer_norm(x + y + extra, (48,), gain, offset, 1e-6)) > 0.1
    stream, rows = row_ops.add_norm(
        x[:, :2].bfloat16(), y[:, :2], norm_weights, None, torch.bfloat16
    )
    assert stream.shape == rows.shape == (2, 2, 48)
    assert stream.dtype == rows.dtype == torch.bfloat16
    stream.zero_()  # the caller adds in place: it is nobody else's memory
    assert x.abs().min() > 0


def test_fp8_rows_and_product() -> None:
    x = torch.randn(7, 32) * torch.logspace(-6, 6, 7)[:, None]
    x[3] = 0
    values, scale = row_ops.quantize_fp8(x)
    assert values.dtype == torch.float8_e4m3fn
    assert scale.shape == (7, 1)
    # Three bits after the point; what is 2^14 times below a row's largest is below the smallest.
    back = values.float() * scale
    assert bool(((back - x).abs() <= x.abs() / 16 + scale * 2**-9).all())
    assert bool((values.float().abs().amax(dim=1)[[0, 6]] == 448).all())
    weight, bias = torch.randn(16, 32), torch.randn(16).bfloat16()
    quantized_weight, rows = row_ops.quantize_fp8(weight)
    exact = back @ (quantized_weight.float() * rows).T + bias.float()
    actual = fp8.fp8_product(values, scale, quantized_weight, rows, bias)
    assert actual.dtype == torch.bfloat16
    assert distance(actual.float(), exact) <= 2**-7
    assert fp8.has_fp8(CPU)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "none"])
def test_activate_equals_torch(activation: str) -> None:
    x = torch.randn(3, 4, 64)
    form: dict[str, Callable[[Tensor], Tensor]] = {
        "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu,
        "none": lambda x: x,
    }  # fmt: skip
    actual = row_ops.activate(x, activation, False, torch.float32)
    assert distance(actual, form[activation](x)) <= 1e-6
    gated = row_ops.activate(x, activation, True, torch.float32)
    assert distance(gated, form[activation](x[..., :32]) * x[..., 32:]) <= 1e-6


def test_rotate_equals_apply_rope() -> None:
    qkv, table = torch.randn(2, 7, 3 * 32), torch.randn(2, 4, 16)
    q, k, _ = qkv.view(2, 7, 3, 2, 16).permute(2, 0, 3, 1, 4)
    turned = row_ops.rotate(qkv, table, 2)
    for actual, x in zip(turned, (q, k), strict=True):
        assert distance(actual, apply_rope(x, 3, table)) <= 1e-6
        assert torch.equal(actual[:, :, :3], x[:, :, :3])


def test_tanh_gelu_adds_little_error_in_bfloat16() -> None:
    """The tanh form of linear_gelu must add little to the error of bfloat16 itself."""
    x, weight, bias = torch.randn(64, 96), torch.randn(256, 96) / 10, torch.randn(256)
    exact = F.gelu(F.linear(x.double(), weight.double(), bias.double()))
    rows, w, b = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    fused = row_ops.linear_gelu(rows, w, b).double()
    actual = F.gelu(F.linear(rows, w, b)).double()
    error = [(actual - exact).pow(2).mean().sqrt() for actual in (fused, actual)]
    assert error[0] <= 1.1 * error[1]


TRITON = """
import sys, torch
from vitlib.fast import row_kernels as kernels, row_ops
E4M3 = torch.float8_e4m3fn
torch.manual_seed(0)

def same(found, exact, what):
    for a, b in zip(found, exact, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), (what, a.shape, b.shape)
        if a.dtype == E4M3:  # the interpreter rounds to 8 bits differently, by one step
            near = (a.float() - b.float()).abs() <= 64
            assert near.all() and (a.float() == b.float()).float().mean() > 0.9, what
        elif a.numel():
            worst = (a - b).abs().max() / b.abs().max()
            assert worst <= float(sys.argv[1]), (what, worst)

for width in (48, 768, 1000):
    x, y = torch.randn(2, 5, width), torch.randn(2, 5, width)
    gain, offset, extra = torch.randn(3, width)
    for dtype in (torch.float32, E4M3):
        for given in ((x, None, None), (x, y, None), (x, y, extra), (x[:, :1], y[:, :1], extra)):
            for kind, bias in (("layer", offset), ("rms", None), ("rms", offset)):
                arguments = given[0], given[1], gain, bias, 1e-6, given[2], dtype, kind
                same(kernels.norm_rows(*arguments), row_ops.define_norm_rows(*arguments), kind)
        for name in ("gelu", "gelu_tanh", "silu", "none"):
            for gated in (False, True):
                given = x, name, gated, dtype
                same(kernels.activate_rows(*given), row_ops.define_activate_rows(*given), name)
for heads, patches in ((3, 4), (48, 6), (1, 7)):
    qkv, table = torch.randn(2, 7, 3 * 16 * heads), torch.randn(2, patches, 16)
    same(kernels.rotate(qkv, table, heads), row_ops.define_rotate(qkv, table, heads), heads)
print("same")
"""


@pytest.mark.parametrize(("tolerance", "ends"), [("2e-6", 0), ("0", 1)])
def test_triton_kernels_equal_their_definitions(tolerance: str, ends: int) -> None:
    """Triton's interpreter runs in a process of its own, as it is chosen at Triton's import.

    Without tolerance the comparison must fail, which proves that it compares.
    """
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    actual = subprocess.run(
        [sys.executable, "-c", TRITON, tolerance],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert actual.returncode == ends, actual.stderr
    assert ("same" in actual.stdout) == (ends == 0)


# --- which one attends ----------------------------------------------------------------------------

HOPPER, AMPERE = Gpu((9, 0), MIN_CUDNN), Gpu((8, 0), MIN_CUDNN)


@pytest.mark.parametrize(
    ("gpu", "dtype", "queries", "tokens", "head_dim", "has_bias", "kernel"),
    [
        (HOPPER, torch.bfloat16, 197, 197, 64, False, "cudnn"),
        (HOPPER, torch.float16, 1370, 1370, 64, False, "cudnn"),
        (HOPPER, torch.bfloat16, 1, 197, 64, False, "flash"),  # the last block
        (HOPPER, torch.bfloat16, 197, 197, 64, True, "efficient"),
        (HOPPER, torch.float32, 197, 197, 64, False, "efficient"),
        (HOPPER, torch.bfloat16, 197, 197, 20, False, "any"),
        (HOPPER, torch.bfloat16, 197, 197, 512, False, "any"),
        (HOPPER, torch.bfloat16, 197, 197, 256, False, "flash"),
        (HOPPER._replace(cudnn=91500), torch.bfloat16, 197, 197, 64, False, "flash"),
        (HOPPER._replace(cudnn=0), torch.bfloat16, 197, 197, 64, False, "flash"),
        (AMPERE, torch.bfloat16, 197, 197, 64, False, "flash"),
        (Gpu((8, 9), MIN_CUDNN), torch.bfloat16, 1370, 1370, 64, False, "flash"),
        (Gpu((10, 0), MIN_CUDNN), torch.bfloat16, 197, 197, 64, False, "flash"),
        (Gpu((7, 5), MIN_CUDNN), torch.float16, 197, 197, 64, False, "efficient"),
        (Gpu((9, 4), MIN_CUDNN, False), torch.bfloat16, 197, 197, 64, False, "flash"),
    ],
)
def test_choose_kernel_by_gpu_and_shape(
    gpu: Gpu, dtype: torch.dtype, queries: int, tokens: int, head_dim: int, has_bias: bool,
    kernel: str,
) -> None:  # fmt: skip
    assert choose_kernel(gpu, dtype, queries, tokens, head_dim, has_bias=has_bias) == kernel


@pytest.mark.parametrize(
    ("wrong", "dtype", "has_bias", "head_dim", "kernel"),
    [
        ({"cudnn"}, torch.bfloat16, False, 64, "flash"),
        ({"cudnn", "flash"}, torch.bfloat16, False, 64, "efficient"),
        ({"cudnn", "flash", "efficient"}, torch.bfloat16, False, 64, "math"),
        ({"efficient"}, torch.float32, False, 64, "math"),
        ({"efficient"}, torch.bfloat16, True, 64, "math"),
        ({"efficient"}, torch.float32, False, 20, "math"),  # torch would pad heads, and take it
    ],
)
def test_wrong_kernel_is_not_chosen(
    wrong: Any, dtype: torch.dtype, has_bias: bool, head_dim: int, kernel: str
) -> None:
    gpu = HOPPER._replace(wrong=frozenset(wrong))
    assert choose_kernel(gpu, dtype, 197, 197, head_dim, has_bias=has_bias) == kernel


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
def test_every_kernel_that_may_serve_is_compared(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: MIN_CUDNN)
    used = {(7, 5): {"efficient"}, (8, 0): {"flash", "efficient"}}
    expected = used.get(capability, {"cudnn", "flash", "efficient"})
    monkeypatch.setattr(cuda_attention, "has_kernel", lambda *_: False)
    assert cuda_attention.get_gpu(GPU).wrong == expected
    monkeypatch.setattr(cuda_attention, "has_kernel", lambda *_: True)
    assert cuda_attention.get_gpu(GPU) == Gpu(capability, MIN_CUDNN)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)
    assert cuda_attention.get_gpu(GPU).cudnn == 0


def test_kernel_of_zeros_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the efficient kernel answers on a GPU that its build does not know (pytorch#176093)."""
    real = cuda_attention.run_kernel
    for kernel in ("cudnn", "flash", "efficient"):
        # A kernel that is not there is no error; a CPU has none of them.
        assert not cuda_attention.has_kernel.__wrapped__(CPU, kernel)
        for factor in (0.0, 1.0):
            monkeypatch.setattr(
                cuda_attention, "run_kernel", lambda _, *x, f=factor: f * real("any", *x)
            )
            assert cuda_attention.has_kernel.__wrapped__(CPU, kernel) == bool(factor)
        monkeypatch.setattr(cuda_attention, "run_kernel", real)


def test_math_equals_torchs_attention() -> None:
    q, k, v = torch.randn(3, 2, 4, 5, 20)
    bias = torch.randn(1, 1, 5, 5).expand(2, 4, 5, 5)
    for scale in (1.0, None):
        actual = cuda_attention.run_kernel("math", q, k, v, bias, scale=scale)
        exact = F.scaled_dot_product_attention(q, k, v, bias, scale=scale)
        assert distance(actual, exact) <= 1e-6


SERVED = {
    "cudnn": ("bf16", {}, "_scaled_dot_product_cudnn_attention"),
    "flash": ("bf16", {}, "_scaled_dot_product_flash_attention"),
    "efficient": ("fp32", {}, "_scaled_dot_product_efficient_attention"),
    "bias": ("bf16", FAMILIES["relative"], "_scaled_dot_product_efficient_attention"),
}


@pytest.mark.parametrize("name", SERVED)
def test_chosen_attention_kernel_is_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    precision, fields, operation = SERVED[name]
    mode, model = fake_mode(monkeypatch), small(**fields)
    if name == "cudnn":
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: MIN_CUDNN)
    with mode, torch.no_grad():
        quick = cuda.optimize_cuda(move_to_fake_gpu(model), precision, None, GPU)  # type: ignore[arg-type]
        run = cuda.bind_method(
            cuda.copy_for_grid(quick.trunk, (4, 4), GPU), "forward_features", torch.float32
        )
        with Count() as count:
            run(torch.empty(2, 3, 32, 32, device=GPU))
    assert count.counts[operation] == 3, count.counts
    biases = [a[3] for n, a in count.calls if n == operation and name == "bias"]
    assert all(t.stride(-2) % cuda_attention.BIAS_ALIGNMENT == 0 for t in biases)


def test_align_bias_aligns_rows() -> None:
    bias = torch.randn(1, 4, 17, 17)
    actual = cuda_attention.align_bias(bias)
    assert torch.equal(actual, bias)
    assert all(stride % cuda_attention.BIAS_ALIGNMENT == 0 for stride in actual.stride()[:-1])
    assert actual.stride(-1) == 1


def test_empty_batch_attends() -> None:
    q = torch.empty(0, 2, 5, 8, device="meta")
    assert cuda_attention.attend(q, q, q, None, HOPPER).shape == (0, 5, 16)


def test_threads_do_not_change_sdpa_settings() -> None:
    """The flags of torch.nn.attention.sdpa_kernel would be those of all threads."""
    from torch.nn.attention import _cur_sdpa_kernel_backends

    before = _cur_sdpa_kernel_backends(with_priority=True)
    inside = threading.Barrier(2)
    kernels: list[Any] = []

    def run(precision: str) -> None:
        quick, images = optimize_on_cpu(small(), precision), torch.randn(2, 3, 32, 32)

        def look(*_: Any) -> None:
            inside.wait(5)
            kernels.append(_cur_sdpa_kernel_backends(with_priority=True))

        quick.trunk.blocks[0].register_forward_hook(look)
        quick(images)

    threads = [threading.Thread(target=run, args=(p,)) for p in ("fp32", "bf16")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kernels == [before, before]
    assert _cur_sdpa_kernel_backends(with_priority=True) == before
