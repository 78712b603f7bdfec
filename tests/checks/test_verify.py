"""Tests of vitlib.checks.verify: comparison with references, and anomalies of one file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vitlib
from fixtures import references
from paths import FIXTURES
from vitlib.checks import convert, verify
from vitlib.errors import CheckpointError, VitlibError

FAMILIES = [
    "vit",
    "vit base",
    "deit two heads",
    "mae",
    "msn",
    "ijepa",
    "dinov2 swiglu",
    "registers",
]
FAMILIES += ["dinov3", "dinov3 gated", "clip", "clip projection", "clip both towers", "siglip"]
FAMILIES += ["siglip base", "beit", "beit shared", "vit not square", "vit masked"]
FAMILIES += ["pixio", "radio", "radio swiglu", "tipsv2"]


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", FAMILIES)
def test_verify_equal_to_transformers(name: str, tmp_path: Path) -> None:
    references.save_model(name, tmp_path)
    verdict = verify(tmp_path, against="transformers")
    names = [state for state, _ in verdict.errors]
    cfg = vitlib.load(tmp_path).config
    assert names[:4] == ["embedding", "block 0", "block 1", "block 2"]
    assert ("norm" in names) == (cfg.final_norm == "tokens")
    assert names[-1] == ("logits" if cfg.num_classes else "output")
    assert verdict.not_compared == ()
    assert verdict.verdict == "equal"
    assert max(error for _, error in verdict.errors) < 2e-6


@pytest.mark.parametrize(
    "source", ["timm/vit", "timm/beit", "meta/deit3.pth", "torchvision/vit.pth", "jax/vit.npz"]
)
def test_verify_writes_other_layouts_for_transformers(source: str) -> None:
    verdict = verify(FIXTURES / source, against="transformers", num_heads=2)
    assert verdict.layout == source.partition("/")[0]
    assert verdict.verdict == "equal"


def test_verify_leaves_out_head_that_transformers_lacks() -> None:
    verdict = verify(FIXTURES / "timm" / "clip_quickgelu", against="transformers")
    assert verdict.verdict == "equal"
    assert verdict.not_compared == ("norm", "logits")
    assert [name for name, _ in verdict.errors] == ["embedding", "block 0"]


def test_verify_diverges_with_other_profile(tmp_path: Path) -> None:
    references.save_model("vit large eps", tmp_path)
    assert verify(tmp_path, against="transformers").ok
    verdict = verify(tmp_path, against="transformers", profile="timm")
    assert verdict.verdict == "diverges at block 0"


def test_verify_rejects_files_with_missing_tensors_in_transformers(tmp_path: Path) -> None:
    references.save_model("vit", tmp_path)
    rewrite(tmp_path, lambda t: t.update({f"model.{n}": t.pop(n) for n in list(t)}))
    assert vitlib.load(tmp_path).config.num_classes == 5
    message = "does not find 56 of its tensors in these files and draws them at random"
    with pytest.raises(CheckpointError, match=message):
        verify(tmp_path, against="transformers")


def test_verify_diverges_at_damaged_block(tmp_path: Path) -> None:
    for name, key in (("vit", "vit.encoder.layer.1.output.dense.bias"),):
        references.save_model(name, tmp_path / "good")
        references.save_model(name, tmp_path / "bad")
        rewrite(tmp_path / "bad", lambda t, key=key: t[key].neg_())
        verdict = verify(tmp_path / "bad", against=tmp_path / "good")
        assert verdict.diverges_at == "block 1"
        assert verdict.verdict == "diverges at block 1"
        assert not verdict.ok
        errors = dict(verdict.errors)
        assert errors["embedding"] == errors["block 0"] == 0
        assert errors["block 1"] > 1e-2
        assert verify(tmp_path / "good", against=tmp_path / "good").verdict == "equal"


DAMAGE: dict[str, tuple[str, Callable[[dict[str, Tensor]], object]]] = {
    "embedding": ("embedding", lambda t: t["vit.embeddings.position_embeddings"][0, 3].zero_()),
    "a swapped q and k": (
        "block 1",
        lambda t: t.update(
            {
                _layer(1, "attention.attention.query.weight"): t[
                    _layer(1, "attention.attention.key.weight")
                ],
                _layer(1, "attention.attention.key.weight"): t[
                    _layer(1, "attention.attention.query.weight")
                ].clone(),
            }
        ),
    ),
    "the last block": ("block 2", lambda t: t[_layer(2, "layernorm_after.bias")].neg_()),
    "the norm": ("norm", lambda t: t["vit.layernorm.bias"].neg_()),
    "the head": ("logits", lambda t: t["classifier.bias"].neg_()),
}


def _layer(number: int, rest: str) -> str:
    return f"vit.encoder.layer.{number}.{rest}"


@pytest.mark.parametrize("case", DAMAGE)
def test_verify_locates_damage(case: str, tmp_path: Path) -> None:
    at, damage = DAMAGE[case]
    references.save_model("vit", tmp_path / "good")
    references.save_model("vit", tmp_path / "bad")
    rewrite(tmp_path / "bad", damage)
    assert verify(tmp_path / "bad", against=tmp_path / "good").diverges_at == at


def test_verify_detects_tanh_gelu_in_place_of_erf(tmp_path: Path) -> None:
    """Tanh in place of erf is the smallest known mistake of numerics."""
    references.save_model("vit", tmp_path / "erf")
    references.save_model("vit tanh gelu", tmp_path / "tanh")
    verdict = verify(tmp_path / "erf", against=tmp_path / "tanh")
    assert verdict.diverges_at == "block 0"
    assert dict(verdict.errors)["block 0"] > 5 * verdict.tolerance


def test_verify_equal_between_layouts(tmp_path: Path) -> None:
    references.save_model("msn", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "timm", layout="timm")
    verdict = verify(tmp_path / "timm", against=tmp_path / "hf")
    assert verdict.verdict == "equal"
    assert verdict.not_compared == ()


def test_verify_rejects_reference_of_other_shape(tmp_path: Path) -> None:
    references.save_model("vit", tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"another model.*embed_dim 48 and 16, depth 3 and 2"):
        verify(tmp_path / "base", against=FIXTURES / "timm" / "vit")
    model = vitlib.load(tmp_path / "base")
    model.reset_classifier(2)
    vitlib.save(model, tmp_path / "two classes")
    assert verify(tmp_path / "base", against=tmp_path / "two classes").diverges_at == "logits"
    model.reset_classifier(0)
    vitlib.save(model, tmp_path / "no head")
    verdict = verify(tmp_path / "base", against=tmp_path / "no head")
    assert (verdict.verdict, verdict.not_compared) == ("equal", ("logits",))


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_verify_rejects_library_that_is_not_installed(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    references.save_model("vit", tmp_path)
    monkeypatch.setitem(sys.modules, library, None)  # makes its import fail
    with pytest.raises(VitlibError, match=f"cannot be imported.*pip install {library}"):
        verify(tmp_path, against=library)


# --- one file alone -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deit_tiny", "dinov2_small"])
def test_real_models_have_no_findings(name: str, request: pytest.FixtureRequest) -> None:
    verdict = verify(request.getfixturevalue(name))
    assert (verdict.verdict, verdict.findings) == ("healthy", ())


@pytest.mark.parametrize("name", ["vit", "dinov2", "beit", "siglip", "clip projection", "dinov3"])
def test_randomised_models_have_no_findings(name: str, tmp_path: Path) -> None:
    references.save_model(name, tmp_path)
    assert verify(tmp_path).findings == ()


def fresh_head(t: dict[str, Tensor]) -> None:
    nn.init.trunc_normal_(t["classifier.weight"], std=0.02)
    t["classifier.bias"].zero_()


def twin(t: dict[str, Tensor]) -> None:
    for name in [name for name in t if ".layer.0." in name]:
        t[name.replace(".layer.0.", ".layer.2.")] = t[name].clone()


ANOMALIES: dict[str, tuple[str, str, Callable[[dict[str, Tensor]], object]]] = {
    "a fresh head": ("untrained: looks like a random", "classifier.weight", fresh_head),
    "a zero layer": (
        "all zero",
        "vit.encoder.layer.1.output.dense.weight",
        lambda t: t[_layer(1, "output.dense.weight")].zero_(),
    ),
    "a fresh norm": (
        "untrained: a norm",
        "vit.layernorm.weight",
        lambda t: (t["vit.layernorm.weight"].fill_(1), t["vit.layernorm.bias"].zero_()),
    ),
    "a block twice": ("equal to an earlier block", "vit.encoder.layer.2.", twin),
    "large weights": (
        "implausible: weights beyond 10000",
        "classifier.bias",
        lambda t: t["classifier.bias"].fill_(1e5),
    ),
    "one layer too large": (
        "implausible: 100 times",
        "vit.encoder.layer.1.output.dense.weight",
        lambda t: t[_layer(1, "output.dense.weight")].mul_(1000),
    ),
    "constant output": (
        "constant: two different images",
        "logits",
        lambda t: t["classifier.weight"].mul_(1e-12),
    ),
    "NaN": (
        "does not load",
        "NaN or infinite values in: vit.layernorm.bias",
        lambda t: t["vit.layernorm.bias"].fill_(torch.nan),
    ),
}


@pytest.mark.parametrize("case", ANOMALIES)
def test_verify_reports_anomaly(case: str, tmp_path: Path) -> None:
    what, tensors, damage = ANOMALIES[case]
    references.save_model("vit", tmp_path)
    rewrite(tmp_path, damage)
    verdict = verify(tmp_path)
    assert verdict.verdict == "suspicious"
    assert any(f.what.startswith(what) and tensors in f.tensors for f in verdict.findings), verdict
    json.dumps(verdict.as_dict(), allow_nan=False)


def test_verify_reports_untrained_model(tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = vitlib.ViTConfig(
        image_size=(32, 32), patch_size=(8, 8), embed_dim=96, depth=3, num_heads=4, num_classes=7
    )
    vitlib.save(vitlib.ViT(config), tmp_path / "vitlib")
    findings = {f.what: f.tensors for f in verify(tmp_path / "vitlib").findings}
    assert "vit.layernorm.weight" in findings["untrained: a norm of ones and zeros"]
    initialised = findings["untrained: looks like a random initialisation"]
    assert "classifier.weight" in initialised
    assert "vit.encoder.layer.0-2.intermediate.dense.weight" in initialised


def test_verify_reports_layer_initialised_by_torch(tmp_path: Path) -> None:
    references.save_model("dinov2 base", tmp_path)
    wide = {"embed_dim": 96, "image_size": (32, 32), "patch_size": (8, 8), "depth": 1}
    model = vitlib.ViT(vitlib.ViTConfig(**wide, num_heads=4, num_classes=64))
    references.randomise(model)
    model.head.weight.data = nn.Linear(96, 64).weight.data
    model.head.bias.data = nn.Linear(96, 64).bias.data
    vitlib.save(model, tmp_path / "out")
    [finding] = verify(tmp_path / "out").findings
    assert finding.tensors == "classifier.weight"


def test_verify_reports_constant_layer_scale(tmp_path: Path) -> None:
    references.save_model("dinov2", tmp_path)
    rewrite(tmp_path, lambda t: t["dinov2.encoder.layer.1.layer_scale2.lambda1"].fill_(1e-5))
    [finding] = verify(tmp_path).findings
    assert finding == (
        "untrained: a LayerScale of one value",
        "dinov2.encoder.layer.1.layer_scale2.lambda1",
    )
