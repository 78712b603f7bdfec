"""OpenVINO IR: every family within 1e-5 of the model; weights halved only where asked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fixtures.exports import export_tiny
from fixtures.families import FAMILIES, tiny
from vitlib import VitlibError
from vitlib.export import ExportSettings

openvino = pytest.importorskip("openvino", reason="needs pip install 'vitlib[openvino]'")
pytestmark = pytest.mark.export


@pytest.mark.parametrize("family", FAMILIES)
def test_openvino_of_every_family(family: str, tmp_path: Path) -> None:
    outputs = ["logits", "embedding", "tokens"]
    if tiny(family).config.tokens.cls:
        outputs.append("attention")
    report = export_tiny(family, tmp_path, "openvino", ExportSettings(outputs=tuple(outputs)))
    assert {c.output for c in report.comparisons} == set(outputs)
    assert max(c.error for c in report.comparisons) <= 1e-5
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["export.json", "model.bin", "model.xml"]


def test_openvino_file_has_names_dynamic_batch_and_metadata(tmp_path: Path) -> None:
    report = export_tiny("vit", tmp_path / "tiny.xml", "openvino")
    model = openvino.Core().read_model(report.path)
    assert model.input("pixels").partial_shape == openvino.PartialShape([-1, 3, 32, 32])
    assert model.output("logits").partial_shape == openvino.PartialShape([-1, 5])
    info = json.loads(model.get_rt_info(["vitlib"]).value)
    assert info["image_processor"]["size"] == [32, 32]
    verification = json.loads(model.get_rt_info(["vitlib_verification"]).value)
    assert verification == json.loads((tmp_path / "export.json").read_text())


def test_openvino_weights_are_halved_only_for_fp16(tmp_path: Path) -> None:
    whole = export_tiny("vit", tmp_path / "whole", "openvino")
    half = export_tiny("vit", tmp_path / "half", "openvino", ExportSettings(precision="fp16"))
    sizes = [report.path.with_suffix(".bin").stat().st_size for report in (whole, half)]
    assert sizes[1] < 0.55 * sizes[0]
    assert sizes[0] >= 4 * sum(tensor.numel() for tensor in tiny("vit").parameters())
    levels = np.zeros((1, 3, 32, 32), np.uint8)
    assert openvino.Core().compile_model(half.path, "CPU")(levels)["logits"].shape == (1, 5)


def test_openvino_refuses_int8(tmp_path: Path) -> None:
    with pytest.raises(VitlibError, match="expected format onnx"):
        export_tiny("vit", tmp_path, "openvino", ExportSettings(precision="int8"))
    assert not list(tmp_path.iterdir())
