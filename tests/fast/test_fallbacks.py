"""optimize() where torch's private operations are absent or wrong, and on other machines' paths.

Each operation is switched off or spoilt, and a probe must notice: the plain path serves, with the
same numbers. What is remembered of a probe is forgotten before and after each test.
"""

from __future__ import annotations

import copy
import logging
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vitlib
from fast.test_optimize import (
    SAME,
    answers,
    apart,
    has_int8,
    one_thread,  # noqa: F401
    pixels,
    tiny,
)
from fixtures.references import distance, rms
from vitlib.errors import ConfigError
from vitlib.fast import FastViT, attention, cpu, onednn_graph, onednn_ops
from vitlib.fast.attention import AbsorbedAttention
from vitlib.fast.cpu import KernelPlan, Machine, kernel_plan
from vitlib.fast.linears import PackedLinear

F32, BF16 = torch.float32, torch.bfloat16
SEVERAL = ["class token", "dinov3 swiglu", "beit", "siglip", "clip", "heads of 7"]
PROBES = [
    (module, name)
    for module in (onednn_ops, onednn_graph, cpu)
    for name, value in vars(module).items()
    if hasattr(value, "cache_clear") and getattr(value, "__module__", "") == module.__name__
]


def forget() -> None:
    for module, name in PROBES:
        probe = getattr(module, name)
        if hasattr(probe, "cache_clear"):
            probe.cache_clear()
    onednn_graph._kernels.clear()


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    forget()
    yield
    forget()


def absent(*_: object, **__: object) -> None:
    raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute")


def packed(fast: FastViT) -> bool:
    return any(isinstance(module, PackedLinear) for module in fast.modules())


def test_what_is_remembered_is_found() -> None:
    names = {name for _, name in PROBES}
    assert {"has_packed_linear", "has_int8_linear", "has_graph_attention", "this_machine"} <= names


# --- packed linears -------------------------------------------------------------------------------

needs_packed = pytest.mark.skipif(
    not (onednn_ops.has_packed_linear(F32) and cpu.this_machine().avx512),
    reason="no packed linears on this machine",
)


@needs_packed
@pytest.mark.parametrize("name", SEVERAL)
def test_without_the_operations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(name)
    images = pixels(model)
    assert packed(vitlib.optimize(model))
    monkeypatch.setattr(torch.ops, "mkldnn", types.SimpleNamespace())
    monkeypatch.setattr(torch.ops, "onednn", types.SimpleNamespace())
    forget()
    assert not onednn_ops.has_packed_linear(F32)
    assert not onednn_ops.has_packed_linear(BF16)
    assert not onednn_ops.has_int8_linear()
    fast = vitlib.optimize(model)
    assert not packed(fast)
    assert apart(fast, model, images) <= SAME


@needs_packed
@pytest.mark.parametrize("name", ["pack", "linear", "linear_binary"])
def test_with_an_operation_that_raises(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    monkeypatch.setattr(onednn_ops, name, absent)
    forget()
    fast = vitlib.optimize(model)
    assert not packed(fast)
    assert apart(fast, model, pixels(model)) <= SAME


def _a_little_off(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *given: real(*given) * (1 + 1e-4)


def _no_bias(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, held, bias, *rest: real(x, held, None, *rest)  # noqa: ARG005


def _always(index: int, word: str, instead: str) -> Callable[..., Any]:
    def spoil(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def spoilt(*given: Any) -> Tensor:
            given = list(given)
            if len(given) > index and given[index] == word:
                given[index] = instead
            return real(*given)

        return spoilt

    return spoil


def _other_order(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda weight: real(weight.flip(0))


SPOILT: list[tuple[str, Callable[..., Any]]] = [
    ("pack", _other_order),
    ("linear", _a_little_off),
    ("linear", _no_bias),
    ("linear", _always(3, "gelu", "gelu_tanh")),
    ("linear", _always(3, "gelu_tanh", "gelu")),
    ("linear", _always(3, "silu", "none")),
    ("linear_binary", _a_little_off),
    ("linear_binary", _no_bias),
    ("linear_binary", _always(4, "add", "mul")),
    ("linear_binary", _always(4, "mul", "add")),
]


@needs_packed
@pytest.mark.parametrize(("name", "spoil"), SPOILT)
def test_with_an_operation_that_is_wrong(
    name: str, spoil: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("dinov2 swiglu" if "with" in name else "gelu_tanh")
    monkeypatch.setattr(onednn_ops, name, spoil(getattr(onednn_ops, name)))
    forget()
    assert not onednn_ops.has_packed_linear(F32)
    fast = vitlib.optimize(model)
    assert not packed(fast)
    assert apart(fast, model, pixels(model)) <= SAME


@needs_packed
def test_bf16_falls_back_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Only bfloat16's kernel is wrong: bf16 is not used and the log says it; fp32 is as it was."""
    if kernel_plan("bf16").arithmetic != "bf16":
        pytest.skip("this machine serves bf16 by float32")
    real, model = onednn_ops.linear, tiny()

    def spoilt(x: Tensor, *rest: Any) -> Tensor:
        return real(x, *rest) * (1 if x.dtype == F32 else 1.1)

    monkeypatch.setattr(onednn_ops, "linear", spoilt)
    forget()
    with caplog.at_level(logging.WARNING, "vitlib"):
        fast = vitlib.optimize(model, "bf16")
    assert len(caplog.messages) == 1
    assert "bf16" in caplog.messages[0]
    assert apart(fast, model, pixels(model)) <= SAME
    assert packed(vitlib.optimize(model))


def test_a_probe_draws_no_random_numbers_and_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[object] = []
    real = onednn_ops._check_packed
    monkeypatch.setattr(
        onednn_ops, "_check_packed", lambda dtype: tried.append(dtype) or real(dtype)
    )
    forget()
    before = torch.random.get_rng_state()
    for _ in range(3):
        onednn_ops.has_packed_linear(F32)
    assert torch.equal(before, torch.random.get_rng_state())
    assert tried == [F32]


# --- 8 bits ---------------------------------------------------------------------------------------


def _rounded_down(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *given: real(*given) - 0.01


@has_int8
@pytest.mark.parametrize("spoil", [lambda _: absent, _rounded_down])
@pytest.mark.parametrize("name", ["pack_int8", "linear_int8", "linear_int8_add"])
def test_int8_is_refused_where_its_operations_are_wrong(
    name: str, spoil: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "pack_int8" and spoil is _rounded_down:
        spoil = _other_order
    monkeypatch.setattr(onednn_ops, name, spoil(getattr(onednn_ops, name)))
    forget()
    with pytest.raises(ConfigError, match=r"int8 needs operations.*fp32 or bf16"):
        vitlib.optimize(tiny(), "int8")


@has_int8
def test_int8_without_packed_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    """The few linears of an int8 model that are not in 8 bits have a plain path too."""
    model = tiny("siglip")
    images = pixels(model)
    monkeypatch.setattr(onednn_ops, "linear", absent)
    forget()
    fast = vitlib.optimize(model, "int8")
    assert not packed(fast)
    assert rms(fast(images), model(images).detach().double()) < 5e-2  # as in fast/test_optimize.py


def test_bytes_are_levels_cut_off() -> None:
    levels = torch.arange(0, 256, 1 / 8)
    assert torch.equal(onednn_ops.to_uint8(levels), levels.floor().to(torch.uint8))


@has_int8
def test_int8_where_a_conversion_to_int8_does_not_wrap(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    images = pixels(model)
    fast = vitlib.optimize(model, "int8", calibrate=images)
    answer = fast(images)
    monkeypatch.setattr(onednn_ops, "_int8_cast_wraps", lambda: False)
    assert torch.equal(fast(images), answer)


# --- attention ------------------------------------------------------------------------------------


def exact_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    scores = q.double() @ k.double().transpose(-1, -2)
    scores = scores if bias is None else scores + bias.double()
    return (scores.softmax(-1) @ v.double()).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("asked", [1, 5, 37])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("way", attention.ATTENTION_KERNELS)
def test_every_way_is_attention(way: str, dtype: torch.dtype, biased: bool, asked: int) -> None:
    """In bfloat16 each score, and each sum, is rounded to 2**-9 once."""
    qkv = torch.randn(2, 37, 3, 4, 12).to(dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # laid out as a fused product gives them
    bias = torch.randn(1, 4, asked, 37) if biased else None
    found = attention.ATTENTION_KERNELS[way](q[:, :, :asked], k, v, bias)
    assert found.dtype == dtype
    expected = exact_attention(q[:, :, :asked], k, v, bias)
    assert distance(found.double(), expected) <= (2e-6 if dtype == F32 else 2e-2)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("biased", [False, True])
def test_first_tokens_alone(count: int, biased: bool) -> None:
    """K and V absorbed: the same as attention with them, float32 sums in another order."""
    x = torch.randn(3, 17, 48)
    q, k, v = (torch.randn(48, 48) / 7 for _ in range(3))
    q_bias, k_bias, v_bias = torch.randn(3, 48)
    bias = torch.randn(1, 4, count, 17) if biased else None
    found = AbsorbedAttention(q, k, v, (q_bias, v_bias), 4)(x, count, bias)
    heads = [
        F.linear(x, w, b).view(3, 17, 4, 12).transpose(1, 2)
        for w, b in ((q, q_bias), (k, k_bias), (v, v_bias))
    ]
    expected = exact_attention(heads[0][:, :, :count], *heads[1:], bias)
    assert distance(found.double(), expected) <= SAME


@pytest.mark.parametrize("name", SEVERAL)
def test_many_scores_go_another_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(name)
    for limit in ("MAX_SCORES", "MAX_TOKENS"):
        with monkeypatch.context() as patch:
            patch.setattr(attention, limit, 16 if limit == "MAX_SCORES" else {F32: 4, BF16: 4})
            assert apart(vitlib.optimize(model), model, pixels(model)) <= SAME


def _no_llga(*_: object) -> None:
    raise RuntimeError("oneDNN Graph is not built in")


OFF: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "refused": lambda patch: patch.setattr(torch._C, "_jit_set_llga_enabled", _no_llga),
    "gone": lambda patch: patch.delattr(torch._C, "_jit_llga_enabled"),
    "without effect": lambda patch: patch.setattr(
        torch._C, "_jit_set_llga_enabled", lambda _: None
    ),
    "no TorchScript": lambda patch: patch.setattr(torch.jit, "CompilationUnit", _no_llga),
    "nothing to see": lambda patch: patch.delattr(torch._C, "_last_executed_optimized_graph"),
    "in no piece": lambda patch: patch.setattr(
        torch._C, "_last_executed_optimized_graph", lambda: "graph()"
    ),
}


@pytest.mark.parametrize(
    "off",
    [pytest.param(off, id=name) for name, off in OFF.items()],
)
@pytest.mark.parametrize("name", ["class token", "beit", "siglip"])
def test_without_oneDNN_graph(  # noqa: N802
    name: str,
    off: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny(name)
    images = pixels(model)
    bf16 = vitlib.optimize(model, "bf16")(images)
    off(monkeypatch)
    forget()
    q = torch.randn(1, 4, 17, 12)
    assert onednn_graph.attention_kernel(q, q, q, None) is None
    assert apart(vitlib.optimize(model), model, images) <= SAME
    # Two paths of one arithmetic: some roundings of 2**-9 apart.
    assert distance(vitlib.optimize(model, "bf16")(images), bf16) <= 3e-2


needs_graph = pytest.mark.skipif(
    onednn_graph.attention_kernel(*(torch.zeros(1, 4, 17, 12),) * 3, None) is None,
    reason="torch here has no oneDNN Graph",
)


@needs_graph
def test_a_wrong_kernel_of_oneDNN_graph(monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: N802
    monkeypatch.setattr(
        onednn_graph, "_SOURCE", onednn_graph._SOURCE.replace("matmul(q, k.", "matmul(k, q.")
    )
    forget()
    q, k, v = torch.randn(3, 2, 4, 17, 12)
    found = attention.graph_attention(q, k, v, None)
    assert distance(found.double(), exact_attention(q, k, v, None)) <= 2e-6


@needs_graph
def test_the_process_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN Graph is on only while a kernel is compiled, also where that fails."""
    q = torch.randn(1, 2, 9, 8)
    for failing in (False, True):
        with monkeypatch.context() as patch:
            if failing:
                patch.setattr(torch.jit, "CompilationUnit", _no_llga)
            for on in (False, True):
                forget()
                torch._C._jit_set_llga_enabled(on)
                try:
                    assert (onednn_graph.attention_kernel(q, q, q, None) is None) == failing
                    assert torch._C._jit_llga_enabled() == on
                finally:
                    torch._C._jit_set_llga_enabled(False)


# --- machines -------------------------------------------------------------------------------------

FULL = {"avx512": True, "avx512_bf16": True, "avx512_vnni": True}
MACHINES = {
    "Intel AMX": Machine("x86_64", "intel", "Sapphire Rapids", **FULL, amx=True),
    "Intel, AMX hidden": Machine("x86_64", "intel", "Sapphire Rapids", **FULL),
    "Intel VNNI": Machine("x86_64", "intel", "Cascade Lake", avx512=True, avx512_vnni=True),
    "Intel AVX-512": Machine("x86_64", "intel", "Skylake", avx512=True),
    "AMD": Machine("x86_64", "amd", "Zen 5", **FULL),
    "AMD AVX2": Machine("x86_64", "amd", "Zen 3"),
    "AVX2, no vendor": Machine("amd64", "", "a virtual machine"),
    "Arm": Machine("aarch64", "", "Neoverse"),
}
# The path of fp32, bf16 and int8: arithmetic, packed, attention and its dtype.
FALLBACK_PLAN, PACKED = ("fp32", False, "fused", F32), ("fp32", True, "fused", F32)
AMD = ("fp32", True, "graph", F32)
EXPECTED: dict[str, tuple[Any, Any, Any]] = {
    "Intel AMX": (PACKED, ("bf16", True, "fused", BF16), ("int8", True, "fused", F32)),
    "Intel, AMX hidden": (PACKED, PACKED, ("int8", True, "fused", F32)),
    "Intel VNNI": (PACKED, PACKED, ("int8", True, "fused", F32)),
    "Intel AVX-512": (PACKED, PACKED, None),
    "AMD": (AMD, ("bf16", True, "graph", BF16), ("int8", True, "graph", BF16)),
    "AMD AVX2": (FALLBACK_PLAN, FALLBACK_PLAN, None),
    "AVX2, no vendor": (FALLBACK_PLAN, FALLBACK_PLAN, None),
    "Arm": (FALLBACK_PLAN, FALLBACK_PLAN, None),
}


@pytest.mark.parametrize("name", MACHINES)
def test_the_table(name: str) -> None:
    for precision, expected in zip(("fp32", "bf16", "int8"), EXPECTED[name], strict=True):
        found = kernel_plan(precision, MACHINES[name])
        assert (None if found is None else tuple(found)[:4]) == expected, precision
        assert found is None or len(found.reason) > 20
    assert kernel_plan("fp8", MACHINES[name]) is None
    assert MACHINES[name].features


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("name", MACHINES)
def test_the_paths_of_other_machines(
    name: str,
    precision: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where this machine has the operations, its neighbours' paths give the same numbers."""
    monkeypatch.setattr(cpu, "this_machine", lambda: MACHINES[name])
    monkeypatch.setattr(
        "vitlib.fast.optimization.this_machine", lambda: MACHINES[name], raising=False
    )
    way = kernel_plan(precision)
    if way is None:
        with pytest.raises(ConfigError, match="VNNI"):
            vitlib.optimize(tiny(), precision)
        return
    if way.arithmetic == "int8" and not onednn_ops.has_int8_linear():
        pytest.skip("no 8-bit linear here")
    for family in ("class token", "beit", "dinov3 swiglu", "siglip"):
        model = tiny(family)
        images = pixels(model)
        with caplog.at_level(logging.WARNING, "vitlib"):
            fast = vitlib.optimize(model, precision)
        exact = answers(copy.deepcopy(model).double(), images.double())
        found = answers(fast, images)
        if way.arithmetic == "fp32":
            assert packed(fast) == (way.packed and onednn_ops.has_packed_linear(F32))
            assert all(distance(found[k].double(), exact[k]) <= SAME for k in exact)
        else:  # as in fast/test_optimize.py
            bound = 2e-2 if way.arithmetic == "bf16" else 5e-2
            assert all(rms(found[k], exact[k]) < bound for k in exact)
    told = [message for message in caplog.messages if "bf16" in message]
    assert bool(told) == (precision == "bf16" and way.arithmetic != "bf16")


@pytest.mark.parametrize("attention_way", ["fused", "bmm", "graph"])
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("arithmetic", ["fp32", "bf16"])
def test_every_path(
    arithmetic: Any, is_packed: bool, attention_way: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a row of the table could say, whether or not one says it now."""
    dtype = F32 if arithmetic == "fp32" else BF16
    if is_packed and not onednn_ops.has_packed_linear(dtype):
        pytest.skip("no such packed linear here")
    way = KernelPlan(arithmetic, is_packed, attention_way, dtype, "because this test says so")
    row = cpu.PlanRow((), way)
    monkeypatch.setattr(cpu, "PLANS", {"fp32": (row,), "bf16": (row,)})
    for family in ("two heads", "beit class token", "dinov3", "siglip swiglu"):
        model = tiny(family)
        images = pixels(model)
        exact = answers(copy.deepcopy(model).double(), images.double())
        found = answers(vitlib.optimize(model, arithmetic), images)
        for key in exact:
            if arithmetic == "fp32":
                assert distance(found[key].double(), exact[key]) <= SAME
            else:
                assert rms(found[key], exact[key]) < 2e-2  # as in fast/test_optimize.py


# --- what a CPU is read from ----------------------------------------------------------------------

LINUX = {"vendor_id": "GenuineIntel", "model name": "Xeon", "flags": "avx512f avx512_vnni"}


@pytest.mark.parametrize(
    ("said", "capability", "expected"),
    [
        (LINUX, "AVX512", ("intel", True, False, True, False)),
        (
            {**LINUX, "flags": "avx512_bf16 amx_bf16 x"},
            "AVX512",
            ("intel", True, True, False, True),
        ),
        ({**LINUX, "vendor_id": "AuthenticAMD"}, "AVX512", ("amd", True, False, True, False)),
        ({**LINUX, "flags": "avx512_bf16"}, "AVX2", ("intel", False, False, False, False)),
        ({"vendor_id": "HygonGenuine", "flags": ""}, "DEFAULT", ("", False, False, False, False)),
        ({}, "DEFAULT", ("", False, False, False, False)),
    ],
)
def test_reading_a_machine(
    said: dict[str, str],
    capability: str,
    expected: tuple[Any, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ATEN_CPU_CAPABILITY lowers what torch uses, and so what counts."""
    monkeypatch.setattr(cpu, "_cpuinfo", lambda: said)
    monkeypatch.setattr(cpu, "_capability", lambda: capability)
    monkeypatch.setattr(cpu.platform, "processor", lambda: "")
    found = cpu.this_machine()
    told = (found.vendor, found.avx512, found.avx512_bf16, found.avx512_vnni, found.amx)
    assert told == expected
    assert found.model


def test_a_machine_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and macOS: the vendor is in a sentence, and torch is asked for the rest."""
    monkeypatch.setattr(cpu, "_cpuinfo", dict)
    monkeypatch.setattr(cpu, "_capability", lambda: "AVX512")
    sentence = "Intel64 Family 6 Model 143 Stepping 8, GenuineIntel"
    monkeypatch.setattr(cpu.platform, "processor", lambda: sentence)
    for name in ("_is_avx512_bf16_supported", "_is_vnni_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: True, raising=False)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    found = cpu.this_machine()
    assert (found.vendor, found.model) == ("intel", sentence)
    assert (found.avx512_bf16, found.avx512_vnni, found.amx) == (True, True, False)
