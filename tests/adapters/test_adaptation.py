"""Adapted models as models: shared memory, training, copies, compilation, files."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vitlib
from fixtures.adapted import EVERY_PART, adapted, base, largest, move
from fixtures.families import FAMILIES, RARE, pixels
from vitlib.adapters import merge_lora
from vitlib.errors import ConfigError

everyone = pytest.mark.parametrize("family", FAMILIES | RARE)


@everyone
def test_only_parts_and_head_get_gradients(family: str) -> None:
    model, images = base(family), pixels(2)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    state = {name: t.clone() for name, t in model.state_dict().items()}
    changed = move(vitlib.adapt(model, **EVERY_PART)).train()
    optimizer = torch.optim.SGD([p for p in changed.parameters() if p.requires_grad], lr=0.1)
    changed(images).square().sum().backward()
    parts = ("prompt_token", ".up", ".down", ".up.weight", ".down.weight", ".up.bias", ".down.bias")
    for name, parameter in changed.named_parameters():
        trains = name.endswith(parts) or name.startswith(("head.", "head_dist."))
        assert parameter.requires_grad == trains, name
        assert (parameter.grad is not None) == trains, name
    optimizer.step()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_weights_lie_in_the_memory_of_the_base() -> None:
    model = base("vit")
    changed = vitlib.adapt(model, **EVERY_PART)
    weight, original = changed.blocks[0].norm1.weight, model.blocks[0].norm1.weight
    assert weight.data_ptr() == original.data_ptr()
    assert changed.head.weight.data_ptr() != model.head.weight.data_ptr()
    with torch.no_grad():
        original.add_(1)
    assert torch.equal(weight, original)
    assert model.adaptation is None
    assert model.num_prompts == 0


def copies(model: vitlib.ViT) -> dict[str, vitlib.ViT]:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = vitlib.adapt(base("beit"), **EVERY_PART)
    again.load_state_dict(model.state_dict())
    return {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(buffer, weights_only=False),
        "state_dict": again,
        "with_attention": model.with_attention(nn.functional.scaled_dot_product_attention),
    }


def test_copies_compute_the_same() -> None:
    images = pixels(2)
    model = adapted(base("beit"), **EVERY_PART)
    for name, other in copies(model).items():
        with torch.no_grad():
            assert largest(other(images), model(images)) <= 1e-6, name
        assert other.num_prefix_tokens == model.num_prefix_tokens
        assert other.adaptation == model.adaptation


def test_compile_takes_it_whole() -> None:
    images = pixels(2)
    for family in ("mae_mean", "mlcd"):
        model = adapted(base(family), **EVERY_PART)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            assert largest(compiled(images), model(images)) <= 2e-6


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    grads, start = [], adapted(base("vit"), **EVERY_PART).train()
    for enable in (False, True):
        model = copy.deepcopy(start)
        model.set_grad_checkpointing(enable)
        model(pixels(2)).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@everyone
@pytest.mark.parametrize(
    ("parts", "as_it_is"),
    [
        ({"prompts": 3, "lora": 2}, set()),
        ({"prompts": {"count": 3, "deep": True}}, {"blocks.1", "blocks.2"}),
        ({"adapters": {"dim": 8, "on": "mlp"}}, {f"blocks.{i}.ls2" for i in range(3)}),
        ({"adapters": {"dim": 8, "parallel": True}}, {f"blocks.{i}.mlp" for i in range(3)}),
    ],
)
def test_optimize_keeps_parts_or_names_them(
    family: str, parts: dict[str, Any], as_it_is: set[str]
) -> None:
    model, images = adapted(base(family), **parts), pixels(2)
    fast = vitlib.optimize(model)
    names = set(vitlib.optimize(base(family)).unoptimized_modules)
    with torch.no_grad():
        assert largest(fast(images), model(images)) <= 5e-6
        assert largest(fast.forward_features(images), model.forward_features(images)) <= 5e-6
    assert set(fast.unoptimized_modules) - names == as_it_is
    assert fast.num_prefix_tokens == model.num_prefix_tokens
    with pytest.raises(vitlib.VitlibError, match=r"save_delta|not vitlib's own"):
        fast.save("never-written")


def test_files_of_checkpoints_refuse_added_parts(tmp_path: Path) -> None:
    model = adapted(base("vit"), **EVERY_PART)
    with pytest.raises(ConfigError, match=r"the model has prompts, adapters, lora, which no") as e:
        vitlib.save(model, tmp_path / "out")
    assert "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=r"prompts, which this file has no place for"):
        vitlib.optimize(vitlib.adapt(base("vit"), prompts=2)).save(tmp_path / "out")
    merged = merge_lora(adapted(base("vit"), lora=2))
    vitlib.save(merged, tmp_path / "out")
    with torch.no_grad():
        assert largest(vitlib.load(tmp_path / "out")(pixels(2)), merged(pixels(2))) <= 1e-6


@pytest.mark.parametrize(
    ("family", "choices"),
    [("vit", {"dynamic_size": True}), ("vit", {"precision": "fp16"}), ("beit", {}), ("mlcd", {})],
)
def test_exported_files_have_the_parts(
    family: str, choices: dict[str, Any], tmp_path: Path
) -> None:
    from vitlib.export import to_onnx

    pytest.importorskip("onnx", reason="needs the extra export")
    model = adapted(base(family), **EVERY_PART)
    processor = vitlib.ImageProcessor(size=(32, 32))
    # It compares the file with the model before the file counts.
    to_onnx(model, tmp_path, image_processor=processor, input="float", **choices)
    exported = vitlib.Predictor.load(tmp_path / "model.onnx").model
    assert exported.info.num_prefix_tokens == model.num_prefix_tokens
    with torch.no_grad():
        bound = 5e-3 if "precision" in choices else 2e-6
        assert largest(exported(pixels(2)), model(pixels(2))) <= bound


def test_mistakes_are_one_line() -> None:
    model = base("vit")
    cases: dict[str, dict[str, Any]] = {
        "nothing to add: give prompts=10": {},
        "prompts: count=0: expected a whole number of at least 1": {"prompts": 0},
        "prompts={'deep': True}: expected count, and of deep some": {"prompts": {"deep": True}},
        "prompts: deep=1: expected True or False": {"prompts": {"count": 1, "deep": 1}},
        "adapters={'dim': 2, 'size': 3}: expected dim": {"adapters": {"dim": 2, "size": 3}},
        "adapters: on='head': expected some of attn, mlp": {"adapters": {"dim": 2, "on": "head"}},
        "expected 'mlp' for parallel": {"adapters": {"dim": 2, "on": "attn", "parallel": True}},
        "adapters: scale=nan: expected a number": {"adapters": {"dim": 2, "scale": float("nan")}},
        "lora: on='qx': expected some of q, k, v": {"lora": {"rank": 2, "on": "qx"}},
        "adapters: scale=0: expected a number other": {"adapters": {"dim": 2, "scale": 0}},
        "adapters: on='': expected some of attn, mlp": {"adapters": {"dim": 2, "on": ""}},
        "lora: on='qq': expected some of q, k, v, o, out, proj, fc1, fc2, each once": {
            "lora": {"rank": 2, "on": "qq"}
        },
        "lora: rank=33: expected at most 32, the smaller side of q of blocks.0": {"lora": 33},
        "lora: on='': expected some of q, k, v": {"lora": {"rank": 2, "on": ""}},
        "lora: rank=5000: expected at most 4096": {"lora": 5000},
        "lora: alpha=0: expected a positive number": {"lora": {"rank": 2, "alpha": 0}},
    }
    for message, arguments in cases.items():
        with pytest.raises(ConfigError) as error:
            vitlib.adapt(model, **arguments)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"adapt: the model has lora already: give the model"):
        vitlib.adapt(vitlib.adapt(model, lora=2), prompts=2)
    with pytest.raises(ConfigError, match=r"adapt: expected a ViT, got a Linear"):
        vitlib.adapt(nn.Linear(2, 2), prompts=2)  # type: ignore[arg-type]
