"""Test optimize() where torch's private operations are absent or wrong.

Each operation is removed or broken, and its check must notice: the public operations serve, with
the same numbers.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vitlib
from fixtures.fast_models import (
    PROBES,
    SEVERAL,
    TOLERANCE,
    forget_probes,
    has_packed_linears,
    max_distance,
    pixels,
    requires_int8,
    tiny,
)
from fixtures.references import rms_error
from vitlib.errors import ConfigError
from vitlib.fast import cpu, onednn_ops
from vitlib.fast.cpu import kernel_plan

pytestmark = pytest.mark.usefixtures("fresh_probes")


F32, BF16 = torch.float32, torch.bfloat16


def raise_absent(*_: object, **__: object) -> None:
    raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute")


def test_probes_cover_every_cached_check() -> None:
    names = {name for _, name in PROBES}
    assert {"has_packed_linear", "has_int8_linear", "has_graph_attention", "this_machine"} <= names


requires_packed = pytest.mark.skipif(
    not (onednn_ops.has_packed_linear(F32) and cpu.this_machine().avx512),
    reason="no packed linears on this machine",
)


@requires_packed
@pytest.mark.parametrize("name", SEVERAL)
def test_optimize_without_private_operations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(name)
    images = pixels(model)
    assert has_packed_linears(vitlib.optimize(model))
    monkeypatch.setattr(torch.ops, "mkldnn", types.SimpleNamespace())
    monkeypatch.setattr(torch.ops, "onednn", types.SimpleNamespace())
    forget_probes()
    assert not onednn_ops.has_packed_linear(F32)
    assert not onednn_ops.has_packed_linear(BF16)
    assert not onednn_ops.has_int8_linear()
    fast = vitlib.optimize(model)
    assert not has_packed_linears(fast)
    assert max_distance(fast, model, images) <= TOLERANCE


@requires_packed
@pytest.mark.parametrize("name", ["pack", "linear", "linear_binary"])
def test_optimize_with_an_operation_that_raises(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    monkeypatch.setattr(onednn_ops, name, raise_absent)
    forget_probes()
    fast = vitlib.optimize(model)
    assert not has_packed_linears(fast)
    assert max_distance(fast, model, pixels(model)) <= TOLERANCE


def _scale_slightly(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: real(*args) * (1 + 1e-4)


def _drop_bias(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, weight, bias, *rest: real(x, weight, None, *rest)  # noqa: ARG005


def _replace_argument(index: int, word: str, instead: str) -> Callable[..., Any]:
    def break_operation(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrong(*args: Any) -> Tensor:
            args = list(args)
            if len(args) > index and args[index] == word:
                args[index] = instead
            return real(*args)

        return wrong

    return break_operation


def _reverse_rows(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda weight: real(weight.flip(0))


WRONG_OPERATIONS: list[tuple[str, Callable[..., Any]]] = [
    ("pack", _reverse_rows),
    ("linear", _scale_slightly),
    ("linear", _drop_bias),
    ("linear", _replace_argument(3, "gelu", "gelu_tanh")),
    ("linear", _replace_argument(3, "gelu_tanh", "gelu")),
    ("linear", _replace_argument(3, "silu", "none")),
    ("linear_binary", _scale_slightly),
    ("linear_binary", _drop_bias),
    ("linear_binary", _replace_argument(4, "add", "mul")),
    ("linear_binary", _replace_argument(4, "mul", "add")),
]


@requires_packed
@pytest.mark.parametrize(("name", "break_operation"), WRONG_OPERATIONS)
def test_optimize_with_an_operation_that_is_wrong(
    name: str, break_operation: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("dinov2 swiglu" if "with" in name else "gelu_tanh")
    monkeypatch.setattr(onednn_ops, name, break_operation(getattr(onednn_ops, name)))
    forget_probes()
    assert not onednn_ops.has_packed_linear(F32)
    fast = vitlib.optimize(model)
    assert not has_packed_linears(fast)
    assert max_distance(fast, model, pixels(model)) <= TOLERANCE


@requires_packed
def test_wrong_bf16_operation_leaves_fp32_packed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Then bf16 is computed in float32 with a warning, and fp32 stays packed."""
    if kernel_plan("bf16").arithmetic != "bf16":
        pytest.skip("this machine serves bf16 by float32")
    real, model = onednn_ops.linear, tiny()

    def wrong(x: Tensor, *rest: Any) -> Tensor:
        return real(x, *rest) * (1 if x.dtype == F32 else 1.1)

    monkeypatch.setattr(onednn_ops, "linear", wrong)
    forget_probes()
    with caplog.at_level(logging.WARNING, "vitlib"):
        fast = vitlib.optimize(model, "bf16")
    assert len(caplog.messages) == 1
    assert "bf16" in caplog.messages[0]
    assert max_distance(fast, model, pixels(model)) <= TOLERANCE
    assert has_packed_linears(vitlib.optimize(model))


def test_probe_runs_once_without_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes: list[object] = []
    real = onednn_ops._check_packed
    monkeypatch.setattr(
        onednn_ops, "_check_packed", lambda dtype: dtypes.append(dtype) or real(dtype)
    )
    forget_probes()
    before = torch.random.get_rng_state()
    for _ in range(3):
        onednn_ops.has_packed_linear(F32)
    assert torch.equal(before, torch.random.get_rng_state())
    assert dtypes == [F32]


def _subtract_a_little(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: real(*args) - 0.01


@requires_int8
@pytest.mark.parametrize("break_operation", [lambda _: raise_absent, _subtract_a_little])
@pytest.mark.parametrize("name", ["pack_int8", "linear_int8", "linear_int8_add"])
def test_int8_with_wrong_operations_is_refused(
    name: str, break_operation: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "pack_int8" and break_operation is _subtract_a_little:
        break_operation = _reverse_rows
    monkeypatch.setattr(onednn_ops, name, break_operation(getattr(onednn_ops, name)))
    forget_probes()
    with pytest.raises(ConfigError, match=r"int8 needs operations.*fp32 or bf16"):
        vitlib.optimize(tiny(), "int8")


@requires_int8
def test_int8_without_packed_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers of an int8 model that are not in 8 bits fall back to torch's own linear."""
    model = tiny("siglip")
    images = pixels(model)
    monkeypatch.setattr(onednn_ops, "linear", raise_absent)
    forget_probes()
    fast = vitlib.optimize(model, "int8")
    assert not has_packed_linears(fast)
    assert (
        rms_error(fast(images), model(images).detach().double()) < 5e-2
    )  # as in test_precisions.py


def test_to_uint8_truncates() -> None:
    values = torch.arange(0, 256, 1 / 8)
    assert torch.equal(onednn_ops.to_uint8(values), values.floor().to(torch.uint8))


@requires_int8
def test_int8_without_wrapping_casts_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    images = pixels(model)
    fast = vitlib.optimize(model, "int8", calibrate=images)
    answer = fast(images)
    monkeypatch.setattr(onednn_ops, "_int8_cast_wraps", lambda: False)
    assert torch.equal(fast(images), answer)
