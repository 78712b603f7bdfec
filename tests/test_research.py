"""Tests that the snippets of docs/research.md run, and do what the page says."""

from __future__ import annotations

import os
import random
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import vitlib
from paths import ROOT
from vitlib.train.settings import Tuning

PAGE = (ROOT / "docs/research.md").read_text(encoding="utf-8")
SECTIONS = {
    part.split("\n", 1)[0].strip("# "): re.findall(r"```python\n(.*?)```", part, flags=re.DOTALL)
    for part in re.split(r"^(?=#{1,2} )", PAGE, flags=re.MULTILINE)
    if part
}
SETUP = "vitlib in research code"
# torch's own modules warn of themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
]


def run(title: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the first snippet of the page and those of a section; return their names."""
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    snippets = SECTIONS[SETUP] + SECTIONS[title]
    assert snippets[1:]
    for code in snippets:
        package = re.search(r"^import (peft)$", code, flags=re.MULTILINE)
        if package:
            pytest.importorskip(package[1], reason=f"the snippet needs pip install {package[1]}")
        exec(compile(code, f"research.md: {title}", "exec"), names)
    names["logits"] = names["vit"].model(names["pixels"])
    return names


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b).abs().max() / b.abs().max()).detach())


def test_every_snippet_has_a_test() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    for title, snippets in SECTIONS.items():
        assert not snippets or f'"{title}"' in text, title


def test_names_of_modules_exist() -> None:
    model = vitlib.load("demo")
    table = PAGE.split("## The names of modules")[1].split("##")[0]
    names = re.findall(r"`([\w.]+)`", "".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)))
    assert len(names) == 14 - 1
    prefix = ""
    for name in names:
        prefix = name.rpartition(".")[0] if not name.startswith(".") else prefix
        path = (prefix + name if name.startswith(".") else name).replace("N", "0")
        model.get_submodule(path)
    assert not any(type(module) is torch.nn.Linear for module in model.modules())


def test_lora_of_peft_trains_adapters_and_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("LoRA with PEFT", monkeypatch)
    trained = {n for n, p in names["adapted"].named_parameters() if p.grad is not None}
    assert trained
    assert all("lora_" in n or ".head." in n for n in trained)
    assert isinstance(names["merged"], vitlib.ViT)
    assert distance(names["merged"](names["pixels"]), names["logits"]) < 1e-5


def test_lora_option_of_page_exists() -> None:
    assert "--lora-r 8" in PAGE
    assert "lora_r" in Tuning.__dataclass_fields__


def test_block_of_ones_own_runs_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = run("A block of your own", monkeypatch)
    model, pixels = names["replaced"], names["pixels"]
    model.blocks[5] = names["TokensOnly"](torch.nn.Identity())  # the last one, with num_queries
    with torch.inference_mode():
        logits = model(pixels)
        assert distance(model.forward_head(model.forward_features(pixels)), logits) < 1e-6
        fast = vitlib.optimize(model)
        assert distance(fast(pixels), logits) < 1e-5
    assert "blocks.2" in fast.unoptimized_modules
    with pytest.raises(vitlib.VitlibError, match=r"blocks\.2"):
        vitlib.save(model, tmp_path / "out")


def test_prompts_are_the_only_new_tensor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = run("Visual prompts", monkeypatch)
    model = names["prompted"].eval()
    assert names["missing"] == ["patch_embed.reg_token"]
    assert names["tokens"].shape == (1, 1 + 10 + 49, 96)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained == ["patch_embed.reg_token", "head.weight", "head.bias"]
    vitlib.save(model, tmp_path, layout="timm")
    opened = vitlib.load(tmp_path)
    assert distance(opened(names["pixels"]), model(names["pixels"])) < 1e-6


def test_added_parts_are_saved_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    title = "Prompts, adapters and LoRA, saved alone"
    paths = {'"delta.safetensors"': str(tmp_path / "delta"), '"merged"': str(tmp_path / "merged")}
    snippets = SECTIONS[title]
    for name, path in paths.items():
        snippets = [code.replace(name, repr(path)) for code in snippets]
    monkeypatch.setitem(SECTIONS, title, snippets)
    names = run(title, monkeypatch)
    adapted, again, pixels = names["adapted"], names["again"], names["pixels"]
    assert all(p.grad is not None for p in names["trained"])
    assert all(p.grad is None for p in names["model"].parameters())
    with torch.no_grad():
        assert torch.equal(again(pixels), adapted(pixels))
    assert (tmp_path / "delta").stat().st_size < 1_000_000
    assert distance(vitlib.load(tmp_path / "merged")(pixels), names["logits"]) < 1e-6


def test_pruned_model_equals_model_with_zeroed_head(monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("Fewer blocks, fewer heads", monkeypatch)
    pixels, pruned, model = names["pixels"], names["pruned"], names["model"]
    assert len(names["short"].blocks) == 4
    assert distance(names["fast"](pixels), names["short"](pixels)) < 1e-5
    assert distance(names["short"](pixels), names["logits"]) > 1e-2
    removed = pruned(pixels)
    width = model.blocks[0].attn.head_dim
    with torch.no_grad():
        model.blocks[0].attn.proj.weight[:, width : 2 * width] = 0
    assert distance(removed, model(pixels)) < 1e-6
    assert distance(removed, names["logits"]) > 1e-3
    assert distance(vitlib.optimize(pruned)(pixels), removed) < 1e-5
    with pytest.raises(vitlib.VitlibError, match=r"blocks\.0\.attn .*torch\.save"):
        vitlib.save(pruned, "never-written")


def test_own_attention_replaces_that_of_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("the snippet of FlexAttention is compiled, which needs a C++ compiler")
    names = run("Attention of your own", monkeypatch)
    pixels, changed = names["pixels"], names["changed"]
    assert changed(pixels).shape == names["logits"].shape
    assert distance(changed(pixels), names["logits"]) > 1e-3
    fast = vitlib.optimize(changed)
    assert fast.unoptimized_modules
    assert distance(fast(pixels), changed(pixels)) < 1e-5
    model = names["model"]
    for other in (names["local"], names["flexible"]):
        with torch.no_grad():  # FlexAttention has no gradients on a CPU
            assert distance(other(pixels), names["logits"]) > 1e-3
        assert next(other.parameters()) is next(model.parameters())
    # With as many tokens as there are, it is the model's own attention.
    wide = SECTIONS["Attention of your own"][-1].replace("topk(8,", "topk(50,")
    exec(compile(wide, "research.md", "exec"), names)
    assert distance(names["changed"](pixels), names["logits"]) < 1e-5


def test_images_of_many_shapes_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("Batches of many shapes", monkeypatch)
    model, images, out = names["model"], names["images"], names["out"]
    assert out.grids == ((7, 7), (7, 14), (10, 7))
    assert [len(tokens) for tokens in (names["square"], names["wide"], names["tall"])] == [
        1 + h * w for h, w in out.grids
    ]
    expected = torch.cat([model(image[None]) for image in images])
    for logits in (out.logits, names["fast_logits"]):
        assert distance(logits, expected) < 5e-6
    packed = model.packed(images, tokens=False).logits
    assert distance(packed, expected) < 5e-6
    assert model.blocks[0].attn.q.weight.grad.abs().max() > 0


def test_points_are_read_and_edited(monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("Points: tensors of a forward by name", monkeypatch)
    model, pixels, logits = names["model"], names["pixels"], names["logits"]
    assert names["queries"].shape == (1, 4, 50, 24)
    for name in ("ablated", "patched", "blind"):
        assert distance(names[name], logits) > 1e-3, name
    assert len(names["lens"]) == 6
    assert distance(names["lens"][-1], logits.softmax(1)) < 1e-5
    assert names["keys"].shape == (1, 7, 7, 96)
    for point in model.trace(pixels, ["*"])[1]:
        kind = point.split(".", 2)[-1] if point.startswith("blocks.") else point
        assert f"`{kind}`" in PAGE or f".{kind.split('.')[-1]}`" in PAGE, point


def test_tokens_become_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("Fewer tokens", monkeypatch)
    pixels, exact = names["pixels"], names["logits"]
    assert names["out"].tokens.shape == (1, 50 - 6 * 4, 96)
    assert names["patches"].shape == (1, 7, 7, 96)
    for name in ("fewer", "dropped", "half"):
        assert distance(names[name](pixels), exact) > 1e-4
        assert names[name](pixels).argmax() == exact.argmax()
    assert distance(names["fast_fewer"](pixels), names["fewer"](pixels)) < 1e-5
    for fact in ("index", "depth", "queries", "keys", "scale", "sizes", "num_prefix_tokens"):
        assert f"`block.{fact}`" in PAGE


def test_own_loop_trains_what_the_table_shows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run("Training by your own loop", monkeypatch)
    section = PAGE.split("## Training by your own loop")[1].split("\n## ")[0]
    (table,) = re.findall(r"```text\n(.*?)```", section, flags=re.DOTALL)
    assert table == capsys.readouterr().out
    first = torch.nn.functional.cross_entropy(names["logits"], names["labels"])
    assert names["loss"] < first
    state, before = names["trained"].state_dict(), names["model"].state_dict()
    moved = {name for name in state if not torch.equal(state[name], before[name])}
    frozen = ("patch_embed.", *(f"blocks.{index}." for index in range(4)))
    # Softmax does not see the bias of keys, whose gradient is rounding.
    assert {n for n in state if not n.startswith(frozen) and "k.bias" not in n} <= moved
    assert not any(name.startswith(frozen) for name in moved)
    assert max(group["lr"] for group in names["optimizer"].param_groups) < 1e-9


def test_step_may_have_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    random.seed(0)
    names = run("Photos of random sizes", monkeypatch)
    assert len(set(names["sizes"])) > 1
    assert names["trained"].patch_embed.pos_embed.grad.any()
    model = names["model"]
    model.set_input_size(56)
    loaded = vitlib.load("demo", image_size=56)
    images = torch.randn(1, 3, 56, 56)
    assert distance(model(images), loaded(images)) < 1e-6


def test_new_channels_train_at_the_rate_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("More channels", monkeypatch)
    kernel = names["bands"].patch_embed.proj.weight
    old = names["model"].patch_embed.proj.weight
    assert kernel.shape[1] == 5
    assert kernel[:, 3].any()  # it began as zeros
    assert not torch.equal(kernel[:, 4], old[:, 0])
    rates = {g["names"][0].split(".")[0]: g["lr"] for g in names["optimizer"].param_groups}
    assert rates["patch_embed"] == 1e-3


def test_scripts_for_timm_run(monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("Scripts written for timm", monkeypatch)
    tokens = names["model"].forward_features(names["pixels"])
    assert names["maps"].shape == (1, 96, 7, 7)
    assert torch.equal(names["patches"], tokens[:, 1:])
    assert torch.equal(names["cls"], tokens[:, 0])
    assert torch.equal(names["vector"], tokens[:, 0])
    assert names["stride"] == 4
    assert names["mean"] == (0.5, 0.5, 0.5)
    assert names["names"] == {"patch_embed.cls_token", "patch_embed.pos_embed"}


def test_hook_on_last_block_sees_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("Hooks, and all tokens of the last block", monkeypatch)
    assert [tuple(x.shape) for x in names["states"]] == [(1, 1, 96), (1, 50, 96)]
    assert torch.allclose(names["states"][0], names["states"][1][:, :1], atol=1e-5)
    assert not names["model"].blocks[-1]._forward_hooks


def test_parity_names_points_and_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("Parity in tests of your own", monkeypatch)
    section = PAGE.split("## Parity in tests of your own")[1]
    shown = re.search(r"```\n(model \(MyViT\).*?)\n```", section, flags=re.DOTALL)[1]
    number = re.compile(r"\d[\d.e-]*")
    assert number.sub("N", names["message"]) == number.sub("N", shown)
    for words in ("blocks.2.norm1 (model: stages.2.norm1)", "eps of norm1: 0.001 in the model"):
        assert words in names["message"]
        assert words in shown
    broken = [name for name, _ in vitlib.testing.damage(names["model"])]
    assert [*names["noticed"]] == broken
    assert len(broken) >= 8
    assert names["noticed"]["swapped q and k"] == "blocks.3.attn.q"


def test_cam_is_a_map_of_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("Class activation maps", monkeypatch)
    assert names["cam"].shape == (1, 7, 7)
    assert names["cam"].max() > 0
    # After the last block the patches do not reach the logits.
    model, tape = names["model"], []
    model.compute_all_tokens = True
    model.blocks[-1].register_forward_hook(lambda _, __, output: tape.append(output))
    (slope,) = torch.autograd.grad(model(names["pixels"])[:, 1].sum(), tape[0])
    assert slope[:, 0].any()
    assert not slope[:, 1:].any()


def test_math_backend_has_second_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("Second derivatives", monkeypatch)
    assert names["penalty"].any()
    images = names["pixels"].clone().requires_grad_()
    (slope,) = torch.autograd.grad(names["model"](images).sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="flash_attention_for_cpu_backward is not implemented"):
        slope.square().sum().backward()


def test_quantize_dynamic_needs_plain_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("torch's own quantization", monkeypatch)
    kinds = {type(m) for m in names["quantized"].modules()}
    assert torch.ao.nn.quantized.dynamic.Linear in kinds
    assert torch.nn.Linear not in kinds
    assert 1e-4 < distance(names["quantized"](names["pixels"]), names["logits"]) < 0.05
    silent = names["quantize_dynamic"](names["model"], {torch.nn.Linear})
    # Some CPUs sum in another order where copied weights begin at other addresses.
    assert distance(silent(names["pixels"]), names["logits"]) < 1e-6


def test_export_takes_other_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("torch.compile and torch.export", monkeypatch)
    pixels = names["pixels"].repeat(3, 1, 1, 1)
    assert distance(names["exported"](pixels), names["logits"].repeat(3, 1)) < 1e-5


def test_vendored_file_gives_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", list(sys.path))
    names = run("One file to take along", monkeypatch)
    assert names["same"]
    assert names["files"].lines <= 250
    assert sys.modules.pop("vit_demo").ViT is type(names["vendored"])
    for path in (names["files"].source, names["files"].weights, names["files"].test):
        path.unlink()


def test_extras_of_page_are_those_of_the_package() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = set(re.findall(r"^(\w+) = ", section, flags=re.MULTILINE)) - {"dev", "docs"}
    table = PAGE.split("## Installing")[1]
    listed = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`\w+`.*?) \|", table, re.MULTILINE)))
    assert set(listed) == extras
