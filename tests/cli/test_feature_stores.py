"""Test --features of embed, similar and batch: one store, which each fills and reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import vitlib
from fixtures.synthetic_photos import write_photos

Run = Callable[..., tuple[int, str, str]]
VERBS = ("embed", "similar", "batch")


def run_verb(run_cli: Run, verb: str, photos: Path, out: Path, *options: object) -> np.ndarray:
    """Run a verb on the photos, and return what it tells of their vectors."""
    if verb == "embed":
        code, _, err = run_cli("embed", "-m", "demo", photos, "-o", out / "v.npy", *options)
        assert code == 0, err
        return np.asarray(np.load(out / "v.npy"))
    if verb == "similar":
        query = next(photos.rglob("*.png"))
        code, text, err = run_cli("similar", "-m", "demo", query, photos, "--json", *options)
        assert code == 0, err
        return np.array([row["cosine"] for row in json.loads(text)])
    run = ("--task", "embed", "--format", "npy", "-o", out / "run", *options)
    code, _, err = run_cli("batch", "-m", "demo", photos, *run)
    assert code == 0, err
    return np.asarray(np.load(out / "run" / "part-00000.npy"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_photos(tmp_path / "photos", 7)
    return tmp_path / "photos"


def count_embedded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the number of images of each batch that the model embeds."""
    counts: list[int] = []
    embed = vitlib.fast.model.FastViT.embed_uint8

    def counted(self: object, images: object) -> object:
        counts.append(len(images))  # type: ignore[arg-type]
        return embed(self, images)  # type: ignore[arg-type]

    monkeypatch.setattr(vitlib.fast.model.FastViT, "embed_uint8", counted)
    return counts


@pytest.mark.parametrize("second", VERBS)
@pytest.mark.parametrize("first", VERBS)
def test_verbs_share_a_store(
    run_cli: Run, photos: Path, tmp_path: Path, first: str, second: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    store = ("--features", tmp_path / "store")
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    expected = run_verb(run_cli, second, photos, tmp_path / "a")
    counts = count_embedded(monkeypatch)
    run_verb(run_cli, first, photos, tmp_path / "b", *store)
    queries = first == "similar"  # whose query is embedded by itself
    assert sum(counts) == 7 + queries
    counts.clear()
    actual = run_verb(run_cli, second, photos, tmp_path / "c", *store)
    assert sum(counts) == (second == "similar")
    np.testing.assert_allclose(actual, expected, atol=2e-5)


def test_environment_names_the_store(
    run_cli: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VITLIB_FEATURES", str(tmp_path / "all"))
    run_verb(run_cli, "embed", photos, tmp_path)
    counts = count_embedded(monkeypatch)
    run_verb(run_cli, "batch", photos, tmp_path)
    assert not counts
    # Labels are no embeddings: the environment does not stop such a run.
    assert run_cli("batch", "-m", "demo", photos, "-o", tmp_path / "labels")[0] == 0


def test_unreadable_photo_is_named_with_a_store(run_cli: Run, photos: Path, tmp_path: Path) -> None:
    (photos / "bad.png").write_bytes(b"no image")
    store = ("--features", tmp_path / "store")
    for _ in range(2):
        code, _, err = run_cli("embed", "-m", "demo", photos, "-o", tmp_path / "v.npy", *store)
        assert code == 1
        assert "bad.png" in err
    assert np.isnan(np.load(tmp_path / "v.npy")).all(axis=1).sum() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--task", "classify"), "features= is for task='embed' in one process"),
        (("--task", "embed", "--workers", 2), "features= is for task='embed' in one process"),
    ],
)
def test_batch_refuses_a_store_that_it_has_no_use_for(
    run_cli: Run, photos: Path, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    arguments = ("-m", "demo", photos, "-o", tmp_path / "run", "--features", tmp_path / "store")
    code, _, err = run_cli("batch", *arguments, *options)
    assert code == 1
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", VERBS)
def test_folder_of_photos_is_no_store(
    run_cli: Run, photos: Path, tmp_path: Path, verb: str
) -> None:
    query = next(photos.rglob("*.png"))
    arguments = {
        "embed": (photos, "-o", tmp_path / "v.npy"),
        "similar": (query, photos),
        "batch": (photos, "-o", tmp_path / "run", "--task", "embed"),
    }
    code, _, err = run_cli(verb, "-m", "demo", *arguments[verb], "--features", photos)
    assert code == 1
    assert "is no store of features: name a new or empty folder" in err
