"""Parameter groups: rates that fall with depth, no decay of vectors, frozen parts, the table."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import vitlib
from fixtures.families import FAMILIES, pixels, tiny
from vitlib.errors import ConfigError
from vitlib.train.optim import create_optimizer
from vitlib.train.settings import Optimizer


def by_name(groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: group for group in groups for name in group["names"]}


def test_each_parameter_is_in_one_group_under_its_name() -> None:
    model = tiny("dinov2_registers", depth=3)
    groups = vitlib.parameter_groups(model)
    pairs = [pair for g in groups for pair in zip(g["names"], g["params"], strict=True)]
    assert len(pairs) == len(dict(pairs))
    named = dict(model.named_parameters())
    assert {name: id(p) for name, p in pairs} == {name: id(p) for name, p in named.items()}


def test_rate_falls_by_a_factor_with_each_layer() -> None:
    groups = by_name(vitlib.parameter_groups(tiny("vit", depth=3), lr=0.1, layer_decay=0.5))
    scales = {
        "head.weight": 1.0,
        "norm.bias": 1.0,
        "blocks.2.attn.q.weight": 0.5,
        "blocks.1.mlp.fc1.bias": 0.25,
        "blocks.0.norm1.weight": 0.125,
        "patch_embed.proj.weight": 0.0625,
        "patch_embed.pos_embed": 0.0625,
    }
    for name, scale in scales.items():
        assert groups[name]["lr_scale"] == scale, name
        assert groups[name]["lr"] == 0.1 * scale, name


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_alone_decay(family: str) -> None:
    model = tiny(family, depth=2)
    groups = by_name(vitlib.parameter_groups(model, weight_decay=0.3))
    kinds = ("attn.", "attn_pool.", "mlp.", "head", "proj", "pooler")
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = name.endswith(".weight") and any(kind in name for kind in kinds)
        is_matrix = layer and parameter.ndim > 1
        assert groups[name]["weight_decay"] == (0.3 if is_matrix else 0.0), name


def test_tables_of_positions_do_not_decay() -> None:
    groups = by_name(vitlib.parameter_groups(tiny("beit", depth=2)))
    assert groups["attn_position.tables.1"]["weight_decay"] == 0.0


@pytest.mark.parametrize(
    ("freeze", "frozen"),
    [
        ("", []),
        ("patch_embed, blocks[:2]", ["patch_embed.", "blocks.0.", "blocks.1."]),
        ("blocks[-1]", ["blocks.3."]),
        ("blocks[1:-1]", ["blocks.1.", "blocks.2."]),
        ("blocks[2:].attn.q,norm.weight", ["blocks.2.attn.q.", "blocks.3.attn.q.", "norm.weight"]),
        ("blocks.0.mlp", ["blocks.0.mlp."]),
        ("blocks", ["blocks."]),
        ("blocks[:0]", []),
        ("patch_embed.cls_token", ["patch_embed.cls_token"]),
    ],
)
def test_frozen_names_do_not_train(freeze: str, frozen: list[str]) -> None:
    model = tiny("vit", depth=4)
    groups = vitlib.parameter_groups(model, freeze=freeze)
    expected = {n for n, _ in model.named_parameters() if n.startswith(tuple(frozen))}
    assert expected == {n for n, p in model.named_parameters() if not p.requires_grad}
    assert not expected & by_name(groups).keys()
    assert groups.num_frozen == sum(p.numel() for n, p in model.named_parameters() if n in expected)


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        ("patch_embd", "expected one of patch_embed, blocks, norm, head; did you mean"),
        ("blocks[2].atn", "expected one of norm1, attn, norm2, mlp; did you mean 'attn'"),
        ("blocks[4]", "blocks has entries 0 to 3"),
        ("blocks[:5]", "blocks has entries 0 to 3"),
        ("blocks[-5:]", "blocks has entries 0 to 3"),
        (
            "blocks[3:1]",
            "the slice ends before it starts: expected [start:stop], such as blocks[1:3]",
        ),
        ("pos_embed", "norm, head; did you mean 'patch_embed.pos_embed'?"),
        ("blocks[]", "blocks has entries 0 to 3"),
        ("blocks.attn", "expected one of 0 to 3"),
        ("norm[0]", "norm is no list"),
        ("blocks[a]", "expected a name, or a list's index or slice"),
        ("blocks[::2]", "expected a name, or a list's index or slice"),
        (["norm"], "expected names, such as"),
        ("patch_embed,blocks,norm,head", "nothing is left to train"),
    ],
)
def test_wrong_names_are_explained(freeze: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        vitlib.parameter_groups(tiny("vit", depth=4), freeze=freeze)
    assert "\n" not in str(caught.value)


def test_empty_slice_freezes_nothing() -> None:
    model = tiny("vit", depth=4)
    assert vitlib.parameter_groups(model, freeze="blocks[:0]").num_frozen == 0


def test_wrong_name_freezes_nothing() -> None:
    model = tiny("vit")
    with pytest.raises(ConfigError, match="no module 'hed'"):
        vitlib.parameter_groups(model, freeze="patch_embed,hed")
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "values",
    [{"lr": -1.0}, {"lr": "1e-3"}, {"weight_decay": -0.1}, {"layer_decay": 0}, {"layer_decay": 2}],
)
def test_wrong_numbers_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(values))}=.*expected a number"):
        vitlib.parameter_groups(tiny("vit"), **values)


def test_other_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="parameter_groups of a Linear: expected a ViT"):
        vitlib.parameter_groups(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_table_has_a_row_for_each_group_and_for_the_frozen() -> None:
    model = tiny("vit", depth=3)
    groups = vitlib.parameter_groups(
        model, lr=1e-3, layer_decay=0.5, freeze="patch_embed,blocks[0]"
    )
    lines = str(groups).splitlines()
    assert repr(groups) == str(groups)
    assert lines[0].split() == ["layer", "lr", "lr_scale", "weight_decay", "parameters", "names"]
    assert [line.split()[0] for line in lines[1:]] == [
        *("blocks.1", "blocks.1", "blocks.2", "blocks.2", "head", "head", "frozen")
    ]
    matrix = lines[2].split()
    assert matrix[1:4] == ["0.00025", "0.25", "0.05"]
    counted = sum(int(line.split()[4].replace(",", "")) for line in lines[1:-1])
    counted += int(lines[-1].split()[1].replace(",", ""))
    assert counted == sum(p.numel() for p in model.parameters())
    assert "attn.q.weight" in lines[2]
    assert "… 3 more" in lines[2]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_optimizers_and_schedulers_of_torch_take_them(kind: type[torch.optim.Optimizer]) -> None:
    model = tiny("vit", depth=2).train()
    groups = vitlib.parameter_groups(model, lr=0.1, layer_decay=0.5, freeze="blocks[0]")
    optimizer = kind(groups, lr=7.0)  # a group's own rate counts
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(pixels(2)).square().sum().backward()
    optimizer.step()
    scheduler.step()
    rates = {group["names"][0]: group["lr"] for group in optimizer.param_groups}
    assert rates["head.weight"] == 0.05
    assert rates["blocks.1.attn.q.weight"] == 0.025
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert "head.weight" in moved
    assert "patch_embed.proj.weight" in moved
    assert not any(name.startswith("blocks.0.") for name in moved)


def test_finetune_has_the_same_groups() -> None:
    settings = Optimizer(learning_rate=0.2, weight_decay=0.1, layer_decay=0.5)
    model = tiny("dinov3", depth=2)
    expected = vitlib.parameter_groups(model, lr=0.2, weight_decay=0.1, layer_decay=0.5)
    groups = create_optimizer(model, settings).param_groups
    keys = ("names", "lr", "lr_scale", "weight_decay")
    assert [[g[key] for key in keys] for g in groups] == [
        [g[key] for key in keys] for g in expected
    ]
