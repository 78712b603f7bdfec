"""Programs of torch.export: they answer like the model, in a process without vitlib."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fixtures.exports import export_tiny
from fixtures.families import FAMILIES, tiny
from vitlib import VitlibError
from vitlib.export import ExportSettings
from vitlib.predict.runtimes import open_file

FAST = ("vit", "dinov3", "beit")

ALONE = """
import sys
sys.modules["vitlib"] = None  # an import of it raises
import numpy as np, torch
extra = {"vitlib": "", "vitlib_verification": ""}
program = torch.export.load(sys.argv[1], extra_files=extra).module()
levels = torch.from_numpy(np.load(sys.argv[2]))
with torch.inference_mode():
    np.savez(sys.argv[3], *(result.numpy() for result in program(levels)))
assert not any(name.startswith("vitlib.") for name in sys.modules)
print(extra["vitlib"])
print(extra["vitlib_verification"].replace("\\n", " "))
"""


@pytest.mark.parametrize("family", FAST)
def test_pt2_answers_like_model_at_any_batch(family: str, tmp_path: Path) -> None:
    report = export_tiny(family, tmp_path, "pt2")
    assert report.ok
    assert {c.batch for c in report.comparisons} == {1, 2, 5}
    assert max(c.error for c in report.comparisons) <= 2e-6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export.json", "model.pt2"]


@pytest.mark.export
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(FAST)))
def test_pt2_of_every_family(family: str, tmp_path: Path) -> None:
    report = export_tiny(family, tmp_path, "pt2")
    assert max(c.error for c in report.comparisons) <= 2e-6


def test_pt2_loads_without_vitlib(tmp_path: Path) -> None:
    report = export_tiny("vit", tmp_path, "pt2")
    levels = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    np.save(tmp_path / "levels.npy", levels)
    command = [sys.executable, "-c", ALONE, "model.pt2", "levels.npy", "results.npz"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    info, verification = map(json.loads, done.stdout.splitlines()[-2:])
    assert (info["version"], info["outputs"]) == (report.versions["vitlib"], ["logits"])
    assert verification["verdict"] == "equal"
    assert verification == json.loads((tmp_path / "export.json").read_text())
    logits = np.load(tmp_path / "results.npz")["arr_0"]
    pixels = (torch.from_numpy(levels).float() / 255 - 0.5) / 0.5
    with torch.inference_mode():
        wanted = tiny("vit")(pixels).numpy()
    assert abs(logits - wanted).max() <= 2e-6 * abs(wanted).max()


def test_pt2_holds_no_path_of_this_machine(tmp_path: Path) -> None:
    export_tiny("vit", tmp_path, "pt2")
    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
        texts = [archive.read(name) for name in archive.namelist() if "weight_" not in name]
    assert not any(str(Path(__file__).parents[2]).encode() in text for text in texts)


def test_pt2_takes_float_pixels(tmp_path: Path) -> None:
    report = export_tiny("vit", tmp_path, "pt2", ExportSettings(input="float"))
    runtime = open_file(report.path)
    assert runtime.input_dtype == "float32"
    pixels = np.random.default_rng(0).standard_normal((1, 3, 32, 32), dtype=np.float32)
    with torch.inference_mode():
        wanted = tiny("vit")(torch.from_numpy(pixels)).numpy()
    assert abs(runtime.run(pixels)["logits"] - wanted).max() <= 2e-6 * abs(wanted).max()


def test_pt2_refuses_other_precisions(tmp_path: Path) -> None:
    with pytest.raises(VitlibError, match="computes in fp32: expected precision='fp32'"):
        export_tiny("vit", tmp_path, "pt2", ExportSettings(precision="fp16"))
    assert not list(tmp_path.iterdir())


def test_pt2_with_machine_code_is_not_opened(tmp_path: Path) -> None:
    report = export_tiny("vit", tmp_path, "pt2")
    with zipfile.ZipFile(report.path, "a") as archive:
        archive.writestr("model/data/aotinductor/model/code.wrapper.so", b"")
    with pytest.raises(VitlibError, match="not a part of a program of tensors"):
        open_file(report.path)


def test_damaged_pt2_gets_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(b"PK and nothing more")
    with pytest.raises(VitlibError, match=r"torch\.export cannot open it") as caught:
        open_file(tmp_path / "model.pt2")
    assert "\n" not in str(caught.value)
