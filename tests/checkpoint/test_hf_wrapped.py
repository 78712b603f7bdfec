"""Models of timm in the wrapper of transformers, and processors of larger models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers as hf
from PIL import Image

import vitlib
from fixtures import references
from paths import FIXTURES

TINY = 2e-6


@pytest.mark.parametrize("name", ["named", "plain", "base"])
def test_timm_wrapper_equals_timm(name: str) -> None:
    folder = FIXTURES / "timm_wrapper"
    expected = safetensors.torch.load_file(folder / f"{name}.outputs.safetensors")
    model = vitlib.load(folder / name)
    with torch.inference_mode():
        assert references.distance(model(expected["pixels"]), expected["answer"]) < TINY
    assert model.config.labels == (("cat", "dog", "3") if name == "named" else ())
    task = "multi_label_classification" if name == "named" else None
    assert model.config.problem_type == task
    assert "crop 16x16" in vitlib.ImageProcessor.load(folder / name).describe()


PROCESSORS = ["CLIP", "ChineseCLIP", "Llava", "Blip", "OwlViT", "Flava", "DPT", "Gemma3", "Siglip"]


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", ["default", "small"])
def test_processor_equals_transformers(name: str, size: str, tmp_path: Path) -> None:
    """To the bit, with the class's own defaults and with sizes that a file says."""
    kind = getattr(hf, f"{name}ImageProcessorPil")
    crops = name in ("CLIP", "ChineseCLIP", "Llava", "Flava")
    options: dict[str, Any] = {"size": {"height": 30, "width": 30}}
    if crops:
        options = {"size": {"shortest_edge": 33}, "crop_size": {"height": 29, "width": 29}}
    if name == "Flava":
        options["size"] = {"height": 33, "width": 33}
    reference_output = kind(**({} if size == "default" else options))
    if size == "default":  # of the class, which no file says
        rule = {"image_processor_type": f"{name}ImageProcessor"}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(rule))
    else:
        reference_output.save_pretrained(tmp_path)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 90, 3), dtype=np.uint8))
    actual = vitlib.ImageProcessor.load(tmp_path)(photo)
    assert torch.equal(actual, reference_output(photo, return_tensors="pt").pixel_values)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"image_processor_type": "LlavaNextImageProcessor"}, "cuts each photo into tiles"),
        ({"image_processor_type": "Owlv2ImageProcessorFast"}, "pads each photo to a square"),
        (
            {"image_processor_type": "Gemma3ImageProcessor", "do_pan_and_scan": True},
            "pan_and_scan is true",
        ),
        ({"image_processor_type": "DPTImageProcessor", "keep_aspect_ratio": True}, "aspect_ratio"),
        ({"image_processor_type": "DPTImageProcessor", "ensure_multiple_of": 32}, "multiple_of"),
    ],
)
def test_unsupported_processor_is_refused(
    rule: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(rule))
    with pytest.raises(vitlib.VitlibError, match=message):
        vitlib.ImageProcessor.load(tmp_path)
