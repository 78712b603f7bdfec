"""Tests of vitlib audit: its output, its exit status and its errors."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fixtures.audit_sets import photo, write_set

pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'vitlib[plot]'")
pytest.importorskip("sklearn", reason="labels need scikit-learn: pip install 'vitlib[eval]'")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_set(tmp_path / "data")


def test_audit_prints_findings_and_writes_files(run_cli: Run, data: Path, tmp_path: Path) -> None:
    photo(2).save(data / "cat" / "again.png")
    out = tmp_path / "audit"
    args = ("audit", data, "-m", "demo", "-o", out)
    status, stdout, err = run_cli(*args, "--fix-list", tmp_path / "fix.csv")
    assert (status, err) == (0, "")
    lines = dict(line.split("  ", 1) for line in stdout.splitlines())
    assert lines["audited"].strip() == f"25 photos of {data}"
    assert lines["exact duplicates"].strip() == "1"
    assert lines["near duplicates"].strip() == "0"
    assert lines["report"].strip() == str(out / "report.html")
    assert lines["to leave out"].strip() == str(tmp_path / "fix.csv")
    with (tmp_path / "fix.csv").open(newline="") as file:
        assert [Path(row["filename"]).name for row in csv.DictReader(file)] == ["again.png"]
    assert (data / "cat" / "again.png").exists()
    status, stdout, err = run_cli(*args, "--json", "--next", 2)
    assert (status, err) == (0, "")
    printed = json.loads(stdout)
    assert printed.pop("report") == str(out / "report.html")
    assert printed == json.loads((out / "audit.json").read_text())
    assert len(printed["label_next"]) == 2


def test_audit_names_unreadable_photos(run_cli: Run, data: Path, tmp_path: Path) -> None:
    (data / "cat" / "broken.png").write_bytes(b"no photo")
    content = (data / "cat" / "1.png").read_bytes()
    (data / "cat" / "cut.png").write_bytes(content[: len(content) // 2])
    status, stdout, err = run_cli("audit", data, "-m", "demo", "-o", tmp_path / "audit")
    assert status == 1
    assert len(err.splitlines()) == 2
    assert "broken.png" in err
    assert "cut.png" in err
    assert "26 photos" in stdout
    with (tmp_path / "audit" / "quality.csv").open(newline="") as file:
        rows = [(Path(row["filename"]).name, row["issue"]) for row in csv.DictReader(file)]
    assert rows == [("broken.png", "unreadable"), ("cut.png", "unreadable")]


def test_audit_tells_forms_of_unicode(
    run_cli: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_set(tmp_path / "data", labels=("cafe\u0301", "dog"))
    (data / "caf\u00e9").mkdir()
    photo(70).save(data / "caf\u00e9" / "70.png")
    assert run_cli("audit", data, "-m", "demo", "-o", tmp_path / "audit")[0] == 0
    assert "written in two Unicode forms, read as one class" in caplog.text
    classes = json.loads((tmp_path / "audit" / "audit.json").read_text())["classes"]
    assert [(row["label"], row["photos"]) for row in classes] == [("caf\u00e9", 13), ("dog", 12)]


def test_audit_refuses_before_the_work(
    run_cli: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> object:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("vitlib.cli.audit.load_predictor", refuse)
    out = tmp_path / "audit"
    rows = [f"{path},a b" if i else f"{path},a" for i, path in enumerate(data.rglob("*.png"))]
    (tmp_path / "several.csv").write_text("\n".join(["filename,label", *rows, f"{rows[0]} b"]))
    (tmp_path / "none").mkdir()
    cases = [
        ((data, "-o", data / "audit"), "lies in"),
        ((data, "-o", data), "is what is read"),
        ((data, "-o", out, "--against", data), "both the data and --against"),
        ((data, "-o", out, "--fix-list", tmp_path / "several.csv" / "x"), "cannot be written"),
        ((tmp_path / "nowhere", "-o", out), "is not there"),
        ((tmp_path / "none", "-o", out), "no photo in it"),
        ((tmp_path / "several.csv", "-o", out), "(--multi-label)"),
    ]
    for arguments, message in cases:
        status, stdout, err = run_cli("audit", *arguments, "-m", "demo")
        assert (status, stdout) == (1, ""), arguments
        assert message in err
        assert len(err.splitlines()) == 1, err
        assert not out.exists()
    status, _, err = run_cli("audit", data, "-o", out, "--next-by", "size")
    assert status == 2


def test_audit_takes_embeddings_of_an_earlier_run(
    run_cli: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_cli("embed", "-m", "demo", data, "-o", tmp_path / "run.npy")[0] == 0

    def refuse(*_: object, **__: object) -> object:
        raise AssertionError("a photo passed through the model")

    monkeypatch.setattr("vitlib.features.extraction.map_batches", refuse)
    args = ("audit", data, "-m", "demo", "-o", tmp_path / "audit")
    status, _, err = run_cli(*args, "--embeddings", tmp_path / "run.npy")
    assert (status, err) == (0, "")


def test_fix_list_is_left_out_by_finetune(run_cli: Run, data: Path, tmp_path: Path) -> None:
    from vitlib.data.exclude import read_exclusions

    name = 'a, "copy".png'
    (data / "cat" / name).write_bytes((data / "cat" / "3.png").read_bytes())
    fix = tmp_path / "fix.csv"
    assert run_cli("audit", data, "-m", "demo", "-o", tmp_path / "a", "--fix-list", fix)[0] == 0
    assert [Path(path).name for path in read_exclusions(fix)] == [name]
