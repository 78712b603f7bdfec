"""Test int8 quantization: its scales, the layers that stay out of it, and real photos."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import vitlib
from fixtures.fast_models import pixels, tiny
from fixtures.references import rms_error
from vitlib import ImageProcessor, ViTConfig
from vitlib.fast import calibration, int8_quantization, onednn_ops, sensitivity
from vitlib.fast.block import FastBlock
from vitlib.fast.cpu import kernel_plan
from vitlib.fast.drawn_images import draw_batches
from vitlib.fast.int8_linears import Int8Linear, Int8PerToken
from vitlib.fast.int8_quantization import (
    ActivationStats,
    affine_params,
    dequantize_block,
    fake_quantize,
    quantize_block,
    search_block_params,
    search_params,
)
from vitlib.fast.linears import FastLinear, LinearWeights
from vitlib.fast.optimization import assemble, cpu_plan
from vitlib.fast.sensitivity import RoundedLinear, errors_alone
from vitlib.fast.stock_blocks import StockBlocks

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
        layer = params.linears["out"]
        assert layer.x_scale is not None
        rounded = (params.quantize(rows) - layer.x_zero_point) * layer.x_scale
        actual = F.linear(rounded, layer.dequantize(), layer.bias)
        errors.append(rms_error(actual, exact))
        # The bias takes up what rounding adds on average.
        assert (actual - exact).mean(dim=0).abs().max() < 1e-4
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
    model = tiny("dinov3 swiglu")
    plan = cpu_plan("fp32")
    blocks = dict(StockBlocks(model))
    float32 = assemble(model, blocks, plan, "fp32", None)
    observed = assemble(model, blocks, plan, "fp32", None)
    samples = calibration.observe_inputs(observed.trunk, iter([pixels(model, 8)]), 8)
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


def test_observed_inputs_are_no_views_of_activations() -> None:
    """A kept view of the class tokens would keep every activation of every layer in memory."""
    observed = calibration.ObservedLinear(FastLinear(LinearWeights(torch.randn(8, 16))), 7)
    x = torch.randn(4, 50, 16)
    observed(x)
    expected, low = x[:, 0].clone(), x.flatten(0, 1).amin(dim=0)
    x.zero_()
    stats = observed.stats()
    assert torch.equal(stats.rows[:4], expected)
    assert torch.equal(stats.low, low)
    storages = {rows.untyped_storage().nbytes() for rows in observed.rows}
    assert max(storages) < x.untyped_storage().nbytes() / 4


def test_quantize_rows_in_parts_equals_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = torch.randn(50, 64), torch.rand(64)
    whole = int8_quantization.quantize_rows(weight, importance)
    monkeypatch.setattr(int8_quantization, "QUANTIZED_PART", 300)  # four rows at a time
    for expected, actual in zip(
        whole, int8_quantization.quantize_rows(weight, importance), strict=True
    ):
        assert torch.equal(expected, actual)


@pytest.mark.parametrize("has_kernel", [True, False])
def test_rounded_linear_equals_its_definition(
    has_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if has_kernel and not onednn_ops.has_int8_linear():
        pytest.skip("no 8-bit linears here")
    monkeypatch.setattr(onednn_ops, "has_int8_linear", lambda: has_kernel)
    linear, rows = LinearWeights(torch.randn(48, 32), torch.randn(48)), torch.randn(40, 32)
    params = search_params({"out": linear}, make_stats(rows), smooth=True)
    layer = params.linears["out"]
    assert layer.x_scale is not None
    rounded = fake_quantize(rows / params.smoothing, layer.x_scale, layer.x_zero_point)
    actual = RoundedLinear("out", params)(rows)
    assert rms_error(actual, F.linear(rounded, layer.dequantize(), layer.bias)) < 1e-6


def test_replayed_blocks_change_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer's error alone is the same, whether the blocks before it run or are replayed."""
    model = tiny()
    images = pixels(model, 2)
    blocks = dict(StockBlocks(model))

    def make_trunk() -> vitlib.ViT:
        return assemble(model, blocks, cpu_plan("fp32"), "fp32", None).trunk

    stats = calibration.observe_inputs(make_trunk(), iter([pixels(model, 4)]), 4)
    params = {
        (path, name): group
        for path, block in blocks.items()
        for name, group in search_block_params(block, stats[path]).items()
    }
    calls: list[str] = []
    forward = FastBlock.forward

    def count(self: FastBlock, *args: Any) -> torch.Tensor:
        calls.append("block")
        return forward(self, *args)

    monkeypatch.setattr(FastBlock, "forward", count)
    replayed = errors_alone(make_trunk(), params, images)
    num_replayed = len(calls)
    monkeypatch.setattr(sensitivity, "replay_blocks", lambda _: {})
    computed = errors_alone(make_trunk(), params, images)
    assert replayed == computed
    # The class token of the last block needs no qkv.
    assert [key for key, error in replayed.items() if error == 0] == [(list(blocks)[-1], "qkv")]
    assert num_replayed < 0.8 * (len(calls) - num_replayed)


def test_drawn_images_are_the_same_each_time() -> None:
    cfg = ViTConfig.named("Ti/16", image_size=(64, 48))
    (batches, count), (again, _) = draw_batches(cfg, None), draw_batches(cfg, None)
    images = torch.cat(list(batches))
    assert images.shape == (count, 3, 64, 48)
    assert torch.equal(images, torch.cat(list(again)))
    assert images.min() >= -1
    assert images.max() <= 1
    # Of the brightness of photos, in each image and over all of them.
    assert (images.std(dim=(1, 2, 3)) > 0.05).all()
    assert 0.3 < images.std() < 0.8
    assert abs(images.mean()) < 0.3


def test_drawn_images_are_normalised_as_photos_are() -> None:
    cfg = ViTConfig.named("Ti/16", image_size=32)
    processor = ImageProcessor(size=(32, 32), image_mean=(0.2, 0.4, 0.6), image_std=(0.1, 0.2, 0.5))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.2, 0.4, 0.6), (0.1, 0.2, 0.5)))
    (drawn, _), (plain, _) = draw_batches(cfg, processor), draw_batches(cfg, None)
    expected = ((next(plain) + 1) / 2 - mean) / std
    torch.testing.assert_close(next(drawn), expected, rtol=1e-4, atol=1e-4)
    cropped = replace(processor, crop_size=(24, 20))
    assert next(draw_batches(cfg, cropped)[0]).shape == (4, 3, 24, 20)
    grey = replace(cfg, in_channels=1)  # a preprocessing of three channels says nothing of one
    assert next(draw_batches(grey, processor)[0]).shape == (4, 1, 32, 32)


@needs_int8
def test_int8_without_photos_has_scales_of_its_own() -> None:
    """Without photos no scale is computed while the model runs."""
    fast = vitlib.optimize(tiny(), "int8")
    kinds = {type(part) for part in fast.trunk.modules()}
    assert Int8Linear in kinds
    assert Int8PerToken not in kinds


@needs_int8
@pytest.mark.parametrize("has_photos", [True, False])
def test_int8_on_real_photos_agrees_with_float32(
    has_photos: bool, deit_tiny: Path, fridge_photos: list[Path], two_cats: Path
) -> None:
    """Labels of other photos than those of the calibration equal float32's, also of cats."""
    model = vitlib.load(deit_tiny)
    assert model.image_processor is not None
    others = model.image_processor([*fridge_photos[1::8], two_cats])
    calibrate = fridge_photos[::8] if has_photos else None
    fast = vitlib.optimize(model, "int8", calibrate=calibrate)
    with torch.inference_mode():
        expected, actual = model(others), fast(others)
    first, second = expected.softmax(dim=-1).topk(2).values.unbind(dim=-1)
    sure = first - second >= 0.05
    same = expected.argmax(dim=-1) == actual.argmax(dim=-1)
    assert sure.sum() >= 10
    assert same[sure].all()
    assert rms_error(actual, expected) < 8e-2
