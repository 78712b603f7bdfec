"""The command line: what it prints, and that each mistake is one clear line and exit 1."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fixtures import references
from paths import FIXTURES
from vitlib import ImageProcessor

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny classifier with its preprocessing."""
    folder = tmp_path / "model"
    references.saved("vit", folder)
    processor = ImageProcessor(shortest_edge=36, crop_size=(32, 32), resample=3)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor.to_dict()))
    return folder


def test_classify_a_real_photo(run_cli: Run, deit_tiny: Path, two_cats: Path) -> None:
    status, out, err = run_cli("classify", two_cats, "--model", deit_tiny)
    assert status == 0
    assert err == ""
    assert out.splitlines()[0] == "0.362  tabby, tabby cat"
    assert len(out.splitlines()) == 5
    status, out, _ = run_cli("classify", two_cats, "--model", deit_tiny, "--top-k", 2, "--json")
    [row] = json.loads(out)
    assert row["image"] == str(two_cats)
    assert [p["index"] for p in row["predictions"]] == [281, 282]
    assert row["predictions"][0]["score"] == pytest.approx(0.362, abs=1e-3)


def test_classify_several(run_cli: Run, model: Path, photo: Path) -> None:
    status, out, err = run_cli("classify", photo, photo, "-m", model, "-k", 1)
    assert status == 0
    assert out.count(str(photo)) == 2
    assert err == ""
    status, out, _ = run_cli("classify", photo, "-m", model, "--threshold", 1)
    assert (status, out) == (0, "no label scores 1.0\n")


def test_one_bad_image_does_not_stop_the_others(run_cli: Run, model: Path, photo: Path) -> None:
    status, out, err = run_cli("classify", photo, "nope.jpg", photo, "-m", model)
    assert status == 1
    assert out.count(str(photo)) == 2
    assert err == "vitlib: error: 'nope.jpg' is not there: expected an image file\n"
    status, out, err = run_cli("classify", photo, "nope.jpg", "-m", model, "--json")
    assert status == 1
    good, bad = json.loads(out)
    assert len(good["predictions"]) == 5
    assert bad == {
        "image": "nope.jpg",
        "error": "'nope.jpg' is not there: expected an image file",
    }


def test_embed(run_cli: Run, model: Path, photo: Path, tmp_path: Path) -> None:
    out_file = tmp_path / "vectors.npy"
    status, out, _ = run_cli("embed", photo, photo, "-m", model, "--out", out_file)
    assert (status, out) == (0, f"{out_file}: 2 x 48 float32\n")
    vectors = np.load(out_file)
    assert vectors.dtype == np.float32
    assert np.array_equal(vectors[0], vectors[1])
    status, out, err = run_cli("embed", photo, "x", "-m", model, "-o", out_file, "--json")
    assert status == 1
    assert json.loads(out)["failed"] == [
        {"image": "x", "row": 1, "error": "'x' is not there: expected an image file"}
    ]
    assert np.isnan(np.load(out_file)).all(axis=1).tolist() == [False, True]
    status, out, err = run_cli("embed", "x", "-m", model, "-o", tmp_path / "none.npy")
    assert (status, out) == (1, "")
    assert not (tmp_path / "none.npy").exists()
    status, out, err = run_cli("embed", photo, "-m", model, "-o", tmp_path / "no/such.npy")
    assert status == 1
    assert "such.npy cannot be written: no folder" in err
    status, _, err = run_cli("embed", photo, "-m", model, "-o", tmp_path / "e.txt")
    assert (status, err) == (
        1,
        "vitlib: error: 'e.txt': expected a name that ends in .npy\n",
    )


def test_info(run_cli: Run, model: Path) -> None:
    status, out, err = run_cli("info", model)
    assert (status, err) == (0, "")
    table = dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines())
    assert table["family"] == "vit"
    assert table["image"] == "32x32 pixels, 3 channels"
    assert table["tokens"] == "17 (class, patches)"
    assert table["classes"] == "5 (thing 0; thing 1; thing 2; …)"
    assert table["preprocessing"].startswith("resize the shorter edge to 36 (bicubic); crop 32x32;")
    assert table["loads"] == "56 tensors"
    found = json.loads(run_cli("info", model, "--json")[1])
    assert found["config"]["embed_dim"] == 48
    assert found["problems"] == []
    tensors = load_file(model / "model.safetensors")
    del tensors["vit.layernorm.bias"]
    save_file(tensors, model / "model.safetensors")
    status, out, err = run_cli("info", model)
    assert status == 1
    assert "missing: vit.layernorm.bias" in err


def test_info_of_a_file_without_config(run_cli: Run) -> None:
    status, out, err = run_cli("info", FIXTURES / "torchvision" / "vit.pth")
    assert (status, err) == (0, "")
    table = dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines())
    assert table["layout"] == table["profile"] == "torchvision"
    assert table["assumed"].startswith("num_heads 1, norm_eps 1e-06, activation gelu, position_res")
    assert (
        "--num-heads or --activation or vitlib.load(..., config=ViTConfig(...))" in table["assumed"]
    )
    status, out, _ = run_cli("info", FIXTURES / "torchvision" / "vit.pth", "--num-heads", 2)
    assert "2 heads" in out
    assert "--num-heads" not in out
    status, out, _ = run_cli("info", FIXTURES / "timm" / "vit", "--profile", "jax", "--json")
    found = json.loads(out)
    assert found["profile"] == "jax"
    assert found["config"]["activation"] == "gelu_tanh"


def test_info_profiles(run_cli: Run, model: Path) -> None:
    status, out, err = run_cli("info", model, "--profiles")
    assert (status, err) == (0, "")
    head, *lines = (re.split(r"  +", line.strip()) for line in out.splitlines())
    assert head == ["hf *", "timm", "original", "jax", "torchvision"]
    table = {name: cells for name, *cells in lines}
    assert table["norm_eps"] == ["1e-12", "1e-06", "1e-06", "1e-06", "1e-06"]
    assert table["activation"] == ["gelu", "gelu", "gelu", "gelu_tanh", "gelu"]
    assert table["position_resize"][0] == "bicubic"
    assert table["resize"][0] == "short edge 36 (bicubic)"
    assert list(table) == [
        *("norm_eps", "activation", "position_resize"),
        *("resize", "crop", "mean", "std"),
    ]
    found = json.loads(run_cli("info", model, "--profiles", "--json")[1])
    assert found["own"] == "hf"
    assert found["profiles"]["jax"]["activation"] == "gelu_tanh"
    assert found["profiles"]["hf"]["preprocessing"]["size"] == {"shortest_edge": 36}


def test_convert_and_verify(run_cli: Run, model: Path, tmp_path: Path) -> None:
    target = tmp_path / "timm"
    status, out, err = run_cli("convert", model, target, "--layout", "timm")
    assert (status, err) == (0, "")
    assert "cannot hold   norm_eps: 1e-12 becomes 1e-06 (logits " in out
    assert re.search(r"^logits .* apart at 32x32", out, re.MULTILINE)
    status, out, err = run_cli("verify", target, "--against", model)
    assert (status, err) == (0, "")
    lines = [re.split(r"  +", line) for line in out.splitlines()]
    assert [line[0] for line in lines] == [
        *("after", "embedding", "block 0", "block 1", "block 2", "norm", "logits"),
        *("diverges at", "verdict"),
    ]
    assert lines[-1] == ["verdict", "equal"]
    status, out, _ = run_cli("verify", target, "--against", "transformers", "--json")
    found = json.loads(out)
    assert (status, found["verdict"], found["diverges_at"]) == (0, "equal", None)
    assert found["errors"]["block 2"] < found["tolerance"]
    assert run_cli("verify", model)[1] == "verdict  healthy\n"
    back = tmp_path / "hf"
    status, out, err = run_cli("convert", target, back, "--layout", "hf", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["drift"] < 2e-6


def test_convert_refuses_and_verify_tells(run_cli: Run, model: Path, tmp_path: Path) -> None:
    edit(model, hidden_act="gelu_pytorch_tanh")
    command = ("convert", model, tmp_path / "out", "--layout", "torchvision")
    status, out, err = run_cli(*command)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "activation gelu_tanh becomes gelu" in err
    assert "--allow-drift" in err
    assert not (tmp_path / "out").exists()
    assert run_cli(*command, "--allow-drift")[0] == 0
    status, out, err = run_cli("verify", tmp_path / "out", "--against", model)
    assert (status, err) == (1, "")
    assert re.search(r"^block 0 .* <- first difference$", out, re.MULTILINE)
    assert out.splitlines()[-1].endswith("diverges at block 0")
    rewrite(model, lambda t: t["classifier.weight"].zero_())
    status, out, err = run_cli("verify", model)
    assert (status, err) == (1, "")
    assert "classifier.weight" in out
    assert out.splitlines()[-1].endswith("suspicious")


def test_every_verb_takes_what_the_files_do_not_say(
    run_cli: Run, model: Path, photo: Path, tmp_path: Path
) -> None:
    assert run_cli("convert", model, tmp_path / "tv", "--layout", "torchvision")[0] == 0
    (tmp_path / "tv/vitlib.json").unlink()
    told = [
        *("--num-heads", 4, "--profile", "hf", "--source-layout", "torchvision"),
        *("--local-files-only", "--json"),
    ]
    for verb in (
        ("info", tmp_path / "tv"),
        ("verify", tmp_path / "tv", "--against", model),
        ("convert", tmp_path / "tv", tmp_path / "back", "--layout", "hf"),
        ("classify", photo, "--model", tmp_path / "tv"),
        ("embed", photo, "--model", tmp_path / "tv", "--out", tmp_path / "out.npy"),
    ):
        status, out, err = run_cli(*verb, *told)
        assert (status, err) == (0, ""), verb
        json.loads(out)
    status, _, err = run_cli("verify", tmp_path / "tv", "--against", model)
    assert status == 1  # one head was assumed
    status, _, err = run_cli("info", model, "--source-layout", "timm")
    assert status == 1
    assert err.count("\n") == 1


def test_the_choices_are_those_of_the_library() -> None:
    from vitlib.checkpoint.layouts import detect, families
    from vitlib.cli import options

    assert tuple(detect.LAYOUTS) == options.LAYOUTS
    assert tuple(families.PROFILES) == options.PROFILES


def test_help_needs_no_torch() -> None:
    script = (
        "import sys; sys.argv = ['vitlib', '--help']\n"
        "from vitlib.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'PIL'} & set(sys.modules), 'torch was loaded'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    for verb in ("classify", "embed", "info", "convert", "verify"):
        assert verb in done.stdout


def test_as_a_module(deit_tiny: Path, two_cats: Path, tmp_path: Path) -> None:
    """A process of its own: stdout is only the answer, a mistake has no traceback."""
    command = [sys.executable, "-m", "vitlib", "classify", "-m", str(deit_tiny)]
    environment = {**os.environ, "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [*command, str(two_cats)], capture_output=True, text=True, check=False, env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("0.362  tabby, tabby cat\n")
    done = subprocess.run([*command, "gone.png"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "vitlib: error: 'gone.png' is not there: expected an image file\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["classify"],
        ["classify", "x.jpg", "--top-k", "0"],
        ["classify", "x.jpg", "--threshold", "2"],
        ["embed", "x.jpg"],
        ["nosuchverb"],
        ["info"],
        ["classify", "x.jpg", "--nosuchoption"],
        ["info", "x", "--profiles", "--profile", "hf"],
        ["info", "x", "--num-heads", "0"],
        ["convert", "x"],
        ["convert", "x", "y"],
        ["convert", "x", "y", "--layout", "tf"],
        ["verify"],
        ["verify", "x", "--profile", "tf"],
    ],
)
def test_wrong_use_is_exit_2(run_cli: Run, arguments: list[str]) -> None:
    status, out, err = run_cli(*arguments)
    assert (status, out) == (2, "")
    assert "Traceback" not in err


# --- bad input: one clear line, exit 1 ------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


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
def test_bad_models(case: str, run_cli: Run, model: Path, photo: Path, tmp_path: Path) -> None:
    damage, told = BAD_MODELS[case]
    assert run_cli("classify", photo, "--model", model)[0] == 0
    damage(model)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for verb in (["classify"], ["embed", "--out", tmp_path / "out.npy"]):
        status, out, err = run_cli(*verb, photo, "--model", model)
        assert (status, out) == (1, "")
        assert err.startswith("vitlib: error: ")
        assert told in err
        assert err.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("./gone", "'./gone' is not there: expected a folder, a weights file or a hub id"),
        ("nobody/no-such-model", "is no folder or file here, is not in the cache, and the hub"),
        ("a/b/c", "is not there"),
    ],
)
def test_models_that_are_nowhere(run_cli: Run, photo: Path, name: str, told: str) -> None:
    for verb in (["classify", photo, "--model", name], ["info", name]):
        status, out, err = run_cli(*verb, "--local-files-only")
        assert (status, out) == (1, "")
        assert told in err
        assert err.count("\n") == 1


# --- files that are no checkpoint, or nearly one, in every layout ---------------------------------


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
    references.saved("vit", folder)
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
    references.saved("vit", folder)
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
def test_bad_files(case: str, run_cli: Run, tmp_path: Path) -> None:
    make, told = BAD_FILES[case]
    folder, target = tmp_path / "bad", tmp_path / "out"
    folder.mkdir()
    make(folder)
    verbs = [["info", folder], ["verify", folder, "--against", "transformers"]]
    for verb in (*verbs, ["convert", folder, target, "--layout", "hf"]):
        status, out, err = run_cli(*verb)
        assert status == 1, verb
        assert told in err, verb
        assert err.startswith("vitlib: error: ")
        assert err.count("\n") == 1
        assert "Traceback" not in out + err
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_two_layouts_can_be_chosen_from(run_cli: Run, tmp_path: Path) -> None:
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


def test_a_training_checkpoint(run_cli: Run, model: Path, tmp_path: Path, photo: Path) -> None:
    """It loads, and what lay beside the network is told."""
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
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "is a folder or device"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images(case: str, run_cli: Run, model: Path, photo: Path) -> None:
    damage, told = BAD_IMAGES[case]
    bad = photo.with_name("bad.png")
    bad.write_bytes(photo.read_bytes())
    damage(bad)
    if case == "too thin":
        processor = ImageProcessor(shortest_edge=3600, crop_size=(32, 32))
        (model / "preprocessor_config.json").write_text(json.dumps(processor.to_dict()))
    status, out, err = run_cli("classify", bad, "--model", model)
    assert (status, out) == (1, "")
    assert err.startswith(f"vitlib: error: '{bad}' ")
    assert told in err
    assert err.count("\n") == 1


def test_a_one_pixel_photo_is_a_photo(run_cli: Run, model: Path, tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    assert run_cli("classify", tmp_path / "dot.png", "--model", model)[0] == 0


def test_a_device_that_is_not_there(run_cli: Run, model: Path, photo: Path) -> None:
    status, _, err = run_cli("classify", photo, "-m", model, "--device", "cuda:77")
    assert status == 1
    assert "device=cuda:77" in err
    assert err.count("\n") == 1
