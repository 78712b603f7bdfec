"""ONNX files of every family equal the model, in ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vitlib
from fixtures.families import FAMILIES, RARE, tiny
from vitlib.errors import CheckpointError
from vitlib.export import ExportReport, ExportSettings, export_model, to_onnx, verification
from vitlib.image.processor import ImageProcessor
from vitlib.predict.runtimes import open_file
from vitlib.vit import ViT

pytest.importorskip("onnxscript", reason="ONNX files are written by torch with onnxscript")
onnx = pytest.importorskip("onnx", reason="ONNX files are read with onnx")
pytest.importorskip("onnxruntime", reason="ONNX files are run by ONNX Runtime")
TINY = 2e-6  # sums of 32 products in another order
PROCESSOR = ImageProcessor(size=(32, 32), image_mean=(0.5, 0.4, 0.3), image_std=(0.5, 0.4, 0.6))


def export(model: ViT, out: Path, **choices: Any) -> ExportReport:
    return to_onnx(model, out, image_processor=PROCESSOR, **choices)


def all_outputs(model: ViT) -> list[str]:
    return ["logits", "embedding", "tokens", *(["attention"] if model.config.tokens.cls else [])]


@pytest.mark.export
@pytest.mark.parametrize("kind", ["uint8", "float"])
@pytest.mark.parametrize("family", [*FAMILIES, *RARE])
def test_every_family_is_equal(family: str, kind: Any, tmp_path: Path) -> None:
    model = tiny(family, depth=2)
    outputs = all_outputs(model) if kind == "float" else []
    report = export(model, tmp_path, input=kind, outputs=outputs)
    assert report.ok
    assert {comparison.batch for comparison in report.comparisons} == {1, 2, 5}
    # The logits of one photo may all be small beside those of others.
    assert max(c.error for c in report.comparisons if c.batch > 1) <= TINY


@pytest.mark.export
@pytest.mark.parametrize(
    "family", ["vit", "dinov3", "beit", "beit_timm", "rope_mixed", "aimv2_native"]
)
def test_positions_of_another_size_are_in_the_file(family: str, tmp_path: Path) -> None:
    report = export(tiny(family, depth=2), tmp_path, image_size=(48, 64))
    assert report.image_size == (48, 64)
    assert max(comparison.error for comparison in report.comparisons) <= TINY


def test_file_has_single_operators_labels_and_preprocessing(tmp_path: Path) -> None:
    model = tiny("vit", depth=2, labels=tuple("abcde"), problem_type="multi_label_classification")
    report = export(model, tmp_path / "a.onnx", outputs=["logits", "embedding"])
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.onnx", "a.onnx.json"]
    stored = json.loads((tmp_path / "a.onnx.json").read_text())
    assert stored == report.as_dict()
    proto = onnx.load(tmp_path / "a.onnx")
    counts = [node.op_type for node in proto.graph.node]
    assert counts.count("LayerNormalization") == 5
    assert counts.count("Gelu") == 2
    assert {item.version for item in proto.opset_import if not item.domain} == {20}
    pixels = proto.graph.input[0].type.tensor_type
    assert [size.dim_value for size in pixels.shape.dim] == [0, 3, 32, 32]
    assert pixels.elem_type == onnx.TensorProto.UINT8
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(metadata["vitlib_verification"]) == stored
    info = open_file(tmp_path / "a.onnx").info
    assert info is not None
    assert (info.class_names, info.task) == (tuple("abcde"), "multi_label_classification")
    assert info.make_processor() == PROCESSOR
    assert len(info.weights_sha256) == 64
    onnx.checker.check_model(proto, full_check=True)


def test_gelu_has_the_form_of_the_model(tmp_path: Path) -> None:
    for name, activation in (("erf", "gelu"), ("tanh", "gelu_tanh")):
        export(tiny("vit", activation=activation), tmp_path / name)
        nodes = onnx.load(tmp_path / name / "model.onnx").graph.node
        (gelu,) = [node for node in nodes if node.op_type == "Gelu"]
        forms = [attribute.s for attribute in gelu.attribute if attribute.name == "approximate"]
        assert forms in ([b"tanh"], [] if name == "tanh" else [b"none"]) or not forms
        assert (forms == [b"tanh"]) == (name == "tanh")


def test_file_that_differs_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of other weights than the model's is what the check must find."""
    model, write = tiny("vit"), vitlib.export.export.write_onnx

    def write_other(prepared: Any, folder: Path) -> Path:
        head = prepared.graph.model.head
        weight = head.weight.detach().clone()
        with torch.no_grad():
            head.weight[0, 0] += 1e-3
        path = write(prepared, folder)
        with torch.no_grad():
            head.weight.copy_(weight)
        return path

    monkeypatch.setattr(vitlib.export.export, "write_onnx", write_other)
    with pytest.raises(CheckpointError, match=r"differs from the model: logits .* nothing was"):
        export(model, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    report = export(model, tmp_path / "out", allow_drift=True)
    assert not report.ok
    assert json.loads((tmp_path / "out/export.json").read_text())["verdict"] == "differs"


def test_swapped_channels_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The photos tell the channels apart: levels in the wrong order are a difference."""
    read = verification.read_levels
    monkeypatch.setattr(verification, "read_levels", lambda *args: read(*args).flip(0))
    photos = [np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8) for i in range(5)]
    with pytest.raises(CheckpointError, match="differs from the model"):
        export(tiny("vit"), tmp_path, photos=photos)


def test_bfloat16_weights_become_the_same_numbers(tmp_path: Path) -> None:
    report = export(tiny("vit").bfloat16(), tmp_path)
    assert report.ok


def test_export_takes_a_folder_and_a_predictor(tmp_path: Path) -> None:
    predictor = vitlib.Predictor(tiny("vit"), PROCESSOR)
    predictor.save(tmp_path / "model")
    first = to_onnx(predictor, tmp_path / "a")
    settings = ExportSettings()
    second = export_model(tmp_path / "model", tmp_path / "b", "onnx", settings)
    assert second.source == str(tmp_path / "model")
    assert first.source == ""
