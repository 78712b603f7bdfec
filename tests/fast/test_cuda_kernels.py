"""How many kernels a GPU launches, what each computes, and which one attends."""

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
    fake_mode,
    kept_on_gpu,
    kernels,
    optimized,
    small,
)
from fixtures.references import distance
from vitlib.encoder import apply_rope
from vitlib.fast import cuda, cuda_attention, fp8, row_ops
from vitlib.fast.cuda_attention import MIN_CUDNN, Gpu, choose_kernel

# --- how many -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "most"), [("bf16", 9), ("fp8", 12), ("fp16", 10)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_launches_few_kernels(family: str, precision: str, most: int) -> None:
    """At batch 1 a model is its launches. Of a plain block in bfloat16: two norms, four products
    (one with its GELU, one with the sum), attention."""
    fields = FAMILIES[family]
    block = kernels(precision, 4, **fields) - kernels(precision, 3, **fields)
    assert sum(block.values()) <= most, block
    # An operation that is not fused would add its own: this is no empty count.
    assert block["norm_rows"] == 2
    assert sum(block.values()) >= 7


@pytest.mark.parametrize(("precision", "count"), [("bf16", 7), ("fp16", 9), ("fp8", 10)])
def test_a_plain_block_launches_what_the_page_says(precision: str, count: int) -> None:
    """docs/performance.md says these numbers."""
    block = kernels(precision, 4) - kernels(precision, 3)
    assert sum(block.values()) == count, block


def test_a_model_launches_few_kernels_beside_its_blocks() -> None:
    plain = kernels("bf16", 12)
    assert sum(plain.values()) <= 100, plain


def test_float32_does_not_convolve_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN convolves in TF32 unless it is told not to; a product is exact."""
    model = small()
    images = torch.randn(2, 3, 36, 40)
    proj = model.patch_embed.proj
    with torch.no_grad():
        exact = proj(images)
        assert distance(proj.project_by_matmul(images), exact) <= 1e-6
    mode = fake_mode(monkeypatch)
    with mode, torch.no_grad(), Count() as count:
        kept_on_gpu(model)(torch.empty(2, 3, 32, 32, device=GPU))
    assert not [name for name in count.of if "conv" in name]
    half = small().bfloat16()
    with mode, torch.no_grad(), Count() as count:
        kept_on_gpu(half)(torch.empty(2, 3, 32, 32, device=GPU))
    assert [name for name in count.of if "conv" in name]  # the count would see one


# --- what they compute ----------------------------------------------------------------------------


def test_norm_rows() -> None:
    x, y, gain, offset, extra = (
        torch.randn(*s) for s in ((2, 5, 48), (2, 5, 48), (48,), (48,), (48,))
    )
    by = row_ops.NormWeights(gain, offset, 1e-6)
    assert (
        distance(row_ops.norm(x, by, torch.float32), F.layer_norm(x, (48,), gain, offset, 1e-6))
        <= 1e-6
    )
    stream, rows = row_ops.add_norm(x, y, by, extra, torch.float32)
    assert torch.equal(stream, x + y + extra)
    assert distance(rows, F.layer_norm(x + y, (48,), gain, offset, 1e-6)) <= 1e-6
    # The bias that is put into the stream is not normalised: with it the rows would differ.
    assert distance(rows, F.layer_norm(x + y + extra, (48,), gain, offset, 1e-6)) > 0.1
    stream, rows = row_ops.add_norm(x[:, :2].bfloat16(), y[:, :2], by, None, torch.bfloat16)
    assert stream.shape == rows.shape == (2, 2, 48)
    assert stream.dtype == rows.dtype == torch.bfloat16
    stream.zero_()  # the caller adds in place: it is nobody else's memory
    assert x.abs().min() > 0


def test_rows_in_8_bits() -> None:
    x = torch.randn(7, 32) * torch.logspace(-6, 6, 7)[:, None]
    x[3] = 0
    levels, scale = row_ops.quantize_fp8(x)
    assert levels.dtype == torch.float8_e4m3fn
    assert scale.shape == (7, 1)
    # Three bits after the point; what is 2^14 times below a row's largest is below the smallest.
    back = levels.float() * scale
    assert bool(((back - x).abs() <= x.abs() / 16 + scale * 2**-9).all())
    assert bool((levels.float().abs().amax(dim=1)[[0, 6]] == 448).all())
    weight, bias = torch.randn(16, 32), torch.randn(16).bfloat16()
    held, rows = row_ops.quantize_fp8(weight)
    exact = back @ (held.float() * rows).T + bias.float()
    found = fp8.fp8_product(levels, scale, held, rows, bias)
    assert found.dtype == torch.bfloat16
    assert distance(found.float(), exact) <= 2**-7
    assert fp8.has_fp8(CPU)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "none"])
def test_activations_of_rows(activation: str) -> None:
    x = torch.randn(3, 4, 64)
    form: dict[str, Callable[[Tensor], Tensor]] = {
        "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu,
        "none": lambda x: x,
    }  # fmt: skip
    plain = row_ops.activate(x, activation, False, torch.float32)
    assert distance(plain, form[activation](x)) <= 1e-6
    gated = row_ops.activate(x, activation, True, torch.float32)
    assert distance(gated, form[activation](x[..., :32]) * x[..., 32:]) <= 1e-6


def test_rotation_of_rows() -> None:
    qkv, table = torch.randn(2, 7, 3 * 32), torch.randn(2, 4, 16)
    q, k, _ = qkv.view(2, 7, 3, 2, 16).permute(2, 0, 3, 1, 4)
    turned = row_ops.rotate(qkv, table, 2)
    for found, x in zip(turned, (q, k), strict=True):
        assert distance(found, apply_rope(x, 3, table)) <= 1e-6
        assert torch.equal(found[:, :, :3], x[:, :, :3])


def test_the_tanh_form_costs_bfloat16_little() -> None:
    """linear_gelu computes GELU's tanh form whatever the model's is: what that adds to the error
    of bfloat16 must be small beside it."""
    x, weight, bias = torch.randn(64, 96), torch.randn(256, 96) / 10, torch.randn(256)
    exact = F.gelu(F.linear(x.double(), weight.double(), bias.double()))
    rows, w, b = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    fused = row_ops.linear_gelu(rows, w, b).double()
    plain = F.gelu(F.linear(rows, w, b)).double()
    error = [(found - exact).pow(2).mean().sqrt() for found in (fused, plain)]
    assert error[0] <= 1.1 * error[1]


TRITON = """
import sys, torch
from vitlib.fast import row_kernels as kernels, row_ops
E4M3 = torch.float8_e4m3fn
torch.manual_seed(0)

def same(found, exact, what):
    for a, b in zip(found, exact, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), (what, a.shape, b.shape)
        if a.dtype == E4M3:  # the interpreter rounds to 8 bits in a way of its own: by a step
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
            arguments = given[0], given[1], gain, offset, 1e-6, given[2], dtype
            same(kernels.norm_rows(*arguments), row_ops.define_norm_rows(*arguments), width)
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
def test_triton_kernels_are_their_definitions(tolerance: str, ends: int) -> None:
    """By Triton's interpreter, in a process of its own as it is chosen when Triton is imported.
    With no tolerance at all the comparison fails: it compares."""
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    found = subprocess.run(
        [sys.executable, "-c", TRITON, tolerance],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == ends, found.stderr
    assert ("same" in found.stdout) == (ends == 0)


# --- which one attends ----------------------------------------------------------------------------

HOPPER, AMPERE = Gpu((9, 0), MIN_CUDNN), Gpu((8, 0), MIN_CUDNN)


@pytest.mark.parametrize(
    ("card", "dtype", "queries", "tokens", "head_dim", "has_bias", "kernel"),
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
def test_which_kernel_attends(
    card: Gpu, dtype: torch.dtype, queries: int, tokens: int, head_dim: int, has_bias: bool,
    kernel: str,
) -> None:  # fmt: skip
    assert choose_kernel(card, dtype, queries, tokens, head_dim, has_bias=has_bias) == kernel


def test_a_card_whose_cudnn_disagrees_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: MIN_CUDNN)
    for agrees in (True, False):
        monkeypatch.setattr(cuda_attention, "has_cudnn_attention", lambda _, agrees=agrees: agrees)
        assert cuda_attention.get_gpu(GPU).cudnn == (MIN_CUDNN if agrees else 0)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)
    assert cuda_attention.get_gpu(GPU).cudnn == 0
    assert not cuda_attention.has_cudnn_attention(CPU)  # a kernel that is not there is no error


SERVED = {
    "cudnn": ("bf16", {}, "_scaled_dot_product_cudnn_attention"),
    "flash": ("bf16", {}, "_scaled_dot_product_flash_attention"),
    "efficient": ("fp32", {}, "_scaled_dot_product_efficient_attention"),
    "bias": ("bf16", FAMILIES["relative"], "_scaled_dot_product_efficient_attention"),
}


@pytest.mark.parametrize("name", SERVED)
def test_the_chosen_kernel_is_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    precision, fields, operation = SERVED[name]
    mode, model = fake_mode(monkeypatch), small(**fields)
    if name == "cudnn":
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: MIN_CUDNN)
        monkeypatch.setattr(cuda_attention, "has_cudnn_attention", lambda _: True)
    with mode, torch.no_grad():
        quick = cuda.optimize_cuda(kept_on_gpu(model), precision, None, GPU)  # type: ignore[arg-type]
        run = cuda.bind_method(
            cuda.copy_for_grid(quick.trunk, (4, 4), GPU), "forward_features", torch.float32
        )
        with Count() as count:
            run(torch.empty(2, 3, 32, 32, device=GPU))
    assert count.of[operation] == 3, count.of
    biases = [a[3] for n, a in count.calls if n == operation and name == "bias"]
    assert all(t.stride(-2) % cuda_attention.BIAS_ALIGNMENT == 0 for t in biases)


def test_a_bias_is_aligned() -> None:
    bias = torch.randn(1, 4, 17, 17)
    found = cuda_attention.align_bias(bias)
    assert torch.equal(found, bias)
    assert all(stride % cuda_attention.BIAS_ALIGNMENT == 0 for stride in found.stride()[:-1])
    assert found.stride(-1) == 1


def test_no_images_are_attended_to() -> None:
    q = torch.empty(0, 2, 5, 8, device="meta")
    assert cuda_attention.attend(q, q, q, None, HOPPER).shape == (0, 5, 16)


def test_two_threads_leave_the_settings_of_others_as_they_were() -> None:
    """torch.nn.attention.sdpa_kernel would not: its flags are the process's."""
    from torch.nn.attention import _cur_sdpa_kernel_backends

    before = _cur_sdpa_kernel_backends(with_priority=True)
    inside = threading.Barrier(2)
    seen: list[Any] = []

    def run(precision: str) -> None:
        quick, images = optimized(small(), precision), torch.randn(2, 3, 32, 32)

        def look(*_: Any) -> None:
            inside.wait(5)
            seen.append(_cur_sdpa_kernel_backends(with_priority=True))

        quick.trunk.blocks[0].register_forward_hook(look)
        quick(images)

    threads = [threading.Thread(target=run, args=(p,)) for p in ("fp32", "bf16")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [before, before]
    assert _cur_sdpa_kernel_backends(with_priority=True) == before
