"""The package as a script uses it: names on first use, types, descriptions, wrong arguments."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_readme import README, TOUR, blocks

import vitlib
from paths import ROOT
from vitlib.errors import VitlibError

MODULES = (
    "adapters.merge_lora",
    "audit.run",
    "batch.run",
    "checks.info",
    "data.read_photos",
    "evaluate.evaluate",
    "explain.relevance",
    "export.to_onnx",
    "fast.load",
    "features.extract",
    "metrics.quick",
    "plots.overlay",
    "probe.run",
    "retrieval.nearest",
    "testing.assert_same",
    "tokens.merge",
    "train.finetune",
    "vendor.write",
)
# Idioms of research code beside those of README and tour.
IDIOMS = """
import torch
import vitlib

model = vitlib.load("demo", layout="hf", pool="cls", dtype="bfloat16", drop_path=0.1)
query: torch.nn.Linear = model.blocks[0].attn.q
last: vitlib.ViT = model
model.blocks = model.blocks[:3]
for block in model.blocks:
    block.attn.q.requires_grad_(False)
if model.image_processor is not None:
    pixels = model.image_processor(["a.jpg"]).to(model.device, model.dtype)
copy = vitlib.load(model.state_dict(), config=model.config)
vit = vitlib.Predictor(copy)
for predictions in vit.classify(["a.jpg"], on_error="none"):
    if predictions is not None:
        print(predictions[0].label)
best: str = vit.classify("a.jpg")[0][0].label
adapted: vitlib.ViT = vitlib.adapt(model, prompts=10, adapters=dict(dim=64), lora=dict(on="qv"))
vitlib.save_delta(adapted, "delta.safetensors")
again: vitlib.ViT = vitlib.load_delta(model, "delta.safetensors")
done = vitlib.train.finetune("photos", "demo", "mine", config=vitlib.train.TrainConfig())
"""


@pytest.mark.parametrize("name", MODULES)
def test_package_is_loaded_on_first_use(name: str) -> None:
    module, _, function = name.partition(".")
    code = f"import sys, vitlib; assert 'torch' not in sys.modules; vitlib.{module}.{function}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_dir_lists_public_names() -> None:
    # `adapt` is public beside the 12 names of __all__, see vitlib/__init__.py.
    public = {
        *vitlib.__all__,
        "adapt",
        *(name.partition(".")[0] for name in MODULES),
        "__version__",
    }
    assert set(dir(vitlib)) == public


def test_snippets_are_typed(tmp_path: Path) -> None:
    pages = {"readme": README, "tour": TOUR}
    snippets = {name: "\n".join(blocks(page, "python")) for name, page in pages.items()}
    for name, code in {**snippets, "idioms": IDIOMS}.items():
        (tmp_path / f"{name}_snippet.py").write_text(code, encoding="utf-8")
    files = sorted(map(str, tmp_path.glob("*.py")))
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "pyproject.toml", *files]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    # A wrong layout is an error: the check reads the package's types.
    wrong = tmp_path / "wrong.py"
    wrong.write_text("import vitlib\nvitlib.load('demo', layout='huggingface')\n")
    result = subprocess.run([*command[:-3], str(wrong)], cwd=ROOT, capture_output=True, text=True)
    assert 'incompatible type "Literal' in result.stdout


def test_repr_describes_models() -> None:
    vit = vitlib.Predictor.load("demo")
    text = repr(vit)
    for part in ("'demo'", "6 blocks", "28x28", "on cpu", "float32", "10 classes", "resize to"):
        assert part in text
    for part in ("precision='fp32'", "device='cpu'", "image_size=28x28", "num_classes=10"):
        assert part in repr(vit.fast())
    text = repr(vit.model)
    assert "embed_dim=96, depth=6, num_heads=4" in text
    assert "num_heads=4, head_dim=24" in text
    assert "activation='gelu'" in text


def test_state_dict_in_memory_is_copied() -> None:
    model = vitlib.load("demo")
    pixels = torch.randn(2, 3, 28, 28)
    wrapped = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    for state in (model.state_dict(), {"epoch": 3, "state_dict": wrapped}):
        again = vitlib.load(state, config=model.config)
        assert torch.equal(again(pixels), model(pixels))
    with torch.no_grad():
        again.head.bias += 1
    assert not torch.equal(again(pixels), model(pixels))


def test_load_sets_rates_and_dtype() -> None:
    model = vitlib.load("demo", dropout=0.2, drop_path=0.1, dtype="bfloat16")
    assert (model.config.dropout, model.config.drop_path) == (0.2, 0.1)
    assert model.blocks[-1].drop_path == pytest.approx(0.1)
    assert (model.dtype, model.device) == (torch.bfloat16, torch.device("cpu"))


def test_attention_is_float32_under_autocast() -> None:
    model, pixels = vitlib.load("demo"), torch.randn(1, 3, 28, 28)
    with torch.autocast("cpu", torch.bfloat16):
        maps = model.attention(pixels)
    assert {x.dtype for x in maps} == {torch.float32}
    assert max((x.sum(-1) - 1).abs().max().item() for x in maps) < 1e-5


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "a size for a config": (lambda: vitlib.ViT("B/16"), "expected a ViTConfig"),  # type: ignore[arg-type]
    "a path for pixels": (lambda: vitlib.load("demo")("cat.jpg"), "a tensor of normalised pixels"),
    "an array for pixels": (
        lambda: vitlib.explain.relevance(
            vitlib.load("demo"),
            np.zeros((1, 3, 28, 28), np.float32),  # type: ignore[arg-type]
            0,
        ),
        "a tensor of normalised pixels, got a ndarray",
    ),
    "a typo in a field": (lambda: vitlib.ViTConfig(embed_dimm=3), "did you mean embed_dim"),  # type: ignore[call-arg]
    "an assignment to a typo": (
        lambda: setattr(vitlib.ViTConfig(), "num_class", 3),
        "did you mean num_classes",
    ),
    "a number for a size": (lambda: vitlib.ViTConfig.named(3), "no ViT is called 3"),  # type: ignore[arg-type]
    "a number for a source": (lambda: vitlib.load(3), "got a int"),  # type: ignore[arg-type]
    "a path for a model": (lambda: vitlib.save("demo", "out"), "expected a ViT, got a str"),  # type: ignore[arg-type]
    "an empty state dict": (lambda: vitlib.load({}), "expected a state dict"),
    "a dtype that is none": (lambda: vitlib.load("demo", dtype="half2"), "expected a dtype"),
    "maps of an optimized model": (
        lambda: vitlib.optimize(vitlib.load("demo")).attention(torch.zeros(1, 3, 28, 28)),
        "call attention\\(\\) of the model",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_argument_gets_one_line(case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises(VitlibError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_load_without_strict_names_differences(caplog: pytest.LogCaptureFixture) -> None:
    model = vitlib.load("demo")
    state = dict(model.state_dict())
    bias = state.pop("blocks.5.mlp.fc2.bias")
    state["blocks.5.adapter.weight"] = torch.zeros(3)
    with pytest.raises(VitlibError, match=r"missing: .*fc2.bias.*unexpected: .*adapter"):
        vitlib.load(state, config=model.config)
    again = vitlib.load(state, config=model.config, strict=False)
    assert again.missing_keys == ("blocks.5.mlp.fc2.bias",)
    assert again.unexpected_keys == ("blocks.5.adapter.weight",)
    assert "missing: " in caplog.text
    assert again.blocks[5].mlp.fc2.bias.shape == bias.shape
    assert torch.equal(again.blocks[4].mlp.fc2.weight, model.blocks[4].mlp.fc2.weight)
    assert (model.missing_keys, model.unexpected_keys) == ((), ())
    state["blocks.0.attn.q.weight"] = torch.zeros(3, 3)
    with pytest.raises(VitlibError, match="wrong shape"):
        vitlib.load(state, config=model.config, strict=False)


def test_config_is_frozen_and_serves_the_trainer() -> None:
    config = vitlib.ViTConfig.named("S/16")
    with pytest.raises(FrozenInstanceError, match=r"replace\(config, depth=3"):
        config.depth = 3  # type: ignore[misc]
    config.use_cache = False  # type: ignore[attr-defined]
    assert replace(config, depth=3).depth == 3
    assert pickle.loads(pickle.dumps(config)) == config
