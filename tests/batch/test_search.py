"""Tests of the search in embeddings of a batch, in all formats and over several parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from fixtures.synthetic_photos import DEMO, make_photo, write_photos
from vitlib import Predictor, batch
from vitlib.batch import search
from vitlib.cli import vitlib_command
from vitlib.errors import BatchError
from vitlib.retrieval import nearest


@pytest.fixture(scope="module")
def vit() -> Predictor:
    return Predictor.load(DEMO)


@pytest.mark.parametrize("form", ["jsonl", "csv", "npy", "parquet"])
@pytest.mark.parametrize("task", ["embed", "both"])
def test_find_returns_nearest_of_all_parts(
    tmp_path: Path, vit: Predictor, form: Any, task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "ROWS", 5)
    photos = write_photos(tmp_path / "in", 40)
    (tmp_path / "in" / "bad.jpg").write_bytes(b"no")
    top_k: Any = "all" if form == "npy" and task == "both" else None
    batch.run(tmp_path / "in", model=vit, out=tmp_path / "out", task=task, format=form,
              shard_size=12, top_k=top_k)  # fmt: skip
    query = vit.embed(make_photo(1000))[0]
    actual = search.find(tmp_path / "out", query, 7)
    blocks = [rows for rows, _ in search.iter_embeddings(tmp_path / "out")]
    names = [name for rows in blocks for _, name in rows]
    assert sorted(names) == sorted(map(str, photos))
    vectors = vit.embed(names)
    expected = nearest(query[None], vectors, 7)[0]
    assert [item.file for item in actual] == [names[item.index] for item in expected]
    cosines = [[item.cosine for item in items] for items in (actual, expected)]
    assert np.allclose(*cosines, atol=1e-5)


def run_similar(*arguments: object) -> Any:
    return CliRunner().invoke(vitlib_command, ["similar", *map(str, arguments)])


def test_similar_uses_model_of_run(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "in", 10)
    arguments = ["batch", tmp_path / "in", "--out", tmp_path / "out", "--model", "demo"]
    run = CliRunner().invoke(vitlib_command, [*map(str, arguments), "--task", "embed"])
    assert run.exit_code == 0, run.output
    result = run_similar(
        photos[3], tmp_path / "out", "--json", "--top-k", 3, "--plot", tmp_path / "p.png"
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(result.output)
    assert rows[0]["image"] == str(photos[3])
    assert rows[0]["cosine"] == pytest.approx(1, abs=1e-5)
    assert (tmp_path / "p.png").exists()
    direct = run_similar(photos[3], tmp_path / "in", "--json", "--top-k", 3, "--model", "demo")
    assert [row["image"] for row in json.loads(direct.output)] == [row["image"] for row in rows]


def test_find_rejects_runs_without_complete_embeddings(tmp_path: Path, vit: Predictor) -> None:
    photos = write_photos(tmp_path / "in", 4)
    batch.run(tmp_path / "in", model=vit, out=tmp_path / "labels")
    with pytest.raises(BatchError, match="labels only"):
        search.find(tmp_path / "labels", vit.embed(photos[0])[0], 1)
    batch.run(tmp_path / "in", model=vit, out=tmp_path / "out", task="embed")
    (tmp_path / "out" / "_SUCCESS").unlink()
    with pytest.raises(BatchError, match="not complete"):
        search.find(tmp_path / "out", vit.embed(photos[0])[0], 1)
    for form in ("npy", "jsonl", "csv", "parquet"):
        run = batch.run(tmp_path / "in", model=vit, out=tmp_path / form, task="embed",
                        format=form)  # type: ignore[arg-type]  # fmt: skip
        part = tmp_path / form / run.files[0]
        data = part.read_bytes()
        if form != "csv":  # which reads zeros as a long header
            part.write_bytes(bytes(len(data)))
            with pytest.raises(BatchError, match="damaged"):
                search.find(tmp_path / form, vit.embed(photos[0])[0], 1)
        part.write_bytes(data[:150])
        with pytest.raises(BatchError, match="not as the run wrote it"):
            search.find(tmp_path / form, vit.embed(photos[0])[0], 1)
        part.unlink()
        with pytest.raises(BatchError, match="is missing"):
            search.find(tmp_path / form, vit.embed(photos[0])[0], 1)
    with pytest.raises(BatchError, match="no run"):
        search.find(tmp_path / "in", vit.embed(photos[0])[0], 1)


def test_similar_reads_folder_with_foreign_manifest(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "in", 2)
    (tmp_path / "in" / "manifest.json").write_text('{"name": "an app", "settings": {}}')
    result = run_similar(photos[1], tmp_path / "in", "--model", "demo", "--json")
    assert json.loads(result.output)[0]["image"] == str(photos[1])
