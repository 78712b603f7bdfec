"""The recipes of docs/export.md run on written files, and give the model's numbers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fixtures.families import tiny
from fixtures.server import SAMPLES
from paths import ROOT
from vitlib import ImageProcessor, Predictor
from vitlib.export import ExportSettings, export_model

PAGE = (ROOT / "docs/export.md").read_text(encoding="utf-8")
PHOTO = SAMPLES[3]
CROPPED = ImageProcessor(shortest_edge=37, crop_size=(32, 32), resample=3,
                         image_mean=(0.5,) * 3, image_std=(0.5,) * 3)  # fmt: skip


def get_block(title: str, language: str = "python") -> str:
    """Return the first code block of a section."""
    section = PAGE.split(f"### {title}\n")[1].split("\n### ")[0]
    match = re.search(rf"```{language}\n(.*?)```", section, flags=re.DOTALL)
    assert match is not None
    return match[1]


def run_alone(code: str, folder: Path, *forbidden: str) -> Any:
    """Run a recipe in a process without some modules; return its logits and what it prints."""
    shutil.copy(PHOTO, folder / "photo.png")
    head = f"import sys\nfor name in {forbidden!r}:\n    sys.modules[name] = None\n"
    tail = '\nnp.save("logits.npy", np.asarray(logits))\n'
    done = subprocess.run(
        [sys.executable, "-c", head + code + tail], cwd=folder, capture_output=True, text=True,
        check=True, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    return np.load(folder / "logits.npy"), done.stdout.strip()


def compute_logits(predictor: Predictor) -> np.ndarray:
    """Compute the model's logits of the photo."""
    with torch.inference_mode():
        pixels = predictor.image_processor(PHOTO)
        return np.asarray(predictor.model(pixels))


def check(result: np.ndarray, predictor: Predictor, bound: float = 5e-6) -> None:
    wanted = compute_logits(predictor)
    assert result.shape == wanted.shape
    assert abs(result - wanted).max() <= bound * abs(wanted).max()


@pytest.fixture(params=["squash", "crop"])
def predictor(request: pytest.FixtureRequest) -> Predictor:
    """The small model of the package, and a model whose photos are cropped."""
    if request.param == "squash":
        return Predictor.load("demo")
    labels = ("a", "b", "c", "d", "e")
    return Predictor(tiny("vit", labels=labels), CROPPED)


def test_torch_recipe(tmp_path: Path) -> None:
    predictor = Predictor.load("demo")
    export_model(predictor, tmp_path, "pt2", ExportSettings())
    logits, label = run_alone(get_block("torch alone"), tmp_path, "vitlib", "onnxruntime")
    check(logits, predictor)
    assert label == predictor.classify(PHOTO)[0][0].label


@pytest.mark.export
def test_onnxruntime_recipe(predictor: Predictor, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs pip install 'vitlib[export]'")
    code = get_block("ONNX Runtime in Python")
    assert len([line for line in code.splitlines() if line and " import " not in line]) <= 12
    export_model(predictor, tmp_path, "onnx", ExportSettings())
    logits, label = run_alone(code, tmp_path, "vitlib", "torch")
    check(logits, predictor)
    assert label == predictor.classify(PHOTO)[0][0].label


@pytest.mark.export
def test_openvino_recipe(predictor: Predictor, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="needs pip install 'vitlib[openvino]'")
    export_model(predictor, tmp_path, "openvino", ExportSettings())
    logits, label = run_alone(get_block("OpenVINO in Python"), tmp_path, "vitlib", "torch")
    check(logits, predictor, 1e-5)
    assert label == predictor.classify(PHOTO)[0][0].label


@pytest.mark.export
def test_javascript_recipe(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs pip install 'vitlib[export]'")
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("needs npm")
    install = [npm, "install", "--silent", "--no-fund", "--no-audit", "onnxruntime-node",
               "--onnxruntime-node-install-cuda=skip"]  # fmt: skip
    if subprocess.run(install, cwd=tmp_path, timeout=300).returncode:
        pytest.skip("npm cannot install onnxruntime-node")
    predictor = Predictor.load("demo")
    export_model(predictor, tmp_path, "onnx", ExportSettings())
    levels = predictor.image_processor.to_uint8_or_float(PHOTO).permute(1, 2, 0).contiguous()
    (tmp_path / "levels.rgb").write_bytes(levels.numpy().tobytes())
    (tmp_path / "recipe.js").write_text(get_block("JavaScript", "javascript"))
    done = subprocess.run(["node", "recipe.js"], cwd=tmp_path, capture_output=True, text=True,
                          check=True)  # fmt: skip
    check(np.array(json.loads(done.stdout))[None], predictor)


@pytest.mark.export
def test_triton_config_fits_the_file(deit_tiny: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs pip install 'vitlib[export]'")
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2",
                                 reason="needs pip install 'tritonclient[grpc]'")  # fmt: skip
    from google.protobuf import text_format

    config = text_format.Parse(get_block("Triton", "protobuf"), schema.ModelConfig())
    export_model(str(deit_tiny), tmp_path, "onnx", ExportSettings())
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (pixels,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (config.input[0].name, config.output[0].name) == (pixels.name, logits.name)
    assert (pixels.type, logits.type) == ("tensor(uint8)", "tensor(float)")
    assert (config.input[0].data_type, config.output[0].data_type) == (
        schema.TYPE_UINT8, schema.TYPE_FP32,
    )  # fmt: skip
    assert list(config.input[0].dims) == pixels.shape[1:]
    assert list(config.output[0].dims) == logits.shape[1:]
    assert not isinstance(pixels.shape[0], int)
    assert config.max_batch_size >= 5
