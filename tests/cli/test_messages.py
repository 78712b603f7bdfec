"""Messages in a person's words: near labels, photos for models, no head, caches, one and many."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import vitlib
from fixtures.command_line import Run, make_workplace
from vitlib.errors import count_noun
from vitlib.source import hub


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(make_workplace(tmp_path))
    return tmp_path


def test_class_offers_labels_that_hold_the_word(run_cli: Run, workplace: Path) -> None:
    labels = ("crate", "tabby, tabby cat", "tiger cat", "bobcat", "Persian cat", *"abc")
    model = vitlib.load("demo", num_classes=len(labels))
    model.config = replace(model.config, labels=labels)
    vitlib.save(model, workplace / "cats")
    command = ("attend", "-m", "cats", "photo.jpg", "--method", "relevance", "-o", "map.png")
    status, _, err = run_cli(*command, "--class", "Cat")
    assert status == 1
    assert "did you mean 'tabby, tabby cat' or 'tiger cat' or 'Persian cat'?" in err
    assert "did you mean 'bobcat'" in run_cli(*command, "--class", "bobcut")[2]


@pytest.mark.usefixtures("workplace")
def test_photo_given_as_a_model_is_called_a_photo(run_cli: Run) -> None:
    for command in (("info", "photo.jpg"), ("classify", "-m", "photo.jpg", "photo.jpg")):
        status, _, err = run_cli(*command)
        assert status == 1
        assert "photo.jpg is a JPEG photo, not a model" in err


def test_no_head_is_said_as_such(run_cli: Run, workplace: Path) -> None:
    vitlib.save(vitlib.load("demo", num_classes=0), workplace / "features")
    for command in (
        ("classify", "-m", "features", "photo.jpg"),
        ("evaluate", "features", "photos", "-o", "report"),
        ("attend", "-m", "features", "photo.jpg", "--method", "gradient", "-o", "map.png"),
        ("batch", "-m", "features", "photos", "--task", "classify", "-o", "out"),
    ):
        status, _, err = run_cli(*command)
        assert status == 1
        assert " no head" in err
        assert len(err.splitlines()) == 1


@pytest.mark.usefixtures("workplace")
def test_few_photos_to_calibrate_with_are_a_warning(
    run_cli: Run, caplog: pytest.LogCaptureFixture
) -> None:
    int8 = ("classify", "-m", "demo", "photo.jpg", "--precision", "int8", "--calibrate")
    assert run_cli(*int8, "photos")[0] == 0
    assert "int8 is calibrated with 8 photos: labels may differ" in caplog.text


@pytest.mark.parametrize(
    ("option", "offline", "reason"),
    [
        (("--local-files-only",), False, "--local-files-only) is set"),
        ((), True, "HF_HUB_OFFLINE is set"),
        ((), False, "the hub cannot be reached"),
    ],
)
def test_absent_model_names_cache_and_demo(
    option: tuple[str, ...],
    offline: bool,
    reason: str,
    run_cli: Run,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(workplace / "cache"))
    monkeypatch.setattr(hub, "is_hub_unreachable", lambda: True)
    status, _, err = run_cli("classify", "photo.jpg", "-m", "no/such-model", *option)
    assert status == 1
    assert reason in err
    assert "--model demo" in err
    assert f"not in the cache {workplace / 'cache'}" in err


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [
        (1, "photo", "1 photo"),
        (0, "photo", "0 photos"),
        (2, "class", "2 classes"),
        (1, "class", "1 class"),
        (3, "copy", "3 copies"),
        (2, "entry", "2 entries"),
    ],
)
def test_noun_follows_number(count: int, noun: str, text: str) -> None:
    assert count_noun(count, noun) == text


@pytest.mark.usefixtures("workplace")
def test_single_input_has_singular_words(run_cli: Run) -> None:
    out = run_cli("batch", "-m", "demo", "photo.jpg", "-o", "out")[1]
    assert out.startswith("out: 1 input = 1 ok + 0 failed\n1 row in ")
