"""Test int8 quantization: its scales, the layers that stay out of it, and real photos."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import vitlib
from fixtures.fast_models import pixels, tiny
from fixtures.references import rms_error
from vitlib.fast import calibration, int8_quantization, onednn_ops
from vitlib.fast.block import FastBlock
from vitlib.fast.cpu import kernel_plan
from vitlib.fast.int8_linears import Int8Linear
from vitlib.fast.int8_quantization import (
    ActivationStats,
    affine_params,
    dequantize_block,
    fake_quantize,
    quantize_block,
    search_block_params,
    search_params,
)
from vitlib.fast.linears import LinearWeights

needs_int8 = pytest.mark.skipif(
    kernel_plan("int8") is None or not onednn_ops.has_int8_linear(), reason="no 8-bit linears here"
)


def make_stats(rows: torch.Tensor) -> ActivationStats:
    return ActivationStats(rows, rows.amin(dim=0), rows.amax(dim=0))


def test_affine_params_cover_the_range_with_margin() -> None:
    low, high = torch.tensor([-1.0, 0.0]), torch.tensor([0.5, 3.0])
    scale, zero = affine_params(low, high)
    values = torch.tensor(
        [-int8_quantization.RANGE_MARGIN, 0.0, 3 * int8_quantization.RANGE_MARGIN]
    )
    assert (fake_quantize(values, scale, zero) - values).abs().max() <= scale
    assert fake_quantize(torch.tensor(0.0), scale, zero) == 0  # a padding of zeros stays zero
    assert (
        fake_quantize(torch.tensor(99.0), scale, zero) <= 3 * int8_quantization.RANGE_MARGIN + scale
    )


def test_quantize_rows_rounds_to_nearest() -> None:
    weight = torch.randn(5, 64)
    quantized, scale = int8_quantization.quantize_rows(weight)
    error = (quantized.float() * scale[:, None] - weight).abs()
    inside = weight.abs() <= 127 * scale[:, None]
    assert (error[inside] <= (scale[:, None] / 2 * 1.001).expand_as(error)[inside]).all()
    zeros, _ = int8_quantization.quantize_rows(torch.zeros(2, 4))
    assert not zeros.any()


def test_search_params_keeps_outputs_near() -> None:
    rows = torch.randn(200, 32) * torch.logspace(-1, 1, 32)  # channels of very different range
    linear = LinearWeights(torch.randn(16, 32), torch.randn(16))
    exact = F.linear(rows, linear.weight, linear.bias)
    errors = []
    for smooth in (True, False):
        params = search_params({"out": linear}, make_stats(rows), smooth=smooth)
        layers = params.linears["out"]
        errors.append(
            rms_error(F.linear(params.fake_quantize(rows), layers.dequantize(), layers.bias), exact)
        )
        mean_error = (
            F.linear(params.fake_quantize(rows), layers.dequantize(), layers.bias) - exact
        ).mean(dim=0)
        assert mean_error.abs().max() < 1e-4  # the bias takes up what rounding adds on average
    assert errors[0] < 0.5 * errors[1]  # moving ranges into the weights is worth it
    assert errors[0] < 2e-2


@needs_int8
@pytest.mark.parametrize("name", ["class token", "dinov3 swiglu", "clip", "beit"])
def test_int8_kernels_compute_the_searched_params(name: str) -> None:
    """A block of 8-bit layers equals a float32 block on rounded numbers, up to bfloat16."""
    model = tiny(name)
    images = pixels(model, 8)
    exact = vitlib.optimize(model)
    fast = vitlib.optimize(model, "int8", calibrate=images)
    blocks = [part for part in fast.trunk.modules() if isinstance(part, FastBlock)]
    assert any(isinstance(linear, Int8Linear) for b in blocks for linear in (b.qkv, b.up, b.down))
    assert 1e-5 < rms_error(fast.forward_features(images), exact.forward_features(images)) < 5e-2


def test_dequantized_block_equals_the_block_to_rounding() -> None:
    """A block that is quantized and dequantized differs by the rounding of its weights alone."""
    from vitlib.fast.block import extract_weights
    from vitlib.fast.optimization import assemble, cpu_plan

    model = tiny("dinov3 swiglu")
    plan = cpu_plan("fp32")
    blocks = {f"blocks.{i}": extract_weights(b) for i, b in enumerate(model.blocks)}
    float32 = assemble(model, blocks, plan, "fp32", None)
    fast = {p: b for p, b in float32.trunk.named_modules() if isinstance(b, FastBlock)}
    samples = calibration.observe_inputs(float32.trunk, fast, iter([pixels(model, 8)]), 8)
    back = {
        p: dequantize_block(quantize_block(b, search_block_params(b, samples[p])))
        for p, b in blocks.items()
    }
    again = assemble(model, back, plan, "fp32", None)
    images = pixels(model, 4)
    assert 1e-6 < rms_error(again.forward_features(images), float32.forward_features(images)) < 3e-2


def test_sensitive_layers_stay_out_of_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    images = pixels(model, 8)
    num_float_layers = []
    for bound in (1.0, 1e-9):
        monkeypatch.setattr(calibration, "MAX_EMBEDDING_ERROR", bound)
        if kernel_plan("int8") is None:
            pytest.skip("this CPU has no VNNI")
        fast = vitlib.optimize(model, "int8", calibrate=images)
        blocks = [b for b in fast.trunk.modules() if isinstance(b, FastBlock)]
        layers = [getattr(b, n) for b in blocks for n in ("qkv", "out", "up", "down")]
        num_float_layers.append(sum(not isinstance(linear, Int8Linear) for linear in layers))
    # The last block's way for the class token is float32 always; one linear may move nothing.
    assert num_float_layers[0] == 4
    assert num_float_layers[1] >= 4 * 4 - 1


@needs_int8
def test_int8_on_real_photos_agrees_with_float32(
    deit_tiny: Path, fridge_photos: list[Path], two_cats: Path
) -> None:
    """Labels of other photos than those of the calibration equal float32's, also of cats."""
    model = vitlib.load(deit_tiny)
    assert model.image_processor is not None
    others = model.image_processor([*fridge_photos[1::8], two_cats])
    fast = vitlib.optimize(model, "int8", calibrate=fridge_photos[::8])
    with torch.inference_mode():
        expected, actual = model(others), fast(others)
    first, second = expected.softmax(dim=-1).topk(2).values.unbind(dim=-1)
    sure = first - second >= 0.05
    same = expected.argmax(dim=-1) == actual.argmax(dim=-1)
    assert sure.sum() >= 10
    assert same[sure].all()
    assert rms_error(actual, expected) < 8e-2
