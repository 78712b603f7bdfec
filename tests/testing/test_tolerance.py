"""The bounds of assert_same where the caller gives none, above all in bfloat16 and float16."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vitlib
from fixtures import references
from fixtures.families import pixels, tiny
from fixtures.own_vits import OWN_POINTS, build_own, build_timm
from vitlib.testing import ParityError, assert_same, damage

DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture
def images() -> Tensor:
    return pixels(2)


def cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy in another dtype."""
    return copy.deepcopy(module).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_damage_is_seen_in_few_bits(dtype: torch.dtype) -> None:
    model = vitlib.load("demo")
    images = torch.randn(2, *(model.config.in_channels, *model.config.image_size))
    assert_same(cast(model, dtype), model, images)
    for number, (kind, broken) in enumerate(damage(model, images)):
        reference = cast(model, dtype) if number % 2 else model
        with pytest.raises(ParityError) as caught:
            assert_same(cast(broken, dtype), reference, images)
        assert caught.value.is_certain, kind


@pytest.mark.parametrize(
    ("dtype", "eps", "coarse"), [(torch.bfloat16, 1e-2, 6e-2), (torch.float16, 1e-3, 6e-3)]
)
def test_wrong_eps_of_a_trained_model_is_named_in_few_bits(
    dtype: torch.dtype, eps: float, coarse: float, deit_tiny: Path, two_cats: Path
) -> None:
    """It changes logits by less than rounding may."""
    predictor = vitlib.Predictor.load(deit_tiny)
    model, images = predictor.model, predictor.image_processor([two_cats])
    broken = copy.deepcopy(model)
    for block in broken.blocks:
        block.norm1.eps = block.norm2.eps = eps
    pair = cast(broken, dtype), cast(model, dtype)
    assert_same(*pair, images, rtol=coarse)
    with pytest.raises(ParityError, match=r"in float32 with weights of b?float16, differ") as error:
        assert_same(*pair, images)
    assert f"eps of norm1: {eps:g} in the model" in error.value.cause


def test_wrong_eps_of_one_block_is_seen_where_no_point_is_known(images: Tensor) -> None:
    model = tiny("vit", depth=2, num_heads=4)
    for dtype in DTYPES:
        own = build_own(model)
        assert_same(cast(own, dtype), cast(model, dtype), images)
        own.stages[1].between.eps = 1e-2
        with pytest.raises(ParityError):
            assert_same(cast(own, dtype), cast(model, dtype), images)
        with pytest.raises(ParityError, match=r"eps of norm2: 0\.01 in the model"):
            assert_same(cast(own, dtype), cast(model, dtype), images, OWN_POINTS)


@pytest.mark.parametrize("name", ["pixio", "dinov3", "sapiens2 no biases", "aimv2 native"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_rounded_in_another_form_are_the_same(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Pixio's class tokens are in the positions here; transformers rounds periods of angles."""
    reference = references.save_model(name, tmp_path)
    images, model = references.make_pixels(reference), vitlib.load(tmp_path)
    rounded, other = cast(model, dtype), cast(reference, dtype)
    for pair in ((rounded, other), (other, rounded), (rounded, reference), (other, model)):
        assert_same(*pair, images)
    broken = copy.deepcopy(model)
    for block in broken.blocks:
        block.norm1.eps = block.norm2.eps = 0.1
    with pytest.raises(ParityError):
        assert_same(cast(broken, dtype), other, images)


def test_module_that_float32_breaks_is_compared_as_it_is(
    images: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny("vit", depth=2, num_heads=4)

    class BFloat16Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build_own(model)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.bfloat16())

    own = BFloat16Alone().bfloat16()
    with caplog.at_level(logging.WARNING, logger="vitlib"):
        assert_same(own, model, [images, images])
    (record,) = caplog.records
    assert record.getMessage() == (
        "assert_same: the model (BFloat16Alone) does not run in float32: compared in bfloat16 "
        "alone, where an eps of 1e-2 in place of 1e-6 may pass"
    )
    with pytest.raises(ParityError):
        assert_same(own, dict(damage(model, images))["missing final norm"], images)


def test_a_bound_of_the_caller_is_of_the_modules_as_they_are(images: Tensor) -> None:
    model = tiny("vit", depth=2, num_heads=4)
    built = build_timm(model)
    built.blocks[1].norm1.eps = 1e-2
    built = built.bfloat16()
    with pytest.raises(ParityError, match="in float32 with weights of bfloat16"):
        assert_same(built, model, images)
    assert_same(built, model, images, rtol=6e-2)
    with pytest.raises(ParityError, match=r"^model \(TimmViT\) and reference \(ViT\) differ"):
        assert_same(built, model, images, rtol=1e-6)


def test_batches_of_few_bits_are_all_compared(images: Tensor) -> None:
    """A mistake that the first batch does not show is seen in the second."""
    model = tiny("vit", depth=2, num_heads=4)

    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = copy.deepcopy(model)

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x) * (1.001 if len(x) == 1 else 1.0)

    doubling = Doubling().bfloat16()
    assert_same(doubling, model, images)
    with pytest.raises(ParityError, match="batch 1 of inputs, in float32 with weights of bfloat16"):
        assert_same(doubling, model, [images, images[:1]])


def test_eps_that_float32_may_round_away_is_seen_in_float64(images: Tensor) -> None:
    model = tiny("vit", depth=2, num_heads=4)
    own = build_own(model).double()
    double = copy.deepcopy(model).double()
    assert_same(own, double, images, rtol=1e-8)
    assert model.config.norm_eps == 1e-6
    own.stages[0].before.eps = 1e-12
    with pytest.raises(ParityError, match="eps of norm1: 1e-12 in the model"):
        assert_same(own, double, images, OWN_POINTS, rtol=1e-8)


def test_gelu_after_small_weights_is_seen_in_float64(images: Tensor) -> None:
    """Both forms are alike around zero, where the fresh weights of a model leave them."""
    model = tiny("vit", depth=2, num_heads=4)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc1.weight.mul_(0.2)
            block.mlp.fc1.bias.zero_()
    broken = copy.deepcopy(model)
    for block in broken.blocks:
        block.mlp.activation = "gelu_tanh"
    assert_same(broken, model, images)
    with pytest.raises(ParityError, match="GELU, tanh form, the reference GELU, erf form"):
        assert_same(broken.double(), model.double(), images, rtol=1e-8)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_bits_on_a_gpu(dtype: torch.dtype, images: Tensor) -> None:
    model = tiny("vit", depth=2, num_heads=4)
    built = build_timm(model)
    assert_same(cast(built, dtype).to("cuda"), model, images)
    built.blocks[1].norm1.eps = 3e-4  # within the bounds of 16 bits
    with pytest.raises(ParityError, match="in float32 with weights of"):
        assert_same(cast(built, dtype).to("cuda"), model, images)
