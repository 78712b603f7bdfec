"""A program of torch.export that would run its author's code is refused before torch opens it."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fixtures.exported import tiny_predictor, write_pt2
from vitlib import Predictor
from vitlib.errors import CheckpointError

Files = dict[str, bytes]


class Payload:
    """An object whose unpickling makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.target,)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("program")
    return write_pt2(folder / "model.pt2", tiny_predictor(), outputs=("logits",))


def edit(source: Path, target: Path, change: Callable[[Files], None]) -> Path:
    with zipfile.ZipFile(source) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    change(files)
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return target


def find(files: Files, end: str) -> str:
    return next(name for name in files if name.endswith(end))


def pickle_inputs(files: Files, mark: Path) -> None:
    buffer = io.BytesIO()
    torch.save(Payload(mark), buffer)
    files[find(files, "sample_inputs/model.pt")] = buffer.getvalue()


def pickle_constant(files: Files, mark: Path) -> None:
    name = find(files, "model_constants_config.json")
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True}
    files[name] = json.dumps({"config": {"c": entry | {"tensor_meta": None}}}).encode()
    files[name.replace("model_constants_config.json", "opaque_obj_0")] = pickle.dumps(Payload(mark))


def evaluate_size(files: Files, mark: Path) -> None:
    name = find(files, "models/model.json")
    code = f"__import__('os').mkdir({str(mark)!r})"
    text = files[name].decode()
    start = text.index('"expr_str": ') + len('"expr_str": ')
    end = text.index('"', start + 1) + 1
    files[name] = (text[:start] + json.dumps(code) + text[end:]).encode()


def compiled_code(files: Files, mark: Path) -> None:
    root = next(iter(files)).partition("/")[0]
    files[f"{root}/data/aotinductor/model/model.so"] = str(mark).encode()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (pickle_inputs, "not of tensors alone"),
        (pickle_constant, "not stored as the bytes of a tensor"),
        (evaluate_size, "is not a formula"),
        (compiled_code, "not a part of a program of tensors"),
    ],
)
def test_program_that_runs_code_is_refused(
    program: Path, tmp_path: Path, change: Callable[[Files, Path], None], words: str
) -> None:
    mark = tmp_path / "ran"
    path = edit(program, tmp_path / "model.pt2", lambda files: change(files, mark))
    with pytest.raises(CheckpointError, match=words) as caught:
        Predictor.load(path)
    assert not mark.exists()
    assert "\n" not in str(caught.value)


def drop_inputs(files: Files) -> None:
    files[find(files, "sample_inputs/model.pt")] = b""


@pytest.mark.parametrize("change", [lambda _: None, drop_inputs])
def test_a_program_of_tensors_is_opened(
    program: Path, tmp_path: Path, change: Callable[[Files], None]
) -> None:
    path = edit(program, tmp_path / "model.pt2", change)
    assert Predictor.load(path).model.num_classes == 5
