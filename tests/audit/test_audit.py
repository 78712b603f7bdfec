"""Audits of tiny planted sets, from files to report."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

import vitlib
from fixtures.audit_sets import photo, write_set
from vitlib import Predictor
from vitlib.audit import AuditReport, run
from vitlib.audit.fix_list import select_photos, write_fix_list
from vitlib.audit.source import read_set
from vitlib.data import read_photos
from vitlib.errors import DataError, SourceError
from vitlib.features import FeatureStore

pytest.importorskip("matplotlib", reason="pictures need matplotlib: vitlib[plot]")
pytest.importorskip("sklearn", reason="labels need scikit-learn: vitlib[eval]")


@pytest.fixture(scope="module")
def demo() -> Predictor:
    return Predictor.load("demo")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_set(tmp_path / "data")


def names(rows: object) -> list[str]:
    return [Path(row.filename).name for row in rows]  # type: ignore[attr-defined]


def test_planted_faults_are_found(demo: Predictor, data: Path, tmp_path: Path) -> None:
    photo(1).save(data / "cat" / "same bytes.png")
    photo(2).save(data / "cat" / "same pixels.bmp")
    ImageOps.mirror(photo(3)).save(data / "dog" / "mirror of 3.png")
    photo(20).crop((20, 20, 110, 88)).save(data / "dog" / "crop of 20.png")
    (data / "dog" / "broken.jpg").write_bytes(b"\xff\xd8\xff no photo")
    (data / "dog" / "empty.jpg").write_bytes(b"")
    Image.new("RGB", (80, 60), (30, 60, 90)).save(data / "dog" / "blank.png")
    photo(50).resize((300, 40)).save(data / "cat" / "long.png")
    photo(51).resize((12, 10)).save(data / "cat" / "tiny.png")
    photo(52).convert("L").save(data / "cat" / "grey.png")
    report = run(demo, data, tmp_path / "out")
    kinds = {
        Path(row.filename).name: (row.kind, Path(row.same_as).name, row.conflict)
        for row in report.duplicates
        if row.kind != "kept"
    }
    # "same bytes.png" and 1.png are equal; the first by name is kept.
    assert kinds.pop("same bytes.png") == ("bytes", "1.png", False)
    assert kinds.pop("same pixels.bmp") == ("pixels", "2.png", False)
    assert kinds.pop("crop of 20.png") == ("near", "20.png", False)
    assert kinds.pop("mirror of 3.png") == ("near", "3.png", True)
    assert not kinds
    issues = {(Path(row.filename).name, row.issue) for row in report.quality}
    assert issues >= {
        ("broken.jpg", "unreadable"), ("empty.jpg", "unreadable"), ("blank.png", "blank"),
        ("long.png", "shape"), ("tiny.png", "tiny"), ("grey.png", "grey"),
    }  # fmt: skip
    assert {Path(file).name for file, _ in report.failed} == {"broken.jpg", "empty.jpg"}
    assert report.counts["unreadable"] == 2
    assert report.counts["exact_duplicates"] == 2
    assert report.counts["near_duplicates"] == 2
    assert "blank.png" not in names(report.label_next)
    check_files(report, tmp_path / "out")


def check_files(report: AuditReport, out: Path) -> None:
    """Compare the files of a report with the report."""
    stored = json.loads((out / "audit.json").read_text())
    assert stored == json.loads(json.dumps(report.as_dict()))
    assert stored["complete"]
    for name in ("duplicates", "quality", "label_suspects", "label_next", "outliers", "leakage"):
        rows = getattr(report, name)
        with (out / f"{name}.csv").open(newline="") as file:
            listed = list(csv.DictReader(file))
        assert [row["filename"] for row in listed] == [row.filename for row in rows]
        assert (out / f"{name}.png").exists() == bool(rows)
    page = (out / "report.html").read_text()
    assert "<script>" in page
    assert all(Path(row.filename).name in page for row in report.duplicates[:5])


def test_leakage_between_sets(demo: Predictor, data: Path, tmp_path: Path) -> None:
    test = write_set(tmp_path / "test", start=100)
    (data / "cat" / "0.png").rename(test / "dog" / "moved.png")
    photo(0).save(data / "cat" / "0.png")
    photo(102).crop((6, 6, 114, 86)).save(data / "cat" / "crop of 102.png")
    report = run(demo, data, tmp_path / "out", against=test, fix_list=tmp_path / "fix.csv")
    found = {Path(row.filename).name: (Path(row.other).name, row.kind) for row in report.leakage}
    assert found == {"0.png": ("moved.png", "bytes"), "crop of 102.png": ("102.png", "near")}
    by_name = {Path(row.filename).name: row for row in report.leakage}
    assert "with another label there" in by_name["0.png"].reason
    assert by_name["0.png"].split == "data"
    assert by_name["0.png"].other_split == "against"
    # Photos of the other set are compared and not audited.
    assert all(str(test) not in row.filename for row in report.label_suspects)
    assert all(str(test) not in row.filename for row in report.label_next)
    with (tmp_path / "fix.csv").open(newline="") as file:
        fixes = {Path(row["filename"]).name for row in csv.DictReader(file)}
    assert {"0.png", "crop of 102.png"} <= fixes
    assert "moved.png" not in fixes


def test_training_and_validation_folder(demo: Predictor, tmp_path: Path) -> None:
    write_set(tmp_path / "data" / "train")
    write_set(tmp_path / "data" / "val", start=100)
    photo(104).save(tmp_path / "data" / "train" / "cat" / "copy.png")
    report = run(demo, tmp_path / "data", tmp_path / "out")
    assert [(Path(r.filename).name, r.other_split) for r in report.leakage] == [("copy.png", "val")]
    assert report.about["data"]["parts"] == {"train": 25, "val": 24}
    with pytest.raises(DataError, match="are compared: leave --against out"):
        read_set(tmp_path / "data", tmp_path / "data" / "val")


def test_same_photo_with_two_labels(demo: Predictor, data: Path, tmp_path: Path) -> None:
    photo(4).save(data / "dog" / "copy of 4.png")
    report = run(demo, data, tmp_path / "out")
    assert report.counts["conflicting_groups"] == 1
    assert {row.label for row in report.duplicates} == {"cat", "dog"}
    fixes = {Path(name).name: reason for name, _, reason in select_photos(report)}
    # Which label is right is unknown, so neither photo may train.
    assert fixes.keys() >= {"4.png", "copy of 4.png"}
    assert "labels cat, dog" in fixes["4.png"]


def test_photos_without_labels(demo: Predictor, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for index in range(8):
        photo(index).save(folder / f"{index}.png")
    photo(3).save(folder / "again.png")
    report = run(demo, folder, tmp_path / "out", next_count=3, next_by="coverage")
    assert report.label_suspects == ()
    assert any("labels are not judged: no folder per class" in note for note in report.notes)
    assert names(report.duplicates) == ["3.png", "again.png"]
    assert len(report.label_next) == 3
    single = run(demo, tmp_path / "d*" / "[0-5].png", tmp_path / "by pattern")
    assert single.about["data"]["photos"] == 6


@pytest.mark.parametrize("arrange", ["one class", "flag"])
def test_folders_without_labels(demo: Predictor, tmp_path: Path, arrange: str) -> None:
    data = write_set(tmp_path / "data")
    if arrange == "one class":
        for path in (data / "dog").iterdir():
            path.unlink()
    report = run(demo, data, tmp_path / "out", unlabelled=arrange == "flag")
    reason = "'cat': two classes or more" if arrange == "one class" else "(--unlabelled)"
    assert any(reason in note for note in report.notes)


def test_several_labels(demo: Predictor, tmp_path: Path) -> None:
    lines = ["filename,label"]
    for index in range(16):
        (tmp_path / "data" / "images").mkdir(parents=True, exist_ok=True)
        photo(index).save(tmp_path / "data" / "images" / f"{index}.png")
        lines.append(f"{index}.png,{' '.join(['red'] * (index % 2) + ['big'] * (index % 3 == 0))}")
    (tmp_path / "data" / "labels.csv").write_text("\n".join(lines) + "\n")
    report = run(demo, tmp_path / "data", tmp_path / "out", multi_label=True)
    assert {row["label"] for row in report.classes} == {"red", "big"}
    assert {row.label for row in report.label_suspects} <= {"red", "big"}
    with pytest.raises(DataError, match="--multi-label"):
        run(demo, tmp_path / "data", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_hostile_names_are_escaped(demo: Predictor, tmp_path: Path) -> None:
    data = write_set(tmp_path / "data", labels=("<script>alert(1)</script>", 'a"b\u202e'))
    evil = "<img src=x onerror=alert(2)>.png"
    photo(1).save(data / 'a"b\u202e' / evil)
    report = run(demo, data, tmp_path / "out", model="<b>model</b>")
    assert evil in names(report.duplicates)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert "<b>model" not in page
    assert "\u202e" not in page
    assert "&lt;img src=x onerror=alert(2)&gt;.png" in page.replace("<wbr>", "")


def test_second_run_computes_nothing_and_says_the_same(
    demo: Predictor, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(demo, data, tmp_path / "out").as_dict()

    def refuse(*_: object) -> object:
        raise AssertionError("a photo was decoded again")

    monkeypatch.setattr("vitlib.audit.inspection.decode_upright", refuse)
    monkeypatch.setattr("vitlib.features.extraction.map_batches", refuse)
    second = run(demo, data, tmp_path / "out").as_dict()
    for changing in ("seconds", "date"):
        first.pop(changing), second.pop(changing)
    assert first == second


def test_killed_run_goes_on(
    demo: Predictor, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("vitlib.audit.audit.find_duplicates", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(demo, data, tmp_path / "out")
    stub = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert stub["complete"] is False
    assert not (tmp_path / "out" / "report.html").exists()
    report = run(demo, data, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "audit.json").read_text())["complete"]
    assert not list((tmp_path / "out").glob(".facts*"))
    assert report.counts["exact_duplicates"] == 0


def test_models_do_not_share_features(demo: Predictor, data: Path, tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "store")
    other = Predictor(
        vitlib.ViT(
            vitlib.ViTConfig(image_size=16, patch_size=8, embed_dim=96, depth=1, num_heads=2)
        ),
        vitlib.ImageProcessor(size=(16, 16)),
    )
    alone = run(other, data, tmp_path / "alone", store=FeatureStore(tmp_path / "second"))
    run(demo, data, tmp_path / "a", store=store)
    mixed = run(other, data, tmp_path / "b", store=store)
    assert [row.margin for row in mixed.label_suspects] == [
        row.margin for row in alone.label_suspects
    ]


def test_nothing_readable_is_one_error(demo: Predictor, tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / "data" / label).mkdir(parents=True)
        (tmp_path / "data" / label / "x.jpg").write_bytes(b"no photo")
    with pytest.raises(DataError, match="none of 2 photos can be read"):
        run(demo, tmp_path / "data", tmp_path / "out")


def test_fix_list_is_read_as_paths(demo: Predictor, data: Path, tmp_path: Path) -> None:
    (data / "cat" / 'a, "b".png').write_bytes((data / "cat" / "1.png").read_bytes())
    report = run(demo, data, tmp_path / "out", fix_list=tmp_path / "fix.csv")
    with (tmp_path / "fix.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["filename", "label", "reason"]
    assert all(Path(row["filename"]).is_absolute() for row in rows)
    files = [row["filename"] for row in rows]
    assert len(set(files)) == len(files)
    assert all(Path(file).is_file() for file in files)  # nothing is deleted
    assert any(file.endswith('a, "b".png') or file.endswith("1.png") for file in files)
    assert write_fix_list(report, tmp_path / "again.csv") == len(rows)
    assert len(read_photos(data)) == 25


def test_output_among_the_photos_is_refused(demo: Predictor, data: Path, tmp_path: Path) -> None:
    for wrong in (data / "audit", data):
        with pytest.raises(SourceError, match="name"):
            run(demo, data, wrong)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(SourceError, match="no report of vitlib audit"):
        run(demo, data, tmp_path / "full")
    with pytest.raises(DataError, match="both the data and --against"):
        run(demo, data, tmp_path / "out", against=data / ".." / "data")
    assert not (tmp_path / "out").exists()


def test_report_is_the_same_in_any_process(demo: Predictor, data: Path, tmp_path: Path) -> None:
    first, second = (run(demo, data, tmp_path / name) for name in "ab")
    assert first.label_suspects == second.label_suspects
    assert first.label_next == second.label_next
    assert np.isfinite(first.label_accuracy)
