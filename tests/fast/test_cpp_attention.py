"""Test that the C++ attention kernels of compiled programs give what float64 gives.

They are compiled here, which takes seconds the first time.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitlib.fast import cpp_attention
from vitlib.fast.attention import AttentionFunction, fused_attention
from vitlib.fast.cpp_attention import kernel_name
from vitlib.fast.cpu import Machine, this_machine

# Root mean square difference from float64 over its root mean square. float32 sums of up to 600
# numbers err by their order; bfloat16 rounds the weights of a softmax and the result.
BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 4e-3}
DTYPES = [
    pytest.param(
        dtype,
        marks=pytest.mark.skipif(
            kernel_name(dtype, this_machine()) is None, reason=f"this CPU has no kernel of {dtype}"
        ),
    )
    for dtype in BOUNDS
]
# Images, heads, queries, tokens, width of a head: around the sizes of a block, a tile and a panel.
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 5, 5, 8),
    (1, 2, 16, 16, 32),
    (1, 2, 17, 17, 33),
    (2, 2, 31, 31, 24),
    (1, 3, 33, 33, 40),
    (3, 2, 48, 64, 64),
    (2, 3, 197, 197, 64),
    (1, 2, 65, 257, 80),
    (1, 1, 257, 257, 88),
    (1, 2, 50, 50, 128),
    (1, 1, 40, 577, 72),
    (1, 1, 1, 513, 64),
]


def load(dtype: torch.dtype) -> AttentionFunction:
    function = cpp_attention.cpp_attention(dtype)
    assert function is not fused_attention
    return function


def heads(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Draw queries, keys and values as a block has them: views of one product."""
    b, h, n, t, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    qkv = torch.randn(b, t, 3, h, width, generator=generator).to(dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return q[:, :, :n], k, v


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=1.0)
    return x.transpose(1, 2).flatten(2)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return float(
        torch.linalg.vector_norm(actual.double() - exact) / torch.linalg.vector_norm(exact)
    )


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_gives_what_float64_gives(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    q, k, v = heads(shape, dtype)
    out, exact = load(dtype)(q, k, v, None), exact_attention(q, k, v)
    assert out.dtype == dtype
    assert out.shape == exact.shape
    assert relative_error(out, exact) <= BOUNDS[dtype]
    assert relative_error(out, exact_attention(q, k, v.roll(1, 3) + 1)) > BOUNDS[dtype]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    q, k, v = heads((2, 3, 197, 197, 64), dtype)
    attend = load(dtype)
    by_two = attend(q, k, v, None)
    torch.set_num_threads(1)
    assert torch.equal(attend(q, k, v, None), by_two)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_number_of_threads_of_a_thread_stays(dtype: torch.dtype) -> None:
    attend, (q, k, v) = load(dtype), heads((2, 3, 33, 33, 24), dtype)

    def use_one() -> None:
        torch.get_num_threads()
        torch.set_num_threads(1)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(use_one).result()
        torch.set_num_threads(2)  # what torch would give a thread anew
        pool.submit(attend, q, k, v, None).result()
        assert pool.submit(torch.get_num_threads).result() == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_in_memory_changes_no_bit(dtype: torch.dtype) -> None:
    q, k, v = heads((2, 3, 33, 33, 24), dtype)
    attend = load(dtype)
    expected = attend(q, k, v, None)
    assert torch.equal(attend(q.contiguous(), k.contiguous(), v.contiguous(), None), expected)
    columns = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    assert torch.equal(attend(columns[0], columns[1], columns[2], None), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_are_exact(dtype: torch.dtype) -> None:
    """One key takes all the weight; scores are far beyond what exp() holds."""
    q, k, v = heads((1, 2, 20, 50, 32), dtype)
    for factor in (30, 1e5, 1e8):
        scaled = q * factor, k * factor
        out = load(dtype)(*scaled, v, None)
        assert relative_error(out, exact_attention(*scaled, v)) <= BOUNDS[dtype], factor
    shifted = load(dtype)(torch.ones_like(q) * -1000, torch.ones_like(k), v, None)
    mean = v.double().mean(dim=2, keepdim=True).expand(-1, -1, 20, -1)
    assert relative_error(shifted, mean.transpose(1, 2).flatten(2)) <= 4 * BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_stay_in_their_row(dtype: torch.dtype, value: float) -> None:
    q, k, v = heads((1, 1, 40, 40, 32), dtype)
    attend = load(dtype)
    expected = attend(q, k, v, None)
    q = q.clone()
    q[0, 0, 7] = value
    out = attend(q, k, v, None)
    assert out[0, 7].isnan().all()
    others = [i for i in range(40) if i != 7]
    assert torch.equal(out[0, others], expected[0, others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_calls_go_to_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = load(dtype)
    q, k, v = heads((1, 2, 9, 9, 16), dtype)
    bias = torch.linspace(-1, 1, 162).view(1, 2, 9, 9)
    assert torch.equal(attend(q, k, v, bias), fused_attention(q, k, v, bias))
    assert torch.equal(
        attend(q.half(), k.half(), v.half(), None),
        fused_attention(q.half(), k.half(), v.half(), None),
    )
    monkeypatch.setattr(cpp_attention, "MAX_TOKENS", 8)
    assert torch.equal(attend(q, k, v, None), fused_attention(q, k, v, None))


@pytest.mark.parametrize("dtype", DTYPES)
def test_operation_refuses_what_does_not_fit(dtype: torch.dtype) -> None:
    load(dtype)
    name = kernel_name(dtype, this_machine())
    assert name is not None
    operation = getattr(torch.ops.vitlib, name)
    q, k, v = heads((1, 2, 9, 9, 16), dtype)
    for arguments in ((q, k[:, :1], v), (q, k, v[:, :, :3]), (q[0], k, v), (q.double(), k, v)):
        with pytest.raises(RuntimeError, match=r"do not fit|attention takes"):
            operation(*arguments)
    assert operation(q[:, :, :0], k, v).shape == (1, 0, 32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_operation_is_what_the_compiler_is_told(dtype: torch.dtype) -> None:
    load(dtype)
    name = kernel_name(dtype, this_machine())
    operation = getattr(torch.ops.vitlib, str(name)).default
    checks = ("test_schema", "test_faketensor")
    checker: Any = torch.library.opcheck
    for shape in SHAPES[:3]:
        checker(operation, heads(shape, dtype), test_utils=checks)


def test_machines_have_the_kernels_they_can_run() -> None:
    zen = Machine("x86_64", "amd", "", avx512=True, avx512_bf16=True)
    sapphire = Machine("x86_64", "intel", "", avx512=True, avx512_bf16=True, amx=True)
    assert kernel_name(torch.float32, zen) == "attention_avx512"
    assert kernel_name(torch.bfloat16, zen) is None
    assert kernel_name(torch.bfloat16, sapphire) == "attention_amx"
    assert kernel_name(torch.float16, sapphire) is None
    assert kernel_name(torch.float32, Machine("x86_64", "intel", "")) is None
    assert kernel_name(torch.float32, Machine("aarch64", "arm", "")) is None
