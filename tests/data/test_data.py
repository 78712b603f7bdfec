"""data: labelled photos from folders, CSV and JSONL; splits; what hostile or wrong input gets."""

from __future__ import annotations

import json
import logging
import os
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from paths import SHARED
from vitlib.data import LabelledPhotos, Photo, folds, gather, read_photos, read_split, rows, split
from vitlib.data.from_csv import CsvRows
from vitlib.errors import ConfigError, DataError

FRIDGE = ("can", "carton", "milk_bottle", "water_bottle")


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is absent")
    return path


def photo(*paths: Path) -> None:
    """Tiny photos, each of its own grey."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3), (hash(path.name) % 256,) * 3).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """a.png to f.png, for a CSV or JSONL to name."""
    here = tmp_path / "set"
    photo(*(here / f"{name}.png" for name in "abcdef"))
    return here


@pytest.fixture
def csv(folder: Path) -> Callable[..., LabelledPhotos]:
    """Read a labels.csv of this text (or these bytes) beside a.png to f.png."""

    def read(text: str | bytes, **options: Any) -> LabelledPhotos:
        path = folder / "labels.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_photos(folder, **options)

    return read


@pytest.fixture
def jsonl(folder: Path) -> Callable[..., LabelledPhotos]:
    """Read a JSONL of these values, one a line; text stands there as it is."""

    def read(*values: Any, **options: Any) -> LabelledPhotos:
        lines = [value if isinstance(value, str) else json.dumps(value) for value in values]
        (folder / "train.jsonl").write_text("\n".join(lines))
        return read_photos(folder, **options)

    return read


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """A folder a class: 5 cans and 3 cartons."""
    here = tmp_path / "classes"
    photo(*(here / "can" / f"{i}.png" for i in range(5)))
    photo(*(here / "carton" / f"{i}.png" for i in range(3)))
    return here


def said(photos: LabelledPhotos) -> list[tuple[str, tuple[str, ...]]]:
    return [(photo.path.name, photo.labels) for photo in photos.photos]


# ------------------------------------------------------------------------------------ real photos


def test_the_fridge_of_one_label() -> None:
    photos = read_photos(shared("data/fridge_multiclass"))
    assert len(photos) == 134
    assert photos.labels == FRIDGE
    assert list(photos.counts().values()) == [32, 32, 37, 33]
    assert np.bincount(photos.targets()).tolist() == [32, 32, 37, 33]
    assert photos.targets().dtype == np.int64
    assert read_split(shared("data/fridge_multiclass"))[1] is None
    for train, held_out in folds(photos, 5, seed=0):
        counts = photos.subset(held_out).counts().values()
        assert all(6 <= count <= 8 for count in counts)
        assert len(train) + len(held_out) == 134


def test_the_fridge_of_many_labels() -> None:
    path = shared("data/fridge_multilabel")
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
    one = read_photos(shared("data/fridge_multiclass"), multi_label=True)  # each photo one label
    assert one.targets().sum(1).tolist() == [1] * 134


# ------------------------------------------------------------------------------- a folder a class


def test_a_folder_a_class(classes: Path, caplog: pytest.LogCaptureFixture) -> None:
    photo(classes / "can" / "shelf" / "low" / "5.JPG")
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
    assert "2 files that no image is called are not read (.md, .txt)" in caplog.text
    assert not photos.multi_label
    assert photos.left_out == ()


def test_paths_stay_usable(classes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(classes.parent)
    photos = read_photos("classes")
    monkeypatch.chdir("/")
    assert all(photo.path.is_file() for photo in photos.photos)
    assert pickle.loads(pickle.dumps(photos)) == photos
    assert repr(photos) == "LabelledPhotos(8 photos, 2 labels, 'classes')"


def test_an_empty_class_is_told(classes: Path, caplog: pytest.LogCaptureFixture) -> None:
    (classes / "milk bottle").mkdir()
    photos = read_photos(classes)
    assert photos.labels == ("can", "carton", "milk bottle")
    assert photos.counts()["milk bottle"] == 0
    assert caplog.text.count("no photo has the label milk bottle") == 1


def test_links_are_followed_once(classes: Path, tmp_path: Path) -> None:
    photo(tmp_path / "elsewhere" / "x.png")
    (classes / "can" / "more").symlink_to(tmp_path / "elsewhere")
    (classes / "can" / "up").symlink_to(classes / "can")  # a loop
    assert read_photos(classes).counts() == {"can": 6, "carton": 3}


def test_a_photo_in_no_class(classes: Path) -> None:
    photo(classes / "lost.png")
    with pytest.raises(DataError, match=r"1 of 9 photos.*: 'lost.png' lies in no class's folder"):
        read_photos(classes)
    photos = read_photos(classes, on_bad_image="skip")
    assert photos.left_out == ((str(classes / "lost.png"), "lies in no class's folder"),)


def test_photos_that_vitlib_cannot_open_are_named(classes: Path) -> None:
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
        (("top/can/a.png", "top/carton/b.png"), r"are they the folders in .*top\? Then name that"),
        (("a.png", "b.png"), r"2 of 2 photos cannot be used: 'a.png' lies in no class's folder"),
    ],
)
def test_folders_that_are_no_set(tmp_path: Path, made: tuple[str, ...], match: str) -> None:
    here = tmp_path / "set"
    here.mkdir()
    for name in made:
        if name.endswith(".png"):
            photo(here / name)
        else:
            (here / name).mkdir()
    with pytest.raises(DataError, match=match):
        read_photos(here)


def test_sources_that_are_none(tmp_path: Path, folder: Path) -> None:
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
    with pytest.raises(DataError, match=r"pipe.csv is no regular file"):
        read_photos(folder / "pipe.csv")
    with pytest.raises(ConfigError, match=r"on_bad_image='ignore': expected one of 'fail', 'skip'"):
        read_photos(folder, on_bad_image="ignore")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"check='all': expected one of 'header', 'none'"):
        read_photos(folder, check="all")  # type: ignore[arg-type]


# ----------------------------------------------------------------------------- train and validation


def test_a_folder_of_both(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    photo(tmp_path / "train/can/a.png", tmp_path / "train/carton/b.png")
    photo(tmp_path / "Val/carton/c.png", tmp_path / "Val/carton/d.png")
    (tmp_path / "README.txt").write_text("files do not matter")
    training, validation = read_split(tmp_path)
    assert validation is not None
    assert len(training), len(validation) == (2, 2)
    assert validation.labels == ("can", "carton")  # though it has no can: one class is enough here
    assert validation.targets().tolist() == [1, 1]
    with pytest.raises(DataError, match=r"name one of them, or read both with read_split"):
        read_photos(tmp_path)
    photo(tmp_path / "test/can/e.png", tmp_path / "test/carton/f.png")
    assert not caplog.text
    _, same = read_split(tmp_path)
    assert same == validation
    assert "test/ is not read" in caplog.text
    (tmp_path / "Val").rename(tmp_path / "other")
    assert read_split(tmp_path / "train")[1] is None
    photo(tmp_path / "val/milk/g.png", tmp_path / "val/can/h.png")
    (tmp_path / "other").rename(tmp_path.parent / f"{tmp_path.name}-other")
    with pytest.raises(DataError, match=r"val: validation has the labels 'milk', which no photo"):
        read_split(tmp_path)
    photo(tmp_path / "validation/can/h.png")
    with pytest.raises(DataError, match=r"holds val, validation, test: expected one folder"):
        read_split(tmp_path)


def test_a_label_that_only_an_empty_training_folder_has(tmp_path: Path) -> None:
    photo(tmp_path / "train/can/a.png", tmp_path / "train/carton/b.png", tmp_path / "val/ice/c.png")
    (tmp_path / "train/ice").mkdir()
    with pytest.raises(DataError, match=r"has the labels 'ice', which no photo"):
        read_split(tmp_path)


def test_test_serves_as_validation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train", "test"):
        photo(tmp_path / name / "images/a.png", tmp_path / name / "images/b.png")
        (tmp_path / name / "labels.csv").write_text("a.png,can carton\nb.png,can\n")
    training, validation = read_split(tmp_path, multi_label=True)
    assert validation is not None
    assert said(training) == said(validation)
    assert "test/ serves as validation" in caplog.text


def test_train_and_val_without_classes(tmp_path: Path) -> None:
    photo(tmp_path / "train/a.png", tmp_path / "val/b.png")
    for read in (read_photos, read_split):
        with pytest.raises(
            DataError, match=r"train holds photos and no classes: expected a folder"
        ):
            read(tmp_path)
    (tmp_path / "labels.csv").write_text(
        "train/a.png,can\nval/b.png,carton\n"
    )  # says what they are
    assert len(read_split(tmp_path)[0]) == 2


def test_train_is_a_class_among_others(tmp_path: Path) -> None:
    photo(tmp_path / "train/a.png", tmp_path / "bus/b.png", tmp_path / "test/c.png")
    assert read_photos(tmp_path).labels == ("bus", "test", "train")


# -------------------------------------------------------------------------------------------- CSV


@pytest.mark.parametrize(
    "text",
    [
        "a.png,can\nb.png,carton\n",
        "filename,label\na.png,can\nb.png,carton",
        "IMAGE_URL, Class\r\na.png,can\r\n\r\n b.png , carton\r\n  \r\n",
        "\ufefffilename,labels\na.png,can\nb.png,carton\n",
        '\ufeff"a.png","can"\n"b.png","carton"\n',
        "label,path\ncan,a.png\ncarton,b.png\n",
        "image,what\na.png,can\nb.png,carton\n",
        "./a.png,can\n../set/b.png,carton\n",
        ",file,label\n0,a.png,can\n1,b.png,carton\n",  # pandas writes an index
        "file,can,carton\na.png,1,0\nb.png,0.0,1.0\n",  # one of several columns, always
    ],
)
def test_csv_of_one_label(csv: Callable[..., LabelledPhotos], text: str) -> None:
    photos = csv(text)
    assert said(photos) == [("a.png", ("can",)), ("b.png", ("carton",))]
    assert photos.targets().tolist() == [0, 1]
    assert all(photo.path.is_file() for photo in photos.photos)


def test_csv_labels_with_spaces_commas_and_quotes(csv: Callable[..., LabelledPhotos]) -> None:
    text = 'a.png,milk bottle\nb.png,"a ""big"", red can"\nc.png,"""milk bottle"""\nd.png,5" pipe\n'
    photos = csv(text + 'e.png,"""a"" b ""c""x"""\n')
    assert photos.labels == ('"a" b "c"x"', '5" pipe', 'a "big", red can', "milk bottle")
    assert photos.counts()["milk bottle"] == 2


def test_csv_of_many_labels(csv: Callable[..., LabelledPhotos]) -> None:
    text = 'a.png,"""milk bottle"" can"\nb.png,\nc.png,can  carton can\nd.png,""" "" carton"\n'
    photos = csv(text, multi_label=True)
    assert photos.labels == ("can", "carton", "milk bottle")
    assert said(photos) == [
        ("a.png", ("can", "milk bottle")),
        ("b.png", ()),
        ("c.png", ("can", "carton")),
        ("d.png", ("carton",)),
    ]
    assert photos.targets().tolist() == [[1, 0, 1], [0, 0, 0], [1, 1, 0], [0, 1, 0]]
    assert photos.multi_label


def test_csv_of_a_column_a_class(
    csv: Callable[..., LabelledPhotos], caplog: pytest.LogCaptureFixture
) -> None:
    text = (
        "filename,water bottle,can,Carton\n"
        "a.png,1,0,-1\nb.png,,1.0,0.0\nc.png,0,nan,0\nd.png,true,False,0\n"
    )
    photos = csv(text, multi_label=True)
    assert photos.labels == ("Carton", "can", "water bottle")  # sorted as text
    expected = [[np.nan, 0, 1], [0, 1, np.nan], [0, np.nan, 0], [0, 0, 1]]
    np.testing.assert_array_equal(photos.targets(), np.array(expected, np.float32))
    assert photos.photos[0] == Photo(photos.photos[0].path, ("water bottle",), ("Carton",))
    assert "no photo has the label Carton" in caplog.text
    with pytest.raises(DataError, match=r"line 2: 'a.png' has unknown labels.*--multi-label"):
        csv(text)
    text = text.replace("1,0,-1", "1,1,0")
    with pytest.raises(
        DataError, match=r"1 of 4 rows have several labels, such as line 2: water bottle, can"
    ):
        csv(text)


def test_other_columns_are_told(
    csv: Callable[..., LabelledPhotos], caplog: pytest.LogCaptureFixture
) -> None:
    photos = csv("filename,width,label\na.png,4,can\nb.png,4,carton\n")
    assert photos.labels == ("can", "carton")
    assert "the columns 'width' are not read" in caplog.text


def test_photos_in_images_and_anywhere(tmp_path: Path) -> None:
    photo(tmp_path / "set/images/a.png", tmp_path / "away/b.png", tmp_path / "set/c.png")
    photo(tmp_path / "set/images/sub/d.png", tmp_path / "set/images/c.png")
    csv = tmp_path / "set/train.CSV"
    csv.write_text(f"a.png,can\n{tmp_path}/away/b.png,can\nc.png,ice\nsub\\d.png,ice\n")
    expected = ["set/images/a.png", "away/b.png", "set/c.png", "set/images/sub/d.png"]
    for source in (csv, csv.parent):  # the only CSV of a folder
        photos = read_photos(source)
        assert read_split(source) == (photos, None)
        assert [p.path for p in photos.photos] == [tmp_path / name for name in expected]
        assert photos.source == str(csv)
    (tmp_path / "set/val.jsonl").touch()
    with pytest.raises(DataError, match=r"holds train.CSV, val.jsonl: name the one to read"):
        read_photos(csv.parent)
    (tmp_path / "set/labels.csv").write_text("a.png,can\nc.png,ice\n")
    assert len(read_photos(csv.parent)) == 2


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", r"labels.csv is empty: expected file,label on each line"),
        ("\n \n", r"is empty"),
        ("filename,label\n", r"no photo in it"),
        ("a.png\nb.png\n", r"line 1 has 1 column, and no names of a column of files"),
        ("filename\na.png\n", r"line 1 has 1 column,"),
        ("a.png;can\nb.png;carton\n", r"line 1 has 1 column and semicolons, and no names"),
        ("a.png\tcan\nb.png\tcarton\n", r"line 1 has 1 column and tabs"),
        ("a.png,can,carton\n", r"line 1 has 3 columns, and no names.*spaces between"),
        ("file,label,class\na.png,a,b\n", r"line 1 has 3 columns, and no names"),
        ("a.png,can\nb.png,can,carton\n", r"line 2 has 3 columns: expected 2. A name with a comma"),
        ("a.png,can\n\nb.png\n", r"line 3 has 1 column: expected 2"),
        ("file,can,ice\na.png,1\n", r"line 2 has 2 columns: expected 3"),
        ("a.png,can\n,carton\n", r"line 2 names no file"),
        ("a.png,can\nb.png, \n", r"line 2: 'b.png' has no label"),
        ("file,can,ice\na.png,0,0\n", r"line 2: 'a.png' has no label"),
        ('a.png,can\nb.png,"can\nc.png,ice\n', r"line 2 is not CSV .*closed on the same line"),
        ('a.png,can\n"b.png"x,can\n', r"line 2 is not CSV"),
        ("a.png,can\rb.png,carton\r", r"line 1 is not CSV"),
        ("file,can,ice\na.png,1,2\n", r"line 2 has '2' in the column 'ice': expected 1 \(in the"),
        ("file,can,b\x07\na.png,1,0\nb.png,1,0\n", r"the label 'b\\x07' has characters that"),
        ("file,can,can\na.png,1,0\n", r"line 1 has 'can' twice: expected the name of a class"),
        ("\nfile,can,\na.png,1,0\n", r"line 2 has a column without a name"),
        (b"a.png,can\nb.png,caf\xe9\n", r"line 2 is not UTF-8: save it as CSV UTF-8"),
        ("a.png,can\nb.png,carton\n".encode("utf-16"), r"line 1 is not UTF-8"),
        (
            "a.png,can\nb.png,ca\0n\n",
            r"line 2: the label 'ca\\x00n' has characters that are no tex",
        ),
        (f"a.png,can\nb.png,{'x' * 1001}\n", r"line 2: a label of 1001 characters: expected 1 to"),
        (f"a.png,can\nb.png,{'x' * 140_000}\n", r"line 2 is not CSV \(field larger than field"),
        ("a.png,can\nb.png,can\n", r"all photos \(2\) have the label 'can': expected two classes"),
        ("a.png,can\nb.png,ice\na.png,ice\n", r"'a.png' has the label can in line 1 and ice in li"),
    ],
)
def test_csv_that_is_wrong(csv: Callable[..., LabelledPhotos], text: Any, match: str) -> None:
    with pytest.raises(DataError, match=match) as caught:
        csv(text)
    assert "labels.csv" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('a.png,"""can carton"\n', r"line 1 has the labels '\"can carton', which cannot be read"),
        ('a.png,"""can""x carton"\n', r"line 1 has the labels .*quotes around one"),
        ("a.png,\nb.png,\n", r"no photo has a label: expected one class or more"),
        ('a.png,can\nb.png,ice\nc.png,"can,ice"\n', r"'can,ice' looks like several labels.*spaces"),
        ("a.png,can\nb.png,ice\nc.png,can;ice\n", r"'can;ice' looks like several labels"),
        ("f,can,ice\na.png,1,0\n", r"line 1 has 3 columns"),
        (
            "file,can,ice\na.png,1,0\na.png,0,1\n",
            r"'a.png' has the label can in line 2 and ice in ",
        ),
    ],
)
def test_csv_of_many_labels_that_is_wrong(
    csv: Callable[..., LabelledPhotos], text: str, match: str
) -> None:
    with pytest.raises(DataError, match=match):
        csv(text, multi_label=True)


@pytest.mark.parametrize(
    ("text", "count", "example"),
    [
        ("a.png,can\nb.png,ice\nc.png,can ice\nd.png,ice can\n", 2, "line 3: can ice"),
        ("a.png,can ice\nb.png,ice can\nc.png,bag\n", 2, "line 1: can ice"),  # only the order
        ("a.png,can\nb.png,ice\nc.png,can;ice\n", 1, "line 3: can;ice"),
        ('a.png,can\nb.png,"a b"\nc.png,"""a b"" can"\n', 1, 'line 3: "a b" can'),
    ],
)
def test_several_labels_given_as_one(
    csv: Callable[..., LabelledPhotos], text: str, count: int, example: str
) -> None:
    with pytest.raises(DataError) as caught:
        csv(text)
    rows = text.count("\n")
    assert f"{count} of {rows} rows have several labels, such as {example}: " in str(caught.value)
    assert "use multi_label=True (--multi-label)" in str(caught.value)


def test_labels_of_two_words_are_one(csv: Callable[..., LabelledPhotos]) -> None:
    photos = csv("a.png,milk bottle\nb.png,water bottle\nc.png,red can\nd.png,red carton\n")
    assert len(photos.labels) == 4


# ------------------------------------------------------------------------------------------ JSONL


def test_jsonl(jsonl: Callable[..., LabelledPhotos]) -> None:
    photos = jsonl(
        {"image_url": "a.png", "label": "can", "image_details": {"format": "png"}},
        "",
        {"image": "./b.png", "labels": "milk bottle"},
        {"file_name": "c.png", "label": " can "},
        {"path": "d.png", "label": "can", "labels": None},
    )
    assert photos.labels == ("can", "milk bottle")
    assert photos.targets().tolist() == [0, 1, 0, 0]


def test_jsonl_of_lists(jsonl: Callable[..., LabelledPhotos]) -> None:
    rows = (
        {"path": "a.png", "label": ["can", "milk bottle"]},
        {"path": "b.png", "label": []},
        {"path": "c.png", "label": ["can", "can"]},
    )
    photos = jsonl(*rows, multi_label=True)
    assert photos.targets().tolist() == [[1, 1], [0, 0], [1, 0]]
    with pytest.raises(
        DataError, match=r"1 of 3 rows have several labels, such as line 1: can, mi"
    ):
        jsonl(*rows)
    with pytest.raises(DataError, match=r"line 2: 'b.png' has no label"):
        jsonl({"path": "a.png", "label": ["can"]}, {"path": "b.png", "label": []})
    one = jsonl({"path": "a.png", "label": ["can"]}, {"path": "b.png", "label": ["ice"]})
    assert one.targets().tolist() == [0, 1]


def test_jsonl_of_marks(jsonl: Callable[..., LabelledPhotos]) -> None:
    rows = (
        {"path": "a.png", "label": {"can": True, "carton": None, "ice": 0}},
        {"path": "b.png", "label": {"carton": -1, "can": 0.0, "ice": False}},
    )
    photos = jsonl(*rows, multi_label=True)
    assert photos.labels == ("can", "carton", "ice")
    expected = np.array([[1, np.nan, 0], [0, np.nan, 0]], np.float32)
    np.testing.assert_array_equal(photos.targets(), expected)
    with pytest.raises(DataError, match=r"line 1: 'a.png' has unknown labels"):
        jsonl(*rows)


def test_jsonl_of_numbers(jsonl: Callable[..., LabelledPhotos]) -> None:
    photos = jsonl({"path": "a.png", "label": 3}, {"path": "b.png", "label": 10})
    assert photos.labels == ("10", "3")  # labels are text, sorted as text
    many = jsonl(
        {"path": "a.png", "label": [3, 10]}, {"path": "b.png", "label": [3]}, multi_label=True
    )
    assert many.targets().tolist() == [[1, 1], [0, 1]]


def test_urls_are_looked_for_here(
    jsonl: Callable[..., LabelledPhotos], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photo(folder / "images/g h.png", folder / "can/a.png")
    azure = "azureml://subscriptions/1/workspaces/w/datastores/d/paths"
    photos = jsonl(
        {"image_url": f"{azure}/fridge/b.png", "label": "can"},
        {"image_url": "https://example.com/x/g%20h.png?key=1#top", "label": "ice"},
        {"image_url": f"{azure}/can/a.png", "label": "can"},
    )
    paths = [folder / "b.png", folder / "images/g h.png", folder / "can/a.png"]
    assert [p.path for p in photos.photos] == paths
    assert caplog.text.count("rows of a URL, whose file of that name here is read: 3") == 1
    for url in (f"{azure}/z.png", "http://[", "s3://..", "http://example.com", "file:///%00.png"):
        with pytest.raises(DataError, match=r"is a URL, and no file.*download the photos first"):
            jsonl({"image_url": url, "label": "can"}, {"image_url": "b.png", "label": "ice"})
    with pytest.raises(DataError, match=r"\(line 1\) and .*\(line 2\) would be the same file here"):
        jsonl(
            {"image_url": "http://x/one/b.png", "label": "can"},
            {"image_url": "http://x/two/b.png", "label": "can"},
        )


def test_mixed_label_types(jsonl: Callable[..., LabelledPhotos]) -> None:
    text = {"path": "a.png", "label": "can"}
    lists = {"path": "b.png", "label": ["can"]}
    numbers = {"path": "c.png", "label": 3}
    message = (
        r"labels are a text in line 1 and a list of texts in line 3 and a number in line 4: wr"
    )
    for multi_label in (False, True):
        with pytest.raises(DataError, match=message):
            jsonl(text, text, lists, numbers, multi_label=multi_label)


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        (["\n"], r"train.jsonl is empty: expected \{\"image_url\": \"a.jpg\""),
        (["{'path': 'a.png'}"], r"line 1 is not JSON \(Expecting property name"),
        (["", "[1]"], r"line 2 holds no object"),
        (["[" * 100_000], r"line 1 is not JSON"),
        (["1" * 10_000], r"line 1 is not JSON|holds no object"),
        ([{"label": "can"}], r"line 1 has no text for image_url, image"),
        ([{"image": {"bytes": ""}, "label": "can"}], r"line 1 has no text for image_url, image"),
        (
            [{"image": "a.png", "path": "b.png", "label": "can"}],
            r"line 1 has image and path: expec",
        ),
        (
            [{"image": "a.png", "label": "a", "labels": "b"}],
            r"line 1 has label and labels: expected",
        ),
        ([{"image": "a.png"}], r"line 1 has nothing for a label: expected a text, a list"),
        ([{"image": "a.png", "label": None}], r"line 1 has nothing for a label"),
        ([{"image": "a.png", "label": True}], r"line 1 has true or false for a label"),
        ([{"image": "a.png", "label": 1.5}], r"line 1 has the number 1.5 for a label"),
        ([{"image": "a.png", "label": ""}], r"line 1: 'a.png' has no label"),
        ([{"image": "a.png", "label": ["a", 1]}], r"line 1 has the number 1 among its labels"),
        ([{"image": "a.png", "label": ["a", ""]}], r"line 1 has an empty text among its labels"),
        ([{"image": "a.png", "label": [None]}], r"line 1 has nothing among its labels"),
        ([{"image": "a.png", "label": {"a": "yes"}}], r"line 1 has a text for 'a': expected true"),
        ([{"image": "a.png", "label": {"a": 2}}], r"line 1 has the number 2 for 'a'"),
        (
            ['{"path": "a.png", "path": "b.png", "label": "a"}'],
            r"line 1 is not JSON \(a key stands",
        ),
        (
            [{"image": "a.png", "label": "\ud800"}],
            r"line 1: the label '\\ud800' has characters tha",
        ),
        ([{"image": "\ud800.png", "label": "can"}], r"line 1: '\\ud800.png' is not there"),
        ([{"image": "x" * 5000, "label": "can"}], r"line 1: '…x+' is not there"),
        (
            [{"image": "a.png", "label": {"a": 1}}, {"image": "b.png", "label": {"b": 1}}],
            r"line 2 and line 1 name other classes \('a', 'b'\): expected true, false or null",
        ),
    ],
)
def test_jsonl_that_is_wrong(
    jsonl: Callable[..., LabelledPhotos], lines: list[Any], match: str
) -> None:
    with pytest.raises(DataError, match=match) as caught:
        jsonl(*lines)
    assert "train.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_jsonl_text_of_several_labels(jsonl: Callable[..., LabelledPhotos]) -> None:
    lines = [
        {"path": f"{n}.png", "label": label}
        for n, label in zip("abc", ("x", "y", "x y"), strict=True)
    ]
    with pytest.raises(DataError, match=r"1 of 3 rows have several labels, such as line 3: x y"):
        jsonl(*lines)
    with pytest.raises(DataError, match=r"'x y' looks like several labels.*a list, \[\"can\""):
        jsonl(*lines, multi_label=True)


# ------------------------------------------------------------------- photos that cannot be used


def test_bad_photos_in_one_error(csv: Callable[..., LabelledPhotos], folder: Path) -> None:
    (folder / "b.png").write_bytes(b"no image")
    (folder / "c.png").write_bytes(b"")
    (folder / "dir.png").mkdir()
    text = (
        "file,label\na.png,can\nb.png,ice\nc.png,ice\nz.png,can\ndir.png,can\nd.png,ice\ny.png,ice\n"
        "x.png,ice\n"
    )
    with pytest.raises(DataError) as caught:
        csv(text)
    message = str(caught.value)
    assert "6 of 8 photos cannot be used: line 3: " in message
    assert "b.png' is not an image: expected JPEG" in message
    assert "c.png' is empty: expected JPEG" in message
    assert (
        "line 5: 'z.png' is not there; line 6: 'dir.png' is not there; line 8: 'y.png'" in message
    )
    assert "x.png" not in message
    assert "… (6 in all). Mend them" in message
    assert "on_bad_image='skip' (--on-bad-image skip)" in message
    with pytest.raises(DataError, match=r": 4 of 8 photos cannot be used: line 5: "):
        csv(text, check="none")


def test_bad_photos_are_left_out_and_named(
    csv: Callable[..., LabelledPhotos], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "b.png").write_bytes(b"no image")
    text = "a.png,can\nb.png,ice\nz.png,cup\nd.png,ice\n"
    photos = csv(text, on_bad_image="skip")
    assert said(photos) == [("a.png", ("can",)), ("d.png", ("ice",))]
    assert photos.labels == ("can", "ice")
    (first, why), (second, why_not) = photos.left_out
    assert first == "b.png"  # as it is written
    assert why.startswith("line 2: is not an image: expected JPEG")
    assert (second, why_not) == ("z.png", "line 3: is not there")
    assert len(caplog.records) == 1
    assert caplog.records[0].name == "vitlib"
    assert "2 of 4 photos are left out: line 2: " in caplog.text
    assert "no photo is left with the label 'cup'" in caplog.text
    with pytest.raises(
        DataError, match=r"none of 2 photos can be used: line 1: 'z.png' is not the"
    ):
        csv("z.png,can\ny.png,ice\n", on_bad_image="skip")
    with pytest.raises(DataError, match=r"all photos \(1\) have the label 'can'"):
        csv("a.png,can\nb.png,ice\n", on_bad_image="skip")


def test_only_the_first_of_many_bad_photos_are_kept(csv: Callable[..., LabelledPhotos]) -> None:
    text = "".join(f"no{i}.png,can\n" for i in range(1000))
    with pytest.raises(
        DataError, match=r"1000 of 1000 photos .*line 5: 'no4.png' is not there; … "
    ):
        csv(text)
    photos = csv(text + "a.png,can\nb.png,ice\n", on_bad_image="skip")
    assert len(photos.left_out) == 1000


def test_a_header_that_is_none(csv: Callable[..., LabelledPhotos]) -> None:
    with pytest.raises(
        DataError, match=r"line 1: 'id' is not there \(if the line is a header: exp"
    ):
        csv("id,breed\na.png,can\nb.png,ice\n")


def test_an_image_bomb_is_named(classes: Path) -> None:
    header = b"P6 60000 60000 255 "
    (classes / "can" / "bomb.ppm").write_bytes(header + b"\0" * 100)
    with pytest.raises(DataError, match=r"bomb.ppm' has (over|60000x60000)"):
        read_photos(classes)
    assert len(read_photos(classes, check="none")) == 9


def test_a_link_to_nothing_is_named(classes: Path) -> None:
    (classes / "can" / "gone.png").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"'can/gone.png' is not there"):
        read_photos(classes, check="none")


def test_a_photo_twice(
    csv: Callable[..., LabelledPhotos], caplog: pytest.LogCaptureFixture
) -> None:
    photos = csv("a.png,can\nb.png,ice\n./a.png,can\n")
    assert said(photos) == [("a.png", ("can",)), ("b.png", ("ice",))]
    assert "rows that repeat an earlier one, read once: 1" in caplog.text
    with pytest.raises(
        DataError, match=r"in line 1 and ice in line 3.*if each is right, use multi_"
    ):
        csv("a.png,can\nb.png,ice\na.png,ice\n")
    photos = csv("a.png,can\nb.png,ice\na.png,ice\n", multi_label=True)  # one label a row
    assert said(photos) == [("a.png", ("can", "ice")), ("b.png", ("ice",))]
    assert "rows of a photo that an earlier one names, their labels joined: 1" in caplog.text


# ------------------------------------------------------------------------------------------ bounds


@pytest.mark.parametrize(
    ("bound", "value", "match"),
    [
        ("rows.MAX_FILE_BYTES", 20, r"labels.csv has \d+ bytes: expected at most 20; split it"),
        ("rows.MAX_LINE_BYTES", 12, r"line 2 is too long: expected at most 12 bytes a line"),
        ("gather.MAX_ROWS", 2, r"over 2 rows: split it"),
        ("gather.MAX_CLASSES", 2, r"line 3: over 2 different labels: expected fewer"),
        ("gather.MAX_LABEL", 3, r"line 2: a label of 6 characters: expected 1 to 3"),
        ("gather.MAX_MARKS", 2, r"over 2 labels in all: split it"),
    ],
)
def test_bounds(
    csv: Callable[..., LabelledPhotos],
    monkeypatch: pytest.MonkeyPatch,
    bound: str,
    value: int,
    match: str,
) -> None:
    module, name = bound.split(".")
    monkeypatch.setattr({"rows": rows, "gather": gather}[module], name, value)
    with pytest.raises(DataError, match=match):
        csv("a.png,can\nb.png,carton\nc.png,ice\n")


def test_a_bound_on_columns(
    csv: Callable[..., LabelledPhotos], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitlib.data.from_csv.MAX_CLASSES", 2)
    with pytest.raises(DataError, match=r"line 1 has 3 classes: expected at most 2"):
        csv("file,a,b,c\na.png,1,0,0\n", multi_label=True)
    monkeypatch.setattr("vitlib.data.from_folder.MAX_CLASSES", 2)


def test_a_bound_on_folders(classes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitlib.data.from_folder.MAX_CLASSES", 1)
    with pytest.raises(DataError, match=r"has 2 folders: expected at most 1 classes"):
        read_photos(classes)


def test_a_hostile_file_takes_little_memory(folder: Path) -> None:
    path = folder / "labels.csv"
    with path.open("wb") as file:  # 256 MiB of one line, which take no room on the disk
        file.truncate(2**28)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"line 1 is too long"):
            read_photos(folder)
        path.write_bytes(b'a.png,"' + b"x\n" * 2**21)  # an open quote before 2 million lines
        with pytest.raises(DataError, match=r"line 1 is not CSV"):
            read_photos(folder)
        path.write_bytes(b"no.png,x\n" * 2**14)  # photos that are not there
        with pytest.raises(DataError, match=r"16384 of 16384 photos cannot be used"):
            read_photos(folder)
        path.write_bytes(b"file," + b"a," * 2**20 + b"\n")  # names that are all the same
        with pytest.raises(DataError, match=r"line 1 has a column without a name|twice"):
            read_photos(folder)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 150 * 2**20


def test_targets_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    photos = LabelledPhotos((Photo(Path("a"), ()),) * 1000, ("can", "ice"), True, "set")
    monkeypatch.setattr("vitlib.data.photos.available_memory", lambda _: 7999)
    with pytest.raises(DataError, match=r"1000 photos and 2 classes take 0.0 GiB"):
        photos.targets()


def test_rows_come_one_by_one(folder: Path) -> None:
    """A wrong line far down does not keep the rows above it from being read."""
    (folder / "labels.csv").write_text("a.png,can\nb.png\n")
    read = iter(CsvRows(folder / "labels.csv", multi_label=False))
    assert next(read) == rows.Row(1, "a.png", ("can",), "field")
    with pytest.raises(DataError, match="line 2"):
        next(read)


def test_what_cannot_be_read(classes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(DataError, match=r"classes cannot be read: Permission denied"):
        read_photos(classes)


# ------------------------------------------------------------------------------- classes of a model


def test_with_labels(classes: Path) -> None:
    photos = read_photos(classes)
    other = photos.with_labels(["ice", "carton", "can"])
    assert other.labels == ("ice", "carton", "can")
    assert other.targets().tolist() == [2] * 5 + [1] * 3
    assert other.counts() == {"ice": 0, "carton": 3, "can": 5}
    assert photos.with_labels(photos.labels) == photos
    with pytest.raises(
        DataError, match=r"labels 'carton' \(photos: 3\) are not among the 2 classes c"
    ):
        photos.with_labels(["can", "ice"])
    with pytest.raises(DataError, match=r"'can' is the name of two classes or more"):
        photos.with_labels(["can", "carton", "can"])
    twice = photos.with_labels(["can", "carton", "crane", "crane"])  # none of them is a crane
    assert twice.targets().tolist() == [0] * 5 + [1] * 3


def test_with_labels_of_many(csv: Callable[..., LabelledPhotos]) -> None:
    photos = csv("file,can,ice,cup\na.png,1,0,\nb.png,0,1,\n", multi_label=True)
    other = photos.with_labels(["ice", "jar", "can"])  # nothing is known of cups: it can go
    assert other.targets().tolist() == [[0, 0, 1], [1, 0, 0]]
    assert other.photos[0].unknown == ()
    kept = photos.with_labels(["cup", "can", "ice"])
    np.testing.assert_array_equal(kept.targets()[:, 0], [np.nan, np.nan])


def test_reading_as_the_classes_of_a_model(classes: Path, tmp_path: Path) -> None:
    photo(tmp_path / "one" / "can" / "a.png")
    photos = read_photos(tmp_path / "one", labels=("carton", "can"))  # one class is enough
    assert photos.targets().tolist() == [1]
    with pytest.raises(
        DataError, match=r"labels 'carton' \(photos: 3\) are not among the 1 classes"
    ):
        read_photos(classes, labels=["can"])


def test_labels_that_are_none() -> None:
    photos = LabelledPhotos((Photo(Path("a"), ("cup",)),), ("can",), False, "set")
    with pytest.raises(DataError, match=r"set: the label 'cup' is none of the classes, can"):
        photos.targets()


def test_subset(classes: Path) -> None:
    photos = read_photos(classes)
    part = photos.subset(np.array([7, 0]))
    assert [p.labels for p in part.photos] == [("carton",), ("can",)]
    assert part.labels == photos.labels
    assert len(photos.subset([])) == 0


# ------------------------------------------------------------------------------------------ splits


def made(counts: dict[str, int]) -> LabelledPhotos:
    """A single-label set of so many photos a class."""
    photos = [Photo(Path(f"{n}{i}"), (n,)) for n, count in counts.items() for i in range(count)]
    return LabelledPhotos(tuple(photos), tuple(sorted(counts)), False, "made")


def made_many(seed: int, count: int, shares: list[float]) -> LabelledPhotos:
    """A multi-label set, each class in about its share of the photos."""
    there = np.random.RandomState(seed).rand(count, len(shares)) < shares
    names = tuple(f"class{i}" for i in range(len(shares)))
    photos = [
        Photo(Path(f"{i}.png"), tuple(n for n, on in zip(names, row, strict=True) if on))
        for i, row in enumerate(there)
    ]
    return LabelledPhotos(tuple(photos), names, True, "made")


def both(training: LabelledPhotos, validation: LabelledPhotos) -> list[Path]:
    return sorted(photo.path for part in (training, validation) for photo in part.photos)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.2, 0.25, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("counts", [{"a": 40, "b": 25, "c": 3, "d": 2}, {"a": 7, "b": 7, "c": 7}])
def test_each_class_keeps_its_share(counts: dict[str, int], fraction: float) -> None:
    photos = made(counts)
    training, validation = split(photos, fraction, seed=3)
    assert both(training, validation) == sorted(photo.path for photo in photos.photos)
    for label, count in counts.items():
        held = validation.counts()[label]
        assert 1 <= held <= count - 1
        assert abs(held - fraction * count) < 1 or held in (1, count - 1)
    assert training.labels == validation.labels == photos.labels
    if fraction in (0.2, 0.25, 0.5):
        assert abs(len(validation) - fraction * len(photos)) < 2
    index = {photo.path: i for i, photo in enumerate(photos.photos)}
    order = [index[photo.path] for photo in training.photos]
    assert order == sorted(order)


def test_a_split_is_its_seed() -> None:
    photos = made({"a": 50, "b": 50})
    assert split(photos, seed=1) == split(photos, seed=1)
    assert split(photos, seed=1) != split(photos, seed=2)
    # The numbers themselves: what is held out must not change with a version of numpy or vitlib.
    held = [photo.path.name for photo in split(made({"a": 5, "b": 5}), 0.4, seed=0)[1].photos]
    assert held == ["a2", "a4", "b3", "b4"]
    held_out = [h.tolist() for _, h in folds(made({"a": 5, "b": 5}), 2, seed=0)]
    assert held_out == [[0, 1, 2, 7, 9], [3, 4, 5, 6, 8]]
    many = [h.tolist() for _, h in folds(made_many(0, 10, [0.5, 0.3]), 2, seed=0)]
    assert many == [[0, 1, 3, 4, 7], [2, 5, 6, 8, 9]]


def test_a_class_of_one_photo_is_for_training(caplog: pytest.LogCaptureFixture) -> None:
    training, validation = split(made({"a": 9, "b": 1}), 0.5)
    assert training.counts()["b"] == 1
    assert validation.counts()["b"] == 0
    assert "no validation photo has the label b" in caplog.text


def test_every_fifth(caplog: pytest.LogCaptureFixture) -> None:
    photos = made({"a": 6, "b": 6})
    training, validation = split(photos, how="fifth")
    assert validation == photos.subset([0, 5, 10])
    assert training == photos.subset([1, 2, 3, 4, 6, 7, 8, 9, 11])
    assert not caplog.text
    split(made({"a": 1, "b": 4}), how="fifth")
    assert "no training photo has the label a" in caplog.text


@pytest.mark.parametrize("how", ["stratified", "fifth"])
@pytest.mark.parametrize("count", [0, 1])
def test_too_few_to_split(how: Any, count: int) -> None:
    for photos in (made({"a": count}), made_many(0, count, [1.0])):
        with pytest.raises(DataError, match=rf"made: {count} photos cannot be split"):
            split(photos, how=how)
        with pytest.raises(DataError, match=rf"made: {count} photos for 2 folds: expected more"):
            folds(photos, 2, 0)
    with pytest.raises(DataError, match=r"3 photos cannot be split.*a class of two photos or more"):
        split(made({"a": 1, "b": 1, "c": 1}))


def test_arguments_of_splits() -> None:
    photos = made({"a": 4, "b": 4})
    for fraction in (0, 1, -0.2, float("nan")):
        with pytest.raises(ConfigError, match=r"fraction=.*expected a number between 0 and 1"):
            split(photos, fraction)
    with pytest.raises(ConfigError, match=r"how='sorted': expected one of 'stratified', 'fifth'"):
        split(photos, how="sorted")  # type: ignore[arg-type]
    for seed in (-1, 2**32, 0.5):
        with pytest.raises(ConfigError, match=r"seed=.*expected a whole number in 0..2"):
            split(photos, seed=seed)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"seed="):
            folds(photos, 2, seed)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"count=1: expected a whole number of at least 2"):
        folds(photos, 1, 0)


@pytest.mark.parametrize("count", [2, 3, 5, 10])
@pytest.mark.parametrize("seed", [0, 1])
def test_folds_hold_each_photo_out_once(count: int, seed: int) -> None:
    few = made_many(seed, count, [0.5, 0.5])
    assert [len(held) for _, held in folds(few, count, seed)] == [1] * count
    for photos in (made({"a": 23, "b": 11, "c": 4}), made_many(0, 38, [0.5, 0.3, 0.1])):
        parts = folds(photos, count, seed)
        assert len(parts) == count
        assert np.sort(np.concatenate([held for _, held in parts])).tolist() == list(range(38))
        for train, held in parts:
            assert held.dtype == train.dtype == np.int64
            assert len(held)
            assert np.sort(np.concatenate([train, held])).tolist() == list(range(38))
            assert (np.diff(held) > 0).all()
            assert (np.diff(train) > 0).all()
        again = folds(photos, count, seed)
        assert all(np.array_equal(a[1], b[1]) for a, b in zip(parts, again, strict=True))
        if not photos.multi_label:
            sizes = [len(held) for _, held in parts]
            assert max(sizes) - min(sizes) <= 1
            for label in photos.labels:
                held_of = [photos.subset(held).counts()[label] for _, held in parts]
                assert max(held_of) - min(held_of) <= 1


def test_rare_classes_in_folds_are_told(caplog: pytest.LogCaptureFixture) -> None:
    folds(made({"a": 20, "b": 3, "c": 0}), 5, 0)
    assert "not in each of 5 folds, for want of photos: b" in caplog.text


def test_iterative_stratification_beats_chance() -> None:
    """Rare classes are spread evenly, which a random split does not do."""
    photos = made_many(1, 400, [0.6, 0.2, 0.05, 0.03])
    targets = photos.targets()
    stratified = folds(photos, 5, 0)
    wanted = targets.sum(0) / 5
    off = max(np.abs(targets[held].sum(0) - wanted).max() for _, held in stratified)
    chance = np.random.RandomState(0).permutation(400).reshape(5, 80)
    off_by_chance = max(np.abs(targets[held].sum(0) - wanted).max() for held in chance)
    assert off < 2 < off_by_chance
    assert all(abs(len(held) - 80) <= 6 for _, held in stratified)


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.2, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_many_labels_are_on_both_sides(fraction: float, seed: int) -> None:
    photos = made_many(seed, 60, [0.5, 0.1, 0.06, 0.04, 0.04])
    training, validation = split(photos, fraction, seed)
    assert both(training, validation) == sorted(photo.path for photo in photos.photos)
    for label, count in photos.counts().items():
        if count > 1:
            assert training.counts()[label], label
            assert validation.counts()[label], label
    assert split(photos, fraction, seed) == (training, validation)


def test_classes_that_cannot_be_on_both_sides(caplog: pytest.LogCaptureFixture) -> None:
    """Each two of three photos share a class, none is on both sides of all: training has all."""
    pairs = (("a", "b"), ("b", "c"), ("a", "c"))
    photos = LabelledPhotos(
        tuple(Photo(Path(str(i)), pair) for i, pair in enumerate(pairs)), ("a", "b", "c"), True, "s"
    )
    training, validation = split(photos, 0.34)
    assert len(training) + len(validation) == 3
    assert len(validation)
    assert all(training.counts().values())
    assert "no validation photo has the label" in caplog.text


def test_photos_without_a_label_are_spread() -> None:
    photos = LabelledPhotos(tuple(Photo(Path(str(i)), ()) for i in range(10)), ("a",), True, "s")
    assert [len(held) for _, held in folds(photos, 5, 0)] == [2] * 5
    assert len(split(photos, 0.2)[1]) == 2


def test_several_labels_taken_for_one(tmp_path: Path) -> None:
    """A model of one label each, photos of several: the hint is what to say."""
    photos = LabelledPhotos(
        (Photo(tmp_path / "a.png", ("can carton",)),),
        ("can carton",),
        multi_label=False,
        source="set",
    )
    with pytest.raises(DataError, match="say that they are several \\(--multi-label\\)"):
        photos.with_labels(("can", "carton"))
    with pytest.raises(DataError, match="rename them"):
        photos.with_labels(("can", "bottle"))
