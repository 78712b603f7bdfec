"""Runs that are killed or interrupted resume to equal bytes."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixtures.batch_runs import (
    SimulatedKill,
    interrupt_run,
    list_journals,
    raise_after,
    read_files,
    start_process,
)
from fixtures.synthetic_photos import BROKEN, DEMO, make_photo, write_photos
from vitlib import Predictor, batch
from vitlib.batch import journal
from vitlib.batch.results import Results
from vitlib.fast.cpu import kernel_plan


@pytest.mark.parametrize("form", ["jsonl", "csv", "npy", "parquet", "azure-csv"])
def test_interrupted_run_resumes_to_equal_bytes(tmp_path: Path, vit: Predictor, form: Any) -> None:
    write_photos(tmp_path / "in", 30)
    (tmp_path / "in" / "bad.jpg").write_bytes(b"no")
    settings: dict[str, Any] = {"format": form, "shard_size": 12, "batch_size": 4}
    batch.run(tmp_path / "in", model=vit, out=tmp_path / "whole", **settings)
    expected = read_files(tmp_path / "whole")
    for name, calls in (("append", 8), ("replace", 30)):
        for after in range(calls):
            out = tmp_path / f"{name}-{after}"
            with pytest.MonkeyPatch.context() as patch:
                raise_after(patch, name, after)
                try:
                    batch.run(tmp_path / "in", model=vit, out=out, **settings)
                except SimulatedKill:
                    assert not (out / "_SUCCESS").exists()
                else:
                    break
            batch.run(tmp_path / "in", model=vit, out=out, **settings)
            assert read_files(out) == expected, (name, after)
        else:
            assert name == "append"


def test_incomplete_journal_record_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "x.rows"
    answers = [
        Results(i, [f"{i}.png", "é\udcff"], [0, 0], [None, "why"], np.array([1, 2], np.uint64),
               scores=np.full((2, 3), i, np.float32))
        for i in range(3)
    ]  # fmt: skip
    for answer in answers:
        journal.append(path, answer)
    whole = path.read_bytes()
    assert journal.truncate_incomplete(path) == 6
    each = len(whole) // 3
    for cut in [*range(0, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:cut])
        assert journal.truncate_incomplete(path) == 2 * (cut // each)
        assert path.read_bytes() == whole[: each * (cut // each)]
    corrupt = bytearray(whole)
    corrupt[each + 60] ^= 1
    path.write_bytes(corrupt)
    assert journal.truncate_incomplete(path) == 2
    (record,) = journal.read_records(path)
    assert (record.files, record.errors) == (answers[0].files, answers[0].errors)
    assert np.array_equal(record.scores, answers[0].scores)  # type: ignore[arg-type]


@pytest.mark.parametrize(("workers", "times"), [(1, 6), (2, 4)])
def test_sigkill_resumes_to_equal_bytes(tmp_path: Path, workers: int, times: int) -> None:
    write_photos(tmp_path / "in", 600, "JPEG")
    for number, make in enumerate(BROKEN.values()):
        make(tmp_path / "in" / f"x{number}.jpg")
    settings = ["--model", DEMO, "--shard-size", 100, "--batch-size", 8, "--max-errors", 20]
    settings += ["--workers", workers]
    process = start_process(tmp_path / "in", "--out", tmp_path / "whole", *settings)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    draw = random.Random(workers)
    kills = 0
    out = tmp_path / "out"
    for _ in range(100):
        process = start_process(tmp_path / "in", "--out", out, *settings)
        until = time.monotonic() + 60
        before = list_journals(out)
        while list_journals(out) == before and process.poll() is None and time.monotonic() < until:
            time.sleep(0.005)  # else most processes die while they import torch
        time.sleep(draw.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        if (out / "_SUCCESS").exists() or kills == times:
            break
    last = start_process(tmp_path / "in", "--out", out, *settings)
    output, _ = last.communicate()
    assert last.returncode == 0, output
    assert kills >= 3
    assert read_files(out) == read_files(tmp_path / "whole")


@pytest.mark.parametrize("precision", ["int8", "auto"])
def test_run_resumes_with_calibrated_model(tmp_path: Path, precision: Any) -> None:
    """The run stores its calibration and the choice of "auto", which another run may not repeat."""
    if kernel_plan("int8") is None:
        pytest.skip("int8 takes a CPU with VNNI")
    photos = [make_photo(number) for number in range(100, 140)]
    calibrated = Predictor.load(DEMO, precision=precision, calibrate=photos)
    out = interrupt_run(tmp_path, calibrated)
    batch.run(tmp_path / "in", model=DEMO, out=out)
    whole: dict[str, Any] = {"shard_size": 12, "batch_size": 4, "out": tmp_path / "whole"}
    batch.run(tmp_path / "in", model=calibrated, **whole)
    assert read_files(out) == read_files(tmp_path / "whole")
    settings = json.loads((out / "manifest.json").read_text())["settings"]
    assert settings["precision_asked"] == precision
    assert precision == "auto" or settings["precision"] == "int8"
