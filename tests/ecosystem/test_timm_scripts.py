"""Scripts written for timm: each runs on timm's model and on vitlib's, of the same weights.

`both` makes the two models, which is the one line of a script that changes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import vitlib
from vitlib.checkpoint.layouts.detect import get_layout

pytestmark = [pytest.mark.ecosystem, pytest.mark.filterwarnings("default")]

MODELS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"dynamic_img_size": True},
    "vit_small_patch14_reg4_dinov2": {"dynamic_img_size": True},
    "vit_base_patch16_clip_224": {"dynamic_img_size": True},
    "deit_tiny_distilled_patch16_224": {},
    "beit_base_patch16_224": {},
    "eva02_tiny_patch14_224": {"dynamic_img_size": True},
    "vit_small_patch16_rope_mixed_224": {"dynamic_img_size": True},
}
everyone = pytest.mark.parametrize("name", MODELS)
Pair = tuple[nn.Module, vitlib.ViT]


@pytest.fixture
def both(tmp_path: Path) -> Callable[..., Pair]:
    """Return a function that makes timm's model of two blocks, and vitlib's of its files."""
    import timm

    def make(name: str) -> Pair:
        torch.manual_seed(0)
        model = timm.create_model(name, depth=3, num_classes=5, **MODELS[name]).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
        path = tmp_path / "config.json"
        config = json.loads(path.read_text())
        config.pop("model_args", None)  # which only state the depth
        path.write_text(json.dumps(config))
        return model, vitlib.load(tmp_path)

    return make


def close(result: Any, expected: Any, bound: float = 1e-4) -> None:
    """Compare tensors, or lists and pairs of them, by the largest value."""
    if isinstance(expected, Tensor):
        assert result.shape == expected.shape
        assert (result - expected).abs().max() <= bound * expected.abs().max()
        return
    assert len(result) == len(expected)
    for a, b in zip(result, expected, strict=True):
        close(a, b, bound)


def images_for(model: nn.Module, count: int = 2) -> Tensor:
    size = model.pretrained_cfg["input_size"]
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(1))


def extract_features(model: nn.Module) -> list[Tensor]:
    """As on the pages of timm's models on the hub."""
    import timm

    data_config = timm.data.resolve_model_data_config(model)
    transforms = timm.data.create_transform(**data_config, is_training=False)
    image = Image.fromarray((torch.rand(300, 260, 3).mul(255)).byte().numpy())
    images = transforms(image).unsqueeze(0)
    output = model.forward_features(images)
    embedding = model.forward_head(output, pre_logits=True)
    logits = model(images)
    top = torch.topk(logits.softmax(dim=1) * 100, k=3)
    model.reset_classifier(0)
    return [images, output, embedding, top.values, model(images)]


@everyone
@torch.no_grad()
def test_feature_extraction(name: str, both: Callable[..., Pair]) -> None:
    results = []
    for model in both(name):
        torch.manual_seed(3)
        results.append(extract_features(model))
    if "distilled" in name:  # without heads, vitlib's gives the class token alone
        close(results[1].pop(), results[1][1][:, 0])
        results[0].pop()
    close(results[1], results[0])


@everyone
@torch.no_grad()
def test_intermediates(name: str, both: Callable[..., Pair]) -> None:
    def script(model: nn.Module) -> Any:
        images = images_for(model)
        maps = model.forward_intermediates(images, indices=[0, 2], intermediates_only=True)
        pairs = model.forward_intermediates(
            images, 1, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True,
            norm=has_norm, stop_early=True,
        )  # fmt: skip
        return maps, pairs

    model, other = both(name)
    # Where the norm is behind a mean, timm's norm=True norms nothing, and vitlib's does.
    has_norm = not isinstance(model.norm, nn.Identity)
    assert has_norm == (name not in ("beit_base_patch16_224", "eva02_tiny_patch14_224"))
    close(script(other), script(model))


@torch.no_grad()
def test_intermediate_layers(both: Callable[..., Pair]) -> None:
    model, other = both("vit_small_patch14_reg4_dinov2")
    images = images_for(model)
    for arguments in ({}, {"n": 2, "norm": True}, {"n": [1], "reshape": True}):
        close(
            other.get_intermediate_layers(images, **arguments),  # type: ignore[arg-type]
            model.get_intermediate_layers(images, **arguments),
        )
    close(
        other.get_intermediate_layers(images, 2, False, True, True),
        model.get_intermediate_layers(images, 2, False, True, True),
    )


@torch.no_grad()
def test_feature_getter_net(both: Callable[..., Pair]) -> None:
    from timm.models._features import FeatureGetterNet

    outputs = []
    for model in both("vit_tiny_patch16_224"):
        images = images_for(model)
        net = FeatureGetterNet(copy.deepcopy(model), out_indices=[0, 1], norm=True)
        assert net.feature_info.channels() == [192, 192]
        assert net.feature_info.reduction() == [16, 16]
        outputs.append(net(images))
        assert len(net.model.blocks) == 2  # it prunes
    close(outputs[1], outputs[0])


class Segmenter(nn.Module):
    """A linear head over maps of three depths."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        info = backbone.feature_info
        self.stride = info[0]["reduction"]
        self.head = nn.Conv2d(sum(entry["num_chs"] for entry in info), 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.backbone.forward_intermediates(
            x, indices=3, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        logits = self.head(torch.cat(maps, dim=1))
        return F.interpolate(logits, scale_factor=self.stride, mode="bilinear")


def test_segmentation_head_trains(both: Callable[..., Pair]) -> None:
    from timm.optim import create_optimizer_v2

    losses = []
    for model in both("vit_tiny_patch16_224"):
        torch.manual_seed(0)
        net = Segmenter(model).train()
        images = images_for(model)[:, :, :64, :96]
        target = (torch.arange(96) // 24).expand(2, 64, 96)  # four columns
        optimizer = create_optimizer_v2(net, opt="adamw", lr=1e-3, weight_decay=0.05)
        steps = []
        for _ in range(5):
            loss = F.cross_entropy(net(images), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps.append(loss.detach())
        losses.append(torch.stack(steps))
        assert losses[-1][-1] < losses[-1][0]
    close(losses[1], losses[0], 1e-3)


def rates(model: nn.Module, rename: Callable[[str], str]) -> dict[str, tuple[float, float]]:
    """Return lr_scale and weight decay of each parameter in groups of timm's factory."""
    from timm.optim import create_optimizer_v2

    optimizer = create_optimizer_v2(
        model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.65
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        rename(names[id(parameter)]): (round(group["lr_scale"], 9), group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@everyone
def test_optimizer_of_timm_has_the_same_groups(name: str, both: Callable[..., Pair]) -> None:
    model, other = both(name)
    layout = get_layout("timm")
    expected = rates(model, lambda name: name)
    expected.pop("rope.freqs", None)  # no pattern of timm's has them, so they are with the head
    result = rates(other, lambda name: layout.file_name(name, other.config))
    missing = {name for name in expected if name not in result}
    assert all("bias" in name or "qkv" in name for name in missing), missing
    result = {name: value for name, value in result.items() if name in expected}
    assert result == {name: expected[name] for name in result}
    assert len(result) > 20
    assert len({scale for scale, _ in result.values()}) >= 4


def test_scheduler_of_timm(both: Callable[..., Pair]) -> None:
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler

    series = []
    for model in both("vit_tiny_patch16_224"):
        optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, layer_decay=0.65)
        scheduler = CosineLRScheduler(optimizer, t_initial=5, warmup_t=2, warmup_lr_init=1e-6)
        seen = set()
        for epoch in range(5):
            scheduler.step(epoch)
            seen |= {round(group["lr"], 12) for group in optimizer.param_groups}
        series.append(seen)
    assert series[0] == series[1]
    # Groups of vitlib have rates that are scaled: a scheduler of timm takes the rate of the head.
    groups = vitlib.parameter_groups(both("vit_tiny_patch16_224")[1], lr=1e-3, layer_decay=0.65)
    for group in groups:
        group["lr"] = 1e-3
    optimizer = torch.optim.AdamW(groups)
    CosineLRScheduler(optimizer, t_initial=5).step(0)
    assert {round(g["lr"] / g["lr_scale"], 12) for g in optimizer.param_groups} == {1e-3}


@pytest.mark.parametrize("name", [name for name in MODELS if "dynamic" in str(MODELS[name])])
@pytest.mark.parametrize(
    "arguments", [{"img_size": (280, 168)}, {"img_size": 336, "patch_size": 28}, {"img_size": None}]
)
@torch.no_grad()
def test_new_input_size(name: str, arguments: dict[str, Any], both: Callable[..., Pair]) -> None:
    model, other = both(name)
    if "rope" in name or "eva02" in name:
        arguments = {"img_size": arguments["img_size"]}
    if "patch16" in name and arguments["img_size"] == (280, 168):
        arguments = {"img_size": (288, 160)}
    for changed in (model, other):
        changed.set_input_size(**arguments)
    images = torch.randn(1, 3, *other.config.image_size)
    assert tuple(model.patch_embed.grid_size) == other.patch_embed.grid_size
    close(other(images), model(images))


def test_other_helpers_of_timm(both: Callable[..., Pair]) -> None:
    from timm.utils import ModelEmaV3
    from timm.utils.model import freeze

    model = both("deit_tiny_distilled_patch16_224")[1].train()
    assert len(model.get_classifier()) == 2  # type: ignore[arg-type]
    model.set_grad_checkpointing(True)
    assert model.gradient_checkpointing
    freeze(model, "patch_embed")
    assert not model.patch_embed.proj.weight.requires_grad
    ema = ModelEmaV3(model, decay=0.5)
    model(images_for(model)).sum().backward()
    with torch.no_grad():
        model.head.weight.mul_(2)
    before = ema.module.head.weight.clone()
    ema.update(model)
    assert not torch.equal(ema.module.head.weight, before)
