"""Bare files of torchvision: facts read from shapes, and facts that need a name."""

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

# Name, weights, width, patch, heads, image size; then resize and mode of the transforms().
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


def build_shapes(width: int, patch: int, size: int) -> dict[str, tuple[int, ...]]:
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


def read_bare(width: int, patch: int, size: int, architecture: str | None = None) -> ParsedConfig:
    facts = Facts(architecture=architecture)
    return torchvision.LAYOUT.read(
        lambda _: None, build_shapes(width, patch, size), NameMatch(), facts
    )


@pytest.mark.parametrize(
    ("name", "tag", "width", "patch", "heads", "size", "resize", "mode"), WEIGHTS
)
def test_published_weights_have_their_heads_and_preprocessing(
    name: str,
    tag: str,
    width: int,
    patch: int,
    heads: int,
    size: int,
    resize: int,
    mode: str,
) -> None:
    cfg, _, doubtful, notes = read_bare(width, patch, size)
    assert (cfg.num_heads, cfg.image_size, doubtful) == (heads, (size, size), ())
    stated = read_bare(width, patch, size, f"{name}.{tag}")
    assert stated.notes == ()
    processors = [
        ImageProcessor.from_profile("torchvision", kind, cfg.image_size)
        for kind in (
            torchvision.choose_preprocessing(cfg, f"{name}.{tag}"),
            torchvision.choose_preprocessing(cfg, name),
        )
    ]
    assert f"resize the shorter edge to {resize} ({mode})" in processors[0].describe()
    if processors[0] != processors[1]:  # the tensors do not tell which: a note names the remedy
        assert f"architecture='{name}.{tag}' (--architecture)" in notes[0]
    elif len(torchvision.get_weight_tags(cfg)) == 1:
        assert notes == ()


def test_num_heads_of_unpublished_width_is_doubtful() -> None:
    assert read_bare(384, 16, 224).doubtful == ("num_heads",)
    assert read_bare(384, 16, 224).notes == ()


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("vit_b_8", "expected one of vit_b_16, vit_b_32, vit_l_16, vit_l_32, vit_h_14"),
        ("vit_l_16", "has other tensors than this file"),
        ("vit_b_16.IMAGENET1K_SWAG_E2E_V1", "for this image size: IMAGENET1K_V1, IMAG"),
    ],
)
def test_read_rejects_architecture_with_other_tensors(architecture: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_bare(768, 16, 224, architecture)


@pytest.mark.parametrize(
    ("file_name", "architecture"),
    [
        ("vit_b_16-c867db91.pth", "vit_b_16.IMAGENET1K_V1"),
        ("vit_b_16_lc_swag-4e70ced5.pth", "vit_b_16.IMAGENET1K_SWAG_LINEAR_V1"),
        ("my-vit_b_16_lc_swag.safetensors", "vit_b_16.IMAGENET1K_SWAG_LINEAR_V1"),
        ("vit_b_16.pth", None),  # no checksum: any file may have this name
        ("model.pth", None),
        ("vit_b_16_swag-9ac1b537.pth", None),  # those weights are for 384 pixels
        ("vit_l_16-852ce7e3.pth", None),
    ],
)
def test_file_name_of_published_weights_gives_their_tag(
    file_name: str, architecture: str | None
) -> None:
    assert torchvision.parse_file_name(file_name, build_shapes(768, 16, 224)) == architecture


def test_load_reads_weights_tag_from_file_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Under torchvision's file name nothing is assumed; under another one, a line is logged."""
    state = build_tensors()
    for name, resize in (("vit_b_16-c867db91.pth", 256), ("vit_b_16_lc_swag-4e70ced5.pth", 224)):
        torch.save(state, tmp_path / name)
        processor = vitlib.load(tmp_path / name).image_processor
        assert isinstance(processor, ImageProcessor)
        assert processor.shortest_edge == resize
    assert "preprocessing" not in caplog.text
    torch.save(state, tmp_path / "model.pth")
    vitlib.load(tmp_path / "model.pth")
    assert (
        "preprocessing is that of IMAGENET1K_V1: for the other weights give architecture="
        in caplog.text
    )


def build_tensors() -> dict[str, torch.Tensor]:
    """Return ViT-B/16 with one block and a narrow MLP, by torchvision's names."""
    sizes = {"embed_dim": 768, "depth": 1, "num_heads": 12, "mlp_dim": 8, "num_classes": 10}
    config = vitlib.ViTConfig(image_size=(224, 224), patch_size=(16, 16), **sizes)
    return torchvision.LAYOUT.write(config, vitlib.ViT(config).state_dict()).tensors
