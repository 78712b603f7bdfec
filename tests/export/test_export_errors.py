"""Exports that cannot be: one line each, and nothing written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vitlib
from fixtures.families import tiny
from vitlib.cli import export as verb
from vitlib.errors import ConfigError, SourceError, VitlibError
from vitlib.export import ExportSettings, to_onnx, to_pt2, verification
from vitlib.export.export import FORMATS
from vitlib.export.graph import OUTPUTS
from vitlib.export.prepare import PRECISIONS, prepare
from vitlib.image.processor import ImageProcessor
from vitlib.system.hashing import hash_tensors

PROCESSOR = ImageProcessor(size=(32, 32))


def refuse(message: str, model: vitlib.ViT, out: Path, **choices: Any) -> None:
    processor = choices.pop("image_processor", PROCESSOR)
    with pytest.raises(VitlibError, match=message) as error:
        to_pt2(model, out, image_processor=processor, **choices)
    assert "\n" not in str(error.value)
    assert not out.exists() or list(out.iterdir()) == []


def test_copies_of_values_in_the_command_line_are_equal() -> None:
    assert (verb.FORMATS, verb.OUTPUTS, verb.PRECISIONS) == (FORMATS, OUTPUTS, PRECISIONS)


@pytest.mark.parametrize(
    ("family", "choices", "message"),
    [
        ("vit", {"outputs": ["logit"]}, "output 'logit': expected one of logits, embedding"),
        ("vit", {"outputs": ["logits", "logits"]}, "expected each name once"),
        ("siglip_map", {"outputs": "attention"}, "no class token whose attention"),
        ("vit", {"image_size": 33}, "33x33 is not whole patches of 8x8: .* such as 32x32"),
        ("vit", {"image_size": 4}, "is not whole patches of 8x8: .* such as 8x8"),
        ("vit", {"image_processor": ImageProcessor(size=None)}, r"state one with image_size="),
        (
            "vit",
            {"image_processor": ImageProcessor(size=(32, 32), float_resize=True), "input": "uint8"},
            r"no 8-bit levels to take: expected input='float'",
        ),
        ("vit", {"photos": ["a.png"]}, "1 photos to compare with: expected at least 5"),
    ],
)
def test_choices_that_do_not_fit_are_one_line(
    family: str, choices: dict[str, Any], message: str, tmp_path: Path
) -> None:
    refuse(message, tiny(family), tmp_path / "out", **choices)


def test_model_without_a_head_has_no_logits(tmp_path: Path) -> None:
    refuse("this model has no head", tiny("vit", num_classes=0), tmp_path / "o", outputs="logits")


def test_parts_of_the_users_own_are_refused(tmp_path: Path) -> None:
    model = tiny("vit")
    model.blocks[0].norm1 = nn.BatchNorm1d(17)
    refuse("parts of your own", model, tmp_path / "out")
    model = tiny("vit")
    model.blocks[0].register_forward_hook(lambda *_: None)
    refuse("parts of your own", model, tmp_path / "out")


def test_optimized_model_is_refused(tmp_path: Path) -> None:
    fast = vitlib.optimize(tiny("vit"))
    with pytest.raises(ConfigError, match="optimized for one machine"):
        to_pt2(vitlib.Predictor(fast, PROCESSOR), tmp_path / "out")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["model.pt2", "export.json"])
def test_target_that_exists_is_kept(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(SourceError, match=f"{name} exists: name another folder"):
        to_pt2(tiny("vit"), tmp_path, image_processor=PROCESSOR)
    assert (tmp_path / name).read_text() == "mine"


def test_files_of_one_folder_have_reports_of_their_own(tmp_path: Path) -> None:
    model = tiny("vit")
    to_pt2(model, tmp_path / "a.pt2", image_processor=PROCESSOR)
    to_pt2(model, tmp_path / "b.pt2", image_processor=PROCESSOR)
    names = ["a.pt2", "a.pt2.json", "b.pt2", "b.pt2.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert json.loads((tmp_path / "a.pt2.json").read_text())["file"] == "a.pt2"
    with pytest.raises(SourceError, match=r"a\.pt2 exists: name another file, or delete it"):
        to_pt2(model, tmp_path / "a.pt2", image_processor=PROCESSOR)


def test_suffix_of_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a name that ends in \.pt2"):
        to_pt2(tiny("vit"), tmp_path / "a.onnx", image_processor=PROCESSOR)


def test_missing_library_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"pip install 'vitlib\[export\]'"):
        to_onnx(tiny("vit"), tmp_path / "out", image_processor=PROCESSOR)


def test_opset_out_of_range_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="ONNX files are written with onnxscript")
    with pytest.raises(ConfigError, match="opset=17: expected 20 to 23"):
        to_onnx(tiny("vit"), tmp_path / "out", opset=17, image_processor=PROCESSOR)


def test_rounding_is_the_distance_from_float64() -> None:
    prepared = prepare(tiny("vit"), PROCESSOR, ExportSettings(outputs=("tokens",)))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    output = prepared.compute_reference(images)["tokens"]
    rounding = verification._measure_rounding(prepared, "tokens", images, output)
    assert 0 < rounding < 1e-6
    worse = verification._measure_rounding(prepared, "tokens", images, output.bfloat16())
    assert worse > 1e-3


def test_hash_depends_on_values_names_and_dtypes() -> None:
    tensor = torch.arange(4.0)
    first = hash_tensors({"a": tensor})
    assert first == hash_tensors({"a": tensor.clone()})
    assert len({first, hash_tensors({"b": tensor}), hash_tensors({"a": tensor + 1})}) == 3
    assert hash_tensors({"a": tensor.bfloat16()}) != first
