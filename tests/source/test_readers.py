"""Readers of weights files: every dtype, damage, and files of other kinds."""

from __future__ import annotations

import io
import json
import pickle
import random
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fixtures.checkpoint_files import (
    ARGUMENTS,
    OPTIMIZER,
    read_tensors,
)
from vitlib.errors import CheckpointError, VitlibError
from vitlib.source.readers.contents import Contents, parts_are_finite
from vitlib.source.readers.tensor_file import read_tensor_file


def is_finite(path: Path, contents: Contents) -> bool | None:
    if contents.parts is None:
        return contents.finite
    return parts_are_finite(path, contents.parts.values())


def to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Convert as JAX does: bfloat16 is two bytes of type void in NumPy."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view("V2")
    return tensor.numpy()


def savez(tensors: dict[str, torch.Tensor], path: Path) -> None:
    np.savez(path, **{name: to_numpy(tensor) for name, tensor in tensors.items()})


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.arange(4),
        "d": torch.randn(()),
        "e": torch.randn(2, 2).half(),
        "f": torch.zeros(0, 3),
        "g": torch.randn(1).double(),
        "h": torch.tensor([True]),
        "i": torch.arange(-3, 4, dtype=torch.int8),
    }


def test_tensors_of_every_dtype(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    torch.save(tensors, tmp_path / "x.bin")
    torch.save(tensors, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    np.savez(tmp_path / "x.npz", **{k: to_numpy(t) for k, t in tensors.items()})
    np.savez_compressed(tmp_path / "y.npz", **{k: to_numpy(t) for k, t in tensors.items()})
    for name in ("x.safetensors", "x.bin", "old.bin", "x.npz", "y.npz"):
        contents = read_tensor_file(tmp_path / name)
        result = contents.tensors
        assert is_finite(tmp_path / name, contents) is (None if name == "old.bin" else True)
        assert result.keys() == tensors.keys()
        for key, expected in tensors.items():
            assert result[key].dtype == expected.dtype
            assert torch.equal(result[key], expected)
            assert result[key].is_contiguous()
            assert result[key].data_ptr() % max(expected.itemsize, 1) == 0


def test_safetensors_header_of_odd_length(tmp_path: Path) -> None:
    """Old writers did not pad the header, so that tensors may start anywhere."""
    data = torch.arange(6, dtype=torch.float32)
    for padding in range(8):
        entry = {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}
        header = json.dumps({"x": entry}).encode() + b" " * padding
        path = tmp_path / f"{padding}.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + data.numpy().tobytes())
        assert torch.equal(read_tensors(path)["x"], data)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_files(keep: int, tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    for name, save in (("x.safetensors", save_file), ("x.bin", torch.save), ("x.npz", savez)):
        path = tmp_path / name
        save(tensors, path)
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(CheckpointError, match=r"truncated or not an? .* download it again"):
            read_tensors(path)


@pytest.mark.parametrize("length", [640, 128, 0x4B50])
def test_a_header_length_that_looks_like_another_format(length: int, tmp_path: Path) -> None:
    """640 is how a pickle begins, 0x4B50 how a zip does."""
    entry = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    header = json.dumps(entry).encode().ljust(length)
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + header + bytes(4))
    assert read_tensors(path).keys() == {"a"}


def test_wrong_safetensors_headers_are_rejected(tmp_path: Path) -> None:
    lies = {
        "long": (2**62).to_bytes(8, "little") + b"{}",
        "beyond": b'{"x":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}',
        "shape": b'{"x":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}',
        "dtype": b'{"x":{"dtype":"Q7","shape":[1],"data_offsets":[0,4]}}',
        "hole": b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        "json": b"{{{{",
    }
    for name, header in lies.items():
        path = tmp_path / f"{name}.safetensors"
        if name == "long":
            path.write_bytes(header)
        else:
            path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
            read_tensors(path)


class Evil:
    ran: list[int] = []  # noqa: RUF012

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return Evil.ran.append, (1,)


def test_pickles_run_no_code(tmp_path: Path) -> None:
    torch.save({"a": Evil()}, tmp_path / "evil.bin")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Evil()))
    torch.save({"a": Evil()}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for name, message in (
        ("evil.bin", "wants getattr"),
        ("old.bin", "wants getattr"),
        ("plain.bin", "torch.save"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_tensors(tmp_path / name)
    assert Evil.ran == []


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    """A few kilobytes could hold gigabytes of zeros."""
    torch.save({"a": torch.zeros(1000)}, tmp_path / "x.bin")
    with (
        zipfile.ZipFile(tmp_path / "x.bin") as old,
        zipfile.ZipFile(tmp_path / "y.bin", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for item in old.infolist():
            new.writestr(item.filename, old.read(item))
    with pytest.raises(CheckpointError, match="is compressed"):
        read_tensors(tmp_path / "y.bin")


def test_git_lfs_pointer_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        read_tensors(path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("save", [save_file, torch.save, savez])
def test_values_that_are_not_finite(
    save: Callable[..., None], dtype: torch.dtype, tmp_path: Path
) -> None:
    """Anywhere in the file, of either sign, and nothing that is merely large, or no float."""
    path = tmp_path / {save_file: "x.safetensors", torch.save: "x.pth", savez: "x.npz"}[save]
    large = torch.finfo(dtype)
    values = torch.randn(1_500_001).to(dtype)
    values[0], values[1], values[-1] = large.max, large.min, large.tiny
    others = {"b": torch.zeros(3, dtype=dtype), "c": torch.full((5,), -1), "d": torch.randn(7)}
    for bad in (None, torch.nan, -torch.nan, torch.inf, -torch.inf):
        for at in (0, 700_000, 1_500_000):
            changed = values.clone()
            if bad is not None:
                changed[at] = bad
            save({"a": changed, **others}, path)
            assert is_finite(path, read_tensor_file(path)) is (bad is None)
    save({"a": torch.zeros(0, dtype=dtype)}, path)
    assert is_finite(path, read_tensor_file(path)) in (True, None)


def test_eight_bit_floats_are_left_to_others(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4).to(torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    path = tmp_path / "x.safetensors"
    assert is_finite(path, read_tensor_file(path)) is None


def test_views_of_one_storage_are_read_once(tmp_path: Path) -> None:
    """Tied, sliced and transposed tensors; what lies between is tested too, at worst."""
    whole = torch.randn(64, 64)
    state = {"a": whole, "b": whole.T, "c": whole[3:7], "d": whole[:, 2], "e": nn.Parameter(whole)}
    torch.save(state, tmp_path / "x.pth")
    contents = read_tensor_file(tmp_path / "x.pth")
    assert all(torch.equal(contents.tensors[name], state[name].detach()) for name in state)
    assert not any(tensor.requires_grad for tensor in contents.tensors.values())
    assert is_finite(tmp_path / "x.pth", contents) is True
    whole[0, 0] = torch.nan
    torch.save({"c": whole[3:7], "z": whole}, tmp_path / "x.pth")
    contents = read_tensor_file(tmp_path / "x.pth")
    assert parts_are_finite(tmp_path / "x.pth", [contents.parts["c"]]) is True
    assert parts_are_finite(tmp_path / "x.pth", [contents.parts["z"]]) is False


def make_zip(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return buffer.getvalue()


def make_tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.h5", b"\x89HDF\r\n\x1a\n" + bytes(600), "is an HDF5 file, as Keras"),
        ("x.bin", b"GGUF" + bytes(600), "is a GGUF file"),
        ("x.npy", b"\x93NUMPY" + bytes(600), "is a single NumPy array"),
        ("x.safetensors", b"<!DOCTYPE html><html>", "is a web page"),
        ("x.pth", b"\x1f\x8b" + bytes(600), "is compressed by gzip"),
        ("x.onnx", b"\x08\x07\x12\x07pytorch" + bytes(600), "is an ONNX graph"),
        ("flax_model.msgpack", b"\x81\xa6params" + bytes(600), "is a Flax msgpack file"),
        ("x.tflite", bytes(4) + b"TFL3" + bytes(600), "is a TensorFlow Lite file"),
        ("model.ckpt.data-00000-of-00001", bytes(600), "is part of a TensorFlow checkpoint"),
        ("model.ckpt.index", bytes(600), "is the index of a TensorFlow checkpoint"),
        ("config.json", b'{"a": 1, "b": 2}', "is a JSON file"),
        ("x.pth", make_tar(), "is a tar archive"),
        ("x.keras", make_zip("config.json", "model.weights.h5"), "is a Keras file"),
        ("x.pt", make_zip("x/readme.txt"), "is a zip archive"),
        (
            "x.pt",
            make_zip("x/constants.pkl", "x/code/a.py", "x/data.pkl"),
            r"torch\.jit\.load\(path",
        ),
        ("x.pkl", pickle.dumps({"a": 1}), "is a pickle that torch.save did not write"),
        ("x.npz", make_zip()[:22], "holds no tensors"),
    ],
)
def test_other_formats_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        read_tensor_file(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_torchscript_archive(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has other plans for it
        torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "x.pt"))
    with pytest.raises(CheckpointError, match=r"is a TorchScript archive.*torch\.jit\.load"):
        read_tensor_file(tmp_path / "x.pt")


def test_an_adapter_by_its_names(tmp_path: Path) -> None:
    names = [f"base_model.model.layer.{i}.q.lora_{ab}.weight" for i in range(3) for ab in "AB"]
    adapter = {name: torch.zeros(2) for name in [*names, "classifier.weight"]}
    save_file(adapter, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"LoRA adapter alone: merge .*merge_and_unload"):
        read_tensor_file(tmp_path / "x.safetensors")
    base = {f"a{i}": torch.zeros(1) for i in range(20)}
    save_file({**base, names[0]: torch.zeros(2)}, tmp_path / "x.safetensors")
    assert len(read_tensors(tmp_path / "x.safetensors")) == 21


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "old.pth", "x.npz", "packed.npz"])
def test_damaged_files_raise_our_errors_alone(
    name: str, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Flipped, cut, doubled and swapped bytes: tensors or one line, nothing else."""
    path = tmp_path / name
    wrapped = {"model": tensors, "args": ARGUMENTS, "optimizer": OPTIMIZER}
    arrays = {key: to_numpy(tensor) for key, tensor in tensors.items()}
    {
        "x.safetensors": lambda: save_file(tensors, path),
        "x.pth": lambda: torch.save(wrapped, path),
        "old.pth": lambda: torch.save(wrapped, path, _use_new_zipfile_serialization=False),
        "x.npz": lambda: np.savez(path, **arrays),
        "packed.npz": lambda: np.savez_compressed(path, **arrays),
    }[name]()
    whole = path.read_bytes()
    opened, message = 0, []
    for seed in range(400):
        chance = random.Random(seed)
        raw = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2, 8))):
            at = chance.randrange(len(raw))
            raw[at] = chance.choice((0, 255, raw[at] ^ 1 << chance.randrange(8)))
        kind = chance.randrange(4)
        if kind == 0:
            del raw[chance.randrange(len(raw)) :]
        elif kind == 1:
            at = chance.randrange(len(raw))
            raw[at:at] = raw[at : at + chance.randrange(1, 64)]
        path.write_bytes(raw)
        try:
            contents = read_tensor_file(path)
            is_finite(path, contents)
            for tensor in contents.tensors.values():
                tensor.clone()
            opened += 1
        except VitlibError as error:
            message.append(str(error))
    assert not any("\n" in line for line in message)
    assert 0 < opened < 400
