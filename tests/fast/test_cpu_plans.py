"""Test the kernel plans of CPUs: the table, every plan in it, and how a CPU is recognised."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch

import vitlib
from fixtures.fast_models import (
    TOLERANCE,
    all_outputs,
    has_packed_linears,
    pixels,
    tiny,
)
from fixtures.references import distance, rms_error
from vitlib.errors import ConfigError
from vitlib.fast import cpu, onednn_ops
from vitlib.fast.cpu import KernelPlan, Machine, kernel_plan

pytestmark = pytest.mark.usefixtures("fresh_probes")


F32, BF16 = torch.float32, torch.bfloat16


FULL = {"avx512": True, "avx512_bf16": True, "avx512_vnni": True}


MACHINES = {
    "Intel AMX": Machine("x86_64", "intel", "Sapphire Rapids", **FULL, amx=True),
    "Intel, AMX hidden": Machine("x86_64", "intel", "Sapphire Rapids", **FULL),
    "Intel VNNI": Machine("x86_64", "intel", "Cascade Lake", avx512=True, avx512_vnni=True),
    "Intel AVX-512": Machine("x86_64", "intel", "Skylake", avx512=True),
    "AMD": Machine("x86_64", "amd", "Zen 5", **FULL),
    "AMD AVX2": Machine("x86_64", "amd", "Zen 3"),
    "AVX2, no vendor": Machine("amd64", "", "a virtual machine"),
    "Arm": Machine("aarch64", "arm", "Neoverse V1", arm_bf16=True),
    "Arm without bfloat16": Machine("aarch64", "arm", "Neoverse N1"),
    "Apple": Machine("arm64", "apple", "M2"),
}


# The path of fp32, bf16 and int8: arithmetic, packed, attention and its dtype.
UNPACKED, PACKED = ("fp32", False, "fused", F32), ("fp32", True, "fused", F32)


AMD = ("fp32", True, "graph", F32)


EXPECTED: dict[str, tuple[Any, Any, Any]] = {
    "Intel AMX": (PACKED, ("bf16", True, "fused", BF16), ("int8", True, "fused", BF16)),
    "Intel, AMX hidden": (PACKED, PACKED, ("int8", True, "fused", F32)),
    "Intel VNNI": (PACKED, PACKED, ("int8", True, "fused", F32)),
    "Intel AVX-512": (PACKED, PACKED, None),
    "AMD": (AMD, ("bf16", True, "graph", BF16), ("int8", True, "graph", BF16)),
    "AMD AVX2": (UNPACKED, UNPACKED, None),
    "AVX2, no vendor": (UNPACKED, UNPACKED, None),
    "Arm": (PACKED, ("bf16", False, "fused", BF16), None),
    "Arm without bfloat16": (PACKED, UNPACKED, None),
    "Apple": (UNPACKED, UNPACKED, None),
}


@pytest.mark.parametrize("name", MACHINES)
def test_table_gives_each_machine_its_plan(name: str) -> None:
    for precision, expected in zip(("fp32", "bf16", "int8"), EXPECTED[name], strict=True):
        actual = kernel_plan(precision, MACHINES[name])
        assert (None if actual is None else tuple(actual)[:4]) == expected, precision
        assert actual is None or len(actual.reason) > 20
    assert kernel_plan("fp8", MACHINES[name]) is None
    assert MACHINES[name].features


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("name", MACHINES)
def test_plans_of_other_machines_give_the_same_numbers(
    name: str,
    precision: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A plan of another CPU gives the same numbers, if this CPU has its operations."""
    monkeypatch.setattr(cpu, "this_machine", lambda: MACHINES[name])
    monkeypatch.setattr(
        "vitlib.fast.optimization.this_machine", lambda: MACHINES[name], raising=False
    )
    plan = kernel_plan(precision)
    if plan is None:
        with pytest.raises(ConfigError, match="VNNI"):
            vitlib.optimize(tiny(), precision)
        return
    if plan.arithmetic == "int8" and not onednn_ops.has_int8_linear():
        pytest.skip("no 8-bit linear here")
    for family in ("class token", "beit", "dinov3 swiglu", "siglip"):
        model = tiny(family)
        images = pixels(model)
        with caplog.at_level(logging.WARNING, "vitlib"):
            fast = vitlib.optimize(model, precision)
        exact = all_outputs(copy.deepcopy(model).double(), images.double())
        actual = all_outputs(fast, images)
        if plan.arithmetic == "fp32":
            assert has_packed_linears(fast) == (plan.packed and onednn_ops.has_packed_linear(F32))
            assert all(distance(actual[k].double(), exact[k]) <= TOLERANCE for k in exact)
        else:  # as in test_precisions.py
            bound = 2e-2 if plan.arithmetic == "bf16" else 5e-2
            assert all(rms_error(actual[k], exact[k]) < bound for k in exact)
    warnings = [message for message in caplog.messages if "bf16" in message]
    assert bool(warnings) == (precision == "bf16" and plan.arithmetic != "bf16")


@pytest.mark.parametrize("attention_kernel", ["fused", "bmm", "graph"])
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("arithmetic", ["fp32", "bf16"])
def test_every_combination_gives_the_same_numbers(
    arithmetic: Any, is_packed: bool, attention_kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every plan that a row of the table could hold, whether or not one does now."""
    dtype = F32 if arithmetic == "fp32" else BF16
    if is_packed and not onednn_ops.has_packed_linear(dtype):
        pytest.skip("no such packed linear here")
    plan = KernelPlan(arithmetic, is_packed, attention_kernel, dtype, "a plan of this test")
    row = cpu.PlanRow((), plan)
    monkeypatch.setattr(cpu, "PLANS", {"fp32": (row,), "bf16": (row,)})
    for family in ("two heads", "beit class token", "dinov3", "siglip swiglu"):
        model = tiny(family)
        images = pixels(model)
        exact = all_outputs(copy.deepcopy(model).double(), images.double())
        actual = all_outputs(vitlib.optimize(model, arithmetic), images)
        for key in exact:
            if arithmetic == "fp32":
                assert distance(actual[key].double(), exact[key]) <= TOLERANCE
            else:
                assert rms_error(actual[key], exact[key]) < 2e-2  # as in test_precisions.py


LINUX = {"vendor_id": "GenuineIntel", "model name": "Xeon", "flags": "avx512f avx512_vnni"}


@pytest.mark.parametrize(
    ("cpuinfo", "capability", "expected"),
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
def test_machine_is_read_from_cpuinfo(
    cpuinfo: dict[str, str],
    capability: str,
    expected: tuple[Any, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ATEN_CPU_CAPABILITY lowers what torch uses, and so what counts."""
    monkeypatch.setattr(cpu, "_cpuinfo", lambda: cpuinfo)
    monkeypatch.setattr(cpu, "_capability", lambda: capability)
    monkeypatch.setattr(cpu.platform, "processor", lambda: "")
    actual = cpu.this_machine()
    warnings = (actual.vendor, actual.avx512, actual.avx512_bf16, actual.avx512_vnni, actual.amx)
    assert warnings == expected
    assert actual.model


@pytest.mark.parametrize(
    ("system", "features", "expected"),
    [
        ("Linux", "fp asimd bf16 i8mm", ("arm", True)),
        ("Linux", "fp asimd", ("arm", False)),
        ("Windows", None, ("arm", False)),
        ("Darwin", None, ("apple", False)),
    ],
)
def test_arm_machine_is_read(
    system: str, features: str | None, expected: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Apple's CPUs are told by the system: torch for macOS has no oneDNN."""
    monkeypatch.setattr(cpu, "_cpuinfo", lambda: {"Features": features} if features else {})
    monkeypatch.setattr(cpu, "_capability", lambda: "DEFAULT")
    names = {"processor": "arm", "machine": "aarch64", "system": system}
    for name, value in names.items():
        monkeypatch.setattr(cpu.platform, name, lambda value=value: value)
    actual = cpu.this_machine()
    assert (actual.vendor, actual.arm_bf16, actual.avx512) == (*expected, False)


def test_machine_is_read_without_cpuinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and macOS: the vendor is in a sentence, and torch is asked for the rest."""
    monkeypatch.setattr(cpu, "_cpuinfo", dict)
    monkeypatch.setattr(cpu, "_capability", lambda: "AVX512")
    sentence = "Intel64 Family 6 Model 143 Stepping 8, GenuineIntel"
    monkeypatch.setattr(cpu.platform, "processor", lambda: sentence)
    for name in ("_is_avx512_bf16_supported", "_is_vnni_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: True, raising=False)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    actual = cpu.this_machine()
    assert (actual.vendor, actual.model) == ("intel", sentence)
    assert (actual.avx512_bf16, actual.avx512_vnni, actual.amx) == (True, True, False)
