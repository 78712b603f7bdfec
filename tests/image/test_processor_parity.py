"""Preprocessing equal to transformers' own processors, to the bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from fixtures.preprocessing import CLASSES, SHAPES, photo
from vitlib import ImageProcessor
from vitlib.errors import ConfigError
from vitlib.image.configs import RESAMPLE

# What people's preprocessor_config.json say, of every age; all other keys missing.
RULES = [
    {},
    {"size": 40},
    {"size": [40, 30]},
    {"size": {"height": 33, "width": 50}, "image_mean": [0.1, 0.2, 0.3]},
    {"size": {"shortest_edge": 37}, "do_center_crop": True, "crop_size": 32},
    {"size": 30, "do_center_crop": True, "crop_size": {"height": 41, "width": 36}},
    {"size": 64, "do_center_crop": True, "crop_size": {"height": 41, "width": 30}},
    {"size": 40, "image_std": [0.1, 0.7, 1.3], "rescale_factor": 0.0125},
    {"size": 30, "do_rescale": False},
    {"size": 30, "do_normalize": False},
    {"do_resize": False, "do_center_crop": True, "crop_size": 45},
    {"do_resize": False, "do_center_crop": False},
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_pixels_equal_transformers_to_the_bit(name: str, rule: dict[str, object]) -> None:
    if name == "ConvNext" and (rule.get("do_center_crop") or not isinstance(rule.get("size"), int)):
        rule = {k: v for k, v in rule.items() if k not in ("size", "do_center_crop", "crop_size")}
    reference = CLASSES[name](**rule)
    actual = ImageProcessor.from_dict({"image_processor_type": f"{name}ImageProcessor", **rule})
    for shape in SHAPES:
        image = photo(*shape)
        expected = reference(image, return_tensors="pt").pixel_values.to(torch.float32)
        assert torch.equal(actual(image), expected), shape


NULLS = ["do_resize", "do_center_crop", "do_rescale", "do_normalize", "resample", "size"]
NULLS += ["image_mean", "image_std", "rescale_factor", "crop_size"]


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("key", NULLS)
def test_null_values_equal_transformers_or_are_rejected(key: str, name: str) -> None:
    """A step whose flag is null is not done; a step that is done needs its values."""
    image = photo(60, 61)
    for step in ({}, {"do_resize": False}, {"do_rescale": False}, {"do_normalize": False}):
        rule = {**step, key: None}
        named = {"image_processor_type": f"{name}ImageProcessor", **rule}
        try:
            expected = CLASSES[name](**rule)(image, return_tensors="pt").pixel_values
        except ValueError:
            with pytest.raises(ConfigError, match=rf"^{key} is null, and do_.* take the key out"):
                ImageProcessor.from_dict(named)
            del named[key]
            ImageProcessor.from_dict(named)
        else:
            result = ImageProcessor.from_dict(named)(image)
            assert torch.equal(result, expected.to(torch.float32)), rule


@pytest.mark.parametrize("name", CLASSES)
def test_crop_without_default_size_is_rejected(name: str) -> None:
    rule: dict[str, object] = {"do_center_crop": True}
    named = {"image_processor_type": f"{name}ImageProcessor", **rule}
    if name == "ConvNext":  # whose own rule crops
        named["do_resize"] = rule["do_resize"] = False
    if hasattr(CLASSES[name], "crop_size"):
        expected = CLASSES[name](**rule)(photo(60, 61), return_tensors="pt").pixel_values
        assert torch.equal(ImageProcessor.from_dict(named)(photo(60, 61)), expected)
        return
    with pytest.raises(ValueError, match="`crop_size` must be specified"):
        CLASSES[name](**rule)(photo(60, 61), return_tensors="pt")
    with pytest.raises(ConfigError, match="do_center_crop is true without a crop_size"):
        ImageProcessor.from_dict(named)
    assert ImageProcessor.from_dict(named | {"crop_size": 32}).crop_size == (32, 32)


@pytest.mark.parametrize("resample", RESAMPLE)
def test_every_filter(resample: int) -> None:
    reference = ViTImageProcessorPil(size={"height": 40, "width": 30}, resample=resample)
    actual = ImageProcessor.from_dict({"size": {"height": 40, "width": 30}, "resample": resample})
    for shape in ((100, 90), (20, 25)):
        expected = reference(photo(*shape), return_tensors="pt").pixel_values
        assert torch.equal(actual(photo(*shape)), expected)


@pytest.mark.parametrize("size", [200, 384])
@pytest.mark.parametrize("crop_pct", [None, 0.8, 1.0])
def test_crop_pct(size: int, crop_pct: float | None) -> None:
    rule = {"size": size, "crop_pct": crop_pct} if crop_pct else {"size": size}
    reference = ConvNextImageProcessorPil(**rule)
    actual = ImageProcessor.from_dict(
        {"feature_extractor_type": "ConvNextFeatureExtractor", **rule}
    )
    image = photo(300, 260)
    assert torch.equal(actual(image), reference(image, return_tensors="pt").pixel_values)


def test_real_photos(fridge_photos: list[Path], dinov2_small: Path) -> None:
    """Portrait photos with EXIF orientation, as transformers' load_image opens them."""
    from transformers.image_utils import load_image

    for source in (dinov2_small, dinov2_small / "model.safetensors"):
        actual = ImageProcessor.load(source)
        reference = BitImageProcessorPil.from_pretrained(dinov2_small)
        for path in fridge_photos[:8]:
            expected = reference(load_image(str(path)), return_tensors="pt").pixel_values
            assert torch.equal(actual(path), expected)


def test_class_names_of_every_version() -> None:
    bare = {"size": 40, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    vit = ImageProcessor(size=(40, 40), image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
    for named in (
        {"feature_extractor_type": "ViTFeatureExtractor"},
        {"image_processor_type": "ViTImageProcessor"},
        {"image_processor_type": "ViTImageProcessorFast"},
        {"image_processor_type": "ViTImageProcessorPil"},
        {"image_processor_type": "ViTFeatureExtractor"},
        {},
    ):
        assert ImageProcessor.from_dict({**bare, **named}) == vit
    assert ImageProcessor.from_dict(bare, "vit") == vit
    bit = ImageProcessor.from_dict({"size": 40}, "dinov2")
    assert bit.shortest_edge == 40
    assert bit.resample == 3


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        *((m, "ViT") for m in ("vit", "vit_mae", "vit_msn", "ijepa")),
        *((m, "Beit") for m in ("beit", "data2vec-vision")),
        *((m, "CLIP") for m in ("clip", "clip_vision_model")),
        *((m, "Siglip") for m in ("siglip", "siglip_vision_model")),
        *((m, "Bit") for m in ("dinov2", "dinov2_with_registers")),
        ("deit", "DeiT"),
    ],
)
def test_class_by_model_type(model_type: str, name: str) -> None:
    for rule in ({}, {"size": 41}):
        expected = CLASSES[name](**rule)(photo(50, 61), return_tensors="pt").pixel_values
        assert torch.equal(ImageProcessor.from_dict(rule, model_type)(photo(50, 61)), expected)


# What transformers 5.23's DINOv3ViTImageProcessor made (torchvision 0.28.0, torch 2.13.0): the mean
# of all pixels, and seven of them, evenly apart.
DINOV3: list[tuple[dict[str, object], tuple[int, int], float, list[float]]] = [
    (
        {},
        (61, 160),
        0.225784757,
        [1.3755461, -0.68859839, -0.66497558, 2.3331034, 1.4533029, 0.0086194938, 0.5921132],
    ),
    (
        {"size": {"height": 24, "width": 20}},
        (61, 160),
        0.225317785,
        [0.14608343, 0.16498956, 0.022700259, 0.069655739, 0.32725888, 0.56735396, 0.30158812],
    ),
    (
        {"size": {"height": 24, "width": 20}},
        (9, 12),
        0.268831802,
        [2.0605361, -0.24788074, -1.4256362, -0.64259434, 1.3300072, 1.7992594, 1.0356436],
    ),
    (
        {"size": {"shortest_edge": 20}, "do_center_crop": True}
        | {"crop_size": {"height": 17, "width": 25}},
        (37, 37),
        -0.169917897,
        [-2.1179039, 0.33954814, -0.42987949, -0.23910283, 0.57053632, 0.24697609, 0.047925182],
    ),
    (
        {"size": {"height": 31, "width": 15}, "resample": 3, "do_normalize": False},
        (61, 160),
        0.499644820,
        [0.53954351, 0.51440781, 0.50266498, 0.4847469, 0.43790781, 0.50441629, 0.56545138],
    ),
]


@pytest.mark.parametrize(("rule", "shape", "mean", "some"), DINOV3)
def test_dinov3_resizes_floats(
    rule: dict[str, object], shape: tuple[int, int], mean: float, some: list[float]
) -> None:
    named = {"image_processor_type": "DINOv3ViTImageProcessorFast", **rule}
    for actual in (ImageProcessor.from_dict(named), ImageProcessor.from_dict(rule, "dinov3_vit")):
        pixels = actual(photo(*shape)).flatten()
        every = pixels[:: len(pixels) // 7][:7]
        assert (every - torch.tensor(some)).abs().max() < 1e-6
        assert abs(pixels.double().mean() - mean) < 1e-6
        assert torch.equal(actual.to_float(photo(*shape)).flatten(), pixels)
        # Resizing levels instead, which are rounded, would be noticed.
        levels = replace(actual, float_resize=False).to_float(photo(*shape)).flatten()
        assert (levels[:: len(pixels) // 7][:7] - torch.tensor(some)).abs().max() > 1e-4


def test_dinov3_equals_torch_arithmetic_to_the_bit() -> None:
    actual = ImageProcessor.from_dict({"size": 31}, "dinov3_vit")
    mean, std = (torch.tensor(v)[:, None, None] for v in (actual.image_mean, actual.image_std))
    for shape in SHAPES:
        levels = torch.from_numpy(np.array(photo(*shape))).permute(2, 0, 1)[None]
        floats = F.interpolate(
            levels.contiguous() * (1 / 255), (31, 31), mode="bilinear", antialias=True
        )
        assert torch.equal(actual(photo(*shape)), (floats - mean) / std)


def test_scalar_mean_means_every_channel() -> None:
    rule = {"size": 20, "image_mean": 0.4, "image_std": 0.3}
    expected = ViTImageProcessorPil(**rule)(photo(30, 30), return_tensors="pt").pixel_values
    assert torch.equal(ImageProcessor.from_dict(rule)(photo(30, 30)), expected)


def test_real_config_files(shared_configs: Path) -> None:
    for path in shared_configs.glob("*/preprocessor_config*.json"):
        rule = json.loads(path.read_text())
        name = rule["image_processor_type"]
        for end in ("Fast", "ImageProcessor", "FeatureExtractor"):
            name = name.removesuffix(end)
        reference = CLASSES[name](**{k: v for k, v in rule.items() if "type" not in k})
        image = photo(300, 500)
        actual = ImageProcessor.from_dict(rule)
        assert torch.equal(actual(image), reference(image, return_tensors="pt").pixel_values)
