"""Mistakes that vitlib finetune refuses, one clear line each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fixtures.finetune_runs import (
    Run,
    draw_photos,
    truncate,
)

pytest.importorskip("yaml", reason="settings files need PyYAML: pip install 'vitlib[train]'")


def test_output_of_another_run_is_refused(train: Run, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert train()[0] == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (data / "dark" / "0.png").rename(data / "dark" / "zero.png")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "run.json").write_text("[1]")
    for options, to, match in (
        ((), out, "holds a run already: go on with it"),
        (("--resume",), out, "a run with another training"),
        (("--resume", "--learning-rate", 0.5), out, "learning_rate (0.0001)"),
        ((), tmp_path / "full", "is not an empty folder"),
        (("--resume",), tmp_path / "full", "is not an empty folder"),
        (("--resume",), tmp_path / "odd", "is damaged or of another version"),
        ((), tmp_path / "file" / "out", "file is no folder to write to"),
    ):
        status, output, err = train(*options, out=to)
        assert (status, output) == (1, "")
        assert match in err
        assert len(err.splitlines()) == 1
    status, _, err = train(out=tmp_path / "file")
    assert status == 2
    assert "is a file" in err
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]


SETTINGS: dict[str, str] = {
    "learning_rat: 1": "did you mean learning_rate",
    "a: [1\n  b: {": "line 2: expected ',' or ']'",
    "#" * 2**21: "has more than 1048576 bytes",
    "learning_rate: [1, 2]": "learning_rate=[1, 2]: expected a number",
    "num_train_epochs: two": "num_train_epochs='two': expected a number",
    "num_train_epochs: 1.5": "expected a whole number",
    "head_only: 3": "head_only=3: expected true or false",
    "- 1\n- 2": "holds a list: expected lines such as learning_rate: 0.001",
    "augment: [1]": "expected a set's name such as light",
    "apply_augmentations: maybe": "expected true or false",
    "loss: 5": "loss=5: expected settings of this part below it",
    "lora_targets: [a]": "expected one of q, k, v, out, fc1, fc2",
    "class_weights: 3": "expected a list",
    "crop_scale: [1, 2, 3]": "expected 2 numbers",
    "precision: !!set {a}": "expected one of fp32, bf16, fp16",
    "learning_rate: 1\nlearning_rate: 2": "learning_rate is given twice",
    "image_width: 16\nimage_height: 32": "image_size is given twice",
    "class_weights: &a [1]\npositive_weights: *a": "line 2: this is a name (*)",
    "optim: &o\n  optim: *o": "line 2: this is a name (*)",
    "[" * 5000: "this is too deep",
    "seed: " + "9" * 6000: "is no settings file",
    "learning_rate: " + "9" * 4000: "999...999",
    "learning_rate: '" + "x" * 9999 + "'": "xxx...xxx",
    "optim: 2020-99-99": "month must be in 1..12",
    "optim: !!python/object/apply:os.getcwd []": "could not determine a constructor",
    "\x00": "unacceptable character",
    "\udcff": "is not UTF-8 text",
}


@pytest.mark.parametrize("text", SETTINGS, ids=lambda text: text[:20])
def test_bad_settings_file_is_refused(text: str, train: Run, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text, errors="surrogateescape")
    status, output, err = train("--config", file)
    assert (status, output) == (1, "")
    assert err.startswith(f"vitlib: error: {file}")
    assert SETTINGS[text] in err
    assert len(err.splitlines()) == 1
    assert len(err) < 1000
    assert not (tmp_path / "out").exists()


FLAGS: dict[str, str] = {
    "--lora-r=-1": "lora_r=-1: expected a number, 0 to 4096",
    "--learning-rate=nan": "learning_rate=nan: expected a number",
    "--learning-rate=-1": "learning_rate=-1.0: expected a number, 0 or more",
    "--learning-rate=inf": "learning_rate=inf",
    "--per-device-train-batch-size=0": "expected a number, 1 to",
    "--num-train-epochs=99999999999999999999": "expected a number, 0 to",
    "--max-steps=0": "max_steps=0: expected 1 or more",
    "--max-steps=-5": "max_steps=-5",
    "--seed=1180591620717411303424": "expected a number, 0 to 4294967295",
    "--seed=-1": "seed=-1",
    "--adam-beta1=1": "adam_beta1=1.0: expected a number",
    "--image-size=7": "image_size=(7, 7) is smaller than patch_size=(8, 8)",
    "--dropout=x": "dropout='x': expected a number",
    "--crop-scale=0.5": "crop_scale=['0.5']: expected 2 numbers",
    "--crop-ratio=none": "crop_ratio=['none']: expected 2 numbers",
    "--validation-split=0 --early-stopping-patience=2": "need a validation set",
    "--validation-split=0.95": "validation_split=0.95: expected a number, 0 to 0.9",
    "--precision=fp16": "'fp16' is for CUDA: use bf16 or fp32",
    "--layers-to-freeze=99": "expected 0 to 3, the embedding and 2 blocks",
    "--head-only --lora-r=4": "head_only trains no block",
    "--class-weights=1": "class_weights has 1: expected 2, one a class",
    "--class-weights=1,-1": "class_weights are -1 to 1: expected numbers of 0 to 1e+06",
    "--class-weights=1,1e38": "class_weights are 1 to 1e+38: expected",
    "--class-weights=0,0": "class_weights are all 0",
    "--class-weights=a,b": "class_weights='a': expected a number",
    "--positive-weights=1,1": "positive_weights is for many labels a photo",
    "--weighted-loss=1 --class-weights=1,1": "leave out weighted_loss, or class_weights",
    "--metric-for-best-model=beauty": "'beauty': expected one of loss, accuracy",
    "--device=nonsense": "device='nonsense' cannot be had on this machine",
    "--device=meta": "device='meta' cannot be had",
    "--device=cuda:99": "device='cuda:99' cannot be had",
    "--model=nothing-here": "'nothing-here' is no folder or file here",
    "--from-scratch=": "as in S/16; or width x blocks x heads / patch, as in 96x8x4/4",
    "--from-scratch=S": "no new ViT of 'S' can be made: expected one of Ti, S, B",
    "--from-scratch=0x0x0/0": "patch_size=0: expected a whole number of at least 1",
    "--from-scratch=96x6x5/4": "embed_dim=96 is not a multiple of num_heads=5",
    "--from-scratch=1e9x2x2/4": "no new ViT of '1e9x2x2/4' can be made",
    "--from-scratch=100000x100x1/8": "100 blocks and takes 89407.7 GiB",
    "--from-scratch=16x999999999x1/8": "has 999999999 blocks",
    "--from-scratch=1x2000x1/8": "expected at most 1000 blocks",
    "--from-scratch=16x1x2/8 --image-size=7": "image_size=(7, 7) is smaller",
}
MISUSED: dict[str, str] = {
    "--from-scratch=16x1x2/8 --model=model": "--from-scratch trains a new model",
    "--from-scratch=16x1x2/8 --num-heads=2": "--from-scratch trains a new model",
    "--learning-rate=x": "'x' is not a valid float",
    "--precision=fp8": "'fp8' is not one of 'fp32', 'bf16', 'fp16'",
    "--augment=wild": "'wild' is not one of 'none', 'light', 'strong', 'card'",
    "--config=.": "'.' is a directory",
}


@pytest.mark.parametrize("options", FLAGS)
def test_bad_flag_values_are_refused(
    options: str, run_cli: Run, data: Path, model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model_option = () if "--from-scratch" in options or "--model" in options else ("-m", model)
    out = tmp_path / "out"
    hub_option = ("--local-files-only",) if "--model" in options else ()
    status, output, err = run_cli(
        "finetune", data, "-o", out, *model_option, *hub_option, *options.split()
    )
    assert (status, output) == (1, "")
    assert err.startswith("vitlib: error: ")
    assert FLAGS[options] in err
    assert len(err.splitlines()) == 1
    assert len(err) < 1000
    assert not out.exists()


@pytest.mark.parametrize("options", MISUSED)
def test_conflicting_flags_exit_with_2(
    options: str, run_cli: Run, data: Path, tmp_path: Path
) -> None:
    status, output, err = run_cli("finetune", data, "-o", tmp_path / "out", *options.split())
    assert (status, output) == (2, "")
    assert MISUSED[options] in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def make_single_class(data: Path) -> Path:
    return draw_photos(data.parent / "one", ("dark",))


def make_empty_folder(data: Path) -> Path:
    (data.parent / "empty").mkdir()
    return data.parent / "empty"


def missing_folder(data: Path) -> Path:
    return data.parent / "nothing"


def make_broken_photos(data: Path) -> Path:
    for path in data.glob("*/*.png"):
        path.write_bytes(b"no photo")
    return data


def make_missing_photo(data: Path) -> Path:
    (data / "labels.csv").write_text("dark/0.png,dark\nlight/0.png,light\ndark/99.png,dark\n")
    return data


def make_mixed_labels(data: Path) -> Path:
    rows = [{"image": "dark/0.png", "label": "a"}, {"image": "dark/1.png", "label": ["b"]}]
    (data / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return data / "rows.jsonl"


def make_text_file(data: Path) -> Path:
    (data / "notes.txt").write_text("dark/0.png,dark\n")
    return data / "notes.txt"


DATA: dict[Callable[[Path], Path], str] = {
    make_single_class: "have the label 'dark': expected two classes or more",
    make_empty_folder: "no photo in it",
    missing_folder: "is not there: expected a folder with a folder per class",
    make_broken_photos: "none of 16 photos can be used",
    make_missing_photo: "line 3: 'dark/99.png' is not there",
    make_mixed_labels: "labels are a text in line 1 and a list of texts in line 2: use one form",
    make_text_file: "ends in .txt: expected a folder with",
}


@pytest.mark.parametrize("make", DATA, ids=lambda make: make.__name__)
def test_bad_sets_of_photos_are_refused(
    make: Callable[[Path], Path], train: Run, data: Path, tmp_path: Path
) -> None:
    skip: tuple[Any, ...] = ("--on-bad-image", "skip") if make is make_broken_photos else ()
    status, output, err = train(*skip, data=make(data))
    assert (status, output) == (1, "")
    assert DATA[make] in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_model_without_preprocessing_is_refused(train: Run, model: Path, tmp_path: Path) -> None:
    (model / "preprocessor_config.json").unlink()
    status, _, err = train()
    assert status == 1
    assert f"no preprocessor_config.json in '{model}'" in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_loss_that_is_not_finite_stops_the_run(train: Run, tmp_path: Path) -> None:
    status, output, err = train(
        "--learning-rate", 1e30, "--max-grad-norm", 0, "--warmup-ratio", 0, "--optim", "sgd",
        "--momentum", 0, "--save-steps", 1,
    )  # fmt: skip
    assert (status, output) == (1, "")
    assert "the loss is nan at step 2 of 4: the checkpoint of step 1 is kept" in err
    assert "a lower learning_rate than 1e+30" in err
    assert len(err.splitlines()) == 1
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000001"]
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_unusual_settings_print_a_note(train: Run, data: Path) -> None:
    (data / "empty").mkdir()
    status, _, err = train("--validation", data)
    assert status == 0
    assert "note: no training photo shows empty" in err
    assert "note: 16 photos are in the training set and the validation set" in err


def test_skipped_photos_are_in_the_card(train: Run, data: Path, tmp_path: Path) -> None:
    truncate(data / "dark" / "0.png")
    status, _, err = train("--on-bad-image", "skip", "--validation-split", 0)
    assert status == 1
    assert "0.png" in err
    assert "1 more could not be read" in (tmp_path / "out" / "README.md").read_text()


def test_run_without_a_step_can_restart(train: Run, tmp_path: Path) -> None:
    """Its folder may go; nothing else is advised."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("{}")
    status, _, err = train()
    assert status == 1
    assert "no checkpoint yet: if it has ended, delete the folder" in err


def test_config_of_another_type_is_refused(data: Path, tmp_path: Path) -> None:
    from vitlib.errors import ConfigError
    from vitlib.train import finetune

    with pytest.raises(
        ConfigError, match=r"expected a TrainConfig, such as TrainConfig\.from_dict"
    ):
        finetune(data, "demo", tmp_path / "out", config={"num_train_epochs": 1})  # type: ignore[arg-type]
