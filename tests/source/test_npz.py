"""Reader of .npz archives."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixtures.checkpoint_files import read_tensors
from vitlib.errors import CheckpointError
from vitlib.source.readers import npz, zips
from vitlib.source.readers.tensor_file import read_tensor_file


def test_npz_of_odd_names_orders_and_text(tmp_path: Path) -> None:
    arrays = {
        "opt/target/head/kernel": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "version": np.array("v1"),
        "c": np.array([1 + 2j], np.complex64),
        "u": np.array([2**63], np.uint64),
    }
    np.savez(tmp_path / "x.npz", **arrays)
    contents = read_tensor_file(tmp_path / "x.npz")
    assert contents.ignored == ("version",)
    assert contents.tensors.keys() == arrays.keys() - {"version"}
    kernel = contents.tensors["opt/target/head/kernel"]
    assert kernel.is_contiguous()
    assert np.array_equal(kernel.numpy(), arrays["opt/target/head/kernel"])
    assert contents.tensors["c"].item() == 1 + 2j
    kernel.add_(1)  # the memory is ours


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([{"a": 1}], dtype=object), r"a is no array of plain .*\(O\)"),
        (np.zeros(2, dtype=[("x", "f4")]), r"an object or record"),
        (np.zeros(2, dtype=">f4"), "little-endian"),
        (np.zeros(2, dtype="V3"), r"\(V3\)"),
        (np.zeros(2, dtype="M8[s]"), "an object or record"),
    ],
)
def test_non_numeric_arrays_are_rejected(array: Any, message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=array)
    with pytest.raises(CheckpointError, match=message):
        read_tensor_file(tmp_path / "x.npz")


def npy(header: str, data: bytes = b"", length: int | None = None) -> bytes:
    text = header.encode()
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", length or len(text)) + text + data


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_wrong_npy_headers_are_rejected(packing: int, tmp_path: Path) -> None:
    baseline = "{'descr': '<f4', 'fortran_order': False, 'shape': (%s), }"
    lies = {
        "long": npy(baseline % "2", bytes(8), 2**31),
        "more": npy(baseline % "9,", bytes(8)),
        "huge": npy(baseline % "1000000000, 1000000000, 1000000000,", bytes(8)),
        "less": npy(baseline % "1,", bytes(8)),
        "deep": npy("(" * 3000, bytes(8)),
        "many": npy(baseline % ("1," * 40), bytes(4)),
        "code": npy("__import__('os')", bytes(8)),
        "none": b"",
        "cut": b"\x93NUMPY",
    }
    for name, member in lies.items():
        with zipfile.ZipFile(tmp_path / "x.npz", "w", packing) as archive:
            archive.writestr("a.npy", member)
        with pytest.raises(CheckpointError):
            print(name, read_tensor_file(tmp_path / "x.npz"))
    with zipfile.ZipFile(tmp_path / "x.npz", "w", packing) as archive:
        archive.writestr("a.npy", npy(baseline % "2L,", bytes(8)))
    assert read_tensors(tmp_path / "x.npz")["a"].shape == (2,)


def test_compressed_npz_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "x.npz", a=np.zeros(100_000, np.float32))
    assert read_tensors(tmp_path / "x.npz")["a"].shape == (100_000,)
    monkeypatch.setattr(npz, "_SMALL_BYTES", 1000)
    with pytest.raises(
        CheckpointError, match=r"would unpack to 400128 bytes: at most .* np\.savez"
    ):
        read_tensor_file(tmp_path / "x.npz")
    monkeypatch.setattr(npz, "MAX_RATIO", 10_000)
    monkeypatch.setattr(npz, "MAX_UNPACKED_BYTES", 100_000)
    with pytest.raises(CheckpointError, match="would unpack to"):
        read_tensor_file(tmp_path / "x.npz")


def test_compressed_npz_with_values_that_are_not_finite(tmp_path: Path) -> None:
    values = np.zeros(1_000_000, np.float32)
    values[-1] = np.nan
    np.savez_compressed(tmp_path / "x.npz", a=values)
    assert read_tensor_file(tmp_path / "x.npz").finite is False


def test_overlapping_zip_members_are_rejected(tmp_path: Path) -> None:
    """A hundred entries on one member would take a hundred times its memory."""
    path = tmp_path / "x.npz"
    np.savez(path, a=np.zeros(1000), b=np.zeros(1000))
    raw = path.read_bytes()
    at = raw.rindex(b"PK\x01\x02")
    path.write_bytes(raw[: at + 42] + bytes(4) + raw[at + 46 :])  # b's entry now points to a
    with pytest.raises(CheckpointError, match=r"truncated or not an \.npz file"):
        read_tensor_file(path)


def test_large_zip_directory_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "x.npz", **{f"a{i}": np.zeros(1) for i in range(200)})
    monkeypatch.setattr(zips, "MAX_DIRECTORY_BYTES", 5000)
    with pytest.raises(CheckpointError, match="truncated or not"):
        read_tensor_file(tmp_path / "x.npz")
