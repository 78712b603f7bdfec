"""What assert_same and damage say of arguments that they cannot take: one line each."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vitlib
from fixtures.families import pixels, tiny
from fixtures.own_vits import build_own
from vitlib.errors import ConfigError
from vitlib.testing import assert_same, damage


@pytest.fixture
def model() -> vitlib.ViT:
    return tiny("vit", depth=2, num_heads=4)


@pytest.fixture
def images() -> Tensor:
    return pixels(2)


def refuse(message: str, function: Any, *args: Any) -> None:
    """Check that a call is refused in one line."""
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        function(*args)
    assert "\n" not in str(caught.value)


INPUTS: dict[str, Any] = {
    "expected tensors of pixels, got None": lambda _: None,
    "expected tensors of pixels, got a int": lambda _: 3,
    "expected tensors of pixels, got a str": lambda _: "cat.jpg",
    "expected tensors of pixels, got a ndarray": lambda x: x.numpy(),
    "got a dict of 'pixel_values': give the pixels of it": lambda x: {"pixel_values": x},
    "got a dict of 'image', 'label': give": lambda x: [{"image": x, "label": 0}],
    "batch 0 of shape (0, 3, 32, 32) is empty: expected one image or more": lambda x: x[:0],
    "batch 1 of shape (0, 3, 32, 32) is empty": lambda x: iter([x, x[:0]]),
    "batch 1 of shape (2, 3, 32, 32) has pixels that are not finite": lambda x: [x, x / 0],
    "batch 0 of shape (2, 3, 32, 32) is on the meta device": lambda x: x.to("meta"),
    "expected at least one batch of pixels, got none": lambda _: [],
}


@pytest.mark.parametrize("message", INPUTS)
def test_inputs_that_are_no_pixels_are_refused(
    message: str, model: vitlib.ViT, images: Tensor
) -> None:
    refuse(message, assert_same, build_own(model), model, INPUTS[message](images))
    # The first batch may differ before: then that is said.
    if "batch 1" not in message:
        refuse(message, assert_same, build_own(model, "gelu"), model, INPUTS[message](images))


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (["norm"], 'such as {"blocks.*.resid": "layers.*"}, got a list'),
        ([], "got a list"),
        ("norm", "got a str"),
        ({3: "last"}, "points: expected names of points, got 3"),
        ({"norm": None}, "points['norm']=None: expected a path, or a pair of paths"),
        ({"norm": 3}, "points['norm']=3: expected a path, or a pair of paths"),
        ({"norm": ("last", None)}, "expected a path, or a pair of paths"),
        ({"norm": ["last", "last"]}, "expected a path, or a pair of paths"),
        ({"norm": "last:input"}, "expected 'path' for the output of a module, or 'path:in'"),
        ({"blocks.*.resid": "stages.0"}, "expected `*`, the number of a block, in the path too"),
        ({"norm": "stages.*"}, "expected `*`, the number of a block, in the point too"),
    ],
)
def test_points_of_another_form_are_refused(
    points: Any, message: str, model: vitlib.ViT, images: Tensor
) -> None:
    refuse(message, assert_same, build_own(model), model, images, points)


def test_modules_without_numbers_are_refused(model: vitlib.ViT, images: Tensor) -> None:
    empty = build_own(model).to("meta")
    message = "OwnViT has weights on the meta device, without numbers: load them first"
    refuse(f"model: {message}", assert_same, empty, model, images)
    refuse(f"reference: {message}", assert_same, model, empty, images)
    refuse("expected an nn.Module, got None", assert_same, None, model, images)
    predictor = vitlib.Predictor.load("demo")
    refuse("got a Predictor: give its model (model.model)", assert_same, predictor, model, images)


def test_damage_refuses_what_is_no_vit(model: vitlib.ViT, images: Tensor) -> None:
    """The call refuses it: an iterator would wait for its first item."""
    for value, kind in (
        (vitlib.optimize(model), "a FastViT"),
        (build_own(model), "a OwnViT"),
        (model.state_dict(), "a OrderedDict"),
        (None, "None"),
        ("demo", "a str"),
    ):
        message = f"model: expected a ViT of vitlib, got {kind}: give the ViT that it is made of"
        refuse(message, damage, value)
    refuse("images: expected tensors of pixels, got a list", damage, model, [images])
    refuse("images: batch 0 of shape (0, 3, 32, 32) is empty", damage, model, images[:0])


def test_damage_of_what_a_module_is_made_of_reaches_the_module(
    model: vitlib.ViT, images: Tensor
) -> None:
    """The remedies work: break the ViT, and make the module again from each broken copy."""
    broken = dict(damage(model, images[0]))
    assert len(broken) >= 6
    for make in (vitlib.optimize, build_own):
        with pytest.raises(AssertionError, match="differ in"):
            assert_same(make(broken["swapped q and k"]), model, images)


def test_output_without_numbers_is_refused(model: vitlib.ViT, images: Tensor) -> None:
    class Empty(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:0]

    refuse("Empty returned Tensor without a tensor of floats", assert_same, Empty(), model, images)


def test_pixels_of_an_array_are_compared(model: vitlib.ViT, images: Tensor) -> None:
    array = np.asarray(images)
    assert_same(build_own(model), model, torch.from_numpy(array))
