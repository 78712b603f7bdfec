"""Output of vitlib finetune, every flag, and kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image

from fixtures.finetune_runs import (
    QUICK,
    Run,
    check_opens_in_transformers,
    draw_photos,
    read_settings,
    truncate,
)
from vitlib import Predictor
from vitlib.cli.finetune import finetune as command
from vitlib.train.config import PARTS
from vitlib.train.log import read_events

pytest.importorskip("yaml", reason="settings files need PyYAML: pip install 'vitlib[train]'")


def test_finetune_single_label(train: Run, tmp_path: Path, photo: Path) -> None:
    out = tmp_path / "out"
    status, output, err = train("--num-train-epochs", 6, "--learning-rate", 0.005)
    assert (status, err) == (0, "")
    table = dict(line.split("  ", 1) for line in output.split("\n\n")[-1].splitlines())
    assert table["labels"].strip() == "dark, light"
    assert table["steps"].strip().startswith("24, ")  # 13 photos by 4s, six times
    assert table["checkpoint"].strip() == str(out)
    data = str(tmp_path / "data")
    assert table["training"].strip() == f"13 photos of {data}"
    assert table["validation"].strip() == f"3 photos of {data}"
    assert float(table["accuracy"]) == 1
    check_opens_in_transformers(out, photo, ("dark", "light"), "single_label_classification")
    assert {path.name for path in out.iterdir()} >= {
        "README.md", "config.json", "metrics.csv", "metrics.jsonl", "model.safetensors",
        "preprocessor_config.json", "train_config.yaml",
    }  # fmt: skip


@pytest.mark.usefixtures("multi_label_csv")
def test_finetune_multi_label(train: Run, tmp_path: Path, photo: Path) -> None:
    status, output, err = train("--multi-label", "--json", "--positive-weights", "1 2 3")
    assert (status, err) == (0, "")
    done = json.loads(output)
    assert done["labels"] == ["day", "night", "sky"]
    assert 0 <= done["metrics"]["iou"] <= 1
    assert done["left_out"] == []
    assert (done["out"], done["stopped_early"]) == (str(tmp_path / "out"), False)
    task = "multi_label_classification"
    check_opens_in_transformers(tmp_path / "out", photo, ("day", "night", "sky"), task)
    status, _, err = train(out=tmp_path / "other")
    assert status == 1
    assert "line 2: 'dark/0.png' has no label" in err
    assert "--multi-label" in err
    assert len(err.splitlines()) == 1


def test_validation_set(train: Run, tmp_path: Path) -> None:
    validation = draw_photos(tmp_path / "validation", count=3)
    status, _, err = train("--validation", validation)
    assert (status, err) == (0, "")
    about = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (about["training"]["photos"], about["validation"]["photos"]) == (16, 6)
    (validation / "gray").mkdir()
    Image.new("RGB", (20, 20)).save(validation / "gray" / "a.png")
    status, _, err = train("--validation", validation, out=tmp_path / "other")
    assert status == 1
    assert "'gray' (photos: 1)" in err
    assert not (tmp_path / "other").exists()


def test_flags_override_settings_file(train: Run, tmp_path: Path) -> None:
    file, out = tmp_path / "settings.yaml", tmp_path / "out"
    file.write_text(
        "number_of_epochs: 9\ntraining_batch_size: 2\noptimizer: adamw_hf\nrandom_seed: 7\n"
        "learning_rate_scheduler: warmup_linear\nlearning_rate: 1e-3\napply_augmentations: true\n"
        "tune:\n  lora_targets: [q, out]\n  lora_r: 2\nloss:\n"
    )
    table = "note: nesterov=False does nothing with optim=adamw\n"
    status, _, err = train("--config", file, "--max-steps", 2, "--no-nesterov")
    assert (status, err) == (0, table)
    config = read_settings(out)
    assert config.run.num_train_epochs == 1  # flags come first
    assert config.run.per_device_train_batch_size == 4
    assert (config.run.max_steps, config.run.seed) == (2, 7)
    assert (config.optim.lr_scheduler_type, config.optim.learning_rate) == ("linear", 1e-3)
    assert config.optim.nesterov is False
    assert (config.tune.lora_targets, config.tune.lora_r) == (("q", "out"), 2)
    assert (config.augment.crop_scale, config.augment.hue) == ((0.08, 1.0), 0.4)
    again = tmp_path / "again"
    status, _, err = train("--config", out / "train_config.yaml", out=again)
    assert (status, err) == (0, table)
    for name in ("train_config.yaml", "model.safetensors"):
        assert (again / name).read_bytes() == (out / name).read_bytes()


def test_flags_of_every_type(train: Run, tmp_path: Path) -> None:
    status, _, err = train(
        "--augment", "strong", "--crop-scale", "none", "--crop-ratio", "0.5, 2", "--dropout", "0.1",
        "--drop-path", "null", "--greater-is-better", "--tensorboard", "--no-tensorboard",
        "--lora-targets", "fc1 v", "--lora-r", "2", "--lr-scheduler-type", "constant",
        "--class-weights", "1 2",
    )  # fmt: skip
    assert (status, err) == (0, "")
    config = read_settings(tmp_path / "out")
    assert config.augment.crop_scale is None
    assert config.augment.crop_ratio == (0.5, 2)
    assert (config.augment.mixup_alpha, config.augment.cutmix_alpha) == (0.8, 1.0)  # strong's
    assert (config.tune.dropout, config.tune.drop_path) == (0.1, None)
    assert (config.run.greater_is_better, config.run.tensorboard) == (True, False)
    assert config.tune.lora_targets == ("fc1", "v")
    assert config.loss.class_weights == (1, 2)


def test_flag_none_overrides_settings_file(train: Run, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("dropout: 0.5\ncrop_scale: [0.5, 1]\nattention_dropout: none\n")
    assert train("--config", file, "--dropout", "none", "--crop-scale", "null")[0] == 0
    config = read_settings(tmp_path / "out")
    assert (config.tune.dropout, config.augment.crop_scale) == (None, None)
    assert config.tune.attention_dropout is None


def test_every_setting_has_a_flag_with_help(run_cli: Run) -> None:
    flags = {parameter.name: parameter for parameter in command.params}
    status, output, err = run_cli("finetune", "--help")
    assert (status, err) == (0, "")
    for kind in PARTS.values():
        for field in fields(kind):
            assert field.metadata["help"], field.name
            assert flags[field.name].help, field.name
            assert "--" + field.name.replace("_", "-") in output


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\nsys.argv = ['vitlib', 'finetune', '--help']\nfrom vitlib.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert b"--learning-rate" in done.stdout


def test_from_scratch(train: Run, tmp_path: Path, photo: Path) -> None:
    status, _, err = train("--from-scratch", "16x1x2/8", "--image-size", 16)
    assert (status, err) == (0, "")
    check_opens_in_transformers(
        tmp_path / "out", photo, ("dark", "light"), "single_label_classification"
    )
    cfg = Predictor.load(tmp_path / "out").model.config
    assert (cfg.embed_dim, cfg.depth, cfg.num_heads) == (16, 1, 2)
    assert (cfg.patch_size, cfg.image_size) == ((8, 8), (16, 16))


def test_lora_of_every_linear(train: Run, tmp_path: Path, photo: Path) -> None:
    status, _, err = train("--lora-r", 2, "--lora-targets", "q k v out fc1 fc2")
    assert (status, err) == (0, "")
    check_opens_in_transformers(
        tmp_path / "out", photo, ("dark", "light"), "single_label_classification"
    )


def test_early_stopping(train: Run, tmp_path: Path) -> None:
    never = ("--early-stopping-threshold", 5)  # more than any accuracy can improve
    options = ("--num-train-epochs", 9, "--early-stopping-patience", 2, "--json")
    status, output, err = train(*options, *never)
    assert (status, err) == (0, "")
    done = json.loads(output)
    assert done["stopped_early"]
    assert done["steps"] == 12
    # The lowest loss decides among evaluations of equal accuracy.
    evaluations = [
        e for e in read_events(tmp_path / "out" / "metrics.jsonl") if e["event"] == "eval"
    ]
    assert [e["step"] for e in evaluations] == [4, 8, 12]
    first = evaluations[0]["accuracy"]
    equal = [e for e in evaluations if e["accuracy"] == first]
    assert done["best_step"] == min(equal, key=lambda e: e["loss"])["step"]


def test_squash_trains_on_the_whole_photo(
    train: Run, model: Path, tmp_path: Path, photo: Path
) -> None:
    assert "crop_size" in json.loads((model / "preprocessor_config.json").read_text())
    status, _, err = train("--fit", "squash")
    assert (status, err) == (0, "")
    rule = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert not rule.get("do_center_crop")
    assert "crop_size" not in rule
    assert rule["size"] == {"height": 16, "width": 16}
    check_opens_in_transformers(
        tmp_path / "out", photo, ("dark", "light"), "single_label_classification"
    )


def test_skipped_photos_are_named(train: Run, data: Path, tmp_path: Path) -> None:
    (data / "dark" / "0.png").write_bytes(b"no photo")
    status, _, err = train("--on-bad-image", "fail")
    assert status == 1
    assert "'dark/0.png' is not an image" in err
    assert "--on-bad-image skip" in err
    assert not (tmp_path / "out").exists()
    status, _, err = train("--on-bad-image", "skip", out=tmp_path / "divided")
    assert status == 1
    assert "dark/0.png: is not an image" in err
    assert len(err.splitlines()) == 1
    assert (tmp_path / "divided" / "model.safetensors").exists()
    for path in data.glob("light/*.png"):
        if path.stem in "0123456":  # most of a class: some of them are for training
            truncate(path)
    status, output, err = train("--on-bad-image", "skip", "--validation-split", 0, "--json")
    assert status == 1
    named = json.loads(output)["left_out"]
    assert [Path(file).name for file, _ in named] == ["0.png", *(f"{n}.png" for n in range(7))]
    assert len(err.splitlines()) == 8
    assert all(file in err for file, _ in named)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_photos_that_fail_to_decode_are_skipped(train: Run, data: Path, tmp_path: Path) -> None:
    """Their headers are all right: they show in the first step or evaluation that reads them."""
    validation = draw_photos(tmp_path / "validation", count=2)
    truncate(validation / "dark" / "1.png")
    status, output, err = train("--on-bad-image", "skip", "--validation", validation, "--json")
    assert status == 1
    assert [Path(file).name for file, _ in json.loads(output)["left_out"]] == ["1.png"]
    assert "validation/dark/1.png" in err
    for path in validation.rglob("*.png"):
        if path.parent.name + path.stem != "dark1":
            truncate(path)
    skip = ("--on-bad-image", "skip")
    status, _, err = train(*skip, "--validation", validation, out=tmp_path / "blind")
    assert (status, len(err.splitlines())) == (1, 1)
    assert "no photo of the validation set can be read" in err
    assert not (tmp_path / "blind" / "model.safetensors").exists()
    for path in data.rglob("*.png"):
        truncate(path)
    for more in ((), ("--head-only", "--augment", "none")):
        out = tmp_path / f"none{len(more)}"
        status, _, err = train(*skip, "--validation-split", 0, *more, out=out)
        assert (status, len(err.splitlines())) == (1, 1)
        assert "no photo can be read" in err
        assert not (out / "model.safetensors").exists()


# A process that has imported everything and forks for each run, which may kill itself.
RUNS = """
import json, os, signal, sys
import vitlib.train.run, vitlib.plots.draw, vitlib.plots
from vitlib.cli import main
from vitlib.system import atomic
from vitlib.train import artifacts

def dies(module, name, which, turn):
    real, seen = getattr(module, name), 0
    def call(*given):
        nonlocal seen
        seen += which in str(given[0])
        if seen == turn:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given)
    setattr(module, name, call)

for line in sys.stdin:
    arguments, death = json.loads(line)
    child = os.fork()
    if not child:
        if death:
            dies(globals()[death[0]], *death[1:])
        sys.argv = ["vitlib", *arguments]
        os.dup2(2, 1)
        try:
            main()
        except SystemExit as stop:
            os._exit(stop.code or 0)
        os._exit(9)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
# Module, function, text in its first argument, and at which such call the process kills itself.
DEATHS = (
    ("atomic", "fsync_path", "tensors.safetensors", 4),  # half of a checkpoint is written
    ("atomic", "fsync_path", "state.json", 3),  # all of it, and has no name yet
    ("artifacts", "write_card", "", 1),  # the weights are there, the rest is not
)


def start_process(*command: object, **pipes: int) -> subprocess.Popen[str]:
    """A process of one thread."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        text=True, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes,
    )  # fmt: skip


def kill_in_training(process: subprocess.Popen[str], log: Path) -> None:
    """From outside, once it has taken three steps."""
    until = time.monotonic() + 100
    while process.poll() is None and time.monotonic() < until:
        if log.is_file() and log.read_bytes().count(b'"train"') >= 3:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.001)
    _, err = process.communicate(timeout=100)
    assert process.returncode == -signal.SIGKILL, err


def test_killed_runs_resume_to_equal_weights(data: Path, model: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    log = parts / "metrics.jsonl"
    run = [
        "finetune", str(data), "--model", str(model), *QUICK, "--num-train-epochs", "10",
        "--save-steps", "1", "--drop-path", "0.2", "--mixup-alpha", "0.4", "--ema-decay", "0.9",
        "--dropout", "0.1", "--out",
    ]  # fmt: skip
    first = start_process("-m", "vitlib", *run, parts, stdout=subprocess.DEVNULL)
    others = start_process("-c", RUNS, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert others.stdin is not None
    assert others.stdout is not None

    def ends(death: object, *more: str) -> int:
        print(json.dumps([[*run, *more], death]), file=others.stdin, flush=True)
        return int(others.stdout.readline())

    with others:
        kill_in_training(first, log)
        steps = [max(event["step"] for event in read_events(log))]
        for death in DEATHS:
            assert ends(death, str(parts), "--resume") == -signal.SIGKILL
            steps.append(max(event["step"] for event in read_events(log)))
        assert 3 <= steps[0] < steps[1] < steps[2] < steps[3] == 40
        assert ends(None, str(parts), "--resume") == 0
        assert ends(None, str(whole)) == 0
        others.stdin.close()
        assert others.stderr.read().count("error") == 0
    for name in ("model.safetensors", "config.json", "preprocessor_config.json", "README.md"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name
    untimed = [
        [
            {k: v for k, v in event.items() if k != "seconds"}
            for event in read_events(out / log.name)
        ]
        for out in (parts, whole)
    ]
    assert untimed[0] == untimed[1]
    left = [path.name for path in parts.rglob(".*")]
    assert not left
