"""Labelled sets of CSV files: labels, marks, and lines that are not rows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixtures.labelled_photos import names_and_labels, write_photos
from vitlib.data import LabelledPhotos, Photo, read_photos, read_split
from vitlib.errors import DataError


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
def test_csv_single_label(csv: Callable[..., LabelledPhotos], text: str) -> None:
    photos = csv(text)
    assert names_and_labels(photos) == [("a.png", ("can",)), ("b.png", ("carton",))]
    assert photos.targets().tolist() == [0, 1]
    assert all(photo.path.is_file() for photo in photos.photos)


def test_csv_labels_with_spaces_commas_and_quotes(csv: Callable[..., LabelledPhotos]) -> None:
    text = 'a.png,milk bottle\nb.png,"a ""big"", red can"\nc.png,"""milk bottle"""\nd.png,5" pipe\n'
    photos = csv(text + 'e.png,"""a"" b ""c""x"""\n')
    assert photos.labels == ('"a" b "c"x"', '5" pipe', 'a "big", red can', "milk bottle")
    assert photos.counts()["milk bottle"] == 2


def test_csv_multi_label(csv: Callable[..., LabelledPhotos]) -> None:
    text = 'a.png,"""milk bottle"" can"\nb.png,\nc.png,can  carton can\nd.png,""" "" carton"\n'
    photos = csv(text, multi_label=True)
    assert photos.labels == ("can", "carton", "milk bottle")
    assert names_and_labels(photos) == [
        ("a.png", ("can", "milk bottle")),
        ("b.png", ()),
        ("c.png", ("can", "carton")),
        ("d.png", ("carton",)),
    ]
    assert photos.targets().tolist() == [[1, 0, 1], [0, 0, 0], [1, 1, 0], [0, 1, 0]]
    assert photos.multi_label


def test_csv_column_per_class(
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


def test_csv_unread_columns_are_logged(
    csv: Callable[..., LabelledPhotos], caplog: pytest.LogCaptureFixture
) -> None:
    photos = csv("filename,width,label\na.png,4,can\nb.png,4,carton\n")
    assert photos.labels == ("can", "carton")
    assert "the columns 'width' are not read" in caplog.text


def test_photos_are_searched_in_images_folder(tmp_path: Path) -> None:
    write_photos(tmp_path / "set/images/a.png", tmp_path / "away/b.png", tmp_path / "set/c.png")
    write_photos(tmp_path / "set/images/sub/d.png", tmp_path / "set/images/c.png")
    csv = tmp_path / "set/train.CSV"
    csv.write_text(f"a.png,can\n{tmp_path}/away/b.png,can\nc.png,ice\nsub\\d.png,ice\n")
    expected = ["set/images/a.png", "away/b.png", "set/c.png", "set/images/sub/d.png"]
    for source in (csv, csv.parent):  # the only CSV of a folder
        photos = read_photos(source)
        assert read_split(source) == (photos, None)
        assert [p.path for p in photos.photos] == [tmp_path / name for name in expected]
        assert photos.source == str(csv)
    (tmp_path / "set/val.jsonl").touch()
    with pytest.raises(DataError, match=r"has train.CSV, val.jsonl: name the file to read"):
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
            # The csv module of Python 3.10 takes no NUL.
            r"line 2: the label 'ca\\x00n' has characters that are not tex"
            if sys.version_info >= (3, 11)
            else r"line 2 is not CSV \(line contains NUL\): expected text",
        ),
        (f"a.png,can\nb.png,{'x' * 1001}\n", r"line 2: a label of 1001 characters: expected 1 to"),
        (f"a.png,can\nb.png,{'x' * 140_000}\n", r"line 2 is not CSV \(field larger than field"),
        ("a.png,can\nb.png,can\n", r"all photos \(2\) have the label 'can': expected two classes"),
        ("a.png,can\nb.png,ice\na.png,ice\n", r"'a.png' has the label can in line 1 and ice in li"),
    ],
)
def test_csv_rejects_bad_lines(csv: Callable[..., LabelledPhotos], text: Any, match: str) -> None:
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
            "id,file,tags\n1,a.png,can\n",
            r"'can' in the column 'tags'.*is named label in the header",
        ),
        (
            "file,can,ice\na.png,1,0\na.png,0,1\n",
            r"'a.png' has the label can in line 2 and ice in ",
        ),
    ],
)
def test_csv_multi_label_rejects_bad_lines(
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
def test_csv_single_label_rejects_several(
    csv: Callable[..., LabelledPhotos], text: str, count: int, example: str
) -> None:
    with pytest.raises(DataError) as caught:
        csv(text)
    rows = text.count("\n")
    assert f"{count} of {rows} rows have several labels, such as {example}: " in str(caught.value)
    assert "use multi_label=True (--multi-label)" in str(caught.value)


def test_csv_reads_label_of_two_words(csv: Callable[..., LabelledPhotos]) -> None:
    photos = csv("a.png,milk bottle\nb.png,water bottle\nc.png,red can\nd.png,red carton\n")
    assert len(photos.labels) == 4
