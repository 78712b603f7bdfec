"""Saved formats that hold parameter names: an older version is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import vitlib
from fixtures.families import tiny
from vitlib import fast
from vitlib.errors import CheckpointError, TrainError
from vitlib.train import resume

VERSION_1 = {
    "attn.proj": "attn.out",
    "attn_pool.proj": "attn_pool.out",
    "ls1.gamma": "scale1",
    "ls2.gamma": "scale2",
    "norm_pre": "pre_norm",
    "attn_position": "positions",
}


def name_in_version_1(name: str) -> str:
    for new, old in VERSION_1.items():
        name = name.replace(new, old)
    return name


@pytest.mark.parametrize("family", ["vit", "dinov2", "clip", "siglip_map", "beit"])
def test_load_refuses_own_layout_of_version_1(family: str, tmp_path: Path) -> None:
    vitlib.save(tiny(family), tmp_path, layout="vitlib")
    weights, config = tmp_path / "model.safetensors", tmp_path / "vitlib.json"
    save_file({name_in_version_1(n): t for n, t in load_file(weights).items()}, weights)
    content = json.loads(config.read_text())
    assert content.pop("format_version") == 2
    config.write_text(json.dumps(content))
    message = r"vitlib's own layout has format version 1: expected 2: save the model in .*'hf'"
    with pytest.raises(CheckpointError, match=message):
        vitlib.load(tmp_path)
    config.unlink()  # the names of the tensors alone tell
    with pytest.raises(CheckpointError, match=message):
        vitlib.load(tmp_path)


def test_fast_load_refuses_folder_of_format_1(tmp_path: Path) -> None:
    vitlib.optimize(tiny("vit")).save(tmp_path)
    path = tmp_path / "fast.safetensors"
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["vitlib_fast"])
    assert header["format"] == 2
    save_file(load_file(path), path, {"vitlib_fast": json.dumps(header | {"format": 1})})
    with pytest.raises(CheckpointError, match=r"format version 1: expected 2: load the checkpoint"):
        fast.load(tmp_path)


def test_resume_refuses_checkpoint_of_version_1(tmp_path: Path) -> None:
    resume.write_checkpoint(tmp_path, 3, {"model/head.bias": torch.zeros(2)}, {"frozen": 0}, set())
    folder = resume.list_checkpoints(tmp_path)[3]
    tensors, state = resume.load_checkpoint(folder)
    assert (list(tensors), state["frozen"]) == (["model/head.bias"], 0)
    (folder / "state.json").write_text(json.dumps({"frozen": 0}))
    with pytest.raises(TrainError, match=r"step-00000003 has format version 1: expected 2: finish"):
        resume.load_checkpoint(folder)
