"""State dicts in training checkpoints, and other content of PyTorch files."""

from __future__ import annotations

import argparse
import collections
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from fixtures.checkpoint_files import (
    ARGUMENTS,
    NET,
    OPTIMIZER,
    OTHER,
    Calls,
    copies,
    read_tensors,
    under,
)
from vitlib.checkpoint.layouts.networks import extract_network
from vitlib.errors import CheckpointError
from vitlib.source.locate import Source
from vitlib.source.readers import pickles
from vitlib.source.readers.tensor_file import read_tensor_file

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
    result, _ = extract_network(source, source.tensors(), None, None)
    assert source.wrapper_keys == taken
    assert source.ignored == ignored
    assert result.keys() == NET.keys()
    assert all(torch.equal(result[key], NET[key]) for key in NET)


@pytest.mark.parametrize(
    ("value", "message"),
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
def test_pickles_without_state_dict_are_rejected(
    value: object, message: str, tmp_path: Path
) -> None:
    torch.save(value, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=message):
        read_tensors(tmp_path / "x.bin")


@pytest.mark.parametrize("zipped", [True, False])
def test_forbidden_global_of_pickle_is_named(zipped: bool, tmp_path: Path) -> None:
    for value, message in (
        (nn.Linear(2, 2), r"wants torch\.nn\.modules\.linear\.Linear, which could run code: only"),
        ({"a": Calls(os.system, "exit 1")}, rf"wants {os.system.__module__}\.system, which could"),
        ({"a": NET, "b": Calls(bytearray, 10)}, r"wants builtins\.bytearray, which can take any"),
        ({"a": Calls(torch.FloatTensor, 1000)}, "has no numbers in the file"),
    ):
        torch.save(value, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match=message) as error:
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


def test_large_pickle_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(NET, tmp_path / "x.pth")
    monkeypatch.setattr(pickles, "MAX_PICKLE_BYTES", 10)
    with pytest.raises(CheckpointError, match="a pickle of more than 10 bytes"):
        read_tensor_file(tmp_path / "x.pth")
