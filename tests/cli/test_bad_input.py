"""Bad models, files, images and devices: one clear line on stderr, and exit status 1."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fixtures import references
from fixtures.command_line import Run, edit, rewrite, save_tiny_classifier
from paths import FIXTURES
from vitlib import ImageProcessor


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Folder of a tiny classifier."""
    return save_tiny_classifier(tmp_path / "model")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


BAD_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "no weights in"),
    "truncated": (lambda m: truncate(m / "model.safetensors"), "is truncated or not a safetensors"),
    "not safetensors": (
        lambda m: (m / "model.safetensors").write_text("hello, I am text"),
        "is truncated or not a safetensors file",
    ),
    "empty": (lambda m: (m / "model.safetensors").write_bytes(b""), "is truncated or not a"),
    "wrong shape": (
        lambda m: rewrite(m, lambda t: t.update({"vit.layernorm.bias": torch.zeros(9)})),
        "wrong shape: vit.layernorm.bias is 9, expected 48",
    ),
    "missing": (
        lambda m: rewrite(m, lambda t: t.pop("vit.layernorm.bias")),
        "missing: vit.layernorm.bias",
    ),
    "unknown": (
        lambda m: rewrite(m, lambda t: t.update(extra=torch.zeros(1))),
        "unexpected: extra",
    ),
    "NaN": (
        lambda m: rewrite(m, lambda t: t["vit.layernorm.bias"].fill_(torch.nan)),
        "NaN or infinite values in: vit.layernorm.bias",
    ),
    "contradiction": (
        lambda m: edit(m, num_hidden_layers=4),
        "config.json contradicts the tensors: num_hidden_layers 4 (the tensors have 3)",
    ),
    "no such heads": (
        lambda m: edit(m, num_attention_heads=7),
        "embed_dim=48 is not a multiple of num_heads=7",
    ),
    "unknown model_type": (
        lambda m: edit(m, model_type="swin"),
        "config.json has model_type 'swin' (its attention is within windows): vitlib does not",
    ),
    "broken config": (lambda m: (m / "config.json").write_text("{"), "config.json is not JSON"),
    "no preprocessing": (
        lambda m: (m / "preprocessor_config.json").unlink(),
        "no preprocessor_config.json in",
    ),
    "broken preprocessing": (
        lambda m: (m / "preprocessor_config.json").write_text("[]"),
        "holds a JSON list: expected an object",
    ),
    "another preprocessing": (
        lambda m: (m / "preprocessor_config.json").write_text('{"image_processor_type": "X"}'),
        "image_processor_type 'X' is not known: vitlib follows those of ViT, DeiT",
    ),
    "patch does not fit": (
        lambda m: (m / "preprocessor_config.json").write_text('{"size": 7}'),
        "images of 7x7 pixels (height x width) hold no whole patch of 8x8: use at least 8x8",
    ),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_model_is_one_line_and_exit_1(
    case: str, run_cli: Run, model: Path, photo: Path, tmp_path: Path
) -> None:
    damage, expected = BAD_MODELS[case]
    assert run_cli("classify", photo, "--model", model)[0] == 0
    damage(model)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for verb in (["classify"], ["embed", "--out", tmp_path / "out.npy"]):
        status, out, err = run_cli(*verb, photo, "--model", model)
        assert (status, out) == (1, "")
        assert err.startswith("vitlib: error: ")
        assert expected in err
        assert err.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("./gone", "'./gone' is not there: expected a folder, a weights file or a hub id"),
        ("nobody/no-such-model", "is no folder or file here and not in the cache"),
        ("vit_tiny_patch16_224", "check the name (an id is OWNER/NAME, such as timm/NAME.TAG)"),
        ("a/b/c", "is not there"),
    ],
)
def test_missing_model_is_one_line_and_exit_1(
    run_cli: Run, photo: Path, name: str, expected: str
) -> None:
    for verb in (["classify", photo, "--model", name], ["info", name]):
        status, out, err = run_cli(*verb, "--local-files-only")
        assert (status, out) == (1, "")
        assert expected in err
        assert err.count("\n") == 1


def lora(folder: Path) -> None:
    adapter = {f"base_model.model.vit.layer.0.q.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    save_file(adapter, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")


def torchscript(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(folder / "model.pt"))


class RunsCode:
    """A pickle that would call print."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("hello",)


def wants_code(folder: Path) -> None:
    torch.save({"model": RunsCode()}, folder / "model.pth")


def two_layouts(folder: Path) -> None:
    references.save_model("vit", folder)
    (folder / "config.json").unlink()
    timm = load_file(FIXTURES / "timm" / "vit" / "model.safetensors")
    rewrite(folder, lambda t: t.update(timm))


def half_renamed(folder: Path) -> None:
    shutil.copytree(FIXTURES / "timm" / "vit", folder, dirs_exist_ok=True)

    def change(t: dict[str, torch.Tensor]) -> None:
        for name in [name for name in t if name.startswith("blocks.1.mlp")]:
            layer = "intermediate" if "fc1" in name else "output"
            leaf = name.rpartition(".")[2]
            t[f"vit.encoder.layer.1.{layer}.dense.{leaf}"] = t.pop(name)

    rewrite(folder, change)


def other_head(folder: Path) -> None:
    references.save_model("vit", folder)
    edit(folder, id2label={str(i): f"x{i}" for i in range(3)})


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a LoRA adapter alone": (lora, "is a LoRA adapter alone: merge it into its base model"),
    "TorchScript": (torchscript, "is a TorchScript archive"),
    "a pickle that wants code": (wants_code, "print"),
    "two layouts": (two_layouts, "2 networks in one file"),
    "half renamed": (half_renamed, "half renamed?"),
    "a head that does not fit": (
        other_head,
        "config.json contradicts the tensors: 3 labels, a head of 5",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_one_line_and_exit_1(case: str, run_cli: Run, tmp_path: Path) -> None:
    make, expected = BAD_FILES[case]
    folder, target = tmp_path / "bad", tmp_path / "out"
    folder.mkdir()
    make(folder)
    verbs = [["info", folder], ["verify", folder, "--against", "transformers"]]
    for verb in (*verbs, ["convert", folder, target, "--layout", "hf"]):
        status, out, err = run_cli(*verb)
        assert status == 1, verb
        assert expected in err, verb
        assert err.startswith("vitlib: error: ")
        assert err.count("\n") == 1
        assert "Traceback" not in out + err
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_source_layout_chooses_between_two(run_cli: Run, tmp_path: Path) -> None:
    two_layouts(tmp_path)
    err = run_cli("info", tmp_path)[2]
    assert "choose one with prefix='vit.' (on the command line --prefix), or layout=" in err
    for choice in (["--prefix", "vit."], ["--source-layout", "hf"], ["--source-layout", "timm"]):
        status, out, err = run_cli("info", tmp_path, *choice)
        if "timm" not in choice:  # the next question, of a width that nobody publishes
            assert "state architecture='vit'" in err
            assert "num_heads= (--num-heads)" in err
            stated = ["--architecture", "vit", "--num-heads", "3"]
            status, out, err = run_cli("info", tmp_path, *choice, *stated)
        assert (status, "layout" in out) == (0, True), choice


def test_training_checkpoint_is_read(
    run_cli: Run, model: Path, tmp_path: Path, photo: Path
) -> None:
    """It loads, and what lay beside the network is expected."""
    state = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    state = {f"module.{name}": tensor for name, tensor in state.items()}
    training = {"state_dict": state, "optimizer": {"state": {}}, "epoch": 7}
    torch.save(training, model / "pytorch_model.bin")
    status, out, err = run_cli("info", model)
    assert (status, err) == (0, "")
    assert re.search(r"^ignores +optimizer, epoch$", out, re.MULTILINE)
    assert run_cli("classify", photo, "-m", model)[0] == 0
    status, out, err = run_cli("convert", model, tmp_path / "out", "--layout", "hf")
    assert (status, err) == (0, "")
    assert re.search(r"^not written +optimizer, epoch$", out, re.MULTILINE)


def strip(path: Path) -> None:
    Image.new("RGB", (20_000, 1)).save(path)


def bomb(path: Path) -> None:
    from image.test_decode import bomb as make

    path.write_bytes(make())


BAD_IMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), "is not there"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "truncated": (truncate, "is damaged or truncated"),
    "not an image": (lambda path: path.write_text("hello"), "is not an image"),
    "a bomb": (bomb, "has over 178956970 pixels"),
    "too thin": (strip, "1x20000 pixels (height x width) would become 3600x72000000"),
    "a device": (
        lambda path: (path.unlink(), path.symlink_to("/dev/null")),
        "is a folder or device",
    ),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_image_is_one_line_and_exit_1(
    case: str, run_cli: Run, model: Path, photo: Path
) -> None:
    damage, expected = BAD_IMAGES[case]
    bad = photo.with_name("bad.png")
    bad.write_bytes(photo.read_bytes())
    damage(bad)
    if case == "too thin":
        processor = ImageProcessor(shortest_edge=3600, crop_size=(32, 32))
        (model / "preprocessor_config.json").write_text(json.dumps(processor.to_dict()))
    status, out, err = run_cli("classify", bad, "--model", model)
    assert (status, out) == (1, "")
    assert err.startswith(f"vitlib: error: '{bad}' ")
    assert expected in err
    assert err.count("\n") == 1


def test_photo_of_one_pixel_is_classified(run_cli: Run, model: Path, tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    assert run_cli("classify", tmp_path / "dot.png", "--model", model)[0] == 0


def test_missing_device_is_one_line_and_exit_1(run_cli: Run, model: Path, photo: Path) -> None:
    status, _, err = run_cli("classify", photo, "-m", model, "--device", "cuda:77")
    assert status == 1
    assert "device='cuda:77' cannot be had" in err
    assert err.count("\n") == 1
