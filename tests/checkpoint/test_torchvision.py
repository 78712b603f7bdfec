"""torchvision's bare files: what their shapes say, and what they cannot say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vitlib
from vitlib.checkpoint.layouts import torchvision
from vitlib.checkpoint.layouts.facts import Facts
from vitlib.checkpoint.layouts.layout import ParsedConfig
from vitlib.checkpoint.layouts.table import NameMatch
from vitlib.errors import CheckpointError
from vitlib.image.processor import ImageProcessor

# name, weights, width, patch, heads, image size; resize and interpolation of their transforms().
WEIGHTS = [
    ("vit_b_16", "IMAGENET1K_V1", 768, 16, 12, 224, 256, "bilinear"),
    ("vit_b_16", "IMAGENET1K_SWAG_LINEAR_V1", 768, 16, 12, 224, 224, "bicubic"),
    ("vit_b_16", "IMAGENET1K_SWAG_E2E_V1", 768, 16, 12, 384, 384, "bicubic"),
    ("vit_b_32", "IMAGENET1K_V1", 768, 32, 12, 224, 256, "bilinear"),
    ("vit_l_16", "IMAGENET1K_V1", 1024, 16, 16, 224, 242, "bilinear"),
    ("vit_l_16", "IMAGENET1K_SWAG_LINEAR_V1", 1024, 16, 16, 224, 224, "bicubic"),
    ("vit_l_16", "IMAGENET1K_SWAG_E2E_V1", 1024, 16, 16, 512, 512, "bicubic"),
    ("vit_l_32", "IMAGENET1K_V1", 1024, 32, 16, 224, 256, "bilinear"),
    ("vit_h_14", "IMAGENET1K_SWAG_LINEAR_V1", 1280, 14, 16, 224, 224, "bicubic"),
    ("vit_h_14", "IMAGENET1K_SWAG_E2E_V1", 1280, 14, 16, 518, 518, "bicubic"),
]


def shapes_of(width: int, patch: int, size: int) -> dict[str, tuple[int, ...]]:
    return {
        "patch_embed.cls_token": (1, 1, width),
        "patch_embed.pos_embed": (1, (size // patch) ** 2 + 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "blocks.0.attn.q.bias": (width,),
        "blocks.0.attn.k.bias": (width,),
        "blocks.0.mlp.fc2.weight": (width, 4 * width),
        "head.weight": (1000, width),
    }


def bare(width: int, patch: int, size: int, architecture: str | None = None) -> ParsedConfig:
    facts = Facts(architecture=architecture)
    return torchvision.read(lambda _: None, shapes_of(width, patch, size), NameMatch(), facts)


@pytest.mark.parametrize(
    ("name", "tag", "width", "patch", "heads", "size", "resize", "mode"), WEIGHTS
)
def test_heads_and_preprocessing_of_published_weights(
    name: str,
    tag: str,
    width: int,
    patch: int,
    heads: int,
    size: int,
    resize: int,
    mode: str,
) -> None:
    cfg, _, doubtful, notes = bare(width, patch, size)
    assert (cfg.num_heads, cfg.image_size, doubtful) == (heads, (size, size), ())
    stated = bare(width, patch, size, f"{name}.{tag}")
    assert stated.notes == ()
    processors = [
        ImageProcessor.from_profile("torchvision", kind, cfg.image_size)
        for kind in (
            torchvision.choose_preprocessing(cfg, f"{name}.{tag}"),
            torchvision.choose_preprocessing(cfg, name),
        )
    ]
    assert f"resize the shorter edge to {resize} ({mode})" in processors[0].describe()
    if processors[0] != processors[1]:  # the tensors do not say which: it is told, with a remedy
        assert f"architecture='{name}.{tag}' (--architecture)" in notes[0]
    elif len(torchvision.get_weight_tags(cfg)) == 1:
        assert notes == ()


def test_another_width_is_doubtful() -> None:
    assert bare(384, 16, 224).doubtful == ("num_heads",)
    assert bare(384, 16, 224).notes == ()


@pytest.mark.parametrize(
    ("architecture", "told"),
    [
        ("vit_b_8", "torchvision's are vit_b_16, vit_b_32, vit_l_16, vit_l_32, vit_h_14"),
        ("vit_l_16", "has other tensors than this file"),
        ("vit_b_16.IMAGENET1K_SWAG_E2E_V1", "weights of this image size are IMAGENET1K_V1, IMAG"),
    ],
)
def test_a_stated_model_that_is_not_this_one(architecture: str, told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        bare(768, 16, 224, architecture)


@pytest.mark.parametrize(
    ("file_name", "stated"),
    [
        ("vit_b_16-c867db91.pth", "vit_b_16.IMAGENET1K_V1"),
        ("vit_b_16_lc_swag-4e70ced5.pth", "vit_b_16.IMAGENET1K_SWAG_LINEAR_V1"),
        ("my-vit_b_16_lc_swag.safetensors", "vit_b_16.IMAGENET1K_SWAG_LINEAR_V1"),
        ("vit_b_16.pth", None),  # anybody may have named it so
        ("model.pth", None),
        ("vit_b_16_swag-9ac1b537.pth", None),  # of 384 pixels: not what this name is of
        ("vit_l_16-852ce7e3.pth", None),
    ],
)
def test_a_published_file_name_says_which_weights_they_are(
    file_name: str, stated: str | None
) -> None:
    assert torchvision.parse_file_name(file_name, shapes_of(768, 16, 224)) == stated


def test_load_reads_the_name_of_a_published_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As torchvision publishes it, nothing is assumed; under another name that is told."""
    state = tensors_of_one_block()
    for name, resize in (("vit_b_16-c867db91.pth", 256), ("vit_b_16_lc_swag-4e70ced5.pth", 224)):
        torch.save(state, tmp_path / name)
        processor = vitlib.load(tmp_path / name).image_processor
        assert isinstance(processor, ImageProcessor)
        assert processor.shortest_edge == resize
    assert "preprocessing" not in caplog.text
    torch.save(state, tmp_path / "model.pth")
    vitlib.load(tmp_path / "model.pth")
    assert "preprocessing is that of IMAGENET1K_V1, give architecture=" in caplog.text


def tensors_of_one_block() -> dict[str, torch.Tensor]:
    """Tensors of ViT-B/16, cut to one block and a narrow MLP, under torchvision's names."""
    sizes = {"embed_dim": 768, "depth": 1, "num_heads": 12, "mlp_dim": 8, "num_classes": 10}
    config = vitlib.ViTConfig(image_size=(224, 224), patch_size=(16, 16), **sizes)
    return torchvision.write(config, vitlib.ViT(config).state_dict()).tensors
