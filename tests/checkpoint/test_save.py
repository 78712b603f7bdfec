"""Save a model: what a layout cannot hold, and who may read the files."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf

import vitlib
from fixtures import references
from vitlib.errors import ConfigError, SourceError


def test_save_refuses_unsupported_model(tmp_path: Path) -> None:
    small = vitlib.ViTConfig(
        image_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=3
    )
    for changes, message in (
        ({"pool": "mean"}, "pool='mean'"),
        ({"num_registers": 2}, "num_registers=2"),
        ({"activation": "swiglu"}, "activation='swiglu'"),
        ({"rope": {"theta": 100.0}, "pos_embed": False}, "rope=Rope"),
        ({"final_norm": "none"}, "final_norm='none'"),
        ({"pre_norm": True}, "pre_norm=True"),
        ({"family": "dinov2", "position_resize": "bicubic_fp32"}, "layer_scale=None"),
        ({"family": "swin"}, "family='swin'"),
    ):
        with pytest.raises(ConfigError, match=message):
            vitlib.save(vitlib.ViT(replace(small, **changes)), tmp_path / "no")
    assert not (tmp_path / "no").exists()
    with pytest.raises(ConfigError, match="layout='tf'"):
        vitlib.save(vitlib.ViT(small), tmp_path / "no", layout="tf")
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="cannot be written"):
        vitlib.save(vitlib.ViT(small), tmp_path / "file")


def test_save_logs_lost_fields(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = vitlib.ViTConfig(
        image_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=3
    )
    lost = vitlib.save(vitlib.ViT(replace(small, position_resize="bilinear")), tmp_path / "a")
    assert lost == {"position_resize": ("bilinear", "bicubic")}
    assert "cannot hold: position_resize bilinear becomes bicubic" in caplog.text
    assert vitlib.save(vitlib.ViT(small), tmp_path / "b") == {}
    gains = replace(small, layer_scale=0.1)  # ViT has no gains there: it becomes a DINOv2
    assert "position_resize" in vitlib.save(vitlib.ViT(gains), tmp_path / "c")
    assert vitlib.load(tmp_path / "c").config.family == "dinov2"


def test_save_refuses_folder_with_other_weights(vit: Path, tmp_path: Path) -> None:
    model = vitlib.load(vit)
    vitlib.save(model, tmp_path / "both")
    with pytest.raises(SourceError, match=r"holds model\.safetensors of another checkpoint"):
        vitlib.save(model, tmp_path / "both", layout="torchvision")


@pytest.mark.parametrize("layout", ["hf", "torchvision"])
def test_saved_files_follow_umask(layout: str, tmp_path: Path) -> None:
    config = vitlib.ViTConfig.named("Ti/16", image_size=32, num_classes=3)
    for umask in (0o022, 0o077):
        before = os.umask(umask)
        try:
            vitlib.save(vitlib.ViT(config), tmp_path / str(umask), layout=layout)
        finally:
            os.umask(before)
        files = list((tmp_path / str(umask)).iterdir())
        assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}


def test_new_model_opens_in_transformers(tmp_path: Path) -> None:
    config = vitlib.ViTConfig.named("Ti/16", image_size=64, num_classes=3)
    model = vitlib.ViT(replace(config, labels=("a", "b", "c"))).eval()
    vitlib.save(model, tmp_path)
    opened = hf.ViTForImageClassification.from_pretrained(tmp_path).eval()
    assert opened.config.id2label == {0: "a", 1: "b", 2: "c"}
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert references.distance(model(images), opened(images).logits) < 2e-6
