"""ImageProcessor: calls, crops, sizes, and configs that are refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fixtures.preprocessing import CLASSES, photo
from vitlib import ImageProcessor
from vitlib.errors import ConfigError, ImageError
from vitlib.image.pixels import center_crop


def test_written_and_read_again(tmp_path: Path) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    for processor in (
        ImageProcessor(size=(40, 30), image_mean=mean, image_std=std),
        ImageProcessor(shortest_edge=50, crop_size=(40, 30), image_mean=mean, image_std=std),
        ImageProcessor(size=(50, 50), crop_size=(40, 40), image_mean=mean, image_std=std),
        ImageProcessor(shortest_edge=50, resample=3, image_mean=mean, image_std=std),
        ImageProcessor(size=(40, 40), rescale_factor=None, image_mean=mean, image_std=std),
        ImageProcessor(size=(50, 50), crop_size=(40, 40), crop_rounding="even"),
        ImageProcessor(size=(40, 40)),
        ImageProcessor(crop_size=(20, 20), image_mean=mean, image_std=std),
        ImageProcessor(size=(20, 20), image_mean=(0.3,), image_std=(0.4,), in_channels=1),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor.to_dict()))
        assert ImageProcessor.load(tmp_path) == processor
        if processor.in_channels == 3:
            name = processor.to_dict()["image_processor_type"].removesuffix("ImageProcessor")
            reference = CLASSES[name].from_pretrained(tmp_path)
            expected = reference(photo(60, 70), return_tensors="pt").pixel_values
            assert torch.equal(processor(photo(60, 70)), expected)


def test_a_float_image_is_not_rescaled_twice() -> None:
    processor = ImageProcessor(size=(20, 20), image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
    levels = np.asarray(photo(30, 40))
    expected = processor(levels)
    # Resizing rounds 8-bit levels, twice, and floats never: a level apart, which is 2 / 255 here.
    for image in (levels / 255, (levels / 255).astype(np.float32)):
        assert (processor(image) - expected).abs().max() < 2 / 255
    whole = ImageProcessor(image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
    for image in (levels / 255, torch.from_numpy(levels / 255).permute(2, 0, 1)):
        assert (whole(image) - whole(levels)).abs().max() < 3e-7


def test_many_channels() -> None:
    processor = ImageProcessor(
        size=(20, 20), image_mean=(0.1,) * 5, image_std=(0.2,) * 5, in_channels=5
    )
    bands = np.random.default_rng(0).integers(0, 256, (30, 40, 5), dtype=np.uint8)
    pixels = processor(bands)
    assert pixels.shape == (1, 5, 20, 20)
    item = ImageProcessor(size=(20, 20), image_mean=(0.1,), image_std=(0.2,), in_channels=1)
    assert torch.equal(item(bands[:, :, 3])[0, 0], pixels[0, 3])


def test_several_images() -> None:
    processor = ImageProcessor(size=(20, 30))
    images = [photo(30, 40), np.asarray(photo(9, 9))]
    pixels = processor(images)
    assert pixels.shape == (2, 3, 20, 30)
    assert torch.equal(pixels[1], processor(images[1])[0])
    batch = np.stack([np.asarray(photo(30, 40))] * 2)
    assert torch.equal(processor(batch)[0], pixels[0])
    with pytest.raises(ImageError, match=r"image 1: 'nope\.jpg' is not there"):
        processor([images[0], "nope.jpg"])
    with pytest.raises(ImageError, match="became pixels of 2 sizes"):
        ImageProcessor(shortest_edge=20)([photo(20, 30), photo(30, 20)])


def test_extreme_aspect_ratio_is_rejected_before_resize() -> None:
    strip = photo(1, 20_000)
    with pytest.raises(ImageError, match=r"1x20000 pixels .* would become 256x5120000: expected"):
        ImageProcessor(shortest_edge=256)(strip)
    assert ImageProcessor(shortest_edge=2, crop_size=(8, 8))(strip).shape == (1, 3, 8, 8)


def test_extreme_aspect_ratio_is_rejected_with_float_resize() -> None:
    rule = {"size": {"shortest_edge": 256}}
    with pytest.raises(ImageError, match=r"1x20000 pixels .* would become 256x5120000: expected"):
        ImageProcessor.from_dict(rule, "dinov3_vit")(photo(1, 20_000))


@pytest.mark.parametrize("rounding", ["floor", "even", "zero"])
@pytest.mark.parametrize("shape", [(7, 7), (8, 5), (5, 8), (4, 4), (3, 9), (2, 2)])
def test_crop_rounding(rounding: str, shape: tuple[int, int]) -> None:
    levels = np.asarray(photo(*shape))
    starts = []
    for have in shape:
        spare = (have - 5) / 2
        # torchvision puts the odd pixel of a border behind, transformers' Pillow backend before.
        short = math.floor if rounding == "floor" else int
        cut = {"floor": math.floor, "even": round, "zero": int}[rounding]
        starts.append(cut(spare) if spare > 0 else short(spare))
    expected = np.full((5, 5, 3), (1, 2, 3), np.uint8)
    for row, column in np.ndindex(5, 5):
        there = (row + starts[0], column + starts[1])
        if 0 <= there[0] < shape[0] and 0 <= there[1] < shape[1]:
            expected[row, column] = levels[there]
    assert np.array_equal(center_crop(levels, (5, 5), rounding, (1, 2, 3)), expected)


def test_pixels_are_a_new_array_each_time() -> None:
    processor = ImageProcessor(size=(8, 8))
    first = processor(photo(8, 8))
    original = first.clone()
    first.zero_()
    assert torch.equal(processor(photo(8, 8)), original)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"size": "large"}, "size='large'"),
        ({"size": {"longest_edge": 3}}, "size has longest_edge: expected height and width"),
        ({"size": -3}, "size=-3"),
        ({"size": True}, "size=True"),
        ({"do_center_crop": True, "crop_size": 10**9}, "crop_size=1000000000x1000000000"),
        ({"resample": 9}, "resample=9: expected one of"),
        ({"image_mean": [0.5]}, "image_std="),
        ({"image_std": [0.5, 0.5, 0]}, "expected no zero"),
        ({"image_mean": ["a", "b", "c"]}, "expected 3 numbers"),
        ({"rescale_factor": "1/255"}, "rescale_factor='1/255'"),
        ({"do_pad": True}, "do_pad is true"),
        ({"image_processor_type": "SamImageProcessorFast"}, "is not known: vitlib follows"),
        ({"image_processor_type": "LlavaNextImageProcessorFast"}, "cuts each photo into tiles"),
        (
            {"image_processor_type": "Siglip2ImageProcessor", "max_num_patches": 0},
            "max_num_patches=0",
        ),
        ({"image_processor_type": "DINOv3ViTImageProcessor", "resample": 1}, "float_resize with"),
        ({"crop_rounding": "up"}, "crop_rounding='up': expected one of"),
        ({"fit": "cover", "size": 9}, "fit='cover' leaves the shape: give size and crop_size"),
        ({"fill": [0, 300, 0]}, "fill=(0, 300, 0): expected 3 levels in 0..255"),
        ({"image_processor_type": 7}, "is not known"),
        ({"image_processor_type": "ConvNextImageProcessor", "crop_pct": 0}, "crop_pct=0"),
    ],
)
def test_invalid_configs_are_rejected(
    rule: dict[str, object], message: str, tmp_path: Path
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(rule))
    with pytest.raises(ConfigError) as error:
        ImageProcessor.load(tmp_path)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_load_without_config_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no preprocessor_config\.json in .* put one there"):
        ImageProcessor.load(tmp_path)


@pytest.mark.parametrize(
    ("height", "width", "grid"),
    [(224, 224, (16, 16)), (480, 640, (16, 21)), (1000, 10, (1600, 16)), (30, 45, (16, 24))],
)
def test_image_size_keep_rounds_to_patches(height: int, width: int, grid: tuple[int, int]) -> None:
    rule = ImageProcessor(shortest_edge=256, crop_size=(224, 224), resample=3)
    keep = rule.with_image_size("keep", (14, 14))
    levels = np.zeros((height, width, 3), np.uint8)
    assert keep.to_float(levels).shape == (3, grid[0] * 14, grid[1] * 14)
    assert keep.visible_box(height, width) == pytest.approx((0, 0, height, width))
    assert ImageProcessor.from_dict(json.loads(json.dumps(keep.to_dict()))) == replace(
        keep, crop_rounding=ImageProcessor.from_dict(keep.to_dict()).crop_rounding
    )
    assert any("multiple_of" in line for line in keep.unsupported_fields("timm"))
    assert "multiples of 14x14" in keep.describe()


def test_image_size_keep_needs_patch_size() -> None:
    with pytest.raises(ConfigError, match="give patch_size"):
        ImageProcessor(size=(32, 32)).with_image_size("keep")
    with pytest.raises(ConfigError, match="multiple_of rounds"):
        ImageProcessor(size=(32, 32), multiple_of=(8, 8))


@pytest.mark.parametrize(
    ("rule", "sides", "box"),
    [
        (ImageProcessor(size=(32, 48)), (100, 200), (0, 0, 100, 200)),
        (ImageProcessor(shortest_edge=50, crop_size=(40, 40)), (100, 200), (10, 60, 90, 140)),
        (ImageProcessor(crop_size=(40, 40)), (30, 80), (-5, 20, 35, 60)),
    ],
)
def test_visible_box(rule: ImageProcessor, sides: tuple[int, int], box: tuple[int, ...]) -> None:
    assert rule.visible_box(*sides) == pytest.approx(box)
