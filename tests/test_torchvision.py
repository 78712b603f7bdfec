"""torchvision's bare files: what their shapes say, and what they cannot say."""

from __future__ import annotations

import pytest

from vitlib.errors import CheckpointError
from vitlib.layouts import torchvision
from vitlib.layouts.facts import Facts
from vitlib.layouts.layout import Reading
from vitlib.layouts.table import Located
from vitlib.preprocess import ImageProcessor

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


def bare(width: int, patch: int, size: int, architecture: str | None = None) -> Reading:
    shapes = {
        "patch_embed.cls_token": (1, 1, width),
        "patch_embed.pos_embed": (1, (size // patch) ** 2 + 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "blocks.0.attn.q.bias": (width,),
        "blocks.0.attn.k.bias": (width,),
        "blocks.0.mlp.fc2.weight": (width, 4 * width),
        "head.weight": (1000, width),
    }
    facts = Facts(architecture=architecture)
    return torchvision.read(lambda _: None, shapes, Located(), facts)


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
            torchvision.preprocessing(cfg, f"{name}.{tag}"),
            torchvision.preprocessing(cfg, name),
        )
    ]
    assert f"resize the shorter edge to {resize} ({mode})" in processors[0].describe()
    if processors[0] != processors[1]:  # the tensors do not say which: it is told, with a remedy
        assert f"architecture='{name}.{tag}' (--architecture)" in notes[0]
    elif len(torchvision.weights_of(cfg)) == 1:
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
