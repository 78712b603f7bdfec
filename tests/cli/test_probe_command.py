"""Tests of vitlib probe: its output, its files and its errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fixtures.tiny_probes import draw_folders, draw_photo, draw_several, save_tiny

pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'vitlib[plot]'")
pytest.importorskip("sklearn", reason="probes need scikit-learn: pip install 'vitlib[eval]'")

Run = Callable[..., tuple[int, str, str]]
FAST = ("--methods", "knn,logistic", "--k", "3")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return draw_folders(tmp_path / "data", 6)


def test_probe_prints_the_table_and_saves_a_classifier(
    run_cli: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    status, stdout, err = run_cli(
        "probe", data, "-m", model, "--layers", "1,3", "--pool", "cls,mean", "--few-shot", "2,all",
        *FAST, "-o", out,
    )  # fmt: skip
    assert (status, err) == (0, "")
    lines = stdout.splitlines()
    assert lines[0].split() == [
        "layer",
        "pool",
        "method",
        "accuracy",
        "95",
        "%",
        "interval",
        "chosen",
    ]
    assert len([line for line in lines if line[:1] in "13"]) == 2 * 2 * 2 + 0
    assert len([line for line in lines if line.startswith("2 photos a class: layer")]) == 8
    assert lines[-1] == f"report                 {out / 'report.html'}"
    photo = next((data / "red").iterdir())
    status, stdout, _ = run_cli("classify", photo, "-m", out / "model")
    assert status == 0
    assert "red" in stdout
    status, stdout, _ = run_cli(
        "finetune", data, "-m", out / "model", "--out", tmp_path / "tuned", "--max-steps", 1,
        "--validation-split", 0,
    )  # fmt: skip
    assert status == 0


def test_probe_names_the_model_of_each_choice(
    run_cli: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    other = save_tiny(tmp_path / "other", seed=1)
    status, out, _ = run_cli("probe", data, "-m", model, "-m", other, *FAST, "-o", tmp_path / "out")
    assert status == 0
    lines = [line for line in out.splitlines() if " chosen" in line][1:]
    assert [line.rpartition(", ")[2] for line in lines[:2]] == [str(model), str(other)]
    assert lines[2].startswith("model chosen, too")


def test_probe_prints_json(run_cli: Run, model: Path, tmp_path: Path) -> None:
    data = draw_several(tmp_path / "several")
    status, stdout, _ = run_cli(
        "probe", data, "-m", model, "--multi-label", *FAST, "-o", tmp_path / "out", "--json",
    )  # fmt: skip
    assert status == 0
    report = json.loads(stdout)
    assert report["primary"] == "iou"
    assert report["best"]["folder"] == str(tmp_path / "out" / "model")
    assert json.loads((tmp_path / "out" / "probe.json").read_text())["rows"] == report["rows"]


def test_probe_names_a_photo_that_cannot_be_read(
    run_cli: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    (data / "red" / "bad.png").write_bytes(b"no photo")
    status, _, err = run_cli("probe", data, "-m", model, *FAST, "-o", tmp_path / "out")
    assert status == 1
    assert err.count("vitlib: error") == 1
    assert "bad.png" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--k", "0"), "'0': expected whole numbers from 1"),
        (("--few-shot", "1,-2"), "'-2': expected whole numbers from 1, with commas between them"),
        (("--layers", "last,2"), "--layers: expected all, last or numbers, not both"),
        (("--layers", "9"), "layer 9: expected numbers in 1..3"),
        (("--pool", "cls,max"), "'max': expected one or more of cls, mean"),
        (("--pool", "map"), "this model has no attention pool"),
        (("--methods", "svm"), "'svm': expected one or more of knn, logistic, linear"),
    ],
)
def test_probe_refuses_wrong_options_before_the_work(
    run_cli: Run, model: Path, data: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    status, stdout, err = run_cli("probe", data, "-m", model, *options, "-o", tmp_path / "out")
    assert status in (1, 2)
    assert message in err
    assert not stdout
    assert not (tmp_path / "out").exists()


def test_probe_refuses_photos_without_labels(run_cli: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    draw_photo([], 1).save(tmp_path / "flat" / "1.png")
    status, _, err = run_cli("probe", tmp_path / "flat", "-m", model, "-o", tmp_path / "out")
    assert status == 1
    assert len(err.splitlines()) == 1
    assert "vitlib audit needs none" in err


def test_probe_takes_the_store_of_the_environment(
    run_cli: Run, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VITLIB_FEATURES", str(tmp_path / "store"))
    assert run_cli("probe", data, "-m", model, *FAST, "-o", tmp_path / "out")[0] == 0
    assert (tmp_path / "store" / "store.json").is_file()
    assert not (tmp_path / "out" / "features").exists()
