"""Tests of the rows of a batch: a row for each input, in all formats, equal in all runs."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fixtures.batch_runs import (
    read_files,
    read_lines,
    read_rows,
)
from fixtures.synthetic_photos import BROKEN, DEMO, SAMPLES, make_photo, write_photos
from vitlib import Predictor, batch
from vitlib.batch import duplicates
from vitlib.errors import ConfigError


def test_every_input_has_a_row(tmp_path: Path, vit: Predictor) -> None:
    photos = write_photos(tmp_path / "in", 50)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    (tmp_path / "in" / ".hidden.png").write_bytes(make_photo(0))
    report = batch.run(
        tmp_path / "in", model=vit, out=tmp_path / "out", shard_size=16, batch_size=8
    )
    assert (report.inputs, report.ok, report.failed, report.ignored) == (50, 50, 0, 2)
    assert report.complete
    rows = read_rows(tmp_path / "out")
    assert [row["row"] for row in rows] == list(range(50))
    assert sorted(row["file"] for row in rows) == sorted(map(str, photos))
    assert [row["file"] for row in rows] == sorted(
        (row["file"] for row in rows), key=lambda name: Path(name).parts
    )
    names = [row["file"] for row in rows]
    for row, expected in zip(rows, vit.classify(names, top_k=5), strict=True):
        assert expected is not None
        assert row["labels"] == [p.label for p in expected]
        assert row["classes"] == [p.index for p in expected]
        assert np.allclose(row["probs"], [p.score for p in expected], atol=1e-6)  # batches differ
        assert row["error"] is None
    assert rows[0]["labels"] != rows[1]["labels"] or rows[0]["probs"] != rows[1]["probs"]
    assert (tmp_path / "out" / "ignored.txt").read_text().count("\n") == 2


def test_manifest_counts_and_checksums(tmp_path: Path, vit: Predictor) -> None:
    write_photos(tmp_path / "in", 20)
    out = tmp_path / "out"
    batch.run(tmp_path / "in", model=vit, out=out, shard_size=7)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["complete"] is True
    assert (out / "_SUCCESS").exists()
    assert not (out / ".run").exists()
    assert (
        manifest["counts"]["inputs"]
        == manifest["counts"]["ok"] + manifest["counts"]["failed"]
        == 20
    )
    assert [part["rows"] for part in manifest["parts"]] == [7, 7, 6]
    for part in manifest["parts"]:
        for name, file in part["files"].items():
            data = (out / name).read_bytes()
            assert file == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    for name in ("shard_size", "batch_size", "precision", "threads", "operations", "labels"):
        assert manifest["settings"][name]


def test_broken_files_have_errors(tmp_path: Path, vit: Predictor) -> None:
    valid = write_photos(tmp_path / "in", 200)
    for number, (kind, make) in enumerate(BROKEN.items()):
        make(tmp_path / "in" / "b" / f"{number:04d}-{kind}.jpg")
    out = tmp_path / "out"
    report = batch.run(tmp_path / "in", model=vit, out=out)
    assert (report.ok, report.failed) == (200, len(BROKEN))
    assert report.inputs == report.ok + report.failed
    bad = {row["file"]: row for row in read_rows(out) if row["error"] is not None}
    assert {Path(name).stem.split("-", 1)[1] for name in bad} == set(BROKEN)
    assert all(row["labels"] is None and row["probs"] is None for row in bad.values())
    assert [(e["row"], e["file"], e["error"]) for e in read_lines(out / "errors.jsonl")] == [
        (row["row"], row["file"], row["error"]) for row in bad.values()
    ]
    scores = dict(zip(map(str, valid), vit.classify(valid, top_k=1), strict=True))
    for row in read_rows(out):
        if row["error"] is None:
            (best,) = scores[row["file"]] or []
            assert row["labels"][0] == best.label
            assert row["probs"][0] == pytest.approx(best.score, abs=1e-6)


def test_duplicates_are_listed(tmp_path: Path, vit: Predictor) -> None:
    folder = tmp_path / "in"
    write_photos(folder, 12)
    (folder / "copy.png").write_bytes(make_photo(3))
    (folder / "z" / "copy.png").write_bytes(make_photo(3))
    out = tmp_path / "out"
    report = batch.run(folder, model=vit, out=out)
    assert report.duplicates == 2
    names = [row["file"] for row in read_rows(out)]
    output = read_lines(out / "duplicates.jsonl")
    assert [Path(names[line["same_as"]]).read_bytes() for line in output] == [make_photo(3)] * 2
    assert len({names[line["row"]] for line in output} | {names[output[0]["same_as"]]}) == 3


@pytest.mark.parametrize("in_memory", [5, 64, 10_000])
def test_duplicates_equal_those_of_a_dict(
    tmp_path: Path, in_memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "MAX_KEYS", in_memory)
    draw = np.random.default_rng(0)
    keys = draw.integers(0, 2**63, 60, dtype=np.uint64)[draw.integers(0, 60, 100)] * np.uint64(2)
    pairs = np.stack([np.arange(100, dtype=np.uint64), keys], axis=1)
    paths = []
    for start in range(0, 100, 30):
        paths.append(tmp_path / f"{start}.npy")
        np.save(paths[-1], pairs[start : start + 30])
    count = duplicates.write_duplicates(iter(paths), 100, tmp_path, tmp_path / "out.jsonl")
    firsts: dict[int, int] = {}
    expected = {
        row: firsts[key] for row, key in pairs.tolist() if firsts.setdefault(key, row) != row
    }
    output = {line["row"]: line["same_as"] for line in read_lines(tmp_path / "out.jsonl")}
    assert output == expected
    assert count == len(expected) > 10


def test_numbers_in_text_restore_float32(tmp_path: Path, vit: Predictor) -> None:
    write_photos(tmp_path / "in", 9)
    for form in ("jsonl", "csv", "npy", "parquet"):
        batch.run(tmp_path / "in", model=vit, out=tmp_path / form, format=form, task="both",
                  top_k="all", batch_size=4)  # fmt: skip
    vectors = np.load(tmp_path / "npy" / "part-00000.npy")
    probs = np.load(tmp_path / "npy" / "part-00000.probs.npy")
    assert vectors.dtype == probs.dtype == np.float32
    rows = read_rows(tmp_path / "jsonl")
    assert np.array_equal(np.array([r["embedding"] for r in rows], np.float32), vectors)
    assert np.array_equal(np.array([r["probs"] for r in rows], np.float32), probs)
    with (tmp_path / "csv" / "part-00000.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0])[:3] == ["file", "row", "prob_0"]
    assert list(table[0])[-1] == "error"
    for i, row in enumerate(table):
        assert np.float32(row["prob_3"]) == probs[i, 3]
        assert np.float32(row["embedding_5"]) == vectors[i, 5]
    from pyarrow import parquet

    read = parquet.read_table(tmp_path / "parquet" / "part-00000.parquet").to_pydict()
    assert np.array_equal(np.array(read["embedding"], np.float32), vectors)
    assert read["file"] == [r["file"] for r in rows]
    files = [row["file"] for row in rows]
    assert np.allclose(vectors, vit.embed(files), atol=1e-5)
    assert np.allclose(probs, vit.probabilities(files), atol=1e-6)


def test_rows_of_failures_in_every_format(tmp_path: Path, vit: Predictor) -> None:
    write_photos(tmp_path / "in", 5)
    (tmp_path / "in" / 'a,"b".jpg').write_bytes(b"no")
    for form in ("csv", "npy", "parquet", "azure-csv"):
        report = batch.run(tmp_path / "in", model=vit, out=tmp_path / form, format=form)
        assert (report.ok, report.failed) == (5, 1)
        assert set(report.files) <= {p.name for p in (tmp_path / form).iterdir()}
    with (tmp_path / "csv" / "part-00000.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [bool(row["error"]) for row in table].count(True) == 1
    bad = next(row for row in table if row["error"])
    assert bad["file"].endswith('a,"b".jpg')
    assert bad["label_1"] == bad["prob_5"] == ""
    array = np.load(tmp_path / "npy" / "part-00000.npy")
    index = read_lines(tmp_path / "npy" / "part-00000.index.jsonl")
    assert array.shape == (6, 10)
    assert [bool(row["error"]) for row in index] == np.isnan(array).any(axis=1).tolist()
    from pyarrow import parquet

    read = parquet.read_table(tmp_path / "parquet" / "part-00000.parquet").to_pydict()
    assert [p is None for p in read["probs"]] == [e is not None for e in read["error"]]
    with (tmp_path / "azure-csv" / "predictions.csv").open(newline="") as file:
        card = list(csv.reader(file))
    assert len(card) == 6
    assert sorted(row[3] for row in card)[:2] == ["0000.png", "0004.png"]  # relative to the folder
    scored_rows = [row for row in card if row[1] != "[]"]
    assert len(scored_rows) == 5
    import ast

    assert ast.literal_eval(scored_rows[0][2]) == list(vit.labels)
    assert sum(ast.literal_eval(scored_rows[0][1])) == pytest.approx(1, abs=1e-5)
    assert not list((tmp_path / "azure-csv").glob("part-*"))


def test_scores_that_are_not_finite_fail_the_row(tmp_path: Path) -> None:
    vit = Predictor.load("demo")
    factor = 3e36  # makes all levels but black infinite
    rule = replace(vit.image_processor, rescale_factor=factor, image_mean=None, image_std=None)
    vit.image_processor = rule
    write_photos(tmp_path / "in", 2)
    Image.new("RGB", (32, 32)).save(tmp_path / "in" / "black.png")
    report = batch.run(tmp_path / "in", model=vit, out=tmp_path / "out")
    assert (report.ok, report.failed) == (1, 2)
    failed = [row for row in read_rows(tmp_path / "out") if row["error"]]
    assert len(failed) == 2
    assert all("numbers that are not finite" in row["error"] for row in failed)


def test_rows_restore_names_that_are_not_unicode(tmp_path: Path, vit: Predictor) -> None:
    name = os.fsencode(tmp_path / "in") + b"/caf\xe9\n.png"
    (tmp_path / "in").mkdir()
    try:
        with open(name, "wb") as file:  # noqa: PTH123
            file.write(make_photo(1))
    except OSError:
        pytest.skip("this file system takes Unicode alone")
    batch.run(tmp_path / "in", model=vit, out=tmp_path / "out")
    (row,) = read_rows(tmp_path / "out")
    assert os.fsencode(row["file"]) == name


def test_list_names_files_in_ascii_locale(tmp_path: Path) -> None:
    for name in (b"caf\xc3\xa9.png", b"bad\xff.png"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(SAMPLES[0].read_bytes())
    text = b'{"image": "caf\xc3\xa9.png"}\n{"image": "bad\\udcff.png"}\n'
    (tmp_path / "list.jsonl").write_bytes(text)
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "vitlib", "batch", "list.jsonl", "--model", "demo"]
    done = subprocess.run(
        [*command, "--out", "out"], cwd=tmp_path, env=os.environ | locale, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert [row["error"] for row in read_rows(tmp_path / "out")] == [None, None]
    assert [row["file"] for row in read_rows(tmp_path / "out")] == ["café.png", "bad\udcff.png"]


def test_names_are_quoted_in_csv(tmp_path: Path, vit: Predictor) -> None:
    names = ["a\rb.png", "c\nd.png", 'e"f.png', "g,h.png", " i .png", "k.png"]
    for number, name in enumerate(names):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(make_photo(number))
    for form in ("csv", "azure-csv"):
        batch.run(tmp_path / "in", model=vit, out=tmp_path / form, format=form)  # type: ignore[arg-type]
    with (tmp_path / "csv" / "part-00000.csv").open(newline="") as file:
        assert sorted(Path(row["file"]).name for row in csv.DictReader(file)) == sorted(names)
    with (tmp_path / "azure-csv" / "predictions.csv").open(newline="") as file:
        assert sorted(row[3] for row in csv.reader(file)) == sorted(names)


def test_two_runs_write_equal_bytes(tmp_path: Path, vit: Predictor) -> None:
    write_photos(tmp_path / "in", 40)
    (tmp_path / "in" / "bad.jpg").write_bytes(b"no")
    for name in ("a", "b"):
        batch.run(tmp_path / "in", model=vit, out=tmp_path / name, shard_size=16, batch_size=8)
    assert read_files(tmp_path / "a") == read_files(tmp_path / "b")


def test_embeddings_of_a_model_without_a_head(tmp_path: Path, vit: Predictor) -> None:
    bare = Predictor.load(DEMO, num_classes=0)
    write_photos(tmp_path / "in", 4)
    batch.run(tmp_path / "in", model=bare, out=tmp_path / "out")
    rows = read_rows(tmp_path / "out")
    assert list(rows[0]) == ["file", "row", "embedding", "error"]
    expected = vit.embed([row["file"] for row in rows])
    assert np.allclose([row["embedding"] for row in rows], expected, atol=1e-5)
    with pytest.raises(ConfigError, match="no head"):
        batch.run(tmp_path / "in", model=bare, out=tmp_path / "no", task="classify")
