"""One word for one thing in every verb: model, output, size of images, photos, stdin, Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vitlib
from fixtures.command_line import Run, make_workplace
from paths import ROOT


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(make_workplace(tmp_path))
    return tmp_path


def set_stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("info", "demo"), ("info", "-m", "demo")),
        (("verify", "demo"), ("verify", "--model", "demo")),
        (
            ("evaluate", "mine", "photos", "-o", "r", "--bootstrap", 0),
            ("evaluate", "photos", "-m", "mine", "-o", "r", "--bootstrap", 0),
        ),
    ],
)
@pytest.mark.usefixtures("workplace")
def test_model_by_position_or_option(
    first: tuple[object, ...], second: tuple[object, ...], run_cli: Run
) -> None:
    result = run_cli(*first)
    assert result[0] == 0
    assert run_cli(*second) == result


def test_convert_by_position_or_options(run_cli: Run, workplace: Path) -> None:
    for index, command in enumerate(
        (("demo", "out0"), ("-m", "demo", "-o", "out1"), ("out2", "-m", "demo"))
    ):
        assert run_cli("convert", *command, "--layout", "timm")[0] == 0
        assert (workplace / f"out{index}/model.safetensors").is_file()
    status, _, err = run_cli("convert", "demo", "--layout", "timm")
    assert status == 2
    assert "expected SRC DST, got 1 argument" in err
    status, _, err = run_cli("evaluate", "a", "b", "c", "-o", "r")
    assert status == 2
    assert "expected MODEL DATA, got 3 arguments: 'c' is one too many" in err


@pytest.mark.usefixtures("workplace")
def test_image_size_in_every_verb_that_runs_a_model(run_cli: Run) -> None:
    bigger = vitlib.Predictor.load("demo")
    bigger.image_processor = bigger.image_processor.with_image_size((56, 28), (4, 4))
    label, score = bigger.classify("photo.jpg", top_k=1)[0][0].label, 0.0
    status, out, _ = run_cli(
        "classify", "-m", "demo", "photo.jpg", "--image-size", "56x28", "-k", 1
    )
    score = bigger.classify("photo.jpg", top_k=1)[0][0].score
    assert (status, out) == (0, f"{score:.3f}  {label}\n")
    size = ("--image-size", "56x28")
    run_cli("embed", "-m", "demo", "photo.jpg", "-o", "e.npy", *size)
    assert np.allclose(np.load("e.npy"), bigger.embed("photo.jpg"))
    run_cli(
        "batch", "-m", "demo", "photo.jpg", "--task", "embed", "--format", "npy", "-o", "b", *size
    )
    assert np.allclose(np.load("b/part-00000.npy"), bigger.embed("photo.jpg"), atol=1e-5)
    out = run_cli("attend", "-m", "demo", "photo.jpg", "-o", "a.png", *size)[1]
    assert "14x7 patches" in out
    assert run_cli("similar", "-m", "demo", "photo.jpg", "a.jpg", *size)[1] == "1.000  a.jpg\n"
    assert run_cli("evaluate", "mine", "photos", "-o", "r", *size)[0] == 0
    out = run_cli("bench", "demo", "--rounds", 1, "--batch-size", 1, "--precision", "fp32", *size)[
        1
    ]
    assert "an image of 56x28" in out
    for verb in (("classify", "photo.jpg"), ("embed", "photo.jpg", "-o", "k.npy")):
        assert run_cli(*verb, "-m", "demo", "--image-size", "keep")[0] == 0
    status, _, err = run_cli("classify", "photo.jpg", "--image-size", "0")
    assert (status, "expected N, HxW or keep" in err) == (2, True)


@pytest.mark.usefixtures("workplace")
def test_all_labels_and_photos(run_cli: Run) -> None:
    assert len(run_cli("classify", "-m", "demo", "photo.jpg", "-k", "all")[1].splitlines()) == 10
    out = run_cli("similar", "-m", "demo", "photo.jpg", "photos", "-k", "all")[1]
    assert len(out.splitlines()) == 8
    status, _, err = run_cli("classify", "photo.jpg", "-k", "0")
    assert (status, "expected a number from 1, or all" in err) == (2, True)


@pytest.mark.parametrize("verb", ["classify", "embed", "similar"])
def test_folders_patterns_and_stdin(
    verb: str, run_cli: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command: tuple[object, ...] = {
        "classify": ("classify", "--json"),
        "embed": ("embed", "--json", "-o", "e.npy"),
        "similar": ("similar", "--json", "-k", "all", "photo.jpg"),
    }[verb]

    def names(*photos: str) -> set[str]:
        status, out, err = run_cli(*command, "-m", "demo", *photos)
        assert status == 0, err
        result = json.loads(out)
        return set(result["images"] if verb == "embed" else (row["image"] for row in result))

    files = sorted(str(p.relative_to(workplace)) for p in workplace.glob("photos/*/*"))
    (workplace / "photos/notes.txt").touch()
    assert names("photos") == set(files)
    assert names("photos/*/*.jpg") == set(files)
    assert names("photos/cat", "a.jpg") == {f for f in files if "cat" in f} | {"a.jpg"}
    for separator in ("\n", "\0", "\r\n"):
        set_stdin(monkeypatch, (separator.join(files[:3]) + separator).encode())
        assert names("-") == set(files[:3])
    assert run_cli(*command, "-m", "demo", "photos/*.gif")[0] == 2


def test_photo_on_stdin(run_cli: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = (workplace / "photo.jpg").read_bytes()
    expected = run_cli("classify", "-m", "demo", "photo.jpg")[1]
    set_stdin(monkeypatch, data)
    assert run_cli("classify", "-m", "demo", "-")[1] == expected
    set_stdin(monkeypatch, data)
    assert run_cli("attend", "-m", "demo", "-", "-o", "map.png")[0] == 0
    set_stdin(monkeypatch, data)
    assert run_cli("similar", "-m", "demo", "-", "a.jpg", "--exclude-query")[1] == "1.000  a.jpg\n"
    for data, message in ((b"", "stdin is empty"), (b"no/such.jpg\n", "names no file")):
        set_stdin(monkeypatch, data)
        status, _, err = run_cli("classify", "-m", "demo", "-")
        assert (status, message in err) == (1, True), err


def test_batch_reads_a_list_on_stdin_and_continues(
    run_cli: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted(str(p.relative_to(workplace)) for p in workplace.glob("photos/*/*"))
    lists = ["\n".join(files), "\n".join(files) + "\n", files[0]]
    command = ("batch", "-m", "demo", "-", "-o", "out", "-k", 1)
    set_stdin(monkeypatch, lists[0].encode())
    status, out, _ = run_cli(*command)
    assert (status, out.splitlines()[0]) == (0, "out: 8 inputs = 8 ok + 0 failed")
    rows = [json.loads(line) for line in Path("out/part-00000.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == files
    set_stdin(monkeypatch, lists[1].encode())
    assert "every row was done before" in run_cli(*command)[1]
    set_stdin(monkeypatch, lists[2].encode())
    assert "out has a run of another list" in run_cli(*command)[2]
    set_stdin(monkeypatch, (workplace / "photo.jpg").read_bytes())
    assert "expected a list of paths" in run_cli("batch", "-", "-o", "new")[2]
    assert not Path("new").exists()


@pytest.mark.usefixtures("workplace")
def test_embeddings_have_names_that_similar_reads(run_cli: Run) -> None:
    status, out, _ = run_cli("embed", "-m", "demo", "photos", "-o", "deep/er/e.npy")
    assert (status, out) == (0, "deep/er/e.npy: 8 x 96 float32\n")
    query = "photos/cat/0.jpg"
    expected = run_cli("similar", "-m", "demo", query, "photos", "-k", 3)[1]
    assert run_cli("similar", query, "deep/er/e.npy", "-k", 3)[1] == expected
    rest = run_cli("similar", query, "deep/er/e.npy", "-k", 2, "--exclude-query")[1]
    assert rest == "".join(line + "\n" for line in expected.splitlines()[1:])
    status, _, err = run_cli("similar", query, "deep/er/e.npy", "-m", "mine")
    assert status == 1
    assert "was made by another model (demo) than mine" in err
    names = Path("deep/er/e.json")
    np.save("deep/er/e.npy", np.zeros((8, 96), np.float32))
    assert "do not belong together" in run_cli("similar", query, "deep/er/e.npy")[2]
    names.write_text('{"mine": 1}')
    status, _, err = run_cli("embed", "-m", "demo", "photos", "-o", "deep/er/e.npy")
    assert (status, "is not of vitlib embed" in err) == (1, True)
    assert names.read_text() == '{"mine": 1}'


def test_embeddings_name_photos_from_another_folder(
    run_cli: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_cli("embed", "-m", "demo", "photos", "-o", "e.npy")
    monkeypatch.chdir(workplace / "photos")
    out = run_cli("similar", "cat/0.jpg", "../e.npy", "-k", 1)[1]
    assert out == f"1.000  {workplace}/photos/cat/0.jpg\n"


def test_vectors_that_are_absent_are_named(
    run_cli: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    code, _, err = run_cli("similar", "photo.jpg", "absent.npy")
    expected = "vitlib: error: absent.npy is not there: expected a file of vitlib embed\n"
    assert (code, err) == (1, expected)


@pytest.mark.parametrize("target", ["/dev/full", "closed", "pipe"])
def test_stdout_that_cannot_be_written_is_one_line(target: str, workplace: Path) -> None:
    command = f"{sys.executable} -m vitlib info demo --json"
    redirect = {"/dev/full": "> /dev/full", "closed": ">&-", "pipe": "| true"}[target]
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} {redirect}"],
        cwd=workplace,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if target == "pipe" and not result.stderr:  # the reader ended after the last line
        return
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("vitlib: error: stdout ")


def test_interrupted_batch_says_how_to_continue(workplace: Path) -> None:
    for index in range(400):
        Image.new("RGB", (1200, 900), (index % 256, 0, 0)).save(workplace / f"photos/{index}.jpg")
    process = subprocess.Popen(
        [sys.executable, "-m", "vitlib", "batch", "-m", "demo", "photos", "-o", "out"],
        cwd=workplace,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background lets them ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (workplace / "out/manifest.json").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.strip().splitlines() == [
        "vitlib: error: interrupted: the same command continues the run, to the same files"
    ]


def test_attend_draws_several_photos_into_a_folder(run_cli: Run, workplace: Path) -> None:
    status, out, err = run_cli("attend", "-m", "demo", "photos", "nope.jpg", "-o", "maps")
    assert status == 1
    assert "'nope.jpg' is not there" in err
    assert len(out.splitlines()) == 8
    assert {p.name for p in (workplace / "maps").iterdir()} == {f"{i}.png" for i in range(8)}
    status, _, err = run_cli("attend", "-m", "demo", "photos", "-o", "maps")
    assert (status, "maps is not empty" in err) == (2, True)
    status, _, err = run_cli("attend", "-m", "demo", "photos", "-o", "maps.png")
    assert (status, "expected a folder for 8 photos" in err) == (2, True)
    (workplace / "below").mkdir()
    (workplace / "below/photo.jpg").write_bytes((workplace / "photo.jpg").read_bytes())
    rows = run_cli("attend", "-m", "demo", "photo.jpg", "below", "-o", "two", "--json")[1]
    assert [row["out"] for row in json.loads(rows)] == ["two/photo-0.png", "two/photo-1.png"]


@pytest.mark.usefixtures("workplace")
def test_similar_names_absent_photos_before_it_loads_a_model(run_cli: Run) -> None:
    status, _, err = run_cli("similar", "photo.jpg", "nope", "-m", "no/such-model")
    assert (status, "PHOTOS nope: no such file or folder" in err) == (2, True)
