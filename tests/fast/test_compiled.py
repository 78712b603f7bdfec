"""Test that compiled programs give the numbers of the model, and serve only where they gain.

The real compiler takes tens of seconds for a program. Here it compiles one, with its quick
settings; the others are traced whole by Dynamo and run without code generation. `make test-compile`
compiles every family in every precision with the real settings.
"""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vitlib
from fixtures.fast_models import (
    FAMILIES,
    pixels,
    requires_bf16,
    requires_int8,
    tiny,
)
from vitlib import ViT
from vitlib.errors import ConfigError, ImageError
from vitlib.fast import FastViT, compiled, inductor, onednn_ops, traced
from vitlib.fast.block import linear_weights
from vitlib.fast.compiled import (
    MAX_ERROR,
    MAX_ERROR_16_BITS,
    CompiledViT,
    Programs,
    is_near,
    measure_gain,
    sample_like,
    split_batch,
)
from vitlib.fast.cpp_linears import AmxInt8Linear, AmxLinear, AmxPatches
from vitlib.fast.cpu import this_machine
from vitlib.fast.linears import PackedLinear
from vitlib.fast.onednn_ops import has_packed_linear
from vitlib.fast.traced import MIN_AMX_ROWS, SplitLinear, unpack_weights

PRECISIONS = [
    "fp32",
    pytest.param("bf16", marks=requires_bf16),
    pytest.param("int8", marks=requires_int8),
]


@pytest.fixture
def trace_only(
    fake_compiler: None,  # noqa: ARG001
    monkeypatch: pytest.MonkeyPatch,
) -> list[Callable[[Tensor], Tensor]]:
    """Trace each program whole, run it operation by operation, and keep it; list the functions."""
    traced = []

    def trace(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        traced.append(function)
        inductor.register_fakes()
        return inductor.compile_alone(function, backend="eager")

    monkeypatch.setattr(compiled, "trace_whole", trace)
    return traced


def optimize_both(model: ViT, precision: Any) -> tuple[FastViT, CompiledViT]:
    """Optimize a model without compiling, and share its modules with a compiled one."""
    options = {"calibrate": pixels(model, 32)} if precision == "int8" else {}
    fast = vitlib.optimize(model, precision, **options)
    both = compiled.compile_model(fast)
    assert isinstance(both, CompiledViT)
    return fast, both


def relative_error(actual: Tensor, exact: Tensor) -> float:
    difference = torch.linalg.vector_norm(actual.float() - exact.float())
    return float(difference / torch.linalg.vector_norm(exact.float()))


def programs_of(model: FastViT) -> list[Any]:
    assert isinstance(model, CompiledViT)
    return list(model.programs.functions.values())


def equal_in_threads(model: FastViT, images: Tensor, expected: Tensor) -> bool:
    """Call a model by four threads at once, and compare the bits of each output."""
    results: list[bool] = []

    def run_often() -> None:
        torch.get_num_threads()
        torch.set_num_threads(1)
        results.extend(torch.equal(model(images), expected) for _ in range(20))

    run_in_threads(run_often)
    return results == [True] * 80


def run_in_threads(run: Callable[[], None]) -> None:
    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.usefixtures("trace_only")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["dinov3 swiglu"])
def test_programs_give_what_the_model_gives(name: str, precision: str) -> None:
    model = tiny(name)
    fast, both = optimize_both(model, precision)
    images = pixels(model, 3)
    bound = MAX_ERROR.get(precision, MAX_ERROR_16_BITS)
    for method in ("__call__", "forward_features"):
        exact = getattr(fast, method)(images)
        assert relative_error(getattr(both, method)(images), exact) <= bound, method
        other = getattr(fast, method)(images.flip(0))
        assert relative_error(other, exact) > bound, method
    levels = sample_like(images, 255.0).to(torch.uint8)
    exact = fast.forward_uint8(levels)
    assert relative_error(both.forward_uint8(levels), exact) <= bound
    assert relative_error(fast.forward_uint8(levels.flip(0)), exact) > bound
    assert None not in programs_of(both)


@pytest.mark.usefixtures("trace_only")
@pytest.mark.skipif(not has_packed_linear(torch.float32), reason="no packed linear layers")
@pytest.mark.parametrize("name", ["gelu_tanh", "dinov2 swiglu"])
def test_float32_layers_of_many_rows_are_packed_for_onednn(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, both = optimize_both(tiny(name), "fp32")
    images, weights, pack = pixels(tiny(name), 2), [], onednn_ops.pack
    exact = fast(images)
    for vendor, rows, is_packed in (
        ("intel", 10**6, False),
        ("amd", 10**6, True),
        ("intel", 1, True),
    ):
        machine = replace(this_machine(), vendor=vendor)
        monkeypatch.setattr(traced, "this_machine", lambda machine=machine: machine)
        monkeypatch.setattr(traced, "MIN_ONEDNN_ROWS", rows)
        monkeypatch.setattr(traced, "has_amx_linear", lambda _: False)
        plain = unpack_weights(fast.trunk, fast.precision)
        with monkeypatch.context() as patch:
            patch.setattr(onednn_ops, "pack", lambda w: (weights.append(w), pack(w))[1])
            assert relative_error(plain(images), exact) <= MAX_ERROR["fp32"]
        assert bool(weights) is is_packed
        weights.clear()
    assert relative_error(both(images), exact) <= MAX_ERROR["fp32"]
    assert None not in programs_of(both)


@pytest.mark.compile
@pytest.mark.parametrize("precision", [*PRECISIONS, "fp32 of many rows"])
@pytest.mark.parametrize("name", FAMILIES)
def test_real_programs_give_what_the_model_gives(
    name: str, precision: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also: the compiler's tables of times are not printed."""
    monkeypatch.setattr(compiled, "measure_gain", lambda *_: 2.0)
    if precision == "fp32 of many rows":
        monkeypatch.setattr(traced, "MIN_ONEDNN_ROWS", 1)
        precision = "fp32"
    model = tiny(name)
    fast, both = optimize_both(model, precision)
    images = pixels(model, 2)
    exact = fast(images)
    bound = MAX_ERROR.get(precision, MAX_ERROR_16_BITS)
    assert relative_error(both(images), exact) <= bound
    assert relative_error(fast(images.flip(0)), exact) > bound
    assert None not in programs_of(both)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "autotune" not in printed.err.lower()


def test_real_program_of_the_quick_settings(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also: it leaves torch's settings as it found them, and its memory is freed.

    The caller's default device and autocast change nothing. Called by several threads at once it
    gives the same bits.
    """
    from torch._inductor import config, select_algorithm

    algorithms: Any = select_algorithm
    quick = {"freezing": True, "autotune_num_choices_displayed": 0}
    monkeypatch.setattr(compiled, "COMPILER_SETTINGS", quick)
    monkeypatch.setattr(compiled, "measure_gain", lambda *_: 2.0)
    before = config.freezing, getattr(algorithms, inductor.WRITE_STATS)
    model = tiny()
    fast, both = optimize_both(model, "fp32")
    images = pixels(model, 2)
    with torch.inference_mode(), torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        first = both(images)
    assert relative_error(first, fast(images)) <= MAX_ERROR["fp32"]
    assert None not in programs_of(both)
    assert (config.freezing, getattr(algorithms, inductor.WRITE_STATS)) == before
    assert capfd.readouterr().out == ""
    assert equal_in_threads(both, images, first)
    plain = weakref.ref(next(iter(both.programs.plain_trunks.values())))
    del both
    gc.collect()
    assert plain() is None


@pytest.mark.usefixtures("trace_only")
@pytest.mark.skipif(not this_machine().amx, reason="this CPU has no AMX")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_layers_are_those_of_amx_where_they_are_compiled(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, _ = optimize_both(tiny(), precision)
    images = pixels(tiny(), 2)
    amx = unpack_weights(fast.trunk, fast.precision)
    monkeypatch.setattr(traced, "has_amx_linear", lambda _: False)
    plain = unpack_weights(fast.trunk, fast.precision)
    kind = {"fp32": SplitLinear, "bf16": AmxLinear, "int8": AmxInt8Linear}[precision]
    for layer in ("qkv", "out", "up", "down"):
        assert type(getattr(amx.blocks[0], layer)) is kind
        assert type(getattr(plain.blocks[0], layer)) is not kind
    assert isinstance(amx.patch_embed.proj, AmxPatches) is (precision == "bf16")
    exact, bound = fast(images), MAX_ERROR.get(precision, MAX_ERROR_16_BITS)
    assert relative_error(amx(images), exact) <= bound
    assert relative_error(plain(images), exact) <= bound
    assert relative_error(amx(images.flip(0)), exact) > bound


@pytest.mark.skipif(not this_machine().amx, reason="this CPU has no AMX")
def test_few_rows_of_float32_are_left_to_other_kernels() -> None:
    layer = torch.nn.Linear(24, 40).requires_grad_(False)
    source = PackedLinear(linear_weights(layer), torch.float32)
    split = SplitLinear(source)
    x, other = torch.randn(MIN_AMX_ROWS, 24), torch.randn(MIN_AMX_ROWS, 40)
    assert split.choose(x) is split.amx
    assert split.choose(x[1:]) is split.traced
    for rows in (0, 1):
        part, second = x[rows:], other[rows:]
        exact = source(part)
        assert relative_error(split(part), exact) <= MAX_ERROR["fp32"]
        assert relative_error(split.add(part, second), exact + second) <= MAX_ERROR["fp32"]
        assert relative_error(split.add_(part, second), exact + second) <= MAX_ERROR["fp32"]
        assert relative_error(split.multiply(part, second), exact * second) <= MAX_ERROR["fp32"]
        gelu = torch.nn.functional.gelu(exact)
        assert relative_error(split.activate(part, "gelu", None), gelu) <= MAX_ERROR["fp32"]


@pytest.mark.usefixtures("trace_only")
@requires_int8
def test_8_bit_weights_are_plain_while_the_compiler_traces() -> None:
    fast, _ = optimize_both(tiny(), "int8")
    plain = unpack_weights(fast.trunk, fast.precision)
    packed, unpacked = fast.trunk.blocks[0].qkv.packed, plain.blocks[0].qkv.packed
    assert packed.is_mkldnn
    assert not unpacked.is_mkldnn
    images = pixels(tiny(), 2)
    # Its attention is another kernel, whose bfloat16 rounds otherwise.
    assert relative_error(plain(images), fast(images)) <= MAX_ERROR_16_BITS


@pytest.mark.usefixtures("fake_compiler")
def test_batches_are_split_into_few_sizes() -> None:
    assert split_batch(7, 4) == [4, 2, 1]
    assert split_batch(8, 8) == [8]
    assert split_batch(19, 6) == [6, 6, 6, 1]
    assert split_batch(1, 1) == [1]
    model = tiny()
    fast = vitlib.optimize(model, batch_size=4, compile=True)
    images = pixels(model, 11)
    assert torch.allclose(fast(images), vitlib.optimize(model)(images), atol=1e-6)
    assert isinstance(fast, CompiledViT)
    sizes = {list(key)[2][0] for key in fast.programs.functions}
    assert sizes == {4, 2, 1}


@pytest.mark.usefixtures("fake_compiler")
def test_each_shape_and_number_of_threads_has_a_program() -> None:
    model = tiny()
    _, both = optimize_both(model, "fp32")
    images = pixels(model, 1)
    for _ in range(2):
        both(images)
        both.embed(images)
        both(pixels(model, 1, (48, 32)))
        both.forward_uint8(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert len(programs_of(both)) == 4
    torch.set_num_threads(2)
    both(images)
    assert len(programs_of(both)) == 5


@pytest.mark.usefixtures("fake_compiler")
def test_threads_that_come_at_once_compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, compilations = tiny(), []

    def trace(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        compilations.append(function)
        return function

    monkeypatch.setattr(compiled, "trace_whole", trace)
    _, both = optimize_both(model, "fp32")
    images, barrier = pixels(model, 1), threading.Barrier(4)

    def run() -> None:
        torch.get_num_threads()
        torch.set_num_threads(1)
        barrier.wait()
        both(images)

    run_in_threads(run)
    assert len(compilations) == 1


@pytest.mark.usefixtures("fake_compiler")
def test_program_that_is_no_faster_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "measure_gain", lambda *_: 1.01)
    model = tiny()
    fast, both = optimize_both(model, "fp32")
    images = pixels(model, 2)
    assert torch.equal(both(images), fast(images))
    assert both.programs.count() == (0, 1)


@pytest.mark.usefixtures("fake_compiler")
def test_program_that_differs_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        compiled, "trace_whole", lambda function: lambda pixels: function(pixels) * 1.001
    )
    model = tiny()
    fast, both = optimize_both(model, "fp32")
    images = pixels(model, 2)
    assert torch.equal(both(images), fast(images))
    assert programs_of(both) == [None]
    assert "2x3x32x32 on 1 thread is not compiled" in caplog.text
    assert "the compiled program differs" in caplog.text


@pytest.mark.usefixtures("fake_compiler")
def test_failures_are_named_and_end_compiling(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: object) -> Callable[[Tensor], Tensor]:
        raise RuntimeError("no C++ compiler\nwith more")

    monkeypatch.setattr(compiled, "trace_whole", fail)
    model = tiny()
    fast, both = optimize_both(model, "fp32")
    for count in (1, 2, 4):
        images = pixels(model, count)
        assert torch.equal(both(images), fast(images))
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "1x3x32x32 on 1 thread is not compiled, and slower: RuntimeError: no C++ compiler",
        "2x3x32x32 on 1 thread is not compiled, and slower: RuntimeError: no C++ compiler",
    ]


@pytest.mark.usefixtures("fake_compiler")
def test_number_of_programs_is_bounded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled, "MAX_PROGRAMS", 2)
    model = tiny()
    fast, both = optimize_both(model, "fp32")
    for width in (32, 48, 64, 64):
        images = pixels(model, 1, (32, width))
        assert torch.allclose(both(images), fast(images), atol=1e-6)
    assert both.programs.count() == (2, 2)
    last = "1x3x32x48 on 1 thread is the last program, of 2: no more shapes are compiled"
    assert caplog.text.count(last) == 1


@pytest.mark.usefixtures("fake_compiler")
@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_copies_compile_their_own_programs(make_copy: Callable[[FastViT], FastViT]) -> None:
    model = tiny()
    _, both = optimize_both(model, "fp32")
    images = pixels(model, 1)
    expected = both(images)
    twin = make_copy(both)
    assert programs_of(twin) == []
    assert torch.allclose(twin(images), expected, atol=1e-6)
    assert len(programs_of(twin)) == len(programs_of(both)) == 1


@pytest.mark.usefixtures("fake_compiler")
def test_saved_folder_is_compiled_again(tmp_path: Path) -> None:
    model = tiny()
    fast = vitlib.optimize(model, compile=True)
    images = pixels(model, 2)
    expected = fast(images)
    fast.save(tmp_path)
    loaded = vitlib.fast.load(tmp_path, compile=True)
    assert torch.allclose(loaded(images), expected, atol=1e-6)
    assert len(programs_of(loaded)) == 1
    assert not isinstance(vitlib.fast.load(tmp_path), CompiledViT)


@pytest.mark.usefixtures("fake_compiler")
def test_what_is_not_compiled_is_as_without(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny()
    fast, both = optimize_both(model, "fp32")
    empty = pixels(model, 0)
    assert both(empty).shape == fast(empty).shape
    with pytest.raises(ImageError):
        both(torch.zeros(3, 32, 32))
    with pytest.raises(ImageError):
        both(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ImageError):
        both(torch.zeros(1, 5, 32, 32))
    with pytest.raises(ConfigError, match="no gradients"):
        both(pixels(model, 1).requires_grad_())
    assert programs_of(both) == []
    model.blocks[0].register_forward_hook(lambda *_: None)
    own = vitlib.optimize(model, compile=True)
    assert not isinstance(own, CompiledViT)
    assert "not compiled: the model has modules that are not vitlib's" in caplog.text


def test_model_on_another_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="compile=True is for CPUs and CUDA"):
        vitlib.optimize(tiny().to("meta"), compile=True)


def test_gain_is_the_ratio_of_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(compiled.time, "perf_counter", lambda: now[0])

    def take(seconds: float) -> Callable[[Tensor], Tensor]:
        def run(pixels: Tensor) -> Tensor:
            now[0] += seconds
            return pixels

        return run

    assert measure_gain(take(2.0), take(3.0), torch.zeros(1)) == 1.5


def test_samples_fill_the_range_of_pixels() -> None:
    waves = sample_like(torch.zeros(2, 3, 8, 8), 1.0)
    assert waves.shape == (2, 3, 8, 8)
    assert waves.min() < -0.99
    assert waves.max() > 0.99
    levels = sample_like(torch.zeros(2, 3, 8, 8), 255.0)
    assert torch.equal(levels, levels.round())
    assert levels.min() == 0
    assert levels.max() == 254


def test_comparison_refuses_what_is_not_finite_or_of_another_shape() -> None:
    exact = torch.ones(4)
    assert is_near(exact, exact, 0.0)
    assert not is_near(exact[:3], exact, 1.0)
    assert not is_near(exact * torch.nan, exact, 1.0)
    assert not is_near(exact * 1.2, exact, 0.1)


def test_seconds_and_gain_are_logged(
    fake_compiler: None,  # noqa: ARG001
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="vitlib")
    model = tiny()
    _, both = optimize_both(model, "fp32")
    both(pixels(model, 2))
    assert "2x3x32x32 on 1 thread compiled in 0 s: 2.00x as fast" in caplog.text


def test_programs_are_made_anew_by_a_copy() -> None:
    programs = Programs("bf16")
    programs.functions["key"] = None
    twin = copy.copy(programs)
    assert (twin.functions, twin.precision) == ({}, "bf16")
