"""Labelled sets of JSONL files: labels, marks, and lines that are not rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixtures.labelled_photos import write_photos
from vitlib.data import LabelledPhotos
from vitlib.errors import DataError


def test_jsonl_single_label(jsonl: Callable[..., LabelledPhotos]) -> None:
    photos = jsonl(
        {"image_url": "a.png", "label": "can", "image_details": {"format": "png"}},
        "",
        {"image": "./b.png", "labels": "milk bottle"},
        {"file_name": "c.png", "label": " can "},
        {"path": "d.png", "label": "can", "labels": None},
    )
    assert photos.labels == ("can", "milk bottle")
    assert photos.targets().tolist() == [0, 1, 0, 0]


def test_jsonl_lists(jsonl: Callable[..., LabelledPhotos]) -> None:
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
    photos = jsonl({"path": "a.png", "label": ["can"]}, {"path": "b.png", "label": ["ice"]})
    assert photos.targets().tolist() == [0, 1]


def test_jsonl_marks(jsonl: Callable[..., LabelledPhotos]) -> None:
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


def test_jsonl_numbers(jsonl: Callable[..., LabelledPhotos]) -> None:
    photos = jsonl({"path": "a.png", "label": 3}, {"path": "b.png", "label": 10})
    assert photos.labels == ("10", "3")  # labels are text, sorted as text
    many = jsonl(
        {"path": "a.png", "label": [3, 10]}, {"path": "b.png", "label": [3]}, multi_label=True
    )
    assert many.targets().tolist() == [[1, 1], [0, 1]]


def test_jsonl_urls_are_searched_locally(
    jsonl: Callable[..., LabelledPhotos], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_photos(folder / "images/g h.png", folder / "can/a.png")
    azure = "azureml://subscriptions/1/workspaces/w/datastores/d/paths"
    photos = jsonl(
        {"image_url": f"{azure}/fridge/b.png", "label": "can"},
        {"image_url": "https://example.com/x/g%20h.png?key=1#top", "label": "ice"},
        {"image_url": f"{azure}/can/a.png", "label": "can"},
    )
    paths = [folder / "b.png", folder / "images/g h.png", folder / "can/a.png"]
    assert [p.path for p in photos.photos] == paths
    assert caplog.text.count("rows of a URL, read from the local file of that name: 3") == 1
    for url in (f"{azure}/z.png", "http://[", "s3://..", "http://example.com", "file:///%00.png"):
        with pytest.raises(
            DataError, match=r"is a URL without a local file.*download the photos first"
        ):
            jsonl({"image_url": url, "label": "can"}, {"image_url": "b.png", "label": "ice"})
    with pytest.raises(DataError, match=r"\(line 1\) and .*\(line 2\) would be the same file here"):
        jsonl(
            {"image_url": "http://x/one/b.png", "label": "can"},
            {"image_url": "http://x/two/b.png", "label": "can"},
        )


def test_jsonl_rejects_mixed_label_types(jsonl: Callable[..., LabelledPhotos]) -> None:
    text = {"path": "a.png", "label": "can"}
    lists = {"path": "b.png", "label": ["can"]}
    numbers = {"path": "c.png", "label": 3}
    message = (
        r"labels are a text in line 1 and a list of texts in line 3 and a number in line 4: use"
    )
    for multi_label in (False, True):
        with pytest.raises(DataError, match=message):
            jsonl(text, text, lists, numbers, multi_label=multi_label)


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        (["\n"], r"train.jsonl is empty: expected \{\"image_url\": \"a.jpg\""),
        (["{'path': 'a.png'}"], r"line 1 is not JSON \(Expecting property name"),
        (["", "[1]"], r"line 2 is not an object"),
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
            r"line 1 is not JSON \(a key is",
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
def test_jsonl_rejects_bad_lines(
    jsonl: Callable[..., LabelledPhotos], lines: list[Any], match: str
) -> None:
    with pytest.raises(DataError, match=match) as caught:
        jsonl(*lines)
    assert "train.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_jsonl_rejects_several_labels_in_one_text(jsonl: Callable[..., LabelledPhotos]) -> None:
    lines = [
        {"path": f"{n}.png", "label": label}
        for n, label in zip("abc", ("x", "y", "x y"), strict=True)
    ]
    with pytest.raises(DataError, match=r"1 of 3 rows have several labels, such as line 3: x y"):
        jsonl(*lines)
    with pytest.raises(DataError, match=r"'x y' looks like several labels.*a list, \[\"can\""):
        jsonl(*lines, multi_label=True)
