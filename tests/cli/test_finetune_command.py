"""vitlib finetune: what it leaves, every flag, a kill at any moment, and what a mistake gets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from fixtures import references
from vitlib import ImageProcessor, Predictor, ViT, ViTConfig, save
from vitlib.cli.finetune import finetune as command
from vitlib.train.config import PARTS, TrainConfig, read_yaml
from vitlib.train.log import read_events

pytest.importorskip("yaml", reason="settings files need PyYAML: pip install 'vitlib[train]'")

Run = Callable[..., tuple[int, str, str]]
QUICK = ("--device", "cpu", "--num-train-epochs", "1", "--per-device-train-batch-size", "4")


def draw(root: Path, labels: tuple[str, ...] = ("dark", "light"), count: int = 8) -> Path:
    """A folder per class, each of its own brightness."""
    random = np.random.default_rng(0)
    for index, label in enumerate(labels):
        (root / label).mkdir(parents=True)
        for number in range(count):
            levels = random.integers(130 * index, 130 * index + 90, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(levels).save(root / label / f"{number}.png")
    return root


def cut(path: Path) -> None:
    """Lose half of a file: its header is all right."""
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return draw(tmp_path / "data")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    cfg = ViTConfig(image_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    half = (0.5,) * 3
    rule = ImageProcessor(shortest_edge=18, crop_size=(16, 16), image_mean=half, image_std=half)
    save(ViT(cfg), tmp_path / "model", image_processor=rule)
    return tmp_path / "model"


@pytest.fixture
def several(data: Path) -> Path:
    """labels.csv of photos with any number of labels."""
    rows = ["filename,labels"]
    for number in range(8):
        rows += [f"dark/{number}.png,{'night' if number % 2 else ''}"]
        rows += [f"light/{number}.png,{'day sky' if number % 3 else 'sky'}"]
    (data / "labels.csv").write_text("\n".join(rows) + "\n")
    return data


@pytest.fixture
def train(run_cli: Run, data: Path, model: Path, tmp_path: Path) -> Run:
    """The verb with all it needs, but for what is given."""

    def run(*options: object, data: object = data, out: object = None) -> tuple[int, str, str]:
        given = () if "--from-scratch" in options else ("--model", model)
        out = out or tmp_path / "out"
        return run_cli("finetune", data, "--out", out, *given, *QUICK, *options)

    return run


def settings(out: Path) -> TrainConfig:
    return read_yaml((out / "train_config.yaml").read_text(), "train_config.yaml")


def opens_in_theirs(out: Path, photo: Path, labels: tuple[str, ...], task: str) -> None:
    """transformers makes the same logits of a photo, from its pixels on."""
    theirs = hf.AutoModelForImageClassification.from_pretrained(out).eval()
    assert tuple(theirs.config.id2label[index] for index in range(len(labels))) == labels
    assert theirs.config.problem_type == task
    with Image.open(photo) as image:
        given = hf.AutoImageProcessor.from_pretrained(out)(image, return_tensors="pt")
    ours = Predictor.load(out, device="cpu")
    with torch.inference_mode():
        expected = theirs(**given).logits
        found = ours.model(ours.image_processor(photo))
    assert references.distance(found, expected) < 2e-6


# --- what comes of it -----------------------------------------------------------------------------


def test_one_label_a_photo(train: Run, tmp_path: Path, photo: Path) -> None:
    out = tmp_path / "out"
    status, said, err = train("--num-train-epochs", 6, "--learning-rate", 0.005)
    assert (status, err) == (0, "")
    told = dict(line.split("  ", 1) for line in said.splitlines())
    assert told["labels"].strip() == "dark, light"
    assert told["steps"].strip().startswith("24, ")  # 13 photos by 4s, six times
    assert told["checkpoint"].strip() == str(out)
    data = str(tmp_path / "data")
    assert told["training"].strip() == f"13 photos of {data}"
    assert told["validation"].strip() == f"3 photos of {data}"
    assert float(told["accuracy"]) == 1
    opens_in_theirs(out, photo, ("dark", "light"), "single_label_classification")
    assert {path.name for path in out.iterdir()} >= {
        "README.md", "config.json", "metrics.csv", "metrics.jsonl", "model.safetensors",
        "preprocessor_config.json", "train_config.yaml",
    }  # fmt: skip


@pytest.mark.usefixtures("several")
def test_several_labels_a_photo(train: Run, tmp_path: Path, photo: Path) -> None:
    status, said, err = train("--multi-label", "--json", "--positive-weights", "1 2 3")
    assert (status, err) == (0, "")
    done = json.loads(said)
    assert done["labels"] == ["day", "night", "sky"]
    assert 0 <= done["metrics"]["iou"] <= 1
    assert done["left_out"] == []
    assert (done["out"], done["stopped_early"]) == (str(tmp_path / "out"), False)
    task = "multi_label_classification"
    opens_in_theirs(tmp_path / "out", photo, ("day", "night", "sky"), task)
    status, _, err = train(out=tmp_path / "other")
    assert status == 1
    assert "line 2: 'dark/0.png' has no label" in err
    assert "--multi-label" in err
    assert len(err.splitlines()) == 1


def test_a_validation_set(train: Run, tmp_path: Path) -> None:
    held = draw(tmp_path / "held", count=3)
    status, _, err = train("--validation", held)
    assert (status, err) == (0, "")
    about = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (about["training"]["photos"], about["validation"]["photos"]) == (16, 6)
    (held / "gray").mkdir()
    Image.new("RGB", (20, 20)).save(held / "gray" / "a.png")
    status, _, err = train("--validation", held, out=tmp_path / "other")
    assert status == 1
    assert "'gray' (photos: 1)" in err
    assert not (tmp_path / "other").exists()


def test_a_file_of_settings_and_flags_over_it(train: Run, tmp_path: Path) -> None:
    file, out = tmp_path / "settings.yaml", tmp_path / "out"
    file.write_text(
        "number_of_epochs: 9\ntraining_batch_size: 2\noptimizer: adamw_hf\nrandom_seed: 7\n"
        "learning_rate_scheduler: warmup_linear\nlearning_rate: 1e-3\napply_augmentations: true\n"
        "tune:\n  lora_targets: [q, out]\n  lora_r: 2\nloss:\n"
    )
    told = "note: nesterov=False does nothing with optim=adamw\n"
    status, _, err = train("--config", file, "--max-steps", 2, "--no-nesterov")
    assert (status, err) == (0, told)
    found = settings(out)
    assert found.run.num_train_epochs == 1  # flags come first
    assert found.run.per_device_train_batch_size == 4
    assert (found.run.max_steps, found.run.seed) == (2, 7)
    assert (found.optim.lr_scheduler_type, found.optim.learning_rate) == ("linear", 1e-3)
    assert found.optim.nesterov is False
    assert (found.tune.lora_targets, found.tune.lora_r) == (("q", "out"), 2)
    assert (found.augment.crop_scale, found.augment.hue) == ((0.08, 1.0), 0.4)
    again = tmp_path / "again"
    status, _, err = train("--config", out / "train_config.yaml", out=again)
    assert (status, err) == (0, told)
    for name in ("train_config.yaml", "model.safetensors"):
        assert (again / name).read_bytes() == (out / name).read_bytes()


def test_flags_of_every_kind(train: Run, tmp_path: Path) -> None:
    status, _, err = train(
        "--augment", "strong", "--crop-scale", "none", "--crop-ratio", "0.5, 2", "--dropout", "0.1",
        "--drop-path", "null", "--greater-is-better", "--tensorboard", "--no-tensorboard",
        "--lora-targets", "fc1 v", "--lora-r", "2", "--lr-scheduler-type", "constant",
        "--class-weights", "1 2",
    )  # fmt: skip
    assert (status, err) == (0, "")
    found = settings(tmp_path / "out")
    assert found.augment.crop_scale is None
    assert found.augment.crop_ratio == (0.5, 2)
    assert (found.augment.mixup_alpha, found.augment.cutmix_alpha) == (0.8, 1.0)  # strong's
    assert (found.tune.dropout, found.tune.drop_path) == (0.1, None)
    assert (found.run.greater_is_better, found.run.tensorboard) == (True, False)
    assert found.tune.lora_targets == ("fc1", "v")
    assert found.loss.class_weights == (1, 2)


def test_a_flag_none_over_a_file(train: Run, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("dropout: 0.5\ncrop_scale: [0.5, 1]\nattention_dropout: none\n")
    assert train("--config", file, "--dropout", "none", "--crop-scale", "null")[0] == 0
    found = settings(tmp_path / "out")
    assert (found.tune.dropout, found.augment.crop_scale) == (None, None)
    assert found.tune.attention_dropout is None


def test_every_setting_is_a_flag_with_its_help(run_cli: Run) -> None:
    given = {parameter.name: parameter for parameter in command.params}
    status, said, err = run_cli("finetune", "--help")
    assert (status, err) == (0, "")
    for kind in PARTS.values():
        for one in fields(kind):
            assert one.metadata["help"], one.name
            assert given[one.name].help, one.name
            assert "--" + one.name.replace("_", "-") in said


def test_help_imports_no_torch() -> None:
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
    opens_in_theirs(tmp_path / "out", photo, ("dark", "light"), "single_label_classification")
    cfg = Predictor.load(tmp_path / "out").model.config
    assert (cfg.embed_dim, cfg.depth, cfg.num_heads) == (16, 1, 2)
    assert (cfg.patch_size, cfg.image_size) == ((8, 8), (16, 16))


def test_lora_of_every_linear(train: Run, tmp_path: Path, photo: Path) -> None:
    status, _, err = train("--lora-r", 2, "--lora-targets", "q k v out fc1 fc2")
    assert (status, err) == (0, "")
    opens_in_theirs(tmp_path / "out", photo, ("dark", "light"), "single_label_classification")


def test_early_stopping(train: Run, tmp_path: Path) -> None:
    never = ("--early-stopping-threshold", 5)  # no accuracy is better by so much
    options = ("--num-train-epochs", 9, "--early-stopping-patience", 2, "--json")
    status, said, err = train(*options, *never)
    assert (status, err) == (0, "")
    done = json.loads(said)
    assert done["stopped_early"]
    assert done["steps"] == 12
    # Of evaluations that are equal in accuracy, the one of the lowest loss is the best.
    seen = [e for e in read_events(tmp_path / "out" / "metrics.jsonl") if e["event"] == "eval"]
    assert [e["step"] for e in seen] == [4, 8, 12]
    first = seen[0]["accuracy"]
    alike = [e for e in seen if e["accuracy"] == first]
    assert done["best_step"] == min(alike, key=lambda e: e["loss"])["step"]


def test_the_whole_photo(train: Run, model: Path, tmp_path: Path, photo: Path) -> None:
    assert "crop_size" in json.loads((model / "preprocessor_config.json").read_text())
    status, _, err = train("--fit", "squash")
    assert (status, err) == (0, "")
    rule = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert not rule.get("do_center_crop")
    assert "crop_size" not in rule
    assert rule["size"] == {"height": 16, "width": 16}
    opens_in_theirs(tmp_path / "out", photo, ("dark", "light"), "single_label_classification")


def test_photos_left_out_are_named(train: Run, data: Path, tmp_path: Path) -> None:
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
            cut(path)
    status, said, err = train("--on-bad-image", "skip", "--validation-split", 0, "--json")
    assert status == 1
    named = json.loads(said)["left_out"]
    assert [Path(file).name for file, _ in named] == ["0.png", *(f"{n}.png" for n in range(7))]
    assert len(err.splitlines()) == 8
    assert all(file in err for file, _ in named)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_photos_that_break_when_they_are_decoded(train: Run, data: Path, tmp_path: Path) -> None:
    """Their headers are all right: they show in the first step or evaluation that reads them."""
    held = draw(tmp_path / "held", count=2)
    cut(held / "dark" / "1.png")
    status, said, err = train("--on-bad-image", "skip", "--validation", held, "--json")
    assert status == 1
    assert [Path(file).name for file, _ in json.loads(said)["left_out"]] == ["1.png"]
    assert "held/dark/1.png" in err
    for path in held.rglob("*.png"):
        if path.parent.name + path.stem != "dark1":
            cut(path)
    skip = ("--on-bad-image", "skip")
    status, _, err = train(*skip, "--validation", held, out=tmp_path / "blind")
    assert (status, len(err.splitlines())) == (1, 1)
    assert "no photo of the validation set can be read" in err
    assert not (tmp_path / "blind" / "model.safetensors").exists()
    for path in data.rglob("*.png"):
        cut(path)
    for more in ((), ("--head-only", "--augment", "none")):
        out = tmp_path / f"none{len(more)}"
        status, _, err = train(*skip, "--validation-split", 0, *more, out=out)
        assert (status, len(err.splitlines())) == (1, 1)
        assert "no photo can be read" in err
        assert not (out / "model.safetensors").exists()


# --- a kill ---------------------------------------------------------------------------------------

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


def started(*command: object, **pipes: int) -> subprocess.Popen[str]:
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


def test_killed_again_and_again(data: Path, model: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    log = parts / "metrics.jsonl"
    run = [
        "finetune", str(data), "--model", str(model), *QUICK, "--num-train-epochs", "10",
        "--save-steps", "1", "--drop-path", "0.2", "--mixup-alpha", "0.4", "--ema-decay", "0.9",
        "--dropout", "0.1", "--out",
    ]  # fmt: skip
    first = started("-m", "vitlib", *run, parts, stdout=subprocess.DEVNULL)
    others = started("-c", RUNS, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
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


# --- mistakes -------------------------------------------------------------------------------------


def test_what_another_run_left_stays(train: Run, data: Path, tmp_path: Path) -> None:
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
        status, said, err = train(*options, out=to)
        assert (status, said) == (1, "")
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
def test_a_file_that_holds_no_settings(text: str, train: Run, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text, errors="surrogateescape")
    status, said, err = train("--config", file)
    assert (status, said) == (1, "")
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
    "--num-train-epochs=99999999999999999999": "expected a number, 1 to",
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
def test_flags_that_cannot_be(
    options: str, run_cli: Run, data: Path, model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = () if "--from-scratch" in options or "--model" in options else ("-m", model)
    out = tmp_path / "out"
    more = ("--local-files-only",) if "--model" in options else ()
    status, said, err = run_cli("finetune", data, "-o", out, *given, *more, *options.split())
    assert (status, said) == (1, "")
    assert err.startswith("vitlib: error: ")
    assert FLAGS[options] in err
    assert len(err.splitlines()) == 1
    assert len(err) < 1000
    assert not out.exists()


@pytest.mark.parametrize("options", MISUSED)
def test_flags_misused(options: str, run_cli: Run, data: Path, tmp_path: Path) -> None:
    status, said, err = run_cli("finetune", data, "-o", tmp_path / "out", *options.split())
    assert (status, said) == (2, "")
    assert MISUSED[options] in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def one_class(data: Path) -> Path:
    return draw(data.parent / "one", ("dark",))


def empty(data: Path) -> Path:
    (data.parent / "empty").mkdir()
    return data.parent / "empty"


def nothing(data: Path) -> Path:
    return data.parent / "nothing"


def broken(data: Path) -> Path:
    for path in data.glob("*/*.png"):
        path.write_bytes(b"no photo")
    return data


def missing(data: Path) -> Path:
    (data / "labels.csv").write_text("dark/0.png,dark\nlight/0.png,light\ndark/99.png,dark\n")
    return data


def mixed(data: Path) -> Path:
    rows = [{"image": "dark/0.png", "label": "a"}, {"image": "dark/1.png", "label": ["b"]}]
    (data / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return data / "rows.jsonl"


def other_file(data: Path) -> Path:
    (data / "notes.txt").write_text("dark/0.png,dark\n")
    return data / "notes.txt"


DATA: dict[Callable[[Path], Path], str] = {
    one_class: "have the label 'dark': expected two classes or more",
    empty: "no photo in it",
    nothing: "is not there: expected a folder with a folder per class",
    broken: "none of 16 photos can be used",
    missing: "line 3: 'dark/99.png' is not there",
    mixed: "labels are a text in line 1 and a list of texts in line 2: use one form",
    other_file: "ends in .txt: expected a folder with",
}


@pytest.mark.parametrize("make", DATA, ids=lambda make: make.__name__)
def test_photos_that_cannot_be(
    make: Callable[[Path], Path], train: Run, data: Path, tmp_path: Path
) -> None:
    skip: tuple[Any, ...] = ("--on-bad-image", "skip") if make is broken else ()
    status, said, err = train(*skip, data=make(data))
    assert (status, said) == (1, "")
    assert DATA[make] in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_model_without_preprocessing(train: Run, model: Path, tmp_path: Path) -> None:
    (model / "preprocessor_config.json").unlink()
    status, _, err = train()
    assert status == 1
    assert f"no preprocessor_config.json in '{model}'" in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number(train: Run, tmp_path: Path) -> None:
    status, said, err = train(
        "--learning-rate", 1e30, "--max-grad-norm", 0, "--warmup-ratio", 0, "--optim", "sgd",
        "--momentum", 0, "--save-steps", 1,
    )  # fmt: skip
    assert (status, said) == (1, "")
    assert "the loss is nan at step 2 of 4: the checkpoint of step 1 is kept" in err
    assert "a lower learning_rate than 1e+30" in err
    assert len(err.splitlines()) == 1
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000001"]
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_what_is_seldom_meant_is_said(train: Run, data: Path) -> None:
    (data / "empty").mkdir()
    status, _, err = train("--validation", data)
    assert status == 0
    assert "note: no training photo shows empty" in err
    assert "note: 16 photos are in the training set and the validation set" in err


def test_photos_left_out_are_in_the_card(train: Run, data: Path, tmp_path: Path) -> None:
    cut(data / "dark" / "0.png")
    status, _, err = train("--on-bad-image", "skip", "--validation-split", 0)
    assert status == 1
    assert "0.png" in err
    assert "Of both, 1 could not be read" in (tmp_path / "out" / "README.md").read_text()


def test_a_run_that_never_got_anywhere(train: Run, tmp_path: Path) -> None:
    """Its folder may go; nothing else is advised."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("{}")
    status, _, err = train()
    assert status == 1
    assert "no checkpoint yet: if it has ended, delete the folder" in err


def test_a_config_of_another_kind(data: Path, tmp_path: Path) -> None:
    from vitlib.errors import ConfigError
    from vitlib.train import finetune

    with pytest.raises(
        ConfigError, match=r"expected a TrainConfig, such as TrainConfig\.from_dict"
    ):
        finetune(data, "demo", tmp_path / "out", config={"num_train_epochs": 1})  # type: ignore[arg-type]
