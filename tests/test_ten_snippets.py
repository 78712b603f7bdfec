"""The ten lines that researchers write most often, each as short as a user would have it.

The list is of ../shared/reference/user-asks.md, section "Ten snippets". A snippet here is what a
user types; `setup` makes the names that it takes for granted. A test compares the number of its
lines with that of the list, where the list is there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vitlib
from paths import SHARED

SNIPPETS = {
    1: """
logits, at = model.trace(pixels, ["blocks.3.attn.q", "blocks.11.attn.out", "blocks.*.resid"])
q = at["blocks.3.attn.q"]
""",
    2: """
keys = model.facets(pixels, layer=9, what="key", grid=True)
""",
    3: """
logits, _ = model.trace(pixels, edit={"blocks.5.attn.heads": lambda z: z * keep[None, :, None, None]})
""",  # noqa: E501
    4: """
clean = model.trace(a, ["blocks.7.resid"])[1]
logits, _ = model.trace(b, edit={"blocks.7.resid": lambda x: torch.where(mask, clean["blocks.7.resid"], x)})
""",  # noqa: E501
    5: """
model = model.with_attention(my_attention, blocks=range(6, 12))
""",
    6: """
model = model.with_tokens(vitlib.tokens.merge(r=8))
patches = model.forward_tokens(pixels).unmerge()
""",
    7: """
model = vitlib.adapt(model, prompts=10, adapters=dict(dim=64), lora=dict(rank=8, on="qv"))
vitlib.save_delta(model, "delta.safetensors")
""",
    8: """
out = model.packed([img1, img2, img3])
""",
    9: """
vitlib.testing.assert_same(my_vit, model, pixels, atol=1e-5)
""",
    10: """
groups = vitlib.parameter_groups(model, layer_decay=.75, freeze="patch_embed,blocks[:4]")
""",
}


def my_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q * 20, k, v, bias)


def setup() -> dict[str, Any]:
    torch.manual_seed(0)
    config = vitlib.ViTConfig(
        image_size=48, patch_size=8, embed_dim=64, depth=12, num_heads=4, num_classes=7
    )
    model = vitlib.ViT(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pixels = torch.randn(2, 3, 48, 48)
    mask = torch.zeros(37, 1, dtype=torch.bool)
    mask[0] = True
    images = {f"img{i}": torch.randn(3, 8 * i + 16, 40) for i in (1, 2, 3)}
    names = {"torch": torch, "vitlib": vitlib, "model": model, "base": model, "pixels": pixels}
    names |= {"a": pixels[:1], "b": pixels[1:], "mask": mask, "my_attention": my_attention}
    names |= {"keep": torch.tensor([1.0, 0.0, 1.0, 1.0]), "my_vit": model}
    return names | images | {"logits": model(pixels)}


def run(number: int) -> dict[str, Any]:
    names = setup()
    with torch.no_grad():
        exec(compile(SNIPPETS[number], f"snippet {number}", "exec"), names)
    return names


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def test_snippets_are_as_short_as_those_of_the_list() -> None:
    page = SHARED / "reference/user-asks.md"
    if not page.exists():
        pytest.skip(f"{page} is absent")
    code = page.read_text().split("## Ten snippets")[1].split("```python\n")[1].split("```")[0]
    parts = re.split(r"^# (?=\d+ )", code, flags=re.MULTILINE)[1:]
    assert len(parts) == len(SNIPPETS)
    for part in parts:
        number, lines = int(part.split()[0]), part.strip().splitlines()[1:]
        lines = [line for line in lines if not line.startswith("#")]
        mine = SNIPPETS[number].strip().splitlines()
        assert len(mine) <= len(lines), number


def test_read_outs_by_name() -> None:
    names = run(1)
    assert names["q"].shape == (2, 4, 37, 16)
    assert len(names["at"]) == 2 + 12
    assert distance(names["logits"], names["model"](names["pixels"])) < 2e-6


def test_facets_as_maps() -> None:
    assert run(2)["keys"].shape == (2, 6, 6, 64)


@pytest.mark.parametrize("number", [3, 4, 5])
def test_edits_and_own_attention_change_the_logits(number: int) -> None:
    names = run(number)
    logits = names["logits"] if number < 5 else names["model"](names["pixels"])
    exact = names["base"](names["pixels"])
    exact = exact[1:] if number == 4 else exact
    assert logits.shape == exact.shape
    assert distance(logits, exact) > 1e-3


def test_fewer_tokens_and_back_on_the_grid() -> None:
    assert run(6)["patches"].shape == (2, 6, 6, 64)


def test_adapters_and_prompts_without_a_subclass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(7)
    again = vitlib.load_delta(names["base"], "delta.safetensors")
    assert torch.equal(again(names["pixels"]), names["model"](names["pixels"]))
    size = (tmp_path / "delta.safetensors").stat().st_size
    assert size < sum(p.nbytes for p in names["base"].parameters())


def test_images_of_many_shapes_in_one_batch() -> None:
    names = run(8)
    for index, tokens in enumerate(names["out"].split()):
        alone = names["model"].forward_features(names[f"img{index + 1}"][None])[0]
        assert distance(tokens, alone) < 2e-6


def test_parity_in_ones_own_test() -> None:
    run(9)


def test_parameter_groups_in_a_line() -> None:
    names = run(10)
    trained = {name for group in names["groups"] for name in group["names"]}
    assert not any(name.startswith(("patch_embed", "blocks.3.")) for name in trained)
    assert "blocks.4.attn.q.weight" in trained
