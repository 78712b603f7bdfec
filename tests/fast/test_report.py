"""Test that fast_report() says what optimize() does, here and on other machines."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fixtures import references
from vitlib import ViT, ViTConfig, VitlibError, optimize
from vitlib.fast import cpu, onednn_graph, onednn_ops, report
from vitlib.fast.block import FastBlock
from vitlib.fast.cpu import PRECISIONS, KernelPlan, Machine
from vitlib.fast.report import ABSENT, AGREES, DIFFERS, TORCH_LINEAR, fast_report

Run = Callable[..., tuple[int, str, str]]


def tiny(**changes: object) -> ViT:
    fields = {"image_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 4, "depth": 3}
    return ViT(ViTConfig(**{**fields, "num_classes": 5, **changes})).eval()  # type: ignore[arg-type]


def run_as(monkeypatch: pytest.MonkeyPatch, other: Machine) -> None:
    """Pretend to run on another CPU."""
    for module in (cpu, report):
        monkeypatch.setattr(module, "this_machine", lambda: other)


def test_report_equals_what_optimize_does() -> None:
    model = tiny()
    actual = fast_report(model)
    assert [row.precision for row in actual.precisions] == list(PRECISIONS)
    for row in actual.precisions:
        if row.error:
            with pytest.raises(VitlibError) as caught:
                optimize(model, row.precision)
            assert str(caught.value) == row.error
            continue
        fast = optimize(model, row.precision)
        block = fast.trunk.blocks[1]  # int8 leaves the first one out
        assert isinstance(block, FastBlock)
        assert row.arithmetic == block.plan.arithmetic
        assert row.reason == block.plan.reason
        assert row.attention_dtype == str(block.plan.attention_dtype).removeprefix("torch.")
        packed = "PackedLinear" in {type(linear).__name__ for linear in block.modules()}
        assert packed == row.linears.startswith("mkldnn")
        blocks = [part for part in fast.trunk.blocks if "vitlib.fast" in type(part).__module__]
        assert actual.model is not None
        assert (actual.model.blocks, actual.model.depth) == (len(blocks), 3)
    assert actual.threads == torch.get_num_threads()
    assert torch.cuda.is_available() or actual.cuda == "no CUDA device"


def test_as_dict_is_json() -> None:
    actual = json.loads(json.dumps(fast_report(tiny()).as_dict()))
    assert list(actual["precisions"]) == list(PRECISIONS)
    assert actual["machine"]["features"]
    assert actual["model"] == {
        "blocks": 3,
        "depth": 3,
        "patch_embed": True,
        "positions": False,
        "linears": 0,
        "unoptimized_modules": [],
    }
    assert fast_report().as_dict()["model"] is None


def test_report_on_a_meta_model() -> None:
    with torch.device("meta"):
        model = ViT(ViTConfig.named("g/14", image_size=518))
    actual = fast_report(model)
    assert actual.model is not None
    assert actual.model.blocks == 40
    assert all(p.is_meta for p in model.parameters())


def test_report_on_users_modules() -> None:
    model = tiny(rope={"theta": 100.0})
    actual = fast_report(model).model
    assert actual is not None
    assert actual.positions
    model.blocks[1].register_forward_hook(lambda *_: None)
    model.blocks[2].mlp.fc1 = nn.Sequential(nn.Linear(48, 192))
    actual = fast_report(model).model
    assert actual is not None
    assert actual.unoptimized_modules == ("blocks.1", "blocks.2.mlp.fc1")
    assert actual.blocks == 1
    fast = optimize(model)
    linears = [
        module
        for path, module in fast.trunk.named_modules()
        if "FastLinear" in {kind.__name__ for kind in type(module).__mro__}
        and path.startswith(("blocks.1", "blocks.2"))
    ]
    assert actual.linears == len(linears) == 11
    half = fast_report(model.to(torch.bfloat16)).model
    assert half is not None
    assert (half.blocks, half.linears, half.patch_embed) == (0, 0, False)


def test_report_without_private_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn_ops, "has_packed_linear", lambda _: False)
    monkeypatch.setattr(onednn_ops, "has_int8_linear", lambda: False)
    monkeypatch.setattr(onednn_graph, "attention_kernel", lambda *_: None)
    actual = fast_report(tiny())
    assert set(actual.operations.values()) <= {DIFFERS, ABSENT}
    support = {row.precision: row for row in actual.precisions}
    assert support["fp32"].linears == f"{TORCH_LINEAR}, float32"
    assert support["fp32"].attention.startswith("torch's fused kernel")
    assert support["bf16"].arithmetic == "fp32"
    assert support["int8"].error


def test_report_on_a_wrong_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        onednn_graph, "attention_kernel", lambda *_: lambda q, *_: q.transpose(1, 2).flatten(2)
    )
    assert not report.graph_agrees(torch.float32)
    kernel = "oneDNN Graph attention float32"
    assert fast_report().operations[kernel] != AGREES


def test_report_on_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    run_as(monkeypatch, Machine("x86_64", "intel", "a Xeon", avx512=True, avx512_bf16=True))
    bf16 = next(row for row in fast_report().precisions if row.precision == "bf16")
    assert bf16.arithmetic == "fp32"
    assert "float32 serves bf16" in bf16.reason or "no packed linear" in bf16.reason
    run_as(monkeypatch, Machine("aarch64", "", "an Arm"))
    support = {row.precision: row for row in fast_report().precisions}
    assert support["fp32"].linears == f"{TORCH_LINEAR}, float32"
    assert "AVX-512 VNNI" in support["int8"].error
    assert "needs a GPU" in support["fp8"].error


def test_report_on_attention_of_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = KernelPlan("fp32", True, "graph", torch.float32, "")
    monkeypatch.setattr(report, "cpu_plan", lambda _: plan)
    monkeypatch.setattr(report, "graph_agrees", lambda _: True)
    assert report.precision_support("fp32", tiny()).attention == "oneDNN Graph"
    large = report.precision_support("fp32", tiny(image_size=512))
    assert large.attention.startswith("torch's fused kernel: so many scores")
    monkeypatch.setattr(report, "graph_agrees", lambda _: False)
    assert "oneDNN Graph has none here" in report.precision_support("fp32", tiny()).attention
    plan = plan._replace(attention_dtype=torch.bfloat16)
    assert report.precision_support("bf16").attention.startswith("two batched products, as")


def test_info_fast_prints_the_report(run_cli: Run, tmp_path: Path) -> None:
    references.save_model("vit", tmp_path)
    status, out, err = run_cli("info", tmp_path, "--fast")
    assert (status, err) == (0, "")
    table = dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines())
    assert table["torch"].startswith(torch.__version__)
    assert {*PRECISIONS, "cpu", "cuda"} <= table.keys()
    assert table["optimized"] == "3 of 3 blocks, the patch projection"
    assert table["not optimized"] == "none"
    status, out, err = run_cli("info", tmp_path, "--fast", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out) == json.loads(json.dumps(fast_report(tiny()).as_dict()))
    assert run_cli("info", tmp_path, "--fast", "--profiles")[0] == 2
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["vit.layernorm.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    status, out, err = run_cli("info", tmp_path, "--fast")
    assert (status, out) == (1, "")
    assert "would not load: missing: vit.layernorm.bias" in err
    assert err.count("\n") == 1
