"""Output of the command line: labels, vectors, tables, JSON and exit status."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from fixtures.command_line import Run, edit, rewrite, save_tiny_classifier
from paths import FIXTURES


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Folder of a tiny classifier."""
    return save_tiny_classifier(tmp_path / "model")


def test_classify_real_photo(run_cli: Run, deit_tiny: Path, two_cats: Path) -> None:
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


def test_classify_several_photos(run_cli: Run, model: Path, photo: Path) -> None:
    status, out, err = run_cli("classify", photo, photo, "-m", model, "-k", 1)
    assert status == 0
    assert out.count(str(photo)) == 2
    assert err == ""
    status, out, _ = run_cli("classify", photo, "-m", model, "--threshold", 1)
    assert (status, out) == (0, "no label scores 1.0\n")


def test_bad_image_does_not_stop_the_others(run_cli: Run, model: Path, photo: Path) -> None:
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
    status, out, err = run_cli("embed", photo, "-m", model, "-o", photo / "such.npy")
    assert status == 1
    assert "such.npy cannot be written: Not a directory" in err
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
    result = json.loads(run_cli("info", model, "--json")[1])
    assert result["config"]["embed_dim"] == 48
    assert result["problems"] == []
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
    result = json.loads(out)
    assert result["profile"] == "jax"
    assert result["config"]["activation"] == "gelu_tanh"


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
    result = json.loads(run_cli("info", model, "--profiles", "--json")[1])
    assert result["own"] == "hf"
    assert result["profiles"]["jax"]["activation"] == "gelu_tanh"
    assert result["profiles"]["hf"]["preprocessing"]["size"] == {"shortest_edge": 36}


def test_convert_and_verify(run_cli: Run, model: Path, tmp_path: Path) -> None:
    target = tmp_path / "timm"
    status, out, err = run_cli("convert", model, target, "--layout", "timm")
    assert (status, err) == (0, "")
    assert "cannot hold   norm_eps 1e-12 becomes 1e-06: logits " in out
    assert "; timm cannot hold another" in out
    assert re.search(r"^logits .* apart at 32x32", out, re.MULTILINE)
    status, out, err = run_cli("verify", target, "--against", model)
    assert (status, err) == (0, "")
    lines = [re.split(r"  +", line) for line in out.splitlines()]
    assert [line[0] for line in lines] == [
        *("after", "embedding", "block 0", "block 1", "block 2", "norm", "logits"),
        *("tolerance", "diverges at", "verdict"),
    ]
    assert lines[-1] == ["verdict", "equal"]
    status, out, _ = run_cli("verify", target, "--against", "transformers", "--json")
    result = json.loads(out)
    assert (status, result["verdict"], result["diverges_at"]) == (0, "equal", None)
    assert result["errors"]["block 2"] < result["tolerance"]
    assert run_cli("verify", model)[1] == "verdict  healthy\n"
    back = tmp_path / "hf"
    status, out, err = run_cli("convert", target, back, "--layout", "hf", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["drift"] < 2e-6


def test_convert_refuses_drift_that_verify_reports(
    run_cli: Run, model: Path, tmp_path: Path
) -> None:
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
    assert re.search(r"^block 0 .* <- first above the tolerance$", out, re.MULTILINE)
    assert out.splitlines()[-1].endswith("diverges at block 0")
    assert re.search(
        r"^meaning  +the first difference above the tolerance is \S+ % of the largest value; ",
        out,
        re.M,
    )
    assert "made in this block: compare its weights, the eps, GELU form and heads" in out
    rewrite(model, lambda t: t["classifier.weight"].zero_())
    status, out, err = run_cli("verify", model)
    assert (status, err) == (1, "")
    assert "classifier.weight" in out
    assert out.splitlines()[-1].endswith("suspicious")


def test_every_verb_takes_missing_facts_as_options(
    run_cli: Run, model: Path, photo: Path, tmp_path: Path
) -> None:
    assert run_cli("convert", model, tmp_path / "tv", "--layout", "torchvision")[0] == 0
    (tmp_path / "tv/vitlib.json").unlink()
    expected = [
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
        status, out, err = run_cli(*verb, *expected)
        assert (status, err) == (0, ""), verb
        json.loads(out)
    status, _, err = run_cli("verify", tmp_path / "tv", "--against", model)
    assert status == 1  # one head was assumed
    status, _, err = run_cli("info", model, "--source-layout", "timm")
    assert status == 1
    assert err.count("\n") == 1


def test_choices_equal_those_of_the_library() -> None:
    from vitlib.checkpoint import families
    from vitlib.checkpoint.layouts import detect
    from vitlib.cli import options

    assert tuple(detect.LAYOUTS) == options.LAYOUTS
    assert tuple(families.PROFILES) == options.PROFILES


def test_help_of_attend_keeps_its_list(run_cli: Run) -> None:
    """click wraps the list into one paragraph where its mark is not an escaped character."""
    status, out, _ = run_cli("attend", "--help")
    assert status == 0
    assert "\\b" not in out
    assert re.search(r"^  rollout     attention .*\n  heads       each head", out, re.MULTILINE)


def test_runs_as_a_module(deit_tiny: Path, two_cats: Path, tmp_path: Path) -> None:
    """A process of its own: stdout is only the answer, a mistake has no traceback."""
    command = [sys.executable, "-m", "vitlib", "classify", "-m", str(deit_tiny)]
    environment = {**os.environ, "HF_HOME": str(tmp_path)}
    process = subprocess.run(
        [*command, str(two_cats)], capture_output=True, text=True, check=False, env=environment
    )
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.startswith("0.362  tabby, tabby cat\n")
    process = subprocess.run([*command, "gone.png"], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr == "vitlib: error: 'gone.png' is not there: expected an image file\n"


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
def test_wrong_use_exits_with_2(run_cli: Run, arguments: list[str]) -> None:
    status, out, err = run_cli(*arguments)
    assert (status, out) == (2, "")
    assert "Traceback" not in err
