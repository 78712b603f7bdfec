"""Tests of runs that vitlib refuses: changed inputs or options, other folders, full disks."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fixtures.batch_runs import (
    interrupt_run,
    pipeline,
    read_files,
    read_rows,
)
from fixtures.synthetic_photos import DEMO, make_photo, write_photos
from vitlib import Predictor, batch
from vitlib.errors import BatchError, ConfigError, SourceError


@pytest.mark.parametrize("change", ["written", "gone", "new", "renamed", "complete"])
def test_changed_inputs_are_refused(tmp_path: Path, vit: Predictor, change: str) -> None:
    out = interrupt_run(tmp_path, vit)
    photos = sorted((tmp_path / "in").rglob("*.png"))
    if change == "complete":
        batch.run(tmp_path / "in", model=vit, out=out)
    if change in ("written", "complete"):
        photos[20].write_bytes(make_photo(99))
    elif change == "gone":
        photos[20].unlink()
    elif change == "new":
        (tmp_path / "in" / "new.png").write_bytes(make_photo(99))
    else:
        photos[20].rename(photos[20].with_name("other.png"))
    with pytest.raises(BatchError, match="inputs"):
        batch.run(tmp_path / "in", model=vit, out=out)


def test_change_during_the_run_is_refused(
    tmp_path: Path, vit: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = write_photos(tmp_path / "in", 30)
    original = pipeline.iter_planned

    def change(*arguments: Any) -> Any:
        photos[5].write_bytes(make_photo(77))
        return original(*arguments)

    monkeypatch.setattr(pipeline, "iter_planned", change)
    with pytest.raises(BatchError, match="changed during the run, among rows 0 to 29"):
        batch.run(tmp_path / "in", model=vit, out=tmp_path / "out")
    assert not read_rows(tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"batch_size": 8}, "batch_size=4"),
        ({"shard_size": 100}, "shard_size=12"),
        ({"format": "csv"}, "format=jsonl"),
        ({"task": "embed"}, "task=classify"),
        ({"top_k": 2}, "top_k=5"),
        ({"top_k": "all"}, "top_k=5"),
        ({"model": "other"}, "another model"),
        ({"model": "bf16"}, "precision=fp32"),
    ],
)
def test_other_options_are_refused(
    tmp_path: Path, vit: Predictor, settings: dict[str, Any], match: str
) -> None:
    out = interrupt_run(tmp_path, vit)
    before = read_files(out)
    if settings.get("model") == "other":
        other = Predictor.load(DEMO)
        other.model.head.bias.data[3] += 1e-3  # type: ignore[union-attr, operator, index]
        settings = {"model": other}
    elif settings.get("model") == "bf16":
        settings = {"model": Predictor.load(DEMO, precision="bf16")}
    with pytest.raises(BatchError, match=match):
        batch.run(tmp_path / "in", **{"model": vit, "out": out} | settings)
    assert {k: v for k, v in read_files(out).items() if "ignored" not in k} == {
        k: v for k, v in before.items() if "ignored" not in k
    }
    batch.run(tmp_path / "in", model=vit, out=out)


@pytest.mark.parametrize("name", ["labels.csv", "labels.parquet"])
def test_name_of_a_file_is_refused(tmp_path: Path, vit: Predictor, name: str) -> None:
    write_photos(tmp_path / "in", 1)
    form = name.partition(".")[2]
    with pytest.raises(ConfigError, match=f"such as 'labels'; .*--format {form}. writes {form}"):
        batch.run(tmp_path / "in", model=vit, out=tmp_path / name)
    assert not (tmp_path / name).exists()


def test_missing_part_is_written_again(tmp_path: Path, vit: Predictor) -> None:
    out = interrupt_run(tmp_path, vit)
    part = out / "part-00000.jsonl"
    part.write_bytes(part.read_bytes()[:-5])
    batch.run(tmp_path / "in", model=vit, out=out)
    batch.run(tmp_path / "in", model=vit, out=tmp_path / "whole", shard_size=12, batch_size=4)
    assert read_files(out) == read_files(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["gone", "shorter"])
def test_complete_run_with_missing_file_is_refused(
    tmp_path: Path, vit: Predictor, damage: str
) -> None:
    write_photos(tmp_path / "in", 5)
    for form in ("jsonl", "azure-csv"):
        out = tmp_path / form
        run = batch.run(tmp_path / "in", model=vit, out=out, format=form)  # type: ignore[arg-type]
        assert batch.run(tmp_path / "in", model=vit, out=out).computed == 0
        path = out / run.files[0]
        data = path.read_bytes()
        path.unlink()
        if damage == "shorter":
            path.write_bytes(data[:-1])
        with pytest.raises(BatchError, match="not as the run wrote it"):
            batch.run(tmp_path / "in", model=vit, out=out)
        assert not (out / ".run").exists()


def test_azure_file_has_a_checksum(tmp_path: Path, vit: Predictor) -> None:
    write_photos(tmp_path / "in", 5)
    batch.run(tmp_path / "in", model=vit, out=tmp_path / "out", format="azure-csv", shard_size=2)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    data = (tmp_path / "out" / "predictions.csv").read_bytes()
    expected = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest["files"] == {"predictions.csv": expected}
    assert not any("files" in part for part in manifest["parts"])


def test_second_process_is_refused(tmp_path: Path, vit: Predictor) -> None:
    from vitlib.batch.locks import lock_folder

    write_photos(tmp_path / "in", 4)
    with lock_folder(tmp_path / "out", 0, 1), pytest.raises(BatchError, match="another process"):
        batch.run(tmp_path / "in", model=vit, out=tmp_path / "out")


def test_folder_with_other_content_is_refused(tmp_path: Path, vit: Predictor) -> None:
    write_photos(tmp_path / "in", 4)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.doc").write_text("years of work")
    with pytest.raises(BatchError, match="not empty"):
        batch.run(tmp_path / "in", model=vit, out=tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(BatchError, match="is a file"):
        batch.run(tmp_path / "in", model=vit, out=tmp_path / "file")


def test_full_disk_is_reported(tmp_path: Path, vit: Predictor) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "none", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")
    try:
        write_photos(tmp_path / "in", 300)
        settings: dict[str, Any] = {"task": "both", "shard_size": 50, "batch_size": 10}
        with pytest.raises(SourceError, match="No space left"):
            batch.run(tmp_path / "in", model=vit, out=small / "out", **settings)
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        run = batch.run(tmp_path / "in", model=vit, out=small / "out", **settings)
        assert run.ok == 300
        assert run.computed < 300  # finished shards are not computed again
        batch.run(tmp_path / "in", model=vit, out=tmp_path / "whole", **settings)
        assert read_files(small / "out") == read_files(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(small)], check=True)
