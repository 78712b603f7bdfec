from __future__ import annotations

import csv
import os
import socket
import stat
from pathlib import Path

import numpy as np
import pytest

from vitlib.errors import SourceError
from vitlib.system.atomic import check_writable, open_atomic, resolve_target, write_npy
from vitlib.system.csv_rows import iter_csv_rows


def test_write_npy(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_npy(tmp_path / "a.npy", array)
    assert np.array_equal(np.load(tmp_path / "a.npy"), array)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


def test_open_atomic_keeps_old_file_on_error(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def stop_early() -> None:
        with open_atomic(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_early()
    assert path.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_mode_follows_umask(umask: int, mode: int, tmp_path: Path) -> None:
    """Also where what writes puts a file of its own, its owner's alone, in the place of ours."""
    before = os.umask(umask)
    try:
        write_npy(tmp_path / "a.npy", np.zeros(1))
        with open_atomic(tmp_path / "b") as file:
            (tmp_path / "other").touch(0o600)
            (tmp_path / "other").rename(file.name)
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.npy", "b")] == [mode] * 2


def test_missing_folders_are_made(tmp_path: Path) -> None:
    path = check_writable(tmp_path / "no/such/folder/a.npy")
    assert not (tmp_path / "no").exists()
    write_npy(path, np.zeros(1))
    assert np.load(path).shape == (1,)
    with pytest.raises(SourceError, match="cannot be written: Not a directory"):
        check_writable(path / "b.npy")


def test_special_files_are_not_replaced(tmp_path: Path) -> None:
    """A rename over a device would take the device away: pipe and socket stand for it here."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as at:
        at.bind(str(tmp_path / "socket"))
        before = {path.name: path.lstat().st_ino for path in tmp_path.iterdir()}
        kinds = {"pipe": "a pipe", "folder": "a folder", "link": "a pipe", "socket": "a socket"}
        for name, kind in kinds.items():
            with pytest.raises(SourceError, match=f"{name} is {kind}: expected a file to write"):
                write_npy(tmp_path / name, np.zeros(1))
    assert {path.name: path.lstat().st_ino for path in tmp_path.iterdir()} == before
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_open_atomic_follows_links(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name in ("old", "new"):  # a file, and one that is not there yet
        (tmp_path / name).symlink_to(tmp_path / "there" / name)
    (tmp_path / "there/old").write_text("old")
    for name in ("old", "new"):
        write_npy(tmp_path / name, np.ones(3))
        assert (tmp_path / name).is_symlink()
        assert np.load(tmp_path / "there" / name).sum() == 3
        assert resolve_target(tmp_path / name) == (tmp_path / "there" / name).resolve()
    assert len(list((tmp_path / "there").iterdir())) == 2


def test_csv_limit_is_restored() -> None:
    before = csv.field_size_limit()
    rows = iter_csv_rows(csv.reader(["a,b", "x" * 11 + ",c"], strict=True), 10)
    assert next(rows) == ["a", "b"]
    assert csv.field_size_limit() == before
    with pytest.raises(csv.Error, match=r"field limit \(10\)"):
        next(rows)
    assert csv.field_size_limit() == before
    (row,) = iter_csv_rows(csv.reader(["x" * (before + 1)]), before + 1)
    assert len(row[0]) == before + 1


def test_link_loop_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(SourceError, match="cannot be written"):
        write_npy(tmp_path / "loop", np.zeros(1))
