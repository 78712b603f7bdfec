"""Classifiers of any name, beside a network or inside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vitlib
from fixtures.layout_files import read_network, weights_path
from fixtures.training_files import (
    HEAD,
    NUM_HEADS,
    TRUNK,
    VIT,
    State,
    add_prefix,
    compute_logits,
    expected_logits,
    save_weights,
)
from vitlib.checkpoint.read import read_checkpoint
from vitlib.source.locate import Source


@pytest.mark.parametrize(
    ("module", "position"),
    [
        (module, position)
        for module in ("classifier", "head", "fc", "linear_head", "heads.head", "linear")
        for position in ("outside", "inside", "next to a part")
    ],
)
def test_load_reads_classifier_of_any_name(module: str, position: str, tmp_path: Path) -> None:
    prefix = {"outside": "", "inside": "lit.backbone.", "next to a part": "lit."}[position]
    head = {f"{prefix}{module}.{name.partition('.')[2]}": t for name, t in HEAD.items()}
    path = save_weights(tmp_path, add_prefix("lit.backbone.") | head)
    assert torch.equal(compute_logits(path), expected_logits(VIT, tmp_path))
    del head[f"{prefix}{module}.bias"]
    unbiased = {**VIT, "head.bias": torch.zeros_like(VIT["head.bias"])}
    path = save_weights(tmp_path, add_prefix("lit.backbone.") | head)
    assert torch.equal(compute_logits(path), expected_logits(unbiased, tmp_path))


@pytest.mark.parametrize(
    "head",
    [
        {"fc.0.weight": torch.ones(5, 16), "fc.0.bias": torch.ones(5)},
        {"linear_head.weight": torch.ones(5, 80), "linear_head.bias": torch.ones(5)},
        {"projector.1.weight": torch.ones(4, 4), "predictor.weight": torch.ones(4, 4)},
        {"fc.weight": torch.ones(5, 16), "classifier.weight": torch.ones(7, 16)},
        {"fc.weight": torch.ones(5, 16, 1)},
    ],
)
def test_read_lists_modules_that_are_no_classifier(head: State, tmp_path: Path) -> None:
    width = TRUNK["cls_token"].shape[-1]
    head = {
        n: torch.ones(t.shape[0], width) if t.shape[1:] == (16,) else t for n, t in head.items()
    }
    for state in (add_prefix("backbone.") | head, add_prefix("", TRUNK) | head):
        checkpoint = read_checkpoint(Source(save_weights(tmp_path, state)))
        assert not checkpoint.problems
        assert checkpoint.model.config.num_classes == 0
        listed = " ".join((*checkpoint.ignored, *checkpoint.notes))
        assert all(name.partition(".")[0] in listed for name in head)
        assert checkpoint.prefix or checkpoint.notes


@pytest.mark.parametrize("module", ["head", "fc"])
@pytest.mark.parametrize("biased", [True, False])
def test_load_ignores_second_classifier_of_same_name(
    module: str, biased: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inner = {f"{module}.weight": HEAD["head.weight"]}
    inner |= {f"{module}.bias": HEAD["head.bias"]} if biased else {}
    outer = {f"{module}.{leaf}": HEAD[f"head.{leaf}"] + 1 for leaf in ("weight", "bias")}
    bias = HEAD["head.bias"] if biased else torch.zeros_like(HEAD["head.bias"])
    path = save_weights(tmp_path, add_prefix("backbone.", TRUNK | inner) | outer)
    assert torch.equal(compute_logits(path), expected_logits({**VIT, "head.bias": bias}, tmp_path))
    assert f"prefix='backbone.'; not loaded: {module} (2 tensors)" in caplog.text


@pytest.mark.parametrize(
    ("names", "family"),
    [
        (("fc.weight", "fc.bias"), "vit"),
        (("fc.0.weight", "fc.2.weight"), "vit"),
        (("fc.fc1.weight", "fc.bn1.weight"), "vit_msn"),
    ],
)
def test_family_is_msn_only_with_its_projection_head(
    names: tuple[str, ...], family: str, tmp_path: Path
) -> None:
    """A classifier of another width comes from training code and tells no family."""
    head = {name: torch.ones(5, 7) for name in names}
    checkpoint = read_checkpoint(Source(save_weights(tmp_path, TRUNK | head)))
    assert (checkpoint.model.config.family, checkpoint.problems) == (family, ())
    assert checkpoint.notes[0].startswith("heads that are left out: fc.")
    assert set(names) <= set(checkpoint.ignored)


@pytest.mark.parametrize("prefix", ["", "backbone."])
@pytest.mark.parametrize(
    ("linear", "rest"), [("head", "head.s"), ("head.fc", "head.bn.weight"), ("fc", "fc.scale")]
)
def test_load_ignores_linear_layer_of_larger_head(
    linear: str, rest: str, prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the batch norm before it or the scale after it, the scores would differ."""
    head = {f"{linear}.{leaf}": HEAD[f"head.{leaf}"] for leaf in ("weight", "bias")}
    path = save_weights(
        tmp_path, add_prefix(prefix) | head | {rest: torch.ones(HEAD["head.weight"].shape[1])}
    )
    assert vitlib.load(path, num_heads=NUM_HEADS).num_classes == 0
    line = caplog.messages[-1]
    assert "left out" in line or "not loaded: head (3 tensors)" in line or "fc (3 tensors)" in line
    assert linear.partition(".")[0] in line


def test_load_warns_of_layers_that_may_precede_the_classifier(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    head = {f"classifier.{leaf}": HEAD[f"head.{leaf}"] for leaf in ("weight", "bias")}
    neck = {"neck.0.weight": torch.ones(3), "neck.0.bias": torch.ones(3)}
    assert vitlib.load(
        save_weights(tmp_path, add_prefix("encoder.") | head | neck), num_heads=NUM_HEADS
    ).num_classes
    warning = "not loaded: neck (2 tensors) (if one of these precedes the head, its scores differ"
    assert warning in caplog.messages[-1]
    caplog.clear()
    projector = {"projector.0.weight": torch.ones(3)}  # a branch of its own
    vitlib.load(
        save_weights(tmp_path, add_prefix("encoder.") | head | projector, "y.pth"),
        num_heads=NUM_HEADS,
    )
    assert "projector" in caplog.text
    assert "precedes" not in caplog.text


def test_read_finds_classifier_in_every_layout(tmp_path: Path) -> None:
    for name in ("torchvision/vit", "meta/dino", "jax/vit"):
        state = read_network(weights_path(name))
        state = {key: t for key, t in state.items() if not key.startswith("head")}
        width = next(
            t for key, t in state.items() if key.endswith(("class_token", "cls_token", "cls"))
        )
        state |= {"linear_head.weight": torch.randn(5, width.shape[-1])}
        checkpoint = read_checkpoint(Source(save_weights(tmp_path, state)))
        if name == "jax/vit":  # JAX kernels are transposed: the layer is ignored
            assert checkpoint.model.config.num_classes == 0
            assert "linear_head.weight" in checkpoint.ignored
        else:
            assert (checkpoint.model.config.num_classes, checkpoint.problems) == (5, ())
            assert not checkpoint.state["head.bias"].any()
