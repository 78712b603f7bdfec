"""vitlib batch: every input has its row, a kill changes nothing, what is wrong is told at once."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from fixtures.synthetic_photos import BROKEN, DEMO, SAMPLES, folder_of, photo
from vitlib import Predictor, batch
from vitlib.batch import duplicates, journal
from vitlib.batch.results import Results
from vitlib.cli import vitlib_command
from vitlib.errors import BatchError, ConfigError, SourceError
from vitlib.fast.cpu import kernel_plan

sys_run = sys.modules["vitlib.batch.pipeline"]


@pytest.fixture(scope="module")
def vit() -> Predictor:
    return Predictor.load(DEMO)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(out.glob("part-*.jsonl")) for row in lines(path)]


def contents(out: Path) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def cli(*arguments: object) -> Any:
    return CliRunner().invoke(vitlib_command, ["batch", *map(str, arguments)])


# --- rows -----------------------------------------------------------------------------------------


def test_every_input_has_its_row(tmp_path: Path, vit: Predictor) -> None:
    photos = folder_of(tmp_path / "in", 50)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    (tmp_path / "in" / ".hidden.png").write_bytes(photo(0))
    found = batch.run(tmp_path / "in", model=vit, out=tmp_path / "out", shard_size=16, batch_size=8)
    assert (found.inputs, found.ok, found.failed, found.ignored) == (50, 50, 0, 2)
    assert found.complete
    rows = rows_of(tmp_path / "out")
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
        assert np.allclose(row["probs"], [p.score for p in expected], atol=1e-6)  # other batches
        assert row["error"] is None
    assert rows[0]["labels"] != rows[1]["labels"] or rows[0]["probs"] != rows[1]["probs"]
    assert (tmp_path / "out" / "ignored.txt").read_text().count("\n") == 2


def test_manifest_counts_and_checksums(tmp_path: Path, vit: Predictor) -> None:
    folder_of(tmp_path / "in", 20)
    out = tmp_path / "out"
    batch.run(tmp_path / "in", model=vit, out=out, shard_size=7)
    said = json.loads((out / "manifest.json").read_text())
    assert said["complete"] is True
    assert (out / "_SUCCESS").exists()
    assert not (out / ".run").exists()
    assert said["counts"]["inputs"] == said["counts"]["ok"] + said["counts"]["failed"] == 20
    assert [part["rows"] for part in said["parts"]] == [7, 7, 6]
    for part in said["parts"]:
        for name, file in part["files"].items():
            data = (out / name).read_bytes()
            assert file == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    for name in ("shard_size", "batch_size", "precision", "threads", "operations", "labels"):
        assert said["settings"][name]


def test_broken_files_are_named_and_others_right(tmp_path: Path, vit: Predictor) -> None:
    good = folder_of(tmp_path / "in", 200)
    for number, (kind, make) in enumerate(BROKEN.items()):
        make(tmp_path / "in" / "b" / f"{number:04d}-{kind}.jpg")
    out = tmp_path / "out"
    found = batch.run(tmp_path / "in", model=vit, out=out)
    assert (found.ok, found.failed) == (200, len(BROKEN))
    assert found.inputs == found.ok + found.failed
    bad = {row["file"]: row for row in rows_of(out) if row["error"] is not None}
    assert {Path(name).stem.split("-", 1)[1] for name in bad} == set(BROKEN)
    assert all(row["labels"] is None and row["probs"] is None for row in bad.values())
    assert [(e["row"], e["file"], e["error"]) for e in lines(out / "errors.jsonl")] == [
        (row["row"], row["file"], row["error"]) for row in bad.values()
    ]
    scores = dict(zip(map(str, good), vit.classify(good, top_k=1), strict=True))
    for row in rows_of(out):
        if row["error"] is None:
            (best,) = scores[row["file"]] or []
            assert row["labels"][0] == best.label
            assert row["probs"][0] == pytest.approx(best.score, abs=1e-6)


def test_copies_are_told(tmp_path: Path, vit: Predictor) -> None:
    folder = tmp_path / "in"
    folder_of(folder, 12)
    (folder / "copy.png").write_bytes(photo(3))
    (folder / "z" / "copy.png").write_bytes(photo(3))
    out = tmp_path / "out"
    found = batch.run(folder, model=vit, out=out)
    assert found.duplicates == 2
    names = [row["file"] for row in rows_of(out)]
    told = lines(out / "duplicates.jsonl")
    assert [Path(names[line["same_as"]]).read_bytes() for line in told] == [photo(3)] * 2
    assert len({names[line["row"]] for line in told} | {names[told[0]["same_as"]]}) == 3


@pytest.mark.parametrize("in_memory", [5, 64, 10_000])
def test_copies_are_those_of_a_dict(
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
    told = {line["row"]: line["same_as"] for line in lines(tmp_path / "out.jsonl")}
    assert told == expected
    assert count == len(expected) > 10


def test_numbers_in_text_are_the_same_float32(tmp_path: Path, vit: Predictor) -> None:
    folder_of(tmp_path / "in", 9)
    for form in ("jsonl", "csv", "npy", "parquet"):
        batch.run(tmp_path / "in", model=vit, out=tmp_path / form, format=form, task="both",
                  top_k="all", batch_size=4)  # fmt: skip
    vectors = np.load(tmp_path / "npy" / "part-00000.npy")
    probs = np.load(tmp_path / "npy" / "part-00000.probs.npy")
    assert vectors.dtype == probs.dtype == np.float32
    rows = rows_of(tmp_path / "jsonl")
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
    folder_of(tmp_path / "in", 5)
    (tmp_path / "in" / 'a,"b".jpg').write_bytes(b"no")
    for form in ("csv", "npy", "parquet", "azure-csv"):
        found = batch.run(tmp_path / "in", model=vit, out=tmp_path / form, format=form)
        assert (found.ok, found.failed) == (5, 1)
        assert set(found.files) <= {p.name for p in (tmp_path / form).iterdir()}
    with (tmp_path / "csv" / "part-00000.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [bool(row["error"]) for row in table].count(True) == 1
    bad = next(row for row in table if row["error"])
    assert bad["file"].endswith('a,"b".jpg')
    assert bad["label_1"] == bad["prob_5"] == ""
    array = np.load(tmp_path / "npy" / "part-00000.npy")
    index = lines(tmp_path / "npy" / "part-00000.index.jsonl")
    assert array.shape == (6, 10)
    assert [bool(row["error"]) for row in index] == np.isnan(array).any(axis=1).tolist()
    from pyarrow import parquet

    read = parquet.read_table(tmp_path / "parquet" / "part-00000.parquet").to_pydict()
    assert [p is None for p in read["probs"]] == [e is not None for e in read["error"]]
    with (tmp_path / "azure-csv" / "predictions.csv").open(newline="") as file:
        card = list(csv.reader(file))
    assert len(card) == 6
    assert sorted(row[3] for row in card)[:2] == ["0000.png", "0004.png"]  # below the folder
    whole = [row for row in card if row[1] != "[]"]
    assert len(whole) == 5
    import ast

    assert ast.literal_eval(whole[0][2]) == list(vit.labels)
    assert sum(ast.literal_eval(whole[0][1])) == pytest.approx(1, abs=1e-5)
    assert not list((tmp_path / "azure-csv").glob("part-*"))


def test_an_answer_that_is_not_finite_is_a_failed_row(tmp_path: Path) -> None:
    vit = Predictor.load("demo")
    factor = 3e36  # a bright level times it is infinite, black is 0
    rule = replace(vit.image_processor, rescale_factor=factor, image_mean=None, image_std=None)
    vit.image_processor = rule
    folder_of(tmp_path / "in", 2)
    Image.new("RGB", (32, 32)).save(tmp_path / "in" / "black.png")
    found = batch.run(tmp_path / "in", model=vit, out=tmp_path / "out")
    assert (found.ok, found.failed) == (1, 2)
    failed = [row for row in rows_of(tmp_path / "out") if row["error"]]
    assert len(failed) == 2
    assert all("numbers that are not finite" in row["error"] for row in failed)


def test_names_that_are_no_unicode(tmp_path: Path, vit: Predictor) -> None:
    name = os.fsencode(tmp_path / "in") + b"/caf\xe9\n.png"
    (tmp_path / "in").mkdir()
    try:
        with open(name, "wb") as file:  # noqa: PTH123
            file.write(photo(1))
    except OSError:
        pytest.skip("this file system takes Unicode alone")
    batch.run(tmp_path / "in", model=vit, out=tmp_path / "out")
    (row,) = rows_of(tmp_path / "out")
    assert os.fsencode(row["file"]) == name


def test_a_list_names_files_in_a_locale_of_ascii(tmp_path: Path) -> None:
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
    assert [row["error"] for row in rows_of(tmp_path / "out")] == [None, None]
    assert [row["file"] for row in rows_of(tmp_path / "out")] == ["café.png", "bad\udcff.png"]


def test_names_in_csv(tmp_path: Path, vit: Predictor) -> None:
    names = ["a\rb.png", "c\nd.png", 'e"f.png', "g,h.png", " i .png", "k.png"]
    for number, name in enumerate(names):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(photo(number))
    for form in ("csv", "azure-csv"):
        batch.run(tmp_path / "in", model=vit, out=tmp_path / form, format=form)  # type: ignore[arg-type]
    with (tmp_path / "csv" / "part-00000.csv").open(newline="") as file:
        assert sorted(Path(row["file"]).name for row in csv.DictReader(file)) == sorted(names)
    with (tmp_path / "azure-csv" / "predictions.csv").open(newline="") as file:
        assert sorted(row[3] for row in csv.reader(file)) == sorted(names)


# --- sources --------------------------------------------------------------------------------------


def test_two_runs_are_the_same_bytes(tmp_path: Path, vit: Predictor) -> None:
    folder_of(tmp_path / "in", 40)
    (tmp_path / "in" / "bad.jpg").write_bytes(b"no")
    for name in ("a", "b"):
        batch.run(tmp_path / "in", model=vit, out=tmp_path / name, shard_size=16, batch_size=8)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_embeddings_of_a_model_without_a_head(tmp_path: Path, vit: Predictor) -> None:
    bare = Predictor.load(DEMO, num_classes=0)
    folder_of(tmp_path / "in", 4)
    batch.run(tmp_path / "in", model=bare, out=tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert list(rows[0]) == ["file", "row", "embedding", "error"]
    expected = vit.embed([row["file"] for row in rows])
    assert np.allclose([row["embedding"] for row in rows], expected, atol=1e-5)
    with pytest.raises(ConfigError, match="no head"):
        batch.run(tmp_path / "in", model=bare, out=tmp_path / "no", task="classify")


# --- kills and changes ----------------------------------------------------------------------------


class Killed(BaseException):
    """As SIGKILL, but in this process."""


def killing(monkeypatch: pytest.MonkeyPatch, name: str, after: int) -> None:
    """The so-manieth call of journal.append, or of a rename, does not return."""
    left = after
    whole = Path.replace if name == "replace" else journal.append

    def call(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return whole(*arguments)

    if name == "replace":
        monkeypatch.setattr(Path, "replace", call)
    else:
        monkeypatch.setattr(sys.modules["vitlib.batch.shards"], "append", call)


@pytest.mark.parametrize("form", ["jsonl", "csv", "npy", "parquet", "azure-csv"])
def test_ended_anywhere_it_goes_on_to_the_same_bytes(
    tmp_path: Path, vit: Predictor, form: Any
) -> None:
    folder_of(tmp_path / "in", 30)
    (tmp_path / "in" / "bad.jpg").write_bytes(b"no")
    settings: dict[str, Any] = {"format": form, "shard_size": 12, "batch_size": 4}
    batch.run(tmp_path / "in", model=vit, out=tmp_path / "whole", **settings)
    expected = contents(tmp_path / "whole")
    for name, calls in (("append", 8), ("replace", 30)):
        for after in range(calls):
            out = tmp_path / f"{name}-{after}"
            with pytest.MonkeyPatch.context() as patch:
                killing(patch, name, after)
                try:
                    batch.run(tmp_path / "in", model=vit, out=out, **settings)
                except Killed:
                    assert not (out / "_SUCCESS").exists()
                else:
                    break
            batch.run(tmp_path / "in", model=vit, out=out, **settings)
            assert contents(out) == expected, (name, after)
        else:
            assert name == "append"


def test_a_torn_journal_is_cut(tmp_path: Path) -> None:
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
    bent = bytearray(whole)
    bent[each + 60] ^= 1
    path.write_bytes(bent)
    assert journal.truncate_incomplete(path) == 2
    (found,) = journal.read_records(path)
    assert (found.files, found.errors) == (answers[0].files, answers[0].errors)
    assert np.array_equal(found.scores, answers[0].scores)  # type: ignore[arg-type]


def start(*arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "vitlib", "batch", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.parametrize(("workers", "times"), [(1, 6), (2, 4)])
def test_sigkill_at_any_moment(tmp_path: Path, workers: int, times: int) -> None:
    folder_of(tmp_path / "in", 600, "JPEG")
    for number, make in enumerate(BROKEN.values()):
        make(tmp_path / "in" / f"x{number}.jpg")
    settings = ["--model", DEMO, "--shard-size", 100, "--batch-size", 8, "--max-errors", 20]
    settings += ["--workers", workers]
    whole = start(tmp_path / "in", "--out", tmp_path / "whole", *settings)
    told, _ = whole.communicate()
    assert whole.returncode == 0, told
    draw = random.Random(workers)
    kills = 0
    out = tmp_path / "out"
    for _ in range(100):
        process = start(tmp_path / "in", "--out", out, *settings)
        until = time.monotonic() + 60
        before = journals(out)
        while journals(out) == before and process.poll() is None and time.monotonic() < until:
            time.sleep(0.005)  # else the most are killed while torch is imported
        time.sleep(draw.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        if (out / "_SUCCESS").exists() or kills == times:
            break
    last = start(tmp_path / "in", "--out", out, *settings)
    told, _ = last.communicate()
    assert last.returncode == 0, told
    assert kills >= 3
    assert contents(out) == contents(tmp_path / "whole")


def journals(out: Path) -> list[tuple[str, int]]:
    try:
        return sorted((p.name, p.stat().st_size) for p in (out / ".run").glob("*.rows"))
    except OSError:
        return []


def stopped(tmp_path: Path, vit: Predictor, **settings: Any) -> Path:
    """A run that was ended after some batches."""
    folder_of(tmp_path / "in", 30)
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        killing(patch, "append", 4)
        with pytest.raises(Killed):
            batch.run(tmp_path / "in", model=vit, out=out, shard_size=12, batch_size=4, **settings)
    return out


@pytest.mark.parametrize("precision", ["int8", "auto"])
def test_what_was_chosen_by_photos_is_kept(tmp_path: Path, precision: Any) -> None:
    """A calibration, and what "auto" chose, are the run's; another time might give another."""
    if kernel_plan("int8") is None:
        pytest.skip("int8 takes a CPU with VNNI")
    photos = [photo(number) for number in range(100, 140)]
    calibrated = Predictor.load(DEMO, precision=precision, calibrate=photos)
    out = stopped(tmp_path, calibrated)
    batch.run(tmp_path / "in", model=DEMO, out=out)
    whole: dict[str, Any] = {"shard_size": 12, "batch_size": 4, "out": tmp_path / "whole"}
    batch.run(tmp_path / "in", model=calibrated, **whole)
    assert contents(out) == contents(tmp_path / "whole")
    said = json.loads((out / "manifest.json").read_text())["settings"]
    assert said["precision_asked"] == precision
    assert precision == "auto" or said["precision"] == "int8"


@pytest.mark.parametrize("change", ["written", "gone", "new", "renamed", "complete"])
def test_changed_inputs_are_noticed(tmp_path: Path, vit: Predictor, change: str) -> None:
    out = stopped(tmp_path, vit)
    photos = sorted((tmp_path / "in").rglob("*.png"))
    if change == "complete":
        batch.run(tmp_path / "in", model=vit, out=out)
    if change in ("written", "complete"):
        photos[20].write_bytes(photo(99))
    elif change == "gone":
        photos[20].unlink()
    elif change == "new":
        (tmp_path / "in" / "new.png").write_bytes(photo(99))
    else:
        photos[20].rename(photos[20].with_name("other.png"))
    with pytest.raises(BatchError, match="inputs"):
        batch.run(tmp_path / "in", model=vit, out=out)


def test_a_change_while_it_works_is_noticed(
    tmp_path: Path, vit: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = folder_of(tmp_path / "in", 30)
    original = sys_run.iter_planned

    def change(*arguments: Any) -> Any:
        photos[5].write_bytes(photo(77))
        return original(*arguments)

    monkeypatch.setattr(sys_run, "iter_planned", change)
    with pytest.raises(BatchError, match="changed during the run, among rows 0 to 29"):
        batch.run(tmp_path / "in", model=vit, out=tmp_path / "out")
    assert not rows_of(tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "what"),
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
def test_another_run_is_refused(
    tmp_path: Path, vit: Predictor, settings: dict[str, Any], what: str
) -> None:
    out = stopped(tmp_path, vit)
    before = contents(out)
    if settings.get("model") == "other":
        other = Predictor.load(DEMO)
        other.model.head.bias.data[3] += 1e-3  # type: ignore[union-attr, operator, index]
        settings = {"model": other}
    elif settings.get("model") == "bf16":
        settings = {"model": Predictor.load(DEMO, precision="bf16")}
    with pytest.raises(BatchError, match=what):
        batch.run(tmp_path / "in", **{"model": vit, "out": out} | settings)
    assert {k: v for k, v in contents(out).items() if "ignored" not in k} == {
        k: v for k, v in before.items() if "ignored" not in k
    }
    batch.run(tmp_path / "in", model=vit, out=out)


def test_a_missing_or_shortened_part_is_made_again(tmp_path: Path, vit: Predictor) -> None:
    out = stopped(tmp_path, vit)
    part = out / "part-00000.jsonl"
    part.write_bytes(part.read_bytes()[:-5])
    batch.run(tmp_path / "in", model=vit, out=out)
    batch.run(tmp_path / "in", model=vit, out=tmp_path / "whole", shard_size=12, batch_size=4)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("how", ["gone", "shorter"])
def test_a_complete_run_that_lacks_something(tmp_path: Path, vit: Predictor, how: str) -> None:
    folder_of(tmp_path / "in", 5)
    for form in ("jsonl", "azure-csv"):
        out = tmp_path / form
        found = batch.run(tmp_path / "in", model=vit, out=out, format=form)  # type: ignore[arg-type]
        assert batch.run(tmp_path / "in", model=vit, out=out).computed == 0
        path = out / found.files[0]
        data = path.read_bytes()
        path.unlink()
        if how == "shorter":
            path.write_bytes(data[:-1])
        with pytest.raises(BatchError, match="not as the run wrote it"):
            batch.run(tmp_path / "in", model=vit, out=out)
        assert not (out / ".run").exists()


def test_the_card_s_file_has_a_checksum(tmp_path: Path, vit: Predictor) -> None:
    folder_of(tmp_path / "in", 5)
    batch.run(tmp_path / "in", model=vit, out=tmp_path / "out", format="azure-csv", shard_size=2)
    said = json.loads((tmp_path / "out" / "manifest.json").read_text())
    data = (tmp_path / "out" / "predictions.csv").read_bytes()
    expected = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert said["files"] == {"predictions.csv": expected}
    assert not any("files" in part for part in said["parts"])


def test_a_second_process_is_refused(tmp_path: Path, vit: Predictor) -> None:
    from vitlib.batch.locks import lock_folder

    folder_of(tmp_path / "in", 4)
    with lock_folder(tmp_path / "out", 0, 1), pytest.raises(BatchError, match="another process"):
        batch.run(tmp_path / "in", model=vit, out=tmp_path / "out")


def test_a_folder_of_something_else_is_refused(tmp_path: Path, vit: Predictor) -> None:
    folder_of(tmp_path / "in", 4)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.doc").write_text("years of work")
    with pytest.raises(BatchError, match="not empty"):
        batch.run(tmp_path / "in", model=vit, out=tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(BatchError, match="is a file"):
        batch.run(tmp_path / "in", model=vit, out=tmp_path / "file")


def test_a_disk_that_fills_up(tmp_path: Path, vit: Predictor) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "none", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")
    try:
        folder_of(tmp_path / "in", 300)
        settings: dict[str, Any] = {"task": "both", "shard_size": 50, "batch_size": 10}
        with pytest.raises(SourceError, match="No space left"):
            batch.run(tmp_path / "in", model=vit, out=small / "out", **settings)
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        found = batch.run(tmp_path / "in", model=vit, out=small / "out", **settings)
        assert found.ok == 300
        assert found.computed < 300  # what was there was kept
        batch.run(tmp_path / "in", model=vit, out=tmp_path / "whole", **settings)
        assert contents(small / "out") == contents(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(small)], check=True)


# --- several processes ----------------------------------------------------------------------------


def test_workers_give_the_same_rows(tmp_path: Path, vit: Predictor) -> None:
    folder_of(tmp_path / "in", 60)
    (tmp_path / "in" / "bad.jpg").write_bytes(b"no")
    settings: dict[str, Any] = {"model": vit, "shard_size": 16, "batch_size": 8, "task": "both"}
    batch.run(tmp_path / "in", out=tmp_path / "one", **settings)
    found = batch.run(tmp_path / "in", out=tmp_path / "two", workers=2, **settings)
    assert (found.ok, found.failed) == (60, 1)
    for a, b in zip(rows_of(tmp_path / "one"), rows_of(tmp_path / "two"), strict=True):
        assert a["file"] == b["file"]
        assert a["labels"] == b["labels"]
        assert a["error"] == b["error"]
        if not a["error"]:
            assert np.allclose(a["probs"], b["probs"], atol=1e-6)
            assert np.allclose(a["embedding"], b["embedding"], atol=1e-5)


def test_ranks_divide_the_shards(
    tmp_path: Path, vit: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of(tmp_path / "in", 45)
    settings: dict[str, Any] = {"model": vit, "shard_size": 10, "batch_size": 5}
    batch.run(tmp_path / "in", out=tmp_path / "one", **settings)
    monkeypatch.setenv("WORLD_SIZE", "2")
    computed = []
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        found = batch.run(tmp_path / "in", out=tmp_path / "two", **settings)
        computed.append(found.computed)
        assert found.complete == (rank == 0)
    assert computed == [20, 25]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


# --- what is asked --------------------------------------------------------------------------------


def test_max_errors(tmp_path: Path, vit: Predictor) -> None:
    folder_of(tmp_path / "in", 20)
    for number in range(4):
        (tmp_path / "in" / f"x{number}.jpg").write_bytes(b"no")
    for most in (3, 0, 0.1):
        with pytest.raises(BatchError, match="inputs failed: expected at most"):
            batch.run(tmp_path / "in", model=vit, out=tmp_path / f"{most}", max_errors=most)
        assert batch.run(tmp_path / "in", model=vit, out=tmp_path / "whole").complete
        with pytest.raises(BatchError, match="inputs failed"):  # of a complete run, too
            batch.run(tmp_path / "in", model=vit, out=tmp_path / "whole", max_errors=most)
    for most in (4, 0.2, None):
        found = batch.run(tmp_path / "in", model=vit, out=tmp_path / "3", max_errors=most)
        assert found.failed == 4


def test_exit_status(tmp_path: Path) -> None:
    folder_of(tmp_path / "in", 6)
    out = tmp_path / "out"
    done = cli(tmp_path / "in", "--model", DEMO, "--out", out)
    assert done.exit_code == 0, done.output
    assert "6 inputs = 6 ok + 0 failed" in done.output
    again = cli(tmp_path / "in", "--model", DEMO, "--out", out)
    assert again.exit_code == 0
    assert "every row was done before" in again.output
    (tmp_path / "in" / "bad.jpg").write_bytes(b"no")
    (tmp_path / "in" / "x.doc").write_bytes(b"no")
    done = cli(tmp_path / "in", "--model", DEMO, "--out", tmp_path / "two", "--json")
    assert done.exit_code == 1
    assert "bad.jpg" in done.stderr
    said = json.loads(done.stdout)
    assert (said["ok"], said["failed"], said["ignored"]) == (6, 1, 1)
    done = cli(tmp_path / "in", "--model", DEMO, "--out", tmp_path / "3", "--max-errors", "20%")
    assert done.exit_code == 0
    again = cli(tmp_path / "in", "--out", tmp_path / "two")  # by the model it began with
    assert again.exit_code == 1  # they still failed
    done = cli(tmp_path / "in", "--model", DEMO, "--out", tmp_path / "4", "--batch-size", 3)
    said = json.loads((tmp_path / "4" / "manifest.json").read_text())
    assert said["settings"]["batch_size"] == 3


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
def test_wrong_use(tmp_path: Path, arguments: list[str], words: str) -> None:
    folder_of(tmp_path / "in", 1)
    done = cli(tmp_path / "in", "--model", DEMO, "--out", tmp_path / "out", *arguments)
    assert done.exit_code == 2
    assert words in done.stderr
    assert not (tmp_path / "out").exists()


def test_bad_sources_are_told_before_any_work(tmp_path: Path, vit: Predictor) -> None:
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
    folder_of(tmp_path / "in", 1)
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


def test_a_missing_library_is_named(
    tmp_path: Path, vit: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of(tmp_path / "in", 1)
    for name in ("pyarrow", "pyarrow.parquet", "ray"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pip install 'vitlib\[parquet\]'"):
        batch.run(tmp_path / "in", model=vit, out=tmp_path / "out", format="parquet")
    with pytest.raises(ConfigError, match=r"pip install 'vitlib\[ray\]'"):
        batch.run(tmp_path / "in", model=vit, out=tmp_path / "out", engine="ray")
    assert not (tmp_path / "out").exists()


def test_samples_are_labelled(tmp_path: Path) -> None:
    done = cli(DEMO / "samples", "--model", "demo", "--out", tmp_path / "out", "--task", "both")
    assert done.exit_code == 0, done.output
    rows = rows_of(tmp_path / "out")
    assert [Path(row["file"]) for row in rows] == SAMPLES
    right = [
        row["labels"][0].replace("/", "-or-").replace(" ", "-").lower()
        == Path(row["file"]).stem.lower()
        for row in rows
    ]
    assert sum(right) >= 8, rows
