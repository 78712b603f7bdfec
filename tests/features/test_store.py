"""Test the store: what it gives back, and what other processes, kills and damage do to it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vitlib.errors import ConfigError, SourceError
from vitlib.features.parts import FeatureKey
from vitlib.features.selection import Feature
from vitlib.features.store import MANY_PARTS, FeatureStore, open_store

KEY = FeatureKey("a" * 32, "fp32", Feature(3, "cls"))
WIDTH = 6


def digests(*names: object) -> list[str]:
    return [hashlib.blake2b(str(name).encode(), digest_size=16).hexdigest() for name in names]


def rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/part-*.safetensors"))


def test_store_gives_back_what_was_written(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "store")
    names, vectors = digests(*range(5)), rows(5)
    store.write(KEY, names, vectors)
    order = [*names[::-1], digests("another")[0], "", names[0]]
    actual = FeatureStore(tmp_path / "store").read(KEY, order, WIDTH)
    np.testing.assert_array_equal(actual[:5], vectors[::-1])
    np.testing.assert_array_equal(actual[7], vectors[0])  # asked for twice
    assert np.isnan(actual[5:7]).all()
    assert store.size() == sum(path.stat().st_size for path in parts(store.folder))


def test_store_never_mixes_models_layers_pools_or_precisions(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    names = digests("photo")
    others = [
        KEY._replace(model_digest="b" * 32),
        KEY._replace(precision="bf16"),
        KEY._replace(feature=Feature(2, "cls")),
        KEY._replace(feature=Feature(3, "mean")),
    ]
    for seed, key in enumerate([KEY, *others]):
        store.write(key, names, rows(1, seed))
    for seed, key in enumerate([KEY, *others]):
        np.testing.assert_array_equal(store.read(key, names, WIDTH), rows(1, seed))


def test_part_of_another_model_is_not_read_where_someone_put_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = FeatureStore(tmp_path)
    other = KEY._replace(model_digest="b" * 32)
    store.write(other, digests("photo"), rows(1))
    (tmp_path / other.folder).rename(tmp_path / KEY.folder)
    with caplog.at_level(logging.WARNING, "vitlib"):
        assert np.isnan(store.read(KEY, digests("photo"), WIDTH)).all()
    assert "of another model" in caplog.text
    assert np.isnan(store.read(KEY, digests("photo"), WIDTH + 1)).all()


def test_rows_without_numbers_or_hash_are_not_stored(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    vectors = rows(3)
    vectors[1, 2] = np.nan
    names = [digests("a")[0], digests("b")[0], ""]
    store.write(KEY, names, vectors)
    actual = store.read(KEY, names, WIDTH)
    assert np.isfinite(actual).all(axis=1).tolist() == [True, False, False]
    empty = FeatureStore(tmp_path / "empty")
    empty.write(KEY, [""], rows(1))
    assert not empty.folder.exists()


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "text"])
def test_damaged_part_is_computed_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = FeatureStore(tmp_path)
    store.write(KEY, digests("a"), rows(1))
    (path,) = parts(tmp_path)
    content = bytearray(path.read_bytes())
    content[-19] ^= 1  # of the vectors; the hashes follow them
    damaged = {"flip": bytes(content), "cut": content[:-4], "empty": b"", "text": b"hello" * 9}
    path.write_bytes(damaged[damage])
    with caplog.at_level(logging.WARNING, "vitlib"):
        assert np.isnan(store.read(KEY, digests("a"), WIDTH)).all()
    assert "is damaged" in caplog.text
    assert not path.exists()
    store.write(KEY, digests("a"), rows(1))
    np.testing.assert_array_equal(store.read(KEY, digests("a"), WIDTH), rows(1))


def test_store_deletes_what_was_not_used_for_the_longest_time(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    for index in range(4):
        store.write(KEY, digests(index), rows(1, index))
    paths = sorted(parts(tmp_path), key=lambda path: path.stat().st_mtime_ns)
    for age, path in enumerate(paths):
        os.utime(path, (age, age))
    store.read(KEY, digests(0), WIDTH)  # now the newest
    size = paths[0].stat().st_size
    small = FeatureStore(tmp_path, max_bytes=3 * size)
    small.write(KEY, digests("new"), rows(1))
    left = [i for i in range(4) if np.isfinite(small.read(KEY, digests(i), WIDTH)).all()]
    assert left == [0, 3]
    assert np.isfinite(small.read(KEY, digests("new"), WIDTH)).all()
    assert small.size() <= 3 * size


def test_many_small_parts_become_one(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    for index in range(MANY_PARTS + 3):
        store.write(KEY, digests(index % 30), rows(1, index % 30))
    assert len(parts(tmp_path)) < 8
    for index in range(30):
        np.testing.assert_array_equal(store.read(KEY, digests(index), WIDTH), rows(1, index))


WRITER = """
import sys, hashlib, numpy as np
from vitlib.features.selection import Feature
from vitlib.features.parts import FeatureKey
from vitlib.features.store import FeatureStore
store = FeatureStore(sys.argv[1])
key = FeatureKey("a" * 32, "fp32", Feature(3, "cls"))
print("ready", flush=True)
sys.stdin.readline()
for index in range(int(sys.argv[2]), int(sys.argv[3])):
    name = hashlib.blake2b(str(index).encode(), digest_size=16).hexdigest()
    store.write(key, [name], np.full((1, 6), index, np.float32))
    print(index, flush=True)
"""


def start_writer(folder: Path, first: int, end: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(first), str(end)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_processes_fill_a_store_at_once(tmp_path: Path) -> None:
    writers = [start_writer(tmp_path, 0, 60), start_writer(tmp_path, 40, 100)]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.communicate("go\n")
        assert writer.returncode == 0
    actual = FeatureStore(tmp_path).read(KEY, digests(*range(100)), WIDTH)
    np.testing.assert_array_equal(actual, np.repeat(np.arange(100.0), WIDTH).reshape(100, WIDTH))


def test_killed_writer_leaves_what_it_wrote(tmp_path: Path) -> None:
    writer = start_writer(tmp_path, 0, 10_000)
    assert writer.stdin is not None
    assert writer.stdout is not None
    writer.stdin.write("go\n")
    writer.stdin.flush()
    while writer.stdout.readline() != "20\n":
        pass
    writer.kill()
    done = [int(line) for line in writer.stdout.read().split()]
    writer.communicate()
    last = max([20, *done])
    store = FeatureStore(tmp_path)
    actual = store.read(KEY, digests(*range(last + 1)), WIDTH)
    np.testing.assert_array_equal(actual[:, 0], np.arange(last + 1.0))
    store.write(KEY, digests("later"), rows(1))  # and it can be filled


def test_store_refuses_a_folder_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SourceError, match=r"holds thesis.txt and is no store of features: name"):
        FeatureStore(tmp_path)
    with pytest.raises(SourceError, match="cannot be a folder of features"):
        FeatureStore(tmp_path / "thesis.txt")
    with pytest.raises(ConfigError, match="max_bytes=0: expected 1 or more"):
        FeatureStore(tmp_path / "new", max_bytes=0)
    other = tmp_path / "newer"
    other.mkdir()
    (other / "store.json").write_text(json.dumps({"format": "vitlib-features", "version": "9"}))
    with pytest.raises(SourceError, match="store of another vitlib"):
        FeatureStore(other)


def test_full_disk_costs_no_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = FeatureStore(tmp_path)
    store.write(KEY, digests("a"), rows(1))

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vitlib.system.atomic.fsync_path", fail)
    with caplog.at_level(logging.WARNING, "vitlib"):
        for name in ("b", "c"):
            store.write(KEY, digests(name), rows(1))
    assert caplog.text.count("No space left on device: new vectors are not stored") == 1
    assert len(parts(tmp_path)) == 1
    np.testing.assert_array_equal(store.read(KEY, digests("a"), WIDTH), rows(1))


def test_store_is_named_by_option_environment_or_verb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VITLIB_FEATURES", raising=False)
    assert open_store(None) is None
    assert open_store(None, tmp_path / "verb").folder == tmp_path / "verb"  # type: ignore[union-attr]
    monkeypatch.setenv("VITLIB_FEATURES", str(tmp_path / "all"))
    assert open_store(None, tmp_path / "verb").folder == tmp_path / "all"  # type: ignore[union-attr]
    assert open_store(tmp_path / "mine").folder == tmp_path / "mine"  # type: ignore[union-attr]
