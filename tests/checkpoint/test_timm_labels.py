"""Class names in every key of timm's config.json that may hold them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

import vitlib
from fixtures.timm_folders import CLASSES, edit_config

WORDS = {"n01": "tench", "n02": "goldfish", "n03": "shark", "n04": "ray", "n05": "cock"}


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ({"label_names": CLASSES}, CLASSES),
        ({"pretrained_cfg": {"label_names": CLASSES}}, CLASSES),
        ({"labels": CLASSES}, CLASSES),
        ({"id2label": {str(i): name for i, name in enumerate(CLASSES)}}, CLASSES),
        ({"pretrained_cfg": {"labels": CLASSES}}, CLASSES),
        ({"label_names": {str(i): name for i, name in enumerate(CLASSES)}}, CLASSES),
        ({"label_names": {name: i for i, name in enumerate(CLASSES)}}, CLASSES),
        ({"label_names": {name: str(i) for i, name in enumerate(CLASSES)}}, CLASSES),
        ({"label_names": CLASSES, "label_descriptions": WORDS}, list(WORDS.values())),
        (
            {"label_names": CLASSES, "label_descriptions": list(WORDS.values())},
            list(WORDS.values()),
        ),
        (
            {"pretrained_cfg": {"label_names": CLASSES, "label_descriptions": WORDS}},
            list(WORDS.values()),
        ),
        ({"label_names": [0, 1, 2, 3, 4]}, ["0", "1", "2", "3", "4"]),
    ],
)
def test_labels_are_read_from_every_config_key(
    changes: dict[str, Any], labels: list[str], tmp_path: Path
) -> None:
    assert list(vitlib.load(edit_config("vit", tmp_path / "m", **changes)).config.labels) == labels


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"label_names": CLASSES[:4]},
            "config.json's label_names is not used: 4 names for 5 classes",
        ),
        ({"pretrained_cfg": {"label_names": {"0": "a", "7": "b"}}}, "pretrained_cfg.label_names"),
        (
            {"label_names": CLASSES, "label_descriptions": {"x": "y"}},
            "label_descriptions is not used: it has none of the label_names",
        ),
    ],
)
def test_unusable_labels_are_logged(
    changes: dict[str, Any], line: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "vitlib"):
        vitlib.load(edit_config("vit", tmp_path / "m", **changes))
    assert line in caplog.text
