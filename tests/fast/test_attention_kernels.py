"""Test the attention kernels of a CPU, and oneDNN Graph where it is absent or wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vitlib
from fixtures.fast_models import (
    SEVERAL,
    TOLERANCE,
    forget_probes,
    max_distance,
    pixels,
    tiny,
)
from fixtures.references import distance
from vitlib.fast import attention, onednn_graph
from vitlib.fast.attention import AbsorbedAttention

pytestmark = pytest.mark.usefixtures("fresh_probes")


F32, BF16 = torch.float32, torch.bfloat16


def exact_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    scores = q.double() @ k.double().transpose(-1, -2)
    scores = scores if bias is None else scores + bias.double()
    return (scores.softmax(-1) @ v.double()).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("num_queries", [1, 5, 37])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("kernel", attention.ATTENTION_KERNELS)
def test_every_kernel_is_attention(
    kernel: str, dtype: torch.dtype, has_bias: bool, num_queries: int
) -> None:
    """In bfloat16 each score, and each sum, is rounded to 2**-9 once."""
    qkv = torch.randn(2, 37, 3, 4, 12).to(dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # laid out as a fused product gives them
    bias = torch.randn(1, 4, num_queries, 37) if has_bias else None
    actual = attention.ATTENTION_KERNELS[kernel](q[:, :, :num_queries], k, v, bias)
    assert actual.dtype == dtype
    expected = exact_attention(q[:, :, :num_queries], k, v, bias)
    assert distance(actual.double(), expected) <= (2e-6 if dtype == F32 else 2e-2)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("has_bias", [False, True])
def test_absorbed_attention_equals_attention(count: int, has_bias: bool) -> None:
    """It differs from attention with K and V only in the order of float32 sums."""
    x = torch.randn(3, 17, 48)
    q, k, v = (torch.randn(48, 48) / 7 for _ in range(3))
    q_bias, k_bias, v_bias = torch.randn(3, 48)
    bias = torch.randn(1, 4, count, 17) if has_bias else None
    actual = AbsorbedAttention(q, k, v, (q_bias, v_bias), 4)(x, count, bias)
    heads = [
        F.linear(x, w, b).view(3, 17, 4, 12).transpose(1, 2)
        for w, b in ((q, q_bias), (k, k_bias), (v, v_bias))
    ]
    expected = exact_attention(heads[0][:, :, :count], *heads[1:], bias)
    assert distance(actual.double(), expected) <= TOLERANCE


@pytest.mark.parametrize("name", SEVERAL)
def test_many_scores_use_the_fused_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(name)
    for limit in ("MAX_SCORES", "MAX_TOKENS"):
        with monkeypatch.context() as patch:
            patch.setattr(attention, limit, 16 if limit == "MAX_SCORES" else {F32: 4, BF16: 4})
            assert max_distance(vitlib.optimize(model), model, pixels(model)) <= TOLERANCE


def _raise_absent(*_: object) -> None:
    raise RuntimeError("oneDNN Graph is not built in")


DISABLED: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "refused": lambda patch: patch.setattr(torch._C, "_jit_set_llga_enabled", _raise_absent),
    "gone": lambda patch: patch.delattr(torch._C, "_jit_llga_enabled"),
    "without effect": lambda patch: patch.setattr(
        torch._C, "_jit_set_llga_enabled", lambda _: None
    ),
    "no TorchScript": lambda patch: patch.setattr(torch.jit, "CompilationUnit", _raise_absent),
    "nothing to see": lambda patch: patch.delattr(torch._C, "_last_executed_optimized_graph"),
    "in no piece": lambda patch: patch.setattr(
        torch._C, "_last_executed_optimized_graph", lambda: "graph()"
    ),
}


@pytest.mark.parametrize(
    "disable",
    [pytest.param(disable, id=name) for name, disable in DISABLED.items()],
)
@pytest.mark.parametrize("name", ["class token", "beit", "siglip"])
def test_optimize_without_onednn_graph(
    name: str,
    disable: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny(name)
    images = pixels(model)
    bf16 = vitlib.optimize(model, "bf16")(images)
    disable(monkeypatch)
    forget_probes()
    q = torch.randn(1, 4, 17, 12)
    assert onednn_graph.attention_kernel(q, q, q, None) is None
    assert max_distance(vitlib.optimize(model), model, images) <= TOLERANCE
    # Two paths of one arithmetic: some roundings of 2**-9 apart.
    assert distance(vitlib.optimize(model, "bf16")(images), bf16) <= 3e-2


requires_graph = pytest.mark.skipif(
    onednn_graph.attention_kernel(*(torch.zeros(1, 4, 17, 12),) * 3, None) is None,
    reason="torch here has no oneDNN Graph",
)


@requires_graph
def test_wrong_kernel_of_onednn_graph_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        onednn_graph, "_SOURCE", onednn_graph._SOURCE.replace("matmul(q, k.", "matmul(k, q.")
    )
    forget_probes()
    q, k, v = torch.randn(3, 2, 4, 17, 12)
    actual = attention.graph_attention(q, k, v, None)
    assert distance(actual.double(), exact_attention(q, k, v, None)) <= 2e-6


@requires_graph
def test_switch_of_onednn_graph_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """The switch is on only while a kernel is compiled, also where that fails."""
    q = torch.randn(1, 2, 9, 8)
    for failing in (False, True):
        with monkeypatch.context() as patch:
            if failing:
                patch.setattr(torch.jit, "CompilationUnit", _raise_absent)
            for on in (False, True):
                forget_probes()
                torch._C._jit_set_llga_enabled(on)
                try:
                    assert (onednn_graph.attention_kernel(q, q, q, None) is None) == failing
                    assert torch._C._jit_llga_enabled() == on
                finally:
                    torch._C._jit_set_llga_enabled(False)
