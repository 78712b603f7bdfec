"""Settings chosen by the photos, and the linear head that a chosen run starts from."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

import vitlib
from fixtures.command_line import Run, make_workplace
from vitlib.data import LabelledPhotos, Photo, read_photos
from vitlib.errors import ConfigError
from vitlib.train import TrainConfig, finetune
from vitlib.train.choice import choose_settings
from vitlib.train.linear_probe import RIDGE_PENALTIES, fit_head
from vitlib.train.losses import Criterion, to_soft_targets


def make_set(count: int, classes: int, *, multi_label: bool = False) -> LabelledPhotos:
    labels = tuple(f"c{i}" for i in range(classes))
    photos = tuple(Photo(Path(f"{i}.png"), (labels[i % classes],)) for i in range(count))
    return LabelledPhotos(photos, labels, multi_label, "made")


def test_few_photos_all_train() -> None:
    config, reason = choose_settings(make_set(20, 2), None, TrainConfig.from_dict({"auto": True}))
    assert (config.tune.linear_probe, config.tune.head_only) == (True, False)
    # 2.5 epochs of three batches.
    assert (config.run.max_steps, config.run.validation_split) == (8, 0.0)
    assert config.run.auto is False
    assert reason.startswith("20 photos of 2 classes: a linear head is fitted to frozen features, ")
    assert config.tune.start_share == 0.5
    assert reason.endswith("all photos train, so that no validation set is left")


def test_few_photos_a_class_fit_a_head_alone() -> None:
    for count, is_alone in ((15, True), (16, False)):
        config, reason = choose_settings(make_set(count, 2), None, TrainConfig())
        assert config.tune.head_only is is_alone
        assert (config.tune.start_share == 0.0) is is_alone
        assert ("epochs" in reason) is not is_alone
    # Several labels of a photo share what the layers learn.
    config, _ = choose_settings(make_set(15, 2, multi_label=True), None, TrainConfig())
    assert config.tune.head_only is False


def test_more_photos_hold_some_out() -> None:
    config, reason = choose_settings(make_set(600, 4), None, TrainConfig.from_dict({"seed": 7}))
    assert (config.tune.linear_probe, config.tune.head_only) == (True, False)
    assert (config.run.num_train_epochs, config.tune.start_share) == (3, 0.0)
    assert config.run.validation_split == 0.1
    assert config.run.seed == 7
    assert "10% of the photos choose the best epoch" in reason
    for count in (12, 600):
        config, _ = choose_settings(make_set(count, 4), make_set(40, 4), TrainConfig())
        assert config.run.validation_split == TrainConfig().run.validation_split


def test_few_photos_with_numbers_fit_a_head_alone() -> None:
    photos = make_set(12, 1)
    numbers = LabelledPhotos(
        tuple(p._replace(labels=(), values=(1.0,)) for p in photos.photos), ("height",), False,
        "made", regression=True,
    )  # fmt: skip
    config, reason = choose_settings(numbers, None, TrainConfig())
    assert (config.tune.head_only, config.run.num_train_epochs) == (True, 0)
    assert "epochs" not in reason
    assert choose_settings(numbers, numbers, TrainConfig())[0].tune.head_only is False


def test_rare_labels_weigh_more() -> None:
    photos = make_set(40, 2, multi_label=True)
    rare = tuple(p._replace(labels=("c0",) if i else ("c1",)) for i, p in enumerate(photos.photos))
    config, reason = choose_settings(
        LabelledPhotos(rare, photos.labels, True, "made"), None, TrainConfig()
    )
    assert config.loss.weighted_loss == 1
    assert "1 rare label" in reason
    assert choose_settings(photos, None, TrainConfig())[0].loss.weighted_loss == 0


def test_head_equals_logistic_regression() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    x = rng.normal(size=(90, 20)) + np.eye(3, 20)[labels] * 2
    features, targets = torch.from_numpy(x).float(), to_soft_targets(labels, 3)
    head = fit_head(features, targets, Criterion("single_label_classification"), 0)
    logits = features @ head.weight.T + head.bias
    standard = (x - x.mean(0)) / x.std(0)
    best = min(
        (0.1, 1, 10, 100, 1000),
        key=lambda penalty: np.abs(
            linear_model.LogisticRegression(C=1 / penalty, max_iter=5000, tol=1e-8)
            .fit(standard, labels)
            .predict_proba(standard)
            - logits.softmax(1).numpy()
        ).max(),
    )
    expected = linear_model.LogisticRegression(C=1 / best, max_iter=5000, tol=1e-8)
    got = expected.fit(standard, labels).predict_proba(standard)
    # Both minimise one function; L-BFGS in float32 losses stops a little earlier.
    assert np.abs(got - logits.softmax(1).numpy()).max() < 5e-3
    assert head.held_out is not None
    assert (head.held_out.argmax(1).numpy() == labels).mean() > 0.6


def test_head_of_numbers_equals_ridge_regression() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 60)) * 3 + 1
    # Small numbers beside a large mean, of which random first weights would say nothing.
    y = 1e3 + 1e-3 * (x @ rng.normal(size=(60, 2)) + rng.normal(size=(40, 2)))
    features, targets = torch.from_numpy(x).float(), torch.from_numpy(y)
    head = fit_head(features, targets, Criterion("regression"), 0)
    got = features.double() @ head.weight.double().T + head.bias.double()
    standard = (x - x.mean(0)) / x.std(0)
    differences = [
        np.abs(linear_model.Ridge(alpha=alpha).fit(standard, y).predict(standard) - got.numpy())
        for alpha in RIDGE_PENALTIES
    ]
    # float32 holds a bias of 1000 to 6e-5.
    assert min(difference.max() for difference in differences) < 1e-4
    assert np.median([difference.max() for difference in differences]) > 5e-4


def test_chosen_run_of_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    make_workplace(tmp_path)
    paths = sorted((tmp_path / "photos").rglob("*.jpg"))
    rows = "".join(f"{path},{0.01 * i}\n" for i, path in enumerate(paths))
    (tmp_path / "numbers.csv").write_text(f"filename,height\n{rows}")
    finetune(tmp_path / "numbers.csv", "demo", tmp_path / "a", regression=True)
    assert "8 photos of 1 number: a linear head is fitted to frozen features; all" in caplog.text
    values = [float(row[0].score) for row in vitlib.Predictor.load(tmp_path / "a").classify(paths)]
    # It follows the numbers, which the mean of all as the answer to each would not.
    assert np.corrcoef(values, np.arange(len(paths)))[0, 1] > 0.5
    assert np.mean(values) == pytest.approx(0.035, abs=1e-5)


def test_chosen_run_of_few_photos(
    run_cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(make_workplace(tmp_path))
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr("vitlib.train.linear_probe.FOLDS", 4)
    status, out, err = run_cli("finetune", "photos", "-m", "demo", "-o", "a")
    assert status == 0, err
    assert "accuracy" in out
    assert "8 photos of 2 classes: a linear head is fitted" in caplog.text
    assert "4 folds, each scored by a head fitted to the others: accuracy" in caplog.text
    settings = json.loads(Path("a/run.json").read_text())["config"]
    assert settings["tune"]["linear_probe"] is True
    assert settings["run"]["auto"] is False
    assert not Path("a/validation.csv").exists()
    right = vitlib.Predictor.load("a").classify(sorted(map(str, Path("photos").rglob("*.jpg"))))
    assert [p[0].label for p in right] == ["cat"] * 4 + ["dog"] * 4
    # One setting of the training, and the usual defaults apply.
    run_cli("finetune", "photos", "-m", "demo", "-o", "b", "--epochs", 1)
    settings = json.loads(Path("b/run.json").read_text())["config"]
    assert (settings["tune"]["linear_probe"], settings["run"]["validation_split"]) == (False, 0.2)


def test_chosen_run_resumes_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitlib.train.choice.FEW", 4)
    make_workplace(tmp_path)
    photos = read_photos(tmp_path / "photos")
    done = finetune(photos, "demo", tmp_path / "a")
    assert done.evaluations[0].step == 0
    assert done.metrics
    assert done.steps == 3
    weights = (tmp_path / "a/model.safetensors").read_bytes()
    for checkpoint in sorted((tmp_path / "a/checkpoints").iterdir())[1:]:
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    again = finetune(photos, "demo", tmp_path / "a", resume=True)
    assert again.steps == 3
    assert (tmp_path / "a/model.safetensors").read_bytes() == weights


def test_last_weights_are_an_average_with_the_start(tmp_path: Path) -> None:
    make_workplace(tmp_path)
    photos = read_photos(tmp_path / "photos")
    # Of three checkpoints the oldest but one would be deleted, were it not the start.
    common = {"linear_probe": True, "validation_split": 0, "learning_rate": 1e-3}
    folders = {}
    for share in (0.0, 0.25, 1.0):
        values = {**common, "start_share": share, "save_total_limit": 1, "save_steps": 1}
        folders[share] = tmp_path / f"share {share}"
        finetune(photos, "demo", folders[share], config=TrainConfig.from_dict(values))
    end, average, start = (
        dict(vitlib.load(folder).named_parameters()) for folder in folders.values()
    )
    assert any(not torch.equal(end[name], start[name]) for name in end)
    for name, weight in average.items():
        expected = 0.25 * start[name] + 0.75 * end[name]
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-7)  # rounding of float32


def test_start_share_needs_a_start_and_no_validation(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="start_share is of linear_probe's weights"):
        TrainConfig.from_dict({"start_share": 0.5})
    make_workplace(tmp_path)
    config = TrainConfig.from_dict({"start_share": 0.5, "linear_probe": True})
    with pytest.raises(ConfigError, match="which no validation set would measure"):
        finetune(tmp_path / "photos", "demo", tmp_path / "a", config=config)


def test_no_epochs_without_a_probe_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="num_train_epochs=0: expected 1 or more, or linear_probe"
    ):
        TrainConfig.from_dict({"num_train_epochs": 0})


def test_card_and_lists_count_photos_that_took_part(
    run_cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_workplace(tmp_path))
    monkeypatch.setattr("vitlib.train.linear_probe.FOLDS", 3)
    whole = Path("photos/cat/0.jpg").read_bytes()
    Path("photos/cat/0.jpg").write_bytes(whole[: len(whole) // 2])
    command = ("finetune", "photos", "-m", "demo", "-o", "a", "--on-bad-image", "skip", "--json")
    status, out, _ = run_cli(*command)
    result = json.loads(out)
    assert (status, result["counts"]) == (1, {"training": 7})
    assert set(result["fold_metrics"]) >= {"accuracy", "log_loss"}
    card = Path("a/README.md").read_text()
    assert "| cat | 3 |" in card
    assert "Training set: 7 photos. No validation set. 1 more could not be read" in card
    assert f"did not see: accuracy {result['fold_metrics']['accuracy']:.4f}." in card
    assert "0.jpg" not in Path("a/training.csv").read_text()
    # A head that is fitted in closed form takes no step, of which there were curves.
    Path("n.csv").write_text(
        "filename,height\n" + "".join(f"photos/dog/{i}.jpg,{i}\n" for i in (1, 3))
    )
    assert run_cli("finetune", "n.csv", "-m", "demo", "-o", "b", "--regression")[0] == 0
    assert not Path("b/curves.png").exists()
    assert "curves.png" not in Path("b/README.md").read_text()
