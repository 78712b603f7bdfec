"""Vendored files: equal to vitlib, short, clean, and without vitlib in their process."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import vitlib
from fixtures.command_line import Run
from fixtures.families import FAMILIES, RARE, pixels, tiny
from paths import ROOT
from vitlib.errors import CheckpointError, ConfigError, SourceError
from vitlib.vendor import write
from vitlib.vendor.file import MAX_LINES
from vitlib.vendor.writer import check_outputs

# Families with other heads, and what only one family or a checkpoint has.
OTHERS = {
    "vit5": {
        "num_registers": 4,
        "pos_embed_cls": False,
        "norms": {"kind": "rms", "qk": "head"},
        "qkv_bias": False,
        "layer_scale": 0.1,
        "rope": {"coords": "index", "theta": 10_000.0, "register_theta": 100.0},
    },
    "norms_in_blocks_beside_a_pool": {
        "norms": {"mlp": True, "attn": True, "qk": "width"},
        "pool": "map",
        "attention_pool": {"num_heads": 4, "prefix_tokens": False},
    },
    "quick_gelu": {"activation": "quick_gelu", "num_classes": 1},
    "no_head": {"num_classes": 0},
    "not_square": {"image_size": (32, 48), "patch_size": (8, 16), "in_channels": 3},
    "cls+mean_without_norm": {"pool": "cls+mean", "final_norm": "none"},
    "pooler_beside_the_head": {"pooler_dim": 24, "mask_token": True},
    "dist_token_alone": {"dist_token": True},
    "dropout": {"dropout": 0.1, "attention_dropout": 0.1, "drop_path": 0.2},
}
NAMES = [*FAMILIES, *RARE, *OTHERS]
SIZES = [(32, 32), (48, 40), (43, 70)]

# Imports each file where vitlib cannot be imported, and computes what the test compares.
RUN = """
import importlib.util, sys
sys.modules["vitlib"] = None
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
images = load_file(sys.argv[1])
for path in sorted(Path(sys.argv[2]).glob("case_*.py")):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.load()
    assert not model.training
    with torch.inference_mode():
        outputs = {key: model(x) for key, x in images.items()}
        tokens = {f"{key} tokens": model.forward_features(x) for key, x in images.items()}
    save_file({k: v.contiguous() for k, v in (outputs | tokens).items()}, path.with_suffix(".out"))
assert not [name for name in sys.modules if name.startswith("vitlib.")]
"""


def model_of(name: str) -> vitlib.ViT:
    """Build a tiny model of two blocks, so that the last one differs from others."""
    if name in OTHERS:
        sizes = {"depth": 2, **OTHERS[name]}
        return tiny("vit", **sizes)
    return tiny(name, depth=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the files of every model, and run them without vitlib."""
    path = tmp_path_factory.mktemp("vendored")
    images = {f"{h}x{w}": pixels(2, h, w) for h, w in SIZES}
    safetensors.torch.save_file(images, path / "images.safetensors")
    for index, name in enumerate(NAMES):
        write(model_of(name), path / f"case_{index:02}.py")
    command = [sys.executable, "-I", "-c", RUN, str(path / "images.safetensors"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.parametrize("name", NAMES)
def test_file_equals_the_model_without_vitlib(name: str, folder: Path) -> None:
    path = folder / f"case_{NAMES.index(name):02}.py"
    outputs, model = safetensors.torch.load_file(path.with_suffix(".out")), model_of(name)
    with torch.inference_mode():
        for height, width in SIZES:
            images = pixels(2, height, width)
            for key, expected in (
                (f"{height}x{width}", model(images)),
                (f"{height}x{width} tokens", model.forward_features(images)),
            ):
                error = (outputs[key] - expected).abs().max() / expected.abs().max()
                assert error <= 2e-6, (key, error)
            two = outputs[f"{height}x{width}"]
            assert not torch.allclose(two[0], two[1], atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_file_is_short_and_names_no_part_of_vitlib(name: str, folder: Path) -> None:
    text = (folder / f"case_{NAMES.index(name):02}.py").read_text()
    assert len(text.splitlines()) <= MAX_LINES == 250
    code = text.split('"""', 2)[2]
    for word in (
        "vitlib.",
        "import vitlib",
        "ImageProcessor",
        "Predictor",
        "ViTConfig",
        "ImageError",
    ):
        assert word not in code, word
    if "qk" not in str(OTHERS.get(name, RARE.get(name, ""))):
        assert "q_norm" not in code


def test_files_are_clean_for_ruff(folder: Path) -> None:
    settings = ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    ruff = [sys.executable, "-m", "ruff"]
    check = [*ruff, "check", "--ignore", "D", *settings, str(folder)]
    for command in (check, [*ruff, "format", "--check", "--diff", *settings, str(folder)]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def run_test(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, str(path)], capture_output=True, text=True, cwd=path.parent,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_its_test_passes_and_fails_with_other_weights(tmp_path: Path) -> None:
    files = write(tiny("dinov2_registers"), tmp_path / "vit.py")
    done = run_test(files.test)
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout
    state = safetensors.torch.load_file(files.weights)
    key = "blocks.0.attn.q.weight"
    safetensors.torch.save_file({**state, key: state[key] * 1.5}, files.weights)
    done = run_test(files.test)
    assert "2 failed, 2 passed" in done.stdout  # the pinned ones; vitlib reads the same weights
    files.source.write_text(files.source.read_text().replace("x + self.ls2", "x - self.ls2"))
    assert "4 failed" in run_test(files.test).stdout


def test_its_test_skips_without_vitlib(tmp_path: Path) -> None:
    files = write(tiny("vit"), tmp_path / "vit.py")
    (tmp_path / "conftest.py").write_text("import sys\nsys.modules['vitlib'] = None\n")
    done = run_test(files.test)
    assert "2 passed, 2 skipped" in done.stdout
    assert "vitlib is not installed" in done.stdout


def test_state_dict_has_the_names_of_vitlib(tmp_path: Path) -> None:
    model = tiny("clip")
    files = write(model, tmp_path / "vit.py")
    state = safetensors.torch.load_file(files.weights)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_file_says_how_it_was_made_and_the_preprocessing(deit_tiny: Path, tmp_path: Path) -> None:
    model = vitlib.load(deit_tiny)
    text = write(model, tmp_path / "vit.py", name="deit-tiny").source.read_text()
    assert f"Written by vitlib {vitlib.__version__}" in text
    assert "vitlib vendor deit-tiny --into vit.py" in text
    assert "SPDX-License-Identifier: Apache-2.0" in text
    assert "SIZE = (224, 224)" in text
    assert f"MEAN = {tuple(model.image_processor.image_mean)}" in text
    assert "the shorter side is resized to 256 pixels, bicubic (Pillow)" in text


def test_weights_may_be_read_by_whom_the_umask_allows(tmp_path: Path) -> None:
    files = write(tiny("vit"), tmp_path / "vit.py")
    assert files.weights.stat().st_mode == files.source.stat().st_mode


def test_dinov2_small_is_written(dinov2_small: Path, tmp_path: Path) -> None:
    files = write(vitlib.load(dinov2_small), tmp_path / "dino.py")
    assert files.lines <= MAX_LINES


def test_bfloat16_weights_keep_their_dtype(tmp_path: Path) -> None:
    model = tiny("vit").to(torch.bfloat16)
    files = write(model, tmp_path / "vit.py")
    state = safetensors.torch.load_file(files.weights)
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    assert run_test(files.test).returncode == 0
    assert model.dtype == torch.bfloat16


class Doubled(nn.Linear):
    """A part of a user's own."""


def with_own_part() -> vitlib.ViT:
    model = tiny("vit")
    model.blocks[0].mlp.fc1 = Doubled(32, 128)
    return model


def with_hook() -> vitlib.ViT:
    model = tiny("vit")
    model.blocks[0].register_forward_hook(lambda *_: None)
    return model


def with_attention() -> vitlib.ViT:
    return tiny("vit").with_attention(lambda q, k, v, bias: v)  # noqa: ARG005


def with_other_config() -> vitlib.ViT:
    model = tiny("vit")
    model.config = replace(model.config, mlp_dim=64)
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (with_own_part, "blocks.0.mlp.fc1 is a Doubled"),
        (with_hook, "hooks of your own"),
        (with_attention, "of your own"),
        (with_other_config, "not those that its config says"),
        (lambda: vitlib.optimize(tiny("vit")), "expected a ViT as vitlib.load"),
        (lambda: nn.Linear(1, 1), "a Linear: expected a ViT"),
    ],
)
def test_models_with_parts_of_a_users_own_are_refused(make, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        write(make(), tmp_path / "vit.py")
    assert not list(tmp_path.iterdir())


def test_files_that_exist_are_replaced_on_request_alone(tmp_path: Path) -> None:
    (tmp_path / "test_vit.py").write_text("mine")
    with pytest.raises(SourceError, match=r"test_vit.py exists: name another file"):
        write(tiny("vit"), tmp_path / "vit.py")
    assert [path.name for path in tmp_path.iterdir()] == ["test_vit.py"]
    write(tiny("vit"), tmp_path / "vit.py", overwrite=True)
    assert (tmp_path / "test_vit.py").read_text() != "mine"


@pytest.mark.parametrize("name", ["vit.txt", "my-vit.py", "vit", "class.py"])
def test_names_that_python_cannot_import_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="expected a file that Python can import"):
        write(tiny("vit"), tmp_path / name)


def test_folders_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="cannot be written"):
        write(tiny("vit"), tmp_path / "file" / "vit.py")


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vitlib.vendor.writer.write_test", fail)
    with pytest.raises(SourceError, match="No space left"):
        write(tiny("vit"), tmp_path / "vit.py")
    assert not list(tmp_path.iterdir())


def test_a_file_with_other_outputs_is_refused(tmp_path: Path) -> None:
    model = tiny("vit")
    text = write(model, tmp_path / "vit.py").source.read_text()
    check_outputs(model, text)
    with pytest.raises(CheckpointError, match="a fault of vitlib"):
        check_outputs(model, text.replace('approximate="none"', 'approximate="tanh"'))


def test_the_model_and_the_process_stay_as_they_are(tmp_path: Path) -> None:
    model, modules = tiny("vit").train(), set(sys.modules)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    write(model, tmp_path / "vit.py")
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not [name for name in set(sys.modules) - modules if "vendored" in name]


def test_writing_twice_gives_the_same_file(tmp_path: Path) -> None:
    first = write(tiny("beit"), tmp_path / "vit.py").source.read_text()
    second = write(tiny("beit"), tmp_path / "vit.py", overwrite=True).source.read_text()
    assert first == second


def test_command_writes_the_demo(run_cli: Run, tmp_path: Path) -> None:
    target = tmp_path / "vit.py"
    status, out, _ = run_cli("vendor", "demo", "--into", str(target), "--json")
    assert status == 0
    files = json.loads(out)
    assert files["source"] == str(target)
    assert files["lines"] == len(target.read_text().splitlines())
    status, _, err = run_cli("vendor", "demo", "--into", str(target))
    assert status == 1
    assert "exists: name another file, or overwrite it (--overwrite)" in err
    assert run_cli("vendor", "demo", "--into", str(target), "--overwrite")[0] == 0
