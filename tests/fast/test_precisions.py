"""Test bf16 and int8 of optimize() against the float32 model."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import vitlib
from fixtures.fast_models import (
    FAMILIES,
    TOLERANCE,
    all_outputs,
    are_blocks_fast,
    max_distance,
    pixels,
    requires_bf16,
    requires_int8,
    tiny,
)
from fixtures.references import rms_error
from vitlib.fast import cpu
from vitlib.fast.cpu import Machine, kernel_plan


@requires_bf16
@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_is_near_float32(name: str) -> None:
    """A bfloat16 rounding is 2**-9 of a number, and a few blocks of them one percent."""
    model = tiny(name)
    images = pixels(model, 8)
    cast_outputs = all_outputs(copy.deepcopy(model).bfloat16(), images)
    exact = {key: value.double() for key, value in all_outputs(model, images).items()}
    fast = vitlib.optimize(model, "bf16")
    assert fast.precision == "bf16"
    assert all(are_blocks_fast(fast))
    for key, actual in all_outputs(fast, images).items():
        assert actual.dtype == torch.float32
        error = rms_error(actual, exact[key])
        assert error < 2e-2, key
        assert error <= 1.2 * rms_error(cast_outputs[key], exact[key]), key
    assert (
        rms_error(fast.forward_features(images), exact["forward_features"]) > 1e-4
    )  # it is bfloat16


@requires_bf16
@pytest.mark.parametrize("name", ["deit_tiny", "dinov2_small"])
def test_bf16_of_real_models_is_near_float32(
    name: str, request: pytest.FixtureRequest, two_cats: Path
) -> None:
    folder = request.getfixturevalue(name)
    model = vitlib.load(folder)
    images = vitlib.ImageProcessor.load(folder)(two_cats)
    exact = all_outputs(model, images)["embed"].double()
    cast_outputs = all_outputs(copy.deepcopy(model).bfloat16(), images)["embed"]
    actual = all_outputs(vitlib.optimize(model, "bf16"), images)["embed"]
    assert rms_error(actual, exact) < 2e-2
    assert rms_error(actual, exact) <= 1.2 * rms_error(cast_outputs, exact)


def test_bf16_without_instructions_warns_and_computes_float32(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bare = Machine("x86_64", "intel", "a CPU of 2013")
    monkeypatch.setattr(cpu, "this_machine", lambda: bare)
    monkeypatch.setattr("vitlib.fast.optimization.this_machine", lambda: bare, raising=False)
    model = tiny()
    with caplog.at_level(logging.WARNING, "vitlib"):
        fast = vitlib.optimize(model, "bf16")
    assert len(caplog.records) == 1
    assert "bf16" in caplog.messages[0]
    assert "\n" not in caplog.messages[0]
    assert max_distance(fast, model, pixels(model)) <= TOLERANCE
    caplog.clear()
    vitlib.optimize(model)
    assert not caplog.records


@requires_int8
@pytest.mark.parametrize("is_calibrated", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_int8_is_near_float32(name: str, is_calibrated: bool) -> None:
    """An eighth of a level of 255 on each side is some percent of the signal after three blocks."""
    model = tiny(name)
    images = pixels(model, 8)
    photos = pixels(model, 16) if is_calibrated else None  # others than those measured
    fast = vitlib.optimize(model, "int8", calibrate=photos)
    assert all(are_blocks_fast(fast))
    exact = {key: value.double() for key, value in all_outputs(model, images).items()}
    for key, actual in all_outputs(fast, images).items():
        assert actual.dtype == torch.float32
        assert rms_error(actual, exact[key]) < 5e-2, key
    plan = kernel_plan("int8")
    assert plan is not None
    if is_calibrated or model.config.depth > 1 or plan.attention_dtype != torch.float32:
        # It is 8 bits; but for the first block, which stays float32 where there are no photos.
        assert rms_error(fast.forward_features(images), exact["forward_features"]) > 1e-4
    assert torch.equal(fast(images), fast(images))


@requires_int8
def test_int8_of_a_real_model_is_near_float32(
    deit_tiny: Path, fridge_photos: list[Path], two_cats: Path
) -> None:
    """Its first three blocks: all twelve take long, and end 5 to 12 percent off."""
    model = vitlib.load(deit_tiny)
    model.image_processor = processor = vitlib.ImageProcessor.load(deit_tiny)
    model.blocks, model.config = model.blocks[:3], replace(model.config, depth=3)
    images = torch.cat([processor(two_cats), processor(fridge_photos[-3:])])
    exact = all_outputs(model, images)["embed"].double()
    for photos in (fridge_photos[:8], None):
        actual = all_outputs(vitlib.optimize(model, "int8", calibrate=photos), images)["embed"]
        assert rms_error(actual, exact) < 5e-2
