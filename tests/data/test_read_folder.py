"""Tests of reading a folder per class, and train and validation folders."""

from __future__ import annotations

import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from fixtures.labelled_photos import names_and_labels, write_photos
from paths import SHARED
from vitlib.data import folds, read_photos, read_split, rows
from vitlib.errors import ConfigError, DataError

FRIDGE = ("can", "carton", "milk_bottle", "water_bottle")


def shared_path(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is absent")
    return path


def test_reads_shared_single_label_set() -> None:
    photos = read_photos(shared_path("data/fridge_multiclass"))
    assert len(photos) == 134
    assert photos.labels == FRIDGE
    assert list(photos.counts().values()) == [32, 32, 37, 33]
    assert np.bincount(photos.targets()).tolist() == [32, 32, 37, 33]
    assert photos.targets().dtype == np.int64
    assert read_split(shared_path("data/fridge_multiclass"))[1] is None
    for train, held_out in folds(photos, 5, seed=0):
        counts = photos.subset(held_out).counts().values()
        assert all(6 <= count <= 8 for count in counts)
        assert len(train) + len(held_out) == 134


def test_reads_shared_multi_label_set() -> None:
    path = shared_path("data/fridge_multilabel")
    photos = read_photos(path, multi_label=True)
    assert len(photos) == 128
    assert photos.labels == FRIDGE
    assert list(photos.counts().values()) == [83, 86, 85, 82]
    targets = photos.targets()
    assert targets.shape == (128, 4)
    assert targets.dtype == np.float32
    assert targets.sum(0).tolist() == [83, 86, 85, 82]
    for _, held_out in folds(photos, 5, seed=0):
        assert all(16 <= count <= 18 for count in photos.subset(held_out).counts().values())
    with pytest.raises(DataError, match=r"108 of 128 rows have several labels.*--multi-label"):
        read_photos(path)
    photos = read_photos(shared_path("data/fridge_multiclass"), multi_label=True)
    assert photos.targets().sum(1).tolist() == [1] * 134


def test_folder_per_class_reads_labels(classes: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_photos(classes / "can" / "shelf" / "low" / "5.JPG")
    (classes / "can" / "notes.txt").write_text("no photo")
    (classes / "can" / ".DS_Store").write_text("no photo")
    (classes / "can" / "._1.jpg").write_text("macOS leaves these")
    (classes / ".cache").mkdir()
    (classes / "__MACOSX" / "can").mkdir(parents=True)
    (classes / "README.md").write_text("no photo")
    caplog.set_level(logging.INFO)
    photos = read_photos(classes)
    assert photos.labels == ("can", "carton")
    assert photos.counts() == {"can": 6, "carton": 3}
    assert photos.photos[5].path == classes / "can/shelf/low/5.JPG"
    assert [p.path for p in photos.photos] == sorted(p.path for p in photos.photos)
    assert photos.source == str(classes)
    assert "2 files without the suffix of an image are not read (.md, .txt)" in caplog.text
    assert not photos.multi_label
    assert photos.left_out == ()


def test_paths_are_absolute(classes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(classes.parent)
    photos = read_photos("classes")
    monkeypatch.chdir("/")
    assert all(photo.path.is_file() for photo in photos.photos)
    assert pickle.loads(pickle.dumps(photos)) == photos
    assert repr(photos) == "LabelledPhotos(8 photos, 2 labels, 'classes')"


def test_empty_class_is_logged(classes: Path, caplog: pytest.LogCaptureFixture) -> None:
    (classes / "milk bottle").mkdir()
    photos = read_photos(classes)
    assert photos.labels == ("can", "carton", "milk bottle")
    assert photos.counts()["milk bottle"] == 0
    assert caplog.text.count("no photo has the label milk bottle") == 1


def test_links_to_folders_are_followed_once(classes: Path, tmp_path: Path) -> None:
    write_photos(tmp_path / "elsewhere" / "x.png")
    (classes / "can" / "more").symlink_to(tmp_path / "elsewhere")
    (classes / "can" / "up").symlink_to(classes / "can")  # a loop
    assert read_photos(classes).counts() == {"can": 6, "carton": 3}


def test_photo_outside_classes_is_refused(classes: Path) -> None:
    write_photos(classes / "lost.png")
    with pytest.raises(
        DataError, match=r"1 of 9 photos.*: 'lost.png' is not in the folder of a class"
    ):
        read_photos(classes)
    photos = read_photos(classes, on_bad_image="skip")
    assert photos.left_out == ((str(classes / "lost.png"), "is not in the folder of a class"),)


def test_unsupported_formats_are_named(classes: Path) -> None:
    (classes / "can" / "phone.heic").write_bytes(b"\0\0\0 ftypheic")
    with pytest.raises(
        DataError, match=r"photos cannot be used: 'can/phone.heic' is not an image: exp"
    ):
        read_photos(classes)


@pytest.mark.parametrize(
    ("made", "match"),
    [
        ((), r"no photo in it$"),
        (("can", "carton"), r"no photo in it, nor in its folders can, carton"),
        (("can/a.png",), r"all photos \(1\) have the label 'can': expected two classes or more$"),
        (("can/a.png", "carton"), r"all photos \(1\) have the label 'can': expected two classes"),
        (("top/can/a.png", "top/carton/b.png"), r"if they are the folders in .*top, name that"),
        (
            ("a.png", "b.png"),
            r"2 photos and no folder of a class in it: expected a folder with a folder per class",
        ),
    ],
)
def test_folder_without_a_set_is_refused(tmp_path: Path, made: tuple[str, ...], match: str) -> None:
    here = tmp_path / "set"
    here.mkdir()
    for name in made:
        if name.endswith(".png"):
            write_photos(here / name)
        else:
            (here / name).mkdir()
    with pytest.raises(DataError, match=match):
        read_photos(here)


def test_source_of_another_kind_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere' is not there: expected a folder with a folder"):
        read_photos(tmp_path / "nowhere")
    for name in ("a\0b", "x" * 5000):
        for read in (read_photos, read_split):
            with pytest.raises(DataError, match=r"is not there"):
                read(name)
    with pytest.raises(DataError, match=r"a.png ends in .png: expected a folder"):
        read_photos(folder / "a.png")
    with pytest.raises(DataError, match=r"gone.csv cannot be read: No such file"):
        list(rows.lines(folder / "gone.csv"))
    os.mkfifo(folder / "pipe.csv")
    with pytest.raises(DataError, match=r"pipe.csv is not a regular file"):
        read_photos(folder / "pipe.csv")
    with pytest.raises(ConfigError, match=r"on_bad_image='ignore': expected one of 'fail', 'skip'"):
        read_photos(folder, on_bad_image="ignore")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"check='all': expected one of 'header', 'none'"):
        read_photos(folder, check="all")  # type: ignore[arg-type]


def test_train_and_validation_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_photos(tmp_path / "train/can/a.png", tmp_path / "train/carton/b.png")
    write_photos(tmp_path / "Val/carton/c.png", tmp_path / "Val/carton/d.png")
    (tmp_path / "README.txt").write_text("files do not matter")
    training, validation = read_split(tmp_path)
    assert validation is not None
    assert len(training), len(validation) == (2, 2)
    assert validation.labels == ("can", "carton")  # though it has no can: one class is enough here
    assert validation.targets().tolist() == [1, 1]
    with pytest.raises(DataError, match=r"name one of them, or read both with read_split"):
        read_photos(tmp_path)
    write_photos(tmp_path / "test/can/e.png", tmp_path / "test/carton/f.png")
    assert not caplog.text
    _, same = read_split(tmp_path)
    assert same == validation
    assert "test/ is not read" in caplog.text
    (tmp_path / "Val").rename(tmp_path / "other")
    assert read_split(tmp_path / "train")[1] is None
    write_photos(tmp_path / "val/milk/g.png", tmp_path / "val/can/h.png")
    (tmp_path / "other").rename(tmp_path.parent / f"{tmp_path.name}-other")
    with pytest.raises(DataError, match=r"val: validation has the labels 'milk', which no photo"):
        read_split(tmp_path)
    write_photos(tmp_path / "validation/can/h.png")
    with pytest.raises(DataError, match=r"has val, validation, test: expected one folder"):
        read_split(tmp_path)


def test_validation_label_without_training_photo_is_refused(tmp_path: Path) -> None:
    write_photos(
        tmp_path / "train/can/a.png", tmp_path / "train/carton/b.png", tmp_path / "val/ice/c.png"
    )
    (tmp_path / "train/ice").mkdir()
    with pytest.raises(DataError, match=r"has the labels 'ice', which no photo"):
        read_split(tmp_path)


def test_test_folder_serves_as_validation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train", "test"):
        write_photos(tmp_path / name / "images/a.png", tmp_path / name / "images/b.png")
        (tmp_path / name / "labels.csv").write_text("a.png,can carton\nb.png,can\n")
    training, validation = read_split(tmp_path, multi_label=True)
    assert validation is not None
    assert names_and_labels(training) == names_and_labels(validation)
    assert "test/ serves as validation" in caplog.text


def test_train_folder_without_classes_is_refused(tmp_path: Path) -> None:
    write_photos(tmp_path / "train/a.png", tmp_path / "val/b.png")
    for read in (read_photos, read_split):
        with pytest.raises(DataError, match=r"train has photos and no classes: expected a folder"):
            read(tmp_path)
    (tmp_path / "labels.csv").write_text(
        "train/a.png,can\nval/b.png,carton\n"
    )  # says what they are
    assert len(read_split(tmp_path)[0]) == 2


def test_train_folder_is_a_class_among_others(tmp_path: Path) -> None:
    write_photos(tmp_path / "train/a.png", tmp_path / "bus/b.png", tmp_path / "test/c.png")
    assert read_photos(tmp_path).labels == ("bus", "test", "train")
