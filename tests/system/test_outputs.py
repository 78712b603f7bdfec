"""An output that is one of the inputs is refused before any work, whatever name it has."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vitlib
from fixtures.synthetic_photos import DEMO, SAMPLES
from vitlib.errors import SourceError
from vitlib.system.atomic import refuse_input

Cli = Callable[..., tuple[int, str, str]]


def test_refuse_input_knows_a_file_by_each_of_its_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    photo = folder / "a.png"
    photo.write_bytes(b"photo")
    (folder / "link.png").symlink_to(photo)
    os.link(photo, tmp_path / "hard.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "new.png")
    monkeypatch.chdir(folder)
    for out in ("a.png", "../in/a.png", "link.png", tmp_path / "hard.png", photo):
        with pytest.raises(SourceError, match="is what is read"):
            refuse_input(out, [photo])
    with pytest.raises(SourceError, match="is what is read"):
        refuse_input("missing.png", ["../in/missing.png"])
    with pytest.raises(SourceError, match="is what is read"):
        refuse_input(tmp_path / "dangling.png", [tmp_path / "new.png"])
    for out in ("b.png", tmp_path / "a.png", "report"):
        refuse_input(out, [photo, "google/vit-base-patch16-224"])
    refuse_input("report", [folder])
    with pytest.raises(SourceError, match=r"lies in .*in, which is read: name a folder outside"):
        refuse_input("report/1", [folder], inside=True)
    (tmp_path / "other").symlink_to(folder)
    with pytest.raises(SourceError, match="lies in"):
        refuse_input(tmp_path / "other/report", [folder], inside=True)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder a class, a photo each."""
    for index, name in enumerate(("bag", "coat")):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        shutil.copy(SAMPLES[index], folder / "x.png")
    return tmp_path / "photos"


def state(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


VERBS: dict[str, list[str]] = {
    "classify": ["classify", "{photo}", "--plot", "{photo}"],
    "classify of a calibration photo": [
        "classify", "{other}", "--precision", "int8", "--calibrate", "{bags}", "--plot", "{link}",
    ],
    "embed": ["embed", "{npy}", "--out", "{npy}"],
    "embed a folder": ["embed", "{photos}", "--out", "{npy}"],
    "attend": ["attend", "{photo}", "--out", "{link}"],
    "similar": ["similar", "{photo}", "{photos}", "--plot", "{other}"],
    "similar to itself": ["similar", "{photo}", "{photos}/coat", "--plot", "{photo}"],
    "convert": ["convert", "{model}", "{model}", "--layout", "timm"],
    "convert to its link": ["convert", "{model}", "{modellink}", "--layout", "timm"],
    "convert of a link": ["convert", "{links}", "{model}", "--layout", "hf"],
    "batch": ["batch", "{photos}", "--out", "{photos}"],
    "batch of a file": ["batch", "{photo}", "--out", "{photo}"],
    "evaluate": ["evaluate", "{model}", "{photos}", "--out", "{photos}/report"],
    "evaluate tune": [
        "evaluate", "{model}", "{photos}/bag", "--tune", "{photos}", "--out", "{photos}/report",
    ],
    "finetune": ["finetune", "{photos}", "--out", "{photos}/run"],
    "finetune validation": [
        "finetune", "{photos}/bag", "--validation", "{photos}", "--out", "{photos}/new",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_refuses_to_write_over_what_it_reads(
    name: str, photos: Path, tmp_path: Path, run_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(DEMO, model, ignore=shutil.ignore_patterns("samples"))
    (tmp_path / "model link").symlink_to(model)
    (tmp_path / "links").mkdir()
    for file in model.iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    os.link(photos / "bag/x.png", tmp_path / "link.png")
    shutil.copy(photos / "bag/x.png", photos / "x.npy")
    names = {
        "photo": photos / "bag/x.png", "other": photos / "coat/x.png", "bags": photos / "bag",
        "link": tmp_path / "link.png", "photos": photos, "npy": photos / "x.npy", "model": model,
        "modellink": tmp_path / "model link", "links": tmp_path / "links",
    }  # fmt: skip
    arguments = [part.format(**names) for part in VERBS[name]]
    if name == "embed a folder":  # whose photos are chosen by their suffix
        (photos / "x.npy").unlink()
        (photos / "x.npy").symlink_to(photos / "bag/x.png")
    verb = arguments[0]
    if verb in ("classify", "embed", "attend", "similar", "batch", "finetune"):
        arguments += ["--model", str(DEMO)]
    loads: list[Any] = []
    monkeypatch.setattr("vitlib.source.locate.Source.tensors", lambda *args: loads.append(args))
    before = state(tmp_path)
    status, out, err = run_cli(*arguments)
    assert (status, out, loads) == (1, "", []), err
    assert "is what is read" in err or "which is read: name a folder outside" in err
    assert state(tmp_path) == before


def test_a_folder_of_weights_called_demo_wins(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_cli: Cli,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/chelsea.jpg").touch()  # photos are no model
    assert vitlib.load("demo").num_classes == 10
    assert not caplog.messages
    other = vitlib.ViT(
        vitlib.ViTConfig(image_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2)
    )
    vitlib.save(other, "demo", image_processor=vitlib.ImageProcessor(size=(8, 8)))
    assert vitlib.load("demo").config.embed_dim == 8
    assert vitlib.Predictor.load("demo").model.config.embed_dim == 8
    assert any("demo is the folder here, not the model inside" in text for text in caplog.messages)
    status, _, _ = run_cli("convert", "demo", "timm", "--layout", "timm")
    assert (status, vitlib.load("timm").config.embed_dim) == (0, 8)
    assert vitlib.load(str(DEMO)).config.embed_dim == 96  # the message names this path
