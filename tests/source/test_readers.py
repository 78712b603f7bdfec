"""Every kind of weights file, whole, damaged and hostile."""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import pickle
import random
import struct
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

from vitlib.checkpoint.layouts.networks import extract_network
from vitlib.errors import CheckpointError, VitlibError
from vitlib.source.locate import Source
from vitlib.source.readers import npz, pickles, zips
from vitlib.source.readers.contents import Contents, parts_are_finite
from vitlib.source.readers.tensor_file import read_tensor_file


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    return read_tensor_file(path).tensors


def is_finite(path: Path, contents: Contents) -> bool | None:
    if contents.parts is None:
        return contents.finite
    return parts_are_finite(path, contents.parts.values())


def as_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """As JAX saves it: bfloat16 is two bytes of nothing to NumPy."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view("V2")
    return tensor.numpy()


def savez(tensors: dict[str, torch.Tensor], path: Path) -> None:
    np.savez(path, **{name: as_numpy(tensor) for name, tensor in tensors.items()})


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
    }


def test_tensors_of_every_dtype(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    torch.save(tensors, tmp_path / "x.bin")
    torch.save(tensors, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    np.savez(tmp_path / "x.npz", **{k: as_numpy(t) for k, t in tensors.items()})
    np.savez_compressed(tmp_path / "y.npz", **{k: as_numpy(t) for k, t in tensors.items()})
    for name in ("x.safetensors", "x.bin", "old.bin", "x.npz", "y.npz"):
        contents = read_tensor_file(tmp_path / name)
        found = contents.tensors
        assert is_finite(tmp_path / name, contents) is (None if name == "old.bin" else True)
        assert found.keys() == tensors.keys()
        for key, expected in tensors.items():
            assert found[key].dtype == expected.dtype
            assert torch.equal(found[key], expected)
            assert found[key].is_contiguous()
            assert found[key].data_ptr() % max(expected.itemsize, 1) == 0


def test_an_odd_header_shifts_nothing(tmp_path: Path) -> None:
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


def test_headers_that_lie(tmp_path: Path) -> None:
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
    for name, told in (
        ("evil.bin", "wants getattr"),
        ("old.bin", "wants getattr"),
        ("plain.bin", "torch.save"),
    ):
        with pytest.raises(CheckpointError, match=told):
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


def test_a_git_lfs_pointer_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        read_tensors(path)


# --- values that are not finite -------------------------------------------------------------------


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


# --- .npz -----------------------------------------------------------------------------------------


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
    ("array", "told"),
    [
        (np.array([{"a": 1}], dtype=object), r"a is no array of plain .*\(O\)"),
        (np.zeros(2, dtype=[("x", "f4")]), r"an object or record"),
        (np.zeros(2, dtype=">f4"), "little-endian"),
        (np.zeros(2, dtype="V3"), r"\(V3\)"),
        (np.zeros(2, dtype="M8[s]"), "an object or record"),
    ],
)
def test_arrays_that_are_none_of_numbers(array: Any, told: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=array)
    with pytest.raises(CheckpointError, match=told):
        read_tensor_file(tmp_path / "x.npz")


def npy(header: str, data: bytes = b"", length: int | None = None) -> bytes:
    text = header.encode()
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", length or len(text)) + text + data


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_npy_headers_that_lie(packing: int, tmp_path: Path) -> None:
    plain = "{'descr': '<f4', 'fortran_order': False, 'shape': (%s), }"
    lies = {
        "long": npy(plain % "2", bytes(8), 2**31),
        "more": npy(plain % "9,", bytes(8)),
        "huge": npy(plain % "1000000000, 1000000000, 1000000000,", bytes(8)),
        "less": npy(plain % "1,", bytes(8)),
        "deep": npy("(" * 3000, bytes(8)),
        "many": npy(plain % ("1," * 40), bytes(4)),
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
        archive.writestr("a.npy", npy(plain % "2L,", bytes(8)))
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


def test_members_that_share_their_bytes(tmp_path: Path) -> None:
    """A hundred entries on one member would take a hundred times its memory."""
    path = tmp_path / "x.npz"
    np.savez(path, a=np.zeros(1000), b=np.zeros(1000))
    raw = path.read_bytes()
    at = raw.rindex(b"PK\x01\x02")
    path.write_bytes(raw[: at + 42] + bytes(4) + raw[at + 46 :])  # b's entry now points to a
    with pytest.raises(CheckpointError, match=r"truncated or not an \.npz file"):
        read_tensor_file(path)


def test_a_directory_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "x.npz", **{f"a{i}": np.zeros(1) for i in range(200)})
    monkeypatch.setattr(zips, "MAX_DIRECTORY_BYTES", 5000)
    with pytest.raises(CheckpointError, match="truncated or not"):
        read_tensor_file(tmp_path / "x.npz")


# --- training checkpoints -------------------------------------------------------------------------


def tiny(value: float) -> dict[str, torch.Tensor]:
    """The least that is a ViT by its names."""
    return {
        "cls_token": torch.full((1, 1, 4), value),
        "patch_embed.proj.weight": torch.full((4, 3, 2, 2), value),
        "blocks.0.attn.qkv.weight": torch.full((12, 4), value),
        "blocks.0.mlp.fc2.weight": torch.full((4, 8), value),
    }


NET, OTHER = tiny(2.0), tiny(0.0)
OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
ARGUMENTS = argparse.Namespace(lr=0.1, arch="vit_base", output_dir="x")


def under(prefix: str, state: dict[str, torch.Tensor] = NET) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def copies(key: str) -> str:
    return f"{key} (4 tensors: prefix='{key}.')"


WRAPPED: dict[str, tuple[object, tuple[str, ...], tuple[str, ...]]] = {
    "flat": (NET, (), ()),
    "ordered": (collections.OrderedDict(NET), (), ()),
    "flat and more": ({**NET, "epoch": 3, "note": "x"}, (), ("epoch", "note")),
    "DeiT, MAE": (
        {"model": NET, "optimizer": OPTIMIZER, "epoch": 3, "args": ARGUMENTS, "scaler": {}},
        ("model",),
        ("optimizer", "epoch", "args", "scaler"),
    ),
    "EMA beside": ({"model": NET, "model_ema": OTHER}, ("model",), (copies("model_ema"),)),
    "timm": (
        {"state_dict": NET, "state_dict_ema": OTHER, "arch": "vit"},
        ("state_dict",),
        (copies("state_dict_ema"), "arch"),
    ),
    "MSN": (
        {
            "encoder": under("module.", OTHER),
            "target_encoder": under("module."),
            "prototypes": torch.zeros(3),
            "opt": OPTIMIZER,
        },
        ("target_encoder",),
        (copies("encoder"), "prototypes", "opt"),
    ),
    "I-JEPA": (
        {
            "encoder": under("module."),
            "predictor": under("module.", OTHER),
            "target_encoder": under("module.", OTHER),
            "loss": 0.1,
        },
        ("encoder",),
        (copies("predictor"), copies("target_encoder"), "loss"),
    ),
    "compiled in DDP": ({"state_dict": under("module._orig_mod.")}, ("state_dict",), ()),
    "blocks compiled": (
        {name.replace("blocks.0.", "blocks.0._orig_mod."): t for name, t in NET.items()},
        (),
        (),
    ),
    "Lightning": (
        {"state_dict": under("model.tower."), "pytorch-lightning_version": "2"},
        ("state_dict",),
        ("pytorch-lightning_version",),
    ),
    "DINOv2, FSDP": (
        {
            "model": {
                **under("student.backbone.", OTHER),
                **under("teacher.backbone."),
                "teacher.dino_head.w": torch.zeros(2),
                "dino_loss.center": torch.zeros(2),
            },
            "iteration": 7,
        },
        ("model", "teacher.backbone."),
        (
            "iteration",
            "student.backbone (4 tensors)",
            "teacher.dino_head (1 tensor)",
            "dino_loss (1 tensor)",
        ),
    ),
    "nested": ({"module": {"state_dict": {"model": NET}}}, ("module", "state_dict", "model"), ()),
    "another name": ({"weights": NET, "epoch": 1}, ("weights",), ("epoch",)),
    "other names": (
        {
            "run": {"net": NET, "head": {"weight": torch.zeros(3)}},
            "model": {"bias": torch.zeros(1)},
        },
        ("run", "net"),
        ("model (1 tensor)", "head (1 tensor)"),
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("zipped", [True, False])
def test_wrappers(name: str, zipped: bool, tmp_path: Path) -> None:
    state, taken, ignored = WRAPPED[name]
    path = tmp_path / "x.pth"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    source = Source(path)
    found, _ = extract_network(source, source.tensors(), None, None)
    assert source.wrapper_keys == taken
    assert source.ignored == ignored
    assert found.keys() == NET.keys()
    assert all(torch.equal(found[key], NET[key]) for key in NET)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([torch.zeros(1)], "holds a list"),
        ({1: torch.zeros(1)}, "holds a dict"),
        ({}, "holds nothing"),
        ({"epoch": 3, "loss": 0.1}, "holds epoch, loss: expected a state dict, or one under model"),
        (
            {"a": NET, "b": OTHER},
            r"several networks, a \(4 tensors: prefix='a.'\), b \(4 tensors: prefix='b.'\): choose "
            r"one with prefix='a.' \(on the command line --prefix\)",
        ),
        ({"model": {"model": {"model": {"model": {"model": NET}}}}}, "expected a state dict"),
        ({"a": torch.zeros(1).expand(1000)}, "repeats it"),
        ({"a": torch.eye(3).to_sparse()}, "is sparse"),
        ({"a": torch.zeros(3, device="meta")}, "empty of data"),
    ],
)
def test_pickles_of_something_else(value: object, told: str, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=told):
        read_tensors(tmp_path / "x.bin")


class Calls:
    """A pickle of a call."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
def test_what_a_pickle_wants_is_named(zipped: bool, tmp_path: Path) -> None:
    for value, told in (
        (nn.Linear(2, 2), r"wants torch\.nn\.modules\.linear\.Linear, which could run code: only"),
        ({"a": Calls(os.system, "exit 1")}, rf"wants {os.system.__module__}\.system, which could"),
        ({"a": NET, "b": Calls(bytearray, 10)}, r"wants builtins\.bytearray, which can take any"),
        ({"a": Calls(torch.FloatTensor, 1000)}, "has no numbers in the file"),
    ):
        torch.save(value, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match=told) as error:
            read_tensor_file(tmp_path / "x.pth")
        assert "\n" not in str(error.value)


def test_arguments_are_allowed_for_one_file_only(tmp_path: Path) -> None:
    torch.save({"model": NET, "args": ARGUMENTS}, tmp_path / "x.pth")
    assert read_tensor_file(tmp_path / "x.pth").ignored == ("args",)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    evil = {"model": NET, "args": argparse.Namespace(a=Calls(os.system, "exit 1"))}
    torch.save(evil, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"wants \w+\.system"):
        read_tensor_file(tmp_path / "x.pth")


def test_a_pickle_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(NET, tmp_path / "x.pth")
    monkeypatch.setattr(pickles, "MAX_PICKLE_BYTES", 10)
    with pytest.raises(CheckpointError, match="a pickle of more than 10 bytes"):
        read_tensor_file(tmp_path / "x.pth")


# --- what is no file of tensors -------------------------------------------------------------------


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "told"),
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
        ("x.pth", tarred(), "is a tar archive"),
        ("x.keras", zipped("config.json", "model.weights.h5"), "is a Keras file"),
        ("x.pt", zipped("x/readme.txt"), "is a zip archive"),
        ("x.pt", zipped("x/constants.pkl", "x/code/a.py", "x/data.pkl"), r"torch\.jit\.load\(path"),
        ("x.pkl", pickle.dumps({"a": 1}), "is a pickle that torch.save did not write"),
        ("x.npz", zipped()[:22], "holds no tensors"),
    ],
)
def test_other_files_are_named(name: str, content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=told) as error:
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


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "old.pth", "x.npz", "packed.npz"])
def test_damaged_files_raise_our_errors_alone(
    name: str, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Flipped, cut, doubled and swapped bytes: tensors or one line, nothing else."""
    path = tmp_path / name
    wrapped = {"model": tensors, "args": ARGUMENTS, "optimizer": OPTIMIZER}
    arrays = {key: as_numpy(tensor) for key, tensor in tensors.items()}
    {
        "x.safetensors": lambda: save_file(tensors, path),
        "x.pth": lambda: torch.save(wrapped, path),
        "old.pth": lambda: torch.save(wrapped, path, _use_new_zipfile_serialization=False),
        "x.npz": lambda: np.savez(path, **arrays),
        "packed.npz": lambda: np.savez_compressed(path, **arrays),
    }[name]()
    whole = path.read_bytes()
    opened, told = 0, []
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
            told.append(str(error))
    assert not any("\n" in line for line in told)
    assert 0 < opened < 400
