"""Test optimize() on models with other norms: RMSNorm, and norms within the branches.

Each model is compared with its own float32 forward. A model without the very norm or layer, but
with the same weights, must differ: this proves that it counts.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import vitlib
from fixtures.fake_gpu import optimize_on_cpu
from fixtures.fast_models import (
    TOLERANCE,
    all_outputs,
    are_blocks_fast,
    max_distance,
    pixels,
    requires_bf16,
    requires_int8,
    tiny,
)
from fixtures.references import distance, rms_error
from vitlib import ViT
from vitlib.encoder import LayerNorm
from vitlib.errors import CheckpointError
from vitlib.fast import load
from vitlib.fast.cpu import kernel_plan
from vitlib.fast.embeddings import FastPatchEmbed
from vitlib.fast.norms import NormWeights, normalize

ROPE = {"theta": 10.0, "coords": "index"}
POOL = {"class_token": True, "num_registers": 2, "pool": "map", "num_classes": 0}
# The config of each model, and the change that must alter its numbers.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rms": ({"norms": {"kind": "rms"}, "norm_eps": 1e-2}, {"norms": {"kind": "layer"}}),
    "rms, qk of heads, swiglu": (
        {"norms": {"kind": "rms", "qk": "head"}, "activation": "swiglu", "rope": ROPE,
         "layer_scale": 1.0, "num_registers": 3},
        {"norms": {"kind": "rms"}},
    ),
    "qk of the width": ({"norms": {"qk": "width"}}, {"norms": {}}),
    "qk of heads": ({"norms": {"qk": "head"}, "norm_eps": 1e-2}, {"norms": {}}),
    "rms, qk of the width": (
        {"norms": {"kind": "rms", "qk": "width"}}, {"norms": {"qk": "width"}}
    ),
    "sub norms": ({"norms": {"attn": True, "mlp": True}}, {"norms": {"mlp": True}}),
    "sub norms, quick_gelu": (
        {"norms": {"mlp": True}, "activation": "quick_gelu", "norm_eps": 5e-2}, {"norm_eps": 1e-6}
    ),
    "sub norms, swiglu": (
        {"norms": {"attn": True, "mlp": True}, "activation": "swiglu", "rope": ROPE},
        {"norms": {"attn": True}},
    ),
    "rms sub norms": (
        {"norms": {"kind": "rms", "attn": True, "mlp": True}}, {"norms": {"kind": "rms"}}
    ),
    "patch norm": ({"norms": {"patch": True}}, {"norms": {}}),
    "aimv2": (
        {"norms": {"kind": "rms", "patch": True}, "activation": "swiglu", "qkv_bias": False,
         "proj_bias": False, "class_token": False, "pool": "mean"},
        {"norms": {"kind": "rms"}},
    ),
    "learned rope": ({"rope": {**ROPE, "learned": True}}, {"rope": ROPE}),
    "no bias of the projections": ({"proj_bias": False}, {"activation": "gelu_tanh"}),
    "pool of patches": (
        {**POOL, "attention_pool": {"num_heads": 2, "mlp_dim": 64, "prefix_tokens": False}},
        {"attention_pool": {"num_heads": 2, "mlp_dim": 64, "prefix_tokens": True}},
    ),
    "post norms": ({"norms": {"post": True}, "layer_scale": 0.5}, {"norms": {}}),
    "post norms, relative": (
        {"norms": {"post": True}, "pos_embed": False, "relative_position": "block"},
        {"norms": {}},
    ),
}  # fmt: skip


def variant(name: str) -> ViT:
    return tiny(**VARIANTS[name][0])


def altered(model: ViT, name: str) -> ViT:
    """Return a model with the weights of another, but with the change of VARIANTS."""
    other = ViT(replace(model.config, **VARIANTS[name][1])).eval()
    other.load_state_dict(model.state_dict(), strict=False)
    for path, norm in other.named_modules():  # an RMSNorm has no bias to load
        if isinstance(norm, LayerNorm) and f"{path}.bias" not in model.state_dict():
            nn.init.zeros_(norm.bias)
    return other


@pytest.mark.parametrize("name", VARIANTS)
def test_fp32_equals_the_model(name: str) -> None:
    model = variant(name)
    fast, images = vitlib.optimize(model), pixels(model, 4)
    assert are_blocks_fast(fast) == [True] * 3
    assert isinstance(fast.trunk.patch_embed, FastPatchEmbed)
    assert fast.unoptimized_modules == ()
    assert max_distance(fast, model, images) <= TOLERANCE
    assert max_distance(fast, model, pixels(model, 2, (40, 24))) <= TOLERANCE
    # The form of GELU alone moves less than a norm.
    least = 1e-4 if name == "no bias of the projections" else 1e-2
    assert max_distance(fast, altered(model, name), images) > least
    levels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    assert distance(fast.forward_uint8(levels), run(model, levels)) <= TOLERANCE


@torch.inference_mode()
def run(model: ViT, levels: Tensor) -> Tensor:
    """Run a model on uint8 pixels."""
    processor = model.image_processor
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    return model((levels / 255 - mean) / std)


@requires_bf16
@pytest.mark.parametrize("name", VARIANTS)
def test_bf16_is_near_float32(name: str) -> None:
    """The bounds are those of test_precisions.py."""
    model = variant(name)
    images = pixels(model, 8)
    exact = {key: value.double() for key, value in all_outputs(model, images).items()}
    cast_outputs = all_outputs(copy.deepcopy(model).bfloat16(), images)
    fast = vitlib.optimize(model, "bf16")
    assert all(are_blocks_fast(fast))
    for key, actual in all_outputs(fast, images).items():
        error = rms_error(actual, exact[key])
        assert error < 2e-2, key
        assert error <= 1.2 * rms_error(cast_outputs[key], exact[key]), key
    tokens = fast.forward_features(images)
    assert rms_error(tokens, exact["forward_features"]) > 1e-4
    other = altered(model, name).forward_features(images).detach().double()
    assert name == "pool of patches" or rms_error(tokens, other) > 2e-3


@requires_int8
@pytest.mark.parametrize("is_calibrated", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_int8_is_near_float32(name: str, is_calibrated: bool) -> None:
    model = variant(name)
    images = pixels(model, 8)
    photos = pixels(model, 16) if is_calibrated else None
    fast = vitlib.optimize(model, "int8", calibrate=photos)
    exact = {key: value.double() for key, value in all_outputs(model, images).items()}
    for key, actual in all_outputs(fast, images).items():
        assert rms_error(actual, exact[key]) < 5e-2, key
    assert rms_error(fast.forward_features(images), exact["forward_features"]) > 1e-4
    if "norms" in VARIANTS[name][1]:
        other = altered(model, name).forward_features(images).detach().double()
        assert rms_error(fast.forward_features(images), other) > 5e-2


@pytest.mark.parametrize("precision", ["fp32", "bf16", *(["int8"] if kernel_plan("int8") else [])])
@pytest.mark.parametrize("name", VARIANTS)
def test_loaded_model_gives_the_same_bits(name: str, precision: Any, tmp_path: Path) -> None:
    model = variant(name)
    for photos in (pixels(model, 8), None) if precision == "int8" else (None,):
        fast = vitlib.optimize(model, precision, calibrate=photos)
        fast.save(tmp_path)
        again, images = load(tmp_path), pixels(model)
        before, after = all_outputs(fast, images), all_outputs(again, images)
        assert all(torch.equal(before[key], after[key]) for key in before)
        again.save(tmp_path / "again")
        name_of_file = "fast.safetensors"
        saved = (tmp_path / "again" / name_of_file).read_bytes()
        assert saved == (tmp_path / name_of_file).read_bytes()


def test_file_with_norms_that_the_config_does_not_have_is_refused(tmp_path: Path) -> None:
    vitlib.optimize(variant("rms, qk of heads, swiglu")).save(tmp_path)
    file = tmp_path / "fast.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    weight = tensors.pop("blocks.1.q_norm.weight")
    tensors["blocks.0.norm1.bias"] = torch.zeros(48)  # as if a LayerNorm stood there
    save_file(tensors, file, metadata)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    assert f"blocks.1.q_norm.weight is missing: expected {tuple(weight.shape)}" in str(caught.value)
    assert "blocks.0.norm1.bias is not known" in str(caught.value)


@pytest.mark.parametrize("name", VARIANTS)
def test_fp32_of_a_gpu_equals_the_model(name: str) -> None:
    model = variant(name)
    fast = optimize_on_cpu(model)
    for size in ((32, 32), (40, 24)):
        images = pixels(model, 3, size)
        assert max_distance(fast, model, images) <= TOLERANCE
    levels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    assert distance(fast.forward_uint8(levels), run(model, levels)) <= TOLERANCE


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 0.05), ("fp16", 0.01), ("fp8", 0.25)])
@pytest.mark.parametrize("name", VARIANTS)
def test_16_and_8_bits_of_a_gpu_are_near_the_model(name: str, precision: Any, bound: float) -> None:
    """The bounds are those of test_cuda_optimize.py."""
    model = variant(name)
    images = pixels(model, 3)
    fast = optimize_on_cpu(model, precision)
    actual, expected = all_outputs(fast, images), all_outputs(model, images)
    for key in ("__call__", "forward_features", "embed"):
        assert actual[key].dtype == torch.float32
        assert distance(actual[key], expected[key]) <= bound, key
    assert distance(actual["embed"], expected["embed"]) > 1e-5


def test_norm_of_another_class_is_left_as_it_is() -> None:
    """A part in the place of a norm, or a norm of another width, has other arithmetic."""
    model = variant("qk of heads")
    model.blocks[0].attn.q_norm = nn.Identity()
    model.blocks[1].attn.k_norm = None
    model.blocks[1].attn.q_norm = None
    model.blocks[2].norm1 = LayerNorm(48, bias=False)
    fast = vitlib.optimize(model)
    assert are_blocks_fast(fast) == [False, True, False]
    assert max_distance(fast, model, pixels(model)) <= TOLERANCE


def test_normalize_equals_its_formula() -> None:
    x, weight, bias = torch.randn(2, 5, 48), *torch.randn(2, 48)
    root = (x.double().square().mean(-1, keepdim=True) + 1e-2).sqrt()
    rms = x.double() / root * weight
    assert distance(normalize(x, NormWeights(weight, None, 1e-2, "rms")), rms) <= 1e-6
    assert distance(normalize(x, NormWeights(weight, bias, 1e-2, "rms")), rms + bias) <= 1e-6
    centred = x.double() - x.double().mean(-1, keepdim=True)
    layer = centred / (centred.square().mean(-1, keepdim=True) + 1e-2).sqrt() * weight + bias
    assert distance(normalize(x, NormWeights(weight, bias, 1e-2)), layer) <= 1e-6
