"""Gathered sets: bad photos, repeated photos, limits, and the classes of a model."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixtures.labelled_photos import names_and_labels, write_photos
from vitlib.data import LabelledPhotos, Photo, gather, read_photos, rows
from vitlib.data.from_csv import CsvRows
from vitlib.errors import DataError


def test_bad_photos_are_named_in_one_error(
    csv: Callable[..., LabelledPhotos], folder: Path
) -> None:
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
    assert "… (6 in all). Repair" in message
    assert "on_bad_image='skip' (--on-bad-image skip). Paths start at /" in message
    with pytest.raises(DataError, match=r": 4 of 8 photos cannot be used: line 5: "):
        csv(text, check="none")


def test_bad_photos_are_left_out_with_skip(
    csv: Callable[..., LabelledPhotos], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "b.png").write_bytes(b"no image")
    text = "a.png,can\nb.png,ice\nz.png,cup\nd.png,ice\n"
    photos = csv(text, on_bad_image="skip")
    assert names_and_labels(photos) == [("a.png", ("can",)), ("d.png", ("ice",))]
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


def test_error_stores_the_first_bad_photos_only(csv: Callable[..., LabelledPhotos]) -> None:
    text = "".join(f"no{i}.png,can\n" for i in range(1000))
    with pytest.raises(
        DataError, match=r"1000 of 1000 photos .*line 5: 'no4.png' is not there; … "
    ):
        csv(text)
    photos = csv(text + "a.png,can\nb.png,ice\n", on_bad_image="skip")
    assert len(photos.left_out) == 1000


def test_csv_line_like_a_header_gets_advice(csv: Callable[..., LabelledPhotos]) -> None:
    with pytest.raises(
        DataError, match=r"line 1: 'id' is not there \(if the line is a header: exp"
    ):
        csv("id,breed\na.png,can\nb.png,ice\n")


def test_image_bomb_is_refused_by_name(classes: Path) -> None:
    header = b"P6 60000 60000 255 "
    (classes / "can" / "bomb.ppm").write_bytes(header + b"\0" * 100)
    with pytest.raises(DataError, match=r"bomb.ppm' has (over|60000x60000)"):
        read_photos(classes)
    assert len(read_photos(classes, check="none")) == 9


def test_broken_link_is_refused_by_name(classes: Path) -> None:
    (classes / "can" / "gone.png").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"'can/gone.png' is not there"):
        read_photos(classes, check="none")


def test_repeated_photo_is_merged_or_refused(
    csv: Callable[..., LabelledPhotos], caplog: pytest.LogCaptureFixture
) -> None:
    photos = csv("a.png,can\nb.png,ice\n./a.png,can\n")
    assert names_and_labels(photos) == [("a.png", ("can",)), ("b.png", ("ice",))]
    assert "rows that repeat an earlier one, read once: 1" in caplog.text
    with pytest.raises(
        DataError, match=r"in line 1 and ice in line 3.*if each is right, use multi_"
    ):
        csv("a.png,can\nb.png,ice\na.png,ice\n")
    photos = csv("a.png,can\nb.png,ice\na.png,ice\n", multi_label=True)  # one label a row
    assert names_and_labels(photos) == [("a.png", ("can", "ice")), ("b.png", ("ice",))]
    assert "rows of a photo of an earlier row, their labels joined: 1" in caplog.text


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
def test_limits_on_rows_and_labels(
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


def test_limit_on_columns(
    csv: Callable[..., LabelledPhotos], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitlib.data.from_csv.MAX_CLASSES", 2)
    with pytest.raises(DataError, match=r"line 1 has 3 classes: expected at most 2"):
        csv("file,a,b,c\na.png,1,0,0\n", multi_label=True)
    monkeypatch.setattr("vitlib.data.from_folder.MAX_CLASSES", 2)


def test_limit_on_folders(classes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitlib.data.from_folder.MAX_CLASSES", 1)
    with pytest.raises(DataError, match=r"has 2 folders: expected at most 1 classes"):
        read_photos(classes)


def test_hostile_file_takes_little_memory(folder: Path) -> None:
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


def test_targets_beyond_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    photos = LabelledPhotos((Photo(Path("a"), ()),) * 1000, ("can", "ice"), True, "set")
    monkeypatch.setattr("vitlib.data.photos.available_memory", lambda _: 7999)
    with pytest.raises(DataError, match=r"1000 photos and 2 classes take 0.0 GiB"):
        photos.targets()


def test_rows_before_wrong_line_are_read(folder: Path) -> None:
    """The reader yields rows before it checks later lines."""
    (folder / "labels.csv").write_text("a.png,can\nb.png\n")
    read = iter(CsvRows(folder / "labels.csv", multi_label=False))
    assert next(read) == rows.Row(1, "a.png", ("can",), "field")
    with pytest.raises(DataError, match="line 2"):
        next(read)


def test_unreadable_file_is_refused(classes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(self: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", deny)
    with pytest.raises(DataError, match=r"classes cannot be read: Permission denied"):
        read_photos(classes)


def test_with_labels_reorders_classes(classes: Path) -> None:
    photos = read_photos(classes)
    other = photos.with_labels(["ice", "carton", "can"])
    assert other.labels == ("ice", "carton", "can")
    assert other.targets().tolist() == [2] * 5 + [1] * 3
    assert other.counts() == {"ice": 0, "carton": 3, "can": 5}
    assert photos.with_labels(photos.labels) == photos
    with pytest.raises(
        DataError, match=r"labels 'carton' \(photos: 3\) are not among the classes \('c"
    ):
        photos.with_labels(["can", "ice"])
    with pytest.raises(DataError, match=r"'can' is the name of two classes or more"):
        photos.with_labels(["can", "carton", "can"])
    twice = photos.with_labels(["can", "carton", "crane", "crane"])  # none of them is a crane
    assert twice.targets().tolist() == [0] * 5 + [1] * 3


def test_with_labels_multi_label(csv: Callable[..., LabelledPhotos]) -> None:
    photos = csv("file,can,ice,cup\na.png,1,0,\nb.png,0,1,\n", multi_label=True)
    other = photos.with_labels(
        ["ice", "jar", "can"]
    )  # all labels of cup are unknown, so it may be absent
    assert other.targets().tolist() == [[0, 0, 1], [1, 0, 0]]
    assert other.photos[0].unknown == ()
    reordered = photos.with_labels(["cup", "can", "ice"])
    np.testing.assert_array_equal(reordered.targets()[:, 0], [np.nan, np.nan])


def test_read_photos_with_labels_of_a_model(classes: Path, tmp_path: Path) -> None:
    write_photos(tmp_path / "one" / "can" / "a.png")
    photos = read_photos(tmp_path / "one", labels=("carton", "can"))  # one class is enough
    assert photos.targets().tolist() == [1]
    with pytest.raises(
        DataError, match=r"labels 'carton' \(photos: 3\) are not among the classes \('can'\)"
    ):
        read_photos(classes, labels=["can"])


def test_targets_reject_unknown_label() -> None:
    photos = LabelledPhotos((Photo(Path("a"), ("cup",)),), ("can",), False, "set")
    with pytest.raises(DataError, match=r"set: the label 'cup' is not among the classes, can"):
        photos.targets()


def test_subset_keeps_classes(classes: Path) -> None:
    photos = read_photos(classes)
    part = photos.subset(np.array([7, 0]))
    assert [p.labels for p in part.photos] == [("carton",), ("can",)]
    assert part.labels == photos.labels
    assert len(photos.subset([])) == 0
