"""SigLIP 2 NaFlex: photos of any shape, prepared and computed as transformers does it.

transformers pads the patches of all photos to one length and masks them; `packed` has no padding.
Bound: 2e-6 of the largest value, that of tiny models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from torch import Tensor
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

import vitlib
from fixtures import reference_towers, references
from vitlib.errors import ConfigError

TINY = 2e-6
SIZES = [(37, 90), (64, 64), (120, 45)]  # height, width


def draw_photo(height: int, width: int) -> Image.Image:
    generator = np.random.default_rng([height, width])
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8))


PHOTOS = [draw_photo(*size) for size in SIZES]


def make_reference(folder: Path, **processor: Any) -> tuple[Any, Siglip2ImageProcessorPil]:
    config = reference_towers.siglip2_config().vision_config
    part = reference_towers.Part(lambda: hf.Siglip2VisionModel(config), "")
    model = reference_towers.build(part)
    settings = {"patch_size": config.patch_size, "max_num_patches": 24, **processor}
    image_processor = Siglip2ImageProcessorPil(**settings)
    model.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    return model, image_processor


def cut_patches(pixels: Tensor, side: int) -> Tensor:
    """Cut pixels (C, H, W) to NaFlex's rows of patches, (N, side * side * C)."""
    patches = pixels.unfold(1, side, side).unfold(2, side, side)
    return patches.permute(1, 2, 3, 4, 0).flatten(2).flatten(0, 1)


@pytest.mark.parametrize("max_patches", [24, 256])
@pytest.mark.parametrize(
    "size", [*SIZES, (1, 1), (5, 700), (480, 640), (641, 479), (224, 224), (333, 1000), (97, 96)]
)
def test_pixels_equal_transformers_to_the_bit(size: tuple[int, int], max_patches: int) -> None:
    reference = Siglip2ImageProcessorPil(max_num_patches=max_patches)
    photo = draw_photo(*size)
    expected = reference(photo, return_tensors="pt")
    ours = vitlib.ImageProcessor.from_dict(json.loads(reference.to_json_string()))
    pixels = ours(photo)[0]
    grid = [side // 16 for side in pixels.shape[1:]]
    assert grid == expected["spatial_shapes"][0].tolist()
    assert grid[0] * grid[1] <= max_patches
    rows = expected["pixel_values"][0, : grid[0] * grid[1]]
    assert torch.equal(cut_patches(pixels, 16), rows.float())


def test_packed_equals_a_masked_batch_of_transformers(tmp_path: Path) -> None:
    reference, processor = make_reference(tmp_path)
    model = vitlib.load(tmp_path)
    assert model.image_processor is not None
    images = [model.image_processor(photo)[0] for photo in PHOTOS]
    inputs = processor(PHOTOS, return_tensors="pt")
    assert len({tuple(shape) for shape in inputs["spatial_shapes"].tolist()}) == 3
    assert inputs["pixel_attention_mask"].min() == 0
    with torch.inference_mode():
        expected = reference(**inputs)
        out = model.packed(images)
    assert out.grids == tuple(map(tuple, inputs["spatial_shapes"].tolist()))
    for i, tokens in enumerate(out.split()):
        reference_tokens = expected.last_hidden_state[i, : out.lengths[i]]
        assert references.distance(tokens, reference_tokens) < TINY
    assert references.distance(out.logits, expected.pooler_output) < TINY
    assert references.distance(out.logits.roll(1, 0), expected.pooler_output) > 0.1


def test_saved_model_opens_in_transformers(tmp_path: Path) -> None:
    make_reference(tmp_path / "first")
    model = vitlib.load(tmp_path / "first")
    assert not vitlib.save(model, tmp_path / "second", image_processor=model.image_processor)
    opened = hf.Siglip2VisionModel.from_pretrained(tmp_path / "second").eval()
    processor = Siglip2ImageProcessorPil.from_pretrained(tmp_path / "second")
    again = vitlib.load(tmp_path / "second")
    assert again.image_processor == model.image_processor
    assert model.image_processor is not None
    images = [model.image_processor(photo)[0] for photo in PHOTOS]
    with torch.inference_mode():
        expected = opened(**processor(PHOTOS, return_tensors="pt"))
        out = model.packed(images)
    assert references.distance(out.logits, expected.pooler_output) < TINY


def test_predictor_takes_photos_of_any_shape(tmp_path: Path) -> None:
    reference, processor = make_reference(tmp_path)
    embeddings = vitlib.Predictor.load(tmp_path).embed(PHOTOS)
    with torch.inference_mode():
        expected = reference(**processor(PHOTOS, return_tensors="pt")).pooler_output
    assert references.distance(torch.from_numpy(embeddings), expected) < TINY


def test_other_sizes_of_a_preprocessing_by_patches() -> None:
    rule = vitlib.ImageProcessor(max_patches=256, multiple_of=(16, 16))
    assert rule.describe().startswith("resize to at most 256 patches of 16x16, aspect ratio kept (")
    assert rule.with_image_size("keep", (14, 14)).multiple_of == (14, 14)
    assert rule.with_image_size((64, 96)).size == (64, 96)
    assert rule.with_squash().size == (256, 256)
    assert any("max_patches" in line for line in rule.unsupported_fields("timm"))
    assert rule.unsupported_fields("hf") == []
    oblong = vitlib.ImageProcessor(max_patches=100, multiple_of=(8, 16))
    assert vitlib.ImageProcessor.from_dict(oblong.to_dict()) == oblong
    assert any("multiple_of" in line for line in oblong.unsupported_fields("hf"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_patches": 256}, "max_patches counts patches of multiple_of"),
        ({"max_patches": 256, "multiple_of": 16, "size": 32}, "and no size, no shortest_edge"),
        ({"max_patches": 0, "multiple_of": 16}, "max_patches=0"),
        ({"max_patches": 10**9, "multiple_of": 16}, "expected at most"),
    ],
)
def test_contradictory_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        vitlib.ImageProcessor(**fields)
