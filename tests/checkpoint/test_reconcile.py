"""Models whose parts were put in by hand: what they are follows from their modules, or is refused.

Each has one change; Predictor, optimize and save take the model as it is then: its own numbers, its
own classes, or one line that says why not.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vitlib
from fixtures import references
from vitlib.checkpoint.reconcile import foreign_parts, reconcile
from vitlib.encoder import Attention
from vitlib.errors import ConfigError
from vitlib.patch_embed import PatchEmbed

RULE = vitlib.ImageProcessor(size=(8, 8))
PHOTO = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
D = 12


def tiny(**fields: Any) -> vitlib.ViT:
    torch.manual_seed(0)
    cfg = vitlib.ViTConfig(
        **{
            "image_size": 8, "patch_size": 4, "embed_dim": D, "depth": 3, "num_heads": 2,
            "num_classes": 3, "labels": ("a", "b", "c"), **fields,
        }
    )  # fmt: skip
    model = vitlib.ViT(cfg).eval()
    model.image_processor, model.loaded_labels = RULE, cfg.labels  # as load() leaves them
    return model


class OwnHead(nn.Module):
    """A head whose modules do not say how many classes it has."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(D, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table


class OwnAttention(Attention):
    """The names of vitlib's attention, other numbers."""

    def split_heads(self, x: Tensor) -> Tensor:
        return super().split_heads(2 * x)


class Named(vitlib.ViT):
    """A subclass that computes as vitlib's."""

    def describe(self) -> str:
        return f"{self.config.depth} blocks"


class Louder(vitlib.ViT):
    def forward(self, images: Tensor) -> Tensor:
        return 2 * super().forward(images)


def part(path: str, module: Callable[[], Any]) -> Callable[[vitlib.ViT], vitlib.ViT]:
    """Put a new module at a path."""

    def change(model: vitlib.ViT) -> vitlib.ViT:
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, module())
        return model

    return change


def fewer_blocks(model: vitlib.ViT) -> vitlib.ViT:
    model.blocks = model.blocks[:2]
    return model


def without_a_block(model: vitlib.ViT) -> vitlib.ViT:
    del model.blocks[1]
    return model


def copy_as_class(kind: type[vitlib.ViT]) -> Callable[[vitlib.ViT], vitlib.ViT]:
    def change(model: vitlib.ViT) -> vitlib.ViT:
        other = kind(model.config).eval()
        other.load_state_dict(model.state_dict())
        other.image_processor = RULE
        return other

    return change


def other_patches() -> PatchEmbed:
    return PatchEmbed(dataclasses.replace(tiny().config, patch_size=(2, 4)))


# change, classes, labels are LABEL_i, what no file holds
CHANGES: dict[str, tuple[Callable[[vitlib.ViT], vitlib.ViT], int, bool, list[str]]] = {
    "linear": (part("head", lambda: nn.Linear(D, 7)), 7, True, []),
    "as many classes": (part("head", lambda: nn.Linear(D, 3)), 3, True, []),
    "no bias": (part("head", lambda: nn.Linear(D, 7, bias=False)), 7, True, []),
    "one class": (part("head", lambda: nn.Linear(D, 1)), 1, True, []),
    "lazy": (part("head", lambda: nn.LazyLinear(4)), 4, True, []),
    "no head": (part("head", nn.Identity), 0, True, []),
    "sequential": (
        part("head", lambda: nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 7), nn.Dropout(0.5))),
        7, True, ["head (Sequential)"],
    ),
    "own head": (part("head", OwnHead), 5, True, ["head (OwnHead)"]),
    "fewer blocks": (fewer_blocks, 3, False, []),
    "a block less": (without_a_block, 3, False, []),
    "no norm": (part("norm", nn.Identity), 3, False, ["norm (Identity)"]),
    "another eps": (part("norm", lambda: nn.LayerNorm(D, 0.1)), 3, False, ["norm (LayerNorm)"]),
    "own attention": (
        part("blocks.0.attn", lambda: OwnAttention(tiny().config)),
        3, False, ["blocks.0.attn (OwnAttention)"],
    ),
    "other patches": (part("patch_embed", other_patches), 3, False, []),
    "subclass": (copy_as_class(Named), 3, False, []),
    "own forward": (copy_as_class(Louder), 3, False, ["the model (Louder)"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_is_taken_as_it_is(name: str, tmp_path: Path) -> None:
    change, classes, renamed, foreign = CHANGES[name]
    model = change(tiny()).eval()
    predictor = vitlib.Predictor(model, RULE)
    pixels = RULE([PHOTO])
    assert predictor.model.num_classes == model.config.num_classes == classes
    assert model.config.depth == len(model.blocks)
    names = tuple(f"LABEL_{i}" for i in range(classes)) if renamed else ("a", "b", "c")
    assert predictor.labels == names
    with torch.inference_mode():
        expected = model(pixels)
        assert references.distance(vitlib.optimize(model)(pixels), expected) < 5e-6
    if classes:
        scores = expected.sigmoid() if classes == 1 else expected.softmax(dim=1)
        assert np.allclose(predictor.probabilities(PHOTO), scores.numpy(), atol=1e-6)
        assert {p.label for p in predictor.classify(PHOTO, top_k=9)[0]} == set(names)
    assert foreign_parts(model) == foreign
    for layout in ("hf", "timm", "meta", "torchvision"):
        if foreign:
            with pytest.raises(ConfigError, match="put in by hand, and no layout describes it"):
                vitlib.save(model, tmp_path / layout, layout=layout)
            assert not (tmp_path / layout).exists()
        elif layout != "torchvision" or name != "other patches":  # whose patches are square
            predictor.model = model
            vitlib.save(model, tmp_path / layout, layout=layout)
            again = vitlib.load(tmp_path / layout)
            assert (again.config.num_classes, again.config.labels) == (
                classes, () if renamed else ("a", "b", "c"),
            )  # fmt: skip
            with torch.inference_mode():
                assert references.distance(again(pixels), expected) < 1e-5


def test_a_head_changed_after_the_first_answer(tmp_path: Path) -> None:
    model = tiny()
    predictor = vitlib.Predictor(model, RULE)
    assert len(predictor.classify(PHOTO, top_k=9)[0]) == 3
    model.head = nn.Linear(D, 7)
    assert len(predictor.classify(PHOTO, top_k=9)[0]) == 7
    model.config = dataclasses.replace(model.config, labels=tuple("ABCDEFG"))
    assert predictor.labels == tuple("ABCDEFG")  # labels set after the head are its own
    predictor.save(tmp_path)
    assert vitlib.Predictor.load(tmp_path).labels == tuple("ABCDEFG")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (part("head", lambda: nn.Linear(D + 1, 7)), "head reads 13 numbers, the model gives it 12"),
        (part("head", lambda: nn.Flatten(0)), r"head gives \(12,\): expected a tensor \(images"),
        (part("head", lambda: None), "head is None: expected a module"),
        (
            part("patch_embed.proj", lambda: nn.Conv2d(3, D, 2, 2)),
            "a patch every 2x2 pixels, patch_embed says 4x4",
        ),
        (
            part("patch_embed.pos_embed", lambda: nn.Parameter(torch.zeros(1, 10, D))),
            "10 positions for 2x2 patches",
        ),
        (
            part("patch_embed.proj", lambda: nn.Conv2d(5, D, 4, 4)),
            "the preprocessing gives 3 channels, the model takes 5",
        ),
    ],
)
def test_parts_that_cannot_work_are_refused(change: Any, expected: str, tmp_path: Path) -> None:
    model = change(tiny())
    with pytest.raises(ConfigError, match=expected):
        vitlib.Predictor(model, RULE)
    with pytest.raises(ConfigError, match=expected):
        vitlib.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["block", "shared", "rotary"])
def test_blocks_and_their_positions_stay_together(kind: str) -> None:
    fields: dict[str, Any] = {"pos_embed": False, "pool": "mean"}
    if kind == "rotary":
        fields |= {"rope": {"theta": 100.0}, "embed_dim": 16}
    else:
        fields |= {"relative_position": kind}
    model, pixels = tiny(**fields), torch.randn(2, 3, 8, 8)
    for table in getattr(model.attn_position, "tables", ()):
        nn.init.normal_(table)
    before = model(pixels)
    model.blocks.append(copy.deepcopy(model.blocks[0]))
    if kind == "block":
        with pytest.raises(ConfigError, match="4 blocks and 3 tables of relative positions"):
            model(pixels)
        tables = [*model.attn_position.tables, copy.deepcopy(model.attn_position.tables[0])]
        model.attn_position.tables = nn.ParameterList(tables)
    assert not torch.equal(model(pixels), before)  # the new block takes part
    with torch.inference_mode():
        assert references.distance(vitlib.optimize(model)(pixels), model(pixels)) < 5e-6


def test_reconcile_leaves_a_stock_model_as_it_is() -> None:
    for model in (tiny(), vitlib.load("demo")):
        before = model.config
        assert reconcile(model) is before
        assert foreign_parts(model) == []


def test_own_parts_cannot_be_given_to_other_processes(tmp_path: Path) -> None:
    from PIL import Image

    from vitlib import batch

    model = CHANGES["own attention"][0](tiny())
    for name in "ab":
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(PHOTO).save(tmp_path / "in" / f"{name}.png")
    predictor = vitlib.Predictor(model, RULE)
    with pytest.raises(ConfigError, match="leave workers= and engine= out"):
        batch.run(tmp_path / "in", model=predictor, out=tmp_path / "two", workers=2)
    done = batch.run(tmp_path / "in", model=predictor, out=tmp_path / "one")
    assert (done.inputs, done.ok) == (2, 2)
