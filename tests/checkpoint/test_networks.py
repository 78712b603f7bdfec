"""Files with prefixes before the names, and files with several networks."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import vitlib
from fixtures.layout_files import read_network, weights_path
from fixtures.training_files import (
    NUM_HEADS,
    OTHER,
    TRUNK,
    VIT,
    State,
    add_prefix,
    compute_logits,
    expected_logits,
    save_weights,
)
from vitlib.checkpoint.layouts.facts import Facts
from vitlib.checkpoint.layouts.networks import find_networks, select_network
from vitlib.checkpoint.read import read_checkpoint
from vitlib.errors import CheckpointError
from vitlib.source.locate import Source

PREFIXES = [
    "backbone.",
    "trunk.",
    "base_encoder.",
    "model.visual.",
    "module.encoder_q.",
    "vit_model.",
    "image_encoder.",
    "net.backbone.0.",
    "timm_model.",
    "module._orig_mod.model.",
    "_orig_mod.",
    "a/b/",
    "x" * 300 + ".",
    "über.modell.",
    "blocks.",
    "1.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_load_removes_any_prefix(prefix: str, tmp_path: Path) -> None:
    path = save_weights(tmp_path, add_prefix(prefix, VIT))
    assert torch.equal(compute_logits(path), expected_logits(VIT, tmp_path))
    path = save_weights(
        tmp_path, {**add_prefix(prefix), "criterion.weight": torch.ones(2)}, "y.pth"
    )
    checkpoint = read_checkpoint(Source(path))
    assert not checkpoint.problems
    assert any(name.startswith("criterion") for name in checkpoint.ignored)


@pytest.mark.parametrize(
    "layout", ["hf", "timm", "meta", "torchvision", "openclip", "jax", "vitlib"]
)
def test_read_removes_prefix_in_every_layout(layout: str, tmp_path: Path) -> None:
    names = {"hf": "vit", "timm": "vit", "meta": "dinov2", "torchvision": "vit"}
    if layout in ("hf", "vitlib"):
        model = vitlib.load(weights_path("timm/vit"))
        vitlib.save(model, tmp_path / "own", layout=layout)
        state = read_network(tmp_path / "own")
    else:
        state = read_network(
            weights_path(f"{layout}/{names.get(layout, 'erf' if layout == 'openclip' else 'vit')}")
        )
    facts = Facts(num_heads=2 if layout == "hf" else None)  # this width is not published
    bare = read_checkpoint(Source(save_weights(tmp_path, state, "bare.pth")), facts=facts)
    checkpoint = read_checkpoint(
        Source(save_weights(tmp_path, add_prefix("lit.net_0.", state), "prefixed.pth")), facts=facts
    )
    assert (checkpoint.layout.name, checkpoint.model.config) == (layout, bare.model.config)
    assert (bare.prefix, checkpoint.prefix) == ("", "lit.net_0.")
    assert not checkpoint.problems
    assert all(torch.equal(checkpoint.state[name], bare.state[name]) for name in bare.state)


def test_load_rejects_positions_of_two_dimensions(tmp_path: Path) -> None:
    flat = {**VIT, "pos_embed": VIT["pos_embed"][0]}
    rows, width = flat["pos_embed"].shape
    with pytest.raises(CheckpointError, match=f"are {rows}x{width}: expected 1 x tokens x {width}"):
        vitlib.load(save_weights(tmp_path, flat), num_heads=NUM_HEADS)


SEVERAL_NETWORKS: dict[str, tuple[State, dict[str, int]]] = {
    "MoCo v3": (
        {
            **add_prefix("module.base_encoder."),
            **add_prefix("module.momentum_encoder.", OTHER),
            "module.base_encoder.head.0.weight": torch.ones(8, 4),
            "module.predictor.0.weight": torch.ones(8, 8),
        },
        {"module.base_encoder.": len(TRUNK) + 1, "module.momentum_encoder.": len(OTHER)},
    ),
    "an EMA copy": (
        {**add_prefix("model."), **add_prefix("ema_model.", OTHER)},
        {"model.": len(TRUNK), "ema_model.": len(OTHER)},
    ),
    "two towers": (
        {**add_prefix("rgb."), **add_prefix("depth.", OTHER)},
        {"rgb.": len(TRUNK), "depth.": len(OTHER)},
    ),
    "a copy inside": ({**TRUNK, **add_prefix("ema.", OTHER)}, {"": len(TRUNK), "ema.": len(OTHER)}),
}


@pytest.mark.parametrize("name", SEVERAL_NETWORKS)
def test_load_lists_networks_and_takes_a_prefix(name: str, tmp_path: Path) -> None:
    state, counts = SEVERAL_NETWORKS[name]
    path = save_weights(tmp_path, {"state_dict": state, "epoch": 3})
    with pytest.raises(CheckpointError) as error:
        vitlib.load(path)
    for prefix, count in counts.items():
        assert f"{prefix!r} ({count} tensors)" in str(error.value)
    remedy = re.search(r"prefix='([^']*)' \(on the command line --prefix\)", str(error.value))
    assert remedy is not None
    assert remedy[1] in counts
    for prefix in counts:
        first = OTHER if "momentum" in prefix or "ema" in prefix or "depth" in prefix else TRUNK
        assert torch.equal(compute_logits(path, prefix=prefix), expected_logits(first, tmp_path))
        if prefix:
            short = prefix.removesuffix(".")
            assert torch.equal(compute_logits(path, prefix=short), expected_logits(first, tmp_path))
    with pytest.raises(CheckpointError, match=r"no tensor's name begins with prefix='no\.'"):
        vitlib.load(path, prefix="no.")


DECIDED_BY_CODE: dict[str, tuple[Any, State, str, State]] = {
    "DINO": (
        {
            "student": add_prefix("module.backbone.", OTHER)
            | {"module.head.mlp.0.weight": torch.ones(2)},
            "teacher": add_prefix("backbone.") | {"head.mlp.0.weight": torch.ones(2)},
            "epoch": 3,
        },
        TRUNK,
        "student.",
        OTHER,
    ),
    "DINOv2": (
        {"model": add_prefix("student.backbone.", OTHER) | add_prefix("teacher.backbone.")},
        TRUNK,
        "student.backbone.",
        OTHER,
    ),
    "timm": ({"state_dict": VIT, "state_dict_ema": OTHER}, VIT, "state_dict_ema.", OTHER),
    "DeiT": ({"model": VIT, "model_ema": OTHER, "args": None}, VIT, "model_ema.", OTHER),
    "EMA of DDP": ({"model": VIT, "ema": add_prefix("module.", OTHER)}, VIT, "ema.", OTHER),
    "Lightning": (
        {
            "state_dict": add_prefix("model.", VIT),
            "callbacks": {"EMA": {"decay": 0.9, "ema_state_dict": add_prefix("model.", OTHER)}},
            "hyper_parameters": {"lr": 0.1},
        },
        VIT,
        "callbacks.EMA.ema_state_dict.",
        OTHER,
    ),
    "solo-learn": (
        {"state_dict": add_prefix("backbone.") | add_prefix("momentum_backbone.", OTHER)},
        TRUNK,
        "momentum_backbone.",
        OTHER,
    ),
}


@pytest.mark.parametrize("name", DECIDED_BY_CODE)
def test_load_chooses_network_by_training_code(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state, first, prefix, other = DECIDED_BY_CODE[name]
    path = save_weights(tmp_path, state)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(compute_logits(path), expected_logits(first, tmp_path))
    warning = next(r.getMessage() for r in caplog.records if "not loaded" in r.getMessage())
    if prefix in warning:
        assert f"prefix='{prefix}'" in warning
    else:
        assert prefix.rstrip(".") in warning
    assert torch.equal(compute_logits(path, prefix=prefix), expected_logits(other, tmp_path))


def test_read_takes_trunk_of_conch(tmp_path: Path) -> None:
    state = add_prefix("visual.trunk.") | {
        "visual.attn_pool_contrast.query": torch.ones(1, 8),
        "visual.ln_contrast.weight": torch.ones(8),
        "visual.proj_contrast": torch.ones(8, 8),
        "text.transformer.resblocks.0.ln_1.weight": torch.ones(8),
        "logit_scale": torch.ones(()),
    }
    path = save_weights(tmp_path, state)
    assert torch.equal(compute_logits(path), expected_logits(TRUNK, tmp_path))
    checkpoint = read_checkpoint(Source(path))
    assert (checkpoint.layout.name, checkpoint.prefix) == ("timm", "visual.trunk.")
    assert "visual.attn_pool_contrast (1 tensor)" in checkpoint.ignored


def test_read_takes_hugging_face_model_in_lightning(tmp_path: Path) -> None:
    model = vitlib.load(weights_path("timm/vit"))
    vitlib.save(model, tmp_path / "hf", layout="hf")
    state = read_network(tmp_path / "hf")
    path = save_weights(
        tmp_path, {"state_dict": add_prefix("model.", state), "loops": {}}, "last.ckpt"
    )
    checkpoint = read_checkpoint(Source(path), facts=Facts(num_heads=2))
    assert (checkpoint.layout.name, checkpoint.prefix, checkpoint.problems) == ("hf", "model.", ())
    assert checkpoint.model.config.num_classes == model.config.num_classes
    bin_file = save_weights(tmp_path / "hf", add_prefix("module.", state), "pytorch_model.bin")
    (tmp_path / "hf" / "model.safetensors").unlink()
    assert bin_file.exists()
    assert (
        read_checkpoint(Source(tmp_path / "hf")).model.config == vitlib.load(tmp_path / "hf").config
    )


def test_select_network_is_fast_for_many_names() -> None:
    tensor = torch.zeros(1)
    hostile = {
        "many networks": [
            f"n{i}.{leaf}"
            for i in range(5_000)
            for leaf in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight")
        ],
        "many parts": ["a." * 500 + f"{i}" for i in range(500)],
        "deep": [f"{'blocks.' * 40}{i}" for i in range(1_000)],
        "one network": [*add_prefix("x."), *(f"x.blocks.0.{i}.w" for i in range(5_000))],
    }
    for name, names in hostile.items():
        tensors = dict.fromkeys(names, tensor) | {
            n: t for n, t in add_prefix("x.").items() if n in names
        }
        start = time.process_time()
        if name == "many networks":
            with pytest.raises(CheckpointError) as error:
                select_network(tensors)
            assert len(str(error.value)) < 1500
        else:
            select_network(tensors)
        assert time.process_time() - start < 3, name
    assert len(find_networks(hostile["many networks"])) == 5_000
