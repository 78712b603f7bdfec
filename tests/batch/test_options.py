"""Tests of options of a batch: workers, ranks, error limits, exit status, bad arguments."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixtures.batch_runs import (
    read_files,
    read_rows,
    run_batch,
)
from fixtures.synthetic_photos import DEMO, SAMPLES, write_photos
from vitlib import Predictor, batch
from vitlib.errors import BatchError, ConfigError, SourceError


def test_workers_write_equal_rows(tmp_path: Path, vit: Predictor) -> None:
    write_photos(tmp_path / "in", 60)
    (tmp_path / "in" / "bad.jpg").write_bytes(b"no")
    settings: dict[str, Any] = {"model": vit, "shard_size": 16, "batch_size": 8, "task": "both"}
    batch.run(tmp_path / "in", out=tmp_path / "one", **settings)
    report = batch.run(tmp_path / "in", out=tmp_path / "two", workers=2, **settings)
    assert (report.ok, report.failed) == (60, 1)
    for a, b in zip(read_rows(tmp_path / "one"), read_rows(tmp_path / "two"), strict=True):
        assert a["file"] == b["file"]
        assert a["labels"] == b["labels"]
        assert a["error"] == b["error"]
        if not a["error"]:
            assert np.allclose(a["probs"], b["probs"], atol=1e-6)
            assert np.allclose(a["embedding"], b["embedding"], atol=1e-5)


def test_ranks_divide_the_shards(
    tmp_path: Path, vit: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_photos(tmp_path / "in", 45)
    settings: dict[str, Any] = {"model": vit, "shard_size": 10, "batch_size": 5}
    batch.run(tmp_path / "in", out=tmp_path / "one", **settings)
    monkeypatch.setenv("WORLD_SIZE", "2")
    computed = []
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        report = batch.run(tmp_path / "in", out=tmp_path / "two", **settings)
        computed.append(report.computed)
        assert report.complete == (rank == 0)
    assert computed == [20, 25]
    assert read_files(tmp_path / "one") == read_files(tmp_path / "two")


def test_max_errors_limits_failed_inputs(tmp_path: Path, vit: Predictor) -> None:
    write_photos(tmp_path / "in", 20)
    for number in range(4):
        (tmp_path / "in" / f"x{number}.jpg").write_bytes(b"no")
    for limit in (3, 0, 0.1):
        with pytest.raises(BatchError, match="inputs failed: expected at most"):
            batch.run(tmp_path / "in", model=vit, out=tmp_path / f"{limit}", max_errors=limit)
        assert batch.run(tmp_path / "in", model=vit, out=tmp_path / "whole").complete
        with pytest.raises(BatchError, match="inputs failed"):  # also of a complete run
            batch.run(tmp_path / "in", model=vit, out=tmp_path / "whole", max_errors=limit)
    for limit in (4, 0.2, None):
        report = batch.run(tmp_path / "in", model=vit, out=tmp_path / "3", max_errors=limit)
        assert report.failed == 4


def test_exit_status_reports_failed_inputs(tmp_path: Path) -> None:
    write_photos(tmp_path / "in", 6)
    out = tmp_path / "out"
    run = run_batch(tmp_path / "in", "--model", DEMO, "--out", out)
    assert run.exit_code == 0, run.output
    assert "6 inputs = 6 ok + 0 failed" in run.output
    second_run = run_batch(tmp_path / "in", "--model", DEMO, "--out", out)
    assert second_run.exit_code == 0
    assert "every row was done before" in second_run.output
    (tmp_path / "in" / "bad.jpg").write_bytes(b"no")
    (tmp_path / "in" / "x.doc").write_bytes(b"no")
    run = run_batch(tmp_path / "in", "--model", DEMO, "--out", tmp_path / "two", "--json")
    assert run.exit_code == 1
    assert "bad.jpg" in run.stderr
    printed = json.loads(run.stdout)
    assert (printed["ok"], printed["failed"], printed["ignored"]) == (6, 1, 1)
    run = run_batch(
        tmp_path / "in", "--model", DEMO, "--out", tmp_path / "3", "--max-errors", "20%"
    )
    assert run.exit_code == 0
    second_run = run_batch(tmp_path / "in", "--out", tmp_path / "two")  # the model of the first run
    assert second_run.exit_code == 1  # the input still fails
    run = run_batch(tmp_path / "in", "--model", DEMO, "--out", tmp_path / "4", "--batch-size", 3)
    manifest = json.loads((tmp_path / "4" / "manifest.json").read_text())
    assert manifest["settings"]["batch_size"] == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--top-k", "0"], "--top-k"),
        (["--top-k", "x"], "--top-k"),
        (["--max-errors", "-1"], "--max-errors"),
        (["--max-errors", "200%"], "--max-errors"),
        (["--task", "sing"], "--task"),
        (["--format", "xml"], "--format"),
        (["--batch-size", "0"], "--batch-size"),
    ],
)
def test_wrong_arguments_exit_with_2(tmp_path: Path, arguments: list[str], words: str) -> None:
    write_photos(tmp_path / "in", 1)
    run = run_batch(tmp_path / "in", "--model", DEMO, "--out", tmp_path / "out", *arguments)
    assert run.exit_code == 2
    assert words in run.stderr
    assert not (tmp_path / "out").exists()


def test_bad_sources_are_rejected_before_work(tmp_path: Path, vit: Predictor) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "no.csv").write_text("a,b\n1,2\n")
    (tmp_path / "none.csv").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"image": "a.png"}\n{"image":\n')
    (tmp_path / "quote.csv").write_text('image\n"a.png\n')
    (tmp_path / "nul.txt").write_bytes(b"a.png\n\0\n")
    (tmp_path / "bad.tar").write_bytes(b"not a tar" * 1000)
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    for name, words in (
        ("empty", "no images in it"), ("missing", "is not there"), ("no.csv", "--column"),
        ("none.csv", "empty"), ("bad.jsonl", "line 2 is not JSON"), ("quote.csv", "is not CSV"),
        ("nul.txt", "line 2"), ("bad.tar", "not a tar"), ("bad.parquet", "not Parquet"),
        ("*.gif", "no images in it"), ("x{9..1}.tar", "range"),
    ):  # fmt: skip
        with pytest.raises((SourceError, BatchError), match=words):
            batch.run(tmp_path / name, model=vit, out=tmp_path / "out")
        assert not (tmp_path / "out").exists(), name
    with pytest.raises(SourceError, match="no column 'z'"):
        batch.run(tmp_path / "no.csv", model=vit, out=tmp_path / "out", column="z")
    write_photos(tmp_path / "in", 1)
    wrong: tuple[dict[str, Any], ...] = (
        {"top_k": 0}, {"batch_size": -1}, {"task": "x"}, {"format": "x"}, {"workers": 0},
        {"max_errors": 2.5}, {"engine": "x"}, {"format": "npy", "top_k": 3},
        {"format": "azure-csv", "task": "both"}, {"task": "embed", "top_k": 3},
        {"address": "localhost:6379"}, {"max_errors": "5%"}, {"column": "x"}, {"column": 5},
        {"root": 5}, {"root": tmp_path / "nowhere"}, {"root": tmp_path}, {"source": None},
        {"source": 5}, {"precision": "fp8"},
    )  # fmt: skip
    for choice in wrong:
        with pytest.raises((ConfigError, SourceError)):
            batch.run(**{"source": tmp_path / "in", "model": vit, "out": tmp_path / "out"} | choice)
        assert not (tmp_path / "out").exists()


def test_missing_library_is_named(
    tmp_path: Path, vit: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_photos(tmp_path / "in", 1)
    for name in ("pyarrow", "pyarrow.parquet", "ray"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pip install 'vitlib\[parquet\]'"):
        batch.run(tmp_path / "in", model=vit, out=tmp_path / "out", format="parquet")
    with pytest.raises(ConfigError, match=r"pip install 'vitlib\[ray\]'"):
        batch.run(tmp_path / "in", model=vit, out=tmp_path / "out", engine="ray")
    assert not (tmp_path / "out").exists()


def test_batch_classifies_samples(tmp_path: Path) -> None:
    run = run_batch(
        DEMO / "samples", "--model", "demo", "--out", tmp_path / "out", "--task", "both"
    )
    assert run.exit_code == 0, run.output
    rows = read_rows(tmp_path / "out")
    assert [Path(row["file"]) for row in rows] == SAMPLES
    is_correct = [
        row["labels"][0].replace("/", "-or-").replace(" ", "-").lower()
        == Path(row["file"]).stem.lower()
        for row in rows
    ]
    assert sum(is_correct) >= 8, rows
