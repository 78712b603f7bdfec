"""Rule files of every library, both ways, and what each library does where there is none.

The sums are CRC-32 of the float32 pixels that timm 1.0.31, open_clip 3.3.0 and torchvision 0.28.0
make of photo() (Pillow 13.0.0): equal sums are equal bits. tests/fixtures/timm holds whole pixels.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from paths import FIXTURES
from vitlib import ImageProcessor
from vitlib.checkpoint import families
from vitlib.errors import ConfigError
from vitlib.image import configs
from vitlib.image.configs.fields import CLIP_STATS, HALF_STATS, IMAGENET_STATS

TIMM = FIXTURES / "timm"
SHAPES = [(37, 50), (61, 40), (9, 70), (30, 12)]
# Pillow 13 runs the two passes of some resizes in another order. Its sums, and those of Pillow 12.
BEFORE_PILLOW_13 = {2788146576: 561809501, 4024366326: 3216497528, 3793016193: 1579898999}


def photo(height: int, width: int) -> Image.Image:
    levels = np.random.default_rng(height + 7 * width).integers(0, 256, (height, width, 3))
    return Image.fromarray(levels.astype(np.uint8))


def sums(processor: ImageProcessor) -> list[int]:
    return [zlib.crc32(processor.to_float(photo(*shape)).numpy().tobytes()) for shape in SHAPES]


def timm_case(case: str, image: str) -> tuple[dict[str, Any], Image.Image, torch.Tensor]:
    config = json.loads((TIMM / "preprocess.json").read_text())["cases"][case]["config"]
    expected = load_file(TIMM / "preprocess.safetensors")[f"{case}@{image}"]
    return config, Image.open(TIMM / f"preprocess_{image}.png").convert("RGB"), expected


@pytest.mark.parametrize("key", sorted(load_file(TIMM / "preprocess.safetensors")))
def test_equal_to_timm_to_the_bit(key: str) -> None:
    config, image, expected = timm_case(*key.split("@"))
    assert torch.equal(ImageProcessor.from_timm(config).to_float(image), expected)


def test_timm_parity_fails_for_wrong_crop_or_fill() -> None:
    # 17 of 24 pixels: three and a half to spare on a side, which is three or four.
    config, image, expected = timm_case("crop90_odd", "a")
    timm = ImageProcessor.from_timm(config)
    wrong = ImageProcessor.from_dict({**timm.to_dict(), "crop_rounding": "floor"})
    assert not torch.equal(wrong.to_float(image), expected)
    config, image, expected = timm_case("border", "a")
    border = ImageProcessor.from_timm(config)
    wrong = ImageProcessor.from_dict({**border.to_dict(), "fill": None})
    assert not torch.equal(wrong.to_float(image), expected)


HALVES = {"mean": HALF_STATS[0], "std": HALF_STATS[1]}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (
            {"input_size": (3, 24, 17), "crop_pct": 0.9, **HALVES},
            [293810190, 1861175416, 4223725953, 1616043592],
        ),
        (
            {"input_size": (3, 21, 30), "crop_pct": 0.8, "crop_mode": "border"},
            [2026590356, 1750718433, 3601455674, 1762580131],
        ),
        (
            {"input_size": (3, 20, 20), "crop_pct": 1.4, "interpolation": "bilinear"},
            [489677218, 1658742074, 3398092266, 1648135161],
        ),
        (
            {"input_size": [3, 24, 17], "crop_pct": 0.7, "interpolation": "lanczos"}
            | {"crop_mode": "squash"},
            [3900979603, 1596838065, 2706780663, 2955905845],
        ),
    ],
    ids=str,
)
def test_timm_configs(rule: dict[str, Any], expected: list[int]) -> None:
    processor = ImageProcessor.from_timm(rule)
    assert sums(processor) == expected
    assert ImageProcessor.from_timm(processor.to_timm()) == processor
    assert processor.unsupported_fields("timm") == []


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"size": 24}, [2368974013, 1914147225, 1103537617, 538990780]),
        ({"size": [17, 24]}, [2270608827, 225468857, 234630939, 2850219446]),
        (
            {"size": 24, "resize_mode": "squash", "interpolation": "bilinear", **HALVES},
            [4202518846, 2788146576, 4055772811, 4024366326],
        ),
        (
            {"size": 24, "resize_mode": "longest", "fill_color": 7},
            [1880308386, 4134149580, 4017697866, 3793016193],
        ),
        (
            {"size": [31, 20], "resize_mode": "longest"},
            [2099197575, 713530725, 3593580913, 2744295511],
        ),
    ],
    ids=str,
)
def test_openclip_configs(rule: dict[str, Any], expected: list[int]) -> None:
    processor = ImageProcessor.from_openclip({"preprocess_cfg": rule})
    if int(PIL.__version__.split(".")[0]) < 13:
        expected = [BEFORE_PILLOW_13.get(value, value) for value in expected]
    assert sums(processor) == expected
    assert ImageProcessor.from_openclip({"preprocess_cfg": processor.to_openclip()}) == processor
    assert processor.unsupported_fields("openclip") == []
    # The tower's size counts, whatever the rule's; open_clip's own files leave the rule's out.
    sized = {"preprocess_cfg": {**rule, "size": 999}, "model_cfg": {}}
    sized["model_cfg"] = {"vision_cfg": {"image_size": rule["size"]}}
    assert ImageProcessor.from_openclip(sized) == processor


def test_torchvision_profiles() -> None:
    norm = {"image_mean": IMAGENET_STATS[0], "image_std": IMAGENET_STATS[1]}
    odd = ImageProcessor(shortest_edge=24, crop_size=(21, 21), crop_rounding="even", **norm)
    assert sums(odd) == [80484967, 2360955157, 727911753, 2371736279]
    short = ImageProcessor(crop_size=(45, 33), crop_rounding="even", **norm)
    assert sums(short) == [4113702261, 2348140879, 892406055, 4158356311]
    swag = ImageProcessor.from_profile("torchvision", "vit", 384)
    assert sums(swag) == [270397422, 707144568, 2988804879, 1564956194]


@pytest.mark.parametrize("stats", [IMAGENET_STATS, HALF_STATS, CLIP_STATS])
def test_uint8_values_equal_torchvision_normalize(stats: configs.Fields) -> None:
    """The division by 255 in float32 and the product in float64 have the same bits."""
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    mean, std = (torch.tensor(values)[:, None, None] for values in stats)
    expected = torch.from_numpy(levels.copy()).permute(2, 0, 1).float().div(255).sub(mean).div(std)
    pixels = ImageProcessor(image_mean=stats[0], image_std=stats[1]).to_float(levels)
    assert torch.equal(pixels, expected)


def test_load_reads_first_config_file(tmp_path: Path) -> None:
    def write(name: str, value: object) -> None:
        (tmp_path / name).write_text(json.dumps(value))

    with pytest.raises(ConfigError, match=r"no preprocessor_config\.json .* nor prep.* of timm"):
        ImageProcessor.load(tmp_path)
    write("open_clip_config.json", {"model_cfg": {}, "preprocess_cfg": {"size": 12}})
    assert ImageProcessor.load(tmp_path).shortest_edge == 12
    older = {"architecture": "vit_base_patch16_224", "input_size": [3, 20, 20], "crop_pct": 1.0}
    write("config.json", older)
    assert ImageProcessor.load(tmp_path).crop_size == (20, 20)
    write("config.json", {"architecture": "x", "pretrained_cfg": {"input_size": [3, 36, 36]}})
    assert ImageProcessor.load(tmp_path).shortest_edge == 41
    nested = {"size": {"height": 50, "width": 40}, "image_processor_type": "SiglipImageProcessor"}
    write("processor_config.json", {"processor_class": "SiglipProcessor"})
    assert ImageProcessor.load(tmp_path).shortest_edge == 41
    write("processor_config.json", {"image_processor": nested})
    assert ImageProcessor.load(tmp_path).size == (50, 40)
    write("preprocessor_config.json", {"size": 60})
    write("config.json", {"model_type": "clip"})
    assert ImageProcessor.load(tmp_path).shortest_edge == 60


def test_saved_by_timm_and_open_clip() -> None:
    timm = ImageProcessor.load(TIMM / "vit")
    assert (timm.shortest_edge, timm.crop_size, timm.crop_rounding) == (17, (16, 16), "even")
    clip = ImageProcessor.load(TIMM.parent / "openclip" / "quickgelu")
    assert (clip.shortest_edge, clip.crop_size, clip.image_mean) == (16, (16, 16), CLIP_STATS[0])
    siglip = ImageProcessor.load(TIMM.parent / "openclip" / "timm_siglip")
    assert (siglip.size, siglip.crop_size, siglip.image_mean) == ((16, 16), None, HALF_STATS[0])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "preprocessor_config.json",
            {"image_processor_type": "Owlv2ImageProcessor"},
            "to a square",
        ),
        ("preprocessor_config.json", {"image_processor_type": "Ovis2ImageProcessor"}, "tiles"),
        ("preprocessor_config.json", {"image_processor_type": "Molmo2ImageProcessor"}, "tiles"),
        ("processor_config.json", {"image_processor": [1]}, "is a list: expected an object"),
        ("config.json", {"pretrained_cfg": {"crop_mode": "trim"}}, "crop_mode='trim': expected"),
        ("config.json", {"pretrained_cfg": {"crop_pct": 1e-9}}, "crop_pct=1e-09: expected a numbe"),
        ("config.json", {"pretrained_cfg": {"crop_pct": True}}, "crop_pct=True: expected a number"),
        ("config.json", {"pretrained_cfg": {"input_size": 224}}, "input_size=224: expected a list"),
        ("config.json", {"pretrained_cfg": {"input_size": [3, 8]}}, "expected (channels, height"),
        ("config.json", {"pretrained_cfg": {"mean": 0.5}}, "mean=0.5: expected a list"),
        ("config.json", {"pretrained_cfg": {"interpolation": "random"}}, "interpolation='random'"),
        ("config.json", {"pretrained_cfg": "x"}, "pretrained_cfg is a str: expected an object"),
        ("open_clip_config.json", {"preprocess_cfg": {"resize_mode": "x"}}, "resize_mode='x'"),
        ("open_clip_config.json", {"preprocess_cfg": {"mode": "L"}}, "mode='L': expected RGB"),
        ("open_clip_config.json", {"preprocess_cfg": {"size": -1}}, "size=-1: expected a whole"),
        ("open_clip_config.json", {"preprocess_cfg": [3]}, "preprocess_cfg is a list: expected"),
    ],
)
def test_load_rejects_invalid_config_files(
    name: str, value: object, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(json.dumps(value))
    with pytest.raises(ConfigError) as error:
        ImageProcessor.load(tmp_path)
    assert message in str(error.value)
    assert f"{name}: " in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "reference"),
    [
        ("vit", ViTImageProcessorPil()),
        ("deit", DeiTImageProcessorPil(image_mean=IMAGENET_STATS[0], image_std=IMAGENET_STATS[1])),
        (
            "dinov2",
            BitImageProcessorPil(
                size=256, image_mean=IMAGENET_STATS[0], image_std=IMAGENET_STATS[1]
            ),
        ),
        ("clip", CLIPImageProcessorPil()),
        ("siglip", SiglipImageProcessorPil()),
        (
            "vit_mae",
            ViTImageProcessorPil(image_mean=IMAGENET_STATS[0], image_std=IMAGENET_STATS[1]),
        ),
        ("ijepa", ViTImageProcessorPil()),
        ("beit", ViTImageProcessorPil()),
    ],
)
def test_profile_of_hugging_face(family: str, reference: Any) -> None:
    actual = ImageProcessor.from_profile("hf", family, 518 if family == "dinov2" else 224)
    for shape in (*SHAPES, (300, 401)):
        expected = reference(photo(*shape), return_tensors="pt").pixel_values
        assert torch.equal(actual(photo(*shape)), expected), shape


def test_published_configs_equal_profile(shared_configs: Path) -> None:
    for name, family in {
        "facebook__dinov2-base": "dinov2",
        "facebook__dinov2-small": "dinov2",
        "openai__clip-vit-base-patch32": "clip",
    }.items():
        rule = json.loads((shared_configs / name / "preprocessor_config.json").read_text())
        assert ImageProcessor.from_dict(rule) == ImageProcessor.from_profile("hf", family, 224)


def test_profiles_at_other_sizes() -> None:
    def describe_profile(profile: str, family: str, size: int | tuple[int, int]) -> tuple[Any, ...]:
        made = ImageProcessor.from_profile(profile, family, size)
        return made.size or made.shortest_edge, made.crop_size, made.resample, made.fit

    assert describe_profile("timm", "vit", 224) == (248, (224, 224), 3, "squash")
    assert describe_profile("timm", "vit", 384) == (384, (384, 384), 3, "squash")
    assert describe_profile("timm", "vit", (16, 20)) == ((17, 22), (16, 20), 3, "cover")
    assert describe_profile("timm", "dinov2", 518) == (518, (518, 518), 3, "squash")
    assert describe_profile("hf", "deit", 384) == ((438, 438), (384, 384), 3, "squash")
    assert describe_profile("hf", "dinov2", 518) == (256, (224, 224), 3, "squash")
    assert describe_profile("hf", "clip", (20, 30)) == (30, (20, 30), 3, "squash")
    assert describe_profile("original", "dino", 224) == (256, (224, 224), 3, "squash")
    assert describe_profile("original", "vit_mae", 448) == (448, (448, 448), 3, "squash")
    assert describe_profile("torchvision", "vit", 224) == (256, (224, 224), 2, "squash")
    assert describe_profile("jax", "vit", 224) == ((224, 224), None, 2, "squash")
    assert ImageProcessor.from_profile("hf", "dinov3_vit", 224).float_resize
    with pytest.raises(ConfigError, match="profile='tf': expected one of hf, timm, original"):
        ImageProcessor.from_profile("tf", "vit", 224)


@pytest.mark.parametrize("profile", families.PROFILES)
def test_profiles_round_trip(profile: str, tmp_path: Path) -> None:
    """If no field is unsupported, transformers computes the same pixels from the written file."""
    variants = [name for family in families.list_families() for name in family.transform_variants]
    for family in (*families.FAMILY_NAMES, *variants, "unheard of"):
        made = ImageProcessor.from_profile(profile, family, (33, 47) if family == "vit" else 33)
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(made.to_dict()))
        assert ImageProcessor.load(tmp_path) == made
        if not made.unsupported_fields("timm"):
            assert sums(ImageProcessor.from_timm(made.to_timm())) == sums(made)
        if not made.unsupported_fields("openclip"):
            config = {"preprocess_cfg": made.to_openclip()}
            assert sums(ImageProcessor.from_openclip(config)) == sums(made)
        if not made.float_resize:  # its class needs torchvision
            reference = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
            same = [
                torch.equal(made(photo(*s)), reference(photo(*s), return_tensors="pt").pixel_values)
                for s in SHAPES
            ]
            assert all(same) or made.unsupported_fields("hf"), family


def test_unsupported_fields_are_listed() -> None:
    timm = ImageProcessor.from_profile("timm", "vit", 224)
    assert timm.unsupported_fields("timm") == []
    assert timm.unsupported_fields("hf") == [
        "preprocessing: crop_rounding is even, in hf it becomes floor"
    ]
    assert [line.split()[1] for line in timm.unsupported_fields("openclip")] == ["shortest_edge"]
    hf = ImageProcessor.from_profile("hf", "dinov2", 224)
    assert hf.unsupported_fields("hf") == []
    assert hf.unsupported_fields("timm") == [
        "preprocessing: crop_rounding is floor, in timm it becomes even"
    ]
    dinov3 = ImageProcessor.from_profile("hf", "dinov3_vit", 224)
    assert dinov3.unsupported_fields("hf") == []
    assert dinov3.unsupported_fields("timm") == [
        "preprocessing: float_resize is True, in timm it becomes False"
    ]
    # 32 pixels to spare: the middle is the middle, however it is rounded.
    assert ImageProcessor.from_profile("hf", "deit", 224).unsupported_fields("timm") == []
    levels = ImageProcessor(size=(8, 8), rescale_factor=None)
    assert [line.split()[1] for line in levels.unsupported_fields("timm")] == ["rescale_factor"]
    assert ImageProcessor(size=(8, 8)).unsupported_fields("openclip") == []
    oblong = ImageProcessor.from_profile("timm", "vit", (32, 40))
    assert [line.split()[1] for line in oblong.unsupported_fields("hf")] == ["fit", "crop_rounding"]
    item = ImageProcessor(size=(8, 8), image_mean=(0.5,), image_std=(0.5,), in_channels=1)
    assert item.unsupported_fields("timm") == []
    assert "preprocessing: in_channels is 1, in openclip it becomes 3" in item.unsupported_fields(
        "openclip"
    )
    with pytest.raises(ConfigError, match="layout='jax': expected one of hf, timm, openclip"):
        item.unsupported_fields("jax")


@pytest.mark.parametrize(("size", "scaled"), [(224, 248), (224, 256), (224, 235), (16, 17)])
def test_crop_pct_is_written_with_few_digits(size: int, scaled: int) -> None:
    shares = {(224, 248): 0.9, (224, 256): 0.875, (224, 235): 0.95, (16, 17): 0.9}
    made = ImageProcessor(shortest_edge=scaled, crop_size=(size, size), crop_rounding="even")
    assert made.to_timm()["crop_pct"] == shares[size, scaled]
