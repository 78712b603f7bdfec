"""No label, name or message writes to a terminal what the terminal obeys; JSON stays valid."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vitlib
from fixtures.server import SAMPLES
from vitlib.batch import run as run_batch
from vitlib.batch.formats import FORMATS
from vitlib.cli import printing
from vitlib.system.terminal import dump_json, escape_surrogates, escape_unprintable

Cli = Callable[..., tuple[int, str, str]]
LABELS = (
    "\x1b]0;title\x07", "two\nvitlib: error: lines\r", "\u202egnp.exe", "\x9b31mC1\x85",
    "lone \ud800", "\ue000\u2028\U000e0041\u200f", "$\\frac{1}$ <b> | `",
)  # fmt: skip


def is_escaped(text: str) -> bool:
    """Return True without control, formatting and lone surrogate characters."""
    kinds = {unicodedata.category(c) for c in text.replace("\n", "")}
    return not kinds & {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The demo model with labels that mean no good, in a folder whose name does neither."""
    folder = tmp_path_factory.mktemp("models") / "m\x1b]0;x\x07\u202e"
    demo = vitlib.Predictor.load("demo")
    demo.save(folder)
    config = json.loads((folder / "config.json").read_text())
    classes = len(config["id2label"])
    names = [LABELS[i % len(LABELS)] + str(i // len(LABELS)) for i in range(classes)]
    config["id2label"] = {str(i): name for i, name in enumerate(names)}
    config["label2id"] = {name: i for i, name in enumerate(names)}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Photos, and what is none, of names that mean no good."""
    folder = tmp_path_factory.mktemp("photos")
    names = [
        "a\x1b[31m.png",
        "b\nc.png",
        "\u202egpj.png",
        os.fsdecode(b"latin-1 \xe9.png"),
        "\x9b.png",
    ]
    for name in names:
        try:
            shutil.copy(SAMPLES[0], folder / name)
        except (OSError, UnicodeError):
            pytest.skip("this file system takes UTF-8 names alone")
    (folder / "broken\x1b]2;x\x07.png").write_bytes(b"none")
    return [str(path) for path in sorted(folder.iterdir())]


@pytest.mark.parametrize("text", LABELS)
def test_escape_unprintable_escapes_control_characters(text: str) -> None:
    assert is_escaped(escape_unprintable(text))
    assert "\n" not in escape_unprintable(text)


def test_escape_unprintable_keeps_text() -> None:
    joined = "".join(map(chr, (0x6CC, 0x200C, 0x62E)))  # of Persian, with a joiner
    for text in (joined, "コップ\u3000缶", "👩\u200d🚀", "1\u202f000 €", "\xa0"):
        assert escape_unprintable(text) == text
    text = dump_json({"\ud800": "é\udc80"}).encode("utf-8").decode()
    assert json.loads(text) == {"\ud800": "é\udc80"}
    assert escape_surrogates("é\udce9") == "é\\udce9"


VERBS: list[tuple[str, ...]] = [
    ("classify", "--model", "MODEL", "PHOTOS"),
    ("embed", "--model", "MODEL", "-o", "OUT/v\x1b[1m.npy", "PHOTOS"),
    ("attend", "--model", "MODEL", "-o", "OUT/a\x1b[1m.png", "PHOTO"),
    ("info", "MODEL"),
    ("convert", "MODEL", "OUT/c\x1b[1m", "--layout", "timm"),
    ("batch", "--model", "MODEL", "-o", "OUT/b\x1b[1m", "PHOTOS"),
    ("similar", "--model", "MODEL", "PHOTO", "FOLDER"),
]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb[0])
def test_verbs_print_escapes_and_valid_json(
    verb: tuple[str, ...], model: str, photos: list[str], tmp_path: Path, run_cli: Cli
) -> None:
    for more in ((), ("--json",)):
        out = tmp_path / f"{len(more)}"
        out.mkdir()
        words: list[str] = []
        for word in verb:
            words += photos if word == "PHOTOS" else [
                word.replace("MODEL", model).replace("OUT", str(out)).replace("PHOTO", photos[0])
                .replace("FOLDER", str(Path(photos[0]).parent))
            ]  # fmt: skip
        status, text, err = run_cli(*words, *more)
        assert status in (0, 1), err
        assert text or err
        assert is_escaped(err)
        if more:
            json.loads(text.encode("utf-8"))  # no lone surrogate, and nothing beside it
        else:
            assert is_escaped(text)


def test_wrong_use_prints_escapes(run_cli: Cli, model: str) -> None:
    for words in (
        ("classify\x1b[1m",), ("classify", "--x\x1b[1m"), ("info", "a", "b\x1b]0;x\x07"),
        ("embed", "--calibrate", "\x1b[1m\u202e", "-o", "x.npy", "y"),
        ("info", "no\x1b[1m/model\x9b"),
        ("batch", "-o", "x", "--max-errors", "\x1b[1m", "y"), ("similar", "--model", model, "\x1b"),
        ("classify", "--image-size", "\x1b[1m", "x"), ("evaluate", "demo", "\x1b[", "-o", "\x9b"),
    ):  # fmt: skip
        status, text, err = run_cli(*words)
        assert status in (1, 2), words
        assert err
        assert is_escaped(text + err), (words, text, err)


def test_scores_and_json_hold_the_labels_themselves(
    model: str, photos: list[str], run_cli: Cli
) -> None:
    _, text, _ = run_cli("classify", "--model", model, "--json", "--top-k", 99, photos[0])
    (row,) = json.loads(text)
    assert row["image"] == photos[0]
    assert {p["label"] for p in row["predictions"]} == {*vitlib.Predictor.load(model).labels}


def test_evaluate_and_its_pictures_take_any_label(model: str, tmp_path: Path, run_cli: Cli) -> None:
    labels = vitlib.Predictor.load(model).labels
    lines = []
    for i, sample in enumerate(SAMPLES[:4]):
        shutil.copy(sample, tmp_path / f"{i}\x1b[1m\u202e.png")
        label = next(x for x in labels[i:] if "\u202e" in x)  # others are refused as labels
        lines.append(json.dumps({"image": f"{i}\x1b[1m\u202e.png", "label": label}))
    (tmp_path / "bad\x9b.png").write_bytes(b"none")
    lines.append(json.dumps({"image": "bad\x9b.png", "label": label}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    status, text, err = run_cli(
        "evaluate", model, tmp_path / "data.jsonl", "-o", tmp_path / "out", "--bootstrap", 0
    )
    assert status == 1, err
    assert is_escaped(text + err)
    assert is_escaped((tmp_path / "out/report.html").read_text())


@pytest.mark.parametrize("form", FORMATS)
def test_batch_accepts_lone_surrogates(form: Any, model: str, tmp_path: Path) -> None:
    """In JSONL as paths, base64 and keys; in labels; in names that are not UTF-8."""
    shutil.copy(SAMPLES[0], tmp_path / "good.png")
    latin = os.fsdecode(b"\xe9.png")
    shutil.copy(SAMPLES[1], tmp_path / latin)
    rows = ['{"image": "\\ud800.png"}', '{"image": "good.png", "\\udfff": 1}',
            '{"image": "\\ud800"}',
            '{"image": "\\udce9.png"}', '{"image": "a\\u0000b.png"}', '{"\\ud800": 1}']  # fmt: skip
    (tmp_path / "list.jsonl").write_text("\n".join(rows))
    if form == "parquet":
        pytest.importorskip("pyarrow")
    outcome = run_batch(
        [tmp_path / "list.jsonl", tmp_path / latin], model=model, out=tmp_path / "out", format=form
    )
    assert (outcome.inputs, outcome.ok, outcome.failed) == (7, 3, 4)
    assert outcome.complete
    for path in (tmp_path / "out").glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").strip("\n").split("\n"):
            json.loads(line)
    again = run_batch(
        [tmp_path / "list.jsonl", tmp_path / latin], model=model, out=tmp_path / "out", format=form
    )
    assert again.computed == 0


def test_batch_names_hostile_photo(tmp_path: Path) -> None:
    from fixtures.hostile_files import jpeg_of_scans

    shutil.copy(SAMPLES[0], tmp_path / "a.png")
    (tmp_path / "b.jpg").write_bytes(jpeg_of_scans(3000, 500))
    outcome = run_batch(tmp_path, model="demo", out=tmp_path / "out")
    assert (outcome.ok, outcome.failed) == (1, 1)
    assert "scans" in outcome.errors[0][2]


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """Log output of a handler of the caller."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    logger = logging.getLogger("vitlib")
    logger.addHandler(handler)
    yield text
    logger.removeHandler(handler)


def test_log_lines_are_escaped(stream: io.StringIO) -> None:
    logger = logging.getLogger("vitlib")
    logger.warning("%s: %d", LABELS[0] + LABELS[1], 3)
    try:
        raise ValueError(LABELS[0] + LABELS[2])
    except ValueError:
        logger.exception("%s failed", "/x\x1b[1m")
    assert is_escaped(stream.getvalue())
    assert stream.getvalue().count("Traceback") == 1
    assert len(stream.getvalue().splitlines()) > 4


def test_a_console_of_few_characters_shows_the_rest_as_escapes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for encoding in ("ascii", "cp1252", "cp932"):
        data = io.BytesIO()
        with io.TextIOWrapper(data, encoding=encoding, errors="strict") as console:
            monkeypatch.setattr(sys, "stdout", console)
            printing.echo("é → 缶 👩")
            printing.echo_json({"é → 缶 👩": "\ud800"}, indent=None)
            console.flush()
            baseline, text = data.getvalue().decode(encoding).splitlines()
        assert json.loads(text) == {"é → 缶 👩": "\ud800"}
        assert "\\U0001f469" in baseline


def test_server_labels_with_lone_surrogates_are_answered() -> None:
    from vitlib.serve.errors import RequestError
    from vitlib.serve.protocol import Params
    from vitlib.serve.writer import Writer

    writer = Writer([*LABELS])
    rows = [np.full(len(LABELS), 1 / len(LABELS), np.float32), RequestError(400, "x", "\ud800")]
    for form in ("azure-v1", "azure-v2", "mlflow"):
        json.loads(writer.answer(rows, Params.parse({"format": form})))
    json.loads(rows[1].body())
